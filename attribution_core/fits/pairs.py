"""A datamodel with products of training weights: how the effect of one example depends on another.

    f̂(w) = base + (w − anchor) @ scores + Σ_k φ_k(w) pair_scores[k]          φ_k = u_A · u_B

with u = w − anchor. For two examples φ is the product of theirs; for two groups, of the groups' means; for
one group with itself, the mean product over its unordered pairs of different members. So f̂ is multilinear:
affine in every single weight, and what it says of random subsets kept with probability p is f̂(p · 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import named
from attribution_core.datamodel import LinearDatamodel

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of groups of examples; an example is a group of one where no groups were given.

    Args:
        pairs: [k, 2] numbers of the groups.
        index: [n] which group each example is in.
        names: [g] of the groups.
    """

    pairs: NDArray[np.intp]
    index: NDArray[np.intp]
    names: NDArray[Any]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, Any]], n: int, groups: ArrayLike | None = None) -> Pairs:
        """Pairs given as labels (row numbers without groups).

        Raises:
            ValueError: unknown labels; pairs that repeat; a pair of one example with itself.
        """
        names, index = (np.arange(n), np.arange(n)) if groups is None else named(groups, n)
        number = {name: k for k, name in enumerate(names.tolist())}
        found: list[tuple[int, int]] = []
        for pair in pairs:
            ends = [end.item() if isinstance(end, np.generic) else end for end in pair]
            if len(ends) != 2 or any(end not in number for end in ends):
                what = (
                    f"rows 0 to {n - 1}" if groups is None else f"groups {names[:5].tolist()} ..."
                )
                raise ValueError(f"expected pairs of {what}, got {tuple(ends)}")
            first, second = sorted(number[end] for end in ends)
            if first == second and (index == first).sum() < 2:
                raise ValueError(
                    f"expected a pair of different examples, got {tuple(ends)}; one example's product "
                    "with itself is not multilinear"
                )
            found.append((first, second))
        if not found or len(set(found)) < len(found):
            raise ValueError("expected at least one pair, each once (in either order)")
        return cls(np.array(found, dtype=np.intp), index, names)

    @property
    def sizes(self) -> NDArray[np.intp]:
        """[g] members of each group."""
        return np.bincount(self.index, minlength=len(self.names))

    def _sums(self, u: Array) -> Array:
        """Sums over groups [..., g] of u [..., n]."""
        order = np.argsort(self.index, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        return np.add.reduceat(u[..., order], starts, axis=-1)

    def products(self, u: Array) -> Array:
        """φ [..., k] of centred weights u [..., n]."""
        a, b = self.pairs.T
        size = self.sizes.astype(float)
        total = self._sums(u)
        within = a == b
        found = total[..., a] / size[a] * (total[..., b] / size[b])
        if within.any():
            same = a[within]
            square = self._sums(u * u)[..., same]
            number = size[same] * (size[same] - 1)
            found[..., within] = (total[..., same] ** 2 - square) / number
        return found

    def slopes(self, u: Array, pair_scores: Array) -> Array:
        """Σ_k ∂φ_k/∂u_i · pair_scores[k], [n, t], at centred weights u [n]."""
        a, b = self.pairs.T
        size = self.sizes.astype(float)
        mean = self._sums(u) / size
        within = a == b
        found = np.zeros((len(self.names), pair_scores.shape[1]))
        across = pair_scores[~within]
        for one, other in ((a, b), (b, a)):
            one, other = one[~within], other[~within]
            np.add.at(found, one, (mean[other] / size[one])[:, None] * across)
        out = found[self.index]
        own = np.zeros_like(found)
        same = a[within]
        np.add.at(own, same, (2 / (size[same] * (size[same] - 1)))[:, None] * pair_scores[within])
        rest = (mean * size)[self.index] - u  # of the other members
        return out + rest[:, None] * own[self.index]


@dataclass(frozen=True)
class PairDatamodel:
    """Outputs as a multilinear function of training weights, with chosen second-order terms.

    Args:
        scores: [n, t] derivatives at the anchor.
        base: [t] outputs at the anchor.
        anchor: [n].
        pairs: [k, 2] labels of the pairs: row numbers, or groups.
        pair_scores: [k, t], output units per product of two weights (or of two groups' mean weights).
        groups: [n] labels of the groups; None where pairs are of examples.
        ids, targets, meta: as of a LinearDatamodel.

    >>> f = PairDatamodel([[1.0], [2.0]], [0.0], [0.0, 0.0], [(0, 1)], [[4.0]])
    >>> float(f.predict([1, 1])[0])
    7.0
    >>> f.gradient_at(0.5).tolist()          # the Shapley values of this game of two
    [[3.0], [4.0]]
    """

    scores: NDArray[Any]
    base: NDArray[Any]
    anchor: NDArray[Any]
    pairs: NDArray[Any]
    pair_scores: NDArray[Any]
    groups: NDArray[Any] | None = None
    ids: NDArray[Any] | None = None
    targets: NDArray[Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        linear = LinearDatamodel(self.scores, self.base, self.anchor, self.ids, self.targets)
        for name in ("scores", "base", "anchor", "ids", "targets"):
            object.__setattr__(self, name, getattr(linear, name))
        values, labels = np.asarray(self.pair_scores, dtype=float), np.asarray(self.pairs)
        want = (len(labels), len(linear.base))
        if values.shape != want or not np.isfinite(values).all():
            raise ValueError(
                f"expected finite pair_scores [k={want[0]}, t={want[1]}], got {values.shape}"
            )
        groups = None if self.groups is None else np.asarray(self.groups)
        found = Pairs.of([tuple(pair) for pair in labels.tolist()], len(linear.scores), groups)
        for name, value in (("pair_scores", values), ("pairs", labels), ("groups", groups)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_pairs", found)
        object.__setattr__(self, "_linear", linear)

    @classmethod
    def of(cls, linear: LinearDatamodel, pairs: Pairs, pair_scores: Array) -> PairDatamodel:
        """A linear datamodel and the scores [k, t] of pairs."""
        alone = (
            len(pairs.names) == len(pairs.index)
            and (pairs.names == np.arange(len(pairs.names))).all()
        )
        groups = None if alone else pairs.names[pairs.index]
        return cls(
            linear.scores, linear.base, linear.anchor, pairs.names[pairs.pairs], pair_scores, groups,
            linear.ids, linear.targets, linear.meta,
        )  # fmt: skip

    @property
    def linear(self) -> LinearDatamodel:
        """The first-order part: the tangent at the anchor."""
        return LinearDatamodel(
            self.scores, self.base, self.anchor, self.ids, self.targets, self.meta
        )

    def predict(self, weights: ArrayLike) -> NDArray[Any]:
        """Predicted outputs, [t] for weights [n] or [m, t] for weights [m, n]."""
        w = np.asarray(weights, dtype=float)
        return self.linear.predict(w) + self._terms.products(w - self.anchor) @ self.pair_scores

    def gradient_at(self, p: ArrayLike) -> Array:
        """∂f̂/∂w [n, t] at weights p (a number for all, or [n]): expected marginal effects when every

        other example is kept with probability p. The mean over p in [0, 1], the Shapley values, is the
        gradient at 1/2.
        """
        u = np.broadcast_to(np.asarray(p, dtype=float), self.anchor.shape) - self.anchor
        return self.scores + self._terms.slopes(u, self.pair_scores)

    @property
    def _terms(self) -> Pairs:
        return self.__dict__["_pairs"]
