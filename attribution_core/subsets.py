"""Which training sets to retrain on: rows of weights [m, n], 0 or 1, seeded.

Players are n examples, or groups of them (owners, domains), given as labels [n]; members of a group share
their weight. Groups are in the order of np.unique(labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import named

ENUMERATED = 20  # players whose 2^players subsets are listed

Players = int | ArrayLike


def random_subsets(
    n: Players, m: int, *, keep: float | Sequence[float], seed: int = 0
) -> NDArray[np.float64]:
    """Weights [m, n] of m random subsets, each of round(keep · n) players at weight 1.

    Args:
        n: number of examples, or labels [n] of groups.
        keep: the fraction kept; with several, rows take them in turn.

    >>> random_subsets(4, 3, keep=0.5).sum(axis=1).tolist()
    [2.0, 2.0, 2.0]
    >>> random_subsets(4, 4, keep=[0.25, 0.75]).sum(axis=1).tolist()
    [1.0, 3.0, 1.0, 3.0]
    """
    index, players = _players(n)
    fractions = _fractions(keep)
    _check_rows(m)
    rng = np.random.default_rng(seed)
    weights = np.zeros((m, players))
    for k, row in enumerate(weights):
        size = max(1, round(fractions[k % len(fractions)] * players))
        row[rng.choice(players, size, replace=False)] = 1.0
    return weights[:, index]


def bernoulli_subsets(
    n: Players, m: int, *, keep: float | Sequence[float], seed: int = 0
) -> NDArray[np.float64]:
    """Weights [m, n] of m subsets into which every player comes with probability `keep`, by itself.

    The law under which regression finds the gradient of the multilinear extension at `keep`
    (`fit_datamodel`), and values are averages over `keep`; sizes differ from row to row.

    >>> bernoulli_subsets(1000, 1, keep=0.5).mean().round(1).item()
    0.5
    """
    index, players = _players(n)
    fractions = _fractions(keep)
    _check_rows(m)
    rng = np.random.default_rng(seed)
    chance = np.resize(fractions, m)[:, None]
    return (rng.random((m, players)) < chance).astype(float)[:, index]


def group_subsets(groups: ArrayLike, m: int, keep: float, seed: int = 0) -> NDArray[np.float64]:
    """Weights [m, n] of m random subsets of whole groups, each of round(keep · g) of the g groups.

    >>> group_subsets(["a", "b", "a", "b"], 3, keep=0.5).sum(axis=1).tolist()
    [2.0, 2.0, 2.0]
    """
    index = named(groups, _count(groups))[1]
    return random_subsets(index, m, keep=keep, seed=seed)


def leave_out_subsets(n: Players) -> NDArray[np.float64]:
    """Weights [1 + players, n]: everyone, then everyone but the first player, but the second, ...

    >>> leave_out_subsets(["a", "b", "a"]).tolist()
    [[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    index, players = _players(n)
    return np.concatenate([np.ones((1, players)), 1.0 - np.eye(players)])[:, index]


def permutation_subsets(n: Players, m: int, *, seed: int = 0) -> NDArray[np.float64]:
    """Weights [m · (players + 1), n]: for m random orders, nobody, then one player more after the other.

    Consecutive rows differ by one player: its marginal contributions, whose mean is its Shapley value.
    Orders come in pairs, one the other's reverse, whose means vary less.

    Source: Castro et al. 2009 (sampled permutations); Mitchell et al. 2022, sec. 4 (antithetic pairs).

    >>> permutation_subsets(2, 1).sum(axis=1).tolist()
    [0.0, 1.0, 2.0]
    """
    index, players = _players(n)
    _check_rows(m)
    rng = np.random.default_rng(seed)
    orders: list[NDArray[np.intp]] = []
    for k in range(m):
        orders.append(orders[-1][::-1] if k % 2 else rng.permutation(players))
    rows = []
    for order in orders:
        place = np.argsort(order)
        rows.append(place < np.arange(players + 1)[:, None])
    found = np.concatenate(rows) if rows else np.zeros((0, players))
    return found.astype(float)[:, index]


def all_subsets(n: Players) -> NDArray[np.float64]:
    """Weights [2^players, n] of every subset, from nobody to everyone; at most 20 players.

    >>> all_subsets(2).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    index, players = _players(n)
    if players > ENUMERATED:
        raise ValueError(
            f"expected at most {ENUMERATED} players to list all subsets of, got {players}; group them, or "
            "use permutation_subsets"
        )
    numbers = np.arange(2**players)[:, None] >> np.arange(players)
    return (numbers & 1).astype(float)[:, index]


def _players(n: Players) -> tuple[NDArray[np.intp], int]:
    """(which player each example belongs to, number of players)."""
    labels = np.arange(n) if isinstance(n, (int, np.integer)) else n
    names, index = named(labels, _count(labels))
    return index, len(names)


def _count(labels: ArrayLike) -> int:
    """How many labels there are, of torch's tensors too, whose `size` is a function that np.size takes."""
    return np.asarray(labels).size


def _check_rows(m: int) -> None:
    if not isinstance(m, (int, np.integer)) or m < 0:
        raise ValueError(f"expected a whole number m >= 0 of rows or orders, got {m!r}")


def _fractions(keep: float | Sequence[float]) -> NDArray[np.float64]:
    found = np.atleast_1d(np.asarray(keep, dtype=float))
    if not len(found) or not ((found > 0) & (found <= 1)).all():
        raise ValueError(f"expected a keep fraction in (0, 1], got {keep}")
    return found
