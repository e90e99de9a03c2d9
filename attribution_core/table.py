"""A table of retrainings: training weights, seeds and outputs; in memory, and in files of one's own or of others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution_core.datamodel import columns, plain
from attribution_core.disk.files import ending, whole


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
                stands for two; seeds that are not whole numbers, or come twice.
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
                    f"expected each seed once in {path}, got {seeds[:10]}; a repeated seed gives the same training again"
                )
            meta = json.loads(str(held["meta"])) if "meta" in held else {}
            return cls(held["weights"], per_seed, tuple(seeds), meta)

    def joined(self, *others: RetrainingTable) -> RetrainingTable:
        """The rows of several tables of the same seeds, examples, outputs and drop, one after the other.

        Names of outputs and the drop are those of the first tables that have them.

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
        known = {"targets": None if names is None else names.tolist(), "drop": (drops or [None])[0]}
        return RetrainingTable(
            np.concatenate([table.weights for table in tables]),
            np.concatenate([table.per_seed for table in tables]),
            self.seeds,
            {**self.meta, **{name: value for name, value in known.items() if value is not None}},
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
        ValueError: one that is not a whole number and would be rounded to another; no list of seeds.
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
    first, row = _rows_of(held, weights, str(path))
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


def _rows_of(
    held: Any, weights: NDArray[np.float64], where: str
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(the first line of each row, which of them each line belongs to).

    By column row; without one, lines of equal weights are one row under several seeds, and without seeds every line
    is one.

    Raises:
        ValueError: lines of no row, or of one row with other weights.
    """
    named = "row" in held.column_names
    if named and (nameless := sum(held["row"].is_null(nan_is_null=True).to_pylist())):
        raise ValueError(
            f"expected a row in every line of {where}, got none in {nameless} of {len(weights)}; number them, or "
            "leave column row out"
        )
    seeded = weights if "seed" in held.column_names else np.arange(len(weights))
    key = np.array(held["row"].to_pylist()) if named else seeded
    _, first, row = np.unique(key, axis=0, return_index=True, return_inverse=True)
    row = row.ravel()
    if named:
        _refuse_other_rows(weights, key, first[row], where)
    return first, row


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
