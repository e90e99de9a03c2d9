"""Jacobians of several numbers a row by the parameters, and moves along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from attribution_core.calling import Params, call, trainable
from attribution_core.data import Batch
from attribution_core.gradients import as_batch, row_by_row
from attribution_core.layerwise.vectors import by_name, flatten


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
    params = trainable(model)
    with torch.no_grad():
        return row_jacobians(lambda at, row: call(model, function, at, row), params, batch).flatten(
            0, 1
        )


def row_jacobians(
    outputs: Callable[[Params, Batch], Tensor], params: Params, batch: Batch
) -> Tensor:
    """∂ outputs(params, row)_j / ∂ params of every row by itself, [b, k, p]."""

    def one(example: Any) -> Tensor:
        row = as_batch(example)
        return flatten(jacrev(lambda at: outputs(at, row).flatten())(params))

    return row_by_row(one, batch).detach()


def move_parameters(model: nn.Module, by: Tensor) -> None:
    """Add [p], in the order of a Jacobian's columns, to the trainable parameters, in place."""
    params = trainable(model)
    with torch.no_grad():
        for name, part in by_name(by, params).items():
            params[name] += part
