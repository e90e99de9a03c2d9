"""Baselines that need no parameter gradient: who resembles the target?

Similar text or images are *corroborative* evidence: they say where a prediction may come from, not what
the model would do without them. Their scores have no unit; they stand beside the methods as floors.

    s_j · similarity(z_i, target_j),   s_j = −sign ⟨∇ loss(target_j), ∇ output_j⟩

s_j is what a twin of the target in the training set would do to it: lower it if it is a loss, raise it
if it is a margin. It is read off the model, so that the sign law holds here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from attribution_core.calling import per_example
from attribution_core.data import Data, Progress, as_data, batches, take, unlabelled
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.gradients import refuse_steps, row_gradients
from attribution_core.joining import parts_of
from attribution_core.layerwise.representations import last_layer, representations
from attribution_core.layerwise.vectors import flatten, size_of
from attribution_core.outputs import labels_in
from attribution_core.problem import Outputs, Problem
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.stepwise.trained import several, trained
from attribution_core.training import Run

BLOCK = 2**20  # distances worked on at a time, 8 MiB
HELD = 2**26  # numbers of per-row gradients held at once where signs are found (256 MiB in float32)
Source = Problem | Run | Sequence[Run]
Similar = Callable[[Outputs], NDArray[Any]]  # of every training row to every target row


def representation_similarity(
    source: Source,
    outputs: Outputs,
    *,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Corroborative: cosine of representations, negated where both have class labels that differ.

        scores[i, j] = s_j y_ij ⟨h_i, h_j⟩ / (‖h_i‖ ‖h_j‖)      y_ij = ±1 for equal and other labels, else 1

    Args:
        source: a problem whose model is trained, a `Run`, or several runs, which are averaged.
        layer: whose input is the representation, see `representations`.
        progress: wraps the loop over training batches (tqdm).

    Returns:
        scores [n, t] in [−1, 1], without units (a slope on them says nothing); base f [t].

    Raises:
        ValueError: an unknown layer; target rows that the training loss cannot be evaluated on.

    Source: Hanawa et al. 2021 (cosine of the last layer's input).
    """

    def similar(problem: Problem) -> Similar:
        own = class_labels(problem.train)
        train, represented = _represented(problem, layer, batch_size, progress)

        def to(part: Outputs) -> NDArray[Any]:
            similarity, theirs = _unit(train) @ _unit(represented(part)).T, class_labels(part.data)
            if own is None or theirs is None:
                return similarity
            return similarity * np.where(own[:, None] == theirs, 1.0, -1.0)

        return to

    return _floor(source, outputs, similar, {"method": "representation_similarity"})


def knn(
    source: Source,
    outputs: Outputs,
    *,
    k: int = 10,
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = iter,
) -> LinearDatamodel:
    """Corroborative: Shapley values of a K-nearest-neighbour classifier on representations.

    The game is v(S) = (1/K) · (how many of the K nearest in S share the target's label). With examples
    sorted by Euclidean distance and m_i = 1 where labels agree (Jia et al. 2019, thm. 1, and for n < K):

        s_n = m_n min(K, n)/(K n),  s_i = s_{i+1} + (m_i − m_{i+1})/K · min(K, i)/i

    Args:
        source, layer, progress: see `representation_similarity`.

    Returns:
        scores [n, t], shares of the classifier's vote, not of the output; base f [t].

    Raises:
        ValueError: batches without class labels; k below 1 or not whole; see `representation_similarity`.
    """
    _whole(k)

    def similar(problem: Problem) -> Similar:
        own = class_labels(problem.train)
        if own is None or any(class_labels(part.data) is None for part in parts_of(outputs)):
            raise ValueError(
                "expected batches with one integer label a row, (inputs, labels) or a dict with "
                "'labels', got others; use representation_similarity or bm25"
            )
        train, represented = _represented(problem, layer, batch_size, progress)

        def to(part: Outputs) -> NDArray[Any]:
            target = represented(part)
            values = np.empty((len(train), len(target)))
            for j, place in enumerate(target):  # by differences: equal rows stay equally far
                values[:, j] = np.square(train - place).sum(1)
            return knn_shapley(values, own[:, None] == class_labels(part.data), k)

        return to

    return _floor(source, outputs, similar, {"method": "knn", "k": k})


def knn_values(
    x: ArrayLike, y: ArrayLike, target_x: ArrayLike, target_y: ArrayLike, *, k: int = 5
) -> LinearDatamodel:
    """Exact Shapley values of a K-nearest-neighbour classifier on features, without any model.

        v_j(S) = (1/K) · (how many of the K nearest to target j in S share its label), see `knn`

    Args:
        x, y: features [n, d] and labels [n] of the training examples.
        target_x, target_y: [t, d] and [t] of the targets.
        k: neighbours that vote; may exceed n.

    Returns:
        scores [n, t], base v_j(everyone), anchor 1: f̂(0) = 0 = v_j(nobody). `values` reads it.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, k below 1 or not whole; no training
            examples; labels that are missing, or text beside numbers.

    Source: Jia et al. 2019, thm. 1; min(K, n)/(K n) for the last neighbour, which holds for n < K too.

    >>> knn_values([[0.0], [1.0]], [1, 0], [[0.1]], [1], k=3).scores[:, 0].round(4).tolist()
    [0.3333, 0.0]
    """
    from scipy.spatial.distance import cdist

    own, theirs = np.asarray(x, dtype=float), np.asarray(target_x, dtype=float)
    labels, wanted = np.asarray(y), np.asarray(target_y)
    fit = own.ndim == theirs.ndim == 2 and own.shape[1] == theirs.shape[1]
    if not fit or labels.shape != own.shape[:1] or wanted.shape != theirs.shape[:1]:
        raise ValueError(
            f"expected x [n, d], y [n], target_x [t, d], target_y [t], got {own.shape}, {labels.shape}, "
            f"{theirs.shape}, {wanted.shape}"
        )
    _whole(k)
    if not (np.isfinite(own).all() and np.isfinite(theirs).all()):
        raise ValueError(
            "expected finite features, got NaN or infinity; mend or leave out those rows"
        )
    if not len(own):
        raise ValueError("expected at least one training example, got none")
    for name, given in (("y", y), ("target_y", target_y)):
        if lost := unlabelled(given):
            raise ValueError(
                f"expected a label for every row, got none in rows {lost[:10]} of {name}; a missing label matches "
                "nothing, and would count as wrong: leave those rows out, or name them"
            )
    text, asked = ({isinstance(label, str) for label in of.tolist()} for of in (labels, wanted))
    if text and asked and text.isdisjoint(asked):
        raise ValueError(
            f"expected labels of one type, got {labels[:3].tolist()} and, of targets, {wanted[:3].tolist()}; a number "
            "and its text never match"
        )
    scores = np.empty((len(own), len(theirs)))
    for some in batches(len(theirs), max(1, BLOCK // len(own))):
        distance = cdist(theirs[some], own, "sqeuclidean")  # by differences: ties stay ties
        scores[:, some] = _ranked(distance, wanted[some, None] == labels, k).T
    meta = {"method": "knn_values", "k": k}
    return LinearDatamodel(scores, scores.sum(0), np.ones(len(own)), meta=meta)


def _whole(k: Any) -> None:
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ValueError(
            f"expected a whole k of at least 1, got {k!r}; neighbours cannot be parted"
        )


def knn_shapley(distance: NDArray[Any], match: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Shapley values [n, t] of the K-nearest-neighbour game, from distances and label matches [n, t].

    Of equally distant examples the earlier is taken for the nearer.

    >>> knn_shapley(np.array([[0.0], [1.0]]), np.array([[True], [False]]), 1)[:, 0].tolist()
    [1.0, 0.0]
    """
    return _ranked(np.ascontiguousarray(distance.T), match.T, k).T


def _ranked(distance: NDArray[Any], match: NDArray[Any], k: int) -> NDArray[np.float64]:
    """The same for targets in rows, [t, n]."""
    order = np.argsort(distance, axis=1, kind="stable")
    m = np.take_along_axis(match, order, axis=1).astype(float)
    i = np.arange(1, m.shape[1] + 1)
    steps = m.copy()
    steps[:, :-1] -= m[:, 1:]
    steps *= np.minimum(k, i) / (k * i)
    values = np.empty_like(steps)
    np.put_along_axis(values, order, np.cumsum(steps[:, ::-1], axis=1)[:, ::-1], axis=1)
    return values


def bm25(
    source: Source,
    outputs: Outputs,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    batch_size: int = 64,
) -> LinearDatamodel:
    """Corroborative: BM25 between token sequences, Σ_q idf(q) tf (k1 + 1) / (tf + k1 (1 − b + b |D| / mean |D|)).

    idf(q) = log(1 + (n − df + ½) / (df + ½)); q runs over the target's tokens, repeats included. Tokens
    are `input_ids`; those that attention_mask leaves out do not count.

    Returns:
        scores [n, t], without units; base f [t].

    Raises:
        ValueError: batches without input_ids; target rows that the training loss cannot be evaluated on.

    Source: Robertson & Zaragoza 2009, eq. 3.15, with the 1 inside idf, which keeps it from being negative.
    """

    def similar(problem: Problem) -> Similar:
        documents = _tokens(problem.train, batch_size)

        def to(part: Outputs) -> NDArray[Any]:
            queries = _tokens(part.data, batch_size)
            width = 1 + max(int(t.max(initial=0)) for t in (*documents, *queries))
            tf, asked = _counts(documents, width), _counts(queries, width)
            n = len(documents)
            df = np.bincount(tf.indices, minlength=width)
            idf = np.log1p((n - df + 0.5) / (df + 0.5))
            length = np.asarray(tf.sum(axis=1)).ravel()
            norm = k1 * (1 - b + b * length / max(length.mean(), 1e-12))
            tf.data *= (k1 + 1) * idf[tf.indices] / (tf.data + np.repeat(norm, np.diff(tf.indptr)))
            return (tf @ asked.T).toarray()

        return to

    return _floor(source, outputs, similar, {"method": "bm25", "k1": k1, "b": b})


def _represented(
    problem: Problem, layer: str | None, batch_size: int, progress: Progress
) -> tuple[NDArray[np.float64], Similar]:
    """(training rows as a layer sees them, target rows as the same layer sees them)."""
    model = problem.model
    name = last_layer(model, problem.loss, problem.train) if layer is None else layer
    train = representations(
        model, problem.loss, problem.train, layer=name, batch_size=batch_size, progress=progress
    )

    def represented(part: Outputs) -> NDArray[np.float64]:
        return representations(model, part.function, part.data, layer=name, batch_size=batch_size)

    return train, represented


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


# --- labels, tokens, signs -----------------------------------------------------------------------


def class_labels(data: Any, batch_size: int = 256) -> NDArray[Any] | None:
    """One integer label a row, from (inputs, labels) or a dict's "labels"; None where there are none."""
    data = as_data(data)
    found = []
    for rows in batches(len(data), batch_size):
        batch = take(data, rows)
        label = labels_in(batch)
        if label is None or label.ndim != 1 or label.is_floating_point():
            return None
        found.append(label)
    return torch.cat(found).cpu().numpy()


def _tokens(data: Data, batch_size: int) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []
    for rows in batches(len(data), batch_size):
        batch = take(data, rows)
        if not isinstance(batch, dict) or "input_ids" not in batch:
            raise ValueError("expected batches with input_ids, got others; bm25 compares tokens")
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found += [ids[m > 0].cpu().numpy() for ids, m in zip(batch["input_ids"], mask, strict=True)]
    return found


def _counts(texts: list[NDArray[Any]], width: int) -> Any:
    from scipy.sparse import csr_matrix

    rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    entries = (np.ones(len(rows)), (rows, np.concatenate(texts)))
    counts = csr_matrix(entries, shape=(len(texts), width))
    counts.sum_duplicates()
    return counts


def _signs(problem: Problem, outputs: Outputs) -> NDArray[np.float64]:
    """s_j of every target row, [rows]: one gradient step on a twin moves its output this way."""
    model, params = problem.model, problem.params
    refuse_steps(model, outputs)
    size = max(1, min(64, HELD // size_of(params)))
    found = []
    for rows in batches(len(outputs.data), size):
        batch = take(outputs.data, rows, problem.device)
        try:
            per_example(model, problem.loss, batch, params, rows)
            loss = row_gradients(model, problem.loss, params, batch)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"expected targets that the training loss can be evaluated on, got {error}; their sign "
                "is that of a training twin's effect: give them the columns of the training data"
            ) from error
        output = row_gradients(model, outputs.function, params, batch)
        products = (flatten(loss).double() * flatten(output).double()).sum(1)  # float32 underflows
        found.append(0.0 - products.sign().cpu())
    return torch.cat(found).numpy()


def _floor(
    source: Source,
    outputs: Outputs,
    similar: Callable[[Problem], Similar],
    meta: dict[str, Any],
) -> LinearDatamodel:
    """Similarities to all target rows as a datamodel: signed, combined into targets, at the anchor."""
    runs = several(source)
    if runs is not None:
        return average([_floor(run, outputs, similar, meta) for run in runs])
    assert isinstance(source, (Problem, Run))
    at = trained(source, window=True)  # whatever weights do, similarities are the same
    refuse_random_layers(at.problem.model)
    to = similar(at.problem)
    parts = [to(part) * _signs(at.problem, part) for part in parts_of(outputs)]
    scores = np.concatenate(parts, axis=1)
    if outputs.matrix is not None:
        scores = scores @ outputs.matrix.numpy()
    base = outputs.evaluate(at.problem.model).numpy()
    meta = {**meta, "evidence": "corroborative"}
    return LinearDatamodel(
        scores + 0.0, base, at.anchor, targets=outputs.targets, meta=meta
    )  # no −0
