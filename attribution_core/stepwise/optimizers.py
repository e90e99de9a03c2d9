"""Optimizers as two pure functions each, the state to start with and one update, and learning rates.

The rules are torch.optim's, where every parameter has a gradient: one that a batch does not reach has zeros here, by
which momentum, Adam and weight decay move it on, while torch leaves out parameters whose `.grad` is None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attribution_core.calling import Params
from attribution_core.problem import Problem, decay_of

State = dict[str, Params]
Schedule = Literal["linear", "cosine"] | Callable[[int], float]
Decay = float | Mapping[str, float]  # of all parameters, or by name (0 for names left out)


class Optimizer(Protocol):
    """Two pure functions, the state to start with and one update, differentiable in all tensors.

    An optimizer that works on each number by itself may say so, `elementwise = True`: it then sees all
    parameters of one dtype as one vector. Others see them by name, in their shapes.
    """

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> Decay | None: ...

    def init(self, params: Params) -> State: ...

    def update(
        self, params: Params, state: State, grads: Params, step: int, lr_factor: float
    ) -> tuple[Params, State]: ...

    def reach(self, state: State, steps: int) -> Params: ...


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: g ← g + weight_decay θ;  b ← momentum b + g;  θ ← θ − lr b  (or g + momentum b).

    weight_decay is one number, or parameter name -> number (0 for names left out); None means the
    problem's.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: Decay | None = None
    elementwise: ClassVar[bool] = True

    def init(self, params: Params) -> State:
        """A momentum buffer of zeros."""
        return {"momentum": {k: torch.zeros_like(v) for k, v in params.items()}}

    def update(
        self, params: Params, state: State, grads: Params, step: int, lr_factor: float
    ) -> tuple[Params, State]:
        """One step; nothing is changed in place."""
        new, buffers = {}, {}
        for name, theta in params.items():
            g = plus(grads[name], theta, decay_of(self.weight_decay, name))
            buffers[name] = plus(g, state["momentum"][name], self.momentum)
            g = plus(g, buffers[name], self.momentum) if self.nesterov else buffers[name]
            new[name] = plus(theta, g, -self.lr * lr_factor)
        return new, {"momentum": buffers}

    def reach(self, state: State, steps: int) -> Params:
        """How far a constant gradient of 1 moves each parameter per step, in the long run."""
        rate = self.lr / (1 - self.momentum)
        return {name: torch.full_like(value, rate) for name, value in state["momentum"].items()}


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam: θ ← θ − lr m̂ / (√(v̂ + eps_root) + eps), decay added to the gradient.

    weight_decay as in `SGD`. eps_root (0 in torch) keeps the update differentiable where a gradient
    was exactly 0.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: Decay | None = None
    elementwise: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False

    def init(self, params: Params) -> State:
        """First and second moments of zeros."""
        return {m: {k: torch.zeros_like(v) for k, v in params.items()} for m in ("first", "second")}

    def update(
        self, params: Params, state: State, grads: Params, step: int, lr_factor: float
    ) -> tuple[Params, State]:
        """One step, counted from 0; nothing is changed in place."""
        lr = self.lr * lr_factor
        one, two = self.betas
        new: Params = {}
        first: Params = {}
        second: Params = {}
        for name, theta in params.items():
            decay = decay_of(self.weight_decay, name)
            g = grads[name] if self.decoupled else grads[name] + decay * theta
            first[name] = one * state["first"][name] + (1 - one) * g
            second[name] = two * state["second"][name] + (1 - two) * g * g
            m = first[name] / (1 - one ** (step + 1))
            v = second[name] / (1 - two ** (step + 1))
            shrunk = theta * (1 - lr * decay) if self.decoupled else theta
            new[name] = shrunk - lr * m / (root(v + self.eps_root) + self.eps)
        return new, {"first": first, "second": second}

    def reach(self, state: State, steps: int) -> Params:
        """How far a small constant gradient of 1 moves each parameter per step: lr / (√v̂ + eps)."""
        correction = 1 - self.betas[1] ** steps
        return {
            name: self.lr / ((v / correction + self.eps_root).sqrt() + self.eps)
            for name, v in state["second"].items()
        }


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: as Adam, with the decay decoupled, θ ← (1 − lr weight_decay) θ − ..."""

    decoupled: ClassVar[bool] = True


def plus(a: Tensor, b: Tensor, factor: Any) -> Tensor:
    """a + factor · b in one pass where the factor is a number, and in none where it is 0."""
    if isinstance(factor, Tensor):
        return a + factor * b
    return a if factor == 0 else torch.add(a, b, alpha=factor)


def root(v: Tensor) -> Tensor:
    """√v, whose derivative is taken as 0 where v = 0.

    There every gradient so far was exactly 0, and so is Adam's first moment, which the derivative of 1/√v
    is multiplied with: the product is 0, where autograd finds 0 · ∞.
    """
    if not torch.is_grad_enabled():
        return v.sqrt()
    moved = v != 0
    return torch.where(moved, torch.where(moved, v, 1.0).sqrt(), 0.0)


def resolved(optimizer: Optimizer, problem: Problem) -> Optimizer:
    """The optimizer with the weight decay in force: its own, or the problem's.

    Raises:
        ValueError: both state one, and they differ; it is negative or names unknown parameters; a
            learning rate that is negative or not finite; momentum, betas or eps out of range.
    """
    if not 0 <= optimizer.lr < math.inf:
        raise ValueError(f"expected a finite learning rate of at least 0, got {optimizer.lr}")
    rates = getattr(optimizer, "betas", (getattr(optimizer, "momentum", 0.0),))
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"expected momentum or betas of 0 to below 1, got {rates}")
    for name in ("eps", "eps_root"):
        if not getattr(optimizer, name, 0.0) >= 0:
            raise ValueError(f"expected {name} of at least 0, got {getattr(optimizer, name)}")
    if optimizer.weight_decay is None:
        return replace(optimizer, weight_decay=problem.weight_decay)  # type: ignore[type-var]
    own = replace(problem, weight_decay=optimizer.weight_decay)  # checks names and signs
    if (problem.decay != 0).any() and (problem.decay != own.decay).any():
        raise ValueError(
            f"expected one weight decay, got {problem.weight_decay} in the problem and "
            f"{optimizer.weight_decay} in the optimizer; state it in one place"
        )
    return optimizer


def lr_factor(schedule: Schedule | None, step: int, steps: int) -> float:
    """What a schedule multiplies the learning rate with at this step of so many.

    >>> lr_factor("linear", 5, 10), lr_factor(None, 5, 10)
    (0.5, 1.0)
    """
    if schedule is None:
        return 1.0
    if callable(schedule):
        return schedule(step)
    if schedule == "linear":
        return 1.0 - step / steps
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    raise ValueError(f"unknown schedule {schedule!r}; linear, cosine, or a function of the step")


def clipped(grads: Params, limit: float) -> Params:
    """Gradients scaled so that their joint norm is at most `limit` (torch.nn.utils.clip_grad_norm_)."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in grads.items()}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The middle of a stretch of steps, first..last − 1, which it stands for (the midpoint rule).

    Made by `train(..., checkpoints=C)`, or by hand from any trainer's files.
    """

    params: Params  # that step `step` started from
    state: State  # of the optimizer, that step `step` left
    step: int  # counted from 0
    first: int
    last: int


def stretches(steps: int, count: int) -> list[tuple[int, int]]:
    """(first, last) of `count` equal stretches of a run, last not included.

    >>> stretches(7, 2)
    [(0, 4), (4, 7)]
    """
    if not 0 <= count <= steps:
        raise ValueError(
            f"expected 0 to {steps} checkpoints, one for each step at most, got {count}"
        )
    ends = [round(steps * k / max(count, 1)) for k in range(count + 1)]
    return list(itertools.pairwise(ends))
