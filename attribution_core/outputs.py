"""Ready functions (model, batch) -> [b]: losses to train on and outputs to predict, in nats.

A batch is (inputs, labels), or a dict whose "labels" are the labels and whose other entries are the
model's keyword arguments (what transformers models take).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.data import Batch


def logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's logits on a batch, and the batch's labels."""
    if not isinstance(batch, dict):
        inputs, labels = batch
        out: Any = model(inputs)
    else:
        labels = batch["labels"]
        out = model(**{name: value for name, value in batch.items() if name != "labels"})
    return getattr(out, "logits", out), labels


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(label), [b], nats.

    >>> import torch
    >>> model = nn.Linear(2, 3).requires_grad_(False)
    >>> _ = model.weight.zero_(), model.bias.zero_()
    >>> cross_entropy(model, (torch.ones(1, 2), torch.tensor([0]))).exp().round().item()  # 3 classes
    3.0
    """
    logits, labels = logits_and_labels(model, batch)
    return F.cross_entropy(logits, labels, reduction="none")


def margin(model: nn.Module, batch: Batch) -> Tensor:
    """log p/(1 − p) of the label, [b]: its logit less the logsumexp of the others (Park et al. 2023, eq. 8)."""
    logits, labels = logits_and_labels(model, batch)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own[:, 0] - others.logsumexp(1)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """½ ‖prediction − label‖², [b], summed over the label's entries."""
    prediction, labels = logits_and_labels(model, batch)
    off = (prediction - labels.reshape(prediction.shape)).reshape(len(prediction), -1)
    return 0.5 * off.square().sum(1)


def causal_lm_loss(model: nn.Module, batch: Batch, *, tokens: int | None = None) -> Tensor:
    """Next-token loss of each sequence, [b]: nats summed over its predicted tokens, divided.

    Divided by the sequence's own count of predicted tokens or, where given, by the constant `tokens`
    (the block length): then a short document counts by its length, as in a token mean.

    The batch is a dict with input_ids [b, L] and, where needed, attention_mask and labels [b, L]
    (−100 is not predicted). Without labels the inputs are predicted, padding (mask 0) left out.
    Two more columns are there to be differentiated by, `magic(wrt="inputs", column=...)`:
    token_weights [b, L] multiply the loss of predicting each token (the first is not predicted) and
    change no denominator; embedding_shift [b, L, width] is added to the tokens' embeddings.
    """
    if not isinstance(batch, dict):
        raise TypeError(f"expected a dict with input_ids, got a {type(batch).__name__}")
    inputs = {
        name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")
    }
    labels = batch.get("labels")
    if labels is None:
        labels = inputs["input_ids"]
        if "attention_mask" in inputs:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    if "embedding_shift" in batch:
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        inputs["inputs_embeds"] = embed(inputs.pop("input_ids")) + batch["embedding_shift"]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    nats = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    nats = nats.reshape(labels.shape)
    if "token_weights" in batch:
        nats = nats * batch["token_weights"][:, 1:]
    total = nats.sum(1)
    if tokens is not None:
        return total / tokens
    return total / (labels != -100).sum(1).clamp(min=1)
