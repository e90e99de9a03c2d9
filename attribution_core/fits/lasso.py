"""The lasso for many targets at once: one factorisation, one path, one column per target.

    minimise over b   1/(2 Σω) Σ_i ω_i (y_i − ȳ − (x_i − x̄) b)² + λ ‖b‖₁          (sklearn's α is λ)

All targets share the design, so a step for all of them is one matrix product: ADMM in float32 with the
inverse of (Gram + ρ) found once (through the m × m side when rows are few), warm-started from λ_max down,
converged columns dropped. What is returned is then finished in float64, by ADMM where rows are many and by
an active-set method, one small linear system a target. 0/1 masks are well conditioned (the Gram matrix of any few columns
is close to a multiple of the identity), so ρ = its mean diagonal works for m < n and m > n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution_core.data import Progress

Array = NDArray[np.float64]
RATIOS = np.geomspace(1.0, 0.01, 30)  # λ / λ_max along the path
PATIENCE = 5  # steps of the path without a better validation error, then a target's path ends
# KKT violations relative to λ: along the path, before the finish, of what is returned
LOOSE, CLOSE, EXACT = 3e-2, 1e-3, 1e-5
RELAX, EVERY = 1.7, 3  # of ADMM: over-relaxation; iterations between looks at the KKT violation
# most iterations: of ADMM in float32 for one λ, in float64 at the end, of the active-set method
ITERATIONS, FINISH, ROUNDS = 5000, 60, 500
TARGETS = 512  # at once: memory is n × this


class NotConverged(UserWarning):
    """A solver stopped before its tolerance; the message says how far it came."""


def centred(x: Array, y: Array, rows: Array) -> tuple[Array, Array, Array, Array]:
    """(√ω (x − x̄), √ω (y − ȳ), x̄, ȳ) with ω = row weights of mean 1; an intercept, projected out."""
    rows = rows / rows.mean()
    x_mean, y_mean = rows @ x / len(x), rows @ y / len(x)
    root = np.sqrt(rows)[:, None]
    return root * (x - x_mean), root * (y - y_mean), x_mean, y_mean


def soft(v: Tensor, threshold: Tensor) -> Tensor:
    """Soft thresholding: v moved towards 0 by threshold.

    >>> soft(torch.tensor([3.0, -0.5]), torch.tensor(1.0)).tolist()
    [2.0, 0.0]
    """
    return v - torch.minimum(torch.maximum(v, -threshold), threshold)


def violation(gradient: Tensor, b: Tensor, penalty: Tensor) -> Tensor:
    """KKT violation relative to λ, [t]: |g − λ sign b| where b ≠ 0, (|g| − λ)₊ where b = 0; g = x'r/m."""
    at_zero = (gradient.abs() - penalty).clamp(min=0)
    return torch.where(b != 0, (gradient - penalty * b.sign()).abs(), at_zero).amax(0) / penalty


@dataclass(frozen=True)
class Design:
    """x [m, d] and y [m, t], centred, and what every step needs of them.

    Args:
        corr: x'y/m, [d, t].
        gram: b -> x'x b / m.
        inverse: v -> (x'x/m + rho)⁻¹ v.
        rho: ADMM's penalty, the mean diagonal of x'x/m.
    """

    corr: Tensor
    gram: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    rho: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Design:
        m, d = x.shape
        rho = float((x * x).sum() / (m * d)) or 1.0  # of columns that never vary
        if 2 * m < d:  # the m × m side: (ρ + x'x/m)⁻¹ = (1 − x'(mρ + xx')⁻¹x) / ρ
            inner = torch.linalg.inv((x @ x.T).double() + m * rho * torch.eye(m)).to(x)
            return cls(
                x.T @ y / m,
                lambda b: x.T @ (x @ b) / m,
                lambda v: (v - x.T @ (inner @ (x @ v))) / rho,
                rho,
            )
        gram = x.T @ x / m
        inverse = torch.linalg.inv(gram.double() + rho * torch.eye(d)).to(x)
        return cls(x.T @ y / m, lambda b: gram @ b, lambda v: inverse @ v, rho)


def admm(
    design: Design,
    penalty: Tensor,
    columns: Tensor,
    v: Tensor,
    tolerance: float,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Solve some columns for their λ [t], in place in v [d, t]; returns the violations [columns].

    The coefficients are soft(v, λ/ρ), and at the solution v = b + gradient/ρ.
    """
    found = torch.full_like(penalty, torch.inf)
    at, corr, limit, vs = (
        columns,
        design.corr[:, columns],
        penalty[columns] / design.rho,
        v[:, columns],
    )
    z = soft(vs, limit)
    for k in range(1, iterations + 1):
        x = design.inverse(corr + design.rho * (2 * z - vs))
        vs = RELAX * x + (1 - RELAX) * z + (vs - z)
        z = soft(vs, limit)
        near = (x - z).abs().amax(0) < tolerance * limit
        last = k == iterations
        if not last and (k % EVERY or not near.any()):
            continue  # no column can have converged: save the product that would tell
        wrong = violation(corr - design.gram(z), z, limit * design.rho)
        done = (wrong < tolerance) | last
        v[:, at[done]], found[at[done]] = vs[:, done], wrong[done]
        if done.all():
            break
        at, corr, limit, vs, z = (a[..., ~done] for a in (at, corr, limit, vs, z))
    return found[columns]


def polish(
    x: Array, gram: Array | None, corr: Array, b: Array, penalty: float
) -> tuple[Array, float]:
    """One target's exact solution from a near one, and its KKT violation relative to λ.

    The feature-sign search of Lee et al. 2007 (alg. 1): solve on the support with its signs held and go
    there, or to the best point on the way at which a coefficient reaches 0; then let violators in, as many
    as the rows can tell apart, or the worst alone where that made no progress.
    """
    m, b, alone = len(x), b.copy(), False
    for _ in range(ROUNDS):
        gradient = corr - (x.T @ (x @ b) / m if gram is None else gram @ b)
        zero = b == 0
        excess = np.where(zero, np.abs(gradient) - penalty, np.abs(gradient - penalty * np.sign(b)))
        wrong = float(excess.max()) / penalty
        if wrong < EXACT:
            break
        outside = np.where(zero, excess, 0.0)
        settled = bool((excess[~zero] < EXACT * penalty).all())
        room = max(1, m // 2 - int((~zero).sum())) if not alone else int(settled)
        enters = np.argsort(-outside)[:room]
        support = np.union1d(np.flatnonzero(~zero), enters[outside[enters] > EXACT * penalty])
        sign = np.where(zero, np.sign(gradient), np.sign(b))[support]
        if gram is None:
            inner = x[:, support].T @ x[:, support] / m
        else:
            inner = gram[np.ix_(support, support)]
        moved = _towards(inner, corr[support], b[support], sign, penalty)
        stuck = bool((moved == b[support]).all())
        if stuck and alone:
            break  # rounding allows no more
        alone, b[support] = stuck, moved
    return b, wrong


def _towards(gram: Array, corr: Array, old: Array, sign: Array, penalty: float) -> Array:
    """The point of least objective from `old` towards the optimum under the given signs."""
    from scipy.linalg import solve

    # the least damping turns null directions into long ways, which are cut where a coefficient is 0
    damped = gram + 1e-12 * np.trace(gram) * np.eye(len(gram))
    way = solve(damped, corr - penalty * sign - gram @ old, assume_a="pos")
    crosses = (old != 0) & ((old + way) * old < 0)
    crossing = np.where(crosses, -old / np.where(crosses, way, 1.0), 1.0)
    steps = np.unique(np.concatenate([[0.0], crossing, [1.0]]))
    points = old + steps[:, None] * way
    points[crosses & (crossing == steps[:, None])] = 0.0
    values = steps * (way @ (gram @ old - corr)) + 0.5 * steps**2 * (way @ gram @ way)
    return points[(values + penalty * np.abs(points).sum(1)).argmin()]


# --- the path ----------------------------------------------------------------------------------


def solve(x: Array, y: Array, penalty: Array, start: Array | None = None) -> tuple[Array, float]:
    """Exact coefficients [d, t] of centred x [m, d] and y [m, t] at one λ a target, and the worst violation.

    Warns:
        NotConverged: a target stopped above a violation of 1e-5 λ.
    """
    penalty = np.where(penalty > 0, penalty, 1.0)  # 0 is the λ_max of outputs that do not vary
    limit, columns = torch.from_numpy(penalty), torch.arange(len(penalty))
    z = torch.zeros(x.shape[1], len(penalty)) if start is None else torch.from_numpy(start)
    # with more rows than columns ADMM goes on in float64; with fewer it would crawl, and supports are small
    stages = [(torch.float32, CLOSE, ITERATIONS), (torch.float64, EXACT, FINISH)]
    for dtype, tolerance, iterations in stages[: 1 + (len(x) > x.shape[1])]:
        design = Design.of(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype))
        z, lam = z.to(dtype), limit.to(dtype)
        slope = (design.corr - design.gram(z)).clamp(-lam, lam)
        v = z + slope / design.rho
        missed = admm(design, lam, columns, v, tolerance, iterations).double().numpy()
        z = soft(v, lam / design.rho)
    near, corr = z.double().numpy(), x.T @ y / len(x)
    gram = x.T @ x / len(x) if 2 * len(x) >= x.shape[1] else None
    for j in np.flatnonzero(missed >= EXACT):
        near[:, j], missed[j] = polish(x, gram, corr[:, j], near[:, j], float(penalty[j]))
    wrong = float(missed.max(initial=0.0))
    _warn(wrong, 10 * EXACT, "the lasso")
    return near, wrong


def _warn(wrong: float, most: float, what: str) -> None:
    if not wrong <= most:
        warnings.warn(
            f"{what} stopped at a KKT violation of {wrong:.1e} of its penalty, expected at most {most:g}; "
            "raise the penalty, or use kind='ridge'",
            NotConverged,
            stacklevel=3,
        )


def validated(
    x: Array, y: Array, rows: Array, held: NDArray[np.bool_], progress: Progress
) -> tuple[Array, Array, Array]:
    """Penalties [t] with the least squared error on the held rows, that error [t], and coefficients.

    Warns:
        NotConverged: ADMM ran out of iterations somewhere on the path.
    """
    xs, ys, x_mean, y_mean = centred(x[~held], y[~held], rows[~held])
    design = Design.of(torch.from_numpy(xs).float(), torch.from_numpy(ys).float())
    x_held = torch.from_numpy(x[held] - x_mean).float()
    y_held = torch.from_numpy(y[held] - y_mean).float()
    root = torch.from_numpy(np.sqrt(rows[held] / rows[held].sum())).float()[:, None]
    top = design.corr.abs().amax(0)
    v = design.corr / design.rho  # the solution at λ_max, and (before) at more
    before = v.clone()
    error = (root * y_held).square().sum(0)  # λ_max: no effects
    penalty, coefficients, since = top.clone(), torch.zeros_like(v), torch.zeros(len(top))
    wrong = 0.0
    for k, ratio in enumerate(progress(RATIOS[1:])):
        columns = torch.nonzero((since < PATIENCE) & (top > 0))[:, 0]
        if len(columns) == 0:
            continue
        # v is linear in λ as long as the support stays: start where that leads
        ahead = (RATIOS[k] - ratio) / (RATIOS[k - 1] - RATIOS[k]) if k else 0.0
        last = v[:, columns]
        v[:, columns] += ahead * (last - before[:, columns])
        before[:, columns] = last
        wrong = max(wrong, float(admm(design, ratio * top, columns, v, LOOSE).max()))
        b = soft(v[:, columns], ratio * top[columns] / design.rho)
        now = (root * (y_held[:, columns] - x_held @ b)).square().sum(0)
        since[columns] += 1
        better = now < error[columns]
        at = columns[better]
        error[at], coefficients[:, at], since[at] = now[better], b[:, better], 0
        penalty[at] = ratio * top[at]
    _warn(wrong, LOOSE, "the path of the lasso")
    return penalty.double().numpy(), error.double().numpy(), coefficients.double().numpy()


def held_rows(x: Array, y: Array, share: float = 0.2) -> NDArray[np.bool_]:
    """Which rows [m] validate: a share drawn by seed 0 from the rows in the order of their bytes,

    so that the choice is the same in whatever order the rows come.
    """
    order = sorted(range(len(x)), key=lambda i: (x[i].tobytes(), y[i].tobytes()))
    drawn = np.random.default_rng(0).permutation(len(x))[: max(1, round(share * len(x)))]
    held = np.zeros(len(x), dtype=bool)
    held[np.asarray(order)[drawn]] = True
    return held


def lasso(
    x: Array, y: Array, rows: Array, penalty: float | None, progress: Progress = iter
) -> tuple[Array, dict[str, Any]]:
    """Coefficients [d, t] of y [m, t] on x [m, d] with an intercept, and how they were found.

    Args:
        rows: [m] row weights.
        penalty: λ for all targets; None chooses each target's by the squared error on a fifth of the rows
            (`held_rows`) along 30 values down to λ_max / 100, and refits on all rows.
    """
    xs, ys, _, _ = centred(x, y, rows)
    scale = np.sqrt((ys * ys).mean(0))
    scale[scale == 0] = 1.0
    held = held_rows(x, y)
    found, chosen, errors, wrong = [], [], [], 0.0
    for j in range(0, y.shape[1], TARGETS):
        block = slice(j, j + TARGETS)
        start, error = None, None
        if penalty is None:
            limit, error, start = validated(x, y[:, block] / scale[block], rows, held, progress)
            errors.append(error)
        else:
            limit = penalty / scale[block]
        fitted, missed = solve(xs, ys[:, block] / scale[block], limit, start)
        found.append(fitted * scale[block])
        chosen.append(limit * scale[block])
        wrong = max(wrong, missed)
    scores = np.concatenate(found, axis=1)
    meta: dict[str, Any] = {
        "penalty": np.concatenate(chosen).tolist() if penalty is None else penalty,
        "nonzero": float((scores != 0).mean()),
        "violation": wrong,
    }
    if penalty is None:
        meta["validation_error"] = float((np.concatenate(errors) * scale**2).mean())
        meta["validation_rows"] = int(held.sum())
    return scores, meta
