"""True Newton steps to other training weights: for removals too large for a linear datamodel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.calling import Params
from attribution_core.data import batches
from attribution_core.datamodel import rows_of, weight_rows
from attribution_core.layerwise.vectors import by_name, vector
from attribution_core.problem import Outputs, Problem
from attribution_core.second_order.quadratic import (
    ALONE,
    Quadratic,
    factored,
    output_width,
    rows_at_once,
    second_order,
    solved,
    standing,
)
from attribution_core.training import Run

HELD = 2**28  # numbers of a stacked Jacobian, 2 GiB, that are kept at most


@dataclass(frozen=True, eq=False)
class NewtonDatamodel:
    """Outputs after Newton steps at given training weights, starting from fitted parameters.

    Not linear in the weights: no `scores`. See `newton`, which makes it.
    """

    problem: Problem  # at the fitted parameters
    outputs: Outputs
    base: NDArray[np.float64]  # [t], outputs at the fitted parameters
    anchor: NDArray[np.float64]  # [n], the weights that they were fitted at
    unit: float  # what a unit of weight counts in the mean loss
    damping: Tensor  # [p]
    steps: int
    rows: Quadratic  # all n training rows at the fitted parameters
    ids: NDArray[Any]
    targets: NDArray[Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, weights: ArrayLike) -> NDArray[np.float64]:
        """Outputs [t] for weights [n], or [m, t] for weights [m, n], at the parameters of `params`.

        Raises:
            ValueError: weights of another shape or that are not finite; weights at which the
                curvature is not positive definite; steps that diverge.
        """
        weights = weight_rows(weights, len(self.anchor))
        found = [
            self.outputs.evaluate(self.problem.model, self.params(row)).numpy()
            for row in np.atleast_2d(weights)
        ]
        return found[0] if weights.ndim == 1 else np.stack(found)

    def without(self, ids: Iterable[Any]) -> NDArray[np.float64]:
        """Outputs [t] when the examples `ids` are left out (weight 0, the others at 1)."""
        weights = np.ones(len(self.anchor))
        weights[rows_of(ids, self.ids)] = 0.0
        return self.predict(weights)

    def params(self, weights: ArrayLike) -> Params:
        """The parameters after the Newton steps at weights [n], by name."""
        w = np.asarray(weights, dtype=float)
        if w.shape != self.anchor.shape or not np.isfinite(w).all():
            raise ValueError(f"expected finite weights [n={len(self.anchor)}], got shape {w.shape}")
        named = self.problem.params
        start = vector(named)
        theta = start + self._first_step(torch.from_numpy(w))
        kept = np.flatnonzero(w)
        for _ in range(self.steps - 1):
            if not theta.isfinite().all():
                break
            rows = _stacked(self.problem, by_name(theta, named), kept)
            share = self.unit * torch.from_numpy(w[kept])
            h = rows.gram(share) + torch.diag(self.problem.decay + self.damping)
            slope = rows.gradient(share) + self.problem.decay * theta
            slope = slope + self.damping * (theta - start) - self._left
            theta = theta - solved(factored(h), slope[None])[0]
        if not theta.isfinite().all():
            raise ValueError(
                "expected Newton steps that converge, got parameters that are not finite; take fewer "
                "steps, or give a weight decay or a damping"
            )
        return by_name(theta, named)

    @cached_property
    def _left(self) -> Tensor:
        """The gradient [p] that the fitted parameters are taken to have at the anchor, see `newton`."""
        if (self.damping == 0).all():
            return torch.zeros_like(self.damping)
        at_anchor = self.rows.gradient(self.unit * torch.from_numpy(self.anchor))
        return at_anchor + self.problem.decay * vector(self.problem.params)

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor [p, p] of H(anchor) + weight_decay + damping."""
        h = self.rows.gram(self.unit * torch.from_numpy(self.anchor))
        return factored(h + torch.diag(self.problem.decay + self.damping))

    def _first_step(self, w: Tensor) -> Tensor:
        """−H(w)⁻¹ ∇L(w), [p], by whichever way is cheaper."""
        slope = self.rows.gradient(self.unit * w) - self._left
        slope = slope + self.problem.decay * vector(self.problem.params)
        changed = int((w != torch.from_numpy(self.anchor)).sum())
        if changed * self.rows.x.shape[1] < len(slope):
            step = self._by_changes(w, slope)
            if step is not None:
                return step
        return self._by_rows(w, slope)

    def _by_rows(self, w: Tensor, slope: Tensor) -> Tensor:
        """The step with H(w) formed over all rows of weight."""
        h = self.rows.gram(self.unit * w) + torch.diag(self.problem.decay + self.damping)
        return -solved(factored(h), slope[None])[0]

    def _by_changes(self, w: Tensor, slope: Tensor) -> Tensor | None:
        """The step from the factor of H(anchor) and the k rows that changed (Woodbury).

        With Y = L⁻¹ X_Kᵀ: H(w) = L (I + Y Δ Yᵀ) Lᵀ. None where what is taken away leaves (nearly)
        nothing of some direction: forming H(w) decides that better.
        """
        change = self.unit * (w - torch.from_numpy(self.anchor))
        some = torch.nonzero(change)[:, 0]
        x = self.rows.x[some].flatten(0, 1)
        delta = (change[some, None] * self.rows.curve[some]).flatten()
        y = torch.linalg.solve_triangular(self._factor, x.T, upper=False)
        seen = y.T @ y
        eye = torch.eye(len(delta), dtype=torch.float64)
        loss = (-delta).clamp(min=0).sqrt()
        pivots, failed = torch.linalg.cholesky_ex(eye - loss[:, None] * seen * loss)
        if failed or (pivots.diag().square() < 1 - ALONE).any():
            return None
        part = torch.linalg.solve_triangular(self._factor, slope[:, None], upper=False)
        inner = torch.linalg.solve(eye + delta[:, None] * seen, delta[:, None] * (y.T @ part))
        back = torch.linalg.solve_triangular(self._factor.T, part - y @ inner, upper=True)
        return -back[:, 0]


def newton(
    source: Problem | Run,
    outputs: Outputs,
    *,
    steps: int = 1,
    damping: float | Tensor | None = None,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
) -> NewtonDatamodel:
    """Newton-step datamodel: f̂(w) = outputs at θ − (H(w) + weight_decay + damping)⁻¹ ∇L(θ; w).

    L(θ; w) = (1/(α n)) Σ w_i ℓ_i(θ) + ½ weight_decay ‖θ‖². One step accounts for what the removed
    examples did to the curvature, and outputs are evaluated, not linearised: the choice for large
    removals. Several steps converge to the exact refit of a convex problem. Costs one [n c, p] product
    and a factorisation for every row of weights; far less where few weights differ from the anchor.

    Args:
        source, weights, exposure: see `influence`.
        steps: Newton steps from the fitted parameters; J, D and r are taken anew for each.
        damping: as in `leave_one_out`. With any, the objective has the term ½ damping ‖θ − c‖², where c
            makes the fitted parameters its optimum at the anchor (a run that stopped early stays where
            it is there); without, the gradient is that of L itself, so a fit that stopped a little
            early is also finished.

    Raises:
        ValueError: more than 6,000 parameters; a Jacobian of all rows over 2 GiB; a loss that does not
            call the model exactly once; fewer than one step.

    Source: Newton's method from the old optimum: Pregibon 1981; Guo et al. 2020 (eq. 3), for removals.
    """
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    at, added = standing(source, damping, weights, exposure)
    problem = at.problem
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN
    n, c, p = problem.n, output_width(problem), len(added)
    if n * c * p > HELD:
        raise ValueError(
            f"expected a Jacobian of at most {HELD * 8 / 2**30:.0f} GiB, got n={n} rows × c={c} outputs × "
            f"p={p} parameters = {n * c * p * 8 / 2**30:.1f} GiB; train fewer parameters "
            "(requires_grad_(False) on the body leaves the head), or use influence or leave_one_out"
        )
    rows = _stacked(problem, problem.params, np.arange(n))
    meta = {
        "method": "newton",
        "curvature": "gauss_newton",
        "steps": steps,
        "damping": float(added.mean()),
        "weight_decay": float(problem.decay.mean()),
        "exposure": at.exposure,
    }
    names = np.asarray(outputs.names) if outputs.names else np.arange(len(outputs))
    return NewtonDatamodel(
        problem, outputs, base, at.anchor, at.unit, added, steps, rows, np.arange(n), names, meta
    )


def _stacked(problem: Problem, params: Params, rows: NDArray[np.intp]) -> Quadratic:
    """`second_order` of many rows, block by block into one tensor."""
    c, p = output_width(problem), len(problem.decay)
    x = torch.empty(len(rows), c, p, dtype=torch.float64)
    slope, curve = torch.empty(2, len(rows), c, dtype=torch.float64)
    for place in batches(len(rows), rows_at_once(problem)):
        part = second_order(problem, params, rows[place])
        x[place], slope[place], curve[place] = part.x, part.slope, part.curve
    return Quadratic(x, slope, curve)
