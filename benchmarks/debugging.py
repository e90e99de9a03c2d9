"""How few rows do decisions hang on, and is that predicted? Three splits of two tables, exact logistic regression.

    python benchmarks/debugging.py

Goal: 95 % of the decisions turn by retraining, without at most .6 of the rows that it takes along the nearest ones of the
same label, and predicted numbers are those of retraining.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from applied.recipe import aligned, paired_interval
from recipes.debug_model import Flags
from recipes.reports.debugging import half, parts_of
from recipes.work.debugging import checked, decided, grouped, model_of, study

SPLITS = range(3)
ASKED = 12  # mistakes, and right decisions


def main() -> None:
    """A line for each table, split and kind of decision; then groups of mistakes."""
    lines = [
        [
            "data",
            "split",
            "decisions",
            "turned",
            "rows",
            "nearest",
            "share",
            "within 30 %",
            "seconds each",
        ]
    ]
    groups = [["data", "split", "groups", "own loss: predicted", "actual", "others", "random rows"]]
    for data in ("digits", "breast_cancer"):
        for split in SPLITS:
            lines_, groups_ = one(data, split)
            lines += lines_
            groups += groups_
    print("\n".join(aligned(lines)), "\n".join(aligned(groups)), sep="\n\n")


def one(data: str, split: int) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of a split."""
    with tempfile.TemporaryDirectory() as folder:
        flags = Flags(data=data, seed=split, mistakes=ASKED, right=ASKED, out=Path(folder))
        table = checked(flags)
        begin = time.perf_counter()
        model = model_of(flags, table)
        said, margin = decided(model, table)
        asked = study(flags, table, said, margin)
        seconds = flags.jobs * (time.perf_counter() - begin) / len(asked)
        found = grouped(flags, table, model, said)
    lines = []
    for kind, some in parts_of(asked).items():
        actual, near = (
            np.array([getattr(x, name) for x in some]) for name in ("actual", "nearest")
        )
        both = [x for x in some if np.isfinite(x.predicted) and np.isfinite(x.actual)]
        close = np.mean([abs(x.predicted - x.actual) <= max(0.3 * x.actual, 1) for x in both])
        lines.append([
            data, str(split), f"{len(some)} {kind}", f"{np.isfinite(actual).mean():.0%}", f"{half(actual):g}",
            f"{half(near):g}", f"{half(actual) / half(near):.2f}", f"{close:.0%}", f"{seconds:.1f}",
        ])  # fmt: skip
    if found is None:
        return lines, []
    own = [np.diag(x) for x in (found.found.predicted, found.found.actual, found.found.random)]
    off = found.found.actual[~np.eye(len(own[0]), dtype=bool)]
    told = [str(paired_interval(x)) for x in (own[0], own[1], off, own[2])]
    return lines, [[data, str(split), str(len(own[0])), *told]]


if __name__ == "__main__":
    main()
