"""Several processes as one: who am I, which rows are mine, sums and sharing over all.

One process unless launched by torchrun or `accelerate launch`; then accelerate sets the group up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        from accelerate import PartialState

        # joins the group that the launcher describes; what one does alone, others wait for: torch's half an hour is too short
        PartialState(timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size()


def my_rows(rows: np.ndarray) -> np.ndarray:
    """This process's contiguous share of the rows."""
    rank, size = world()
    return np.array_split(rows, size)[rank]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same on each."""
    if world()[1] == 1:
        return tensor
    moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor  # nccl sums on GPUs only
    moved = moved.contiguous()
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def sum_all(tensors: T) -> T:
    """The tensors of a list, a dict or several of them summed over all processes, in one all-reduce."""
    leaves, form = tree_flatten(tensors)
    if world()[1] == 1 or not leaves:
        return tensors
    flat = sum_over_processes(torch.cat([leaf.flatten() for leaf in leaves]))
    parts = flat.split([leaf.numel() for leaf in leaves])
    found = [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, leaves, strict=True)]
    return tree_unflatten(found, form)


def collect(rows: Tensor) -> Tensor:
    """All processes' rows [own, k], concatenated in the order of `my_rows`, on each."""
    if world()[1] == 1:
        return rows
    parts: list[Tensor | None] = [None] * world()[1]
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat([part for part in parts if part is not None])


def union(names: set[str]) -> set[str]:
    """All processes' names, on each."""
    if world()[1] == 1:
        return names
    parts: list[set[str]] = [set()] * world()[1]
    dist.all_gather_object(parts, names)
    return set().union(*parts)


def from_first(value: T) -> T:
    """The first process's value, on all."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Wait until every process has come here."""
    if world()[1] > 1:
        dist.barrier()


@contextmanager
def failing_together() -> Iterator[None]:
    """In the body each process works by itself; what one of them raises is raised on all, which else would wait for it.

    Raises:
        ValueError: another process stopped; says which, and why.
    """
    if world()[1] == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    said: list[str | None] = [None] * world()[1]
    dist.all_gather_object(said, None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for rank, why in enumerate(said):
        if why is not None:
            raise ValueError(f"process {rank} stopped, and with it all others: {why}")


def gathered(make: Callable[[], Tensor]) -> Tensor:
    """`collect` of what each process makes of its own rows; what one raises is raised on all."""
    with failing_together():
        own = make()
    return collect(own)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the body before the others: it makes files that they then read."""
    if world()[0] > 0:
        wait()
    yield
    if world()[0] == 0:
        wait()
