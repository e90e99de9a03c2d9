"""Models matched to logits that are to change: how, and how near they came."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from applied.gauss_newton import GaussNewton, fits, match_by_gauss_newton, row_cost
from applied.unlearners import Steps, centred_logits, is_sequence, match, of_classes
from attribution_core.data import Rows, batches, rows_in, take
from attribution_core.outputs import labels_in, next_labels

KINDS = ("forget logits", "retain logits")
TIMES = (1.0, 3.0, 10.0)  # learning rates of Adam, in the training's
RATES = (0.02, 0.06, 0.18)  # learning rates of SGD
DAMPINGS = (0.003, 0.1)  # of Gauss–Newton steps
ROWS, LEAST = 100, 2  # Gauss–Newton steps: rows of each, about; how many at least
Progress = Callable[[Iterable[Any]], Iterable[Any]]
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
                        _counted(*centred_logits(model, take(data, some, device)))
                        for some in batches(len(data), 256)
                    ]
                ).cpu()
                for name, data in zip(KINDS, (self.forget, self.retain), strict=True)
            }

    def reached(self, model: nn.Module, change: Any, how: How) -> nn.Module:
        """The model, matched to its own logits as they are to change."""
        if how is None:
            return copy.deepcopy(model)
        now = self.logits(model)
        wanted = [now[name] + part.to(now[name]) for name, part in zip(KINDS, change, strict=True)]
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

        Gauss–Newton steps for a model of single rows whose Jacobian can be held: the least damping that brings the
        first run nearer, since damping moves all models short of the goal the same way. Else gradient steps, at the
        learning rate that brings it nearest. Where nothing does, all models are left alone.

        Raises:
            ValueError: changes that are not finite or not of the logits' shape; no step left.
        """
        first, batch = runs[0].model, len(runs[0].order[0])
        self._refuse(change, self.logits(first))
        ways, rows = self._ways(runs, left * batch, change, seed)
        tried = 0
        best: tuple[nn.Module, How, float]
        best = copy.deepcopy(first), None, self._missed(first, first, change)
        for how in ways:
            tried += 1
            try:
                model = self.reached(first, change, how)
                missed = self._missed(first, model, change)
            except ValueError:  # left the finite numbers
                continue
            if missed < best[2]:
                best = model, how, missed
                if isinstance(how, GaussNewton):
                    break
        models, how = [best[0]], best[1]
        for k, run in enumerate(progress(runs[1:]), 1):
            again = None if how is None else replace(how, seed=seed + k)
            models.append(self.reached(run.model, change, again))
        return models, how, rows * (1 + (tried - 1) / len(runs)) / batch

    def _ways(
        self, runs: Sequence[Any], rows: float, change: Any, seed: int
    ) -> tuple[list[How], float]:
        """(what to try, what one costs in rows of training)."""
        classes = change[0].shape[-1]
        if change[0].ndim == 2 and classes > 1:
            contrasts = classes - of_classes(change[0][:1], take(self.forget, [0]))
            each, whole = row_cost(contrasts), rows / _tries(DAMPINGS, runs)
            steps = max(LEAST, round(whole / (each * ROWS)))
            size = min(int(whole / (each * steps)), len(self.forget) + len(self.retain))
            if size > 1 and fits(runs[0].model, size, contrasts):
                by_solving = [GaussNewton(steps, size, some, seed) for some in DAMPINGS]
                return [*by_solving], steps * size * each
        like, rates = self._gradient_steps(runs, rows, seed)
        return [replace(like, lr=lr) for lr in rates], like.steps * like.batch_size

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
        """Of the squared change of logits that was wanted; 0 is all of it reached, 1 none or as far beside it."""
        wanted = self._missed(before, before, change)
        return self._missed(before, after, change) / wanted if wanted else 0.0

    def _missed(self, before: nn.Module, after: nn.Module, change: Any) -> float:
        """Mean squared distance of logits from those wanted, both sets alike."""
        was, now = self.logits(before), self.logits(after)
        return sum(
            float((now[name] - was[name] - part.to(was[name])).square().mean())
            for name, part in zip(KINDS, change, strict=True)
        )


def _tries(ways: Sequence[Any], runs: Sequence[Any]) -> float:
    """How often each run pays for a matching: once, and its part of what is tried on the first."""
    return 1 + (len(ways) - 1) / len(runs)


def _counted(z: Tensor, places: Tensor) -> Tensor:
    return z * places[..., None]
