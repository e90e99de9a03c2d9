"""Influence functions: how outputs move with training weights, at a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.curvature import Form, Kind, fit_curvature
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.gradients import Engine, Progress, directional, flatten, output_gradients
from attribution_core.problem import Outputs, Problem, Rows
from attribution_core.processes import collect, my_rows
from attribution_core.store import Store, fingerprint
from attribution_core.training import Run


def influence(
    source: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    curvature: Kind = "gauss_newton",
    damping: float | Tensor | None = None,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    curvature_rows: int | None = None,
    form: Form = "auto",
    engine: Engine = "auto",
    tolerance: float | None = None,
    max_iterations: int = 500,
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Influence-function datamodel: scores = −(1/(α n)) G (H + weight_decay + damping)⁻¹ A.

    G [n, p] holds the per-example loss gradients, A [p, t] the output gradients, H is the curvature
    of the mean loss (see `curvature`). Scores are exact derivatives of refitted models when the
    problem is strongly convex, the model is at its optimum and `curvature="hessian"`.

    Args:
        source: a problem whose model is trained; or a `Run`, which brings its anchor along; or
            several runs, whose datamodels are averaged.
        curvature: "gauss_newton", "hessian" (exact; convex problems), "diagonal", or "identity"
            (none: gradient products, scaled by decay and damping).
        damping: added to the curvature beside the weight decay. None: for a run, what its length
            amounts to (`Run.damping`; 0 with "hessian"); for a problem, see `fit_curvature`. The
            mean of what was used stands in `.meta["damping"]`.
        weights: [n] the weights at which a problem was trained; 1 if not given. With a run: its own.
        exposure: α, how often a problem's model saw each example, relative to a full run. A model
            trained on batches drawn from a fraction α of the data averages over αn examples, so a unit of
            weight counts 1/(αn) there. With a run: its own.
        curvature_rows: estimate the curvature on so many rows, drawn with a fixed seed; all if not given.
        engine, batch_size: how gradients are taken; change cost, never the result.
        folder: keep scores there, block by block; the same call resumes. [n, t] float32.
        progress: wraps the loops over solver iterations and training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t]; anchor α · weights.

    Raises:
        ValueError: see `fit_curvature` and `directional`; a folder that belongs to another run.

    Source: Koh & Liang 2017, eq. 2, with the sign of ∂ output / ∂ weight; anchors as in DESIGN.
    """
    if not isinstance(source, Problem) and (weights is not None or exposure != 1.0):
        raise ValueError("a run brings its own weights and exposure; do not give them again")
    if isinstance(source, Sequence):
        one = partial(
            influence, outputs=outputs, curvature=curvature, damping=damping,
            curvature_rows=curvature_rows, form=form, engine=engine, tolerance=tolerance,
            max_iterations=max_iterations, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        folders = [None if folder is None else Path(folder) / f"run{k}" for k in range(len(source))]
        return average([one(run, folder=f) for run, f in zip(source, folders, strict=True)])
    if isinstance(source, Run):
        problem, w, exposure = source.trained(), source.weights, source.exposure
        n = source.drawn
        if damping is None and curvature != "hessian":
            damping = flatten({k: v[None] for k, v in source.damping.items()})[0].double().cpu()
    else:
        problem = source
        w = np.ones(problem.n) if weights is None else np.asarray(weights, dtype=float)
        n = problem.n
    if w.shape != (problem.n,) or not 0 < exposure <= 1:
        raise ValueError(
            f"expected weights [n={problem.n}] and an exposure in (0, 1], got {w.shape} and {exposure}"
        )

    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN

    def solve() -> tuple[Tensor, dict[str, Any]]:
        some = sample(problem.n, curvature_rows)
        fitted = fit_curvature(
            replace(problem, train=Rows(problem.train, some)), curvature,
            weights=w[some] * (problem.n / n),
            damping=damping, form=form, tolerance=tolerance, max_iterations=max_iterations,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        targets = flatten(output_gradients(problem.model, outputs)).double().cpu()
        solved = fitted.solve(targets) / (-n * exposure)
        return solved, {**fitted.meta, "damping": fitted.damping}

    settings = (curvature, damping, form, tolerance, max_iterations, curvature_rows, exposure, n, w)
    along = partial(directional, engine=engine, batch_size=batch_size)
    if folder is None:
        directions, fitted = solve()
        mine = my_rows(np.arange(problem.n))
        scores = collect(along(problem, directions, mine, progress=progress).cpu()).numpy()
    else:
        made_of = fingerprint(problem, outputs, settings)
        store = Store.open(folder, (problem.n, len(outputs)), made_of)
        directions, fitted = store.remember("directions", solve)
        for rows in progress(store.missing()):
            store.write(rows, along(problem, directions, rows).cpu().numpy())
        scores = store.read()
    trainable = sum(value.numel() for value in problem.params.values())
    meta = {
        "method": "influence",
        **fitted,
        "weight_decay": float(problem.decay.mean()),
        "exposure": exposure,
        "covered": trainable / sum(value.numel() for value in problem.model.parameters()),
    }
    names = np.asarray(outputs.names) if outputs.names else None
    return LinearDatamodel(scores, base, exposure * w, targets=names, meta=meta)


def sample(n: int, size: int | None, seed: int = 0) -> NDArray[np.intp]:
    """All n row numbers, or `size` of them drawn without replacement, in order."""
    if size is None or size >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size, replace=False))
