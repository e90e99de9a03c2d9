"""applied.recipe: decisions, paired verification, its controls and its errors."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from applied.recipe import ROWS, Decision, Interval, paired_interval, random_subset, verify

N, T = 12, 3


@dataclass
class World:
    """Truth as an affine function of the weights plus noise that belongs to the training seed."""

    scores: np.ndarray
    noise: float = 1.0  # shared by all trainings with one seed
    own: float = 0.0  # of one training alone: (weights, seed)
    calls: list = field(default_factory=list)

    def __call__(self, weights, *, seeds):
        self.calls.append((np.array(weights), list(seeds)))
        outputs = np.empty((len(weights), len(seeds), self.scores.shape[1]))
        for r, row in enumerate(weights):
            for s, seed in enumerate(seeds):
                shared = np.random.default_rng(seed).normal(size=self.scores.shape[1])
                key = [seed, *(row * 1000).astype(int)]
                alone = np.random.default_rng(key).normal(size=self.scores.shape[1])
                outputs[r, s] = row @ self.scores + self.noise * shared + self.own * alone
        return SimpleNamespace(per_seed=outputs)


@pytest.fixture
def world():
    return World(np.random.default_rng(0).normal(size=(N, T)))


def decide(world, weights, costs=None):
    weights = np.asarray(weights, dtype=float)
    costs = np.ones(len(weights)) if costs is None else np.asarray(costs, dtype=float)
    expected = np.full(len(weights), weights @ costs / costs.sum())
    return Decision(
        weights=weights,
        ids=np.arange(len(weights))[weights > 0],
        predicted=weights @ world.scores,
        baseline=expected @ world.scores,
        targets=np.array(["a", "b", "c"]),
        costs=costs,
    )


@pytest.fixture
def decision(world):
    return decide(world, np.arange(N) < 5)


# --- pairing -------------------------------------------------------------------------------------


def test_seed_noise_cancels_in_the_difference(world, decision):
    other = np.arange(N) >= 5
    verified = verify(decision, world, control={"rest": other}, seeds=4)
    expected = float(((decision.weights - other) @ world.scores).mean())
    interval = verified.difference("rest")
    # what is left is the rounding of adding noise of size 1 and taking it away again
    assert interval.mean == pytest.approx(expected, abs=1e-12)
    assert interval.high - interval.low < 1e-12
    assert verified.actual.mean(axis=1).std() > 0.1  # and there was noise to cancel


def test_only_needed_pairs_are_trained(world, decision):
    verified = verify(
        decision, world, control={"random": "random", "all": np.ones(N)}, seeds=[7, 3, 5]
    )
    first, *rest = world.calls
    assert np.array_equal(first[0], np.stack([decision.weights, np.ones(N)]))
    assert first[1] == [7, 3, 5]
    assert [(len(weights), seeds) for weights, seeds in rest] == [(1, [7]), (1, [3]), (1, [5])]
    assert list(verified.control) == ["random", "all"]
    assert verified.actual.shape == verified.control["random"].shape == (3, T)
    # every result lies at its own seed
    for s, (weights, seeds) in enumerate(rest):
        again = World(world.scores)(weights, seeds=seeds).per_seed[0, 0]
        assert np.array_equal(verified.control["random"][s], again)


def test_random_control_is_fresh_for_each_seed_and_repeatable(world, decision):
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - proves that it is left alone
    verify(decision, world, seeds=4)
    first = [weights[0] for weights, _ in world.calls[1:]]
    world.calls.clear()
    verify(decision, world, seeds=4)
    second = [weights[0] for weights, _ in world.calls[1:]]
    assert np.array_equal(first, second)
    assert len({tuple(row) for row in first}) == 4
    assert [row.sum() for row in first] == [5.0] * 4
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_random_control_is_not_the_training_order(world):
    # a training that shuffles with default_rng(seed) must not meet the control's examples first
    n, k = 200, 100
    big = World(np.zeros((n, T)))
    verify(decide(big, np.arange(n) < k), big, seeds=5)
    for weights, (seed,) in big.calls[1:]:
        first = np.random.default_rng(seed).permutation(n)[:k]
        # hypergeometric: mean 50, sd 3.5; identical streams would give 100
        assert abs(weights[0][first].sum() - k / 2) < 5 * 3.6


def test_an_array_of_controls(world, decision):
    one = verify(decision, world, control=np.ones(N), seeds=2)
    two = verify(decision, world, control=np.stack([np.ones(N), np.zeros(N)]), seeds=2)
    assert list(one.control) == ["control"]
    assert list(two.control) == ["control 1", "control 2"]
    assert two.cost == {"control 1": N, "control 2": 0.0}
    assert np.array_equal(one.control["control"], two.control["control 1"])


# --- intervals -----------------------------------------------------------------------------------


def test_paired_interval_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=7), rng.normal(size=7)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    interval = paired_interval(a, b)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)  # rounding
    assert interval.mean == pytest.approx((a - b).mean(), rel=1e-12)


def test_interval_covers_the_true_difference(world):
    world.own, trials = 0.5, 400
    decision = decide(world, np.arange(N) < 5)
    control = np.arange(N) >= 5
    truth = float(((decision.weights - control) @ world.scores).mean())
    hits = 0
    for trial in range(trials):
        seeds = range(4 * trial, 4 * trial + 4)
        interval = verify(decision, world, control=control, seeds=seeds).difference("control")
        hits += interval.low <= truth <= interval.high
    # binomial: sd of the rate is sqrt(.95 * .05 / 400) = .011; four of them
    assert hits / trials == pytest.approx(0.95, abs=0.044)


def test_one_seed_has_no_interval(world, decision):
    verified = verify(decision, world, seeds=1)
    interval = verified.difference()
    assert np.isfinite(interval.mean)
    assert np.isnan([interval.low, interval.high]).all()
    assert "needs >= 2 seeds" in verified.table()


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])])
def test_unpaired_values_are_refused(a, b):
    with pytest.raises(ValueError, match="paired"):
        paired_interval(a, b)


# --- the table -----------------------------------------------------------------------------------


def test_table_shows_predicted_actual_control_and_seeds(world, decision):
    verified = verify(decision, world, control={"random": "random", "all": np.ones(N)}, seeds=3)
    lines = verified.table().splitlines()
    assert lines[0].split() == ["target", "predicted", "actual", "random", "all"]
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    for j, line in enumerate(lines[1:4]):
        assert f"{decision.predicted[j]:.4g}" in line
        assert str(paired_interval(verified.actual[:, j])) in line
        assert str(paired_interval(verified.control["all"][:, j])) in line
    text = verified.table()
    assert f"actual - random: {verified.difference('random')}" in text
    assert f"actual - all: {verified.difference('all')}" in text
    assert f"predicted {(decision.predicted - decision.baseline).mean():.4g}" in text
    assert "3 training seeds" in text
    assert lines[5].split() == ["cost", "5", "5", "12"]


def test_a_long_table_ends_in_the_mean():
    t = ROWS + 5
    world = World(np.ones((4, t)))
    decision = Decision(np.ones(4), np.arange(4), np.ones(t), np.ones(t), np.arange(t))
    lines = verify(decision, world, seeds=2).table().splitlines()
    assert len(lines) == 1 + ROWS + 1 + 1 + 2  # head, targets, mean, cost, difference and seeds
    assert lines[ROWS + 1].startswith(f"mean of {t}")


def test_unknown_control_is_named(world, decision):
    with pytest.raises(KeyError, match=r"no control 'filter'; there are \['random'\]"):
        verify(decision, world, seeds=1).difference("filter")


# --- random subsets ------------------------------------------------------------------------------


@given(
    costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_random_subset_spends_what_it_can(costs, share, seed):
    costs = np.array(costs)
    budget = share * costs.sum()
    weights = random_subset(costs, budget, np.random.default_rng(seed))
    spent = weights @ costs
    assert set(weights) <= {0.0, 1.0}
    assert spent <= budget * (1 + 1e-8)  # the slack of equal sums in another order
    left_out = costs[weights == 0]
    assert not len(left_out) or left_out.min() > budget - spent - 1e-8 * budget


def test_random_subset_takes_every_example_equally_often():
    rng, draws = np.random.default_rng(2), 4000
    counts = np.mean([random_subset(np.ones(10), 3, rng) for _ in range(draws)], axis=0)
    # sd of one frequency is sqrt(.3 * .7 / 4000) = .0072; five of them
    assert counts == pytest.approx(np.full(10, 0.3), abs=0.037)


def test_random_subset_cannot_spend_more_than_there_is():
    with pytest.raises(ValueError, match="at most 4, the cost of all 4 examples, got 5"):
        random_subset(np.ones(4), 5, np.random.default_rng(0))


def test_a_control_may_have_one_draw_a_seed(world, decision):
    draws = np.random.default_rng(5).integers(0, 2, (3, N)).astype(float)
    both = verify(decision, world, control={"mine": draws}, seeds=[3, 1, 2])
    for row, seed, outputs in zip(draws, [3, 1, 2], both.control["mine"], strict=True):
        assert np.array_equal(outputs, world(row[None], seeds=[seed]).per_seed[0, 0])
    assert both.cost["mine"] == pytest.approx((draws @ decision.costs).mean())


def test_an_unknown_interval_is_not_printed():
    assert str(paired_interval([2.0])) == "2"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1]])
def test_seeds_must_be_there_and_differ(world, decision, seeds):
    with pytest.raises(ValueError, match="at least one seed >= 0, each once"):
        verify(decision, world, seeds=seeds)


def test_outputs_that_are_not_finite_name_row_and_seed(world, decision):
    def broken(weights, *, seeds):
        table = world(weights, seeds=seeds)
        if len(weights) > 1:
            table.per_seed[1, 2] = np.nan
        return table

    with pytest.raises(ValueError, match="got nan for 'all' with seed 9"):
        verify(decision, broken, control={"all": np.ones(N)}, seeds=[4, 6, 9])


def test_random_outputs_that_are_not_finite_name_their_seed(world, decision):
    def broken(weights, *, seeds):
        table = world(weights, seeds=seeds)
        if seeds == [1]:
            table.per_seed[:] = np.inf
        return table

    with pytest.raises(ValueError, match="got inf for 'random' with seed 1"):
        verify(decision, broken, seeds=3)


def test_outputs_of_another_shape_are_refused(world, decision):
    def fewer(weights, *, seeds):
        return SimpleNamespace(per_seed=world(weights, seeds=seeds).per_seed[..., :2])

    with pytest.raises(ValueError, match=r"shape \(1, 3, 3\), got \(1, 3, 2\)"):
        verify(decision, fewer, seeds=3)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("best", "expected control 'random' or weights, got 'best'"),
        ({}, "at least one control"),
        (np.ones(N - 1), r"shape \[n=12\] .* for control 'control', got \(11,\)"),
        ({"filter": np.full(N, np.nan)}, "finite weights >= 0 .* 'filter'"),
        (np.ones((2, N + 1)), r"'control 1', got \(13,\)"),
        ({"filter": -np.ones(N)}, "finite weights >= 0 .* 'filter'"),
    ],
)
def test_controls_that_make_no_sense(world, decision, control, message):
    with pytest.raises(ValueError, match=message):
        verify(decision, world, control=control)
    assert not world.calls  # nothing was trained before the check


def test_a_decision_dearer_than_the_pool_has_no_random_control(world):
    double = decide(world, np.full(N, 2.0))
    with pytest.raises(ValueError, match="got 24; a random subset cannot spend more"):
        verify(double, world)
    assert not world.calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[1.0, 0.0]]}, r"weights of shape \(2,\), got \(1, 2\)"),
        ({"weights": [1.0, -1.0]}, "finite weights >= 0, got -1.0 in row 1"),
        ({"weights": [np.inf, 0.0]}, "finite weights >= 0, got inf in row 0"),
        ({"costs": [1.0, np.nan]}, "finite costs >= 0, got nan in row 1"),
        ({"costs": [1.0]}, r"costs of shape \(2,\), got \(1,\)"),
        ({"ids": [0, 1]}, r"ids of shape \(1,\), got \(2,\)"),
        ({"baseline": [1.0, 2.0]}, r"baseline of shape \(1,\), got \(2,\)"),
        ({"targets": ["a", "b"]}, r"targets of shape \(1,\), got \(2,\)"),
    ],
)
def test_a_decision_checks_its_shapes(change, message):
    sound = {
        "weights": [1.0, 0.0],
        "ids": [0],
        "predicted": [1.0],
        "baseline": [2.0],
        "targets": ["a"],
    }
    assert Decision(**sound).costs.tolist() == [1.0, 1.0]
    assert Decision(**sound).cost == 1.0
    with pytest.raises(ValueError, match=message):
        Decision(**{**sound, **change})


def test_an_interval_reads_as_text():
    assert str(Interval(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]"
