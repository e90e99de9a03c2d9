"""Several methods on several tables of retrained models: which predicts best, and at what cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attribution_core.data import Progress
from attribution_core.disk.files import write_text
from attribution_core.evaluation import LDS, Predictor, lds
from attribution_core.table import RetrainingTable

Method = Callable[[float], Predictor]  # keep fraction -> datamodel, anchored where it likes


@dataclass(frozen=True)
class Compared:
    """One method at one keep fraction."""

    method: str
    keep: float
    lds: LDS
    seconds: float
    floor: bool

    def cells(self) -> tuple[str, ...]:
        """Method, LDS, interval, slope and seconds, as text."""
        name = f"{self.method} (floor)" if self.floor else self.method
        return (
            name, f"{self.lds.mean:.3f}", self.lds.span, f"{self.lds.slope:.2g}",
            f"{self.seconds:.2g}",
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All methods at all keep fractions, best first within each."""

    rows: tuple[Compared, ...]

    @property
    def keeps(self) -> tuple[float, ...]:
        """The keep fractions, ascending."""
        return tuple(sorted({row.keep for row in self.rows}))

    def at(self, keep: float) -> list[Compared]:
        """The rows of one keep fraction, highest LDS first."""
        return sorted((r for r in self.rows if r.keep == keep), key=lambda r: -r.lds.mean)

    def table(self) -> str:
        """An aligned table for each keep fraction, with the truth it stands on."""
        parts = []
        for keep in self.keeps:
            rows = self.at(keep)
            lines = [HEAD, *(row.cells() for row in rows)]
            widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
            text = [
                "  ".join(
                    cell.ljust(w) if k == 0 else cell.rjust(w)
                    for k, (cell, w) in enumerate(zip(line, widths, strict=True))
                )
                for line in lines
            ]
            parts.append("\n".join([_truth(rows[0]), *text]))
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """The same as Markdown tables."""
        parts = []
        for keep in self.keeps:
            rows = self.at(keep)
            lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(row.cells() for row in rows)]
            body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            parts.append(f"{_truth(rows[0])}\n\n{body}\n")
        return "\n".join(parts)

    def save(self, path: str | Path) -> None:
        """One JSON record per row, per-target correlations included."""
        records = [asdict(row) for row in self.rows]
        for record in records:
            found = record["lds"]
            found["per_target"] = found["per_target"].tolist()
            found["ceiling"] = None if math.isnan(found["ceiling"]) else found["ceiling"]
            found["interval"] = None if math.isnan(found["interval"][0]) else found["interval"]
        write_text(Path(path), json.dumps(records, indent=1))


HEAD = ("method", "LDS", "95 % interval", "slope", "seconds")


def _truth(row: Compared) -> str:
    one = row.lds
    seeds = f"mean over {one.seeds} seeds" if one.seeds > 1 else "one seed"
    most = "unknown" if math.isnan(one.ceiling) else f"{one.ceiling:.3f}"
    return (
        f"keep {row.keep:g}: {one.rows} retrainings, {seeds}, {len(one.per_target)} targets; "
        f"ceiling {most}"
    )


def compare(
    methods: Mapping[str, Method],
    tables: Mapping[float, RetrainingTable],
    *,
    floors: Collection[str] = (),
    progress: Progress = iter,
) -> Comparison:
    """LDS and seconds of every method on every table.

    Args:
        methods: name -> function of the keep fraction that returns a datamodel, so that each can anchor
            where it will be judged; what a function computes counts in its seconds.
        tables: keep fraction -> retrained subsets of that size.
        floors: names of the baselines, marked as such.
        progress: wraps the loop over pairs (tqdm).

    Raises:
        ValueError: no methods or no tables, a floor that is no method, methods that are no functions; a method's
            own error, with its name; see also `lds`.
    """
    unknown = sorted(set(floors) - set(methods))
    if not methods or not tables or unknown:
        raise ValueError(
            f"expected methods, tables and floors among the methods, got {len(methods)} methods, "
            f"{len(tables)} tables, unknown floors {unknown}"
        )
    made = {name: type(m).__name__ for name, m in methods.items() if not callable(m)}
    if made:
        raise ValueError(
            f"expected functions of the keep fraction that return a datamodel, got {made}; pass `lambda keep: datamodel` for "
            "one that is the same at every fraction (its seconds are then not those of making it), or `lds(datamodel, table)`"
        )
    rows = []
    pairs: list[Any] = [(keep, name) for keep in tables for name in methods]
    for keep, name in progress(pairs):
        start = time.perf_counter()
        try:
            datamodel = methods[name](keep)
            seconds = time.perf_counter() - start
            found = lds(datamodel, tables[keep])
        except ValueError as error:
            raise ValueError(f"{name!r} at keep fraction {keep:g}: {error}") from error
        rows.append(Compared(name, keep, found, seconds, name in floors))
    return Comparison(tuple(rows))
