"""Removal of training rows from a convex problem by Newton steps, with a certificate of what is left.

    L(θ; w) = (1/n) Σ w_i ℓ_i(θ) + ½ weight_decay ‖θ‖² + bᵀθ/n        n fixed, removed rows at weight 0

The model is linear in its parameters, outputs z_i = J_i θ + constant. A Newton step d = −H(w)⁻¹∇L(θ; w)
leaves ∇L(θ + d; w) = ∫₀¹ [H(θ + s d) − H(θ)] d ds, and where ‖ℓ_i''(z + u) − ℓ_i''(z)‖ ≤ γ ‖u‖

    ‖∇L(θ + d; w)‖ ≤ ½ γ (1/n) ‖√w J‖₂ ‖(√w_i ‖J_i d‖²)_i‖₂

wherever the step began: nothing that earlier steps left is carried on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.calling import Params
from attribution_core.data import checked_weights
from attribution_core.problem import Problem
from attribution_core.second_order.affine import (
    Smoothness,
    gradient_norm,
    minimised,
    moved,
    newton_step,
    objective,
    refuse_nonlinear,
    smoothness_of,
    step_bounds,
)
from attribution_core.second_order.quadratic import standing

LARGEST = 4.0  # epsilon up to which Guo et al.'s constant is enough for the tail of a Gaussian
NEAR = 0.01  # of the objective: what a fitted model may still gain by one Newton step


@dataclass(frozen=True, eq=False)
class Certified:
    """A fitted linear model, rows removed or not, with bounds on what its gradient still holds.

    Gradients are of the mean loss, in nats (or the loss's unit) per unit of parameter. Made by
    `fit_certified` and `remove`; `.remove(rows)` gives the next, and nothing is changed in place.
    """

    problem: Problem  # at the parameters found; the model is a copy
    weights: NDArray[np.float64]  # [n], 0 for removed rows
    residual: float  # ‖∇L(θ; w)‖, measured
    bound: float  # what it is proven not to exceed, rounding included; after a fit the residual
    loss: Smoothness  # γ
    noise: Tensor  # b [p], zeros without
    sigma: float = 0.0  # of the noise
    epsilon: float = 1.0
    delta: float = 1e-4
    steps: int = 0  # of the last removal
    spent: float = 0.0  # sum of the bounds of all removals since the fit
    recognised: bool = False  # γ, by the loss's second derivatives, rather than given
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.problem.model

    @property
    def params(self) -> Params:
        return self.problem.params

    @property
    def allowed(self) -> float:
        """σ ε / (c n), c = √(2 log(1.5/δ)): the residual that the noise hides; 0 without noise.

        Guo et al. sum the losses, Σ ℓ_i + ½ λ n ‖θ‖² + bᵀθ, b ~ N(0, σ² I), and allow a gradient of
        σ ε / c. That is n times this objective, so the gradient of the mean may have 1/n of it.

        Source: Guo et al. 2020, Theorem 3.
        """
        c = math.sqrt(2 * math.log(1.5 / self.delta))
        return self.sigma * self.epsilon / (c * len(self.weights))

    @property
    def retrain(self) -> bool:
        """Whether there is noise that does not hide the bound: then `.refit(seed)`, or take more steps."""
        return self.sigma > 0 and self.bound > self.allowed

    @property
    def distance(self) -> float:
        """bound / min weight_decay: what ‖θ − θ*(w)‖, to the exact refit, does not exceed.

        By strong convexity; infinite where a parameter has no weight decay, such as a free intercept.
        """
        least = float(self.problem.decay.min())
        return self.bound / least if least > 0 else math.inf

    def remove(self, rows: Iterable[int] | ArrayLike, *, steps: int = 1) -> Certified:
        """The model without some more training rows, by Newton steps. See the function `remove`."""
        w = self.weights.copy()
        w[_rows(rows, w)] = 0.0
        return self.reweight(w, steps=steps)

    def reweight(self, weights: ArrayLike, *, steps: int = 1) -> Certified:
        """The model at any other training weights [n] of at least 0, by Newton steps.

        Raises:
            ValueError: a gradient left that is larger than the bound: γ is not the loss's.
        """
        w = checked_weights(weights, self.problem.n, some=True)
        if steps < 1:
            raise ValueError(f"expected at least one step, got {steps}")
        problem = self.problem
        for _ in range(steps - 1):
            problem = moved(problem, newton_step(problem, w, self.noise).d)
        step = newton_step(problem, w, self.noise)
        ours, guo = step_bounds(problem, w, step.d, self.loss)
        problem, bound = moved(problem, step.d), ours + step.rounding
        left = gradient_norm(problem, w, self.noise)
        if not left <= bound:
            raise ValueError(
                f"expected a gradient of at most {bound:.3g} after the step, got {left:.3g}: the loss is not what "
                f"it was taken for, of second derivatives that change by at most gamma={self.loss.gamma:.3g} for each "
                "unit of output; give a gamma that holds for it"
            )
        return replace(
            self, problem=problem, weights=w, residual=left,
            bound=bound, steps=steps, spent=self.spent + bound,
            meta={"rounding": step.rounding, "guo": guo + step.rounding},
        )  # fmt: skip

    def refit(self, seed: int) -> Certified:
        """The exact optimum at the present weights, with noise of another seed: nothing is spent."""
        return _fitted(replace(self, noise=_drawn(self.sigma, len(self.noise), seed)))

    def table(self) -> str:
        """What was removed, what is left, and whether the noise hides it, as text."""
        gone = int((self.weights == 0).sum())
        how = f"{self.steps} Newton step{'s' * (self.steps != 1)}" if self.steps else "a fit"
        lines = [
            f"{gone} of {len(self.weights)} rows at weight 0, by {how}",
            f"gradient left    {self.residual:.2e}, proven at most {self.bound:.2e}",
            f"from the refit   at most {self.distance:.2e} in the parameters",
        ]
        if self.sigma == 0:
            return "\n".join([*lines, "no noise, so nothing is hidden: fit_certified(..., sigma=)"])
        given = f"sigma {self.sigma:g}, epsilon {self.epsilon:g}, delta {self.delta:g}"
        lines.append(f"noise hides      {self.allowed:.2e} ({given})")
        over = "RETRAIN (refit) or take more steps: the bound is larger"
        return "\n".join([*lines, over if self.retrain else "certified"])

    def __str__(self) -> str:
        return self.table()


def fit_certified(
    problem: Problem,
    *,
    weights: ArrayLike | None = None,
    sigma: float = 0.0,
    epsilon: float = 1.0,
    delta: float = 1e-4,
    gamma: float | None = None,
    seed: int = 0,
) -> Certified:
    """Fit to rounding by Newton steps, with noise in the loss that hides what removals will leave.

    Minimises L(θ; w) + bᵀθ/n, b ~ N(0, sigma² I), [p]. Whoever sees the parameters after a removal can
    then hardly tell them from a fit that never saw the rows: the two probabilities of any event differ by
    a factor of at most e^epsilon, but for delta, while bound ≤ allowed.

    It holds for one published model at a time and for requests that do not depend on what was published.
    Guo et al.'s proof takes the residual to be independent of b. It is a function of b, and the exact
    log-ratio has the further term log |det(I − n ∂r/∂b)|, r the residual: small where residuals are.

    >>> x, y = torch.ones(3, 1).double(), torch.tensor([1.0, 2.0, 6.0]).double()
    >>> from attribution_core.outputs import squared_error
    >>> line = Problem(nn.Linear(1, 1, bias=False).double(), squared_error, (x, y), weight_decay=1.0)
    >>> fitted = fit_certified(line)  # Σ y / (Σ w + n weight_decay)
    >>> round(fitted.model.weight.item(), 9), round(fitted.remove([2]).model.weight.item(), 9)
    (1.5, 0.6)

    Args:
        problem: its parameters are where the search starts; the model is not changed.
        weights: [n], 1 if not given.
        sigma: of the noise in the sum of losses; 0 for none, and then no epsilon is certified.
        epsilon, delta: the certificate, natural logarithm and probability.
        gamma: γ, for a loss other than cross entropy, logistic and squared error (these are recognised
            by their second derivatives, at the points tried: in every row, around the outputs of the fit).

    Raises:
        ValueError: a model not linear in its parameters, in float32, or of over 6,000 parameters; a loss
            whose γ is not known; no weight decay (with noise: on every parameter); an epsilon above 4.

    Source: Guo et al. 2020, Algorithm 1, Theorem 3; noise in the loss: Chaudhuri et al. 2011.
    """
    if not (sigma >= 0 and math.isfinite(sigma) and 0 < epsilon <= LARGEST and 0 < delta < 1):
        raise ValueError(
            f"expected sigma of at least 0, epsilon in (0, {LARGEST:g}] and delta in (0, 1), got "
            f"{sigma}, {epsilon} and {delta}; what is certified at {LARGEST:g} is at any larger epsilon"
        )
    if sigma > 0 and not (problem.decay > 0).all():
        raise ValueError(
            "expected a weight decay on every parameter, got some without: noise may then leave no "
            "optimum; give one number for all"
        )
    start = _start(problem, weights, gamma)
    noise = _drawn(sigma, len(problem.decay), seed)
    return _fitted(replace(start, noise=noise, sigma=sigma, epsilon=epsilon, delta=delta))


def remove(
    problem: Problem,
    rows: Iterable[int] | ArrayLike,
    *,
    steps: int = 1,
    weights: ArrayLike | None = None,
    gamma: float | None = None,
) -> Certified:
    """A fitted model without some training rows: θ − H(w)⁻¹ ∇L(θ; w), w = 0 at the rows.

    Each step costs a product of n Jacobians and a factorisation [p, p]. What is left of the gradient is
    of second order in the rows removed; with another step, of fourth. The input is not changed.

    Args:
        problem: at its optimum, or nearly: a fit that stopped early is finished on the way.
        rows: row numbers, each once, not all, of those that have weight.
        steps: the bound is that of the last.
        weights: [n], what the model was fitted at; 1 if not given.
        gamma: see `fit_certified`, whose result certifies an epsilon too.

    Raises:
        KeyError: rows that are not 0..n−1.
        ValueError: rows twice, removed before, or all; a model far from its optimum; more gradient left than
            γ allows; see `fit_certified`.

    Source: Guo et al. 2020, eq. 3 and Corollary 1 (for one logit and one row); two steps: arXiv 2505.07640.
    """
    start = _start(problem, weights, gamma)
    _rows(rows, start.weights)  # before anything is computed
    gain = newton_step(problem, start.weights, start.noise).gain
    height = objective(problem, start.weights, start.noise)
    if gain > NEAR * abs(height):
        raise ValueError(
            f"expected a model at the optimum of its problem, got one that a Newton step would better by "
            f"{gain:.3g} of {height:.3g} nats; fit it first: fit_certified(problem).remove(rows)"
        )
    return start.remove(rows, steps=steps)


def _fitted(start: Certified) -> Certified:
    """The optimum at the weights and noise of `start`."""
    problem, rounding = minimised(start.problem, start.weights, start.noise)
    left = gradient_norm(problem, start.weights, start.noise)
    meta = {"rounding": rounding, "guo": left}
    # again, where it counts: before, the outputs may have been far from those of the fit
    loss = smoothness_of(problem) if start.recognised else start.loss
    return replace(
        start, problem=problem, loss=loss, residual=left, bound=left, spent=0.0, steps=0, meta=meta
    )


def _drawn(sigma: float, p: int, seed: int) -> Tensor:
    return torch.from_numpy(sigma * np.random.default_rng(seed).standard_normal(p))


# --- what is refused -------------------------------------------------------------------------


def _start(problem: Problem, weights: ArrayLike | None, gamma: float | None) -> Certified:
    """A problem that may be certified, where it stands; nothing is claimed of it yet."""
    standing(problem, None, None, 1.0)  # few parameters, no dropout
    if not (problem.decay > 0).any():
        raise ValueError(
            "expected a weight decay, got none: nothing then bounds how far a removal moves the "
            "parameters; fit with some, and give it to the Problem"
        )
    refuse_nonlinear(problem)
    w = checked_weights(weights, problem.n, some=True)
    if gamma is not None and not 0 <= gamma < math.inf:
        raise ValueError(f"expected a finite gamma of at least 0, got {gamma}; see fit_certified")
    known = smoothness_of(problem) if gamma is None else Smoothness(float(gamma), centred=False)
    noise = torch.zeros(len(problem.decay), dtype=torch.float64)
    return Certified(problem, w, math.nan, math.nan, known, noise, recognised=gamma is None)


def _rows(rows: Iterable[int] | ArrayLike, weights: NDArray[np.float64]) -> NDArray[np.intp]:
    given: Any = rows if isinstance(rows, np.ndarray) else list(rows)  # type: ignore[arg-type]
    wanted, n = np.asarray(given), len(weights)
    if wanted.ndim != 1 or not len(wanted) or not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(
            f"expected row numbers, at least one, got {wanted.dtype} of shape {wanted.shape}; give "
            "np.flatnonzero of a mask, and weights to .reweight"
        )
    unknown = wanted[(wanted < 0) | (wanted >= n)]
    if len(unknown):
        raise KeyError(f"unknown rows {unknown[:5].tolist()}; there are rows 0 to {n - 1}")
    names, count = np.unique(wanted, return_counts=True)
    if (count > 1).any():
        raise ValueError(f"expected each row once, got {names[count > 1][:5].tolist()} again")
    gone = names[weights[names] == 0]
    if len(gone):
        raise ValueError(f"expected rows of weight, got {gone[:5].tolist()} that have none already")
    if len(names) == np.count_nonzero(weights):
        raise ValueError("expected rows to stay, got all of them to remove")
    return wanted
