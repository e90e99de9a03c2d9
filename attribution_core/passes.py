"""Passes of a training that are kept, and the products of their per-example gradients with directions.

What a backward pass shows of each layer, its input and the gradient of its output, is all that a
product with a per-example gradient needs, and the direction may come later. Passes that saw small layers are multiplied
together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.ghost import any_layer, rule_of
from attribution_core.gradients import ENGINES
from attribution_core.layers import Coverage, watched
from attribution_core.problem import Params
from attribution_core.steps import Steps

JOINED = 2**22  # bytes of passes that are multiplied together


class Use(NamedTuple):
    """One use of a layer: its input and the gradient of its output."""

    module: nn.Module
    names: dict[str, str]
    source: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """What is kept of the pass of a step."""

    step: int
    rows: NDArray[np.intp]
    clip: float  # what its gradient was multiplied with
    params: Params  # packed, that it started from, where they are needed
    pace: Params  # packed, what Adam multiplied its movement with
    uses: list[Use]

    @property
    def bytes(self) -> int:
        """What it holds, shared tensors once."""
        used = [x for use in self.uses for x in (use.source, use.gradient)]
        held = {x.data_ptr(): x.nbytes for x in (*used, *self.params.values(), *self.pace.values())}
        return sum(held.values())

    def fits(self, other: Pass) -> bool:
        """Whether the same layers saw rows of the same shapes."""
        return len(self.uses) == len(other.uses) and all(
            a.module is b.module
            and a.source.shape[1:] == b.source.shape[1:]
            and a.gradient.shape[1:] == b.gradient.shape[1:]
            for a, b in zip(self.uses, other.uses, strict=True)
        )


@dataclass(eq=False)
class Passes:
    """The passes of a training as one of the engines of `directional` sees them."""

    steps: Steps
    engine: str
    coverage: Coverage
    uses: list[Use] = field(default_factory=list)  # of the pass that is under way
    hooks: ExitStack = field(default_factory=ExitStack)
    size: int = 0

    def __post_init__(self) -> None:
        model = self.steps.problem.model
        self.known = all(
            rule_of(m) is not any_layer
            for m in model.modules()
            if any(p.requires_grad for p in m.parameters(recurse=False))
        )
        self.bare = None if self.known else copy.deepcopy(model)

    def watch(self, size: int) -> None:
        """Watch the layers in passes of so many rows."""
        if self.engine != "ghost" or size == self.size:
            return
        problem = self.steps.problem
        self.hooks.close()
        names, shared = set(problem.params), self.coverage.is_shared
        watching = watched(problem.model, names, size, self._arrive, shared=shared)
        self.hooks.enter_context(watching)
        self.size = size

    def _arrive(self, *use: Any) -> None:
        seen = Use(*use)
        self.coverage.check(self.size, seen.names, seen.source, seen.gradient)
        self.uses.append(seen)

    def taken(self) -> list[Use]:
        """What was seen since the last call."""
        seen, self.uses = self.uses, []
        return seen

    @property
    def stateless(self) -> bool:
        """Whether products are formed without the parameters that the steps started from."""
        return self.engine == "ghost" and self.known

    def joined(self, passes: list[Pass], alike: Callable[[int], int]) -> Iterator[list[Pass]]:
        """Neighbours that are multiplied together, at most alike(step) from a step on."""
        block: list[Pass] = []
        most = size = 0
        for one in passes:
            if block and not (
                self.stateless
                and len(block) < most
                and (len(block) + 1) * size <= JOINED
                and block[0].fits(one)
            ):
                yield block
                block = []
            if not block:
                most, size = alike(one.step), one.bytes
            block.append(one)
        if block:
            yield block

    def products(self, block: list[Pass], vectors: Params) -> Tensor:
        """(w_i / B) ⟨∇ℓ_i, v⟩ for the rows of passes, [rows, t]; gradients are of the weighted mean."""
        if self.engine == "ghost":
            uses = zip(*(one.uses for one in block), strict=True)
            return torch.stack([self._share(same, block[0], vectors) for same in uses]).sum(0)
        steps, (one,) = self.steps, block
        found = ENGINES[self.engine](
            steps.problem.model, steps.problem.loss, steps.packing.unpack(one.params), vectors,
            steps.batch(one.step, one.rows),
        )  # fmt: skip
        w = torch.from_numpy(steps.weights_at(one.step, one.rows)).to(found)
        return w[:, None] / len(one.rows) * found

    def _share(self, uses: tuple[Use, ...], one: Pass, vectors: Params) -> Tensor:
        """What the same use of a layer adds in every pass, [rows, t]."""
        module, names, source, gradient = uses[0]
        if len(uses) > 1:
            source = torch.cat([use.source for use in uses])
            gradient = torch.cat([use.gradient for use in uses])
        held = {local: vectors[name] for local, name in names.items()}
        if isinstance(module, nn.LayerNorm) and len(held) == 2:  # as it acted, with v in its place
            shape, eps = module.normalized_shape, module.eps
            return torch.stack(
                [
                    F.layer_norm(source, shape, v, bias, eps).mul_(gradient).flatten(1).sum(1)
                    for v, bias in zip(held["weight"], held["bias"], strict=True)
                ],
                dim=1,
            )
        rule = rule_of(module)
        if rule is any_layer:  # differentiates the layer where it stood
            module = self._stood(module, names, self.steps.packing.unpack(one.params))
        shares = rule(module, source, gradient, held)
        return torch.stack(list(shares.values())).sum(0) if len(shares) > 1 else shares.popitem()[1]

    def _stood(self, module: nn.Module, names: dict[str, str], params: Params) -> nn.Module:
        """A copy of a layer with the parameters that it had."""
        modules = self.steps.problem.model.named_modules()
        assert self.bare is not None
        layer = self.bare.get_submodule(next(name for name, m in modules if m is module))
        for local, parameter in names.items():
            getattr(layer, local).copy_(params[parameter])
        return layer
