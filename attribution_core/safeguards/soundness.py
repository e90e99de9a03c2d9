"""Whether a loss is what attribution takes it to be: a function of the parameters by name and of its own row.

Layers are looked at first (`refuse_random_layers`). What no list of layers can cover (noise drawn in a forward pass,
buffers that it changes, rows that see one another) is found by passing a few rows through.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attribution_core.calling import Params, PerExample, call, in_eval_mode, trainable
from attribution_core.data import Batch, Data, rows_in, take, tensors_in
from attribution_core.disk.behaviour import KEPT_BY_TORCH, SCALAR
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.joining import parts_of
from attribution_core.layerwise.layers import owners
from attribution_core.layerwise.vectors import normal_like
from attribution_core.precision import rounding
from attribution_core.problem import Outputs, Problem
from attribution_core.safeguards.refusals import batch_norms, refuse_random_layers
from attribution_core.safeguards.swapping import refuse_hidden_parameters

TRIED = 8  # rows that are passed through together, and some of them alone
ALONE = 2
NESTED = 4  # containers in one another that are looked into; one may hold itself
APART = 1e-3  # relative difference of losses, far above the rounding of float32
# relative difference of outputs: those that compare rows change by their own size; bfloat16 inside a float32 model
# (batches of other sizes use other kernels) changes by less
COMPARED = 0.25
STEP = 1e-6  # of a central difference in float64, in norms of the parameters
STOPPED = 0.02  # relative difference of slopes, above what a kink within a step makes
SMALL = 1e-2  # nats added to the size that differences are compared with: losses near 0 are all rounding

# those that were found to be, and which of their modules were in training mode then
_SOUND: WeakKeyDictionary[Problem, tuple[bool, ...]] = WeakKeyDictionary()
# and of which models, copies of one another, see `_kind`
_OF_ROWS: WeakKeyDictionary[Outputs, tuple[Any, ...]] = WeakKeyDictionary()


def refuse_unsound(problem: Problem, rows: NDArray[np.intp] | None = None) -> None:
    """Raise where losses are no functions of parameters and rows, at the model as it stands; tried once a problem.

    Raises:
        ValueError: dropout or batch norm in training mode; a forward pass that draws random numbers or changes
            buffers; losses that depend on the other rows of a batch; parameters that swapping does not reach.
    """
    refuse_random_layers(problem.model)
    modes = tuple(module.training for module in problem.model.modules())
    if _SOUND.get(problem) == modes:
        return
    few = (np.arange(problem.n) if rows is None else rows)[:TRIED]
    try:
        batch = take(problem.train, few, problem.device)
    except Exception:
        return  # whatever it is, the pass that is really needed says it
    refuse_restless(problem.train, few)
    tried = _Rows(problem.model, problem.loss, batch)
    with nothing_else_changes(problem.model, "call model.eval()"):
        together = tried.at(problem.params)
    alone = tried.mixed(problem.params, together, APART)
    if alone is not None and together is not None:
        raise ValueError(
            f"expected a loss for each row that does not depend on the other rows of its batch, got "
            f"{together[: len(alone)].tolist()} beside {len(together) - 1} others and {alone.tolist()} alone; divide by constants "
            "(a mean over a batch's tokens is no loss of a row), and use GroupNorm where statistics are a batch's own"
        )
    refuse_hidden_parameters(
        problem.model, problem.loss, lambda: take(problem.train, few[:2], problem.device)
    )
    _SOUND[problem] = modes


def refuse_restless(data: Data, rows: NDArray[np.intp]) -> None:
    """Raise where data give something else the second time (shuffled or augmented rows), or another first row by itself.

    By itself only columns of a row for each are looked at; those padded to the longest row of a batch may have another
    shape then.
    """
    first, again, alone = (take(data, some) for some in (rows, rows, rows[:1]))
    twice = zip_longest(tensors_in(first), tensors_in(again))
    if not all(_same(a, b) for a, b in twice):
        raise ValueError(
            f"expected data[rows] to give the same rows every time, got others for {rows[:5].tolist()} the second time; leave "
            "shuffling to the recipe, and hand augmentation to Recipe(augment=), a function of batch, rows and step"
        )
    single = _of_rows(alone, 1)
    beside = {k: x[:1] for k, x in _of_rows(first, len(rows)).items() if k in single}
    moved = [k for k, x in beside.items() if x.shape == single[k].shape and not _same(x, single[k])]
    if moved:
        raise ValueError(
            f"expected data[rows] to give each row as it is by itself, got row {rows[0]} alone other than beside {len(rows) - 1} "
            f"more in column {moved[0]}; make no column out of a batch, or leave it out"
        )


def _of_rows(batch: Batch, count: int) -> dict[int, Tensor]:
    """The columns that have a row for each of so many, by place."""
    columns = dict(enumerate(tensors_in(batch)))
    return {
        k: x for k, x in columns.items()
        if x.layout == torch.strided and x.ndim and len(x) == count
    }  # fmt: skip


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether columns are equal, NaN to itself."""
    if a is None or b is None or a.shape != b.shape or a.layout != b.layout:
        return False
    one, other = (x if x.layout == torch.strided else x.to_dense() for x in (a, b))
    return bool(((one == other) | ((one != one) & (other != other))).all())


def refuse_mixed_outputs(model: nn.Module, outputs: Outputs) -> None:
    """Raise where outputs change by much with the other rows of their batch, at the model as it stands; tried once
    a kind of model.

    Raises:
        ValueError: batch norm without running statistics; outputs of one of the first rows alone that are others
            than beside more rows.
    """
    with in_eval_mode(model):
        for name, _ in batch_norms(model):
            raise ValueError(
                f"expected an output for each row, got batch norm without running statistics in {name!r}, which "
                "mixes the rows of a batch of outputs; use GroupNorm or track_running_stats=True"
            )
    kind = _kind(model)
    if _OF_ROWS.get(outputs) == kind:
        return
    for part in parts_of(outputs):
        _refuse_mixed(model, part)
    _OF_ROWS[outputs] = kind


def _refuse_mixed(model: nn.Module, outputs: Outputs) -> None:
    """`refuse_mixed_outputs` for the first rows of one kind."""
    params = trainable(model)
    device = next(iter(params.values())).device
    try:
        batch = take(outputs.data, np.arange(min(TRIED, len(outputs.data))), device)
    except Exception:
        return  # whatever it is, the pass that is really needed says it
    refuse_restless(outputs.data, np.arange(rows_in(batch)))
    tried = _Rows(model, outputs.function, batch)
    with torch.random.fork_rng([]), in_eval_mode(model):
        together, again = tried.at(params), tried.at(params)
        if together is None or again is None or not torch.equal(together, again):
            return  # they draw random numbers
        alone = tried.mixed(params, together, COMPARED)
    if alone is not None:
        raise ValueError(
            f"expected an output for each row that does not depend on the other rows of its batch, got "
            f"{together[: len(alone)].tolist()} beside {len(together) - 1} others and {alone.tolist()} alone; compare rows "
            "with constants, or with rows that the function holds itself"
        )


def _kind(model: nn.Module) -> tuple[Any, ...]:
    """What the copies of a model have in common, and other models rarely have: the names, types and attributes of its
    modules, as far as these are plain values, functions, arrays, or containers of such.

    Runs hand out a new copy each time; modes, parameters and buffers, which training changes, are left out, as are
    objects' insides.
    """
    return tuple(
        (
            name,
            type(module),
            {key: _alike(vars(module)[key]) for key in vars(module).keys() - KEPT_BY_TORCH},
        )
        for name, module in model.named_modules()
    )


def _alike(value: Any, depth: int = 0) -> Any:
    """What compares equal for an attribute and its deep copy."""
    if isinstance(value, (Tensor, np.ndarray)):
        return fingerprint(value)
    if isinstance(value, types.MethodType):  # a copy's is bound to the copy
        return value.__func__
    if isinstance(
        value, (*SCALAR, type, torch.dtype, types.FunctionType, types.BuiltinFunctionType)
    ):
        return value
    if depth < NESTED and isinstance(value, Mapping):
        return {key: _alike(item, depth + 1) for key, item in value.items()}
    if depth < NESTED and isinstance(value, (list, tuple)):
        return [_alike(item, depth + 1) for item in value]
    if isinstance(value, functools.partial):
        return value.func, _alike(value.args, depth), _alike(value.keywords, depth)
    return type(value)


def stopped(problem: Problem) -> bool:
    """Whether autograd's derivatives are not the loss's own: something is detached, or rounded straight through.

    Along a random direction v, in float64: |⟨∇ℓ, v⟩ − (ℓ(θ + hv) − ℓ(θ − hv)) / 2h| beside ‖∇ℓ ⊙ v‖. Where nothing
    can be said (a model that is no float64's, a loss that fails), nothing is.
    """
    try:
        refuse_random_layers(problem.model)
        batch = take(problem.train, np.arange(min(TRIED, problem.n)), problem.device)
        batch = tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)
        wide = {name: value.double() for name, value in problem.params.items()}
        v = {
            name: noise * wide[name].norm().clamp(min=1) / noise.numel() ** 0.5
            for name, noise in normal_like(wide).items()
        }
        for module, own in owners(problem.model, set(wide)).items():
            if getattr(module, "padding_idx", None) is not None:  # stands still in every training
                v[own["weight"]][module.padding_idx] = 0.0
        leaf = {name: value.clone().requires_grad_() for name, value in wide.items()}
        total = call(problem.model, problem.loss, leaf, batch).sum()
        found = torch.autograd.grad(total, list(leaf.values()), materialize_grads=True)
        slopes = torch.cat([(g * x).flatten() for g, x in zip(found, v.values(), strict=True)])
        tried = _Rows(problem.model, problem.loss, batch)
        ends = [
            tried.at({name: value + h * v[name] for name, value in wide.items()})
            for h in (STEP, -STEP)
        ]
    except Exception:
        return False
    if ends[0] is None or ends[1] is None:
        return False
    moved = (ends[0].sum() - ends[1].sum()) / (2 * STEP)
    return bool((slopes.sum() - moved).abs() > STOPPED * (slopes.norm() + moved.abs()))


@contextmanager
def nothing_else_changes(model: nn.Module, cure: str) -> Iterator[None]:
    """Raise where passes through a model draw random numbers or change its buffers, but for batch norm's."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def generators() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if cuda else [])]

    before = generators()
    yield
    if not all(torch.equal(a, b) for a, b in zip(before, generators(), strict=True)):
        raise ValueError(
            "expected a forward pass without random numbers, got one that draws them (functional "
            f"dropout, drop path, noise); {cure}"
        )
    now = dict(model.named_buffers())
    # what a first pass makes, tables of positions say, is no change
    kept = [k for k, v in buffers.items() if k in now and now[k].shape == v.shape]
    changed = [k for k in kept if not torch.allclose(now[k], buffers[k], 0, 0, equal_nan=True)]
    if changed:
        with torch.no_grad():
            for name in changed:
                now[name].copy_(buffers[name])
        raise ValueError(
            f"expected a forward pass that leaves buffers alone (batch norm's apart), got changed "
            f"{changed[:5]}; put the layer into eval mode"
        )


@dataclass(frozen=True, eq=False)
class _Rows:
    """A few rows, and what is asked of each: losses, or outputs."""

    model: nn.Module
    function: PerExample
    batch: Batch

    def at(self, params: Params) -> Tensor | None:
        """[b], real; None where they cannot be computed: the pass that is needed then says why."""
        try:
            with torch.no_grad():
                found = call(self.model, self.function, params, self.batch)
        except Exception:
            return None
        if found.shape != (rows_in(self.batch),):
            return None
        # bool has no difference, and that of unsigned numbers wraps
        return found if found.is_floating_point() else found.double()

    def alone(self, params: Params) -> Tensor | None:
        """Of the first rows, each by itself."""
        found = [
            replace(self, batch=tree_map(lambda x, k=k: x[k : k + 1], self.batch)).at(params)
            for k in range(min(ALONE, rows_in(self.batch)))
        ]
        known = [one for one in found if one is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def mixed(self, params: Params, together: Tensor | None, apart: float) -> Tensor | None:
        """What the first rows give alone, if that differs from what they give beside others, also in float64."""
        alone = self.alone(params)
        if together is None or alone is None or not _apart(together, alone, params, apart):
            return None
        # what is small beside what cancels in it differs by rounding
        wide = {name: value.double() for name, value in params.items()}
        doubled = tree_map(lambda x: x.double() if x.is_floating_point() else x, self.batch)
        exact = replace(self, batch=doubled)
        again, again_alone = exact.at(wide), exact.alone(wide)
        known = again is not None and again_alone is not None
        return None if known and not _apart(again, again_alone, wide, apart) else alone


def _apart(together: Any, alone: Any, params: Params, apart: float) -> bool:
    """Whether losses differ by more than rounding."""
    eps = max(rounding(value) for value in params.values())
    most = max(apart, 8 * eps) * (together.abs().max() + SMALL)
    return bool(((together[: len(alone)] - alone).abs() > most).any())
