"""Rehearsals: pairs of short, fast trainings whose difference is what other training weights do.

A training of K steps at learning rate η is near a gradient flow for the time ηK. A rehearsal takes the same
time in fewer, longer steps, once at the run's own weights and once at others, from the same start, in the
same order; what the short training gets wrong is wrong in both and drops out of their difference, which is
then added to the outputs of the long one (a control variate). It starts between the run's initial and
trained parameters: far enough back to forget, near enough not to learn everything again. Unlike a linear
datamodel it follows large and coherent changes, where the model comes to see the rows otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.gradients import Progress
from attribution_core.problem import Params
from attribution_core.steps import Steps
from attribution_core.training import Recipe, Run, checked_weights, steps_of, watched_step

Read = Callable[[nn.Module], Tensor]  # what to know of a model in eval mode: numbers of any shape
SEED = 70_001  # added to a run's own: batches that the run did not see in this order
SLOPE_BATCHES = 4  # on which the first gradient is measured


@dataclass(frozen=True)
class Pace:
    """How rehearsals are taken.

    Args:
        share: of the run's steps; the learning rate grows by the inverse.
        start: where between the initial (0) and the trained (1) parameters.
        clip: largest gradient norm, in norms of the first gradient at the start.
        tail: share of the last steps whose parameters are averaged.
    """

    share: float = 0.2
    start: float = 0.4
    clip: float = 1.5
    tail: float = 0.25

    def __post_init__(self) -> None:
        for name in ("share", "tail"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.start <= 1 or not self.clip > 0:
            raise ValueError(
                f"expected start in [0, 1] and a positive clip, got {self.start} and {self.clip}"
            )


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a change of training weights is predicted to do to readings.

    Args:
        changes: [k, *shape], one a run: reading at the new weights less reading at the run's own.
        steps: training steps that were taken, in all.
    """

    changes: Tensor
    steps: float

    @property
    def mean(self) -> Tensor:
        """The mean change over runs."""
        return self.changes.mean(0)

    @property
    def trust(self) -> float:
        """1 − noise / signal of the mean change, between 0 and 1: what shrinking it multiplies it with.

        James & Stein's factor, pooled over all readings: 1 − Σ s²/k / Σ mean², s² the variance over the k
        runs. 1 for a single run, which shows no noise.
        """
        return float(self._factor(self.changes.ndim - 1))

    @property
    def shrunk(self) -> Tensor:
        """The mean change, each block along the last dimension shrunk by its own noise (see `trust`)."""
        return self._factor(1) * self.mean

    def _factor(self, over: int) -> Tensor:
        """James & Stein's factor over the last dimensions, which are kept with size 1."""
        k, dims = len(self.changes), list(range(-over, 0))
        signal = self.mean.square().sum(dims, keepdim=True)
        if k < 2:
            return (signal > 0).double()
        noise = self.changes.var(0).sum(dims, keepdim=True) / k
        return torch.where(signal > 0, 1 - noise / signal, torch.zeros_like(signal)).clamp(0, 1)


def rehearse(
    runs: Run | Sequence[Run],
    weights: ArrayLike,
    read: Read,
    *,
    pace: Pace = Pace(),
    progress: Progress = iter,
) -> Rehearsal:
    """Predict what training at other weights would do to readings of a model, from short trainings.

        change = read(θ̃(w)) − read(θ̃(w₀)),     θ̃: ⌈share · K⌉ steps at lr / share from
                                               θ_init + start · (θ_run − θ_init), its tail averaged

    Both trainings see the same batches; weight 0 is "dropped, same batches, same steps". Cost: 2 · share of
    a training for each run.

    Args:
        runs: trained models; one pair of rehearsals each.
        weights: [n], those to predict at; w₀ is a run's own.
        read: model -> numbers, in eval mode.
        pace: see `Pace`.
        progress: wraps the loop over runs (tqdm).

    Raises:
        ValueError: no runs; weights that are not [n]; a rehearsal that leaves the finite numbers; an
            optimizer without a learning rate to scale.

    Source: the difference of two coarse solutions as a correction to a fine one: Giles 2008 (multilevel
    Monte Carlo); starting between initial and trained parameters: Ash & Adams 2020 (shrink and perturb).
    """
    several = [runs] if isinstance(runs, Run) else list(runs)
    if not several:
        raise ValueError("expected at least one run to rehearse, got none")
    w = checked_weights(weights, several[0].problem.n)
    found, steps = [], 0.0
    for run in progress(several):
        before, after, taken = _pair(run, w, read, pace)
        found.append(after - before)
        steps += taken
    return Rehearsal(torch.stack(found), steps)


def _pair(run: Run, w: NDArray[np.float64], read: Read, pace: Pace) -> tuple[Tensor, Tensor, float]:
    """(reading at the run's weights, reading at w, steps taken)."""
    recipe = _quicker(run, pace)
    start = replace(run.problem, model=_between(run, pace.start))
    order = recipe.draw(np.arange(run.problem.n))
    steps = steps_of(start, recipe, order, run.weights)
    norm, taken = _first_slope(steps)
    limit = pace.clip * norm if recipe.clip is None else min(recipe.clip, pace.clip * norm)
    read_at = []
    for at in (run.weights, w):
        model = _averaged(replace(steps, weights=at, clip=limit), pace.tail)
        with torch.no_grad():
            read_at.append(read(model).double().cpu())
        taken += len(order)
    return read_at[0], read_at[1], taken


def _quicker(run: Run, pace: Pace) -> Recipe:
    """The run's recipe in fewer, longer steps."""
    recipe, optimizer = run.recipe, run.recipe.optimizer
    if not hasattr(optimizer, "lr"):
        raise ValueError(
            f"expected an optimizer with a learning rate `lr`, got {type(optimizer).__name__}"
        )
    steps = max(1, math.ceil(pace.share * len(run.order)))
    size = len(run.order[0])
    longer: Any = optimizer
    return replace(
        recipe,
        optimizer=replace(longer, lr=optimizer.lr * len(run.order) / steps),
        batch_size=size, epochs=steps * size / run.problem.n, seed=recipe.seed + SEED, order=None,
        init=None,
    )  # fmt: skip


def _between(run: Run, share: float) -> nn.Module:
    """The run's model between its initial and its trained parameters."""
    model = copy.deepcopy(run.problem.model)
    first = run.problem.params
    state = {name: first[name].lerp(value, share) for name, value in run.params.items()}
    model.load_state_dict({**state, **run.buffers}, strict=False)
    return model


def _first_slope(steps: Steps) -> tuple[float, int]:
    """(norm of the mean gradient over the first batches at the start, batches)."""
    state, some = steps.start(), min(SLOPE_BATCHES, len(steps))
    watched_step(steps, state, 0)
    total: Params = {}
    for step in range(some):
        grads = steps.gradient(state, step)[1]
        total = {name: g + total[name] if total else g for name, g in grads.items()}
    return math.sqrt(sum(float(g.square().sum()) for g in total.values())) / some, some


def _averaged(steps: Steps, tail: float) -> nn.Module:
    """The model after all steps, the parameters of the last ones averaged, in eval mode."""
    state, last = steps.start(), max(1, round(tail * len(steps)))
    mean: Params = {}
    for step in range(len(steps)):
        try:
            state, _ = steps.step(state, step)
        except ValueError as error:
            raise ValueError(
                f"a rehearsal stopped at step {step} of {len(steps)}: {error}; take a smaller `clip` or "
                "a larger `share`"
            ) from None
        passed = step - (len(steps) - last)
        if passed >= 0:
            mean = {
                name: value if passed == 0 else mean[name].lerp(value, 1 / (passed + 1))
                for name, value in state.params.items()
            }
    model = copy.deepcopy(steps.problem.model)
    named = steps.packing.unpack(mean)
    model.load_state_dict({**named, **state.buffers}, strict=False)
    return model.eval()
