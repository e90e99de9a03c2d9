"""Layers seen from outside: what goes in, which gradient comes back, and their weights as matrices.

`watched` lets one backward pass through a model report every use of a layer that holds parameters.
`factors` writes such a use as two lists of vectors whose outer products are the weight's gradient:

    ∇W of example i = Σ_t left_it right_itᵀ        left [g, b, T, r], right [g, b, T, c]

for Linear (W [r, c] = [out, in]), transformers' Conv1D ([in, out]), Conv1d and Conv2d (one matrix
[out/g, in/g · kernel] per group) and Embedding ([vocabulary, width]; left is the token numbers [b, T]
that stand for one-hot rows).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from attribution_core.calling import given_first
from attribution_core.precision import widened

Arrive = Callable[[nn.Module, dict[str, str], Tensor, Tensor], None]
Names = dict[str, str]  # of a layer's parameters: local name -> name in the model


class NotCovered(ValueError):
    """A layer that does not see every row of a batch, or of which nothing is known."""


@dataclass(frozen=True)
class Coverage:
    """Which layers see every row of a batch, in order, as far as a trial showed (`coverage.coverage_of`).

    Args:
        wrong: parameters whose layers do not.
        unseen: parameters that no tried row reached: of a layer that sees rows later, nothing is known.
        shared: parameters of layers that see one row for a whole batch, as position embeddings do.
    """

    wrong: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

    def is_shared(self, names: Names, _: Tensor) -> bool:
        """Whether a layer's one row stands for every row of a batch."""
        return not self.shared.isdisjoint(names.values())

    def holds(self, b: int, names: Names, source: Tensor, gradient: Tensor) -> bool:
        """Whether a layer saw a batch of b rows, as layers of these names were seen to do."""
        return sees_all(b, source, gradient) and self.unseen.isdisjoint(names.values())

    def check(self, b: int, names: Names, source: Tensor, gradient: Tensor) -> None:
        """Raise where it does not hold.

        Raises:
            NotCovered: a layer that saw other than b rows, or of which nothing is known.
        """
        if not self.holds(b, names, source, gradient):
            raise NotCovered(
                f"expected layers that see every row of a batch, got one that saw {tuple(source.shape)} of {b} rows "
                f"({', '.join(sorted(names.values())[:2])}), as where a forward pass treats rows differently; "
                "use engine='jvp' or 'rows'"
            )


UNTRIED = Coverage()


def sees_all(b: int, source: Tensor, gradient: Tensor) -> bool:
    """Whether a layer saw as many rows as a batch has."""
    return source.ndim > 0 and len(source) == b == len(gradient)


def owners(model: nn.Module, names: set[str]) -> dict[nn.Module, dict[str, str]]:
    """The modules that hold the named parameters directly: module -> {local name: parameter name}.

    A tied parameter has one name but several holders; it stands under each of them.
    """
    name_of = {id(p): name for name, p in model.named_parameters() if name in names}
    found = {}
    for module in model.modules():
        local = module.named_parameters(recurse=False, remove_duplicate=False)
        own = {name: name_of[id(p)] for name, p in local if id(p) in name_of}
        if own:
            found[module] = own
    return found


@contextmanager
def watched(
    model: nn.Module, names: set[str], b: int, arrive: Arrive | None, called: Arrive | None = None,
    *, shared: Callable[[Names, Tensor], bool] = lambda names, source: True,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """While open, forward passes of b rows are watched; yields the list of leaves to differentiate by.

    Run the model inside, then `torch.autograd.grad(total, leaves, allow_unused=True)`, inside or after,
    as often as you like: for every use of a layer that holds one of the named parameters, `arrive(module, {local
    name: name}, source, gradient)` gets its input and the gradient of its output. `called` gets its input and
    output as they pass forwards; a gradient may be taken at the output's `edge`, too. One row that is `shared` by
    the batch is seen as b rows. No weight gradient is formed where the parameters themselves need none.
    """
    leaves: list[Tensor] = []

    def watch(own: dict[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            source = given_first(args, kwargs)
            if not (isinstance(source, Tensor) and isinstance(output, Tensor) and output.ndim > 0):
                return output  # of attention, a scale, ...: not a layer seen from outside
            source = source.detach()
            if len(output) == 1 < b and shared(own, source):
                output, source = (x.expand(b, *x.shape[1:]) for x in (output, source))
            if not output.requires_grad:
                leaves.append(output.detach().requires_grad_())
                output = leaves[-1].clone()  # a leaf has no in-place successors
            output, whole = _whole(output)
            if called is not None:
                called(module, own, source, output)
            if arrive is not None:
                shape = output.shape
                whole.register_hook(
                    lambda gradient: arrive(module, own, source, gradient.detach().reshape(shape))
                )
            return output

        return hook

    handles = [
        module.register_forward_hook(watch(own), with_kwargs=True)
        for module, own in owners(model, names).items()
        if not any(True for _ in module.children())  # a layer, not a model with a weight of its own
    ]
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _whole(output: Tensor) -> tuple[Tensor, Tensor]:
    """(output, the tensor whose hook sees its gradient, whatever in-place successors do).

    An in-place successor leaves the hooks of a tensor alone, but not those of a view, whose place in
    the graph it takes. The view's base keeps its own; a view of a part is copied.
    """
    base = output._base
    if base is None:
        return output, output
    same = base.numel() == output.numel() and base.requires_grad
    if same and base.is_contiguous() and output.is_contiguous():
        return output, base
    copy = output.clone()
    return copy, copy


def edge(output: Tensor) -> GradientEdge:
    """Where the gradient of an output that `called` gets arrives, whatever in-place successors do."""
    return get_gradient_edge(output if output._base is None else output._base)


def matrix_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """(g, r, c): the weight as g matrices r × c; None for layers that `factors` does not know."""
    kind = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if kind == "Linear" and not isinstance(module, nn.Linear):
        return None  # of another library, whose weight may be [in, out]
    if kind in ("Linear", "Conv1D", "Embedding") and weight.ndim == 2:
        return (1, *weight.shape)
    if type(module) in (nn.Conv1d, nn.Conv2d):
        groups: Any = module.groups
        return groups, weight.shape[0] // groups, weight[0].numel()
    return None


def factors(
    module: nn.Module, source: Tensor, gradient: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """left [g, b, T, r] and right [g, b, T, c] of one use; token numbers [b, T] as left of an Embedding.

    With `bias` the side of the inputs is lengthened by a one, so that the bias is a further column
    (for Conv1D a further row).
    """
    kind = type(module).__name__
    if kind == "Embedding":
        return source.reshape(len(source), -1), _rows(gradient)[None]
    inputs, back = (
        _patches(module, source, gradient)
        if isinstance(module, (nn.Conv1d, nn.Conv2d))
        else (_rows(source)[None], _rows(gradient)[None])
    )
    if bias:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    return (inputs, back) if kind == "Conv1D" else (back, inputs)


def _rows(x: Tensor) -> Tensor:
    """[b, T, width], in float32 at least."""
    x = widened(x)
    return x.reshape(len(x), -1, x.shape[-1]) if x.ndim != 2 else x[:, None]


def _patches(module: Any, source: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What each place of a convolution's output saw, [g, b, T, in/g · kernel], and its gradient."""
    source, gradient = widened(source), widened(gradient)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(source, module._reversed_padding_repeated_twice, mode=mode)
    size, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        padded = padded[:, :, None]
        size, dilation, stride = (1, *size), (1, *dilation), (1, *stride)
    seen = F.unfold(padded, size, dilation=dilation, stride=stride)  # [b, in · kernel, T]
    seen, back = (
        x.reshape(len(x), module.groups, -1, x.shape[-1]).permute(1, 0, 3, 2)
        for x in (seen, gradient.flatten(2))
    )
    return seen, back


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, GroupNorm, or one of the RMSNorms of torch and transformers (by their names)."""
    kind = type(module).__name__
    return kind in ("LayerNorm", "GroupNorm") or kind.endswith("RMSNorm")


def norm_gradients(module: Any, source: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Per-example gradients of LayerNorm, RMSNorm and GroupNorm, [b, *shape] by local name.

    output = normalised ⊙ weight + bias.
    """
    if isinstance(module, nn.GroupNorm):
        normal = F.group_norm(source, module.num_groups, eps=module.eps)
        other = tuple(range(2, source.ndim))
    else:
        shape = module.weight.shape
        other = tuple(range(1, source.ndim - len(shape)))
        if isinstance(module, nn.LayerNorm):
            normal = F.layer_norm(source, shape, eps=module.eps)
        else:
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            normal = F.rms_norm(widened(source), shape, eps=eps)
    per_row = {"weight": gradient * normal, "bias": gradient}
    return {local: value.sum(other) if other else value for local, value in per_row.items()}


def plain_gradients(
    module: Any, source: Tensor, gradient: Tensor, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Per-example gradients [b, *shape] of a norm's parameters, or of a bias, by local name."""
    if not wanted:
        return {}
    if is_norm(module):
        return {k: g for k, g in norm_gradients(module, source, gradient).items() if k in wanted}
    if set(wanted) == {"bias"} and matrix_shape(module) is not None:
        is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d))
        by_row = gradient.flatten(2).mT if is_conv else gradient
        return {"bias": by_row.reshape(len(by_row), -1, by_row.shape[-1]).sum(1)}
    return {}
