"""Whether a model is what its parameters by name make of it, as every method here takes it to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attribution_core.calling import Params, PerExample, call, trainable
from attribution_core.data import Batch
from attribution_core.layerwise.vectors import normal_like
from attribution_core.precision import precision_of, rounding
from attribution_core.stepwise.steps import running_statistics

MOVED = 0.3  # how far parameters are moved, in root mean squares of their own
APART = 1e-3  # relative difference of two gradients, far above the rounding of float32


def refuse_hidden_parameters(
    model: nn.Module,
    function: PerExample,
    taken: Callable[[], Batch],
    *,
    copied: bool = False,
) -> None:
    """Raise where gradients with other parameters swapped in are not those of a model that holds them.

    So it is where activations are computed again during the backward pass, by which time the model's own
    parameters are back; where a weight is reached through a list or a closure; where, in a copy, something
    still calls the original. A step, a derivative or a copied model would then be wrong in silence.

    Args:
        taken: gives a few rows.
        copied: whether a copy of the model is to hold them, as a finished training's does.

    Raises:
        ValueError: they differ.
    """
    params, moved = trainable(model), {}
    for name, noise in normal_like(params).items():
        size = MOVED * params[name].float().square().mean().sqrt().item() + 1e-2
        moved[name] = params[name] + size * noise
    for name, module in model.named_modules():
        on = module.training and getattr(module, "gradient_checkpointing", False) is True
        if on and any(p.requires_grad for p in module.parameters()):
            raise ValueError(_words(f"activation checkpointing in {name or 'the model'!r},"))
    try:
        batch = taken()
        own = _held(model, function, moved, batch, copied)
    except Exception:
        return  # whatever it is, the pass that is really needed says it
    if not all(torch.isfinite(g).all() for g in own.values()):
        return
    try:
        swapped = _swapped(model, function, moved, batch)
    except torch.OutOfMemoryError:
        return
    except RuntimeError as error:
        raise ValueError(_words("an error")) from error
    size = torch.stack([g.double().norm() for g in own.values()]).norm()
    apart = {name: float((g - own[name]).double().norm()) for name, g in swapped.items()}
    worst = max(apart, key=lambda name: apart[name])
    eps = max(rounding(g) for g in own.values())
    if apart[worst] > max(APART, 8 * eps) * max(float(size), torch.finfo(torch.float32).tiny):
        raise ValueError(_words(f"another gradient for {worst!r}"))


def refuse_computed_weights(model: nn.Module) -> None:
    """Raise for layers whose hooks compute their weights, which torch cannot copy: pruned ones, or weight and
    spectral norm of the old kind.

    Raises:
        ValueError: there is one (names it); says what to use.
    """
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                cure = (
                    f"call torch.nn.utils.prune.remove on it for {hook._tensor_name!r}, or mask "
                    "it in a parametrization"
                )
            elif isinstance(hook, (WeightNorm, SpectralNorm)):
                cure = "use the norm of the same name in torch.nn.utils.parametrizations"
            else:
                continue
            raise ValueError(
                f"expected a model that can be copied, got a layer {name!r} whose weight a hook computes "
                f"({type(hook).__name__}); {cure}"
            )


def _words(got: str) -> str:
    return (
        f"expected a loss that is a function of the model's parameters by name, got {got} where others are "
        "swapped in than where the model holds them; turn activation (gradient) checkpointing off, reach every weight "
        "as a parameter of a module, not through a list or a closure, and let the loss call the model that it is given"
    )


def _held(
    model: nn.Module, function: PerExample, moved: Params, batch: Batch, copied: bool
) -> Params:
    """Plain autograd on a model that holds the parameters; the model itself is given its own back."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    holder = copy.deepcopy(model, frozen) if copied else model
    leaf: Any = {name: p for name, p in holder.named_parameters() if p.requires_grad}
    before = {} if copied else {name: p.detach().clone() for name, p in leaf.items()}
    try:
        _load(leaf, moved)
        with precision_of(moved), running_statistics(holder, {}):
            return _gradient(lambda: call(holder, function, {}, batch), leaf)
    finally:
        _load(leaf, before)


def _load(leaf: Params, values: Params) -> None:
    with torch.no_grad():
        for name, value in values.items():
            leaf[name].copy_(value)


def _swapped(model: nn.Module, function: PerExample, moved: Params, batch: Batch) -> Params:
    """As methods here differentiate."""
    leaf = {name: value.clone().requires_grad_() for name, value in moved.items()}
    with running_statistics(model, {}):  # which stay as they are
        return _gradient(lambda: call(model, function, leaf, batch), leaf)


def _gradient(act: Any, leaf: Params) -> Params:
    """∂ Σ act() by leaves, with the same random numbers each time and the global ones left alone."""
    device = next(iter(leaf.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            total: Tensor = act().sum()
            if not total.requires_grad:
                return {name: torch.zeros_like(value) for name, value in leaf.items()}
            found = torch.autograd.grad(total, list(leaf.values()), materialize_grads=True)
    dense = [g.to_dense() if g.is_sparse else g for g in found]
    return dict(zip(leaf, dense, strict=True))
