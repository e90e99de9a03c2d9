"""Ridge regression of every penalty from one decomposition, and the choice of penalty and prior scale.

    minimise over b   Σ_i ω_i (y_i − ȳ − s · p_i − (x_i − x̄) b)² + λ ‖b‖²

with p what a prior predicts. Both s and λ are chosen by exact leave-one-out errors, which cost a matrix
product a λ: the residual of a row that the fit has not seen is its residual over 1 − its leverage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attribution_core.data import Progress

Array = NDArray[np.float64]
GRID = np.logspace(-5, 3, 33)  # of penalties, in units of the mean eigenvalue
RANK = 1e-11  # eigenvalues below this share of the largest are rounding
CAUTION = 2.0  # squared standard errors by which the prior's scale is drawn towards 0
SEEN = 1e-10  # 1 − leverage below which a row is fitted whatever its output: no left-out error


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of every penalty from one eigendecomposition, with exact leave-one-out residuals.

    With x = u √d v' centred [m, n] and f = λ / (d + λ), in rows scaled by √ω:

        residual = y − u u'y + u (f · u'y)        1 − leverage = 1 − ω/Σω − Σ_k u_k² + Σ_k u_k² f_k

    and the residual of a row that the fit has not seen is their ratio (intercept included).

    Args:
        u: [m, r] orthonormal, orthogonal to √ω.
        d: [r] the eigenvalues of x'x above rounding.
        v: [n, r].
        rest: [m] 1 − ω/Σω − Σ_k u_k², exactly 0 where the rows are independent.
    """

    u: Array
    d: Array
    v: Array
    rest: Array

    @classmethod
    def of(cls, x: Array, rows: Array) -> Ridge:
        m, n = x.shape
        root = np.sqrt(rows / rows.sum())
        if m <= n:
            gram = x @ x.T
            gram += 2 * np.trace(gram) * np.outer(root, root)  # lifts the null vector √ω to the top
            d, u = np.linalg.eigh(gram)
            d, u = d[:-1], u[:, :-1]
            keep = d > RANK * d.max(initial=0)
            d, u = d[keep], u[:, keep]
            v = x.T @ u / np.sqrt(d)
        else:
            d, v = np.linalg.eigh(x.T @ x)
            keep = d > RANK * d.max(initial=0)
            d, v = d[keep], v[:, keep]
            u = x @ v / np.sqrt(d)
        rest = 1 - root**2 - (u * u).sum(1)
        return cls(u, d, v, np.zeros(m) if len(d) == m - 1 else rest)

    def outside(self, y: Array) -> Array | None:
        """The part of y [m, t] that no weights reach, y − u u'y; None if there is none."""
        return y - self.u @ (self.u.T @ y) if self.rest.any() else None

    def left_out(self, y: Array, penalty: float, outside: Array | None) -> Array:
        """Residuals [m, t] of rows that were left out, in rows scaled by √ω; nan where undetermined."""
        if np.isinf(penalty):
            f = np.ones_like(self.d)
        elif (
            outside is None
        ):  # both sides of the ratio carry λ: divide by it, and λ = 0 has a limit
            f = self.d.min(initial=np.inf) / (self.d + penalty)
        else:
            f = penalty / (self.d + penalty)
        residual = self.u @ (f[:, None] * (self.u.T @ y))
        if outside is not None:
            residual += outside
        kept = self.rest + (self.u**2) @ f
        return residual / np.where(kept > SEEN, kept, np.nan)[:, None]

    def coefficients(self, y: Array, penalty: float) -> Array:
        """[n, t]; the smallest of the best with penalty 0, and 0 with penalty ∞."""
        return self.v @ ((np.sqrt(self.d) / (self.d + penalty))[:, None] * (self.u.T @ y))


@dataclass(frozen=True)
class Choice:
    """A penalty, the prior's scales [t] and their left-out error, in units of the outputs' variance."""

    penalty: float
    scale: Array
    error: float


def choose(
    ridge: Ridge, y: Array, along: Array | None, penalty: float | None, progress: Progress
) -> Choice:
    """The penalty and the prior's scales with the least leave-one-out error.

    Residuals are linear in the scale, left out or not, so the best scale has a closed form for every λ.

    Args:
        along: [m, t] what the prior predicts, centred.
    """
    variance = (y * y).mean(0)
    variance[variance == 0] = 1.0
    if penalty is not None:
        grid = np.array([penalty])
    else:
        unit = float(ridge.d.sum()) / max(1, len(ridge.d)) or 1.0
        grid = np.append(unit * GRID, np.inf) if along is not None else unit * GRID
    perpendicular = ridge.outside(y), None if along is None else ridge.outside(along)
    found = []
    for one in progress(grid):
        left = ridge.left_out(y, one, perpendicular[0])
        scale = np.zeros(y.shape[1])
        if along is not None:
            of_prior = ridge.left_out(along, one, perpendicular[1])
            scale = _scales(np.nan_to_num(left), np.nan_to_num(of_prior), variance)
            left = left - scale * of_prior
        found.append(Choice(float(one), scale, float(((left * left).mean(0) / variance).mean())))
    known = [choice for choice in found if np.isfinite(choice.error)]
    return min(known, key=lambda choice: choice.error) if known else found[-1]


def away(ridge: Ridge, y: Array, along: Array) -> float:
    """How many standard errors the one scale of a prior for all targets lies from 0, where nothing else explains y.

    With b = 0: where b fits nearly every row, left-out errors go together, and their scatter is no error.
    """
    variance = (y * y).mean(0)
    variance[variance == 0] = 1.0  # outputs that never change
    left, of_prior = (ridge.left_out(x, np.inf, ridge.outside(x)) for x in (y, along))
    common, error = _common(np.nan_to_num(left), np.nan_to_num(of_prior), variance)
    return common / error if error > 0 else math.copysign(math.inf, common) if common else 0.0


def _common(left: Array, of_prior: Array, variance: Array) -> tuple[float, float]:
    """(one scale of the prior for all targets, its error over rows: the targets of one row err together)."""
    weighed = of_prior / variance
    power = float((of_prior * weighed).sum())
    if not power > 0:
        return 0.0, 0.0
    common = float((left * weighed).sum()) / power
    error = (((left - common * of_prior) * weighed).sum(1) ** 2).sum() / power**2
    return common, math.sqrt(error)


def _scales(left: Array, of_prior: Array, variance: Array) -> Array:
    """The prior's scale for every target [t]: its own, drawn towards that of all, and that towards 0.

    Each is drawn as far as it is uncertain (empirical Bayes; the positive part of James and Stein): with
    error e of an estimate s of 0, s (1 − CAUTION e²/s²)₊, which is all there is to one target.
    """
    common, error = _common(left, of_prior, variance)
    pooled = common * max(0.0, 1 - CAUTION * error**2 / common**2) if common != 0 else 0.0
    each = (of_prior * of_prior).sum(0)
    each = np.where(each > 0, each, np.inf)
    own = (left * of_prior).sum(0) / each
    noise = ((left - own * of_prior) ** 2).mean(0) / each
    # from the common scale as it was: how far it was drawn tells no targets apart
    beyond = (own - common) ** 2 - noise
    spread = max(0.0, float(beyond.mean() - beyond.std() / np.sqrt(len(beyond))))
    share = spread / (spread + noise) if spread > 0 else 0.0
    return pooled + share * (own - pooled)
