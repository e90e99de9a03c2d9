"""One step of training as a pure function: (state, step number) -> state.

    g = ∇_θ (1/B) Σ w_i ℓ_i(θ);   (θ, moments) ← update(θ, moments, clip(g));   norm layers' running
    statistics ← their old values and the batch's

Everything a step needs beside its state is a function of the step's number: the rows, their weights, the
learning rate, the augmentation, the dropout masks. So any state of a training can be computed again, bit
by bit, and differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core.calling import Params, call, check_rows, given_first
from attribution_core.data import Batch, rows_in, take
from attribution_core.problem import Problem, decay_of
from attribution_core.processes import failing_together, sum_all, world
from attribution_core.safeguards.refusals import batch_norms
from attribution_core.seeds import drawn_by
from attribution_core.stepwise.optimizers import Optimizer, State, clipped

Augment = Callable[[Batch, NDArray[np.intp], int], Batch]  # (batch, its rows, step) -> batch
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Packing:
    """Parameters by name as one vector for each dtype, on which optimizers that work number by number
    take one operation where they would take one for every name. Without `groups` names stay as they are.
    """

    shapes: dict[str, torch.Size]
    groups: dict[str, list[str]]  # vector -> the names in it, in order

    @classmethod
    def of(cls, params: Params, optimizer: Optimizer) -> Packing:
        groups: dict[str, list[str]] = {}
        if getattr(optimizer, "elementwise", False):
            for name, value in params.items():
                groups.setdefault(str(value.dtype), []).append(name)
        return cls({name: value.shape for name, value in params.items()}, groups)

    def pack(self, params: Params) -> Params:
        """Vectors; dimensions before the parameters' own are kept."""
        if not self.groups:
            return dict(params)
        name, shape = next(iter(self.shapes.items()))
        lead = params[name].ndim - len(shape)
        return {
            group: torch.cat(
                [params[name].reshape((*params[name].shape[:lead], -1)) for name in names], dim=lead
            )
            for group, names in self.groups.items()
        }

    def unpack(self, packed: Params) -> Params:
        """The parameters by name, as views."""
        if not self.groups:
            return dict(packed)
        found = {}
        for group, names in self.groups.items():
            sizes = [self.shapes[name].numel() for name in names]
            parts = packed[group].split(sizes, dim=-1)
            for name, part in zip(names, parts, strict=True):
                found[name] = part.reshape((*part.shape[:-1], *self.shapes[name]))
        return {name: found[name] for name in self.shapes}


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What one step hands to the next."""

    params: Params  # packed
    moments: State  # of the optimizer, packed
    buffers: Params  # running statistics of norm layers, by name

    def __repr__(self) -> str:
        """A line: a generated one prints every tensor."""
        count = sum(value.numel() for value in self.params.values())
        held = ", ".join(self.moments) or "no moments"
        return f"TrainingState({count:,} parameters, {held}, {self.bytes:,} bytes)"

    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order."""
        moments = [value for held in self.moments.values() for value in held.values()]
        return [*self.params.values(), *moments, *self.buffers.values()]

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return sum(value.numel() * value.element_size() for value in self.tensors())

    def digest(self) -> int:
        """A sum over the bits of every number: equal states have equal digests, others hardly ever."""
        sums = [
            value.contiguous().view(BITS[value.element_size()]).sum(dtype=torch.int64)
            for value in self.tensors()
        ]
        found = 0
        for part in torch.stack(sums).tolist():
            found = (found * 1_000_003 + part) % 2**63
        return found


class Watch(Protocol):
    """What sees the gradients of layers' outputs in the very pass that trains."""

    def edges(self) -> Sequence[GradientEdge]:
        """What to differentiate by beside the parameters, after a forward pass."""

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients there; None where nothing came."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of one training.

    Args:
        problem: its model is the initial one.
        optimizer: with the weight decay in force.
        order: the rows of every step.
        weights: [n]; they act from step `since` on, before that every weight is 1.
        factors: [steps] what the schedule multiplies the learning rate with.
        clip: largest norm of the whole gradient.
        accumulate: parts of a batch that are passed through the model one by one.
        masks: seed of the dropout masks, if any.
        augment: (batch, rows, step) -> batch.
        shards: processes that share the rows of a batch.
        since: the first step at which the weights act.
    """

    problem: Problem
    optimizer: Optimizer
    order: list[NDArray[np.intp]]
    weights: NDArray[np.float64]
    factors: NDArray[np.float64]
    clip: float | None = None
    accumulate: int = 1
    masks: int | None = None
    augment: Augment | None = None
    shards: int = 1
    since: int = 0

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def packing(self) -> Packing:
        return Packing.of(self.problem.params, self.optimizer)

    @cached_property
    def tracking(self) -> bool:
        """Whether the model has batch norm in training mode, with or without running statistics."""
        return any(True for _ in batch_norms(self.problem.model))

    @cached_property
    def packed_optimizer(self) -> Optimizer:
        """The optimizer for packed parameters."""
        return self.with_decay(self.optimizer, self.optimizer.weight_decay or 0.0)

    def with_decay(self, optimizer: Any, weight_decay: Any) -> Any:
        """The optimizer with a weight decay (numbers or tensors, one or by name) for packed parameters."""
        if isinstance(weight_decay, Mapping) and self.packing.groups:
            like = self.problem.params
            spread = {
                name: (value.new_ones(()) * decay_of(weight_decay, name)).expand(value.shape)
                for name, value in like.items()
            }
            weight_decay = self.packing.pack(spread)
        return replace(optimizer, weight_decay=weight_decay)

    def start(self) -> TrainingState:
        """The state that step 0 starts from."""
        params = {name: value.clone() for name, value in self.problem.params.items()}
        packed = self.packing.pack(params)
        buffers = {
            f"{name}.{key}": value.clone()
            for name, module in batch_norms(self.problem.model)
            for key, value in module.named_buffers(recurse=False)
        }
        return TrainingState(packed, self.optimizer.init(packed), buffers)

    def weights_at(self, step: int, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """The rows' weights at a step."""
        return self.weights[rows] if step >= self.since else np.ones(len(rows))

    def parts(self, step: int) -> list[NDArray[np.intp]]:
        """This process's rows of a step, in the parts that pass through the model one by one."""
        rows = self.order[step]
        if self.shards > 1:
            rows = np.array_split(rows, self.shards)[world()[0]]
        return [part for part in np.array_split(rows, self.accumulate) if len(part)]

    def batch(self, step: int, rows: NDArray[np.intp]) -> Batch:
        """The rows as the model sees them at this step."""
        return self.seen(take(self.problem.train, rows, self.problem.device), step, rows)

    def seen(self, batch: Batch, step: int, rows: NDArray[np.intp]) -> Batch:
        """A batch after the augmentation of this step."""
        return batch if self.augment is None else self.augment(batch, rows, step)

    def losses(
        self, params: Params, buffers: Params, batch: Batch, step: int, part: int = 0
    ) -> tuple[Tensor, Params]:
        """(losses [b], running statistics after the pass) at packed parameters; differentiable in all."""
        named = {**self.packing.unpack(params)}
        draws = None if self.masks is None else [self.masks, step, part]
        with (
            drawn_by(draws, self.problem.device),
            running_statistics(self.problem.model, buffers) as after,
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
        ):
            losses = call(self.problem.model, self.problem.loss, named, batch)
        return losses, after

    def gradient(
        self, state: TrainingState, step: int, watch: Watch | None = None
    ) -> tuple[float, Params, Params]:
        """(loss, gradient, running statistics after) of a step; a watch sees gradients of layers beside it."""
        if self.shards == 1:
            total, grads, buffers = self._own_gradient(state, step, watch)
            return float(total), grads, buffers
        failed: Exception | None = None
        buffers = state.buffers
        try:
            total, grads, buffers = self._own_gradient(state, step, watch)
        except Exception as error:  # the others wait in the sum; a loss of NaN stops them
            failed, total = error, math.nan
            grads = {name: torch.zeros_like(value) for name, value in state.params.items()}
        loss = torch.as_tensor(total).to(next(iter(grads.values())))
        total, grads = sum_all((loss, grads))
        if total.isnan():
            with failing_together():
                if failed is not None:
                    raise failed
        return float(total), grads, buffers

    @torch.enable_grad()  # whatever the caller is in
    def _own_gradient(
        self, state: TrainingState, step: int, watch: Watch | None
    ) -> tuple[Any, Params, Params]:
        """This process's part of `gradient`."""
        size = len(self.order[step])
        leaf = {name: value.detach().requires_grad_() for name, value in state.params.items()}
        total: Any = 0.0
        grads = {name: torch.zeros_like(value) for name, value in state.params.items()}
        buffers = state.buffers
        for number, rows in enumerate(self.parts(step)):
            batch = self.batch(step, rows)
            losses, buffers = self.losses(leaf, buffers, batch, step, number)
            check_rows(losses, rows_in(batch), rows)
            w = torch.from_numpy(self.weights_at(step, rows))
            loss = (losses * w.to(losses)).sum() / size
            by: list[Any] = [*leaf.values(), *([] if watch is None else watch.edges())]
            found = torch.autograd.grad(loss, by, allow_unused=True)
            if watch is not None:
                watch.take(found[len(leaf) :])
            for name, g in zip(leaf, found[: len(leaf)], strict=True):
                if g is not None:
                    grads[name] = g if number == 0 else grads[name] + g
            total += loss.detach()
        return total, grads, {name: value.detach() for name, value in buffers.items()}

    def update(
        self,
        params: Params,
        moments: State,
        grads: Params,
        step: int,
        optimizer: Optimizer | None = None,
    ) -> tuple[Params, State]:
        """Clip and update; differentiable in all three, and in an optimizer made of tensors."""
        if self.clip is not None:
            grads = clipped(grads, self.clip)
        optimizer = optimizer or self.packed_optimizer
        return optimizer.update(params, moments, grads, step, float(self.factors[step]))

    def step(self, state: TrainingState, step: int) -> tuple[TrainingState, float]:
        """(the state that the next step starts from, the loss)."""
        loss, grads, buffers = self.gradient(state, step)
        with torch.no_grad():
            params, moments = self.update(state.params, state.moments, grads, step)
        return TrainingState(params, moments, buffers), loss


# --- what layers do beside their losses ------------------------------------------------------


@contextmanager
def running_statistics(model: nn.Module, before: Params) -> Iterator[Params]:
    """Batch norms normalise by the batch and leave their buffers alone; what the buffers would become is
    put into the mapping that is given out, differentiable in the layers' inputs and in `before`."""
    norms = dict(batch_norms(model))
    after = dict(before)
    if not norms:
        yield after
        return

    def note(name: str, module: Any, args: Any, kwargs: Any) -> None:
        if f"{name}.running_mean" not in after:
            return
        x = given_first(args, kwargs)
        over = [d for d in range(x.ndim) if d != 1]
        count = after[f"{name}.num_batches_tracked"] + 1
        rate = module.momentum if module.momentum is not None else 1.0 / count.to(x.dtype)
        for key, now in (
            ("running_mean", x.mean(over)),
            ("running_var", x.var(over, unbiased=True)),
        ):
            after[f"{name}.{key}"] = (1 - rate) * after[f"{name}.{key}"] + rate * now
        after[f"{name}.num_batches_tracked"] = count

    handles = []
    for name, module in norms.items():
        handles.append(module.register_forward_pre_hook(partial(note, name), with_kwargs=True))
        module.track_running_stats = False
    tracked = {name: f"{name}.running_mean" in before for name in norms}
    try:
        yield after
    finally:
        for handle in handles:
            handle.remove()
        for name, module in norms.items():
            module.track_running_stats = tracked[name]
