"""Several outputs read off one model: losses beside accuracies, one set of rows beside another."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution_core.calling import PerExample
from attribution_core.data import Batch, Data, take
from attribution_core.problem import Outputs

LARGEST = 2**27  # rows · targets of joined averages: 1 GiB
PART = "part_of_outputs"  # the column that says which part a row is of; of a tuple the last


def join_outputs(parts: Mapping[str, Outputs]) -> Outputs:
    """One set of outputs from several, so that each training is done once and read in every way.

        f = (f_1, f_2, ...),    targets in the order of the parts

    A part of one target gives it its name, a part of several "part: target". Where every part has a target for each
    of its rows, so has the whole, and nothing is named. `split_outputs` takes values apart again.

    Args:
        parts: name -> outputs, whose batches have the same columns, of the same shapes but for the rows. Where their
            functions differ, each is computed for all rows of a batch, and has to be finite there, too.

    Raises:
        ValueError: no parts; columns that differ; averages beside a target for each of thousands of rows.

    >>> rows = torch.eye(2), torch.tensor([0, 1])
    >>> first = Outputs(lambda model, batch: model(batch[0])[:, 0], rows)
    >>> total = Outputs(lambda model, batch: model(batch[0]).sum(1), rows)
    >>> both = join_outputs({"first": first.mean(), "total": total.mean()})
    >>> both.names, both.evaluate(nn.Linear(2, 2, bias=False).apply(lambda m: nn.init.ones_(m.weight))).tolist()
    (('first', 'total'), [1.0, 2.0])
    """
    if not parts:
        raise ValueError("expected outputs to join, a name for each, got none")
    several = list(parts.values())
    alone = {name: parts_of(some) for name, some in parts.items()}  # of what was joined before
    _refuse_other_columns({name: one for name, inner in alone.items() for one in inner})
    inner = [one for some in alone.values() for one in some]
    functions = {_identity(one.function): one.function for one in inner}
    places = {identity: k for k, identity in enumerate(functions)}
    which = tuple(places[_identity(one.function)] for one in inner)
    function = _Chosen(tuple(functions.values()), which)
    data = _Joined(tuple(one.data for one in inner))
    if all(some.matrix is None for some in several):
        return Outputs(function, data)
    _refuse_large(several)
    names = [name for part, some in parts.items() for name in _names(part, some)]
    return Outputs(function, data, torch.block_diag(*map(_matrix, several)), tuple(names))


def split_outputs(values: NDArray[Any], parts: Mapping[str, Outputs]) -> dict[str, NDArray[Any]]:
    """Values [..., t] of joined outputs by part, [..., targets of the part] each.

    Raises:
        ValueError: another number of targets.
    """
    sizes = [len(some) for some in parts.values()]
    if values.shape[-1] != sum(sizes):
        raise ValueError(
            f"expected values of {sum(sizes)} targets, those of {dict(zip(parts, sizes, strict=True))}, got {values.shape}"
        )
    cut = np.split(values, np.cumsum(sizes)[:-1], axis=-1)
    return dict(zip(parts, cut, strict=True))


def parts_of(outputs: Outputs) -> list[Outputs]:
    """The outputs that were joined, without their averages; these as they are, where none were."""
    function, data = outputs.function, outputs.data
    if not (isinstance(function, _Chosen) and isinstance(data, _Joined)):
        return [outputs]
    pairs = zip(function.which, data.parts, strict=True)
    return [Outputs(function.functions[k], some) for k, some in pairs]


@dataclass(frozen=True, eq=False)
class _Joined:
    """Rows of several data sets, one after the other, with a column that says which they are of."""

    parts: tuple[Data, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        ends = np.cumsum([len(some) for some in self.parts])
        which = np.searchsorted(ends, rows, side="right")
        own = np.asarray(rows, dtype=int) - (ends - [len(some) for some in self.parts])[which]
        there = np.unique(which)
        batches: list[Any] = [take(self.parts[k], own[which == k]) for k in there]
        back = np.argsort(np.argsort(which, kind="stable"))  # from part by part to the rows' order
        part = torch.from_numpy(which)
        if isinstance(batches[0], dict):
            columns = {k: _stacked([batch[k] for batch in batches])[back] for k in batches[0]}
            return {**columns, PART: part}
        return (*(_stacked(column)[back] for column in zip(*batches, strict=True)), part)


@dataclass(frozen=True)
class _Chosen:
    """One of several functions for each row, as its last column says."""

    functions: tuple[PerExample, ...]
    which: tuple[int, ...]  # of each part

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            part: Tensor = batch[PART]
            own: Any = {k: x for k, x in batch.items() if k != PART}
        else:
            *columns, part = batch
            own = tuple(columns)
        values = [function(model, own) for function in self.functions]
        if len({value.requires_grad for value in values}) > 1:
            raise ValueError(
                "expected joined outputs that all have a derivative by the parameters, or none, got some of either "
                "(an accuracy beside a loss); join those that have one by themselves for this, the others for retraining"
            )
        chosen = torch.tensor(self.which, device=part.device)[part]
        found = values[0]
        for k, value in enumerate(values[1:], 1):
            found = torch.where(chosen == k, value, found)
        return found


def _stacked(column: Sequence[Tensor]) -> Tensor:
    """A column of several batches, one below the other."""
    if len({x.shape[1:] for x in column}) > 1:
        raise ValueError(
            f"expected rows of one size, got {[tuple(x.shape[1:]) for x in column]} in parts of joined outputs; pad the rows of "
            "all parts to one length"
        )
    return torch.cat(list(column))


def _refuse_large(several: Sequence[Outputs]) -> None:
    """Raise where the matrix that makes targets of rows would be mostly zeros, and large."""
    rows, targets = (sum(map(len, some)) for some in ([x.data for x in several], several))
    if rows * targets > LARGEST:
        raise ValueError(
            f"expected joined outputs of few targets where some are averages, got {targets:,} of {rows:,} rows: join what has "
            "a target for each of its rows by itself"
        )


def _identity(function: PerExample) -> tuple[int, ...]:
    """What tells functions apart; a method is another object each time it is named."""
    if isinstance(function, types.MethodType):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def _matrix(outputs: Outputs) -> Tensor:
    """What makes targets of rows, [rows, targets]."""
    return torch.eye(len(outputs)).double() if outputs.matrix is None else outputs.matrix


def _names(part: str, outputs: Outputs) -> list[str]:
    """What the targets of a part are called."""
    if len(outputs) == 1:
        return [part]
    return [f"{part}: {name}" for name in outputs.names or range(len(outputs))]


def _refuse_other_columns(parts: Mapping[str, Outputs]) -> None:
    """Raise where the batches of one part cannot stand beside those of another."""

    def columns(outputs: Outputs) -> dict[Any, tuple[tuple[int, ...], torch.dtype]]:
        batch: Any = take(outputs.data, [0])
        found = batch if isinstance(batch, dict) else dict(enumerate(batch))
        return {name: (tuple(x.shape[1:]), x.dtype) for name, x in found.items()}

    (first, one), *others = parts.items()
    for name, some in others:
        if columns(some) != columns(one):
            raise ValueError(
                f"expected the same columns in all outputs that are joined, got {columns(one)} in {first!r} and {columns(some)} "
                f"in {name!r} (size and type of a row); bring them into one form, or retrain for each"
            )
