"""Rehearsals: pairs of trainings on smaller batches, whose difference is what other training weights do.

A rehearsal is the run's training on smaller batches: from the same start, as many steps, a share of the rows, the
same learning rates (Adam's over the root of the share). It is taken twice in the same order, once at the run's own
weights and once at others; what smaller batches get wrong is wrong in both and drops out of their difference, which
is then added to the outputs of the run (a control variate). A run has also memorised more of the
left-out rows than its rehearsals did; that part must be removed, not kept (`Rehearsal.carried`). Unlike a linear
datamodel it follows large and coherent changes, after which the model represents the rows differently.
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

from attribution_core.calling import Params
from attribution_core.data import Progress, checked_weights
from attribution_core.stepwise.steps import Steps
from attribution_core.training import Recipe, Run, steps_of

Read = Callable[[nn.Module], Tensor]  # what to know of a model in eval mode: numbers of any shape
MISSED = 0.1  # of a change, by which rehearsals are typically off
SEED = 70_001  # added to a run's own: batches that the run did not see in this order


@dataclass(frozen=True)
class Pace:
    """How rehearsals are taken.

    Args:
        share: of the rows of a batch, one row at least; 1: two whole trainings in another order.
        tail: share of the last steps whose parameters are averaged.
    """

    share: float = 0.5
    tail: float = 0.25

    def __post_init__(self) -> None:
        for name in ("share", "tail"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")

    def size(self, run: Run) -> int:
        """Rows of a batch."""
        return max(1, round(self.share * len(run.order[0])))

    def cost(self, run: Run) -> float:
        """What a pair costs, in steps of the run's training."""
        return len(run.order) * 2 * self.size(run) / len(run.order[0])


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a change of training weights is predicted to do to readings.

    Args:
        changes: [k, *shape], one a run: reading at the new weights less reading at the run's own.
        ahead: [k, *shape]: reading of the run itself less reading of its rehearsal at the run's own weights.
        steps: training steps that were taken, in all.
    """

    changes: Tensor
    ahead: Tensor
    steps: float

    @property
    def mean(self) -> Tensor:
        """The mean change over runs."""
        return self.changes.mean(0)

    @property
    def corrected(self) -> Tensor:
        """The mean change from the runs' own readings: mean − (1 − carried) · mean ahead, [*shape].

        Added to a mean reading of the runs: the rehearsals' at the new weights and `carried` of what the runs are
        ahead.
        """
        return self.mean - (1 - self.carried) * self.ahead.mean(0)

    @property
    def trust(self) -> float:
        """1 − noise / signal of the mean change, between 0 and 1: what shrinking it multiplies it with.

        James & Stein's factor, pooled over all readings, with k − 1 for k: 1 − Σ s²/(k−1) / Σ mean², s² the
        variance over the k runs. That is, to first order, the multiple of the other runs' mean that comes
        nearest a run; readings of a model move together, so that two runs may agree by chance. 1 for a
        single run, which shows no noise.
        """
        k, signal = len(self.changes), float(self.mean.square().sum())
        if signal == 0 or k == 1:
            return float(signal > 0)
        return max(0.0, 1 - float(self.changes.var(0).sum()) / (k - 1) / signal)

    @property
    def carried(self) -> float:
        """How much of what the runs are ahead of their rehearsals stays at the new weights, between 0 and 1.

            1 − .1² Σ mean change² / Σ mean ahead²

        Runs are ahead by having come further with all rows, which is kept, and by an effect of the rows that is
        larger in them than in rehearsals, by a tenth or so, which goes with the rows. Both are taken as independent
        and pooled over readings. 1 where nothing is ahead.
        """
        signal = float(self.ahead.mean(0).square().sum())
        effect = MISSED**2 * float(self.mean.square().sum())
        return max(0.0, 1 - effect / signal) if signal else 1.0


def rehearse(
    runs: Run | Sequence[Run],
    weights: ArrayLike,
    read: Read,
    *,
    pace: Pace = Pace(),
    progress: Progress = iter,
) -> Rehearsal:
    """Predict what training at other weights would do to readings of a model, from pairs of trainings.

        change = read(θ̃(w)) − read(θ̃(w₀)),     θ̃: the run's training on batches of share · b rows,
                                               in an order of their own, its tail averaged

    Both trainings see the same batches; weight 0 is "dropped, same batches, same steps". Cost: 2 · share of
    a training for each run. A few runs with large batches show more than many with small ones.

    Args:
        runs: trained models; one pair of rehearsals each.
        weights: [n], those to predict at; w₀ is a run's own.
        read: model -> numbers, in eval mode.
        pace: see `Pace`.
        progress: wraps the loop over runs (tqdm).

    Raises:
        ValueError: no runs; weights that are not [n], or above 0 for rows that a run was drawn without
            (`drop="row"`); a rehearsal that leaves the finite numbers.

    Source: the difference of two coarse solutions as a correction to a fine one: Giles 2008 (multilevel
    Monte Carlo); Adam's learning rate and the root of the batch: Malladi et al. 2022.
    """
    several = [runs] if isinstance(runs, Run) else list(runs)
    if not several:
        raise ValueError("expected at least one run to rehearse, got none")
    w = checked_weights(weights, several[0].problem.n)
    for run in several:
        back = np.setdiff1d(np.flatnonzero(w), run.pool)
        if len(back):
            raise ValueError(
                f"expected weights for rows that batches were drawn from, got {w[back[0]]:g} for row {back[0]}, which "
                "the run's training was drawn without; train with drop='weight'"
            )
    found = [_rehearsed(run, w, read, pace) for run in progress(several)]
    changes, ahead = (torch.stack(part) for part in zip(*found, strict=True))
    return Rehearsal(changes, ahead, sum(pace.cost(run) for run in several))


def _rehearsed(run: Run, w: NDArray[np.float64], read: Read, pace: Pace) -> tuple[Tensor, Tensor]:
    """(reading after a rehearsal at w, reading of the run), each less that after one at the run's weights."""
    recipe = _smaller(run, pace.size(run))
    steps = steps_of(run.problem, recipe, recipe.draw(run.pool), run.weights, run.since)
    models = [_averaged(replace(steps, weights=at), pace.tail) for at in (run.weights, w)]
    with torch.no_grad():
        own, before, after = (read(model).double().cpu() for model in (run.model, *models))
    return after - before, own - before


def _smaller(run: Run, size: int) -> Recipe:
    """The run's recipe on smaller batches, on which it gets as far.

    Adam divides by the size of gradients, which is mostly their noise and grows as 1 / √batch; its learning rate
    makes up for it.
    """
    share, optimizer = size / len(run.order[0]), run.recipe.optimizer
    parts = math.ceil(run.recipe.accumulate * share)
    if hasattr(optimizer, "betas"):
        adam: Any = optimizer
        optimizer = replace(adam, lr=adam.lr / math.sqrt(share))
    return replace(
        run.recipe, optimizer=optimizer, batch_size=size, epochs=len(run.order) * size / run.drawn, accumulate=parts,
        seed=run.recipe.seed + SEED, order=None, init=None,
    )  # fmt: skip


def _averaged(steps: Steps, tail: float) -> nn.Module:
    """The model after all steps, the parameters of the last ones averaged, in eval mode."""
    state, last = steps.start(), max(1, round(tail * len(steps)))
    mean: Params = {}
    for step in range(len(steps)):
        try:
            state, _ = steps.step(state, step)
        except ValueError as error:
            raise ValueError(
                f"a rehearsal stopped at step {step} of {len(steps)}: {error}; take a larger "
                "`share`"
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
