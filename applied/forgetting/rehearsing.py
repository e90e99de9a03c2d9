"""Rehearsals of a removal: how many the budget allows, how outputs and logits change, how far to trust that."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from applied.forgetting.matching import KINDS, Goal
from attribution_core.data import Progress
from attribution_core.problem import Outputs
from attribution_core.rehearsal import Pace, Rehearsal, rehearse

MATCHING = 0.3  # of the budget; the rest is for rehearsals
ROUNDING = 1e-9
PAIRS = 2  # rehearsals at least: one shows no noise, and larger batches help more than many
LARGEST = 0.5  # share of a batch: no rehearsal is the whole training without the forget set
BEHIND = 0.5  # of the runs' logits; where rehearsals serve, they miss .1 to .3
TOO_LITTLE = (
    "rehearsals learn less than half of what the runs did (on the forget set they miss {behind:.2f} of the runs' logits): what "
    "is learned late is not rehearsed, and too little may be forgotten; give a larger budget, more runs, or "
    "counterparts that were never seen (`like=`)"
)
ALONE = (
    "with a single run the noise cannot be estimated, so the prediction is used unshrunk and other rows may change as much as "
    "the forget set; pass several runs with different seeds"
)


class UnlearningWarning(UserWarning):
    """Models that come back as they were given, or may have forgotten too little or too much."""


def plan_rehearsals(
    runs: Sequence[Any], budget: float, pace: Pace | None = None, models: bool = True
) -> tuple[Pace, int]:
    """(how to rehearse, with how many runs), within the budget of all runs together; see `unlearn`.

    Args:
        runs: whatever has the `order` of a training's batches.
        pace: the one that is asked for; by default the largest batches that the budget has room for.
        models: whether models are to be matched afterwards, for which a part of the budget is kept.

    Raises:
        ValueError: batches of one row; the smallest rehearsals, or those asked for, cost more, or leave no step
            to match with.
    """
    n, length, rows = len(runs), len(runs[0].order), len(runs[0].order[0])
    sizes = range(int(LARGEST * rows), 0, -1)
    paces = [pace] if pace is not None else [Pace(size / rows) for size in sizes]
    if not paces:
        raise ValueError(
            "expected runs on batches of two rows or more, got one: rehearsals are on smaller ones; "
            "`pace=Pace(1)` asks for whole trainings without the forget set"
        )
    total, least = n * length * budget + ROUNDING, min(n, PAIRS)
    whole = total * (1 - MATCHING if models else 1)
    fitting = (some for some in paces if least * some.cost(runs[0]) <= whole)
    plan = next(fitting, paces[-1])
    pairs = min(n, max(int(whole // plan.cost(runs[0])), least))
    spent = pairs * plan.cost(runs[0]) / n
    if spent > budget * length + ROUNDING - models:
        raise ValueError(
            f"expected a budget that rehearsals fit in, got {budget:g} of {length} steps, while {pairs} pairs "
            f"on batches of {plan.size(runs[0])} take {spent:.1f} a model{', and matching a step' * models}; raise `budget` "
            "or give more runs"
        )
    return plan, pairs


@dataclass(frozen=True, eq=False)
class _Reader:
    """What rehearsals read of a model: outputs by name, and the logits of both sets, as one vector."""

    named: Mapping[str, Outputs]
    goal: Goal | None

    def parts(self, model: nn.Module) -> dict[str, Tensor]:
        found = {name: some.evaluate(model) for name, some in self.named.items()}
        return found if self.goal is None else {**found, **self.goal.logits(model)}

    def __call__(self, model: nn.Module) -> Tensor:
        parts = self.parts(model)
        self.shapes.update({name: part.shape for name, part in parts.items()})
        return torch.cat([part.double().cpu().flatten() for part in parts.values()])

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {}

    def cut(self, found: Rehearsal) -> dict[str, Rehearsal]:
        """The rehearsals, as they read each part."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(found.changes.split(sizes, dim=1), found.ahead.split(sizes, dim=1), strict=True)
        return {
            name: replace(
                found, changes=changes.reshape(-1, *shape), ahead=ahead.reshape(-1, *shape)
            )
            for (name, shape), (changes, ahead) in zip(self.shapes.items(), parts, strict=True)
        }

    def trust(self, parts: Mapping[str, Rehearsal]) -> dict[str, float]:
        """How far each part's mean change is trusted.

        Logits by the larger of two estimates, from all of them and from those of the labels: most of a change is in the
        latter, most of the noise in the others, and two pairs are few for either.
        """
        trust = {name: part.trust for name, part in parts.items()}
        if self.goal is not None:
            for name in KINDS:
                own = self.goal.own(name, parts[name].changes)
                trust[name] = max(trust[name], replace(parts[name], changes=own).trust)
        return trust


@dataclass(frozen=True, eq=False)
class Told:
    """What is predicted to change, by name, as far as it is trusted; what that cost, and how it was found."""

    moved: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    steps: float = 0.0  # a run
    meta: Mapping[str, Any] = field(default_factory=dict)


def rehearsed(
    runs: Sequence[Any],
    without: NDArray[np.float64],
    named: Mapping[str, Outputs],
    goal: Goal | None,
    *,
    of_models: bool,
    budget: float,
    pace: Pace | None = None,
    progress: Progress = iter,
) -> Told:
    """The trusted changes of outputs, and of a goal's logits, by pairs of rehearsals with and without some rows.

    Args:
        without: [n] weights that leave the rows out.
        goal: whose logits are read as well.
        of_models: whether a part of the budget is kept for matching models.
        budget: of a training's steps, for each run.

    Raises:
        ValueError: see `plan_rehearsals`.
        UnlearningWarning: (a warning) a single run; rehearsals that learn less than half of what the runs did.
    """
    plan, pairs = plan_rehearsals(runs, budget, pace, of_models)
    reader = _Reader(named, goal)
    found = rehearse(runs[:pairs], without, reader, pace=plan, progress=progress)
    parts = reader.cut(found)
    trust, carried = reader.trust(parts), {name: part.carried for name, part in parts.items()}
    meta: dict[str, Any] = {"pairs": pairs, "pace": plan, "trust": trust, "carried": carried}
    if goal is not None:
        meta["behind"] = _behind(parts[KINDS[0]], goal.logits(runs[0].model)[KINDS[0]])
        _warn_of(runs, meta["behind"])
    moved = {name: (trust[name] * part.corrected).numpy() for name, part in parts.items()}
    return Told(moved, found.steps / len(runs), meta)


def _behind(found: Rehearsal, logits: Tensor) -> float:
    """How much of a run's logits its rehearsals miss, in their size: √(mean ahead² / mean logits²)."""
    ahead, size = (float(x.double().square().mean()) for x in (found.ahead.mean(0), logits))
    return math.sqrt(ahead / size) if size else math.inf if ahead else 0.0


def _warn_of(runs: Sequence[Any], behind: float) -> None:
    """Warn where rehearsals fall short: a single run shows no noise, and what is learned late is not rehearsed."""
    if len(runs) == 1:
        warnings.warn(ALONE, UnlearningWarning, stacklevel=4)
    if behind > BEHIND:
        warnings.warn(TOO_LITTLE.format(behind=behind), UnlearningWarning, stacklevel=4)
