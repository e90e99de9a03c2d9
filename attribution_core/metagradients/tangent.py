"""Training with derivatives pushed along: G of them, for any number of outputs.

A step (θ, moments, statistics) -> (θ, moments, statistics) is differentiated forward along G tangents of its
state, its weights and its hyperparameters at once. No state is kept, so memory does not grow with the steps,
and the cost, about 1 + 2 G trainings, does not grow with the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from attribution_core.calling import Params
from attribution_core.data import Progress, batches, take
from attribution_core.gradients import forward_mode, refuse_steps
from attribution_core.metagradients.adjoint import Part, Wanted, with_hyper
from attribution_core.problem import Outputs
from attribution_core.processes import sum_all
from attribution_core.safeguards.soundness import refuse_mixed_outputs
from attribution_core.stepwise.replay import check, refuse_another_end
from attribution_core.stepwise.steps import Steps, TrainingState

if TYPE_CHECKING:
    from attribution_core.training import Run


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
) -> tuple[TrainingState, TrainingState]:
    """(the last state, its G tangents, every tensor with a leading G).

    Args:
        digests: of the run's states; every state is compared with its own.
        since: the first step at which the arguments are moved.
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


def pushed_outputs(
    run: Run,
    outputs: Outputs,
    along: Tangents,
    since: int | None = None,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """Derivatives of a run's outputs along G directions of its weights and hyperparameters, [G, t]."""
    refuse_mixed_outputs(run.model, outputs)
    refuse_steps(run.model, outputs)
    start = run.since if since is None else since
    steps = run.steps
    end, tangents = push(steps, along, run.digests, start, progress)
    if run.digests is None:
        refuse_another_end(run.last.params, end.params)
    floating = {k: v for k, v in run.buffers.items() if v.is_floating_point()}
    moved = {**steps.packing.unpack(tangents.params), **tangents.buffers}
    return output_tangents(run.model, {**run.params, **floating}, moved, outputs).numpy()


def _parts(state: TrainingState) -> tuple[Params, dict[str, Params], Params]:
    floating = {k: v for k, v in state.buffers.items() if v.is_floating_point()}
    return state.params, state.moments, floating


def _moved(steps: Steps, state: TrainingState, step: int, tangents: Any, along: Tangents) -> Any:
    """The tangents after a step."""
    params, moments, buffers = tangents
    slope = _slope_with_statistics if steps.tracking else _slope
    grads, slopes, buffers = slope(steps, state, step, params, buffers, along)
    if steps.shards > 1:
        slopes, grads = sum_all((slopes, grads))
    where = next(iter(state.params.values())).device
    hyper = {
        name: torch.tensor(along.at[name], dtype=torch.float64, device=where)
        for name in along.hyper
    }
    turned = {name: torch.from_numpy(values).to(where) for name, values in along.hyper.items()}

    def update(params: Params, moments: Any, grads: Params, hyper: Any) -> Any:
        return steps.update(params, moments, grads, step, with_hyper(steps, hyper))

    def updated(v: Params, m: Any, g: Params, h: Any) -> Any:
        return jvp(update, (state.params, state.moments, grads, hyper), (v, m, g, h))[1]

    new, new_moments = _over(updated, (params, moments, slopes, turned))
    return new, new_moments, buffers


def _weights(along: Tangents, rows: NDArray[np.intp], like: Tensor) -> Tensor:
    """How the rows' weights turn, [G, b]."""
    if along.weights is None:
        return torch.zeros(len(along), len(rows)).to(like)
    return torch.from_numpy(along.weights[:, rows]).to(like)


def _slope(
    steps: Steps, state: TrainingState, step: int, params: Params, buffers: Params, along: Tangents
) -> tuple[Params, Params, Params]:
    """(g, its tangents H θ̇ + (1/B) Σ ẇ_i ∇ℓ_i, the tangents of the buffers): H is symmetric, so backward passes
    through one trace give both."""
    grads = {k: torch.zeros_like(v) for k, v in state.params.items()}
    slopes = {k: torch.zeros_like(v) for k, v in params.items()}
    for number, rows in enumerate(steps.parts(step)):
        part = Part.of(steps, state, step, number, rows, Wanted(), None)
        own = part.trace()
        found = part.second(params, {}, _weights(along, rows, part.w))
        grads = {k: v + own[k].detach() for k, v in grads.items()}
        slopes = {k: v + found.params[k] for k, v in slopes.items()}
    return grads, slopes, buffers


def _slope_with_statistics(
    steps: Steps, state: TrainingState, step: int, params: Params, buffers: Params, along: Tangents
) -> tuple[Params, Params, Params]:
    """The same by forward derivatives, which running statistics need."""
    (rows,) = steps.parts(step)
    batch = steps.batch(step, rows)
    like = next(iter(state.params.values()))
    weights = torch.from_numpy(steps.weights_at(step, rows)).to(like)
    _, _, floating = _parts(state)
    fixed = {k: v for k, v in state.buffers.items() if k not in floating}

    def loss(params: Params, w: Tensor, buffers: Params) -> tuple[Tensor, Params]:
        losses, after = steps.losses(params, {**fixed, **buffers}, batch, step)
        moved = {k: after[k] for k in floating}
        return (losses * w.to(losses)).sum() / len(steps.order[step]), moved

    def gradient(params: Params, w: Tensor, buffers: Params) -> Any:
        return grad(loss, has_aux=True)(params, w, buffers)

    def slope(v: Params, w: Tensor, b: Params) -> Any:
        return jvp(gradient, (state.params, weights, floating), (v, w, b))[1]

    grads, _ = gradient(state.params, weights, floating)
    slopes, moved = _over(slope, (params, _weights(along, rows, like), buffers))
    return grads, slopes, moved


def _over(one: Any, tangents: Any) -> Any:
    """one(...) for each of the leading G, stacked; by vmap, or one by one where vmap has no rule."""
    try:
        return vmap(one, randomness="same")(*tangents)
    except RuntimeError as error:
        if "vmap" not in str(error) and "batching" not in str(error):
            raise
        count = len(next(iter(tangents[0].values())))
        rows = [one(*tree_map(lambda x, g=g: x[g], tangents)) for g in range(count)]
        return tree_map(lambda *parts: torch.stack(parts), *rows)
