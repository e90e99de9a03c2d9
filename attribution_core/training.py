"""Replayable training: optimizers as pure functions, data order as index lists, weights per example.

A step on the batch of rows b_1..b_B is g = ∇ (1/B) Σ w_i ℓ_i(θ), then (θ, state) = update(θ, state, g).
The denominator is the number of rows in the batch, never Σ w: weight 0 is "dropped, same batches,
same order, same steps".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.calling import Params
from attribution_core.data import Progress, checked_weights
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.disk.run_folder import RunFolder
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import failing_together, from_first, wait, world
from attribution_core.safeguards.purity import check_steps, watched_step
from attribution_core.stepwise.batches import Drop, Recipe, drawn_order, removed_rows
from attribution_core.stepwise.optimizers import (
    SGD,
    Adam,
    AdamW,
    Checkpoint,
    State,
    resolved,
    stretches,
)
from attribution_core.stepwise.replay import MEMORY, States, first_pass, states_held
from attribution_core.stepwise.steps import Steps, TrainingState

__all__ = ["SGD", "Adam", "AdamW", "Checkpoint", "Recipe", "Run", "train"]


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training: the model, and where in weight space it stands (its anchor)."""

    problem: Problem  # its model is the initial one
    recipe: Recipe
    params: Params
    state: State  # of the optimizer, at the end
    order: list[NDArray[np.intp]]
    weights: NDArray[np.float64]
    exposure: float
    losses: NDArray[np.float64]  # the weighted mean loss of each step's batch
    checkpoints: tuple[Checkpoint, ...] = ()  # in order, of equal stretches of the steps
    buffers: Params = field(default_factory=dict)  # running statistics of norm layers, at the end
    states: Mapping[int, TrainingState] = field(default_factory=dict)  # kept on the way, by step
    digests: NDArray[np.int64] | None = (
        None  # [steps + 1], of the states; None where none were kept
    )
    since: int = 0  # the step from which the weights acted
    shards: int = 1  # processes that shared the rows of each batch
    removed: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, int))  # never drawn from

    def __repr__(self) -> str:
        """A line: a generated one prints every tensor."""
        last = f", last loss {self.losses[-1]:.4g}" if len(self.losses) else ""
        return f"Run(n={len(self.weights)} rows, {len(self.order)} steps, seed {self.recipe.seed}{last})"

    @property
    def model(self) -> nn.Module:
        """A copy of the problem's model with the trained parameters, in eval mode."""
        model = copy.deepcopy(self.problem.model)
        model.load_state_dict({**self.params, **self.buffers}, strict=False)
        return model.eval()

    @property
    def anchor(self) -> NDArray[np.float64]:
        """The training weights at which derivatives of this run are taken: exposure · weights, [n]."""
        return self.exposure * self.weights

    @property
    def pool(self) -> NDArray[np.intp]:
        """The examples that batches were drawn from: all but those that were removed."""
        return np.setdiff1d(np.arange(len(self.weights)), self.removed)

    @property
    def drawn(self) -> int:
        """How many examples the batches were drawn from: n, or fewer where rows were removed."""
        return len(self.weights) - len(self.removed)

    def outputs(self, outputs: Outputs) -> Tensor:
        """The trained model's outputs [t], in eval mode."""
        return outputs.evaluate(self.model)

    @property
    def damping(self) -> Params:
        """What stopping after K steps does to curvature: 1 / Σ_k (lr reach of a step), per parameter.

        Gradient descent for K steps answers a change a of the gradient by (1 − e^{−ηKH}) H⁻¹ a, which
        is near (H + 1/(ηK))⁻¹ a: the run has not forgotten its start (Bae et al. 2024, sec. 3.3, one
        segment). With momentum η is lr/(1 − momentum), with Adam lr/(√v̂ + eps) for each parameter.
        """
        factors = sum(self.recipe.factors(len(self.order)))
        reach = self.recipe.optimizer.reach(self.state, len(self.order))
        return {name: 1.0 / (value * factors) for name, value in reach.items()}

    def trained(self) -> Problem:
        """The problem at the trained parameters, with the weight decay that was in force."""
        decay = resolved(self.recipe.optimizer, self.problem).weight_decay
        return replace(self.problem, model=self.model, weight_decay=decay or 0.0)

    @property
    def steps(self) -> Steps:
        """The run as pure functions of its step numbers."""
        return steps_of(
            self.problem, self.recipe, self.order, self.weights, self.since, self.shards
        )

    def again(
        self, weights: ArrayLike, *, since: int | None = None, progress: Progress = iter
    ) -> Run:
        """The same training at other weights: same start, same order, same steps; no states are kept.

        Args:
            weights: [n].
            since: the step from which they act; by default this run's.
        """
        w = checked_weights(weights, self.problem.n)
        start = self.since if since is None else since
        _check_since(start, len(self.order))
        steps = steps_of(self.problem, self.recipe, self.order, w, start, self.shards)
        return _descend(replace(self, weights=w, since=start), steps, 0, 0, progress)

    @property
    def last(self) -> TrainingState:
        """The state after the last step."""
        pack = self.steps.packing.pack
        moments = {name: pack(held) for name, held in self.state.items()}
        return TrainingState(pack(self.params), moments, self.buffers)


def train(
    problem: Problem,
    recipe: Recipe,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    *,
    drop: Drop = "weight",
    since: int = 0,
    states: States = "auto",
    memory: int = MEMORY,
    checkpoints: int = 0,
    shard: bool = False,
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> Run:
    """Train `problem.model` (left untouched) by a recipe and return the run.

    Args:
        weights: [n] training weights, 1 if not given.
        exposure: α in (0, 1]: take the steps (and the schedule) of a run on a fraction α of the data,
            but draw from the whole set, so that every example is seen α as often. The run's anchor is
            then α: the best place from which to predict models trained on such a fraction.
        drop: what weight 0 means. "weight": the example stays in its batches and counts nothing.
            "row": it is gone; batches are drawn from the other rows, with as many epochs.
        since: the weights act from this step on; before it every example counts once.
        states: which states along the way are kept for `magic`, which computes the others again: "all",
            "sqrt" (2⌈√T⌉ of T), a number, 0 for none; "auto": what fits into `memory` bytes, but none
            with a folder. With a folder they are kept there, otherwise in memory with the run.
        checkpoints: keep the parameters and the optimizer's state at so many steps, each the middle of
            an equal stretch of the run; what `tracin` and `source` read.
        shard: under torchrun, share the rows of each batch between the processes, with one all-reduce a
            step; without it every process trains the whole model by itself.
        folder: keep the run there; the same call reads it back instead of training again, and goes on
            where a killed one stopped. Under torchrun the first process writes and the others read. What
            it does not notice: see `fingerprint.fingerprint`.
        progress: wraps the loop over steps (tqdm).

    Raises:
        ValueError: weights that are not [n], finite and non-negative; no rows left to train on; an
            exposure outside (0, 1]; dropout without `masks`, or `masks` for dropout in a model in eval mode; a forward
            pass that draws random numbers or changes buffers in another way than batch norm; batch norm or dropout
            where a batch is cut into parts; weights that swapping parameters does not reach (activation checkpointing, a
            loss of another model); more checkpoints than steps; a step since which there are none; a loss that is not
            finite (names step and rows).
    """
    shards = world()[1] if shard else 1
    run = begun(problem, recipe, weights, exposure, drop, since, shards)
    steps = run.steps
    check_steps(steps)
    start = steps.start()
    held = states_held(states, len(steps), start.bytes, memory)
    if folder is None:
        return _descend(run, steps, held, checkpoints, progress)
    held = 0 if states == "auto" else held
    asked = {"checkpoints": checkpoints, "states": held, "since": since}
    made_of = fingerprint(run.problem, recipe, run.weights, exposure, drop, asked)
    where = RunFolder(Path(folder), from_first(made_of), start)
    if not from_first(where.finished()):
        if shards > 1 or world()[0] == 0:
            found = _descend(run, steps, held, checkpoints, progress, where)
            if world()[0] == 0:
                where.write(found)
        wait()
    return replace(run, **where.read(steps))


def begun(
    problem: Problem,
    recipe: Recipe,
    weights: ArrayLike | None = None,
    exposure: float = 1.0,
    drop: Drop = "weight",
    since: int = 0,
    shards: int = 1,
) -> Run:
    """A run before its first step: its initial model, its batches and their weights; see `train`.

    Raises:
        ValueError: weights, an exposure, a drop or a step since which there are none.
    """
    w = checked_weights(weights, problem.n)
    if not 0 < exposure <= 1:
        raise ValueError(f"expected an exposure in (0, 1], got {exposure}; .5 is half of the steps")
    order = drawn_order(recipe, w, drop, exposure)
    if drop == "row" and since > 0 and (w == 0).any():
        raise ValueError(
            f"expected drop='weight' with since={since}, got drop='row': removed rows are missing from step 0 on; use "
            "drop='weight', or since=0"
        )
    _check_since(since, len(order))
    model = problem.model if recipe.init is None else recipe.init(recipe.seed).to(problem.device)
    return Run(
        replace(problem, model=model), recipe, {}, {}, order, w, exposure, np.zeros(0),
        since=since, shards=shards, removed=removed_rows(recipe, w, drop),
    )  # fmt: skip


def steps_of(
    problem: Problem,
    recipe: Recipe,
    order: list[NDArray[np.intp]],
    weights: NDArray[np.float64],
    since: int = 0,
    shards: int = 1,
) -> Steps:
    """A training's steps: a problem and a recipe, with everything drawn that is to be drawn."""
    if recipe.accumulate < 1:
        raise ValueError(f"expected a batch in at least 1 part, got {recipe.accumulate}")
    factors = np.array(recipe.factors(len(order)))
    return Steps(
        problem, resolved(recipe.optimizer, problem), order, weights, factors, recipe.clip,
        recipe.accumulate, recipe.masks, recipe.augment, shards, since,
    )  # fmt: skip


def _check_since(since: int, steps: int) -> None:
    if since and not 0 < since < steps:
        raise ValueError(
            f"expected weights that act from a step of 0 to {steps - 1} on, got since={since}; the run has {steps} steps"
        )


def _descend(
    run: Run,
    steps: Steps,
    held: int,
    checkpoints: int,
    progress: Progress,
    folder: RunFolder | None = None,
) -> Run:
    """The steps of a run, from its start or from where a killed one stopped; the first process writes."""
    middles = {(a + b) // 2: (a, b) for a, b in stretches(len(steps), checkpoints)}
    keep = set(first_pass(len(steps), held))
    state, first = steps.start(), 0
    losses, digests = np.zeros(len(steps)), np.zeros(len(steps) + 1, np.int64)
    states: dict[int, TrainingState] = {}
    marks: list[Checkpoint] = []
    by_name = steps.packing.unpack
    if folder is not None:
        with failing_together() if steps.shards > 1 else nullcontext():
            state, first, losses, digests = folder.resume(state, losses, digests)
            passed = [(at, *middles[at]) for at in sorted(middles) if at < first]
            marks = folder.marks(passed, steps.problem.params)
        if steps.shards > 1:
            _refuse_apart(folder, first)
    writer = None if world()[0] else folder
    if writer is not None and first == 0:
        writer.clear()
    if held:
        digests[first] = state.digest()
    for step in progress(range(first, len(steps))):
        if step in keep:
            if folder is None:
                states[step] = state
            elif writer is not None:
                writer.keep(step, state)
        try:
            new, losses[step] = (watched_step if step == first else Steps.step)(steps, state, step)
        except ValueError as error:
            raise ValueError(f"training stopped at step {step} of {len(steps)}: {error}") from None
        if step in middles:
            moments = {name: by_name(held_) for name, held_ in new.moments.items()}
            marks.append(Checkpoint(by_name(state.params), moments, step, *middles[step]))
            if writer is not None:
                writer.mark(len(marks) - 1, marks[-1])
        state = new
        if held:
            digests[step + 1] = state.digest()
        if writer is not None:
            writer.snapshot(step + 1, state, losses, digests)
    return replace(
        run,
        params=by_name(state.params),
        state={name: by_name(of) for name, of in state.moments.items()},
        losses=losses,
        checkpoints=tuple(marks),
        buffers=state.buffers,
        states=states,
        digests=digests if held else None,
    )


def _refuse_apart(folder: RunFolder, first: int) -> None:
    """Raise, on all processes, where one would go on from another step than the first does."""
    shared = from_first(first)
    with failing_together():
        if shared != first:
            raise ValueError(
                f"expected a folder that all processes see, got {folder.path}, where one finds step {first} "
                f"and the first {shared}; take one on a shared file system"
            )
