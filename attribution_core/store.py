"""A resumable folder of rows [n, t]: a plain npy file, one flag a block, and a json that says of what.

    scores.npy     the array, memory-mapped; readable with numpy alone
    done.npy       one byte per block of rows: 1 once the block is written
    store.json     shape, block size and the fingerprint of what the rows were computed from

Every process writes its own blocks. A killed run loses the blocks in flight, no more.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from attribution_core.behaviour import (
    BARE,
    closed_over,
    hooks_of,
    is_own,
    is_plain,
    of_class,
    own_classes,
    read_globals,
    settings,
)
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
                with whole(path) as part, part.open("wb") as file:
                    np.savez(file, tensor=tensor.cpu().numpy(), about=json.dumps(about))
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


def ending(path: str | Path, *known: str) -> str:
    """The ending of a file that is to be written; "" among the known ones allows none.

    Raises:
        ValueError: another one, under which nobody would look for what is written.
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


def fingerprint(*parts: Any) -> str:
    """sha256 of models, tensors, arrays, data, functions and settings: equal content, equal print.

    Classes and functions count by their code where they are the user's, installed ones by their names. Not seen are
    other versions of installed packages, files read on the way, and what may be a counter, a cache or a stamp of time:
    private attributes and containers that no constructor's parameter names, whole numbers that methods set, what a
    function collects in a scope around it, objects among globals other than dataclasses, namespaces and dicts of plain
    values. Nor are hooks of torch, transformers and peft, which register some by themselves.
    """
    digest = _Digest()
    for part in parts:
        _feed(digest, part)
    for part in digest.named:  # which grows on the way
        _feed(digest, _behaviour(part))
    return digest.content.hexdigest()


class _Digest:
    """A digest under way, and the objects that it is inside of."""

    def __init__(self) -> None:
        self.content = hashlib.sha256()
        self.inside: set[int] = set()
        # functions, classes and objects, each read once, after what names it: they may name one another without end
        self.named: list[Any] = []
        self.number: dict[int, int] = {}

    def update(self, data: bytes) -> None:
        self.content.update(data)

    def name(self, part: Any) -> None:
        """The number of a function, class or object in the place of its content."""
        if id(part) not in self.number:
            self.number[id(part)] = len(self.named)
            self.named.append(part)
        self.update(b"@%d" % self.number[id(part)])


def _unplaced(text: str) -> str:
    """A text without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _inside(part: torch.Tensor) -> list[torch.Tensor]:
    """Indices and values of a sparse tensor; nothing of layouts without any."""
    if part.layout != torch.sparse_coo or part.is_meta:
        return []
    whole = part.detach().coalesce()
    return [whole.indices(), whole.values()]


def _configuration(config: Any) -> Any:
    """A model's configuration, without what transformers notes in it on a first pass with labels."""
    if not hasattr(config, "to_dict"):
        return config if is_plain(config) else _unplaced(str(config))
    held = dict(config.to_dict())
    noted = "regression" if held.get("num_labels", 2) == 1 else "single_label_classification"
    if held.get("problem_type") == noted:
        held["problem_type"] = None
    return json.dumps(held, sort_keys=True, default=str)


def _feed(digest: Any, part: Any) -> None:
    """The content of a part, or where it is a part of itself, that."""
    if id(part) in digest.inside:
        digest.update(b"^")
        return
    digest.inside.add(id(part))
    try:
        _content(digest, part)
    finally:
        digest.inside.discard(id(part))


def _content(digest: Any, part: Any) -> None:
    if isinstance(part, (str, bytes)):
        digest.update(f"{type(part).__qualname__}:{part!r};".encode())
    elif hasattr(part, "_fingerprint") and not isinstance(
        part, type
    ):  # a datasets.Dataset, or data that know their own
        digest.update(str(part._fingerprint).encode())
    elif isinstance(part, nn.Module):
        # what the weights alone do not tell: heads of a transformer, frozen parameters
        configs = {
            id(c): c for m in part.modules() if (c := getattr(m, "config", None)) is not None
        }
        _feed(digest, [_unplaced(str(part)), *map(_configuration, configs.values())])
        _feed(digest, [name for name, p in part.named_parameters() if p.requires_grad])
        kept = part.state_dict()
        _feed(digest, kept)
        _feed(digest, {name: b for name, b in part.named_buffers() if name not in kept})
        _feed(digest, [[own_classes(type(m)), settings(m)] for m in part.modules()])
        if hooks := hooks_of(part):
            _feed(digest, hooks)
        drawn = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        active = [name for name, m in part.named_modules() if isinstance(m, drawn) and m.training]
        _feed(digest, active)
    elif isinstance(part, torch.Tensor):
        # bfloat16 has no numpy counterpart: its bytes are read as they are
        if part.layout != torch.strided or part.is_meta:
            _feed(digest, [str(part.layout), list(part.shape), *_inside(part)])
            return
        flat = part.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(part, np.ndarray) and part.dtype.hasobject:
        _feed(digest, [part.shape, part.tolist()])
    elif isinstance(part, np.ndarray):
        digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
    elif isinstance(part, Mapping):
        digest.update(b"{%d" % len(part))
        for name in part:
            _feed(digest, str(name))
            _feed(digest, part[name])
    elif is_dataclass(part) and not isinstance(part, type):
        _feed(digest, [type(part).__qualname__, *own_classes(type(part))])
        for item in fields(part):
            _feed(digest, getattr(part, item.name))
    elif isinstance(part, Sequence):
        digest.update(b"[%d" % len(part))
        for item in part:
            _feed(digest, item)
    elif isinstance(part, (set, frozenset)):
        _feed(digest, sorted(repr(item) for item in part))
    elif isinstance(part, functools.partial):
        _feed(digest, ["partial", part.func, part.args, part.keywords])
    elif isinstance(part, types.CodeType):
        _feed(digest, [part.co_code, part.co_names, part.co_consts])
    elif isinstance(part, types.FunctionType):
        digest.name(part)
    elif isinstance(part, types.MethodType):
        _feed(digest, [part.__func__, part.__self__])
    elif isinstance(part, (type, types.BuiltinFunctionType)):
        _feed(digest, f"{part.__module__}.{part.__qualname__}")
        if isinstance(part, type) and is_own(part.__module__):
            digest.name(part)
    elif isinstance(part, functools._lru_cache_wrapper):
        _feed(digest, ["cached", part.__wrapped__])
    elif isinstance(part, BARE):
        _feed(digest, dict(sorted(vars(part).items())))
    elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        for start in range(0, len(part), 1024):  # data of one's own, read as methods read them
            _feed(digest, part[list(range(start, min(start + 1024, len(part))))])
    else:
        text = repr(part)  # an address is no content, and differs between processes
        unnamed = " at 0x" in text
        digest.update(f"{type(part).__qualname__}:{'' if unnamed else text};".encode())
        if (unnamed or is_own(type(part).__module__)) and hasattr(part, "__dict__"):
            digest.name(part)


def _behaviour(part: Any) -> list[Any]:
    """What a function, a class or an object does."""
    if isinstance(part, type):
        return [own_classes(part)[1:], of_class(part)]
    if not isinstance(part, types.FunctionType):
        return [own_classes(type(part)), settings(part)]
    held = closed_over(part)
    return [
        part.__module__, part.__qualname__, part.__code__, part.__defaults__, part.__kwdefaults__,
        [value for value in held if value is not part], read_globals(part),
    ]  # fmt: skip
