"""Training and target data: anything that gives a batch of tensors for a list of row numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Batch = dict[str, Tensor] | tuple[Tensor, ...]
Column = str | int  # of the data: a key, or a place in the tuple
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # tqdm fits


@runtime_checkable
class Data(Protocol):
    """Anything with a length that gives a batch of tensors for a list of row numbers."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Columns:
    """A dict or a tuple of tensors as `Data`: rows are taken along the first dimension."""

    columns: Batch

    def __len__(self) -> int:
        return len(next(iter(tensors_in(self.columns))))

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        if isinstance(self.columns, dict):
            return {name: column[rows] for name, column in self.columns.items()}
        return tuple(column[rows] for column in self.columns)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of other data, in the order given."""

    data: Data
    rows: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int]) -> Any:
        return self.data[self.rows[np.asarray(rows, dtype=int)].tolist()]


def as_data(data: Any) -> Data:
    """Adapt a dict or tuple of tensors, a TensorDataset or a datasets.Dataset to `Data`.

    Raises:
        TypeError: it has no length, or `data[[0]]` is not a dict or tuple of tensors.
        ValueError: it has no rows, no columns, or columns of different lengths.
    """
    if isinstance(data, (Mapping, list, tuple)) and not data:
        raise ValueError("expected columns, one for inputs or more, got none")
    if isinstance(data, Mapping) and any(hasattr(part, "column_names") for part in data.values()):
        raise TypeError(f"expected one data set, got several: {list(data)}; take one of them")
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        raise TypeError(
            "expected columns, got a list of rows; use datasets.Dataset.from_list(rows), or stack them"
        )
    if isinstance(data, Mapping):
        data = Columns({name: _column(name, column) for name, column in data.items()})
    elif isinstance(data, (tuple, list)):
        data = Columns(tuple(_column(place, column) for place, column in enumerate(data)))
    elif isinstance(getattr(data, "format", None), Mapping) and data.format.get("type") != "torch":
        data = data.with_format("torch")
    if isinstance(data, Columns) and len({len(c) for c in tensors_in(data.columns)}) > 1:
        raise ValueError(
            f"expected columns of one length, got {[len(c) for c in tensors_in(data.columns)]}; one row per example"
        )
    if not isinstance(data, Data):
        raise TypeError(f"expected data with a length and data[[rows]] -> batch, got {type(data)}")
    if len(data) == 0:
        raise ValueError("expected at least one example, got empty data")
    try:
        first = data[[0]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise TypeError(
            f"expected data[[0]] to be a dict or tuple of tensors, got {type(error).__name__}: {error}; "
            "pass a dict of tensors, or give your class a __getitem__ that takes a list of rows"
        ) from error
    if not any(isinstance(value, Tensor) for value in _values(first)):
        raise TypeError(
            f"expected data[[0]] to be a dict or tuple of tensors, got {type(first)}; "
            "use a dict of tensors, a TensorDataset, or dataset.with_format('torch')"
        )
    return data


def _column(name: Any, column: Any) -> Tensor:
    """A column of numbers as a tensor, in the order of its rows; memory is shared where it can be.

    Raises:
        TypeError: no numbers.
        ValueError: one number for all rows.
    """
    try:
        found = _as_tensor(column)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(column, "dtype", type(column).__name__)
        raise TypeError(
            f"expected numbers in column {name!r}, got {kind}: {error}; number categories (np.unique(column, "
            "return_inverse=True)[1]), pad rows of different lengths, and leave out what is no number"
        ) from None
    if found.ndim == 0:
        raise ValueError(f"expected a row for every example in column {name!r}, got one number")
    return found


def _as_tensor(column: Any) -> Tensor:
    """A tensor of numbers in rows: of plain Python's in torch's default dtype, of arrays' and tables' in their own."""
    if not (hasattr(column, "dtype") or hasattr(column, "to_numpy")):
        try:
            return torch.as_tensor(column)
        except (TypeError, ValueError, RuntimeError):
            pass  # for example a list of vectors
    if isinstance(column, Tensor):
        return column
    array = np.asarray(column)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of arrays that are read only: so are columns
        return torch.as_tensor(array.copy() if min(array.strides, default=0) < 0 else array)


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def tensors_in(batch: Any) -> list[Tensor]:
    """The columns of a batch that are tensors."""
    return [value for value in _values(batch) if isinstance(value, Tensor)]


def take(data: Data, rows: ArrayLike, device: torch.device | None = None) -> Batch:
    """The rows of `data` as a batch of tensors on `device`; columns of a dict that are no tensors are left out.

    Raises:
        ValueError: rows of different lengths; something else than tensors in a tuple or list.
    """
    batch = data[np.asarray(rows, dtype=int).tolist()]
    if isinstance(batch, Mapping):
        ragged = [k for k, v in batch.items() if isinstance(v, list) and isinstance(v[0], Tensor)]
        if ragged:
            raise ValueError(
                f"expected one tensor per column, got rows of different lengths in {ragged}; pad them, "
                "or remove the columns"
            )
        return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    found = tensors_in(batch)
    if isinstance(batch, (tuple, list)) and len(found) < len(batch):
        other = next(k for k, value in enumerate(batch) if not isinstance(value, Tensor))
        raise ValueError(
            f"expected tensors in all {len(batch)} places of a batch, got {type(batch[other]).__name__} in place {other}; leave "
            "it out of the data, for places are counted, or give a dict"
        )
    return tuple(v.to(device) for v in found)


def replaced(batch: Batch, column: Column, values: Tensor) -> Batch:
    """A batch with other values in one column.

    >>> replaced((torch.zeros(1), torch.ones(1)), 0, torch.ones(1))
    (tensor([1.]), tensor([1.]))
    """
    if isinstance(batch, dict):
        return {**batch, str(column): values}
    return tuple(values if place == column else old for place, old in enumerate(batch))


def floating_column(data: Data, column: Column | None = None) -> Column:
    """The column of the data that can be differentiated by: the first floating one, unless named.

    Raises:
        ValueError: none, or the one named is not.
    """
    batch: Any = take(data, [0])
    columns = dict(batch) if isinstance(batch, dict) else dict(enumerate(batch))
    floating = [name for name, value in columns.items() if value.is_floating_point()]
    if column is None and floating:
        return floating[0]
    if column is None or column not in floating:
        raise ValueError(
            f"expected a column of floating numbers to differentiate by, one of {floating}, got {column!r}; "
            "token ids have no derivative: add a column of zeros that the loss adds to the embeddings "
            "(causal_lm_loss reads 'embedding_shift')"
        )
    return column


def row_numbers(rows: ArrayLike, n: int, *, once: bool = False) -> NDArray[np.intp]:
    """Rows given as numbers of 0 .. n − 1, checked: a mask would be read as rows 0 and 1.

    Raises:
        ValueError: no whole numbers, some outside, or, with `once`, some twice.

    >>> row_numbers([2, 0], 3)
    array([2, 0])
    """
    found = np.atleast_1d(np.asarray(rows))
    expected = f"expected {'different rows' if once else 'rows'} of 0 to {n - 1}"
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise ValueError(
            f"{expected}, got {found.dtype} of shape {found.shape}; give np.flatnonzero of a mask"
        )
    found = found.astype(int)  # an empty list is one of floats
    wrong = (found < 0) | (found >= n)
    if once and not wrong.any():
        wrong = np.bincount(found, minlength=n)[found] > 1
    if wrong.any():
        raise ValueError(f"{expected}, got {found[wrong][:10].tolist()}")
    return found


def checked_weights(
    weights: ArrayLike | None, n: int, *, some: bool = False
) -> NDArray[np.float64]:
    """Training weights [n] as an array of their own; 1 where none are given.

    Raises:
        ValueError: another number of them; some that are negative, NaN or infinite; with `some`, none above 0.
    """
    w = np.ones(n) if weights is None else np.array(weights, dtype=float)
    if w.shape != (n,):
        raise ValueError(f"expected one weight per training example, [n={n}], got {w.shape}")
    bad = np.flatnonzero(~(np.isfinite(w) & (w >= 0)))
    if len(bad):
        raise ValueError(
            f"expected finite weights >= 0, got {w[bad][:5].tolist()} for rows {bad[:5].tolist()}; use 0 to drop an example"
        )
    if some and not w.any():
        raise ValueError("expected a row of positive weight, got weight 0 for every example")
    return w


def rows_in(batch: Batch) -> int:
    """How many rows a batch has."""
    return len(tensors_in(batch)[0])


def batches(n: int | ArrayLike, size: int) -> Iterator[np.ndarray]:
    """Row numbers 0..n−1 (or the rows given) in order, `size` at a time."""
    rows = np.arange(n) if isinstance(n, (int, np.integer)) else np.asarray(n, dtype=int)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def sample(n: int, size: int | None, seed: int = 0) -> NDArray[np.intp]:
    """All n row numbers, or `size` of them drawn without replacement, in order."""
    if size is None or size >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size, replace=False))


def named(groups: ArrayLike, n: int) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """(names of the groups, which of them each of n examples is in)."""
    labels = np.asarray(groups)
    if labels.shape != (n,) or n == 0:
        raise ValueError(f"expected one group label per example, [n={n}], got {labels.shape}")
    if lost := unlabelled(groups):
        raise ValueError(
            f"expected a group label for every example, got none for {lost[:10]}; name them, "
            "for example by one label for all that have none"
        )
    return np.unique(labels, return_inverse=True)


def summed(rows: NDArray[Any], index: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    """The rows of each group added up, [groups, ...]; see `named` for the index.

    >>> summed(np.array([1, 2, 4]), np.array([0, 1, 0]), 2)
    array([5., 2.])
    """
    total = np.zeros((groups, *rows.shape[1:]), dtype=np.result_type(rows.dtype, float))
    np.add.at(total, index, rows)
    return total


def numbers_of(
    data: Data, rows: NDArray[np.intp], column: Column
) -> tuple[NDArray[np.intp], NDArray[np.float64], list[int]]:
    """Every number of a column in some rows: (row · numbers of a row + place, the numbers, the column's shape)."""
    batch: Any = take(data, rows)
    values = batch[column].flatten(1).double().cpu().numpy()
    ids = rows[:, None] * values.shape[1] + np.arange(values.shape[1])
    return ids.ravel(), values.ravel(), list(batch[column].shape)


def unlabelled(labels: ArrayLike) -> list[int]:
    """The places of labels that are missing: None, or one of the ways of numpy and pandas to say so."""

    def is_missing(label: Any) -> bool:
        nan = isinstance(label, float) and math.isnan(label)
        of_pandas = type(label).__name__ in ("NAType", "NaTType")
        return label is None or nan or of_pandas or label != label

    given = labels if isinstance(labels, (list, tuple)) else np.asarray(labels).tolist()
    return [k for k, label in enumerate(given) if is_missing(label)]


@dataclass(frozen=True)
class Sized:
    """An iterable that knows its length, for progress bars."""

    items: Iterable[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)
