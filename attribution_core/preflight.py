"""Before the expensive part: does a recipe train so smoothly that first order can be believed, and which does?"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

from attribution_core.data import Progress, Rows, sample
from attribution_core.magic import magic
from attribution_core.metagradients.tangent import Tangents, pushed_outputs
from attribution_core.problem import Outputs, Problem
from attribution_core.safeguards.smoothness import (
    FiniteDifference,
    H,
    Look,
    MetagradientWarning,
    Metasmoothness,
    compared,
    look,
    metasmoothness,
    moved_weights,
    refuse_low_precision,
)
from attribution_core.training import Recipe, begun, train


@dataclass(frozen=True)
class Tried:
    """A recipe, and how it did."""

    recipe: Recipe
    loss: float  # of training, mean over the last tenth of the steps
    growth: float
    check: FiniteDifference
    smoothness: Metasmoothness
    seconds: float  # of the training alone

    @property
    def name(self) -> str:
        """What was varied."""
        optimizer: Any = self.recipe.optimizer
        root = f", eps_root {optimizer.eps_root:g}" if hasattr(optimizer, "eps_root") else ""
        return f"lr {optimizer.lr:g}{root}"


@dataclass(frozen=True)
class Preflight:
    """Recipes that were tried, the one to take, and what looks amiss whatever the recipe."""

    tried: tuple[Tried, ...]
    look: Look

    @property
    def best(self) -> Tried | None:
        """Of those whose check held the one with the lowest training loss; None where none held."""
        fine = [one for one in self.tried if one.check.holds]
        return min(fine, key=lambda one: one.loss, default=None)

    @property
    def holds(self) -> bool:
        """Whether the recipe as given passed."""
        return self.tried[0].check.holds

    def table(self) -> str:
        """A line for each recipe."""
        lines = [
            f"{'recipe':34}{'loss':>8}{'growth':>9}{'error':>8}{'cosine':>8}{'signs':>7}{'seconds':>9}"
        ]
        for one in self.tried:
            lines.append(
                f"{one.name:34}{one.loss:8.3g}{one.growth:9.2g}{one.check.error:8.2f}{one.check.agreement:8.2f}"
                f"{one.smoothness.signs:7.2f}{one.seconds:9.2g}  {'holds' if one.check.holds else 'does not hold'}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        best = self.best
        given = self.tried[0]
        words = f"{str(given.check)[0].upper()}{str(given.check)[1:]}."
        if self.holds:
            words += f" First order holds with {given.name}."
        elif best is not None:
            words += f" First order does not hold with {given.name}; it does with {best.name} (training loss {best.loss:.3f}, not {given.loss:.3f}): take that."
        else:
            words += f" First order does not hold with {given.name}"
            if len(self.tried) > 1:
                words += ", nor with any recipe that was tried: use"
            else:
                words += ": search for a recipe with which it does, or use"
            words += " fewer steps, a window (since=...), smoother layers, or another method."
        if self.look.kinked:
            words += f" {self.look.kinked:.0%} of the activations have kinks: GELU or average pooling predict further."
        return words


def candidates(recipe: Recipe) -> list[Recipe]:
    """Smaller learning rates and, for Adam, larger eps_root, the levers that matter, from mild to strong."""
    optimizer: Any = recipe.optimizer
    rates = [optimizer.lr * factor for factor in (1, 1 / 3, 1 / 10)]
    roots = [None]
    if hasattr(optimizer, "eps_root"):
        roots = sorted(
            {optimizer.eps_root, *(r for r in (1e-8, 1e-6, 1e-5) if r > optimizer.eps_root)}
        )
    found = []
    for rate in rates:
        for eps in roots:
            changes = {"lr": rate} if eps is None else {"lr": rate, "eps_root": eps}
            found.append(replace(recipe, optimizer=replace(optimizer, **changes)))
    return found


def preflight(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs | None = None,
    *,
    exposure: float = 1.0,
    search: bool = True,
    seed: int = 0,
    progress: Progress = iter,
) -> Preflight:
    """Train by the recipe, attribute, and train twice more at moved weights: can first order be believed?

    Where it cannot, smaller learning rates and larger eps_root are tried, from mild to strong, until one
    passes. A recipe costs about ten trainings, whatever the number of outputs.

    Args:
        outputs: what will be predicted, better held-out rows; by default the losses of 32 training rows. 16
            targets or more make a steady verdict.
        exposure: of the runs, as in `train`.
        search: try other recipes if the given one fails; False looks at that alone.
        seed: of the direction in which weights are moved.
        progress: wraps the loop over recipes (tqdm).

    Raises:
        ValueError: see `train` and `magic`.
    """
    if outputs is None:
        some = sample(problem.n, 32, seed)
        outputs = Outputs(problem.loss, Rows(problem.train, some))
    refuse_low_precision(problem)
    seen = look(begun(problem, recipe, exposure=exposure).steps)
    seen.refuse()
    tried: list[Tried] = []
    for one in progress(candidates(recipe) if search else [recipe]):
        if tried and tried[-1].check.holds:
            break
        tried.append(_try(problem, one, outputs, exposure, seed))
    return Preflight(tuple(tried), seen)


def _try(problem: Problem, recipe: Recipe, outputs: Outputs, exposure: float, seed: int) -> Tried:
    start = time.perf_counter()
    try:
        run = train(problem, recipe, exposure=exposure)
    except ValueError as error:
        if "NaN or infinity" not in str(error):
            raise
        nan, none = float("nan"), Metasmoothness(float("inf"), float("nan"))
        lost = FiniteDifference(float("inf"), nan, nan, H, len(outputs))
        return Tried(recipe, nan, float("inf"), lost, none, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetagradientWarning)
        mean = outputs.mean() if outputs.matrix is None else outputs
        growth = magic(run, mean, check=False).meta["growth"]
    weights = moved_weights(run, H, seed)
    # along one direction forward mode predicts all outputs for the price of two trainings
    predicted = pushed_outputs(run, outputs, Tangents((weights - run.weights)[None], {}, {}))[0]
    near = run.again(weights)
    before, after = (each.outputs(outputs).numpy() for each in (run, near))
    return Tried(
        recipe,
        float(run.losses[-max(1, len(run.losses) // 10) :].mean()),
        float(growth),
        compared(predicted, after - before, H),
        metasmoothness(run, outputs, seed=seed, near=near),
        seconds,
    )
