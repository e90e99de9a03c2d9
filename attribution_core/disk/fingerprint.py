"""Fingerprints: whether a folder's numbers were made of the same models, data, functions and settings."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from attribution_core.disk.behaviour import (
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

CALLED = (
    functools.partial, functools._lru_cache_wrapper, types.CodeType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType, type,
)  # fmt: skip
DRAWN = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
)  # what training mode changes


def fingerprint(*parts: Any) -> str:
    """sha256 of models, tensors, arrays, data, functions and settings: equal content, equal print.

    Classes and functions count by their code where they are the user's, installed ones by their names. Not seen are
    other versions of installed packages, files read on the way, and what may be a counter, a cache or a stamp of time:
    private attributes and containers that no constructor's parameter names, whole numbers that methods set, what a
    function counts and collects in a scope around it, objects among globals other than dataclasses, namespaces and
    dicts of plain values. Nor are hooks of torch, transformers and peft, which register some by themselves.
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
    elif hasattr(part, "_fingerprint") and not isinstance(part, type):
        digest.update(
            str(part._fingerprint).encode()
        )  # a datasets.Dataset, or data that know their own
    elif isinstance(part, nn.Module):
        for told in _of_module(part):
            _feed(digest, told)
    elif isinstance(part, torch.Tensor):
        _tensor(digest, part)
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
    elif isinstance(part, CALLED):
        _called(digest, part)
    elif isinstance(part, BARE):
        _feed(digest, dict(sorted(vars(part).items())))
    elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        for start in range(0, len(part), 1024):  # data of one's own, read as methods read them
            _feed(digest, part[list(range(start, min(start + 1024, len(part))))])
    else:
        text = repr(part)  # an address is no content, and differs between processes
        unnamed = " at 0x" in text
        digest.update(f"{type(part).__qualname__}:{'' if unnamed else text};".encode())
        if unnamed or is_own(type(part).__module__):
            digest.name(part)


def _of_module(model: nn.Module) -> Iterator[Any]:
    """What a model is: its weights, and what these alone do not tell (heads of a transformer, frozen parameters)."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    yield [_unplaced(str(model)), *map(_configuration, configs.values())]
    yield [name for name, p in model.named_parameters() if p.requires_grad]
    kept = model.state_dict()
    yield kept
    yield {name: buffer for name, buffer in model.named_buffers() if name not in kept}
    yield [[own_classes(type(m)), settings(m)] for m in model.modules()]
    if hooks := hooks_of(model):
        yield hooks
    yield [name for name, m in model.named_modules() if isinstance(m, DRAWN) and m.training]


def _tensor(digest: Any, part: torch.Tensor) -> None:
    if part.layout != torch.strided or part.is_meta:
        _feed(digest, [str(part.layout), list(part.shape), *_inside(part)])
        return
    flat = part.detach().cpu().contiguous()
    digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
    if flat.numel():  # as bytes: bfloat16 has no numpy counterpart
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())


def _called(digest: Any, part: Any) -> None:
    """Functions and classes, in all the ways they are handed around."""
    if isinstance(part, functools.partial):
        _feed(digest, ["partial", part.func, part.args, part.keywords])
    elif isinstance(part, types.CodeType):
        _feed(digest, [part.co_code, part.co_names, part.co_consts])
    elif isinstance(part, types.FunctionType):
        digest.name(part)
    elif isinstance(part, types.MethodType):
        _feed(digest, [part.__func__, part.__self__])
    elif isinstance(part, functools._lru_cache_wrapper):
        _feed(digest, ["cached", part.__wrapped__])
    else:
        _feed(digest, f"{part.__module__}.{part.__qualname__}")
        if isinstance(part, type) and is_own(part.__module__):
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
