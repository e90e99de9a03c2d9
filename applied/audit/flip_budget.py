"""The audit: how few changed rows are predicted to turn an output, and how many it really takes.

    min Σ z     such that  f̂_j(w + z · moves) + κ · (disagreement of datamodels) ≤ 0,    z in [0, 1]

A small number is a warning about a decision, not about a model: it says which of its outputs hang on few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.audit.attack import Quota, Victim, of_table
from applied.audit.threat import ThreatModel
from applied.audit.versions import Versions, relabelled
from applied.recipe import (
    Interval,
    Retrained,
    distinct_seeds,
    paired_interval,
    retrained_outputs,
)
from attribution_core.data import Column, Progress
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.problem import Problem

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
        """Share of outputs whose predicted number is within ± `share` (and at least one row) of the actual one.

        Of those that turn in both: an output that was said not to turn is not among them.
        """
        both = np.isfinite(self.predicted) & np.isfinite(self.actual)
        if not both.any():
            return math.nan
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
    rounds: int = 1,
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

    First order misjudges many changes at once. With R rounds, each output has a path of its own: a share 1/R of the
    rows it seems to need is changed, the surrogate is asked around these data, the rest is predicted from there, of
    which 1/(R − 1) is changed, and so on. Where a step turns the output, the number lies inside it, between the two
    margins in proportion to what the step's rows were predicted to do.

    Args:
        threat: its budget is the most rows that are looked at.
        surrogate: as in `flip_labels`, for outputs that count as right while positive, such as `margin`; may return
            several datamodels, one a training seed, whose disagreement `caution` weighs.
        rounds: 1 asks the surrogate once for all outputs; R asks it at most R − 1 times more for each.
        victim: as in `flip_labels`; the smallest number of rows is found by bisection along the rows in predicted
            order, the mean over seeds deciding. None: nothing is retrained.
        seeds: of victims.

    Raises:
        ValueError: outputs that are wrong already (names them); inputs, which have no fewest; no rounds; see
            `flip_labels`.
        RuntimeError: the solver found no optimum.

    Source: Yang et al. 2023 (arXiv 2305.12809) for removals; the program in cvxpy is this project's.
    """
    # rewrite: an output turns where its margin, as a function of weights, reaches 0
    if threat.may_change == "inputs":
        raise ValueError(
            "expected may_change='labels' or 'rows', got 'inputs': how far counts there, not how many"
        )
    quota = Quota.of(threat, threat.may_change, sources, problem.n)
    relabel = threat.may_change == "labels"
    versions = relabelled(problem, classes, column) if relabel else _as_they_are(problem)

    if rounds < 1:
        raise ValueError(f"expected rounds >= 1, got {rounds}")

    # plug in: what every change does to every output, around the data as they are or as they were changed so far
    def around(weights: NDArray[np.float64]) -> _Around:
        given = surrogate(versions.problem, weights.copy())
        for one in [given] if isinstance(given, LinearDatamodel) else given:
            of_table(one, weights)
        return _Around.of(given, versions, weights, relabel)

    clean = around(versions.clean)
    names, margin = clean.names, clean.margin
    _refuse_wrong(names, margin)
    if caution and len(clean.moves) < 2:
        raise ValueError(f"expected several datamodels to disagree for caution={caution}, got one")

    # optimize: the fewest rows of each output
    search = _Search(versions, around, quota, threat.rows(problem.n), rounds, caution)
    numbers, rows, into = zip(*(search(j, clean) for j in progress(range(len(names)))), strict=True)
    unknown = np.full(len(names), math.nan)
    found = FlipBudgets(
        names, margin, np.array(numbers, dtype=float), unknown, list(rows), list(into), versions
    )
    return found if victim is None else replace(found, actual=smallest(found, victim, seeds))


def _as_they_are(problem: Problem) -> Versions:
    """Rows that can only be left out."""
    return Versions(problem, np.arange(problem.n), np.ones(problem.n))


def _refuse_wrong(names: NDArray[Any], margin: NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(margin <= 0)
    if len(wrong):
        raise ValueError(
            f"expected outputs that are positive (right) with the data as they are, got {len(wrong)} that are wrong already: "
            f"{names[wrong][:10].tolist()}; leave them out"
        )


@dataclass(frozen=True, eq=False)
class _Around:
    """What datamodels say of the changes that can still be made to some data: margin [t], moves [M, n, choices, t]."""

    names: NDArray[Any]
    margin: NDArray[np.float64]
    moves: NDArray[np.float64]

    @classmethod
    def of(
        cls, given: LinearDatamodel | Sequence[LinearDatamodel], versions: Versions,
        weights: NDArray[np.float64], relabel: bool,
    ) -> _Around:  # fmt: skip
        models = [given] if isinstance(given, LinearDatamodel) else list(given)
        f = models[0] if len(models) == 1 else average(models)
        moves = np.stack([_moves(m.scores, versions, relabel) for m in models])
        there = versions.current(weights) == np.flatnonzero(versions.clean)
        moves[:, ~there] = 0.0  # changed already
        return cls(np.asarray(f.targets), f.predict(weights), moves)

    def places(self, rows: NDArray[np.intp], choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """Of the rows' chosen versions in the table; −1 where they are left out."""
        choices = self.moves.shape[2]
        return rows * choices + choice[rows] if choices > 1 else np.full(len(rows), -1)

    def best(self, j: int) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
        """(choice [n] that lowers output j most, by how much [n], what each model says beside their mean [M, n])."""
        moves = self.moves[..., j]
        choice = moves.mean(axis=0).argmin(axis=1)
        of_choice = moves[:, np.arange(len(choice)), choice]
        d = of_choice.mean(axis=0)
        return choice, d, of_choice - d


def _moves(scores: NDArray[Any], versions: Versions, relabel: bool) -> NDArray[np.float64]:
    """[n, choices, t]: what each change of each row as it was does to each output; 0 for no change."""
    if not relabel:
        return -np.asarray(scores, dtype=float)[:, None, :]
    n = versions.n
    by_label = np.asarray(scores, dtype=float).reshape(n, -1, scores.shape[1])
    old = by_label[versions.clean.reshape(n, -1) > 0]
    return by_label - old[:, None, :]


@dataclass(frozen=True, eq=False)
class _Search:
    """For the fewest rows of one output, on datamodels around the data changed so far."""

    versions: Versions
    around: Callable[[NDArray[np.float64]], _Around]
    quota: Quota
    most: int
    rounds: int
    caution: float

    def __call__(self, j: int, here: _Around) -> tuple[float, NDArray[np.intp], NDArray[np.intp]]:
        """(fewest rows predicted, rows to change and their versions, the strongest first)."""
        everyone = np.arange(self.versions.n)
        rows = into = everyone[:0]
        for later in reversed(range(self.rounds)):
            room = self.most - len(rows)
            choice, d, spread = here.best(j)
            z = _fewest(float(here.margin[j]), d, self._doubt(spread), self.quota, rows, room)
            needed = math.inf if z is None else max(1, math.ceil(z - 1e-6))
            order = self.quota.best(-d, everyone, room, rows)
            strongest, versions = np.r_[rows, order], np.r_[into, here.places(order, choice)]
            if later == 0 or needed == 1 or not len(order):
                break
            step = math.ceil(min(needed, len(order)) / (later + 1))
            done = len(rows) + step
            there = self.around(_changed(self.versions, strongest[:done], versions[:done]))
            if there.margin[j] <= 0:  # too far
                needed = _crossing(here.margin[j], d[order[:step]], there.margin[j])
                break
            here, rows, into = there, strongest[:done], versions[:done]
        return len(rows) + needed, strongest, versions

    def _doubt(self, spread: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What the margin is widened by; None where it is not."""
        return spread * (self.caution / math.sqrt(len(spread))) if self.caution else None


def _crossing(before: float, moves: NDArray[np.float64], after: float) -> int:
    """How many moves, scaled to lead from one margin to the other, reach 0."""
    share = np.cumsum(moves) / moves.sum()
    return int(np.argmax(before + share * (after - before) <= 0)) + 1


def _fewest(
    margin: float, d: NDArray[Any], spread: NDArray[Any] | None, quota: Quota,
    taken: NDArray[np.intp], most: int,
) -> float | None:  # fmt: skip
    """min Σ z; None where `most` rows do not reach."""
    import cvxpy as cp

    useful = np.flatnonzero(d < 0)
    if not len(useful):
        return None
    z = cp.Variable(len(useful), bounds=[0, 1])
    rest: Any = 1.0 + (d[useful] / margin) @ z
    if spread is not None:
        rest = rest + cp.norm((spread[:, useful] / margin) @ z, 2)
    limits = [rest <= 0]
    if quota.sources is not None:
        brought = quota.sources[useful]
        left = quota.left(taken)
        limits += [cp.sum(z[brought == name]) <= left[name] for name in np.unique(brought).tolist()]
    problem = cp.Problem(cp.Minimize(cp.sum(z)), limits)
    problem.solve(solver="HIGHS" if spread is None else "CLARABEL")
    if problem.status in cp.settings.INF_OR_UNB:
        return None
    if problem.status != cp.OPTIMAL:
        raise RuntimeError(f"expected an optimum, got solver status {problem.status!r}")
    value = float(problem.value)
    return value if value <= most + 1e-6 else None


def smallest(
    found: FlipBudgets, victim: Callable[..., Retrained], seeds: int | Sequence[int]
) -> NDArray[np.float64]:
    """[t] rows of its order at which each output turns, by bisection between a number that does not turn it and one
    that does; infinite where none does.
    """
    t, chosen = len(found.targets), distinct_seeds(seeds)
    train = Victim(victim, found.versions.problem)
    reach = np.array([len(order) for order in found.rows])
    low, high = np.zeros(t, dtype=int), reach + 1  # turned at high: not known to be, at first
    trial = np.minimum(np.where(np.isfinite(found.predicted), found.predicted, reach), reach)
    tried = trial.astype(int)
    while True:
        open_ = np.flatnonzero((high - low > 1) & (tried > 0))
        if not len(open_):
            break
        weights = np.stack(
            [
                _changed(found.versions, found.rows[j][: tried[j]], found.into[j][: tried[j]])
                for j in open_
            ]
        )
        names = [str(found.targets[j]) for j in open_]
        outputs = retrained_outputs(train, weights, chosen, t, names).mean(axis=1)
        for j, value in zip(open_, outputs[np.arange(len(open_)), open_], strict=True):
            if value <= 0:
                high[j] = tried[j]
            else:
                low[j] = tried[j]
            unbounded = high[j] > reach[j]  # doubling until something turns
            middle = 2 * low[j] if unbounded else (low[j] + high[j]) // 2
            tried[j] = min(max(middle, low[j] + 1), reach[j])
    return np.where(high <= reach, high, math.inf)


def _changed(
    versions: Versions, rows: NDArray[np.intp], into: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Weights with these changes."""
    weights = versions.clean.copy()
    weights[versions.current(weights)[rows]] = 0.0
    weights[into[into >= 0]] = 1.0
    return weights
