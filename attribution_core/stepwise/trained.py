"""Where a trained model stands: the problem at its parameters, and its place in weight space.

A model that saw each of its examples α times as often as a full run does averages over α · drawn
examples, so a unit of weight counts 1/(α · drawn) there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.data import checked_weights
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.layerwise.vectors import vector
from attribution_core.problem import Problem
from attribution_core.safeguards.soundness import refuse_unsound
from attribution_core.stepwise.batches import Drop, check_drop
from attribution_core.training import Run

OWN = "a run brings its own weights and exposure; do not give them again"


@dataclass(frozen=True, eq=False)
class Trained:
    """A problem at trained parameters, with the weights and the exposure that led there."""

    problem: Problem
    weights: NDArray[np.float64]  # [n]
    exposure: float  # α
    drawn: int  # how many examples the batches came from
    damping: Tensor | None = None  # [p], what the length of a run amounts to; None: not a run

    @property
    def anchor(self) -> NDArray[np.float64]:
        """The training weights at which derivatives are taken: α · weights, [n]."""
        return self.exposure * self.weights

    @property
    def unit(self) -> float:
        """What a unit of weight counts in the mean training loss: 1 / (α · drawn)."""
        return 1.0 / (self.exposure * self.drawn)


def trained(
    source: Problem | Run,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    drop: Drop = "weight",
    *,
    window: bool = False,
) -> Trained:
    """Where a run's model stands, or a problem's that was trained at these weights and this exposure.

    drop="row": rows of weight 0 were not there, so the mean loss was over the others. window: take runs whose weights
    act from a later step on, of which the final model is no optimum.

    Raises:
        ValueError: weights that are not [n], an exposure outside (0, 1]; either given beside a run; a run whose
            weights act from a later step on; a problem whose model is left in training mode with dropout or
            batch norm.
    """
    if isinstance(source, Run):
        if source.since and not window:
            raise ValueError(
                f"expected a run whose weights act from its first step on, got since={source.since}: this method does not "
                "know when they act; use magic, tracin or source"
            )
        if weights is not None or exposure != 1.0 or drop != "weight":
            raise ValueError(OWN)
        problem, damping = source.trained(), vector(source.damping)
        refuse_unsound(problem)
        return Trained(problem, source.weights, source.exposure, source.drawn, damping)
    check_drop(drop)
    refuse_unsound(source)  # before anything else passes through it
    w = checked_weights(weights, source.n)
    if not 0 < exposure <= 1:
        raise ValueError(f"expected an exposure in (0, 1], got {exposure}")
    drawn = int((w > 0).sum()) if drop == "row" else source.n
    if drawn == 0:
        raise ValueError(
            "expected a problem trained on at least one row, got weight 0 for every example and drop='row'; give "
            "the weights it was trained at, or drop='weight'"
        )
    return Trained(source, w, exposure, drawn)


def several(
    source: Problem | Run | Sequence[Run], weights: ArrayLike | None = None, exposure: float = 1.0
) -> Sequence[Run] | None:
    """The runs, where several were given; None for one.

    Raises:
        ValueError: an empty sequence; weights or an exposure beside runs.
    """
    if isinstance(source, (Problem, Run)):
        return None
    if not source:
        raise ValueError("expected at least one run, got none")
    if weights is not None or exposure != 1.0:
        raise ValueError(OWN)
    return source


def over_runs(
    one: Callable[..., LinearDatamodel], runs: Sequence[Run], folder: str | Path | None
) -> LinearDatamodel:
    """The mean of one(run, folder=...) over runs."""
    return average(each_run(one, runs, folder))


def each_run(
    one: Callable[..., LinearDatamodel], runs: Sequence[Run], folder: str | Path | None
) -> list[LinearDatamodel]:
    """one(run, folder=...) of each run, in a folder of its own."""
    folders = [None if folder is None else Path(folder) / f"run{k}" for k in range(len(runs))]
    return [one(run, folder=f) for run, f in zip(runs, folders, strict=True)]
