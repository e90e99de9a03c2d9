"""attribution_core.aumann_shapley: the path integral, its sum, owners by real retraining, resuming, Adam."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec

from applied.valuation import values
from attribution_core import (
    SGD,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    RemainderWarning,
    all_subsets,
    aumann_shapley,
    cross_entropy,
    influence,
    magic,
    permutation_subsets,
    retrain,
    train,
)
from attribution_core.aumann_shapley import placed
from recipes.data.tasks import mlp
from tests import menagerie

RECIPE = Recipe(SGD(0.05, 0.9), batch_size=4, epochs=3)


def small():
    problem = menagerie.softmax()
    return problem, menagerie.unseen(problem)


def derivative(problem, outputs, recipe, s):
    run = train(problem, recipe, np.full(problem.n, s))
    return magic(run, outputs, check=False).scores


def test_it_is_the_integral():
    """Against adaptive quadrature; Gauss–Legendre with 8 points is as good on a smooth training."""
    problem, outputs = small()
    found = aumann_shapley(problem, RECIPE, outputs)
    exact = quad_vec(partial(derivative, problem, outputs, RECIPE), 1e-9, 1, epsabs=1e-8, limit=20)[
        0
    ]
    np.testing.assert_allclose(found.scores, exact, atol=1e-7 * np.abs(exact).max())


def test_the_error_falls_with_the_points():
    problem, outputs = small()
    errors = [
        np.abs(aumann_shapley(problem, RECIPE, outputs.mean(), points=k).meta["remainder"]).max()
        for k in (2, 4, 8)
    ]
    assert errors[0] > 10 * errors[1] > 1000 * errors[2]


def test_it_is_exact_at_both_ends():
    problem, outputs = small()
    found = aumann_shapley(problem, RECIPE, outputs)
    whole = train(problem, RECIPE).outputs(outputs).numpy()
    nothing = train(problem, RECIPE, np.zeros(problem.n)).outputs(outputs).numpy()
    np.testing.assert_allclose(found.predict(np.ones(20)), whole, rtol=1e-9)
    np.testing.assert_allclose(found.meta["change"], whole - nothing, rtol=1e-9)
    np.testing.assert_allclose(found.predict(np.zeros(20)), nothing, rtol=1e-9)


def test_what_the_points_leave_is_shared_equally():
    problem, outputs = small()
    exact = aumann_shapley(problem, RECIPE, outputs, points=12)
    with pytest.warns(RemainderWarning, match=r"1 points find .* the rest is shared equally"):
        rough = aumann_shapley(problem, RECIPE, outputs, points=1)
    change, left = np.array(rough.meta["change"]), np.array(rough.meta["remainder"])
    np.testing.assert_allclose(rough.scores.sum(0), change, rtol=1e-9)
    found = derivative(problem, outputs, RECIPE, 0.5)
    np.testing.assert_allclose(found.sum(0) - change, left * np.abs(change), atol=1e-12)
    np.testing.assert_allclose(rough.scores, found - left * np.abs(change) / 20, atol=1e-12)
    assert np.abs(exact.meta["remainder"]).max() < 1e-6


@pytest.mark.parametrize("sign", [1, -1])
def test_the_share_that_is_found_is_named_of_outputs_that_fall_too(sign):
    problem, outputs = small()
    named = Outputs(lambda model, batch: sign * cross_entropy(model, batch), outputs.data).mean()
    with pytest.warns(RemainderWarning) as told:
        aumann_shapley(problem, RECIPE, named, points=1)
    found = derivative(problem, named, RECIPE, 0.5).sum()
    nobody, everyone = (
        train(problem, RECIPE, np.full(problem.n, w)).outputs(named).item() for w in (0.0, 1.0)
    )
    assert sign * (everyone - nobody) < 0  # the loss falls
    assert f"1 points find {100 * found / (everyone - nobody):.1f} % of" in str(told[0].message)


def test_any_method_that_differentiates():
    problem, outputs = small()
    by_domain = partial(magic, check=False)
    one = aumann_shapley(problem, RECIPE, outputs, points=3)
    two = aumann_shapley(problem, RECIPE, outputs, points=3, method=by_domain)
    np.testing.assert_array_equal(one.scores, two.scores)
    with pytest.warns(RemainderWarning, match=r"3 points find .* % of f\(1\) − f\(0\)"):
        rough = aumann_shapley(problem, RECIPE, outputs, points=3, method=influence)
    assert (rough.scores != one.scores).any()


@pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")  # short runs miss rows
@pytest.mark.parametrize("path", ["weight", "exposure"])
@pytest.mark.parametrize("method", [None, partial(magic, check=False)])
def test_owners_by_tangents_are_sums_over_their_rows(path, method):
    problem, outputs = small()
    labels = np.array(["c", "a", "b", "a"] * 5)  # three owners, five outputs: pushed forward
    settings = {"points": 4, "path": path}
    rows = aumann_shapley(problem, RECIPE, outputs, **settings)
    owners = aumann_shapley(problem, RECIPE, outputs, groups=labels, method=method, **settings)
    assert owners.ids.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(owners.scores, rows.grouped(labels).scores, atol=1e-10)
    np.testing.assert_allclose(owners.meta["remainder"], rows.meta["remainder"], atol=1e-9)


@pytest.mark.filterwarnings("ignore::attribution_core.RemainderWarning")  # of two points
@pytest.mark.parametrize("method", [None, influence])
@pytest.mark.parametrize("labels", [list("hgfedcba"), [3, 1, 7, 0, 2, 6, 5, 4]])
def test_owners_of_a_row_each_are_their_rows(method, labels):
    problem = menagerie.mlp(8)
    outputs = Outputs(problem.loss, problem.train).mean()
    recipe = Recipe(SGD(0.1), 4, 2)
    rows = aumann_shapley(problem, recipe, outputs, points=2, method=method)
    owners = aumann_shapley(problem, recipe, outputs, points=2, method=method, groups=labels)
    assert owners.ids.tolist() == sorted(labels)
    np.testing.assert_allclose(owners.scores[owners.rows(labels)], rows.scores, rtol=1e-9)


def test_rows_of_nobody_are_refused():
    problem = menagerie.mlp(4)
    outputs = Outputs(problem.loss, problem.train).mean()
    with pytest.raises(ValueError, match=r"label for every example, got none for \[1\]"):
        aumann_shapley(problem, RECIPE, outputs, groups=["a", float("nan"), "b", "b"])


def owners_of_digits(n=240, groups=6):
    """Digits in owners of unequal sizes; one owner's labels are all wrong."""
    x, y = (array[:n].copy() for array in menagerie.digits_arrays())
    sizes = np.arange(1, groups + 1) * n // (groups * (groups + 1) // 2)
    owners = np.repeat(
        np.arange(groups), sizes + (np.arange(groups) == groups - 1) * (n - sizes.sum())
    )
    y[owners == 3] = (y[owners == 3] + 1) % 10
    train_x = torch.tensor(x).double()
    problem = Problem(mlp(0, 16).double(), cross_entropy, (train_x, torch.tensor(y)))
    test_x, test_y = (array[600:900] for array in menagerie.digits_arrays())
    return (
        problem,
        Outputs(cross_entropy, (torch.tensor(test_x).double(), torch.tensor(test_y))).mean(),
        owners,
    )


def correlation(a, b):
    return np.corrcoef(a.values, b.values)[0, 1]


def test_owners_agree_with_exact_shapley_by_retraining():
    """2^8 retrainings in the same order; the metagradient at w = 1 alone does worse."""
    problem, outputs, owners = owners_of_digits(groups=8)
    recipe = Recipe(SGD(0.05, 0.9), batch_size=20, epochs=6)
    table = retrain(problem, recipe, outputs, all_subsets(owners), seeds=1, drop="weight")
    exact = values(table, owners=owners)
    path = aumann_shapley(problem, recipe, outputs)
    assert abs(path.meta["remainder"][0]) < 0.02
    found = values(path, owners=owners)
    assert abs(found.remainder) < 1e-9
    assert found.change == pytest.approx(exact.change, rel=1e-6)
    assert correlation(found, exact) > 0.99
    alone = values(magic(train(problem, recipe), outputs, check=False), owners=owners)
    assert correlation(alone, exact) < 0.95


def test_rows_agree_with_a_large_permutation_sample():
    """Single rows as players: 3,100 retrainings for 30 rows, whose noise is a thousandth of their variance."""
    problem, outputs, _ = owners_of_digits(30)
    recipe = Recipe(SGD(0.05, 0.9), batch_size=10, epochs=4)
    table = retrain(problem, recipe, outputs, permutation_subsets(30, 100), seeds=1, drop="weight")
    sampled = values(table)
    assert np.mean(sampled.standard_error**2) < 0.005 * np.var(sampled.values)
    assert correlation(values(aumann_shapley(problem, recipe, outputs)), sampled) > 0.98


@pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")  # of magic at w = 1
@pytest.mark.filterwarnings("ignore::attribution_core.RemainderWarning")
def test_adam_is_valued_along_exposure():
    """Adam's updates do not depend on the scale of weights: derivatives add up to nothing anywhere but near
    s = 0, where f jumps. Along exposure owners are valued as retraining without them does."""
    problem, outputs, owners = owners_of_digits(groups=8)
    recipe = Recipe(AdamW(0.003), batch_size=20, epochs=8)
    found = aumann_shapley(problem, recipe, outputs)
    assert found.meta["path"] == "exposure"
    change = found.meta["change"][0]
    np.testing.assert_allclose(found.scores.sum(0), change, rtol=1e-9)
    start = outputs.evaluate(problem.model).numpy()
    np.testing.assert_allclose(found.predict(np.zeros(problem.n)), start, rtol=1e-9)
    plain = magic(train(problem, recipe), outputs, check=False).scores.sum()
    assert abs(plain) < 0.01 * abs(change)
    table = retrain(problem, recipe, outputs, all_subsets(owners), seeds=[5, 6], drop="row")
    removed = values(table, owners=owners)
    assert correlation(values(found, owners=owners), removed) > 0.95
    weight = aumann_shapley(problem, recipe, outputs, path="weight")
    assert np.median(weight.meta["points"]) < 0.1  # gathered where f jumps
    assert abs(weight.meta["remainder"][0]) < 0.15  # most of the jump is seen
    assert correlation(values(weight, owners=owners), removed) < 0.9


def test_points_are_placed_where_f_changes():
    s = np.array([0.0, 0.1, 1.0])
    at, weight = placed(s, np.array([[2.0], [0.5], [0.4]]), 8)
    assert (at < 0.1).sum() >= 4
    assert weight.sum() == pytest.approx(1, abs=0.04)  # ∫ ds, over the kink of the path
    # a constant f tells nothing: points are even
    even, _ = placed(s, np.ones((3, 1)), 2)
    np.testing.assert_allclose(even, (1 + np.array([-1, 1]) / 3**0.5) / 2)


DONE = []


def noting(run, outputs):
    DONE.append(run.weights[0])
    return magic(run, outputs, check=False)


def test_finished_points_are_kept(tmp_path):
    problem, outputs = small()
    DONE.clear()
    settings = {"points": 3, "folder": tmp_path, "method": noting}
    one = aumann_shapley(problem, RECIPE, outputs, **settings)
    next(tmp_path.glob("point-*.npy")).unlink()
    two = aumann_shapley(problem, RECIPE, outputs, **settings)
    np.testing.assert_array_equal(one.scores, two.scores)
    assert len(DONE) == 4
    with pytest.raises(ValueError, match="holds values of another run"):
        aumann_shapley(problem, Recipe(SGD(0.1), 4, 3), outputs, **settings)
    with pytest.raises(ValueError, match="at least 1 point"):
        aumann_shapley(problem, RECIPE, outputs, points=0)
    with pytest.raises(ValueError, match="unknown path 'time'"):
        aumann_shapley(problem, RECIPE, outputs, path="time")


def test_another_method_is_another_run(tmp_path):
    problem, outputs = small()
    aumann_shapley(problem, RECIPE, outputs, points=3, folder=tmp_path)
    with pytest.raises(ValueError, match="holds values of another run"):
        aumann_shapley(problem, RECIPE, outputs, points=3, folder=tmp_path, method=influence)
