"""Damping chosen by retraining: the multiple of a run's own whose datamodel predicts best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution_core.curvature import Curvature, fit_curvature
from attribution_core.data import Progress, Rows
from attribution_core.datamodel import LinearDatamodel
from attribution_core.evaluation import lds
from attribution_core.gradients import directional, output_gradients
from attribution_core.layerwise.vectors import flatten
from attribution_core.problem import Outputs
from attribution_core.processes import gathered, my_rows
from attribution_core.retraining import retrain
from attribution_core.stepwise.trained import trained
from attribution_core.subsets import random_subsets
from attribution_core.training import Run

MULTIPLES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
SUBSETS = 16
SEED = 90_001  # of the subsets: others than an evaluation would draw


def choose_damping(
    run: Run,
    outputs: Outputs,
    curvature: Any = "auto",
    *,
    rows: NDArray[np.intp] | None = None,
    multiples: Sequence[float] = MULTIPLES,
    subsets: int = SUBSETS,
    progress: Progress = iter,
    **settings: Any,
) -> Curvature:
    """The curvature damped by c · `run.damping`, c the multiple of highest LDS on a few retrainings.

    Random subsets of the fraction that the run is anchored at (half of the data for a full run) are
    trained once each by the run's recipe, with a seed that is not the run's. `.meta` keeps every
    multiple's LDS; with so few retrainings, neighbours are often within noise of one another.

    Args:
        curvature, settings: as of `fit_curvature`.
        rows: training rows to fit the curvature on; all if not given.
        progress: wraps the loop over retrainings (tqdm).
    """
    at = trained(run)
    problem, rows = at.problem, np.arange(at.problem.n) if rows is None else rows
    keep = run.exposure if run.exposure < 1 else 0.5
    weights = at.weights * random_subsets(problem.n, subsets, keep=keep, seed=SEED)
    table = retrain(
        run.problem, run.recipe, outputs, weights, seeds=[run.recipe.seed + SEED],
        drop="row" if run.recipe.order is None else "weight", progress=progress,
    )  # fmt: skip
    assert at.damping is not None
    part = replace(problem, train=Rows(problem.train, rows))
    w = at.weights[rows] * (problem.n / at.drawn)
    fits: list[Curvature] = []
    for multiple in multiples:
        damping = multiple * at.damping
        known = fits[0].spectrum if fits and not settings.get("refine") else None
        if known is not None:  # H is fitted once
            fits.append(_shifted(fits[0], problem.decay, damping))
        else:
            fits.append(fit_curvature(part, curvature, weights=w, damping=damping, **settings))
    targets = flatten(output_gradients(problem.model, outputs)).double().cpu()
    solved = torch.cat([fit.solve(targets) * -at.unit for fit in fits])
    mine = my_rows(np.arange(problem.n))
    scores = gathered(lambda: directional(problem, solved, mine).cpu()).numpy()
    base = outputs.evaluate(problem.model).numpy()
    each = np.split(scores, len(fits), axis=1)
    found = [lds(LinearDatamodel(one, base, at.anchor), table).mean for one in each]
    best = int(np.argmax(found))
    chosen = {"damping_multiple": multiples[best], "damping_lds": dict(zip(map(str, multiples), found, strict=True))}  # fmt: skip
    return replace(fits[best], meta={**fits[best].meta, **chosen})


def _shifted(fit: Curvature, decay: Tensor, damping: Tensor) -> Curvature:
    """The same H with another damping."""
    h = fit.spectrum
    assert h is not None
    return replace(fit, solve=lambda v: h.solve(v, decay + damping), damping=float(damping.mean()))
