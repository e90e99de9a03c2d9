"""attribution_core.outputs: ready functions against torch's, transformers' and the definitions."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import causal_lm_loss, cross_entropy, margin, squared_error
from tests import menagerie


def test_cross_entropy_of_tuples_and_dicts():
    problem = menagerie.mlp()
    x, y = problem.train.columns

    class Named(nn.Module):
        def forward(self, features):
            return problem.model(features)

    expected = F.cross_entropy(problem.model(x), y, reduction="none")
    assert torch.equal(cross_entropy(problem.model, (x, y)), expected)
    assert torch.equal(cross_entropy(Named(), {"features": x, "labels": y}), expected)


def test_cross_entropy_of_a_transformers_classifier():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=3,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).double().eval()
    batch = {"input_ids": torch.randint(1, 11, (4, 5)), "labels": torch.tensor([0, 2, 1, 1])}
    for row in range(4):
        one = {name: value[[row]] for name, value in batch.items()}
        torch.testing.assert_close(cross_entropy(model, one)[0], model(**one).loss)


def test_margin_is_the_log_odds_of_the_label():
    problem = menagerie.mlp()
    x, y = problem.train.columns
    p = problem.model(x).softmax(1)[torch.arange(len(y)), y]
    torch.testing.assert_close(margin(problem.model, (x, y)), (p / (1 - p)).log())


def test_margin_stays_finite_where_the_probability_is_one():
    logits = torch.tensor([[1000.0, 0.0, -1000.0]]).double()
    found = margin(nn.Identity(), (logits, torch.tensor([0])))
    torch.testing.assert_close(found, torch.tensor([1000.0]).double())


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3)])
def test_squared_error_for_labels_of_any_shape(shape):
    wide = shape[1] if len(shape) > 1 else 1
    model = nn.Linear(2, wide).double()
    x, y = torch.randn(5, 2).double(), torch.randn(shape).double()
    expected = 0.5 * (model(x) - y.reshape(5, wide)).pow(2).sum(1)
    torch.testing.assert_close(squared_error(model, (x, y)), expected)


@pytest.mark.parametrize("labels", ["none", "mask", "labels"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_lm_loss_is_transformers_own(name, labels):
    """Sequence by sequence, beside model(labels=...).loss, with padding and with ignored labels."""
    problem = menagerie.ARCHITECTURES[name]()
    ids = problem.train[[0, 1, 2, 3]]["input_ids"]
    batch, wanted = {"input_ids": ids}, ids.clone()
    if labels == "mask":
        mask = torch.ones_like(ids)
        mask[0, 4:] = mask[2, 2:] = 0
        batch["attention_mask"], wanted = mask, ids.masked_fill(mask == 0, -100)
    if labels == "labels":
        wanted[:, :3] = -100
        batch["labels"] = wanted
    found = causal_lm_loss(problem.model, batch)
    for row in range(4):
        one = {k: v[[row]] for k, v in batch.items() if k != "labels"}
        own = problem.model(**one, labels=wanted[[row]]).loss
        # transformers computes the loss in float32
        torch.testing.assert_close(found[row].float(), own.float(), rtol=1e-5, atol=1e-6)


def test_causal_lm_loss_divided_by_a_constant():
    problem = menagerie.llama()
    batch = problem.train[[0, 1, 2]]
    counts = batch["attention_mask"][:, 1:].sum(1)
    own = causal_lm_loss(problem.model, batch)
    fixed = causal_lm_loss(problem.model, batch, tokens=8)
    torch.testing.assert_close(fixed * 8, own * counts)


def test_causal_lm_loss_of_a_sequence_without_predicted_tokens_is_zero():
    problem = menagerie.gpt2()
    ids = problem.train[[0, 1]]["input_ids"]
    labels = ids.clone()
    labels[1] = -100
    found = causal_lm_loss(problem.model, {"input_ids": ids, "labels": labels})
    assert found[1] == 0
    assert np.isfinite(found.tolist()).all()


def test_causal_lm_loss_wants_names():
    problem = menagerie.gpt2()
    with pytest.raises(TypeError, match="expected a dict with input_ids, got"):
        causal_lm_loss(problem.model, (problem.train[[0]]["input_ids"],))


def test_squared_error_of_a_model_that_returns_numbers():
    model = lambda x: x.sum(1)  # noqa: E731
    x, y = torch.ones(3, 2), torch.tensor([2.0, 1.0, 0.0])
    assert squared_error(model, (x, y)).tolist() == [0.0, 0.5, 2.0]
