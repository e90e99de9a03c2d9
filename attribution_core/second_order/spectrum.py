"""Functions of a symmetric matrix H [p, p] whose eigenvalues are at hand: φ(H) V and (H + shift)⁻¹ V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

Phi = Callable[[Tensor], Tensor]  # a function of eigenvalues, elementwise


class Spectrum(Protocol):
    """A symmetric H [p, p] with eigenvalues at hand, so that any function φ of it can be applied."""

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues."""

    def apply(self, v: Tensor, phi: Phi) -> Tensor:
        """φ(H) V for every row of v [k, p], float64."""

    def solve(self, v: Tensor, shift: Tensor) -> Tensor:
        """(H + diag(shift))⁻¹ V for every row of v [k, p] and shift [p], float64."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """H = diag(values).

    >>> h = Diagonal(torch.tensor([1.0, 3.0], dtype=torch.float64))
    >>> h.apply(torch.ones(1, 2).double(), torch.square).tolist()
    [[1.0, 9.0]]
    """

    values: Tensor  # [p]

    @property
    def trace(self) -> float:
        """The sum of the values."""
        return float(self.values.sum())

    def apply(self, v: Tensor, phi: Phi) -> Tensor:
        """φ(values) ⊙ V."""
        return v * phi(self.values)

    def solve(self, v: Tensor, shift: Tensor) -> Tensor:
        """V / (values + shift)."""
        lowest = float((self.values + shift).min())
        if lowest <= 0:
            raise not_definite(lowest)
        return v / (self.values + shift)


@dataclass(frozen=True, eq=False)
class Dense:
    """H as a matrix; eigenvalues are found when a function of them is first asked for.

    >>> h = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))   # eigenvalues 1, 3
    >>> h.apply(torch.eye(2).double(), torch.square).round().tolist()
    [[5.0, 4.0], [4.0, 5.0]]
    """

    matrix: Tensor  # [p, p]

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return float(self.matrix.trace())

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [p] and eigenvectors [p, p], one a column."""
        return tuple(torch.linalg.eigh(self.matrix))

    def apply(self, v: Tensor, phi: Phi) -> Tensor:
        """V Q φ(Λ) Qᵀ."""
        values, vectors = self.eigen
        return v @ vectors * phi(values) @ vectors.T

    def solve(self, v: Tensor, shift: Tensor) -> Tensor:
        """By a Cholesky factor."""
        return self.factored(shift)(v)

    def factored(self, shift: Tensor) -> Callable[[Tensor], Tensor]:
        """The solve with H + diag(shift), factored once."""
        return _cholesky(self.matrix + shift.diag())


def not_definite(lowest: float) -> ValueError:
    """The error of a curvature that cannot be divided by."""
    return ValueError(
        f"expected a positive definite curvature, got a smallest eigenvalue of {lowest:.3g} with weight "
        "decay and damping; use curvature='gauss_newton', or raise the damping"
    )


def _cholesky(shifted: Tensor) -> Callable[[Tensor], Tensor]:
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        raise not_definite(float(torch.linalg.eigvalsh(shifted)[0]))
    return lambda v: torch.cholesky_solve(v.T, factor).T
