"""Leaving one example out: the influence function with each example's own leverage corrected."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from attribution_core.data import Progress, batches
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.gradients import output_gradients
from attribution_core.layerwise.vectors import flatten
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import collect, failing_together, my_rows, sum_over_processes
from attribution_core.second_order.quadratic import (
    ALONE,
    Quadratic,
    factored,
    rows_at_once,
    second_order,
    solved,
    standing,
)
from attribution_core.stepwise.trained import several
from attribution_core.training import Run


def leave_one_out(
    source: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    damping: float | Tensor | None = None,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Leave-one-out datamodel: scores_i = −(1/(α n)) A H⁻¹ J_iᵀ (I − w_i D_i B_i)⁻¹ r_i.

    B_i = (1/n) J_i H⁻¹ J_iᵀ is what example i sees of the curvature, and the leverage h_i the largest
    eigenvalue of w_i D_i B_i: with one output the factor is 1/(1 − h_i). Setting weight i from the anchor
    to 0 is thereby predicted with one Newton step of the objective without it: exactly, for least
    squares and outputs that are linear in the parameters. Scores of an example of weight 0 are its
    influence.

    Args:
        source, weights, exposure: see `influence`.
        damping: added to the curvature beside the weight decay, one number or [p]. None: 0 for a
            problem, `Run.damping` for a run.
        progress: wraps the loop over training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight, such that a whole example's weight moves
        outputs right; for several examples at once `newton` is nearer. Largest leverage in `.meta`.

    Raises:
        ValueError: a leverage of 1: without that example nothing determines the parameters (names the
            rows); a curvature that is not positive definite; more than 6,000 parameters; a loss that
            does not call the model exactly once.

    Source: Pregibon 1981; Rad & Maleki 2020; as a datamodel Rubinstein & Hopkins 2025 ("rescaled").

    >>> from attribution_core import squared_error           # a mean: one parameter, always shown a 1
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> x, y = torch.ones(3, 1).double(), torch.tensor([[0.0], [3.0], [6.0]]).double()
    >>> mean = Outputs(lambda model, batch: model(batch[0])[:, 0], (x[:1],))
    >>> f = leave_one_out(Problem(model, squared_error, (x, y)), mean)
    >>> [round(float(f.without([i])[0]), 6) for i in range(3)]
    [4.5, 3.0, 1.5]
    """
    runs = several(source, weights, exposure)
    if runs is not None:
        each = [leave_one_out(run, outputs, damping=damping, progress=progress) for run in runs]
        return average(each)
    assert isinstance(source, (Problem, Run))
    at, added = standing(source, damping, weights, exposure)
    problem, params = at.problem, at.problem.params
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN
    w = torch.from_numpy(at.weights)
    mine = my_rows(np.arange(problem.n))
    blocks = list(batches(mine, rows_at_once(problem)))

    h = torch.zeros(len(added), len(added), dtype=torch.float64)
    with failing_together():
        for rows in progress(blocks):
            h += second_order(problem, params, rows).gram(w[rows])
    h = sum_over_processes(h) / at.drawn
    solve = partial(solved, factored(h + torch.diag(problem.decay + added)))
    directions = -at.unit * solve(flatten(output_gradients(problem.model, outputs)).double().cpu())

    scores, leverages = [torch.zeros(0, len(outputs)).double()], [torch.zeros(0).double()]
    with failing_together():
        for rows in progress(blocks):
            part = second_order(problem, params, rows)
            b = part.x @ solve(part.x.flatten(0, 1)).reshape(part.x.shape).mT / at.drawn
            alone, leverage = _without_itself(part, b, w[rows])
            scores.append(torch.einsum("bcp,bc,tp->bt", part.x, alone, directions))
            leverages.append(leverage)
    leverage = collect(torch.cat(leverages)[:, None])[:, 0]
    _refuse_alone(leverage)
    meta = {
        "method": "leave_one_out",
        "curvature": "gauss_newton",
        "damping": float(added.mean()),
        "weight_decay": float(problem.decay.mean()),
        "exposure": at.exposure,
        "leverage": float(leverage.max()),
    }
    return LinearDatamodel(
        collect(torch.cat(scores)).numpy(), base, at.anchor, targets=outputs.targets, meta=meta
    )


def _without_itself(part: Quadratic, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(I − w D B)⁻¹ r of every row, [b, c], and its leverage, [b].

    Negative curvature only lowers a leverage; it is left out of it, which errs to the safe side.
    """
    bend = w[:, None] * part.curve
    root = bend.clamp(min=0).sqrt()
    leverage = torch.linalg.eigvalsh(root[:, :, None] * b * root[:, None, :])[:, -1]
    system = torch.eye(b.shape[1], dtype=torch.float64) - bend[:, :, None] * b
    system[leverage >= ALONE] = torch.eye(b.shape[1], dtype=torch.float64)  # refused by the caller
    return torch.linalg.solve(system, part.slope), leverage


def _refuse_alone(leverage: Tensor) -> None:
    bad = torch.nonzero(leverage >= ALONE)[:, 0].tolist()
    if bad:
        raise ValueError(
            f"expected leverages below 1, got {float(leverage.max()):.7f} in {len(bad)} rows, first "
            f"{bad[:10]}: without such an example nothing determines some direction of the "
            "parameters; give a weight decay or a damping"
        )
