"""Influence functions: how outputs move with training weights, at a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.curvature import Form, Kind, fit_curvature
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.gradients import Engine, Progress, directional, flatten, output_gradients
from attribution_core.problem import Outputs, Problem
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
            (gradient dot products, without units).
        damping: added to the curvature beside the weight decay. None: for a run, what its length
            amounts to (`Run.damping`; 0 with "hessian"); for a problem, see `fit_curvature`. The
            mean of what was used stands in `.meta["damping"]`.
        weights: [n] the weights at which a problem was trained; 1 if not given. With a run: its own.
        exposure: α, how often a problem's model saw each example, relative to a full run. A model
            trained on batches drawn from a fraction α of the data averages over αn examples, so a unit of
            weight counts 1/(αn) there. With a run: its own.
        engine, batch_size: how gradients are taken; change cost, never the result.
        folder: keep scores there, block by block; the same call resumes. [n, t] float32.
        progress: wraps the loop over the training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t]; anchor α · weights.

    Raises:
        ValueError: see `fit_curvature` and `directional`; a folder that belongs to another run.

    Source: Koh & Liang 2017, eq. 2, with the sign of ∂ output / ∂ weight; anchors as in DESIGN.
    """
    settings: dict[str, Any] = {
        "curvature": curvature, "damping": damping, "form": form,
        "tolerance": tolerance, "max_iterations": max_iterations,
    }  # fmt: skip
    if isinstance(source, Sequence):
        folders = [None if folder is None else Path(folder) / f"run{k}" for k in range(len(source))]
        found = [
            influence(
                run,
                outputs,
                **settings,
                engine=engine,
                batch_size=batch_size,
                folder=f,
                progress=progress,
            )
            for run, f in zip(source, folders, strict=True)
        ]
        return average(found)
    if isinstance(source, Run):
        if weights is not None or exposure != 1.0:
            raise ValueError("a run brings its own weights and exposure; do not give them again")
        problem, w, exposure = source.trained(), source.weights, source.exposure
        if damping is None and curvature != "hessian":
            damping = flatten({k: v[None] for k, v in source.damping.items()})[0].double()
    else:
        problem = source
        w = np.ones(problem.n) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != (problem.n,) or not 0 < exposure <= 1:
        raise ValueError(
            f"expected weights [n={problem.n}] and an exposure in (0, 1], got {w.shape} and {exposure}"
        )

    targets = flatten(output_gradients(problem.model, outputs)).double()
    fitted = fit_curvature(
        problem, curvature, weights=w, damping=damping, form=form,
        tolerance=tolerance, max_iterations=max_iterations,
    )  # fmt: skip
    directions = fitted.solve(targets) / (-problem.n * exposure)
    scores = _scores(problem, directions, engine, batch_size, folder, progress)
    trainable = sum(value.numel() for value in problem.params.values())
    every = sum(value.numel() for value in problem.model.parameters())
    meta = {
        "method": "influence",
        **fitted.meta,
        "damping": fitted.damping,
        "weight_decay": problem.weight_decay,
        "exposure": exposure,
        "covered": trainable / every,
    }
    names = None if outputs.names is None else np.asarray(outputs.names)
    base = outputs.evaluate(problem.model).numpy()
    return LinearDatamodel(scores, base, exposure * w, targets=names, meta=meta)


def _scores(
    problem: Problem,
    directions: Tensor,
    engine: Engine,
    batch_size: int,
    folder: str | Path | None,
    progress: Progress,
) -> NDArray[np.float64]:
    """J V for all rows, in memory or in a resumable store; every process its own rows."""
    shown = {"batch_size": batch_size, "progress": progress}
    if folder is None:
        mine = my_rows(np.arange(problem.n))
        return collect(directional(problem, directions, mine, engine, **shown)).numpy()  # type: ignore[arg-type]
    print_ = fingerprint(problem, directions, "influence")
    store = Store.open(folder, (problem.n, len(directions)), print_)
    for rows in progress(store.missing()):
        store.write(
            rows,
            directional(problem, directions, rows, engine, batch_size=batch_size).cpu().numpy(),
        )
    return store.read()
