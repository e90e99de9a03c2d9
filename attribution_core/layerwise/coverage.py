"""Whether ghost products hold for a model: found out by trial, on rows from all over the data.

No list of layer types is enough: weights are used outside their module, batches are folded into another dimension,
a subclass has another forward, rows are taken apart or put into another order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from attribution_core.calling import Params, call
from attribution_core.data import Batch, rows_in, take
from attribution_core.layerwise.ghost import any_layer, layer_shares, rule_of
from attribution_core.layerwise.layers import Coverage, Names, owners, sees_all, watched
from attribution_core.layerwise.vectors import normal_like
from attribution_core.precision import roomy, rounding
from attribution_core.problem import Problem

TRIED, TRIALS = 8, 4  # rows of a batch on which ghost products are tried, and such batches at most
SHARE = 8  # of this many rows one is tried
NOISE = 0.1  # of a parameter's size: moves parameters whose gradients vanish where they stand
LEAST = 0.02  # how far they are moved at least
FEW_EPS = 8  # roundings that add up
# eps to this power, 4e-10 in float64 and 7e-5 in float32, is what they add up to in deep networks, below a small term that
# is missed; where a product is rounded coarsely, in half precision and in a GPU's TF32, it is a few of its roundings
POWER, COARSE = 0.6, 1e-4

Shares = Callable[[Tensor], bool]
SHARING: tuple[Shares, ...] = (
    lambda source: True,
    lambda source: not source.is_floating_point(),  # positions alone
    lambda source: False,
)


@torch.enable_grad()  # whatever the caller is in
def coverage_of(problem: Problem, rows: NDArray[np.intp]) -> Coverage:
    """What ghost products cover, tried on some of the rows, drawn from all.

        Σ_i w_i share_i = ⟨∇ Σ_i w_i ℓ_i, v⟩        w random: a share that went to another row shows as well

    A last layer initialised at zero hides every layer before it, so parameters without an effect are perturbed and
    tried again. If they stay hidden they count as covered only in layer types with a rule. What a few rows do not
    show (a forward pass that orders rows by something rare) is not found.
    """
    many = min(len(rows), max(TRIED, min(TRIED * TRIALS, len(rows) // SHARE)))
    drawn = np.random.default_rng(0).choice(rows, many, replace=False)
    parts = np.array_split(drawn, math.ceil(many / TRIED))
    trial = _Trial(problem)
    try:
        for part in parts:
            trial.compare(problem.params, part)
        if trial.hidden and not trial.wrong:
            trial.compare(_moved(problem.params), parts[0], trial.hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # for example a layer that needs more than its input; plain autograd says what else is wrong
        return Coverage(frozenset(problem.params))
    wrong = trial.wrong | trial.hidden - _held_by_rules(problem)
    return Coverage(
        frozenset(wrong),
        frozenset(problem.params.keys() - trial.arrived - wrong),
        frozenset(trial.shared),
    )


def skipped(problem: Problem, rows: NDArray[np.intp]) -> set[str]:
    """Parameters of layers that some of a few rows pass through and others, by themselves, do not.

    Ghost products hold for them, where a batch is seen whole; sums of their inputs depend on what else is in it.
    What one row in many skips is found as far as these rows show.
    """
    some = np.random.default_rng(0).choice(rows, min(len(rows), TRIED * TRIALS), replace=False)
    try:
        called = [_called(problem, row) for row in some]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes no single rows
        return set()
    return set().union(*called) - called[0].intersection(*called)


def _called(problem: Problem, row: int) -> set[str]:
    """Parameters of the layers that a row passes through."""
    names: set[str] = set()
    batch = take(problem.train, [row], problem.device)

    def note(module: nn.Module, own: Names, *_: Tensor) -> None:
        names.update(own.values())

    with watched(problem.model, set(problem.params), 1, lambda *_: None, note):
        call(problem.model, problem.loss, problem.params, batch)
    return names


def _moved(params: Params) -> Params:
    """Parameters a little way off."""
    found = {}
    for name, noise in normal_like(params).items():
        size = NOISE * params[name].float().square().mean().sqrt()
        found[name] = params[name] + noise * size.clamp(min=LEAST).to(noise)
    return found


def _held_by_rules(problem: Problem) -> set[str]:
    """Parameters that layers with a rule hold, and nothing else."""
    known: set[str] = set()
    other: set[str] = set()
    for module, names in owners(problem.model, set(problem.params)).items():
        ruled = rule_of(module) is not any_layer or isinstance(module, _ConvNd)
        (known if ruled else other).update(names.values())
    return known - other


class _Trial:
    """Ghost products beside plain autograd, on a batch at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem
        noise = normal_like(problem.params)
        self.probe = {name: v.to(roomy(v.dtype))[None] for name, v in noise.items()}
        self.rng = np.random.default_rng(1)
        self.wrong: set[str] = set()
        self.used: set[str] = set()
        self.reached: set[str] = set()
        self.arrived: set[str] = set()  # whose layers some rows reached
        self.shared: set[str] = set()  # whose layers saw one row for all

    @property
    def hidden(self) -> set[str]:
        """Used by the rows so far, without effect."""
        return self.used - self.reached

    def compare(
        self, params: Params, rows: NDArray[np.intp], judged: set[str] | None = None
    ) -> None:
        """Try the parameters, or those that are `judged`, on a batch."""
        batch = take(self.problem.train, rows, self.problem.device)
        seen = self.seen(params, batch)
        self.arrived |= seen.scale.keys() | seen.strays
        self.shared |= seen.shared
        gradients, w = self.plain(params, batch)
        for name, v in self.probe.items():
            if judged is not None and name not in judged:
                continue
            products = gradients.get(name, torch.zeros_like(v)) * v
            apart = (w.to(seen.shares[name]) @ seen.shares[name] - products.sum()).abs()
            off = _off(rounding(params[name])) * products.norm().item()
            # a gradient that no layer shows: in half precision all of it may be "off"
            unseen = name not in seen.scale and bool(products.any())
            if (
                apart > max(off, seen.rounding(name, params[name]), 1e-12)
                or unseen
                or name in seen.strays
            ):
                self.wrong.add(name)
            if products.any():
                self.reached.add(name)
        self.used |= gradients.keys()

    def seen(self, params: Params, batch: Batch) -> _Seen:
        """A pass with hooks, in which layers of one row share it as far as that fits together."""
        for shares in SHARING:
            try:
                return _Seen.of(self.problem, params, self.probe, batch, shares)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a layer that saw one row by chance, or one on its own
                if shares is SHARING[-1]:
                    raise
        raise AssertionError("unreachable")

    def plain(self, params: Params, batch: Batch) -> tuple[Params, Tensor]:
        """(∇ Σ_i w_i ℓ_i by parameters that it depends on, w [b])."""
        leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
        values = call(self.problem.model, self.problem.loss, leaf, batch)
        # powers of two, which rounding does not see
        drawn = self.rng.choice([-2, -1, -0.5, 0.5, 1, 2], len(values))
        w = torch.from_numpy(drawn).to(values)
        found = torch.autograd.grad((w * values).sum(), list(leaf.values()), allow_unused=True)
        return {name: g for name, g in zip(leaf, found, strict=True) if g is not None}, w


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a pass with hooks shows of every parameter.

    Args:
        shares: [b] along one direction.
        scale: norms of the terms that gradients are sums of.
        strays: those of layers that saw other rows than the batch's.
        shared: those of layers whose one row was taken for all.
    """

    shares: dict[str, Tensor]
    scale: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    strays: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, problem: Problem, params: Params, probe: Params, batch: Batch, shares: Shares
    ) -> _Seen:
        """Pass a batch; layers that see one row share it, where their input says so, or are strays."""
        b = rows_in(batch)
        seen = cls({name: v.new_zeros(b) for name, v in probe.items()})

        def shared(names: Names, source: Tensor) -> bool:
            if shares(source):
                seen.shared.update(names.values())
            return shares(source)

        def arrive(module: nn.Module, names: Names, source: Tensor, gradient: Tensor) -> None:
            if not sees_all(b, source, gradient):
                seen.strays.update(names.values())
                return
            found = layer_shares(module, names, source, gradient, probe)
            for local, share in found.items():
                seen.shares[names[local]] += share[:, 0]
                seen.scale[names[local]] += _terms(source, gradient)

        with watched(problem.model, set(params), b, arrive, shared=shared) as leaves:
            total = call(problem.model, problem.loss, params, batch).sum()
            torch.autograd.grad(total, leaves, allow_unused=True)
        return seen

    def rounding(self, name: str, value: Tensor) -> float:
        """How far rounding of its terms may move a parameter's product with a direction.

        Terms may cancel: the gradients of attention's key biases are zero, but for this. Half precision's rounding
        would excuse what is missed.
        """
        eps = torch.finfo(value.dtype).eps if value.dtype.itemsize >= 4 else 0.0
        return FEW_EPS * eps * self.scale.get(name, 0.0)


def _off(eps: float) -> float:
    """Of its terms' norm, how much rounding may move a sum."""
    return FEW_EPS * eps if eps > COARSE else eps**POWER


def _terms(source: Tensor, gradient: Tensor) -> float:
    """A bound on the norm of Σ_t d_t a_tᵀ before its terms cancel, with ones for inputs that are no numbers."""
    ones = (gradient.numel() / max(1, gradient.shape[-1])) ** 0.5
    inputs = source.float().norm().item() if source.is_floating_point() else 0.0
    return gradient.float().norm().item() * max(ones, inputs)
