"""Retraining as a table: training weights in, outputs out; the ground truth of everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.gradients import Progress
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import sum_over_processes, world
from attribution_core.store import Store, fingerprint
from attribution_core.training import Drop, Recipe, train


@dataclass(frozen=True)
class RetrainingTable:
    """Outputs of m retrainings under s seeds each.

    Args:
        weights: [m, n] training weights of each row.
        outputs: [m, s, t] outputs of the retrained models.
        seeds: [s] the seeds.
        meta: how it was made.
    """

    weights: NDArray[np.float64]
    outputs: NDArray[np.float64]
    seeds: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, s = len(self.weights), len(self.seeds)
        if self.weights.ndim != 2 or self.outputs.ndim != 3 or self.outputs.shape[:2] != (m, s):
            raise ValueError(
                f"expected weights [m, n] and outputs [m, s={s}, t], got {self.weights.shape} "
                f"and {self.outputs.shape}"
            )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Outputs averaged over seeds, [m, t]."""
        return self.outputs.mean(axis=1)

    def save(self, path: str | Path) -> None:
        """Write one npz file (weights, outputs, seeds)."""
        np.savez_compressed(path, weights=self.weights, outputs=self.outputs, seeds=self.seeds)

    @classmethod
    def load(cls, path: str | Path) -> RetrainingTable:
        """Read an npz file with weights [m, n], outputs [m, s, t] or [m, t], and seeds."""
        with np.load(path) as held:
            outputs = held["outputs"] if held["outputs"].ndim == 3 else held["outputs"][:, None]
            seeds = held["seeds"] if "seeds" in held else np.arange(outputs.shape[1])
            return cls(held["weights"], outputs, tuple(int(seed) for seed in seeds))


def random_subsets(n: int, m: int, *, keep: float, seed: int = 0) -> NDArray[np.float64]:
    """Weights [m, n] of m random subsets, each of round(keep · n) examples at weight 1.

    >>> random_subsets(4, 3, keep=0.5).sum(axis=1).tolist()
    [2.0, 2.0, 2.0]
    """
    if not 0 < keep <= 1:
        raise ValueError(f"expected a keep fraction in (0, 1], got {keep}")
    rng = np.random.default_rng(seed)
    size = max(1, round(keep * n))
    weights = np.zeros((m, n))
    for row in weights:
        row[rng.choice(n, size, replace=False)] = 1.0
    return weights


def retrain(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    weights: ArrayLike,
    *,
    seeds: int | Sequence[int],
    folder: str | Path | None = None,
    drop: Drop = "row",
    jobs: int = 1,
    progress: Progress = iter,
) -> RetrainingTable:
    """Train one model for every row of weights and every seed, and table its outputs.

    Args:
        weights: [m, n] or [n], one training set a row.
        seeds: which seeds (the recipe's order and init), or how many, counted from 0.
        folder: keep finished trainings there; the same call resumes, row by row and seed by seed.
        drop: "row" removes examples of weight 0 and trains on the rest, with as many epochs: what
            happens when data are really taken away. "weight" keeps every batch and counts them as
            nothing: the counterfactual that a same-order metagradient predicts.
        jobs: trainings side by side in worker processes; under torchrun, rows are also split over
            the launched processes.
        progress: wraps the loop over trainings (tqdm).

    Raises:
        ValueError: weights that do not fit; a folder that belongs to another run; a failed training.
    """
    table = np.atleast_2d(np.asarray(weights, dtype=float))
    if table.ndim != 2 or table.shape[1] != problem.n:
        raise ValueError(f"expected weights [m, n={problem.n}], got {table.shape}")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if not chosen:
        raise ValueError("expected at least one seed, got none")
    cells = [(row, seed) for row in range(len(table)) for seed in chosen]
    shape = (len(cells), len(outputs))
    if folder is None:
        store = None
        todo = list(range(world()[0], len(cells), world()[1]))
    else:
        print_ = fingerprint(problem, recipe, outputs, table, chosen, drop, len(outputs))
        store = Store.open(folder, shape, print_, dtype="float64", block=1)
        todo = [int(block[0]) for block in store.missing()]
    found = np.zeros(shape)
    work = ((cell, *_cell(cells[cell], table)) for cell in todo)
    for cell, values in progress(
        _Sized(_run(problem, recipe, outputs, work, drop, jobs), len(todo))
    ):
        found[cell] = values
        if store is not None:
            store.write(np.array([cell]), values[None])
    values = np.array(store.read()) if store is not None else _gathered(found)
    meta = {"drop": drop, "seeds": list(chosen), "rows": len(table)}
    return RetrainingTable(table, values.reshape(len(table), len(chosen), -1), chosen, meta)


def _cell(cell: tuple[int, int], table: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    return table[cell[0]], cell[1]


def _train_one(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    cell: int,
    row: NDArray[Any],
    seed: int,
    drop: Drop,
) -> tuple[int, NDArray[np.float64]]:
    try:
        run = train(problem, replace(recipe, seed=seed), row, drop=drop)
        return cell, run.outputs(outputs).numpy()
    except ValueError as error:
        raise ValueError(f"retraining {cell} (seed {seed}) failed: {error}") from None


def _run(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    work: Iterable[tuple[int, NDArray[Any], int]],
    drop: Drop,
    jobs: int,
) -> Iterable[tuple[int, NDArray[np.float64]]]:
    """Finished cells as they come, one at a time or `jobs` side by side."""
    if jobs == 1:
        return (_train_one(problem, recipe, outputs, *cell, drop) for cell in work)
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
        pool = Parallel(return_as="generator_unordered")
        return pool(delayed(_train_one)(problem, recipe, outputs, *cell, drop) for cell in work)


@dataclass(frozen=True)
class _Sized:
    """An iterable that knows its length, for progress bars."""

    items: Iterable[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(self.items)


def _gathered(found: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of all processes: each filled its own and left the others 0."""
    import torch

    return sum_over_processes(torch.from_numpy(found)).numpy()
