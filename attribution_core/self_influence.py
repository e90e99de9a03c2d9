"""How much each training row's weight moves its own loss: large for rows that the others do not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.curvature import Curvature, Kind
from attribution_core.data import Progress, batches, sample, take
from attribution_core.gradients import row_gradients
from attribution_core.influence import fitted_curvature
from attribution_core.layerwise.vectors import flatten, size_of
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import collect, failing_together, my_rows
from attribution_core.stepwise.trained import several, trained
from attribution_core.training import Run

HELD = 2**26  # numbers of row gradients at a time


def self_influence(
    source: Problem | Run | Sequence[Run],
    *,
    curvature: Kind | Literal["auto"] | Curvature = "auto",
    damping: float | Tensor | None = None,
    weights: ArrayLike | None = None,
    curvature_rows: int | None = None,
    batch_size: int = 256,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """−∂ loss_i / ∂ weight_i = (1/(α n)) ∇ℓ_iᵀ (H + weight_decay + damping)⁻¹ ∇ℓ_i, [n], nats.

    The diagonal of `influence(source, Outputs(problem.loss, problem.train))`, without the rest of it. Never
    negative; large where a row pulls the model alone: rare rows, wrong labels.

    Args:
        source: as of `influence`; several runs are averaged.
        curvature, damping, weights, curvature_rows: as of `influence`.
        batch_size: rows whose gradients are held at a time, fewer for large models.

    Raises:
        ValueError: see `influence`.

    Source: Koh & Liang 2017, sec. 5.4; Feldman & Zhang 2020 for memorisation.

    >>> from attribution_core import squared_error           # a mean of 0, 0, 3: slope 2 alone against −1
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(3, 1).double(), torch.tensor([[0.0], [0.0], [3.0]]).double()
    >>> self_influence(Problem(model, squared_error, (x, y)), damping=0.0).round(3).tolist()
    [0.333, 0.333, 1.333]
    """
    runs = several(source, weights)
    if runs is not None:
        return np.mean(
            [
                self_influence(
                    run, curvature=curvature, damping=damping, curvature_rows=curvature_rows,
                    batch_size=batch_size, progress=progress,
                )
                for run in runs
            ],
            axis=0,
        )  # fmt: skip
    assert isinstance(source, (Problem, Run))
    at = trained(source, weights)
    problem, params = at.problem, at.problem.params
    own = Outputs(problem.loss, problem.train)
    some = sample(problem.n, curvature_rows)
    fitted = fitted_curvature(
        source, at, own, curvature, damping, rows=some, labels="model", refine=0
    )
    size = max(1, min(batch_size, HELD // size_of(params)))
    parts: list[Any] = [torch.zeros(0, 1, dtype=torch.float64)]
    with failing_together():
        for rows in progress(list(batches(my_rows(np.arange(problem.n)), size))):
            batch = take(problem.train, rows, problem.device)
            g = flatten(row_gradients(problem.model, problem.loss, params, batch)).double().cpu()
            parts.append((g * fitted.solve(g)).sum(1, keepdim=True) * at.unit)
    return collect(torch.cat(parts))[:, 0].numpy()
