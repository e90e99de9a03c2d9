"""The way of a training through parameter space: its checkpoints, and how far the steps around each reach."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from attribution_core.layerwise.vectors import vector
from attribution_core.problem import Problem
from attribution_core.safeguards.swapping import refuse_computed_weights
from attribution_core.stepwise.optimizers import Checkpoint
from attribution_core.stepwise.trained import Trained, trained
from attribution_core.training import Run

Checkpoints = Sequence[Checkpoint | Mapping[str, Tensor]]
Rates = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class Stretch:
    """A stretch of steps: the problem at its checkpoint, and two diagonals [p] summed over its steps."""

    problem: Problem
    reach: Tensor  # how far a constant gradient of 1 moves each parameter
    pull: Tensor  # by which share of itself weight decay moves it


@dataclass(frozen=True, eq=False)
class Way:
    """A training from its first stretch to its final model."""

    final: Trained
    stretches: list[Stretch]


def way_of(
    given: Problem | Run,
    checkpoints: Checkpoints | None = None,
    lr: Rates | None = None,
    steps: int | None = None,
    momentum: float = 0.0,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    *,
    final_alone: bool = False,
) -> Way:
    """The way of a run, or of a problem with checkpoints from elsewhere; see `tracin` for the arguments.

    Args:
        final_alone: without checkpoints, let the final parameters stand for the whole training.
    """
    final = trained(given, weights, exposure, window=True)
    if isinstance(given, Run):
        if any(x is not None for x in (checkpoints, lr, steps)) or momentum != 0.0:
            raise ValueError(
                "a run brings its own checkpoints and learning rates; do not give them again"
            )
        return Way(final, _of_run(given, final.problem, final_alone))
    if checkpoints is None and final_alone:
        checkpoints = [given.params]
    return Way(final, _of_files(given, checkpoints, lr, steps, momentum))


def _of_run(run: Run, final: Problem, final_alone: bool) -> list[Stretch]:
    """The stretches of a run, from the step on at which its weights act."""
    optimizer, total = run.recipe.optimizer, len(run.order)
    kept = run.checkpoints
    if not kept and final_alone:
        kept = (Checkpoint(run.params, run.state, total - 1, 0, total),)
    if not kept:
        raise ValueError(
            "expected a run with checkpoints, got one without; keep some by train(..., checkpoints=6)"
        )
    found = []
    for at in kept:
        if at.last <= run.since:
            continue  # weights did not act there yet
        first = max(at.first, run.since)
        factors = sum(run.recipe.factors(total)[first : at.last])
        reach = factors * vector(optimizer.reach(at.state, at.step + 1))
        # decoupled decay is not divided by √v̂ + eps
        pull = optimizer.lr * factors if getattr(optimizer, "decoupled", False) else reach
        found.append(Stretch(problem_at(final, at.params), reach, final.decay * pull))
    return found


def _of_files(
    problem: Problem,
    checkpoints: Checkpoints | None,
    lr: Rates | None,
    steps: int | None,
    momentum: float,
) -> list[Stretch]:
    if not checkpoints:
        raise ValueError(
            "expected checkpoints of the training, got none; pass its state dicts in order as "
            "checkpoints=[...], or a run of train(..., checkpoints=6)"
        )
    count = len(checkpoints)
    lengths = [float(at.last - at.first) for at in checkpoints if isinstance(at, Checkpoint)]
    if lr is None or (steps is None and not lengths):
        raise ValueError(
            f"expected lr and steps beside the checkpoints of a problem, got lr={lr} and steps={steps}; "
            "a run of `train` brings both"
        )
    if len(lengths) not in (0, count) or (lengths and steps not in (None, sum(lengths))):
        raise ValueError(
            f"expected state dicts and steps, or Checkpoints that stand for all steps, got {len(lengths)} "
            f"of {count} Checkpoints with {sum(lengths):.0f} steps, and steps={steps}"
        )
    rates = [float(lr)] * count if isinstance(lr, (int, float)) else [float(x) for x in lr]
    if len(rates) != count or min(rates) < 0 or max(rates) == 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"expected one positive lr, or one for each of {count} checkpoints, and a momentum in "
            f"[0, 1), got lr={lr} and momentum={momentum}"
        )
    found = []
    for k, at in enumerate(checkpoints):
        length = lengths[k] if lengths else (steps or 0) / count
        reach = torch.full_like(problem.decay, rates[k] * length / (1 - momentum))
        params = at.params if isinstance(at, Checkpoint) else at
        found.append(Stretch(problem_at(problem, params), reach, reach * problem.decay))
    return found


def problem_at(problem: Problem, params: Mapping[str, Tensor]) -> Problem:
    """The problem at other parameters; buffers of the model that a state dict holds are taken over.

    Raises:
        ValueError: trainable parameters are missing, or have other shapes.
    """
    wrong = [k for k, v in problem.params.items() if k not in params or params[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"expected checkpoints with all trainable parameters in the model's shapes, got one with "
            f"{sorted(params)[:5]} ..., where {wrong[:5]} are missing or of other shapes"
        )
    refuse_computed_weights(problem.model)
    model = copy.deepcopy(problem.model)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in params.items() if k in own}, strict=False)
    return replace(problem, model=model)
