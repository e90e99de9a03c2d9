"""Problems whose outputs are linear in the parameters: z_i(θ) = J_i θ + constant, J_i [c, p].

What a Newton step leaves of their gradient follows from J and one constant γ of the loss,
‖ℓ''(z + u) − ℓ''(z)‖ ≤ γ ‖u‖, with norms in output space.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from attribution_core.calling import Params, per_example
from attribution_core.data import Batch, batches, sample, take, tensors_in
from attribution_core.gradients import as_batch, mean_gradient, row_by_row
from attribution_core.layerwise.jacobian import move_parameters, row_jacobians
from attribution_core.layerwise.opened import open_output
from attribution_core.layerwise.vectors import vector
from attribution_core.problem import Problem
from attribution_core.second_order.quadratic import (
    BLOCK,
    factored,
    hessian,
    rows_at_once,
    second_order,
    solved,
)

LOGISTIC = 1 / (6 * math.sqrt(3))  # max |σ''|
SOFTMAX = math.sqrt(2) / (3 * math.sqrt(3))  # see `Smoothness`
CHECKED = 256  # rows at which a model is tried for being linear
REACHES = (
    1e-6,
    0.01,
    0.1,
    1.0,
    30.0,
)  # around outputs and labels, of their size: where a loss is tried
FEW = 8  # operations that a loss takes to its slope, each of which rounds
SMALL = 1e-9  # relative; float64 is off by some 1e-15 times the terms of a product


class Smoothness(NamedTuple):
    """γ of a loss, and whether it does not see a common shift of its outputs.

        logistic, each output its own    1/(6√3) ≈ .0962
        cross entropy (softmax)          √2/(3√3) ≈ .2722
        squared error                    0

    The third derivative of logsumexp along u is the third central moment of a variable on the values u_k,
    at most R³/(6√3) on an interval of length R, and a unit vector's entries lie within R ≤ √2. The norm
    of a symmetric trilinear form is that at equal arguments (Banach 1938).
    """

    gamma: float
    centred: bool  # then outputs count without their mean: J_i − 1 1ᵀJ_i/c


def refuse_nonlinear(problem: Problem) -> None:
    """Raise unless the outputs are float64 and affine in the parameters, tried along random lines.

    Raises:
        ValueError: another precision; z(θ + v) + z(θ − v) ≠ 2 z(θ) at up to 256 rows.
    """
    kinds = {value.dtype for value in problem.params.values()}
    if kinds != {torch.float64}:
        raise ValueError(
            f"expected parameters in float64, got {sorted(map(str, kinds))}: rounding would be larger than "
            "what is certified; use model.double(), and inputs in float64"
        )
    here, rows = problem.params, sample(problem.n, CHECKED)
    batch = take(problem.train, rows, problem.device)

    def outputs(params: Params) -> Tensor:
        with torch.no_grad():
            return _only(open_output(problem.model, problem.loss, params, batch)[0])

    rng = torch.Generator().manual_seed(0)
    base = outputs(here)
    for scale in (0.1, 1.0, 10.0):
        v = {
            name: scale * torch.randn(value.shape, generator=rng, dtype=value.dtype).to(value)
            for name, value in here.items()
        }
        up = outputs({name: value + v[name] for name, value in here.items()})
        down = outputs({name: value - v[name] for name, value in here.items()})
        bent = float((up + down - 2 * base).abs().max())
        if bent > SMALL * float(torch.stack([up, down, base]).abs().max() + 1):
            raise ValueError(
                f"expected outputs linear in the trained parameters, got ones that bend by {bent:.3g}; train "
                "the last layer alone (requires_grad_(False) on the body), or use newton, without a certificate"
            )


def smoothness_of(problem: Problem) -> Smoothness:
    """γ of the loss, recognised by its second derivatives in the outputs, at the points tried.

    These are of every row, around 0, the model's own outputs and whatever may be a label, near and far (to some 30
    times their size): a loss of pieces (Huber's) is quadratic in each of them. Of several outputs, rows beyond the
    first thousands are tried at two points, near 0 and around their own outputs: give a fitted model.

    Raises:
        ValueError: none of cross entropy, logistic and squared error in all rows; a row that no output
            tried bends; a loss that depends on other rows.
    """
    c = _only(_opened(problem, np.arange(1))[0])[0].numel()
    _refuse_mixing(problem, max(4, 64 // c))
    eye = torch.eye(c, dtype=torch.float64)
    softmax, logistic, squares = c > 1, True, True
    rng = torch.Generator().manual_seed(0)
    for rows in batches(problem.n, max(1, BLOCK // (16 * c * c))):
        # weights of rows and classes show at any output: many are tried for pieces, in the first rows alone
        z, found, flat = _curvatures(problem, rows, c, rng, few=c > 1 and rows[0] > 0)
        # a loss that never changes, of a row of weight 0 within, is within any γ
        rows, z, found = rows[~flat.numpy()], z[~flat], found[~flat]
        if not len(rows):
            continue
        p, s = z.softmax(-1), z.sigmoid()
        softmax &= _same(found, p[..., None] * eye - p[..., None] * p[..., None, :])
        logistic &= _same(found, (s * (1 - s))[..., None] * eye)
        largest = found.abs().amax((1, 2, 3), keepdim=True)
        squares &= bool(((found - found[:, :1]).abs() <= SMALL * largest).all())
        if squares and not largest.all():
            straight = rows[(largest == 0).flatten().numpy()]
            raise ValueError(
                f"expected a loss that bends in the model's output, got none that does in rows {straight[:5].tolist()}, "
                "as if it were an absolute error; give gamma, 0 where it is straight everywhere"
            )
        if not (softmax or logistic or squares):
            raise ValueError(
                "expected cross entropy, a logistic loss or squared error of the model's output, got a loss of other "
                f"second derivatives among rows {rows[0]} to {rows[-1]}; give gamma: how much they change, in norm, for "
                "each unit of change in the output; or as weights what it weighs rows and classes by"
            )
    if squares:
        return Smoothness(0.0, False)
    return Smoothness(SOFTMAX, True) if softmax else Smoothness(LOGISTIC, False)


def _same(found: Tensor, known: Tensor) -> bool:
    """To 1e-8: torch's softplus is straight from 20 on, where e⁻²⁰ ≈ 2e-9 is left."""
    return bool((found - known).abs().max() <= 1e-8)


def _refuse_mixing(problem: Problem, count: int) -> None:
    """Raise where the loss of a row has second derivatives in another's output, among `count` rows."""
    output, losses = _opened(problem, sample(problem.n, count))

    def total(z: Tensor) -> Tensor:
        return losses([z.reshape(output[0].shape)]).sum()

    rng = torch.Generator().manual_seed(0)
    z = torch.randn(len(output[0]), output[0][0].numel(), generator=rng, dtype=torch.float64)
    curve = hessian(total)(z.to(output[0])).cpu()  # [b, c, b, c]
    own = float(torch.einsum("bcbd->bcd", curve).square().sum())
    if not abs(float(curve.square().sum()) - own) <= SMALL * (own + 1):
        raise ValueError(
            "expected losses of each row's own output, got other second derivatives, between two rows; return "
            "one loss a row"
        )


def _curvatures(
    problem: Problem, rows: NDArray[np.intp], c: int, rng: torch.Generator, few: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs z [b, k, c] at which the losses of some rows are tried (few: two), second derivatives [b, k, c, c], and
    which rows' losses [b] have neither first nor second ones at any.
    """
    drawn = torch.randn(len(rows), 2 + len(REACHES), c, generator=rng, dtype=torch.float64)
    reach = REACHES[-1] ** torch.rand(len(rows), generator=rng, dtype=torch.float64)  # from 1

    def one(given: Any) -> tuple[Tensor, Tensor, Tensor]:
        example, noise, far = given
        row = as_batch(example)
        output, losses = open_output(problem.model, problem.loss, problem.params, row)
        own = _only(output)

        def around(centre: Tensor) -> tuple[Tensor, Tensor]:
            middle = torch.nan_to_num(centre.detach().to(noise)).flatten().expand(c)
            return middle, middle.abs().max().clamp(min=1.0)

        if few:
            middle, size = around(own)
            tried = [noise[0], middle + far * size * noise[1]]
        else:
            tried = [noise[0], 3 * noise[1]]
            for centre in (own, *(leaf for leaf in tensors_in(row) if leaf.numel() in (1, c))):
                middle, size = around(centre)
                tried += [middle + s * size * e for s, e in zip(REACHES, noise[2:], strict=True)]

        def loss(z: Tensor) -> Tensor:
            return losses([z.reshape(own.shape)])[0]

        z = torch.stack(tried).to(own)
        slope = torch.stack([grad(loss)(at) for at in z])
        bend = torch.stack([hessian(loss)(at) for at in z])
        return z, bend, (slope == 0).all() & (bend == 0).all()

    parts = take(problem.train, rows, problem.device), drawn, reach
    batch: Any = tree_map(lambda part: part.to(problem.device), parts)
    z, found, flat = row_by_row(one, batch)
    return z.detach().double().cpu(), found.detach().double().cpu(), flat.cpu()


def step_bounds(
    problem: Problem, w: NDArray[np.float64], d: Tensor, loss: Smoothness
) -> tuple[float, float]:
    """What the gradient of (1/n) Σ w_i ℓ_i keeps, at most, after a Newton step d [p]: ours, and Guo's.

        ours    ½ γ (1/n) ‖√w J‖₂ ‖(√w_i ‖J_i d‖²)_i‖₂
        Guo's   γ (1/n) ‖√w J‖₂ max_i ‖J_i‖₂ ‖d‖ ‖(√w_i ‖J_i d‖)_i‖₂

    Source: Guo et al. 2020, Corollary 1, of a sum over rows of norm at most 1; they take γ = ¼.
    """
    if loss.gamma == 0:
        return 0.0, 0.0
    squared = torch.zeros(len(d), len(d), dtype=torch.float64)
    fourth = second = longest = 0.0
    kept = np.flatnonzero(w)
    for rows in np.split(kept, range(rows_at_once(problem), len(kept), rows_at_once(problem))):
        j = jacobian(problem, rows)
        if loss.centred:
            j = j - j.mean(1, keepdim=True)
        share = torch.from_numpy(w[rows])
        tall = (share.sqrt()[:, None, None] * j).flatten(0, 1)
        squared += tall.T @ tall
        turn = (j @ d).square().sum(1)  # ‖J_i d‖²
        fourth += float((share * turn.square()).sum())
        second += float((share * turn).sum())
        longest = max(longest, float(torch.linalg.eigvalsh(j @ j.mT).max()))
    norm = math.sqrt(max(float(torch.linalg.eigvalsh(squared)[-1]), 0.0)) / problem.n
    ours = 0.5 * loss.gamma * norm * math.sqrt(fourth)
    return ours, loss.gamma * norm * math.sqrt(longest * second) * float(d.norm())


def jacobian(problem: Problem, rows: NDArray[np.intp]) -> Tensor:
    """∂ outputs / ∂ parameters of some training rows, [b, c, p], float64 on the CPU."""

    def outputs(at: Params, row: Batch) -> Tensor:
        return _only(open_output(problem.model, problem.loss, at, row)[0])

    found = row_jacobians(outputs, problem.params, take(problem.train, rows, problem.device))
    return found.double().cpu()


# --- Newton steps ----------------------------------------------------------------------------


class Step(NamedTuple):
    d: Tensor  # −H(w)⁻¹∇L, [p]
    gain: float  # ½ ∇Lᵀ H⁻¹ ∇L, what it promises of the objective
    rounding: float  # what rounding may add to the gradient after it


def newton_step(problem: Problem, w: NDArray[np.float64], noise: Tensor) -> Step:
    p, n = len(problem.decay), problem.n
    h = torch.diag(problem.decay)
    slope = problem.decay * vector(problem.params)
    size = float(slope.norm()) + float(noise.norm()) / n
    slope, early, stiff = slope + noise / n, 0.0, 0.0
    for rows in batches(np.flatnonzero(w), rows_at_once(problem)):
        part = second_order(problem, problem.params, rows)
        share = torch.from_numpy(w[rows]) / n
        h = h + part.gram(share)
        slope = slope + part.gradient(share)
        size += float(torch.einsum("b,bc,bcp->bp", share, part.slope, part.x).norm(dim=1).sum())
        # outputs are sums, of the terms of J θ, and slopes differences, such as p − y
        z, long = _outputs(problem, rows).norm(dim=1), part.x.flatten(1).norm(dim=1)
        bend = part.curve.abs().amax(1)
        early += float((share * (bend * z + 1) * long).sum())
        stiff += float((share * bend * long.square()).sum())
    d = -solved(factored(h), slope[None])[0]
    early += stiff * float(vector(problem.params).norm() + d.norm())
    # a sum of n terms, of products over p each, is off by at most (n + p) ulps of their sizes, and each slope by those
    # of its output, p, and some of the loss
    ulps = (n + p) * size + (p + FEW) * early
    rounding = torch.finfo(torch.float64).eps * ulps + float((h @ d + slope).norm())
    return Step(d, -0.5 * float(slope @ d), rounding)


def minimised(problem: Problem, w: NDArray[np.float64], noise: Tensor) -> tuple[Problem, float]:
    """At the optimum, to rounding, and how much that may be: steps are halved until they descend."""
    height, near = objective(problem, w, noise), 0
    for _ in range(100):
        step = newton_step(problem, w, noise)
        # so near, the objective is too coarse to tell; two full steps from there end at rounding
        near += step.gain <= 1e-13 * (abs(height) + 1)
        for share in 0.5 ** np.arange(40):
            found = moved(problem, share * step.d)
            lower = objective(found, w, noise)
            if near or lower <= height - 1e-4 * share * step.gain:
                break
        problem, height = found, lower
        if near == 2:
            return problem, step.rounding
    raise ValueError(
        "expected Newton steps that converge, got no end in 100; raise the weight decay, or scale the inputs"
    )


def objective(problem: Problem, w: NDArray[np.float64], noise: Tensor) -> float:
    """L(θ; w) + bᵀθ/n."""
    theta = vector(problem.params)
    total = 0.5 * float((problem.decay * theta.square()).sum()) + float(noise @ theta) / problem.n
    with torch.no_grad():
        for rows in batches(np.flatnonzero(w), 4096):
            batch = take(problem.train, rows, problem.device)
            losses = per_example(problem.model, problem.loss, batch, rows=rows)
            total += float(losses.double().cpu() @ torch.from_numpy(w[rows])) / problem.n
    return total


def gradient_norm(problem: Problem, w: NDArray[np.float64], noise: Tensor) -> float:
    """‖∇L(θ; w)‖."""
    return float((vector(mean_gradient(problem, w)) + noise / problem.n).norm())


def moved(problem: Problem, d: Tensor) -> Problem:
    """The problem with a copy of its model, at θ + d."""
    model = copy.deepcopy(problem.model)
    move_parameters(model, d)
    return replace(problem, model=model)


# --- opening a model -------------------------------------------------------------------------


def _opened(problem: Problem, rows: NDArray[np.intp]) -> tuple[list[Tensor], Any]:
    batch = take(problem.train, rows, problem.device)
    with torch.no_grad():
        return open_output(problem.model, problem.loss, problem.params, batch)


def _outputs(problem: Problem, rows: NDArray[np.intp]) -> Tensor:
    """[b, c], float64 on the CPU."""
    return _only(_opened(problem, rows)[0]).reshape(len(rows), -1).double().cpu()


def _only(output: list[Tensor]) -> Tensor:
    if len(output) != 1:
        raise ValueError(
            f"expected a model with one output tensor, got {len(output)}; wrap it to give its logits alone"
        )
    return output[0]
