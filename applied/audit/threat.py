"""What an adversary may do to training data: stated before an attack, checked against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import named

Change = Literal["labels", "inputs", "rows"]
Knowledge = Literal["white-box", "grey-box", "black-box"]
ROUNDING = 1e-6  # of the box: float32 inputs that were normalised
NORMS = {"inf": "inf", "linf": "inf", "2": "2", "l2": "2", "2.0": "2"}


@dataclass(frozen=True)
class ThreatModel:
    """Who could change what, and how much of it.

    Args:
        budget: rows that may be changed or brought in: a number, or a share of the training rows below 1.
        may_change: "labels" of rows, "inputs" of rows (inside a ball), or which "rows" there are (insert,
            remove).
        knowledge: "white-box": the adversary knows the data and trains what the victim trains; "grey-box": the
            data, and another model, so that the attack has to transfer; "black-box": only where the data come
            from. Stated in every table; the callables given to an attack make it true.
        norm, epsilon: of inputs: every changed row stays within ‖x − original‖ ≤ epsilon, "inf" or "2" (or "linf",
            "l2", inf, 2) over all numbers of the row.
        box: of inputs: the smallest and the largest number that an input can be.
        source_quota: rows at most from one source (an author, an owner), given labels of sources.
        clean_label: labels are beyond reach, as where the victim labels the data.

    Raises:
        ValueError: a budget of nothing, numbers out of range, a ball for what has no inputs to move, or inputs
            to move without a ball.

    >>> ThreatModel(budget=0.05, may_change="labels").rows(1000)
    50
    """

    budget: float
    may_change: Change
    knowledge: Knowledge = "white-box"
    norm: str | float = "inf"
    epsilon: float | None = None
    box: tuple[float, float] | None = None
    source_quota: int | None = None
    clean_label: bool = False

    def __post_init__(self) -> None:
        if self.may_change not in ("labels", "inputs", "rows"):
            raise ValueError(f"expected may_change labels, inputs or rows, got {self.may_change!r}")
        if self.knowledge not in get_args(Knowledge):
            raise ValueError(
                f"expected knowledge among {get_args(Knowledge)}, got {self.knowledge!r}"
            )
        if isinstance(self.budget, (str, bytes)) or not hasattr(self.budget, "__float__"):
            raise ValueError(f"expected a budget in numbers, got {self.budget!r}")
        whole = self.budget >= 1 and self.budget % 1 == 0
        if not (math.isfinite(self.budget) and (0 < self.budget < 1 or whole)):
            raise ValueError(
                f"expected a budget of at least one row, or a share of the rows in (0, 1), got {self.budget}; "
                "an adversary who may change nothing needs no audit"
            )
        if self.source_quota is not None and not (
            self.source_quota >= 1 and self.source_quota % 1 == 0
        ):
            raise ValueError(
                f"expected a source_quota of at least 1, got {self.source_quota}; it counts rows"
            )
        if self.clean_label and self.may_change == "labels":
            raise ValueError(
                "a threat model that cannot be met: clean_label puts labels beyond reach, and may_change='labels' "
                "changes nothing else; use may_change='inputs' or 'rows', or clean_label=False"
            )
        self._check_ball()

    def _check_ball(self) -> None:
        norm = NORMS.get(str(self.norm).lower())
        if norm is None:
            raise ValueError(f"expected norm 'inf' or '2', got {self.norm!r}")
        object.__setattr__(self, "norm", norm)
        if (self.epsilon is not None) != (self.may_change == "inputs"):
            raise ValueError(
                f"expected an epsilon for inputs and for nothing else, got may_change={self.may_change!r} with "
                f"epsilon={self.epsilon}; say how far an input may move"
            )
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ValueError(f"expected a positive epsilon, got {self.epsilon}")
        if self.box is not None and not (len(self.box) == 2 and self.box[0] < self.box[1]):
            raise ValueError(f"expected a box (low, high), got {self.box}")

    def rows(self, n: int) -> int:
        """The budget in rows, of n training rows.

        Raises:
            ValueError: more than there are, or a share that rounds to none.
        """
        k = round(self.budget * n) if self.budget < 1 else int(self.budget)
        if not 1 <= k <= n:
            raise ValueError(
                f"a threat model that cannot be met: expected a budget of 1 to {n} rows, got {self.budget:g} "
                f"({k} rows)"
            )
        return k

    def check(self, change: Change, sources: ArrayLike | None, n: int) -> NDArray[Any] | None:
        """Labels of sources [n] where they are needed; raises where the attack is another one.

        Raises:
            ValueError: an attack that changes something else; a quota without sources, rows of none, or too few
                sources for the budget.
        """
        if self.may_change != change:
            raise ValueError(
                f"expected a threat model with may_change={change!r}, got {self.may_change!r}; this attack changes "
                f"{change}"
            )
        if self.source_quota is None:
            return None
        if sources is None:
            raise ValueError(
                f"expected sources [n={n}] beside source_quota={self.source_quota}, got none; pass one label a row"
            )
        if np.shape(sources) != (n,):
            raise ValueError(f"expected sources [n={n}], got {np.shape(sources)}")
        names, index = named(sources, n)  # a quota on rows of no source would hold for each of them
        most = int(np.minimum(np.bincount(index), self.source_quota).sum())
        if most < self.rows(n):
            raise ValueError(
                f"a threat model that cannot be met: {self.rows(n)} rows, while a quota of {self.source_quota} a "
                f"source leaves {most}; lower the budget or raise the quota"
            )
        return names[index]

    def within(self, x: NDArray[Any], original: NDArray[Any]) -> NDArray[Any]:
        """The nearest inputs [k, ...] inside the ball around the originals, then inside the box.

        Raises:
            ValueError: originals that are outside the box.

        >>> threat = ThreatModel(1, "inputs", epsilon=0.5, box=(0.0, 1.0))
        >>> threat.within(np.array([[2.0, 0.3]]), np.array([[0.2, 0.2]])).tolist()
        [[0.7, 0.3]]
        """
        assert self.epsilon is not None
        slack = 0.0 if self.box is None else ROUNDING * max(1.0, *map(abs, self.box))
        if self.box is not None and (
            original.min() < self.box[0] - slack or original.max() > self.box[1] + slack
        ):
            raise ValueError(
                f"expected originals in the box [{self.box[0]:g}, {self.box[1]:g}], got some in "
                f"[{original.min():g}, {original.max():g}]; they would have to leave the ball to get there"
            )
        moved = x - original
        if self.norm == "inf":
            moved = np.clip(moved, -self.epsilon, self.epsilon)
        else:
            length = np.linalg.norm(moved.reshape(len(x), -1), axis=1)
            short = np.minimum(1.0, self.epsilon / np.maximum(length, 1e-300))
            moved = moved * short.reshape(-1, *[1] * (x.ndim - 1))
        inside = original + moved
        return inside if self.box is None else np.clip(inside, *self.box)

    def __str__(self) -> str:
        words = [f"may change {self.may_change} of {self.budget:g} rows" if self.budget >= 1
                 else f"may change {self.may_change} of {self.budget:.3g} of the rows",
                 self.knowledge]  # fmt: skip
        if self.epsilon is not None:
            words.append(f"within {self.epsilon:g} ({self.norm} norm)")
        if self.box is not None:
            words.append(f"inputs in [{self.box[0]:g}, {self.box[1]:g}]")
        if self.source_quota is not None:
            words.append(f"at most {self.source_quota} rows a source")
        if self.clean_label:
            words.append("labels beyond reach")
        return ", ".join(words)
