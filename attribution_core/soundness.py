"""Whether a loss is what per-example attribution takes it to be: a function of the parameters by name and of its own row.

Layers are looked at first (`refuse_random_layers`); what no list of layers can tell, noise drawn in a forward pass,
buffers that it changes, rows that see one another, is found by passing a few rows through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution_core.data import rows_in, take
from attribution_core.problem import Problem, call, refuse_random_layers, rounding
from attribution_core.swapping import refuse_hidden_parameters

TRIED = 8  # rows that are passed through together, and some of them alone
ALONE = 2
APART = 1e-3  # relative difference of losses, far above the rounding of float32
SMALL = 1e-2  # nats beside which losses are told apart: those near 0 are all rounding

_SOUND: WeakSet[Problem] = WeakSet()  # those that were found to be


def refuse_unsound(problem: Problem, rows: NDArray[np.intp] | None = None) -> None:
    """Raise where losses, at the problem's model as it stands, are no functions of parameters and rows; once for each problem.

    Raises:
        ValueError: dropout or batch norm in training mode; a forward pass that draws random numbers or changes
            buffers; losses that depend on the other rows of a batch; parameters that swapping does not reach.
    """
    if problem in _SOUND:
        return
    refuse_random_layers(problem.model)
    few = (np.arange(problem.n) if rows is None else rows)[:TRIED]
    with nothing_else_changes(problem.model, "call model.eval()"):
        together = _losses(problem, few)
    _refuse_mixed_rows(problem, few, together)
    refuse_hidden_parameters(
        problem.model, problem.loss, lambda: take(problem.train, few[:2], problem.device)
    )
    _SOUND.add(problem)


@contextmanager
def nothing_else_changes(model: nn.Module, cure: str) -> Iterator[None]:
    """Raise where passes through a model draw random numbers or change its buffers; batch norm's are looked after elsewhere."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def generators() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if cuda else [])]

    before = generators()
    yield
    if not all(torch.equal(a, b) for a, b in zip(before, generators(), strict=True)):
        raise ValueError(
            "expected a forward pass without random numbers, got one that draws them (functional "
            f"dropout, drop path, noise); {cure}"
        )
    changed = [k for k, v in model.named_buffers() if not torch.equal(v, buffers[k])]
    if changed:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        raise ValueError(
            f"expected a forward pass that leaves buffers alone (batch norm's apart), got changed "
            f"{changed[:5]}; put the layer into eval mode"
        )


def _losses(problem: Problem, rows: NDArray[np.intp]) -> Tensor | None:
    """Losses of some rows, [b]; None where there are none, for which the pass that is really needed says why."""
    try:
        batch = take(problem.train, rows, problem.device)
        with torch.no_grad():
            found = call(problem.model, problem.loss, problem.params, batch)
    except Exception:
        return None
    return found if found.shape == (rows_in(batch),) else None


def _refuse_mixed_rows(problem: Problem, rows: NDArray[np.intp], together: Tensor | None) -> None:
    """Raise where the loss of one of the first rows is another without those beside it."""
    alone = [_losses(problem, rows[k : k + 1]) for k in range(min(ALONE, len(rows)))]
    if together is None or any(one is None for one in alone):
        return
    own = torch.cat([one for one in alone if one is not None])
    eps = max(rounding(value) for value in problem.params.values())
    most = max(APART, 8 * eps) * (together.abs().max() + SMALL)
    if ((together[: len(own)] - own).abs() > most).any():
        raise ValueError(
            f"expected a loss for each row that does not depend on the other rows of its batch, got "
            f"{together[: len(own)].tolist()} beside {len(rows) - 1} others and {own.tolist()} alone; divide by constants "
            "(a mean over a batch's tokens is no loss of a row), and use GroupNorm where statistics are a batch's own"
        )
