"""Retraining as a table: training weights in, outputs out; the ground truth of everything."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from attribution_core.datamodel import columns, plain
from attribution_core.gradients import Progress, Sized
from attribution_core.problem import Outputs, Problem
from attribution_core.processes import failing_together, from_first, sum_over_processes, world
from attribution_core.seeds import listed
from attribution_core.soundness import refuse_mixed_outputs
from attribution_core.stacked import Cell, Diverged, Stack, stack_size
from attribution_core.store import claim, ending, fingerprint, whole
from attribution_core.training import Drop, Recipe, check_drop, train


@dataclass(frozen=True)
class RetrainingTable:
    """Outputs of m retrainings under s seeds each.

    Args:
        weights: [m, n] training weights of each row.
        per_seed: [m, s, t] outputs of the retrained models.
        seeds: [s] the seeds.
        meta: how it was made; "targets" names the outputs.
    """

    weights: NDArray[np.float64]
    per_seed: NDArray[np.float64]
    seeds: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weights", "per_seed"):
            if np.iscomplexobj(getattr(self, name)):  # numpy would drop the imaginary part
                raise ValueError(
                    f"expected real numbers as {name}, got complex ones; take parts or magnitudes as outputs"
                )
        object.__setattr__(self, "weights", np.asarray(self.weights, dtype=float))
        object.__setattr__(self, "per_seed", np.asarray(self.per_seed, dtype=float))
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

    @property
    def targets(self) -> NDArray[Any] | None:
        """Names [t] of the outputs, where they have some."""
        names = self.meta.get("targets")
        fits = isinstance(names, (list, tuple)) and len(names) == self.per_seed.shape[2]
        return np.array(names) if fits else None

    def save(self, path: str | Path) -> None:
        """Write one file: .parquet, with a line per training (row, weights, seed, outputs); .npz, or without an
        ending, npz (weights, per_seed, seeds).

        Raises:
            ValueError: another ending.
        """
        suffix = ending(path, ".npz", ".parquet", "")
        with whole(Path(path)) as part, part.open("wb") as file:
            if suffix == ".parquet":
                _write_parquet(self, file)
            else:
                np.savez_compressed(
                    file, weights=self.weights, per_seed=self.per_seed, seeds=np.array(self.seeds),
                    meta=json.dumps(self.meta, default=plain),
                )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> RetrainingTable:
        """Read a table, also one that was made elsewhere.

        An npz file holds weights [m, n] and per_seed [m, s, t] with seeds [s], or outputs [m, t] of one
        training a row. A parquet file has a line per training: weights (a list of n), outputs (a list of t,
        or a number); seed if there were several, and row (a number) if rows of weights repeat.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other columns or none; a row of weights that lacks one of the seeds, or a name of a row that
                stands for two; seeds that are no whole numbers, or come twice.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"no table at {path}")
        if Path(path).suffix.lower() == ".parquet":
            return cls(*_read_parquet(path))
        with np.load(path) as held:
            if "weights" not in held or not {"per_seed", "outputs"} & set(held):
                raise ValueError(
                    f"expected arrays weights [m, n] and per_seed [m, s, t] (or outputs [m, t]) in {path}, "
                    f"got {sorted(held)}"
                )
            if "per_seed" in held:
                per_seed = held["per_seed"]
            else:
                outputs = held["outputs"]
                per_seed = outputs.reshape(len(outputs), 1, -1)
            seeds = held["seeds"].tolist() if "seeds" in held else list(range(per_seed.shape[1]))
            seeds = _whole_seeds(seeds, str(path))
            if len(set(seeds)) < len(seeds):
                raise ValueError(
                    f"expected each seed once in {path}, got {seeds[:10]}; a training that repeats is no second opinion"
                )
            meta = json.loads(str(held["meta"])) if "meta" in held else {}
            return cls(held["weights"], per_seed, tuple(seeds), meta)

    def joined(self, *others: RetrainingTable) -> RetrainingTable:
        """The rows of several tables of the same seeds, examples, outputs and drop, one after the other.

        Names of outputs and the drop are those of the first tables that tell them.

        Raises:
            ValueError: tables that differ in one of them; the same outputs in another order.
        """
        tables = (self, *others)
        mine = (self.seeds, self.weights.shape[1], self.per_seed.shape[2])
        names = next((table.targets for table in tables if table.targets is not None), None)
        for other in others:
            theirs = (other.seeds, other.weights.shape[1], other.per_seed.shape[2])
            if mine != theirs:
                raise ValueError(
                    f"expected tables of the same seeds, n and t, got {mine} and {theirs}"
                )
            if (columns(other.targets, names, mine[2]) != np.arange(mine[2])).any():
                raise ValueError(
                    f"expected tables with outputs in one order, got {names} and {other.targets}; "
                    "retrain with the same outputs"
                )
        drops = [table.meta["drop"] for table in tables if "drop" in table.meta]
        if len(set(drops)) > 1:
            raise ValueError(
                f"expected tables of one drop, got {sorted(set(drops))}: these are other counterfactuals; retrain with one"
            )
        told = {"targets": None if names is None else names.tolist(), "drop": (drops or [None])[0]}
        return RetrainingTable(
            np.concatenate([table.weights for table in tables]),
            np.concatenate([table.per_seed for table in tables]),
            self.seeds,
            {**self.meta, **{name: value for name, value in told.items() if value is not None}},
        )


def _write_parquet(table: RetrainingTable, file: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    m, s, t = table.per_seed.shape
    columns = {
        "row": pa.array(np.repeat(np.arange(m), s)),
        "weights": _lists(np.repeat(table.weights, s, axis=0)),
        "seed": pa.array(np.tile(np.array(table.seeds, dtype=np.int64), m)),
        "outputs": _lists(table.per_seed.reshape(m * s, t)),
    }
    made = pa.table(columns).replace_schema_metadata(
        {"meta": json.dumps(table.meta, default=plain)}
    )
    pq.write_table(made, file)


def _lists(rows: NDArray[np.float64]) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _whole_seeds(seeds: Any, where: str) -> list[int]:
    """Seeds as a file holds them, as whole numbers.

    Raises:
        ValueError: one that is none, which would become another's; no list of seeds.
    """
    if not isinstance(seeds, list):
        raise ValueError(f"expected a list of seeds in {where}, got {seeds!r}; write [{seeds!r}]")
    for seed in seeds:
        try:
            fits = float(seed).is_integer()
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"expected whole numbers as seeds in {where}, got {seed!r}; number the seeds from 0 on"
            )
    return [int(seed) for seed in seeds]


def _refuse_other_rows(
    weights: NDArray[np.float64], names: NDArray[Any], first: NDArray[np.intp], where: str
) -> None:
    """Raise where lines of one row, the first of which is at `first`, have other weights than that one.

    Raises:
        ValueError: they do; outputs would stand beside weights that they are not of.
    """
    for k, of in enumerate(first):
        if k != of and not np.array_equal(weights[k], weights[of], equal_nan=True):
            raise ValueError(
                f"expected equal weights in all lines of a row, got row {names[k]} with other weights in line {k} than "
                f"in line {of} of {where}; number rows anew where tables are put together, or use RetrainingTable.joined"
            )


def _read_parquet(path: str | Path) -> tuple[Any, Any, tuple[int, ...], dict[str, Any]]:
    """(weights, per_seed, seeds, meta) of a parquet file with a line per training."""
    import pyarrow.parquet as pq

    held = pq.read_table(path)
    if not {"weights", "outputs"} <= set(held.column_names):
        raise ValueError(
            f"expected columns weights and outputs (and seed) in {path}, got {held.column_names}"
        )
    if not len(held):
        raise ValueError(
            f"expected a line per training in {path}, got none; save a table with rows"
        )
    weights, outputs = (
        _numbers(held[name], f"{name} in {path}") for name in ("weights", "outputs")
    )
    column = [0] * len(weights)
    if "seed" in held.column_names:
        column = _whole_seeds(held["seed"].to_pylist(), f"column seed of {path}")
    seeds = list(dict.fromkeys(column))  # in the order that they were written in
    if "row" in held.column_names:
        if nameless := sum(held["row"].is_null(nan_is_null=True).to_pylist()):
            raise ValueError(
                f"expected a row in every line of {path}, got none in {nameless} of {len(weights)}; number them, or "
                "leave column row out"
            )
        key = np.array(held["row"].to_pylist())
    else:  # lines of equal weights are one row, under several seeds; without seeds every line is one
        key = weights if "seed" in held.column_names else np.arange(len(weights))
    _, first, row = np.unique(key, axis=0, return_index=True, return_inverse=True)
    row = row.ravel()
    if "row" in held.column_names:
        _refuse_other_rows(weights, key, first[row], str(path))
    rank = np.argsort(np.argsort(first))[row]  # rows in the order of their first line
    counts = np.zeros((len(first), len(seeds)), dtype=int)
    at = {seed: j for j, seed in enumerate(seeds)}
    place = np.array([at[seed] for seed in column])
    np.add.at(counts, (rank, place), 1)
    if (counts != 1).any():
        k, j = np.argwhere(counts != 1)[0]
        raise ValueError(
            f"expected every row of weights once with each of the seeds {seeds[:10]}, got row {k} "
            f"{counts[k, j]} times with seed {seeds[j]} in {path}; number repeated rows in a column row"
        )
    per_seed = np.empty((len(first), len(seeds), outputs.shape[1]))
    per_seed[rank, place] = outputs
    meta = json.loads((held.schema.metadata or {}).get(b"meta", b"{}"))
    return weights[np.sort(first)], per_seed, tuple(seeds), meta


def _numbers(column: Any, where: str) -> NDArray[np.float64]:
    """A column of numbers, or of lists of one length, as an array [lines, numbers], by Arrow's own buffers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    nested = pa.types.is_nested(column.type)
    lengths = pc.unique(pc.list_value_length(column)).to_pylist() if nested else [1]
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"expected lists of one length as {where}, got lengths {lengths[:10]}")
    chunks = (chunk.flatten() if nested else chunk for chunk in column.chunks)
    flat = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])
    return flat.astype(float, copy=False).reshape(-1, lengths[0])


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
            are not (`store.fingerprint`).
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
        with whole(self._path(cell)) as part, part.open("wb") as file:
            np.save(file, values)


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
