"""Poisoning, as an audit of one's own models: how far could somebody with a few rows move this one?

    max over what the adversary controls of  goal · f(w)        w: which version of every row is trained on

A changed label, a changed input, a row brought in: each gives weight to another version of a row
(`applied.audit.versions`), so the datamodel of a surrogate predicts it, and the victim's retraining checks it, beside no
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

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from applied.audit.attack import (
    Attack,
    Quota,
    Said,
    goal_of,
    instead,
    of_table,
    random_rows,
    verified_attack,
)
from applied.audit.detection import Detection, detect
from applied.audit.flip_budget import FlipBudgets, budget_to_flip
from applied.audit.perturbation import perturb
from applied.audit.repairing import Repair, Trace, repair, trace
from applied.audit.threat import ROUNDING, ThreatModel
from applied.audit.versions import Versions, joined, labels_of, relabelled
from applied.recipe import Retrained
from attribution_core.data import Column, Data, Progress, as_data, take
from attribution_core.datamodel import LinearDatamodel
from attribution_core.outputs import labels_in, logits_of
from attribution_core.problem import Problem

__all__ = [
    "Attack", "Detection", "FlipBudgets", "Repair", "ThreatModel", "Trace", "Versions", "attempt", "budget_to_flip",
    "detect", "flip_labels", "insert", "perturb", "relabelled", "repair", "trace",
]  # fmt: skip

Surrogate = Callable[[Problem, NDArray[np.float64]], LinearDatamodel]


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
    best rows is the optimum, source quotas included. First order misjudges what many flips do together: with
    `rounds` the budget is spent in equal parts, each on a surrogate of the data poisoned so far. What all flips do
    together is predicted by the last surrogate; one round's by a second one, of the data with every other flip in it.

    Args:
        problem: the model, loss and training data, a classification.
        threat: with may_change="labels".
        surrogate: (table, weights [N]) -> datamodel of the outputs around these weights. The table's rows are all
            rows with all labels; train on those of weight 1, score all.
        victim: (table, weights [m, N], seeds) -> what `retrain` returns. The same training as the surrogate's, or
            another model altogether.
        classes, column: see `relabelled`.
        goal: the output (its name), or the combination [t] of outputs, to be made large; by default their mean.
        rounds: how often the surrogate is asked what to change.
        sources: [n], who brought each row, for source quotas.
        targets: names of what the victim's outputs are, where these are more than the surrogate's (an accuracy).
        seeds: of victims; a number k means 0 .. k−1.

    Raises:
        ValueError: a threat model of another kind or that cannot be met; labels out of range; a goal that is none
            of the outputs; rounds that are more than the budget; a surrogate of other rows than the table's, or around other
            weights; no flip that is predicted to raise the goal.

    Source: Koh & Liang 2017 for the gain of one label; choosing by a datamodel as in Engstrom et al. 2025.
    """
    # rewrite: a flip moves weight from a row as it is to the same row with another label
    k = threat.rows(problem.n)
    quota = Quota.of(threat, "labels", sources, problem.n)
    versions = relabelled(problem, classes, column)

    # plug in, optimize: the best label of each row, then the best rows
    weights, changed, said, meta = _in_rounds(
        versions, k, rounds, quota, surrogate, goal, "flip", progress
    )
    random = partial(_random_flips, versions, len(changed), quota)
    name = "flip_labels" if rounds == 1 else f"flip_labels, {rounds} rounds"
    return verified_attack(
        name, threat, versions, weights, changed, said, random, victim, targets, seeds, meta
    )


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
        ValueError: see `flip_labels`; a budget of more rows than the pool has; labels that the model has no output for.
    """
    # rewrite: rows that are brought in go from weight 0 to 1
    versions, places = joined(problem, pool)
    _refuse_unknown_labels(problem, as_data(pool))
    k = threat.rows(problem.n)
    if k > len(places):
        raise ValueError(
            f"a threat model that cannot be met: {k} rows of a pool of {len(places)}; lower the budget"
        )
    authors = Quota.of(replace(threat, budget=k), "rows", sources, len(places))
    quota = authors.after(problem.n)

    # plug in, optimize: the best rows
    weights, changed, said, meta = _in_rounds(
        versions, k, rounds, quota, surrogate, goal, "row of the pool", progress
    )
    random = partial(_random_rows, versions, places, len(changed), quota)
    return verified_attack(
        "insert", threat, versions, weights, changed, said, random, victim, targets, seeds, meta
    )


def attempt(
    versions: Versions,
    weights: ArrayLike,
    threat: ThreatModel,
    victim: Callable[..., Retrained],
    *,
    datamodel: LinearDatamodel | None = None,
    random: Callable[[int], NDArray[np.float64]] | None = None,
    sources: ArrayLike | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    name: str = "attempt",
) -> Attack:
    """An attack of one's own on a table of versions: what others would do, or a heuristic to compare with.

    Args:
        versions: of `relabelled`, say.
        weights: [N], 0 or 1, which version of every row is trained on.
        datamodel: predicts its effect, f̂(weights) − f̂(clean); nothing is predicted without it.
        random: seed -> weights [N] of the random control; by default random labels of a table of `relabelled`, random
            rows brought in of one of `joined`. Needed for other tables.
        sources: [rows], who brings each, for source quotas.
        targets: names of the victim's outputs; needed without a datamodel.

    Raises:
        ValueError: more changed rows than the budget or a quota; a table of something else than the threat model
            lets change; inputs outside its ball; a row in two versions; weights that do not fit; no random control.
    """
    w = np.asarray(weights, dtype=float)
    if w.shape != versions.clean.shape or not np.isin(w, (0.0, 1.0)).all():
        raise ValueError(f"expected weights 0 or 1 [N={len(versions.clean)}], got shape {w.shape}")
    taken = versions.row[w > 0]
    if len(np.unique(taken)) < len(taken):
        raise ValueError("expected one version of a row at most, got rows in two versions")
    lost = np.setdiff1d(versions.row[versions.clean > 0], taken)
    changed = np.r_[versions.row[(w > 0) & (versions.clean == 0)], lost]
    k = threat.rows(versions.n)
    if not 1 <= len(changed) <= k:
        raise ValueError(f"expected 1 to {k} changed rows, as the budget says, got {len(changed)}")
    change = "rows" if len(lost) else versions.kind or threat.may_change
    of_rows = replace(threat, budget=k)  # a share is one of the rows, not of a pool's beside them
    quota = Quota.of(of_rows, change, sources, int(versions.row.max()) + 1)
    quota.refuse(changed)
    _refuse_beyond(versions, w, threat)
    if datamodel is None and targets is None:
        raise ValueError(
            "expected targets, the names of the victim's outputs, or a datamodel; got neither"
        )
    said = Said([], np.zeros(0), np.zeros(0))
    if datamodel is not None:
        before = datamodel.predict(versions.clean)
        names = np.asarray(datamodel.targets).astype(str)
        said = Said(names, before, datamodel.predict(w) - before)
    drawn = random or _random_of(versions, len(changed), quota)
    return verified_attack(
        name, threat, versions, w, changed, said, drawn, victim, targets, seeds, {}
    )


def _in_rounds(
    versions: Versions, k: int, rounds: int, quota: Quota, surrogate: Surrogate, goal: Any, what: str,
    progress: Progress,
) -> tuple[NDArray[np.float64], NDArray[np.intp], Said, dict[str, Any]]:  # fmt: skip
    """(weights, changed rows, what was predicted, meta): equal parts, each on a datamodel of the data by then."""
    if not isinstance(rounds, (int, np.integer)) or not 1 <= rounds <= k:
        raise ValueError(f"expected 1 to {k} rounds for {k} {what.split()[0]}s, got {rounds}")
    weights, row = versions.clean.copy(), versions.row
    changed, first = np.zeros(0, dtype=int), None
    for size in progress(np.diff(np.round(np.linspace(0, k, rounds + 1)).astype(int)).tolist()):
        # plug in: the datamodel around the data poisoned so far
        f = of_table(surrogate(versions.problem, weights.copy()), weights)
        first = f if first is None else first
        value = f.scores @ goal_of(f, goal)
        old = versions.current(weights)[row]  # the version in whose place each one would come
        gain = value - np.where(old >= 0, value[old], 0.0)
        gain[(weights > 0) | np.isin(row, changed)] = 0.0

        # optimize: the best version of each row, then the best rows
        chosen = quota.best(gain, row, size, changed)
        gone = old[chosen]
        weights[gone[gone >= 0]] = 0.0
        weights[chosen] = 1.0
        changed = np.r_[changed, row[chosen]]
    if first is None or not len(changed):
        raise ValueError(
            f"expected a {what} that is predicted to raise the goal, got none; look at the goal's sign"
        )

    # plug in, once more: what all of it does, which first order at the clean data misjudges
    if rounds == 1 and len(changed) > 1:
        half = instead(versions, chosen[::2])
        f = of_table(surrogate(versions.problem, half.copy()), half)
    before = first.predict(versions.clean)
    said = Said(np.asarray(f.targets).astype(str), before, f.predict(weights) - before)
    return weights, changed, said, {"rounds": rounds, "surrogate": dict(f.meta)}


def _refuse_unknown_labels(problem: Problem, pool: Data) -> None:
    """Raise for rows of a pool of classes that neither the training data nor the model's outputs have."""
    try:
        _, labels = labels_of(pool)
        _, own = labels_of(problem.train)
        with torch.no_grad():
            model = copy.deepcopy(problem.model).eval()
            z = logits_of(model, take(pool, [0], problem.device))
    except Exception:  # no classification, or a model that is called in another way
        return
    new = np.setdiff1d(labels, own)
    if z.ndim == 2 and z.shape[1] > 1 and len(new) and not 0 <= new[0] <= new[-1] < z.shape[1]:
        raise ValueError(
            f"expected a pool with labels 0 .. {z.shape[1] - 1}, got {labels.min()} to {labels.max()}"
        )


def _refuse_beyond(versions: Versions, weights: NDArray[np.float64], threat: ThreatModel) -> None:
    """Raise where inputs lie outside the ball around those that they replace, or labels change that may not."""
    if threat.may_change != "inputs":
        return
    new = np.flatnonzero((weights > 0) & (versions.clean == 0))
    old = versions.current(versions.clean)[versions.row[new]]
    if (old < 0).any():
        raise ValueError("expected inputs of rows that are there, got rows that are brought in")
    pairs = [take(versions.problem.train, rows) for rows in (new, old)]
    now, then = map(labels_in, pairs)
    if (
        now is not None
        and then is not None
        and not (now.is_floating_point() or torch.equal(now, then))
    ):
        raise ValueError(
            "expected labels as they were, which a threat model of inputs puts beyond reach, got others; may_change='labels' or "
            "'rows' takes them"
        )
    after, before = map(_floats, pairs)
    for x, original in zip(after, before, strict=True):
        if np.array_equal(x, original):
            continue
        near = threat.within(x, original)
        far = np.abs(near - x).reshape(len(x), -1).max(1) > ROUNDING * max(1.0, np.abs(x).max())
        if far.any():
            raise ValueError(
                f"expected inputs within epsilon={threat.epsilon:g} of those they replace, got "
                f"{int(far.sum())} rows farther off: {versions.row[new[far]][:5].tolist()}"
            )


def _floats(batch: Any) -> list[NDArray[np.float64]]:
    columns = batch.values() if isinstance(batch, dict) else batch
    return [x.double().cpu().numpy() for x in columns if x.is_floating_point()]


def _random_of(versions: Versions, k: int, quota: Quota) -> Callable[[int], NDArray[np.float64]]:
    """The random control that fits a table."""
    if versions.kind == "labels":
        return partial(_random_flips, versions, k, quota)
    if versions.kind == "rows":
        pool = np.flatnonzero(versions.clean == 0)
        return partial(_random_rows, versions, pool, k, quota)
    raise ValueError(
        "expected random, seed -> weights [N] of the random control, for a table that is neither of relabelled "
        "nor of joined; got none"
    )


def _random_flips(versions: Versions, k: int, quota: Quota, seed: int) -> NDArray[np.float64]:
    """Random rows with random other labels."""
    rng = np.random.default_rng([seed, 0xF1])
    classes = len(versions.row) // versions.n
    rows = random_rows(np.arange(versions.n), k, quota, rng)
    old = versions.current(versions.clean)[rows] % classes
    return instead(versions, rows * classes + (old + rng.integers(1, classes, len(rows))) % classes)


def _random_rows(
    versions: Versions, places: NDArray[np.intp], k: int, quota: Quota, seed: int
) -> NDArray[np.float64]:
    """Random rows of the pool."""
    rng = np.random.default_rng([seed, 0xF2])
    rows = random_rows(versions.row[places], k, quota, rng)
    weights = versions.clean.copy()
    weights[places[np.isin(versions.row[places], rows)]] = 1.0
    return weights
