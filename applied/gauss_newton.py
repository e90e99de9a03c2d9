"""Classifiers matched to logits by Gauss–Newton steps: a few rows solved exactly, in the place of many gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from applied.unlearners import of_classes
from attribution_core.data import Batch, Data, as_data, take
from attribution_core.jacobian import jacobian, move_parameters
from attribution_core.outputs import logits_and_labels
from attribution_core.problem import trainable

LARGEST = 2**28  # numbers in a Jacobian: a gigabyte of single precision
WIDE = 10.0  # damping falls towards the last step, where the rest of the way is gone at once


@dataclass(frozen=True)
class GaussNewton:
    """How a model is matched.

    Args:
        steps: how many; each goes an equal part of the way.
        rows: of each step, half of them of the forget set at most.
        damping: of the last step, in mean eigenvalues of the step's JᵀJ; with a share s of the steps done it is
            10^(1 − s) times that.
        seed: of the rows.
    """

    steps: int = 2
    rows: int = 100
    damping: float = 0.003
    seed: int = 0

    def damping_at(self, step: int) -> float:
        """Larger for the first steps: they are taken where the Jacobian will not stay."""
        return float(self.damping * WIDE ** (1 - (step + 1) / self.steps))


def row_cost(contrasts: int) -> float:
    """What a row's Jacobian costs, in rows of training: a pass forward and, twice as dear, one backward a contrast."""
    return (1 + 2 * contrasts) / 3


def fits(model: nn.Module, rows: int, contrasts: int) -> bool:
    """Is the Jacobian of so many rows small enough to be held?"""
    return rows * contrasts * sum(p.numel() for p in trainable(model).values()) <= LARGEST


def match_by_gauss_newton(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    forget_logits: Tensor,
    retain_logits: Tensor,
    how: GaussNewton = GaussNewton(),
) -> nn.Module:
    """Move parameters until the logits are those wanted, on the forget set and on retained rows.

        θ ← θ + Jᵀ (J Jᵀ + damping · tr(JᵀJ)/p · I)⁻¹ (z* − z(θ)) / steps left

    z are the logits of a step's rows in an orthonormal basis of what softmax sees (Helmert's contrasts of the c
    classes), J [rows · (c − 1), p] their Jacobian: the smallest move that reaches z* to first order. Outputs that
    are no classes' stand for themselves, c of them. The goal is that of `match`; a step costs (2c − 1)/3 training
    steps on as many rows.

    Args:
        forget_logits, retain_logits: z*, [rows, c], in the rows' order.

    Raises:
        ValueError: logits that are not [rows, c]; a solution that is not finite.

    Source: Levenberg 1944; in its dual form, ridge regression with the empirical neural tangent kernel.
    """
    sets = [(as_data(forget), forget_logits), (as_data(retain), retain_logits)]
    for data, wanted in sets:
        if wanted.ndim != 2 or len(wanted) != len(data) or wanted.shape[1] < 2:
            raise ValueError(
                f"expected logits [rows={len(data)}, classes >= 2] to match, got {tuple(wanted.shape)}"
            )
    new, rng = copy.deepcopy(model), np.random.default_rng(how.seed)
    for step in range(how.steps):
        parts = [
            _residual(new, data, wanted, rng.choice(len(data), size, replace=False))
            for (data, wanted), size in zip(sets, _sizes(how.rows, *sets), strict=True)
            if size
        ]
        slopes, missing = (torch.cat(several) for several in zip(*parts, strict=True))
        part = missing / (how.steps - step)
        move = _solved(slopes, part, how.damping_at(step))
        if not torch.isfinite(move).all():
            raise ValueError(
                f"expected a finite step, got NaN or infinity at damping {how.damping:g}; raise it"
            )
        move_parameters(new, move)
    return new


def _sizes(rows: int, forget: tuple[Data, Tensor], retain: tuple[Data, Tensor]) -> tuple[int, int]:
    """Rows of a step from either set."""
    few = min(len(forget[0]), max(1, rows // 2))
    return few, min(len(retain[0]), rows - few)


def _residual(
    model: nn.Module, data: Data, wanted: Tensor, rows: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(Jacobian [b · contrasts, p], wanted less present contrasts [b · contrasts]) of some rows."""
    from scipy.linalg import helmert

    some = next(iter(trainable(model).values()))
    batch = take(data, rows, some.device)
    c = wanted.shape[1]
    basis = torch.from_numpy(helmert(c) if of_classes(wanted[rows], batch) else np.eye(c)).to(some)

    def contrasts(at: nn.Module, of: Batch) -> Tensor:
        return logits_and_labels(at, of)[0] @ basis.T

    with torch.no_grad():
        off = wanted[torch.from_numpy(rows)].to(some) @ basis.T - contrasts(model, batch)
    return jacobian(model, contrasts, batch), off.flatten()


def _solved(slopes: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """The ridge solution [p], in double precision."""
    kernel = (slopes @ slopes.T).double()
    shift = damping * kernel.diagonal().sum() / slopes.shape[1]
    kernel.diagonal().add_(shift.clamp(min=torch.finfo(kernel.dtype).tiny))
    found = torch.linalg.solve(kernel, wanted.double())
    return slopes.T @ found.to(slopes)
