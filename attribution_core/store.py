"""A resumable folder of rows [n, t]: a plain npy file, one flag a block, and a json that says of what.

    scores.npy     the array, memory-mapped; readable with numpy alone
    done.npy       one byte per block of rows: 1 once the block is written
    store.json     shape, block size and the fingerprint of what the rows were computed from

Every process writes its own blocks. A killed run loses the blocks in flight, no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from attribution_core.disk.files import write_arrays, write_text
from attribution_core.processes import failing_together, from_first, wait, world

FORMAT = 1


@dataclass(frozen=True)
class Store:
    """An open folder of rows; `missing()` says what this process still has to write."""

    folder: Path
    rows: NDArray[Any]
    done: NDArray[np.uint8]
    block: int

    @classmethod
    def open(
        cls,
        folder: str | Path,
        shape: tuple[int, int],
        fingerprint: str,
        *,
        dtype: str = "float32",
        block: int = 256,
    ) -> Store:
        """Open the store in `folder`, or create it.

        Raises:
            ValueError: the folder holds rows of another model, data or setting, or a broken file.
        """
        folder = Path(folder)
        head = {
            "format": FORMAT,
            "fingerprint": from_first(fingerprint),  # processes may differ in where they work
            "shape": list(shape),
            "dtype": dtype,
            "block": block,
        }
        if world()[0] == 0 and not (folder / "store.json").exists():
            _create(folder, head)
        wait()
        try:
            found = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            for name in ("scores", "done"):
                np.load(folder / f"{name}.npy", mmap_mode="r")  # "r+" fills a short file with zeros
            rows = np.load(folder / "scores.npy", mmap_mode="r+")
            done = np.load(folder / "done.npy", mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} is damaged ({error}); delete it and run again") from None
        if found != head:
            differs = [name for name in head if found.get(name) != head[name]]
            raise ValueError(
                f"{folder} was written by another run (different {', '.join(differs)}); "
                "the model, the data or a setting has changed: choose another folder or delete this one"
            )
        return cls(folder, rows, done, block)

    def missing(self) -> list[NDArray[np.intp]]:
        """This process's share of the row blocks that are not written yet."""
        rank, size = world()
        # the first process's list for all: another may have written blocks by the time one looks
        todo = from_first(np.flatnonzero(self.done == 0))[rank::size]
        return [np.arange(b * self.block, min((b + 1) * self.block, len(self.rows))) for b in todo]

    def write(self, rows: NDArray[np.intp], values: ArrayLike) -> None:
        """Write one block's values, then its flag, so that a flag never stands before its rows."""
        values = np.asarray(values)
        if not np.isfinite(values).all():
            bad = rows[~np.isfinite(values).all(axis=1)]
            raise ValueError(
                f"expected finite values, got NaN or infinity in rows {bad[:10].tolist()}"
            )
        self.rows[rows] = values
        _flush(self.rows)
        self.done[rows[0] // self.block] = 1
        _flush(self.done)

    def remember(
        self, name: str, make: Callable[[], tuple[torch.Tensor, dict[str, Any]]]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """A tensor and its description, made once for the rows to come and read back on resuming."""
        path = self.folder / f"{name}.npz"
        if not from_first(path.exists()):
            tensor, about = make()
            if world()[0] == 0:
                write_arrays(path, tensor=tensor.cpu().numpy(), about=json.dumps(about))
            wait()
        with np.load(path) as held:
            return torch.from_numpy(held["tensor"]), json.loads(str(held["about"]))

    def fill(
        self,
        make: Callable[[NDArray[np.intp]], ArrayLike],
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> NDArray[Any]:
        """Make and write what is missing of this process's share, then read all rows; what one process raises
        is raised on all."""
        todo = self.missing()
        with failing_together():
            for rows in progress(todo):
                self.write(rows, make(rows))
        return self.read()

    def read(self) -> NDArray[Any]:
        """All rows, once every process has written its own.

        Raises:
            ValueError: blocks are missing.
        """
        wait()
        done = np.load(self.folder / "done.npy")
        if not done.all():
            raise ValueError(
                f"{int((done == 0).sum())} of {len(done)} blocks in {self.folder} are not written; "
                "run the same command again to compute them"
            )
        return np.load(self.folder / "scores.npy", mmap_mode="r")


def _flush(array: NDArray[Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()


def _create(folder: Path, head: dict[str, Any]) -> None:
    """The three files; store.json last and by renaming, so that it vouches for the others."""
    if (folder / "scores.npy").exists() and not (folder / "done.npy").exists():
        raise ValueError(
            f"{folder} holds a scores.npy that is not a store's; choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shape = tuple(head["shape"])
    blocks = -(-shape[0] // head["block"])
    for name, dtype, dims in (("done", "uint8", (blocks,)), ("scores", head["dtype"], shape)):
        array = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=dims
        )
        array[:] = 0
        array.flush()
    write_text(folder / "store.json", json.dumps(head, indent=1))
