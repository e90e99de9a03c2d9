"""Curvature of the mean training loss, and solves with it: (H + weight_decay + damping)⁻¹ V.

    H = (1/n) Σ w_i ∇²ℓ_i          "hessian"
    H = (1/n) Σ w_i J_iᵀ D_i J_i   "gauss_newton": J_i the Jacobian of the model's output on example i,
                                   D_i the Hessian of the loss in that output (Schraudolph 2002)
                                   "ekfac": the same, Kronecker-factored by layers (see `ekfac`)
    H = (1/n) Σ w_i diag(∇ℓ_i²)    "diagonal": of the empirical Fisher
    H = 0                          "identity": none; what is left is the weight decay and the damping
                                   (after a short run the damping is nearly all), or I without both

n is fixed whatever the weights. Sums run over all rows and processes before anything is inverted, so
no result depends on a batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core.calling import Params, PerExample, call, per_example
from attribution_core.data import Batch, Progress, Rows, batches, sample, take
from attribution_core.gradients import row_gradients
from attribution_core.layerwise.opened import Losses, open_output
from attribution_core.layerwise.vectors import flatten, size_of, unflatten
from attribution_core.problem import Problem
from attribution_core.processes import my_rows, sum_over_processes
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.second_order.conjugate import conjugate_gradients, conjugate_steps
from attribution_core.second_order.ekfac import EKFAC, Labels, fit_ekfac
from attribution_core.second_order.spectrum import Dense, Diagonal, Spectrum

Kind = Literal["identity", "diagonal", "hessian", "gauss_newton", "ekfac"]
Form = Literal["auto", "dense", "cg"]
DENSE = 6000  # parameters up to which H is formed: 288 MB in float64, factored in seconds
# EK-FAC's eigenvalues are flatter than the true ones, and want less of the damping. On digits MLPs by
# three optimizers a quarter was nearest the exact solve in energy norm, an eighth had the best LDS.
SHARPER, ALONE = 0.25, 0.125
SIZERS, SIZE_ROWS = 8, 256  # mixtures of directions, and rows, by which EK-FAC's size is found
MOSTLY = 0.2  # of the parameters in no Kronecker block: worth a warning
PROBES = 16  # random directions for the mean eigenvalue where H is not formed


@dataclass(frozen=True)
class Curvature:
    """A fitted curvature: `solve(V [k, p])` is (H + weight_decay + damping)⁻¹ V, float64 in and out."""

    solve: Callable[[Tensor], Tensor]
    damping: float  # its mean over parameters
    meta: dict[str, Any] = field(default_factory=dict)
    spectrum: Spectrum | None = None  # H itself, where its eigenvalues are at hand


def spectrum(
    problems: Problem | Sequence[Problem],
    kind: Kind = "gauss_newton",
    *,
    weights: NDArray[np.float64] | None = None,
    labels: Labels = "model",
    draws: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress = iter,
) -> Spectrum:
    """The curvature of one problem, or the mean over several (checkpoints of one training), as a Spectrum.

    Without weight decay and damping. "identity" is H = 0. `labels`, `draws` and `seed` are EK-FAC's, see
    `fit_ekfac`.
    """
    several = [problems] if isinstance(problems, Problem) else list(problems)
    first = several[0]
    w = np.ones(first.n) if weights is None else weights
    p = size_of(first.params)
    if kind == "identity":
        return Diagonal(torch.zeros(p, dtype=torch.float64))
    if kind == "diagonal":
        parts = [fisher_diagonal(problem, w, batch_size) for problem in several]
        return Diagonal(torch.stack(parts).mean(0))
    if kind == "ekfac":
        return fit_ekfac(
            several, weights=w, labels=labels, draws=draws, seed=seed,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    eye = torch.eye(p, dtype=torch.float64)  # small models: larger batches save passes
    size = max(batch_size, 512)
    matrix = sum(products(problem, kind, eye, w, size) for problem in several) / len(several)
    assert isinstance(matrix, Tensor)
    return Dense((matrix + matrix.T) / 2)


def fit_curvature(
    problem: Problem,
    kind: Kind | Literal["auto"] = "auto",
    *,
    weights: NDArray[np.float64] | None = None,
    damping: float | Tensor | None = None,
    form: Form = "auto",
    labels: Labels = "model",
    draws: int | None = None,
    seed: int = 0,
    refine: int | Literal["size"] = 0,
    tolerance: float | None = None,
    max_iterations: int = 500,
    batch_size: int = 256,
    progress: Progress = iter,
) -> Curvature:
    """Fit a curvature to the problem at its present parameters.

    Args:
        kind: see the head of this file; "auto" is "gauss_newton" where H can be formed (up to 6,000
            parameters), else "ekfac".
        damping: added to the eigenvalues of H beside the problem's weight decay: one number, or [p]
            one per parameter. None: 0 for the exact Hessian and wherever a weight decay is known (above
            0, or stated by name, as scikit-learn's models state theirs), else 0.1 × the mean eigenvalue
            of H (with EK-FAC: of each weight matrix by itself).
        form: "dense" forms and factors H; "cg" only multiplies with it; "auto" is dense up to
            6,000 parameters.
        labels, draws, seed: of EK-FAC, see `fit_ekfac`; one draw where no damping and no decay is known.
        refine: of EK-FAC, which by itself errs in size by a factor of 2 to 5. So many steps of conjugate
            gradients on the exact Gauss–Newton, preconditioned by it; each costs one product per
            direction over all rows, and 4 gave the exact solve's correlation on small networks. Or
            "size": an eighth of the damping, and one multiple for all directions that makes up for the
            size, found by 8 exact products on 256 rows.
        tolerance: of cg, on ‖residual‖ / ‖v‖ of every direction; by default 1e-12 for float64 models,
            1e-4 for float32 and eps for narrower ones (.0078 for bfloat16, .001 for float16), whose
            products are no nearer: scores of bfloat16 models were then within 3 % of float64's.
        progress: wraps the iterations of cg, which end when the tolerance is reached, or the two
            passes of EK-FAC (tqdm).

    Raises:
        ValueError: an unknown kind; random layers; losses that are not one finite number per row (names
            the rows); H + weight_decay + damping is not positive definite; cg has not
            converged within max_iterations (says how far it came).
    """
    w = np.ones(problem.n) if weights is None else weights
    p = size_of(problem.params)
    _refuse(problem, kind, damping, p)
    if kind == "auto":
        kind = "gauss_newton" if p <= DENSE else "ekfac"
    if draws is None and damping is None and not _decay_known(problem):
        draws = (
            1  # under the small damping of that rule the expectation predicted worse, by .02 LDS
        )
    meta: dict[str, Any] = {"curvature": kind}
    shift = partial(_shift, problem, kind, damping)

    def multiply(v: Tensor) -> Tensor:
        return products(problem, kind, v, w, batch_size)

    def shifted(v: Tensor, rows: int | None = None) -> Tensor:
        exact: Kind = "gauss_newton" if kind == "ekfac" else kind
        some = sample(problem.n, rows)
        part = problem if rows is None else replace(problem, train=Rows(problem.train, some))
        return products(part, exact, v, w[some], batch_size) + shifts.to(v) * v

    solve: Callable[[Tensor], Tensor]
    h: Spectrum | None = None
    if kind in ("identity", "diagonal", "ekfac"):
        h = spectrum(
            problem, kind, weights=w, labels=labels, draws=draws, seed=seed,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        shifts = shift(h.means if isinstance(h, EKFAC) else h.trace / p)
        solve = partial(h.solve, shift=shifts)
        solve(torch.zeros(1, p, dtype=torch.float64))  # refuses what cannot be divided by
        if isinstance(h, EKFAC):
            meta["labels"], meta["diagonal"] = labels, _warned_share(h)
        if isinstance(h, EKFAC) and refine:
            meta["refined"] = refine
            solve = _refined(h, problem.decay, shifts, refine, shifted, progress)
    elif form == "dense" or (form == "auto" and p <= DENSE):
        meta["form"] = "dense"
        h = dense = spectrum(problem, kind, weights=w, batch_size=batch_size)
        assert isinstance(dense, Dense)
        shifts = shift(dense.trace / p)
        solve = dense.factored(shifts)
    else:
        meta["form"] = "cg"
        shifts = shift(partial(_mean_eigenvalue, multiply, p))
        if tolerance is None:
            tolerance = _reachable(problem)
        meta["tolerance"] = goal = tolerance

        # dampings of a run with Adam differ by orders of magnitude; measured in them, H is nearly low-rank
        scale = partial(torch.mul, 1.0 / shifts) if (shifts > 0).all() else None
        solve = partial(
            conjugate_gradients, shifted, tolerance=goal, max_iterations=max_iterations,
            progress=progress, precondition=scale,
        )  # fmt: skip

    return Curvature(solve, float((shifts - problem.decay).mean()), meta, h)


def _refuse(problem: Problem, kind: str, damping: float | Tensor | None, p: int) -> None:
    """Raise for settings and losses that no curvature can be fitted with."""
    if kind not in ("auto", "identity", "diagonal", "hessian", "gauss_newton", "ekfac"):
        raise ValueError(
            f"unknown curvature {kind!r}; auto, identity, diagonal, hessian, gauss_newton or ekfac"
        )
    if damping is not None and (torch.as_tensor(damping) < 0).any():
        raise ValueError(f"expected damping of at least 0, got {damping}")
    if damping is not None and torch.as_tensor(damping).shape not in ((), (p,)):
        raise ValueError(
            f"expected damping as one number or [p={p}], got {tuple(torch.as_tensor(damping).shape)}"
        )
    refuse_random_layers(problem.model)
    first = np.arange(min(2, problem.n))
    with torch.no_grad():  # one finite number per row?
        batch = take(problem.train, first, problem.device)
        names = problem.train.rows[first] if isinstance(problem.train, Rows) else first
        per_example(problem.model, problem.loss, batch, rows=names)


def _decay_known(problem: Problem) -> bool:
    """Is a weight decay known: above 0, or stated by name, be it 0?"""
    return isinstance(problem.weight_decay, Mapping) or bool((problem.decay > 0).any())


def _shift(
    problem: Problem,
    kind: Kind,
    damping: float | Tensor | None,
    mean: float | Tensor | Callable[[], float],
) -> Tensor:
    """weight_decay + damping, [p]; the damping by the stated rule where none is given."""
    added: float | Tensor = 0.0
    if damping is not None:
        added = damping
    elif kind == "identity":
        added = 0.0 if (problem.decay > 0).all() else 1.0
    elif kind != "hessian" and not _decay_known(problem):
        added = 0.1 * torch.as_tensor(mean() if callable(mean) else mean, dtype=torch.float64)
    return problem.decay + torch.as_tensor(added, dtype=torch.float64).cpu()


def _refined(
    h: Spectrum,
    decay: Tensor,
    shifts: Tensor,
    refine: int | Literal["size"],
    multiply: Callable[..., Tensor],
    progress: Progress,
) -> Callable[[Tensor], Tensor]:
    """EK-FAC brought nearer to the exact solve: by steps of conjugate gradients, or in size alone."""
    if refine != "size":
        guess = partial(h.solve, shift=decay + SHARPER * (shifts - decay))
        return partial(
            conjugate_steps, multiply, steps=refine, progress=progress, precondition=guess
        )

    def sized(v: Tensor) -> Tensor:
        x = h.solve(v, decay + ALONE * (shifts - decay))
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (SIZERS, len(v)), generator=generator).to(v) * 2 - 1
        asked, found = signs @ v, signs @ x
        # the multiple of x nearest the exact solve in energy norm, on average over mixtures of v
        energy = float((found * multiply(found, SIZE_ROWS)).sum())
        return x.mul_(float((asked * found).sum()) / energy) if energy > 0 else x

    return sized


class DiagonalWarning(UserWarning):
    """EK-FAC had to treat many parameters as a diagonal."""


def _warned_share(h: EKFAC) -> float:
    """Which share of the parameters EK-FAC treats as a diagonal; a warning where it is large."""
    share = size_of(h.diagonal) / size_of(h.params)
    if share > MOSTLY:
        names = sorted(h.diagonal, key=lambda name: -h.diagonal[name].numel())
        warnings.warn(
            f"EK-FAC treats {share:.0%} of the parameters as a diagonal, first {names[:3]}: they act "
            "outside nn.Linear, Conv1d, Conv2d, Embedding and Conv1D modules, or without a batch "
            "dimension (positions: look up pos[None]); refine=4 corrects what that costs",
            DiagonalWarning,
            stacklevel=3,
        )
    return share


def _reachable(problem: Problem) -> float:
    """A residual that products in the parameters' own dtype can show."""
    eps = max(torch.finfo(value.dtype).eps for value in problem.params.values())
    return 1e-12 if eps <= torch.finfo(torch.float64).eps else max(1e-4, eps)


def _mean_eigenvalue(multiply: Callable[[Tensor], Tensor], p: int) -> float:
    """trace(H)/p by random signs z: E[zᵀHz] = trace H (Hutchinson 1990)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 2, (PROBES, p), generator=generator).double() * 2 - 1
    return float((z * multiply(z)).sum(1).mean()) / p


def products(
    problem: Problem, kind: Kind, v: Tensor, weights: NDArray[np.float64], batch_size: int = 256
) -> Tensor:
    """H v for every row of v [k, p] (without weight decay or damping), float64."""
    params = problem.params
    some = next(iter(params.values()))
    size = None
    if some.dtype == torch.float16:  # ends at 65,504, which preconditioned directions of cg exceed
        size = v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        v = v / size
    directions = unflatten(v.to(some), params)
    total = torch.zeros_like(v, device=some.device)
    one = hessian_product if kind == "hessian" else gauss_newton_product
    for rows in batches(my_rows(np.arange(problem.n)), batch_size):
        batch = take(problem.train, rows, problem.device)
        w = torch.from_numpy(weights[rows]).to(some)

        def along(direction: Params, batch: Batch = batch, w: Tensor = w) -> Params:
            return one(problem.model, problem.loss, params, direction, batch, w)

        with sdpa_kernel(SDPBackend.MATH):
            part = flatten(vmap(along, chunk_size=min(len(v), 128))(directions)).double()
        _refuse_nan(part, problem, rows, batch)
        total += part
    found = sum_over_processes(total).to(v.device) / problem.n
    return found if size is None else found * size


def _refuse_nan(part: Tensor, problem: Problem, rows: NDArray[np.intp], batch: Batch) -> None:
    """Raise where a batch's part of a sum is not finite, and name the rows that made it so."""
    if torch.isfinite(part.sum()):
        return
    names = problem.train.rows[rows] if isinstance(problem.train, Rows) else rows
    with torch.no_grad():
        per_example(problem.model, problem.loss, batch, rows=names)
    raise ValueError(
        f"expected finite curvature, got NaN or infinity from rows {names[:10].tolist()}, whose "
        "losses are finite; look at functions without a slope there, such as a root of 0"
    )


def hessian_product(
    model: nn.Module, loss: PerExample, params: Params, v: Params, batch: Batch, w: Tensor
) -> Params:
    """Σ w_i ∇²ℓ_i v, forward over reverse; reverse over reverse, which is slower, where that is all there is."""

    def total(at: Params) -> Tensor:
        return (call(model, loss, at, batch) * w).sum()

    try:
        return pushed(grad(total), params, v)[1]
    except NotImplementedError as error:  # of Huber's loss, for one, forward over reverse
        try:
            return vjp(grad(total), params)[1](v)[0]
        except RuntimeError as again:
            raise error from again


def pushed(f: Callable[[Params], Any], at: Params, v: Params) -> tuple[Any, Any]:
    """(f(at), its derivative along v).

    Raises:
        NotImplementedError: layers or a loss without forward mode.
    """
    try:
        return jvp(f, (at,), (v,))  # type: ignore[return-value]
    except (NotImplementedError, RuntimeError) as error:
        if type(error) is RuntimeError and "functorch" not in str(error):
            raise
        raise NotImplementedError(
            f"expected layers and a loss with forward-mode derivatives for products with the exact curvature, got: {(str(error).splitlines() or ['none'])[0].rstrip('. ')}; "
            "take curvature='ekfac' with refine=0, which needs none, or layers and a loss that have them (for transformers' experts "
            "config._experts_implementation = 'eager')"
        ) from error


def gauss_newton_product(
    model: nn.Module, loss: PerExample, params: Params, v: Params, batch: Batch, w: Tensor
) -> Params:
    """Σ w_i J_iᵀ D_i J_i v, with the model's own output as the inner function."""
    losses: list[Losses] = []

    def inner(at: Params) -> list[Tensor]:
        output, of_output = open_output(model, loss, at, batch)
        losses[:] = [of_output]
        return output

    def outer(output: list[Tensor]) -> Tensor:
        return (losses[0](output) * w).sum()

    output, tangent = pushed(inner, params, v)
    # D is symmetric: in reverse it costs the same, and losses without forward mode (Huber's) have it
    curved = vjp(grad(outer), output)[1](tangent)[0]
    return vjp(inner, params)[1](curved)[0]


def fisher_diagonal(
    problem: Problem, weights: NDArray[np.float64], batch_size: int = 256
) -> Tensor:
    """(1/n) Σ w_i ∇ℓ_i², [p], float64."""
    params = problem.params
    total = torch.zeros(size_of(params), dtype=torch.float64)
    for rows in batches(my_rows(np.arange(problem.n)), min(batch_size, 32)):
        batch = take(problem.train, rows, problem.device)
        g = flatten(row_gradients(problem.model, problem.loss, params, batch)).double().cpu()
        _refuse_nan(g, problem, rows, batch)
        total += torch.from_numpy(weights[rows]) @ g.square()
    return sum_over_processes(total) / problem.n
