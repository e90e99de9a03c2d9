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

from attribution_core.data import Batch, batches, rows_in, take
from attribution_core.layers import is_norm, norm_gradients, watched
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
TRIED = 16  # rows on which ghost products may be tried


def ghost(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] by hooks; see `ghost_shares`."""
    return torch.stack(list(ghost_shares(model, loss, params, vectors, batch).values())).sum(0)


def ghost_shares(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> dict[str, Tensor]:
    """Each parameter's share [b, k] of the directional gradients, by one backward pass.

    For a linear layer with inputs a_t and output gradients d_t the share of example i is
    Σ_t d_tᵀ V a_t: one product per direction, or Σ_t d_t a_tᵀ formed once for many.
    """
    b = rows_in(batch)
    count = len(next(iter(vectors.values())))
    some = next(iter(params.values()))
    shares = {name: some.new_zeros(b, count) for name in params}

    def arrive(module: nn.Module, names: dict[str, str], source: Tensor, gradient: Tensor) -> None:
        held = {local: vectors[name] for local, name in names.items()}
        rule = norm if is_norm(module) else RULES.get(type(module).__name__, any_layer)
        for local, share in rule(module, source, gradient, held).items():
            if len(share) == b:  # else a layer without a batch: `ghost_uncovered` finds it missing
                shares[names[local]] += share

    with watched(model, set(params), b, arrive) as leaves:
        total = call(model, loss, params, batch).sum()
        torch.autograd.grad(total, leaves, allow_unused=True)
    return shares


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
    """Parameters for which ghost products differ from plain autograd on the first two rows.

    Catches what no list of layer types can: weights used outside their module, batches folded into
    another dimension, a forward of one's own under a known name. Where the two rows do not reach a
    parameter (its gradient is zero), the next ones are tried, up to `TRIED`.
    """
    params, device = problem.params, problem.device
    probe = {name: noise[None] for name, noise in normal_like(params).items()}
    wrong: set[str] = set()
    reached: set[str] = set()
    for some in batches(rows[:TRIED], 2):
        batch = take(problem.train, some, device)
        try:
            shares = ghost_shares(problem.model, problem.loss, params, probe, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # a layer that needs more than its input, say; plain autograd tells what else is wrong
            return list(params)
        for place in range(len(some)):
            leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
            # in the same batch: that its rows do not meet is another trial, and bfloat16 rounds it alike
            value = call(problem.model, problem.loss, leaf, batch)[place]
            gradients = torch.autograd.grad(value, list(leaf.values()), allow_unused=True)
            for (name, v), g in zip(probe.items(), gradients, strict=True):
                products = torch.zeros_like(v) if g is None else g * v
                size = products.norm().item()
                # rounding of a sum scales with the norm of its terms; 1e-3 of it is far above
                # float32's and far below any missed term (bfloat16, with its 8 bits, needs .06)
                close = max(1e-3, 8 * rounding(v)) * size
                if (shares[name][place, 0] - products.sum()).abs() > max(close, 1e-12):
                    wrong.add(name)
                if size > 0:
                    reached.add(name)
        if wrong or len(reached) == len(params):
            break
    return sorted(wrong)
