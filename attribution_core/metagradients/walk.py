"""The walk back through a training: what outputs owe to everything that its steps were made of.

All outputs of a chunk walk together. For each step, last to first, the state it started from is at hand or
computed again (`replay`), and the step's own adjoint (`adjoint`) says what is owed to its rows, inputs and
hyperparameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution_core.data import Progress, Rows, Sized, take
from attribution_core.disk.files import write_arrays
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.gradients import has_forward_mode, output_gradients
from attribution_core.layerwise.vectors import size_of
from attribution_core.metagradients.adjoint import Adjoint, Form, Owed, Wanted, pull
from attribution_core.problem import Outputs
from attribution_core.processes import from_first, sum_over_processes, wait, world
from attribution_core.stepwise.optimizers import stretches
from attribution_core.stepwise.replay import backwards, refuse_another_end
from attribution_core.stepwise.steps import Steps
from attribution_core.training import Run

CHUNK = 32  # targets that share a walk, unless their adjoints take more than WIDE numbers
WIDE = 2**27
VMAP = 16  # targets from which vmap is quicker, in models of up to ...
TINY = 2**16  # ... so many parameters; beyond, one backward pass a target (benchmarks/magic.py)


@dataclass(frozen=True, eq=False)
class Walk:
    """How to walk.

    Args:
        since: the step to stop at; segments: of the steps from there on, that are summed separately.
        form: of the second-order pass. batch_targets: outputs a chunk. held: states at a time.
        folder: where finished chunks are kept. progress: wraps the loop over steps.
    """

    since: int
    segments: int
    form: Form
    batch_targets: int | None
    held: int
    folder: str | Path | None
    progress: Progress


@dataclass(frozen=True, eq=False)
class Walked:
    """What was found: owed [segments, rows, t], the adjoint's growth [t], the most states held."""

    owed: NDArray[np.float64]
    growth: NDArray[np.float64]
    held: int


def walk_back(run: Run, outputs: Outputs, wanted: Wanted, how: Walk) -> Walked:
    """What every output owes to what is wanted, a chunk of outputs at a time.

    Returns:
        owed: rows are training rows, or (of "inputs") the rows asked for times their numbers, or
            hyperparameters; derivatives by the weight that a row carries each time it appears.
    """
    p = size_of(run.params)
    size = how.batch_targets or max(1, min(CHUNK, WIDE // max(1, p)))
    chunks = [np.arange(k, min(k + size, len(outputs))) for k in range(0, len(outputs), size)]
    made_of = fingerprint(
        run.problem,
        run.recipe,
        run.order,
        run.weights,
        run.exposure,
        run.since,
        run.params,
        run.digests,
        outputs,
        wanted,
        how.since,
        how.segments,
    )
    found = []
    for number, chunk in enumerate(chunks):
        path = None if how.folder is None else Path(how.folder) / f"chunk{number:05d}.npz"
        part = None if path is None else _read(path, made_of, chunk)
        if part is None:
            part = _walk(run, _columns(outputs, chunk), wanted, how)
            if path is not None and world()[0] == 0:
                _write(path, made_of, chunk, part)
            wait()
        found.append(part)
    return Walked(
        np.concatenate([part.owed for part in found], axis=2),
        np.concatenate([part.growth for part in found]),
        max(part.held for part in found),
    )


def _walk(run: Run, outputs: Outputs, wanted: Wanted, how: Walk) -> Walked:
    """One walk from the last step to the first, for all of these outputs."""
    steps = run.steps
    at = _last_adjoint(run, steps, outputs)
    last = at.norms
    shared = _sharing(steps)
    form = _form(how.form, len(outputs), steps)
    riding = _shadows(run)
    total = _Total.of(run, wanted, how, len(outputs))
    held = [max(1, len(run.states))]
    walk = backwards(steps, how.held, run.states, run.digests, how.since, noted=held.append)
    for k, state in how.progress(Sized(walk, len(steps) - how.since)):
        if run.digests is None and k == len(steps) - 1:
            refuse_another_end(run.last.params, steps.step(state, k)[0].params)
        with told_operation():
            at, owed = pull(shared, state, k, at, wanted, form, riding[k] if riding else None)
        total.add(k, owed)
        if not torch.isfinite(at.norms).all():
            raise ValueError(
                f"expected finite derivatives, got NaN or infinity at step {k} of {len(steps)}: the training is "
                "not differentiable there, or too unstable; lower the learning rate, or give Adam an "
                "eps_root (1e-8)"
            )
    growth = (at.norms / last.clamp(min=torch.finfo(torch.float64).tiny)).numpy()
    return Walked(total.scores(shared.shards > 1), growth, max(held))


@contextmanager
def told_operation() -> Iterator[None]:
    """Name the operation that has no second derivative, and what to take instead."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "derivative" not in text and "not implemented" not in text:
            raise
        named = re.search(r"aten::(\w+)|'(\w+)'", text)
        name = (named[1] or named[2]) if named else "an operation"
        cure = (
            "load transformers with attn_implementation='eager'"
            if "attention" in text
            else "write that layer in plain operations (nn.Embedding and a mean for nn.EmbeddingBag, say)"
        )
        raise ValueError(
            f"expected a loss that can be differentiated twice, got {name}, which has no second derivative; "
            f"{cure} ({text})"
        ) from error


def _last_adjoint(run: Run, steps: Steps, outputs: Outputs) -> Adjoint:
    """∂ outputs / ∂ (parameters, moments, running statistics) after the last step."""
    floating = {k: v for k, v in run.buffers.items() if v.is_floating_point()}
    found = output_gradients(run.model, outputs, params={**run.params, **floating})
    found = {name: value.detach() for name, value in found.items()}
    params = steps.packing.pack({name: found[name] for name in run.params})
    moments = {
        name: {k: torch.zeros_like(params[k]) for k in of} for name, of in run.last.moments.items()
    }
    return Adjoint(params, moments, {name: found[name] for name in floating})


def _sharing(steps: Steps) -> Steps:
    """The steps with the rows of a batch shared by all processes, where they can be."""
    mixed = steps.tracking or steps.masks is not None
    return steps if mixed else replace(steps, shards=world()[1])


def _form(form: Form, count: int, steps: Steps) -> Form:
    """The form of the second-order pass, by what was measured (benchmarks/magic.py)."""
    if form not in ("auto", "double", "vmap"):
        raise ValueError(f"unknown form {form!r}; auto, double or vmap")
    fixed = steps.tracking or steps.masks is not None  # batch norm and masks have no vmapped form
    if form == "vmap" and fixed:
        raise ValueError("batch norm in training mode and dropout masks need form='double'")
    layers = steps.problem.model.modules()
    convolves = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in layers)
    if form == "auto":
        tiny = size_of(steps.problem.params) <= TINY
        quick = tiny and count >= VMAP and not (fixed or convolves)
        some = steps.batch(0, steps.order[0][:2])
        return "vmap" if quick and has_forward_mode(steps.problem, some) else "double"
    return form


def _shadows(run: Run) -> list[NDArray[np.intp]] | None:
    """For each step the rows that ride along at weight 0: those that batches were drawn without."""
    absent = run.removed
    if not len(absent):
        return None
    if run.steps.tracking:
        raise ValueError(
            "expected a run that saw every row, got rows that are in no batch, and batch norm, whose "
            "statistics they would change; train with drop='weight'"
        )
    sizes = np.array([len(batch) for batch in run.order])
    present = run.problem.n - len(absent)
    ends = np.round(np.cumsum(sizes) * len(absent) / present).astype(int)
    rng = np.random.default_rng(run.recipe.seed)
    passes = -(-int(ends[-1]) // len(absent)) if ends[-1] else 0
    stream = np.concatenate([rng.permutation(absent) for _ in range(max(passes, 1))])[: ends[-1]]
    return np.split(stream, ends[:-1])


def _columns(outputs: Outputs, chunk: NDArray[np.intp]) -> Outputs:
    """Some of the targets."""
    if len(chunk) == len(outputs):
        return outputs
    if outputs.matrix is None:
        return replace(outputs, data=Rows(outputs.data, chunk))
    names = tuple(outputs.names[j] for j in chunk) if outputs.names else ()
    return replace(outputs, matrix=outputs.matrix[:, torch.from_numpy(chunk)], names=names)


@dataclass(frozen=True, eq=False)
class _Total:
    """What is owed, summed over steps, segment by segment: [segments, rows, numbers of a row, K]."""

    sums: Tensor
    segment: NDArray[np.intp]  # of each step
    place: NDArray[np.intp]  # of each training row among those that are summed
    shared: bool  # between processes, by rows

    @classmethod
    def of(cls, run: Run, wanted: Wanted, how: Walk, count: int) -> _Total:
        numbers, size, place = 1, run.problem.n, np.arange(run.problem.n)
        if wanted.rows is not None:
            batch: Any = take(run.problem.train, wanted.rows[:1])
            numbers, size = batch[wanted.column].numel(), len(wanted.rows)
            place = np.zeros(run.problem.n, np.intp)
            place[wanted.rows] = np.arange(size)
        elif wanted.hyper:
            size = len(wanted.hyper)
        segment = np.zeros(len(run.order), np.intp)
        for number, (a, b) in enumerate(stretches(len(run.order) - how.since, how.segments)):
            segment[how.since + a : how.since + b] = number
        sums = torch.zeros(how.segments, size, numbers, count, dtype=torch.float64)
        return cls(sums, segment, place, not wanted.hyper)

    def add(self, step: int, owed: Owed) -> None:
        into = self.sums[self.segment[step]]
        if owed.hyper is not None:
            into[:, 0] += owed.hyper
        if owed.weights is not None:
            into[:, 0].index_add_(0, torch.from_numpy(owed.rows), owed.weights.double().cpu())
        if owed.inputs is not None and owed.inputs_rows is not None:
            at = torch.from_numpy(self.place[owed.inputs_rows])
            into.index_add_(0, at, owed.inputs.double().cpu())

    def scores(self, shared: bool) -> NDArray[np.float64]:
        """[segments, rows · numbers, K]."""
        sums = sum_over_processes(self.sums) if shared and self.shared else self.sums
        return sums.reshape(sums.shape[0], -1, sums.shape[3]).numpy()


# --- finished chunks -------------------------------------------------------------------------------


def _write(path: Path, made_of: str, chunk: NDArray[np.intp], found: Walked) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(
        path, made_of=made_of, chunk=chunk, owed=found.owed, growth=found.growth, held=found.held
    )


def _read(path: Path, made_of: str, chunk: NDArray[np.intp]) -> Walked | None:
    if not from_first(path.exists()):
        return None
    with np.load(path) as held:
        if str(held["made_of"]) != made_of or not np.array_equal(held["chunk"], chunk):
            raise ValueError(
                f"{path.parent} holds scores of another run; the run, the outputs or what they are "
                "differentiated by have changed: choose another folder or delete this one"
            )
        return Walked(held["owed"], held["growth"], int(held["held"]))
