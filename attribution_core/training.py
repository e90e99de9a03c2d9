"""Replayable training: optimizers as pure functions, data order as index lists, weights per example.

A step on the batch of rows b_1..b_B is g = ∇ (1/B) Σ w_i ℓ_i(θ), then (θ, state) = update(θ, state, g).
The denominator is the number of rows in the batch, never Σ w: weight 0 is "dropped, same batches,
same order, same steps".
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.gradients import Progress
from attribution_core.optimizers import (
    SGD,
    Adam,
    AdamW,
    Checkpoint,
    Optimizer,
    Schedule,
    State,
    clipped,
    load_state,
    lr_factor,
    resolved,
    save_state,
    stretches,
)
from attribution_core.problem import (
    Batch,
    Outputs,
    Params,
    Problem,
    per_example,
    refuse_random_layers,
    rows_in,
    take,
)
from attribution_core.processes import wait, world
from attribution_core.store import fingerprint, write_text

__all__ = ["SGD", "Adam", "AdamW", "Checkpoint", "Recipe", "Run", "train"]

Drop = Literal["weight", "row"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to train: everything but the problem and the weights.

    Args:
        optimizer: SGD, Adam or AdamW of this module.
        batch_size: rows per step; at most the number of rows.
        epochs: passes over the rows; fractions count. steps = round(epochs · rows / batch_size).
        schedule: "linear" or "cosine" (from 1 to 0 over the run), or your own step -> lr factor.
        seed: of the data order, and of `init`.
        clip: largest norm of the whole gradient.
        order: explicit index lists, one a step, to replay a run made elsewhere.
        init: seed -> model, the initial model; without it every run starts from `problem.model`.
    """

    optimizer: Optimizer
    batch_size: int
    epochs: float
    schedule: Schedule | None = None
    seed: int = 0
    clip: float | None = None
    order: Sequence[Sequence[int]] | None = None
    init: Callable[[int], nn.Module] | None = None

    def draw(self, rows: NDArray[np.intp], exposure: float = 1.0) -> list[NDArray[np.intp]]:
        """The batches of a run: one permutation of the rows after another, cut into equal batches."""
        if self.order is not None:
            given = [np.asarray(batch, dtype=int) for batch in self.order]
            return given[: max(1, round(exposure * len(given)))]
        size = min(self.batch_size, len(rows))
        steps = max(1, round(self.epochs * exposure * len(rows) / size))
        rng = np.random.default_rng(self.seed)
        passes = math.ceil(steps * size / len(rows))
        stream = np.concatenate([rng.permutation(rows) for _ in range(passes)])
        return list(stream[: steps * size].reshape(steps, size))

    def lr_factor(self, step: int, steps: int) -> float:
        """What the schedule multiplies the learning rate with at this step."""
        return lr_factor(self.schedule, step, steps)


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training: the model, and where in weight space it stands (its anchor)."""

    problem: Problem
    recipe: Recipe
    params: Params
    state: State  # of the optimizer, at the end
    order: list[NDArray[np.intp]]
    weights: NDArray[np.float64]
    exposure: float
    losses: NDArray[np.float64]  # the weighted mean loss of each step's batch
    checkpoints: tuple[Checkpoint, ...] = ()  # in order, of equal stretches of the steps

    @property
    def model(self) -> nn.Module:
        """A copy of the problem's model with the trained parameters."""
        model = copy.deepcopy(self.problem.model)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in self.params:
                    value.copy_(self.params[name])
        return model

    @property
    def anchor(self) -> NDArray[np.float64]:
        """The training weights at which derivatives of this run are taken: exposure · weights, [n]."""
        return self.exposure * self.weights

    @property
    def drawn(self) -> int:
        """How many examples the batches were drawn from: n, or fewer where rows were removed."""
        seen = np.bincount(np.concatenate(self.order), minlength=len(self.weights))
        removed = (self.weights == 0).any() and not seen[self.weights == 0].any()
        return int((self.weights > 0).sum()) if removed else len(self.weights)

    def outputs(self, outputs: Outputs) -> Tensor:
        """The trained model's outputs [t]."""
        return outputs.evaluate(self.problem.model, self.params)

    @property
    def damping(self) -> Params:
        """What stopping after K steps does to curvature: 1 / Σ_k (lr reach of a step), per parameter.

        Gradient descent for K steps answers a change a of the gradient by (1 − e^{−ηKH}) H⁻¹ a, which
        is near (H + 1/(ηK))⁻¹ a: the run has not forgotten its start (Bae et al. 2024, sec. 3.3, one
        segment). With momentum η is lr/(1 − momentum), with Adam lr/(√v̂ + eps) for each parameter.
        """
        factors = sum(self.recipe.lr_factor(k, len(self.order)) for k in range(len(self.order)))
        reach = self.recipe.optimizer.reach(self.state, len(self.order))
        return {name: 1.0 / (value * factors) for name, value in reach.items()}

    def trained(self) -> Problem:
        """The problem at the trained parameters, with the weight decay that was in force."""
        decay = resolved(self.recipe.optimizer, self.problem).weight_decay
        return replace(self.problem, model=self.model, weight_decay=decay or 0.0)


def train(
    problem: Problem,
    recipe: Recipe,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    *,
    drop: Drop = "weight",
    checkpoints: int = 0,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> Run:
    """Train `problem.model` (left untouched) by a recipe and return the run.

    Args:
        weights: [n] training weights, 1 if not given.
        exposure: α in (0, 1]: take the steps (and the schedule) of a run on a fraction α of the data,
            but draw from the whole set, so that every example is seen α as often. The run's anchor is
            then α: the place from which models trained on such a fraction are predicted best.
        drop: what weight 0 means. "weight": the example stays in its batches and counts nothing.
            "row": it is gone; batches are drawn from the other rows, with as many epochs.
        checkpoints: keep the parameters and the optimizer's state at so many steps, each the middle of
            an equal stretch of the run; what `tracin` and `source` read.
        folder: keep the run there; the same call reads it back instead of training again. Under
            torchrun the first process trains and the others read.
        progress: wraps the loop over steps (tqdm).

    Raises:
        ValueError: weights that are not [n], finite and non-negative; nothing left to train on; an
            exposure outside (0, 1]; random layers; more checkpoints than steps; a loss that is not finite (names step and rows).
    """
    w = _checked_weights(weights, problem.n)
    if not 0 < exposure <= 1:
        raise ValueError(f"expected an exposure in (0, 1], got {exposure}; .5 is half of the steps")
    if drop not in ("weight", "row"):
        raise ValueError(f"unknown drop {drop!r}; 'weight' keeps batches, 'row' removes examples")
    if drop == "row" and recipe.order is not None and (w == 0).any():
        raise ValueError(
            "a recipe with an explicit order cannot be redrawn without rows; use drop='weight'"
        )
    model = problem.model if recipe.init is None else recipe.init(recipe.seed).to(problem.device)
    refuse_random_layers(model)
    started = replace(problem, model=model)
    if folder is None:
        return _descend(started, recipe, w, exposure, drop, checkpoints, progress)
    kept = [checkpoints] if checkpoints else []
    keep = _Folder(Path(folder), fingerprint(started, recipe, w, exposure, drop, *kept))
    if world()[0] == 0 and not keep.exists():
        keep.write(_descend(started, recipe, w, exposure, drop, checkpoints, progress))
    wait()
    return keep.read(started, recipe, w, exposure)


def _descend(
    problem: Problem,
    recipe: Recipe,
    w: NDArray[np.float64],
    exposure: float,
    drop: Drop,
    checkpoints: int,
    progress: Progress,
) -> Run:
    """The steps of a run, from the problem's own parameters."""
    optimizer = resolved(recipe.optimizer, problem)
    order = recipe.draw(np.flatnonzero(w > 0) if drop == "row" else np.arange(problem.n), exposure)
    middles = {(a + b) // 2: (a, b) for a, b in stretches(len(order), checkpoints)}
    params, state = problem.params, optimizer.init(problem.params)
    losses, kept = np.zeros(len(order)), []
    for step, some in enumerate(progress(order)):
        batch = take(problem.train, some, problem.device)
        factor = recipe.lr_factor(step, len(order))
        try:
            loss, grads = gradient(problem, params, batch, torch.from_numpy(w[some]), some)
        except ValueError as error:
            raise ValueError(f"training stopped at step {step} of {len(order)}: {error}") from None
        if recipe.clip is not None:
            grads = clipped(grads, recipe.clip)
        before = params
        params, state = optimizer.update(params, state, grads, step, factor)
        losses[step] = loss
        if step in middles:
            kept.append(Checkpoint(before, state, step, *middles[step]))
    return Run(problem, recipe, params, state, order, w, exposure, losses, tuple(kept))


@dataclass(frozen=True)
class _Folder:
    """A run on disk: run.safetensors and checkpoint0.safetensors ... (parameters, state), run.npz
    (order, losses, the checkpoints' steps), run.json."""

    path: Path
    fingerprint: str

    def _tensors(self, checkpoint: int | None = None) -> Path:
        name = "run" if checkpoint is None else f"checkpoint{checkpoint}"
        return self.path / f"{name}.safetensors"

    def exists(self) -> bool:
        head = self.path / "run.json"
        if not head.exists():
            return False
        if json.loads(head.read_text(encoding="utf-8")) != {"fingerprint": self.fingerprint}:
            raise ValueError(
                f"{self.path} holds another training; the model, the data, the recipe or the number of "
                "checkpoints has changed: choose another folder or delete this one"
            )
        return True

    def write(self, run: Run) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for k, at in enumerate(run.checkpoints):
            save_state(self._tensors(k), at.params, at.state)
        save_state(self._tensors(), run.params, run.state)
        np.savez(
            self.path / "run.npz",
            order=np.concatenate(run.order),
            sizes=[len(batch) for batch in run.order],
            losses=run.losses,
            checkpoints=np.array([(at.step, at.first, at.last) for at in run.checkpoints], int),
        )
        write_text(self.path / "run.json", json.dumps({"fingerprint": self.fingerprint}))

    def read(
        self, problem: Problem, recipe: Recipe, weights: NDArray[np.float64], exposure: float
    ) -> Run:
        with np.load(self.path / "run.npz") as held:
            order = np.split(held["order"], np.cumsum(held["sizes"])[:-1])
            losses = held["losses"]
            steps = held["checkpoints"].tolist() if "checkpoints" in held else []
        kept = tuple(
            Checkpoint(*load_state(self._tensors(k), problem.params), *where)
            for k, where in enumerate(steps)
        )
        params, state = load_state(self._tensors(), problem.params)
        return Run(problem, recipe, params, state, order, weights, exposure, losses, kept)


def gradient(
    problem: Problem, params: Params, batch: Batch, weights: Tensor, rows: ArrayLike | None = None
) -> tuple[float, Params]:
    """(1/B) Σ w_i ℓ_i and its gradient; B is the number of rows in the batch."""
    leaf = {name: value.requires_grad_() for name, value in detached(params).items()}
    losses = per_example(problem.model, problem.loss, batch, leaf, rows)
    loss = (losses * weights.to(losses)).sum() / rows_in(batch)
    grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
    named = zip(leaf.items(), grads, strict=True)
    return loss.item(), {k: torch.zeros_like(v) if g is None else g for (k, v), g in named}


def detached(params: Params) -> Params:
    """The same parameters, outside any graph."""
    return {name: value.detach() for name, value in params.items()}


def _checked_weights(weights: ArrayLike | None, n: int) -> NDArray[np.float64]:
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != (n,):
        raise ValueError(f"expected one weight per training example, [n={n}], got {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ValueError("expected finite weights of at least 0, got others; 0 drops an example")
    if not (w > 0).any():
        raise ValueError("expected something to train on, got weight 0 for every example")
    return w
