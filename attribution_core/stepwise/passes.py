"""Passes of a training that are kept, and the products of their per-example gradients with directions.

What a backward pass shows of each layer, its input and the gradient of its output, is all that a
product with a per-example gradient needs, and the direction may come later. Passes that saw small layers are multiplied
together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from attribution_core.calling import Params
from attribution_core.gradients import ENGINES
from attribution_core.layerwise.ghost import any_layer, linear, linear_each, rule_of
from attribution_core.layerwise.layers import Coverage, Names, edge, watched
from attribution_core.stepwise.steps import Steps

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

    def fits(self, other: Pass, rows: bool) -> bool:
        """Whether the same layers saw rows of the same shapes, and as many of them if `rows`."""
        skip = 0 if rows else 1
        return len(self.uses) == len(other.uses) and all(
            a.module is b.module
            and a.source.shape[skip:] == b.source.shape[skip:]
            and a.gradient.shape[skip:] == b.gradient.shape[skip:]
            for a, b in zip(self.uses, other.uses, strict=True)
        )


@dataclass(eq=False)
class Passes:
    """The passes of a training as one of the engines of `directional` sees them."""

    steps: Steps
    engine: str
    coverage: Coverage
    called: list[tuple[GradientEdge, nn.Module, Names, Tensor, torch.Size]] = field(
        default_factory=list
    )  # layers, in the pass that is under way
    uses: list[Use] = field(default_factory=list)  # of the pass that was last
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
        watching = watched(problem.model, names, size, None, self._called, shared=shared)
        self.hooks.enter_context(watching)
        self.size = size

    def _called(self, module: nn.Module, names: Names, source: Tensor, output: Tensor) -> None:
        self.called.append((edge(output), module, names, source, output.shape))

    def edges(self) -> list[GradientEdge]:
        """What to differentiate the loss by, beside the parameters: a hook a layer would cost thrice as much."""
        return [use[0] for use in self.called]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients that were found there; None where an output was not used."""
        called, self.called, self.uses = self.called, [], []
        for (_, module, names, source, shape), gradient in zip(called, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.reshape(shape)
                self.coverage.check(self.size, names, source, gradient)
                self.uses.append(Use(module, names, source, gradient))

    @property
    def stateless(self) -> bool:
        """Whether products are formed without the parameters that the steps started from."""
        return self.engine == "ghost" and self.known

    def joined(self, passes: list[Pass], along: list[Params]) -> Iterator[slice]:
        """Neighbours that are multiplied together; `along` are the passes' directions, all one or each its own."""
        each = any(v is not along[0] for v in along)
        start = size = 0
        for k, (one, v) in enumerate(zip(passes, along, strict=True)):
            together = (
                self.stateless
                and (k - start + 1) * size <= JOINED
                and passes[start].fits(one, rows=each)
            )
            if k > start and not together:
                yield slice(start, k)
                start = k
            if k == start:
                size = one.bytes + sum(x.nbytes for x in v.values())
        if passes:
            yield slice(start, len(passes))

    def products(self, block: list[Pass], along: list[Params]) -> Tensor:
        """(w_i / B) ⟨∇ℓ_i, v⟩ for the rows of passes, each along its own direction, [rows, t]; gradients are of
        the weighted mean."""
        steps, unpack = self.steps, self.steps.packing.unpack
        one = block[0]
        if self.engine == "ghost":
            uses = zip(*(one.uses for one in block), strict=True)
            if all(v is along[0] for v in along):
                vectors = unpack(along[0])
                shares = [self._share(same, one, vectors) for same in uses]
            else:
                vectors = unpack({k: torch.stack([v[k] for v in along]) for k in along[0]})
                shares = [self._share_each(same, one, vectors) for same in uses]
            return torch.stack(shares).sum(0)
        found = ENGINES[self.engine](
            steps.problem.model, steps.problem.loss, unpack(one.params), unpack(along[0]),
            steps.batch(one.step, one.rows),
        )  # fmt: skip
        w = torch.from_numpy(steps.weights_at(one.step, one.rows)).to(found)
        return w[:, None] / len(one.rows) * found

    def _share_each(self, uses: tuple[Use, ...], one: Pass, vectors: Params) -> Tensor:
        """What the same use of a layer adds in every pass, each along its own direction, [rows, t]."""
        module, names, _, _ = uses[0]
        held = {local: vectors[name] for local, name in names.items()}
        some = next(iter(held.values()))
        if rule_of(module) is not linear or some.shape[1] > 1:
            each = [{name: vectors[name][k] for name in names.values()} for k in range(len(uses))]
            return torch.cat([self._share((u,), one, v) for u, v in zip(uses, each, strict=True)])
        source, gradient = (
            torch.stack(x) for x in zip(*((u.source, u.gradient) for u in uses), strict=True)
        )
        return sum_of(linear_each(module, source, gradient, held))

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
        return sum_of(rule(module, source, gradient, held))

    def _stood(self, module: nn.Module, names: dict[str, str], params: Params) -> nn.Module:
        """A copy of a layer with the parameters that it had."""
        modules = self.steps.problem.model.named_modules()
        assert self.bare is not None
        layer = self.bare.get_submodule(next(name for name, m in modules if m is module))
        for local, parameter in names.items():
            getattr(layer, local).copy_(params[parameter])
        return layer


def sum_of(shares: dict[str, Tensor]) -> Tensor:
    """Of all parameters of a layer."""
    return torch.stack(list(shares.values())).sum(0) if len(shares) > 1 else shares.popitem()[1]
