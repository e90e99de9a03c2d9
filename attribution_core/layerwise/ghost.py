"""Ghost products: one backward pass in which each layer's share of ⟨∇ℓ_i, v⟩ is taken as it passes by.

No weight gradient is formed. For a linear layer with inputs a_t and output gradients d_t the share of
example i along V is Σ_t d_tᵀ V a_t. A layer without a rule here takes the forward-mode derivative of
the layer alone, times its output gradient. Where parameters act outside their module nothing can be
taken; `coverage` finds that out by trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from attribution_core.calling import Params, PerExample, call
from attribution_core.data import Batch, rows_in
from attribution_core.layerwise.layers import (
    UNTRIED,
    Coverage,
    Names,
    is_norm,
    norm_gradients,
    watched,
)
from attribution_core.precision import precision_of, roomy

LAYER_ELEMENTS = 2**22  # of one layer's per-example products held at once (16 MiB in float32)


def ghost(
    model: nn.Module,
    loss: PerExample,
    params: Params,
    vectors: Params,
    batch: Batch,
    coverage: Coverage = UNTRIED,
) -> Tensor:
    """Directional gradients [b, k] by one backward pass with hooks.

    For a linear layer with inputs a_t and output gradients d_t the share of example i is
    Σ_t d_tᵀ V a_t: one product per direction, or Σ_t d_t a_tᵀ formed once for many.

    Raises:
        NotCovered: a layer that saw other than b rows, or of which the trial knows nothing.
    """
    b = rows_in(batch)
    some = next(iter(vectors.values()))
    total = some.new_zeros(b, len(some))

    def arrive(module: nn.Module, names: Names, source: Tensor, gradient: Tensor) -> None:
        coverage.check(b, names, source, gradient)
        total.add_(sum(layer_shares(module, names, source, gradient, vectors).values()))

    with watched(model, set(params), b, arrive, shared=coverage.is_shared) as leaves:
        losses = call(model, loss, params, batch).sum()
        torch.autograd.grad(losses, leaves, allow_unused=True)
    return total


def layer_shares(
    module: nn.Module, names: Names, source: Tensor, gradient: Tensor, vectors: Params
) -> dict[str, Tensor]:
    """The shares [b, k] of one use of a layer's parameters, by their local names."""
    held = {local: vectors[name] for local, name in names.items()}
    source, gradient = (x.to(roomy(x.dtype)) for x in (source, gradient))  # as directions are
    return rule_of(module)(module, source, gradient, held)


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


def linear_each(
    module: nn.Module, source: Tensor, gradient: Tensor, held: Params
) -> dict[str, Tensor]:
    """`linear` of K batches together, each along one direction of its own: source and gradient [K, b, ..., width],
    directions [K, 1, *shape]; shares [K b, 1]."""
    k, b = source.shape[:2]
    shares = {}
    if "weight" in held:
        pair = (gradient, source) if isinstance(module, nn.Linear) else (source, gradient)
        left, right = (x.reshape(k, -1, x.shape[-1]) for x in pair)  # [K, b T, width]
        product = (left @ held["weight"].squeeze(1)).mul_(right)
        shares["weight"] = product.view(k * b, -1).sum(1)[:, None]
    if "bias" in held:
        total = gradient.reshape(k, b, -1, gradient.shape[-1]).sum(2)
        shares["bias"] = (total @ held["bias"].mT).flatten(0, 1)
    return shares


def embedding(
    module: nn.Embedding, source: Tensor, gradient: Tensor, held: Params
) -> dict[str, Tensor]:
    """nn.Embedding: rows of the direction are looked up as the weights were; `call` keeps padding still."""
    looked_up = ((F.embedding(source, v) * gradient).flatten(1).sum(1) for v in held["weight"])
    return {"weight": torch.stack(list(looked_up), dim=1)}


def norm(module: Any, source: Tensor, gradient: Tensor, held: Params) -> dict[str, Tensor]:
    """LayerNorm, RMSNorm and GroupNorm: output = normalised ⊙ weight + bias."""
    rows = {local: g.flatten(1) for local, g in norm_gradients(module, source, gradient).items()}
    # RMSNorm computes in float32 whatever the model does
    return {k: (rows[k] @ v.flatten(1).T.to(rows[k])).to(v) for k, v in held.items()}


def any_layer(
    module: nn.Module, source: Tensor, gradient: Tensor, held: Params
) -> dict[str, Tensor]:
    """Any layer of one input tensor: forward-mode derivative of the layer alone, times its gradient."""
    own = {k: p.detach().to(roomy(p.dtype)) for k, p in module.named_parameters(recurse=False)}

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


def rule_of(module: nn.Module) -> Rule:
    """How the shares of a layer's parameters are formed."""
    return norm if is_norm(module) else RULES.get(type(module).__name__, any_layer)
