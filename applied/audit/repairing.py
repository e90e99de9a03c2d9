"""What to do about it: who stands behind a bad output, and what comes back without the suspects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.audit.attack import Attack
from applied.audit.detection import Detection
from applied.recipe import Decision, Interval, Retrain, Verified, aligned, paired_interval, verify
from attribution_core.datamodel import LinearDatamodel
from attribution_core.seeds import listed

ROUNDING = 1e-12  # of the outputs: damage that is none


@dataclass(frozen=True, eq=False)
class Trace:
    """The training rows behind one output.

    Args:
        ids: [k] the rows that raise it most, the strongest first; scores: [k], by how much per unit of weight.
        predicted: change of the output without them.
        weights: [n], the training weights without them.
        verified: retrained without them, beside as many random rows; None where nothing was retrained.
    """

    ids: NDArray[Any]
    scores: NDArray[np.float64]
    predicted: float
    weights: NDArray[np.float64]
    verified: Verified | None = None


def trace(
    datamodel: LinearDatamodel,
    target: Any = 0,
    *,
    k: int = 10,
    retrain: Retrain | None = None,
    seeds: int | Sequence[int] = 3,
) -> Trace:
    """The training rows that raise one bad output most: its proponents, if the output is a loss.

        ids = argmax_k anchor_i scores[i, target],   predicted change without them = −Σ anchor_i scores_i

    Args:
        datamodel: of bad outputs, which are to become small.
        target: name of the output, or its column number.
        k: how many rows at most; rows of weight 0, or that lower it, are never among them.
        retrain: (weights, seeds) -> all outputs of the datamodel, to check by removal.

    Raises:
        ValueError: an unknown output; no row that raises it.
    """
    names = [str(name) for name in np.asarray(datamodel.targets)]
    at = names.index(str(target)) if str(target) in names else target
    j = at if isinstance(at, (int, np.integer)) else -1
    if not 0 <= j < len(names):
        raise ValueError(f"expected a target among {names[:20]}, got {target!r}")
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"expected a number of rows k of at least 1, got {k!r}")
    effect = datamodel.anchor * datamodel.scores[:, j]
    order = np.argsort(-effect, kind="stable")[:k]
    order = order[effect[order] > 0]
    if not len(order):
        raise ValueError(f"expected rows that raise {names[j]!r}, got none; is it a loss?")
    weights = np.array(datamodel.anchor, dtype=float)
    weights[order] = 0.0
    verified = None
    if retrain is not None:
        # what random removal leaves of each row on average
        even = 1 - len(order) / np.count_nonzero(datamodel.anchor)
        decision = Decision(
            weights=weights, ids=np.asarray(datamodel.ids)[weights > 0], predicted=datamodel.predict(weights),
            baseline=datamodel.predict(even * datamodel.anchor), targets=np.asarray(datamodel.targets), meta={"application": "trace"},
        )  # fmt: skip
        controls = {"nothing removed": datamodel.anchor}
        controls["random"] = _removed_at_random(datamodel.anchor, len(order), seeds)
        verified = verify(decision, retrain, control=controls, seeds=seeds)
    return Trace(
        np.asarray(datamodel.ids)[order], datamodel.scores[order, j], -float(effect[order].sum()), weights, verified
    )  # fmt: skip


def _removed_at_random(
    weights: NDArray[Any], k: int, seeds: int | Sequence[int]
) -> NDArray[np.float64]:
    """[s, n]: k random rows of positive weight taken away, a draw for each seed."""
    chosen = listed(seeds)
    drawn = np.repeat(np.asarray(weights, dtype=float)[None], len(chosen), axis=0)
    there = np.flatnonzero(drawn[0] > 0)
    for row, seed in zip(drawn, chosen, strict=True):
        row[np.random.default_rng([seed, 0xDE]).choice(there, k, replace=False)] = 0.0
    return drawn


# --- repair --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Repair:
    """What came back without the suspects.

    Args:
        removed: [r] places in the poisoned training data; planted: how many of them were.
        verified: retrained without them, beside as many random rows taken away ("random"), and beside exactly what
            was planted ("planted": the most that removal can do).
        attacked, clean: [s, t] outputs under the attack and without one, same seeds.
    """

    removed: NDArray[np.intp]
    planted: int
    verified: Verified
    attacked: NDArray[np.float64]
    clean: NDArray[np.float64]
    targets: list[str] = field(default_factory=list)

    def recovered(self, target: str | int = 0, arm: str = "repaired") -> Interval:
        """Σ (attacked − repaired) / Σ (attacked − clean) of one output, over victims: 1 is all of it.

        With a 95 % interval over victims, see `shares_recovered`; nan where no damage can be told: of one or two victims, where
        there is none, of three or more, where its interval holds 0. The other arms are
        "random", as many rows taken away at random, and "planted", exactly the planted ones.
        """
        j = self.targets.index(target) if isinstance(target, str) else target
        outputs = self.verified.actual if arm == "repaired" else self.verified.control[arm]
        damage, gain = (self.attacked[:, j] - other[:, j] for other in (self.clean, outputs))
        shares = shares_recovered(damage, gain, ROUNDING * float(np.abs(self.attacked[:, j]).max()))
        return paired_interval(shares) if len(shares) else Interval(math.nan, math.nan, math.nan)

    def table(self) -> str:
        """Every output: clean, attacked, repaired, random removal, and the share recovered."""
        rows = [
            [
                "output",
                "clean",
                "attacked",
                "repaired",
                "random removal",
                "planted removed",
                "recovered",
            ]
        ]
        for j, name in enumerate(self.targets):
            means = (
                self.clean,
                self.attacked,
                self.verified.actual,
                self.verified.control["random"],
                self.verified.control["planted"],
            )
            share = self.recovered(j)
            told = str(share) if math.isfinite(share.mean) else "-"
            rows.append([name, *(f"{m[:, j].mean():.4g}" for m in means), told])
        lines = aligned(rows)
        return "\n".join(
            [f"{len(self.removed)} rows removed, {self.planted} of them planted", *lines]
        )


def shares_recovered(
    damage: NDArray[np.float64],
    gain: NDArray[np.float64],
    least: float = 0.0,
    *,
    rises: bool = False,
) -> NDArray[np.float64]:
    """Shares of damage [s] that came back, one a victim or split, whose mean is all that did over all the damage:

        r + (g_s − r d_s) / d̄,    r = Σ g / Σ d

    A mean of ratios would be ruled by victims of hardly any damage. Empty where there is no more than `least` of it
    in the mean (of either sign; with `rises`, as of a loss, above 0), or where its own 95 % interval holds 0: a ratio
    to it may be anything. The interval is asked of three victims or more; that of two holds 0 of nearly any damage.

    Source: the ratio estimator and its residuals, Cochran 1977, ch. 6.

    >>> shares_recovered(np.array([2.0, 4.0, 3.0]), np.array([1.0, 4.0, 2.5])).mean().round(9).item()
    0.833333333
    """
    if not len(damage):
        return np.zeros(0)
    mean = paired_interval(damage)
    some = mean.mean > least if rises else abs(mean.mean) > least
    if not some or (len(damage) > 2 and mean.low <= 0 <= mean.high):
        return np.zeros(0)
    r = gain.sum() / damage.sum()
    shares: NDArray[np.float64] = r + (gain - r * damage) / damage.mean()
    return shares


def repair(
    attack: Attack,
    suspicion: Detection | ArrayLike,
    victim: Callable[..., Any],
    *,
    remove: int | None = None,
    seeds: int | Sequence[int] | None = None,
) -> Repair:
    """Take the most suspicious rows away, retrain (or unlearn), and say how much of the damage came back.

    Args:
        attack: what was done; gives the poisoned data and the outputs with and without it.
        suspicion: a `Detection` (its combined scores), or scores [n] of the poisoned data, high is suspicious.
        victim: as the attack's; or anything (table, weights [m, N], seeds) -> outputs that forgets the rows of
            weight 0, such as an unlearner.
        remove: how many rows; by default the detection's suspects, whose labels are disputed.
        seeds: those of the attack, unless given.

    Raises:
        ValueError: scores that do not fit; no suspects; scores, or a detection without trusted rows, without a
            number of rows to remove; other seeds than the attack's, which could not be paired.
    """
    there = np.flatnonzero(attack.weights > 0)
    detection = isinstance(suspicion, Detection)
    scores = suspicion.combined if isinstance(suspicion, Detection) else np.asarray(suspicion, dtype=float)  # fmt: skip
    if scores.shape != (len(there),):
        raise ValueError(f"expected suspicion [n={len(there)}], got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"expected a suspicion of each row, got {np.isnan(scores).sum()} NaN")
    if remove is None and not (isinstance(suspicion, Detection) and suspicion.signed):
        what = "a detection without trusted rows" if detection else "plain scores"
        raise ValueError(f"expected `remove` beside {what}: they do not say where to stop")
    count = int((scores > 0).sum()) if remove is None else remove
    if not isinstance(count, (int, np.integer)) or not 0 < count < len(there):
        raise ValueError(f"expected some, not all, of {len(there)} rows to remove, got {count}")
    chosen = list(attack.verified.seeds) if seeds is None else listed(seeds)
    if chosen != list(attack.verified.seeds):
        raise ValueError(
            f"expected the attack's seeds {list(attack.verified.seeds)}, got {chosen}; pairs need the same"
        )
    removed = np.argsort(-scores, kind="stable")[:count]
    weights = attack.weights.copy()
    weights[there[removed]] = 0.0
    t = len(attack.targets)
    decision = Decision(
        weights=weights, ids=np.flatnonzero(weights > 0), predicted=np.full(t, np.nan),
        baseline=np.full(t, np.nan), targets=np.array(attack.targets), meta={"application": "repair"},
    )  # fmt: skip
    random = _removed_at_random(attack.weights, count, chosen)

    def retrain(weights: NDArray[Any], *, seeds: list[int]) -> Any:
        return victim(attack.versions.problem, weights, seeds)

    kept = attack.weights * attack.versions.clean
    verified = verify(decision, retrain, control={"random": random, "planted": kept}, seeds=chosen)
    planted = int((attack.versions.clean[there[removed]] == 0).sum())
    return Repair(
        removed, planted, verified, attack.outputs(), attack.outputs("no attack"), attack.targets
    )
