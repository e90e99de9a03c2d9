"""Datamodels fitted on retrainings, alone or as the correction of a gradient datamodel.

    outputs [m, t]  ≈  base + (weights [m, n] − anchor) @ scores          scores = s · prior + b

The prior says where to start, the retrainings say how far to trust it: its scale s and the ridge on b are
chosen together by exact leave-one-out errors, so that a good prior is kept and a useless one is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import Progress
from attribution_core.datamodel import LinearDatamodel, columns
from attribution_core.fits.lasso import NotConverged, centred, lasso
from attribution_core.fits.pairs import PairDatamodel, Pairs
from attribution_core.fits.ridge import Ridge, away, choose
from attribution_core.table import RetrainingTable

__all__ = ["NotConverged", "PairDatamodel", "PriorWarning", "Underdetermined", "fit_datamodel"]

Array = NDArray[np.float64]
Kind = Literal["ridge", "lasso", "empirical", "least_squares", "shapley"]
Prior: TypeAlias = LinearDatamodel | ArrayLike | None
KINDS = ("ridge", "lasso", "empirical", "least_squares", "shapley")
TURNED = 1e-4  # chance that a useless prior has so negative a scale, from which on it is told


class Underdetermined(UserWarning):
    """Fewer directions of the weights were tried than there are scores to find."""


class PriorWarning(UserWarning):
    """A prior that says the opposite of what retrainings do; the message says by how much."""


@overload
def fit_datamodel(
    table: RetrainingTable, *, kind: Kind = ..., prior: Prior = ..., penalty: float | None = ...,
    at: float | None = ..., drawn: float | None = ..., pairs: None = ..., groups: None = ...,
    progress: Progress = ...,
) -> LinearDatamodel: ...  # fmt: skip
@overload
def fit_datamodel(
    table: RetrainingTable, *, kind: Kind = ..., prior: Prior = ..., penalty: float | None = ...,
    at: float | None = ..., drawn: float | None = ..., pairs: Sequence[tuple[Any, Any]],
    groups: ArrayLike | None = ..., progress: Progress = ...,
) -> PairDatamodel: ...  # fmt: skip
def fit_datamodel(
    table: RetrainingTable,
    *,
    kind: Kind = "ridge",
    prior: Prior = None,
    penalty: float | None = None,
    at: float | None = None,
    drawn: float | None = None,
    pairs: Sequence[tuple[Any, Any]] | None = None,
    groups: ArrayLike | None = None,
    progress: Progress = iter,
) -> LinearDatamodel | PairDatamodel:
    """Regress retrained outputs (means over seeds) on training weights.

        ridge           Σ ω (y − ȳ − (w − w̄) b)² + λ ‖b‖², with row weights ω of mean 1
        lasso           1/(2 Σω) Σ ω (y − ȳ − (w − w̄) b)² + λ ‖b‖₁                     Ilyas et al. 2022
        least_squares   ridge with λ = 0
        empirical       mean(y | i in) − mean(y | i out)                       Feldman & Zhang 2020, eq. 1
        shapley         KernelSHAP's weights, efficiency exact            Lundberg & Lee 2017, theorem 2

    The anchor is one number for all examples, the mean training weight; base is the prediction there.
    Subsets of one fixed size never move all weights together: whatever the penalty, the sum of all scores
    then comes from the prior, or is 0. "shapley" takes every row for itself: all subsets, or an even sample.

    Args:
        table: m retrainings; weights [m, n] are 0 or 1 for "empirical" and "shapley", anything otherwise.
        kind: the regression; "ridge" takes one λ for all targets, "lasso" one for each. With far more
            examples than rows the lasso is slow (10 s a target at m = 300, n = 20,000), ridge is not.
        prior: a datamodel of the same examples and targets (names tell which is which where both have some),
            or its scores [n, t]; for ridge and lasso.
            y is then s · (w − w̄) prior + (w − w̄) b, where s is each target's scale of the prior, drawn
            towards the scale of all targets, and that towards 0, as far as they are uncertain.
        penalty: λ. None chooses it: for ridge with s by exact leave-one-out squared errors, targets
            standardised by their variance, on a log grid that includes ∞ (b = 0) where there is a prior;
            for lasso by the error on a fifth of the rows.
        at: fit as under Bernoulli(at) subsets: rows weigh ω = at^|S| (1 − at)^(n − |S|), divided by the
            same in `drawn` if given. On all 2ⁿ subsets least_squares then finds exactly the gradient of
            the multilinear extension at `at`.
        drawn: rows were drawn as Bernoulli(drawn) subsets; None: every row stands for itself.
        pairs: also fit products of the centred weights of these pairs of rows; see `PairDatamodel`.
        groups: [n] labels; pairs are then pairs of labels, and a group's weight is its members' mean.
        progress: wraps the loop over λ (tqdm).

    Returns:
        LinearDatamodel, or PairDatamodel if pairs are given. meta has kind, rows, seeds, rank, penalty,
        prior_scale, loo_error (mean squared, over targets in units of their variance), nonzero ...

    Raises:
        ValueError: an unknown kind; options that the kind does not take; shapes or names of targets that do not
            fit; outputs that are not finite; an example that is always in or always out ("empirical"); no full and
            empty row ("shapley").

    Warns:
        Underdetermined: λ = 0 and the rows do not determine all scores (the smallest are returned, for
            "shapley" the most equal); `at` so far from `drawn` that few rows count.
        PriorWarning: a prior's scale that is clearly negative: scores of margins beside outputs that are losses, say.
        NotConverged: the lasso stopped early.

    >>> table = RetrainingTable(np.array([[0., 0], [0, 1], [1, 0], [1, 1]]),
    ...                         np.array([1., 3, 0, 2]).reshape(4, 1, 1), (0,))
    >>> fit_datamodel(table, kind="least_squares").scores.round(9).tolist()
    [[-1.0], [2.0]]
    """
    w, y = _checked(table, kind, prior, penalty, at, drawn, pairs)
    y, offset = _from_least(y)
    rows, size = _row_weights(w, at, drawn)
    anchor = float(rows @ w.mean(1) / rows.sum())
    start = _prior_scores(prior, w.shape[1], y.shape[1], table.targets)
    second = None if pairs is None else Pairs.of(pairs, w.shape[1], groups)
    if groups is not None and pairs is None:
        raise ValueError("expected pairs beside groups; to fit one score a group, use group_table")
    meta: dict[str, Any] = {
        "method": "regression", "kind": kind, "rows": len(w), "seeds": list(table.seeds), "at": at,
        "effective_rows": size,
    }  # fmt: skip
    features = w - anchor
    if second is not None:
        features = np.concatenate([features, second.products(features)], axis=1)
    if kind == "empirical":
        coefficients, base = _empirical(w, y, rows, anchor)
    elif kind == "shapley":
        coefficients, base = _shapley(w, y, rows, anchor, meta)
    else:
        if start is not None and second is not None:
            start = np.concatenate([start, np.zeros((len(second.pairs), y.shape[1]))])
        scale = _column_scale(features, rows, w.shape[1])
        coefficients = _regress(
            features * scale, y, rows, kind, None if start is None else start / scale[:, None],
            penalty, meta, progress,
        ) * scale[:, None]  # fmt: skip
        base = rows @ (y - features @ coefficients) / rows.sum()
    names: dict[str, Any] = {"meta": meta, "targets": table.targets}
    if isinstance(prior, LinearDatamodel):
        names["ids"] = prior.ids
        if table.targets is None:
            names["targets"] = prior.targets
    n = w.shape[1]
    linear = LinearDatamodel(coefficients[:n], base + offset, np.full(n, anchor), **names)
    return linear if second is None else PairDatamodel.of(linear, second, coefficients[n:])


# --- what comes in -----------------------------------------------------------------------------


def _checked(
    table: RetrainingTable, kind: str, prior: Any, penalty: Any, at: Any, drawn: Any, pairs: Any
) -> tuple[Array, Array]:
    """The weights [m, n] and outputs [m, t], once the request makes sense."""
    if kind not in KINDS:
        raise ValueError(f"expected a kind among {', '.join(KINDS)}, got {kind!r}")
    fixed = kind in ("empirical", "least_squares", "shapley")
    taken = {
        "prior": (prior, kind in ("ridge", "lasso")),
        "penalty": (penalty, not fixed),
        "at": (at, kind != "shapley"),
        "pairs": (pairs, kind in ("ridge", "lasso", "least_squares")),
    }
    for name, (value, fits) in taken.items():
        if value is not None and not fits:
            raise ValueError(f"kind={kind!r} takes no {name}; leave it out, or use kind='ridge'")
    if penalty is not None and not penalty >= (0 if kind == "ridge" else 1e-300):
        raise ValueError(
            f"expected a penalty that is {'0 or more' if kind == 'ridge' else 'positive'}, got {penalty}"
        )
    for name, p in (("at", at), ("drawn", drawn)):
        if p is not None and not 0 < p < 1:
            raise ValueError(f"expected {name} between 0 and 1, a probability, got {p}")
    if drawn is not None and at is None:
        raise ValueError("expected at= beside drawn=: rows are reweighted from `drawn` to `at`")
    w, y = np.asarray(table.weights, dtype=float), np.asarray(table.outputs, dtype=float)
    if len(w) < 3:
        raise ValueError(f"expected at least 3 retrainings to regress on, got {len(w)}")
    for name, values in (("weights", w), ("outputs", y)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{name} are not finite in rows {np.flatnonzero(bad)[:5].tolist()} of the table; "
                "leave these retrainings out"
            )
    if (kind in ("empirical", "shapley") or at is not None) and not np.isin(w, (0.0, 1.0)).all():
        what = "at=" if at is not None else f"kind={kind!r}"
        raise ValueError(f"{what} expects weights that are 0 or 1, got others; use kind='ridge'")
    return w, y


def _from_least(y: Array) -> tuple[Array, Array]:
    """(y − its least value for each target, that value); what varies by rounding alone becomes 0."""
    offset = y.min(0)
    above = y - offset
    return np.where(above.max(0) > 1e-12 * np.abs(y).max(0), above, 0.0), offset


def _prior_scores(prior: Prior, n: int, t: int, targets: NDArray[Any] | None) -> Array | None:
    """The prior's scores [n, t], in the order of the table's targets."""
    if prior is None:
        return None
    scores = np.asarray(prior.scores if isinstance(prior, LinearDatamodel) else prior, dtype=float)
    if scores.shape != (n, t):
        raise ValueError(
            f"expected a prior with scores [n={n}, t={t}], as the table, got {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("expected a prior with finite scores, got NaN or infinity")
    if isinstance(prior, LinearDatamodel):
        return np.take(scores, columns(prior.targets, targets, t), axis=1)
    return scores


def _row_weights(w: Array, at: float | None, drawn: float | None) -> tuple[Array, float]:
    """Row weights ω [m] of mean 1, and the number of equal rows that they are worth, (Σω)² / Σω²."""
    m, n = w.shape
    size = w.sum(1)
    log = np.zeros(m)
    for p, sign in ((at, 1.0), (drawn, -1.0)):
        if p is not None and at is not None:
            log += sign * (size * np.log(p) + (n - size) * np.log1p(-p))
    rows = np.exp(log - log.max())
    rows = rows / rows.mean()
    worth = float(m**2 / (rows**2).sum())
    if drawn is None:
        every = m >= 2**n and len(np.unique(w, axis=0)) == 2**n  # however they count, they say all
        few, whence = worth < 2 < m and not every, f"{m} rows"
    else:
        few, whence = worth < m / 10, f"Bernoulli({drawn}) rows"
    if few:
        warnings.warn(
            f"reweighting {whence} to at={at} leaves {worth:.1f} of {m} rows' worth; "
            + (
                "say how they were drawn (drawn=)"
                if drawn is None
                else "retrain subsets drawn nearer to it"
            ),
            Underdetermined,
            stacklevel=3,
        )
    return rows, worth


def _column_scale(features: Array, rows: Array, n: int) -> Array:
    """[d] what columns are multiplied by: 1 for weights; products get the weights' mean variance."""
    scale = np.ones(features.shape[1])
    mean = rows @ features / rows.sum()
    variance = rows @ (features - mean) ** 2 / rows.sum()
    second = variance[n:]
    scale[n:] = np.sqrt(variance[:n].mean() / np.where(second > 0, second, variance[:n].mean()))
    return scale


# --- the fits ----------------------------------------------------------------------------------


def _regress(
    x: Array,
    y: Array,
    rows: Array,
    kind: str,
    prior: Array | None,
    penalty: float | None,
    meta: dict[str, Any],
    progress: Progress,
) -> Array:
    """Coefficients [d, t] by ridge, lasso or least squares; fills meta."""
    from scipy.stats import t as student

    xs, ys, _, _ = centred(x, y, rows)
    penalty = 0.0 if kind == "least_squares" else penalty
    if kind == "lasso" and prior is None:
        scores, found = lasso(x, y, rows, penalty, progress)
        meta.update(found)
        return scores
    ridge = Ridge.of(xs, rows)
    fixed = None if kind == "lasso" else penalty
    best = choose(ridge, ys, None if prior is None else xs @ prior, fixed, progress)
    meta["rank"] = len(ridge.d)
    start = np.zeros((x.shape[1], y.shape[1])) if prior is None else best.scale * prior
    if prior is not None:
        meta["prior_scale"] = best.scale.tolist()
        beyond = away(ridge, ys, xs @ prior)
        if beyond < student.ppf(TURNED, len(x) - 2):
            warnings.warn(
                f"the prior says the opposite of what retrainings do: expected a scale above 0, got one {-beyond:.3g} standard "
                "errors below; the fit turns it around. Are its scores of margins and the table's outputs losses, or "
                "the other way round? Give the prior of the table's own outputs",
                PriorWarning,
                stacklevel=3,
            )
    if kind == "lasso":
        scores, found = lasso(x, y - x @ start, rows, penalty, progress)
        meta.update(found)
        return start + scores
    meta.update(penalty=best.penalty, loo_error=None if np.isnan(best.error) else best.error)
    if best.penalty == 0 and len(ridge.d) < x.shape[1]:
        warnings.warn(
            f"{len(x)} rows of rank {len(ridge.d)} do not determine {x.shape[1]} coefficients; the "
            "smallest that fit are returned: use kind='ridge', or retrain more subsets, of several sizes",
            Underdetermined,
            stacklevel=3,
        )
    return start + ridge.coefficients(ys - xs @ start, best.penalty)


def _empirical(w: Array, y: Array, rows: Array, anchor: float) -> tuple[Array, Array]:
    """(mean with − mean without [n, t], base [t])."""
    inside = rows @ w
    outside = rows.sum() - inside
    stuck = ~((w > 0).any(0) & (w < 1).any(0)) | (inside <= 0) | (outside <= 0)
    if stuck.any():
        raise ValueError(
            f"examples {np.flatnonzero(stuck)[:5].tolist()} are in every subset that counts or in none, {int(stuck.sum())} "
            "in all; retrain more subsets, or use kind='ridge'"
        )
    total = (rows[:, None] * w).T @ y
    mean = rows @ y / rows.sum()
    scores = total / inside[:, None] - (rows @ y - total) / outside[:, None]
    return scores, mean + (anchor - inside / rows.sum()) @ scores


def _shapley(
    w: Array, y: Array, rows: Array, anchor: float, meta: dict[str, Any]
) -> tuple[Array, Array]:
    """(least squares under the Shapley kernel, whose scores add up to full − empty; base)."""
    from scipy.special import gammaln

    n = w.shape[1]
    size = w.sum(1)
    full, empty = size == n, size == 0
    if not (full.any() and empty.any()):
        raise ValueError(
            "kind='shapley' expects a row with all examples and a row with none in the table, got "
            f"{int(full.sum())} and {int(empty.sum())}; retrain these two as well"
        )
    between = ~(full | empty)
    if not between.any():
        raise ValueError("kind='shapley' expects proper subsets besides the full and empty row")
    s = size[between]
    binomial = gammaln(n + 1) - gammaln(s + 1) - gammaln(n - s + 1)
    log = np.log(n - 1) - binomial - np.log(s) - np.log(n - s)
    kernel = np.sqrt(np.exp(log - log.max()))[:, None]
    first, change = y[empty].mean(0), y[full].mean(0) - y[empty].mean(0)
    # scores = change / n + d with d adding up to 0; rows w − s/n are blind to that sum, so d is the
    # smallest solution
    x = kernel * (w[between] - (s / n)[:, None])
    gap = kernel * (y[between] - first - s[:, None] * change / n)
    d, _, rank, _ = np.linalg.lstsq(x, gap, rcond=None)
    meta["rank"] = int(rank) + 1
    if rank < n - 1:
        warnings.warn(
            f"{int(between.sum())} subsets determine {rank} of {n - 1} differences between values; the most "
            "equal values that fit are returned: retrain more subsets",
            Underdetermined,
            stacklevel=3,
        )
    return change / n + d, first + anchor * change
