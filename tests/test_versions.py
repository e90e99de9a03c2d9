"""applied.audit.versions: one table of every row that could be handed in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from applied.audit.versions import Versions, joined, labels_of, relabelled, rewritten
from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    margin,
    retrain,
    train,
)
from attribution_core.data import take
from attribution_core.refitting import refit, refitted
from tests import menagerie


def as_dict(problem):
    """The same rows under names, with a column that the model is not asked about."""
    x, y = problem.train.columns

    def loss(model, batch):
        return cross_entropy(model, (batch["x"], batch["labels"]))

    return replace(problem, loss=loss, train={"labels": y, "x": x, "id": torch.arange(len(y))})


# --- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_every_row_with_every_label(kind):
    problem = menagerie.softmax(7)
    x, y = problem.train.columns
    problem = as_dict(problem) if kind == "dict" else problem
    table = relabelled(problem)
    assert len(table.problem.train) == 21
    assert table.row.tolist() == [i for i in range(7) for _ in range(3)]
    assert table.n == 7
    assert table.clean.tolist() == [float(y[i] == c) for i in range(7) for c in range(3)]
    for places in (np.arange(21), np.array([20, 0, 4, 4])):  # any order, and twice
        batch = take(table.problem.train, places)
        inputs, labels = (batch["x"], batch["labels"]) if kind == "dict" else batch
        assert torch.equal(inputs, x[places // 3])
        assert labels.tolist() == (places % 3).tolist()
        assert labels.dtype == y.dtype
        if kind == "dict":
            assert batch["id"].tolist() == (places // 3).tolist()
    current = table.current(table.clean)
    assert current.tolist() == (np.arange(7) * 3 + y.numpy()).tolist()
    again = table.take(table.clean)
    batch = take(again.train, np.arange(7))
    inputs, labels = (batch["x"], batch["labels"]) if kind == "dict" else batch
    assert torch.equal(inputs, x)
    assert torch.equal(labels, y)
    # the original loss of a row at its own label, by the table's own problem
    own = Outputs(table.problem.loss, table.problem.train).evaluate(problem.model)[current]
    expected = Outputs(problem.loss, problem.train).evaluate(problem.model)
    np.testing.assert_array_equal(own, expected)


def test_more_classes_than_the_data_hold_and_another_column():
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    problem = Problem(torch.nn.Linear(2, 3).double(), cross_entropy, (y, x))
    table = relabelled(problem, classes=3, column=0)
    assert table.clean.reshape(4, 3).argmax(1).tolist() == y.tolist()
    labels, inputs = take(table.problem.train, [5, 0])
    assert labels.tolist() == [2, 0]
    assert labels.dtype == torch.int32
    assert torch.equal(inputs, x[[1, 0]])


def test_left_out_rows_have_no_place():
    table = relabelled(menagerie.softmax(4))
    weights = table.clean.copy()
    weights[table.row == 2] = 0
    assert table.current(weights)[2] == -1
    assert (table.current(weights)[[0, 1, 3]] == table.current(table.clean)[[0, 1, 3]]).all()
    assert len(table.take(weights).train) == 3


def test_labels_are_read_in_blocks():
    y = torch.arange(2500) % 7 % 4
    name, labels = labels_of((torch.zeros(2500, 1), y))
    assert name == 1
    np.testing.assert_array_equal(labels, y)
    assert labels_of({"labels": y, "z": y})[0] == "labels"


@pytest.mark.parametrize(
    ("data", "column", "message"),
    [
        ((torch.ones(3, 2), torch.ones(3)), None, "column 1, got torch.float32 of shape"),
        ((torch.ones(3, 2), torch.ones(3, 2).long()), None, "got torch.int64 of shape"),
        ((torch.ones(3).long(),), 1, "in column 1, got no such column"),
        ({"x": torch.ones(3), "y": torch.ones(3).long()}, None, "'labels', got no such column"),
        ({"x": torch.ones(3), "labels": torch.ones(3).long()}, "y", "'y', got no such column"),
    ],
)
def test_labels_that_are_none(data, column, message):
    with pytest.raises(ValueError, match=message):
        labels_of(data, column)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 1, 3], 3, "classes=3 >= 2, got labels 0 to 3"),
        ([-1, 1, 0], 3, "got labels -1 to 1"),
        ([0, 0, 0], None, "classes=1 >= 2"),
        ([0, 0, 0], 1, "classes=1 >= 2"),
    ],
)
def test_labels_out_of_range(labels, classes, message):
    problem = Problem(
        torch.nn.Linear(2, 3), cross_entropy, (torch.ones(3, 2), torch.tensor(labels))
    )
    with pytest.raises(ValueError, match=message):
        relabelled(problem, classes)


# --- other inputs, more rows -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_rewritten_rows_stand_beside_their_originals(kind):
    problem = menagerie.softmax(5)
    x, y = problem.train.columns
    problem = as_dict(problem) if kind == "dict" else problem
    rows = np.array([3, 1, 3])  # one of them twice
    new = np.random.default_rng(0).normal(size=(3, 4))
    table, places = rewritten(problem, rows, new, "x" if kind == "dict" else 0)
    assert table.row.tolist() == [0, 1, 1, 2, 3, 3, 3, 4]
    assert table.clean.tolist() == [1, 1, 0, 1, 1, 0, 0, 1]
    assert table.row[places].tolist() == rows.tolist()
    assert places.tolist() == [5, 2, 6]
    batch = take(table.problem.train, np.arange(8))
    inputs, labels = (batch["x"], batch["labels"]) if kind == "dict" else batch
    np.testing.assert_array_equal(inputs[places], new)
    assert torch.equal(labels, y[table.row])
    old = np.flatnonzero(table.clean)
    assert torch.equal(inputs[old], x)
    swapped = take(table.problem.train, [6, 0, 5])  # both halves, out of order
    found = swapped["x"] if kind == "dict" else swapped[0]
    np.testing.assert_array_equal(found, np.stack([new[2], x[0], new[0]]))
    assert table.current(table.clean).tolist() == old.tolist()


def test_inputs_keep_the_precision_of_their_column():
    problem = Problem(
        torch.nn.Linear(2, 2), cross_entropy, (torch.ones(3, 2), torch.zeros(3).long())
    )
    table, places = rewritten(problem, [1], np.full((1, 2), 0.1), 0)
    found = take(table.problem.train, places)[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((1, 2), 0.1))


def test_a_pool_stands_after_the_rows():
    problem = menagerie.softmax(5)
    pool = menagerie.softmax(8).train[[6, 7]]
    table, places = joined(problem, pool)
    assert places.tolist() == [5, 6]
    assert table.row.tolist() == list(range(7))
    assert table.clean.tolist() == [1] * 5 + [0] * 2
    assert table.n == 5
    found = take(table.problem.train, [6, 1, 5])
    both = [torch.cat(pair) for pair in zip(problem.train.columns, pool, strict=True)]
    for column, expected in zip(found, both, strict=True):
        assert torch.equal(column, expected[[6, 1, 5]])
    weights = table.clean.copy()
    weights[6] = 1
    weights[0] = 0
    taken = table.take(weights)
    assert torch.equal(take(taken.train, range(5))[0], both[0][[1, 2, 3, 4, 6]])


# --- training on a table ---------------------------------------------------------------------------


RECIPE = Recipe(SGD(0.1, momentum=0.9), batch_size=4, epochs=5, schedule="linear", seed=3)


def tables(problem):
    """Every kind of table of one problem, and rows whose versions may be swapped."""
    x, _ = problem.train.columns
    return {
        "relabelled": relabelled(problem, 3),
        "rewritten": rewritten(problem, [2, 2, 9], x[[2, 2, 9]] + 1.0, 0)[0],
        "joined": joined(problem, problem.train[[0, 1]])[0],
    }


@pytest.mark.parametrize("kind", ["relabelled", "rewritten", "joined"])
def test_training_on_clean_weights_is_training_on_the_rows(kind):
    """Bit for bit, whichever versions lie beside: pairs by seed rest on it."""
    problem = menagerie.mlp(13)
    table = tables(problem)[kind]
    run = train(table.problem, RECIPE, table.clean, drop="row")
    expected = train(problem, RECIPE)
    for name, value in expected.params.items():
        assert torch.equal(run.params[name], value)
    assert run.drawn == 13
    outputs = Outputs(margin, problem.train)
    found = retrain(table.problem, RECIPE, outputs, table.clean, seeds=[3], stack=1)
    np.testing.assert_array_equal(found.per_seed[0, 0], expected.outputs(outputs).numpy())


def test_training_on_a_version_is_training_on_the_changed_rows():
    problem = menagerie.mlp(13)
    x, y = problem.train.columns
    table = relabelled(problem, 3)
    weights = table.clean.copy()
    weights[[4 * 3 + int(y[4])]] = 0
    weights[4 * 3 + (int(y[4]) + 1) % 3] = 1
    changed = y.clone()
    changed[4] = (y[4] + 1) % 3
    run = train(table.problem, RECIPE, weights, drop="row")
    expected = train(replace(problem, train=(x, changed)), RECIPE)
    other = train(problem, RECIPE)
    for name, value in expected.params.items():
        assert torch.equal(run.params[name], value)
        assert not torch.equal(other.params[name], value)


# --- influence on a table: drop="row" --------------------------------------------------------------


def classifier(classes=3, n=40):
    """Labels with noise, so that the optimum is finite and curved."""
    rng = np.random.default_rng(classes)
    x = rng.normal(size=(n, 4))
    y = (x @ rng.normal(size=(4, classes)) + rng.normal(size=(n, classes))).argmax(1)
    fitted = LogisticRegression(C=0.7, solver="newton-cholesky", tol=1e-12).fit(x, y)
    problem = Problem.from_sklearn(fitted, x, y)
    held = problem.model.encode(rng.normal(size=(6, 4)), rng.integers(0, classes, 6))
    return fitted, problem, Outputs(margin, held)


@pytest.mark.parametrize("classes", [2, 3])
def test_influence_on_a_relabelled_table_is_the_slope_of_refits(classes):
    """Moving weight from (i, y) to (i, c), at clean labels and at poisoned ones."""
    fitted, problem, outputs = classifier(classes)
    table = relabelled(problem)
    poisoned = table.clean.copy()
    for i in (3, 17):
        poisoned[i * classes : (i + 1) * classes] = np.roll(
            poisoned[i * classes : (i + 1) * classes], 1
        )
    for anchor in (table.clean, poisoned):
        at = refitted(fitted, table.problem, anchor)
        f = influence(at, outputs, curvature="hessian", weights=anchor, drop="row")
        assert f.scores.shape == (40 * classes, 6)
        np.testing.assert_array_equal(f.anchor, anchor)
        current = table.current(anchor)
        # a weight below 0 is none: the slope from one side. Differences of fourth order err by
        # h⁴/5 of a fifth derivative, below 1e-6 of the slope (each derivative costs a factor near 1),
        # and refits to gradients of 1e-12 move outputs by 1e-10, slopes by 1e-8
        h, tried = 0.02, 0
        for i, c in ((3, 0), (8, 1), (31, 0), (0, classes - 1)):
            move = np.zeros(len(anchor))
            move[i * classes + c] += 1
            move[current[i]] -= 1
            if not move.any():  # its own label
                continue
            tried += 1
            weights = np.stack([anchor + k * h * move for k in range(5)])
            v = refit(fitted, table.problem, outputs, weights).outputs
            slope = (-25 * v[0] + 48 * v[1] - 36 * v[2] + 16 * v[3] - 3 * v[4]) / (12 * h)
            predicted = move @ f.scores
            assert np.abs(predicted - slope).max() < 1e-5 * np.abs(slope).max()
        assert tried >= 2


def test_scores_of_rows_that_are_there_are_the_plain_problems():
    fitted, problem, outputs = classifier()
    table = relabelled(problem)
    at = refitted(fitted, table.problem, table.clean)
    found = influence(at, outputs, curvature="hessian", weights=table.clean, drop="row")
    plain = influence(problem, outputs, curvature="hessian")
    there = table.current(table.clean)
    # two fits of one convex problem to gradients of 1e-12, amplified by 1/decay ~ 30
    np.testing.assert_allclose(found.scores[there], plain.scores, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.base, plain.base, rtol=0, atol=1e-9)
    # and without drop="row" a row counts as one of 120, not one of 40: these are other scores
    other = influence(at, outputs, curvature="hessian", weights=table.clean)
    assert np.abs(other.scores[there] - plain.scores).max() > 0.1 * np.abs(plain.scores).max()


def test_row_order_permutes_the_tables_scores():
    fitted, problem, outputs = classifier()
    x, y = problem.train.columns
    order = np.random.default_rng(1).permutation(40)
    other = Problem.from_sklearn(fitted, x.numpy()[order], y.numpy()[order])
    pair = []
    for one in (problem, other):
        table = relabelled(one)
        f = influence(
            replace(table.problem, model=problem.model), outputs, curvature="hessian",
            weights=table.clean, drop="row", batch_size=7 if one is other else 64,
        )  # fmt: skip
        pair.append(f.scores.reshape(40, 3, -1))
    # sums over rows in another order, in float64
    np.testing.assert_allclose(pair[1], pair[0][order], rtol=1e-9, atol=1e-12)


def test_a_run_brings_its_own_drop():
    problem = menagerie.mlp(13)
    table = relabelled(problem, 3)
    run = train(table.problem, RECIPE, table.clean, drop="row")
    outputs = Outputs(margin, problem.train)
    with pytest.raises(ValueError, match="a run brings its own"):
        influence(run, outputs, drop="row")
    f = influence(run, outputs)
    plain = influence(train(problem, RECIPE), outputs)
    # the same model and the same curvature, of sums that are taken in other blocks
    np.testing.assert_allclose(
        f.scores[table.current(table.clean)], plain.scores, rtol=1e-8, atol=1e-10
    )
    assert f.scores.shape == (39, 13)
    assert np.abs(f.scores[table.clean == 0]).max() > 0  # rows that were not there are scored, too


def test_a_table_says_how_many_rows_there_are():
    table = Versions(menagerie.softmax(3), np.arange(3), np.array([1.0, 0.0, 1.0]))
    assert table.n == 2
