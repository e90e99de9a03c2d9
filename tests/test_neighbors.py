"""attribution_core.neighbors: closed forms, brute-force Shapley values, and the sign of a twin."""

import copy
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from applied.valuation import values
from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    RetrainingTable,
    all_subsets,
    average,
    cross_entropy,
    knn_values,
    margin,
    neighbors,
    squared_error,
    train,
)
from attribution_core.data import Rows
from attribution_core.layerwise.representations import activation_gradients, representations
from attribution_core.neighbors import (
    bm25,
    class_labels,
    knn,
    knn_shapley,
    representation_similarity,
)
from tests import menagerie

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few terms of size 1


def unseen(problem, function=margin):
    """Outputs at the problem's own inputs, shifted."""
    x, y = problem.train.columns
    return Outputs(function, (x[:4] + 0.1, y[:4]))


# --- Shapley values --------------------------------------------------------------------------


def brute_force(distance, match, k):
    """Shapley values [n] of one target by all coalitions."""
    n = len(distance)

    def worth(coalition):
        near = sorted(coalition, key=lambda i: (distance[i], i))[:k]
        return sum(float(match[i]) for i in near) / k

    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            share = 1 / (n * math.comb(n - 1, size))
            for some in combinations(others, size):
                values[i] += share * (worth((*some, i)) - worth(some))
    return values


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_knn_shapley_is_brute_force(k):
    """n = 7: also K = n, and K > n, where the recursion starts at m_n / K."""
    rng = np.random.default_rng(0)
    distance, match = rng.random((7, 4)), rng.random((7, 4)) < 0.5
    distance[3] = distance[5]  # a tie: the earlier row is the nearer
    expected = np.column_stack([brute_force(distance[:, j], match[:, j], k) for j in range(4)])
    np.testing.assert_allclose(knn_shapley(distance, match, k), expected, **CLOSE)


def test_the_values_share_out_what_all_give_together():
    rng = np.random.default_rng(1)
    distance, match = rng.random((50, 9)), rng.random((50, 9)) < 0.3
    near = np.take_along_axis(match, np.argsort(distance, axis=0), axis=0)[:5]
    np.testing.assert_allclose(knn_shapley(distance, match, 5).sum(0), near.mean(0), **CLOSE)


# --- representations -------------------------------------------------------------------------


def test_the_default_layer_is_the_last_that_runs():
    problem = menagerie.mlp()
    x, _ = problem.train.columns
    hidden = problem.model[:-1](x).detach()
    found = representations(problem.model, problem.loss, problem.train)
    np.testing.assert_allclose(found, hidden, **CLOSE)
    named = representations(problem.model, problem.loss, problem.train, layer="3")
    np.testing.assert_allclose(named, problem.model[:3](x).detach(), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequences_are_averaged_over_real_positions(name):
    """By plain means, one row at a time, padding cut off."""
    problem = menagerie.ARCHITECTURES[name]()
    columns = problem.train.columns
    found = representations(problem.model, problem.loss, columns, batch_size=4)
    ids = columns["input_ids"]
    mask = columns.get("attention_mask", torch.ones_like(ids))
    for row in range(len(ids)):
        with menagerie.precision_of(problem.params), torch.no_grad():
            real = ids[row, : mask[row].sum()][None]
            last = problem.model(input_ids=real, output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(found[row], last[0].mean(0), rtol=1e-10, atol=1e-12)


def test_images_and_a_layer_inside():
    problem = menagerie.conv()
    x, _ = problem.train.columns
    assert representations(problem.model, problem.loss, problem.train).shape == (6, 9)
    inside = representations(problem.model, problem.loss, problem.train, layer="first")
    np.testing.assert_allclose(inside, x.flatten(1))


class ByName(nn.Module):
    """A head that is called with a keyword."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(input=x.tanh())


def test_a_layer_called_by_keyword():
    x, y = menagerie.mlp().train.columns
    problem = Problem(ByName().double(), cross_entropy, (x, y))
    np.testing.assert_allclose(representations(problem.model, problem.loss, (x, y)), x.tanh())
    assert activation_gradients(problem).shape == (6, 4)


def test_activation_gradients_of_a_linear_head():
    """∂ cross-entropy / ∂h = Wᵀ (p − e_y)."""
    problem = menagerie.mlp()
    x, y = problem.train.columns
    logits = problem.model(x).detach()
    expected = (logits.softmax(1) - nn.functional.one_hot(y, 3)) @ problem.model[-1].weight.detach()
    np.testing.assert_allclose(activation_gradients(problem), expected, **CLOSE)
    few = activation_gradients(problem, "5", batch_size=2)
    np.testing.assert_allclose(few, expected, **CLOSE)


def test_activation_gradients_of_sequences_are_summed():
    """Along a shift of all hidden states: central differences through the head alone."""
    problem = menagerie.llama()
    model = copy.deepcopy(problem.model)
    found = activation_gradients(problem, batch_size=4)
    shift = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    h, losses = 1e-4, []
    for sign in (1, -1):
        handle = model.lm_head.register_forward_pre_hook(
            lambda _, args, sign=sign: (args[0] + sign * h * shift,)
        )
        with menagerie.precision_of(problem.params), torch.no_grad():
            losses.append(problem.loss(model, problem.train[list(range(problem.n))]))
        handle.remove()
    slopes = (losses[0] - losses[1]) / (2 * h)
    np.testing.assert_allclose(found @ shift.numpy(), slopes, rtol=1e-6, atol=1e-8)  # h² = 1e-8


# --- the datamodels --------------------------------------------------------------------------


@pytest.mark.parametrize("function", [cross_entropy, margin], ids=["loss", "margin"])
def test_similarity_is_the_signed_cosine(function):
    """−1 for a loss and +1 for a margin at equal labels, and the other way round at others."""
    problem = menagerie.mlp()
    outputs = unseen(problem, function)
    (x, y), (q, z) = problem.train.columns, outputs.data.columns
    h, g = (problem.model[:-1](v).detach() for v in (x, q))
    cosine = nn.functional.cosine_similarity(h[:, None], g[None], dim=2)
    side = torch.where(y[:, None] == z, 1.0, -1.0) * (-1.0 if function is cross_entropy else 1.0)
    f = representation_similarity(problem, outputs)
    np.testing.assert_allclose(f.scores, cosine * side, **CLOSE)
    np.testing.assert_allclose(f.base, outputs.evaluate(problem.model))
    assert f.meta == {"method": "representation_similarity", "evidence": "corroborative"}
    assert (f.anchor == 1).all()


def test_without_class_labels_likeness_is_the_cosine_alone():
    problem = menagerie.ridge()
    outputs = menagerie.unseen(problem)
    assert class_labels(problem.train) is None
    x, q = problem.train.columns[0], outputs.data.columns[0]
    cosine = nn.functional.cosine_similarity(x[:, None], q[None], dim=2)
    np.testing.assert_allclose(representation_similarity(problem, outputs).scores, -cosine, **CLOSE)


def test_knn_is_the_values_of_its_parts():
    problem = menagerie.mlp()
    outputs = unseen(problem)
    (x, y), (q, z) = problem.train.columns, outputs.data.columns
    h, g = (problem.model[:-1](v).detach() for v in (x, q))
    expected = knn_shapley(torch.cdist(h, g).numpy(), (y[:, None] == z).numpy(), 3)
    f = knn(problem, outputs, k=3)
    np.testing.assert_allclose(f.scores, expected, **CLOSE)
    assert f.meta == {"method": "knn", "k": 3, "evidence": "corroborative"}


def logit(model, batch):
    """The logit of class 0, whatever the label: it rises with twins of one class only."""
    return model(batch[0])[:, 0]


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("function", [cross_entropy, margin, logit])
def test_the_sign_is_that_of_a_step_on_a_twin(name, function):
    """The most similar training row is the target itself; a gradient step on it moves the output."""
    problem = menagerie.ARCHITECTURES[name]()
    outputs = Outputs(function, problem.train)
    scores = representation_similarity(problem, outputs).scores
    for row in range(problem.n):
        twin = copy.deepcopy(problem)
        step = torch.optim.SGD(twin.model.parameters(), 1e-5)
        problem.loss(twin.model, problem.train[[row]]).sum().backward()
        step.step()
        moved = outputs.evaluate(twin.model)[row] - outputs.evaluate(problem.model)[row]
        assert scores[row, row] == pytest.approx(float(moved.sign()), abs=1e-12)


def test_a_target_that_no_twin_moves_has_scores_of_zero():
    """A constant output; and not −0, so that saved scores are the same bytes everywhere."""
    problem = menagerie.mlp()
    outputs = Outputs(lambda model, batch: 0.0 * model(batch[0])[:, 0], problem.train)
    scores = representation_similarity(problem, outputs).scores
    assert (scores == 0).all()
    assert not np.signbit(scores).any()


@pytest.mark.parametrize("method", [knn, representation_similarity])
def test_averages_of_outputs_are_averages_of_columns(method):
    problem = menagerie.mlp()
    outputs = unseen(problem)
    each = method(problem, outputs)
    np.testing.assert_allclose(method(problem, outputs.mean()).scores, each.mean().scores, **CLOSE)
    by = method(problem, outputs.mean(by=["b", "a", "b", "a"]))
    np.testing.assert_allclose(by.scores[:, 0], each.scores[:, [1, 3]].mean(1), **CLOSE)
    assert by.targets.tolist() == ["a", "b"]


@pytest.mark.parametrize("method", [knn, representation_similarity])
def test_batch_size_changes_nothing_even_with_twins(method):
    problem = menagerie.mlp()
    x, y = problem.train.columns
    twice = Problem(problem.model, problem.loss, (torch.cat([x, x]), torch.cat([y, (y + 1) % 3])))
    outputs = unseen(problem)
    expected = method(twice, outputs)
    for size in (1, 5):
        found = method(twice, outputs, batch_size=size)
        np.testing.assert_allclose(found.scores, expected.scores, **CLOSE)


def test_runs_bring_their_anchor_and_are_averaged():
    problem = menagerie.softmax()
    outputs = menagerie.unseen(problem)
    runs = [train(problem, Recipe(SGD(0.1), 5, 2, seed=k), exposure=0.5) for k in range(2)]
    one = knn(runs[0], outputs)
    np.testing.assert_array_equal(one.anchor, 0.5)
    alone = knn(runs[0].trained(), outputs)
    np.testing.assert_array_equal(one.scores, alone.scores)
    np.testing.assert_allclose(
        knn(runs, outputs).scores, average([one, knn(runs[1], outputs)]).scores
    )


# --- BM25 ------------------------------------------------------------------------------------


def plain_bm25(documents, query, k1, b):
    """The formula, a loop a token."""
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    found = np.zeros(n)
    for i, document in enumerate(documents):
        for q in query:
            df, tf = sum(q in other for other in documents), document.count(q)
            idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
            found[i] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean))
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (1.5, 0.0)])
def test_bm25_is_its_formula(k1, b):
    """Padding does not count; targets are longer and hold tokens that no document has."""
    problem = menagerie.llama()
    ids, mask = (problem.train.columns[name] for name in ("input_ids", "attention_mask"))
    problem = Problem(
        problem.model, problem.loss, {"input_ids": ids.clamp(max=9), "attention_mask": mask}
    )
    asked = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
    outputs = Outputs(problem.loss, {"input_ids": asked, "attention_mask": torch.ones_like(asked)})
    documents = [row[m > 0].tolist() for row, m in zip(ids.clamp(max=9), mask, strict=True)]
    expected = [plain_bm25(documents, query.tolist(), k1, b) for query in asked]
    f = bm25(problem, outputs, k1=k1, b=b, batch_size=4)
    np.testing.assert_allclose(
        f.scores, -np.column_stack(expected), **CLOSE
    )  # a loss: twins lower it
    assert f.meta == {"method": "bm25", "k1": k1, "b": b, "evidence": "corroborative"}


# --- refusals --------------------------------------------------------------------------------


def test_layers_that_say_nothing():
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match="no layer 'head' in the model; it has"):
        representation_similarity(problem, unseen(problem), layer="head")
    text = menagerie.gpt2()
    with pytest.raises(ValueError, match=r"expected floats for 6 rows.*torch.int64 \(6, 7\)"):
        representations(text.model, text.loss, text.train, layer="transformer.wte")
    idle = nn.Sequential(nn.Linear(4, 3).double())
    idle.idle = nn.Identity()

    def first(model, batch):
        return model[0](batch[0])[:, 0]

    with pytest.raises(ValueError, match="going into layer 'idle', got no call"):
        representations(idle, first, (problem.train.columns[0],), layer="idle")
    with pytest.raises(ValueError, match="layers that hold parameters"):
        representations(
            nn.ParameterList([torch.ones(1)]), lambda m, x: m[0] * x[0], (torch.ones(2),)
        )


def test_data_that_do_not_fit():
    problem = menagerie.mlp()
    x, _ = problem.train.columns
    bare = Outputs(lambda model, batch: model(batch[0])[:, 0], (x,))
    with pytest.raises(ValueError, match=r"the training loss can be evaluated on.*training data"):
        representation_similarity(problem, bare)
    with pytest.raises(ValueError, match="one integer label a row"):
        knn(problem, bare)
    for k in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"whole k of at least 1, got {k}"):
            knn(problem, unseen(problem), k=k)
    with pytest.raises(ValueError, match="input_ids"):
        bm25(problem, unseen(problem))
    active = Problem(
        nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), cross_entropy, problem.train
    )
    with pytest.raises(ValueError, match="active dropout"):
        knn(active, unseen(problem))


def test_shapes_that_only_the_loss_refuses():
    """Labels of another kind reach the loss, and its error is told."""
    problem = menagerie.ridge()
    x, y = problem.train.columns
    wide = Outputs(menagerie.prediction, (x, torch.cat([y, y], dim=1)))
    assert problem.loss is squared_error
    with pytest.raises(ValueError, match="the training loss can be evaluated on"):
        representation_similarity(problem, wide)


def test_rows_of_other_data_have_labels_too():
    data = Rows(menagerie.mlp().train, np.array([2, 0]))
    np.testing.assert_array_equal(class_labels(data), menagerie.mlp().train.columns[1][[2, 0]])
    assert class_labels({"input_ids": torch.ones(2, 3).long()}) is None


# --- values on features ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_knn_values_are_shapley_values(n, k):
    """Every subset of the training rows votes; K may exceed their number, which pyDVL 0.10 gets wrong."""
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 2)), rng.integers(0, 2, n)
    target_x, target_y = rng.normal(size=(3, 2)), rng.integers(0, 2, 3)
    distance = ((x[:, None] - target_x) ** 2).sum(2)

    def vote(inside):
        nearest = [np.flatnonzero(inside)[np.argsort(distance[inside, j])[:k]] for j in range(3)]
        return [(y[near] == target_y[j]).sum() / k for j, near in enumerate(nearest)]

    rows = all_subsets(n)
    table = RetrainingTable(rows, np.array([vote(row > 0) for row in rows])[:, None], (0,))
    found = knn_values(x, y, target_x, target_y, k=k)
    np.testing.assert_allclose(found.scores, values(table).per_target, atol=1e-12)
    np.testing.assert_allclose(found.base, vote(np.ones(n, dtype=bool)), atol=1e-12)


def test_labels_of_two_types_and_no_examples_are_told():
    x = np.arange(4.0)[:, None]
    with pytest.raises(ValueError, match=r"one type, got \[0, 1, 0\] and, of targets, \['0'\]"):
        knn_values(x, [0, 1, 0, 1], x[:1], ["0"])
    with pytest.raises(ValueError, match="at least one training example, got none"):
        knn_values(x[:0], [], x[:1], [0])
    named, numbers = (knn_values(x, y, x[:1], y[:1]) for y in (list("abab"), [0, 1, 0, 1]))
    np.testing.assert_array_equal(named.scores, numbers.scores)


def test_knn_values_by_blocks_of_targets(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    target_x, target_y = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    whole = knn_values(x, y, target_x, target_y).scores
    monkeypatch.setattr(neighbors, "BLOCK", 150)  # three targets at a time
    np.testing.assert_array_equal(knn_values(x, y, target_x, target_y).scores, whole)


@pytest.mark.parametrize(
    ("arrays", "k", "message"),
    [
        (
            (np.ones((3, 2)), np.ones(2), np.ones((1, 2)), np.ones(1)),
            1,
            r"expected x \[n, d\], y \[n\]",
        ),
        (
            (np.ones((3, 2)), np.ones(3), np.ones((1, 1)), np.ones(1)),
            1,
            r"expected x \[n, d\], y \[n\]",
        ),
        ((np.ones((3, 2)), np.ones(3), np.ones((1, 2)), np.ones(1)), 0, "k of at least 1"),
        ((np.ones((3, 2)), np.ones(3), np.ones((1, 2)), np.ones(1)), 2.5, "whole k of at least 1"),
        ((np.full((3, 2), np.nan), np.ones(3), np.ones((1, 2)), np.ones(1)), 1, "finite features"),
        (
            (np.ones((3, 2)), np.array([1.0, np.nan, 1.0]), np.ones((1, 2)), np.ones(1)),
            1,
            r"none in rows \[1\] of y",
        ),
        (
            (np.ones((3, 2)), ["a", "b", None], np.ones((1, 2)), ["a"]),
            1,
            r"none in rows \[2\] of y",
        ),
        (
            (np.ones((2, 2)), ["a", "b"], np.ones((2, 2)), ["a", float("nan")]),
            1,
            r"none in rows \[1\] of target_y",
        ),
    ],
)
def test_arrays_that_make_no_knn_values(arrays, k, message):
    with pytest.raises(ValueError, match=message):
        knn_values(*arrays, k=k)
