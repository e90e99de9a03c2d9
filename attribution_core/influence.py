"""Influence functions: how outputs move with training weights, at a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.curvature import Curvature, Form, Kind, fit_curvature
from attribution_core.data import Progress, Rows, sample
from attribution_core.datamodel import LinearDatamodel
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.gradients import Engine, directional, output_gradients
from attribution_core.groups import group_directional, mean_anchor
from attribution_core.layerwise.vectors import flatten, size_of
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import gathered, my_rows
from attribution_core.second_order.damping import choose_damping
from attribution_core.second_order.ekfac import Labels
from attribution_core.stepwise.batches import Drop
from attribution_core.stepwise.trained import OWN, Trained, over_runs, several, trained
from attribution_core.store import Store
from attribution_core.training import Run

QUICK = 5 * 10**9  # rows · parameters · targets up to which EK-FAC is refined in seconds
WIDE = 2**28  # output gradients, in numbers, up to which float32 models are solved in float64


def influence(
    source: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    curvature: Kind | Literal["auto"] | Curvature = "auto",
    damping: float | Tensor | Literal["auto"] | None = None,
    labels: Labels = "model",
    refine: int | Literal["size"] | None = None,
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    drop: Drop = "weight",
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
    of the mean loss (see `curvature`). Scores are exact derivatives of refitted models (the
    infinitesimal jackknife) when the problem is strongly convex, the model is at its optimum and H is
    exact ("hessian", or "gauss_newton" for linear models).

    Args:
        source: a problem whose model is trained; or a `Run`, which brings its anchor along; or
            several runs, whose datamodels are averaged.
        curvature: "auto" is "gauss_newton" up to 6,000 parameters and "ekfac" beyond; "hessian" (exact;
            convex problems), "diagonal", or "identity" (none: gradient products, scaled by decay and
            damping). Or a curvature fitted before by `fit_curvature`, for further outputs.
        damping: added to the curvature beside the weight decay. None: for a run, what its length
            amounts to (`Run.damping`; 0 with "hessian"); for a problem, see `fit_curvature`. "auto":
            for a run, the multiple of its own damping with the best LDS on 16 small retrainings (see
            `choose_damping`). The mean of what was used stands in `.meta["damping"]`.
        labels: of "ekfac": drawn from the "model", or those of the "data".
        refine: of "ekfac": how it is brought nearer to the exact Gauss–Newton, see `fit_curvature`. None:
            for a problem 0, EK-FAC as it is; for a run 4 steps where that takes seconds (n · p · t up to
            5·10⁹), else "size". With a damping of your own: 0 for large runs too.
        groups: [n] labels: one row of scores per group, the sum of its members', at one backward pass
            a group. The curvature is the examples'.
        weights: [n] the weights at which a problem was trained; 1 if not given. With a run: its own.
        exposure: α, how often a problem's model saw each example, relative to a full run. A model
            trained on batches drawn from a fraction α of the data averages over αn examples, so a unit of
            weight counts 1/(αn) there. With a run: its own.
        drop: what weight 0 meant where a problem was trained at `weights`. "weight": n is fixed, (1/n) Σ w ℓ.
            "row": those rows were not there; n counts the others, and the absent rows get scores as well. With a
            run: its own.
        curvature_rows: estimate the curvature on so many rows, drawn with a fixed seed; all if not given.
        engine, batch_size: how gradients are taken; change cost, never the result.
        folder: keep scores there, block by block; the same call resumes. [n, t] float32. What it does not
            notice: see `fingerprint.fingerprint`.
        progress: wraps the loops over solver iterations and training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t]; anchor α · weights.
        With groups: ids are their names, and a group's anchor is the mean of its members'; where these differ, a
        group's weight shifts them alike, weight 0 is not its removal, and an `AnchorWarning` says so.

    Raises:
        ValueError: see `fit_curvature` and `directional`; a folder that belongs to another run;
            damping="auto" without a run; groups with a folder.

    Source: Koh & Liang 2017, eq. 2, with the sign of ∂ output / ∂ weight; anchors as in DESIGN.
    """
    runs = several(source, weights, exposure)
    if runs is not None and drop != "weight":
        raise ValueError(OWN)
    if runs is not None:
        one = partial(
            influence, outputs=outputs, curvature=curvature, damping=damping, labels=labels,
            refine=refine, groups=groups, curvature_rows=curvature_rows, form=form, engine=engine,
            tolerance=tolerance, max_iterations=max_iterations, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        return over_runs(one, runs, folder)
    assert isinstance(source, (Problem, Run))
    if groups is not None and folder is not None:
        raise ValueError("groups cost one backward pass each and keep no folder; leave one out")
    at = trained(source, weights, exposure, drop)
    problem = at.problem
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN

    some = sample(problem.n, curvature_rows)
    size = len(some) * size_of(problem.params) * len(outputs)
    if refine is None and isinstance(source, Run) and not isinstance(curvature, Curvature):
        refine = 4 if size <= QUICK else "size" if damping is None else 0

    def solve() -> tuple[Tensor, dict[str, Any]]:
        fitted = fitted_curvature(
            source, at, outputs, curvature, damping,
            rows=some, labels=labels, refine=refine or 0, form=form, tolerance=tolerance,
            max_iterations=max_iterations, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        targets = flatten(output_gradients(problem.model, outputs)).cpu()
        # EK-FAC errs by far more than float32 rounds
        rough = fitted.meta.get("curvature") == "ekfac" or targets.numel() > WIDE
        single = rough and targets.dtype == torch.float32
        solved = fitted.solve(targets if single else targets.double()) * -at.unit
        return solved, {**fitted.meta, "damping": fitted.damping}

    along = partial(directional, engine=engine, batch_size=batch_size)
    names: NDArray[Any] | None = None
    anchor = at.anchor
    if groups is not None:
        directions, fitted = solve()
        names, found = group_directional(
            problem, directions, groups, batch_size=batch_size, progress=progress
        )
        scores = found.cpu().numpy()
        anchor = mean_anchor(anchor, groups)
    elif folder is None:
        directions, fitted = solve()
        mine = my_rows(np.arange(problem.n))
        scores = gathered(lambda: along(problem, directions, mine, progress=progress).cpu()).numpy()
    else:
        settings = (curvature, damping, labels, refine, form, tolerance, max_iterations, curvature_rows,
                    at.exposure, at.drawn, at.weights)  # fmt: skip
        made_of = fingerprint(problem, outputs, settings)
        store = Store.open(folder, (problem.n, len(outputs)), made_of)
        directions, fitted = store.remember("directions", solve)
        scores = store.fill(lambda rows: along(problem, directions, rows).cpu(), progress)
    meta = {
        "method": "influence",
        **fitted,
        "weight_decay": float(problem.decay.mean()),
        "exposure": at.exposure,
        "covered": problem.covered,
    }
    return LinearDatamodel(scores, base, anchor, ids=names, targets=outputs.targets, meta=meta)


def fitted_curvature(
    source: Problem | Run,
    at: Trained,
    outputs: Outputs,
    curvature: Kind | Literal["auto"] | Curvature,
    damping: float | Tensor | Literal["auto"] | None,
    *,
    rows: NDArray[np.intp],
    progress: Progress = iter,
    **settings: Any,
) -> Curvature:
    """The curvature on some rows, with the damping asked for; rows of weight 0 do not contribute and are skipped."""
    if isinstance(curvature, Curvature):
        if damping is not None or settings["labels"] != "model" or settings["refine"]:
            raise ValueError(
                "a fitted curvature brings its damping, labels and refinement; do not give them again"
            )
        return curvature
    if isinstance(damping, str):
        if damping != "auto" or not isinstance(source, Run):
            raise ValueError(
                f"expected a number, a tensor [p], or 'auto' with a run, got {damping!r} with a "
                f"{type(source).__name__}; only a run knows how to retrain"
            )
        return choose_damping(source, outputs, curvature, rows=rows, progress=progress, **settings)
    if damping is None and curvature != "hessian":
        damping = at.damping
    bent = rows[at.weights[rows] != 0]
    if len(bent) == 0:  # their curvature is 0, which a row at weight 0 stands for
        bent = rows[:1]
    share = len(bent) / len(rows)
    return fit_curvature(
        replace(at.problem, train=Rows(at.problem.train, bent)),
        curvature,
        weights=at.weights[bent] * (at.problem.n / at.drawn * share),
        damping=damping,
        progress=progress,
        **settings,
    )
