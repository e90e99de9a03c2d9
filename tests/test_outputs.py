"""attribution_core.outputs: ready functions against torch's, transformers' and the definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import (
    Outputs,
    Problem,
    causal_lm_loss,
    cross_entropy,
    influence,
    margin,
    squared_error,
)
from attribution_core.outputs import next_labels
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


# --- padding, and what else a model is given -------------------------------------------------------


def padded(left, attention):
    """Four sequences of a Llama (rotary positions: they do not care where one begins), padded on one side."""
    model = menagerie.llama(6, 7).model
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
    sides = [torch.zeros(4, 3, dtype=torch.long), ids]
    masks = [torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 5, dtype=torch.long)]
    turn = 1 if left else -1
    data = {
        "input_ids": torch.cat(sides[::turn], 1), "attention_mask": torch.cat(masks[::turn], 1),
    }  # fmt: skip
    return Problem(model, causal_lm_loss, data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_is_padding_on_the_right(attention):
    """Nothing is predicted from padding, which on the left precedes the first token."""
    one, other = (padded(left, attention) for left in (False, True))
    plain = Problem(one.model, causal_lm_loss, {"input_ids": one.train.columns["input_ids"][:, :5]})
    losses = [Outputs(p.loss, p.train).evaluate(p.model) for p in (plain, one, other)]
    # positions are counted from 0 on the left, too: rotary angles round otherwise
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-12)
    scores = [
        influence(p, Outputs(p.loss, p.train), curvature="gauss_newton", damping=0.1).scores
        for p in (one, other)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-8, atol=1e-12)


def test_labels_that_were_given_are_not_predicted_from_padding_either():
    ids, mask = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 1, 1, 1]])
    given = next_labels({"input_ids": ids, "labels": ids, "attention_mask": mask})
    assert given.tolist() == [[-100, 4, 5]]
    masked = torch.tensor([[1, 1, 0, 0]])  # labels at padding were asked for
    assert next_labels({"input_ids": ids, "labels": ids, "attention_mask": masked}).tolist() == [
        [3, 4, -100]
    ]


def test_positions_and_token_types_reach_the_model():
    """Two short texts packed in a row count their positions from 0 each."""
    problem = menagerie.gpt2(3, 8)
    ids = problem.train.columns["input_ids"]
    more = {
        "position_ids": torch.tensor([[0, 1, 2, 3] * 2] * 3),
        "token_type_ids": torch.ones_like(ids),
    }
    plain = causal_lm_loss(problem.model, {"input_ids": ids})
    for name, column in more.items():
        found = causal_lm_loss(problem.model, {"input_ids": ids, name: column})
        own = problem.model(input_ids=ids, **{name: column}, use_cache=False).logits[:, :-1]
        expected = F.cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(found, expected.reshape(3, 7).mean(1))
        assert (found - plain).abs().min() > 1e-4


def test_losses_of_classes_refuse_what_has_none():
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="two classes or more"):
        cross_entropy(nn.Linear(3, 1), (rows, torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="take causal_lm_loss"):
        cross_entropy(nn.Linear(3, 4), (torch.zeros(2, 5, 3), torch.zeros(2, 5).long()))
    with pytest.raises(ValueError, match="and labels"):
        margin(nn.Linear(3, 4), (rows, torch.zeros(2, 1).long()))
    problem = menagerie.gpt2(2)
    with pytest.raises(ValueError, match="rows with labels"):
        cross_entropy(problem.model, {"input_ids": problem.train.columns["input_ids"]})


def test_a_model_that_takes_no_token_types_is_given_none():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(11, 11)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return SimpleNamespace(logits=self.emb(input_ids))

    ids = torch.randint(0, 11, (2, 5))
    told = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    model = Plain()
    assert torch.equal(causal_lm_loss(model, told), causal_lm_loss(model, {"input_ids": ids}))


def test_labels_of_any_whole_type_are_labels():
    rows, y = torch.randn(4, 3), torch.tensor([0, 3, 1, 2])
    model = nn.Linear(3, 4)
    for dtype in (torch.int32, torch.uint8):
        for output in (cross_entropy, margin):
            assert torch.equal(output(model, (rows, y.to(dtype))), output(model, (rows, y)))


def test_numbers_that_the_model_does_not_know_are_named():
    rows = torch.randn(2, 3)
    for labels, outputs in (([0, 4], (cross_entropy, margin)), ([0, -100], (margin,))):
        for output in outputs:
            with pytest.raises(ValueError, match=r"labels that the model knows .*\(2, 4\)"):
                output(nn.Linear(3, 4), (rows, torch.tensor(labels)))
    with pytest.raises(RuntimeError, match="shapes"):  # other errors stay what they are
        cross_entropy(nn.Linear(5, 4), (rows, torch.tensor([0, 1])))


def test_tokens_that_the_model_does_not_know_are_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    ).eval()
    for ids in ([[0, 11, 2]], [[0, 1, 2, 3, 4]]):
        with pytest.raises(ValueError, match="vocab_size 11, max_position_embeddings 4"):
            causal_lm_loss(model, {"input_ids": torch.tensor(ids)})


class OfTwo(torch.nn.Module):
    """Adds its two inputs."""

    def forward(self, x, c):
        return x + c


def test_a_model_is_given_all_columns_but_the_labels():
    x, c, y = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4) % 3
    expected = torch.nn.functional.cross_entropy(x + c, y, reduction="none")
    assert torch.equal(cross_entropy(OfTwo(), (x, c, y)), expected)
    assert torch.equal(cross_entropy(OfTwo(), {"x": x, "c": c, "labels": y}), expected)
    with pytest.raises(TypeError, match=r"'y'; a model is given every column of a dict but labels"):
        cross_entropy(OfTwo(), {"x": x, "c": c, "y": y, "labels": y})


class OfParts(nn.Linear):
    """Returns its logits in something else."""

    def __init__(self, form):
        super().__init__(2, 3)
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x))


@pytest.mark.parametrize("function", [cross_entropy, margin, squared_error])
def test_models_that_return_no_logits_are_told(function):
    """They ended in AttributeError: 'tuple' object has no attribute 'ndim'."""
    batch = (torch.ones(4, 2), torch.arange(4) % 3)
    for form, words in (
        (lambda z: (z, z), "got a tuple of OfParts; return the logits alone"),
        (lambda z: {"logits": z, "aux": z}, r"got a dict with \['logits', 'aux'\] of OfParts"),
        (lambda z: SimpleNamespace(logits=(z,)), "got a tuple of OfParts"),
        (lambda z: None, "got a NoneType of OfParts"),
    ):
        with pytest.raises(ValueError, match=r"expected a model that returns logits, .*" + words):
            function(OfParts(form), batch)
    held = OfParts(lambda z: SimpleNamespace(logits=z))
    assert torch.equal(
        cross_entropy(held, batch),
        F.cross_entropy(nn.Linear.forward(held, batch[0]), batch[1], reduction="none"),
    )


@pytest.mark.parametrize(
    "labels",
    [torch.arange(4.0), torch.arange(4)[:, None], torch.eye(4, 3).long(), torch.ones(4, 2)],
)
def test_labels_that_are_no_classes(labels):
    with pytest.raises(ValueError, match=r"whole labels \[b=4\], or a probability for each of 3"):
        cross_entropy(torch.nn.Linear(2, 3), (torch.ones(4, 2), labels))


def test_rows_without_labels():
    with pytest.raises(ValueError, match="expected rows with labels, got 1 column"):
        cross_entropy(torch.nn.Linear(2, 3), (torch.ones(4, 2),))


def test_yeses_and_noes_have_a_squared_error():
    x, yes = torch.ones(4, 2), torch.tensor([True, False, True, True])
    model = torch.nn.Linear(2, 1)
    assert torch.equal(squared_error(model, (x, yes)), squared_error(model, (x, yes.float())))
