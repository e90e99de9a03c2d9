"""Models matched to logits that are to change: how fast, and how near they came."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from applied.unlearners import Steps, centred_logits, match
from attribution_core.data import Rows, batches, take

KINDS = ("forget logits", "retain logits")
TIMES = (1.0, 3.0, 10.0)  # learning rates of Adam, in the training's
RATES = (0.02, 0.06, 0.18)  # learning rates that matching is tried with, on the first run


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

    def reached(self, model: nn.Module, change: Any, how: Steps) -> nn.Module:
        """The model, matched to its own logits as they are to change."""
        now = self.logits(model)
        wanted = [now[name] + part.to(now[name]) for name, part in zip(KINDS, change, strict=True)]
        return match(
            model,
            self.forget,
            self.retain,
            forget_logits=wanted[0],
            retain_logits=wanted[1],
            how=how,
        )

    def best_rate(
        self, run: Any, change: Any, left: float, runs: int, seed: int
    ) -> tuple[Steps, float]:
        """(how to match within what is left for each of the runs, what it and the choice cost each, in training steps).

        Batches are half of the training's: twice as many steps come nearer at the same cost. Tried on one run.
        """
        model, optimizer = run.model, run.recipe.optimizer
        batch = len(run.order[0])
        size = max(2, min(batch, len(self.forget) + len(self.retain)) // 2)
        tries = 1 + len(RATES) / runs
        each = int(left * batch / size / tries)
        if each < 1:
            raise ValueError(
                f"expected steps left to match with, got {left:.1f} a model after rehearsals; raise `budget`"
            )
        like = Steps(each, momentum=0.8, batch_size=size, decay=True, clip=1.0, seed=seed)
        rates = RATES
        if hasattr(optimizer, "betas"):  # trained by Adam: matched by it
            like, rates = replace(like, momentum=None), tuple(k * optimizer.lr for k in TIMES)
        tried = {0.0: self._missed(model, model, change)}  # better left alone than made worse
        for lr in rates:
            how = replace(like, lr=lr)
            try:
                tried[lr] = self._missed(model, self.reached(model, change, how), change)
            except ValueError:  # left the finite numbers
                tried[lr] = math.inf
        best = min(tried, key=tried.__getitem__)
        return replace(like, lr=best), each * tries * size / batch

    def _missed(self, before: nn.Module, after: nn.Module, change: Any) -> float:
        """Mean squared distance of logits from those wanted, both sets alike."""
        was, now = self.logits(before), self.logits(after)
        return sum(
            float((now[name] - was[name] - part.to(was[name])).square().mean())
            for name, part in zip(KINDS, change, strict=True)
        )


def _counted(z: Tensor, places: Tensor) -> Tensor:
    return z * places[..., None]
