"""A curvature in Kronecker-factored eigenbases: φ(H) V layer by layer, diagonal in each basis.

    φ(H) V = Q_L (φ(Λ) ⊙ (Q_Lᵀ V Q_R)) Q_Rᵀ        for a weight matrix, V [r, c]

How the bases and the eigenvalues Λ are found is in `ekfac`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attribution_core.calling import Params
from attribution_core.layerwise.ghost import LAYER_ELEMENTS
from attribution_core.layerwise.vectors import flatten, size_of, unflatten
from attribution_core.second_order.spectrum import Phi, not_definite

WIDEST = 4096  # a side up to which eigenvectors are found


@dataclass(frozen=True)
class Place:
    """Where a weight matrix sits: its name, its bias's name if it has one, and its shape."""

    weight: str
    bias: str | None
    shape: tuple[int, int, int]  # groups, rows and columns, the bias included
    tall: bool  # the bias is a further row (Conv1D), not a column
    one_hot: bool  # rows are tokens
    holders: int

    def covariances(self) -> list[tuple[int, ...]]:
        """Shapes of the covariances of the two sides; empty for a side that keeps its coordinates."""
        g, r, c = self.shape
        own = (self.one_hot or r > WIDEST, c > WIDEST)
        return [(0,) if o else (g, side, side) for o, side in zip(own, (r, c), strict=True)]

    def gather(self, held: Params) -> Tensor:
        """[k, g, r, c] from the named parameters' [k, *shape]."""
        g, r, c = self.shape
        matrix = held[self.weight]
        if self.bias is None:
            return matrix.reshape(-1, g, r, c)
        bias = held[self.bias]
        if self.tall:
            return torch.cat([matrix.reshape(-1, g, r - 1, c), bias.reshape(-1, g, 1, c)], dim=2)
        return torch.cat([matrix.reshape(-1, g, r, c - 1), bias.reshape(-1, g, r, 1)], dim=3)

    def scatter(self, matrix: Tensor, like: Params) -> Params:
        """The inverse of `gather`."""
        parts = {self.weight: matrix}
        if self.bias is not None:
            weight, bias = (
                (matrix[:, :, :-1], matrix[:, :, -1:])
                if self.tall
                else (matrix[..., :-1], matrix[..., -1:])
            )
            parts = {self.weight: weight, self.bias: bias}
        return {name: value.reshape(like[name].shape) for name, value in parts.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """One weight matrix's share of the curvature."""

    place: Place
    left: Tensor | None  # Q_L [g, r, r]; None: own coordinates
    right: Tensor | None  # Q_R [g, c, c]
    values: Tensor  # Λ [g, r, c]

    def rotated(self, matrix: Tensor) -> Tensor:
        """Q_Lᵀ M Q_R."""
        matrix = matrix if self.left is None else self.left.mT @ matrix
        return matrix if self.right is None else matrix @ self.right

    def back(self, matrix: Tensor) -> Tensor:
        """Q_L M Q_Rᵀ."""
        matrix = matrix if self.left is None else self.left @ matrix
        return matrix if self.right is None else matrix @ self.right.mT

    def along(self, diagonal: Tensor) -> Tensor:
        """The diagonal, in this basis, of a matrix that is diagonal in the parameters' own."""
        diagonal = diagonal if self.left is None else self.left.square().mT @ diagonal
        return diagonal if self.right is None else diagonal @ self.right.square()

    def sides(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right vectors [g, b, T, ·] in this basis; token numbers stay what they are."""
        left = left if self.left is None else _turned(left, self.left)
        return left, right if self.right is None else _turned(right, self.right)

    def add(self, uses: list[tuple[Tensor, Tensor]], weights: Tensor) -> None:
        """values += Σ_i w_i (Σ_uses Σ_t l rᵀ)², element by element."""
        g, r, c = self.place.shape
        left, right = uses[0]
        if len(uses) == 1 and right.shape[2] == 1 and left.is_floating_point():  # one outer product
            squares = left[:, :, 0].square() * weights.to(left)[:, None]
            self.values.add_(squares.mT @ right[:, :, 0].square())
            return
        if len(uses) == 1 and not left.is_floating_point():
            self._add_tokens(left, right[0], weights)
            return
        size = max(1, LAYER_ELEMENTS // (g * r * c))
        for start in range(0, len(weights), size):
            some = slice(start, start + size)
            whole = sum(
                _products(pair[0][some], pair[1][:, some], r)
                if not pair[0].is_floating_point()
                else pair[0][:, some].mT @ pair[1][:, some]
                for pair in uses
            )
            assert isinstance(whole, Tensor)
            squares = torch.einsum("b,gbrc->grc", weights[some].to(whole), whole.square_())
            self.values.add_(squares)

    def _add_tokens(self, tokens: Tensor, right: Tensor, weights: Tensor) -> None:
        """The same where l is one-hot: a token's vectors are summed within an example, then squared."""
        b, r = len(tokens), self.place.shape[1]
        example = torch.arange(b, device=tokens.device)[:, None]
        pair, of = torch.unique(tokens + example * r, return_inverse=True)
        whole = right.new_zeros(len(pair), right.shape[-1])
        whole.index_add_(0, of.flatten(), right.flatten(0, 1))
        squares = (whole.square() * weights.to(whole)[pair // r, None]).to(self.values)
        self.values[0].index_add_(0, pair % r, squares)


def weighted_gram(side: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i Σ_t x_it x_itᵀ, [g, width, width], for x [g, b, T, width]."""
    if (weights == weights[0]).all():
        flat = side.flatten(1, 2)
        return flat.mT @ flat * weights[0].to(side)
    weighted = side * weights.to(side)[:, None, None]
    return weighted.flatten(1, 2).mT @ side.flatten(1, 2)


def _turned(side: Tensor, basis: Tensor) -> Tensor:
    """Vectors x [g, b, T, width] in a basis [g, width, width]: one product where there is one group."""
    return side @ basis[0] if len(basis) == 1 else side @ basis[:, None]


def _products(tokens: Tensor, right: Tensor, r: int) -> Tensor:
    """Σ_t e_token rᵀ, [1, b, r, c]."""
    b, c = len(tokens), right.shape[-1]
    place = tokens + torch.arange(b, device=tokens.device)[:, None] * r
    whole = right.new_zeros(b * r, c).index_add_(0, place.flatten(), right[0].flatten(0, 1))
    return whole.reshape(1, b, r, c)


@dataclass(frozen=True, eq=False)
class EKFAC:
    """A fitted EK-FAC; a `Spectrum`."""

    params: Params  # for names and shapes
    blocks: tuple[Block, ...]
    diagonal: Params  # name -> values of the parameters outside blocks

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues."""
        values = [block.values for block in self.blocks] + list(self.diagonal.values())
        return float(sum(v.double().sum() for v in values))

    @property
    def means(self) -> Tensor:
        """The mean eigenvalue of each parameter's own matrix, [p]; of all, where its own is 0."""
        mean = {name: float(v.double().mean()) for name, v in self.diagonal.items()}
        for block in self.blocks:
            names = (block.place.weight, block.place.bias)
            mean |= {name: float(block.values.mean()) for name in names if name is not None}
        parts = [
            torch.full((v.numel(),), mean[k] or self.trace / self._size, dtype=torch.float64)
            for k, v in self.params.items()
        ]
        return torch.cat(parts)

    def apply(self, v: Tensor, phi: Phi) -> Tensor:
        """φ(H) V for every row of v [k, p]."""
        zero = torch.zeros(1, self._size)
        return self._applied(v, zero, lambda values, _: phi(values))

    def solve(self, v: Tensor, shift: Tensor) -> Tensor:
        """(H + diag(shift))⁻¹ V; a shift that differs between parameters enters as its diagonal in the basis."""

        def divide(values: Tensor, shift: Tensor) -> Tensor:
            shifted = values + shift
            if shifted.min() <= 0:
                raise not_definite(float(shifted.min()))
            return 1.0 / shifted

        return self._applied(v, shift[None], divide)

    @property
    def _size(self) -> int:
        return size_of(self.params)

    def _applied(self, v: Tensor, shift: Tensor, phi: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        held, shifts = unflatten(v, self.params), unflatten(shift, self.params)
        found = {
            name: held[name] * phi(values.to(v), shifts[name][0].to(v))
            for name, values in self.diagonal.items()
        }
        for block in self.blocks:
            at = partial(torch.Tensor.to, device=block.values.device, dtype=v.dtype)
            left, right = (None if q is None else at(q) for q in (block.left, block.right))
            cast = Block(block.place, left, right, at(block.values))
            factor = phi(cast.values, cast.along(at(block.place.gather(shifts)[0])))
            matrix = cast.back(factor * cast.rotated(at(block.place.gather(held))))
            found |= block.place.scatter(matrix.to(v.device), held)
        return flatten({name: found[name] for name in self.params})
