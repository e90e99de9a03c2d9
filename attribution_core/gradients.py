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

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from attribution_core.calling import Params, PerExample, call, in_eval_mode, per_example, trainable
from attribution_core.data import Batch, Progress, batches, row_numbers, rows_in, take
from attribution_core.joining import parts_of
from attribution_core.layerwise.coverage import coverage_of
from attribution_core.layerwise.ghost import ghost
from attribution_core.layerwise.layers import UNTRIED, Coverage, NotCovered
from attribution_core.layerwise.vectors import flatten, size_of, unflatten
from attribution_core.precision import roomy, widened
from attribution_core.problem import Outputs, Problem, decay_of
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.safeguards.soundness import refuse_mixed_outputs, refuse_unsound

Engine = Literal["auto", "ghost", "jvp", "rows"]
SINGLY = 32  # outputs up to which each gets a backward pass of its own
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
            on a few rows against plain autograd), else jvp for few directions and rows for many.
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
    rows = np.arange(problem.n) if rows is None else row_numbers(rows, problem.n)
    count = len(next(iter(vectors.values())))
    if len(rows) == 0:
        return torch.zeros(0, count)
    first = take(problem.train, rows[:2], problem.device)
    per_example(problem.model, problem.loss, first, params, rows[:2])  # one finite number per row?
    refuse_unsound(problem, rows)
    products = _products(problem, vectors, rows, engine)
    out = []
    for some in progress(list(batches(rows, batch_size))):
        batch = take(problem.train, some, problem.device)
        part = products(batch).detach()
        if not torch.isfinite(part).all():
            per_example(problem.model, problem.loss, batch, params, some)  # names rows of NaN loss
            bad = some[~torch.isfinite(part).all(1).cpu().numpy()]
            raise ValueError(
                f"expected finite gradients, got NaN or infinity in rows {bad[:10].tolist()}"
            )
        out.append(widened(part))
    return torch.cat(out)


def _products(
    problem: Problem, vectors: Params, rows: np.ndarray, engine: Engine
) -> Callable[[Batch], Tensor]:
    """Batch -> [b, k], by the engine, and another one for batches that a layer does not see whole."""
    count = len(next(iter(vectors.values())))
    chosen, coverage = choose_engine(problem, count, rows, engine)
    given = (problem.model, problem.loss, problem.params, vectors)
    other = ""

    def products(batch: Batch) -> Tensor:
        nonlocal other
        if chosen != "ghost":
            return ENGINES[chosen](*given, batch)
        try:
            return ghost(*given, batch, coverage)
        except NotCovered:
            if engine == "ghost":
                raise
            other = other or plain_engine(problem, count, rows)
            return ENGINES[other](*given, batch)

    return products


def check_directions(directions: Params | Tensor, params: Params) -> Params:
    """Directions as a dict name -> [k, *shape] in the parameters' order, dtype and device.

    Those of a model in float16 stay in float32.
    """
    p = size_of(params)
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
    return {k: directions[k].detach().to(v.device, roomy(v.dtype)) for k, v in params.items()}


# --- forward mode and per-example rows; ghost has a file of its own --------------------------


def forward_mode(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] as derivatives of the losses along each direction; the losses themselves are shared."""

    def along(direction: Params) -> Tensor:
        return jvp(lambda at: call(model, loss, at, batch), (params,), (direction,))[1]

    tangents, size = _tangents(vectors, params)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # fused attention has no forward mode
        return vmap(along, chunk_size=8)(tangents).T * size


def _tangents(vectors: Params, params: Params) -> tuple[Params, Tensor | float]:
    """Directions in the parameters' dtypes, and what to multiply products with: their norms in float16."""
    if all(v.dtype == params[name].dtype for name, v in vectors.items()):
        return vectors, 1.0
    norms = flatten(vectors).norm(dim=1)
    size = torch.where(norms > 0, norms, 1.0)
    return {
        name: (v / size.reshape(-1, *[1] * (v.ndim - 1))).to(params[name])
        for name, v in vectors.items()
    }, size


def by_rows(
    model: nn.Module, loss: PerExample, params: Params, vectors: Params, batch: Batch
) -> Tensor:
    """[b, k] from per-example gradients."""
    along = flatten(vectors)
    return flatten(row_gradients(model, loss, params, batch)).to(along) @ along.T


def row_gradients(model: nn.Module, function: PerExample, params: Params, batch: Batch) -> Params:
    """Gradients of function(model, batch) [b] for every row by itself: dict name -> [b, *shape]."""

    def one(example: Any) -> Params:
        return grad(lambda at: _of_one(call(model, function, at, as_batch(example))))(params)

    try:
        # without no_grad, parameters that are not among `params` would drag a graph along
        with torch.no_grad():
            return row_by_row(one, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # packed sequences, functions of the old kind: plain autograd, which says all else
        return _plain_gradients(model, function, params, batch)


def _of_one(values: Tensor) -> Tensor:
    """The value of a batch of one."""
    if values.shape != (1,):
        raise ValueError(
            f"expected one value for each row, shape (1,) of one row, got {tuple(values.shape)}; return [b], where "
            ".squeeze() or a mean over the batch gives less"
        )
    return values[0]


def _plain_gradients(
    model: nn.Module, function: PerExample, params: Params, batch: Batch
) -> Params:
    """`row_gradients` without torch.func, a pass for each row."""
    found = []
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for i in range(rows_in(batch)):
            leaf = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
            value = _of_one(call(model, function, leaf, as_batch(_row(batch, i))))
            leaves = list(leaf.values())
            if value.requires_grad:
                found.append(torch.autograd.grad(value, leaves, materialize_grads=True))
            else:  # for example a masked row
                found.append(tuple(torch.zeros_like(x) for x in leaves))
    columns = zip(params, zip(*found, strict=True), strict=True)
    return {name: torch.stack(column) for name, column in columns}


def row_by_row(one: Callable[[Any], Any], batch: Batch) -> Any:
    """one(example) for every row of a batch, stacked; `as_batch` makes an example a batch of one again."""
    with sdpa_kernel(SDPBackend.MATH):
        try:
            return vmap(one)(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
        # layers without a batched form (recurrent ones), control flow that depends on values (padding masks in
        # transformers): row by row instead, where any other error comes again
        singles = [one(_row(batch, i)) for i in range(rows_in(batch))]
    return tree_map(lambda *parts: torch.stack(parts), *singles)


def _row(batch: Batch, i: int) -> Any:
    return tree_map(lambda value: value[i], batch)


def as_batch(example: Any) -> Batch:
    """A row as a batch of one."""
    return tree_map(lambda value: value[None], example)


ENGINES = {"ghost": ghost, "jvp": forward_mode, "rows": by_rows}


def choose_engine(
    problem: Problem, count: int, rows: np.ndarray, engine: Engine
) -> tuple[str, Coverage]:
    """(the engine to use, what layers were seen to do): ghost only where it agrees with plain autograd on a few rows."""
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {engine!r}; one of auto, {', '.join(ENGINES)}")
    if engine in ("jvp", "rows"):
        return engine, UNTRIED
    coverage = coverage_of(problem, rows)
    if not coverage.wrong:
        return "ghost", coverage
    if engine == "ghost":
        raise ValueError(
            f"expected layers whose parameters act in their own forward, but {sorted(coverage.wrong)[:5]} do not; "
            "use engine='jvp' or 'rows', or 'auto', which does so by itself"
        )
    return plain_engine(problem, count, rows), coverage


def plain_engine(problem: Problem, count: int, rows: np.ndarray) -> str:
    """The engine for layers that ghost products do not cover: jvp for few directions, where there is one."""
    some = take(problem.train, rows[:2], problem.device)
    return "jvp" if count <= FEW and has_forward_mode(problem, some) else "rows"


def has_forward_mode(problem: Problem, batch: Batch) -> bool:
    """Whether the losses can be differentiated along a direction; some layers have reverse mode alone."""
    params = problem.params
    still = {name: torch.zeros_like(value)[None] for name, value in params.items()}
    try:
        found = forward_mode(problem.model, problem.loss, params, still, batch)
    except (NotImplementedError, RuntimeError, ValueError):  # a ValueError: types that may not meet
        return False
    return bool(torch.isfinite(found).all())  # attention's masks in float16 may give NaN


# --- sums of gradients, gradients of outputs ---------------------------------------------------


@torch.enable_grad()  # whatever the caller is in
def mean_gradient(
    problem: Problem, weights: ArrayLike | None = None, batch_size: int = 256
) -> Params:
    """(1/n) Σ w_i ∇ℓ_i(θ) + weight_decay θ: the gradient of the trained objective, dict name -> shape."""
    leaf = _leaves(problem.params)
    w = torch.ones(problem.n) if weights is None else torch.as_tensor(np.asarray(weights))
    total = {k: decay_of(problem.weight_decay, k) * value.detach() for k, value in leaf.items()}
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


def output_gradients(
    model: nn.Module, outputs: Outputs, batch_size: int = 64, params: Params | None = None
) -> Params:
    """Gradients of all t outputs with respect to the parameters (or the tensors given, buffers of the
    model among them), dict name -> [t, *shape]."""
    return valued_gradients(model, outputs, batch_size, params)[1]


@torch.enable_grad()  # whatever the caller is in
def valued_gradients(
    model: nn.Module, outputs: Outputs, batch_size: int = 64, params: Params | None = None
) -> tuple[Tensor, Params]:
    """(the outputs [t], float64 on the CPU, their gradients), in eval mode, of one pass but where many rows are
    differentiated together."""
    refuse_mixed_outputs(model, outputs)
    params = trainable(model) if params is None else params
    with in_eval_mode(model):
        return _valued_gradients(model, outputs, batch_size, params)


def _valued_gradients(
    model: nn.Module, outputs: Outputs, batch_size: int, params: Params
) -> tuple[Tensor, Params]:
    """`valued_gradients`, in the mode that the model is in."""
    if outputs.matrix is not None:
        return _mean_gradients(model, outputs, batch_size, params)
    if len(outputs) <= SINGLY:  # torch's vmap takes a second to load
        return _single_gradients(model, outputs, params)
    refuse_steps(model, outputs, params)
    device = next(iter(params.values())).device
    parts = [
        row_gradients(model, outputs.function, params, take(outputs.data, rows, device))
        for rows in batches(len(outputs.data), batch_size)
    ]
    gradients = {name: torch.cat([part[name] for part in parts]) for name in params}
    return outputs.evaluate(model, params, batch_size), gradients


def _leaves(params: Params) -> Params:
    """Copies that gradients are taken by."""
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def _values_at(model: nn.Module, outputs: Outputs, leaf: Params, rows: Any) -> Tensor:
    """Outputs of some rows, differentiable in `leaf`."""
    batch = take(outputs.data, rows, next(iter(leaf.values())).device)
    values = per_example(model, outputs.function, batch, leaf, rows, what="output")
    _refuse_steps(values)
    return values


def _single_gradients(model: nn.Module, outputs: Outputs, params: Params) -> tuple[Tensor, Params]:
    """`valued_gradients`, a pass for each row."""
    leaf = _leaves(params)
    values, found = [], []
    for row in range(len(outputs)):
        value = _values_at(model, outputs, leaf, [row])
        values.append(value.detach())
        found.append(torch.autograd.grad(value[0], list(leaf.values()), materialize_grads=True))
    columns = zip(leaf, zip(*found, strict=True), strict=True)
    return torch.cat(values).double().cpu(), {name: torch.stack(x) for name, x in columns}


def _mean_gradients(
    model: nn.Module, outputs: Outputs, batch_size: int, params: Params
) -> tuple[Tensor, Params]:
    """`valued_gradients` of averages over rows, a backward pass for each average."""
    assert outputs.matrix is not None
    leaf = _leaves(params)
    total = torch.zeros(len(outputs), dtype=torch.float64)
    slopes = {name: value.new_zeros((len(outputs), *value.shape)) for name, value in leaf.items()}
    for rows in batches(len(outputs.data), batch_size):
        values = _values_at(model, outputs, leaf, rows)
        total += values.detach().double().cpu() @ outputs.matrix[rows]
        columns = values @ outputs.matrix[rows].to(values)
        for j, column in enumerate(columns):
            more = j + 1 < len(columns)
            found = torch.autograd.grad(
                column, list(leaf.values()), retain_graph=more, allow_unused=True
            )
            for name, g in zip(leaf, found, strict=True):
                if g is not None:
                    slopes[name][j] += g
    return total, {name: value.detach() for name, value in slopes.items()}


def refuse_steps(model: nn.Module, outputs: Outputs, params: Params | None = None) -> None:
    """Raise for outputs without a derivative by the parameters, where none would pass for one of 0."""
    # whatever the caller is in
    with torch.inference_mode(False), torch.enable_grad(), in_eval_mode(model):
        values = trainable(model) if params is None else params
        leaf = {name: value.detach().requires_grad_() for name, value in values.items()}
        for part in parts_of(outputs):
            _values_at(model, part, leaf, [0])


def _refuse_steps(values: Tensor) -> None:
    """Raise for outputs without a derivative."""
    if not values.requires_grad:
        raise ValueError(
            "expected outputs with a derivative by the parameters of the model they are given, got some "
            "without (an accuracy, an argmax, a detached value, another model's); use a loss or a margin"
        )
