"""One table of every row that could be handed in, of which a training set takes some.

A changed label, a changed input, a row that is brought in or left out: each is a choice of training weights over
this table, so that a datamodel predicts it and a retraining checks it like any other choice of data.

    rows     0: as is    1: as is    2: as is    ...
             0: label 1  1: label 0  2: label 0            one version of each row at most has weight 1

Versions of a row stand side by side. A training that removes rows of weight 0 therefore meets the same places in
the same order whichever version is taken: runs with the same seed are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from applied.audit.threat import Change
from attribution_core.data import Batch, Column, Data, Rows, as_data, batches, replaced, take
from attribution_core.problem import Problem


@dataclass(frozen=True, eq=False)
class Versions:
    """A problem whose training rows are versions of other rows.

    Args:
        problem: N rows; the model and the loss of the problem that it was made of.
        row: [N], which original row each is a version of; rows brought in are numbered from n on.
        clean: [N], 0 or 1, the weights of the data as they are.
        kind: what its versions differ in: labels, inputs, or rows that are brought in; None where unknown.
    """

    problem: Problem
    row: NDArray[np.intp]
    clean: NDArray[np.float64]
    kind: Change | None = None

    @property
    def n(self) -> int:
        """How many rows the data have as they are."""
        return int(self.clean.sum())

    def current(self, weights: NDArray[np.float64]) -> NDArray[np.intp]:
        """[rows], the place in the table of each row's version in these weights; −1 where it is left out."""
        places = np.full(int(self.row.max()) + 1, -1)
        there = np.flatnonzero(weights > 0)
        places[self.row[there]] = there
        return places

    def take(self, weights: NDArray[np.float64]) -> Problem:
        """The problem whose training data are the rows of positive weight."""
        return replace(self.problem, train=Rows(self.problem.train, np.flatnonzero(weights > 0)))


@dataclass(frozen=True, eq=False)
class _Relabelled:
    """Row i · classes + c is row i with label c."""

    data: Data
    column: Column  # of the labels
    classes: int

    def __len__(self) -> int:
        return len(self.data) * self.classes

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        places = np.asarray(rows, dtype=int)
        batch: Any = take(self.data, places // self.classes)
        labels = torch.from_numpy(places % self.classes)
        return replaced(batch, self.column, labels.to(batch[self.column]))


@dataclass(frozen=True, eq=False)
class _Joined:
    """Rows of one data set, then those of another with the same columns; columns may be replaced in the latter."""

    first: Data
    second: Data

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        places = np.asarray(rows, dtype=int)
        old = places < len(self.first)
        order = np.argsort(np.r_[np.flatnonzero(old), np.flatnonzero(~old)])
        parts = [
            take(data, some)
            for data, some in (
                (self.first, places[old]),
                (self.second, places[~old] - len(self.first)),
            )
            if len(some)
        ]
        if len(parts) == 1:
            return parts[0]
        first: Any = parts[0]
        second: Any = parts[1]
        if isinstance(first, dict):
            return {k: torch.cat([v, second[k].to(v)])[order] for k, v in first.items()}
        return tuple(torch.cat([a, b.to(a)])[order] for a, b in zip(first, second, strict=True))


def labels_of(data: Any, column: Column | None = None) -> tuple[Column, NDArray[np.int64]]:
    """(the column of the labels, labels [n]) of a classification's data.

    Raises:
        ValueError: no column of one integer a row.
    """
    data = as_data(data)
    first: Any = take(data, [0])
    last: Column = "labels" if isinstance(first, dict) else len(first) - 1
    name = last if column is None else column
    names = list(first) if isinstance(first, dict) else range(len(first))
    values = first[name] if name in names else None
    if values is None or values.ndim != 1 or values.is_floating_point():
        raise ValueError(
            f"expected labels, one integer a row, in column {name!r}, got "
            f"{'no such column' if values is None else f'{values.dtype} of shape {tuple(values.shape)}'}; name it"
        )
    blocks: list[Any] = [take(data, rows) for rows in batches(len(data), 1024)]
    found = [block[name] for block in blocks]
    return name, torch.cat(found).cpu().numpy().astype(np.int64)


def relabelled(
    problem: Problem, classes: int | None = None, column: Column | None = None
) -> Versions:
    """Every row with every label.

    Args:
        classes: how many labels there are, 0 .. classes − 1; by default as many as the data hold.
        column: of the labels; by default the last, or "labels".

    Raises:
        ValueError: no labels, labels out of range, fewer than two classes.
    """
    name, labels = labels_of(problem.train, column)
    count = int(labels.max()) + 1 if classes is None else classes
    if count < 2 or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"expected labels 0 .. classes − 1 with classes={count} >= 2, got labels {labels.min()} to {labels.max()}"
        )
    clean = np.zeros(problem.n * count)
    clean[np.arange(problem.n) * count + labels] = 1.0
    table = replace(problem, train=_Relabelled(problem.train, name, count))
    return Versions(table, np.repeat(np.arange(problem.n), count), clean, "labels")


def rewritten(
    problem: Problem, rows: ArrayLike, inputs: ArrayLike, column: Column
) -> tuple[Versions, NDArray[np.intp]]:
    """(the rows as they are and with other inputs, places [m] of the new versions in the table).

    Args:
        rows: [m], a row may come several times.
        inputs: [m, ...], what stands in `column` of each.
    """
    places = np.asarray(rows, dtype=int)
    batch: Any = take(problem.train, places)
    values = torch.from_numpy(np.asarray(inputs)).to(batch[column])
    return _sorted(problem, replaced(batch, column, values), places, "inputs")


def joined(problem: Problem, pool: Any) -> tuple[Versions, NDArray[np.intp]]:
    """(the rows and after them a pool's, of weight 0; places of the pool's rows in the table)."""
    pool = as_data(pool)
    _refuse_other_columns(take(problem.train, [0]), take(pool, [0]))
    return _sorted(problem, pool, np.arange(problem.n, problem.n + len(pool)), "rows")


def _refuse_other_columns(first: Any, second: Any) -> None:
    """Raise where a pool's columns are not those of the data."""

    def columns(batch: Any) -> dict[Any, tuple[Any, ...]]:
        items = batch.items() if isinstance(batch, dict) else enumerate(batch)
        return {
            name: (tuple(x.shape[1:]), "numbers" if x.is_floating_point() else "whole numbers")
            for name, x in items
        }

    expected, got = columns(first), columns(second)
    if expected != got:
        raise ValueError(f"expected a pool with the columns of the data, {expected}, got {got}")


def _sorted(
    problem: Problem, new: Any, row: NDArray[np.intp], kind: Change
) -> tuple[Versions, NDArray[np.intp]]:
    """Old rows and new ones in one table, versions of a row side by side, the old one first."""
    both = _Joined(problem.train, as_data(new))
    of = np.r_[np.arange(problem.n), row]
    order = np.argsort(of, kind="stable")
    places = np.argsort(order)[problem.n :]
    clean = (order < problem.n).astype(float)
    return Versions(replace(problem, train=Rows(both, order)), of[order], clean, kind), places
