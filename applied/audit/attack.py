"""An attack: what was changed, what it was predicted to do, what it did to freshly trained victims.

Shared by every attack of `applied.poisoning`: choosing within a budget and quotas, the random control of the same
budget, and the proof by retraining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.audit.threat import Change, ThreatModel
from applied.audit.versions import Versions
from applied.recipe import (
    Decision,
    Interval,
    Retrained,
    Verified,
    aligned,
    distinct_seeds,
    paired_interval,
    verify,
)
from attribution_core.datamodel import LinearDatamodel
from attribution_core.problem import Problem

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

    def __repr__(self) -> str:
        """A line: a generated one prints every row."""
        many = len(self.verified.seeds)
        return f"Attack({self.name}: {len(self.changed)} rows changed, {many} victim{'s'[: many != 1]})"

    @property
    def weights(self) -> NDArray[np.float64]:
        """[N], which version of every row is trained on."""
        return self.verified.decision.weights

    @property
    def poisoned(self) -> Problem:
        """The problem that the victim is given: its training data hold the changed rows."""
        return self.versions.take(self.weights)

    @property
    def planted(self) -> NDArray[np.bool_]:
        """[rows of `poisoned.train`], which of them were changed or brought in."""
        return self.versions.clean[self.weights > 0] == 0

    @property
    def places(self) -> NDArray[np.intp]:
        """[k], where the changed rows stand in `poisoned.train`."""
        return np.flatnonzero(self.planted)

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
        lines = aligned(rows)
        many = len(self.verified.seeds)
        over = "1 victim" if many == 1 else f"{many} victims, [95 % t interval over seeds]"
        head = f"{self.name}: {self.threat}; {len(self.changed)} rows changed; {over}"
        return "\n".join([head, *lines])


@dataclass(frozen=True, eq=False)
class Said:
    """Outputs by name, before an attack and how they are predicted to change."""

    targets: Sequence[Any] | NDArray[Any]
    before: NDArray[np.float64]
    change: NDArray[np.float64]

    def at(self, names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(before, change) of these outputs; nan for those that the surrogate does not have."""
        place = {str(name): j for j, name in enumerate(self.targets)}
        found = [(self.before[place[n]], self.change[place[n]]) if n in place else (np.nan,) * 2 for n in names]  # fmt: skip
        both = np.array(found, dtype=float).reshape(len(names), 2)
        return both[:, 0], both[:, 1]


@dataclass(frozen=True, eq=False)
class Quota:
    """How many rows one source may bring."""

    sources: NDArray[Any] | None  # by row
    most: int | None

    @classmethod
    def of(cls, threat: ThreatModel, change: Change, sources: ArrayLike | None, n: int) -> Quota:
        """What the threat model says of sources [n]; raises where the attack changes something else."""
        return cls(threat.check(change, sources, n), threat.source_quota)

    def after(self, n: int) -> Quota:
        """The same for a pool's rows, numbered from n on; the first n rows are never brought in."""
        if self.sources is None:
            return self
        return Quota(np.r_[np.full(n, self.sources[0]), self.sources], self.most)

    def times(self, factor: int) -> Quota:
        """Quotas so many times as wide, for rows of which only a part is kept."""
        return replace(self, most=None if self.most is None else factor * self.most)

    def left(self, taken: NDArray[np.intp]) -> dict[Any, int]:
        """How many more rows each source may bring; empty where there are no quotas."""
        if self.sources is None or self.most is None:
            return {}
        names, used = np.unique(self.sources[taken], return_counts=True)
        spent = dict(zip(names.tolist(), used.tolist(), strict=True))
        return {name: self.most - spent.get(name, 0) for name in np.unique(self.sources).tolist()}

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

    def refuse(self, rows: NDArray[np.intp]) -> None:
        """Raise where the given rows are more than a source may bring."""
        if self.sources is None or self.most is None:
            return
        names, counts = np.unique(self.sources[rows], return_counts=True)
        if (counts > self.most).any():
            raise ValueError(
                f"expected at most {self.most} rows a source, as the threat model says, got {counts.max()} of "
                f"{names[counts.argmax()]!r}"
            )

    def _source(self, row: int) -> Any:
        return None if self.sources is None else self.sources[row]


def of_table(f: LinearDatamodel, weights: NDArray[np.float64]) -> LinearDatamodel:
    """A surrogate's datamodel, if it scores the rows of the table that it was asked about, around these weights."""
    n = len(weights)
    if len(f.scores) != n:
        raise ValueError(
            f"expected a surrogate that scores the {n} rows of the problem it is given, versions of rows among "
            f"them, got scores of {len(f.scores)}; score that problem at the weights given, not the original one"
        )
    # regressions look at no one place, and stand at their subsets' mean weight
    if f.meta.get("method") != "regression" and ((f.anchor > 0) != (weights > 0)).any():
        raise ValueError(
            f"expected a surrogate around the weights it is given, {int((weights > 0).sum())} of {n} versions of rows, got "
            f"one around {int((f.anchor > 0).sum())}: pass weights on, as in lambda table, w: "
            'influence(train(table, how, w, drop="row"), outputs); of a model trained at w in another way say replace(f, anchor=w)'
        )
    return f


def goal_of(f: LinearDatamodel, goal: str | ArrayLike | None) -> NDArray[np.float64]:
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


def instead(versions: Versions, places: NDArray[np.intp]) -> NDArray[np.float64]:
    """The clean weights with some new versions in the place of the old ones."""
    weights = versions.clean.copy()
    old = versions.current(weights)[versions.row[places]]
    weights[old[old >= 0]] = 0.0  # a row that is brought in replaces none
    weights[places] = 1.0
    return weights


def random_rows(
    rows: NDArray[np.intp], k: int, quota: Quota, rng: np.random.Generator
) -> NDArray[np.intp]:
    """k random rows within the quotas."""
    order = rng.permutation(len(rows))
    chosen = quota.best(1.0 + rng.random(len(rows))[order], rows[order], k, rows[:0])
    return rows[order][chosen]


def verified_attack(
    name: str, threat: ThreatModel, versions: Versions, weights: NDArray[np.float64], changed: NDArray[np.intp],
    said: Said, random: Callable[[int], NDArray[np.float64]], victim: Callable[..., Retrained],
    targets: Sequence[str] | None, seeds: int | Sequence[int], meta: dict[str, Any],
) -> Attack:  # fmt: skip
    """Victims retrained with the attack, without one, and with a random one of the same budget."""
    names = [str(target) for target in (said.targets if targets is None else targets)]
    before, predicted = said.at(names)
    decision = Decision(
        weights=weights, ids=np.flatnonzero(weights > 0), predicted=before + predicted, baseline=before,
        targets=np.array(names), meta={"application": "poisoning", "attack": name, **meta},
    )  # fmt: skip
    chosen = distinct_seeds(seeds)
    controls = {NO_ATTACK: versions.clean, RANDOM: np.stack([random(s) for s in chosen])}
    train = Victim(victim, versions.problem)
    verified = verify(decision, train, control=controls, seeds=chosen)
    return Attack(name, threat, versions, np.sort(changed), verified, predicted, meta)
