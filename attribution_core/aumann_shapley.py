"""Aumann–Shapley values: every row's share of what training did, from a few metagradients.

    scores_i = ∫₀¹ ∂f/∂w_i (s·1) ds,      Σ_i scores_i = f(1) − f(0)

Weights grow together from nothing to one, and each row is credited with what it adds on the way. No subset is
sampled: a handful of points, each with one training and one walk back, value all rows at once. For owners of
many small rows it is the limit of their Shapley values (Aumann & Shapley 1974).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import Progress, Sized, named, summed
from attribution_core.datamodel import LinearDatamodel
from attribution_core.disk.files import claim, write_array
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.magic import magic
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import from_first, wait, world
from attribution_core.retraining import retrain
from attribution_core.safeguards.smoothness import MetagradientWarning
from attribution_core.training import Adam, Recipe, Run, train

Method = Callable[[Run, Outputs], LinearDatamodel]

FIRST = np.concatenate(
    [[0.0], np.logspace(-4, 0, 9)]
)  # where f is looked at before points are placed
STEP = 0.15  # of all change of f: largest between neighbouring looks, more are taken in between
ROUNDS = 4  # of looking closer
GENTLE = 3.5  # share of f's change per length of s, up to which points need not gather anywhere
EVEN = (
    0.4  # share of the path's own length in how points are placed; the rest follows the change of f
)
TOLD = 0.05  # remainder beyond which a user is warned


class RemainderWarning(UserWarning):
    """Points that find too little or too much of the output's change; the message says how much."""


def aumann_shapley(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    *,
    points: int = 8,
    path: Literal["auto", "weight", "exposure"] = "auto",
    groups: ArrayLike | None = None,
    method: Method | None = None,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """The datamodel whose scores are Aumann–Shapley values: exact at nobody and at everyone.

        scores_i = ∫₀¹ ∂f/∂w_i (s·1) ds ≈ Σ_k ω_k ∂f/∂w_i (s_k·1)                           path "weight"
        scores_i = (f(1) − f(0))/n + ∫₀¹ [ ∂f/∂w_i (α) − mean_j ∂f/∂w_j (α) ] dα            path "exposure"

    What the points leave of f(1) − f(0) is shared equally by all rows, so that accounts balance, and stated.

    Along "weight" every loss counts s-fold, in the same batches (as `drop="weight"` has it). Points gather
    where f changes: it is first looked at by some 15–25 plain trainings (stacked where the model is small).

    Under Adam that path says little: updates do not depend on the scale of weights, so f jumps near s = 0, and
    from there on derivatives add up to nothing. Along "exposure" training grows in length instead: α of the
    steps, weights 1. Derivatives then say who counts more, and the change that longer training
    makes, whoever it is fed with, is shared equally. (Ten owners of digits, rows really removed, AdamW:
    correlation .98 with exact Shapley values against .77 along "weight"; benchmarks/RESULTS.md.)

    Args:
        points: metagradients taken, one training each. Error falls quickly with their number where training is
            smooth; 8 leave about 1 % of the change.
        path: "auto" is "exposure" for Adam and AdamW, "weight" for others.
        groups: [n] labels of owners: values [g, t] of owners, by one tangent each pushed forward through
            training where there are fewer owners than outputs, else summed over their rows.
        method: (run, outputs) -> datamodel of derivatives where the run stands; by default `magic`.
        folder: keep looks and points there; the same call resumes.
        progress: wraps the loop over points (tqdm).

    Returns:
        scores [n, t] (or [g, t]), base f(1), anchor 1, so that f̂(1) = f(1) and f̂(0) = f(0). `.meta`: change
        f(1) − f(0) [t]; remainder [t], what the points found less the change, over |change|, before it was
        shared (along "exposure" by design all of it); path, points, trainings.

    Raises:
        ValueError: fewer than 1 point; a training that diverges; a folder of another run.

    Warns:
        RemainderWarning: a remainder of more than 5 % of the change.

    Source: Aumann & Shapley 1974; integrated gradients (Sundararajan et al. 2017) are the same for inputs;
    the exposure path is this project's.
    """
    if points < 1:
        raise ValueError(f"expected at least 1 point, got {points}; 8 is usual")
    if path not in ("auto", "weight", "exposure"):
        raise ValueError(f"unknown path {path!r}; auto, weight or exposure")
    if path == "auto":
        path = "exposure" if isinstance(recipe.optimizer, Adam) else "weight"
    given = np.arange(problem.n) if groups is None else groups
    names, index = named(given, problem.n)
    labels = np.asarray(given)
    size = np.bincount(index)[:, None] / problem.n
    where = None
    if folder is not None:
        made_of = fingerprint(problem, recipe, outputs, points, path, labels, method)
        where = claim(folder, "aumann_shapley.json", "values", made_of)
    shared = (
        groups if len(names) < problem.n else None
    )  # owners of a row each: by row, and named then
    method = method or partial(_derivatives, groups=shared)
    point = partial(_point, problem, recipe, outputs, method, where, names, index)
    f: NDArray[np.float64]
    if path == "weight":
        s, f = _looked(problem, recipe, outputs, where)
        at, weight = placed(s, f, points)
        each = (point(x, np.full(problem.n, x), 1.0) for x in at)
    else:
        f = _ends(problem, recipe, outputs)
        at, weight = _gauss_legendre(points)
        each = (_centred(point(x, np.ones(problem.n), x), size) for x in at)
    scores: Any = sum(
        w * found for w, found in progress(Sized(zip(weight, each, strict=True), points))
    )
    change, total = f[-1] - f[0], scores.sum(0)
    scores = scores + (change - total) * size  # what is left over is everyone's
    remainder = (total - change) / np.maximum(np.abs(change), np.finfo(float).tiny)
    if path == "weight" and np.abs(remainder).max() > TOLD:
        worst = np.abs(remainder).argmax()
        found = total[worst] / (change[worst] or np.finfo(float).tiny)
        warnings.warn(
            f"{points} points find {100 * found:.1f} % of f(1) − f(0); the rest "
            "is shared equally: raise points, or smooth the training (smaller learning rate, clipping)",
            RemainderWarning,
            stacklevel=2,
        )
    meta = {
        "method": "aumann_shapley", "path": path, "points": [float(x) for x in at],
        "change": change.tolist(), "remainder": remainder.tolist(), "seeds": [recipe.seed],
        "trainings": len(f) + points,
    }  # fmt: skip
    targets = outputs.targets
    return LinearDatamodel(scores, f[-1], np.ones(len(names)), names, targets, meta)


def _derivatives(run: Run, outputs: Outputs, groups: ArrayLike | None) -> LinearDatamodel:
    """`magic` without its warnings: here the remainder says whether first order holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetagradientWarning)
        return magic(run, outputs, groups=groups, check=False)


def _centred(scores: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Less what a row of the mean would have, for as many rows as each player brings."""
    return scores - scores.sum(0) * size


def _gauss_legendre(points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(nodes, weights) on [0, 1]."""
    node, weight = np.polynomial.legendre.leggauss(points)
    return (node + 1) / 2, weight / 2


def placed(
    s: NDArray[np.float64], f: NDArray[np.float64], points: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(points s_k, weights of ∂f/∂w at them), from looks f [looks, t] at s: Gauss–Legendre in u, along which

        du = EVEN ds + (1 − EVEN) |df| / ∫|df|       (the mean of |df| / ∫|df| over outputs)

    or in s itself, where f changes gently all the way.

    >>> at, weight = placed(np.array([0.0, 0.5, 1.0]), np.array([[0.0], [0.5], [1.0]]), 2)
    >>> at.round(4).tolist(), weight.round(4).tolist()
    ([0.2113, 0.7887], [0.5, 0.5])
    """
    from scipy.interpolate import PchipInterpolator

    moved = np.abs(np.diff(f, axis=0))
    total = moved.sum(0)
    shares = np.where(total > 0, moved / np.where(total > 0, total, 1.0), np.diff(s)[:, None])
    share = shares.mean(1)
    node, weight = _gauss_legendre(points)
    if (share <= GENTLE * np.diff(s)).all():
        return node, weight
    u = np.concatenate([[0.0], np.cumsum(EVEN * np.diff(s) + (1 - EVEN) * share)])
    path = PchipInterpolator(u / u[-1], s)  # monotone, with a continuous slope
    return path(node), weight * path.derivative()(node)


def _looked(
    problem: Problem, recipe: Recipe, outputs: Outputs, folder: Path | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(s [looks], f [looks, t]): closer together where f changes much."""

    def look(at: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = at[:, None] * np.ones(problem.n)
        where = None if folder is None else folder / "looks"
        return retrain(
            problem, recipe, outputs, weights, seeds=[recipe.seed], drop="weight", folder=where
        ).outputs

    s, f = FIRST, look(FIRST)
    for _ in range(ROUNDS):
        moved = np.abs(np.diff(f, axis=0))
        share = (moved / np.maximum(moved.sum(0), np.finfo(float).tiny)).max(1)
        wide = np.flatnonzero(share > STEP)
        if not len(wide):
            break
        between = np.where(s[wide] > 0, np.sqrt(s[wide] * s[wide + 1]), s[wide + 1] / 2)
        s, f = np.insert(s, wide + 1, between), np.insert(f, wide + 1, look(between), axis=0)
    return s, f


def _ends(problem: Problem, recipe: Recipe, outputs: Outputs) -> NDArray[np.float64]:
    """f(nobody) and f(everyone), [2, t]: the initial model's outputs and the trained one's."""
    run = train(problem, recipe)
    start = copy.deepcopy(run.problem.model).eval()
    return np.stack([outputs.evaluate(start).numpy(), run.outputs(outputs).numpy()])


def _point(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    method: Method,
    folder: Path | None,
    names: NDArray[Any],
    index: NDArray[np.intp],
    at: float,
    weights: NDArray[np.float64],
    exposure: float,
) -> NDArray[np.float64]:
    """∂f/∂w at one point of the path, [g, t]; read back where it was kept."""
    kept = None if folder is None else folder / f"point-{at:.12f}.npy"
    if kept is not None and from_first(kept.exists()):
        return np.load(kept)
    run = train(problem, recipe, weights, exposure)
    found = method(run, outputs)
    scores = np.asarray(found.scores, dtype=float)
    ids = np.asarray(found.ids)
    numbered = np.array_equal(ids, np.arange(len(index)))
    if numbered or not np.array_equal(ids, names):  # rows, of a method that knows no groups
        scores = summed(scores, index, len(names))
    if kept is not None and world()[0] == 0:
        write_array(kept, scores)
    wait()
    return scores
