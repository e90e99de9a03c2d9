"""A loss opened at the model's output: ℓ(θ) = losses(output(θ)), the two apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from attribution_core.calling import Params, PerExample, call
from attribution_core.data import Batch
from attribution_core.precision import precision_of

Losses = Callable[[list[Tensor]], Tensor]  # real leaves of the output -> [b]


def open_output(
    model: nn.Module, loss: PerExample, params: Params, batch: Batch
) -> tuple[list[Tensor], Losses]:
    """The real tensors of the model's output on a batch, and the losses [b] as a function of them.

    Raises:
        ValueError: a loss that does not call the model exactly once.
    """
    seen = outputs_in(model, lambda: call(model, loss, params, batch))
    if len(seen) != 1:
        raise ValueError(
            f"expected a loss that calls the model once, got {len(seen)} calls; "
            "use curvature='hessian', 'diagonal' or 'identity'"
        )
    leaves, spec = tree_flatten(seen[0])
    if not any(is_real(leaf) for leaf in leaves):
        raise ValueError(
            f"expected a model that returns tensors, by themselves or in a tuple, a dict or a ModelOutput, got "
            f"{type(seen[0]).__name__}; return a dict instead"
        )

    own = [leaf for leaf in leaves if is_real(leaf)]

    def losses(output: list[Tensor]) -> Tensor:
        values = iter(output)
        filled = tree_unflatten([next(values) if is_real(x) else x for x in leaves], spec)
        given = _Given(model, filled)
        try:
            with precision_of(params):
                return loss(given, batch)
        except RuntimeError as error:  # class weights of another dtype, say
            if not any(_width(x) > _width(z) for x, z in zip(output, own, strict=True)):
                raise
            try:
                return _widely(given, model, loss, batch, max(output, key=_width).dtype)
            except (RuntimeError, ValueError):
                raise error from None

    return own, losses


def _widely(
    given: nn.Module, model: nn.Module, loss: PerExample, batch: Batch, dtype: torch.dtype
) -> Tensor:
    """Losses of outputs wider than the model's: class weights and labels have to be of the same dtype."""

    def wide(x: Any) -> Any:
        return x.to(dtype) if is_real(x) and _width(x) < dtype.itemsize else x

    buffers = {name: wide(value) for name, value in model.named_buffers()}
    return call(model, lambda _, rows: loss(given, rows), buffers, tree_map(wide, batch))


def _width(x: Tensor) -> int:
    return x.dtype.itemsize


def outputs_in(model: nn.Module, act: Callable[[], Any]) -> list[Any]:
    """What the model puts out, call by call, in act()."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        act()
    finally:
        handle.remove()
    return seen


def is_real(value: Any) -> bool:
    """A tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


class _Given(nn.Module):
    """Stands in for a model whose output is known."""

    def __init__(self, model: nn.Module, output: Any):
        super().__init__()
        self.__dict__["_stands_for"] = model
        self.__dict__["_output"] = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_output"]
