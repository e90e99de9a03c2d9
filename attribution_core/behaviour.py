"""What an object does, for its fingerprint: the code of one's own classes, its settings, the globals a function reads.

Nothing is called. Whole numbers and containers may be counters and caches, which change as an object is used: they
are settings where no code beside them changes them.
"""

from __future__ import annotations

import argparse
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
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
    made, changed = _set_by([cls])
    found = {}
    for name, value in sorted(vars(cls).items()):
        functions = _functions(value)
        if functions:
            found[name] = functions
        elif not name.startswith("__") and name not in made | changed and is_plain(value):
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
    made, changed = _set_by(classes)

    def tells(name: str, value: Any) -> bool:
        named = name.removeprefix("_") in given
        private = name.startswith("_")
        if (named and is_plain(value)) or (not private and isinstance(value, SETTINGS)):
            return True
        seen = bool(classes) and (name in made or not private)
        return seen and name not in changed and is_plain(value)

    held = {name: value for name, value in vars(part).items() if name not in KEPT_BY_TORCH}
    return {name: held[name] for name in sorted(held) if tells(name, held[name])}


def read_globals(function: Any) -> dict[str, Any]:
    """Global numbers, texts and arrays that a function reads and does not set, and functions of its own module.

    Of one's own functions also what is plain else and not changed in them, and what they take from one's own modules.
    """
    scope, module = function.__globals__, function.__module__
    own = is_own(module)
    read, written, changed = set(), set(), _changes(function.__code__)[1]
    found: dict[str, Any] = {}
    for code in _codes(function.__code__):
        for step, after in pairwise(_steps(code)):
            if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                written.add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(step.argval)
                at = scope.get(step.argval)
                if own and isinstance(at, types.ModuleType) and is_own(at.__name__):
                    found[f"{step.argval}.{after.argval}"] = vars(at).get(after.argval)
    found |= {name: scope[name] for name in read - written if name in scope}
    plain = (*SCALAR, np.ndarray, torch.Tensor, torch.dtype)
    return {
        name: value
        for name, value in sorted(found.items())
        if isinstance(value, plain)
        or (isinstance(value, types.FunctionType) and value.__module__ == module)
        or (own and name not in changed and is_plain(value))
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


def _set_by(classes: Iterable[type]) -> tuple[set[str], set[str]]:
    """Attributes that constructors set, with the methods they name; and those that other methods set or change."""
    functions = [
        (name, function.__code__)
        for cls in classes
        for name, value in vars(cls).items()
        for function in _functions(value)
    ]
    named = {other for name, code in functions if name in BUILT_BY for other in code.co_names}
    building = (named | BUILT_BY) - {"forward", "__call__"}
    made: set[str] = set()
    changed: set[str] = set()
    for name, code in functions:
        stored, inside = _changes(code)
        if name in building:
            made |= stored
        else:
            changed |= stored | inside
    return made, changed


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


# --- bytecode ----------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]


@functools.lru_cache(2**12)  # a model has many modules of a class
def _changes(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of attributes that code sets, and of globals and attributes that it changes inside.

    x.n = 1 sets n and changes x; so do x.n += 1, x[k] = 1, x[k] += 1 and x.append(1) change x.
    """
    stored: set[str] = set()
    inside: set[str] = set()
    for one in _codes(code):
        steps = _steps(one)
        for k, step in enumerate(steps):
            if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
                stored.add(step.argval)
            at = _changed_by(steps, k)
            while at >= 0 and steps[at].opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME"):
                inside.add(steps[at].argval)
                at = at - 1 if steps[at].opname == "LOAD_ATTR" else -1
    return frozenset(stored), frozenset(inside)


def _changed_by(steps: list[dis.Instruction], k: int) -> int:
    """The step that loads what step k changes; −1 where it changes nothing."""
    name, arg = steps[k].opname, steps[k].arg
    if name in ("STORE_ATTR", "DELETE_ATTR", "DUP_TOP") or (name == "COPY" and arg == 1):
        return k - 1
    if name in ("LOAD_METHOD", "LOAD_ATTR") and steps[k].argval in CHANGING:
        return k - 1
    twice = name == "DUP_TOP_TWO" or (name == "COPY" and arg == 2)  # x[k] += 1 keeps x and k
    between = {"STORE_SUBSCR": 1, "DELETE_SUBSCR": 1, "STORE_SLICE": 2}.get(name, int(twice))
    if not between:
        return -1
    while between > 0 and k > 0:  # over the key, however it is computed
        k -= 1
        between -= dis.stack_effect(steps[k].opcode, steps[k].arg)
    return k - 1
