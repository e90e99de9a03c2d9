"""Scikit-learn's linear models fitted again on other training weights: exact retraining of convex problems.

fitted = LogisticRegression(C=0.1, tol=1e-10).fit(X, y)
problem = Problem.from_sklearn(fitted, X, y)
table = refit(fitted, problem, outputs, weights)            # as `retrain`, without a seed to depend on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.data import Progress, checked_weights, take
from attribution_core.linear_models import LinearModel, from_sklearn
from attribution_core.problem import Outputs, Problem
from attribution_core.seeds import listed
from attribution_core.table import RetrainingTable


def refitted(fitted: Any, problem: Problem, weights: ArrayLike) -> Problem:
    """The problem with the model that the estimator would be, had it been fitted at these weights.

    Its weight decay is that of the rows of positive weight alone: pass it on as
    `influence(..., weights=w, drop="row")`.

    Args:
        fitted: the estimator that `problem` was made of; a copy is fitted.
        problem: of `Problem.from_sklearn`, or of rows made from it (other versions of rows, say).
        weights: [n], passed as sample_weight; rows of weight 0 are left out. They hold class weights, where the
            estimator has some, as those given to `Problem.from_sklearn` do.

    Raises:
        ValueError: weights that do not fit; a class without a row left; a RidgeClassifier, whose encoded labels
            cannot be taken back; a problem whose model is no LinearModel.
    """
    from sklearn.base import clone

    w = checked_weights(weights, problem.n, some=True)
    if not isinstance(problem.model, LinearModel) or type(fitted).__name__ == "RidgeClassifier":
        raise ValueError(
            "expected a problem of Problem.from_sklearn and an estimator other than RidgeClassifier, got "
            f"{type(problem.model).__name__} and {type(fitted).__name__}; use retrain for other models"
        )
    rows = np.flatnonzero(w)
    batch: Any = take(problem.train, rows)
    x, y = (column.cpu().numpy() for column in batch)
    one = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if hasattr(fitted, "classes_") and len(np.unique(one)) != problem.model.width:
        raise ValueError(
            f"expected rows of each of the {problem.model.width} classes, got {len(np.unique(one))} classes; leave "
            "some rows of every class"
        )
    again = clone(fitted)
    if getattr(again, "class_weight", None) is not None:
        _refuse_weights_without_classes(fitted, problem, w)
        again.set_params(class_weight=None)
    again.fit(x, one, sample_weight=w[rows])
    made = from_sklearn(again, x, one, weights=w[rows])
    return replace(problem, model=made.model, weight_decay=made.weight_decay)


def _refuse_weights_without_classes(fitted: Any, problem: Problem, w: NDArray[np.float64]) -> None:
    """Raise for weights that treat all rows alike where the estimator's class weights do not.

    Weights hold the class weights of all rows, see `from_sklearn`; those of an attack or a selection, 0 and 1, do
    not. A table with every row under every label is balanced by itself: there those of the rows that are taken count.
    """
    from sklearn.utils.class_weight import compute_sample_weight

    kept = w > 0
    if np.ptp(w[kept]) > 0:
        return
    batch: Any = take(problem.train, np.arange(problem.n))
    labels = fitted.classes_[batch[1].cpu().numpy().ravel()]
    model: Any = problem.model
    table = kept.mean() <= 1 / model.width
    own = compute_sample_weight(fitted.class_weight, labels[kept] if table else labels)
    if np.ptp(own) > 1e-9 * own.max():
        raise ValueError(
            f"expected weights that hold the class weights {fitted.class_weight!r}, got {w[kept][0]:g} for all rows; multiply "
            "them by sklearn.utils.class_weight.compute_sample_weight(class_weight, labels), or fit without class weights"
        )


def refit(
    fitted: Any,
    problem: Problem,
    outputs: Outputs,
    weights: ArrayLike,
    *,
    seeds: int | Sequence[int] = 1,
    progress: Progress = iter,
) -> RetrainingTable:
    """Outputs of the estimator fitted at every row of weights [m, n]; the counterpart of `retrain`.

    The optimum depends on no seed: outputs are repeated for each, so that whatever asks for seeds can ask here.

    Raises:
        ValueError: see `refitted`.

    >>> from sklearn.linear_model import LinearRegression
    >>> from attribution_core import squared_error
    >>> x, y = np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 1.0, 4.0])
    >>> line = LinearRegression().fit(x, y)
    >>> problem = Problem.from_sklearn(line, x, y)
    >>> at_two = Outputs(lambda model, batch: model(batch[0])[:, 0], (problem.train[[2]][0],))
    >>> refit(line, problem, at_two, [[1, 1, 1], [1, 1, 0]]).outputs.round(3).ravel().tolist()
    [3.667, 2.0]
    """
    table: NDArray[Any] = np.atleast_2d(np.asarray(weights, dtype=float))
    chosen = tuple(listed(seeds))
    found = [outputs.evaluate(refitted(fitted, problem, w).model).numpy() for w in progress(table)]
    per_seed = np.repeat(np.stack(found)[:, None], len(chosen), axis=1)
    return RetrainingTable(table, per_seed, chosen, {"drop": "row", "fitted": str(fitted)})
