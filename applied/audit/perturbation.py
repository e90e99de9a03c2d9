"""Inputs moved inside a ball: by exact metagradients, by influence, or by matching gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.audit.attack import (
    Attack,
    Quota,
    Said,
    goal_of,
    instead,
    random_rows,
    verified_attack,
)
from applied.audit.threat import ThreatModel
from applied.audit.versions import rewritten
from applied.recipe import Retrained, distinct_seeds
from attribution_core.data import Column, Progress, floating_column, row_numbers, take
from attribution_core.datamodel import LinearDatamodel
from attribution_core.disk.files import claim, write_arrays
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.problem import Problem

InputSurrogate = Callable[[Problem, NDArray[np.intp], int], LinearDatamodel]
FIRST_STEP = 0.2  # of epsilon
CANDIDATES = 4  # times the rows of the budget that are moved at first
CHOOSING = 2 / 3  # of the steps, by which no more rows than the budget are left


def perturb(
    problem: Problem,
    threat: ThreatModel,
    surrogate: InputSurrogate,
    victim: Callable[..., Retrained],
    *,
    rows: ArrayLike | None = None,
    candidates: int = CANDIDATES,
    column: Column | None = None,
    steps: int = 40,
    step_size: float | None = None,
    momentum: float = 0.9,
    goal: str | ArrayLike | None = None,
    sources: ArrayLike | None = None,
    targets: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    name: str = "perturb",
    folder: str | Path | None = None,
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
        rows: which rows are moved; by default they are chosen on the way.
        candidates: how many times the rows of the budget are moved at first, those whose inputs reach furthest at
            first order (on one call of the surrogate over all rows). In equal parts of two thirds of the steps they
            are halved, those kept whose move ⟨m_i, x_i − original_i⟩ raises the goal most; what is given up lies
            where it lay. 1 settles the rows before the first step.
        column: of the inputs, by default the first floating one.
        steps, step_size: the first step, η; a fifth of epsilon unless given, at any number of steps: more go further.
        momentum: of the running mean.
        goal: as in `flip_labels`.
        targets: names of the victim's outputs; by default those of the surrogate. Outputs of these names that the
            surrogate does not have are not predicted.
        folder: keep the inputs there after every step; the same call goes on where a killed one stopped, and another
            victim is shown the same inputs.

    Returns:
        An attack whose prediction is what the surrogates say: the mean over the last tenth of the steps of outputs after
        the step, at first order, less the first outputs. The random control moves random rows by random signs (directions) as far as the ball allows.

    Raises:
        ValueError: see `flip_labels`; no rows, or more than the budget; no floating column; steps,
            candidates, a step size or a momentum out of range; a folder that belongs to another attack.

    Source: Engstrom et al. 2025 (arXiv 2503.13751) for metagradients; Koh & Liang 2017, sec. 5.2, for influence.
    """
    # rewrite: moved rows are other versions of rows; their inputs are what is chosen
    quota, trained = Quota.of(threat, "inputs", sources, problem.n), distinct_seeds(seeds)
    at = floating_column(problem.train, column)
    _check(steps, step_size, candidates, momentum)
    k = threat.rows(problem.n)
    if rows is None:
        chosen = _furthest(
            problem, threat, surrogate, goal, candidates * k, quota.times(candidates)
        )
    else:
        candidates, chosen = 1, _given(problem, quota, k, rows)
    left = _left(k, candidates, steps)
    assert threat.epsilon is not None
    size = FIRST_STEP * threat.epsilon if step_size is None else step_size
    original = _inputs(problem, chosen, at)
    seen = replace(threat, knowledge="white-box")  # whoever the victim is, the inputs are the same
    asked = (chosen, candidates, at, steps, size, momentum, goal, quota.sources)
    kept = _kept(folder, problem, seen, *asked, surrogate)
    state = _Ascent.resumed(kept, chosen, original)
    for step in progress(range(len(state.levels), steps)):
        # plug in: the datamodel by inputs, around the inputs as they are now
        versions, places = rewritten(problem, state.rows, state.x, at)
        f = surrogate(versions.take(instead(versions, places)), state.rows, step)
        slope = (f.scores @ goal_of(f, goal)).reshape(state.x.shape)
        mean = momentum * state.mean + (1 - momentum) * slope

        # optimize: one step up, back into the ball, and the rows that do most
        rate = size * (1 - 0.9 * step / max(steps - 1, 1))
        start = original[np.searchsorted(chosen, state.rows)]
        x = threat.within(state.x + rate * _direction(mean, threat), start)
        gain = (mean * (x - start)).reshape(len(x), -1).sum(1)
        keep = _strongest(gain, state.rows, left[step], quota.times(max(1, left[step] // k)))
        there = start.copy()  # where rows that are given up lie again
        there[keep] = x[keep]
        ahead = f.base + (there - state.x).ravel() @ f.scores
        levels, names = [*state.levels, (f.base, ahead)], np.asarray(f.targets).astype(str)
        state = _Ascent(state.rows[keep], x[keep], mean[keep], levels, names)
        state.save(kept)
    rows = state.rows
    noise = {seed: _noisy(problem, threat, at, len(rows), quota, seed) for seed in trained}
    quota.refuse(state.rows)
    versions, weights, *random = _one_table(problem, at, [(rows, state.x), *noise.values()])
    drawn = dict(zip(noise, random, strict=True))
    meta = {"steps": steps, "step_size": size, "momentum": momentum, "candidates": candidates}
    return verified_attack(
        name, threat, versions, weights, rows, state.said, drawn.__getitem__, victim, targets, trained, meta
    )  # fmt: skip


def _check(steps: int, step_size: float | None, candidates: int, momentum: float) -> None:
    """Raise where a number of the ascent is out of range."""
    if steps < 1 or candidates < 1 or not 0 <= momentum < 1:
        raise ValueError(
            f"expected steps >= 1, candidates >= 1 and a momentum of 0 to below 1, got {steps}, {candidates} and "
            f"{momentum}"
        )
    if step_size is not None and not 0 < step_size < np.inf:
        raise ValueError(f"expected a positive step_size, got {step_size}")


def _given(problem: Problem, quota: Quota, k: int, given: ArrayLike) -> NDArray[np.intp]:
    """The given rows, checked."""
    rows = np.sort(row_numbers(given, problem.n, once=True))
    if not 1 <= len(rows) <= k:
        raise ValueError(
            f"expected 1 to {k} rows of 0 to {problem.n - 1}, as the budget says, got {len(rows)}: "
            f"{rows[:5].tolist()} ..."
        )
    quota.refuse(rows)
    return rows


def _one_table(
    problem: Problem, column: Column, arms: Sequence[tuple[NDArray[np.intp], NDArray[np.float64]]]
) -> tuple[Any, ...]:
    """(versions, weights of each arm ...) of arms that move some rows each: (rows, their inputs)."""
    rows, inputs = (np.concatenate(parts) for parts in zip(*arms, strict=True))
    versions, places = rewritten(problem, rows, inputs, column)
    ends = np.cumsum([len(some) for some, _ in arms])[:-1]
    return versions, *(instead(versions, some) for some in np.split(places, ends))


def _left(k: int, candidates: int, steps: int) -> list[int]:
    """How many rows are left after every step: `candidates` times k, halved in equal parts of the steps.

    >>> _left(10, 4, 6)
    [40, 20, 20, 10, 10, 10]
    """
    halvings = math.ceil(math.log2(candidates))
    ends = np.round(CHOOSING * steps * np.arange(1, halvings + 1) / max(halvings, 1))
    done = (np.arange(1, steps + 1)[:, None] >= ends).sum(1)
    left: list[int] = np.maximum(k, np.ceil(candidates * k / 2.0**done)).astype(int).tolist()
    return left


def _strongest(
    gain: NDArray[Any], rows: NDArray[np.intp], k: int, quota: Quota
) -> NDArray[np.intp]:
    """Places of the k rows, in order, whose moves raise the goal most."""
    rank = np.empty(len(gain))
    rank[np.argsort(gain, kind="stable")] = np.arange(1, len(gain) + 1)
    return np.sort(quota.best(rank, rows, k, rows[:0]))


@dataclass(frozen=True, eq=False)
class _Ascent:
    """Rows on their way: which, where they are, their mean slope, and what the surrogates said so far.

    Args:
        levels: outputs by every surrogate, [t] before its step and, at first order, [t] after it.
    """

    rows: NDArray[np.intp]
    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    levels: list[tuple[NDArray[np.float64], NDArray[np.float64]]]
    targets: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=str))

    @property
    def said(self) -> Said:
        """The mean over the last tenth of the surrogates, after their steps, less the first, which saw no change."""
        before, after = (np.stack(some) for some in zip(*self.levels, strict=True))
        tail = max(1, len(after) // 10)
        return Said(self.targets, before[0], after[-tail:].mean(axis=0) - before[0])

    def save(self, path: Path | None) -> None:
        """Keep them where a folder is given."""
        if path is None:
            return
        of = {name: getattr(self, name) for name in ("rows", "x", "mean", "targets")}
        write_arrays(path, levels=np.stack(self.levels), **of)

    @classmethod
    def resumed(
        cls, path: Path | None, rows: NDArray[np.intp], original: NDArray[np.float64]
    ) -> _Ascent:
        """From where a killed ascent stopped, or from the start."""
        if path is None or not path.exists():
            return cls(rows, original, np.zeros_like(original), [])
        with np.load(path) as held:
            levels = [(before, after) for before, after in held["levels"]]
            return cls(held["rows"], held["x"], held["mean"], levels, held["targets"])


def _kept(folder: str | Path | None, *made_of: Any) -> Path | None:
    """The file that steps are kept in."""
    if folder is None:
        return None
    of = fingerprint("levels before and after", *made_of)
    return claim(folder, "perturb.json", "steps", of) / "perturb.npz"


def _furthest(
    problem: Problem,
    threat: ThreatModel,
    surrogate: InputSurrogate,
    goal: Any,
    k: int,
    quota: Quota,
) -> NDArray[np.intp]:
    """Rows whose inputs reach furthest: the largest first-order gain inside the ball."""
    everyone = np.arange(problem.n)
    f = surrogate(problem, everyone, 0)
    slope = (f.scores @ goal_of(f, goal)).reshape(problem.n, -1)
    reach = np.abs(slope).sum(1) if threat.norm == "inf" else np.linalg.norm(slope, axis=1)
    return np.sort(quota.best(reach, everyone, k, everyone[:0]))


def _direction(mean: NDArray[Any], threat: ThreatModel) -> NDArray[Any]:
    if threat.norm == "inf":
        return np.sign(mean)
    length = np.linalg.norm(mean.reshape(len(mean), -1), axis=1)
    return mean / np.maximum(length, 1e-300).reshape(-1, *[1] * (mean.ndim - 1))


def _inputs(problem: Problem, rows: NDArray[np.intp], column: Column) -> NDArray[np.float64]:
    batch: Any = take(problem.train, rows)
    return batch[column].double().cpu().numpy()


def _noisy(
    problem: Problem, threat: ThreatModel, column: Column, k: int, quota: Quota, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(random rows, their inputs moved at random as far as the ball allows)."""
    rng = np.random.default_rng([seed, 0xF3])
    rows = np.sort(random_rows(np.arange(problem.n), k, quota, rng))
    x = _inputs(problem, rows, column)
    assert threat.epsilon is not None
    noise = threat.epsilon * _direction(rng.standard_normal(x.shape), threat)
    return rows, threat.within(x + noise, x)
