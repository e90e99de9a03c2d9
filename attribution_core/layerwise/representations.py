"""What a model makes of its inputs: a layer's input for every example, and gradients by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution_core.calling import PerExample, call, per_example, trainable
from attribution_core.data import Batch, Progress, as_data, batches, rows_in, take
from attribution_core.layerwise.layers import owners
from attribution_core.problem import Problem
from attribution_core.processes import collect, my_rows, world
from attribution_core.safeguards.refusals import refuse_random_layers


def representations(
    model: nn.Module,
    function: PerExample,
    data: Any,
    *,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """What goes into a layer, [rows, width], when function(model, batch) is called.

    Of sequences [b, T, h] the mean over positions, of those that attention_mask counts where a dict
    batch has one; images are flattened.

    Args:
        layer: a module's name; by default the last module called that holds parameters. Of one that is
            called several times the last call counts.
        progress: wraps the loop over batches (tqdm).

    Raises:
        ValueError: no such layer, or one whose input is not a row of floats for each row of the batch.
    """

    def one(batch: Batch) -> Tensor:
        with torch.no_grad():
            entered = _entering(model, function, batch, name, lambda value: value)[1]
        return _pooled(entered, batch)

    refuse_random_layers(model)
    name = last_layer(model, function, data) if layer is None else layer
    return _by_batch(one, data, next(model.parameters()).device, batch_size, progress)


def activation_gradients(
    problem: Problem,
    layer: str | None = None,
    *,
    batch_size: int = 64,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """Gradients of the losses with respect to a layer's input, [n, width], summed over positions.

    The features of Grad-K-Means (Ley et al. 2024, sec. 4): along a shift that all positions share.

    Args:
        layer, progress: see `representations`.
    """
    model = problem.model

    def one(batch: Batch) -> Tensor:
        with torch.enable_grad():
            losses, leaf = _entering(
                model, problem.loss, batch, name, lambda value: value.detach().requires_grad_()
            )
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return _pooled(gradient, batch, total=True)

    refuse_random_layers(model)
    name = last_layer(model, problem.loss, problem.train) if layer is None else layer
    return _by_batch(one, problem.train, problem.device, batch_size, progress)


def _by_batch(
    one: Callable[[Batch], Tensor], data: Any, device: Any, batch_size: int, progress: Progress
) -> NDArray[np.float64]:
    """`one` of every batch, concatenated; several processes share the rows."""
    data = as_data(data)
    rows = np.arange(len(data))
    shared = len(rows) >= world()[1]
    mine = list(batches(my_rows(rows) if shared else rows, batch_size))
    own = torch.cat([one(take(data, some, device)).double().cpu() for some in progress(mine)])
    return (collect(own) if shared else own).numpy()


def last_layer(model: nn.Module, function: PerExample, data: Any) -> str:
    """The name of the module that was called last, of those that hold parameters themselves."""
    holders = owners(model, {name for name, _ in model.named_parameters()})
    names = {module: name for name, module in model.named_modules() if module in holders}
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, *_: called.append(names[module]))
        for module in names
    ]
    try:
        with torch.no_grad():
            batch = take(as_data(data), [0], next(model.parameters()).device)
            call(model, function, trainable(model), batch)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError("expected a model with layers that hold parameters; name one by layer=")
    return called[-1]


def _entering(
    model: nn.Module,
    function: PerExample,
    batch: Batch,
    layer: str,
    change: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """function(model, batch) [b], and what went into a layer last: `change` of its own input."""
    known = dict(model.named_modules())
    if layer not in known:
        raise ValueError(f"no layer {layer!r} in the model; it has {list(known)[1:6]} ...")
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        first = None if args else next(iter(kwargs), None)
        value = args[0] if args else kwargs.get(first)
        if isinstance(value, Tensor) and value.is_floating_point():
            value = change(value)
            args, kwargs = (
                ((value, *args[1:]), kwargs) if args else (args, {**kwargs, first: value})
            )
        seen.append(value)
        return args, kwargs

    handle = known[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        values = per_example(model, function, batch)
    finally:
        handle.remove()
    value, b = seen[-1] if seen else None, rows_in(batch)
    if not isinstance(value, Tensor) or not value.is_floating_point() or len(value) != b:
        got = (
            f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value)}"
        )
        raise ValueError(
            f"expected floats for {b} rows going into layer {layer!r}, got {got if seen else 'no call'}; "
            "name another by layer="
        )
    return values, value


def _pooled(x: Tensor, batch: Batch, total: bool = False) -> Tensor:
    """[b, width]: of [b, T, h] the mean (or sum) over positions, those that attention_mask counts."""
    if x.ndim != 3:
        return x.reshape(len(x), -1)
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], device=x.device)
    mask = mask[..., None].to(x)
    summed = (x * mask).sum(1)
    return summed if total else summed / mask.sum(1).clamp(min=1)
