"""attribution_core.refitting: scikit-learn's models, fitted again at other weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
)
from sklearn.utils.class_weight import compute_sample_weight

from applied.recipe import Decision, verify
from attribution_core import Outputs, Problem, cross_entropy, influence, squared_error
from attribution_core.refitting import refit, refitted
from tests import menagerie

N = 30


def rows(classes=None):
    rng = np.random.default_rng(classes or 0)
    x = rng.normal(size=(N, 3))
    z = x @ rng.normal(size=(3, classes or 1)) + rng.normal(size=(N, classes or 1))
    return x, z.argmax(1) if classes else z[:, 0]


def logistic(classes):
    x, y = rows(classes)
    return LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-12), x, y


def ridge():
    return Ridge(alpha=0.7), *rows()


def least_squares():
    return LinearRegression(), *rows()


def counts():
    x, y = rows()
    return PoissonRegressor(alpha=0.2, tol=1e-10, max_iter=1000), x, np.floor(np.exp(0.3 * y))


MODELS = {
    "two classes": lambda: logistic(2),
    "four classes": lambda: logistic(4),
    "ridge": ridge,
    "least squares": least_squares,
    "poisson": counts,
}


def predicted(fitted, x):
    """What the estimator itself says: the first output of the model that it becomes."""
    if isinstance(fitted, LogisticRegression):
        return np.log(fitted.predict_proba(x)[:, 1] / fitted.predict_proba(x)[:, 0])
    if isinstance(fitted, PoissonRegressor):
        return np.log(fitted.predict(x))
    return fitted.predict(x)


def output(model, batch):
    z = model(batch[0])
    return z[:, 1] - z[:, 0] if z.shape[1] > 1 else z[:, 0]


def choices(y):
    """Rows left out, rows twice, and fractional weights; every class keeps a row."""
    rng = np.random.default_rng(5)
    some = (rng.random(N) < 0.7).astype(float)
    some[[np.flatnonzero(y == c)[0] for c in np.unique(y)[:4]]] = 1.0
    return np.stack([np.ones(N), some, some * rng.integers(1, 3, N), some * rng.uniform(0.2, 2, N)])


@pytest.mark.parametrize("name", MODELS)
def test_refits_are_fits_by_hand(name):
    estimator, x, y = MODELS[name]()
    fitted = estimator.fit(x, y)
    problem = Problem.from_sklearn(fitted, x, y)
    fresh = np.random.default_rng(9).normal(size=(5, 3))
    outputs = Outputs(output, (torch.from_numpy(fresh), torch.zeros(5)))
    weights = choices(y)
    table = refit(fitted, problem, outputs, weights)
    assert table.per_seed.shape == (4, 1, 5)
    np.testing.assert_array_equal(table.weights, weights)
    before = predicted(fitted, fresh)
    for w, found in zip(weights, table.outputs, strict=True):
        kept = w > 0
        again = type(estimator)(**estimator.get_params()).fit(
            x[kept], y[kept], sample_weight=w[kept]
        )
        # the same calls with the same numbers: only logits are computed otherwise
        np.testing.assert_allclose(found, predicted(again, fresh), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(predicted(fitted, fresh), before)  # a copy was fitted
    assert np.abs(table.outputs[1:] - table.outputs[0]).max() > 1e-3


def test_a_refit_solves_the_normal_equations():
    """The closed form: (Xᵀ W X + α) θ = Xᵀ W y around the weighted means."""
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    w = choices(y)[3]
    found = refitted(estimator, problem, w)
    mean_x, mean_y = w @ x / w.sum(), w @ y / w.sum()
    a = x - mean_x
    theta = np.linalg.solve((a.T * w) @ a + 0.7 * np.eye(3), (a.T * w) @ (y - mean_y))
    np.testing.assert_allclose(found.model.weight.detach().numpy()[0], theta, rtol=1e-10)
    assert float(found.model.bias.detach()[0]) == pytest.approx(mean_y - mean_x @ theta, rel=1e-10)
    # alpha over the rows that are there: what influence(drop="row") divides the losses by
    assert found.weight_decay["weight"] == pytest.approx(0.7 / np.count_nonzero(w), rel=1e-12)
    assert found.train is problem.train


@pytest.mark.parametrize("name", ["two classes", "ridge"])
def test_a_refit_is_where_its_scores_are_slopes(name):
    estimator, x, y = MODELS[name]()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    w = choices(y)[1]
    outputs = Outputs(output, problem.train)
    f = influence(
        refitted(estimator, problem, w), outputs, curvature="hessian", weights=w, drop="row"
    )
    move = np.random.default_rng(0).normal(size=N) * (w > 0)
    h = 1e-3
    up, down = refit(estimator, problem, outputs, np.stack([w + h * move, w - h * move])).outputs
    slope = (up - down) / (2 * h)
    # central differences err by h² f'''/6 ~ 1e-6 of f'
    assert np.abs(move @ f.scores - slope).max() < 1e-5 * np.abs(slope).max()


def test_row_order_and_weight_zero_do_not_matter():
    estimator, x, y = logistic(4)
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    outputs = Outputs(output, problem.train[[0, 1, 2]])
    w = choices(y)[3]
    order = np.random.default_rng(2).permutation(N)
    other = Problem.from_sklearn(estimator, x[order], y[order])
    first = refit(estimator, problem, outputs, w).outputs
    # two fits to gradients of 1e-12 over decays of 1/(C n)
    np.testing.assert_allclose(
        refit(estimator, other, outputs, w[order]).outputs, first, rtol=0, atol=1e-9
    )
    spoilt = x.copy()
    spoilt[w == 0] = 1e6  # never seen
    torch_x = torch.from_numpy(spoilt)
    ruined = replace(problem, train=(torch_x, problem.train.columns[1]))
    np.testing.assert_array_equal(refit(estimator, ruined, outputs, w).outputs, first)


def test_seeds_only_repeat():
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    outputs = Outputs(output, problem.train)
    table = refit(estimator, problem, outputs, np.ones(N), seeds=[4, 9])
    assert table.seeds == (4, 9)
    assert table.per_seed.shape == (1, 2, N)
    np.testing.assert_array_equal(table.per_seed[0, 0], table.per_seed[0, 1])
    assert refit(estimator, problem, outputs, np.ones(N), seeds=3).seeds == (0, 1, 2)


def test_a_decision_is_verified_by_it():
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    outputs = Outputs(squared_error, problem.train).mean()
    f = influence(problem, outputs, curvature="hessian")
    weights = (np.arange(N) >= 3).astype(float)
    decision = Decision(weights, np.arange(3, N), f.predict(weights), f.base, f.targets)

    def retrain(some, *, seeds):
        return refit(estimator, problem, outputs, some, seeds=seeds)

    verified = verify(decision, retrain, control={"all": np.ones(N), "random": "random"}, seeds=3)
    expected = Ridge(alpha=0.7).fit(x[3:], y[3:])
    assert verified.actual[:, 0] == pytest.approx(
        np.full(3, 0.5 * ((expected.predict(x) - y) ** 2).mean()), rel=1e-12
    )
    np.testing.assert_allclose(verified.control["all"][:, 0], np.repeat(f.base, 3), rtol=1e-12)
    assert np.ptp(verified.control["random"]) > 0  # its rows differ by seed


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [np.ones(N - 1), np.ones((1, N)), np.zeros(N), -np.ones(N), np.full(N, np.nan)]
)
def test_weights_that_do_not_fit(weights):
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    with pytest.raises(ValueError, match=r"expected (a row of positive|finite|one) weights?"):
        refitted(estimator, problem, weights)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_class_without_rows(classes):
    estimator, x, y = logistic(classes)
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    message = (
        "one class|at least 2 classes|rows of each of the 2"
        if classes == 2
        else "rows of each of the 4 classes, got 3"
    )
    with pytest.raises(ValueError, match=message):
        refitted(estimator, problem, (y != 1).astype(float))


def test_models_that_it_cannot_fit():
    x, y = rows(2)
    classifier = RidgeClassifier().fit(x, y)
    with pytest.raises(ValueError, match="other than RidgeClassifier, got LinearModel and RidgeCl"):
        refitted(classifier, Problem.from_sklearn(classifier, x, y), np.ones(N))
    network = menagerie.mlp()
    with pytest.raises(ValueError, match="got Sequential and LogisticRegression; use retrain"):
        refitted(LogisticRegression(), network, np.ones(network.n))


def test_scores_at_fewer_rows_are_slopes_of_refits():
    """Rows left out or brought in change n; drop="row" and the decay of the refit follow it together."""
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    w = np.ones(len(x))
    w[: len(x) // 3] = 0.0
    outputs = Outputs(lambda model, batch: model(batch[0])[:, 0], (torch.tensor(x[:2]),))
    at = refitted(estimator, problem, w)
    scores = influence(at, outputs, weights=w, drop="row", curvature="hessian").scores
    step = 1e-6  # least squares: the slope's own change is of this size, rounding of 1e-10
    for row in (0, len(x) - 1):
        moved = w.copy()
        moved[row] += step
        slope = (refit(estimator, problem, outputs, moved).outputs - at_outputs(at, outputs)) / step
        np.testing.assert_allclose(scores[row], slope[0], rtol=1e-4)


def at_outputs(problem, outputs):
    return outputs.evaluate(problem.model).numpy()


@pytest.mark.parametrize("class_weight", ["balanced", {0: 1.0, 1: 5.0}])
def test_class_weights_count_once(class_weight):
    """The weights given hold them, so a refit at these weights is the fit itself; at fewer rows, scikit-learn's."""
    x, y = rows(2)
    fit = LogisticRegression(class_weight=class_weight, tol=1e-12, max_iter=10_000).fit(x, y)
    w = compute_sample_weight(class_weight, y)
    problem = Problem.from_sklearn(fit, x, y, weights=w)
    outputs = Outputs(cross_entropy, problem.model.encode(x[:3], y[:3]))
    np.testing.assert_allclose(
        refit(fit, problem, outputs, w).outputs[0], at_outputs(problem, outputs), rtol=1e-6
    )
    fewer = np.where(np.arange(len(x)) < 4, 0.0, w)
    plain = LogisticRegression(tol=1e-12, max_iter=10_000).fit(x, y, sample_weight=fewer)
    expected = -plain.predict_log_proba(x[:3])[np.arange(3), y[:3]]
    np.testing.assert_allclose(refit(fit, problem, outputs, fewer).outputs[0], expected, rtol=1e-6)


def test_no_seeds_at_all():
    estimator, x, y = ridge()
    problem = Problem.from_sklearn(estimator.fit(x, y), x, y)
    outputs = Outputs(squared_error, problem.train)
    with pytest.raises(ValueError, match="at least one seed"):
        refit(estimator, problem, outputs, np.ones(len(x)), seeds=0)


def test_weights_without_class_weights_are_refused():
    """Those of an attack, 0 and 1, would refit another estimator than the one that was fitted."""
    x, y = rows(2)
    y = np.where(np.arange(len(y)) < len(y) // 4, 1, 0)
    fit = LogisticRegression(class_weight="balanced", tol=1e-12, max_iter=10_000).fit(x, y)
    w = compute_sample_weight("balanced", y)
    problem = Problem.from_sklearn(fit, x, y, weights=w)
    with pytest.raises(ValueError, match="hold the class weights"):
        refitted(fit, problem, np.ones(len(y)))
    refitted(fit, problem, w)
    # classes of one size: their weights are equal anyway
    even = np.r_[np.flatnonzero(y), np.flatnonzero(y == 0)[: y.sum()]]
    refitted(fit, problem, np.isin(np.arange(len(y)), even).astype(float))


def test_one_class_left_is_said_before_scikit_learn_does():
    x, y = rows(2)
    fit = LogisticRegression().fit(x, y)
    problem = Problem.from_sklearn(fit, x, y)
    with pytest.raises(ValueError, match="rows of each of the 2 classes, got 1"):
        refitted(fit, problem, (y == y[0]).astype(float))


def test_balanced_classes_may_lose_a_row():
    """Their weights are those of all rows: a row that is left out changes none."""
    x, y = rows(2)
    y = np.arange(len(y)) % 2
    fit = LogisticRegression(class_weight="balanced", tol=1e-12, max_iter=10_000).fit(x, y)
    w = compute_sample_weight("balanced", y)
    problem = Problem.from_sklearn(fit, x, y, weights=w)
    w[0] = 0
    found = refitted(fit, problem, w).model
    plain = LogisticRegression(tol=1e-12, max_iter=10_000).fit(x[1:], y[1:])
    np.testing.assert_allclose(found.weight.detach().numpy(), plain.coef_, rtol=1e-6)
