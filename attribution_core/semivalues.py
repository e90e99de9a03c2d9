"""Semivalues of a table: what a player adds, on average over the sets that it joins.

    value_i = Σ_{s=0}^{n−1} q_s E[ f(S ∪ i) − f(S) ],  S uniform over the sets of s players without i

f is the output of a model trained on the players of S, read off a `RetrainingTable` of 0/1 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["shapley", "banzhaf", "beta", "leave_one_out"]
Freedom = float | NDArray[np.float64]
Estimate = tuple[NDArray[np.float64], NDArray[np.float64], Freedom]  # see `semivalues`


def semivalues(
    inside: NDArray[np.bool_], outputs: NDArray[np.float64], kind: Kind, beta: tuple[float, float]
) -> tuple[Estimate, str]:
    """((values [n, t], standard errors [n, t], degrees of freedom, one or [n, t]), how) from subsets that were trained on.

    Exact where the table holds all subsets (the error is then that over seeds or over repeated rows; 0 for one seed, whose
    game is known exactly); marginal contributions where it is made of permutations; differences to
    everyone for "leave_one_out"; else `by_size`. Of several seeds, every error covers the seeds (see `over_seeds`); of
    one, none does.

    Args:
        inside: [m, n], who is in each row.
        outputs: [m, s, t], under s seeds.
        kind: which q; beta: (α, β) of kind "beta".

    Raises:
        ValueError: rows that a kind needs are missing.
    """
    n = inside.shape[1]
    size = inside.sum(1)
    q = size_weights(kind, n, beta)
    if kind == "leave_one_out":
        return _left_out(inside, outputs, size), "left out one by one"
    if len(inside) >= 2**n and len(np.unique(inside, axis=0)) == 2**n:
        return _enumerated(inside, outputs, q), "all subsets"
    if (orders := _orders(inside)) is not None:
        along = over_seeds(lambda y: _marginals(orders, y, q), outputs)
        return along, f"{len(orders)} permutations"
    level, one = levelling(size, kind, n), outputs.shape[1] == 1
    found = over_seeds(lambda y: _by_size(inside, y, size, q, level, one), outputs)
    return found, "subsets by size"


def over_seeds(
    estimate: Callable[[NDArray[Any]], Estimate], outputs: NDArray[np.float64]
) -> Estimate:
    """An estimate from the rows' means over seeds, whose error covers the draw of rows and that of s seeds.

        error² = e²(ȳ) + [ Σ_k v(y_k − ȳ)² − Σ_k e²(y_k − ȳ) ]₊ / (s (s − 1))

    with v the value, e² its squared error over rows, y_k the outputs under seed k. How far the values of single seeds lie
    apart is the seeds' doing, less what the rows' noise alone would make of it, which e²(ȳ) counts already. Degrees
    of freedom are those of the sum before this is taken off (Welch 1947): with few seeds the difference is
    small by chance too often to be trusted. (Additive games: 95 % intervals hold the values in 91 to 97 % of cases with
    three seeds or more, in 85 to 90 % with two where these are all there is to the error.)

    Args:
        estimate: outputs [m, ...] -> (values, errors, degrees of freedom), with values linear in the outputs.
        outputs: [m, s, ...], under s seeds; with one seed, the error is that over rows.

    Source: two-way clusters, Cameron, Gelbach & Miller 2011, eq. 2.3.
    """
    mean = outputs.mean(1)
    value, error, freedom = estimate(mean)
    s = outputs.shape[1]
    if s == 1:
        return value, error, freedom
    apart, noise = np.zeros_like(error), np.zeros_like(error)
    for k in range(s):
        off, of_rows, _ = estimate(outputs[:, k] - mean)
        apart += off**2 / (s * (s - 1))
        noise += of_rows**2 / (s * (s - 1))
    rows = error**2
    part = rows**2 / freedom + apart**2 / (s - 1)
    welch = np.divide((rows + apart) ** 2, part, out=np.full_like(part, math.inf), where=part > 0)
    return value, np.sqrt(rows + np.maximum(apart - noise, 0.0)), welch


def levelling(size: NDArray[Any], kind: str, n: int) -> NDArray[np.bool_]:
    """[m], which rows are used to estimate the average value, i.e. how f grows with the subset size.

    Banzhaf values depend on sizes n/2 ± √n (two standard deviations) almost alone, whatever f does at others: of those
    the ones drawn are used, and all next to them without a gap, where nothing is interpolated. If no sizes on both sides of
    the middle were drawn there, the two nearest to it are used; no rows if there are none.
    """
    if kind != "banzhaf":
        return np.full(len(size), size.min() == 0 and size.max() == n)
    near = np.abs(size - n / 2) <= math.sqrt(n)
    below, above = size[(size > 0) & (size <= (n - 1) / 2)], size[(size < n) & (size > (n - 1) / 2)]
    if not len(below) or not len(above):
        return np.zeros(len(size), dtype=bool)
    across = near.any() and size[near].min() <= (n - 1) / 2 < size[near].max()
    if not across:
        return np.isin(size, (below.max(), above.min()))
    drawn, low, high = set(size.tolist()), int(size[near].min()), int(size[near].max())
    while low - 1 in drawn:
        low -= 1
    while high + 1 in drawn:
        high += 1
    return (low <= size) & (size <= high)


def size_weights(kind: str, n: int, beta: tuple[float, float]) -> NDArray[np.float64]:
    """q_s [n]: how much the sets of s = 0 .. n − 1 other players count; they add up to 1."""
    from scipy.stats import betabinom, binom

    s = np.arange(n)
    if kind == "shapley":
        return np.full(n, 1.0 / n)
    if kind == "banzhaf":
        return binom.pmf(s, n - 1, 0.5)
    if kind == "beta":
        if min(beta) <= 0:
            raise ValueError(f"expected beta=(α, β), both positive, got {beta}")
        return betabinom.pmf(s, n - 1, beta[1], beta[0])
    return (s == n - 1).astype(float)


def _left_out(inside: NDArray[Any], outputs: NDArray[Any], size: NDArray[Any]) -> Estimate:
    """f(everyone) − f(all but i), paired by seed."""
    n = inside.shape[1]
    whole = outputs[size == n].mean(0) if (size == n).any() else None
    rows = [np.flatnonzero((size == n - 1) & ~inside[:, i]) for i in range(n)]
    missing = [i for i, some in enumerate(rows) if not len(some)]
    if whole is None or missing:
        raise ValueError(
            f"expected rows for everyone and for everyone but each player, got none for "
            f"{'everyone' if whole is None else f'players {missing[:5]}'}; use leave_out_subsets"
        )
    differences = np.stack([whole - outputs[some].mean(0) for some in rows])  # [n, seeds, 1 + t]
    return _over(differences.swapaxes(0, 1))


def _over(draws: NDArray[Any]) -> Estimate:
    """Mean of draws [s, n, t] by seed, its standard error (0 where there is but one) and s − 1."""
    s = len(draws)
    if s == 1:
        return draws[0], np.zeros(draws.shape[1:]), math.inf
    return draws.mean(0), draws.std(0, ddof=1) / math.sqrt(s), s - 1


def _orders(inside: NDArray[Any]) -> NDArray[np.intp] | None:
    """The permutations [k, n] of a table made of chains from nobody to everyone, else None."""
    m, n = inside.shape
    if m % (n + 1):
        return None
    chains = inside.reshape(-1, n + 1, n)
    added = np.diff(chains.astype(np.int8), axis=1)
    if chains[:, 0].any() or (added < 0).any() or (added.sum(2) != 1).any():
        return None
    return added.argmax(2)


def _marginals(orders: NDArray[np.intp], y: NDArray[Any], q: NDArray[np.float64]) -> Estimate:
    """Mean marginal contributions along permutations, those after s others counted n q_s times; y [m, t].

    The variance is that of clusters, C / (C − 1) Σ_c (Σ_{k in c} (x_k − x̄))² / K², since an order and its reverse
    are one draw.
    """
    k, n = orders.shape
    chains = y.reshape(k, n + 1, -1)
    steps = np.diff(chains, axis=1) * (n * q)[None, :, None]
    each = np.empty_like(steps)
    np.put_along_axis(each, np.broadcast_to(orders[:, :, None], steps.shape), steps, axis=1)
    mean = each.mean(0)
    starts = _draws(orders)
    draws = len(starts)
    if draws == 1:
        return mean, np.full(mean.shape, math.nan), math.inf
    apart = np.add.reduceat(each - mean, starts)
    return mean, np.sqrt((apart**2).sum(0) * draws / (draws - 1)) / k, draws - 1


def _draws(orders: NDArray[np.intp]) -> list[int]:
    """Where draws begin among permutations [k, n]: an order and, right after it, its reverse are one."""
    starts = [0]
    for k in range(1, len(orders)):
        paired = starts[-1] == k - 1 and (orders[k] == orders[k - 1][::-1]).all()
        if not paired:
            starts.append(k)
    return starts


def _enumerated(inside: NDArray[Any], outputs: NDArray[Any], q: NDArray[np.float64]) -> Estimate:
    """Exact values from all 2^n subsets: Σ_S f(S) (i in S: q_{s−1}/C(n−1, s−1), else −q_s/C(n−1, s)).

    Rows that repeat are averaged; under one seed, how far they differ is the error.
    """
    from scipy.special import comb

    n = inside.shape[1]
    once, place, count = np.unique(inside, axis=0, return_inverse=True, return_counts=True)
    size = once.sum(1)
    padded = np.concatenate([[0.0], q, [0.0]])  # q_{s−1} stands at s
    share = comb(n - 1, np.arange(-1, n + 1))
    padded = np.divide(padded, share, out=np.zeros(n + 2), where=share > 0)
    weight = np.where(once, padded[size][:, None], -padded[size + 1][:, None])
    mean = np.zeros((len(once), *outputs.shape[1:]))
    np.add.at(mean, place.ravel(), outputs)
    mean /= count[:, None, None]
    draws = np.einsum("mi,mst->sit", weight, mean)
    free = len(inside) - len(once)
    if free == 0 or outputs.shape[1] > 1:
        return _over(draws)
    apart = (outputs - mean[place.ravel()]).mean(1)
    noise = (apart**2).sum(0) / free  # of a row's mean over seeds, [t]
    spread = np.sqrt((weight**2 / count[:, None]).sum(0)[:, None] * noise)
    return draws.mean(0), spread, free


def _by_size(
    inside: NDArray[Any], y: NDArray[Any], size: NDArray[Any], q: NDArray[np.float64],
    level: NDArray[np.bool_], one_seed: bool,
) -> Estimate:  # fmt: skip
    """Values from random subsets, by what a player makes among subsets of one size; y [m, t].

        value_i = Σ_s q_s (μ_{s+1} − μ_s) + Σ_s [q_{s−1} (1 − s/n) + q_s s/n] D_i(s)

    with μ_s the mean of f over sets of size s, and D_i(s) its mean over those with i less that over those
    without. (Both lines are exact over all sets.) Sizes with too few rows are taken together, sizes
    that were not drawn are interpolated, and beyond them μ goes on as it does between them. The D_i of a size
    add up to zero, and are made to. μ is estimated from the rows of `level`, from all rows if there are none.
    """
    n = inside.shape[1]
    interior = (size > 0) & (size < n)
    if not interior.any():
        raise ValueError(
            "expected subsets between nobody and everyone, got none; use random_subsets, "
            "permutation_subsets or all_subsets"
        )
    centres, d, variance, rows = _contrasts(inside[interior], y[interior], size[interior])
    s, count = _counts(q)
    share = count @ np.stack([np.interp(s, centres, one) for one in np.eye(len(centres))], axis=1)
    used = level if level.any() else np.ones(len(y), dtype=bool)
    mean, mean_variance = _levels(y[used], size[used], q, one_seed)
    spread = np.tensordot(share**2, variance, axes=1)
    error = np.sqrt(spread + mean_variance)
    return mean + np.tensordot(share, d, axes=1), error, _freedom(share, rows)[:, None]


def beyond(size: NDArray[Any], kind: str, beta: tuple[float, float], n: int) -> float:
    """The share of the D_i(s), in `_by_size`, at sizes s beyond those drawn between nobody and everyone.

    Sizes next to drawn ones count as drawn; for Banzhaf values, which look at n/2 ± √n alone (two standard
    deviations), all that are as near.
    """
    s, count = _counts(size_weights(kind, n, beta))
    drawn = size[(size > 0) & (size < n)]
    near = math.sqrt(n) if kind == "banzhaf" else 1.0
    outside = (s < drawn.min() - near) | (s > drawn.max() + near)
    return float(count[outside].sum() / count.sum())


def telling(kind: str, beta: tuple[float, float], n: int) -> list[float]:
    """Keep fractions from which a kind of n players is estimated well: the sizes of its D_i(s) at five quantiles."""
    s, count = _counts(size_weights(kind, n, beta))
    up_to = np.cumsum(count) / count.sum()
    sizes = s[np.searchsorted(up_to, [0.05, 0.25, 0.5, 0.75, 0.95])]
    return sorted({float(f"{size / n:.2g}") for size in sizes})


def around(n: int) -> list[float]:
    """Keep fractions on both sides of half of n players, two standard deviations of Banzhaf's sizes apart."""
    apart = max(1.0, math.sqrt(n) / 2) / n
    return [float(f"{0.5 - apart:.2g}"), float(f"{0.5 + apart:.2g}")]


def _counts(q: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(s = 1 .. n − 1, how much D_i(s) counts, q_{s−1} (1 − s/n) + q_s s/n)."""
    n = len(q)
    s = np.arange(1, n)
    return s, q[s - 1] * (1 - s / n) + q[s] * s / n


def _freedom(share: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees of freedom [n] of Σ_b share_b D_i(b), from rows in and out [bins, 2, n] of one variance (Welch 1947)."""
    part = share[:, None, None] ** 2 / rows
    return part.sum((0, 1)) ** 2 / (part**2 / (rows - 1)).sum((0, 1))


def _levels(
    y: NDArray[Any], size: NDArray[Any], q: NDArray[np.float64], one_seed: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Σ_s q_s (μ_{s+1} − μ_s), [t], and its variance.

    μ is interpolated between the sizes there are, and goes on beyond them as it does between them on average. There is
    one set of everyone and one of nobody, which err by their seeds alone: of several, `over_seeds` says how much; of one,
    the variance among sets of one size takes its place.
    """
    known, where, count = np.unique(size, return_inverse=True, return_counts=True)
    between = np.zeros_like(q)
    between[known[0] : known[-1]] = q[known[0] : known[-1]]
    between /= between.sum() or 1.0
    share = np.array(
        [
            between @ np.diff(np.interp(np.arange(len(q) + 1), known, one))
            for one in np.eye(len(known))
        ]
    )
    mu = np.stack([y[where == k].mean(0) for k in range(len(known))])
    inner = (size > 0) & (size < len(q))
    free = max(1, inner.sum() - len(np.unique(size[inner])))
    within = ((y - mu[where])[inner] ** 2).sum(0) / free
    noisy = (known > 0) & (known < len(q))
    parts = share**2 / count
    counted = parts if one_seed else parts[noisy]
    return share @ mu, counted.sum() * within


def _contrasts(
    inside: NDArray[Any], y: NDArray[Any], size: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """(mean size, D [bins, n, t], variance of D, rows in and out [bins, 2, n]) of bins of sizes in which every
    player is twice in and twice out."""
    order = np.argsort(size, kind="stable")
    sizes = size[order]
    ends = [k for k in range(1, len(order) + 1) if k == len(order) or sizes[k] != sizes[k - 1]]
    bins: list[NDArray[np.intp]] = []
    start = 0
    for end in ends:
        rows = order[start:end]
        if _enough(inside[rows]):
            bins.append(rows)
            start = end
    if start < len(order):  # what is left joins the bin before it
        rows = order[start:]
        if not bins and not _enough(inside):
            few = int(np.minimum(inside.sum(0), (~inside).sum(0)).min())
            raise ValueError(
                f"expected every player in at least two subsets and out of two, got one with {few}; "
                "retrain on more subsets"
            )
        bins[-1:] = [np.concatenate([*bins[-1:], rows])]
    found = [_contrast(inside[rows], y[rows], size[rows]) for rows in bins]
    centres = np.array([size[rows].mean() for rows in bins])
    counts = [[inside[rows].sum(0), (~inside[rows]).sum(0)] for rows in bins]
    d, variance = (np.stack(part) for part in zip(*found, strict=True))
    return centres, d, variance, np.array(counts, dtype=float)


def _enough(inside: NDArray[Any]) -> bool:
    return bool((inside.sum(0) >= 2).all() and ((~inside).sum(0) >= 2).all())


def _contrast(
    inside: NDArray[Any], y: NDArray[Any], size: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means with less means without each player [n, t], and their variances; y freed of a slope in size."""
    x = size - size.mean()
    if x.any():
        y = y - np.outer(x, x @ y / (x @ x))
    y = y - y.mean(0)
    w = inside.astype(float)
    k_in, k_out = w.sum(0)[:, None], (1 - w).sum(0)[:, None]
    mean_in, mean_out = w.T @ y / k_in, (1 - w).T @ y / k_out
    var_in = np.maximum(w.T @ y**2 / k_in - mean_in**2, 0) / (k_in - 1)
    var_out = np.maximum((1 - w).T @ y**2 / k_out - mean_out**2, 0) / (k_out - 1)
    d = mean_in - mean_out
    return d - d.mean(0), var_in + var_out
