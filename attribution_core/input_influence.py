"""How a trained model's outputs move with the inputs of training rows: the influence hypergradient, and a baseline.

`magic(run, outputs, wrt="inputs", rows=...)` has the exact derivative through training. Here stand its two cheaper
relatives: one curvature solve at the trained model, and the alignment of gradients, which asks for no curvature.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core.calling import Params, call
from attribution_core.curvature import Curvature, Kind
from attribution_core.data import (
    Column,
    batches,
    floating_column,
    numbers_of,
    replaced,
    row_numbers,
    sample,
    take,
)
from attribution_core.datamodel import LinearDatamodel
from attribution_core.gradients import output_gradients
from attribution_core.influence import fitted_curvature
from attribution_core.layerwise.vectors import flatten, unflatten
from attribution_core.problem import Outputs, Problem
from attribution_core.stepwise.trained import trained
from attribution_core.training import Run


@torch.enable_grad()  # whatever the caller is in
def input_influence(
    source: Problem | Run,
    outputs: Outputs,
    *,
    rows: ArrayLike,
    column: Column | None = None,
    curvature: Kind | Literal["auto"] | Curvature = "auto",
    damping: float | Tensor | None = None,
    curvature_rows: int | None = None,
    batch_size: int = 256,
) -> LinearDatamodel:
    """Influence datamodel by the inputs of training rows: scores = −(w_i/n) ∂/∂x_i ⟨∇_θ ℓ_i(θ), (H + λ)⁻¹ a_j⟩.

    Exact, for infinitesimal changes, at the optimum of a strongly convex problem with the exact Hessian.

    Args:
        source: a problem whose model is trained, or a run.
        rows: training rows, [k]; column: of their inputs, by default the first floating one.
        curvature, damping, curvature_rows: as of `influence`.

    Returns:
        scores [k · numbers, t], output units per unit of input; anchor: the inputs; ids: row · numbers + place;
        meta["shape"] [k, ...]. The same layout as `magic(wrt="inputs")`.

    Raises:
        ValueError: rows that do not exist, or twice; no floating column; see `fit_curvature`.

    Source: Koh & Liang 2017, eq. 5 (I_pert,loss).
    """
    at = trained(source)
    problem = at.problem
    name, places = _asked(problem, rows, column)
    some = sample(problem.n, curvature_rows)
    fitted = fitted_curvature(
        source, at, outputs, curvature, damping, rows=some, labels="model", refine=0
    )
    targets = flatten(output_gradients(problem.model, outputs)).double().cpu()
    directions = unflatten((fitted.solve(targets) / -at.drawn), problem.params)
    parts = []
    for chosen in batches(places, batch_size):
        w = torch.from_numpy(at.weights[chosen]).to(problem.device)
        parts.append(_along(problem, chosen, name, directions, w))
    meta = {"method": "input_influence", "damping": fitted.damping, **fitted.meta}
    base = outputs.evaluate(problem.model).numpy()
    names = outputs.targets
    return _by_inputs(problem, places, name, torch.cat(parts), base, names, meta)


@torch.enable_grad()  # whatever the caller is in
def gradient_matching(
    source: Problem | Run, goal: Outputs, *, rows: ArrayLike, column: Column | None = None
) -> LinearDatamodel:
    """cos(−∇ goal, Σ_i ∇ℓ_i): whether training on some rows does what the adversary wants, and its slope.

    The baseline of data poisoning: rows whose gradient points where descent would raise the goal. It looks at one
    model and no curvature. The output is a cosine, not a prediction of the goal.

    Args:
        goal: one output, which the adversary wants large: descending along −∇ goal raises it.
        rows, column: as of `input_influence`.

    Returns:
        scores [k · numbers, 1] of the one output "alignment".

    Raises:
        ValueError: several goals; rows that do not exist; no floating column.

    Source: Geiping et al. 2021 (Witches' Brew), eq. 3, for untargeted goals Fowl et al. 2021.
    """
    if len(goal) != 1:
        raise ValueError(f"expected one goal, got {len(goal)} outputs; pass goal.mean()")
    problem = trained(source).problem
    name, places = _asked(problem, rows, column)
    wanted = -flatten(output_gradients(problem.model, goal))[0]
    x, grads = _traced(problem, places, name, torch.ones(len(places)))
    joint = torch.cat([g.flatten() for g in grads.values()])
    cosine = torch.nn.functional.cosine_similarity(joint, wanted.to(joint), dim=0)
    (slope,) = torch.autograd.grad(cosine, x)
    scores = slope.flatten(1).double().cpu()[:, :, None]
    meta = {"method": "gradient_matching"}
    base = np.array([float(cosine.detach())])
    return _by_inputs(problem, places, name, scores, base, np.array(["alignment"]), meta)


def _asked(
    problem: Problem, rows: ArrayLike, column: Column | None
) -> tuple[Column, NDArray[np.intp]]:
    """The column and the rows, checked."""
    places = row_numbers(rows, problem.n, once=True)
    if not len(places):
        raise ValueError(f"expected different rows of 0 to {problem.n - 1}, got none")
    return floating_column(problem.train, column), places


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def _traced(
    problem: Problem, rows: NDArray[np.intp], column: Column, w: Tensor
) -> tuple[Tensor, Params]:
    """(inputs x of the rows, the gradient of Σ w_i ℓ_i by name with the graph that leads back to x)."""
    batch: Any = take(problem.train, rows, problem.device)
    x = batch[column].clone().requires_grad_()
    leaf = {key: value.clone().requires_grad_() for key, value in problem.params.items()}
    losses = call(problem.model, problem.loss, leaf, replaced(batch, column, x))
    found = torch.autograd.grad(
        (losses * w.to(losses)).sum(),
        list(leaf.values()),
        create_graph=True,
        materialize_grads=True,
    )
    return x, dict(zip(leaf, found, strict=True))


def _along(
    problem: Problem, rows: NDArray[np.intp], column: Column, directions: Params, w: Tensor
) -> Tensor:
    """∂/∂x_i w_i ⟨∇ℓ_i, v_j⟩, [rows, numbers, t]: forward along v, back to the inputs."""
    x, grads = _traced(problem, rows, column, w)
    found = []
    for j in range(len(next(iter(directions.values())))):
        along = torch.stack(
            [(g * directions[key][j].to(g)).sum() for key, g in grads.items()]
        ).sum()
        (slope,) = torch.autograd.grad(along, x, retain_graph=True, materialize_grads=True)
        found.append(slope.flatten(1).double().cpu())
    return torch.stack(found, dim=2)


def _by_inputs(
    problem: Problem,
    rows: NDArray[np.intp],
    column: Column,
    scores: Tensor,
    base: NDArray[Any],
    targets: NDArray[Any] | None,
    meta: dict[str, Any],
) -> LinearDatamodel:
    """The layout of `magic(wrt="inputs")`."""
    ids, anchor, shape = numbers_of(problem.train, rows, column)
    meta = {**meta, "wrt": "inputs", "shape": shape}
    flat = scores.reshape(len(ids), -1).numpy()
    return LinearDatamodel(flat, base, anchor, ids=ids, targets=targets, meta=meta)
