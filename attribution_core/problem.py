"""What a method may know: a model, a loss per example, training data; and the outputs to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.calling import Params, PerExample, in_eval_mode, per_example, trainable
from attribution_core.data import as_data, batches, named, take


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its loss per example and its training data.

    The trained objective is (1/n) Σ w_i ℓ_i(θ) + ½ weight_decay ‖θ‖², n fixed whatever the weights.
    A weight decay may differ between parameters: ½ Σ_name weight_decay[name] ‖θ_name‖².

    Args:
        model: any nn.Module. Trained, for methods that read it; initial, for `train`.
        loss: your own function (model, batch) -> [b], one loss per row of the batch, in nats.
        train: a dict or tuple of tensors, a TensorDataset, a datasets.Dataset, or any `Data`.
        weight_decay: what torch's optimizers mean by it; the ½ weight_decay ‖θ‖² above. One number, or
            parameter name -> number, 0 for names left out (biases and norms, as is usual).

    Raises:
        TypeError, ValueError: data that cannot be used (see `as_data`); no trainable parameters, or complex ones;
            a weight decay that is negative or names a parameter that the model does not train.
    """

    model: nn.Module
    loss: PerExample
    train: Any
    weight_decay: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", as_data(self.train))
        if not self.params:
            raise ValueError(
                "expected a model with trainable parameters, got none with requires_grad"
            )
        unreal = [name for name, value in self.params.items() if value.is_complex()]
        if unreal:
            raise ValueError(
                f"expected real parameters, got complex ones in {unreal[:5]}; hold torch.view_as_real(w) as the "
                "parameter and take torch.view_as_complex of it in forward"
            )
        by_name = self.weight_decay if isinstance(self.weight_decay, Mapping) else {}
        unknown = sorted(set(by_name) - set(self.params))
        if unknown:
            raise ValueError(
                f"expected weight decays of trainable parameters, got {unknown[:5]}; "
                f"the names are {list(self.params)[:5]} ..."
            )
        if not (self.decay >= 0).all():
            raise ValueError(f"expected a weight decay of at least 0, got {self.weight_decay}")

    @classmethod
    def from_sklearn(
        cls, fitted: Any, X: Any, y: Any, *, weights: ArrayLike | None = None
    ) -> Problem:
        """A fitted scikit-learn linear model and its training data; see `linear_models.from_sklearn`."""
        from attribution_core.linear_models import from_sklearn

        return from_sklearn(fitted, X, y, weights=weights)

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def params(self) -> Params:
        """The trainable parameters, detached and by name; tied ones appear once."""
        return trainable(self.model)

    @property
    def decay(self) -> Tensor:
        """The weight decay of each parameter, [p] in the order of `params`, float64 on the CPU."""
        parts = [
            torch.full((value.numel(),), decay_of(self.weight_decay, name), dtype=torch.float64)
            for name, value in self.params.items()
        ]
        return torch.cat(parts)

    @property
    def covered(self) -> float:
        """Which share of the model's parameters is trained, and so attributed to."""
        trained = sum(value.numel() for value in self.params.values())
        return trained / sum(value.numel() for value in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model lives; batches are moved there."""
        return next(self.model.parameters()).device


def decay_of(weight_decay: Any, name: str) -> Any:
    """The weight decay of one parameter, from one number (or tensor), a mapping by name, or None.

    >>> decay_of(0.1, "bias"), decay_of({"weight": 0.1}, "bias")
    (0.1, 0.0)
    """
    found = weight_decay.get(name, 0.0) if isinstance(weight_decay, Mapping) else weight_decay
    return found if isinstance(found, Tensor) else float(found or 0.0)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What to predict: a function (model, batch) -> [b] over target data; one target per row.

    `mean()` makes one target of them, the average; `mean(by=labels)` one target per label.
    """

    function: PerExample
    data: Any
    matrix: Tensor | None = None  # [rows, t] combines rows into targets; None is one target per row
    names: tuple[str, ...] = ()  # of the targets, where averages were given some

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", as_data(self.data))

    def __len__(self) -> int:
        return len(self.data) if self.matrix is None else self.matrix.shape[1]

    @property
    def targets(self) -> NDArray[Any] | None:
        """The names of the targets as a datamodel takes them; None where they have none."""
        return np.asarray(self.names) if self.names else None

    def mean(self, by: ArrayLike | None = None) -> Outputs:
        """One target: the average over rows; or, with labels [rows], one average per label."""
        if self.matrix is not None:
            raise ValueError(
                "expected outputs of single rows, got averages already; call mean once"
            )
        labels = np.full(len(self.data), "mean") if by is None else np.asarray(by)
        if labels.shape != (len(self.data),):
            raise ValueError(f"expected one label per row [{len(self.data)}], got {labels.shape}")
        names, index = named(labels, len(self.data))
        matrix = torch.zeros(len(self.data), len(names), dtype=torch.float64)
        matrix[torch.arange(len(index)), torch.as_tensor(index)] = 1.0
        return replace(self, matrix=matrix / matrix.sum(0), names=tuple(str(x) for x in names))

    def evaluate(
        self, model: nn.Module, params: Params | None = None, batch_size: int = 32
    ) -> Tensor:
        """The outputs [t] of a model in eval mode, float64 on the CPU."""
        values = []
        device = next(model.parameters()).device
        with torch.no_grad(), in_eval_mode(model):
            for rows in batches(len(self.data), batch_size):
                batch = take(self.data, rows, device)
                values.append(per_example(model, self.function, batch, params, rows, what="output"))
        rows_values = torch.cat(values).double().cpu()
        return rows_values if self.matrix is None else rows_values @ self.matrix
