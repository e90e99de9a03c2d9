"""Conjugate gradients for many right-hand sides at once (Hestenes & Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attribution_core.data import Progress


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    v: Tensor,
    tolerance: float,
    max_iterations: int,
    progress: Progress = iter,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Solve A x = v for every row of v [k, p], A symmetric positive definite; true residual checked.

    `precondition` is a symmetric positive definite guess at A⁻¹; it changes how many iterations are
    needed, not the solution.

    >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> x = conjugate_gradients(lambda rows: rows @ a, torch.eye(2).double(), 1e-12, 10)
    >>> torch.allclose(x @ a, torch.eye(2).double())
    True
    """
    x = conjugate_steps(multiply, v, max_iterations, tolerance, progress, precondition)
    # the recursion's residual drifts from the true one by rounding; ten times its goal is allowed
    size = v.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    left = ((v - multiply(x)).norm(dim=1) / size).max().item()
    if left > 10 * tolerance:
        raise ValueError(
            f"conjugate gradients did not converge: relative residual {left:.2g} after "
            f"{max_iterations} iterations, asked for {tolerance:.2g}; raise the damping, "
            "max_iterations or the tolerance"
        )
    return x


def conjugate_steps(
    multiply: Callable[[Tensor], Tensor],
    v: Tensor,
    steps: int,
    tolerance: float = 0.0,
    progress: Progress = iter,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """So many steps of conjugate gradients from 0, fewer where the tolerance is reached, or squares underflow."""
    x = torch.zeros_like(v)
    residual = v.clone()
    direction = toward = residual.clone() if precondition is None else precondition(residual)
    size = v.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    square = (residual * toward).sum(1)
    info = torch.finfo(v.dtype)
    for _ in progress(range(steps)):
        active = (residual.norm(dim=1) > tolerance * size) & (square > info.tiny / info.eps)
        if not active.any():
            break
        image = multiply(direction)
        curvature = (direction * image).sum(1)
        if (curvature[active] <= 0).any():
            raise ValueError(
                "expected a positive definite curvature, conjugate gradients met a direction of none; "
                "use curvature='gauss_newton', or raise the damping; in half precision rounding alone makes such "
                "directions where the damping is small: take model.float()"
            )
        step = torch.where(active, square / curvature, 0.0)[:, None]
        x = x + step * direction
        residual = residual - step * image
        toward = residual if precondition is None else precondition(residual)
        new = (residual * toward).sum(1)
        direction = toward + torch.where(active, new / square, 0.0)[:, None] * direction
        square = new
    return x
