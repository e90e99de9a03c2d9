"""A problem to second order in its parameters: Jacobians, slopes and curvatures of single examples.

    H(w) = (1/n) Σ w_i J_iᵀ D_i J_i + weight_decay + damping

J_i [c, p] is the Jacobian of the model's output on example i, r_i [c] the gradient and D_i [c, c] the
Hessian of its loss in that output: the Gauss–Newton curvature, for linear models the objective's own
Hessian. Rows are kept in coordinates where D_i is diagonal, so a row counts as c rows of rank one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.func import grad, jacrev

from attribution_core.calling import Params, per_example
from attribution_core.curvature import DENSE
from attribution_core.data import take
from attribution_core.gradients import as_batch, row_by_row
from attribution_core.layerwise.opened import open_output
from attribution_core.layerwise.vectors import flatten
from attribution_core.problem import Problem
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.stepwise.trained import Trained, trained
from attribution_core.training import Run

ALONE = 1 - 1e-6  # leverage from which an example alone determines a direction
BLOCK = 2**23  # numbers of a stacked Jacobian that are worked on at a time, 64 MiB


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Losses to second order: ℓ_i(θ + d) ≈ ℓ_i + r_i·X_i d + ½ Σ_k s_ik (X_i d)_k², D_i diagonal."""

    x: Tensor  # [b, c, p], X_i = Q_iᵀ J_i with D_i = Q_i diag(s_i) Q_iᵀ
    slope: Tensor  # [b, c], r_i
    curve: Tensor  # [b, c], s_i

    def gradient(self, w: Tensor) -> Tensor:
        """Σ w_i ∇ℓ_i, [p]."""
        return torch.einsum("bc,bcp->p", w[:, None] * self.slope, self.x)

    def gram(self, w: Tensor) -> Tensor:
        """Σ w_i J_iᵀ D_i J_i, [p, p]."""
        _, c, p = self.x.shape
        total = torch.zeros(p, p, dtype=torch.float64)
        rows = torch.nonzero(w)[:, 0]
        for some in rows.split(max(1, BLOCK // (c * p))):
            x = self.x[some].reshape(-1, p)
            total += x.T @ (x * (w[some, None] * self.curve[some]).reshape(-1, 1))
        return total


def hessian(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """∂² loss / ∂z², reverse over reverse: torch's own goes forward, which some losses cannot (soft margin)."""
    return jacrev(grad(loss))


def second_order(problem: Problem, params: Params, rows: NDArray[np.intp]) -> Quadratic:
    """J, r and D of some training rows at `params`, float64 on the CPU.

    Raises:
        ValueError: a loss that does not call the model exactly once; values that are not finite.
    """
    batch = take(problem.train, rows, problem.device)
    per_example(problem.model, problem.loss, batch, params, rows)  # one finite number per row?

    def one(example: Any) -> tuple[Tensor, Tensor, Tensor]:
        row = as_batch(example)
        opened = partial(open_output, problem.model, problem.loss, batch=row)
        output, losses = opened(params=params)
        sizes = [value.numel() for value in output]

        def loss(z: Tensor) -> Tensor:
            parts = zip(z.split(sizes), output, strict=True)
            return losses([part.reshape(value.shape) for part, value in parts])[0]

        def flat(at: Params) -> Tensor:
            return torch.cat([value.flatten() for value in opened(params=at)[0]])

        z = torch.cat([value.flatten() for value in output])
        return flatten(jacrev(flat)(params)), grad(loss)(z), hessian(loss)(z)

    j, r, d = row_by_row(one, batch)
    j, r, d = (part.detach().double().cpu() for part in (j, r, d))
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in (j, r, d)]).all(0)
    if not finite.all():
        raise ValueError(
            f"expected finite curvature, got NaN or infinity from rows {rows[~finite.numpy()][:10].tolist()}, "
            "whose losses are finite; look at functions without a slope there, such as a root of 0"
        )
    curve, basis = torch.linalg.eigh(d)
    return Quadratic(basis.mT @ j, (basis.mT @ r[..., None])[..., 0], curve)


def standing(
    source: Problem | Run,
    damping: float | Tensor | None,
    weights: ArrayLike | None,
    exposure: float,
) -> tuple[Trained, Tensor]:
    """Where the model stands, and the damping [p]; refuses what has no dense Gauss–Newton."""
    at = trained(source, weights, exposure)
    p = len(at.problem.decay)
    refuse_random_layers(at.problem.model)
    if p > DENSE:
        raise ValueError(
            f"expected at most {DENSE} trainable parameters, got {p}, and the curvature is formed and "
            "factored; freeze what need not move (requires_grad_(False)), or use influence"
        )
    if damping is None:
        added = torch.zeros(p, dtype=torch.float64) if at.damping is None else at.damping
        return at, added
    added = torch.as_tensor(damping, dtype=torch.float64).cpu()
    if added.shape not in ((), (p,)) or not (added >= 0).all():
        raise ValueError(f"expected damping of at least 0, one number or [p={p}], got {damping}")
    return at, added.expand(p)


def output_width(problem: Problem) -> int:
    """c: how many numbers the model puts out for one example."""
    first = take(problem.train, [0], problem.device)
    with torch.no_grad():
        output, _ = open_output(problem.model, problem.loss, problem.params, first)
    return sum(value.numel() for value in output)


def rows_at_once(problem: Problem) -> int:
    return max(1, BLOCK // (output_width(problem) * len(problem.decay)))


# --- Newton steps for any weights ------------------------------------------------------------


def factored(h: Tensor) -> Tensor:
    """The lower factor of H; an error where H is singular to rounding."""
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed or (factor.diag().square() < 1e-14 * h.diag()).any():
        raise ValueError(
            "expected a positive definite curvature, got a smallest eigenvalue of "
            f"{float(torch.linalg.eigvalsh(h)[0]):.3g}: at these weights the examples, weight decay and "
            "damping leave some direction of the parameters open; raise one of the latter"
        )
    return factor


def solved(factor: Tensor, v: Tensor) -> Tensor:
    """H⁻¹ V for every row of v [k, p]."""
    return torch.cholesky_solve(v.T, factor).T
