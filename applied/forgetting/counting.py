"""What a piece of code costs in passes through a model: rows, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

FORWARD = 1 / 3  # of a training step, which is a forward pass and a backward pass of twice its work


@dataclass
class Count:
    """Rows passed forward, with gradients and without."""

    rows: int = 0
    rows_read: int = 0
    on: bool = True
    made: list[nn.Module] = field(default_factory=list)

    def steps(self, batch_size: int) -> float:
        """The cost in training steps."""
        return (self.rows + FORWARD * self.rows_read) / batch_size


@contextmanager
def counted(model: nn.Module) -> Iterator[Count]:
    """Count the rows that pass through a model and its copies, deep or pickled, by a hook that is taken off again.

    Append models that were made meanwhile to `.made`, so that it is taken off these too. Not seen are
    passes through parts of the model, and through models built anew.
    """
    count = Count()
    hook = _Hook(count, uuid4().hex)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    _UNDER_WAY[hook.name] = hook
    try:
        yield count
    finally:
        del _UNDER_WAY[hook.name]
        count.on = False  # copies that were kept elsewhere still hold the hook
        for module in (part for top in (model, *count.made) for part in top.modules()):
            mine = [key for key, found in module._forward_pre_hooks.items() if found is hook]
            for key in mine:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


@dataclass(frozen=True, eq=False)
class _Hook:
    """Counts the rows of a call; however a model is copied, its copies count here as well."""

    count: Count
    name: str  # by which pickled copies find it; unique

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(_inside([args, kwargs]), None)
        if first is None or not self.count.on:
            return
        if torch.is_grad_enabled():
            self.count.rows += _rows(first)
        else:
            self.count.rows_read += _rows(first)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_under_way, (self.name,)


_UNDER_WAY: dict[str, _Hook] = {}  # hooks of counts in progress


def _hook_under_way(name: str) -> _Hook:
    """The hook that a pickled model held; one that counts nothing where its count has ended."""
    return _UNDER_WAY.get(name) or _Hook(Count(on=False), name)


def _inside(given: Any) -> Iterator[Tensor]:
    """The tensors in arguments, nested ones too, in order."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (Mapping, list, tuple)):
        parts: Iterable[Any] = given.values() if isinstance(given, Mapping) else given
        for part in parts:
            yield from _inside(part)


def _rows(x: Tensor) -> int:
    """Rows of a tensor; under vmap times what is mapped over."""
    functorch: Any = torch._C._functorch
    rows = len(x) if x.ndim else 1
    while functorch.is_functorch_wrapped_tensor(x):
        inner = functorch.get_unwrapped(x)
        if functorch.is_batchedtensor(x):
            rows *= inner.shape[functorch.maybe_get_bdim(x)]
        x = inner
    return rows
