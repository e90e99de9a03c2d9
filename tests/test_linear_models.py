"""attribution_core.linear_models: scikit-learn's own fits, refits and slopes are the reference."""

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn import linear_model
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from attribution_core import Outputs, Problem, cross_entropy, influence, margin, squared_error
from attribution_core.gradients import mean_gradient
from attribution_core.leave_out import leave_one_out
from attribution_core.linear_models import UnconvergedWarning, poisson_loss
from attribution_core.newton import newton

N, D = 40, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)) + np.array([0.0, 1.0, -2.0])
NOISY = X @ RNG.normal(size=(D, 3)) + RNG.normal(size=(N, 3))
NUMBERS = NOISY[:, 0]
TWO = np.where(NOISY[:, 1] > NOISY[:, 1].mean(), "yes", "no")
THREE = np.array(["a", "b", "c"])[(NOISY - NOISY.mean(0)).argmax(1)]
COUNTS = np.random.default_rng(1).poisson(np.exp(0.3 * NUMBERS)).astype(float)
TEST = slice(0, 6)


def logistic(**settings):
    """To a gradient of 1e-12, with every intercept free."""
    return LogisticRegression(
        **{"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 200} | settings
    )


FITS = {
    "least squares": (LinearRegression(), NUMBERS),
    "least squares, three outputs": (LinearRegression(), NOISY),
    "ridge": (Ridge(alpha=2.0), NUMBERS),
    "ridge without intercept": (Ridge(alpha=2.0, fit_intercept=False), NUMBERS),
    "ridge, three outputs": (Ridge(alpha=2.0), NOISY),
    "ridge classifier": (RidgeClassifier(alpha=2.0), TWO),
    "ridge classifier, three classes": (RidgeClassifier(alpha=2.0), THREE),
    "logistic": (logistic(C=0.5), TWO),
    "logistic without intercept": (logistic(C=0.5, fit_intercept=False), TWO),
    "logistic without penalty": (logistic(C=np.inf), TWO),
    "softmax": (logistic(C=0.5), THREE),
    "softmax without intercept": (logistic(C=0.5, fit_intercept=False), THREE),
    "softmax without penalty": (logistic(C=np.inf, solver="newton-cg"), THREE),
    "liblinear without intercept": (
        logistic(C=0.5, fit_intercept=False, solver="liblinear"),
        TWO,
    ),
}  # fmt: skip
# solvers that stop on a gradient of 1e-12 of objectives near 1; liblinear and newton-cg stop above it
STOPPED = {"softmax without penalty": 1e-7, "liblinear without intercept": 1e-7}
POISSON = PoissonRegressor(alpha=0.1, solver="newton-cholesky", tol=1e-12, max_iter=200)


def clone(estimator):
    from sklearn.base import clone

    return clone(estimator)


def fit(estimator, y, weights=None):
    """A new fit without the rows of weight 0, which are then truly gone."""
    weights = np.ones(N) if weights is None else weights
    kept = weights > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # line searches that end at the last digit
        return clone(estimator).fit(X[kept], y[kept], sample_weight=weights[kept])


def raw(fitted):
    """The estimator's own z at the test rows, [rows] or [rows, c]."""
    return getattr(fitted, "decision_function", fitted.predict)(X[TEST])


def first(model, batch):
    """The model's last output, [b]: of two classes the estimator's own z."""
    return model(batch[0])[:, -1]


def problem_of(name, weights=None):
    estimator, y = FITS[name]
    return Problem.from_sklearn(fit(estimator, y, weights), X, y, weights=weights)


def outputs_of(name, problem):
    """Losses, and margins of softmaxes, else the last z: nothing that a common shift of logits moves."""
    y = FITS[name][1]
    other = margin if name.startswith("softmax") else first
    data = problem.model.encode(X[TEST] + 0.1, y[TEST])
    return [Outputs(problem.loss, data), Outputs(other, data)]


@pytest.mark.parametrize("name", FITS)
def test_same_predictions_and_the_same_optimum(name):
    estimator, y = FITS[name]
    fitted = fit(estimator, y)
    problem = Problem.from_sklearn(fitted, X, y)
    z = problem.model(torch.from_numpy(X[TEST])).detach().numpy()
    expected = raw(fitted).reshape(6, -1)
    if expected.shape[1] < z.shape[1]:  # two classes: logits (0, z)
        np.testing.assert_array_equal(z[:, 0], 0)
        z = z[:, 1:]
    if "softmax" in name:  # equal up to a shift of each row
        z, expected = z - z[:, :1], expected - expected[:, :1]
    np.testing.assert_allclose(z, expected, rtol=1e-10, atol=1e-12)
    left = torch.cat([g.flatten() for g in mean_gradient(problem).values()]).norm()
    assert left < STOPPED.get(name, 1e-11)
    assert all(value.dtype == torch.float64 for value in problem.params.values())


@pytest.mark.parametrize("name", FITS)
def test_no_direction_is_left_open(name):
    """H is positive definite without damping: softmax has no common shift among its parameters."""
    problem = problem_of(name)
    f = influence(problem, outputs_of(name, problem)[0], curvature="hessian")
    assert np.isfinite(f.scores).all()


@pytest.mark.parametrize("anchor", ["ones", "uneven"])
@pytest.mark.parametrize("name", FITS)
def test_influence_is_the_slope_of_scikit_learns_fits(name, anchor):
    w = None if anchor == "ones" else np.linspace(0.5, 1.5, N)
    problem = problem_of(name, w)
    start = np.ones(N) if w is None else w
    for outputs in outputs_of(name, problem):
        f = influence(problem, outputs, curvature="hessian", weights=w)
        for row in (0, 17):
            # h = 1e-3: the next term is h² f'''/6 ~ 1e-6 of f' for rows of leverage near 1/2
            step = 1e-3 * np.eye(N)[row]
            ends = [
                outputs.evaluate(problem_of(name, start + s).model).numpy() for s in (step, -step)
            ]
            slope = (ends[0] - ends[1]) / 2e-3
            far = 1e-5 if name not in STOPPED else 1e-3  # their fits are good to 1e-7 / h
            assert np.abs(f.scores[row] - slope).max() < far * np.abs(slope).max()


@pytest.mark.parametrize("name", [name for name, (e, _) in FITS.items() if hasattr(e, "copy_X")])
def test_leave_one_out_of_least_squares_is_the_refit(name):
    """The acceptance: to 1e-8; alpha stays as it is, for weight 0 keeps n. What is left is rounding."""
    problem = problem_of(name)
    outputs = Outputs(first, problem.model.encode(X[TEST], FITS[name][1][TEST]))
    f = leave_one_out(problem, outputs)
    for row in (0, 17, 39):
        expected = raw(fit(*FITS[name], 1 - np.eye(N)[row])).reshape(6, -1)[:, -1]
        np.testing.assert_allclose(f.without([row]), expected, rtol=0, atol=1e-11)


# without a penalty, a third of 40 rows can be separated, and then there is no optimum
@pytest.mark.parametrize(
    "name", [name for name in FITS if name not in STOPPED and name != "logistic without penalty"]
)
def test_newton_is_the_refit_at_random_weights(name):
    """Sample weights and dropped rows at once; with several steps, to rounding."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 2, (3, N)) * (rng.random((3, N)) < 0.7)
    problem = problem_of(name)
    for outputs in outputs_of(name, problem):
        refits = [fit(*FITS[name], w) for w in weights]
        expected = [
            outputs.evaluate(Problem.from_sklearn(m, X, FITS[name][1], weights=w).model).numpy()
            for m, w in zip(refits, weights, strict=True)
        ]
        steps = 15 if "logistic" in name or "softmax" in name else 1
        found = newton(problem, outputs, steps=steps).predict(weights)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_poisson_follows_the_sum_of_weights():
    """Its penalty is alpha beside a *mean*: weight w at fixed n is alpha · n / Σ w."""
    fitted = fit(POISSON, COUNTS)
    problem = Problem.from_sklearn(fitted, X, COUNTS)
    batch = problem.model.encode(X[TEST], COUNTS[TEST])
    np.testing.assert_allclose(
        problem.model(batch[0])[:, 0].detach().exp(), fitted.predict(X[TEST])
    )
    w = np.random.default_rng(0).uniform(0, 2, N)
    w[:10] = 0
    same = fit(clone(POISSON).set_params(alpha=0.1 * N / w.sum()), COUNTS, w)
    expected = np.log(same.predict(X[TEST]))
    found = newton(problem, Outputs(first, batch), steps=15).predict(w)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    # fitted with weights, the penalty counts beside their mean
    heavy = Problem.from_sklearn(fit(POISSON, COUNTS, w), X, COUNTS, weights=w)
    assert heavy.weight_decay["weight"] == pytest.approx(0.1 * w.mean())
    likelihood = poisson_loss(problem.model, batch).detach().exp()
    z = problem.model(batch[0])[:, 0].detach()
    expected = (torch.distributions.Poisson(z.exp()).log_prob(batch[1][:, 0]).neg()).exp()
    factorial = (torch.lgamma(batch[1][:, 0] + 1)).exp()
    torch.testing.assert_close(likelihood * factorial, expected)


def test_five_lines():
    """The ones in the docstring, with labels that are words."""
    fitted = LogisticRegression(tol=1e-10).fit(X, THREE)
    problem = Problem.from_sklearn(fitted, X, THREE)
    targets = Outputs(margin, problem.model.encode(X[TEST] + 0.1, THREE[TEST]))
    f = leave_one_out(problem, targets)
    refit = Problem.from_sklearn(
        LogisticRegression(tol=1e-10).fit(X[1:], THREE[1:]), X[1:], THREE[1:]
    )
    actual = targets.evaluate(refit.model).numpy() - f.base
    # the 1/(1 − h) of a single row errs by its third derivative
    assert np.abs(f.without([0]) - f.base - actual).max() < 0.2 * np.abs(actual).max()


def test_class_weights_are_weights():
    estimator = logistic(C=0.5, class_weight="balanced")
    fitted = estimator.fit(X, THREE)
    with pytest.raises(ValueError, match=r"class_weight='balanced'.*compute_sample_weight"):
        Problem.from_sklearn(fitted, X, THREE)
    w = compute_sample_weight("balanced", THREE)
    problem = Problem.from_sklearn(fitted, X, THREE, weights=w)
    same = Problem.from_sklearn(fit(logistic(C=0.5), THREE, w), X, THREE, weights=w)
    for name, value in problem.params.items():
        torch.testing.assert_close(value, same.params[name], rtol=1e-9, atol=1e-11)


# --- warnings --------------------------------------------------------------------------------


def test_a_fit_that_stopped_early_is_told_and_left_alone():
    fitted = LogisticRegression(tol=0.05, C=100.0).fit(X, THREE)
    with pytest.warns(
        UnconvergedWarning, match="got a gradient of .* of a row's; refit with a sma"
    ):
        problem = Problem.from_sklearn(fitted, X, THREE)
    np.testing.assert_array_equal(problem.model.weight.detach(), fitted.coef_)
    LogisticRegression().fit(X, THREE)
    Problem.from_sklearn(
        LogisticRegression().fit(X, THREE), X, THREE
    )  # the default tol is no warning


def test_other_data_and_other_weights_are_told():
    fitted = Ridge().fit(X, NUMBERS)
    with pytest.warns(UnconvergedWarning, match="that it was fitted on"):
        Problem.from_sklearn(fitted, X[:, ::-1], NUMBERS)
    with pytest.warns(UnconvergedWarning, match="that it was fitted on"):
        Problem.from_sklearn(fitted, X, NUMBERS, weights=np.linspace(0, 2, N))
    weighted = fit(Ridge(), NUMBERS, np.linspace(0, 2, N))
    Problem.from_sklearn(weighted, X, NUMBERS, weights=np.linspace(0, 2, N))


def test_a_fit_without_error_is_no_early_stop():
    """Residuals of rounding only: nothing to be compared with."""
    y = X @ [1.0, 2.0, 3.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = Problem.from_sklearn(LinearRegression().fit(X, y), X, y)
    assert problem.model(problem.train[[0]][0]).item() == pytest.approx(y[0])


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (linear_model.Lasso(), "got Lasso$"),
        (linear_model.LinearSVC() if hasattr(linear_model, "LinearSVC") else None, "got LinearSVC$"),
        (linear_model.RidgeCV(), "got RidgeCV; refit Ridge with its alpha_"),
        (linear_model.LogisticRegressionCV(), "refit LogisticRegression with its C_"),
        (make_pipeline(StandardScaler(), Ridge()), r"pass pipeline\[-1\] and pipeline\[:-1\].transfo"),
        (type("Mine", (Ridge,), {})(), "got Mine"),
        (type("Ridge", (Ridge,), {})(), "got Ridge"),
    ],
)  # fmt: skip
def test_other_estimators(estimator, message):
    if estimator is None:
        from sklearn.svm import LinearSVC

        estimator = LinearSVC()
    with pytest.raises(TypeError, match=f"expected a fitted LogisticRegression.*{message}"):
        Problem.from_sklearn(estimator, X, NUMBERS)


def test_searches_hold_their_best():
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(Ridge(), {"alpha": [1.0, 2.0]}, cv=2).fit(X, NUMBERS)
    with pytest.raises(TypeError, match="got GridSearchCV; pass its best_estimator_"):
        Problem.from_sklearn(search, X, NUMBERS)
    Problem.from_sklearn(search.best_estimator_, X, NUMBERS)


def test_a_pipeline_in_two_parts():
    pipeline = make_pipeline(StandardScaler(), Ridge()).fit(X, NUMBERS)
    seen = pipeline[:-1].transform(X)
    problem = Problem.from_sklearn(pipeline[-1], seen, NUMBERS)
    z = problem.model(torch.from_numpy(seen))[:, 0].detach().numpy()
    np.testing.assert_allclose(z, pipeline.predict(X), rtol=1e-12)


def _set(estimator, **settings):
    """A fitted estimator with settings changed: what matters here is how it says it was fitted."""
    fitted = estimator.fit(X, TWO if settings.pop("two", False) else THREE)
    for name, value in settings.items():
        setattr(fitted, name, value)
    return fitted


@pytest.mark.parametrize(
    ("fitted", "y", "message"),
    [
        (Ridge(), NUMBERS, "expected a fitted Ridge, got one without coef_"),
        (Ridge(positive=True).fit(X, NUMBERS), NUMBERS, "got positive=True"),
        (Ridge(alpha=[1.0, 2.0, 3.0]).fit(X, NOISY), NOISY, "expected one alpha, got 3"),
        (_set(logistic(), penalty="l1"), THREE, "got penalty='l1' with an l1 share of 1"),
        (_set(logistic(), penalty="elasticnet", l1_ratio=0.3), THREE, "an l1 share of 0.3"),
        (_set(logistic(), l1_ratio=0.5, penalty="deprecated"), THREE, "an l1 share of 0.5"),
        (_set(logistic(), multi_class="ovr"), THREE, "got one-versus-rest"),
        (_set(logistic(), solver="liblinear"), THREE, "got one-versus-rest"),
        (_set(logistic(), solver="liblinear", two=True), TWO, "liblinear', which penalises it"),
        (_set(logistic(), multi_class="multinomial", two=True), TWO, "logistic loss for two classes"),
        (_set(logistic()).sparsify(), THREE, r"call fitted.densify\(\) first"),
        (_set(logistic()), np.array(["a", "z"] * 20), r"labels among \['a', 'b', 'c'\].*got \['z'\]"),
        (_set(logistic()), NOISY, "one label per row"),
        (Ridge().fit(X, NUMBERS), NOISY, r"expected labels \[rows, 1\], got shape \(40, 3\)"),
        (Ridge().fit(X, NOISY), NUMBERS, r"expected labels \[rows, 3\], got shape \(40,\)"),
        (Ridge().fit(X, NUMBERS), NUMBERS[:5], r"as many labels, got \(40, 3\) and \(5,\)"),
        (Ridge().fit(X, NUMBERS), NUMBERS[:0], "labels of at least one row"),
    ],
)  # fmt: skip
def test_fits_and_labels_that_no_problem_has(fitted, y, message):
    with pytest.raises(ValueError, match=message):
        Problem.from_sklearn(fitted, X, y)


def test_inputs_that_do_not_fit():
    fitted = Ridge().fit(X, NUMBERS)
    holed = X.copy()
    holed[7, 1] = np.nan
    for x, message in (
        (X[:, :2], r"expected X \[rows, features=3\] and as many labels, got \(40, 2\)"),
        (X[:, 0], "expected X"),
        (sparse.csr_matrix(X), r"pass X.toarray\(\)"),
        (holed, r"NaN or infinity in rows \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Problem.from_sklearn(fitted, x, NUMBERS)
    with pytest.raises(ValueError, match=r"expected weights \[n=40\], got \(3,\)"):
        Problem.from_sklearn(fitted, X, NUMBERS, weights=np.ones(3))


def test_the_users_arrays_stay_their_own():
    """float64 arrays are copied: a datamodel does not move when they do, nor they with the model."""
    fitted, x = Ridge().fit(X, NUMBERS), X.copy()
    problem = Problem.from_sklearn(fitted, x, NUMBERS)
    with torch.no_grad():
        problem.model.weight.zero_()
    x[:] = 0
    assert (fitted.coef_ != 0).all()
    np.testing.assert_array_equal(problem.train.columns[0], X)


def test_losses_by_name():
    """A user combines them: the ones that come with the package, so that outputs of the same kind fit."""
    assert problem_of("ridge").loss is squared_error
    assert problem_of("logistic").loss is cross_entropy
    assert Problem.from_sklearn(fit(POISSON, COUNTS), X, COUNTS).loss is poisson_loss
