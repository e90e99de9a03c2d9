"""Training seeds: a number of them, or which ones; and what random layers draw by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def listed(seeds: int | Sequence[int]) -> list[int]:
    """The seeds themselves: 0 .. seeds − 1 for a number.

    Raises:
        ValueError: no seed; a negative one; one that is named twice; no whole number of seeds.

    >>> listed(3), listed([4, 2])
    ([0, 1, 2], [4, 2])
    """
    if isinstance(seeds, (int, np.integer)):
        seeds = range(seeds)
    if not isinstance(seeds, Iterable):
        raise ValueError(
            f"expected a number of seeds, or which ones, got {seeds!r}; pass a whole number or a list of such"
        )
    given = list(seeds)
    found = [int(seed) for seed in given]
    if not found or min(found) < 0 or len(set(found)) < len(found) or found != given:
        raise ValueError(
            f"expected at least one seed >= 0, each once, got {given}; a repeated seed gives the same training again"
        )
    return found


@contextmanager
def drawn_by(seed: Sequence[int] | None, device: torch.device) -> Iterator[None]:
    """Random layers draw from a seed, and the generators of the CPU and of CUDA are left as they were; None: as they come."""
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    own = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(own)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield
