"""Retraining as a table: training weights in, outputs out; the ground truth of everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from attribution_core.gradients import Progress, Sized
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import from_first, sum_over_processes, wait, world
from attribution_core.store import FORMAT, fingerprint, write_text
from attribution_core.training import Drop, Recipe, train


@dataclass(frozen=True)
class RetrainingTable:
    """Outputs of m retrainings under s seeds each.

    Args:
        weights: [m, n] training weights of each row.
        per_seed: [m, s, t] outputs of the retrained models.
        seeds: [s] the seeds.
        meta: how it was made.
    """

    weights: NDArray[np.float64]
    per_seed: NDArray[np.float64]
    seeds: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, s = len(self.weights), len(self.seeds)
        if self.weights.ndim != 2 or self.per_seed.ndim != 3 or self.per_seed.shape[:2] != (m, s):
            raise ValueError(
                f"expected weights [m, n] and per_seed [m, s={s}, t], got {self.weights.shape} "
                f"and {self.per_seed.shape}"
            )

    @property
    def outputs(self) -> NDArray[np.float64]:
        """Outputs averaged over seeds, [m, t]."""
        return self.per_seed.mean(axis=1)

    def save(self, path: str | Path) -> None:
        """Write one npz file (weights, per_seed, seeds)."""
        part = Path(path).with_name(Path(path).name + ".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file, weights=self.weights, per_seed=self.per_seed, seeds=np.array(self.seeds)
            )
        part.replace(path)  # whole or not at all

    @classmethod
    def load(cls, path: str | Path) -> RetrainingTable:
        """Read an npz file with weights [m, n], per_seed [m, s, t] and seeds [s]."""
        with np.load(path) as held:
            seeds = tuple(int(seed) for seed in held["seeds"])
            return cls(held["weights"], held["per_seed"], seeds)


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
        folder: keep every finished training there; the same call resumes, and a larger table of the
            same problem and recipe trains only what is new.
        drop: "row" removes examples of weight 0 and trains on the rest, with as many epochs: what
            happens when data are really taken away. "weight" keeps every batch and counts them as
            nothing: the counterfactual that a same-order metagradient predicts.
        jobs: trainings side by side in worker processes; under torchrun, trainings are also split
            over the launched processes.
        progress: wraps the loop over trainings (tqdm).

    Raises:
        ValueError: weights that do not fit; a folder that belongs to another run; a failed training.
    """
    table = np.atleast_2d(np.asarray(weights, dtype=float))
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    pairs = [(row, seed) for row in table for seed in chosen]
    found = retrain_pairs(
        problem, recipe, outputs, pairs, folder=folder, drop=drop, jobs=jobs, progress=progress
    )
    per_seed = found.reshape(len(table), len(chosen), -1)
    return RetrainingTable(table, per_seed, chosen, {"drop": drop})


def retrain_pairs(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    pairs: Sequence[tuple[ArrayLike, int]],
    *,
    folder: str | Path | None = None,
    drop: Drop = "row",
    jobs: int = 1,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """Outputs [len(pairs), t] of trainings given as (weights [n], seed); see `retrain`."""
    cells = [(np.asarray(row, dtype=float), int(seed)) for row, seed in pairs]
    if not cells:
        raise ValueError("expected at least one training: a row of weights and a seed, got none")
    for row, _ in cells:
        if row.shape != (problem.n,):
            raise ValueError(
                f"expected weights [n={problem.n}] for every training, got {row.shape}"
            )
    cache = None if folder is None else _Cache.open(folder, problem, recipe, outputs, drop)
    rank, size = world()
    # the first process's list for all: another may have finished some by the time one looks
    todo = from_first([k for k in range(len(cells)) if cache is None or not cache.has(cells[k])])
    mine = todo[rank::size]
    found = np.zeros((len(cells), len(outputs)))
    done = _trained(problem, recipe, outputs, [(k, *cells[k]) for k in mine], drop, jobs)
    for k, values in progress(Sized(done, len(mine))):
        if cache is None:
            found[k] = values
        else:
            cache.put(cells[k], values)
    wait()
    if cache is None:
        return sum_over_processes(torch.from_numpy(found)).numpy()  # each process filled its own
    return np.stack([cache.get(cell) for cell in cells])


Cell = tuple[NDArray[np.float64], int]


@dataclass(frozen=True)
class _Cache:
    """One small npy file per finished training, named by its weights and seed."""

    folder: Path

    @classmethod
    def open(
        cls, folder: str | Path, problem: Problem, recipe: Recipe, outputs: Outputs, drop: Drop
    ) -> _Cache:
        folder = Path(folder)
        print_ = fingerprint(problem, replace(recipe, seed=0), outputs, drop)
        head = json.dumps({"format": FORMAT, "fingerprint": print_})
        path = folder / "retraining.json"
        if world()[0] == 0 and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, head)
        wait()
        if path.read_text(encoding="utf-8") != head:
            raise ValueError(
                f"{folder} holds trainings of another run; the model, the data, the recipe or the "
                "outputs have changed: choose another folder or delete this one"
            )
        return cls(folder)

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
        part = self._path(cell).with_suffix(f".part{world()[0]}.npy")
        np.save(part, values)
        part.replace(self._path(cell))  # whole or not at all


def _train_one(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    k: int,
    row: NDArray[Any],
    seed: int,
    drop: Drop,
) -> tuple[int, NDArray[np.float64]]:
    try:
        run = train(problem, replace(recipe, seed=seed), row, drop=drop, states=0)
        return k, run.outputs(outputs).numpy()
    except ValueError as error:
        raise ValueError(f"retraining {k} (seed {seed}) failed: {error}") from None


def _trained(
    problem: Problem,
    recipe: Recipe,
    outputs: Outputs,
    work: list[tuple[int, NDArray[Any], int]],
    drop: Drop,
    jobs: int,
) -> Iterable[tuple[int, NDArray[np.float64]]]:
    """Finished trainings as they come, one at a time or `jobs` side by side."""
    if jobs == 1 or len(work) < 2:
        return (_train_one(problem, recipe, outputs, *cell, drop) for cell in work)
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
        pool = Parallel(return_as="generator_unordered")
        return pool(delayed(_train_one)(problem, recipe, outputs, *cell, drop) for cell in work)
