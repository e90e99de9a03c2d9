"""What a method may know: a model, a loss per example, training data; and the outputs to predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attribution_core.data import Batch, as_data, batches, named, rows_in, take, tensors_in

PerExample = Callable[[nn.Module, Any], Tensor]  # (plain module, batch of b rows) -> [b]
Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its loss per example and its training data.

    The trained objective is (1/n) Σ w_i ℓ_i(θ) + ½ weight_decay ‖θ‖², n fixed whatever the weights.
    A weight decay may differ between parameters: ½ Σ_name weight_decay[name] ‖θ_name‖².

    Args:
        model: any nn.Module. Trained, for methods that read it; initial, for `train`.
        loss: your own function (model, batch) -> [b], one loss per row of the batch, in nats.
        train: a dict or tuple of tensors, a TensorDataset, a datasets.Dataset, or any `Data`.
        weight_decay: what torch's optimizers mean by it; the ½ weight_decay ‖θ‖² above. One number, or
            parameter name -> number, 0 for names left out (biases and norms, as is usual).

    Raises:
        TypeError, ValueError: data that cannot be used (see `as_data`); no trainable parameters, or complex ones;
            a weight decay that is negative or names a parameter that the model does not train.
    """

    model: nn.Module
    loss: PerExample
    train: Any
    weight_decay: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", as_data(self.train))
        if not self.params:
            raise ValueError(
                "expected a model with trainable parameters, got none with requires_grad"
            )
        unreal = [name for name, value in self.params.items() if value.is_complex()]
        if unreal:
            raise ValueError(
                f"expected real parameters, got complex ones in {unreal[:5]}; hold torch.view_as_real(w) as the "
                "parameter and take torch.view_as_complex of it in forward"
            )
        by_name = self.weight_decay if isinstance(self.weight_decay, Mapping) else {}
        unknown = sorted(set(by_name) - set(self.params))
        if unknown:
            raise ValueError(
                f"expected weight decays of trainable parameters, got {unknown[:5]}; "
                f"the names are {list(self.params)[:5]} ..."
            )
        if not (self.decay >= 0).all():
            raise ValueError(f"expected a weight decay of at least 0, got {self.weight_decay}")

    @classmethod
    def from_sklearn(
        cls, fitted: Any, X: Any, y: Any, *, weights: ArrayLike | None = None
    ) -> Problem:
        """A fitted scikit-learn linear model and its training data; see `linear_models.from_sklearn`."""
        from attribution_core.linear_models import from_sklearn

        return from_sklearn(fitted, X, y, weights=weights)

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def params(self) -> Params:
        """The trainable parameters, detached and by name; tied ones appear once."""
        return trainable(self.model)

    @property
    def decay(self) -> Tensor:
        """The weight decay of each parameter, [p] in the order of `params`, float64 on the CPU."""
        parts = [
            torch.full((value.numel(),), decay_of(self.weight_decay, name), dtype=torch.float64)
            for name, value in self.params.items()
        ]
        return torch.cat(parts)

    @property
    def covered(self) -> float:
        """Which share of the model's parameters is trained, and so attributed to."""
        trained = sum(value.numel() for value in self.params.values())
        return trained / sum(value.numel() for value in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model lives; batches are moved there."""
        return next(self.model.parameters()).device


def decay_of(weight_decay: Any, name: str) -> Any:
    """The weight decay of one parameter, from one number (or tensor), a mapping by name, or None.

    >>> decay_of(0.1, "bias"), decay_of({"weight": 0.1}, "bias")
    (0.1, 0.0)
    """
    found = weight_decay.get(name, 0.0) if isinstance(weight_decay, Mapping) else weight_decay
    return found if isinstance(found, Tensor) else float(found or 0.0)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What to predict: a function (model, batch) -> [b] over target data; one target per row.

    `mean()` makes one target of them, the average; `mean(by=labels)` one target per label.
    """

    function: PerExample
    data: Any
    matrix: Tensor | None = None  # [rows, t] combines rows into targets; None is one target per row
    names: tuple[str, ...] = ()  # of the targets, where averages were given some

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", as_data(self.data))

    def __len__(self) -> int:
        return len(self.data) if self.matrix is None else self.matrix.shape[1]

    @property
    def targets(self) -> NDArray[Any] | None:
        """The names of the targets as a datamodel takes them; None where they have none."""
        return np.asarray(self.names) if self.names else None

    def mean(self, by: ArrayLike | None = None) -> Outputs:
        """One target: the average over rows; or, with labels [rows], one average per label."""
        if self.matrix is not None:
            raise ValueError(
                "expected outputs of single rows, got averages already; call mean once"
            )
        labels = np.full(len(self.data), "mean") if by is None else np.asarray(by)
        if labels.shape != (len(self.data),):
            raise ValueError(f"expected one label per row [{len(self.data)}], got {labels.shape}")
        names, index = named(labels, len(self.data))
        matrix = torch.zeros(len(self.data), len(names), dtype=torch.float64)
        matrix[torch.arange(len(index)), torch.as_tensor(index)] = 1.0
        return replace(self, matrix=matrix / matrix.sum(0), names=tuple(str(x) for x in names))

    def evaluate(
        self, model: nn.Module, params: Params | None = None, batch_size: int = 32
    ) -> Tensor:
        """The outputs [t] of a model, float64 on the CPU."""
        values = []
        device = next(model.parameters()).device
        with torch.no_grad():
            for rows in batches(len(self.data), batch_size):
                batch = take(self.data, rows, device)
                values.append(per_example(model, self.function, batch, params, rows, what="output"))
        rows_values = torch.cat(values).double().cpu()
        return rows_values if self.matrix is None else rows_values @ self.matrix


class _Bound(nn.Module):
    """A function of a model as a module, so that `functional_call` can swap the parameters in."""

    def __init__(self, model: nn.Module, function: PerExample):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


def trainable(model: nn.Module) -> Params:
    """The trainable parameters of a model, detached and by name; tied ones appear once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def normal_like(params: Params) -> Params:
    """Normal numbers in the shapes of parameters, the same at every call; drawn where the parameters are."""
    drawn: dict[torch.device, torch.Generator] = {}
    found = {}
    for name, value in params.items():
        where = value.device
        generator = drawn.setdefault(where, torch.Generator(where).manual_seed(0))
        found[name] = torch.randn(value.shape, generator=generator, device=where).to(value)
    return found


def widened(x: Tensor) -> Tensor:
    """In float32 at least, where sums of many keep their digits."""
    return x.float() if x.dtype.itemsize < 4 else x


def roomy(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, which ends at 6e-8 and at 65,504; any other as it is."""
    return torch.float32 if dtype == torch.float16 else dtype


def rounding(value: Tensor) -> float:
    """Relative rounding of products: eps of the dtype, on a GPU of TF32's ten bits for float32, which may be in use."""
    eps = torch.finfo(value.dtype).eps
    return max(eps, 2.0**-10) if value.is_cuda and value.dtype == torch.float32 else eps


class _KeepDouble(TorchFunctionMode):
    """Leave float64 tensors float64 where a layer would cast them to float32.

    transformers' norms, rotary embeddings and softmaxes compute in float32 whatever the model's
    dtype; a model that was asked to be float64 would be exact to 1e-8 only. Products of a float64 and a
    float32 tensor (rotary positions, for example) are computed in float64; torch would raise an error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        if func in PRODUCTS and {getattr(a, "dtype", None) for a in args} == MIXED:
            args = tuple(a.double() for a in args)
        return func(*args, **kwargs)


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
MIXED = {torch.float32, torch.float64}


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

    A float64 model is computed in float64 throughout, see `_KeepDouble`; forward and reverse mode
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


def precision_of(params: Params) -> AbstractContextManager[Any]:
    """A context that computes in the parameters' own precision, see `_KeepDouble`."""
    double = {value.dtype for value in params.values()} == {torch.float64}
    return _KeepDouble() if double else nullcontext()


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
