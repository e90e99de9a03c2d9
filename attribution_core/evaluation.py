"""How well a datamodel predicts retrained models: LDS with interval, ceiling and slope."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.datamodel import columns
from attribution_core.table import RetrainingTable

MAX_SPLITS = 20  # of the seeds into halves, for the ceiling
FEW = 30  # targets from which their mean's interval is a bootstrap's
ROUNDING = 1e-12  # of the largest value of a column, as `fit_datamodel` takes it
LISTED = 10_000  # splits from which these are chosen; of more seeds, halves are drawn


@dataclass(frozen=True)
class LDS:
    """Linear datamodeling score (Ilyas et al. 2022; Park et al. 2023, sec. 2.2).

    Args:
        mean: mean over targets of the Spearman correlation, over the table's rows, between predicted
            and retrained outputs (averaged over seeds).
        interval: 95 % interval of the mean, over targets: Student's of fewer than 30, a bootstrap's of more.
        per_target: [t] the correlations.
        ceiling: what a perfect predictor of the seed-averaged output could reach: the square root of
            a target's split-half reliability (Spearman–Brown), in the mean over targets; nan with fewer than two
            seeds. Its bias: see `ceiling`.
        slope: least-squares slope of actual on predicted, both centred per target; 1 is calibrated.
        seeds, rows: size of the truth.
    """

    mean: float
    interval: tuple[float, float]
    per_target: NDArray[np.float64]
    ceiling: float
    slope: float
    seeds: int
    rows: int

    @property
    def span(self) -> str:
        """The interval in words."""
        low, high = self.interval
        return "one target" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"

    def __str__(self) -> str:
        most = "unknown (one seed)" if math.isnan(self.ceiling) else f"{self.ceiling:.3f}"
        return (
            f"LDS {self.mean:.3f} {self.span} over {len(self.per_target)} targets, "
            f"ceiling {most}, slope {self.slope:.2f} "
            f"({self.rows} retrainings × {self.seeds} seeds)"
        )


class Predictor(Protocol):
    """What predicts outputs from training weights: a LinearDatamodel, or anything with these three."""

    @property
    def base(self) -> NDArray[Any]:
        """[t], the outputs at `anchor`."""

    @property
    def anchor(self) -> NDArray[Any]:
        """[n], the weights that predictions start from."""

    def predict(self, weights: ArrayLike) -> NDArray[Any]:
        """Outputs [t] for weights [n], or [m, t] for weights [m, n]."""


def lds(datamodel: Predictor, table: RetrainingTable) -> LDS:
    """Compare a datamodel's predictions with a table of retrained outputs, in the table's order of targets.

    Raises:
        ValueError: other numbers of examples or targets; other names of targets, where both have some; fewer than 3
            rows; outputs or predictions that are not finite, or do not vary, so that no correlation is defined.
    """
    m, n = table.weights.shape
    t = table.outputs.shape[1]
    own = len(datamodel.anchor), len(datamodel.base)
    if (n, t) != own:
        raise ValueError(
            f"expected a table of n={own[0]} examples and t={own[1]} targets, got n={n} and t={t}"
        )
    if m < 3:
        raise ValueError(f"expected at least 3 retrainings to correlate, got {m}")
    order = columns(getattr(datamodel, "targets", None), table.targets, t)
    predicted, actual = np.take(datamodel.predict(table.weights), order, axis=1), table.outputs
    for name, values in (("retrained", actual), ("predicted", predicted)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise ValueError(
                f"expected finite {name} outputs, got NaN or infinity in rows "
                f"{np.flatnonzero(bad)[:5].tolist()} of the table"
            )
        flat = ~_varies(values)
        if flat.any():
            raise ValueError(
                f"{name} outputs do not vary for targets {np.flatnonzero(flat)[:5].tolist()}, but by rounding at most; "
                "leave these out, or take subsets that change them"
            )
    per_target = spearman(predicted, actual)
    x, y = predicted - predicted.mean(0), actual - actual.mean(0)
    return LDS(
        mean=float(per_target.mean()),
        interval=_interval(per_target),
        per_target=per_target,
        ceiling=ceiling(table),
        slope=float((x * y).sum() / (x * x).sum()),
        seeds=len(table.seeds),
        rows=m,
    )


def _varies(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which columns of values [m, t] vary by more than rounding, [t]; ranks of rounding are noise."""
    return np.ptp(values, axis=0) > ROUNDING * np.abs(values).max(axis=0)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Rank correlation of the columns of a [m, t] with those of b [m, t], [t].

    >>> spearman(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [4.0], [9.0]])).tolist()
    [1.0]
    """
    from scipy.stats import rankdata

    x, y = (rankdata(values, axis=0) for values in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / np.sqrt((x * x).sum(0) * (y * y).sum(0))


def _interval(correlations: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of their mean; resampling few of them covers too little (.48 of two, .84 of five)."""
    t = len(correlations)
    if t < 2 or t >= FEW:
        return bootstrap_interval(correlations)
    from scipy.stats import t as student

    mean = float(correlations.mean())
    half = float(student.ppf(0.975, t - 1) * correlations.std(ddof=1) / math.sqrt(t))
    return max(-1.0, mean - half), min(1.0, mean + half)


def bootstrap_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by resampling; nan where there is but one value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ceiling(table: RetrainingTable) -> float:
    """Mean over targets of √ reliability of their seed-averaged outputs: halves of the seeds correlated, stepped up.

    Spearman–Brown, for each target by itself: with r ≥ 0 the mean correlation between means of k seeds each,
    s seeds have reliability (s/k) r / (1 + (s/k − 1) r).

    What bias is left comes from few rows, in which r is uncertain. A target that is all noise has r = 0, but a
    ceiling of about .2 with 60 rows and .15 with 200; where noise has twice the spread of what it hides, ceilings of
    two seeds are .07 too low with 30 rows, .04 with 60 and right with 200.
    """
    s = len(table.seeds)
    if s < 2:
        return float("nan")
    k, t = s // 2, table.outputs.shape[1]
    total, count = np.zeros(t), np.zeros(t)
    for a, b in _splits(s, k):
        one, other = table.per_seed[:, a].mean(1), table.per_seed[:, b].mean(1)
        varies = _varies(one) & _varies(other)  # a constant has no ranks
        total[varies] += spearman(one[:, varies], other[:, varies])
        count += varies
    known = count > 0
    if not known.any():
        return float("nan")
    r = np.maximum(total[known] / count[known], 0.0)
    return float(np.sqrt((s / k) * r / (1 + (s / k - 1) * r)).mean())


def _splits(s: int, k: int) -> list[tuple[list[int], list[int]]]:
    """Two disjoint halves of k of s seeds each, in 20 ways at most, drawn from all pairs of such halves."""
    rng = np.random.default_rng(0)
    if comb(s, k) * comb(s - k, k) > LISTED:
        orders = [rng.permutation(s).tolist() for _ in range(MAX_SPLITS)]
        return [(order[:k], order[k : 2 * k]) for order in orders]
    splits = [
        (list(a), list(b))
        for a in combinations(range(s), k)
        for b in combinations(sorted(set(range(s)) - set(a)), k)
        if a < b
    ]
    if len(splits) > MAX_SPLITS:
        splits = [splits[i] for i in rng.choice(len(splits), MAX_SPLITS, replace=False)]
    return splits
