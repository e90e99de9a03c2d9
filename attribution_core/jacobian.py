"""Jacobians of several numbers a row by the parameters, and moves along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.data import Batch
from attribution_core.gradients import as_batch, flatten, row_by_row, unflatten
from attribution_core.problem import call, trainable


def jacobian(
    model: nn.Module, function: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> Tensor:
    """∂ function(model, row)_j / ∂θ of every row by itself, [b · k, p], for a function (model, batch) -> [b, k].

    One pass forward and k backward for each row; θ are the trainable parameters in their order.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> torch.equal(jacobian(model, lambda model, batch: model(batch[0]), (x,)), x)
    True
    """
    from torch.func import jacrev

    params = trainable(model)

    def one(example: Any) -> Any:
        return jacrev(lambda at: call(model, function, at, as_batch(example))[0])(params)

    with torch.no_grad():
        per_row = row_by_row(one, batch)
        return flatten({name: part.flatten(0, 1) for name, part in per_row.items()})


def move_parameters(model: nn.Module, by: Tensor) -> None:
    """Add [p], in the order of a Jacobian's columns, to the trainable parameters, in place."""
    params = trainable(model)
    with torch.no_grad():
        for name, part in unflatten(by[None], params).items():
            params[name] += part[0].to(params[name])
