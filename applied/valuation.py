"""Valuation: what each example or owner is worth, in units of the output, with intervals; and what to pay.

    value_i = Σ_s q_s E[ f(S ∪ i) − f(S) ],  S of s players without i        Shapley: q_s = 1/n

f is the mean output (or any linear combination of outputs) of a model trained on the players of S. A value
is a reading of a datamodel or of a table of retrainings, never another engine: kNN-Shapley, in-run values and
Aumann–Shapley values are datamodels of the core, and are read here like any other.

The sign convention holds: a value is what a player adds to the output. If the output is a loss, helpful players
have negative values, and the values of all add up to f(everyone) − f(nobody). To pay and to buy, high must be
good: pass `-values` there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.payment import Payments, SignWarning, pay
from applied.purchase import GapWarning, buy
from applied.worth import Values
from attribution_core.data import named
from attribution_core.datamodel import LinearDatamodel
from attribution_core.groups import group_table
from attribution_core.semivalues import (
    Estimate,
    Kind,
    around,
    beyond,
    levelling,
    over_seeds,
    semivalues,
    telling,
)
from attribution_core.subsets import all_subsets, leave_out_subsets, permutation_subsets
from attribution_core.table import RetrainingTable

__all__ = [
    "GapWarning", "Payments", "SignWarning", "ValuationWarning", "Values", "buy", "held_out", "pay", "self_confidence", "values",
]  # fmt: skip

EXACT = 15  # players whose 2^players predictions are all made
FAR = 0.25  # of what a kind looks at, in sets of other sizes than those drawn


class Predictor(Protocol):
    """Anything that predicts outputs from training weights."""

    @property
    def anchor(self) -> NDArray[Any]: ...

    def predict(self, weights: ArrayLike) -> NDArray[Any]: ...


Source = RetrainingTable | LinearDatamodel | Predictor


class ValuationWarning(UserWarning):
    """Values that are less than they could be; the message says why, and what to add."""


def values(
    source: Source | Sequence[Source],
    *,
    kind: Kind = "shapley",
    owners: ArrayLike | None = None,
    utility: ArrayLike | None = None,
    beta: tuple[float, float] = (16.0, 1.0),
    permutations: int = 200,
    seed: int = 0,
) -> Values:
    """What each example or owner adds to the mean output.

        value_i = Σ_{s=0}^{n−1} q_s E[ f(S ∪ i) − f(S) ],  S uniform over the sets of s players without i

    with q_s = 1/n (Shapley), C(n−1, s)/2^{n−1} (Banzhaf), the beta-binomial (Beta), all on s = n − 1
    (leave-one-out).

    Args:
        source: what is known of f.
            A `LinearDatamodel`: every kind is its scores, exactly; the standard error is that of its
                spread over runs.
            A datamodel with pairs (`fit_datamodel(pairs=...)`): closed form, β_i + Σ_j β_ij (p̄ − anchor).
            Anything with `predict(weights)`: all 2^k predictions for k ≤ 15 players, else permutations.
            A `RetrainingTable` of 0/1 weights: exact where it holds all subsets; marginal contributions
                where it is made of `permutation_subsets`; f(everyone) less f(all but one) for
                "leave_one_out"; else means with and without a player at each subset size (see `_by_size`).
            Several of them (such as one per run): their mean, with its standard error.
            The error of a table with several seeds is that over its draw of subsets and over seeds; two seeds tell
            little of the second, three or more are better. With one seed, how far another seed would move the values is not in it.
        kind: "shapley", "banzhaf", "beta", "leave_one_out".
        owners: [n] labels; players are then owners, in the order of np.unique.
        utility: [t], f = outputs @ utility; by default the mean of the outputs.
        beta: (α, β) of kind "beta": (16, 1) looks at small sets, (1, 1) is Shapley.
        permutations, seed: of players, where more than 15 are predicted for.

    Raises:
        ValueError: a table whose weights are not 0 or 1, or that lacks the rows which a kind needs; labels
            or a utility that do not fit.

    Warns:
        ValuationWarning: a table without rows for everyone or nobody, whose values are known up to a
            common constant only; one of subsets whose sizes are not those that the kind looks at.

    Source: Shapley 1953; Ghorbani & Zou 2019; Kwon & Zou 2022, eq. 4 (Beta); Wang & Jia 2023 (Banzhaf).

    >>> f = LinearDatamodel([[-1.0], [3.0]], base=[5.0], anchor=1.0)
    >>> found = values(f)
    >>> found.values.tolist(), found.change
    ([-1.0, 3.0], 2.0)
    """
    if kind not in ("shapley", "banzhaf", "beta", "leave_one_out"):
        raise ValueError(f"unknown kind {kind!r}; one of shapley, banzhaf, beta, leave_one_out")
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise ValueError("expected at least one source of values, got none")
        found = [
            values(
                one, kind=kind, owners=owners, utility=utility, beta=beta,
                permutations=permutations, seed=seed,
            )
            for one in source
        ]  # fmt: skip
        return _averaged(found)
    if isinstance(source, RetrainingTable):
        return _of_table(source, kind, owners, utility, beta)
    if not hasattr(source, "predict"):
        raise ValueError(
            f"expected a datamodel, a table of retrainings, or several of one, got {type(source).__name__}; make one by "
            "influence, trak, magic, fit_datamodel or retrain"
        )
    if permutations < 1:
        raise ValueError(f"expected at least one permutation, got {permutations}")
    n = len(source.anchor)
    if isinstance(source, LinearDatamodel):
        return _of_linear(source, kind, owners, utility)
    if hasattr(source, "gradient_at") and owners is None:
        return _of_pairs(source, kind, utility, beta)
    players: Any = n if owners is None else np.asarray(owners)
    count = n if owners is None else len(named(owners, n)[0])
    if kind == "leave_one_out":
        weights = np.concatenate([leave_out_subsets(players), np.zeros((1, n))])
    elif count <= EXACT:
        weights = all_subsets(players)
    else:
        weights = permutation_subsets(players, permutations, seed=seed)
    predicted = np.asarray(source.predict(weights), dtype=float)
    if predicted.ndim == 0 or len(predicted) != len(weights):
        raise ValueError(
            f"expected predictions [{len(weights)}, t], one for each row of weights, got shape {predicted.shape}"
        )
    predicted = predicted.reshape(len(weights), -1)
    table = RetrainingTable(weights, predicted[:, None], (0,))
    return _of_table(table, kind, owners, utility, beta)


# --- from datamodels ---------------------------------------------------------------------------------


def _of_linear(
    f: LinearDatamodel, kind: str, owners: ArrayLike | None, utility: ArrayLike | None
) -> Values:
    """Scores, summed by owner: the value of every kind for a sum of players' own contributions."""
    u = _utility(utility, f.scores.shape[1])
    per_target = _by_player(owners, f.scores)
    error, runs = np.full(len(per_target), math.nan), f.meta.get("averaged", 1)
    if f.spread is not None:
        # errors of different examples and targets may go together: their sum is the safe bound
        error = _by_player(owners, f.spread @ np.abs(u)) / math.sqrt(runs)
    # at other weights the change is not f(everyone) − f(nobody), which is then that of the scores
    change = f.meta.get("change") if np.isin(f.anchor, (0.0, 1.0)).all() else None
    nobody = f.predict(np.zeros(len(f.scores)))
    return Values(
        values=per_target @ u, standard_error=error, freedom=runs - 1 if runs > 1 else math.inf,
        players=np.asarray(f.ids) if owners is None else np.unique(np.asarray(owners)),
        per_target=per_target, empty=float(nobody @ u), kind=kind, targets=f.targets,
        change=float(per_target.sum(0) @ u if change is None else np.asarray(change) @ u),
        labels=None if owners is None else np.asarray(owners), meta={"datamodel": dict(f.meta)},
    )  # fmt: skip


def _of_pairs(f: Any, kind: str, utility: ArrayLike | None, beta: tuple[float, float]) -> Values:
    """The gradient of a quadratic's multilinear extension at the mean keep fraction: it is linear in it."""
    p = {"leave_one_out": 1.0, "beta": beta[1] / sum(beta)}.get(kind, 0.5)
    per_target = np.asarray(f.gradient_at(p))
    n, t = per_target.shape
    u = _utility(utility, t)
    everyone, nobody = (f.predict(np.full(n, p_)) @ u for p_ in (1.0, 0.0))
    linear = getattr(f, "linear", None)
    return Values(
        values=per_target @ u, standard_error=np.full(n, math.nan),
        players=np.arange(n) if linear is None else np.asarray(linear.ids), per_target=per_target,
        change=float(everyone - nobody), empty=float(nobody), kind=kind,
    )  # fmt: skip


def _averaged(found: list[Values]) -> Values:
    """The mean of values of the same players, with its standard error over them."""
    first = found[0]
    for other in found[1:]:
        if not np.array_equal(first.players, other.players):
            raise ValueError("expected sources of the same players, got different ones")
    stacked = np.stack([one.values for one in found])
    many = len(found)
    error, freedom = first.standard_error, first.freedom
    if many > 1:
        error, freedom = stacked.std(0, ddof=1) / math.sqrt(many), many - 1
    return replace(
        first, values=stacked.mean(0), standard_error=error, freedom=freedom,
        per_target=np.mean([one.per_target for one in found], axis=0),
        change=float(np.mean([one.change for one in found])),
        empty=float(np.mean([one.empty for one in found])), meta={**first.meta, "averaged": many},
    )  # fmt: skip


# --- from tables -------------------------------------------------------------------------------------


def _of_table(
    table: RetrainingTable,
    kind: Kind,
    owners: ArrayLike | None,
    utility: ArrayLike | None,
    beta: tuple[float, float],
) -> Values:
    """Values from subsets that were really trained on."""
    folded = table if owners is None else group_table(table, owners)
    other = folded.weights[~np.isin(folded.weights, (0.0, 1.0))]
    if other.size:
        raise ValueError(
            f"expected a table of subsets, weights 0 or 1, got {other[0]:g}; fit_datamodel reads any weights"
        )
    inside = folded.weights > 0
    n, t = inside.shape[1], folded.per_seed.shape[2]
    u = _utility(utility, t)
    # column 0 is f itself, the others its outputs one by one
    outputs = np.concatenate([folded.per_seed @ u[:, None], folded.per_seed], axis=2)
    (found, error, freedom), how = semivalues(inside, outputs, kind, beta)
    if isinstance(freedom, np.ndarray):
        freedom = np.broadcast_to(freedom, error.shape)[:, 0]
    size = inside.sum(1)
    everyone, nobody = (
        float(outputs[size == s, :, 0].mean()) if (size == s).any() else math.nan for s in (n, 0)
    )
    if how == "subsets by size" and (words := _untold(size, kind, beta, n)):
        warnings.warn("; ".join(words), ValuationWarning, stacklevel=3)
    return Values(
        values=found[:, 0], standard_error=error[:, 0], per_target=found[:, 1:],
        players=np.arange(n) if owners is None else np.unique(np.asarray(owners)), kind=kind,
        targets=table.targets, change=everyone - nobody, empty=nobody, freedom=freedom,
        labels=None if owners is None else np.asarray(owners),
        meta={"from": how, "rows": len(inside), "seeds": len(table.seeds)},
    )  # fmt: skip


def _untold(size: NDArray[Any], kind: Kind, beta: tuple[float, float], n: int) -> list[str]:
    """What subsets of such sizes leave unknown of values, in words."""
    words = []
    if not levelling(size, kind, n).any():
        missing = [who for who, s in (("everyone", n), ("nobody", 0)) if not (size == s).any()]
        lacks, add = f"row for {' and '.join(missing)}", "such rows"
        if kind == "banzhaf":
            lacks, add = (
                "subsets on both sides of half of the players",
                f"random_subsets(keep={around(n)})",
            )
        words.append(
            f"the table has no {lacks}: values are known up to a common constant; add {add}, or only compare players"
        )
    if (far := beyond(size, kind, beta, n)) > FAR:
        words.append(
            f"expected subsets of the sizes that {kind} values look at, got {far:.0%} of these sizes beyond those "
            "drawn: values are extrapolated from the drawn sizes, and the intervals do not cover that error; add rows of "
            f"random_subsets(keep={telling(kind, beta, n)})"
        )
    return words


# --- controls ----------------------------------------------------------------------------------------


def held_out(table: RetrainingTable) -> Values:
    """Each training example's own output in the models that were trained without it.

        value_i = mean over rows with w_i = 0 of output_i

    Needs no clean data: where an example's label is wrong, models that did not see it disagree with the
    label. The outputs are the training examples' own (`Outputs(margin, train)`); of losses, high is suspicious. The
    error is that over rows, of several seeds also that over seeds; of one, the seed is not in it.

    Raises:
        ValueError: a table whose outputs are not one for each example; an example that is in every row.

    Source: Feldman & Zhang 2020 (held-out part of memorisation); Northcutt et al. 2021 (out-of-sample labels).
    """
    m, n = table.weights.shape
    if table.outputs.shape[1] != n:
        raise ValueError(
            f"expected the outputs of the n={n} training examples themselves, got {table.outputs.shape[1]}; "
            "retrain with Outputs(function, problem.train)"
        )
    out = table.weights == 0
    count = out.sum(0)
    if not count.all():
        raise ValueError(
            f"expected every example to be left out of some row, got {np.flatnonzero(count == 0)[:5].tolist()} "
            "in all; retrain on more subsets"
        )
    mean, error, freedom = over_seeds(lambda y: _mean_of(y, out), table.per_seed)
    return Values(
        mean, error, np.arange(n), mean[:, None], kind="held out", freedom=freedom,
        meta={"rows": m, "seeds": len(table.seeds)},
    )  # fmt: skip


def _mean_of(y: NDArray[Any], out: NDArray[np.bool_]) -> Estimate:
    """Means [n] of y [m, n] where out, their errors over rows, nan for one row, and degrees of freedom."""
    count = out.sum(0)
    mean = np.where(out, y, 0.0).sum(0) / count
    spread = np.where(out, (y - mean) ** 2, 0.0).sum(0)
    error = np.sqrt(spread / np.maximum(count - 1, 1) / count)
    freedom = int(count[count > 1].min()) - 1 if (count > 1).any() else math.inf
    return mean, np.where(count > 1, error, math.nan), freedom


def self_confidence(x: ArrayLike, y: ArrayLike, *, folds: int = 5, seed: int = 0) -> Values:
    """Cross-validated probability that a logistic regression gives to each example's own label.

    The control that every table of values needs: it takes seconds and no clean data. High is good. Fewer folds where a
    class has fewer rows.

    Raises:
        ValueError: one class alone; a class of one row, which cannot be cross-validated.

    Source: Northcutt et al. 2021 (confident learning), its base score.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = np.asarray(x, dtype=float), np.asarray(y)
    names, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2 or count.min() < 2:
        raise ValueError(
            f"expected two classes or more with two rows or more each, got {dict(zip(names.tolist()[:10], count.tolist(), strict=False))}"
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    cut = StratifiedKFold(min(folds, int(count.min())), shuffle=True, random_state=seed)
    chance = cross_val_predict(model, features, index, cv=cut, method="predict_proba")
    own = chance[np.arange(len(index)), index]
    unknown = np.full(len(own), math.nan)
    return Values(own, unknown, np.arange(len(own)), own[:, None], kind="self-confidence")


# --- shared ------------------------------------------------------------------------------------------


def _utility(utility: ArrayLike | None, t: int) -> NDArray[np.float64]:
    u = np.full(t, 1.0 / t) if utility is None else np.asarray(utility, dtype=float)
    if u.shape != (t,) or not np.isfinite(u).all():
        raise ValueError(f"expected a finite utility [t={t}], one weight an output, got {u.shape}")
    return u


def _by_player(owners: ArrayLike | None, rows: NDArray[Any]) -> NDArray[np.float64]:
    """What each example has [n, ...], summed over the examples that a player brings, [k, ...]."""
    if owners is None:
        return np.array(rows, dtype=float)
    names, index = named(owners, len(rows))
    total = np.zeros((len(names), *rows.shape[1:]))
    np.add.at(total, index, rows)
    return total
