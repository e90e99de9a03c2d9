"""What stands at the two ends of a list of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def ends(scores: NDArray[Any], most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(the lowest scores below 0, the highest above 0), each the farthest first, so many at most."""
    order = np.argsort(scores, kind="stable")
    rising, falling = order[scores[order] < 0], order[::-1][scores[order[::-1]] > 0]
    return rising[:most], falling[:most]
