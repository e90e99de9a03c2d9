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
TRIED, TRIALS = 8, 4  # rows of a batch on which ghost products are tried, and such batches at most
SHARE = 8  # of this many rows one is tried
NOISE = 0.1  # of a parameter's size: moves parameters whose gradients vanish where they stand
LEAST = 0.02  # how far they are moved at least


class NotCovered(ValueError):
    """A layer that does not see every row of a batch, once and in order.

    Args:
        names: its parameters.
        cure: what to use instead.
    """

    def __init__(
        self, b: int, names: dict[str, str], source: Tensor, cure: str = "engine='jvp' or 'rows'"
    ):
        self.names = set(names.values())
        super().__init__(
            f"expected layers that see every row of a batch, got one that saw {tuple(source.shape)} of {b} rows "
            f"({', '.join(sorted(self.names)[:2])}), as where rows are told apart in a forward pass; use {cure}"
        )


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
                raise NotCovered(b, names, source)
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
    """Parameters for which ghost products differ from plain autograd on some rows, drawn from all.

        Σ_i w_i share_i = ⟨∇ Σ_i w_i ℓ_i, v⟩        w random: a share that went to another row is missed, too

    Catches what no list of layer types can: weights used outside their module, batches folded into another
    dimension, a forward of one's own under a known name, rows that are taken apart or put into another order.
    Parameters that the rows use without effect are moved a little, for a last layer that starts at zero hides all
    before it. What is hidden still counts as covered only where layers with a rule hold it.
    """
    many = min(len(rows), max(TRIED, min(TRIED * TRIALS, len(rows) // SHARE)))
    parts = list(batches(np.random.default_rng(0).choice(rows, many, replace=False), TRIED))
    trial = _Trial(problem)
    try:
        for part in parts:
            trial.compare(problem.params, part)
        if trial.hidden and not trial.wrong:
            trial.compare(_moved(problem.params), parts[0], trial.hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # a layer that needs more than its input, say; plain autograd tells what else is wrong
        return list(problem.params)
    return sorted(trial.wrong | trial.hidden - _held_by_rules(problem))


def _moved(params: Params) -> Params:
    """Parameters a little way off."""
    found = {}
    for name, noise in normal_like(params).items():
        size = NOISE * params[name].float().square().mean().sqrt()
        found[name] = params[name] + noise * size.clamp(min=LEAST).to(noise)
    return found


def _held_by_rules(problem: Problem) -> set[str]:
    """Parameters that layers with a rule hold, and nothing else."""
    known: set[str] = set()
    other: set[str] = set()
    for module, names in owners(problem.model, set(problem.params)).items():
        ruled = is_norm(module) or type(module).__name__ in RULES or isinstance(module, _ConvNd)
        (known if ruled else other).update(names.values())
    return known - other


class _Trial:
    """Ghost products beside plain autograd, on a batch at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.probe = {name: noise[None] for name, noise in normal_like(problem.params).items()}
        self.rng = np.random.default_rng(1)
        self.wrong: set[str] = set()
        self.used: set[str] = set()
        self.reached: set[str] = set()

    @property
    def hidden(self) -> set[str]:
        """Used by the rows so far, without effect."""
        return self.used - self.reached

    def compare(self, params: Params, rows: np.ndarray, judged: set[str] | None = None) -> None:
        """Try the parameters, or those that are `judged`, on a batch."""
        model, loss = self.problem.model, self.problem.loss
        batch, strays = take(self.problem.train, rows, self.problem.device), set[str]()
        shares = ghost_shares(model, loss, params, self.probe, batch, strays)
        leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
        values = call(model, loss, leaf, batch)
        # powers of two, which rounding does not see
        drawn = self.rng.choice([-2, -1, -0.5, 0.5, 1, 2], len(values))
        w = torch.from_numpy(drawn).to(values)
        found = torch.autograd.grad((w * values).sum(), list(leaf.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaf, found, strict=True) if g is not None}
        largest = max((g.norm().item() for g in gradients.values()), default=0.0)
        for name, v in self.probe.items():
            if judged is not None and name not in judged:
                continue
            products = gradients.get(name, torch.zeros_like(v)) * v
            apart = (w.to(shares[name]) @ shares[name][:, 0] - products.sum()).abs()
            if name in strays or apart > _rounding(products, v, largest):
                self.wrong.add(name)
            if products.any():
                self.reached.add(name)
        self.used |= set(gradients)


def _rounding(products: Tensor, v: Tensor, largest: float) -> float:
    """How far a sum of products of gradients and v may be off.

    It scales with the norm of its terms; 1e-3 of it is far above float32's rounding and far below any missed term
    (bfloat16, with its 8 bits, needs .06). Gradients that are zero but for rounding, of attention's key biases say,
    err by rounding of the largest one, which in half precision would hide what is missed.
    """
    off = max(1e-3, 8 * rounding(v)) * products.norm().item()
    eps = torch.finfo(v.dtype).eps if v.dtype.itemsize >= 4 else 0.0
    return max(off, 1e-12, 8 * eps * largest * v.norm().item())
