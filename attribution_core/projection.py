"""Random projections of per-example gradients: a matrix P [p, k] with E[P Pᵀ] = I, known by its seed.

    features_i = Pᵀ ∇f_i        E ⟨Pᵀa, Pᵀb⟩ = ⟨a, b⟩, with a standard error of about ‖a‖ ‖b‖ / √k

Units are kept: nothing is divided by p or by a norm. Entries of P are drawn on the CPU as a function of
the seed, the parameter's name and the place in it alone, so that neither batches nor blocks nor devices
nor processes change them. The kinds of P:

    factored     a column is u vᵀ on each weight matrix, u and v random signs, so that a feature is
                 uᵀ ∇W v = Σ_t (uᵀ left_t)(rightᵀ_t v), taken layer by layer in one backward pass (see
                 `layers`): no gradient is formed. Norms, lone biases and parameters that act outside
                 their layers are projected by random signs. A feature is a sum over all layers.
    rademacher   random signs / √k times per-example gradients
    gaussian     normal numbers / √k times per-example gradients
    exact        the identity, k = p: what every kind is once k reaches p

The error of "factored" for unrelated gradients is that of "rademacher"; it is up to 2 times that for
parallel ones. (Two projected sides and their k_l · k_r products, Choe et al. 2024, cost less for long
sequences but err by ‖a‖ ‖b‖ k^-1/4 where one side's vectors are alike, as activations are.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attribution_core.calling import Params, PerExample, per_example
from attribution_core.data import Batch, Data, Progress, batches, row_numbers, rows_in, take
from attribution_core.gradients import row_gradients
from attribution_core.layerwise.coverage import coverage_of
from attribution_core.layerwise.layers import (
    UNTRIED,
    Coverage,
    Names,
    factors,
    is_norm,
    matrix_shape,
    owners,
    plain_gradients,
    watched,
)
from attribution_core.layerwise.vectors import flatten, size_of
from attribution_core.precision import widened
from attribution_core.problem import Problem
from attribution_core.safeguards.soundness import refuse_unsound
from attribution_core.second_order.ekfac import plan
from attribution_core.second_order.kronecker import Place

Kind = Literal["auto", "factored", "rademacher", "gaussian"]
Law = Literal["rademacher", "gaussian"]
KEPT = 2**26  # numbers of P kept between batches (256 MiB in float32); beyond, P is drawn anew
BLOCK = 2**24  # numbers of P, or of a layer's features of single tokens, held at once
TILE = 256  # rows of P drawn from one stream of random numbers


def project(
    problem: Problem,
    function: PerExample,
    dim: int,
    seed: int = 0,
    *,
    kind: Kind = "auto",
    data: Data | None = None,
    rows: ArrayLike | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> Tensor:
    """Projected gradients Pᵀ ∇f_i of function(model, batch) for training rows, [rows, min(dim, p)].

    Args:
        problem: the model at whose parameters the gradients are taken.
        function: (model, batch) -> [b], one value per row: the loss, a margin, any output.
        dim: k; from p on the gradients themselves come back.
        seed: of P. The same seed, kind and dim give the same P for any function and data.
        kind: see the head of this file; "auto" is "factored" where at least half of the parameters are
            weights of layers, else "rademacher".
        data, rows: other data than the training data, some rows only.
        batch_size: rows per pass; changes memory and time, never the result.
        progress: wraps the loop over batches (tqdm).

    Raises:
        ValueError: a dim below 1, an unknown kind, random layers; values that are not one finite number
            per row; gradients that are not finite, or that P sends to zero though they are not.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> linear = lambda model, batch: model(batch[0])[:, 0]
    >>> project(Problem(model, linear, (x,)), linear, dim=2).tolist()      # ∇ xᵀθ = x
    [[1.0, 2.0], [3.0, 4.0]]
    """
    found = projection(problem, dim, seed, kind=kind)
    parts = found.parts(function, data, rows, batch_size=batch_size, progress=progress)
    features = [part for _, part in parts]
    return torch.cat(features) if features else torch.zeros(0, found.dim)


def projection(
    problem: Problem, dim: int, seed: int = 0, *, kind: Kind = "auto", scale: Params | None = None
) -> Projection:
    """Settle how a model's gradients are projected; see `project` for the arguments.

    Args:
        scale: multiplied into the gradients, element by element, before they are projected. "factored"
            takes of each weight matrix the product of its row and column means over its mean.
    """
    if dim < 1:
        raise ValueError(f"expected a projection to at least 1 dimension, got {dim}")
    if kind not in ("auto", "factored", "rademacher", "gaussian"):
        raise ValueError(f"unknown kind {kind!r}; auto, factored, rademacher or gaussian")
    refuse_unsound(problem)
    p = size_of(problem.params)
    if dim >= p:
        return Projection(problem, p, seed, "exact", scale)
    if kind in ("rademacher", "gaussian"):
        return Projection(problem, dim, seed, kind, scale)
    coverage = coverage_of(problem, np.arange(problem.n))
    places = plan(problem, coverage.wrong)
    inside = {name for place in places for name in (place.weight, place.bias) if name}
    if kind == "auto" and 2 * sum(problem.params[name].numel() for name in inside) < p:
        return Projection(problem, dim, seed, "rademacher", scale)
    by_layer = _by_layer(problem, set(problem.params) - inside) - coverage.wrong
    alone = tuple(name for name in problem.params if name not in inside | by_layer)
    return Projection(problem, dim, seed, "factored", scale, tuple(places), alone, coverage)


def _by_layer(problem: Problem, names: set[str]) -> set[str]:
    """Those of the named parameters for which every holder has a rule in `plain_gradients`."""
    known = set(names)
    for module, own in owners(problem.model, names).items():
        norm = is_norm(module)
        if not norm and (set(own) != {"bias"} or matrix_shape(module) is None):
            known -= set(own.values())
    return known


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection P [p, dim] of the gradients of one model; made by `projection`."""

    problem: Problem
    dim: int
    seed: int
    kind: Literal["exact", "factored", "rademacher", "gaussian"]
    scale: Params | None = None
    places: tuple[Place, ...] = ()  # of "factored": weight matrices
    alone: tuple[str, ...] = ()  # of "factored": parameters that take per-example gradients
    coverage: Coverage = UNTRIED  # of "factored": what its layers were seen to do
    kept: dict[str, Any] = field(default_factory=dict)  # pieces of P, while they are few

    def parts(
        self,
        function: PerExample,
        data: Data | None = None,
        rows: ArrayLike | None = None,
        *,
        batch_size: int = 64,
        progress: Progress = iter,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Values [b] and features [b, dim] of one batch after another."""
        data = self.problem.train if data is None else data
        rows = np.arange(len(data)) if rows is None else row_numbers(rows, len(data))
        for some in progress(list(batches(rows, batch_size))):
            batch = take(data, some, self.problem.device)
            values, features = self.of(function, batch, some)
            yield values, features

    def of(
        self, function: PerExample, batch: Batch, rows: NDArray[np.intp] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values [b] and features [b, dim] of one batch."""
        rows = np.arange(rows_in(batch)) if rows is None else rows
        if self.kind == "factored":
            values, features = self._factored(function, batch, rows)
        else:
            model, params = self.problem.model, self.problem.params
            with torch.no_grad():
                values = per_example(model, function, batch, params, rows, what="value")
            gradients = row_gradients(model, function, params, batch)
            features = self._dense(gradients, "exact" if self.kind == "exact" else "dense")
        if not torch.isfinite(features).all():
            bad = rows[~torch.isfinite(features).all(1).cpu().numpy()]
            raise ValueError(
                f"expected finite gradients, got NaN or infinity in rows {bad[:10].tolist()}"
            )
        self._refuse_zeros(function, batch, features, rows)
        return values.detach(), features

    def _refuse_zeros(
        self, function: PerExample, batch: Batch, features: Tensor, rows: NDArray[np.intp]
    ) -> None:
        """Raise where a row's features are all zero though its gradient is not."""
        zero = (features == 0).all(1).cpu().numpy()
        if not zero.any() or self.kind == "exact":
            return
        few = tree_map(lambda value: value[torch.from_numpy(zero)], batch)
        gradients = self._scaled(
            row_gradients(self.problem.model, function, self.problem.params, few)
        )
        lost = flatten(gradients).abs().amax(1) > 0
        if lost.any():
            raise ValueError(
                f"the projection sent the gradients of rows {rows[zero][lost.cpu().numpy()][:10].tolist()} "
                f"to zero, though they are not; raise the dimension (now {self.dim}), or take another seed"
            )

    # --- per-example gradients ---------------------------------------------------------------

    def _scaled(self, gradients: Params) -> Params:
        if self.scale is None:
            return gradients
        return {name: g * self.scale[name].to(g) for name, g in gradients.items()}

    def _dense(self, gradients: Params, way: Literal["exact", "dense"]) -> Tensor:
        """Σ over parameters of their gradients [b, *shape] times their rows of P, [b, dim]."""
        flat = {name: g.reshape(len(g), -1) for name, g in self._scaled(gradients).items()}
        flat = {name: widened(g) for name, g in flat.items()}
        if way == "exact":
            return torch.cat([flat[name] for name in self.problem.params], dim=1)
        first = next(iter(flat.values()))
        total = first.new_zeros(len(first), self.dim)
        for name, g in flat.items():
            for start, matrix in self._rows_of(name, g):
                total.addmm_(g[:, start : start + len(matrix)], matrix)
        return total.div_(self.dim**0.5)

    def _rows_of(self, name: str, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A parameter's rows of √dim P, in blocks: (first row, [rows, dim])."""
        count = like.shape[1]
        if self._few:
            yield 0, self._kept(name, count, like)
            return
        size = max(1, BLOCK // (TILE * self.dim)) * TILE
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield start, self._drawn(name, start, stop).to(like)

    def _kept(self, name: str, count: int, like: Tensor) -> Tensor:
        key = f"{self.seed} {name}"
        if key not in self.kept:
            self.kept[key] = self._drawn(name, 0, count).to(like)
        return self.kept[key]

    def _drawn(self, name: str, start: int, stop: int) -> Tensor:
        kind: Law = "gaussian" if self.kind == "gaussian" else "rademacher"
        return draws(kind, self.seed, name, start, stop, self.dim)

    @property
    def _few(self) -> bool:
        """Whether P is small enough to be kept."""
        sizes = {name: value.numel() for name, value in self.problem.params.items()}
        for place in self.places:
            g, r, c = place.shape
            sizes[place.weight] = g * (r + c)
            if place.bias is not None:
                sizes[place.bias] = 0
        return sum(sizes.values()) * self.dim <= KEPT

    # --- layer by layer ------------------------------------------------------------------------

    def _factored(
        self, function: PerExample, batch: Batch, rows: NDArray[np.intp]
    ) -> tuple[Tensor, Tensor]:
        """Values and features by one backward pass, and a second one for parameters outside layers, or of layers that do
        not see these rows whole.
        """
        model, params = self.problem.model, self.problem.params
        places = {place.weight: place for place in self.places}
        inside = {name for place in self.places for name in (place.weight, place.bias)}
        total: dict[str, list[Tensor]] = {weight: [] for weight in places}
        others: Params = {}
        strays: set[str] = set()  # whose layers do not see these rows whole

        def arrive(module: nn.Module, names: Names, source: Tensor, gradient: Tensor) -> None:
            if not self.coverage.holds(len(rows), names, source, gradient):
                strays.update(names.values())
                return
            place = places.get(names.get("weight", ""))
            if place is not None:
                pair = factors(module, source, gradient, place.bias is not None)
                total[place.weight].append(self._products(place, *pair))
            rest = {
                local: name
                for local, name in names.items()
                if name not in inside and name not in self.alone
            }
            for local, g in plain_gradients(module, source, gradient, rest).items():
                others[rest[local]] = others.get(rest[local], 0) + g

        names, shared = set(params) - set(self.alone), self.coverage.is_shared
        with watched(model, names, rows_in(batch), arrive, shared=shared) as leaves:
            values = per_example(model, function, batch, params, rows, what="value")
            if leaves:
                torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        if self.alone or strays:
            some = {name: params[name] for name in params if name in {*self.alone, *strays}}
            plain = row_gradients(model, function, some, batch)
            for place in self.places:
                if place.weight in strays:
                    total[place.weight] = [self._of_rows(place, plain)]
            others.update({name: g for name, g in plain.items() if name not in inside})
        products = [x for held in total.values() for x in held]
        parts = [sum(products) / self.dim**0.5] if products else []
        if others:
            parts.append(self._dense(others, "dense"))
        features = sum(parts)
        assert isinstance(features, Tensor)
        return values, features

    def _of_rows(self, place: Place, gradients: Params) -> Tensor:
        """The products of a matrix whose per-example gradients [b, *shape] are given: each of its rows is a token."""
        held = {name: gradients[name] for name in (place.weight, place.bias) if name}
        matrix = widened(place.gather(held))
        b, _, r, _ = matrix.shape
        numbers = torch.arange(r, device=matrix.device).expand(b, r)
        return self._products(place, numbers, matrix.transpose(0, 1))

    def _products(self, place: Place, left: Tensor, right: Tensor) -> Tensor:
        """Σ_g Σ_t (uᵀ left_t)(vᵀ right_t) for the `dim` pairs (u, v) of one use of a matrix, [b, dim]."""
        u, v = self._signs(place, right)
        g, b, length, c = right.shape
        r = u.shape[1]
        tokens = not left.is_floating_point()
        # products a row: of every token's sides, or of the gradient once it is formed
        whole = not tokens and r * c * (length + self.dim) < length * (r + c) * self.dim
        if whole:
            gradient, held = (left.mT @ right).flatten(1, 2), b * r  # [g, b · r, c]
        else:
            right, held = right.flatten(1, 2), b * length  # one product for all tokens of all rows
            left = left.flatten() if tokens else left.flatten(1, 2)
        found = []
        size = max(1, BLOCK // held)
        for a, z in zip(u.split(size, dim=2), v.split(size, dim=2), strict=True):
            if whole:
                product = (gradient @ z).reshape(g, b, r, -1).mul_(a[:, None])
            else:
                product = (a[:, left] if tokens else left @ a).mul_(right @ z)
            found.append(product.reshape(g, b, held // b, -1).sum((0, 2)))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _signs(self, place: Place, like: Tensor) -> tuple[Tensor, Tensor]:
        """u [g, r, dim] and v [g, c, dim] of a matrix, with the sides of its scale multiplied in."""
        key = f"{self.seed} {place.weight} sides"
        if key in self.kept:
            return self.kept[key]
        g, r, c = place.shape
        u, v = (
            self._drawn(f"{place.weight} {side}", 0, g * count).to(like).reshape(g, count, -1)
            for side, count in (("left", r), ("right", c))
        )
        if self.scale is not None:
            a, z = _rank_one(place.gather({k: s[None] for k, s in self.scale.items()})[0])
            u, v = u * a.to(like)[..., None], v * z.to(like)[..., None]
        if self._few:
            self.kept[key] = (u, v)
        return u, v


def _rank_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sides a [g, r] and z [g, c] whose products are row mean · column mean / mean of [g, r, c]."""
    return matrix.mean(2), matrix.mean(1) / matrix.mean((1, 2))[:, None]


def draws(kind: Law, seed: int, name: str, start: int, stop: int, dim: int) -> Tensor:
    """Rows start..stop − 1 of a random matrix [∞, dim] of variance 1 known by seed and name, float32.

    Philox counts through the matrix in tiles of rows, so that any block can be drawn by itself.

    >>> whole = draws("rademacher", 0, "weight", 0, 700, 5)
    >>> torch.equal(draws("rademacher", 0, "weight", 300, 400, 5), whole[300:400])
    True
    """
    digest = hashlib.sha256(f"{kind} {seed} {name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    tiles: list[Tensor] = []
    for tile in range(start // TILE, -(-stop // TILE)):
        bits = np.random.Philox(key=key, counter=[0, 0, 0, tile])
        if kind == "gaussian":
            normal = np.random.Generator(bits).standard_normal((TILE, dim), dtype=np.float32)
            tiles.append(torch.from_numpy(normal))
        else:
            octets = bits.random_raw(-(-TILE * dim // 64)).astype("<u8").view(np.uint8)
            signs = np.unpackbits(octets, count=TILE * dim).reshape(TILE, dim)
            tiles.append(torch.from_numpy(signs))
    first = start // TILE * TILE
    whole = torch.cat(tiles)[start - first : stop - first] if tiles else torch.zeros(0, dim)
    return whole if kind == "gaussian" else whole.float().mul_(2).sub_(1)
