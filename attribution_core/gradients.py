"""Per-example loss gradients as one linear operator J [n, p], and gradients of outputs.

`directional` is the engine of every gradient method: rows of J times parameter directions, J Vᵀ.
It has three equal forms inside:

    ghost   one backward pass without weight gradients; each layer's product of its input, its output
            gradient and the direction is taken on the way (no per-example gradient beyond one layer's)
    jvp     forward-mode derivatives of the losses along each direction
    rows    per-example gradients [rows, p], then one product

A set of k directions is a dict name -> [k, *shape], or one tensor [k, p] whose columns follow the
order of `problem.params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core.problem import (
    Batch,
    Outputs,
    Params,
    PerExample,
    Problem,
    batches,
    call,
    per_example,
    precision_of,
    refuse_random_layers,
    rows_in,
    take,
    trainable,
)

Engine = Literal["auto", "ghost", "jvp", "rows"]
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # tqdm fits
LAYER_ELEMENTS = 2**22  # of one layer's per-example products held at once (16 MiB in float32)
TRIED = 16  # rows on which ghost products may be tried
FEW = 24  # up to so many directions forward mode beats per-example rows (they break even near 27)


def directional(
    problem: Problem,
    directions: Params | Tensor,
    rows: ArrayLike | None = None,
    engine: Engine = "auto",
    *,
    batch_size: int = 64,
    progress: Progress = iter,
) -> Tensor:
    """Per-example loss gradients along k parameter directions: out[i, j] = ⟨∇ℓ_i(θ), v_j⟩, [rows, k].

    Args:
        problem: the model at whose parameters the gradients are taken.
        directions: dict name -> [k, *shape] over all of `problem.params`, or a tensor [k, p].
        rows: which training examples; all if not given.
        engine: "ghost", "jvp" or "rows"; "auto" takes ghost where it covers every parameter (tried
            on two rows against plain autograd), else jvp for few directions and rows for many.
        batch_size: rows per pass; changes memory and time, never the result.
        progress: wraps the loop over batches (tqdm).

    Raises:
        ValueError: directions that do not fit the parameters; active dropout or batch norm; losses
            that are not one finite number per row; ghost asked for where it cannot cover.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> half_square = lambda model, batch: 0.5 * model(batch[0])[:, 0] ** 2
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> out = directional(Problem(model, half_square, (x,)), torch.eye(2, dtype=torch.float64))
    >>> torch.allclose(out, model(x) * x)      # ∇ ½(xᵀθ)² = (xᵀθ) x
    True
    """
    refuse_random_layers(problem.model)
    params = problem.params
    vectors = check_directions(directions, params)
    rows = np.arange(problem.n) if rows is None else np.asarray(rows, dtype=int)
    count = len(next(iter(vectors.values())))
    if len(rows) == 0:
        return torch.zeros(0, count)
    first = take(problem.train, rows[:2], problem.device)
    per_example(problem.model, problem.loss, first, params, rows[:2])  # one finite number per row?
    along = ENGINES[choose_engine(problem, count, rows, engine)]
    out = []
    for some in progress(list(batches(rows, batch_size))):
        batch = take(problem.train, some, problem.device)
        part = along(problem.model, problem.loss, params, vectors, batch).detach()
        if not torch.isfinite(part).all():
            per_example(problem.model, problem.loss, batch, params, some)  # names rows of NaN loss
            bad = some[~torch.isfinite(part).all(1).cpu().numpy()]
            raise ValueError(
                f"expected finite gradients, got NaN or infinity in rows {bad[:10].tolist()}"
            )
        out.append(part)
    return torch.cat(out)


def check_directions(directions: Params | Tensor, params: Params) -> Params:
    """Directions as a dict name -> [k, *shape] in the parameters' order, dtype and device."""
    p = sum(value.numel() for value in params.values())
    if isinstance(directions, Tensor):
        if directions.ndim != 2 or directions.shape[1] != p:
            raise ValueError(
                f"expected directions [k, p={p}], got {tuple(directions.shape)}; one row per direction"
            )
        directions = unflatten(directions, params)
    if set(directions) != set(params):
        missing, extra = set(params) - set(directions), set(directions) - set(params)
        raise ValueError(
            f"expected a direction for every trainable parameter; missing {sorted(missing)[:5]}, "
            f"unknown {sorted(extra)[:5]}"
        )
    shapes = {name: tuple(directions[name].shape) for name in params}
    wrong = {n: s for n, s in shapes.items() if s[1:] != tuple(params[n].shape)}
    if wrong or len({s[0] for s in shapes.values()}) != 1:
        raise ValueError(
            f"expected directions [k, *shape] with one k for all parameters, got {wrong or shapes}"
        )
    return {name: directions[name].detach().to(value) for name, value in params.items()}


def flatten(directions: Params) -> Tensor:
    """[k, p] from a dict name -> [k, *shape]."""
    return torch.cat([value.flatten(1) for value in directions.values()], dim=1)


def unflatten(flat: Tensor, params: Params) -> Params:
    """A dict name -> [k, *shape] from [k, p]."""
    parts = flat.split([value.numel() for value in params.values()], dim=1)
    return {
        name: part.reshape(len(flat), *value.shape)
        for part, (name, value) in zip(parts, params.items(), strict=True)
    }


# --- ghost: one backward pass, each layer's share of ⟨∇ℓ_i, v⟩ taken as its gradient passes by ----


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
    leaves: list[Tensor] = []

    def watch(names: dict[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected a tensor from {type(module).__name__}, got {type(output)}"
                )
            source = (args[0] if args else next(iter(kwargs.values()))).detach()
            if len(output) == 1 < b:  # one row for the whole batch, as position embeddings do
                output, source = (x.expand(b, *x.shape[1:]) for x in (output, source))
            if not output.requires_grad:
                leaves.append(output.detach().requires_grad_())
                output = leaves[-1]
            output = output.clone()  # so that an in-place successor leaves the hook alone
            held = {local: vectors[name] for local, name in names.items()}

            def arrive(gradient: Tensor) -> None:
                rule = RULES.get(type(module).__name__, any_layer)
                for local, share in rule(module, source, gradient.detach(), held).items():
                    shares[names[local]] += share

            output.register_hook(arrive)
            return output

        return hook

    handles = [
        module.register_forward_hook(watch(names), with_kwargs=True)
        for module, names in owners(model, set(params)).items()
    ]
    try:
        with torch.enable_grad():
            total = call(model, loss, params, batch).sum()
            torch.autograd.grad(total, leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return shares


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


def outer(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    """Σ_t left_tᵀ V_k right_t, [b, k], for left [b, T, r], right [b, T, c], V [k, r, c].

    One direction is multiplied into the wider side, so that what is held is [b, T, min(r, c)]. For
    many, Σ_t left_t right_tᵀ is formed once, a block of V's rows at a time.
    """
    b, _, r = left.shape
    c = right.shape[2]
    if len(vectors) == 1:
        v = vectors[0]
        product = (left @ v) * right if c < r else (right @ v.T) * left
        return product.sum((1, 2))[:, None]
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
            normal = F.rms_norm(
                source.float() if source.dtype.itemsize < 4 else source, shape, eps=eps
            )
    per_row = {"weight": gradient * normal, "bias": gradient}
    return {
        local: (per_row[local].sum(other) if other else per_row[local]).flatten(1) @ v.flatten(1).T
        for local, v in held.items()
    }


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
    "LayerNorm": norm,
    "GroupNorm": norm,
    "RMSNorm": norm,
    "LlamaRMSNorm": norm,
}


# --- forward mode and per-example rows -------------------------------------------------------


def forward_mode(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] as derivatives of the losses along each direction; the losses themselves are shared."""

    def along(direction: Params) -> Tensor:
        return jvp(lambda at: call(model, loss, at, batch), (params,), (direction,))[1]

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # fused attention has no forward mode
        return vmap(along, chunk_size=8)(vectors).T


def by_rows(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] from per-example gradients."""
    return flatten(row_gradients(model, loss, params, batch)) @ flatten(vectors).T


def row_gradients(model: nn.Module, function: PerExample, params: Params, batch: Batch) -> Params:
    """Gradients of function(model, batch) [b] for every row by itself: dict name -> [b, *shape]."""

    def one(example: Any) -> Params:
        return grad(lambda at: call(model, function, at, _one_row(example))[0])(params)

    with sdpa_kernel(SDPBackend.MATH):
        try:
            return vmap(one)(batch)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
        # control flow that depends on values (padding masks in transformers): row by row instead
        singles = [one(_row(batch, i)) for i in range(rows_in(batch))]
    return {name: torch.stack([single[name] for single in singles]) for name in params}


def _row(batch: Batch, i: int) -> Any:
    if isinstance(batch, dict):
        return {name: value[i] for name, value in batch.items()}
    return tuple(value[i] for value in batch)


def _one_row(example: Any) -> Batch:
    if isinstance(example, dict):
        return {name: value[None] for name, value in example.items()}
    return tuple(value[None] for value in example)


ENGINES = {"ghost": ghost, "jvp": forward_mode, "rows": by_rows}


def choose_engine(problem: Problem, count: int, rows: np.ndarray, engine: Engine) -> str:
    """The engine to use; ghost only where it agrees with plain autograd on the first two rows."""
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {engine!r}; one of auto, {', '.join(ENGINES)}")
    if engine in ("jvp", "rows"):
        return engine
    uncovered = ghost_uncovered(problem, rows)
    if not uncovered:
        return "ghost"
    if engine == "ghost":
        raise ValueError(
            f"expected layers whose parameters act in their own forward, but {uncovered[:5]} do not; "
            "use engine='jvp' or 'rows', or 'auto', which does so by itself"
        )
    return "jvp" if count <= FEW else "rows"


def ghost_uncovered(problem: Problem, rows: np.ndarray) -> list[str]:
    """Parameters for which ghost products differ from plain autograd on the first two rows.

    Catches what no list of layer types can: weights used outside their module, batches folded into
    another dimension, a forward of one's own under a known name. Where the two rows do not reach a
    parameter (its gradient is zero), the next ones are tried, up to `TRIED`.
    """
    params, device = problem.params, problem.device
    generator = torch.Generator().manual_seed(0)
    probe = {
        name: torch.randn((1, *value.shape), generator=generator).to(value)
        for name, value in params.items()
    }
    wrong: set[str] = set()
    reached: set[str] = set()
    for some in batches(rows[:TRIED], 2):
        batch = take(problem.train, some, device)
        try:
            shares = ghost_shares(problem.model, problem.loss, params, probe, batch)
        except (TypeError, RuntimeError):
            return list(params)
        for place, row in enumerate(some):
            leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
            value = call(problem.model, problem.loss, leaf, take(problem.train, [row], device))
            gradients = torch.autograd.grad(value.sum(), list(leaf.values()), allow_unused=True)
            for (name, v), g in zip(probe.items(), gradients, strict=True):
                products = torch.zeros_like(v) if g is None else g * v
                size = products.norm().item()
                # rounding of a sum scales with the norm of its terms; 1e-3 of it is far above
                # float32's and far below any missed term
                if (shares[name][place, 0] - products.sum()).abs() > max(1e-3 * size, 1e-12):
                    wrong.add(name)
                if size > 0:
                    reached.add(name)
        if wrong or len(reached) == len(params):
            break
    return sorted(wrong)


# --- sums of gradients, gradients of outputs ---------------------------------------------------


def mean_gradient(
    problem: Problem, weights: ArrayLike | None = None, batch_size: int = 256
) -> Params:
    """(1/n) Σ w_i ∇ℓ_i(θ) + weight_decay θ: the gradient of the trained objective, dict name -> shape."""
    leaf = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    w = torch.ones(problem.n) if weights is None else torch.as_tensor(np.asarray(weights))
    total = {name: problem.weight_decay * value.detach() for name, value in leaf.items()}
    for rows in batches(problem.n, batch_size):
        batch = take(problem.train, rows, problem.device)
        losses = per_example(problem.model, problem.loss, batch, leaf, rows)
        loss = (losses * w[rows].to(losses)).sum() / problem.n
        for name, g in zip(
            leaf, torch.autograd.grad(loss, list(leaf.values()), allow_unused=True), strict=True
        ):
            if g is not None:
                total[name] = total[name] + g
    return total


def output_gradients(model: nn.Module, outputs: Outputs, batch_size: int = 64) -> Params:
    """Gradients of all t outputs with respect to the parameters, dict name -> [t, *shape]."""
    params = trainable(model)
    device = next(iter(params.values())).device
    if outputs.matrix is None:
        parts = [
            row_gradients(model, outputs.function, params, take(outputs.data, rows, device))
            for rows in batches(len(outputs.data), batch_size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in params}
    leaf = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = {name: value.new_zeros((len(outputs), *value.shape)) for name, value in params.items()}
    for rows in batches(len(outputs.data), batch_size):
        batch = take(outputs.data, rows, device)
        values = per_example(model, outputs.function, batch, leaf, rows, what="output")
        columns = values @ outputs.matrix[rows].to(values)
        for j, column in enumerate(columns):
            gradients = torch.autograd.grad(
                column, list(leaf.values()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(leaf, gradients, strict=True):
                if g is not None:
                    total[name][j] += g
    return total
