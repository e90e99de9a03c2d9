"""Steps that are no functions of their state and number alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from attribution_core.calling import Params
from attribution_core.data import tensors_in
from attribution_core.safeguards.refusals import (
    batch_norms,
    refuse_dropout,
    refuse_embeddings,
    refuse_idle_masks,
)
from attribution_core.safeguards.soundness import nothing_else_changes, refuse_restless
from attribution_core.safeguards.swapping import refuse_computed_weights, refuse_hidden_parameters
from attribution_core.stepwise.steps import Steps, TrainingState

T = TypeVar("T")
SOME = 8  # rows on which gradients are compared before a training


def check_steps(steps: Steps) -> None:
    """Raise where a step would not be a function of its state and number alone."""
    model = steps.problem.model
    refuse_embeddings(model, "scale_grad_by_freq", "sparse")
    refuse_computed_weights(model)
    if steps.masks is None:
        refuse_dropout(
            model, "say which masks by Recipe(masks=seed), or call model.eval() or set p=0"
        )
    else:
        refuse_idle_masks(model)
    mixed = [name for name, _ in batch_norms(model)]
    if (mixed or steps.masks is not None) and (steps.accumulate > 1 or steps.shards > 1):
        what = f"batch norm on statistics of the batch ({mixed[0]!r})" if mixed else "dropout masks"
        raise ValueError(
            f"expected a batch that can be cut into parts, got {what}, which sees the whole; use "
            "accumulate=1 and shard=False, or GroupNorm and no dropout"
        )
    some = steps.order[0][:SOME]
    refuse_restless(steps.problem.train, some)
    refuse_hidden_parameters(model, steps.problem.loss, partial(steps.batch, 0, some), copied=True)


def watched_step(steps: Steps, state: TrainingState, step: int) -> tuple[TrainingState, float]:
    """A step during which nothing but its result may change."""
    return unchanging(steps, step, lambda: steps.step(state, step))


def unchanging(steps: Steps, step: int, act: Callable[[], T]) -> T:
    """act(), which takes a step and may change nothing but its result: no random draws, no buffers."""
    cure = "say which by Recipe(masks=seed), or call model.eval()"
    with nothing_else_changes(steps.problem.model, cure):
        done = act()
    if steps.augment is not None:
        rows = steps.order[step]
        once, twice = (tensors_in(steps.batch(step, rows)) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(once, twice, strict=True)):
            raise ValueError(
                f"expected augment(batch, rows, step) to be a function of its arguments alone, got two "
                f"results for step {step}; seed it by row and step"
            )
    return done


def first_gradient(steps: Steps) -> Params:
    """The gradient of step 0 by name, after the checks that every training begins with."""
    check_steps(steps)
    state = steps.start()
    watched_step(steps, state, 0)
    return steps.packing.unpack(steps.gradient(state, 0)[1])
