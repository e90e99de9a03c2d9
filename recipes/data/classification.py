"""Classification tables with owners: scikit-learn's, or your own file; features ready for a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMBEDDED = ("digits", "breast_cancer")
SPOILED = {1: 1.0, 3: 0.5, 6: 0.3}  # of the embedded owners: share of wrong labels


@dataclass(frozen=True)
class Classification:
    """Training rows with owners, target rows that values are for, test rows that judge.

    Args:
        x, y, owners: [n, d], [n], [n].
        target_x, target_y, test_x, test_y: held out.
        classes: names of the labels 0 .. c − 1.
        bad: [n] which labels were spoiled; None where unknown.
        ids, held_ids: [n] the training rows' places in the file they come from, and those of the held-out rows in theirs,
            targets first; as they stand, unless given.
        features: names of the columns that x is made of.
        repeated: how many of the held-out rows are also training rows.
        inputs: what each of the d numbers is made of: a column less its mean over its scale, or whether it is a value.
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
    held_ids: NDArray[np.intp] | None = None
    features: Sequence[str] = ()
    repeated: int = 0
    inputs: Sequence[Mapping[str, str | float]] = ()

    @property
    def places(self) -> NDArray[np.intp]:
        """[n] what training rows are called in whatever is written."""
        return np.arange(len(self.x)) if self.ids is None else self.ids

    @property
    def held_places(self) -> NDArray[np.intp]:
        """[targets + test] what held-out rows are called, the targets first."""
        held = len(self.target_x) + len(self.test_x)
        return np.arange(held) if self.held_ids is None else self.held_ids


def facts_of(data: Classification) -> dict[str, str]:
    """What a report says of a table: its features, and held-out rows that were trained on."""
    facts = {}
    if data.features:
        many = len(data.features)
        named = ", ".join(map(str, data.features[:10])) + (", ..." if many > 10 else "")
        facts["features"] = f"{many} columns ({named}), {data.x.shape[1]} numbers a row"
    if data.repeated:
        held = len(data.target_x) + len(data.test_x)
        facts["held-out rows that are also training rows"] = f"{data.repeated} of {held}"
    return facts


def warn_of_repeated(data: Classification) -> None:
    """Warn where held-out rows were trained on: results on them are not results on new rows."""
    if data.repeated:
        held = len(data.target_x) + len(data.test_x)
        print(
            f"warning: {data.repeated} of {held} held-out rows are also training rows, features and label: results say less "
            "of new rows than they seem to; take them out of one of the two",
            flush=True,
        )


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


def load(
    data: str, label: str, ignore: Sequence[str], test: str | None, seed: int, mislabel: float = 0.0
) -> Classification:
    """An embedded table by its name, with a share of wrong labels, or a file of one's own; without owners."""
    if data in EMBEDDED:
        return embedded(data, mislabel, 0, seed)
    return from_file(data, label, None, test, seed, ignore)


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
    path: str,
    label: str,
    owner: str | None,
    test: str | None,
    seed: int,
    ignore: Sequence[str] = (),
) -> Classification:
    """A .parquet or .csv file with a label column; text columns become indicators, numbers are scaled.

    Without a test file two fifths of the rows are held out, half as targets and half to judge; every owner must have
    rows among the others.

    Args:
        ignore: columns that are no features: ids, dates, what is unknown when the label is predicted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, columns that are missing, that number or name the rows, or that hold neither
            numbers nor text; empty cells, too few rows, labels that are no classes, a label in the test file that
            training rows do not have or that is written in several ways, an owner whose rows are all held out.
    """
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    if used := [name for name in (label, owner) if name in ignore]:
        raise ValueError(f"expected --ignore of columns that nothing else needs, got {used}")
    frame, other = _read(path, label, owner), None if test is None else _read(test, label)
    needed = [label, *([owner] if owner else [])]
    _check_there(frame, [*needed, *(c for c in ignore if other is None or c not in other)], path)
    frame = frame.drop(columns=[c for c in ignore if c in frame])
    _check_cells(frame, path)
    features = [c for c in frame.columns if c not in (label, owner)]
    _check_features(frame, features, path)
    order = np.random.default_rng(seed).permutation(len(frame))
    ids = np.arange(len(frame))
    if test is None or other is None:
        fifth = len(frame) // 5
        held_ids, ids = order[: 2 * fifth], order[2 * fifth :]
        held = frame.iloc[held_ids]
    else:
        _check_there(other, [label, *features], test)
        held = other[[label, *features]]  # without columns that training lacks
        _check_cells(held, test)
        held_ids = np.random.default_rng(seed).permutation(len(held))
        held = held.iloc[held_ids]
        _check_same_kinds(frame, held, features, path, test)
    train = frame.iloc[ids]
    if owner:
        _check_owners(frame[owner], train[owner], path)
    if len(train) < 20 or len(held) < 10:
        raise ValueError(
            f"expected at least 20 training rows and 10 held out, got {len(train)} and {len(held)}"
        )
    names, y, held_y = _labels(train[label], held[label], path)
    encode = make_column_transformer(
        (StandardScaler(), make_column_selector(dtype_include="number")),
        (
            OneHotEncoder(handle_unknown="ignore", sparse_output=False),
            make_column_selector(dtype_exclude="number"),
        ),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        x = encode.fit_transform(train[features]).astype(np.float32)
        held_x = encode.transform(held[features]).astype(np.float32)
    if not (np.isfinite(x).all() and np.isfinite(held_x).all()):
        raise ValueError(
            f"expected numbers that float32 holds, got larger ones in {path}; take logarithms, or mend them"
        )
    half = len(held) // 2
    owners = train[owner].astype(str).to_numpy() if owner else np.full(len(train), "all")
    seen = {row.tobytes() for row in np.column_stack([x, y])}
    repeated = sum(row.tobytes() in seen for row in np.column_stack([held_x, held_y]))
    return Classification(
        Path(path).name, x, y, owners, held_x[:half], held_y[:half], held_x[half:], held_y[half:], names,
        None, ids, held_ids, features, repeated, _inputs(encode),
    )  # fmt: skip


def _inputs(encode: Any) -> list[Mapping[str, str | float]]:
    """What each number is made of that a fitted transformer of `from_file` gives."""
    found: list[Mapping[str, str | float]] = []
    for _, fitted, columns in encode.transformers_:
        if hasattr(fitted, "categories_"):
            for column, values in zip(columns, fitted.categories_, strict=True):
                found += [{"column": str(column), "is": str(value)} for value in values]
        elif len(columns):
            parts = zip(columns, fitted.mean_, fitted.scale_, strict=True)
            found += [{"column": str(c), "less": float(m), "over": float(v)} for c, m, v in parts]
    return found


def _labels(
    train: Any, held: Any, path: str
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """(names of the classes, training labels, held-out labels) of two columns."""

    def words(column: Any) -> Any:  # 1.0 is the label 1
        if column.dtype.kind != "f":
            return column.astype(str)
        return column.map(lambda v: str(int(v)) if v == round(v) and abs(v) < 2**53 else str(v))

    names, y = np.unique(words(train).astype(str), return_inverse=True)
    if train.dtype.kind in "iuf" and len(names) > max(20, len(train) // 2):
        raise ValueError(
            f"expected classes in {train.name!r} of {path}, got {len(names)} different numbers in {len(train)} rows; "
            "these recipes are for classes: cut the numbers into ranges"
        )
    if len(names) < 2:
        raise ValueError(
            f"expected two classes or more in {train.name!r} of {path}, got {names.tolist()} alone"
        )
    unknown = sorted(set(words(held)) - set(names))
    if unknown:
        raise ValueError(
            f"expected held-out labels that training rows have ({names[:5].tolist()}), got {unknown[:5]}; leave rows of these "
            "labels out, or join them to others; numbers to be predicted are no classes: cut them into ranges"
        )
    return [str(n) for n in names], y.astype(np.int64), np.searchsorted(names, words(held))


def _check_owners(every: Any, train: Any, path: str) -> None:
    """Raise where an owner has no training row: nothing would be said of it."""
    if lost := sorted(set(every.astype(str)) - set(train.astype(str))):
        raise ValueError(
            f"expected training rows of every owner in {path}, got none of {lost[:5]}, whose rows are all held out; give "
            "held-out rows by --test, take another --seed, which splits differently, or leave these owners out or join them "
            "to others"
        )


def _check_features(frame: Any, features: Sequence[str], path: str) -> None:
    """Raise where there are no columns, or some are names or numbers of rows instead of features.

    Raises:
        ValueError: they are; says which to ignore.
    """
    if not features:
        raise ValueError(f"expected features in {path}, got a label alone")
    n, numbers = len(frame), frame.select_dtypes("number").columns
    kinds = {c: type(frame[c].iloc[0]).__name__ for c in features if c not in numbers and n}
    others = {c: k for c, k in kinds.items() if k not in ("str", "bool", "bool_")}
    if others:
        raise ValueError(
            f"expected numbers and text in {path}, got {others}; make columns of numbers of them, or leave them out by "
            f"--ignore {' '.join(map(str, others))}"
        )

    def is_name(c: str) -> bool:
        column = frame[c]
        if c in numbers:  # 0, 1, 2 ... as pandas writes its index
            first = int(column.iloc[0] == 1)
            return n > 2 and bool((column.to_numpy(dtype=float) == np.arange(n) + first).all())
        return bool(column.nunique() > max(20, n // 2))

    if named := [c for c in features if is_name(c)]:
        raise ValueError(
            f"expected features, got columns of {path} that name or number rows: {named[:5]}; leave them out by --ignore "
            f"{' '.join(map(str, named[:5]))}"
        )


def _check_same_kinds(frame: Any, held: Any, features: Sequence[str], path: str, test: str) -> None:
    """Raise where a column holds numbers in one file and text in the other."""
    kinds = [set(f[features].select_dtypes(["number", "bool"]).columns) for f in (frame, held)]
    if other := sorted(kinds[0] ^ kinds[1]):
        raise ValueError(
            f"expected columns of one kind in {path} and {test}, got numbers in one and text in the other in "
            f"{other[:5]}; write both alike, or leave columns out by --ignore"
        )


def _refuse_no_table(path: str) -> None:
    """Raise for a path to nothing, and to what is no table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no file {path}; give a .parquet or .csv file, 'digits' or 'breast_cancer'"
        )
    if Path(path).suffix.lower() not in (".parquet", ".csv"):
        raise ValueError(
            f"expected a .parquet or .csv file, 'digits' or 'breast_cancer', got {path}"
        )


def _read(path: str, label: str, owner: str | None = None) -> Any:
    """The table in a file; owners are the words that they are written in: 0012 is not 12.

    Raises:
        ValueError: a file that is no table, or not in UTF-8; a label in several forms.
    """
    import pandas as pd

    _refuse_no_table(path)
    try:
        if Path(path).suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        frame = pd.read_csv(path, dtype={owner: str} if owner else None)
        if label in frame and frame[label].dtype.kind in "iufb":
            _refuse_forms(frame[label], pd.read_csv(path, dtype={label: str})[label], path)
        return frame
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} in UTF-8, got {error}; save it so") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise ValueError(f"expected a table in {path}, got none: {error}") from None


def _refuse_forms(values: Any, written: Any, path: str) -> None:
    """Raise where labels of one value are written in several ways: whether 01 means 1 is unknown.

    Raises:
        ValueError: they are; names the forms.
    """
    forms = written.str.strip().groupby(values).unique()
    for several in forms[forms.str.len() > 1]:
        raise ValueError(
            f"expected labels in {values.name!r} of {path} that are written in one way each, got "
            f"{sorted(several)[:5]}, which are read as one; write them alike, or as words that differ"
        )


def _check_there(frame: Any, needed: Sequence[str], path: str) -> None:
    """Raise where a column is missing."""
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(f"expected columns {missing} in {path}, got {list(frame.columns)[:20]}")


def _check_cells(frame: Any, path: str) -> None:
    """Raise for empty cells, times and infinity."""
    empty = frame.columns[frame.isna().any()].tolist()
    if empty:
        raise ValueError(
            f"expected no empty cells, got some in {empty[:5]} of {path}; fill or drop them, or leave columns out by "
            "--ignore (words such as NA count as empty)"
        )
    times = frame.select_dtypes(["datetime", "datetimetz", "timedelta"]).columns.tolist()
    if times:
        raise ValueError(
            f"expected numbers and text, got times in {times[:5]} of {path}; make numbers of them, such as days "
            "since a date, or leave them out by --ignore"
        )
    numbers = frame.select_dtypes("number")
    endless = [name for name in numbers if np.isinf(numbers[name].astype(float)).any()]
    if endless:
        raise ValueError(f"expected finite numbers, got infinity in {endless[:5]} of {path}")
