"""Files that are whole or not there, under known endings, in folders of one run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attribution_core.processes import from_first, wait, world

FORMAT = 1


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that then takes its place, whole or not at all; each process writes one of its own."""
    part = path.with_name(path.name + f".part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_array(path: Path, array: ArrayLike) -> None:
    """Write a .npy file whole or not at all; the array may be a map of the very file it replaces."""
    with whole(path) as part, part.open("wb") as file:
        np.save(file, array)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write a .npz file whole or not at all."""
    with whole(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def write_parquet(path: Path, table: Any) -> None:
    """Write a pyarrow table as a .parquet file, whole or not at all."""
    from pyarrow import parquet

    with whole(path) as part:
        parquet.write_table(table, part)


def ending(path: str | Path, *known: str) -> str:
    """The ending of a file that is to be written; "" among the known ones allows none.

    Raises:
        ValueError: another one, which readers of the file would not expect.
    """
    found = Path(path).suffix.lower()
    found = "" if found[1:].isdigit() else found  # of a name such as halves-0.5
    if found not in known:
        raise ValueError(
            f"expected a file name that ends in {' or '.join(filter(None, known))}, got {Path(path).name!r}; rename it"
        )
    return found


def claim(folder: str | Path, name: str, what: str, made_of: str) -> Path:
    """A folder for `what` of a run with this fingerprint, which `name` in it keeps: an empty folder is
    taken, the run's own goes on.

    Raises:
        ValueError: it holds `what` of another run.
    """
    folder = Path(folder)
    head = json.dumps({"format": FORMAT, "fingerprint": from_first(made_of)})
    path = folder / name
    if world()[0] == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, head)
    wait()
    if path.read_text(encoding="utf-8") != head:
        raise ValueError(
            f"{folder} holds {what} of another run; the model, the data, the recipe, the outputs or a setting "
            "have changed: choose another folder or delete this one"
        )
    return folder
