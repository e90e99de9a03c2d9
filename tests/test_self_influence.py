"""attribution_core.self_influence: the diagonal of influence, and the slope of refits."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    fit_curvature,
    influence,
    train,
)
from attribution_core.refitting import refit
from attribution_core.self_influence import self_influence
from tests import menagerie
from tests.test_curvature import dense_gauss_newton, dense_hessian

RECIPE = Recipe(SGD(0.1, momentum=0.5), batch_size=2, epochs=4, schedule="linear")


def diagonal(source, **settings):
    """The long way: every loss by every row."""
    problem = source if isinstance(source, Problem) else source.problem
    f = influence(source, Outputs(problem.loss, problem.train), refine=0, **settings)
    return -np.diag(f.scores)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "diagonal", "identity", "ekfac"])
@pytest.mark.parametrize("anchor", ["ones", "uneven"])
def test_it_is_the_diagonal_of_influence(curvature, anchor):
    problem = replace(menagerie.mlp(9), weight_decay=2.0)  # enough for the raw Hessian
    w = None if anchor == "ones" else np.linspace(0, 1.5, 9)
    found = self_influence(problem, curvature=curvature, weights=w)
    expected = diagonal(problem, curvature=curvature, weights=w)
    assert found.shape == (9,)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)
    assert found.min() > 0


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_it_is_the_formula(curvature):
    """(1/n) gᵢᵀ H⁻¹ gᵢ, with every piece from plain autograd."""
    problem = replace(menagerie.mlp(), weight_decay=2.0)
    dense = dense_hessian if curvature == "hessian" else dense_gauss_newton
    g = menagerie.row_gradients(problem)
    h = dense(problem, np.ones(6)) + 2.0 * torch.eye(g.shape[1]).double()
    expected = (g @ torch.linalg.inv(h) * g).sum(1) / 6
    # float64; matrices of a condition below 1e4
    np.testing.assert_allclose(self_influence(problem, curvature=curvature), expected, rtol=1e-10)


@pytest.mark.parametrize("name", menagerie.CONVEX)
def test_it_is_the_slope_of_exact_refits(name):
    problem = menagerie.refit(menagerie.CONVEX[name]())
    found = self_influence(problem, curvature="hessian")
    own = Outputs(problem.loss, problem.train)
    h = 1e-3
    step = h * np.eye(problem.n)
    up, down = (menagerie.outputs_of_refits(problem, own, 1.0 + s) for s in (step, -step))
    slopes = -np.diag(up - down) / (2 * h)
    # h² f'''/6 ~ 1e-6 of the slope; refits to gradients of 1e-12 add 1e-8 at worst
    assert np.abs(found - slopes).max() < 1e-5 * slopes.max()
    assert found.min() >= 0


def test_of_a_fitted_estimator():
    """Scikit-learn's own refits; rows with wrong labels are among the largest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = (x[:, 0] + 0.3 * rng.normal(size=60) > 0).astype(int)
    wrong = np.argsort(-np.abs(x[:, 0]))[[2, 7, 11]]
    y[wrong] = 1 - y[wrong]
    fitted = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, y)
    problem = Problem.from_sklearn(fitted, x, y)
    found = self_influence(problem, curvature="hessian")
    some = np.r_[wrong, 0, 1]
    own = Outputs(problem.loss, problem.train[some.tolist()])
    h = 1e-3
    step = h * np.eye(60)[some]
    up, down = (refit(fitted, problem, own, 1.0 + s).outputs for s in (step, -step))
    slopes = -np.diag(up - down) / (2 * h)
    assert np.abs(found[some] - slopes).max() < 1e-5 * slopes.max()  # as above
    assert set(np.argsort(-found)[:3]) == set(wrong.tolist())


# --- what must not matter ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
def test_batch_size_changes_nothing(size, monkeypatch):
    problem = menagerie.mlp(9)
    expected = self_influence(problem)
    np.testing.assert_allclose(self_influence(problem, batch_size=size), expected, rtol=1e-10)
    module = importlib.import_module("attribution_core.self_influence")
    asked = []
    gradients = module.row_gradients
    monkeypatch.setattr(
        module, "row_gradients", lambda *a: asked.append(len(a[3][0])) or gradients(*a)
    )
    monkeypatch.setattr(module, "HELD", 1)  # a large model: one row at a time
    np.testing.assert_allclose(self_influence(problem, batch_size=size), expected, rtol=1e-10)
    assert asked == [1] * 9


def test_row_order_permutes():
    problem = menagerie.softmax()
    order = np.random.default_rng(0).permutation(problem.n)
    x, y = problem.train.columns
    other = replace(problem, train=(x[order], y[order]))
    expected = self_influence(problem)[order]
    np.testing.assert_allclose(self_influence(other), expected, rtol=1e-10, atol=1e-15)


# --- runs ------------------------------------------------------------------------------------------


def test_a_run_brings_its_weights_and_damping():
    problem = menagerie.softmax()
    w = np.linspace(0.5, 1.5, problem.n)
    run = train(problem, RECIPE, w, exposure=0.5)
    np.testing.assert_allclose(self_influence(run), diagonal(run), rtol=1e-10)
    with pytest.raises(ValueError, match="a run brings its own weights and exposure"):
        self_influence(run, weights=w)
    with pytest.raises(ValueError, match="a run brings its own weights and exposure"):
        self_influence([run, run], weights=w)


def test_several_runs_are_averaged():
    problem = menagerie.softmax()
    runs = [train(problem, replace(RECIPE, seed=seed)) for seed in range(3)]
    expected = np.mean([self_influence(run) for run in runs], axis=0)
    np.testing.assert_array_equal(self_influence(runs), expected)
    assert np.abs(self_influence(runs[0]) - expected).max() > 1e-3 * expected.max()
    with pytest.raises(ValueError, match="at least one run"):
        self_influence([])


def test_ekfac_of_a_small_network():
    """Not the Gauss–Newton, but its ranks: rows whose labels are wrong stand out in both."""
    x, y = (array[:150] for array in menagerie.digits_arrays())
    y = y.copy()
    wrong = np.arange(0, 150, 15)
    y[wrong] = (y[wrong] + 5) % 10
    problem = Problem(
        menagerie.digits_model(0, 16), cross_entropy, (torch.tensor(x), torch.tensor(y))
    )
    run = train(problem, Recipe(SGD(0.1, momentum=0.9), 30, 15))
    found = self_influence(run, curvature="ekfac")
    np.testing.assert_allclose(
        found, diagonal(run, curvature="ekfac"), rtol=1e-3
    )  # of a float32 network
    assert found.min() >= 0
    planted = np.isin(np.arange(150), wrong)
    above = (found[planted][:, None] > found[~planted]).mean()
    # of 10 against 140 rows the AUC of a random score is .5 with an sd of .095
    assert above > 0.5 + 4 * 0.095
    some = self_influence(run, curvature="ekfac", curvature_rows=60)
    assert some.shape == (150,)
    assert np.corrcoef(np.log(some), np.log(found))[0, 1] > 0.9


def test_a_curvature_fitted_before_serves_again():
    problem = menagerie.refit(menagerie.softmax())
    fitted = fit_curvature(problem, "hessian")
    expected = self_influence(problem, curvature="hessian")
    np.testing.assert_allclose(self_influence(problem, curvature=fitted), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="brings its damping"):
        self_influence(problem, curvature=fitted, damping=0.1)
    more = self_influence(problem, curvature="hessian", damping=0.1)
    assert (more < expected).all()  # a stiffer model moves less
