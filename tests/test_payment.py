"""applied.payment, purchase: shares in proportion within limits, discounts, purchases; signs that are found out."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from applied import purchase
from applied.payment import SignWarning, pay
from applied.purchase import GapWarning, buy
from applied.recipe import random_subset
from applied.worth import Values

SOLVED = 1e-6  # relative; Clarabel stops at 1e-8


def worth(numbers, error=None, **more):
    numbers = np.asarray(numbers, dtype=float)
    error = np.zeros(len(numbers)) if error is None else error
    names = np.array([f"owner {k}" for k in range(len(numbers))])
    return Values(numbers, error, names, numbers[:, None], **more)


def test_proportional_to_worth():
    found = pay(worth([3.0, 1.0, -1.0, 0.0]), 80)
    np.testing.assert_allclose(found.amounts, [60.0, 20.0, 0.0, 0.0], rtol=SOLVED)
    np.testing.assert_allclose(found.proportional, [60.0, 20.0, 0.0, 0.0])


limits = st.lists(
    st.tuples(st.floats(0.05, 5), st.floats(0, 4), st.floats(0, 30)), min_size=2, max_size=6
)


@given(limits)
def test_limits_are_met_and_the_others_are_proportional(players):
    """x = clip(c · worth, floor, cap), with the one c that spends the budget: found here by bisection."""
    numbers, floor, width = (np.array(column) for column in zip(*players, strict=True))
    cap = floor + width
    budget = (floor.sum() + cap.sum()) / 2
    if budget < 0.5 or width.sum() < 0.1:
        return
    found = pay(worth(numbers), budget, floors=floor, caps=cap)
    c = brentq(lambda c: np.clip(c * numbers, floor, cap).sum() - budget, 0, 1e6)
    np.testing.assert_allclose(
        found.amounts, np.clip(c * numbers, floor, cap), atol=1e-4 * budget, rtol=1e-4
    )
    assert found.amounts.sum() == pytest.approx(budget, rel=1e-5)


def test_a_discount_pays_uncertain_players_less():
    found = pay(worth([2.0, 2.0], [0.0, 0.5]), 90, discount=2)
    np.testing.assert_allclose(found.amounts, [60.0, 30.0], rtol=SOLVED)


def test_intervals_of_payments():
    found = pay(worth([2.0, 2.0], [0.5, 0.0]), 100)
    low, high = (2 + side * 1.959964 * 0.5 for side in (-1, 1))
    np.testing.assert_allclose(
        [found.low[0], found.high[0]], [100 * low / (low + 2), 100 * high / (high + 2)], rtol=1e-6
    )
    np.testing.assert_allclose([found.low[1], found.high[1]], [50.0, 50.0])
    assert "owner 0" in found.table()
    assert "100.00" in found.table()


@pytest.mark.parametrize(
    ("numbers", "budget", "more", "message"),
    [
        ([-1.0, -2.0], 10, {}, "if the outputs are losses, data lower them: pass -values"),
        ([1.0, 2.0, -3.0], 10, {}, "A sum of 0 means values up to a common constant"),
        ([1.0, 2.0], 0, {}, "positive budget, got 0"),
        ([1.0, 2.0], "10", {}, "positive budget, got '10'"),
        ([1.0, 2.0], 10, {"floors": 6}, "floors within the budget 10, got 12"),
        ([1.0, 2.0], 10, {"floors": 3, "caps": 2}, "0 <= floors <= caps"),
        ([1.0, 2.0, -1.0], 10, {"caps": 4}, "got at most 8 for those of worth"),
    ],
)
def test_what_cannot_be_paid(numbers, budget, more, message):
    with pytest.raises(ValueError, match=message):
        pay(worth(numbers), budget, **more)


def test_discounts_need_errors():
    unknown = worth([1.0, 2.0], np.full(2, np.nan))
    assert pay(unknown, 3).amounts.sum() == pytest.approx(3)
    for spend in (lambda: pay(unknown, 3, discount=1), lambda: buy(unknown, [1, 1], 1, discount=1)):
        with pytest.raises(ValueError, match="expected standard errors for a discount"):
            spend()
    with pytest.raises(ValueError, match="a player of positive worth at discount 9"):
        pay(worth([1.0, 2.0], [1.0, 1.0]), 3, discount=9)


# --- buying ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::applied.payment.SignWarning")
@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_purchases_are_best_of_all(seed):
    rng = np.random.default_rng(seed)
    numbers, prices = rng.normal(1, 1, 7), rng.uniform(1, 4, 7)
    budget = prices.sum() / 2
    if not (numbers[prices <= budget] > 0).any():
        return
    found = buy(worth(numbers), prices, budget)
    choices = np.array(list(itertools.product([0, 1], repeat=7)))
    best = max(choices[choices @ prices <= budget] @ numbers)
    assert numbers @ found.weights == pytest.approx(best, rel=1e-6)
    assert found.cost <= budget * (1 + 1e-9)
    part = buy(worth(numbers), prices, budget, whole=False)
    assert numbers @ part.weights >= best - 1e-6


def test_owners_become_weights_of_their_examples():
    labels = np.array(["b", "a", "b", "c"])
    found = buy(worth([1.0, 5.0, 2.0], labels=labels, empty=-9.0), [1.0, 2.0, 4.0], 3.5)
    np.testing.assert_array_equal(found.weights, [1.0, 1.0, 1.0, 0.0])
    assert found.cost == pytest.approx(3.0)  # owners a and b, whatever their sizes
    np.testing.assert_array_equal(found.ids, [0, 1, 2])
    # of a loss: 9 without data, lowered by 6
    np.testing.assert_allclose(found.predicted, [3.0])
    # for 3 random examples are those of a and b: c's costs 4
    np.testing.assert_allclose(found.baseline, [3.0])


@pytest.mark.parametrize(
    ("numbers", "prices", "budget", "message"),
    [
        ([-1.0, -2.0], [1, 1], 1, "pass -values"),
        ([1.0, 2.0], [1, 0], 1, "positive, finite prices, got 0 for owner 1"),
        ([1.0, 2.0], [math.nan, -1], 1, "got nan for owner 0, -1 for owner 1"),
        ([1.0, 2.0], [1, math.inf], 1, "got inf for owner 1"),
        ([1.0, 2.0], [1, 1, 1], 1, r"one positive price per player \[2\], got \(3,\)"),
        ([1.0, 2.0], [2, 3], "5", "a budget that is a number, got '5'"),
        ([1.0, 2.0], [2, 3], 1, "a budget for the cheapest player, 2, got 1"),
    ],
)
def test_what_cannot_be_bought(numbers, prices, budget, message):
    with pytest.raises(ValueError, match=message):
        buy(worth(numbers), prices, budget)


def test_the_good_are_bought_however_bad_the_others_are():
    values = worth([0.59, 0.52, 0.48, -1.7], empty=-2.0)
    with pytest.warns(SignWarning, match=r"the values sum to -0\.11;"):
        found = buy(values, np.ones(4), 2)
    assert found.ids.tolist() == ["owner 0", "owner 1"]
    np.testing.assert_allclose(found.predicted, [2.0 - 1.11])
    with pytest.raises(ValueError, match=r"got a sum of -0\.11"):
        pay(values, 2)  # a share of less than nothing is none


def test_values_up_to_a_constant_buy_nobody():
    """Of centred values the sign says nothing; of values that add up to a known change of 0 it does."""
    centred = [1.0, 2.0, -3.0]
    with pytest.raises(ValueError, match="whose sign means good or bad, got a sum of 0"):
        buy(worth(centred), np.ones(3), 1)
    assert buy(worth(centred, change=0.0), np.ones(3), 1).ids.tolist() == ["owner 1"]


def test_a_worth_of_almost_nothing_gets_the_floor():
    """Rounding of a player who adds nothing is no reason to pay the others otherwise."""
    found = pay(worth([0.5, 0.3, 2e-16]), 100.0, floors=5.0)
    np.testing.assert_allclose(found.amounts, [95 * 5 / 8, 95 * 3 / 8, 5.0], rtol=1e-12)
    found = pay(worth([5.0, 3.0, 1.0, 1e-9]), 100.0, floors=5.0)
    np.testing.assert_allclose(found.amounts, [95 * 5 / 9, 95 * 3 / 9, 95 / 9, 5.0], rtol=1e-8)


def test_limits_that_leave_no_choice():
    for amounts, limits in (([20, 40, 40], "floors"), ([40, 40, 20], "caps")):
        found = pay(worth([5.0, 3.0, 1.0]), 100.0, **{limits: amounts})
        np.testing.assert_allclose(found.amounts, amounts)


def test_a_purchase_is_the_best_to_the_last_digit():
    """60 players at prices of whole numbers, against dynamic programming over every sum."""
    rng = np.random.default_rng(25)
    prices = rng.integers(100, 1000, 60)
    numbers = prices + rng.normal(size=60) * 5 + 100
    budget = int(prices.sum() * 0.4)
    best = np.zeros(budget + 1)
    for gain, price in zip(numbers, prices, strict=True):
        best[price:] = np.maximum(best[price:], best[:-price] + gain)
    assert numbers @ buy(worth(numbers), prices, budget).weights == pytest.approx(
        best[-1], rel=1e-12
    )


@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_a_choice_at_prices_that_follow_values_is_as_near_to_the_best_as_it_says(apart):
    """20 players, a subset-sum problem, whose best choice a solver takes long to prove."""
    rng = np.random.default_rng(0)
    numbers = np.abs(rng.normal(size=20)) + 0.1
    prices = numbers * np.exp(apart * rng.normal(size=20))
    budget = prices.sum() / 2
    inside = (np.arange(2**20)[:, None] >> np.arange(20)) & 1
    best = (inside @ numbers)[inside @ prices <= budget].max()
    found = buy(worth(numbers), prices, budget)
    assert found.meta["gap"] <= 1e-4
    assert best * (1 - found.meta["gap"] - 1e-9) <= numbers @ found.weights <= best * (1 + 1e-9)


def test_many_players_at_prices_that_follow_values_are_bought_in_time():
    """What `pay` gives as prices: choices that are as good as equal have no end; the gap says what may be missed."""
    numbers = np.abs(np.random.default_rng(0).normal(size=200)) + 0.1
    values = worth(numbers)
    start = time.perf_counter()
    found = buy(values, pay(values, 1000.0).amounts, 500.0)
    assert time.perf_counter() - start < 60  # some 3 s, alone on two cores
    assert 0 < found.meta["gap"] < 1e-4
    assert found.cost == pytest.approx(500.0, rel=1e-4)  # gains are proportional to what is spent
    assert found.cost <= 500 * (1 + 1e-9)


def test_a_gap_that_is_much_is_told(monkeypatch):
    """A solver that stops before it found any leaves what is at hand."""
    monkeypatch.setattr(purchase, "_best", lambda gain, *_: (np.zeros(len(gain)), False))
    with pytest.warns(GapWarning, match=r"within 0\.01% of the best, got .* miss 20\.00% of it"):
        found = buy(worth([3.0, 2.0, 2.0]), [3.0, 2.0, 2.0], 3.75)
    assert found.ids.tolist() == ["owner 0"]  # 3, while fractions would gain 3.75
    assert found.meta["gap"] == pytest.approx(0.2, rel=1e-6)  # a bound has a slack of 1e-9


@pytest.mark.parametrize("price", [0.1 + 0.2, 1.35 + 0.05])
def test_a_price_that_is_the_budget_but_for_rounding_is_bought(price):
    """As two players at .1 and .2 are for .3."""
    values = worth([1.0])
    assert buy(values, [price], round(price, 2)).ids.tolist() == ["owner 0"]
    beside = buy(worth([1.0, -0.1]), [price, 0.05], round(price, 2))
    assert beside.ids.tolist() == ["owner 0"]


def test_no_more_is_spent_than_there_is():
    found = buy(worth([1.0, 1.0]), [500_000.4] * 2, 1_000_000.0)
    assert found.cost == 500_000.4
    with pytest.raises(ValueError, match="got 5, while the cheapest of 1 costs 10"):
        buy(worth([3.0, -1.0]), [10.0, 1.0], 5.0)


@pytest.mark.parametrize(
    ("gains", "prices", "budget", "best"),
    [
        ([1, 1], [0.1, 0.2], 0.3, [0, 1]),  # .1 + .2 is a little above .3
        (
            [2, 4, 8],
            [272_737, 514_989, 817_560],
            817_559.5,
            [0, 1],
        ),  # half a unit short of the best
        ([8, 1, 6, 1], [716_463, 565_160, 715_677, 396_817], 1_432_139.5, [0, 1]),
        ([1e7, 0.3, 0.2, 0.4], [10, 5, 4, 4], 14, [0, 3]),  # far below a solver's tolerance
    ],
)
def test_purchases_at_the_edge_of_a_tolerance(gains, prices, budget, best):
    assert buy(worth(gains), prices, budget).ids.tolist() == [f"owner {k}" for k in best]


def test_caps_that_are_all_there_is_beside_a_floor_without_worth():
    found = pay(
        worth([0.54, 0.32, 0.5, 0]), 1.9 + 2e-16, floors=[0, 0, 0, 0.08], caps=[0.93, 0.53, 0.36, 1]
    )
    np.testing.assert_allclose(found.amounts, [0.93, 0.53, 0.36, 0.08], rtol=1e-12)


def test_intervals_of_payments_at_a_discount_hold_the_share():
    """Worth 3 − .5 and 1 − .5; ends of the interval discounted alike."""
    values = worth([3.0, 1.0], np.array([0.1, 0.1]))
    found = pay(values, 100, discount=5)
    np.testing.assert_allclose(found.proportional, [250 / 3, 50 / 3], rtol=1e-12)
    assert (found.low < found.proportional).all()
    assert (found.proportional < found.high).all()
    with pytest.raises(ValueError, match="a discount of 0 or more"):
        pay(values, 100, discount=-1)


@pytest.mark.parametrize("act", [lambda: pay([1, 2], 10), lambda: buy([1, 2], [1, 1], 2)])
def test_numbers_are_no_values(act):
    with pytest.raises(ValueError, match="expected Values, got list"):
        act()


@pytest.mark.parametrize("discount", [-1.0, np.nan, np.inf])
def test_a_discount_that_is_none(discount):
    worth = Values([1.0, 2.0, -0.5], [1.0] * 3, ["a", "b", "c"], [[1.0], [2.0], [-0.5]])
    for act in (lambda: pay(worth, 3, discount=discount), lambda: buy(worth, [1, 1, 1], 3, discount=discount)):  # fmt: skip
        with pytest.raises(ValueError, match="a discount of 0 or more"):
            act()


@pytest.mark.parametrize("limits", [{"floors": [1.0, 2.0]}, {"caps": [[30.0] * 3]}])
def test_limits_that_are_not_one_a_player(limits):
    worth = Values([1.0, 2.0, 3.0], [1.0] * 3, ["a", "b", "c"], [[1.0], [2.0], [3.0]])
    with pytest.raises(ValueError, match="one number or one a player"):
        pay(worth, 30, **limits)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_settled_before_the_program_changes_nothing(seed, monkeypatch):
    """Of many players nearly all are settled by reduced costs; a program of all of them chooses as well."""
    rng = np.random.default_rng(seed)
    values, prices = worth(rng.normal(0.2, 1, 500)), rng.uniform(1, 5, 500)
    asked = []
    best = purchase._best
    monkeypatch.setattr(
        purchase, "_best", lambda *given: asked.append(len(given[0])) or best(*given)
    )
    found = buy(values, prices, 300)
    monkeypatch.setattr(
        purchase, "_sure", lambda gain, *_: (np.zeros(len(gain)), np.ones(len(gain), dtype=bool))
    )
    whole = buy(values, prices, 300)
    *few, many = asked  # few is nobody where all are settled
    assert many == 500
    assert sum(few) < 150
    assert found.predicted == pytest.approx(whole.predicted, rel=1e-12)


def test_prices_and_limits_go_by_name():
    """Tables are sorted by value, arrays go by the order of players: numbers copied in that order were mispaired."""
    one = worth([1.0, 5.0, 2.0])
    prices = {"owner 2": 4.0, "owner 1": 2.0, "owner 0": 1.0}
    by_name, in_order = buy(one, prices, 3.5), buy(one, [1.0, 2.0, 4.0], 3.5)
    np.testing.assert_array_equal(by_name.costs, in_order.costs)
    np.testing.assert_array_equal(by_name.weights, in_order.weights)
    floors = {"owner 2": 0.0, "owner 0": 30.0, "owner 1": 0.0}
    caps = dict.fromkeys(floors, 50.0)
    found = pay(one, 100, floors=floors, caps=caps)
    np.testing.assert_allclose(found.amounts, [30.0, 50.0, 20.0])
    np.testing.assert_array_equal(
        found.amounts, pay(one, 100, floors=[30, 0, 0], caps=[50, 50, 50]).amounts
    )
    wrong = {"owner 0": 1.0, "owner 2": 1.0, "owner 7": 1.0}
    for name, spend in (
        ("prices", lambda: buy(one, wrong, 3)),
        ("floors", lambda: pay(one, 3, floors=wrong)),
        ("caps", lambda: pay(one, 3, caps=wrong)),
    ):
        with pytest.raises(ValueError, match=rf"{name} of .*\['owner 1'\] .*\['owner 7'\]"):
            spend()


def test_a_purchase_is_compared_with_random_ones_of_its_price():
    """Random players that fill what is left with cheap ones are more than the share that is spent."""
    prices = np.random.default_rng(0).lognormal(size=300)
    found = buy(worth(np.ones(300)), prices, 0.02 * prices.sum())
    spent, draws = found.meta["spent"], map(np.random.default_rng, range(400))
    controls = [random_subset(prices, spent, rng) for rng in draws]
    many = np.array([-w.sum() for w in controls])
    assert found.baseline[0] == pytest.approx(
        many.mean(), abs=4 * many.std() / np.sqrt(133)
    )  # of 400 and 200 draws
