"""Baselines that need no parameter gradient: who resembles the target?

Similar text or images are *corroborative* evidence: they say where a prediction may come from, not what
the model would do without them. Their scores have no unit; they stand beside the methods as floors.

    s_j · similarity(z_i, target_j),   s_j = −sign ⟨∇ loss(target_j), ∇ output_j⟩

s_j is what a twin of the target in the training set would do to it: lower it if it is a loss, raise it
if it is a margin. It is read off the model, so that the sign law holds here too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution_core.datamodel import LinearDatamodel
from attribution_core.gradients import Progress, row_gradients
from attribution_core.layers import watched
from attribution_core.problem import (
    Batch,
    Data,
    Outputs,
    PerExample,
    Problem,
    batches,
    call,
    rows_in,
    take,
    trainable,
)

SIGN_ROWS = 8  # targets whose gradients are held at once


def representation_similarity(
    problem: Problem,
    outputs: Outputs,
    *,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Corroborative: cosine of representations, negated where both have class labels that differ.

    Args:
        layer: the module whose input is the representation; by default the last that holds parameters.
            Sequences are averaged over the positions that attention_mask counts.
        progress: wraps the loop over training batches (tqdm).

    Raises:
        ValueError: an unknown layer; target rows that the training loss cannot be evaluated on.

    Source: Hanawa et al. 2021 (cosine of the last layer's input).
    """
    train, target = _represented(problem, outputs, layer, batch_size, progress)
    similarity = _unit(train) @ _unit(target).T
    own, theirs = _labels(problem.train, batch_size), _labels(outputs.data, batch_size)
    if own is not None and theirs is not None:
        similarity = similarity * np.where(own[:, None] == theirs[None], 1.0, -1.0)
    return _datamodel(problem, outputs, similarity, {"method": "representation_similarity"})


def knn(
    problem: Problem,
    outputs: Outputs,
    *,
    k: int = 10,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Corroborative: Shapley values of a K-nearest-neighbour classifier on representations.

    The game is v(S) = (1/K) · (how many of the K nearest in S share the target's label). With examples
    sorted by distance and m_i = 1 where labels agree (Jia et al. 2019, thm. 1, and for n < K):
    s_n = m_n min(K, n)/(K n),  s_i = s_{i+1} + (m_i − m_{i+1})/K · min(K, i)/i.

    Args:
        layer, progress: see `representation_similarity`.

    Raises:
        ValueError: batches without class labels; k below 1.
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    own, theirs = _labels(problem.train, batch_size), _labels(outputs.data, batch_size)
    if own is None or theirs is None:
        raise ValueError(
            "expected batches with one integer label a row, (inputs, labels) or a dict with 'labels', "
            "got others; use representation_similarity or bm25"
        )
    train, target = _represented(problem, outputs, layer, batch_size, progress)
    distance = (
        np.square(train).sum(1)[:, None] - 2 * train @ target.T
    )  # less ‖target‖², the same for all
    values = knn_shapley(distance, own[:, None] == theirs[None], k)
    return _datamodel(problem, outputs, values, {"method": "knn", "k": k})


def knn_shapley(distance: NDArray[Any], match: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Shapley values [n, t] of the K-nearest-neighbour game, from distances and label matches [n, t].

    >>> knn_shapley(np.array([[0.0], [1.0]]), np.array([[True], [False]]), 1)[:, 0].tolist()
    [1.0, 0.0]
    """
    n = len(distance)
    order = np.argsort(distance, axis=0, kind="stable")
    m = np.take_along_axis(match, order, axis=0).astype(float)
    i = np.arange(1, n + 1)[:, None]
    steps = np.minimum(k, i) / (k * i) * m
    steps[:-1] -= (np.minimum(k, i) / (k * i))[:-1] * m[1:]
    values = np.zeros_like(steps)
    np.put_along_axis(values, order, np.cumsum(steps[::-1], axis=0)[::-1], axis=0)
    return values


def bm25(
    problem: Problem,
    outputs: Outputs,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    batch_size: int = 64,
) -> LinearDatamodel:
    """Corroborative: BM25 between token sequences, Σ_q idf(q) tf (k1 + 1) / (tf + k1 (1 − b + b |D| / mean |D|)).

    idf(q) = log(1 + (n − df + ½) / (df + ½)); q runs over the target's tokens, repeats included. Tokens
    are `input_ids`; those that attention_mask leaves out do not count.

    Raises:
        ValueError: batches without input_ids.

    Source: Robertson & Zaragoza 2009, eq. 3.15.
    """
    documents, queries = _tokens(problem.train, batch_size), _tokens(outputs.data, batch_size)
    width = 1 + max(int(max(t.max(initial=0) for t in side)) for side in (documents, queries))
    tf, asked = _counts(documents, width), _counts(queries, width)
    n = len(documents)
    df = np.asarray((tf > 0).sum(axis=0)).ravel()
    idf = np.log1p((n - df + 0.5) / (df + 0.5))
    length = np.asarray(tf.sum(axis=1)).ravel()
    norm = k1 * (1 - b + b * length / max(length.mean(), 1e-12))
    weighted = tf.copy()
    weighted.data = tf.data * (k1 + 1) / (tf.data + np.repeat(norm, np.diff(tf.indptr)))
    similarity = np.asarray((weighted.multiply(idf[None]) @ asked.T).todense())
    return _datamodel(problem, outputs, similarity, {"method": "bm25", "k1": k1, "b": b})


# --- representations -----------------------------------------------------------------------------


def representations(
    model: nn.Module,
    function: PerExample,
    data: Data,
    *,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> NDArray[np.float64]:
    """What goes into a layer, [rows, width], when function(model, batch) is called; sequences averaged.

    Args:
        layer: a module's name; by default the last module called that holds parameters.
    """
    device = next(model.parameters()).device
    module = _layer(model, function, take(data, [0], device), layer)
    found = []
    for rows in progress(list(batches(len(data), batch_size))):
        batch = take(data, rows, device)
        with torch.no_grad():
            found.append(_averaged(_input_of(module, model, function, batch), batch).double().cpu())
    return torch.cat(found).numpy()


def activation_gradients(
    problem: Problem, *, layer: str | None = None, batch_size: int = 64, progress: Progress = iter
) -> NDArray[np.float64]:
    """Gradients of the losses with respect to a layer's input, [n, width], summed over positions.

    The features of Grad-K-Means (Ley et al. 2024, sec. 4).
    """
    model, device = problem.model, problem.device
    module = _layer(model, problem.loss, take(problem.train, [0], device), layer)
    found = []
    for rows in progress(list(batches(problem.n, batch_size))):
        batch = take(problem.train, rows, device)
        leaves: list[Tensor] = []

        def cut(_: nn.Module, args: Any, leaves: list[Tensor] = leaves) -> Any:
            leaves.append(args[0].detach().requires_grad_())
            return (leaves[-1], *args[1:])

        handle = module.register_forward_pre_hook(cut)
        try:
            losses = call(model, problem.loss, problem.params, batch)
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(losses.sum(), leaves[-1:])
        found.append(_flat_positions(gradient).sum(1).double().cpu())
    return torch.cat(found).numpy()


def _layer(model: nn.Module, function: PerExample, batch: Batch, name: str | None) -> nn.Module:
    if name is not None:
        modules = dict(model.named_modules())
        if name not in modules:
            raise ValueError(f"no layer {name!r} in the model; it has {list(modules)[1:6]} ...")
        return modules[name]
    seen: list[nn.Module] = []
    names = {key for key, _ in model.named_parameters()}

    def note(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    with watched(model, names, rows_in(batch), lambda *_: None, note):
        call(model, function, trainable(model), batch)
    if not seen:
        raise ValueError("expected a model with layers that hold parameters; name one by layer=")
    return seen[-1]


def _input_of(module: nn.Module, model: nn.Module, function: PerExample, batch: Batch) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        call(model, function, trainable(model), batch)
    finally:
        handle.remove()
    return seen[-1]


def _flat_positions(x: Tensor) -> Tensor:
    """[b, positions, width]."""
    return x.reshape(len(x), -1, x.shape[-1]) if x.ndim > 2 else x[:, None]


def _averaged(x: Tensor, batch: Batch) -> Tensor:
    """[b, width]: the mean over positions, those that attention_mask counts."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    x = _flat_positions(x)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    return (x * mask[..., None].to(x)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(x)


def _represented(
    problem: Problem, outputs: Outputs, layer: str | None, batch_size: int, progress: Progress
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    train = representations(
        problem.model, problem.loss, problem.train, layer=layer, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    return train, representations(
        problem.model, outputs.function, outputs.data, layer=layer, batch_size=batch_size
    )


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


# --- labels, tokens, signs -----------------------------------------------------------------------


def _labels(data: Data, batch_size: int) -> NDArray[Any] | None:
    """One integer label a row, from (inputs, labels) or a dict's "labels"; None where there are none."""
    found = []
    for rows in batches(len(data), batch_size):
        batch = take(data, rows)
        label = batch.get("labels") if isinstance(batch, dict) else batch[-1]
        if label is None or label.ndim != 1 or label.is_floating_point():
            return None
        found.append(label)
    return torch.cat(found).numpy()


def _tokens(data: Data, batch_size: int) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []
    for rows in batches(len(data), batch_size):
        batch = take(data, rows)
        if not isinstance(batch, dict) or "input_ids" not in batch:
            raise ValueError("expected batches with input_ids, got others; bm25 compares tokens")
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found += [ids[m > 0].numpy() for ids, m in zip(batch["input_ids"], mask, strict=True)]
    return found


def _counts(texts: list[NDArray[Any]], width: int) -> Any:
    from scipy.sparse import csr_matrix

    rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    entries = (np.ones(len(rows)), (rows, np.concatenate(texts)))
    counts = csr_matrix(entries, shape=(len(texts), width))
    counts.sum_duplicates()
    return counts


def _signs(problem: Problem, outputs: Outputs) -> NDArray[np.float64]:
    """s_j of every target row, [rows]; gradients with respect to the last layer's parameters."""
    model, device = problem.model, problem.device
    last = _layer(model, outputs.function, take(outputs.data, [0], device), None)
    own = {id(p) for p in last.parameters(recurse=False)}
    params = {name: p.detach() for name, p in model.named_parameters() if id(p) in own}
    found = []
    for rows in batches(len(outputs.data), SIGN_ROWS):
        batch = take(outputs.data, rows, device)
        try:
            loss = row_gradients(model, problem.loss, params, batch)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"expected targets that the training loss can be evaluated on, got {error}; their sign "
                "is that of a training twin's effect"
            ) from error
        output = row_gradients(model, outputs.function, params, batch)
        products = sum((loss[k] * output[k]).flatten(1).sum(1) for k in params)
        assert isinstance(products, Tensor)
        found.append(-products.sign())
    return torch.cat(found).double().cpu().numpy()


def _datamodel(
    problem: Problem, outputs: Outputs, similarity: NDArray[Any], meta: dict[str, Any]
) -> LinearDatamodel:
    scores = similarity * _signs(problem, outputs)
    if outputs.matrix is not None:
        scores = scores @ outputs.matrix.numpy()
    names = np.asarray(outputs.names) if outputs.names else None
    base = outputs.evaluate(problem.model).numpy()
    return LinearDatamodel(
        scores, base, np.ones(problem.n), targets=names, meta={**meta, "evidence": "corroborative"}
    )
