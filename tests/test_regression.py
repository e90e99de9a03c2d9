"""attribution_core.regression, ridge, lasso, pairs: brute force, known games, and the promise of the prior."""

import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.linear_model import Ridge as SkRidge

from attribution_core import LinearDatamodel, RetrainingTable, lds, random_subsets
from attribution_core.fits.lasso import NotConverged, held_rows
from attribution_core.fits.pairs import PairDatamodel
from attribution_core.fits.ridge import _scales
from attribution_core.regression import PriorWarning, Underdetermined, fit_datamodel
from attribution_core.subsets import all_subsets

# a few thousand float64 operations on numbers near 1
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def table_of(weights, outputs, seeds=(0,)):
    outputs = np.asarray(outputs, dtype=float)
    return RetrainingTable(np.asarray(weights, dtype=float), outputs[:, None], seeds)


def cut(table, rows):
    return RetrainingTable(table.weights[rows], table.per_seed[rows], table.seeds)


def linear_world(m, n=30, t=5, noise=0.1, seed=0, keep=None):
    """(true scores [n, t], table of noisy outputs); Bernoulli(1/2) rows, or of fixed size."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, t))
    w = rng.integers(0, 2, (m, n)) if keep is None else random_subsets(n, m, keep=keep, seed=seed)
    return truth, table_of(w, 3.0 + w @ truth + noise * rng.normal(size=(m, t)))


def every_subset(n):
    return np.array(list(itertools.product([0.0, 1.0], repeat=n)))


def game(n, t=2, seed=0):
    """A random set function on all 2ⁿ subsets: it has terms of every order."""
    return table_of(every_subset(n), np.random.default_rng(seed).normal(size=(2**n, t)))


def multilinear_gradient(table, p):
    """∂/∂w_i E f(S) at inclusion probabilities p, by summing over all subsets of the others."""
    w, y = table.weights, table.outputs
    rows = [("".join(map(str, row.astype(int)))) for row in w]
    at = dict(zip(rows, y, strict=True))
    n = w.shape[1]
    out = np.zeros((n, y.shape[1]))
    for i in range(n):
        for rest in itertools.product([0, 1], repeat=n - 1):
            chance = np.prod([p if kept else 1 - p for kept in rest])
            names = ["".join(map(str, (*rest[:i], x, *rest[i:]))) for x in (1, 0)]
            out[i] += chance * (at[names[0]] - at[names[1]])
    return out


def shapley_values(table):
    """Average marginal contribution over sizes, by summing over all subsets."""
    w, y = table.weights, table.outputs
    at = {tuple(row): value for row, value in zip(w.astype(int).tolist(), y, strict=True)}
    n = w.shape[1]
    out = np.zeros((n, y.shape[1]))
    for subset, value in at.items():
        for i in range(n):
            if subset[i] == 0:
                s = sum(subset)
                joined = (*subset[:i], 1, *subset[i + 1 :])
                out[i] += (at[joined] - value) / (n * math.comb(n - 1, s))
    return out


# --- ridge -----------------------------------------------------------------------------------


def left_out_errors(w, y, rows, penalty, prior_part=0.0):
    """Squared errors of every row under sklearn's refit without it, [m, t]."""
    errors = np.zeros_like(y)
    for i in range(len(w)):
        keep = np.arange(len(w)) != i
        fit = SkRidge(alpha=penalty, tol=1e-12).fit(w[keep], (y - prior_part)[keep], rows[keep])
        errors[i] = (y - prior_part)[i] - fit.predict(w[[i]])[0]
    return errors**2


@pytest.mark.parametrize("m", [12, 20, 21, 60])  # fewer rows than columns, about as many, more
@pytest.mark.parametrize("at", [None, 0.4])
def test_left_out_error_is_that_of_refits(m, at):
    _, table = linear_world(m, n=20, noise=1.0)
    w, y = table.weights, table.outputs
    rows = np.ones(m)
    if at is not None:
        rows = (at / 0.5) ** w.sum(1) * ((1 - at) / 0.5) ** (20 - w.sum(1))
        rows /= rows.mean()
    drawn = None if at is None else 0.5
    mean = rows @ y / m
    variance = rows @ (y - mean) ** 2 / m
    found = {}
    for penalty in (0.1, 2.0, 30.0):
        f = fit_datamodel(table, penalty=penalty, at=at, drawn=drawn)
        found[penalty] = (rows @ left_out_errors(w, y, rows, penalty) / m / variance).mean()
        assert f.meta["loo_error"] == pytest.approx(found[penalty], rel=1e-8)
        own = SkRidge(alpha=penalty, tol=1e-12).fit(w, y, rows)
        np.testing.assert_allclose(f.scores, own.coef_.T, **EXACT)
        np.testing.assert_allclose(f.predict(w), own.predict(w), **EXACT)
    chosen = fit_datamodel(table, at=at, drawn=drawn)
    assert chosen.meta["loo_error"] <= min(found.values()) * 1.02  # the grid's steps are 1.8-fold
    fixed = fit_datamodel(table, penalty=chosen.meta["penalty"], at=at, drawn=drawn)
    np.testing.assert_allclose(chosen.scores, fixed.scores, **EXACT)


def test_the_anchor_is_one_number_and_base_the_prediction_there():
    _, table = linear_world(50)
    f = fit_datamodel(table)
    assert np.ptp(f.anchor) == 0
    assert f.anchor[0] == pytest.approx(table.weights.mean())
    # an intercept fits the mean row exactly
    np.testing.assert_allclose(f.predict(table.weights).mean(0), table.outputs.mean(0), **EXACT)


def test_weights_that_are_not_masks():
    rng = np.random.default_rng(0)
    w, truth = rng.normal(1, 0.3, (40, 8)), rng.normal(size=(8, 2))
    f = fit_datamodel(table_of(w, 1 + w @ truth), kind="least_squares")
    np.testing.assert_allclose(f.scores, truth, **EXACT)
    np.testing.assert_allclose(f.at(0.0).base, 1.0, **EXACT)


def test_least_squares_on_halves_leaves_the_sum_at_zero_and_says_so():
    _, table = linear_world(200, keep=0.5)
    with pytest.warns(Underdetermined, match="rank 29 do not determine 30"):
        f = fit_datamodel(table, kind="least_squares")
    np.testing.assert_allclose(f.scores.sum(0), 0.0, atol=1e-9)  # 30 scores near 1
    expected = LinearRegression().fit(table.weights, table.outputs).predict(table.weights)
    np.testing.assert_allclose(f.predict(table.weights), expected, **EXACT)


# --- lasso -----------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [25, 60, 300])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_lasso_against_sklearn(m, share):
    _, table = linear_world(m, n=60, t=4, noise=2.0)
    w, y = table.weights, table.outputs
    x, z = w - w.mean(0), y - y.mean(0)
    penalty = share * np.abs(x.T @ z / m).max()
    f = fit_datamodel(table, kind="lasso", penalty=penalty)
    gradient = x.T @ (z - x @ f.scores) / m
    off = np.where(
        f.scores != 0,
        np.abs(gradient - penalty * np.sign(f.scores)),
        np.maximum(np.abs(gradient) - penalty, 0),
    )
    assert off.max() <= 1e-5 * penalty  # EXACT in lasso.py
    assert 0 < f.meta["nonzero"] < 1

    def value(b):
        return ((z - x @ b) ** 2).sum(0) / (2 * m) + penalty * np.abs(b).sum(0)

    peer = np.stack(
        [Lasso(penalty, tol=1e-10, max_iter=10**6).fit(x, z[:, j]).coef_ for j in range(4)], axis=1
    )
    # a violation of ε λ costs at most ε λ ‖b − b*‖₁, far below 1e-8 of the objective here
    np.testing.assert_allclose(value(f.scores), value(peer), rtol=1e-7)


def test_lasso_validates_each_target_and_is_best_where_few_effects_are():
    rng = np.random.default_rng(0)
    truth = np.zeros((80, 6))
    truth[rng.choice(80, 5, replace=False)] = rng.normal(size=(5, 6))
    w = random_subsets(80, 60, keep=0.5)
    table = table_of(w, w @ truth + 0.1 * rng.normal(size=(60, 6)))
    f, ridge = fit_datamodel(table, kind="lasso"), fit_datamodel(table)
    assert len(f.meta["penalty"]) == 6
    assert f.meta["validation_rows"] == 12
    assert np.abs(f.scores - truth).mean() < 0.2 * np.abs(ridge.scores - truth).mean()


def test_held_rows_do_not_depend_on_the_order():
    _, table = linear_world(40)
    x, y = table.weights, table.outputs
    order = np.random.default_rng(3).permutation(40)
    np.testing.assert_array_equal(held_rows(x, y)[order], held_rows(x[order], y[order]))


def test_lasso_that_did_not_converge_says_so(monkeypatch):
    monkeypatch.setattr("attribution_core.fits.lasso.ROUNDS", 1)
    monkeypatch.setattr("attribution_core.fits.lasso.ITERATIONS", 1)
    monkeypatch.setattr("attribution_core.fits.lasso.FINISH", 1)
    monkeypatch.setattr("attribution_core.fits.lasso.admm.__defaults__", (1,))
    _, table = linear_world(25, n=60, noise=2.0)
    with pytest.warns(NotConverged, match="KKT violation of"):
        fit_datamodel(table, kind="lasso", penalty=0.01)


# --- empirical influence, games -------------------------------------------------------------


def test_empirical_influence_by_hand():
    w = [[1, 0], [1, 1], [0, 1], [0, 0]]
    f = fit_datamodel(table_of(w, [[1.0], [5.0], [2.0], [0.0]]), kind="empirical")
    np.testing.assert_allclose(f.scores, [[(1 + 5) / 2 - 1], [(5 + 2) / 2 - 0.5]], **EXACT)
    np.testing.assert_allclose(f.base, [2.0], **EXACT)


def test_empirical_influence_under_other_row_weights_is_the_multilinear_gradient():
    table = game(6)
    f = fit_datamodel(table, kind="empirical", at=0.3)
    np.testing.assert_allclose(f.scores, multilinear_gradient(table, 0.3), **EXACT)


def test_an_additive_game_is_found_by_every_unpenalised_kind():
    truth = np.random.default_rng(0).normal(size=(6, 3))
    w = every_subset(6)
    table = table_of(w, 2 + w @ truth)
    for kind in ("least_squares", "empirical", "shapley"):
        f = fit_datamodel(table, kind=kind)
        np.testing.assert_allclose(f.scores, truth, **EXACT)
        np.testing.assert_allclose(f.at(0.0).base, 2.0, **EXACT)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_least_squares_at_p_is_the_gradient_of_the_multilinear_extension(p):
    table = game(8)
    f = fit_datamodel(table, kind="least_squares", at=p)
    np.testing.assert_allclose(f.scores, multilinear_gradient(table, p), **EXACT)
    chance = np.prod(np.where(table.weights > 0, p, 1 - p), axis=1)
    np.testing.assert_allclose(f.anchor, p, **EXACT)
    np.testing.assert_allclose(f.base, chance @ table.outputs, **EXACT)  # its value at p


def test_rows_drawn_at_another_rate_are_reweighted():
    enumerated = game(6)
    # subsets as often as Bernoulli(1/3) draws them: 2^(number left out) times
    times = 2 ** (6 - enumerated.weights.sum(1)).astype(int)
    rows = np.repeat(np.arange(64), times)
    for kind in ("least_squares", "ridge", "lasso", "empirical"):
        penalty = {"ridge": 0.5, "lasso": 0.01}.get(kind)
        drawn = fit_datamodel(
            cut(enumerated, rows), kind=kind, at=0.6, drawn=1 / 3, penalty=penalty and
            (penalty * len(rows) / 64 if kind == "ridge" else penalty),
        )  # fmt: skip
        whole = fit_datamodel(enumerated, kind=kind, at=0.6, penalty=penalty)
        # the lasso's tolerance; the others are exact
        close = {"rtol": 0, "atol": 1e-5} if kind == "lasso" else EXACT
        np.testing.assert_allclose(drawn.scores, whole.scores, **close)
        np.testing.assert_allclose(drawn.base, whole.base, **close)


def test_reweighting_that_leaves_few_rows_is_named():
    _, table = linear_world(50)
    with pytest.warns(Underdetermined, match="leaves .* of 50 rows' worth"):
        fit_datamodel(table, at=0.9, drawn=0.5)


@pytest.mark.parametrize("n", [3, 8, 10])
def test_the_shapley_kernel_is_exact(n):
    table = game(n)
    f = fit_datamodel(table, kind="shapley")
    np.testing.assert_allclose(f.scores, shapley_values(table), **EXACT)
    np.testing.assert_allclose(f.predict(np.zeros(n)), table.outputs[0], **EXACT)
    np.testing.assert_allclose(f.predict(np.ones(n)), table.outputs[-1], **EXACT)


def test_shapley_of_few_subsets_is_efficient_and_warns():
    table = cut(game(8), [0, 3, 17, 70, 255])
    with pytest.warns(Underdetermined, match="3 subsets determine 3 of 7"):
        f = fit_datamodel(table, kind="shapley")
    np.testing.assert_allclose(f.predict(np.ones(8)), table.outputs[-1], **EXACT)


# --- prior -----------------------------------------------------------------------------------


def sparse_world(m, seed=0, n=100, t=12):
    """Effects of unlike size, halves, no noise but that of a second order: (truth, table, held-out table)."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, t)) * rng.gamma(0.5, size=(n, 1))
    curve = rng.normal(size=(n, t)) * 0.2

    def outputs(w):
        return w @ truth + 1.5 * ((w - 0.5) @ curve) ** 2

    fit, held = (random_subsets(n, k, keep=0.5, seed=seed + 1 + k) for k in (m, 151))
    return truth, table_of(fit, outputs(fit)), table_of(held, outputs(held))


def test_an_exact_prior_is_kept_whole():
    truth, table = linear_world(40, noise=0.0, keep=0.5)
    f = fit_datamodel(table, prior=2.0 * truth)
    np.testing.assert_allclose(f.meta["prior_scale"], 0.5, rtol=1e-8)
    np.testing.assert_allclose(f.scores, truth, rtol=1e-8, atol=1e-8)
    noisy = replace(
        table,
        per_seed=table.per_seed + np.random.default_rng(0).normal(size=table.per_seed.shape),
    )
    f = fit_datamodel(noisy, prior=truth)
    assert f.meta["penalty"] == np.inf
    np.testing.assert_allclose(f.scores, np.array(f.meta["prior_scale"]) * truth, **EXACT)
    assert (
        np.abs(np.array(f.meta["prior_scale"]) - 1).max() < 0.2
    )  # 40 rows, noise a third of the signal


@pytest.mark.parametrize("m", [50, 200, 400])
def test_a_prior_never_costs_more_than_five_thousandths(m):
    worst = []
    for seed in range(3):
        truth, table, held = sparse_world(m, seed)
        rng = np.random.default_rng(100 + seed)  # not the stream that the truth is made of
        ridge = lds(fit_datamodel(table), held).mean
        for quality in (0.0, 0.3, 1.0, 3.0):  # from nothing to good
            prior = 7 * (quality * truth + rng.normal(size=truth.shape) * np.abs(truth).mean())
            alone = lds(LinearDatamodel(prior, table.outputs.mean(0), 0.5), held).mean
            both = lds(fit_datamodel(table, prior=prior), held).mean
            worst.append(both - max(ridge, alone))
            if quality == 1.0:
                assert both > max(ridge, alone)  # each knows what the other does not
    assert np.mean(worst) > 0
    assert min(worst) > -0.005


def test_the_scale_of_the_prior_is_each_targets_own_where_the_rows_can_tell():
    truth, table = linear_world(400, t=6, noise=0.5)
    unequal = np.array([0.2, 0.5, 1.0, 2.0, 5.0, -1.0])
    f = fit_datamodel(table, prior=truth / unequal)
    np.testing.assert_allclose(f.meta["prior_scale"], unequal, rtol=0.05)  # 400 rows: 1/√400


def test_a_prior_helps_the_lasso():
    truth, table, held = sparse_world(80)
    prior = truth + 0.5 * np.random.default_rng(100).normal(size=truth.shape) * np.abs(truth).mean()
    f = fit_datamodel(table, kind="lasso", prior=prior)
    assert lds(f, held).mean > lds(fit_datamodel(table, kind="lasso"), held).mean + 0.02


def test_a_datamodel_as_prior_lends_its_names():
    truth, table = linear_world(40, t=2)
    ids = [f"doc{i}" for i in range(30)]
    prior = LinearDatamodel(truth, [0, 0], 1.0, ids=ids, targets=["a", "b"])
    f = fit_datamodel(table, prior=prior)
    assert (f.ids.tolist(), f.targets.tolist()) == (ids, ["a", "b"])
    np.testing.assert_array_equal(f.scores, fit_datamodel(table, prior=truth).scores)


def test_a_prior_is_taken_by_the_names_of_its_targets():
    truth, table = linear_world(40, t=2)
    table = replace(table, meta={"targets": ["a", "b"]})
    turned = LinearDatamodel(truth[:, ::-1], [0, 0], 1.0, targets=["b", "a"])
    f = fit_datamodel(table, prior=turned)
    assert f.targets.tolist() == ["a", "b"]
    np.testing.assert_allclose(f.scores, fit_datamodel(table, prior=truth).scores, rtol=1e-9)
    other = replace(turned, targets=["b", "c"])
    with pytest.raises(ValueError, match=r"expected outputs \['a', 'b'\], got \['b', 'c'\]"):
        fit_datamodel(table, prior=other)
    unnamed = replace(turned, scores=truth, targets=None)
    assert fit_datamodel(table, prior=unnamed).targets.tolist() == ["a", "b"]


def test_a_random_prior_gets_no_weight():
    truth, table = linear_world(100, t=12, noise=1.0)
    f = fit_datamodel(table, prior=np.random.default_rng(9).normal(size=truth.shape))
    # a scale of .1 would add a hundredth of the variance of the true scores
    assert np.abs(f.meta["prior_scale"]).max() < 0.1
    assert f.meta["penalty"] < np.inf


def test_what_may_be_chance_draws_no_scale():
    zero = 0
    for seed in range(12):
        truth, table = linear_world(60, noise=1.0, seed=seed)
        prior = np.random.default_rng(100 + seed).normal(size=truth.shape)
        zero += not np.any(fit_datamodel(table, prior=prior).meta["prior_scale"])
    # two squared errors are passed by chance in 16 % of trials, and by a target of its own in a few more
    assert zero >= 6


def test_the_scale_of_one_target_is_drawn_as_far_as_it_is_uncertain():
    """Rows made so that s = 1 and e = 1/z: s (1 − 2/z²)₊, which grows with z; twins of a target are drawn alike."""
    rng = np.random.default_rng(0)
    p, r = rng.normal(size=(2, 40, 1))
    p /= np.linalg.norm(p)
    r -= p * (p * r).sum()
    unit = np.sqrt(((r * p) ** 2).sum())  # e of left = p + r
    for z in (0.5, 1.2, 1.4, 1.6, 2.0, 3.0, 6.0):
        left = p + r / (z * unit)
        expected = max(0.0, 1 - 2 / z**2)
        for t in (1, 3):
            many = np.repeat(left, t, 1), np.repeat(p, t, 1), np.full(t, (left * left).mean())
            # sums of 40 products; the square of z differs from s²/e² by their rounding
            np.testing.assert_allclose(_scales(*many), expected, rtol=0, atol=1e-12)


# by chance a few are opposite to the truth
@pytest.mark.filterwarnings("ignore::attribution_core.PriorWarning")
def test_useless_priors_of_one_target_are_trusted_no_more_often_than_chance_has_it():
    """200 fits: beyond √2 standard errors are 16 %, some more for the choice of penalty; .23 before."""
    found = []
    for k in range(200):
        rng, w = np.random.default_rng(k), random_subsets(20, 40, keep=0.5, seed=k)
        y = w @ rng.normal(size=(20, 1)) + 2 * rng.normal(size=(40, 1))
        prior = rng.normal(size=(20, 1))
        found.append(fit_datamodel(table_of(w, y), prior=prior).meta["prior_scale"][0])
    assert np.mean(np.array(found) != 0) < 0.2


@pytest.mark.parametrize("kind", ["ridge", "lasso"])
def test_a_prior_of_the_wrong_sign_is_told(kind):
    """Scores of margins beside losses, say: turned around the prior is as good, but hardly ever what was meant."""
    truth, table = linear_world(40, t=2, noise=1.0)
    with pytest.warns(
        PriorWarning, match=r"expected a scale above 0, got one .* standard errors below"
    ):
        turned = fit_datamodel(table, kind=kind, prior=-truth)
    right = fit_datamodel(table, kind=kind, prior=truth)  # warnings are errors
    np.testing.assert_allclose(turned.scores, right.scores, atol=1e-9)  # of numbers near 1


def test_an_output_that_never_changes_says_nothing_of_a_prior():
    """An accuracy of 1 in every retraining, beside others: warnings are errors here."""
    truth, table = linear_world(40, t=3, noise=1.0)
    still = replace(table, per_seed=np.concatenate([table.per_seed, np.ones((40, 1, 1))], axis=2))
    prior = np.concatenate([truth, np.ones((30, 1))], axis=1)
    found = fit_datamodel(still, prior=prior)
    assert found.meta["prior_scale"][3] == 0
    assert min(found.meta["prior_scale"][:3]) > 0.5


def test_a_useless_prior_is_not_called_turned():
    """Of outputs that are noise, 600 fits of 10 to 40 rows: one of 10,000 is told, if errors of few rows were exact."""
    told = 0
    for k in range(600):
        rng, m = np.random.default_rng(k), (10, 20, 40)[k % 3]
        w, y = random_subsets(20, m, keep=0.5, seed=k), rng.normal(size=(m, 1))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fit_datamodel(table_of(w, y), prior=rng.normal(size=(20, 1)))
        told += any(one.category is PriorWarning for one in found)
    assert told <= 2  # .06 expected, several times as many where errors of ten rows are too small


def test_an_unpenalised_prior_with_few_rows_still_has_a_scale():
    truth, table = linear_world(12, keep=0.5)
    with pytest.warns(Underdetermined):
        f = fit_datamodel(table, prior=truth, penalty=0)
    np.testing.assert_allclose(f.predict(table.weights), table.outputs, **EXACT)


# --- pairs -----------------------------------------------------------------------------------


def test_a_game_of_pairs_is_recovered():
    rng = np.random.default_rng(0)
    w = every_subset(7)
    pairs, values = [(0, 3), (5, 1), (2, 6)], rng.normal(size=(3, 2))
    linear = rng.normal(size=(7, 2))
    y = 1 + w @ linear + sum(
        np.outer(w[:, i] * w[:, j], v) for (i, j), v in zip(pairs, values, strict=True)
    )  # fmt: skip
    f = fit_datamodel(table_of(w, y), kind="least_squares", pairs=pairs)
    np.testing.assert_allclose(f.pair_scores, values, **EXACT)
    np.testing.assert_allclose(f.predict(w), y, **EXACT)
    for p in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            f.gradient_at(p), multilinear_gradient(table_of(w, y), p), **EXACT
        )
    shapley = fit_datamodel(table_of(w, y), kind="shapley").scores
    np.testing.assert_allclose(f.gradient_at(0.5), shapley, **EXACT)
    assert lds(f, table_of(w, y)).mean == pytest.approx(1.0)
    np.testing.assert_array_equal(f.linear.scores, f.gradient_at(f.anchor))


def test_pairs_of_groups_use_mean_weights_and_stay_multilinear():
    rng = np.random.default_rng(1)
    labels = np.array(list("abacabcc"))
    w = every_subset(8)
    linear = rng.normal(size=(8, 1))
    mean = {g: w[:, labels == g].mean(1) for g in "abc"}
    inside = np.mean([w[:, i] * w[:, j] for i, j in [(3, 6), (3, 7), (6, 7)]], axis=0)
    y = w @ linear + (2 * mean["a"] * mean["b"] - 3 * inside)[:, None]
    table = table_of(w, y)
    f = fit_datamodel(table, kind="least_squares", pairs=[("b", "a"), ("c", "c")], groups=labels)
    np.testing.assert_allclose(f.pair_scores, [[2.0], [-3.0]], **EXACT)
    np.testing.assert_allclose(f.predict(w), y, **EXACT)
    assert f.pairs.tolist() == [["a", "b"], ["c", "c"]]
    for p in (0.2, 0.9):
        np.testing.assert_allclose(f.gradient_at(p), multilinear_gradient(table, p), **EXACT)


def test_gradient_of_pairs_is_the_difference_quotient_anywhere():
    rng = np.random.default_rng(2)
    labels = np.array([0, 0, 0, 1, 1, 2])
    f = PairDatamodel(
        rng.normal(size=(6, 2)), rng.normal(size=2), rng.uniform(size=6),
        [(0, 1), (0, 0), (1, 2), (1, 1)], rng.normal(size=(4, 2)), labels,
    )  # fmt: skip
    p = rng.uniform(size=6)
    for i in range(6):
        up, down = p + 0.5 * np.eye(6)[i], p - 0.5 * np.eye(6)[i]
        # f̂ is affine in one weight: the quotient is exact
        np.testing.assert_allclose(f.gradient_at(p)[i], f.predict(up) - f.predict(down), **EXACT)


def test_ridge_with_pairs_beats_ridge_without_where_there_are_some():
    rng = np.random.default_rng(0)
    n, labels = 40, np.repeat(np.arange(8), 5)
    truth, curve = rng.normal(size=(n, 4)), rng.normal(size=4) * 25

    def outputs(w):
        u = w - 0.5
        return w @ truth + np.outer(u[:, :5].mean(1) * u[:, 5:10].mean(1), curve)

    fit, held = rng.integers(0, 2, (2, 200, n))
    table, test = table_of(fit, outputs(fit)), table_of(held, outputs(held))
    with_pairs = fit_datamodel(table, pairs=[(0, 1), (2, 3), (4, 4)], groups=labels)
    assert lds(with_pairs, test).mean > lds(fit_datamodel(table), test).mean + 0.02
    assert (
        np.abs(with_pairs.pair_scores[0] / curve - 1).max() < 0.2
    )  # shrunk by the ridge, a little
    assert np.abs(with_pairs.pair_scores[1:]).max() < 0.2 * np.abs(curve).max()


@pytest.mark.parametrize(
    ("pairs", "groups", "says"),
    [
        ([(0, 99)], None, "expected pairs of rows 0 to 29"),
        ([(3, 3)], None, "different examples"),
        ([(0, 1), (1, 0)], None, "each once"),
        ([], None, "at least one pair"),
        ([("a", "z")], ["a", "b"] * 15, "groups .*'a', 'b'"),
        ([(0, 1)], [0, 1], "one group label per example"),
        (None, ["a", "b"] * 15, "expected pairs beside groups"),
    ],
)
def test_pairs_that_do_not_fit(pairs, groups, says):
    with pytest.raises(ValueError, match=says):
        fit_datamodel(linear_world(40)[1], pairs=pairs, groups=groups)


# --- all kinds -------------------------------------------------------------------------------

KINDS = ["ridge", "lasso", "empirical", "least_squares"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    _, table = linear_world(60)
    order = np.random.default_rng(1).permutation(60)
    a, b = fit_datamodel(table, kind=kind), fit_datamodel(cut(table, order), kind=kind)
    # float32 along the lasso's path and its tolerance; rounding for the others
    close = {"rtol": 0, "atol": 1e-4} if kind == "lasso" else EXACT
    np.testing.assert_allclose(a.scores, b.scores, **close)
    np.testing.assert_allclose(a.base, b.base, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_are_averaged(kind):
    rng = np.random.default_rng(0)
    _, table = linear_world(60)
    offset = rng.normal(size=(60, 1, 5))
    several = RetrainingTable(
        table.weights,
        np.concatenate([table.per_seed + k * offset for k in (-1, 0, 1)], 1),
        (4, 5, 6),
    )
    f = fit_datamodel(several, kind=kind)
    close = {"rtol": 0, "atol": 1e-4} if kind == "lasso" else EXACT
    np.testing.assert_allclose(f.scores, fit_datamodel(table, kind=kind).scores, **close)
    assert f.meta["seeds"] == [4, 5, 6]
    assert f.meta["rows"] == 60
    json.dumps(f.meta)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_fitted_each_for_itself(kind):
    _, table = linear_world(60)
    penalty = {"ridge": 2.0, "lasso": 0.02}.get(kind)
    f = fit_datamodel(table, kind=kind, penalty=penalty)
    for j in range(5):
        one = RetrainingTable(table.weights, table.per_seed[..., [j]], table.seeds)
        alone = fit_datamodel(one, kind=kind, penalty=penalty)
        close = {"rtol": 0, "atol": 1e-4} if kind == "lasso" else EXACT
        np.testing.assert_allclose(f.scores[:, [j]], alone.scores, **close)


@pytest.mark.parametrize("kind", ["ridge", "lasso"])
def test_units_of_the_outputs_do_not_matter(kind):
    truth, table = linear_world(60, noise=1.0)
    unit = np.array([1e-3, 1.0, 1e3, 1.0, 10.0])
    scaled = RetrainingTable(table.weights, table.per_seed * unit, table.seeds)
    noise = np.random.default_rng(5).normal(size=truth.shape)
    for prior in (None, truth + noise):
        a = fit_datamodel(table, kind=kind, prior=prior)
        b = fit_datamodel(scaled, kind=kind, prior=None if prior is None else prior * unit)
        close = {"rtol": 0, "atol": 1e-4} if kind == "lasso" else {"rtol": 1e-7, "atol": 1e-9}
        np.testing.assert_allclose(b.scores / unit, a.scores, **close)


def test_outputs_that_do_not_vary_have_no_effects():
    _, table = linear_world(40)
    table.per_seed[..., 2] = 7.0
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            f = fit_datamodel(table, kind=kind)
        np.testing.assert_allclose(f.scores[:, 2], 0.0, atol=1e-12)
        np.testing.assert_allclose(f.base[2], 7.0, **EXACT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "forest"}, "expected a kind among ridge, lasso"),
        ({"kind": "empirical", "prior": np.ones((30, 5))}, "takes no prior"),
        ({"kind": "shapley", "at": 0.5}, "takes no at"),
        ({"kind": "least_squares", "penalty": 1.0}, "takes no penalty"),
        ({"kind": "empirical", "pairs": [(0, 1)]}, "takes no pairs"),
        ({"penalty": -1.0}, "0 or more, got -1"),
        ({"penalty": float("nan")}, "0 or more, got nan"),
        ({"kind": "lasso", "penalty": 0.0}, "positive, got 0"),
        ({"at": 1.0}, "at between 0 and 1"),
        ({"at": 0.5, "drawn": 0.0}, "drawn between 0 and 1"),
        ({"drawn": 0.5}, "expected at= beside drawn="),
        ({"kind": "shapley", "drawn": 0.5}, "expected at= beside drawn="),
        (
            {"prior": np.ones((3, 5))},
            r"prior with scores \[n=30, t=5\], as the table, got \(3, 5\)",
        ),
        ({"prior": np.full((30, 5), np.nan)}, "finite scores"),
        ({"kind": "shapley"}, "a row with all examples and a row with none"),
    ],
)
def test_requests_that_make_no_sense(arguments, says):
    with pytest.raises(ValueError, match=says):
        fit_datamodel(linear_world(40)[1], **arguments)


def test_tables_that_make_no_sense():
    _, table = linear_world(40)
    for kind in ("empirical", "shapley"):
        with pytest.raises(ValueError, match="0 or 1"):
            fit_datamodel(replace(table, weights=table.weights * 2), kind=kind)
    with pytest.raises(ValueError, match="at= expects weights that are 0 or 1"):
        fit_datamodel(replace(table, weights=table.weights + 0.1), at=0.5)
    weights = table.weights.copy()
    weights[:, [3, 7]] = 1
    with pytest.raises(
        ValueError, match=r"examples \[3, 7\] are in every subset that counts or in none, 2"
    ):
        fit_datamodel(replace(table, weights=weights), kind="empirical")
    outputs = table.per_seed.copy()
    outputs[4] = np.nan
    with pytest.raises(ValueError, match=r"outputs are not finite in rows \[4\]"):
        fit_datamodel(replace(table, per_seed=outputs))
    with pytest.raises(ValueError, match="at least 3 retrainings"):
        fit_datamodel(cut(table, [0, 1]))
    with pytest.raises(ValueError, match="proper subsets"):
        fit_datamodel(table_of([[0, 0], [1, 1], [1, 1]], np.ones((3, 1))), kind="shapley")


def test_weights_that_never_vary_have_no_effects():
    y = np.random.default_rng(0).normal(size=(10, 2))
    for settings in ({}, {"penalty": 0.1}):
        found = fit_datamodel(table_of(np.ones((10, 4)), y), kind="lasso", **settings)
        assert not found.scores.any()


@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
def test_of_all_subsets_none_is_too_few(p):
    """Near the ends one set counts nearly all: still the slope of the multilinear extension, without a warning."""
    n, step = 8, 1e-4
    w = all_subsets(n)
    y = np.random.default_rng(0).normal(size=(2**n, 1))
    found = fit_datamodel(table_of(w, y), kind="least_squares", at=p).scores[:, 0]

    def extension(i, value):
        probability = np.full(n, p)
        probability[i] = value
        return np.prod(np.where(w > 0, probability, 1 - probability), axis=1) @ y[:, 0]

    slope = [(extension(i, p + step) - extension(i, p - step)) / (2 * step) for i in range(n)]
    np.testing.assert_allclose(found, slope, atol=1e-8)  # linear in one p: rounding over the step


def test_one_row_that_counts_is_named_where_nobody_said_how_rows_were_drawn():
    w = (np.random.default_rng(0).random((300, 2000)) < 0.5).astype(float)  # their sizes differ
    table = table_of(w, w[:, :1])
    with pytest.warns(Underdetermined, match=r"say how they were drawn"):
        fit_datamodel(table, at=0.1)
    with (
        pytest.warns(Underdetermined),
        pytest.raises(ValueError, match="in every subset that counts"),
    ):
        fit_datamodel(table, kind="empirical", at=0.1)
