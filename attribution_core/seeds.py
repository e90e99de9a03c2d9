"""Training seeds: a number of them, or which ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


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
