"""How far a gradient moves the parameters, in its own step and in later ones.

    θ_{l+1} − θ_l = −Σ_{k ≤ l} gain_l keep^(l − k) P_l ⊙ g_k  (and weight decay)

with keep the momentum or Adam's β₁, and P_l 1 or Adam's 1 / (√(v̂_l + eps_root) + eps). A gradient g_k
therefore does to an output, whose gradient along step l is ĝ_l,

    −⟨g_k, total_k D_k⟩,    total_k = Σ_{l ≥ k} gain_l keep^(l − k),    D_k the same mean of P_l ⊙ ĝ_l
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attribution_core.calling import Params
from attribution_core.stepwise.optimizers import SGD, State
from attribution_core.stepwise.passes import Pass
from attribution_core.stepwise.steps import Steps

AHEAD = 0.03  # of a gradient's movements that may still be unknown when it is read


class Segment(NamedTuple):
    """A segment of steps, and the outputs' average gradient ĝ along it."""

    slope: Params
    passes: list[Pass]


@dataclass(frozen=True, eq=False)
class Reach:
    """What the steps of a training do with a gradient: gain, keep, total, and the later steps' share of total."""

    optimizer: Any  # SGD or Adam
    lr: NDArray[np.float64]
    keep: float
    total: NDArray[np.float64]
    later: NDArray[np.float64]

    @classmethod
    def of(cls, steps: Steps) -> Reach:
        optimizer: Any = steps.packed_optimizer
        lr = gain = optimizer.lr * steps.factors
        if isinstance(optimizer, SGD):
            keep = optimizer.momentum
        else:
            keep = optimizer.betas[0]
            gain = lr * (1 - keep) / (1 - keep ** np.arange(1, len(lr) + 1))
        total = np.zeros(len(lr) + 1)
        for k in reversed(range(len(lr))):
            total[k] = gain[k] + keep * total[k + 1]
        rest, total = keep * total[1:], total[:-1]
        later = np.divide(rest, total, out=np.zeros_like(lr), where=total > 0)
        return cls(optimizer, lr, keep, total, later)

    @property
    def lag(self) -> int:
        """Steps after which all but `AHEAD` of a gradient's movements are known."""
        return math.ceil(math.log(AHEAD) / math.log(self.keep)) if self.keep > 0 else 0

    def pace(self, moments: State, step: int) -> Params:
        """P of a step, from the moments that it leaves; {} for 1."""
        optimizer = self.optimizer
        if isinstance(optimizer, SGD):
            return {}
        correction = 1 - optimizer.betas[1] ** (step + 1)
        return {
            name: 1 / ((v / correction + optimizer.eps_root).sqrt() + optimizer.eps)
            for name, v in moments["second"].items()
        }

    def moved(self, step: int) -> float:
        """total_k; with Nesterov's momentum, whose movement is g + momentum · buffer, more."""
        nesterov = isinstance(self.optimizer, SGD) and self.optimizer.nesterov
        total = float(self.total[step])
        return float(self.lr[step]) + self.keep * total if nesterov else total

    def directions(self, segments: list[Segment]) -> dict[int, Params]:
        """D_k [t, p] of the steps of neighbouring segments; what comes after them is like their end."""
        found: dict[int, Params] = {}
        after: Params = {}
        nesterov = isinstance(self.optimizer, SGD) and self.optimizer.nesterov
        for segment in reversed(segments):
            for at in reversed(segment.passes):
                here = segment.slope
                if at.pace:
                    here = {name: x * at.pace[name] for name, x in here.items()}
                later = float(self.later[at.step])
                after = mixed(here, after, later) if after and later else here
                found[at.step] = after
                if nesterov:
                    now = float(self.lr[at.step]) / max(self.moved(at.step), 1e-300)
                    found[at.step] = mixed(after, here, now)
        return found


def mixed(one: Params, other: Params, share: float) -> Params:
    """(1 − share) one + share other."""
    return {name: x.lerp(other[name], share) for name, x in one.items()}
