"""Training with derivatives pushed along: G of them, for any number of outputs.

A step (θ, moments, statistics) -> (θ, moments, statistics) is differentiated forward along G tangents of its
state, its weights and its hyperparameters at once. No state is kept, so memory does not grow with the steps,
and the cost, about 1 + 2 G trainings, does not grow with the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from attribution_core.adjoint import with_hyper
from attribution_core.gradients import Progress, forward_mode
from attribution_core.problem import Outputs, Params, batches, take
from attribution_core.processes import sum_over_processes
from attribution_core.replay import check
from attribution_core.steps import Steps, TrainingState


@dataclass(frozen=True, eq=False)
class Tangents:
    """G directions in the arguments of a training: weights [G, n] and hyperparameters name -> [G]."""

    weights: NDArray[np.float64] | None
    hyper: dict[str, NDArray[np.float64]]
    at: dict[str, float]  # the hyperparameters' values

    def __len__(self) -> int:
        first = self.weights if self.weights is not None else next(iter(self.hyper.values()))
        return len(first)


def push(
    steps: Steps,
    along: Tangents,
    digests: NDArray[np.int64] | None = None,
    since: int = 0,
    progress: Progress = iter,
    noted: Callable[[int, Params], None] = lambda step, tangents: None,
) -> tuple[TrainingState, TrainingState]:
    """(the last state, its G tangents, every tensor with a leading G).

    Args:
        digests: of the run's states; every state is compared with its own.
        since: the first step at which the arguments are moved.
        noted: called after every step with its number and the tangents of the parameters.
    """
    state = steps.start()
    count = len(along)

    def zeros(value: Tensor) -> Tensor:
        floating = value.dtype if value.is_floating_point() else torch.float32
        return torch.zeros((count, *value.shape), dtype=floating, device=value.device)

    tangents = tree_map(zeros, _parts(state))
    for step in progress(range(len(steps))):
        if step >= since:
            tangents = _moved(steps, state, step, tangents, along)
        state, _ = steps.step(state, step)
        check(state, step + 1, digests)
        noted(step, tangents[0])
    return state, TrainingState(*tangents)


def output_tangents(
    model: torch.nn.Module,
    params: Params,
    tangents: Params,
    outputs: Outputs,
    batch_size: int = 64,
) -> Tensor:
    """The outputs' derivatives along G tangents of the parameters and buffers, [G, t], float64."""
    found = []
    device = next(iter(params.values())).device
    for rows in batches(len(outputs.data), batch_size):
        batch = take(outputs.data, rows, device)
        found.append(forward_mode(model, outputs.function, params, tangents, batch).double().cpu())
    values = torch.cat(found)
    return (values if outputs.matrix is None else outputs.matrix.T @ values).T


def _parts(state: TrainingState) -> tuple[Params, dict[str, Params], Params]:
    floating = {k: v for k, v in state.buffers.items() if v.is_floating_point()}
    return state.params, state.moments, floating


def _moved(steps: Steps, state: TrainingState, step: int, tangents: Any, along: Tangents) -> Any:
    """The tangents after a step."""
    parts = [(k, rows, steps.batch(step, rows)) for k, rows in enumerate(steps.parts(step))]
    like = next(iter(state.params.values()))
    weights = [torch.from_numpy(steps.weights_at(step, rows)).to(like) for _, rows, _ in parts]
    names = list(along.hyper)
    hyper = {name: torch.tensor(along.at[name], dtype=torch.float64) for name in names}
    size = len(steps.order[step])
    fixed = {k: v for k, v in state.buffers.items() if not v.is_floating_point()}

    def gradient(params: Params, ws: list[Tensor], buffers: Params) -> tuple[Params, Params]:
        total = tree_map(torch.zeros_like, params)
        for (k, _, batch), w in zip(parts, ws, strict=True):

            def loss(
                params: Params, w: Tensor, buffers: Params, batch: Any = batch, k: int = k
            ) -> Any:
                losses, after = steps.losses(params, {**fixed, **buffers}, batch, step, k)
                return (losses * w.to(losses)).sum() / size, after

            found, buffers = grad(loss, has_aux=True)(params, w, buffers)
            total = {name: total[name] + found[name] for name in total}
        return total, {k: v for k, v in buffers.items() if v.is_floating_point()}

    def whole(params: Params, moments: Any, grads: Params, hyper: Any) -> Any:
        return steps.update(params, moments, grads, step, with_hyper(steps, hyper))

    ws = [
        torch.zeros(len(along), len(rows)).to(like)
        if along.weights is None
        else torch.from_numpy(along.weights[:, rows]).to(like)
        for _, rows, _ in parts
    ]
    turned = {name: torch.from_numpy(along.hyper[name]) for name in names}
    params, moments, buffers = tangents
    _, _, own_buffers = _parts(state)

    def slope(v: Params, w: Any, b: Params) -> Any:
        return jvp(gradient, (state.params, weights, own_buffers), (v, w, b))

    (grads, _), (slopes, buffers) = _over(slope, (params, ws, buffers), first_is_shared=True)
    if steps.shards > 1:
        slopes = {k: sum_over_processes(v) for k, v in slopes.items()}
        grads = {k: sum_over_processes(v) for k, v in grads.items()}

    def updated(v: Params, m: Any, g: Params, h: Any) -> Any:
        primals = (state.params, state.moments, grads, hyper)
        return jvp(whole, primals, (v, m, g, h))[1]

    new, new_moments = _over(updated, (params, moments, slopes, turned))
    return new, new_moments, buffers


def _over(one: Any, tangents: Any, first_is_shared: bool = False) -> Any:
    """one(...) for each of the leading G, stacked; by vmap, or one by one where vmap has no rule."""

    def single(*args: Any) -> Any:
        return one(*args)

    def shared(found: Any) -> Any:
        """Primal values do not differ along G; the first stands for all."""
        primal, moved = found
        return tree_map(lambda x: x[0], primal), moved

    try:
        found = vmap(single, randomness="same")(*tangents)
    except RuntimeError as error:
        if "vmap" not in str(error) and "batching" not in str(error):
            raise
        count = len(next(iter(tangents[0].values())))
        rows = [one(*tree_map(lambda x, g=g: x[g], tangents)) for g in range(count)]
        found = tree_map(lambda *parts: torch.stack(parts), *rows)
    return shared(found) if first_is_shared else found
