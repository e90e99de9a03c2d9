"""Models matched to logits that are to change: how, and how near they came."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from applied.forgetting.gauss_newton import (
    TOGETHER,
    GaussNewton,
    fitting,
    match_by_gauss_newton,
    match_together,
    row_cost,
    squares_of_means,
)  # fmt: skip
from applied.unlearners import Steps, centred_logits, is_sequence, match, of_classes
from attribution_core.data import Progress, Rows, batches, rows_in, sample, take
from attribution_core.outputs import labels_in, next_labels
from attribution_core.precision import widened

KINDS = ("forget logits", "retain logits")
TIMES = (1.0, 3.0, 10.0)  # learning rates of Adam, in the training's
RATES = (0.02, 0.06, 0.18)  # learning rates of SGD
ROWS, LEAST = 100, 2  # Gauss–Newton steps: rows of each, about; how many at least
SEEN = 50  # rows of either set that settle their damping
How = GaussNewton | Steps | None  # None: left alone


@dataclass(frozen=True, eq=False)
class Goal:
    """Logits of the forget set and of retained rows that models are to reach."""

    forget: Rows
    retain: Rows

    def logits(self, model: nn.Module) -> dict[str, Tensor]:
        """Centred logits [rows, ..., c] of both sets; 0 where nothing is predicted."""
        device = next(model.parameters()).device
        with torch.no_grad():
            return {
                name: torch.cat(
                    [
                        widened(_counted(*centred_logits(model, take(data, some, device))))
                        for some in batches(len(data), 256)
                    ]
                ).cpu()
                for name, data in zip(KINDS, (self.forget, self.retain), strict=True)
            }

    def reached(self, model: nn.Module, change: Any, how: How) -> nn.Module:
        """The model, matched to its own logits as they are to change."""
        if how is None:
            return copy.deepcopy(model)
        wanted = self._wanted(model, change)
        by: Any = match_by_gauss_newton if isinstance(how, GaussNewton) else match
        return by(
            model,
            self.forget,
            self.retain,
            forget_logits=wanted[0],
            retain_logits=wanted[1],
            how=how,
        )

    def matched(
        self, runs: Sequence[Any], change: Any, left: float, seed: int, progress: Progress = iter
    ) -> tuple[list[nn.Module], How, float]:
        """(the models matched, how, what that cost each run in training steps), within what is left for each.

        Gauss–Newton steps for a model of single rows whose Jacobian can be held, damped as brings the first few models'
        mean nearest. Else gradient steps, at the learning rate that brings the first model nearest. Where nothing
        does, all models are left alone.

        Raises:
            ValueError: changes that are not finite or not of the logits' shape; no step left.
        """
        first, batch = runs[0].model, len(runs[0].order[0])
        self._refuse(change, self.logits(first))
        plan = self._solving(first, left * batch, change)
        if plan is not None:
            models, how = self._by_solving(plan, runs, change, seed)
            rows = plan.steps * plan.rows * plan.each
        else:
            like, rates = self._gradient_steps(runs, left * batch, seed)
            models, how = self._by_descending(first, change, [replace(like, lr=lr) for lr in rates])
            rows = like.steps * like.batch_size * _tries(rates, runs)
        for k, run in enumerate(progress(runs[len(models) :]), len(models)):
            again = None if how is None else replace(how, seed=seed + k)
            models.append(self.reached(run.model, change, again))
        return models, how, rows / batch

    def _solving(self, model: nn.Module, rows: float, change: Any) -> Plan | None:
        """Gauss–Newton steps that cost so many rows of training; None where gradient steps are needed."""
        classes = change[0].shape[-1]
        if change[0].ndim != 2 or classes == 1:
            return None
        contrasts = classes - of_classes(change[0][:1], take(self.forget, [0]))
        each = row_cost(contrasts)
        steps = max(LEAST, round(rows / (each * ROWS)))
        size = min(int(rows / (each * steps)), len(self.forget) + len(self.retain))
        at_once = fitting(model, size, contrasts) if size > 1 else 0
        return Plan(steps, size, each, min(at_once, TOGETHER)) if at_once else None

    def _by_solving(
        self, plan: Plan, runs: Sequence[Any], change: Any, seed: int
    ) -> tuple[list[nn.Module], How]:
        """(the first models, matched together or left alone, how)."""
        before = [run.model for run in runs[: plan.at_once]]
        forget, retain = zip(*(self._wanted(model, change) for model in before), strict=True)
        some, part = self._sampled(change, seed)
        goals = [some._wanted(model, part) for model in before]

        def left(k: int, model: nn.Module) -> list[Tensor]:
            return _less(goals[k], some.logits(model))

        alone = [copy.deepcopy(model) for model in before]
        try:
            models, how = match_together(
                before, self.forget, self.retain, forget_logits=forget, retain_logits=retain, left=left,
                steps=plan.steps, rows=plan.rows, of=len(runs), seed=seed,
            )  # fmt: skip
        except ValueError:  # diverged
            return alone, None
        missed = squares_of_means([left(k, model) for k, model in enumerate(models)], len(runs))
        nearer = missed < squares_of_means([part], 1)
        return (models, how) if nearer else (alone, None)

    def _by_descending(
        self, first: nn.Module, change: Any, ways: Sequence[Steps]
    ) -> tuple[list[nn.Module], How]:
        """(the first model, matched by the best way or left alone, how)."""
        best: tuple[nn.Module, How] = copy.deepcopy(first), None
        wanted = self._wanted(first, change)
        least = squares_of_means([change], 1)
        for how in ways:
            try:
                model = self.reached(first, change, how)
                missed = squares_of_means([_less(wanted, self.logits(model))], 1)
            except ValueError:  # diverged
                continue
            if missed < least:
                best, least = (model, how), missed
        return [best[0]], best[1]

    def _gradient_steps(
        self, runs: Sequence[Any], rows: float, seed: int
    ) -> tuple[Steps, list[float]]:
        """(steps on half of the training's batches: twice as many come nearer at the same cost; learning rates)."""
        optimizer, batch = runs[0].recipe.optimizer, len(runs[0].order[0])
        size = max(2, min(batch, len(self.forget) + len(self.retain)) // 2)
        steps = int(rows / size / _tries(RATES, runs))
        if steps < 1:
            raise ValueError(
                f"expected steps left to match with, got {rows / batch:.1f} a model after rehearsals; raise `budget`"
            )
        like = Steps(steps, momentum=0.8, batch_size=size, decay=True, clip=1.0, seed=seed)
        if hasattr(optimizer, "betas"):  # trained by Adam: matched by it
            return replace(like, momentum=None), [k * optimizer.lr for k in TIMES]
        return like, list(RATES)

    def own(self, name: str, change: Tensor) -> Tensor:
        """Of changed logits [k, rows, ..., c] the labels' own [k, rows, ...]; all where labels are no classes."""
        data = self.forget if name == KINDS[0] else self.retain
        parts = [take(data, some, change.device) for some in batches(len(data), 256)]
        those = change
        if is_sequence(parts[0], (rows_in(parts[0]), *change.shape[2:-1])):
            found, those = [next_labels(part) for part in parts], change[:, :, :-1]
        else:
            found = [x for x in map(labels_in, parts) if x is not None]
        labels = torch.cat(found) if found else torch.zeros(0)
        classes = not labels.is_floating_point() and labels.shape == those.shape[1:-1]
        if not classes or those.shape[-1] == 1 or int(labels.max()) >= those.shape[-1]:
            return change
        # where nothing is predicted, at label −100, changes are 0
        places = labels.clamp(min=0).expand(those.shape[:-1])
        return those.gather(-1, places[..., None])[..., 0]

    def _refuse(self, change: Any, logits: dict[str, Tensor]) -> None:
        """Raise where changes are not one finite number for each logit."""
        for (name, now), part in zip(logits.items(), change, strict=True):
            if part.shape != now.shape or not torch.isfinite(part).all():
                raise ValueError(
                    f"expected finite changes of the {name}, of shape {tuple(now.shape)}, got {tuple(part.shape)}"
                    f"{'' if torch.isfinite(part).all() else ' with NaN or infinity'}"
                )

    def share_missed(self, before: nn.Module, after: nn.Module, change: Any) -> float:
        """The share of the wanted squared change of logits that is missing: 0 is all reached, 1 none, or as large an error."""
        wanted = squares_of_means([change], 1)
        left = _less(self._wanted(before, change), self.logits(after))
        return squares_of_means([left], 1) / wanted if wanted else 0.0

    def _wanted(self, model: nn.Module, change: Any) -> list[Tensor]:
        """A model's logits of both sets, as they are to change."""
        now = self.logits(model)
        return [now[name] + part.to(now[name]) for name, part in zip(KINDS, change, strict=True)]

    def _sampled(self, change: Any, seed: int) -> tuple[Goal, list[Tensor]]:
        """The goal on fewer rows, and their changes."""
        sets = (self.forget, self.retain)
        kept = [sample(len(data), SEEN, seed) for data in sets]
        forget, retain = (Rows(data, rows) for data, rows in zip(sets, kept, strict=True))
        return Goal(forget, retain), [part[rows] for part, rows in zip(change, kept, strict=True)]


@dataclass(frozen=True)
class Plan:
    """Gauss–Newton steps: how many, on how many rows each, what a row costs, how many models take them at once."""

    steps: int
    rows: int
    each: float
    at_once: int


def _tries(ways: Sequence[Any], runs: Sequence[Any]) -> float:
    """How often each run pays for a matching: once, and its part of what is tried on the first."""
    return 1 + (len(ways) - 1) / len(runs)


def _less(wanted: Sequence[Tensor], logits: dict[str, Tensor]) -> list[Tensor]:
    return [z - now.to(z) for z, now in zip(wanted, logits.values(), strict=True)]


def _counted(z: Tensor, places: Tensor) -> Tensor:
    return z * places[..., None]
