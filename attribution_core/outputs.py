"""Ready functions (model, batch) -> [b]: losses to train on and outputs to predict, in nats.

A batch is (inputs, labels), or a dict whose "labels" are the labels and whose other entries are the
model's keyword arguments (what transformers models take).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.data import Batch

IGNORED = -100  # the label of what is not predicted
NOT_TO_MODELS = ("labels", "token_weights", "embedding_shift")
TO_MODELS = ("input_ids", "attention_mask")
IF_TAKEN = ("position_ids", "token_type_ids")


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits on a batch: it is given all columns but the labels, the last of a tuple.

    Raises:
        TypeError: a model that does not take these columns.
        ValueError: one that returns something else: a tuple, a dict.
    """
    columns: Any = {}
    inputs: list[Tensor] = []
    if isinstance(batch, dict):
        columns = {name: x for name, x in batch.items() if name not in NOT_TO_MODELS}
    else:
        *inputs, _ = batch
    try:
        out: Any = model(*inputs, **columns)
    except TypeError as error:
        raise TypeError(
            f"{error}; a model is given every column of a dict but {', '.join(NOT_TO_MODELS)}, or of a tuple all but the "
            "last, its labels: leave other columns out, or give the model a forward of your own that takes them"
        ) from error
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        parts = f" with {list(logits)}" if isinstance(logits, Mapping) else ""
        raise ValueError(
            f"expected a model that returns logits, or an object with .logits, got a {kind}{parts} of {type(model).__name__}; "
            "return the logits alone from its forward, or wrap it in a module whose forward takes them out"
        )
    return logits


def labels_in(batch: Batch) -> Tensor | None:
    """The labels of a batch: its last column, or the one of that name; None where there is none."""
    if isinstance(batch, dict):
        return batch.get("labels")
    return batch[-1] if len(batch) > 1 else None


def logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's logits on a batch, and the batch's labels.

    Raises:
        ValueError: rows without labels.
    """
    labels = labels_in(batch)
    if labels is None:
        columns = sorted(batch) if isinstance(batch, dict) else f"{len(batch)} column"
        raise ValueError(
            f"expected rows with labels, got {columns}; causal_lm_loss predicts the inputs themselves"
        )
    return logits_of(model, batch), labels


def next_labels(batch: Batch) -> Tensor:
    """What every position but the last of a sequence predicts, [b, L − 1]; −100 where nothing is predicted.

    Without labels the inputs are predicted, padding (mask 0) left out. Nothing is predicted from padding: there no
    model has anything to go by.

    >>> import torch
    >>> ids, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    >>> next_labels({"input_ids": ids, "attention_mask": mask}).tolist()
    [[-100, -100, 8, 9]]
    """
    if not isinstance(batch, dict):
        return batch[-1][:, 1:]
    labels, mask = labels_in(batch), batch.get("attention_mask")
    known = (batch["input_ids"] if labels is None else labels)[:, 1:]
    if mask is None or mask.ndim != 2:
        return known
    left_out = mask[:, :-1] == 0
    if labels is None:
        left_out = left_out | (mask[:, 1:] == 0)
    return known.masked_fill(left_out, IGNORED)


@contextmanager
def _in_range(numbers: str, known: object) -> Iterator[None]:
    """Say which numbers were expected where torch says that one is out of range."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if not any(words in str(error) for words in ("out of bounds", "out of range in self")):
            raise
        raise ValueError(
            f"expected {numbers} that the model knows ({known}), got others: {error}; number them from 0 on, "
            "or give the model more"
        ) from None


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(label), [b], nats; 0 where the label is −100.

    >>> import torch
    >>> model = nn.Linear(2, 3).requires_grad_(False)
    >>> _ = model.weight.zero_(), model.bias.zero_()
    >>> cross_entropy(model, (torch.ones(1, 2), torch.tensor([0]))).exp().round().item()  # 3 classes
    3.0
    """
    logits, labels = logits_and_labels(model, batch)
    if logits.ndim > 2 and labels.shape == logits.shape[:-1]:
        raise ValueError(
            f"expected logits [b, classes], got {tuple(logits.shape)}; of sequences take causal_lm_loss"
        )
    if logits.ndim > 1 and logits.shape[1] == 1:
        raise ValueError(
            f"expected logits of two classes or more, got {tuple(logits.shape)}, whose cross entropy is 0 whatever they are; "
            "take squared_error, or a loss of your own"
        )
    real = labels.is_floating_point()
    if logits.ndim == 2 and labels.shape != (logits.shape if real else logits.shape[:1]):
        raise ValueError(
            f"expected whole labels [b={len(logits)}], or a probability for each of {logits.shape[1]} classes, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}; cast by .long(), take one column, or argmax(1) of indicators"
        )
    with _in_range("labels", f"logits {tuple(logits.shape)}"):
        return F.cross_entropy(logits, _whole(labels), reduction="none")


def _whole(labels: Tensor) -> Tensor:
    """Labels of any whole type as torch wants them; probabilities as they are."""
    return labels if labels.is_floating_point() else labels.long()


def _own_and_others(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The label's logit [b], and all logits [b, classes] with −∞ in its place."""
    logits, labels = logits_and_labels(model, batch)
    if logits.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            f"expected logits [b, classes] and labels [b], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    with _in_range("labels", f"logits {tuple(logits.shape)}"):
        own = logits.gather(1, labels.long()[:, None])
    return own[:, 0], logits.scatter(1, labels.long()[:, None], float("-inf"))


def correct(model: nn.Module, batch: Batch) -> Tensor:
    """1 where the largest logit is the label's, else 0, [b]; their mean is the accuracy. It has no derivative.

    >>> x, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
    >>> correct(nn.Identity(), (x, labels)).tolist()
    [1.0, 0.0]
    """
    logits, labels = logits_and_labels(model, batch)
    if labels.is_floating_point() or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [b, classes] and whole labels [b], got {tuple(logits.shape)} and {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    return (logits.argmax(1) == labels).to(logits)


def margin(model: nn.Module, batch: Batch) -> Tensor:
    """log p/(1 − p) of the label, [b]: its logit less the logsumexp of the others (Park et al. 2023, eq. 8)."""
    own, others = _own_and_others(model, batch)
    return own - others.logsumexp(1)


def logit_margin(model: nn.Module, batch: Batch) -> Tensor:
    """The label's logit less the largest of the others, [b], positive where the label is the model's decision.

    >>> import torch
    >>> model = nn.Identity()
    >>> logit_margin(model, (torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 3.5]]), torch.tensor([1, 0]))).tolist()
    [2.0, -0.5]
    """
    own, others = _own_and_others(model, batch)
    return own - others.amax(1)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """½ ‖prediction − label‖², [b], summed over the label's entries."""
    prediction, labels = logits_and_labels(model, batch)
    labels = labels.to(prediction) if labels.dtype == torch.bool else labels
    wanted = labels.reshape(prediction.shape)
    off = (prediction - wanted).reshape(len(prediction), -1)
    return 0.5 * off.square().sum(1)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes a keyword."""
    known = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in known)


def causal_lm_loss(model: nn.Module, batch: Batch, *, tokens: int | None = None) -> Tensor:
    """Next-token loss of each sequence, [b]: nats summed over its predicted tokens, divided.

    Divided by the sequence's own count of predicted tokens or, where given, by the constant `tokens`
    (the block length): then a short document counts by its length, as in a token mean.

    The batch is a dict with input_ids [b, L] and, where needed, attention_mask and labels [b, L]
    (−100 is not predicted). Without labels the inputs are predicted, padding (mask 0) left out. Nothing is predicted
    from padding, on whichever side. Columns position_ids and token_type_ids go to models that take them.
    Two more columns are there to be differentiated by, `magic(wrt="inputs", column=...)`:
    token_weights [b, L] multiply the loss of predicting each token (the first is not predicted) and
    change no denominator; embedding_shift [b, L, width] is added to the tokens' embeddings.
    """
    if not isinstance(batch, dict):
        raise TypeError(f"expected a dict with input_ids, got a {type(batch).__name__}")
    inputs = {name: batch[name] for name in TO_MODELS if name in batch}
    inputs |= {name: batch[name] for name in IF_TAKEN if name in batch and _takes(model, name)}
    if "embedding_shift" in batch:
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        inputs["inputs_embeds"] = embed(inputs.pop("input_ids")) + batch["embedding_shift"]
    config = getattr(model, "config", None)
    sizes = [
        f"{name} {getattr(config, name, '?')}" for name in ("vocab_size", "max_position_embeddings")
    ]
    with _in_range("token numbers and positions", ", ".join(sizes)):
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = next_labels(batch)
    nats = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    nats = nats.reshape(labels.shape)
    if "token_weights" in batch:
        nats = nats * batch["token_weights"][:, 1:]
    total = nats.sum(1)
    if tokens is not None:
        return total / tokens
    return total / (labels != IGNORED).sum(1).clamp(min=1)
