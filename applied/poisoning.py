"""Poisoning, as an audit of one's own models: how far could somebody with a few rows move this one?

    max over what the adversary controls of  goal · f(w)        w: which version of every row is trained on

A changed label, a changed input, a row brought in: each gives weight to another version of a row
(`applied.versions`), so the datamodel of a surrogate predicts it, and the victim's retraining checks it, beside no
attack and beside a random attack of the same budget. `detect`, `trace` and `repair` read the same table backwards.

    attack = flip_labels(
        problem, ThreatModel(budget=0.05, may_change="labels"),
        surrogate=lambda table, w: influence(train(table, recipe, w, drop="row"), outputs),
        victim=lambda table, w, seeds: retrain(table, recipe, outputs, w, seeds=seeds),
    )
    print(attack.table())

Scope: models and data that you own or may test. Nothing here makes triggers or payloads: labels, inputs inside a
stated ball, and rows that the caller brings are all that an attack chooses from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.detection import Detection, Repair, Trace, detect, repair, trace
from applied.flip_budget import FlipBudgets, budget_to_flip
from applied.recipe import Decision, Interval, Retrained, Verified, paired_interval, verify
from applied.threat import ThreatModel
from applied.versions import Versions, joined, relabelled, rewritten
from attribution_core.datamodel import LinearDatamodel
from attribution_core.problem import Column, Problem, floating_column, take

__all__ = [
    "Attack", "Detection", "FlipBudgets", "Repair", "ThreatModel", "Trace", "Versions", "attempt", "budget_to_flip",
    "detect", "flip_labels", "insert", "perturb", "relabelled", "repair", "trace",
]  # fmt: skip

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Surrogate = Callable[[Problem, NDArray[np.float64]], LinearDatamodel]
InputSurrogate = Callable[[Problem, NDArray[np.intp], int], LinearDatamodel]
NO_ATTACK, RANDOM = "no attack", "random"


@dataclass(frozen=True)
class Victim:
    """How an attack's victims are trained: (table, weights [m, N], seeds) -> outputs, bound to its table."""

    train: Callable[..., Retrained]
    table: Problem

    def __call__(self, weights: NDArray[Any], *, seeds: Sequence[int]) -> Retrained:
        return self.train(self.table, weights, seeds)


@dataclass(frozen=True, eq=False)
class Attack:
    """What was changed, what that was predicted to do, and what it did to freshly trained victims.

    Args:
        name: of the attack.
        threat: what the adversary might do.
        versions: the table of rows that could be trained on.
        changed: [k] rows of the training data (rows brought in are numbered from n on).
        verified: weights of the attack, outputs retrained with them, without an attack, and with a random one,
            paired by seed.
        predicted: [t], the predicted change of every output by the attack; nan where the surrogate predicts no
            such output.
        meta: how it was made.
    """

    name: str
    threat: ThreatModel
    versions: Versions
    changed: NDArray[np.intp]
    verified: Verified
    predicted: NDArray[np.float64]
    meta: dict[str, Any]

    @property
    def weights(self) -> NDArray[np.float64]:
        """[N], which version of every row is trained on."""
        return self.verified.decision.weights

    @property
    def poisoned(self) -> Problem:
        """The problem that the victim is given: its training data hold the changed rows."""
        return self.versions.take(self.weights)

    @property
    def places(self) -> NDArray[np.intp]:
        """[k], where the changed rows stand in `poisoned.train`."""
        there = np.flatnonzero(self.weights > 0)
        return np.flatnonzero(self.versions.clean[there] == 0)

    @property
    def targets(self) -> list[str]:
        """Names of the outputs."""
        return [str(name) for name in self.verified.decision.targets]

    def outputs(self, arm: str = "attack") -> NDArray[np.float64]:
        """Retrained outputs [s, t] of "attack", "no attack" or "random"."""
        return self.verified.actual if arm == "attack" else self.verified.control[arm]

    def effect(self, target: str | int = 0, arm: str = "attack") -> Interval:
        """What an attack changed of one output, with a 95 % interval over victims, paired by seed."""
        j = self.targets.index(str(target)) if isinstance(target, str) else target
        return paired_interval(self.outputs(arm)[:, j], self.outputs(NO_ATTACK)[:, j])

    def table(self) -> str:
        """Every output without attack, and its change: predicted, actual, by a random attack."""
        rows = [["output", NO_ATTACK, "predicted change", "actual change", "random change"]]
        for j, name in enumerate(self.targets):
            said = "-" if np.isnan(self.predicted[j]) else f"{self.predicted[j]:+.4g}"
            rows.append([
                name, f"{self.outputs(NO_ATTACK)[:, j].mean():.4g}", said, str(self.effect(j)),
                str(self.effect(j, RANDOM)),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        many = len(self.verified.seeds)
        over = "1 victim" if many == 1 else f"{many} victims, [95 % t interval over seeds]"
        head = f"{self.name}: {self.threat}; {len(self.changed)} rows changed; {over}"
        return "\n".join([head, *lines])


def flip_labels(
    problem: Problem,
    threat: ThreatModel,
    surrogate: Surrogate,
    victim: Callable[..., Retrained],
    *,
    classes: int | None = None,
    column: Column | None = None,
    goal: str | ArrayLike | None = None,
    rounds: int = 1,
    sources: ArrayLike | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    progress: Progress = iter,
) -> Attack:
    """Change the labels that raise the goal most.

        max Σ_i Σ_c z_ic (scores_(i,c) − scores_(i,y_i)) · goal     Σ_c z_ic ≤ 1,  Σ z ≤ budget,  z in {0, 1}

    where (i, c) is row i with label c. With a linear datamodel, taking the best label of each row and then the
    best rows is the optimum, source quotas included. First order underrates what many flips do together: with
    `rounds` the budget is spent in equal parts, each on a surrogate of the data poisoned so far.

    Args:
        problem: the model, loss and training data, a classification.
        threat: with may_change="labels".
        surrogate: (table, weights [N]) -> datamodel of the outputs around these weights. The table's rows are all
            rows with all labels; train on those of weight 1, score all.
        victim: (table, weights [m, N], seeds) -> what `retrain` returns. The same training as the surrogate's, or
            another model altogether.
        classes, column: see `relabelled`.
        goal: the output (its name), or the combination [t] of outputs, to be made large; by default their mean.
        rounds: how often the surrogate is asked.
        sources: [n], who brought each row, for source quotas.
        targets: names of what the victim's outputs are, where these are more than the surrogate's (an accuracy).
        seeds: of victims; a number k means 0 .. k−1.

    Raises:
        ValueError: a threat model of another kind or that cannot be met; labels out of range; a goal that is none
            of the outputs; rounds that are more than the budget; no flip that is predicted to raise the goal.

    Source: Koh & Liang 2017 for the gain of one label; choosing by a datamodel as in Engstrom et al. 2025.
    """
    # rewrite: a flip moves weight from a row as it is to the same row with another label
    k = threat.rows(problem.n)
    quota = _Quota(threat.check("labels", sources, problem.n), threat.source_quota)
    if not 1 <= rounds <= k:
        raise ValueError(f"expected 1 to {k} rounds for {k} flips, got {rounds}")
    versions = relabelled(problem, classes, column)
    weights, row = versions.clean.copy(), versions.row
    changed = np.zeros(0, dtype=int)
    first = None
    for size in progress(_parts(k, rounds)):
        # plug in: the datamodel around the data poisoned so far
        f = surrogate(versions.problem, weights)
        first = f if first is None else first
        value = f.scores @ _goal(f, goal)
        current = versions.current(weights)
        gain = value - value[current[row]]
        gain[(weights > 0) | np.isin(row, changed)] = 0.0

        # optimize: the best label of each row, then the best rows
        chosen = quota.best(gain, row, size, changed)
        weights[current[row[chosen]]] = 0.0
        weights[chosen] = 1.0
        changed = np.r_[changed, row[chosen]]
    assert first is not None
    _some(changed, "flip")
    rng_of = partial(_random_flips, versions, k, quota)
    name = "flip_labels" if rounds == 1 else f"flip_labels, {rounds} rounds"
    return _attack(
        name, threat, versions, weights, changed, first, f.predict(weights) - first.base, rng_of, victim, targets,
        seeds, {"rounds": rounds, "surrogate": dict(f.meta)},
    )  # fmt: skip


def insert(
    problem: Problem,
    pool: Any,
    threat: ThreatModel,
    surrogate: Surrogate,
    victim: Callable[..., Retrained],
    *,
    goal: str | ArrayLike | None = None,
    rounds: int = 1,
    sources: ArrayLike | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    progress: Progress = iter,
) -> Attack:
    """Bring in the rows of a pool that raise the goal most: how far could one author, or several, move this model?

        max Σ_i w_i scores_i · goal      w_i in {0, 1} over the pool,  Σ w ≤ budget,  Σ_{i of source} w_i ≤ quota

    Args:
        pool: rows that could be brought in, with the columns of the training data; the caller's own.
        threat: with may_change="rows"; a share is of the training rows.
        sources: [pool], the author of each row of the pool.
        surrogate, victim, goal, rounds, targets, seeds: see `flip_labels`; the table is the training data and after
            them the pool.

    Raises:
        ValueError: see `flip_labels`; a budget of more rows than the pool has.
    """
    # rewrite: rows that are brought in go from weight 0 to 1
    versions, places = joined(problem, pool)
    k = threat.rows(problem.n)
    if k > len(places):
        raise ValueError(
            f"a threat model that cannot be met: {k} rows of a pool of {len(places)}; lower the budget"
        )
    labels = threat.check("rows", sources, len(places))
    row = versions.row
    padded = None if labels is None else np.r_[np.full(problem.n, labels[0]), labels]
    quota = _Quota(padded, threat.source_quota)
    weights, changed, first = versions.clean.copy(), np.zeros(0, dtype=int), None
    for size in progress(_parts(k, min(rounds, k))):
        # plug in
        f = surrogate(versions.problem, weights)
        first = f if first is None else first
        gain = f.scores @ _goal(f, goal)
        gain[weights > 0] = 0.0

        # optimize
        chosen = quota.best(gain, row, size, changed)
        weights[chosen] = 1.0
        changed = np.r_[changed, row[chosen]]
    assert first is not None
    _some(changed, "row of the pool")
    rng_of = partial(_random_rows, versions, places, k, quota)
    return _attack(
        "insert", threat, versions, weights, changed, first, f.predict(weights) - first.base, rng_of, victim, targets,
        seeds, {"rounds": rounds, "surrogate": dict(f.meta)},
    )  # fmt: skip


def perturb(
    problem: Problem,
    threat: ThreatModel,
    surrogate: InputSurrogate,
    victim: Callable[..., Retrained],
    *,
    rows: ArrayLike | None = None,
    column: Column | None = None,
    steps: int = 40,
    step_size: float | None = None,
    momentum: float = 0.9,
    goal: str | ArrayLike | None = None,
    sources: ArrayLike | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    name: str = "perturb",
    progress: Progress = iter,
) -> Attack:
    """Move the inputs of some rows, inside a ball around them, to where training on them raises the goal most.

        max goal · f(x)    ‖x_i − original_i‖ ≤ epsilon;      x ← nearest in the ball (x + η · direction of m)

    with m the running mean of ∂ goal/∂x over steps, direction its sign ("inf") or its unit vector a row ("2"), and η
    falling linearly to a tenth.

    Args:
        threat: with may_change="inputs".
        surrogate: (problem with the rows as they are now, rows [k], step) -> datamodel by their inputs:
            `magic(train(..., seed=step), outputs, wrt="inputs", rows=rows)` (exactly through training),
            `input_influence` (one curvature solve), or `gradient_matching` (the usual baseline). Training with
            another seed at every step makes poisons that work on fresh seeds.
        rows: which rows are moved; by default those whose inputs reach furthest at first order, on one call of the
            surrogate over all rows.
        column: of the inputs, by default the first floating one.
        steps, step_size: step_size is 2.5 epsilon / steps unless given.
        momentum: of the running mean.
        goal: as in `flip_labels`.
        targets: names of the victim's outputs; by default those of the surrogate. Outputs of these names that the
            surrogate does not have are not predicted.

    Returns:
        An attack whose prediction is the sum over steps of what each first-order model predicts of its step. The
        random control moves random rows by random signs (directions) as far as the ball allows.

    Raises:
        ValueError: see `flip_labels`; rows that are more than the budget; no floating column.

    Source: Engstrom et al. 2025 (arXiv 2503.13751) for metagradients; Koh & Liang 2017, sec. 5.2, for influence.
    """
    # rewrite: moved rows are other versions of rows; their inputs are what is chosen
    k = threat.rows(problem.n)
    quota = _Quota(threat.check("inputs", sources, problem.n), threat.source_quota)
    at = floating_column(problem.train, column)
    chosen = _furthest(problem, threat, surrogate, goal, k, quota) if rows is None else np.sort(np.asarray(rows, dtype=int))  # fmt: skip
    if len(chosen) > k or len(np.unique(chosen)) < len(chosen):
        raise ValueError(
            f"expected at most {k} different rows, as the budget says, got {len(chosen)}"
        )
    original = _inputs(problem, chosen, at)
    x, mean = original.copy(), np.zeros_like(original)
    assert threat.epsilon is not None
    size = 2.5 * threat.epsilon / steps if step_size is None else step_size
    moved: Any = 0.0
    for step in progress(range(steps)):
        # plug in: the datamodel by inputs, around the inputs as they are now
        versions, places = rewritten(problem, chosen, x, at)
        f = surrogate(versions.take(_instead(versions, places)), chosen, step)
        slope = (f.scores @ _goal(f, goal)).reshape(x.shape)
        mean = momentum * mean + (1 - momentum) * slope

        # optimize: one step up, back into the ball
        rate = size * (1 - 0.9 * step / max(steps - 1, 1))
        new = threat.within(x + rate * _direction(mean, threat.norm), original)
        moved = moved + (new - x).ravel() @ f.scores
        x = new
    noise = [_noisy(problem, threat, at, k, quota, seed) for seed in _listed(seeds)]
    versions, places = rewritten(
        problem,
        np.concatenate([chosen, *(some for some, _ in noise)]),
        np.concatenate([x, *(moved for _, moved in noise)]),
        at,
    )
    ends = np.cumsum([len(chosen), *(len(some) for some, _ in noise)])
    weights = _instead(versions, places[: ends[0]])
    random = [_instead(versions, places[a:b]) for a, b in pairwise(ends)]
    meta = {"steps": steps, "step_size": size, "surrogate": dict(f.meta), "rows": chosen}
    return _attack(
        name, threat, versions, weights, chosen, f, np.asarray(moved), lambda seed: random[_listed(seeds).index(seed)],
        victim, targets, seeds, meta,
    )  # fmt: skip


def attempt(
    versions: Versions,
    weights: ArrayLike,
    threat: ThreatModel,
    victim: Callable[..., Retrained],
    *,
    datamodel: LinearDatamodel | None = None,
    random: Callable[[int], NDArray[np.float64]] | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    name: str = "attempt",
) -> Attack:
    """An attack of one's own on a table of versions: what others would do, or a heuristic to compare with.

    Args:
        versions: of `relabelled`, say.
        weights: [N], 0 or 1, which version of every row is trained on.
        datamodel: predicts its effect, f̂(weights) − f̂(clean); nothing is predicted without it.
        random: seed -> weights [N] of the random control; by default random labels (of a table of `relabelled`).
        targets: names of the victim's outputs; needed without a datamodel.

    Raises:
        ValueError: more changed rows than the budget; a row in two versions; weights that do not fit.
    """
    w = np.asarray(weights, dtype=float)
    if w.shape != versions.clean.shape or not np.isin(w, (0.0, 1.0)).all():
        raise ValueError(f"expected weights 0 or 1 [N={len(versions.clean)}], got shape {w.shape}")
    taken = versions.row[w > 0]
    if len(np.unique(taken)) < len(taken):
        raise ValueError("expected one version of a row at most, got rows in two versions")
    changed = versions.row[(w > 0) & (versions.clean == 0)]
    k = threat.rows(versions.n)
    if not 1 <= len(changed) <= k:
        raise ValueError(f"expected 1 to {k} changed rows, as the budget says, got {len(changed)}")
    if datamodel is None and targets is None:
        raise ValueError(
            "expected targets, the names of the victim's outputs, or a datamodel; got neither"
        )
    f = datamodel
    if f is None:
        f = LinearDatamodel(np.zeros((len(w), 0)), np.zeros(0), versions.clean)
    drawn = random or partial(_random_flips, versions, k, _Quota(None, None))
    moved = f.predict(w) - f.predict(versions.clean)
    return _attack(name, threat, versions, w, changed, f, moved, drawn, victim, targets, seeds, {})


# --- choosing --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Quota:
    """How many rows one source may bring."""

    sources: NDArray[Any] | None  # by row
    most: int | None

    def best(
        self, gain: NDArray[Any], row: NDArray[np.intp], k: int, taken: NDArray[np.intp]
    ) -> NDArray[np.intp]:
        """Places of the k largest positive gains, one of a row at most, within what is left of the quotas.

        Rows within sources within the budget are nested limits (a laminar matroid): taking the best that still
        fits is the optimum.
        """
        used: dict[Any, int] = {}
        for old in taken:
            used[self._source(old)] = used.get(self._source(old), 0) + 1
        found: list[int] = []
        rows: set[int] = set()
        for place in np.argsort(-gain, kind="stable"):
            if gain[place] <= 0 or len(found) == k:
                break
            source = self._source(row[place])
            full = self.most is not None and used.get(source, 0) >= self.most
            if row[place] in rows or full:
                continue
            found.append(place)
            rows.add(row[place])
            used[source] = used.get(source, 0) + 1
        return np.array(found, dtype=int)

    def _source(self, row: int) -> Any:
        return None if self.sources is None else self.sources[row]


def _goal(f: LinearDatamodel, goal: str | ArrayLike | None) -> NDArray[np.float64]:
    """[t], the combination of outputs that is to become large."""
    names = [str(name) for name in np.asarray(f.targets)]
    if goal is None:
        return np.full(len(names), 1.0 / len(names))
    if isinstance(goal, str):
        if goal not in names:
            raise ValueError(f"expected a goal among the outputs {names[:20]}, got {goal!r}")
        return np.array([float(name == goal) for name in names])
    given = np.asarray(goal, dtype=float)
    if given.shape != (len(names),) or not np.isfinite(given).all():
        raise ValueError(f"expected a finite goal [t={len(names)}], got {given.shape}")
    return given


def _parts(k: int, rounds: int) -> list[int]:
    """The budget in equal parts."""
    return np.diff(np.round(np.linspace(0, k, rounds + 1)).astype(int)).tolist()


def _some(changed: NDArray[np.intp], what: str) -> None:
    if not len(changed):
        raise ValueError(
            f"expected a {what} that is predicted to raise the goal, got none; look at the goal's sign"
        )


def _furthest(
    problem: Problem,
    threat: ThreatModel,
    surrogate: InputSurrogate,
    goal: Any,
    k: int,
    quota: _Quota,
) -> NDArray[np.intp]:
    """Rows whose inputs reach furthest: the largest first-order gain inside the ball."""
    everyone = np.arange(problem.n)
    f = surrogate(problem, everyone, 0)
    slope = (f.scores @ _goal(f, goal)).reshape(problem.n, -1)
    reach = np.abs(slope).sum(1) if threat.norm == "inf" else np.linalg.norm(slope, axis=1)
    return np.sort(quota.best(reach, everyone, k, everyone[:0]))


def _direction(mean: NDArray[Any], norm: str) -> NDArray[Any]:
    if norm == "inf":
        return np.sign(mean)
    length = np.linalg.norm(mean.reshape(len(mean), -1), axis=1)
    return mean / np.maximum(length, 1e-300).reshape(-1, *[1] * (mean.ndim - 1))


# --- versions and controls ---------------------------------------------------------------------------


def _inputs(problem: Problem, rows: NDArray[np.intp], column: Column) -> NDArray[np.float64]:
    batch: Any = take(problem.train, rows)
    return batch[column].double().cpu().numpy()


def _instead(versions: Versions, places: NDArray[np.intp]) -> NDArray[np.float64]:
    """The clean weights with some new versions in the place of the old ones."""
    weights = versions.clean.copy()
    weights[versions.current(weights)[versions.row[places]]] = 0.0
    weights[places] = 1.0
    return weights


def _random_places(
    rows: NDArray[np.intp], k: int, quota: _Quota, rng: np.random.Generator
) -> NDArray[np.intp]:
    """k random rows within the quotas."""
    order = rng.permutation(len(rows))
    chosen = quota.best(1.0 + rng.random(len(rows))[order], rows[order], k, rows[:0])
    return rows[order][chosen]


def _random_flips(versions: Versions, k: int, quota: _Quota, seed: int) -> NDArray[np.float64]:
    """Random rows with random other labels."""
    rng = np.random.default_rng([seed, 0xF1])
    classes = len(versions.row) // versions.n
    rows = _random_places(np.arange(versions.n), k, quota, rng)
    old = versions.current(versions.clean)[rows] % classes
    return _instead(
        versions, rows * classes + (old + rng.integers(1, classes, len(rows))) % classes
    )


def _random_rows(
    versions: Versions, places: NDArray[np.intp], k: int, quota: _Quota, seed: int
) -> NDArray[np.float64]:
    """Random rows of the pool."""
    rng = np.random.default_rng([seed, 0xF2])
    rows = _random_places(versions.row[places], k, quota, rng)
    weights = versions.clean.copy()
    weights[places[np.isin(versions.row[places], rows)]] = 1.0
    return weights


def _noisy(
    problem: Problem, threat: ThreatModel, column: Column, k: int, quota: _Quota, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(random rows, their inputs moved at random as far as the ball allows)."""
    rng = np.random.default_rng([seed, 0xF3])
    rows = np.sort(_random_places(np.arange(problem.n), k, quota, rng))
    x = _inputs(problem, rows, column)
    assert threat.epsilon is not None
    noise = threat.epsilon * _direction(rng.standard_normal(x.shape), threat.norm)
    return rows, threat.within(x + noise, x)


def _listed(seeds: int | Sequence[int]) -> list[int]:
    return list(range(seeds)) if isinstance(seeds, int) else list(seeds)


def _attack(
    name: str, threat: ThreatModel, versions: Versions, weights: NDArray[np.float64], changed: NDArray[np.intp],
    f: LinearDatamodel, moved: NDArray[np.float64], random: Callable[[int], NDArray[np.float64]],
    victim: Callable[..., Retrained], targets: Sequence[str] | None, seeds: int | Sequence[int], meta: dict[str, Any],
) -> Attack:  # fmt: skip
    """Victims retrained with the attack, without one, and with a random one of the same budget."""
    known = [str(target) for target in np.asarray(f.targets)]
    names = known if targets is None else [str(target) for target in targets]
    said = dict(zip(known, moved, strict=True))
    base = dict(zip(known, f.base, strict=True))
    predicted = np.array([said.get(target, np.nan) for target in names])
    before = np.array([base.get(target, np.nan) for target in names])
    decision = Decision(
        weights=weights, ids=np.flatnonzero(weights > 0), predicted=before + predicted, baseline=before,
        targets=np.array(names), meta={"application": "poisoning", "attack": name, **meta},
    )  # fmt: skip
    controls = {NO_ATTACK: versions.clean, RANDOM: np.stack([random(s) for s in _listed(seeds)])}
    verified = verify(
        decision, Victim(victim, versions.problem), control=controls, seeds=_listed(seeds)
    )
    return Attack(name, threat, versions, np.sort(changed), verified, predicted, meta)
