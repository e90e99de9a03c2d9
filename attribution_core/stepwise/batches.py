"""A recipe, and the batches that it draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from attribution_core.data import row_numbers
from attribution_core.stepwise.optimizers import Optimizer, Schedule, lr_factor
from attribution_core.stepwise.steps import Augment

Drop = Literal["weight", "row"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to train: everything but the problem and the weights.

    Args:
        optimizer: SGD, Adam or AdamW of this module.
        batch_size: rows per step; at most the number of rows.
        epochs: passes over the rows; fractions count. steps = round(epochs · rows / batch_size).
        schedule: "linear" or "cosine" (from 1 to 0 over the run), or your own step -> lr factor.
        seed: of the data order, and of `init`.
        clip: largest norm of the whole gradient.
        order: explicit index lists, one a step, to replay a run made elsewhere.
        init: seed -> model, the initial model; without it every run starts from `problem.model`.
        accumulate: pass a batch through the model in so many parts; the same gradient, less memory.
        masks: seed of the dropout masks, which are then a function of it and of the step. Without it
            active dropout is refused: nothing would say which masks a run had.
        augment: (batch, its rows, step) -> batch, a pure function: the same for the same row and step.
    """

    optimizer: Optimizer
    batch_size: int
    epochs: float
    schedule: Schedule | None = None
    seed: int = 0
    clip: float | None = None
    order: Sequence[Sequence[int]] | None = None
    init: Callable[[int], nn.Module] | None = None
    accumulate: int = 1
    masks: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        size, clip = self.batch_size, self.clip
        whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not whole or size < 1:
            raise ValueError(f"expected a batch_size of at least one row, got {size!r}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(
                f"expected epochs above 0 (fractions count; any run takes a step), got {self.epochs}"
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"expected clip to be a largest norm above 0, or None, got {clip}")

    def draw(self, rows: NDArray[np.intp], exposure: float = 1.0) -> list[NDArray[np.intp]]:
        """The batches of a run: one permutation of the rows after another, cut into equal batches."""
        if self.order is not None:
            given = [row_numbers(batch, int(rows.max()) + 1) for batch in self.order]
            if not given or not all(len(batch) for batch in given):
                raise ValueError(
                    f"expected an order of batches with rows in them, got {len(given)} batches of "
                    f"{[len(batch) for batch in given][:10]} rows"
                )
            return given[: max(1, round(exposure * len(given)))]
        size = min(self.batch_size, len(rows))
        steps = max(1, round(self.epochs * exposure * len(rows) / size))
        rng = np.random.default_rng(self.seed)
        passes = math.ceil(steps * size / len(rows))
        stream = np.concatenate([rng.permutation(rows) for _ in range(passes)])
        return list(stream[: steps * size].reshape(steps, size))

    def lr_factor(self, step: int, steps: int) -> float:
        """What the schedule multiplies the learning rate with at this step."""
        return lr_factor(self.schedule, step, steps)

    def factors(self, steps: int) -> list[float]:
        """What it multiplies the learning rate with at each step of so many."""
        return [self.lr_factor(step, steps) for step in range(steps)]


def drawn_order(
    recipe: Recipe, weights: NDArray[np.float64], drop: Drop, exposure: float = 1.0
) -> list[NDArray[np.intp]]:
    """The batches of a run at these weights.

    Raises:
        ValueError: an unknown drop; no rows left; an explicit order that holds the removed rows.
    """
    check_drop(drop)
    if drop == "weight" or weights.all():
        return recipe.draw(np.arange(len(weights)), exposure)
    if not weights.any():
        raise ValueError(
            "expected something to train on, got weight 0 for every example and drop='row'"
        )
    if recipe.order is not None:
        raise ValueError(
            f"expected drop='weight' with an explicit order, got drop='row' and {(weights == 0).sum()} rows of weight 0: "
            "an order cannot be drawn again without them; use drop='weight'"
        )
    return recipe.draw(np.flatnonzero(weights), exposure)


def removed_rows(recipe: Recipe, weights: NDArray[np.float64], drop: Drop) -> NDArray[np.intp]:
    """The rows of weight 0 that no batch is drawn from; with an explicit order all of them if no batch holds any, else none."""
    out = weights == 0
    if recipe.order is None:
        gone = drop == "row"
    else:
        seen = np.bincount(np.concatenate(list(recipe.order)), minlength=len(out))
        gone = not seen[out].any()
    return np.flatnonzero(out) if gone else np.zeros(0, int)


def check_drop(drop: str) -> None:
    """Raise where weight 0 is to mean neither."""
    if drop not in ("weight", "row"):
        raise ValueError(f"unknown drop {drop!r}; 'weight' keeps batches, 'row' removes examples")
