"""Leaving examples out, beyond first order: the exact one-example correction, and true Newton steps.

Both see the trained objective to second order in the parameters, with the Gauss–Newton curvature

    H(w) = (1/n) Σ w_i J_iᵀ D_i J_i + weight_decay + damping

J_i [c, p] the Jacobian of the model's output on example i, r_i [c] the gradient and D_i [c, c] the
Hessian of its loss in that output. For linear models this is the objective's own Hessian. Rows are kept
in coordinates where D_i is diagonal, so a row counts as c rows of rank one.

    leave_one_out   a LinearDatamodel: influence with the 1/(1 − h) of each example, for one at a time
    newton          a NewtonDatamodel: one solve for every set of weights, for many at once
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core.curvature import DENSE
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.draws import open_output
from attribution_core.gradients import (
    Progress,
    _one_row,
    _row,
    flatten,
    output_gradients,
    unflatten,
)
from attribution_core.problem import (
    Outputs,
    Params,
    Problem,
    batches,
    per_example,
    refuse_random_layers,
    rows_in,
    take,
)
from attribution_core.processes import collect, my_rows, sum_over_processes
from attribution_core.trained import Trained, several, trained
from attribution_core.training import Run

ALONE = 1 - 1e-6  # leverage from which an example alone determines a direction
HELD = 2**28  # numbers of a stacked Jacobian, 2 GiB, that `newton` keeps at most
BLOCK = 2**23  # numbers of it that are worked on at a time, 64 MiB


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


def second_order(problem: Problem, params: Params, rows: NDArray[np.intp]) -> Quadratic:
    """J, r and D of some training rows at `params`, float64 on the CPU.

    Raises:
        ValueError: a loss that does not call the model exactly once; values that are not finite.
    """
    batch = take(problem.train, rows, problem.device)
    per_example(problem.model, problem.loss, batch, params, rows)  # one finite number per row?

    def one(example: Any) -> tuple[Tensor, Tensor, Tensor]:
        row = _one_row(example)
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

    with sdpa_kernel(SDPBackend.MATH):
        try:
            j, r, d = vmap(one)(batch)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            # control flow that depends on values (padding masks in transformers): row by row instead
            singles = [one(_row(batch, i)) for i in range(rows_in(batch))]
            j, r, d = (torch.stack(parts) for parts in zip(*singles, strict=True))
    j, r, d = (part.detach().double().cpu() for part in (j, r, d))
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in (j, r, d)]).all(0)
    if not finite.all():
        raise ValueError(
            f"expected finite curvature, got NaN or infinity from rows {rows[~finite.numpy()][:10].tolist()}, "
            "whose losses are finite; look at functions without a slope there, such as a root of 0"
        )
    curve, basis = torch.linalg.eigh(d)
    return Quadratic(basis.mT @ j, (basis.mT @ r[..., None])[..., 0], curve)


def leave_one_out(
    source: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    damping: float | Tensor | None = None,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Leave-one-out datamodel: scores_i = −(1/(α n)) A H⁻¹ J_iᵀ (I − w_i D_i B_i)⁻¹ r_i.

    B_i = (1/n) J_i H⁻¹ J_iᵀ is what example i sees of the curvature, and the leverage h_i the largest
    eigenvalue of w_i D_i B_i: with one output the factor is 1/(1 − h_i). Setting weight i from the anchor
    to 0 is thereby predicted with one Newton step of the objective without it: exactly, for least
    squares and outputs that are linear in the parameters. Scores of an example of weight 0 are its
    influence.

    Args:
        source, weights, exposure: see `influence`.
        damping: added to the curvature beside the weight decay, one number or [p]. None: 0 for a
            problem, `Run.damping` for a run.
        progress: wraps the loop over training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight, such that a whole example's weight moves
        outputs right; for several examples at once `newton` is nearer. Largest leverage in `.meta`.

    Raises:
        ValueError: a leverage of 1: without that example nothing determines the parameters (names the
            rows); a curvature that is not positive definite; more than 6,000 parameters; a loss that
            does not call the model exactly once.

    Source: Pregibon 1981; Rad & Maleki 2020; as a datamodel Rubinstein & Hopkins 2025 ("rescaled").

    >>> from attribution_core import squared_error           # a mean: one parameter, always shown a 1
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> x, y = torch.ones(3, 1).double(), torch.tensor([[0.0], [3.0], [6.0]]).double()
    >>> mean = Outputs(lambda model, batch: model(batch[0])[:, 0], (x[:1],))
    >>> f = leave_one_out(Problem(model, squared_error, (x, y)), mean)
    >>> [round(float(f.without([i])[0]), 6) for i in range(3)]
    [4.5, 3.0, 1.5]
    """
    runs = several(source)
    if runs is not None:
        if weights is not None or exposure != 1.0:
            raise ValueError("a run brings its own weights and exposure; do not give them again")
        each = [leave_one_out(run, outputs, damping=damping, progress=progress) for run in runs]
        return average(each)
    assert isinstance(source, (Problem, Run))
    at, added = _start(source, damping, weights, exposure)
    problem, params = at.problem, at.problem.params
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN
    w = torch.from_numpy(at.weights)
    mine = my_rows(np.arange(problem.n))
    blocks = list(batches(mine, _rows_at_once(problem)))

    h = torch.zeros(len(added), len(added), dtype=torch.float64)
    for rows in progress(blocks):
        h += second_order(problem, params, rows).gram(w[rows])
    h = sum_over_processes(h) / at.drawn
    solve = partial(_solve, _cholesky(h + torch.diag(problem.decay + added)))
    directions = -at.unit * solve(flatten(output_gradients(problem.model, outputs)).double().cpu())

    scores, leverages = [torch.zeros(0, len(outputs)).double()], [torch.zeros(0).double()]
    for rows in progress(blocks):
        part = second_order(problem, params, rows)
        b = part.x @ solve(part.x.flatten(0, 1)).reshape(part.x.shape).mT / at.drawn
        alone, leverage = _without_itself(part, b, w[rows])
        scores.append(torch.einsum("bcp,bc,tp->bt", part.x, alone, directions))
        leverages.append(leverage)
    leverage = collect(torch.cat(leverages)[:, None])[:, 0]
    _refuse_alone(leverage)
    meta = {
        "method": "leave_one_out",
        "curvature": "gauss_newton",
        "damping": float(added.mean()),
        "weight_decay": float(problem.decay.mean()),
        "exposure": at.exposure,
        "leverage": float(leverage.max()),
    }
    targets = np.asarray(outputs.names) if outputs.names else None
    return LinearDatamodel(
        collect(torch.cat(scores)).numpy(), base, at.anchor, targets=targets, meta=meta
    )


def _without_itself(part: Quadratic, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(I − w D B)⁻¹ r of every row, [b, c], and its leverage, [b].

    Negative curvature only lowers a leverage; it is left out of it, which errs to the safe side.
    """
    bend = w[:, None] * part.curve
    root = bend.clamp(min=0).sqrt()
    leverage = torch.linalg.eigvalsh(root[:, :, None] * b * root[:, None, :])[:, -1]
    system = torch.eye(b.shape[1], dtype=torch.float64) - bend[:, :, None] * b
    system[leverage >= ALONE] = torch.eye(b.shape[1], dtype=torch.float64)  # refused by the caller
    return torch.linalg.solve(system, part.slope), leverage


def _refuse_alone(leverage: Tensor) -> None:
    bad = torch.nonzero(leverage >= ALONE)[:, 0].tolist()
    if bad:
        raise ValueError(
            f"expected leverages below 1, got {float(leverage.max()):.7f} in {len(bad)} rows, first "
            f"{bad[:10]}: without such an example nothing determines some direction of the "
            "parameters; give a weight decay or a damping"
        )


def _start(
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


def _width(problem: Problem) -> int:
    """c: how many numbers the model puts out for one example."""
    first = take(problem.train, [0], problem.device)
    with torch.no_grad():
        output, _ = open_output(problem.model, problem.loss, problem.params, first)
    return sum(value.numel() for value in output)


def _rows_at_once(problem: Problem) -> int:
    return max(1, BLOCK // (_width(problem) * len(problem.decay)))


# --- Newton steps for any weights ------------------------------------------------------------


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
        weights = np.asarray(weights, dtype=float)
        n = len(self.anchor)
        if weights.ndim not in (1, 2) or weights.shape[-1] != n:
            raise ValueError(
                f"expected weights [n={n}] or [m, n={n}], got {weights.shape}; one weight per example"
            )
        found = [
            self.outputs.evaluate(self.problem.model, self.params(row)).numpy()
            for row in np.atleast_2d(weights)
        ]
        return found[0] if weights.ndim == 1 else np.stack(found)

    def without(self, ids: Iterable[Any]) -> NDArray[np.float64]:
        """Outputs [t] when the examples `ids` are left out (weight 0, the others at 1)."""
        place = {name: row for row, name in enumerate(self.ids.tolist())}
        wanted = np.asarray(list(ids)).tolist()
        unknown = [name for name in wanted if name not in place]
        if unknown:
            raise KeyError(
                f"unknown ids {unknown[:5]}; known ones look like {self.ids[:3].tolist()}"
            )
        weights = np.ones(len(self.anchor))
        weights[[place[name] for name in wanted]] = 0.0
        return self.predict(weights)

    def params(self, weights: ArrayLike) -> Params:
        """The parameters after the Newton steps at weights [n], by name."""
        w = np.asarray(weights, dtype=float)
        if w.shape != self.anchor.shape or not np.isfinite(w).all():
            raise ValueError(f"expected finite weights [n={len(self.anchor)}], got shape {w.shape}")
        named = self.problem.params
        start = _flat(named)
        theta = start + self._first_step(torch.from_numpy(w))
        kept = np.flatnonzero(w)
        for _ in range(self.steps - 1):
            if not theta.isfinite().all():
                break
            rows = _stacked(self.problem, _named(theta, named), kept)
            share = self.unit * torch.from_numpy(w[kept])
            h = rows.gram(share) + torch.diag(self.problem.decay + self.damping)
            slope = rows.gradient(share) + self.problem.decay * theta
            slope = slope + self.damping * (theta - start) - self._left
            theta = theta - _solve(_cholesky(h), slope[None])[0]
        if not theta.isfinite().all():
            raise ValueError(
                "expected Newton steps that converge, got parameters that are not finite; take fewer "
                "steps, or give a weight decay or a damping"
            )
        return _named(theta, named)

    @cached_property
    def _left(self) -> Tensor:
        """The gradient [p] that the fitted parameters are taken to have at the anchor, see `newton`."""
        if (self.damping == 0).all():
            return torch.zeros_like(self.damping)
        at_anchor = self.rows.gradient(self.unit * torch.from_numpy(self.anchor))
        return at_anchor + self.problem.decay * _flat(self.problem.params)

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor [p, p] of H(anchor) + weight_decay + damping."""
        h = self.rows.gram(self.unit * torch.from_numpy(self.anchor))
        return _cholesky(h + torch.diag(self.problem.decay + self.damping))

    def _first_step(self, w: Tensor) -> Tensor:
        """−H(w)⁻¹ ∇L(w), [p], by whichever way is cheaper."""
        slope = self.rows.gradient(self.unit * w) - self._left
        slope = slope + self.problem.decay * _flat(self.problem.params)
        changed = int((w != torch.from_numpy(self.anchor)).sum())
        if changed * self.rows.x.shape[1] < len(slope):
            step = self._by_changes(w, slope)
            if step is not None:
                return step
        return self._by_rows(w, slope)

    def _by_rows(self, w: Tensor, slope: Tensor) -> Tensor:
        """The step with H(w) formed over all rows of weight."""
        h = self.rows.gram(self.unit * w) + torch.diag(self.problem.decay + self.damping)
        return -_solve(_cholesky(h), slope[None])[0]

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
    at, added = _start(source, damping, weights, exposure)
    problem = at.problem
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN
    n, c, p = problem.n, _width(problem), len(added)
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
    c, p = _width(problem), len(problem.decay)
    x = torch.empty(len(rows), c, p, dtype=torch.float64)
    slope, curve = torch.empty(2, len(rows), c, dtype=torch.float64)
    for place in batches(len(rows), _rows_at_once(problem)):
        part = second_order(problem, params, rows[place])
        x[place], slope[place], curve[place] = part.x, part.slope, part.curve
    return Quadratic(x, slope, curve)


def _flat(params: Params) -> Tensor:
    """[p], float64 on the CPU."""
    return flatten({name: value[None] for name, value in params.items()})[0].double().cpu()


def _named(flat: Tensor, like: Params) -> Params:
    """[p] as parameters by name, in the dtype and on the device of `like`."""
    parts = unflatten(flat[None], like)
    return {name: part[0].to(like[name]) for name, part in parts.items()}


def _cholesky(h: Tensor) -> Tensor:
    """The lower factor of H; an error where H is singular to rounding."""
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed or (factor.diag().square() < 1e-14 * h.diag()).any():
        raise ValueError(
            "expected a positive definite curvature, got a smallest eigenvalue of "
            f"{float(torch.linalg.eigvalsh(h)[0]):.3g}: at these weights the examples, weight decay and "
            "damping leave some direction of the parameters open; raise one of the latter"
        )
    return factor


def _solve(factor: Tensor, v: Tensor) -> Tensor:
    """H⁻¹ V for every row of v [k, p]."""
    return torch.cholesky_solve(v.T, factor).T
