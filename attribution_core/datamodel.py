"""The datamodel: what a model would output, had its training weights been others.

    f̂(w) = base + (w − anchor) @ scores        w [n], f̂ [t], scores [n, t]

`scores[i, j] = ∂ output_j / ∂ weight_i` at `anchor`. If output j is a loss, a negative score means
that example i helps. Weight 1 is: counted once in the sum of training losses; 0 is: left out.
Every method of this package returns this object, and every application takes nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import named, summed
from attribution_core.disk.files import write_array, write_text

FORMAT = 1  # of the saved folder; another number is refused
OF_OUTPUTS = ("change", "weight_decay", "remainder")  # lists in meta with a number for each output


@dataclass(frozen=True)
class LinearDatamodel:
    """Outputs as an affine function of training weights: f̂(w) = base + (w − anchor) @ scores.

    Args:
        scores: [n, t], output units (nats for losses) per unit of training weight.
        base: [t], the outputs at `anchor`.
        anchor: [n], or one number for all; the weights at which the scores are derivatives.
        ids: [n] names of the examples, unique; the row numbers if not given.
        targets: [t] names of the outputs; the column numbers if not given.
        meta: how it was made: method, damping, seeds ... (anything that json can hold).
        parts: [k, n, t] what the scores are the sum of, e.g. one part a segment of training; see `part`.
        spread: [n, t] standard deviation of the scores over the runs that they are the mean of.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, ids that repeat.

    >>> f = LinearDatamodel([[-1.0], [2.0]], base=[5.0], anchor=1.0)
    >>> float(f.predict([1, 0])[0])          # without example 1
    3.0
    >>> float(f.without([1])[0])
    3.0
    """

    scores: NDArray[Any]
    base: NDArray[Any]
    anchor: NDArray[Any]
    ids: NDArray[Any] | None = None
    targets: NDArray[Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: NDArray[Any] | None = None
    spread: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        scores = np.asanyarray(self.scores)
        if scores.ndim != 2:
            raise ValueError(
                f"expected scores [n, t], got shape {scores.shape}; pass one column per output"
            )
        n, t = scores.shape
        base = np.atleast_1d(np.array(self.base, dtype=float))  # copies: nobody else's to change
        anchor = np.array(self.anchor, dtype=float)
        anchor = np.full(n, float(anchor)) if anchor.ndim == 0 else anchor
        ids = np.arange(n) if self.ids is None else np.asarray(self.ids)
        targets = np.arange(t) if self.targets is None else np.asarray(self.targets)
        for name, array, want in (
            ("base", base, t),
            ("anchor", anchor, n),
            ("ids", ids, n),
            ("targets", targets, t),
        ):
            if array.shape != (want,):
                raise ValueError(
                    f"expected {name} of shape ({want},) beside scores [n={n}, t={t}], got {array.shape}"
                )
        for name, extra, dims in (("parts", self.parts, 3), ("spread", self.spread, 2)):
            shape = np.shape(extra) if extra is not None else ()
            if extra is not None and (shape[-2:] != (n, t) or len(shape) != dims):
                raise ValueError(
                    f"expected {name} {'[k, n, t]' if dims == 3 else '[n, t]'} beside scores "
                    f"[n={n}, t={t}], got {shape}"
                )
        for name, array in (("base", base), ("anchor", anchor)):
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{name} is not finite at {np.flatnonzero(~np.isfinite(array))[:5]}"
                )
        sorted_already = n < 2 or (ids.dtype != object and bool((ids[1:] > ids[:-1]).all()))
        if not sorted_already and len(np.unique(ids)) != n:
            values, counts = np.unique(ids, return_counts=True)
            raise ValueError(
                f"expected unique ids, got {values[counts > 1][:5].tolist()} more than once"
            )
        bad = ~np.isfinite(scores).all(axis=1)
        if bad.any():
            raise ValueError(
                f"scores are not finite for {int(bad.sum())} of {n} examples, first ids "
                f"{ids[bad][:5].tolist()}; look at their loss, and raise the damping if it is fine"
            )
        for name, array in (
            ("scores", scores),
            ("base", base),
            ("anchor", anchor),
            ("ids", ids),
            ("targets", targets),
        ):
            object.__setattr__(self, name, array)

    def predict(self, weights: ArrayLike) -> NDArray[Any]:
        """Predicted outputs, [t] for weights [n] or [m, t] for weights [m, n]."""
        weights = weight_rows(weights, len(self.scores))
        return self.base + (weights - self.anchor) @ self.scores

    def rows(self, ids: Iterable[Any]) -> NDArray[np.intp]:
        """Row numbers of the given ids; KeyError names those that are unknown, a mask is refused."""
        return rows_of(ids, np.asarray(self.ids))

    def without(self, ids: Iterable[Any]) -> NDArray[Any]:
        """Predicted outputs [t] when the examples `ids` are left out (weight 0, the others at 1)."""
        weights = np.ones(len(self.scores))
        weights[self.rows(ids)] = 0.0
        return self.predict(weights)

    def grouped(self, groups: ArrayLike) -> LinearDatamodel:
        """Fold examples into groups [n]: a group's score is the sum of its members' scores.

        Exact, by linearity, for weights that a group shares; its members must share one anchor.

        Raises:
            ValueError: members of one group have different anchors.
        """
        names, index = named(groups, len(self.scores))
        folded = partial(summed, index=index, groups=len(names))
        anchor = np.zeros(len(names))
        anchor[index] = self.anchor
        if not np.allclose(anchor[index], self.anchor, rtol=1e-12, atol=0):
            raise ValueError(
                "members of one group have different anchors; group examples of one anchor, or re-anchor"
            )
        parts = None if self.parts is None else np.stack([folded(part) for part in self.parts])
        return replace(
            self, scores=folded(self.scores), anchor=anchor, ids=names, parts=parts, spread=None
        )

    def combine(self, matrix: ArrayLike, targets: Sequence[Any] | None = None) -> LinearDatamodel:
        """The datamodel of linear combinations of outputs: columns of `matrix` [t, k].

        >>> f = LinearDatamodel([[-1.0, 3.0]], base=[5.0, 7.0], anchor=1.0)
        >>> f.combine([[0.5], [0.5]]).scores.tolist()
        [[1.0]]
        """
        matrix = np.asarray(matrix, dtype=float)
        t = self.scores.shape[1]
        if matrix.ndim != 2 or matrix.shape[0] != t:
            raise ValueError(f"expected a matrix [t={t}, k], got {matrix.shape}")
        names = None if targets is None else np.asarray(targets)
        parts = None if self.parts is None else self.parts @ matrix
        return replace(
            self, scores=self.scores @ matrix, base=self.base @ matrix, targets=names, parts=parts,
            spread=None, meta=_meta_of([self.meta], lambda many: many[0] @ matrix),
        )  # fmt: skip

    def mean(self) -> LinearDatamodel:
        """The datamodel of the average output, one column."""
        t = self.scores.shape[1]
        return self.combine(np.full((t, 1), 1.0 / t), targets=["mean"])

    def at(self, anchor: ArrayLike) -> LinearDatamodel:
        """The same affine function, written around another anchor.

        >>> f = LinearDatamodel([[-1.0], [2.0]], base=[5.0], anchor=1.0).at(0.0)
        >>> f.base.tolist(), f.predict([1, 1]).tolist()
        ([4.0], [5.0])
        """
        point = np.broadcast_to(np.asarray(anchor, dtype=float), self.anchor.shape)
        return replace(self, base=self.predict(point), anchor=point.copy())

    def part(self, *which: int) -> LinearDatamodel:
        """The datamodel of some of its parts: segments of training that reproduce, say.

        Raises:
            ValueError: it has no parts.
        """
        if self.parts is None:
            raise ValueError(
                "expected a datamodel with parts, got one without; magic(segments=4) keeps some"
            )
        scores = self.parts[list(which)].sum(axis=0)
        return replace(self, scores=scores, parts=None, spread=None)

    def save(self, folder: str | Path) -> None:
        """Write scores.npy, base.npy, anchor.npy, ids.npy, targets.npy (parts.npy, spread.npy) and
        datamodel.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("scores", "base", "anchor", "ids", "targets", "parts", "spread"):
            if getattr(self, name) is None:
                (folder / f"{name}.npy").unlink(missing_ok=True)
                continue
            write_array(folder / f"{name}.npy", _typed(np.asarray(getattr(self, name))))
        text = json.dumps({"format": FORMAT, "meta": dict(self.meta)}, indent=1, default=plain)
        write_text(folder / "datamodel.json", text)

    @classmethod
    def load(cls, folder: str | Path, *, mmap: bool = True) -> LinearDatamodel:
        """Read a saved datamodel; the scores stay on disk (memory-mapped) unless mmap=False.

        Raises:
            FileNotFoundError: no datamodel there.
            ValueError: files that are damaged, missing or of another format.
        """
        folder = Path(folder)
        if not (folder / "datamodel.json").exists():
            raise FileNotFoundError(
                f"no datamodel in {folder} (datamodel.json is missing); was it saved there?"
            )
        try:
            head = json.loads((folder / "datamodel.json").read_text(encoding="utf-8"))
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}, this version reads {FORMAT}")
            arrays = {
                name: np.load(folder / f"{name}.npy")
                for name in ("base", "anchor", "ids", "targets")
            }
            mode: Any = "r" if mmap else None
            scores = np.load(folder / "scores.npy", mmap_mode=mode)
            for name in ("parts", "spread"):
                if (folder / f"{name}.npy").exists():
                    arrays[name] = np.load(folder / f"{name}.npy", mmap_mode=mode)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"cannot read {folder} ({error}); save the datamodel again") from None
        return cls(scores=scores, meta=head["meta"], **arrays)


def _typed(array: NDArray[Any]) -> NDArray[Any]:
    """An array that can be saved: objects as the numbers they are, else as text."""
    if array.dtype != object:
        return array
    numbers = all(isinstance(value, (int, float, np.number)) for value in array)
    found = np.array(array.tolist()) if numbers else array.astype(str)
    return array.astype(str) if found.dtype == object else found  # whole numbers beyond 64 bits


def plain(value: Any) -> Any:
    """What json writes for numpy's numbers and arrays, and for anything else its name."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def weight_rows(weights: ArrayLike, n: int) -> NDArray[np.float64]:
    """Weights [n], or [m, n], as an array of that shape."""
    found = np.asarray(weights, dtype=float)
    if found.ndim not in (1, 2) or found.shape[-1] != n:
        raise ValueError(
            f"expected weights [n={n}] or [m, n={n}], got {found.shape}; one weight per example"
        )
    return found


def rows_of(ids: Iterable[Any], known: NDArray[Any]) -> NDArray[np.intp]:
    """Where the ids stand among the known ones; KeyError names those that do not, a mask is refused."""
    wanted = np.asarray(list(ids))
    if wanted.dtype == bool and known.dtype != bool:  # would be read as 1 and 0
        raise ValueError(
            f"expected ids like {known[:3].tolist()}, got a mask of {len(wanted)}; give ids[mask]"
        )
    order = np.argsort(known, kind="stable")
    place = np.clip(np.searchsorted(known, wanted, sorter=order), 0, len(known) - 1)
    found = order[place]
    unknown = known[found] != wanted
    if unknown.any():
        raise KeyError(
            f"unknown ids {wanted[unknown][:5].tolist()}; known ones look like {known[:3].tolist()}"
        )
    return found


def columns(names: NDArray[Any] | None, wanted: NDArray[Any] | None, t: int) -> NDArray[np.intp]:
    """Where the outputs `wanted` stand among outputs `names`, [t]; each at its place if one side has no names.

    Raises:
        ValueError: other names; names that repeat, in another order.
    """
    if _numbered(names) or _numbered(wanted):
        return np.arange(t)
    have, want = ([str(name) for name in np.asarray(side)] for side in (names, wanted))
    if have == want:
        return np.arange(t)
    if sorted(have) != sorted(want) or len(set(have)) < t:
        raise ValueError(
            f"expected outputs {want[:5]}, got {have[:5]}; bring both to the same outputs (`combine`)"
        )
    place = {name: j for j, name in enumerate(have)}
    return np.array([place[name] for name in want], dtype=np.intp)


def _numbered(names: NDArray[Any] | None) -> bool:
    """Whether outputs have no names but their numbers."""
    if names is None:
        return True
    held = np.asarray(names)
    return held.dtype.kind in "iu" and np.array_equal(held, np.arange(len(held)))


def average(datamodels: Sequence[LinearDatamodel]) -> LinearDatamodel:
    """The mean of datamodels of the same examples and targets, e.g. over training seeds, with its spread.

    Raises:
        ValueError: none given, or they differ in examples, targets or anchor.
    """
    if not datamodels:
        raise ValueError("expected at least one datamodel to average, got none")
    first = datamodels[0]
    for other in datamodels[1:]:
        for name in ("ids", "targets", "anchor"):
            if not np.array_equal(getattr(first, name), getattr(other, name)):
                raise ValueError(
                    f"datamodels with different {name} cannot be averaged; bring them to one first"
                )
    scores = np.mean([f.scores for f in datamodels], axis=0)
    base = np.mean([f.base for f in datamodels], axis=0)
    split = [f.parts for f in datamodels if f.parts is not None]
    return replace(
        first,
        scores=scores,
        base=base,
        meta={
            **_meta_of([f.meta for f in datamodels], lambda many: many.mean(0)),
            "averaged": len(datamodels),
        },
        parts=np.mean(split, axis=0) if len(split) == len(datamodels) else None,
        spread=np.std([f.scores for f in datamodels], axis=0, ddof=1)
        if len(datamodels) > 1
        else None,
    )


def _meta_of(
    several: Sequence[Mapping[str, Any]], combined: Callable[[NDArray[Any]], NDArray[Any]]
) -> dict[str, Any]:
    """The first meta; what it says of each output goes with the outputs, and a ratio of such is left out."""
    lost = ("relative_remainder", "prior_scale")
    kept = {name: value for name, value in several[0].items() if name not in lost}
    for name in (name for name in OF_OUTPUTS if isinstance(kept.get(name), list)):
        lists = [meta.get(name) for meta in several]
        if all(isinstance(one, list) for one in lists):
            kept[name] = combined(np.array(lists, dtype=float)).tolist()
        else:
            del kept[name]
    return kept
