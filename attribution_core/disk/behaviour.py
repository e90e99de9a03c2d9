"""What an object does, for its fingerprint: the code of one's own classes, its settings, the globals a function reads.

Nothing is called. Counters, caches and stamps of time change from one run to the next and are no settings: only what
constructors were given, numbers that no method sets again, and dicts of plain values that nothing changes are.
"""

from __future__ import annotations

import argparse
import dis
import enum
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

KEPT_BY_TORCH = frozenset(vars(nn.Module()))  # _parameters ..., read by themselves; training
BARE = (types.SimpleNamespace, argparse.Namespace)  # nothing but their attributes
SCALAR = (bool, int, float, str, bytes, type(None), enum.Enum)
SETTINGS = (
    float, str, enum.Enum, np.ndarray, torch.Tensor, torch.dtype, functools.partial, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType, functools._lru_cache_wrapper, nn.Module,
)  # fmt: skip
BUILT_BY = {"__init__", "__post_init__", "__new__", "__setstate__"}
CONTAINERS = (dict, list, set)
OF_DICTS = {"clear", "pop", "popitem", "setdefault", "update"}  # methods that change them
CHANGING = OF_DICTS | {"add", "append", "extend", "insert"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# packages that register hooks by themselves, some on a first pass: they ask for gradients, note and count
HOOKING = {"torch", "transformers", "peft", "accelerate", "attribution_core", "applied"}


def is_own(module: str | None) -> bool:
    """Whether a module is the user's: neither Python's, nor of an installed package, nor of this one."""
    top = (module or "builtins").partition(".")[0]
    if top == "__main__":
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    known = top in sys.stdlib_module_names or top == __name__.partition(".")[0]
    return not known and not {"site-packages", "dist-packages"} & {*Path(path).parts}


def own_classes(cls: type) -> list[type]:
    """A class and those it inherits from, as far as they are the user's."""
    return [base for base in cls.__mro__ if is_own(base.__module__)]


def of_class(cls: type) -> dict[str, Any]:
    """A class's functions, and the numbers and texts that they do not set, by name."""
    again = _set_again([cls])
    found: dict[str, Any] = {}
    for name, value in sorted(vars(cls).items()):
        if functions := _functions(value):
            found[name] = functions
        elif isinstance(value, SCALAR) and not name.startswith("__") and name not in again:
            found[name] = value
    return found


def attributes(part: Any) -> dict[str, Any]:
    """What an object holds by name, in slots as well."""
    slots = [(cls.__name__, vars(cls).get("__slots__", ())) for cls in type(part).__mro__]
    names = [
        f"_{cls.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for cls, some in slots
        for name in ([some] if isinstance(some, str) else some)
    ]
    held = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return {**held, **getattr(part, "__dict__", {})}


def settings(part: Any) -> dict[str, Any]:
    """The attributes of an object that say what it does, by name.

    What a constructor was given under the same name (or _name), and public numbers with a fraction, texts, arrays and
    functions; of one's own classes also whole numbers and arrays that no method but the constructor sets.
    """
    try:
        given = set(inspect.signature(type(part).__init__).parameters)
    except (TypeError, ValueError):
        given = set()
    classes = own_classes(type(part))
    again = _set_again(classes)

    def tells(name: str, value: Any) -> bool:
        if name.removeprefix("_") in given and is_plain(value):
            return True
        if classes and isinstance(value, (int, np.ndarray, torch.Tensor)) and name not in again:
            return True
        return not name.startswith("_") and isinstance(value, SETTINGS)

    held = {name: x for name, x in attributes(part).items() if name not in KEPT_BY_TORCH}
    return {name: held[name] for name in sorted(held) if tells(name, held[name])}


def hooks_of(model: nn.Module) -> list[Any]:
    """Hooks of a model's modules in their order, but for those that packages register by themselves."""
    return [
        [name, kind, hook]
        for name, module in model.named_modules()
        for kind in HOOKS
        for hook in getattr(module, kind).values()
        if _comes_from(hook) not in HOOKING
    ]


def _comes_from(hook: Any) -> str:
    """The package of a function, or of an object's class."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0]


def closed_over(function: Any) -> list[Any]:
    """What a function holds of the scopes around it, but for names it sets there and containers it changes there."""
    codes = list(_codes(function.__code__))
    left = _named_by(codes, ("STORE_DEREF", "DELETE_DEREF"))
    changed = _changed_in_scope(codes)
    cells = zip(codes[0].co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells if name not in left}
    return [x for name, x in held.items() if not (name in changed and isinstance(x, CONTAINERS))]


def read_globals(function: Any) -> dict[str, Any]:
    """Global numbers, texts and arrays that a function reads and does not set, and functions of its own module.

    Of one's own functions also configurations (dataclasses, namespaces, dicts of plain values that the function does
    not change), classes, those of other objects, and what they take from one's own modules.
    """
    scope, module = function.__globals__, function.__module__
    own = is_own(module)
    codes = list(_codes(function.__code__))
    read = _named_by(codes, ("LOAD_GLOBAL", "LOAD_NAME"))
    written = _named_by(codes, ("STORE_GLOBAL", "DELETE_GLOBAL"))
    changes = _changes_dicts(codes)
    found: dict[str, Any] = {}
    for code in codes:
        for step, after in pairwise(_steps(code)):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                at = scope.get(step.argval)
                if own and isinstance(at, types.ModuleType) and is_own(at.__name__):
                    found[f"{step.argval}.{after.argval}"] = vars(at).get(after.argval)
    found |= {name: scope[name] for name in read - written if name in scope}
    plain = (*SCALAR, np.ndarray, torch.Tensor, torch.dtype)
    told = {}
    for name, value in sorted(found.items()):
        beside = isinstance(value, types.FunctionType) and value.__module__ == module
        if isinstance(value, plain) or beside or (own and _configures(value, changes)):
            told[name] = value
        elif own and is_own(type(value).__module__):
            told[name] = type(value)
    return told


def is_plain(value: Any) -> bool:
    """Numbers, texts, functions, arrays and classes, and containers of such."""
    if isinstance(value, Mapping):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return all(isinstance(item, SCALAR) for item in value)
    configures = is_dataclass(value) and is_own(type(value).__module__)
    return configures or isinstance(value, (*SCALAR, *SETTINGS, *BARE, type))


def _configures(value: Any, changes: bool) -> bool:
    """Whether a global is a class or a function of one's own, or holds settings."""
    if isinstance(value, (type, types.FunctionType)):
        return is_own(value.__module__)
    if isinstance(value, BARE):
        value = vars(value)
    if type(value) is dict:
        simple = all(
            isinstance(x, SCALAR)
            or (isinstance(x, (list, tuple)) and all(isinstance(y, SCALAR) for y in x))
            for x in value.values()
        )
        return not changes and simple and all(isinstance(key, str) for key in value)
    return is_dataclass(value) and is_own(type(value).__module__)


def _set_again(classes: list[type]) -> set[str]:
    """Attributes that functions of classes set, but for their constructors."""
    codes = [
        code
        for cls in classes
        for name, value in vars(cls).items()
        for function in _functions(value)
        for code in _codes(function.__code__)
        if name not in BUILT_BY or code is not function.__code__
    ]
    return _named_by(codes, ("STORE_ATTR", "DELETE_ATTR"))


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


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]


def _named_by(codes: list[types.CodeType], operations: tuple[str, ...]) -> set[str]:
    """The names that some operations of codes are about."""
    return {step.argval for code in codes for step in _steps(code) if step.opname in operations}


def _changes_dicts(codes: list[types.CodeType]) -> bool:
    """Whether codes set an entry of anything, or call anything by the name of a method that changes dicts."""
    called = {name for code in codes for name in code.co_names}
    return not OF_DICTS.isdisjoint(called) or any(
        step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for code in codes for step in _steps(code)
    )


def _changed_in_scope(codes: list[types.CodeType]) -> set[str]:
    """The names around a function whose value, or an entry of it, it changes: x.append(...), x[k] = ..., x[k].add(...)."""
    changed = set()
    for code in codes:
        steps = _steps(code)
        for at, step in enumerate(steps):
            if step.opname == "LOAD_DEREF":
                first, second, third = [*steps[at + 1 : at + 4], *[step] * 3][:3]
                of_entry = second.opname == "BINARY_SUBSCR" or second.argrepr == "[]"  # Python 3.14
                method = third if of_entry else first
                called = method.opname in ("LOAD_ATTR", "LOAD_METHOD") and method.argval in CHANGING
                # COPY and DUP_TOP_TWO begin x[k] += ...
                if called or second.opname in (
                    "STORE_SUBSCR",
                    "DELETE_SUBSCR",
                    "COPY",
                    "DUP_TOP_TWO",
                ):
                    changed.add(step.argval)
    return changed
