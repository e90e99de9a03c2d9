"""A resumable folder of rows [n, t]: a plain npy file, one flag a block, and a json that says of what.

    scores.npy     the array, memory-mapped; readable with numpy alone
    done.npy       one byte per block of rows: 1 once the block is written
    store.json     shape, block size and the fingerprint of what the rows were computed from

Every process writes its own blocks. A killed run loses the blocks in flight, no more.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

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
                part = path.with_suffix(".part.npz")
                np.savez(part, tensor=tensor.cpu().numpy(), about=json.dumps(about))
                part.replace(path)
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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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
    """sha256 of models, tensors, arrays, data, functions and settings: equal content, equal print."""
    digest = _Digest()
    for part in parts:
        _feed(digest, part)
    return digest.content.hexdigest()


class _Digest:
    """A digest under way, and the objects that it is inside of."""

    def __init__(self) -> None:
        self.content = hashlib.sha256()
        self.inside: set[int] = set()
        self.functions: dict[int, int] = {}  # those that were read already -> their number

    def update(self, data: bytes) -> None:
        self.content.update(data)


def _settings(part: Any) -> dict[str, Any]:
    """The attributes of an object that say what it does, by name.

    What a constructor was given under the same name (or _name), and public numbers with a fraction, texts, arrays and
    functions; whole numbers and containers else may be counters and caches, which change as an object is used.
    """
    try:
        given = set(inspect.signature(type(part).__init__).parameters)
    except (TypeError, ValueError):
        given = set()
    given -= KEPT_BY_TORCH
    held = {k: v for k, v in vars(part).items() if not k.startswith("_") or k[1:] in given}
    return {
        name: held[name]
        for name in sorted(held)
        if isinstance(held[name], SETTINGS)
        or (name.removeprefix("_") in given and _is_plain(held[name]))
    }


KEPT_BY_TORCH = {
    "modules",
    "parameters",
    "buffers",
}  # as _modules ..., which are read by themselves
SETTINGS = (
    float, str, np.ndarray, torch.Tensor, torch.dtype, functools.partial, types.FunctionType,
    types.BuiltinFunctionType, nn.Module,
)  # fmt: skip


def _globals(function: Any) -> dict[str, Any]:
    """Global numbers, texts and arrays that a function reads and does not set, and functions of its own module.

    Containers and objects may be caches, which change as they are used.
    """
    scope, module = function.__globals__, function.__module__
    codes, read, written = [function.__code__], set(), set()
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                written.add(step.argval)
    found = {name: scope[name] for name in sorted(read - written) if name in scope}
    plain = (bool, int, float, str, bytes, np.ndarray, torch.Tensor, torch.dtype)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, plain)
        or (isinstance(value, types.FunctionType) and value.__module__ == module)
    }


def _inside(part: torch.Tensor) -> list[torch.Tensor]:
    """Indices and values of a sparse tensor; nothing of layouts without any."""
    if part.layout != torch.sparse_coo or part.is_meta:
        return []
    whole = part.detach().coalesce()
    return [whole.indices(), whole.values()]


def _text(config: Any) -> str:
    """A model's configuration in words, without what transformers notes in it on a first pass with labels."""
    if not hasattr(config, "to_dict"):
        return str(config)
    held = dict(config.to_dict())
    noted = "regression" if held.get("num_labels", 2) == 1 else "single_label_classification"
    if held.get("problem_type") == noted:
        held["problem_type"] = None
    return json.dumps(held, sort_keys=True, default=str)


def _is_plain(value: Any) -> bool:
    """Numbers, texts, functions and arrays, and containers of such."""
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, *SETTINGS))


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
    elif hasattr(part, "_fingerprint"):  # a datasets.Dataset, or data that know their own
        digest.update(str(part._fingerprint).encode())
    elif isinstance(part, nn.Module):
        # what the weights alone do not tell: heads of a transformer, frozen parameters
        configs = {
            id(c): c for m in part.modules() if (c := getattr(m, "config", None)) is not None
        }
        _feed(digest, [str(part), *(_text(config) for config in configs.values())])
        _feed(digest, [name for name, p in part.named_parameters() if p.requires_grad])
        kept = part.state_dict()
        _feed(digest, kept)
        _feed(digest, {name: b for name, b in part.named_buffers() if name not in kept})
        _feed(digest, [_settings(module) for module in part.modules()])
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
        _feed(digest, type(part).__qualname__)
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
    elif isinstance(part, types.FunctionType) and id(part) in digest.functions:
        digest.update(b"@%d" % digest.functions[id(part)])
    elif isinstance(part, (types.FunctionType, types.MethodType)):
        if isinstance(part, types.FunctionType):
            digest.functions[id(part)] = len(digest.functions)
        _feed(digest, [part.__module__, part.__qualname__, part.__code__])
        _feed(digest, [part.__defaults__, getattr(part, "__kwdefaults__", None)])
        _feed(digest, getattr(part, "__self__", None))
        held = [cell.cell_contents for cell in part.__closure__ or ()]
        _feed(digest, [value for value in held if value is not part])
        _feed(digest, _globals(part))
    elif isinstance(part, (type, types.BuiltinFunctionType)):
        _feed(digest, f"{part.__module__}.{part.__qualname__}")
    elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        for start in range(0, len(part), 1024):  # data of one's own, read as methods read them
            _feed(digest, part[list(range(start, min(start + 1024, len(part))))])
    else:
        text = repr(part)  # an address is no content, and differs between processes
        unnamed = " at 0x" in text
        digest.update(f"{type(part).__qualname__}:{'' if unnamed else text};".encode())
        if unnamed and hasattr(part, "__dict__"):
            _feed(digest, _settings(part))
