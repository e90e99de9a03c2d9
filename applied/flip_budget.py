"""The audit: how few changed rows are predicted to turn an output, and how many it really takes.

    min Σ z     such that  f̂_j(w + z · moves) + κ · (disagreement of datamodels) ≤ 0,    z in [0, 1]

A small number is a warning about a decision, not about a model: it says which of its outputs hang on few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.attack import Quota, listed
from applied.recipe import Interval, Retrained, paired_interval
from applied.threat import ThreatModel
from applied.versions import Versions, relabelled
from attribution_core.data import Column
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.problem import Problem

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Surrogate = Callable[[Problem, NDArray[np.float64]], LinearDatamodel | Sequence[LinearDatamodel]]


@dataclass(frozen=True, eq=False)
class FlipBudgets:
    """How many changed rows turn each output: predicted, and found by retraining.

    Args:
        targets: [t] names of the outputs.
        margin: [t], outputs without any change, positive.
        predicted: [t] rows; infinite where the threat model does not reach.
        actual: [t], the smallest number of rows at which retraining turns it, along the predicted order; infinite
            where none within the threat model does; nan where nothing was retrained.
        rows: for each output the rows to change, the strongest first; into: their places in `versions`, −1 where
            a row is left out.
        versions: the table of rows that could be trained on.
    """

    targets: NDArray[Any]
    margin: NDArray[np.float64]
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    rows: list[NDArray[np.intp]]
    into: list[NDArray[np.intp]]
    versions: Versions

    @property
    def ratio(self) -> NDArray[np.float64]:
        """predicted / actual of the outputs that turn in both, [≤ t]."""
        both = np.isfinite(self.predicted) & np.isfinite(self.actual)
        return self.predicted[both] / self.actual[both]

    def within(self, share: float = 0.3) -> float:
        """Share of outputs whose predicted number is within ± `share` (and at least one row) of the actual one."""
        both = np.isfinite(self.predicted) & np.isfinite(self.actual)
        off = np.abs(self.predicted[both] - self.actual[both])
        return float((off <= np.maximum(share * self.actual[both], 1.0)).mean())

    def calibration(self) -> Interval:
        """The factor from predicted to actual, geometric mean over outputs with a 95 % t interval of the mean log.

        Fit it on some outputs and correct others by it.
        """
        found = paired_interval(-np.log(self.ratio))
        return Interval(*(math.exp(x) for x in (found.mean, found.low, found.high)))

    def some(self, which: slice | ArrayLike) -> FlipBudgets:
        """Some of the outputs."""
        at = np.arange(len(self.targets))[which if isinstance(which, slice) else np.asarray(which)]
        return FlipBudgets(
            self.targets[at], self.margin[at], self.predicted[at], self.actual[at],
            [self.rows[j] for j in at], [self.into[j] for j in at], self.versions,
        )  # fmt: skip

    def table(self, most: int = 20) -> str:
        """One line an output, those that need the fewest rows first."""
        lines = [f"{'output':>10}  {'margin':>8}  {'predicted':>9}  {'actual':>7}"]
        for j in np.argsort(self.predicted, kind="stable")[:most]:
            lines.append(
                f"{self.targets[j]!s:>10}  {self.margin[j]:8.3f}  {self.predicted[j]:9.0f}  {self.actual[j]:7.0f}"
            )
        if len(self.ratio):
            lines.append(
                f"{self.within():.0%} within 30 %; actual = {self.calibration()} × predicted"
            )
        return "\n".join(lines)


def budget_to_flip(
    problem: Problem,
    threat: ThreatModel,
    surrogate: Surrogate,
    victim: Callable[..., Retrained] | None = None,
    *,
    classes: int | None = None,
    column: Column | None = None,
    caution: float = 0.0,
    sources: ArrayLike | None = None,
    seeds: int | Sequence[int] = 1,
    progress: Progress = iter,
) -> FlipBudgets:
    """The fewest rows predicted to turn each output from positive to negative, then looked for by retraining.

        min Σ_i z_i    s.t.   f_j + Σ_i z_i d_ij + caution · ‖C_jᵀ z‖₂ ≤ 0,   0 ≤ z ≤ 1,  source quotas

    d_ij is what the best change of row i does to output j: another label (may_change="labels"), or leaving it out
    ("rows"). With one datamodel the program is linear, and its value rounded up is the optimum over whole rows; with
    several, C_j [n, M] holds each one's d minus the mean, over √M.

    Args:
        threat: its budget is the most rows that are looked at.
        surrogate: as in `flip_labels`, for outputs that count as right while positive, such as `margin`; may return
            several datamodels, one a training seed, whose disagreement `caution` weighs.
        victim: as in `flip_labels`; the smallest number of rows is found by bisection along the rows in predicted
            order, the mean over seeds deciding. None: nothing is retrained.
        seeds: of victims.

    Raises:
        ValueError: outputs that are wrong already (names them); inputs, which have no fewest; see `flip_labels`.
        RuntimeError: the solver found no optimum.

    Source: Yang et al. 2023 (arXiv 2305.12809) for removals; the program in cvxpy is this project's.
    """
    # rewrite: an output turns where its margin, as a function of weights, reaches 0
    if threat.may_change == "inputs":
        raise ValueError(
            "expected may_change='labels' or 'rows', got 'inputs': how far counts there, not how many"
        )
    quota = Quota.of(threat, threat.may_change, sources, problem.n)
    most = threat.rows(problem.n)
    relabel = threat.may_change == "labels"
    versions = relabelled(problem, classes, column) if relabel else _as_they_are(problem)

    # plug in: what every change does to every output, by each datamodel
    given = surrogate(versions.problem, versions.clean)
    models = [given] if isinstance(given, LinearDatamodel) else list(given)
    f = models[0] if len(models) == 1 else average(models)
    names, margin = np.asarray(f.targets), f.predict(versions.clean)
    _refuse_wrong(names, margin)
    if caution and len(models) < 2:
        raise ValueError(f"expected several datamodels to disagree for caution={caution}, got one")
    moves = [_moves(m.scores, versions, relabel) for m in models]

    # optimize: the fewest rows of each output
    predicted, rows, into = np.zeros(len(names)), [], []
    everyone = np.arange(problem.n)
    for j in progress(range(len(names))):
        mean = np.mean([move[:, :, j] for move in moves], axis=0)
        best = mean.argmin(axis=1)
        d = mean[everyone, best]
        spread = np.stack([move[everyone, best, j] - d for move in moves])
        spread *= caution / math.sqrt(len(models))
        z = _fewest(float(margin[j]), d, spread if caution else None, quota, most)
        predicted[j] = math.inf if z is None else max(1, math.ceil(z - 1e-6))
        order = quota.best(-d, everyone, most, everyone[:0])
        rows.append(order)
        into.append(order * mean.shape[1] + best[order] if relabel else np.full(len(order), -1))
    actual = np.full(len(names), math.nan)
    found = FlipBudgets(names, margin, predicted, actual, rows, into, versions)
    if victim is not None:
        actual[:] = _smallest(found, victim, seeds)
    return found


def _as_they_are(problem: Problem) -> Versions:
    """Rows that can only be left out."""
    return Versions(problem, np.arange(problem.n), np.ones(problem.n))


def _refuse_wrong(names: NDArray[Any], margin: NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(margin <= 0)
    if len(wrong):
        raise ValueError(
            f"expected outputs that are right (positive) without an attack, got {len(wrong)} that are wrong already: "
            f"{names[wrong][:10].tolist()}; leave them out"
        )


def _moves(scores: NDArray[Any], versions: Versions, relabel: bool) -> NDArray[np.float64]:
    """[n, choices, t]: what each change of each row does to each output; 0 for no change."""
    if not relabel:
        return -np.asarray(scores, dtype=float)[:, None, :]
    n = versions.n
    by_label = np.asarray(scores, dtype=float).reshape(n, -1, scores.shape[1])
    old = by_label[versions.clean.reshape(n, -1) > 0]
    return by_label - old[:, None, :]


def _fewest(
    margin: float, d: NDArray[Any], spread: NDArray[Any] | None, quota: Quota, most: int
) -> float | None:
    """min Σ z; None where `most` rows do not reach."""
    import cvxpy as cp

    useful = np.flatnonzero(d < 0)
    if not len(useful):
        return None
    z = cp.Variable(len(useful), bounds=[0, 1])
    left: Any = 1.0 + (d[useful] / margin) @ z
    if spread is not None:
        left = left + cp.norm((spread[:, useful] / margin) @ z, 2)
    limits = [left <= 0]
    if quota.sources is not None:
        brought = quota.sources[useful]
        limits += [cp.sum(z[brought == name]) <= quota.most for name in np.unique(brought)]
    problem = cp.Problem(cp.Minimize(cp.sum(z)), limits)
    problem.solve(solver="HIGHS" if spread is None else "CLARABEL")
    if problem.status in cp.settings.INF_OR_UNB:
        return None
    if problem.status != cp.OPTIMAL:
        raise RuntimeError(f"expected an optimum, got solver status {problem.status!r}")
    value = float(problem.value)
    return value if value <= most + 1e-6 else None


def _smallest(
    found: FlipBudgets, victim: Callable[..., Retrained], seeds: int | Sequence[int]
) -> NDArray[np.float64]:
    """[t], by bisection between a number of rows that does not turn an output and one that does."""
    t = len(found.targets)
    reach = np.array([len(order) for order in found.rows])
    low, high = np.zeros(t, dtype=int), reach + 1  # turned at high: not known to be, at first
    trial = np.minimum(np.where(np.isfinite(found.predicted), found.predicted, reach), reach)
    tried = trial.astype(int)
    while True:
        open_ = np.flatnonzero((high - low > 1) & (tried > 0))
        if not len(open_):
            break
        weights = np.stack([_changed(found, int(j), int(tried[j])) for j in open_])
        trained = victim(found.versions.problem, weights, listed(seeds))
        outputs = np.asarray(trained.per_seed, dtype=float).mean(axis=1)
        for j, value in zip(open_, outputs[np.arange(len(open_)), open_], strict=True):
            if value <= 0:
                high[j] = tried[j]
            else:
                low[j] = tried[j]
            unbounded = high[j] > reach[j]  # doubling until something turns
            middle = 2 * low[j] if unbounded else (low[j] + high[j]) // 2
            tried[j] = min(max(middle, low[j] + 1), reach[j])
    return np.where(high <= reach, high, math.inf)


def _changed(found: FlipBudgets, j: int, k: Any) -> NDArray[np.float64]:
    """Weights with the k strongest changes for output j."""
    weights = found.versions.clean.copy()
    rows, into = found.rows[j][:k], found.into[j][:k]
    weights[found.versions.current(weights)[rows]] = 0.0
    weights[into[into >= 0]] = 1.0
    return weights
