"""What players are worth: values in units of the output, with intervals, by target and by slice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import Interval
from attribution_core.data import named
from attribution_core.disk.files import ending


@dataclass(frozen=True, eq=False)
class Values:
    """What each player adds to the output, in the output's units and sign.

    Args:
        values: [k], of the mean output (or of `utility`).
        standard_error: [k]; 0 where the value is exact, nan where unknown.
        players: [k] names: ids, or owners.
        per_target: [k, t] the values for each output by itself.
        change: f(everyone) − f(nobody), what Shapley values add up to; nan where unknown.
        empty: f(nobody); nan where unknown.
        freedom: degrees of freedom of the standard errors (draws − 1), for intervals; one, or [k].
        kind: how the players' marginal contributions were averaged.
        targets: [t] names of the outputs.
        labels: [n] the owner of each example, where players are owners.
        meta: how it was made.
    """

    values: NDArray[Any]
    standard_error: NDArray[Any]
    players: NDArray[Any]
    per_target: NDArray[Any]
    change: float = math.nan
    empty: float = math.nan
    freedom: float | NDArray[Any] = math.inf
    kind: str = "shapley"
    targets: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = np.size(self.values)
        for name in ("values", "standard_error", "players"):
            array = np.asarray(getattr(self, name))
            if array.shape != (k,):
                raise ValueError(f"expected {name} of shape ({k},), got {array.shape}")
            object.__setattr__(self, name, array)
        per_target = np.asarray(self.per_target, dtype=float)
        if per_target.ndim != 2 or len(per_target) != k:
            raise ValueError(f"expected per_target [k={k}, t], got {per_target.shape}")
        if not np.isfinite(self.values).all():
            raise ValueError("expected finite values, got NaN or infinity; look at the outputs")
        object.__setattr__(self, "per_target", per_target)

    def __len__(self) -> int:
        return len(self.values)

    def __neg__(self) -> Values:
        """The values of minus the output: of a loss, what a player is worth."""
        return replace(
            self, values=-self.values, per_target=-self.per_target, change=-self.change,
            empty=-self.empty,
        )  # fmt: skip

    @property
    def half(self) -> NDArray[np.float64]:
        """Half-widths [k] of 95 % t intervals."""
        from scipy.stats import t as student

        return student.ppf(0.975, self.freedom) * np.asarray(self.standard_error, dtype=float)

    @property
    def remainder(self) -> float:
        """What the values do not explain: Σ values − (f(everyone) − f(nobody))."""
        return float(self.values.sum() - self.change)

    def interval(self, player: Any) -> Interval:
        """The value of one player with its 95 % interval."""
        place = np.flatnonzero(self.players == player)
        if not len(place):
            raise KeyError(
                f"no player {player!r}; they look like {np.asarray(self.players)[:3].tolist()}"
            )
        mean, half = float(self.values[place[0]]), float(self.half[place[0]])
        return Interval(mean, mean - half, mean + half)

    def slices(self, labels: ArrayLike) -> NDArray[np.float64]:
        """Values [k, labels] for slices of the targets (classes, languages), in the order of np.unique.

        By linearity: the value for a slice's mean output is the mean of its values.
        """
        names, index = named(labels, self.per_target.shape[1])
        share = np.zeros((len(index), len(names)))
        share[np.arange(len(index)), index] = 1.0
        return self.per_target @ (share / share.sum(0))

    def table(self, rows: int = 20) -> str:
        """The players from the highest value to the lowest, of many both ends; with intervals, and the sum.

        Args:
            rows: the most players shown, half of them the highest, half the lowest.
        """
        order = np.argsort(-self.values, kind="stable")
        high = len(self) if len(self) <= rows else -(-rows // 2)
        low = max(high, len(self) - rows // 2)
        shown = [*order[:high], *order[low:]]
        width = max([6, *(len(str(self.players[i])) for i in shown)])
        lines = [f"{'player':{width}}  value [95 % interval]"]
        half = self.half
        for i in shown:
            mean = float(self.values[i])
            one = Interval(mean, mean - half[i], mean + half[i])
            lines.append(f"{self.players[i]!s:{width}}  {one}")
        if low > high:
            lines.insert(1 + high, f"... {low - high} between left out ...")
        total = f"sum {self.values.sum():.4g}"
        if math.isfinite(self.change):
            total += (
                f"; f(everyone) - f(nobody) = {self.change:.4g}, remainder {self.remainder:.2g}"
            )
        return "\n".join([*lines, total])

    def save(self, path: str | Path) -> None:
        """Write a .parquet or .csv file: player, value, standard_error.

        Raises:
            ValueError: another ending.
        """
        import pyarrow as pa

        suffix = ending(path, ".parquet", ".csv")
        made = pa.table(
            {
                "player": pa.array(np.asarray(self.players).tolist()),
                "value": pa.array(np.asarray(self.values, dtype=float)),
                "standard_error": pa.array(np.asarray(self.standard_error, dtype=float)),
            }
        )
        if suffix == ".csv":
            from pyarrow import csv

            csv.write_csv(made, path)
        else:
            from pyarrow import parquet

            parquet.write_table(made, path)
