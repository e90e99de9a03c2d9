"""What an object does, for its fingerprint: the code of one's own classes, its settings, the globals a function reads.

Nothing is called. Numbers may be counters and containers caches, which change as an object is used: an attribute that
a method sets again is no setting, nor is a container that is named in code which changes containers.
"""

from __future__ import annotations

import argparse
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

KEPT_BY_TORCH = frozenset(
    vars(nn.Module())
)  # _parameters ..., which are read by themselves; training
BARE = (types.SimpleNamespace, argparse.Namespace)  # nothing but their attributes
SCALAR = (bool, int, float, str, bytes, type(None))
SETTINGS = (
    float, str, np.ndarray, torch.Tensor, torch.dtype, functools.partial, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType, functools._lru_cache_wrapper, nn.Module,
)  # fmt: skip
CHANGING = {  # methods of containers
    "add", "append", "appendleft", "clear", "difference_update", "discard", "extend", "insert",
    "intersection_update", "pop", "popitem", "popleft", "remove", "reverse", "setdefault", "sort",
    "symmetric_difference_update", "update",
}  # fmt: skip
BUILT_BY = {"__init__", "__post_init__", "__new__", "__setstate__"}


def is_own(module: str | None) -> bool:
    """Whether a module is the user's: neither Python's, nor of an installed package, nor of this one."""
    top = (module or "builtins").partition(".")[0]
    path = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    known = top in sys.stdlib_module_names or top == __name__.partition(".")[0]
    return not known and not {"site-packages", "dist-packages"} & {*Path(path).parts}


def own_classes(cls: type) -> list[type]:
    """A class and those it inherits from, as far as they are the user's."""
    return [base for base in cls.__mro__ if is_own(base.__module__)]


def of_class(cls: type) -> dict[str, Any]:
    """A class's functions, and the plain attributes that its functions do not set or change, by name."""
    use = _Use.of([cls])
    found = {}
    for name, value in sorted(vars(cls).items()):
        functions = _functions(value)
        if functions:
            found[name] = functions
        elif not name.startswith("__") and name not in use.made and use.keeps(name, value):
            found[name] = value
    return found


def settings(part: Any) -> dict[str, Any]:
    """The attributes of an object that say what it does, by name.

    What a constructor was given under the same name (or _name), and public numbers with a fraction, texts, arrays and
    functions; of one's own classes also what is plain else, private where their constructors set it, unless their
    methods change it.
    """
    try:
        given = set(inspect.signature(type(part).__init__).parameters)
    except (TypeError, ValueError):
        given = set()
    classes = own_classes(type(part))
    use = _Use.of(classes)

    def tells(name: str, value: Any) -> bool:
        named = name.removeprefix("_") in given
        private = name.startswith("_")
        if (named and is_plain(value)) or (not private and isinstance(value, SETTINGS)):
            return True
        seen = bool(classes) and (name in use.made or not private)
        return seen and use.keeps(name, value)

    held = {name: value for name, value in vars(part).items() if name not in KEPT_BY_TORCH}
    return {name: held[name] for name in sorted(held) if tells(name, held[name])}


def read_globals(function: Any) -> dict[str, Any]:
    """Global numbers, texts and arrays that a function reads and does not set, and functions of its own module.

    Of one's own functions also what is plain else and not changed in them, and what they take from one's own modules.
    """
    scope, module = function.__globals__, function.__module__
    own = is_own(module)
    read, written = set(), set()
    found: dict[str, Any] = {}
    for code in _codes(function.__code__):
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for step, after in pairwise(steps):
            if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                written.add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(step.argval)
                at = scope.get(step.argval)
                if own and isinstance(at, types.ModuleType) and is_own(at.__name__):
                    found[f"{step.argval}.{after.argval}"] = vars(at).get(after.argval)
    found |= {name: scope[name] for name in read - written if name in scope}
    plain = (*SCALAR, np.ndarray, torch.Tensor, torch.dtype)
    still = own and not _changes(function.__code__)[1]
    return {
        name: value
        for name, value in sorted(found.items())
        if isinstance(value, plain)
        or (isinstance(value, types.FunctionType) and value.__module__ == module)
        or (still and is_plain(value))
    }


def is_plain(value: Any) -> bool:
    """Numbers, texts, functions, arrays, classes, objects of one's own classes, and containers of such."""
    if isinstance(value, Mapping):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return all(isinstance(item, SCALAR) for item in value)
    if isinstance(value, (*SCALAR, *SETTINGS, *BARE, type)):
        return True
    return is_own(type(value).__module__) and not is_data(value)


def is_data(value: Any) -> bool:
    """Whether rows are read from an object by their numbers."""
    return hasattr(type(value), "__len__") and hasattr(type(value), "__getitem__")


@dataclass(frozen=True)
class _Use:
    """What the functions of classes do with attributes.

    Args:
        made: those that constructors set, with the methods they name.
        set_again: those that other methods set.
        in_changing: those named in other methods that change containers.
    """

    made: frozenset[str]
    set_again: frozenset[str]
    in_changing: frozenset[str]

    @classmethod
    def of(cls, classes: Iterable[type]) -> _Use:
        """As their code has it."""
        functions = [
            (name, function.__code__)
            for one in classes
            for name, value in vars(one).items()
            for function in _functions(value)
        ]
        named = {other for name, code in functions if name in BUILT_BY for other in code.co_names}
        building = (named | BUILT_BY) - {"forward", "__call__"}
        made: set[str] = set()
        again: set[str] = set()
        changing: set[str] = set()
        for name, code in functions:
            stored, changes = _changes(code)
            if name in building:
                made |= stored
            else:
                again |= stored
                changing |= {name for one in _codes(code) for name in one.co_names if changes}
        return cls(frozenset(made), frozenset(again), frozenset(changing))

    def keeps(self, name: str, value: Any) -> bool:
        """Whether a plain attribute stays as it is while an object is used."""
        simple = isinstance(value, (*SCALAR, *SETTINGS))
        return (
            name not in self.set_again
            and is_plain(value)
            and (simple or name not in self.in_changing)
        )


def _functions(value: Any) -> list[types.FunctionType]:
    """The functions in what a class holds under a name: a method, a property, a cached or a static one."""
    if isinstance(value, types.FunctionType):
        return [value]
    wrapping = (
        staticmethod, classmethod, property, functools.cached_property, functools.partialmethod,
        functools._lru_cache_wrapper,
    )  # fmt: skip
    if not isinstance(value, wrapping):
        return []
    inner = (getattr(value, name, None) for name in ("fget", "fset", "func", "__wrapped__"))
    return [function for one in inner for function in _functions(one)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


@functools.lru_cache(2**12)  # a model has many modules of a class
def _changes(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """Names of attributes that code sets, and whether it changes a container: by an item, or by a method's name."""
    stored: set[str] = set()
    changes = False
    for one in _codes(code):
        for step in dis.get_instructions(one):
            if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
                stored.add(step.argval)
            changes |= step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
        changes |= not CHANGING.isdisjoint(one.co_names)
    return frozenset(stored), changes
