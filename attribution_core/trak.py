"""TRAK: the influence function of a logistic loss in projected gradients, averaged over models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.calling import PerExample
from attribution_core.data import Progress, batches, take
from attribution_core.datamodel import LinearDatamodel
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.gradients import refuse_steps
from attribution_core.layerwise.vectors import size_of, unflatten
from attribution_core.outputs import cross_entropy, margin
from attribution_core.precision import widened
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import collect, failing_together, my_rows, sum_over_processes
from attribution_core.projection import Kind, Projection, projection
from attribution_core.stepwise.trained import Trained, several, trained
from attribution_core.stepwise.trajectory import problem_at
from attribution_core.store import Store
from attribution_core.training import Run

RIDGE = 2.0  # × the mean eigenvalue of the examples' kernel, where no run says better
WIDEST = 2048  # dimensions taken without being asked
ROWS = 4096  # of features turned into float64 at once


def trak(
    source: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
    projection_dim: int | None = None,
    ridge: float | None = None,
    seed: int = 0,
    features: PerExample | None = None,
    kind: Kind = "auto",
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """TRAK datamodel: scores = (1/(α n)) mean_c[Φ_c (H_c + λ)⁻¹ φ_c] ⊙ mean_c[1 − p_c].

        H = (1/n) Σ_i w_i p_i (1 − p_i) φ_i φ_iᵀ        φ_i = Pᵀ ∇f_i,  f = log p/(1 − p)

    Φ [n, k] holds the projected margin gradients φ_i of the training rows, φ [k, t] those of the outputs,
    one random projection for each model c (see `projection`). The loss is −log p, whose gradient is
    −(1 − p) ∇f and whose curvature in the margin is p (1 − p): without the projection this is the
    influence function with that curvature. The paper leaves p (1 − p) out, and λ too; with them scores
    keep their units, and no dimension is too large. (A digits MLP, five runs, k = n/2: LDS .81 with a slope
    of .92; without p (1 − p) .66 and 2.7; without both .21.)

    Args:
        source: a `Run`, or several (fresh seeds are the ensemble), which bring their anchor along; or a
            problem whose model is trained.
        outputs: what to predict; their gradients are projected alike.
        checkpoints: state dicts of a problem's trained models, by parameter name; without, its own model.
        projection_dim: k; n/2 if not given, but 256 at least and 2,048 at most. From p on nothing is
            projected.
        ridge: λ = weight decay + ridge × trace(H)/n, the mean eigenvalue of the kernel of n examples. None:
            for runs, weight decay + what their length amounts to (`Run.damping`), parameter by parameter
            (gradients are scaled before they are projected); for a problem, 2 (a decay by parameter
            name counts by its mean).
        seed: of the projections: seed + c for model c.
        features: f, your own; p is then 1/(1 + e^−f). By default the margin where the loss is
            `cross_entropy`, else −log(e^loss − 1), the same for p = e^−loss.
        kind: of projection, see `projection`.
        weights, exposure: [n] and α, as in `influence`; a run brings its own.
        batch_size: rows per pass; changes memory and time, never the result.
        folder: keep the training rows' features there, block by block; the same call resumes, and one
            for other outputs reuses them. C · n · k numbers.
        progress: wraps the loops over training rows, one a model (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t], the mean over models;
        anchor α · weights. `.meta["ridge"]` is λ, its mean over models.

    Raises:
        ValueError: a dimension below 1, a negative ridge; an H without full rank and no ridge; losses that
            are no −log p; checkpoints that lack parameters, or beside a run; runs of different anchors; see
            also `project`; a folder that belongs to another model.

    Source: Park et al. 2023, eq. 13–17, with the sign of ∂ output / ∂ weight.
    """
    models = _models(source, checkpoints, weights, exposure)
    first = models[0]
    if ridge is not None and not ridge >= 0:
        raise ValueError(f"expected a ridge of at least 0, got {ridge}")
    if features is None:
        _refuse_negative(first.problem, batch_size)
    f = features or margin_of(first.problem.loss)
    p = size_of(first.problem.params)
    dim = (
        min(p, WIDEST, max(256, first.problem.n // 2)) if projection_dim is None else projection_dim
    )
    plan = projection(first.problem, dim, seed, kind=kind)
    base = np.mean([outputs.evaluate(at.problem.model).numpy() for at in models], axis=0)
    made_of = "" if folder is None else fingerprint(first.problem.train, f)
    kernel, missed = torch.zeros(()), torch.zeros(())  # means of Φ (H + λ)⁻¹ φ and of 1 − p
    shifts = []
    for c, at in enumerate(models):
        shift = _shift(at, ridge)
        projected = replace(
            plan, problem=at.problem, seed=seed + c, scale=_scale(at, shift), kept={}
        )
        keep = None if folder is None else Path(folder) / f"model{c}"
        held = _training_features(projected, f, keep, made_of, batch_size, progress)
        factor, used = _factor(held, at, shift, RIDGE if ridge is None else ridge)
        targets = _target_features(projected, outputs, batch_size)
        found, p_of = _kernel(held, torch.cholesky_solve(targets.T, factor))
        kernel, missed = kernel + found / len(models), missed + (1 - p_of) / len(models)
        shifts.append(used)
    scores = collect(kernel * missed[:, None]).numpy() * first.unit
    meta = {
        "method": "trak",
        "dimension": plan.dim,
        "ridge": float(np.mean(shifts)),
        "kind": plan.kind,
        "checkpoints": len(models),
        "covered": first.problem.covered,
        "exposure": first.exposure,
        "seed": seed,
    }
    return LinearDatamodel(scores, base, first.anchor, targets=outputs.targets, meta=meta)


# --- models ------------------------------------------------------------------------------------


def _models(
    source: Problem | Run | Sequence[Run],
    checkpoints: Sequence[Mapping[str, Tensor]] | None,
    weights: ArrayLike | None,
    exposure: float,
) -> list[Trained]:
    """Every model, with the one anchor that they share."""
    if isinstance(source, Problem):
        at = trained(source, weights, exposure)
        if checkpoints is None:
            return [at]
        if not checkpoints:
            raise ValueError(
                "expected at least one checkpoint, got none; leave it out for the model"
            )
        return [replace(at, problem=problem_at(source, state)) for state in checkpoints]
    if checkpoints is not None:
        raise ValueError("a run brings its own model; give several runs instead of checkpoints")
    runs = [source] if isinstance(source, Run) else several(source)
    assert runs is not None
    models = [trained(run, weights, exposure) for run in runs]
    first = models[0]
    shapes = {name: value.shape for name, value in first.problem.params.items()}
    for at in models[1:]:
        if not np.array_equal(at.anchor, first.anchor):
            raise ValueError(
                "expected runs of one anchor, got different weights or exposures; average their datamodels"
            )
        if {name: value.shape for name, value in at.problem.params.items()} != shapes:
            raise ValueError("expected runs of one model, got parameters of other names or shapes")
    return models


def _shift(at: Trained, ridge: float | None) -> Tensor | None:
    """λ of each parameter [p], where it is known before H is; None: a multiple of H's own size."""
    if at.damping is None or ridge is not None:
        return None
    return at.problem.decay + at.damping


def _scale(at: Trained, shift: Tensor | None) -> dict[str, Tensor] | None:
    """√(mean λ / λ), which makes λ the same for all parameters; None where it is already."""
    if shift is None or shift.max() <= shift.min() * (1 + 1e-9):
        return None
    scale = unflatten((shift.mean() / shift).sqrt()[None], at.problem.params)
    return {name: s[0].to(at.problem.device) for name, s in scale.items()}


# --- margins -----------------------------------------------------------------------------------


def margin_of(loss: PerExample) -> PerExample:
    """log p/(1 − p) of a loss −log p: `margin` for `cross_entropy`, else −log(e^loss − 1)."""
    return margin if loss is cross_entropy else partial(loss_margin, loss)


def loss_margin(loss: PerExample, model: nn.Module, batch: Any) -> Tensor:
    """log p/(1 − p), [b], for p = e^−loss; its gradient is −∇loss/(1 − p).

    Where a loss is so small that 1 − p is 0 in its precision, the margin is the largest that it
    has, with gradient 0: such an example contributes nothing more (1 − p multiplies its scores).
    """
    values = loss(model, batch)
    values = widened(values)
    least = torch.finfo(values.dtype).eps
    safe = values.clamp(min=least)
    found = -safe - torch.log(-torch.expm1(-safe))
    return torch.where(values >= -least, found, torch.nan)


def _refuse_negative(problem: Problem, batch_size: int) -> None:
    """Losses of a few rows, for a word on what is wrong; `loss_margin` gives NaN for others."""
    rows = np.arange(min(problem.n, batch_size))
    with torch.no_grad():
        values = problem.loss(problem.model, take(problem.train, rows, problem.device))
    if (values < -1e-6).any():
        raise ValueError(
            "expected losses −log p of at least 0, got negative ones, which have no margin log p/(1 − p); "
            "pass features=, a function (model, batch) -> [b]"
        )


# --- features, curvature, scores ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Held:
    """This process's rows, their features [rows, k] and f [rows] as one array, and where to keep more."""

    rows: NDArray[np.intp]
    array: Any  # [rows, k + 1], a tensor or a map of a file
    store: Store | None = None

    def blocks(self) -> Iterator[tuple[NDArray[np.intp], Tensor, Tensor]]:
        """Places, features and p of some rows after another, float64."""
        for some in batches(len(self.rows), ROWS):
            part = self.array[some[0] : some[-1] + 1]
            kept = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            both = kept.double()
            yield some, both[:, :-1], torch.sigmoid(both[:, -1])


def _training_features(
    projected: Projection,
    f: PerExample,
    folder: Path | None,
    made_of: str,
    batch_size: int,
    progress: Progress,
) -> _Held:
    """Features and margins of this process's training rows; with a folder, only what is not there yet."""
    n = projected.problem.n
    mine = my_rows(np.arange(n))

    def of(rows: NDArray[np.intp], progress: Progress = iter) -> Tensor:
        parts = projected.parts(f, rows=rows, batch_size=batch_size, progress=progress)
        joined = [torch.cat([phi, value.to(phi)[:, None]], dim=1).cpu() for value, phi in parts]
        return torch.cat(joined) if joined else torch.zeros(0, projected.dim + 1)

    if folder is None:
        with failing_together():
            own = of(mine, progress)
        return _Held(mine, own)
    some = next(iter(projected.problem.params.values()))
    dtype = "float64" if some.dtype == torch.float64 else "float32"
    settings = (projected.dim, projected.kind, projected.seed, projected.scale)
    print_ = fingerprint(made_of, projected.problem.model, settings)
    store = Store.open(folder, (n, projected.dim + 1), print_, dtype=dtype)
    array = store.fill(of, progress)
    return _Held(mine, array[mine[0] : mine[-1] + 1] if len(mine) else array[:0], store)


def _factor(held: _Held, at: Trained, shift: Tensor | None, ridge: float) -> tuple[Tensor, float]:
    """The Cholesky factor of H + λ [k, k], float64, and λ."""

    def make() -> tuple[Tensor, dict[str, Any]]:
        k = held.array.shape[1] - 1
        h = torch.zeros(k, k, dtype=torch.float64)
        weights = torch.from_numpy(at.weights[held.rows])
        for some, phi, p in held.blocks():
            h += phi.T @ (phi * (weights[some] * p * (1 - p) / at.drawn)[:, None])
        h = sum_over_processes(h)
        own = float(at.problem.decay.mean()) + ridge * float(h.trace()) / at.drawn
        added = own if shift is None else float(shift.mean())
        if added == 0:
            _refuse_singular(h, at.drawn)
        factor, info = torch.linalg.cholesky_ex(h + added * torch.eye(k, dtype=h.dtype))
        if info != 0 or not torch.isfinite(factor).all():
            raise ValueError(
                f"expected H + ridge to be positive definite, got {added:.1e} too small beside a mean "
                f"eigenvalue of {float(h.trace()) / k:.1e}; raise the ridge"
            )
        return factor, {"ridge": added}

    if held.store is None:
        factor, about = make()
    else:
        settings = fingerprint(at.weights, at.drawn, at.problem.decay, shift, ridge)
        factor, about = held.store.remember(f"factor-{settings[:16]}", make)
    return factor, about["ridge"]


def _refuse_singular(h: Tensor, n: int) -> None:
    values = torch.linalg.eigvalsh(h)
    k = len(values)
    rank = int((values > k * torch.finfo(h.dtype).eps * values[-1]).sum())
    if rank < k:
        raise ValueError(
            f"expected H of full rank where there is no ridge, got rank {rank} of {k} dimensions from {n} "
            "examples; leave ridge out, or project to fewer dimensions"
        )


def _target_features(projected: Projection, outputs: Outputs, batch_size: int) -> Tensor:
    """Projected gradients of the outputs, [t, k], float64 on the CPU."""
    refuse_steps(projected.problem.model, outputs)
    t = len(outputs)
    total = torch.zeros(t, projected.dim, dtype=torch.float64)
    start = 0
    parts = projected.parts(outputs.function, outputs.data, batch_size=batch_size)
    for _, phi in parts:
        phi, rows = phi.double().cpu(), slice(start, start + len(phi))
        if outputs.matrix is None:
            total[rows] = phi
        else:
            total += outputs.matrix[rows].to(phi).T @ phi
        start += len(phi)
    return total


def _kernel(held: _Held, solved: Tensor) -> tuple[Tensor, Tensor]:
    """Φ · solved [rows, t] and p [rows]."""
    kernel = torch.zeros(len(held.rows), solved.shape[1], dtype=torch.float64)
    ps = torch.zeros(len(held.rows), dtype=torch.float64)
    for some, phi, p in held.blocks():
        kernel[some], ps[some] = phi @ solved, p
    return kernel, ps
