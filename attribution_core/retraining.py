"""Retraining as a table: training weights in, outputs out; the ground truth of everything."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import Progress, Sized
from attribution_core.disk.files import claim, write_array
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import failing_together, from_first, sum_over_processes, world
from attribution_core.safeguards.soundness import refuse_mixed_outputs
from attribution_core.seeds import listed
from attribution_core.stepwise.batches import Drop, check_drop
from attribution_core.stepwise.stacked import Cell, Diverged, Stack, stack_size
from attribution_core.table import RetrainingTable
from attribution_core.training import Recipe, train


def retrain(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    weights: ArrayLike,
    *,
    seeds: int | Sequence[int],
    folder: str | Path | None = None,
    drop: Drop = "row",
    stack: int | Literal["auto"] = "auto",
    jobs: int | None = 1,
    progress: Progress = iter,
) -> RetrainingTable:
    """Train one model for every row of weights and every seed, and table its outputs.

    Small models are trained in stacks (`stacked.py`): the same outputs to rounding, an order of magnitude
    sooner. Where no row is left to train on, the outputs are the initial model's.

    Args:
        weights: [m, n] or [n], one training set a row.
        seeds: which seeds (the recipe's order and init), or how many, counted from 0.
        folder: keep every finished training there; the same call resumes, and a larger table of the
            same problem and recipe trains only what is new. A kill loses the stacks in flight, no more. Edits of
            your own functions and classes are noticed, those of installed packages and of files that they read
            are not (`fingerprint.fingerprint`).
        drop: "row" removes examples of weight 0 and trains on the rest, with as many epochs: what
            happens when data are really taken away. "weight" keeps every batch and counts them as
            nothing: the counterfactual that a same-order metagradient predicts.
        stack: trainings that take their steps together; 1 trains one by one, "auto" decides by the
            model (up to 2^15 parameters on a CPU, more on a GPU; no batch norm, dropout or augmentation).
        jobs: stacks side by side in worker processes, each on one thread; None takes joblib's active
            configuration, and with it any backend that joblib knows:

                with joblib.parallel_config(backend="dask"):  # a cluster, after dask's own set-up
                    retrain(..., jobs=None)

            Under torchrun, stacks are also split over the launched processes.
        progress: wraps the loop over trainings (tqdm).

    Raises:
        ValueError: weights that do not fit; a folder that belongs to another run; a failed training; outputs
            that depend on the other rows of their batch; a problem that cannot be stacked, where a number
            asks for it.
    """
    table = np.atleast_2d(np.asarray(weights, dtype=float))
    chosen = tuple(listed(seeds))
    pairs = [(row, seed) for row in table for seed in chosen]
    found = retrain_pairs(
        problem, recipe, outputs, pairs, folder=folder, drop=drop, stack=stack, jobs=jobs,
        progress=progress,
    )  # fmt: skip
    per_seed = found.reshape(len(table), len(chosen), -1)
    named = {"targets": list(outputs.names)} if outputs.names else {}
    return RetrainingTable(table, per_seed, chosen, {"drop": drop, **named})


def retrain_pairs(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    pairs: Sequence[tuple[ArrayLike, int]],
    *,
    folder: str | Path | None = None,
    drop: Drop = "row",
    stack: int | Literal["auto"] = "auto",
    jobs: int | None = 1,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """Outputs [len(pairs), t] of trainings given as (weights [n], seed); see `retrain`."""
    from joblib import effective_n_jobs

    check_drop(drop)
    cells = [(np.asarray(row, dtype=float), int(seed)) for row, seed in pairs]
    if not cells:
        raise ValueError("expected at least one training: a row of weights and a seed, got none")
    for row, _ in cells:
        if row.shape != (problem.n,):
            raise ValueError(
                f"expected weights [n={problem.n}] for every training, got {row.shape}"
            )
    refuse_mixed_outputs(problem.model, outputs)
    names = _names(cells)
    places = {name: k for k, name in reversed(list(enumerate(names)))}
    first = [places[name] for name in names]  # a training that repeats is done once
    cache = None if folder is None else _Cache.open(folder, problem, recipe, outputs, drop)
    rank, size = world()
    # the first process's list for all: another may have finished some by the time one looks
    done = from_first([cache is not None and cache.has(cell) for cell in cells])
    chosen = sorted(set(first))
    if stack == "auto":  # every worker of every process gets some
        workers = size * (1 if jobs is None else effective_n_jobs(jobs))
        width = min(stack_size(problem, recipe, len(chosen))[0], -(-len(chosen) // workers))
    elif isinstance(stack, (int, np.integer)):
        width = int(stack)
    else:
        raise ValueError(f"expected stack='auto' or a number of trainings, got {stack!r}")
    work = _Work(problem, recipe, outputs, drop, width, stack == "auto")
    stacks = [[(k, *cells[k]) for k in some if not done[k]] for some in work.cut(cells, chosen)]
    mine = [some for some in stacks if some][rank::size]
    found = np.zeros((len(cells), len(outputs)))
    with failing_together():
        for k, values in progress(Sized(work.results(mine, jobs), sum(map(len, mine)))):
            if cache is None:
                found[k] = values
            else:
                cache.put(cells[k], values)
    if cache is None:  # each process filled its own
        return sum_over_processes(torch.from_numpy(found)).numpy()[first]
    return np.stack([cache.get(cell) for cell in cells])


def _names(cells: Sequence[Cell]) -> list[tuple[bytes, int]]:
    """(print of the weights, seed) of each training; a row that several seeds share is read once."""
    rows = {id(row): row for row, _ in cells}
    prints = {k: hashlib.sha256(np.ascontiguousarray(row).data).digest() for k, row in rows.items()}
    return [(prints[id(row)], seed) for row, seed in cells]


Numbered = tuple[int, NDArray[np.float64], int]  # (place in the table, weights [n], seed)


@dataclass(frozen=True)
class _Cache:
    """One small npy file per finished training, named by its weights and seed."""

    folder: Path

    @classmethod
    def open(
        cls, folder: str | Path, problem: Problem, recipe: Recipe, outputs: Outputs, drop: Drop
    ) -> _Cache:
        made_of = fingerprint(problem, replace(recipe, seed=0), outputs, drop)
        return cls(claim(folder, "retraining.json", "trainings", made_of))

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{fingerprint(*cell)[:24]}.npy"

    def has(self, cell: Cell) -> bool:
        return self._path(cell).exists()

    def get(self, cell: Cell) -> NDArray[np.float64]:
        try:
            return np.load(self._path(cell))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self._path(cell)} is damaged ({error}); delete it and run again"
            ) from None

    def put(self, cell: Cell, values: NDArray[np.float64]) -> None:
        write_array(self._path(cell), values)


@dataclass(frozen=True)
class _Work:
    """What every training of a table shares, and how stacks of them are done."""

    problem: Problem
    recipe: Recipe
    outputs: Outputs
    drop: Drop
    width: int  # trainings of a stack
    either: bool  # train one by one what cannot be stacked
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)  # that models are made in

    def cut(self, cells: list[Cell], chosen: list[int]) -> list[list[int]]:
        """The chosen cells in stacks, longest trainings first; by all of them, finished or not."""
        if self.width < 1:
            raise ValueError(f"expected a stack of at least 1 training, got {self.width}")
        if self.width > 1 and self.drop == "row":
            chosen = sorted(chosen, key=lambda k: -np.count_nonzero(cells[k][0]))
        return [chosen[start : start + self.width] for start in range(0, len(chosen), self.width)]

    def results(
        self, stacks: list[list[Numbered]], jobs: int | None
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Finished trainings as they come, one stack at a time or `jobs` of them side by side."""
        if jobs == 1 or (len(stacks) < 2 and jobs is not None):
            return (one for some in stacks for one in self.done(some))
        from joblib import Parallel, delayed, parallel_config

        calls = (delayed(_list)(self, some) for some in stacks)
        if jobs is None:
            found = Parallel(return_as="generator_unordered")(calls)
        else:
            with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
                found = Parallel(return_as="generator_unordered")(calls)
        return (one for some in found for one in some)

    def done(self, stack: list[Numbered]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The results of one stack."""
        if self.width > 1:
            try:
                cells = [(row, seed) for _, row, seed in stack]
                values = Stack(self.problem, self.recipe, cells, self.drop).outputs(self.outputs)
                yield from zip([k for k, _, _ in stack], values, strict=True)
                return
            except Diverged as error:
                k, _, seed = stack[error.slice]
                raise ValueError(f"retraining {k} (seed {seed}) failed: {error}") from None
            except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
                if not self.either:
                    raise ValueError(
                        f"expected trainings that can be stacked, got {error}; use stack=1 or 'auto'"
                    ) from error
        for k, row, seed in stack:
            yield k, self.alone(k, row, seed)

    def alone(self, k: int, row: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
        """The outputs of one training by itself."""
        recipe = replace(self.recipe, seed=seed)
        try:
            if self.drop == "row" and not row.any():  # nothing to train on: the initial model
                made = self.problem.model if recipe.init is None else recipe.init(seed)
                return self.outputs.evaluate(
                    copy.deepcopy(made).to(self.problem.device).eval()
                ).numpy()
            run = train(self.problem, recipe, row, drop=self.drop, states=0)
            return run.outputs(self.outputs).numpy()
        except ValueError as error:
            raise ValueError(f"retraining {k} (seed {seed}) failed: {error}") from None


def _list(work: _Work, stack: list[Numbered]) -> list[tuple[int, NDArray[np.float64]]]:
    """The results of one stack in a worker, which does not know the caller's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(work.dtype)
    try:
        return list(work.done(stack))
    finally:
        torch.set_default_dtype(before)
