"""Classification tables with owners: scikit-learn's, or a file of one's own; features ready for a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPOILED = {1: 1.0, 3: 0.5, 6: 0.3}  # of the embedded owners: share of wrong labels


@dataclass(frozen=True)
class Classification:
    """Training rows with owners, target rows that values are for, test rows that judge.

    Args:
        x, y, owners: [n, d], [n], [n].
        target_x, target_y, test_x, test_y: held out.
        classes: names of the labels 0 .. c − 1.
        bad: [n] which labels were spoiled; None where nobody knows.
        ids: [n] the training rows' places in the file they come from; as they stand, unless given.
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    owners: NDArray[Any]
    target_x: NDArray[np.float32]
    target_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    classes: list[str]
    bad: NDArray[np.bool_] | None
    ids: NDArray[np.intp] | None = None

    @property
    def places(self) -> NDArray[np.intp]:
        """[n] what training rows are called in whatever is written."""
        return np.arange(len(self.x)) if self.ids is None else self.ids


def network(d: int, classes: int, width: int, seed: int) -> Any:
    """d features, one hidden layer of GELUs (or none, width 0), c classes; weights from the seed."""
    import torch

    nn = torch.nn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if width == 0:
            return nn.Linear(d, classes)
        return nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, classes))


def problem_of(data: Classification, width: int, weight_decay: float) -> tuple[Any, Any]:
    """(Problem, seed -> initial model)."""
    import torch

    from attribution_core import Problem, cross_entropy

    make = partial(network, data.x.shape[1], len(data.classes), width)
    train = (torch.tensor(data.x), torch.tensor(data.y))
    return Problem(make(0), cross_entropy, train, weight_decay=weight_decay), make


def embedded(name: str, mislabel: float, owners: int, seed: int) -> Classification:
    """Digits or breast cancer, with wrong labels in random rows and in some owners.

    Owners are of unequal sizes. A share `mislabel` of all labels is flipped at random; owners 1, 3 and 6 also
    have 100, 50 and 30 % of theirs flipped when there are at least 7.
    """
    from recipes.embedded import breast_cancer, digits

    size, load = {"digits": (1000, digits), "breast_cancer": (300, breast_cancer)}[name]
    table = load(size, mislabel=mislabel, seed=seed)
    y, bad = table.y.copy(), table.mislabelled.copy()
    count = max(1, min(owners, size))
    share = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    ends = np.round(np.cumsum(share) * size).astype(int)
    owner = np.searchsorted(ends, np.arange(size), side="right")
    rng, classes = np.random.default_rng([seed, 1]), int(y.max()) + 1
    for which, part in SPOILED.items() if count >= 7 and owners else ():
        rows = np.flatnonzero((owner == which) & ~bad)
        wrong = rng.choice(rows, round(part * len(rows)), replace=False)
        y[wrong] = (y[wrong] + rng.integers(1, classes, len(wrong))) % classes
        bad[wrong] = True
    half = len(table.test_y) // 2
    x, test_x = table.x.astype(np.float32), table.test_x.astype(np.float32)
    return Classification(
        name, x, y, np.array([f"owner {k:02d}" for k in owner]), test_x[:half], table.test_y[:half],
        test_x[half:], table.test_y[half:], [str(c) for c in range(classes)], bad,
    )  # fmt: skip


def from_file(
    path: str, label: str, owner: str | None, test: str | None, seed: int
) -> Classification:
    """A .parquet or .csv file with a label column; text columns become indicators, numbers are scaled.

    Without a test file two fifths of the rows are held out, half as targets and half to judge.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, columns that are missing, empty cells, too few rows, a label in the test
            file that training rows do not have.
    """
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    frame = _read(path, [label, *([owner] if owner else [])])
    ids = np.arange(len(frame))
    features = [c for c in frame.columns if c not in (label, owner)]
    order = np.random.default_rng(seed).permutation(len(frame))
    if test is None:
        fifth = len(frame) // 5
        ids, held = order[2 * fifth :], frame.iloc[order[: 2 * fifth]]
    else:
        held = _read(test, [label, *features])
        held = held.iloc[np.random.default_rng(seed).permutation(len(held))]
    train = frame.iloc[ids]
    if len(train) < 20 or len(held) < 10:
        raise ValueError(
            f"expected at least 20 training rows and 10 held out, got {len(train)} and {len(held)}"
        )
    names, y = np.unique(train[label].astype(str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"expected two classes or more in {label!r} of {path}, got {names.tolist()} alone"
        )
    unknown = sorted(set(held[label].astype(str)) - set(names))
    if unknown:
        raise ValueError(f"expected held-out labels that training rows have, got {unknown[:5]}")
    encode = make_column_transformer(
        (StandardScaler(), make_column_selector(dtype_include="number")),
        (
            OneHotEncoder(handle_unknown="ignore", sparse_output=False),
            make_column_selector(dtype_exclude="number"),
        ),
    )
    x = encode.fit_transform(train[features]).astype(np.float32)
    held_x = encode.transform(held[features]).astype(np.float32)
    held_y = np.searchsorted(names, held[label].astype(str))
    half = len(held) // 2
    owners = train[owner].astype(str).to_numpy() if owner else np.full(len(train), "all")
    return Classification(
        Path(path).name, x, y.astype(np.int64), owners, held_x[:half], held_y[:half], held_x[half:],
        held_y[half:], [str(n) for n in names], None, ids,
    )  # fmt: skip


def _read(path: str, needed: Sequence[str]) -> Any:
    import pandas as pd

    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}; or 'digits', 'breast_cancer'")
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    if Path(path).suffix not in readers:
        raise ValueError(f"expected a .parquet or .csv file, got {path}")
    frame: Any = readers[Path(path).suffix](path)
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(f"expected columns {missing} in {path}, got {list(frame.columns)[:20]}")
    empty = frame.columns[frame.isna().any()].tolist()
    if empty:
        raise ValueError(
            f"expected no empty cells, got some in {empty[:5]} of {path}; fill or drop them"
        )
    times = frame.select_dtypes(["datetime", "datetimetz", "timedelta"]).columns.tolist()
    if times:
        raise ValueError(
            f"expected numbers and text, got times in {times[:5]} of {path}; make numbers of them, days since a date say, or drop them"
        )
    numbers = frame.select_dtypes("number")
    endless = [name for name in numbers if np.isinf(numbers[name].astype(float)).any()]
    if endless:
        raise ValueError(f"expected finite numbers, got infinity in {endless[:5]} of {path}")
    return frame
