"""Training seeds: a number of them, or which ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def listed(seeds: int | Sequence[int]) -> list[int]:
    """The seeds themselves: 0 .. seeds − 1 for a number.

    Raises:
        ValueError: a seed that is named twice: what repeats is no second opinion; no whole number of seeds.

    >>> listed(3), listed([4, 2])
    ([0, 1, 2], [4, 2])
    """
    if isinstance(seeds, (int, np.integer)):
        return list(range(seeds))
    if not isinstance(seeds, Iterable):
        raise ValueError(
            f"expected a number of seeds, or which ones, got {seeds!r}; pass a whole number or a list of such"
        )
    given = list(seeds)
    found = [int(seed) for seed in given]
    if len(set(found)) < len(found) or found != given:
        raise ValueError(
            f"expected at least one seed >= 0, each once, got {found}; a training that repeats is no second opinion"
        )
    return found
