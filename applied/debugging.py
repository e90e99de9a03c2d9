"""Debugging: which training rows stand behind what a model does, and would it do the same without them?

    min |R|  such that  f_j(S \\ R) ≤ 0        the support of a decision: the fewest rows that hold it up

A decision is an output that is positive, such as `logit_margin` of the label that the model gives. Wrong ones are asked
like right ones: rows without which a mistake would not be made are where to look first. `subpopulations` asks the same of
many outputs at once: which of them hang on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.audit.flip_budget import FlipBudgets, Surrogate, budget_to_flip, smallest
from applied.audit.threat import ThreatModel
from applied.recipe import Retrain, Retrained, aligned, distinct_seeds, retrained_outputs
from attribution_core.data import Progress
from attribution_core.datamodel import LinearDatamodel, columns
from attribution_core.problem import Problem

__all__ = ["Subpopulations", "Support", "subpopulations", "support"]

DIRECTIONS = 20  # principal components that outputs are clustered in
MOST_GROUPS = 10
ROWS_SHOWN = 5
ALIKE = 8  # digits of unit directions


@dataclass(frozen=True, eq=False)
class Support:
    """How few training rows each decision hangs on: predicted, found by retraining, and along other orders of rows.

    Args:
        targets: [t] names of the decisions.
        margin: [t] by how much they stand, on all rows.
        predicted, actual: [t] numbers of rows; infinite where `most` do not do it, actual nan where nothing was
            retrained.
        order: for each decision the rows to leave out, the strongest first.
        controls: name -> [t], the smallest number along another order.
        most: rows that were looked at.
    """

    targets: NDArray[Any]
    margin: NDArray[np.float64]
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    order: list[NDArray[np.intp]]
    controls: Mapping[str, NDArray[np.float64]]
    most: int

    def rows(self, j: int) -> NDArray[np.intp]:
        """The rows without which decision j is another: as many as retraining took, or else as were predicted."""
        for many in (self.actual[j], self.predicted[j]):
            if np.isfinite(many):
                return self.order[j][: int(many)]
        return self.order[j][:0]

    def turned(self, k: ArrayLike, order: str | None = None) -> NDArray[np.float64]:
        """Share of the decisions that retraining turns without k rows, in the datamodel's order or a control's.

        Raises:
            ValueError: nothing was retrained.
        """
        if np.isnan(self.actual).any():
            raise ValueError(
                "expected retrained decisions, got predicted ones alone; pass a victim"
            )
        numbers = self.actual if order is None else self.controls[order]
        return (numbers[:, None] <= np.atleast_1d(np.asarray(k, dtype=float))).mean(axis=0)

    def table(self, most: int = 20) -> str:
        """One line an output, those that hang on the fewest rows first."""
        names = list(self.controls)
        lines = [["output", "margin", "predicted", "actual", *names, "rows"]]
        first = np.where(np.isnan(self.actual), self.predicted, self.actual)
        for j in np.argsort(first, kind="stable")[:most]:
            numbers = (
                self.predicted[j],
                self.actual[j],
                *(self.controls[n][j] for n in names),
            )
            rows = [str(i) for i in self.rows(j)[:ROWS_SHOWN]]
            lines.append([
                str(self.targets[j]), f"{self.margin[j]:.3f}", *(self._number(x) for x in numbers),
                " ".join(rows) + (" ..." if len(self.rows(j)) > ROWS_SHOWN else ""),
            ])  # fmt: skip
        return "\n".join(aligned(lines))

    def _number(self, rows: float) -> str:
        return "-" if np.isnan(rows) else f"> {self.most}" if np.isinf(rows) else f"{rows:.0f}"


def support(
    problem: Problem,
    surrogate: Surrogate,
    victim: Callable[..., Retrained] | None = None,
    *,
    most: int,
    rounds: int = 3,
    orders: Mapping[str, LinearDatamodel | ArrayLike] | None = None,
    seeds: int | Sequence[int] = 1,
    progress: Progress = iter,
) -> Support:
    """The fewest training rows without which each decision would be another, predicted, then retrained.

        min Σ_i z_i    s.t.   f_j − Σ_i z_i scores_ij ≤ 0,   0 ≤ z ≤ 1        asked again on the way, `rounds` times

    Args:
        surrogate: (problem, weights [n]) -> a datamodel of decisions around these weights, positive while they stand:
            `logit_margin` of the labels that the model gives, right or wrong.
        victim: (problem, weights [m, n], seeds) -> retrained outputs, as `retrain` and `refit` give them; the mean over
            seeds decides. None: nothing is retrained.
        most: rows that may be left out.
        rounds: first order asks for too few rows; 1 asks it alone, R up to R − 1 times more for each output.
        orders: controls by name, scores [n, t] or datamodels of the same outputs: rows are left out from the highest
            positive score down. `knn(problem, outputs)` is one to beat; random rows are always beside it.
        seeds: of victims.

    Returns:
        a `Support`, whose rows are row numbers of the training data.

    Raises:
        ValueError: a decision that does not stand (an output ≤ 0); scores of another shape; no room for a row.
        RuntimeError: the solver found no optimum.

    Source: Ilyas et al. 2022 (arXiv 2202.00622, section 4.1), there by datamodels alone and checked by bisection.
    """
    given = {} if orders is None else dict(orders)
    if "random" in given:
        raise ValueError("expected another name than 'random', which stands for random rows")
    if not _whole(most) or not 1 <= most < problem.n:
        raise ValueError(
            f"expected most among 1 .. {problem.n - 1} of {problem.n} rows, got {most!r}"
        )

    # rewrite: a decision stands while its margin, as a function of weights, is positive
    threat = ThreatModel(most, "rows")

    # plug in, optimize: what leaving rows out does to each margin; the fewest rows that take it to 0
    found = budget_to_flip(problem, threat, surrogate, rounds=rounds, progress=progress)

    # verify: along these rows, and along others
    n, targets = problem.n, found.targets
    named = {name: _order(name, scores, n, targets, most) for name, scores in given.items()}
    actual, controls = found.actual, {}
    if victim is not None:
        draws = [np.random.default_rng([0x5C, j]) for j in range(len(targets))]
        named["random"] = [rng.permutation(n)[:most] for rng in draws]
        actual, *others = _along([found.rows, *named.values()], found, victim, seeds)
        controls = dict(zip(named, others, strict=True))
    return Support(targets, found.margin, found.predicted, actual, found.rows, controls, most)


def _along(
    orders: list[list[NDArray[np.intp]]],
    found: FlipBudgets,
    victim: Callable[..., Retrained],
    seeds: int | Sequence[int],
) -> NDArray[np.float64]:
    """[orders, t], the smallest number of rows along each order; all of them are trained together."""
    rows, times, t = [some for order in orders for some in order], len(orders), len(found.targets)

    def repeated(table: Problem, weights: NDArray[np.float64], chosen: Any) -> Any:
        outputs = np.asarray(victim(table, weights, chosen).per_seed)
        return SimpleNamespace(per_seed=np.tile(outputs, times))

    every = replace(
        found.some(np.tile(np.arange(t), times)),
        rows=rows,
        into=[np.full(len(some), -1) for some in rows],
    )
    return smallest(every, repeated, seeds).reshape(times, t)


def _order(
    name: str, scores: LinearDatamodel | ArrayLike, n: int, targets: NDArray[Any], most: int
) -> list[NDArray[np.intp]]:
    """For each decision the rows of positive score, the highest first; a datamodel's columns by their names."""
    t = len(targets)
    if isinstance(scores, LinearDatamodel):
        given = np.asarray(scores.scores)
        if given.shape == (n, t):
            given = given[:, columns(scores.targets, targets, t)]
    else:
        given = scores.detach().numpy() if hasattr(scores, "detach") else np.asarray(scores)
    array = np.asarray(given, dtype=float)
    if array.shape != (n, t) or not np.isfinite(array).all():
        raise ValueError(
            f"expected finite scores of {name!r} of shape {(n, t)}, got {array.shape}; score the same outputs"
        )
    best = [np.argsort(-column, kind="stable")[:most] for column in array.T]
    return [rows[column[rows] > 0] for rows, column in zip(best, array.T, strict=True)]


# --- subpopulations ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subpopulations:
    """Outputs that hang on the same rows, and what each group of outputs does without its own rows.

    Args:
        group: [t], which group each output is in; 0 is the largest.
        rows: for each group the rows that raise its mean output most, the strongest first.
        predicted, actual: [G, G], change of group h's mean output without the rows of group g; actual is nan where
            nothing was retrained.
        random: [G, G], the same without as many random rows.
    """

    group: NDArray[np.intp]
    rows: list[NDArray[np.intp]]
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    random: NDArray[np.float64]

    def of(self, g: int) -> NDArray[np.intp]:
        """The outputs of a group."""
        return np.flatnonzero(self.group == g)

    def table(self) -> str:
        """One line a group: its own change without its rows, that of the other groups, that without random rows."""
        lines = [["group", "outputs", "rows", "predicted", "actual", "other groups", "random rows"]]
        size = np.bincount(self.group)
        for g, rows in enumerate(self.rows):
            others = np.delete(np.arange(len(self.rows)), g)
            apart = (
                np.average(self.actual[g, others], weights=size[others]) if len(others) else np.nan
            )
            numbers = (self.predicted[g, g], self.actual[g, g], apart, self.random[g, g])
            told = ["-" if np.isnan(x) else f"{x:+.3f}" for x in numbers]
            lines.append([str(g), str(size[g]), str(len(rows)), *told])
        return "\n".join(aligned(lines))


def subpopulations(
    datamodel: LinearDatamodel,
    groups: int | None = None,
    *,
    k: int = 20,
    retrain: Retrain | None = None,
    seeds: int | Sequence[int] = 3,
    seed: int = 0,
) -> Subpopulations:
    """Groups of outputs that the same training rows move, and the rows of each.

        e_j = anchor · scores[:, j] / ‖·‖        k-means of e_1 .. e_t, in their first principal components

    Args:
        datamodel: of outputs such as losses of mistakes: rows that raise a group's mean are what to look at, and
            leaving them out lowers it. Of margins, those rows hold the group up.
        groups: how many at most; by default from 2 to 10 the number with the largest silhouette. Outputs that all rows
            move alike are never parted.
        k: rows for each group at most; rows of weight 0, or that lower the mean, are never among them.
        retrain: (weights, seeds) -> all outputs of the datamodel, to check by removal.
        seed: of k-means and of random rows.

    Raises:
        ValueError: fewer outputs than groups; outputs that no row moves; a group whose mean no row raises.

    Source: Ilyas et al. 2022 (arXiv 2202.00622, section 5.2), for clusters of datamodels.
    """
    # rewrite: one question for each group: its mean output
    effect = np.asarray(datamodel.anchor)[:, None] * np.asarray(datamodel.scores, dtype=float)
    group = _clustered(effect, groups, seed)
    size = np.bincount(group)
    to_means = (group[:, None] == np.arange(len(size))) / size
    means = datamodel.combine(to_means)

    # plug in: what every row does to every mean
    of_group = np.asarray(datamodel.anchor)[:, None] * means.scores

    # optimize: the rows that raise it most
    rows = [_strongest(of_group[:, g], k, g) for g in range(len(size))]
    predicted = np.array([-of_group[some].sum(axis=0) for some in rows])

    # verify: each group without its own rows, without the others', without random ones
    unknown = np.full(predicted.shape, np.nan)
    if retrain is None:
        return Subpopulations(group, rows, predicted, unknown, unknown)
    full, rng = np.asarray(datamodel.anchor, dtype=float), np.random.default_rng([seed, 0x5B])
    there = np.flatnonzero(full > 0)
    drawn = [rng.choice(there, len(some), replace=False) for some in rows]
    weights = np.repeat(full[None], 1 + 2 * len(rows), axis=0)
    for w, some in zip(weights[1:], [*rows, *drawn], strict=True):
        w[some] = 0.0
    names = ["nothing", *(f"{what} {g}" for what in ("group", "random") for g in range(len(rows)))]
    outputs = retrained_outputs(retrain, weights, distinct_seeds(seeds), len(group), names).mean(
        axis=1
    )
    of_means = outputs @ to_means
    change = of_means[1:] - of_means[0]
    return Subpopulations(group, rows, predicted, change[: len(rows)], change[len(rows) :])


def _clustered(effect: NDArray[np.float64], groups: int | None, seed: int) -> NDArray[np.intp]:
    """[t] groups of columns by direction, the largest first."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    t, size = effect.shape[1], np.linalg.norm(effect, axis=0)
    least = min(2, t) if groups is None else groups
    if not _whole(least) or not 1 <= least <= t:
        raise ValueError(
            f"expected 1 to t={t} groups of outputs, got {least}; score more outputs or ask for fewer groups"
        )
    if (still := np.flatnonzero(size == 0)).size:
        raise ValueError(
            f"expected outputs that training rows move, got none for {still[:5].tolist()}; leave these out"
        )
    unit = (effect / size).T
    apart = len(np.unique(unit.round(ALIKE), axis=0))  # directions, but for rounding
    if least == 1 or apart == 1:
        return np.zeros(t, dtype=int)
    place = PCA(min(DIRECTIONS, *effect.shape), random_state=seed).fit_transform(unit)

    def by_means(count: int) -> NDArray[np.intp]:
        return KMeans(count, n_init=10, random_state=seed).fit_predict(place)

    if groups is None:
        tried = [by_means(count) for count in range(2, min(MOST_GROUPS, apart, t - 1) + 1)]
        found = (
            max(tried, key=lambda some: silhouette_score(place, some)) if tried else by_means(least)
        )
    else:
        found = by_means(min(groups, apart))
    order = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(order)[found]


def _strongest(effect: NDArray[np.float64], k: int, g: int) -> NDArray[np.intp]:
    """The rows of positive effect, the largest first."""
    if not _whole(k) or not 1 <= k < len(effect):
        raise ValueError(
            f"expected k among 1 .. {len(effect) - 1} of {len(effect)} rows, got {k!r}"
        )
    order = np.argsort(-effect, kind="stable")[:k]
    order = order[effect[order] > 0]
    if not len(order):
        raise ValueError(
            f"expected rows that raise the mean output of group {g}, got none; pass .combine(-identity) of the datamodel"
        )
    return order


def _whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)
