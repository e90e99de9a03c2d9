"""Attribution along the way of a training: TracIn and SOURCE, from a few checkpoints.

One step of training answers a change of weight i by −(lr/B) ∇ℓ_i(θ), and carries earlier changes on
by I − lr H. Checkpoint c stands for a stretch of steps (an equal share of the run), and

    TracIn    adds up the answers and carries nothing on;
    SOURCE    puts the checkpoints into L segments, takes gradients and curvature to be constant in each,
              and carries on by S_l = exp(−η_l H_l).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attribution_core.curvature import DENSE, Kind, spectrum
from attribution_core.data import Progress
from attribution_core.datamodel import LinearDatamodel
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.gradients import Engine, directional, output_gradients
from attribution_core.influence import WIDE
from attribution_core.layerwise.vectors import flatten
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import gathered, my_rows
from attribution_core.second_order.conjugate import conjugate_gradients
from attribution_core.second_order.spectrum import Dense, Diagonal, Spectrum
from attribution_core.stepwise.trained import over_runs, several
from attribution_core.stepwise.trajectory import Checkpoints, Rates, Stretch, Way, way_of
from attribution_core.store import Store
from attribution_core.training import Run

Remember = Callable[
    [str, Callable[[], Tensor]], Tensor
]  # a tensor made once, read back on resuming
IMPLICIT = 1e-3  # residual of a segment's implicit step; far below what a factored H itself is off
KINDS = ("auto", "gauss_newton", "ekfac", "hessian", "diagonal", "identity")


def tracin(
    trained: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    checkpoints: Checkpoints | None = None,
    lr: Rates | None = None,
    steps: int | None = None,
    momentum: float = 0.0,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    engine: Engine = "auto",
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """TracIn datamodel: scores = −(1/(α n)) Σ_c G_c (η_c ⊙ a_c).

    G_c [n, p] and a_c [p, t] are the gradients of the losses and of the outputs at checkpoint c; η_c is
    the sum of learning rates over the steps that c stands for, over 1 − momentum; with Adam, per
    parameter, over √v̂ + eps. Exact for one step and an output that is linear in the parameters; each
    further step adds an error of the order of lr times the curvature, so the runs must be short.

    Args:
        trained: a `Run` made with `train(..., checkpoints=6)`, which brings everything along; several
            of them, whose datamodels are averaged; or a problem whose model is trained, with
        checkpoints: its state dicts from any trainer, in order, of equal stretches of the training
            (best from their middles); or `Checkpoint`s, which say their stretches themselves.
        lr: the mean learning rate, of all stretches or one for each.
        steps: of the whole training.
        momentum: of SGD. For Adam, train with `train`.
        weights, exposure: [n] and α, as in `influence`; a run brings its own.
        engine, batch_size: how gradients are taken; change cost, never the result.
        folder: keep scores there, block by block; the same call resumes. [n, t] float32.
        progress: wraps the loops over training rows (tqdm).

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t]; anchor α · weights.

    Raises:
        ValueError: a run without checkpoints, a problem without lr and steps, checkpoints that lack
            parameters; see also `directional`; a folder that belongs to another run.

    Source: Pruthi et al. 2020, eq. of TracInCP (sec. 3.3), with the sign of ∂ output / ∂ weight. Clipping
    and weight decay are not seen.
    """
    runs = several(trained, weights, exposure)
    if runs is not None:
        one = partial(
            tracin, outputs=outputs, checkpoints=checkpoints, lr=lr, steps=steps, momentum=momentum,
            engine=engine, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return over_runs(one, runs, folder)
    assert isinstance(trained, (Problem, Run))
    way = way_of(trained, checkpoints, lr, steps, momentum, weights, exposure)

    def directions(remember: Remember) -> list[Tensor]:
        def at(stretch: Stretch) -> Tensor:
            targets = _targets(stretch.problem, outputs)
            return targets * (stretch.reach * -way.final.unit).to(targets)

        return [remember(f"directions{c}", partial(at, s)) for c, s in enumerate(way.stretches)]

    meta = {"method": "tracin", "checkpoints": len(way.stretches)}
    return _datamodel(way, outputs, directions, meta, engine, batch_size, folder, progress)


def source(
    trained: Problem | Run | Sequence[Run],
    outputs: Outputs,
    *,
    checkpoints: Checkpoints | None = None,
    segments: int = 3,
    curvature: Kind | Literal["auto"] = "auto",
    lr: Rates | None = None,
    steps: int | None = None,
    momentum: float = 0.0,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    engine: Engine = "auto",
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """SOURCE datamodel: scores = −(1/(α n)) Σ_l G_l F_l q_l, with q_L = a(θ_final), q_{l−1} = S_l q_l.

        S_l = exp(−η_l H_l),   F_l = (1 − exp(−η_l H_l)) H_l⁻¹   (η_l where H_l has no curvature)

    G_l [n, p] and H_l are the loss gradients and the curvature with its weight decay, averaged over the
    checkpoints of segment l; η_l is the sum of learning rates over its steps, over 1 − momentum. With
    Adam η_l is a diagonal matrix R (learning rates over √v̂ + eps) and H stands between its roots.
    Negative eigenvalues count as 0. One segment is the influence function, damped as a training of
    that length damps: (1 − e^{−x})/x where `influence` of a run has 1/(1 + x), x = ηH.

    Args:
        trained: a `Run` made with `train(..., checkpoints=6)` (the paper's six, in three segments), which
            brings everything along; several of them, whose datamodels are averaged; or a problem whose
            model is trained. With segments=1 the trained parameters suffice as the one checkpoint.
        segments: L, at most the number of checkpoints; they are shared out evenly, in order.
        curvature: "gauss_newton" (p × p), "ekfac", "hessian", "diagonal" or "identity" (none but the
            weight decay); "auto" is "gauss_newton" up to 6,000 parameters, "ekfac" beyond.
        checkpoints, lr, steps, momentum, weights, exposure, engine, batch_size, folder, progress: as in
            `tracin`.

    Returns:
        scores [n, t] in output units per unit of weight; base f(anchor) [t]; anchor α · weights.

    Raises:
        ValueError: see `tracin`; more segments than checkpoints; an unknown curvature.

    Source: Bae et al. 2024 (arXiv 2405.12186), eq. 12–18, averages as in app. D.2; `respond` says what is
    exact. Clipping is not seen.
    """
    if curvature not in KINDS:
        raise ValueError(f"unknown curvature {curvature!r}; one of {', '.join(KINDS)}")
    runs = several(trained, weights, exposure)
    if runs is not None:
        one = partial(
            source, outputs=outputs, checkpoints=checkpoints, segments=segments, curvature=curvature,
            lr=lr, steps=steps, momentum=momentum, engine=engine,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return over_runs(one, runs, folder)
    assert isinstance(trained, (Problem, Run))
    way = way_of(
        trained, checkpoints, lr, steps, momentum, weights, exposure, final_alone=segments == 1
    )
    count = len(way.stretches)
    if not 1 <= segments <= count:
        raise ValueError(
            f"expected 1 to {count} segments of {count} checkpoints, got {segments}; pass "
            f"segments={count}, or keep more checkpoints"
        )
    kind = curvature
    if kind == "auto":
        kind = "gauss_newton" if len(way.final.problem.decay) <= DENSE else "ekfac"
    parts = [[way.stretches[c] for c in some] for some in np.array_split(range(count), segments)]

    def directions(remember: Remember) -> list[Tensor]:
        def back(part: list[Stretch], query: Tensor | None) -> Tensor:
            """F_l q_l and q_{l−1}, [2, t, p]."""
            if query is None:
                query = _targets(way.final.problem, outputs)
            return torch.stack(_through(part, kind, way, query, batch_size))

        found: list[Tensor] = []
        query = None
        for k in reversed(range(segments)):
            direction, query = remember(f"segment{k}", partial(back, parts[k], query))
            shared = direction * (-way.final.unit / len(parts[k]))
            found = [shared] * len(parts[k]) + found
        return found

    meta = {"method": "source", "segments": segments, "checkpoints": count, "curvature": kind}
    return _datamodel(way, outputs, directions, meta, engine, batch_size, folder, progress)


# --- one segment ---------------------------------------------------------------------------------


def _through(
    part: list[Stretch], kind: Kind, way: Way, query: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """(F q, S q) of a segment of stretches."""
    reach = torch.stack([s.reach for s in part]).sum(0)
    if not reach.any():  # a learning rate of 0: nothing moves
        return torch.zeros_like(query), query
    decay = torch.stack([s.pull for s in part]).sum(0) / reach
    problems = [s.problem for s in part]
    w = way.final.weights * (way.final.problem.n / way.final.drawn)
    h = spectrum(problems, kind, weights=w, batch_size=batch_size)
    return respond(h, query, reach, decay)


def respond(h: Spectrum, query: Tensor, reach: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """(F q, S q) for every row of q [k, p]: F = H̃⁻¹ (1 − e^{−H̃R}), S = e^{−H̃R}, H̃ = H + decay, R = diag(reach).

    A change δ of the parameters obeys dδ/ds = −R (H̃ δ + g) while s goes from 0 to 1 along the segment;
    then q·δ(1) = (S q)·δ(0) − (F q)·g. Exact for a dense or a diagonal H: with D = √R and B = D H̃ D,
    F = D (1 − e^{−B}) B⁻¹ D and S = D⁻¹ e^{−B} D. A factored H keeps its eigenvectors: it takes the mean
    of the decays where R is one number; with Adam's R it takes one implicit step, F = (H̃ + R⁻¹)⁻¹ and
    S = R⁻¹ F, which has the same limits for small and large H̃R and lies below the exact F by at most a
    factor of 1.3. (Bae et al., app. D, eq. 43, put diag(H) into the exponential instead: with the exact
    H of three small networks under Adam, cosines of .06 to .43 with exact scores, against .99.)
    """
    reach, decay = reach.to(query), decay.to(query)
    if isinstance(h, Diagonal):
        x = reach * (h.values + decay)
        return query * reach * _gained(x), query * _kept(x)
    if isinstance(h, Dense):
        root = reach.sqrt()
        b = Dense(root[:, None] * (h.matrix + decay.diag()) * root)
        return b.apply(query * root, _gained) * root, b.apply(query * root, _kept) / root
    if reach.min() == reach.max():
        rate, added = reach[0], decay.mean()
        gained = h.apply(query, lambda x: rate * _gained(rate * (x + added)))
        return gained, h.apply(query, lambda x: _kept(rate * (x + added)))
    shift = decay + 1 / reach

    def shifted(v: Tensor) -> Tensor:
        return h.apply(v, lambda x: x) + shift * v

    # `solve` of a factored H takes a shift by its diagonal in H's basis: near, and made exact here
    guess = partial(h.solve, shift=shift)
    gained = conjugate_gradients(shifted, query, IMPLICIT, 500, precondition=guess)
    return gained, gained / reach


def _targets(problem: Problem, outputs: Outputs) -> Tensor:
    """Output gradients [t, p], float64 where that is not too wide."""
    found = flatten(output_gradients(problem.model, outputs)).cpu()
    wide = found.dtype == torch.float32 and found.numel() > WIDE
    return found if wide else found.double()


def _kept(x: Tensor) -> Tensor:
    """e^{−x}, negative x counting as 0."""
    return torch.exp(-x.clamp(min=0))


def _gained(x: Tensor) -> Tensor:
    """(1 − e^{−x})/x, 1 at 0; negative x counting as 0."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    return -torch.expm1(-x) / x


# --- from directions to scores -------------------------------------------------------------------


def _datamodel(
    way: Way,
    outputs: Outputs,
    directions: Callable[[Remember], list[Tensor]],
    meta: dict[str, Any],
    engine: Engine,
    batch_size: int,
    folder: str | Path | None,
    progress: Progress,
) -> LinearDatamodel:
    """scores = Σ_c G_c v_c, with the directions v_c [t, p] of each checkpoint."""
    problem, final = way.final.problem, way.final
    base = outputs.evaluate(problem.model).numpy()  # first, for it names rows of NaN

    def rows_of(found: list[Tensor], rows: NDArray[np.intp], progress: Progress) -> Tensor:
        parts = [
            directional(s.problem, v, rows, engine, batch_size=batch_size, progress=progress)
            for s, v in zip(way.stretches, found, strict=True)
        ]
        return torch.stack(parts).double().sum(0).cpu()

    if folder is None:
        found = directions(lambda name, make: make())
        mine = my_rows(np.arange(problem.n))
        scores = gathered(lambda: rows_of(found, mine, progress)).numpy()
    else:
        places = [(s.problem.params, s.reach, s.pull) for s in way.stretches]
        made_of = fingerprint(problem, outputs, places, final.anchor, final.unit, meta)
        store = Store.open(folder, (problem.n, len(outputs)), made_of)
        found = directions(lambda name, make: store.remember(name, lambda: (make(), {}))[0])
        scores = store.fill(lambda rows: rows_of(found, rows, iter), progress)
    meta = {
        **meta,
        "weight_decay": float(problem.decay.mean()),
        "exposure": final.exposure,
        "covered": problem.covered,
    }
    return LinearDatamodel(scores, base, final.anchor, targets=outputs.targets, meta=meta)
