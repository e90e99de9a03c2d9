"""Classifiers matched to logits by Gauss–Newton steps: a few rows solved exactly, in the place of many gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from applied.unlearners import of_classes
from attribution_core.calling import trainable
from attribution_core.data import Batch, Data, as_data, take
from attribution_core.layerwise.jacobian import jacobian, move_parameters
from attribution_core.outputs import logits_and_labels
from attribution_core.precision import widened

LARGEST = 2**28  # numbers in Jacobians that are held at a time: a gigabyte of single precision
DAMPINGS = (0.003, 0.03, 0.3, 3.0)
NEARLY = 1.1  # times the nearest: as near
TOGETHER = 5  # models at most that settle the damping of all
Left = Callable[[int, nn.Module], Sequence[Tensor]]  # (which model, as it is now) -> what it misses


@dataclass(frozen=True)
class GaussNewton:
    """How a model is matched: in steps that go equal parts of the way.

    Args:
        dampings: of each step, in mean eigenvalues of the step's JᵀJ.
        rows: of each step, half of them of the forget set at most.
        seed: of the rows.
    """

    dampings: tuple[float, ...] = (0.01, 0.003)
    rows: int = 100
    seed: int = 0


def row_cost(contrasts: int) -> float:
    """What a row's Jacobian costs, in rows of training: a forward pass, and for each contrast a backward pass, twice as dear."""
    return (1 + 2 * contrasts) / 3


def fitting(model: nn.Module, rows: int, contrasts: int) -> int:
    """How many Jacobians of so many rows can be held."""
    return LARGEST // (rows * contrasts * sum(p.numel() for p in trainable(model).values()))


def match_by_gauss_newton(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    forget_logits: Tensor,
    retain_logits: Tensor,
    how: GaussNewton = GaussNewton(),
) -> nn.Module:
    """Move parameters until the logits are those wanted, on the forget set and on retained rows.

        θ ← θ + Jᵀ (J Jᵀ + damping · tr(JᵀJ)/p · I)⁻¹ (z* − z(θ)) / steps left

    z are the logits of a step's rows in an orthonormal basis of what softmax sees (Helmert's contrasts of the c
    classes), J [rows · (c − 1), p] their Jacobian: the smallest move that reaches z* to first order. Outputs that
    are no classes' stand for themselves, c of them. The goal is that of `match`; a step costs (2c − 1)/3 training
    steps on as many rows.

    Args:
        forget_logits, retain_logits: z*, [rows, c], in the rows' order.

    Raises:
        ValueError: logits that are not [rows, c]; a solution that is not finite.

    Source: Levenberg 1944; in its dual form, ridge regression with the empirical neural tangent kernel.
    """
    way = _Way(model, _paired(forget, retain, forget_logits, retain_logits), how.rows, how.seed)
    for done, damping in enumerate(how.dampings):
        way.model = way.moved(way.system(len(how.dampings) - done), damping)
    return way.model


def match_together(
    models: Sequence[nn.Module],
    forget: Any,
    retain: Any,
    *,
    forget_logits: Sequence[Tensor],
    retain_logits: Sequence[Tensor],
    left: Left,
    steps: int,
    rows: int,
    of: int,
    seed: int = 0,
) -> tuple[list[nn.Module], GaussNewton]:
    """Models matched side by side, and how: each step by the damping that brings their mean nearest.

        min over damping of Σ_z (mean over models of what is left of z after the step, less what should be)²

    Too little damping fits the step's own rows and moves other rows at random, differently in each model; too much
    leaves all models short of the goal in the same way. The mean weighs both as a comparison of sets of models does; for
    a single model it is the squared distance. Of `DAMPINGS` the smallest is taken whose result is about as near as the
    best. One Jacobian serves all of them, and models are only read.

    Args:
        forget_logits, retain_logits: z* of each model.
        left: z* less the present outputs of model k, on both sets; most of these rows are in no step.
        of: models that there are, of which these are the first.
        seed: of the first model's rows; the next has the next.
    """
    wanted = zip(forget_logits, retain_logits, strict=True)
    ways = [
        _Way(model, _paired(forget, retain, *both), rows, seed + k)
        for k, (model, both) in enumerate(zip(models, wanted, strict=True))
    ]
    dampings = []
    for step in range(steps):
        systems = [way.system(steps - step) for way in ways]
        dampings.append(_damping(ways, systems, 1 / (steps - step), left, of))
        for way, system in zip(ways, systems, strict=True):
            way.model = way.moved(system, dampings[-1])
    return [way.model for way in ways], GaussNewton(tuple(dampings), rows, seed)


def _damping(ways: list[_Way], systems: list[_System], part: float, left: Left, of: int) -> float:
    """The damping after which the models' mean is nearest to a part of the way."""
    should_be = [[(1 - part) * z for z in left(k, way.model)] for k, way in enumerate(ways)]

    def off(damping: float) -> float:
        try:
            after = [
                left(k, way.moved(system, damping))
                for k, (way, system) in enumerate(zip(ways, systems, strict=True))
            ]
        except ValueError:  # diverged
            return math.inf
        each = [
            [a - b for a, b in zip(*pair, strict=True)]
            for pair in zip(after, should_be, strict=True)
        ]
        return squares_of_means(each, of)

    tried: dict[float, float] = {}
    for damping in DAMPINGS:
        tried[damping] = off(damping)
        if tried[damping] > 2 * min(tried.values()):  # and rising
            break
    return next(damping for damping, far in tried.items() if far <= NEARLY * min(tried.values()))


def squares_of_means(each: Sequence[Sequence[Tensor]], of: int) -> float:
    """What the mean of `of` models misses, estimated from the first k of them: Σ over parts of mean squares.

        E mean_of² = max(mean_k² − (1/k − 1/of) s², s²/of),     s²: the variance over models

    Infinite where something is not finite.

    Args:
        each: what each of the k models misses, part by part.

    >>> squares_of_means([[torch.tensor([1.0])], [torch.tensor([3.0])]], 2)
    4.0
    """
    k, total = len(each), 0.0
    for part in zip(*each, strict=True):
        values = torch.stack(part).double()
        spread = float(values.var(0).mean()) if k > 1 else 0.0
        mean = float(values.mean(0).square().mean())
        total += max(mean - (1 / k - 1 / of) * spread, spread / of)
    return total if math.isfinite(total) else math.inf


Sets = Sequence[tuple[Data, Tensor]]


def _paired(forget: Any, retain: Any, forget_logits: Tensor, retain_logits: Tensor) -> Sets:
    """Both sets with their logits."""
    sets = [(as_data(forget), forget_logits), (as_data(retain), retain_logits)]
    for data, wanted in sets:
        if wanted.ndim != 2 or len(wanted) != len(data) or wanted.shape[1] < 2:
            raise ValueError(
                f"expected logits [rows={len(data)}, classes >= 2] to match, got {tuple(wanted.shape)}"
            )
    return sets


class _Way:
    """A copy of a model on its way to wanted logits."""

    def __init__(self, model: nn.Module, sets: Sets, rows: int, seed: int) -> None:
        self.model, self.sets, self.rows = copy.deepcopy(model), sets, rows
        self.rng = np.random.default_rng(seed)

    def system(self, steps: int) -> _System:
        """The next step, of so many to go, on rows of its own."""
        sizes = _sizes(self.rows, *self.sets)
        parts = [
            _residual(self.model, data, wanted, self.rng.choice(len(data), size, replace=False))
            for (data, wanted), size in zip(self.sets, sizes, strict=True)
            if size
        ]
        slopes, missing = (torch.cat(several) for several in zip(*parts, strict=True))
        return _System(slopes, missing / steps)

    def moved(self, system: _System, damping: float) -> nn.Module:
        """A copy after the step."""
        new = copy.deepcopy(self.model)
        move_parameters(new, system.solved(damping))
        return new


def _sizes(rows: int, forget: tuple[Data, Tensor], retain: tuple[Data, Tensor]) -> tuple[int, int]:
    """Rows of a step from either set."""
    few = min(len(forget[0]), max(1, rows // 2))
    return few, min(len(retain[0]), rows - few)


def _residual(
    model: nn.Module, data: Data, wanted: Tensor, rows: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(Jacobian [b · contrasts, p], wanted less present contrasts [b · contrasts]) of some rows."""
    from scipy.linalg import helmert

    batch = take(data, rows, next(model.parameters()).device)
    goal, c = wanted[torch.from_numpy(rows)], wanted.shape[1]
    basis = torch.from_numpy(helmert(c) if of_classes(goal, batch) else np.eye(c))

    def contrasts(at: nn.Module, of: Batch) -> Tensor:
        z = widened(logits_and_labels(at, of)[0])
        return z @ basis.to(z).T

    with torch.no_grad():
        now = contrasts(model, batch)
        off = goal.to(now) @ basis.to(now).T - now
    return jacobian(model, contrasts, batch), off.flatten()


@dataclass(frozen=True, eq=False)
class _System:
    """slopes · move = wanted, for contrasts of a step's rows: [m, p] · [p] = [m]."""

    slopes: Tensor
    wanted: Tensor

    @cached_property
    def kernel(self) -> Tensor:
        slopes = widened(self.slopes)
        return (slopes @ slopes.T).double()

    def solved(self, damping: float) -> Tensor:
        """The ridge solution [p], in double precision."""
        kernel = self.kernel.clone()
        shift = damping * kernel.diagonal().sum() / self.slopes.shape[1]
        kernel.diagonal().add_(shift.clamp(min=torch.finfo(kernel.dtype).tiny))
        slopes = widened(self.slopes)
        move = slopes.T @ torch.linalg.solve(kernel, self.wanted.double()).to(slopes)
        if not torch.isfinite(move).all():
            raise ValueError(
                f"expected a finite step, got NaN or infinity at damping {damping:g}; raise it, or look at the "
                "model's gradients"
            )
        return move
