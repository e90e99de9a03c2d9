"""applied.debugging: the fewest rows by brute force, controls along other orders, groups of outputs by their rows."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from applied import debugging_pictures as pictures
from applied.debugging import Subpopulations, subpopulations, support
from attribution_core import (
    LinearDatamodel,
    Outputs,
    Problem,
    cross_entropy,
    influence,
    knn,
    logit_margin,
    refit,
    refitted,
)

N = 8


class World:
    """Margins base + (w − 1) S, for surrogate and victim alike; a victim's seeds differ by noise of mean 0."""

    def __init__(self, t=4, n=N, seed=0, reach=(0.5, 3.0)):
        rng = np.random.default_rng(seed)
        self.scores, self.base = rng.normal(size=(n, t)), rng.uniform(*reach, t)
        x, y = torch.zeros(n, 2), torch.arange(n) % 2
        self.problem = Problem(torch.nn.Linear(2, 2), cross_entropy, (x, y))

    def value(self, w):
        return self.base + (np.asarray(w) - 1) @ self.scores

    def surrogate(self, table, w):
        return LinearDatamodel(self.scores, self.value(w), np.array(w))

    def victim(self, table, weights, seeds):
        noise = np.arange(len(seeds)) - (len(seeds) - 1) / 2
        return SimpleNamespace(per_seed=self.value(weights)[:, None] + noise[:, None])

    def fewest(self, j, most):
        """By trying all subsets."""
        for k in range(1, most + 1):
            for rows in combinations(range(len(self.scores)), k):
                w = np.ones(len(self.scores))
                w[list(rows)] = 0
                if self.value(w)[j] <= 0:
                    return k
        return np.inf


@pytest.mark.parametrize("seed", range(4))
def test_the_fewest_rows_are_those_of_brute_force(seed):
    world = World(seed=seed)
    found = support(world.problem, world.surrogate, world.victim, most=6, seeds=3)
    expected = [world.fewest(j, 6) for j in range(4)]
    np.testing.assert_array_equal(found.predicted, expected)
    np.testing.assert_array_equal(found.actual, expected)
    for j, k in enumerate(expected):
        assert len(found.rows(j)) == (k if np.isfinite(k) else 0)
    assert (found.controls["random"] >= expected).all()
    np.testing.assert_array_equal(found.turned([0, 6]), [0, np.isfinite(expected).mean()])


def test_controls_go_along_their_own_order_and_no_further_than_their_positive_scores():
    """The reversed order takes more rows; scores that are positive nowhere turn nothing."""
    world = World()
    world.scores = np.abs(world.scores) + 0.1
    orders = {"reversed": -world.scores + 10, "same": world.scores, "none": -world.scores}
    found = support(world.problem, world.surrogate, world.victim, most=N - 1, orders=orders)
    np.testing.assert_array_equal(found.controls["same"], found.actual)
    assert np.isinf(found.controls["none"]).all()
    for j in range(4):
        w, order = np.ones(N), np.argsort(world.scores[:, j])
        k = next(k for k in range(1, N) if world.base[j] <= world.scores[order[:k], j].sum())
        assert found.controls["reversed"][j] == k
        w[order[:k]] = 0
        assert world.value(w)[j] <= 0
    assert (found.controls["reversed"] > found.actual).any()
    assert found.turned(N, "none") == 0


def test_nothing_is_retrained_without_a_victim():
    world = World()
    found = support(world.problem, world.surrogate, most=6, orders={"same": world.scores})
    assert np.isnan(found.actual).all()
    assert not found.controls
    with pytest.raises(ValueError, match="pass a victim"):
        found.turned(3)
    lines = found.table().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["output", "margin", "predicted", "actual", "rows"]
    assert all("-" in line.split() for line in lines[1:])
    finite = np.flatnonzero(np.isfinite(found.predicted))
    assert [len(found.rows(j)) for j in finite] == found.predicted[finite].tolist()


def test_a_datamodel_as_control_is_read_by_the_names_of_its_outputs():
    world = World()
    names = np.array(list("abcd"))

    def named(scores, targets):
        return LinearDatamodel(scores, world.base, np.ones(N), targets=targets)

    def surrogate(table, w):
        return LinearDatamodel(world.scores, world.value(w), np.array(w), targets=names)

    straight, turned = (
        support(
            world.problem, surrogate, world.victim, most=6, orders={"same": named(scores, targets)}
        )
        for scores, targets in ((world.scores, names), (world.scores[:, ::-1], names[::-1]))
    )
    np.testing.assert_array_equal(straight.controls["same"], turned.controls["same"])


def test_the_table_says_where_nothing_turns():
    world = World(reach=(50.0, 60.0))
    found = support(world.problem, world.surrogate, world.victim, most=3)
    assert found.table().count("> 3") == 3 * 4  # predicted, actual and random of four outputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"orders": {"near": np.zeros((3, 4))}},
            r"scores of 'near' of shape \(8, 4\), got \(3, 4\)",
        ),
        ({"orders": {"random": np.zeros((8, 4))}}, "another name than 'random'"),
        ({"orders": {"near": np.full((8, 4), np.nan)}}, "finite scores of 'near'"),
        ({"most": True}, "got True"),
        ({"most": 0}, r"most among 1 \.\. 7 of 8 rows, got 0"),
        ({"most": 0.5}, "got 0.5"),
        ({"rounds": 0}, "rounds >= 1"),
    ],
)
def test_wrong_input_of_support(change, message):
    world = World()
    with pytest.raises(ValueError, match=message):
        support(world.problem, world.surrogate, **{"most": 6, **change})


def test_a_decision_that_does_not_stand_is_named():
    world = World()
    world.base[2] = -1.0
    with pytest.raises(ValueError, match="wrong already"):
        support(world.problem, world.surrogate, most=3)


def blobs(seed):
    """Three overlapping classes, a tenth of them mislabelled; decisions of a logistic regression on new rows."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(3, 5)) * 1.5
    y, held_y = rng.integers(0, 3, 150), rng.integers(0, 3, 60)
    x, held = centre[y] + rng.normal(size=(150, 5)), centre[held_y] + rng.normal(size=(60, 5))
    wrong = rng.choice(150, 15, replace=False)
    y[wrong] = (y[wrong] + 1) % 3
    fitted = LogisticRegression(C=1.0, tol=1e-8, max_iter=2000).fit(x, y)
    return fitted, x, y, held, held_y


@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_logistic_regression_predictions_hold_and_the_rows_are_fewer_than_the_nearest(seed):
    """Exact refits without the rows; as many rows as predicted turn the decision, one fewer do not."""
    fitted, x, y, held, held_y = blobs(seed)
    said = fitted.predict(held)
    asked = np.flatnonzero(said != held_y)[:5]
    asked = np.r_[asked, np.flatnonzero(said == held_y)[:5]]
    problem = Problem.from_sklearn(fitted, x, y)
    outputs = Outputs(logit_margin, (torch.tensor(held[asked]), torch.tensor(said[asked])))

    def surrogate(table, w):
        at = refitted(fitted, table, w)
        return influence(at, outputs, weights=w, drop="row", curvature="hessian")

    def victim(table, w, seeds):
        return refit(fitted, table, outputs, w, seeds=seeds)

    near = knn(problem, outputs)
    found = support(problem, surrogate, victim, most=30, orders={"nearest": near})
    predicted, actual = found.predicted, found.actual
    both = np.isfinite(predicted) & np.isfinite(actual)
    assert both.sum() >= 6
    np.testing.assert_allclose(predicted[both], actual[both], atol=1)
    assert (found.controls["nearest"] >= actual).all()
    assert (found.controls["nearest"] > actual).sum() >= 5
    for j in np.flatnonzero(both):
        for many, turns in ((int(actual[j]), True), (int(actual[j]) - 1, False)):
            w = np.ones((1, 150))
            w[0, found.rows(j)[:many]] = 0
            again = LogisticRegression(C=1.0, tol=1e-8, max_iter=2000)
            again.fit(x[w[0] > 0], y[w[0] > 0])
            assert (again.predict(held[asked[[j]]])[0] != said[asked[j]]) == turns


# --- subpopulations ------------------------------------------------------------------------------

GROUPS = (5, 3, 2)


def parted(seed=0, n=60):
    """Outputs in three groups, each moved by twenty rows of its own, in another order of outputs."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(np.repeat(np.arange(3), GROUPS))
    own = np.repeat(np.arange(3), n // 3)
    scores = np.where(
        own[:, None] == true, rng.uniform(0.5, 1.5, (n, 10)), 0.01 * rng.normal(size=(n, 10))
    )
    datamodel = LinearDatamodel(scores, np.zeros(10), np.ones(n))

    def retrain(weights, seeds):
        change = (np.asarray(weights) - 1) @ scores
        return SimpleNamespace(per_seed=np.repeat(change[:, None], len(seeds), axis=1))

    return datamodel, true, own, retrain


@pytest.mark.parametrize("groups", [None, 3])
def test_outputs_that_the_same_rows_move_are_put_together(groups):
    datamodel, true, own, retrain = parted()
    found = subpopulations(datamodel, groups, k=7, retrain=retrain)
    assert [len(found.of(g)) for g in range(3)] == list(GROUPS)
    for g in range(3):
        assert len(set(true[found.of(g)])) == 1
        assert (own[found.rows[g]] == true[found.of(g)][0]).all()
        mean = datamodel.scores[:, found.of(g)].mean(axis=1)
        np.testing.assert_array_equal(found.rows[g], np.argsort(-mean)[:7])
        assert found.predicted[g, g] == pytest.approx(-mean[found.rows[g]].sum(), rel=1e-12)
    np.testing.assert_allclose(
        found.actual, found.predicted, atol=1e-12
    )  # linear: first order is exact
    off = ~np.eye(3, dtype=bool)
    assert (np.diag(found.actual) < np.diag(found.random)).all()
    assert np.abs(found.actual[off]).max() < 0.1 * np.abs(np.diag(found.actual)).min()


def test_order_and_scale_of_outputs_do_not_matter_to_their_groups():
    datamodel, _, _, _ = parted()
    order, scale = np.random.default_rng(1).permutation(10), np.geomspace(0.01, 100, 10)
    first = subpopulations(datamodel, 3).group
    other = subpopulations(datamodel.combine(np.diag(scale)[:, order]), 3).group
    np.testing.assert_array_equal(other, first[order])


def test_rows_without_weight_are_never_among_them():
    datamodel, _, _, retrain = parted()
    full = np.ones(60)
    full[::2] = 0.0
    found = subpopulations(datamodel.at(full), 3, k=40, retrain=retrain)
    assert all((rows % 2 == 1).all() for rows in found.rows)


def test_without_retraining_nothing_is_claimed():
    found = subpopulations(parted()[0], 3)
    assert np.isnan(found.actual).all()
    assert np.isnan(found.random).all()
    assert found.table().splitlines()[1].split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f, 11), "1 to t=10 groups of outputs, got 11"),
        (lambda f: (f.combine(np.zeros((10, 4))), 2), "outputs that training rows move"),
        (
            lambda f: (LinearDatamodel(-np.abs(f.scores), f.base, f.anchor), 1),
            "rows that raise the mean output",
        ),
    ],
)
def test_wrong_input_of_subpopulations(change, message):
    datamodel, groups = change(parted()[0])
    with pytest.raises(ValueError, match=message):
        subpopulations(datamodel, groups)
    with pytest.raises(ValueError, match=r"k among 1 \.\. 59 of 60 rows, got 0"):
        subpopulations(parted()[0], 3, k=0)


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("t", [1, 5])
def test_outputs_that_are_all_alike_are_one_group(t, groups):
    if groups == 3 and t == 1:
        groups = 1
    scores = np.outer(np.arange(6.0), np.geomspace(0.1, 10, t))  # in other units
    found = subpopulations(LinearDatamodel(scores, np.zeros(t), np.ones(6)), groups, k=2)
    assert not found.group.any()
    datamodel = LinearDatamodel(np.ones((6, 1)), [0.0], np.ones(6))
    found = subpopulations(datamodel, 1, k=2)
    assert isinstance(found, Subpopulations)
    np.testing.assert_allclose(found.predicted, [[-2.0]])
    assert "nan" not in found.table()


# --- pictures --------------------------------------------------------------------------------------


def test_curves_count_the_decisions_that_turned():
    figure = pictures.turned({"datamodel": [1, 2, np.inf, 4], "random": [np.inf] * 4}, 5)
    first, second = figure.axes[0].lines
    assert first.get_ydata()[-1] == 0.75
    assert first.get_ydata()[1] == 0.25
    assert not second.get_ydata().any()
    assert "up to 5" in figure.get_label()
    with pytest.raises(ValueError, match="at least 1"):
        pictures.turned({"datamodel": [0.0]}, 5)
    with pytest.raises(ValueError, match="at least one order"):
        pictures.turned({}, 5)


def test_the_heat_map_shows_what_was_retrained_or_else_predicted():
    datamodel, _, _, retrain = parted()
    shown = pictures.specificity(subpopulations(datamodel, 3, k=5, retrain=retrain))
    words = {text.get_text() for text in shown.axes[0].texts}
    found = subpopulations(datamodel, 3, k=5)
    assert f"{found.predicted[0, 0]:+.2f}" in words
    assert len(shown.axes[0].texts) == 9
    assert "3 by 3" in pictures.specificity(found).get_label()


def test_images_stand_beside_their_decision():
    some = np.arange(16.0).reshape(4, 4)
    figure = pictures.images(
        [("8, says 3", some, [("3", some), ("5", some)]), ("1, says 1", some, [])], most=3
    )
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["8, says 3", "3", "5", "1, says 1"]
    with pytest.raises(ValueError, match="at least one decision"):
        pictures.images([])
