"""Values read off during one training: what each example's steps did to the outputs (in-run data Shapley).

A segment of steps moves the parameters by θ_b − θ_a, a sum of one movement for each example. Therefore

    f(θ_b) − f(θ_a) = ⟨θ_b − θ_a, ĝ⟩,    ĝ = ∫₀¹ ∇f(θ_a + s (θ_b − θ_a)) ds

splits over the examples by itself, and the share of an example is its Aumann-Shapley value in the game
whose players are the segment's movements: for a quadratic f its Shapley value, what it does alone plus
half of its interactions, without a Hessian. A gradient is credited at once with the later movements that momentum makes of it (`reach`). The
products of ĝ with per-example gradients wait for the end of their segment; what they are made of is kept
from the very passes that train (`passes`). ĝ is the mean of ∇f at the segment's ends, each of which ends one
segment, begins the next, and gives f as well. A segment is as long as its sum ⟨θ_b − θ_a, ĝ⟩ stays near f's
change; where it does not, the middle of the line is used as well (Simpson's rule), and where that does not
help the segment is split, before anything is read.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attribution_core.calling import Params
from attribution_core.data import Progress
from attribution_core.datamodel import LinearDatamodel
from attribution_core.gradients import Engine, choose_engine, plain_engine, valued_gradients
from attribution_core.layerwise.layers import UNTRIED, Coverage, NotCovered
from attribution_core.problem import Outputs, Problem, decay_of
from attribution_core.safeguards.purity import check_steps, unchanging
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.stepwise.batches import Drop
from attribution_core.stepwise.optimizers import SGD, Adam, AdamW
from attribution_core.stepwise.passes import Pass, Passes
from attribution_core.stepwise.reach import Reach, Segment, mixed
from attribution_core.stepwise.steps import Steps, TrainingState
from attribution_core.training import Recipe, Run, begun

GROWTH = 6  # a segment of a given length is at most such a part of the steps before it
FURTHER = 4.0  # times as long as the last segment that the next may be
MISS = 0.015  # of f's change so far, by which the sum of all segments may miss it
MARKS = 8  # parts, at most, between which a segment may be split
MEMORY = 2**30  # bytes that the steps of a segment may hold by default


class MovementWarning(UserWarning):
    """Scores without all that a step does later, under momentum or Adam, for want of memory."""


@dataclass(frozen=True, eq=False)
class InRun:
    """A training and the values read off during it."""

    datamodel: LinearDatamodel
    run: Run


def in_run(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    weights: ArrayLike | None = None,
    *,
    drop: Drop = "weight",
    order: Literal[1, 2] = 2,
    every: int | Literal["auto"] = "auto",
    engine: Engine = "auto",
    batch_size: int = 256,
    memory: int = MEMORY,
    progress: Progress = iter,
) -> InRun:
    """Train once and say what each example contributed to the outputs' change on the way.

        scores[i] = Σ_k −(1/B) total_k ⟨∇ℓ_i(θ_k), P ĝ⟩  over the steps k whose batch holds i

    total_k is how far a gradient of step k moves the parameters, then and later: lr_k for plain SGD, near
    lr / (1 − momentum) with momentum. P is 1, or Adam's 1 / (√v̂ + eps) at the segment's end. Weight decay
    moves the outputs as well and belongs to no example; it stands apart. Σ_i w_i scores[i] + decay = f(θ_end) −
    f(θ_start) up to the remainder.

    Args:
        weights: [n] training weights, 1 if not given; drop: what 0 means, as in `train`.
        order: the rule for ĝ. 1: ∇f at the segment's start. 2: the mean of ∇f at both ends, exact where f is
            quadratic along the line; with SGD and every=1 the second order of In-Run Data Shapley.
        every: most steps of a segment, which is also at most a sixth of those before it: outputs move most at
            the start. "auto": as many as keep the sum near the outputs' change. A segment's sum is compared
            with f(θ_b) − f(θ_a). Where it misses, order 2 takes ĝ by Simpson's rule; where that
            misses too, the segment is split near its middle. The sums of all are to miss f's change by
            1.5 %, at worst by 3 % of its largest change on the way. The next one is as long as the miss
            suggests, at most four times as long. Later movements under momentum and Adam add their own errors.
        engine: "ghost", "jvp" or "rows", as in `directional`; "auto" takes ghost where it covers every
            parameter. The others pass every batch through the model a second time.
        batch_size: rows of outputs per pass; changes memory and time, never the result.
        memory: bytes of layer inputs and output gradients that wait for a segment's end; where they would
            be more, the segment ends (more often, at more cost). With momentum and Adam a pass waits until most
            of its later movements are known; where there is no room for that, a `MovementWarning` says so.
        progress: wraps the loop over steps (tqdm).

    Returns:
        The run, the same as `train`'s, and a datamodel: scores [n, t] in output units per unit of weight
        (0 for rows that the training never weighed), base f(θ_end) [t], anchor `weights`. meta: "segments" and
        "gradients", how many there were, those of split segments too; "change"
        [t] f(θ_end) − f(θ_start); "weight_decay" [t], its part of it; "remainder" [t], Σ w scores + decay − change, and
        "relative_remainder", that over |change|, never scaled away.

    Raises:
        ValueError: dropout or batch norm in training mode, accumulate above 1, an optimizer other than
            SGD, Adam and AdamW; ghost asked for where it cannot cover; see also `train`.

    Source: Wang et al. 2024 (arXiv 2406.11011), its first and second order, with the sign of the change;
    Aumann & Shapley 1974, the diagonal formula, for the rest.
    """
    _check(recipe, order, every)
    run = begun(problem, recipe, weights, drop=drop)
    refuse_random_layers(run.problem.model)
    steps = run.steps
    check_steps(steps)
    most = len(steps) if every == "auto" else every
    ends = None if every == "auto" else ends_of(len(steps), every)
    rows = np.unique(np.concatenate(run.order))
    chosen, coverage = choose_engine(run.problem, len(outputs), rows, engine)

    def read(engine: str, coverage: Coverage) -> tuple[_Reading, Any, NDArray[np.float64]]:
        passes = Passes(steps, engine, coverage)
        reading = _Reading(steps, outputs, order, ends, passes, batch_size)
        return reading, *reading.train(memory, progress)

    try:
        reading, state, losses = read(chosen, coverage)
    except NotCovered:  # what the trial's rows did not show
        if engine != "auto":
            raise
        chosen = plain_engine(run.problem, len(outputs), rows)
        reading, state, losses = read(chosen, UNTRIED)
    by_name = steps.packing.unpack
    moments = {name: by_name(held) for name, held in state.moments.items()}
    run = replace(run, params=by_name(state.params), state=moments, losses=losses)
    meta: dict[str, object] = {
        "method": "in_run",
        "order": order,
        "every": most,
        "engine": chosen,
    }
    return InRun(reading.datamodel(run, meta), run)


def ends_of(steps: int, every: int) -> set[int]:
    """The steps after which segments end.

    >>> sorted(ends_of(16, 2))
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16]
    """
    ends, done = set(), 0
    while done < steps:
        done = min(steps, done + min(every, max(1, done // GROWTH)))
        ends.add(done)
    return ends


class Point(NamedTuple):
    """The outputs at some parameters, [t], and their gradients, packed [t, p]."""

    value: Tensor
    slope: Params


@dataclass(eq=False)
class _Reading:
    """A training that is read, and what has been read so far."""

    steps: Steps
    outputs: Outputs
    order: Literal[1, 2]
    ends: set[int] | None  # steps after which segments end; None: as f's change says
    passes: Passes
    batch_size: int
    segments: int = 0
    gradients: int = 0  # of the outputs

    def __post_init__(self) -> None:
        problem, t = self.steps.problem, len(self.outputs)
        self.still: nn.Module = copy.deepcopy(problem.model).eval()  # for outputs
        self.reach = Reach.of(self.steps)
        self.open: list[Segment] = []  # whose steps still move the parameters
        self.scores = torch.zeros(problem.n, t, dtype=torch.float64)  # what each example did
        self.decay = torch.zeros(t, dtype=torch.float64)  # what weight decay did
        self.miss = torch.zeros(t, dtype=torch.float64)  # Σ ⟨θ_b − θ_a, ĝ⟩ less f's change, so far
        decays = replace(problem, weight_decay=self.steps.optimizer.weight_decay or 0.0).decay
        self.decays = bool((decays != 0).any())
        self.stays = self.decays or not self.passes.stateless  # parameters of every step
        self.here = self.point(self.steps.start().params)  # where the last segment ended
        self.first = self.here.value

    def train(self, memory: int, progress: Progress) -> tuple[TrainingState, NDArray[np.float64]]:
        """The steps of the training, read segment by segment: (the state at the end, losses)."""
        steps = self.steps
        state, losses = steps.start(), np.zeros(len(steps))
        held: list[Pass] = []
        room, lag, length = 0, self.reach.lag, 1
        with self.passes.hooks:
            for step in progress(range(len(steps))):
                try:
                    mark = self.ends is None and len(held) % math.ceil(length / MARKS) == 0
                    act = partial(self.step, state, step, self.stays or mark or not held)
                    # is the first a function of its state and number alone?
                    state, losses[step], kept = act() if step else unchanging(steps, step, act)
                except NotCovered:
                    raise
                except ValueError as error:
                    raise ValueError(
                        f"training stopped at step {step} of {len(steps)}: {error}"
                    ) from None
                held.append(kept)
                if room == 0:
                    room = max(1, memory // max(1, kept.bytes))
                    if room // 2 < lag and room < len(steps):
                        lag = room // 2
                        _warn(lag, self.reach.lag, kept.bytes)
                waiting = len(held) + sum(len(of.passes) for of in self.open)
                left = len(steps) - step - 1
                due = len(held) >= length if self.ends is None else step + 1 in self.ends
                if due or left == 0 or waiting >= room:
                    length = self.close(held, state.params, step + 1 - lag if left else len(steps))
                    length = math.ceil(left / math.ceil(left / length)) if left else 0
                    held = []
        return state, losses

    def step(
        self, state: TrainingState, step: int, keep: bool
    ) -> tuple[TrainingState, float, Pass]:
        """(the next state, the loss, what waits for the segment's end)."""
        steps, rows, clip = self.steps, self.steps.order[step], 1.0
        self.passes.watch(len(rows))
        loss, grads, buffers = steps.gradient(state, step, self.passes)
        with torch.no_grad():
            params, moments = steps.update(state.params, state.moments, grads, step)
            pace = self.reach.pace(moments, step)
        if steps.clip is not None:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            clip = min(1.0, steps.clip / (float(norm) + 1e-6))
        kept = Pass(step, rows, clip, state.params if keep else {}, pace, self.passes.uses)
        return TrainingState(params, moments, buffers), loss, kept

    @torch.no_grad()
    def close(self, held: list[Pass], params: Params, known: int) -> int:
        """End a segment, read the steps before `known`, whose movements are known well enough, and say how
        long the next segment should be."""
        length = self.measure(held, params, self.point(params))
        directions = self.reach.directions(self.open)
        for segment in self.open:
            self.read(segment, [of for of in segment.passes if of.step < known], directions)
        left = [(of.slope, [at for at in of.passes if at.step >= known]) for of in self.open]
        self.open = [Segment(slope, passes) for slope, passes in left if passes]
        return length

    def measure(self, held: list[Pass], params: Params, end: Point) -> int:
        """Find ĝ along a segment that ends at `params`, or along its parts if its sum misses f's change:

            miss = ⟨θ_b − θ_a, ĝ⟩ − (f(θ_b) − f(θ_a)) ~ length^(order + 1)

        which also says how long the next segment should be, half to four times as long. At order 2 the middle of
        the line is looked at, too, before parts are.
        """
        begin, start, further = self.here, held[0].params, FURTHER

        def missed(slope: Params) -> Tensor:
            moved = [slope[name] @ (theta - start[name]) for name, theta in params.items()]
            return torch.stack(moved).double().sum(0).cpu() - (end.value - begin.value)

        slope = begin.slope if self.order == 1 else mixed(begin.slope, end.slope, 0.5)
        if self.ends is None:
            room, miss = self.room(end.value, len(held)), missed(slope)
            fits = room / max(float(miss.abs().sum()), 1e-300)
            further = min(further, max(0.5, 0.9 * fits ** (1 / (1 + self.order))))
            if fits < 1 and self.order == 2:  # Simpson's rule: off by ~ length^5
                middle = self.point(mixed(start, params, 0.5)).slope
                slope = mixed(slope, middle, 2 / 3)
                miss = missed(slope)
            marks = [k for k, of in enumerate(held) if k and of.params]
            if float(miss.abs().sum()) > room and marks:
                k = min(marks, key=lambda k: abs(2 * k - len(held)))
                self.measure(held[:k], held[k].params, self.point(held[k].params))
                return self.measure(held[k:], params, end)
            self.miss += miss
        self.open.append(Segment(slope, held))
        self.segments += 1
        self.here = end
        return max(1, int(further * len(held)))

    def room(self, value: Tensor, steps: int) -> float:
        """By how much a segment of so many steps may miss f's change, absolute values summed over outputs.

        Half of what those before it have left of `MISS` |f_b − f_0|, and at least its share of steps of
        that: |Σ miss| ≤ 2 `MISS` max_b |f_b − f_0|, unless a part that cannot be split misses more. Rounding of f is no
        miss.
        """
        most = MISS * float((value - self.first).abs().sum())
        eps = max(torch.finfo(x.dtype).eps for x in self.steps.problem.params.values())
        left = most - float(self.miss.abs().sum())
        return max(left / 2, most * steps / len(self.steps), eps * float(value.abs().sum()))

    def read(self, segment: Segment, passes: list[Pass], directions: dict[int, Params]) -> None:
        """Take the products of some passes of a segment."""
        along = [directions[of.step] for of in passes]
        for some in self.passes.joined(passes, along):
            block = passes[some]
            moved = [np.full(len(of.rows), of.clip * self.reach.moved(of.step)) for of in block]
            parts = self.passes.products(block, along[some]).double().cpu()
            parts *= -torch.from_numpy(np.concatenate(moved))[:, None]
            rows = torch.from_numpy(np.concatenate([of.rows for of in block]))
            self.scores.index_add_(0, rows, parts)
        if self.decays:
            for of, v in zip(passes, along, strict=True):
                self.decay -= self.decayed(of, segment.slope, v)

    def point(self, params: Params) -> Point:
        """The outputs at packed parameters and their gradients."""
        pack = self.steps.packing
        self.gradients += 1
        value, found = valued_gradients(
            self.still, self.outputs, self.batch_size, pack.unpack(params)
        )
        slope = pack.pack({name: found[name].detach() for name in self.steps.problem.params})
        return Point(value, slope)

    def decayed(self, of: Pass, slope: Params, along: Params) -> Tensor:
        """By how much weight decay lowered the outputs in a step, [t]."""
        optimizer = self.reach.optimizer
        decoupled = isinstance(optimizer, Adam) and optimizer.decoupled
        far = float(self.reach.lr[of.step]) if decoupled else self.reach.moved(of.step)
        parts = [
            v @ (decay_of(optimizer.weight_decay, name) * of.params[name])
            for name, v in (slope if decoupled else along).items()
        ]
        return far * torch.stack(parts).double().sum(0).cpu()

    def datamodel(self, run: Run, meta: dict[str, object]) -> LinearDatamodel:
        """What was read, beside what happened."""
        base = self.here.value.numpy()
        change, parts, w = base - self.first.numpy(), self.scores.numpy(), run.weights[:, None]
        remainder = parts.sum(0) + self.decay.numpy() - change
        pairs = zip(remainder, change, strict=True)
        meta = {
            **meta,
            "segments": self.segments,
            "gradients": self.gradients,
            "change": change.tolist(),
            "weight_decay": self.decay.tolist(),
            "remainder": remainder.tolist(),
            "relative_remainder": [float(abs(r / c)) if c else None for r, c in pairs],
        }
        scores = np.divide(parts, w, out=np.zeros_like(parts), where=w > 0)
        return LinearDatamodel(scores, base, run.weights, targets=self.outputs.targets, meta=meta)


def _warn(lag: int, wanted: int, size: int) -> None:
    warnings.warn(
        f"a gradient moves the parameters for {wanted} more steps, of which {lag} are seen in this memory: scores leave "
        f"out what comes later (see meta['remainder']); give memory={2 * (wanted + 1) * size} bytes, or smaller batches",
        MovementWarning,
        stacklevel=4,
    )


def _check(recipe: Recipe, order: int, every: int | str) -> None:
    """Raise what cannot be read."""
    if order not in (1, 2):
        raise ValueError(
            f"expected order 1 or 2, got {order!r}; 2 takes ∇f at both ends of a segment"
        )
    if every != "auto" and (isinstance(every, (bool, str)) or every < 1):
        raise ValueError(f"expected segments of at least one step or 'auto', got every={every!r}")
    if type(recipe.optimizer) not in (SGD, Adam, AdamW):
        raise ValueError(
            f"expected SGD, Adam or AdamW, whose movements are shared out here, got "
            f"{type(recipe.optimizer).__name__}; use one of them, or magic, which takes any optimizer"
        )
    if recipe.accumulate != 1:
        raise ValueError(
            f"expected batches in one part, got accumulate={recipe.accumulate}; a segment's passes are kept "
            "whole anyway: use accumulate=1 (the same gradient) and a smaller `memory`"
        )
