"""Fitted scikit-learn linear models as problems whose optimum is the estimator's.

    objective of the estimator                              Problem
    Ridge, RidgeClassifier   Σ w_i (y_i − z_i)² + alpha ‖θ‖²     ½ (z − y)²,  weight decay alpha/n
    LinearRegression         Σ w_i (y_i − z_i)²                  the same without decay
    LogisticRegression       C Σ w_i ℓ_i + ½ ‖θ‖²                cross_entropy,  1/(C n)
    PoissonRegressor         Σ w_i ℓ_i / Σ w_i + ½ alpha ‖θ‖²    exp(z) − y z,  alpha Σ w_i / n

Intercepts are not penalised. Weight 0 in a datamodel, with n fixed, is the same estimator fitted without the
row: with the same alpha or C; of PoissonRegressor, whose penalty follows Σ w, with alpha · n / Σ w.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.calling import PerExample
from attribution_core.data import Batch, batches, take
from attribution_core.gradients import mean_gradient
from attribution_core.layerwise.opened import open_output
from attribution_core.outputs import cross_entropy, squared_error
from attribution_core.problem import Problem

STATIONARY = (
    1e-3  # of a row's gradient (root mean square): a larger mean gradient is worth a warning
)
Encode = Callable[[NDArray[Any]], Tensor]


class UnconvergedWarning(UserWarning):
    """The fitted coefficients are not at the optimum of the estimator's objective."""


class LinearModel(nn.Module):
    """z = x Wᵀ + b in float64; classifiers that put out logits hold the first class's at 0 where free.

    Softmax does not see a common shift of the logits, so parameters that the penalty does not settle
    are differences to the first class: always the intercepts, without a penalty the weights as well. Two
    classes have the logits (0, z).

    Args:
        weight: [c, d] or, as differences, [c − 1, d].
        bias: [c] or [c − 1]; None without intercept.
        width: c, outputs an example.
        encode_labels: labels [rows] or [rows, c] as the estimator takes them -> the loss's tensor.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, width: int, encode_labels: Encode):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.width = width
        self.encode_labels = encode_labels

    def forward(self, x: Tensor) -> Tensor:
        """Logits or predictions [b, c] of x [b, d]; of PoissonRegressor the log of the mean."""
        z = F.pad(x @ self.weight.T, (self.width - len(self.weight), 0))
        return z if self.bias is None else z + F.pad(self.bias, (self.width - len(self.bias), 0))

    def encode(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """X [rows, d] and y, as scikit-learn takes them, as the batch (inputs, labels) of a loss or output.

        Raises:
            ValueError: sparse X, other features than fitted, values that are not finite, labels that the
                classifier has not seen.
        """
        if hasattr(X, "toarray"):
            raise ValueError("expected dense X, got a sparse matrix; pass X.toarray()")
        x, labels = np.asarray(X, dtype=float), np.asarray(y)
        d = self.weight.shape[1]
        if x.ndim != 2 or x.shape[1] != d or len(labels) != len(x):
            raise ValueError(
                f"expected X [rows, features={d}] and as many labels, got {x.shape} and {labels.shape}; "
                "give X as the estimator itself sees it, after any transformers"
            )
        if not np.isfinite(x).all():
            bad = np.flatnonzero(~np.isfinite(x).all(1))
            raise ValueError(f"expected finite X, got NaN or infinity in rows {bad[:10].tolist()}")
        return torch.from_numpy(x.copy()), self.encode_labels(labels)


def poisson_loss(model: nn.Module, batch: Batch) -> Tensor:
    """exp(z) − y z of z = log mean, [b]: the negative log-likelihood up to log y!."""
    assert not isinstance(batch, dict)
    inputs, counts = batch
    z = model(inputs)
    return (z.exp() - counts.reshape(z.shape) * z).sum(1)


def from_sklearn(fitted: Any, X: Any, y: Any, *, weights: ArrayLike | None = None) -> Problem:
    """A fitted scikit-learn linear model as a Problem, in float64.

    Five lines to a datamodel of a fitted classifier:

        fitted = LogisticRegression(tol=1e-10).fit(X, y)
        problem = Problem.from_sklearn(fitted, X, y)
        targets = Outputs(margin, problem.model.encode(X_test, y_test))
        f = leave_one_out(problem, targets)      # or influence(..., curvature="hessian"), newton(...)
        f.without([3])

    Args:
        fitted: a LogisticRegression (l2 or no penalty), LinearRegression, Ridge, RidgeClassifier or
            PoissonRegressor. Of a pipeline: `pipeline[-1]`, with X through `pipeline[:-1].transform`.
        X, y: what it was fitted on, in any order of rows.
        weights: [n] the sample_weight it was fitted with (class weights are included), 1 if not given.
            Weights are no part of a problem: give them to `influence(..., weights=)` again.

    Returns:
        A Problem whose `.model` is a `LinearModel`; `.model.encode(X, y)` makes data for `Outputs`. Its
        loss is cross_entropy, squared_error (labels of RidgeClassifier are ±1) or `poisson_loss`.

    Raises:
        TypeError: an estimator of another kind.
        ValueError: one that is not fitted; a penalty, positivity or class weights that no Problem has;
            data that do not fit, see `LinearModel.encode`.

    Warns:
        UnconvergedWarning: the coefficients are not at the optimum. scikit-learn stops early by
            default; influence is exact at the optimum only. The model is left as it is.
    """
    _refuse_others(fitted)
    labels = np.asarray(y)
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    if labels.ndim == 0 or len(labels) == 0:
        raise ValueError(f"expected labels of at least one row, got y of shape {labels.shape}")
    if w.shape != labels.shape[:1]:
        raise ValueError(f"expected weights [n={len(labels)}], got {w.shape}")
    _refuse_class_weight(fitted, weights)
    convert = {"LogisticRegression": _logistic, "PoissonRegressor": _poisson}
    model, loss, decay = convert.get(type(fitted).__name__, _least_squares)(fitted, w)
    problem = Problem(model, loss, model.encode(X, y), weight_decay={"weight": decay})
    _warn_unless_stationary(problem, w)
    return problem


# --- one kind of estimator after another -----------------------------------------------------

Converted = tuple[LinearModel, PerExample, float]


def _tensors(weight: Any, bias: Any, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """coef_ as [k, d] and intercept_ as [k], float64, copied; None without an intercept."""
    rows = torch.from_numpy(np.atleast_2d(np.array(weight, dtype=float)))
    if not intercept:
        return rows, None
    filled = np.broadcast_to(np.atleast_1d(np.asarray(bias, dtype=float)), len(rows))
    return rows, torch.from_numpy(filled.copy())


def _logistic(fitted: Any, w: NDArray[np.float64]) -> Converted:
    penalty = getattr(fitted, "penalty", None)
    l1 = {"l1": 1.0, "l2": 0.0, None: 0.0}.get(penalty, getattr(fitted, "l1_ratio", None) or 0.0)
    if l1 > 0:
        raise ValueError(
            f"expected an l2 penalty or none, got penalty={penalty!r} with an l1 share of {l1}: its optimum has "
            "kinks; refit with l2, on the features that l1 kept"
        )
    several = len(fitted.classes_) > 2
    scheme = getattr(fitted, "multi_class", None)
    if several and (fitted.solver == "liblinear" or scheme == "ovr"):
        raise ValueError(
            "expected one softmax over all classes, got one-versus-rest; refit with solver='lbfgs' (and without "
            "multi_class), or make a problem of each class"
        )
    if not several and scheme == "multinomial":
        raise ValueError(
            "expected the logistic loss for two classes, got multi_class='multinomial', which penalises "
            "otherwise; refit without multi_class"
        )
    if fitted.solver == "liblinear" and fitted.fit_intercept:
        raise ValueError(
            "expected an intercept without penalty, got solver='liblinear', which penalises it; refit with "
            "solver='lbfgs'"
        )
    strength = 0.0 if penalty is None else 1.0 / fitted.C
    weight, bias = _tensors(fitted.coef_, fitted.intercept_, fitted.fit_intercept)
    if several and bias is not None:
        bias = bias[1:] - bias[0]
    if several and strength == 0:
        weight = weight[1:] - weight[0]
    model = LinearModel(weight, bias, len(fitted.classes_), _positions(fitted.classes_))
    return model, cross_entropy, strength / len(w)


def _least_squares(fitted: Any, w: NDArray[np.float64]) -> Converted:
    if getattr(fitted, "positive", False):
        raise ValueError("expected free coefficients, got positive=True; refit with positive=False")
    alpha = np.unique(np.asarray(getattr(fitted, "alpha", 0.0), dtype=float))
    if len(alpha) != 1:
        raise ValueError(
            f"expected one alpha, got {len(alpha)} of them; make a problem of each target"
        )
    weight, bias = _tensors(fitted.coef_, fitted.intercept_, fitted.fit_intercept)
    encode = _signs(fitted.classes_) if hasattr(fitted, "classes_") else _numbers(len(weight))
    return LinearModel(weight, bias, len(weight), encode), squared_error, float(alpha[0]) / len(w)


def _poisson(fitted: Any, w: NDArray[np.float64]) -> Converted:
    weight, bias = _tensors(fitted.coef_, fitted.intercept_, fitted.fit_intercept)
    model = LinearModel(weight, bias, 1, _numbers(1))
    return model, poisson_loss, float(fitted.alpha * w.mean())


# --- labels ----------------------------------------------------------------------------------


def _positions(classes: NDArray[Any]) -> Encode:
    """Labels [rows] -> their places in classes_, [rows]."""

    def encode(labels: NDArray[Any]) -> Tensor:
        if labels.ndim != 1:
            raise ValueError(f"expected one label per row, got labels of shape {labels.shape}")
        unknown = np.setdiff1d(labels, classes)
        if len(unknown):
            raise ValueError(
                f"expected labels among {classes[:5].tolist()} ..., got {unknown[:5].tolist()}; the "
                "classifier was fitted without them"
            )
        return torch.from_numpy(np.searchsorted(classes, labels))

    return encode


def _signs(classes: NDArray[Any]) -> Encode:
    """Labels [rows] -> 1 for the own class and −1 for others, [rows, c]; one column for two classes."""
    positions = _positions(classes)

    def encode(labels: NDArray[Any]) -> Tensor:
        signs = 2.0 * F.one_hot(positions(labels), len(classes)).double() - 1.0
        return signs[:, 1:] if len(classes) == 2 else signs

    return encode


def _numbers(width: int) -> Encode:
    """Labels [rows] or [rows, c] -> numbers [rows, c]."""

    def encode(labels: NDArray[Any]) -> Tensor:
        numbers = np.array(labels, dtype=float)
        if numbers.shape not in ((len(labels),), (len(labels), width)) or (
            numbers.ndim == 1 and width > 1
        ):
            raise ValueError(f"expected labels [rows, {width}], got shape {numbers.shape}")
        return torch.from_numpy(numbers.reshape(len(labels), width))

    return encode


# --- guards ----------------------------------------------------------------------------------


def _refuse_others(fitted: Any) -> None:
    """Raise unless it is one of the five kinds, itself (subclasses may change the objective), and fitted."""
    from sklearn import linear_model

    known = (
        "LogisticRegression",
        "LinearRegression",
        "Ridge",
        "RidgeClassifier",
        "PoissonRegressor",
    )
    name = type(fitted).__name__
    hints = {
        "Pipeline": "; pass pipeline[-1] and pipeline[:-1].transform(X)",
        "LogisticRegressionCV": "; refit LogisticRegression with its C_",
        "RidgeCV": "; refit Ridge with its alpha_",
        "RidgeClassifierCV": "; refit RidgeClassifier with its alpha_",
    }
    hint = "; pass its best_estimator_" if hasattr(fitted, "best_estimator_") else ""
    if name not in known or type(fitted) is not getattr(linear_model, name):
        raise TypeError(
            f"expected a fitted {', '.join(known[:-1])} or {known[-1]}, got {name}{hints.get(name, hint)}"
        )
    if not hasattr(fitted, "coef_"):
        raise ValueError(f"expected a fitted {name}, got one without coef_; call fit first")
    if hasattr(fitted.coef_, "toarray"):
        raise ValueError(
            "expected dense coefficients, got sparse ones; call fitted.densify() first"
        )


def _refuse_class_weight(fitted: Any, weights: ArrayLike | None) -> None:
    if getattr(fitted, "class_weight", None) is not None and weights is None:
        raise ValueError(
            f"expected no class weights, got class_weight={fitted.class_weight!r}; take them as weights: "
            "w = sklearn.utils.class_weight.compute_sample_weight(fitted.class_weight, y), then "
            "Problem.from_sklearn(fitted, X, y, weights=w) and influence(problem, ..., weights=w)"
        )


@torch.enable_grad()  # whatever the caller is in
def _warn_unless_stationary(problem: Problem, w: NDArray[np.float64]) -> None:
    """Compare the objective's gradient with the size of a single row's, ‖r_i‖ √(‖x_i‖² + 1)."""
    left = torch.cat([g.flatten() for g in mean_gradient(problem, w).values()]).norm()
    squares = torch.zeros((), dtype=torch.float64, device=problem.device)
    for rows in batches(problem.n, 4096):
        batch = take(problem.train, rows, problem.device)
        assert not isinstance(batch, dict)
        output, losses_at = open_output(problem.model, problem.loss, problem.params, batch)
        z = output[0].requires_grad_()
        losses = losses_at([z])
        slope = torch.autograd.grad((losses * torch.from_numpy(w[rows]).to(losses)).sum(), z)[0]
        # a fit without error has no slope but that of rounding
        size = slope.square().sum(1) + 1e-20 * (z.detach().square().sum(1) + 1)
        squares += (size * (batch[0].square().sum(1) + 1)).sum()
    share = float(left / (squares / problem.n).sqrt())
    if share > STATIONARY:
        warnings.warn(
            f"expected coefficients at the optimum of these data, got a gradient of {share:.1g} of a row's; "
            "refit with a smaller tol and a larger max_iter (tol=1e-10, solver='newton-cholesky'), on standardised "
            "features; if it has converged, give the X, y and sample_weight (weights=) that it was fitted on",
            UnconvergedWarning,
            stacklevel=4,
        )
