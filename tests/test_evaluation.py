"""attribution_core.evaluation: LDS in worlds whose answer is known, intervals, ceiling, refusals."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from attribution_core import LinearDatamodel, RetrainingTable, evaluation, lds, random_subsets
from attribution_core.evaluation import bootstrap_interval, ceiling, spearman

N, T, ROWS = 30, 8, 60


def affine_world(noise=0.0, seeds=4, rows=ROWS, seed=0):
    """(true datamodel, table whose outputs are its predictions plus noise of every single seed)."""
    rng = np.random.default_rng(seed)
    truth = LinearDatamodel(rng.normal(size=(N, T)), rng.normal(size=T), 1.0)
    weights = random_subsets(N, rows, keep=0.5, seed=seed)
    per_seed = truth.predict(weights)[:, None] + noise * rng.normal(size=(rows, seeds, T))
    return truth, RetrainingTable(weights, per_seed, tuple(range(seeds)))


def test_the_truth_scores_one():
    truth, table = affine_world()
    found = lds(truth, table)
    np.testing.assert_allclose(found.per_target, 1.0, rtol=1e-12)
    assert found.mean == pytest.approx(1.0)
    assert found.interval == pytest.approx((1.0, 1.0))
    assert found.slope == pytest.approx(1.0)
    assert found.ceiling == pytest.approx(1.0)
    assert (found.seeds, found.rows) == (4, ROWS)
    assert "LDS 1.000" in str(found)
    assert "60 retrainings × 4 seeds" in str(found)


@pytest.mark.parametrize("factor", [0.5, -2.0])
def test_scaled_scores_keep_the_rank_and_show_in_the_slope(factor):
    truth, table = affine_world()
    scaled = LinearDatamodel(factor * truth.scores, truth.base + 3, truth.anchor)
    found = lds(scaled, table)
    assert found.mean == pytest.approx(np.sign(factor))
    assert found.slope == pytest.approx(1 / factor)


def test_per_target_is_scipys_spearman():
    truth, table = affine_world(noise=3.0)
    predicted = truth.predict(table.weights)
    expected = [stats.spearmanr(predicted[:, j], table.outputs[:, j]).statistic for j in range(T)]
    found = lds(truth, table)
    np.testing.assert_allclose(found.per_target, expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.interval[0] < found.mean < found.interval[1]


def test_slope_is_least_squares_with_an_intercept_per_target():
    truth, table = affine_world(noise=3.0)
    predicted = truth.predict(table.weights)
    x = np.zeros((ROWS * T, 1 + T))
    x[:, 0] = predicted.ravel()
    x[np.arange(ROWS * T), 1 + np.tile(np.arange(T), ROWS)] = 1.0
    expected = np.linalg.lstsq(x, table.outputs.ravel(), rcond=None)[0][0]
    assert lds(truth, table).slope == pytest.approx(expected)


def test_targets_are_compared_by_their_names():
    truth, table = affine_world()
    names = [f"class {j}" for j in range(T)]
    table = replace(table, meta={"targets": names})
    order = np.random.default_rng(0).permutation(T)
    turned = LinearDatamodel(
        truth.scores[:, order], truth.base[order], 1.0, targets=[names[j] for j in order]
    )
    np.testing.assert_allclose(lds(turned, table).per_target, 1.0, rtol=1e-12)
    assert lds(truth, table).mean == pytest.approx(1.0)  # without names each stands at its place
    other = replace(turned, targets=[*turned.targets[:-1], "another"])
    with pytest.raises(ValueError, match=r"expected outputs \['class 0', 'class 1'.*`combine`"):
        lds(other, table)
    twice = replace(turned, targets=["class 0"] * T)
    with pytest.raises(ValueError, match="expected outputs"):
        lds(twice, table)


def test_spearman_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (20, 5)), rng.integers(0, 4, (20, 5))
    expected = [stats.spearmanr(a[:, j], b[:, j]).statistic for j in range(5)]
    np.testing.assert_allclose(spearman(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_ceiling_is_what_a_perfect_predictor_reaches(seeds):
    """Mean LDS of the truth itself over repeated worlds, beside the mean ceiling of their tables."""
    worlds = [affine_world(noise=4.0, seeds=seeds, seed=k) for k in range(30)]
    reached = np.array([lds(*world).mean for world in worlds])
    said = np.array([ceiling(table) for _, table in worlds])
    gap = reached - said
    # four standard errors of the mean gap; .02 for ranks, for which Spearman–Brown (a statement about
    # Pearson correlations) and the square root of a noisy mean are only near
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap)) + 0.02
    assert 0.5 < said.mean() < 0.97  # the noise matters


@pytest.mark.parametrize("seeds", [2, 4])
def test_the_ceiling_is_the_mean_of_the_targets_ceilings(seeds):
    """Half of the targets all but without noise, half with five times their spread: a ceiling of .83 was said."""
    reached, said = [], []
    for k in range(60):
        truth, table = affine_world(seeds=seeds, seed=k)
        noise = np.where(np.arange(T) < T // 2, 0.05, 5.0) * table.outputs.std(0)
        per_seed = table.per_seed + noise * np.random.default_rng([k, 1]).normal(
            size=table.per_seed.shape
        )
        table = replace(table, per_seed=per_seed)
        reached.append(lds(truth, table).mean)
        said.append(ceiling(table))
        alone = [ceiling(replace(table, per_seed=per_seed[:, :, [j]])) for j in range(T)]
        assert said[-1] == pytest.approx(np.mean(alone), rel=1e-12)
    gap = np.array(reached) - said
    # four standard errors, and the bias that is left: .04 of the noisy half, with 60 rows
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap)) + 0.02


def test_the_order_of_seeds_does_not_change_the_ceiling():
    """Three seeds: by hand, over all three pairs. One seed of pure noise is not passed over."""
    _, table = affine_world(noise=4.0, seeds=5)
    three = table.per_seed[:, :3]
    pairs = [spearman(three[:, a], three[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    r = np.mean(pairs, axis=0)
    by_hand = np.sqrt(3 * r / (1 + 2 * r)).mean()
    for order in itertools.permutations(range(3)):
        found = ceiling(RetrainingTable(table.weights, three[:, order], (0, 1, 2)))
        assert found == pytest.approx(by_hand, rel=1e-12)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        turned = replace(table, per_seed=table.per_seed[:, order])
        assert ceiling(turned) == pytest.approx(ceiling(table), rel=1e-12)
    spoiled = three.copy()
    spoiled[:, 2] = 1e3 * np.random.default_rng(1).normal(size=(ROWS, T))
    # the average is the third seed; pairs with it correlate by chance, which leaves a third of r
    assert ceiling(RetrainingTable(table.weights, spoiled, (0, 1, 2))) < 0.8 * by_hand


@pytest.mark.parametrize("seeds", range(2, 12))
def test_halves_have_no_favourite_seed(seeds):
    """All pairs where there are 20 at most; else each seed about as often, within 4 standard deviations."""
    splits, k = evaluation._splits(seeds, seeds // 2), seeds // 2
    count = math.comb(seeds, k) * math.comb(seeds - k, k) // 2
    assert len(splits) == len({frozenset(map(frozenset, map(tuple, pair))) for pair in splits})
    assert len(splits) == min(count, 20)
    used = np.bincount([i for a, b in splits for i in a + b], minlength=seeds)
    share = 2 * k / seeds
    slack = 0 if count <= 20 else 4 * np.sqrt(20 * share * (1 - share))
    assert np.abs(used - len(splits) * share).max() <= slack


def test_halves_of_many_seeds_are_drawn(monkeypatch):
    """155 million ways to halve 30 seeds; drawn or chosen from a list, halves tell the same."""
    _, many = affine_world(noise=4.0, seeds=30)
    assert 0.9 < ceiling(many) < 1
    _, table = affine_world(noise=4.0, seeds=9)
    listed = ceiling(table)
    monkeypatch.setattr(evaluation, "LISTED", 0)
    assert ceiling(table) == pytest.approx(listed, abs=0.02)  # over 20 halves each
    for a, b in evaluation._splits(9, 4):
        assert (len(a), len(b), len({*a, *b})) == (4, 4, 8)


def test_the_ceiling_of_pure_noise_and_of_one_seed():
    rng = np.random.default_rng(0)
    weights = random_subsets(N, 200, keep=0.5)
    noise = RetrainingTable(weights, rng.normal(size=(200, 4, T)), tuple(range(4)))
    # split halves of 200 rows correlate by chance at 1/√(200 · 8 · 3 splits) ~ .015; √(2 r) of it
    assert ceiling(noise) < 0.35
    alone = RetrainingTable(weights, rng.normal(size=(200, 1, T)), (0,))
    assert np.isnan(ceiling(alone))


def test_the_interval_covers_the_mean():
    """95 % nominal; percentile bootstraps of 20 values cover about 92 %."""
    rng = np.random.default_rng(0)
    draws = [bootstrap_interval(rng.normal(1.0, 2.0, 20)) for _ in range(100)]
    covered = sum(low <= 1.0 <= high for low, high in draws)
    assert 84 <= covered <= 99  # 92 less and plus 2.9 and 2.6 standard errors of 2.7


@pytest.mark.parametrize("targets", [2, 3, 5, 10, 29])
def test_intervals_of_few_targets_cover_the_mean(targets):
    """95 % nominal, exact for normal values; of 1000 draws 4 standard errors are 28. Resampling covered 480 of two."""
    rng = np.random.default_rng(0)
    draws = [evaluation._interval(rng.normal(0.5, 0.1, targets)) for _ in range(1000)]
    covered = sum(low <= 0.5 <= high for low, high in draws)
    assert abs(covered - 950) <= 28
    assert min(low for low, _ in draws) >= -1
    assert max(high for _, high in draws) <= 1


def test_the_interval_of_lds_is_students_for_few_targets():
    truth, table = affine_world(noise=3.0)
    found = lds(truth, table)
    by_scipy = stats.t.interval(0.95, T - 1, found.mean, stats.sem(found.per_target))
    assert found.interval == pytest.approx(by_scipy, rel=1e-12)
    many = np.random.default_rng(0).normal(0.5, 0.1, evaluation.FEW)
    assert evaluation._interval(many) == bootstrap_interval(many)


def test_the_interval_of_few_values():
    assert np.isnan(bootstrap_interval(np.array([1.0]))).all()
    assert bootstrap_interval(np.array([2.0, 2.0])) == (2.0, 2.0)
    values = np.random.default_rng(0).normal(size=9)
    assert bootstrap_interval(values) == bootstrap_interval(values)


# --- refusals --------------------------------------------------------------------------------


def test_tables_that_do_not_fit():
    truth, table = affine_world()
    fewer = LinearDatamodel(truth.scores[:, 1:], truth.base[1:], 1.0)
    with pytest.raises(ValueError, match="n=30 examples and t=7 targets, got n=30 and t=8"):
        lds(fewer, table)
    short = LinearDatamodel(truth.scores[1:], truth.base, 1.0)
    with pytest.raises(ValueError, match="n=29 examples and t=8 targets, got n=30"):
        lds(short, table)


def test_too_few_retrainings():
    truth, table = affine_world(rows=2)
    with pytest.raises(ValueError, match="at least 3 retrainings to correlate, got 2"):
        lds(truth, table)


def test_outputs_or_predictions_that_do_not_vary():
    truth, table = affine_world()
    table.per_seed[:, :, 2] = 1.0
    with pytest.raises(ValueError, match=r"retrained outputs do not vary for targets \[2\]"):
        lds(truth, table)
    truth, table = affine_world()
    truth.scores[:, 3] = 0.0
    with pytest.raises(ValueError, match=r"predicted outputs do not vary for targets \[3\]"):
        lds(truth, table)


def test_what_varies_by_rounding_alone_does_not_vary():
    """Equal scores on subsets of one size, and outputs that differ in a last bit: ranks of noise were correlated."""
    rng = np.random.default_rng(0)
    weights = random_subsets(50, 40, keep=0.5)
    last_bit = 1 / 3 + 1.1e-16 * rng.integers(0, 2, (40, 2, 3))
    real = rng.normal(size=(40, 2, 3))
    equal = LinearDatamodel(np.full((50, 3), 0.7), [1.0, 2.0, 3.0], 0.3)
    assert np.ptp(equal.predict(weights), axis=0).max() > 0
    with pytest.raises(ValueError, match=r"predicted outputs do not vary for targets \[0, 1, 2\]"):
        lds(equal, RetrainingTable(weights, real, (0, 1)))
    other = LinearDatamodel(rng.normal(size=(50, 3)), [1.0, 2.0, 3.0], 0.3)
    with pytest.raises(ValueError, match=r"retrained outputs do not vary for targets \[0, 1, 2\]"):
        lds(other, RetrainingTable(weights, last_bit, (0, 1)))
    assert np.isnan(ceiling(RetrainingTable(weights, last_bit, (0, 1))))
    small = RetrainingTable(weights, 1 + 1e-9 * real, (0, 1))  # above rounding
    assert lds(other, small).per_target == pytest.approx(
        lds(other, RetrainingTable(weights, real, (0, 1))).per_target, abs=1e-3
    )


def test_outputs_that_are_not_finite():
    truth, table = affine_world()
    table.per_seed[5, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"expected finite retrained outputs.*rows \[5\]"):
        lds(truth, table)


def test_a_target_that_never_changes_leaves_the_ceiling_to_the_others():
    weights = random_subsets(6, 30, keep=0.5)
    slopes = np.random.default_rng(0).normal(size=(6, 4))
    per_seed = np.stack([weights @ slopes] * 2, axis=1)
    per_seed[:, 0, 3] = 1.0
    assert ceiling(RetrainingTable(weights, per_seed, (0, 1))) == pytest.approx(1.0)
    per_seed[:] = 1.0
    assert np.isnan(ceiling(RetrainingTable(weights, per_seed, (0, 1))))
