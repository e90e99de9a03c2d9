"""The defence: which rows look planted.

    found = detect(features, labels, trusted=(clean_features, clean_labels), signals={"loss": losses, ...})
    print(found.table())                               # AUCs where it is known what was planted, else suspects

A few rows that somebody has looked at ("trusted") are worth more than any score that only sees the poisoned data: an
attack that was optimised against the model is, by that, near what the model expects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import aligned
from attribution_core.data import batches

COMBINED, NEIGHBOURS = "combined", "neighbours"
DOUBTED = 0.3  # of the rows, left out of the first vote of the combined detector
VOTES = 3  # rounds of it; rows change sides in the first two
LANDMARKS = 500  # of its kernel
PENALTY = 0.2  # of its ridge
BLOCK = 2**22  # distances at a time, 32 MiB
TIED = 1e-12  # of squared lengths: squared distances that differ by rounding alone


@dataclass(frozen=True, eq=False)
class Detection:
    """Suspicion of every training row, by several detectors; high is suspicious.

    Args:
        scores: detector -> [n]. "combined" is in signed units where trusted rows were given: above 0, the rows that
            are believed dispute the label.
        planted: [n], what was really changed; None where unknown.
        signed: whether trusted rows were given, so that "combined" says where to stop.
    """

    scores: Mapping[str, NDArray[np.float64]]
    planted: NDArray[np.bool_] | None = None
    signed: bool = True

    @property
    def combined(self) -> NDArray[np.float64]:
        """The combined detector's scores, [n]."""
        return self.scores[COMBINED]

    @property
    def suspects(self) -> NDArray[np.intp]:
        """Rows whose label is disputed: combined above 0, the most suspicious first; none without trusted rows."""
        if not self.signed:
            return np.zeros(0, dtype=np.intp)
        order = np.argsort(-self.combined, kind="stable")
        return order[self.combined[order] > 0]

    def auc(self, name: str = COMBINED) -> float:
        """Chance that a planted row looks more suspicious than one that is not; ties count half.

        Raises:
            ValueError: it is not known what was planted, or nothing, or everything, was.
        """
        from sklearn.metrics import roc_auc_score

        if self.planted is None:
            raise ValueError("expected planted=[n] to judge a detector by, got none")
        if not self._judged:
            raise ValueError(
                f"expected planted rows and others to judge a detector by, got {int(self.planted.sum())} planted of "
                f"{len(self.planted)}"
            )
        return float(roc_auc_score(self.planted, self.scores[name]))

    @property
    def _judged(self) -> bool:
        """Whether there are planted rows and others."""
        return self.planted is not None and bool(0 < self.planted.sum() < len(self.planted))

    def table(self, rows: int = 20) -> str:
        """One line a detector, the best first; where no planted rows are known, the most suspicious rows."""
        if not self._judged:
            return self._rows(rows)
        ranked = sorted(self.scores, key=self.auc, reverse=True)
        width = max(map(len, ranked))
        lines = [f"{name:{width}}  {self.auc(name):.4f}" for name in ranked]
        return "\n".join([f"{'detector':{width}}  AUC", *lines])

    def _rows(self, rows: int) -> str:
        """The most suspicious rows by the combined detector, with every detector's score."""
        order = np.argsort(-self.combined, kind="stable")[:rows]
        suspects = set(self.suspects.tolist())
        lines = [["row", *self.scores, ""]]
        for i in order.tolist():
            scores = (f"{float(found[i]):.4g}" for found in self.scores.values())
            lines.append([str(i), *scores, "suspect" if i in suspects else ""])
        many = f"{len(suspects)} suspects" if self.signed else "no trusted rows, so no suspects"
        return "\n".join([*aligned(lines), f"{many} among {len(self.combined)} rows"])


def detect(
    features: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    *,
    trusted: tuple[ArrayLike, ArrayLike] | None = None,
    signals: Mapping[str, ArrayLike] | None = None,
    neighbours: int = 10,
    planted: ArrayLike | None = None,
) -> Detection:
    """How suspicious every training row is.

    "neighbours": the share of the nearest rows with another label; rows equally far share the last places.
    "combined": rows vote on each other's labels by kernel ridge regression, margin_i = p_i(own label) − max other p_i,
    each by a vote without itself (exact leave-one-out). There are two votes, one that weights all rows alike and one
    that weights all classes alike, and the larger margin counts: the first vote disputes honest rows of rare classes,
    the second honest rows of common ones. Trusted rows always vote. Of the others, those vote first that trusted rows and signals doubt least, then
    those that the previous vote agreed with. The score is −margin. Without trusted rows or labels it is the mean over
    detectors of −log(1 − rank), and does not say where to stop.

    Args:
        features: [n, ...], inputs or representations, on comparable scales.
        labels: [n] integers, as they stand in the poisoned data.
        trusted: (features [m, ...], labels [m]) of rows known to be right: a hundred or two do.
        signals: more detectors, name -> [n], high is suspicious: `self_influence(run)`, each row's loss,
            `influence(run, loss_on_trusted).scores.mean(1)` (positive: harms what is trusted).
        planted: [n] truth, to judge by.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, nothing to detect with.

    Source: the vote is this project's; Koh & Liang 2017, sec. 5.4, for self-influence; Northcutt et al. 2021.

    >>> x = np.r_[np.zeros(20), np.ones(20)][:, None] + np.linspace(0, 0.1, 40)[:, None]
    >>> y = np.repeat([0, 1], 20)
    >>> y[3] = 1
    >>> detect(x, y, trusted=([[0.0], [1.0]], [0, 1])).suspects.tolist()
    [3]
    """
    given = {name: np.asarray(values, dtype=float) for name, values in (signals or {}).items()}
    y = None if labels is None else np.asarray(labels)
    x = None if features is None else _flat(features)
    n = len(x) if x is not None else len(next(iter(given.values()), []))
    taken = sorted({NEIGHBOURS, COMBINED} & set(given))
    if taken:
        raise ValueError(f"expected other names of signals than {taken}, which stand for detectors")
    _check(given, n, x, y, planted)
    if neighbours < 1:
        raise ValueError(f"expected at least one neighbour, got neighbours={neighbours}")
    if x is not None and y is not None:
        given[NEIGHBOURS] = _disagreement(x - x.mean(0), y, min(neighbours, n - 1))
    signed = x is not None and y is not None and trusted is not None
    if x is not None and y is not None and trusted is not None:
        clean_x, clean_y = _flat(trusted[0]), np.asarray(trusted[1])
        if clean_x.shape[1:] != x.shape[1:] or clean_y.shape != (len(clean_x),):
            raise ValueError(
                f"expected trusted features [m, {x.shape[1]}] and labels [m], got {clean_x.shape} and {clean_y.shape}"
            )
        _refuse_text("trusted labels", clean_y)
        known = np.isfinite(clean_x).all(axis=1) & np.isfinite(clean_y)
        if not known.all() or not len(clean_x):
            raise ValueError(
                f"expected finite trusted features and labels, got NaN or infinity in {int((~known).sum())} of "
                f"{len(clean_x)} rows; mend them, or leave trusted out"
            )
        middle = x.mean(0)  # distances lose their digits far from 0
        vote = _Vote.of(x - middle, y, clean_x - middle, clean_y)
        combined = -vote.margins(sum(map(_surprise, given.values())))
    else:
        combined = np.mean([_surprise(values) for values in given.values()], axis=0)
    truth = None if planted is None else np.asarray(planted, dtype=bool)
    return Detection({**given, COMBINED: combined}, truth, signed)


def _check(given: Mapping[str, NDArray[Any]], n: int, x: Any, y: Any, planted: Any) -> None:
    if n == 0 or (not given and (x is None or y is None)):
        raise ValueError("expected features and labels, or signals, to detect with; got neither")
    shapes = {**given, **({} if y is None else {"labels": y})}
    shapes |= {} if planted is None else {"planted": np.asarray(planted)}
    for name, values in shapes.items():
        _refuse_text(name, values)
        if values.shape != (n,) or not np.isfinite(values).all():
            raise ValueError(f"expected finite {name} [n={n}], got shape {values.shape}")
    if x is not None and not np.isfinite(x).all():
        raise ValueError("expected finite features, got NaN or infinity; mend those rows")
    if x is not None and y is not None and len(np.unique(y)) < 2:
        raise ValueError(f"expected labels of two classes or more, got one in {n} rows")


def _refuse_text(name: str, values: NDArray[Any]) -> None:
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"expected numbers for {name}, got {values.dtype}; number the classes "
            "(np.unique(labels, return_inverse=True)[1])"
        )


def _flat(features: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(features, dtype=float)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _surprise(values: NDArray[Any]) -> NDArray[np.float64]:
    """−log(1 − rank share): an exponential variable where nothing is planted, large at the top."""
    from scipy.stats import rankdata

    return -np.log1p(-rankdata(values) / (len(values) + 1))


def _disagreement(x: NDArray[Any], y: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Share of the k nearest other rows with another label, [n]; rows as far as the k-th share its places.

    A row nearer than r, the distance of the k-th, counts 1, one at r (k − how many are nearer)/(how many are at r).
    """
    from sklearn.neighbors import NearestNeighbors

    squares, more = (x * x).sum(1), min(k + 1, len(x) - 1)
    lengths, near = NearestNeighbors(n_neighbors=more).fit(x).kneighbors()  # without themselves
    found: NDArray[np.float64] = (y[near[:, :k]] != y[:, None]).mean(1)
    last, after = lengths[:, k - 1] ** 2, lengths[:, -1] ** 2
    # some more than differ by rounding: which of them are ties is told below
    tied = np.flatnonzero((after - last <= 4 * TIED * (squares + after)) & (more > k))
    for rows in batches(tied, max(1, BLOCK // len(x))):
        distance = squares[rows, None] + squares - 2 * x[rows] @ x.T
        distance[np.arange(len(rows)), rows] = np.inf
        reach = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
        rounding = TIED * (squares[rows, None] + np.abs(reach))
        nearer = distance < reach - rounding
        at = (distance <= reach + rounding) & ~nearer
        share = (k - nearer.sum(1)) / at.sum(1)
        other = y[rows][:, None] != y
        found[rows] = ((other & nearer).sum(1) + share * (other & at).sum(1)) / k
    return found


@dataclass(frozen=True, eq=False)
class _Vote:
    """Labels disputed by kernel ridge regression of the rows that are believed.

    Args:
        phi, own: [n, m] kernel features of the rows, [n, c] their labels as indicators.
        trusted_phi, trusted_own: the same of trusted rows.
    """

    phi: NDArray[np.float64]
    own: NDArray[np.float64]
    trusted_phi: NDArray[np.float64]
    trusted_own: NDArray[np.float64]

    @classmethod
    def of(cls, x: Any, y: Any, clean_x: Any, clean_y: Any) -> _Vote:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.metrics import pairwise_distances

        both = np.concatenate([clean_x, x])
        # landmarks are drawn by place: in an order that the rows' values give, that of the file is nothing
        ordered = both[np.lexsort(both.T)]
        few = ordered[np.random.default_rng(0).permutation(len(both))[:LANDMARKS]]
        distance = pairwise_distances(few, metric="sqeuclidean")
        middle = float(np.median(distance[np.triu_indices(len(few), 1)])) or 1.0
        kernel = Nystroem(
            gamma=1.0 / middle, n_components=min(len(both), LANDMARKS), random_state=0
        )
        phi = kernel.fit(ordered).transform(both)
        classes = np.unique(np.concatenate([clean_y, y]))
        own = (np.concatenate([clean_y, y])[:, None] == classes).astype(float)
        m = len(clean_x)
        return cls(phi[m:], own[m:], phi[:m], own[:m])

    def margins(self, doubt: Any) -> NDArray[np.float64]:
        """p(own label) − largest other p of every row, by the last vote."""
        n = len(self.phi)
        nobody = np.zeros(n, dtype=bool)
        doubt = _surprise(-self.one(nobody)) + doubt
        believed = nobody.copy()
        believed[np.argsort(doubt, kind="stable")[: round((1 - DOUBTED) * n)]] = True
        for _ in range(VOTES - 1):
            believed = self.one(believed) > 0
        return self.one(believed)

    def one(self, believed: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The larger margin [n] of two votes: of rows that count alike, and of classes that do."""
        count = self.trusted_own.sum(axis=0) + self.own[believed].sum(axis=0)
        there = count > 0
        # a class counts as much as another, all of them as much as there are voters
        even = np.where(there, count.sum() / (there.sum() * np.maximum(count, 1)), 0.0)
        return np.maximum(self.weighed(believed, np.ones(len(count))), self.weighed(believed, even))

    def weighed(
        self, believed: NDArray[np.bool_], of_class: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Margins [n] by the votes of trusted rows and those believed, of_class [c] each; no row votes on itself."""
        phi = np.concatenate([self.trusted_phi, self.phi[believed]])
        own = np.concatenate([self.trusted_own, self.own[believed]])
        weighed = phi * (own @ of_class)[:, None]
        inverse = np.linalg.inv(weighed.T @ phi + PENALTY * np.eye(phi.shape[1]))
        p = self.phi @ (inverse @ (weighed.T @ own))
        mine = self.own[believed]
        leverage = (mine @ of_class) * np.einsum(
            "ij,jk,ik->i", self.phi[believed], inverse, self.phi[believed], optimize=True
        )
        p[believed] = mine - (mine - p[believed]) / (1 - leverage)[:, None]
        right = (p * self.own).sum(axis=1)
        return right - np.where(self.own > 0, -np.inf, p).max(axis=1)
