"""Ghost products: one backward pass in which each layer's share of ⟨∇ℓ_i, v⟩ is taken as it passes by.

No weight gradient is formed. For a linear layer with inputs a_t and output gradients d_t the share of
example i along V is Σ_t d_tᵀ V a_t. A layer without a rule here takes the forward-mode derivative of
the layer alone, times its output gradient. Where parameters act outside their module nothing can be
taken, and `ghost_uncovered` finds that out by trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from attribution_core.data import Batch, batches, rows_in, take
from attribution_core.layers import is_norm, norm_gradients, owners, watched
from attribution_core.problem import (
    Params,
    PerExample,
    Problem,
    call,
    normal_like,
    precision_of,
    rounding,
)

LAYER_ELEMENTS = 2**22  # of one layer's per-example products held at once (16 MiB in float32)
TRIED, TRIALS = 4, 8  # rows of a batch on which ghost products are tried, and such batches at most
COMPARED = 2  # of its rows, each with a backward pass of its own
NOISE = (
    0.1  # of a parameter's size, or .02: moves parameters whose gradients vanish where they stand
)


class NotCovered(ValueError):
    """A layer that does not see every row of a batch, once and in order."""


def ghost(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] by hooks; see `ghost_shares`."""
    return torch.stack(list(ghost_shares(model, loss, params, vectors, batch).values())).sum(0)


def ghost_shares(
    model: nn.Module,
    loss: PerExample,
    params: Params,
    vectors: Params,
    batch: Batch,
    strays: set[str] | None = None,
) -> dict[str, Tensor]:
    """Each parameter's share [b, k] of the directional gradients, by one backward pass.

    For a linear layer with inputs a_t and output gradients d_t the share of example i is
    Σ_t d_tᵀ V a_t: one product per direction, or Σ_t d_t a_tᵀ formed once for many.

    Raises:
        NotCovered: a layer that saw other than b rows; with `strays` its parameters are put there instead.
    """
    b = rows_in(batch)
    count = len(next(iter(vectors.values())))
    some = next(iter(params.values()))
    shares = {name: some.new_zeros(b, count) for name in params}

    def arrive(module: nn.Module, names: dict[str, str], source: Tensor, gradient: Tensor) -> None:
        if not whole(b, source, gradient):
            if strays is None:
                raise NotCovered(unlike(b, names, source))
            strays.update(names.values())
            return
        held = {local: vectors[name] for local, name in names.items()}
        rule = norm if is_norm(module) else RULES.get(type(module).__name__, any_layer)
        for local, share in rule(module, source, gradient, held).items():
            shares[names[local]] += share

    with watched(model, set(params), b, arrive) as leaves:
        total = call(model, loss, params, batch).sum()
        torch.autograd.grad(total, leaves, allow_unused=True)
    return shares


def whole(b: int, source: Tensor, gradient: Tensor) -> bool:
    """Whether a layer saw a batch of b rows."""
    return source.ndim > 0 and len(source) == b == len(gradient)


def unlike(
    b: int, names: dict[str, str], source: Tensor, cure: str = "engine='jvp' or 'rows'"
) -> str:
    """What a layer saw instead of every row of a batch."""
    return (
        f"expected layers that see every row of a batch, got one that saw {tuple(source.shape)} of {b} rows "
        f"({', '.join(sorted(names.values())[:2])}), as where rows are told apart in a forward pass; use {cure}"
    )


def outer(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    """Σ_t left_tᵀ V_k right_t, [b, k], for left [b, T, r], right [b, T, c], V [k, r, c].

    One direction is multiplied into the wider side, so that what is held is [b, T, min(r, c)]. For
    many, Σ_t left_t right_tᵀ is formed once, a block of V's rows at a time.
    """
    b, _, r = left.shape
    c = right.shape[2]
    if len(vectors) == 1:
        v = vectors[0]
        product = (left @ v).mul_(right) if c < r else (right @ v.T).mul_(left)
        return product.flatten(1).sum(1)[:, None]
    size = max(1, LAYER_ELEMENTS // (b * c))
    total = vectors.new_zeros(b, len(vectors))
    for x, v in zip(left.split(size, dim=2), vectors.split(size, dim=1), strict=True):
        total += (x.mT @ right).flatten(1) @ v.flatten(1).T
    return total


Rule = Callable[[Any, Tensor, Tensor, Params], dict[str, Tensor]]


def linear(module: nn.Module, source: Tensor, gradient: Tensor, held: Params) -> dict[str, Tensor]:
    """nn.Linear (weight [o, i]) and transformers' Conv1D (weight [i, o])."""
    gradient = gradient.flatten(1, -2) if gradient.ndim > 2 else gradient[:, None]
    source = source.flatten(1, -2) if source.ndim > 2 else source[:, None]
    shares = {}
    if "weight" in held:
        pair = (gradient, source) if isinstance(module, nn.Linear) else (source, gradient)
        shares["weight"] = outer(*pair, held["weight"])
    if "bias" in held:
        shares["bias"] = gradient.sum(1) @ held["bias"].T
    return shares


def embedding(
    module: nn.Embedding, source: Tensor, gradient: Tensor, held: Params
) -> dict[str, Tensor]:
    """nn.Embedding: rows of the direction are looked up as the weights were; `call` keeps padding still."""
    looked_up = ((F.embedding(source, v) * gradient).flatten(1).sum(1) for v in held["weight"])
    return {"weight": torch.stack(list(looked_up), dim=1)}


def norm(module: Any, source: Tensor, gradient: Tensor, held: Params) -> dict[str, Tensor]:
    """LayerNorm, RMSNorm and GroupNorm: output = normalised ⊙ weight + bias."""
    rows = norm_gradients(module, source, gradient)
    return {local: rows[local].flatten(1) @ v.flatten(1).T for local, v in held.items()}


def any_layer(
    module: nn.Module, source: Tensor, gradient: Tensor, held: Params
) -> dict[str, Tensor]:
    """Any layer of one input tensor: forward-mode derivative of the layer alone, times its gradient."""
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}

    def share(name: str, direction: Tensor) -> Tensor:
        def layer(value: Tensor) -> Tensor:
            hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
            try:
                with precision_of(own):
                    return functional_call(module, {**own, name: value}, (source,))
            finally:
                module._forward_hooks = hooks

        return (jvp(layer, (own[name],), (direction,))[1] * gradient).flatten(1).sum(1)

    return {name: torch.stack([share(name, v) for v in vs], dim=1) for name, vs in held.items()}


RULES: dict[str, Rule] = {
    "Linear": linear,
    "Conv1D": linear,
    "Embedding": embedding,
}


def ghost_uncovered(problem: Problem, rows: np.ndarray) -> list[str]:
    """Parameters for which ghost products differ from plain autograd on a few rows, drawn from all.

    Catches what no list of layer types can: weights used outside their module, batches folded into
    another dimension, a forward of one's own under a known name, rows that are taken apart or put into another order. Where no row
    reaches a parameter (its gradient is zero), parameters are moved a little, for a last layer that starts at zero
    hides all before it. What is not reached then counts as covered only where nothing uses it, or a layer with a rule holds it.
    """
    params = problem.params
    drawn = np.random.default_rng(0).choice(rows, min(len(rows), TRIED * TRIALS), replace=False)
    moved = {name: value + noise * _size(value) for (name, value), noise in zip(
        params.items(), normal_like(params).values(), strict=True
    )}  # fmt: skip
    trial = _Trial(problem)
    for at in (params, moved):
        for some in batches(drawn, TRIED):
            if not trial.goes_on:
                return sorted(trial.wrong)
            try:
                trial.compare(at, take(problem.train, some, problem.device))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # a layer that needs more than its input, say; plain autograd tells what else is wrong
                return list(params)
    return sorted(trial.wrong | (trial.left & trial.used) - _held_by_rules(problem))


def _size(value: Tensor) -> Tensor:
    """[], how far a parameter is moved."""
    return (NOISE * value.float().square().mean().sqrt()).clamp(min=0.02).to(value)


def _held_by_rules(problem: Problem) -> set[str]:
    """Parameters that layers with a rule hold, and nothing else."""
    known: set[str] = set()
    other: set[str] = set()
    for module, names in owners(problem.model, set(problem.params)).items():
        ruled = is_norm(module) or type(module).__name__ in RULES or isinstance(module, _ConvNd)
        (known if ruled else other).update(names.values())
    return known - other


def _eps(v: Tensor) -> float:
    """Rounding of the largest gradient that may stand in one that is zero: none in half precision, where it hides what is missed."""
    return torch.finfo(v.dtype).eps if v.dtype.itemsize >= 4 else 0.0


class _Trial:
    """Ghost products beside plain autograd, on a batch at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.probe = {name: noise[None] for name, noise in normal_like(problem.params).items()}
        self.wrong: set[str] = set()
        self.left = set(problem.params)  # whose gradients have been zero so far
        self.used: set[str] = set()

    @property
    def goes_on(self) -> bool:
        return bool(self.left) and not self.wrong

    def compare(self, params: Params, batch: Batch) -> None:
        """Try the first rows of a batch."""
        model, loss = self.problem.model, self.problem.loss
        shares = ghost_shares(model, loss, params, self.probe, batch, self.wrong)
        for place in range(min(COMPARED, rows_in(batch))):
            leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
            # in the same batch: that its rows do not meet is another trial, and bfloat16 rounds it alike
            value = call(model, loss, leaf, batch)[place]
            gradients = torch.autograd.grad(value, list(leaf.values()), allow_unused=True)
            # gradients that are zero but for rounding, of attention's key biases say, are rounding of the largest
            largest = max((g.norm().item() for g in gradients if g is not None), default=0.0)
            for (name, v), g in zip(self.probe.items(), gradients, strict=True):
                products = torch.zeros_like(v) if g is None else g * v
                size = products.norm().item()
                # rounding of a sum scales with the norm of its terms; 1e-3 of it is far above
                # float32's and far below any missed term (bfloat16, with its 8 bits, needs .06)
                close = max(1e-3, 8 * rounding(v)) * size
                if (shares[name][place, 0] - products.sum()).abs() > max(
                    close, 1e-12, 8 * _eps(v) * largest * v.norm().item()
                ):
                    self.wrong.add(name)
                if size > 0:
                    self.left.discard(name)
                if g is not None:
                    self.used.add(name)
