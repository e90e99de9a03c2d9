"""Layers whose gradients are not those of single rows, or not the same twice: dropout, batch norm, some embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def refuse_random_layers(model: nn.Module) -> None:
    """Raise where a forward pass is random or mixes examples: dropout or batch norm in training mode."""
    refuse_embeddings(model, "scale_grad_by_freq")
    refuse_dropout(model, "call model.eval() or set p=0")
    for name, module in batch_norms(model):
        how = "in training mode" if module.training else "without running statistics"
        raise ValueError(
            f"expected a loss per example, got batch norm {how} in {name!r}, which mixes "
            "the rows of a batch; call model.eval() or use GroupNorm"
        )


def refuse_dropout(model: nn.Module, cure: str) -> None:
    """Raise where dropout is active in a module, by its layers or by a rate that it keeps."""
    for name, module, rate in dropouts(model):
        if module.training:
            raise ValueError(
                f"expected a deterministic model, got active dropout in {name!r} (p={rate}); {cure}"
            )


def refuse_idle_masks(model: nn.Module) -> None:
    """Raise where masks would be drawn for nothing: a model with dropout, all of which is in eval mode."""
    found = [name for name, _, _ in dropouts(model)]
    if found and not any(module.training for module in model.modules()):
        raise ValueError(
            f"expected a model that trains with dropout beside masks, got one with {found[0]!r} and all else in eval "
            "mode; call model.train(), or leave masks out"
        )


def dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, float]]:
    """(name, module, rate above 0) of dropout, active or not."""
    for name, module in model.named_modules():
        # attention and recurrent layers keep theirs as a number
        rates = [getattr(module, at, 0) for at in ("dropout", "attention_dropout")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        above = [rate for rate in rates if isinstance(rate, (int, float)) and rate > 0]
        if above:
            yield name, module, above[0]


def batch_norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The batch norms that mix the rows of a batch: in training mode, or without statistics of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            yield name, module


def refuse_embeddings(model: nn.Module, *kinds: str) -> None:
    """Raise for embeddings that shrink their weights as they look them up (max_norm), and for trained ones whose
    gradients depend on the batch (scale_grad_by_freq), or are sparse.

    Raises:
        ValueError: one of these kinds is set; says how to unset it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None:
            raise ValueError(
                f"expected embeddings that a forward pass leaves alone, got max_norm={module.max_norm:g} in {name!r}; renormalise "
                f"them once and set model.get_submodule({name!r}).max_norm = None"
            )
        for kind in kinds:
            if module.weight.requires_grad and getattr(module, kind):
                raise ValueError(
                    f"expected embeddings whose gradients are dense and those of their lookups, got {kind}=True in "
                    f"{name!r}; set model.get_submodule({name!r}).{kind} = False"
                )
