"""Groups of examples: scores at one backward pass a group, ways to form groups, and their truth.

    scores_G[g, :] = Σ_{i in g} scores[i, :]        f̂(u) = base + (u − anchor) @ scores_G

Groups are labels [n], numbers or strings; their names are np.unique(labels), in that order everywhere.
Sums go into the right-hand side alone: a curvature built from group sums would weigh a pair of
examples by whether they share a group, so none is (Ley et al. 2024 build one, and lose by it).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.calling import Params, per_example
from attribution_core.data import Progress, batches, named, take
from attribution_core.gradients import check_directions
from attribution_core.layerwise.vectors import flatten
from attribution_core.precision import widened
from attribution_core.problem import Problem
from attribution_core.processes import collect, failing_together, my_rows
from attribution_core.safeguards.soundness import refuse_unsound
from attribution_core.table import RetrainingTable

BLOCK = 2**12  # parameters a product runs over: one long float32 product loses a digit


class AnchorWarning(UserWarning):
    """Members of a group stand at different weights, so that its weight is none of theirs."""


def group_directional(
    problem: Problem,
    directions: Params | Tensor,
    groups: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    batch_size: int = 256,
    progress: Progress = iter,
) -> tuple[NDArray[Any], Tensor]:
    """Loss gradients of whole groups along t directions: out[g, j] = ⟨Σ_{i in g} w_i ∇ℓ_i(θ), v_j⟩.

    One backward pass a group (in chunks of `batch_size` rows) and one product with all directions;
    the same as the summed rows of `directional`.

    Args:
        directions: dict name -> [t, *shape] over all of `problem.params`, or a tensor [t, p].
        groups: [n] labels. Several processes share the groups.
        weights: [n] of the examples within their groups; 1 if not given.
        progress: wraps the loop over groups (tqdm).

    Returns:
        (names [g] = np.unique(groups), products [g, t] in the model's precision, float32 at least).

    Raises:
        ValueError: labels, weights or directions that do not fit; active dropout or batch norm; losses
            or gradients that are not finite.

    Source: Ley et al. 2024, sec. 3 (group gradients), without their group Fisher.
    """
    refuse_unsound(problem)
    params = problem.params
    flat = widened(flatten(check_directions(directions, params)))
    names, index = named(groups, problem.n)
    w = np.ones(problem.n) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != (problem.n,):
        raise ValueError(f"expected weights [n={problem.n}], got {w.shape}; one per example")
    mine = my_rows(np.arange(len(names)))
    out = flat.new_zeros(len(mine), len(flat))
    with failing_together():
        for place, g in enumerate(progress(mine)):
            rows = np.flatnonzero(index == g)
            gradient = summed_gradient(problem, params, rows, w[rows], batch_size)
            if not torch.isfinite(gradient).all():
                raise ValueError(
                    f"expected finite gradients, got NaN or infinity in group {names.tolist()[g]!r}; `directional` "
                    "names the rows"
                )
            parts = zip(flat.split(BLOCK, dim=1), gradient.split(BLOCK), strict=True)
            out[place] = torch.stack([v @ g for v, g in parts]).sum(0, dtype=torch.float64)
    return names, collect(out)


def mean_anchor(anchor: NDArray[np.float64], groups: ArrayLike) -> NDArray[np.float64]:
    """The mean of the members' anchors [n], [g]; `AnchorWarning` where members of one group differ."""
    names, index = named(groups, len(anchor))
    found: NDArray[np.float64] = np.bincount(index, anchor) / np.bincount(index)
    apart = np.flatnonzero(~np.isclose(found[index], anchor, rtol=1e-12, atol=0))
    if len(apart):
        of = anchor[index == index[apart[0]]]
        warnings.warn(
            f"expected one anchor for all members of a group, got {of.min():g} to {of.max():g} in group "
            f"{names.tolist()[index[apart[0]]]!r}: its weight shifts all members alike from there, so that weight 0 is not "
            "the group's removal; group examples of one anchor, or predict from the scores of rows (no groups)",
            AnchorWarning,
            stacklevel=3,
        )
    return found


@torch.enable_grad()  # whatever the caller is in
def summed_gradient(
    problem: Problem, params: Params, rows: NDArray[np.intp], weights: ArrayLike, batch_size: int
) -> Tensor:
    """Σ w_i ∇ℓ_i(θ) over some rows, [p]; what a parameter is not reached by is 0."""
    leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = torch.cat([widened(torch.zeros_like(value)).flatten() for value in params.values()])
    w = torch.as_tensor(np.asarray(weights))
    for some in batches(len(rows), batch_size):
        batch = take(problem.train, rows[some], problem.device)
        losses = per_example(problem.model, problem.loss, batch, leaf, rows[some])
        found = torch.autograd.grad(
            (losses * w[some].to(losses)).sum(),
            list(leaf.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        total += torch.cat([widened(g).flatten() for g in found])
    return total


# --- ways to form groups -----------------------------------------------------------------------


def random_groups(n: int, size: int, seed: int = 0) -> NDArray[np.intp]:
    """Labels [n] of ⌈n / size⌉ random groups, whose sizes differ by one at most.

    >>> np.bincount(random_groups(7, 3)).tolist()
    [3, 2, 2]
    """
    if not 1 <= size <= n:
        raise ValueError(f"expected groups of 1 to n={n} examples, got size {size}")
    labels = np.arange(n) % -(-n // size)
    return np.random.default_rng(seed).permutation(labels)


def kmeans_groups(features: ArrayLike | Tensor, groups: int, seed: int = 0) -> NDArray[np.intp]:
    """Labels [n] of at most `groups` clusters of features [n, d], by k-means on mini-batches.

    Features: `representations` of the model, or `activation_gradients` for Grad-K-Means.

    Raises:
        ValueError: features that are not [n, d]; fewer examples than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    x = features.cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if x.ndim != 2 or not 1 <= groups <= len(x):
        raise ValueError(
            f"expected features [n, d] and 1 to n clusters, got {x.shape} and {groups} clusters"
        )
    size = max(
        1024, 4 * groups
    )  # of a batch; sklearn warns below 3 rows a cluster on wide machines
    found = MiniBatchKMeans(groups, n_init=3, batch_size=size, random_state=seed).fit(x)
    return found.labels_.astype(np.intp)


# --- their truth -------------------------------------------------------------------------------


def group_table(table: RetrainingTable, groups: ArrayLike) -> RetrainingTable:
    """The same retrainings with one weight a group, [m, g], so that a grouped datamodel is judged:

        lds(datamodel.grouped(groups), group_table(table, groups))

    Raises:
        ValueError: labels that are not [n]; members of one group that differ in weight.
    """
    names, index = named(groups, table.weights.shape[1])
    weights = np.zeros((len(table.weights), len(names)))
    weights[:, index] = table.weights
    differ = ~np.isclose(weights[:, index], table.weights, rtol=1e-12, atol=0)
    if differ.any():
        row, i = np.argwhere(differ)[0]
        raise ValueError(
            f"expected one weight for all members of a group, but in row {row} of the table group "
            f"{names.tolist()[index[i]]!r} has {table.weights[row, i]:g} and {weights[row, index[i]]:g}; "
            "retrain on group_subsets(groups, ...)"
        )
    return RetrainingTable(
        weights, table.per_seed, table.seeds, {**table.meta, "groups": len(names)}
    )
