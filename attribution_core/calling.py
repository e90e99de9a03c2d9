"""A model called with other parameters: the same function in every mode of differentiation, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attribution_core.data import Batch, rows_in, tensors_in
from attribution_core.precision import precision_of

PerExample = Callable[[nn.Module, Any], Tensor]  # (plain module, batch of b rows) -> [b]
Params = dict[str, Tensor]


def trainable(model: nn.Module) -> Params:
    """The trainable parameters of a model, detached and by name; tied ones appear once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class _Bound(nn.Module):
    """A function of a model as a module, so that `functional_call` can swap the parameters in."""

    def __init__(self, model: nn.Module, function: PerExample):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


class _FixedStatistics(TorchFunctionMode):
    """Batch norm in eval mode, differentiable in its running statistics, which torch's is not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "_", "eps")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if given.get("training") or given.get("running_mean") is None:
            return func(*args, **(kwargs or {}))
        x = given["input"]
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        out = (x - given["running_mean"].reshape(shape)) * scale.reshape(shape)
        return out if given.get("bias") is None else out + given["bias"].reshape(shape)


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm in plain operations: torch's own has no forward mode, and wrong second derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("v", "g", "dim"), args, strict=False)), **(kwargs or {})}
        v, g, dim = given["v"], given["g"], given.get("dim", 0)
        if dim == -1:  # of all
            return v * (g / v.norm())
        rows = v.transpose(0, dim).reshape(v.shape[dim], -1)
        return v * (g / rows.norm(dim=1).reshape(g.shape))


# how parameters of weight norm end, torch's and the one before it
NORMED = (".original0", ".original1", "_g", "_v")


def call(model: nn.Module, function: PerExample, params: Params, batch: Batch) -> Tensor:
    """function(model, batch) with `params` in place of the model's own; differentiable in both.

    A float64 model is computed in float64 throughout, see `precision_of`; forward and reverse mode
    see the same function, see `_one_function`.
    """
    named = _everywhere(model, params)
    statistics = any(name.endswith("running_var") for name in params)
    fixed = _FixedStatistics() if statistics else nullcontext()
    normed = _PlainWeightNorm() if any(k.endswith(NORMED) for k in params) else nullcontext()
    with precision_of(params), _one_function(model), fixed, normed, _told_types(params, batch):
        return functional_call(_Bound(model, function), named, (batch,), tie_weights=False)


def _everywhere(model: nn.Module, params: Params) -> Params:
    """The parameters at every place of `_Bound` that holds them, each place once.

    torch finds the places of a tied tensor by itself, but a module that stands under two names twice, and
    then leaves what it swapped in behind.
    """
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # each once
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append(f"{prefix}.{key}" if prefix else key)
    found = {f"model.{name}": value for name, value in params.items()}
    for names in places.values():
        given = [params[name] for name in names if name in params]
        if given:
            found.update({f"model.{name}": given[0] for name in names})
    return found


@contextmanager
def _told_types(params: Params, batch: Batch) -> Iterator[None]:
    """Say which types met where torch says that they may not."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("same dtype", "expected scalar type")):
            raise
        own = sorted({str(value.dtype) for value in params.values()})
        given = [str(x.dtype) for x in tensors_in(batch)]
        raise ValueError(
            f"expected inputs in the parameters' dtype {own}, got {given}: {error}; "
            "cast columns (torch.as_tensor(x).float()) or the model (model.double()), so that all are of one type"
        ) from error


# what transformers and peft call hooks that ask a layer's output for gradients, for checkpointing
ASKING = ("make_inputs_require_grads", "make_inputs_require_grad")


def given_first(args: Any, kwargs: Any) -> Any:
    """What a layer was called with first, by place or by name; None of nothing."""
    return next(iter((*args, *kwargs.values())), None)


@contextmanager
def _one_function(model: nn.Module) -> Iterator[None]:
    """Where torch's two modes of differentiation differ, follow reverse mode, as training does.

    Padding rows of an embedding get no gradient, but forward mode gives them a tangent. Attention
    layers in eval mode take fused kernels that have no forward mode. Hooks that ask outputs for
    gradients, which a transformed function may not, are off meanwhile.
    """

    def still(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        padding = (given_first(args, kwargs) == module.padding_idx)[..., None]
        return torch.where(padding, output.detach(), output)

    fast = torch.backends.mha.get_fastpath_enabled()
    modules = list(model.modules())
    hooked = [module._forward_hooks for module in modules if module._forward_hooks]
    asking = [
        (hooks, hooks.copy())
        for hooks in hooked
        if any(getattr(hook, "__name__", "") in ASKING for hook in hooks.values())
    ]
    for hooks, before in asking:
        for key, hook in before.items():
            if getattr(hook, "__name__", "") in ASKING:
                del hooks[key]
    handles = [
        module.register_forward_hook(still, with_kwargs=True)
        for module in modules
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for hooks, before in asking:  # in their order
            hooks.clear()
            hooks.update(before)


def per_example(
    model: nn.Module,
    function: PerExample,
    batch: Batch,
    params: Params | None = None,
    rows: ArrayLike | None = None,
    what: str = "loss",
) -> Tensor:
    """function(model, batch), checked to be one finite number per row.

    Raises:
        ValueError: a scalar or any other shape than [b]; NaN or infinite values (names the rows).
    """
    values = call(model, function, trainable(model) if params is None else params, batch)
    return check_rows(values, rows_in(batch), rows, what)


def check_rows(values: Tensor, b: int, rows: ArrayLike | None = None, what: str = "loss") -> Tensor:
    """The values, if they are one finite number for each of b rows; see `per_example`."""
    if not isinstance(values, Tensor) or values.shape != (b,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values)
        raise ValueError(
            f"expected one {what} per row, shape ({b},), got {got}; return per-example values "
            "(in torch's losses: reduction='none')"
        )
    finite = torch.isfinite(values.detach())
    if not finite.all():
        names = np.arange(b) if rows is None else np.asarray(rows)
        bad = names[~finite.cpu().numpy()]
        raise ValueError(
            f"expected finite {what} values, got NaN or infinity in rows {bad[:10].tolist()}; "
            "look at these examples, or at the learning rate that led here"
        )
    return values


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module, as trained models are asked for outputs, and then as it was.

    By `model.eval()`, which some models use to prepare themselves; none is called where all are in eval mode already.
    """
    modes = {module: module.training for module in model.modules()}
    training = [module for module, was in modes.items() if was]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            if type(module).train is not nn.Module.train:
                module.train()
        for module, was in modes.items():
            if module.training != was:
                module.training = was
