"""One step of training, backwards: from what K outputs owe to its result, to what they owe to its inputs.

With λ the derivatives of the outputs by the state that a step leaves, the step's own part is
    (a) λ, ḡ ← the derivative of update(θ, moments, g), number by number, transposed;
    (b) λ_θ += H ḡ and, for row i of the batch, ∂ output / ∂ w_i += ⟨∇ℓ_i, ḡ⟩ / B,
both of (b) the derivative of ⟨g(θ, w), ḡ⟩, so one second-order pass over the batch gives them together, and
with them the derivative by the batch's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, jvp, vmap

from attribution_core.calling import Params
from attribution_core.data import Batch, Column, replaced, take
from attribution_core.processes import sum_all, world
from attribution_core.stepwise.optimizers import State
from attribution_core.stepwise.steps import Steps, TrainingState

Form = Literal["auto", "double", "vmap"]


@dataclass(frozen=True, eq=False)
class Adjoint:
    """Derivatives of K outputs by a state, every tensor with a leading K."""

    params: Params
    moments: State
    buffers: Params  # floating ones

    @property
    def norms(self) -> Tensor:
        """The norm of the parameters' part, [K]."""
        squares = [value.flatten(1).double().square().sum(1) for value in self.params.values()]
        return torch.stack(squares).sum(0).sqrt().cpu()


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the outputs are differentiated by."""

    weights: bool = False
    column: Column | None = None  # inputs in this column of the data ...
    rows: NDArray[np.intp] | None = None  # ... of these rows
    hyper: Mapping[str, float] | None = None  # hyperparameters by name, see `with_hyper`


@dataclass(frozen=True, eq=False)
class Owed:
    """What K outputs owe to one step's own arguments."""

    rows: NDArray[np.intp]  # of this process
    weights: Tensor | None = None  # [rows, K]
    inputs: Tensor | None = None  # [those of the rows that were asked for, numbers, K]
    inputs_rows: NDArray[np.intp] | None = None
    hyper: Tensor | None = None  # [hyperparameters, K]


def pull(
    steps: Steps,
    state: TrainingState,
    step: int,
    at: Adjoint,
    wanted: Wanted,
    form: Form = "double",
    shadows: NDArray[np.intp] | None = None,
) -> tuple[Adjoint, Owed]:
    """The adjoint of the state that a step started from, and what is owed to the step's arguments.

    Args:
        shadows: rows that ride along at weight 0: differentiated by, not trained on.
    """
    if shadows is not None and steps.shards > 1:
        shadows = np.array_split(shadows, steps.shards)[world()[0]]
    parts = [
        Part.of(steps, state, step, k, rows, wanted, shadows if k == 0 else None)
        for k, rows in enumerate(steps.parts(step))
    ]
    double = form == "double"
    grads = _summed(
        steps, state.params, [part.trace() if double else part.plain() for part in parts]
    )
    before, pulled, hyper = _through_update(steps, state, grads, step, at, wanted)
    found = [
        part.second(pulled, at.buffers) if double else part.second_vmapped(pulled) for part in parts
    ]
    curved = _summed(steps, before.params, [one.params for one in found])
    params = {name: value + curved[name] for name, value in before.params.items()}
    buffers = found[0].buffers if at.buffers and steps.tracking else at.buffers
    rows = np.concatenate([part.rows for part in parts]) if parts else np.zeros(0, np.intp)
    weights = [one.weights for one in found] if wanted.weights else []
    inputs = [(part, one) for part, one in zip(parts, found, strict=True) if one.inputs is not None]
    return Adjoint(params, before.moments, buffers), Owed(
        rows,
        torch.cat(weights, dim=1).T if weights else None,
        torch.cat([one.inputs for _, one in inputs]) if inputs else None,  # type: ignore[misc]
        np.concatenate([part.inputs_rows for part, _ in inputs]) if inputs else None,
        hyper,
    )


def _summed(steps: Steps, like: Params, parts: list[Params]) -> Params:
    """The sum over the parts of a batch and over the processes that share it, in one all-reduce."""
    total = {
        name: sum((part[name].detach() for part in parts), torch.zeros_like(value))
        for name, value in like.items()
    }
    return total if steps.shards == 1 else sum_all(total)


# --- (a) the update -------------------------------------------------------------------------------


def with_hyper(steps: Steps, hyper: Mapping[str, Any]) -> Any:
    """The optimizer with hyperparameters put in: "lr", "weight_decay", or "weight_decay of <name>"."""
    optimizer: Any = steps.optimizer
    if "lr" in hyper:
        optimizer = replace(optimizer, lr=hyper["lr"])
    decay: Any = optimizer.weight_decay
    if "weight_decay" in hyper:
        decay = hyper["weight_decay"]
    elif isinstance(decay, Mapping):
        decay = {name: hyper.get(f"weight_decay of {name}", value) for name, value in decay.items()}
    return steps.with_decay(optimizer, decay)


def _through_update(
    steps: Steps, state: TrainingState, grads: Params, step: int, at: Adjoint, wanted: Wanted
) -> tuple[Adjoint, Params, Tensor | None]:
    """(adjoint of what the update read of the state, adjoint ḡ of the gradient [K, ...], of hyperparameters)."""
    with torch.enable_grad():
        params, g = _leaves(state.params), _leaves(grads)
        moments = {name: _leaves(held) for name, held in state.moments.items()}
        hyper = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in (wanted.hyper or {}).items()
        }
        optimizer = with_hyper(steps, hyper) if hyper else None
        new, new_moments = steps.update(params, moments, g, step, optimizer)
    results = [*new.values(), *(v for held in new_moments.values() for v in held.values())]
    owed = [*at.params.values(), *(v for held in at.moments.values() for v in held.values())]
    inputs = [*params.values(), *g.values(), *hyper.values()]
    inputs += [v for held in moments.values() for v in held.values()]
    found = iter(_transposed(results, inputs, owed))
    own = {name: next(found) for name in params}
    pulled = {name: next(found) for name in g}
    by_hyper = torch.stack([next(found).double().cpu() for _ in hyper]) if hyper else None
    own_moments = {name: {k: next(found) for k in held} for name, held in moments.items()}
    return Adjoint(own, own_moments, at.buffers), pulled, by_hyper


def _leaves(values: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _transposed(results: list[Tensor], inputs: list[Tensor], owed: list[Tensor]) -> list[Tensor]:
    """Σ owedᵀ ∂results/∂inputs for K rows of `owed`, each with its leading K."""
    count = len(owed[0])
    pairs = [(r, o) for r, o in zip(results, owed, strict=True) if r.requires_grad]
    results, owed = [r for r, _ in pairs], [o for _, o in pairs]
    if count == 1:
        found = torch.autograd.grad(results, inputs, [o[0] for o in owed], materialize_grads=True)
        return [value[None] for value in found]
    found = torch.autograd.grad(results, inputs, owed, is_grads_batched=True, allow_unused=True)
    return [
        x.new_zeros((count, *x.shape)) if value is None else value
        for x, value in zip(inputs, found, strict=True)
    ]


# --- (b) the second-order pass --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Second:
    params: Params  # [K, ...]
    weights: Tensor  # [K, b], where asked for
    inputs: Tensor | None  # [rows asked for, numbers, K]
    buffers: Params


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a step that pass through the model together, with all that is differentiated by."""

    steps: Steps
    state: TrainingState
    step: int
    number: int
    rows: NDArray[np.intp]  # shadows at the end
    size: int  # B of the whole batch
    w: Tensor
    batch: Batch
    column: Column | None
    chosen: NDArray[np.intp]  # places within `rows` of the inputs asked for
    wanted: Wanted
    graph: dict[str, Any]  # what `trace` leaves for `second`

    @classmethod
    def of(
        cls,
        steps: Steps,
        state: TrainingState,
        step: int,
        number: int,
        rows: NDArray[np.intp],
        wanted: Wanted,
        shadows: NDArray[np.intp] | None,
    ) -> Part:
        w = steps.weights_at(step, rows)
        if shadows is not None and number == 0:
            rows, w = np.concatenate([rows, shadows]), np.concatenate([w, np.zeros(len(shadows))])
        batch = take(steps.problem.train, rows, steps.problem.device)
        chosen = np.zeros(0, np.intp)
        if wanted.column is not None and wanted.rows is not None:
            chosen = np.flatnonzero(np.isin(rows, wanted.rows))
        like = next(iter(state.params.values()))
        return cls(
            steps, state, step, number, rows, len(steps.order[step]), torch.from_numpy(w).to(like),
            batch, wanted.column if len(chosen) else None, chosen, wanted, {},
        )  # fmt: skip

    @property
    def inputs_rows(self) -> NDArray[np.intp]:
        return self.rows[self.chosen]

    def losses(self, params: Params, buffers: Params, x: Any) -> tuple[Tensor, Params]:
        """(ℓ_i, buffers after)."""
        batch = self.batch
        if self.column is not None:
            batch = replaced(batch, self.column, x)
        batch = self.steps.seen(batch, self.step, self.rows)
        return self.steps.losses(params, buffers, batch, self.step, self.number)

    def mean(self, losses: Tensor, w: Tensor) -> Tensor:
        """(1/B) Σ w_i ℓ_i."""
        return (losses * w.to(losses)).sum() / self.size

    @property
    def x(self) -> Tensor | None:
        """The column that is differentiated by."""
        return None if self.column is None else self.batch[self.column]  # type: ignore[index]

    def plain(self) -> Params:
        """The gradient, without a graph."""
        leaf = _leaves(self.state.params)
        loss = self.mean(self.losses(leaf, self.state.buffers, self.x)[0], self.w)
        found = torch.autograd.grad(loss, list(leaf.values()), materialize_grads=True)
        return dict(zip(leaf, found, strict=True))

    def trace(self) -> Params:
        """The gradient, with the graph that `second` goes back through."""
        leaf, w = _leaves(self.state.params), self.w.detach().requires_grad_()
        floating = {k: v for k, v in self.state.buffers.items() if v.is_floating_point()}
        buffers = _leaves(floating)
        x = None if self.x is None else self.x.detach().requires_grad_()
        with torch.enable_grad():
            losses, after = self.losses(leaf, {**self.state.buffers, **buffers}, x)
            loss = self.mean(losses, w)
            found = torch.autograd.grad(
                loss, list(leaf.values()), create_graph=True, materialize_grads=True
            )
        grads = dict(zip(leaf, found, strict=True))
        held = {"leaf": leaf, "w": w, "x": x, "buffers": buffers}
        self.graph.update(held, grads=grads, after=after, losses=losses)
        return grads

    def second(self, pulled: Params, owed_buffers: Params, turned: Tensor | None = None) -> Second:
        """Backwards through the trace, once for each of K directions: of ⟨g, pulled⟩ + ⟨buffers, owed⟩ and,
        where weights turn along ẇ [K, b], of (1/B) Σ ẇ_i ℓ_i."""
        held = self.graph
        inputs = {**held["leaf"], **{f"buffer {k}": v for k, v in held["buffers"].items()}}
        if self.wanted.weights:
            inputs["w"] = held["w"]
        if held["x"] is not None:
            inputs["x"] = held["x"]
        outputs = [held["grads"][name] for name in pulled]
        cotangents = list(pulled.values())
        for name, value in owed_buffers.items():
            outputs.append(held["after"][name])
            cotangents.append(value)
        if turned is not None:
            outputs.append(held["losses"])
            cotangents.append(turned.to(held["losses"]) / self.size)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        count = len(next(iter(pulled.values())))
        rows = [
            torch.autograd.grad(
                [o for o, _ in pairs], list(inputs.values()), [c[k] for _, c in pairs],
                retain_graph=k < count - 1, materialize_grads=True,
            )
            for k in range(count)
        ] if pairs else [[torch.zeros_like(v) for v in inputs.values()]] * count  # fmt: skip
        stacked = {
            name: torch.stack(column)
            for name, column in zip(inputs, zip(*rows, strict=True), strict=True)
        }
        held.clear()
        return Second(
            {name: stacked[name] for name in pulled},
            stacked.get("w", torch.zeros(0)),
            self._chosen(stacked.get("x")),
            {k: stacked[f"buffer {k}"] for k in owed_buffers},
        )

    def second_vmapped(self, pulled: Params) -> Second:
        """Forward derivatives of the gradient along all K directions at once."""
        wanted = (0, 1, 2) if self.x is not None else (0, 1)

        def gradients(params: Params) -> Any:
            def loss(params: Params, w: Tensor, x: Any) -> Tensor:
                return self.mean(self.losses(params, self.state.buffers, x)[0], w)

            return grad(loss, argnums=wanted)(params, self.w, self.x)

        def along(direction: Params) -> Any:
            return jvp(gradients, (self.state.params,), (direction,))[1]

        found = vmap(along)(pulled)
        x = found[2] if self.x is not None else None
        return Second(found[0], found[1], self._chosen(x), {})

    def _chosen(self, x: Tensor | None) -> Tensor | None:
        """[K, b, ...] -> [rows asked for, numbers, K]."""
        if x is None:
            return None
        return x[:, torch.from_numpy(self.chosen).to(x.device)].flatten(2).permute(1, 2, 0)
