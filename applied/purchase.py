"""Which data to buy within a budget. High is good here: of a loss, pass `-values`."""

from __future__ import annotations

import math
import warnings
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applied.payment import ByPlayer, SignWarning, are_values, in_order, refuse_discount
from applied.recipe import SLACK, Decision, expected_choice, random_subset
from applied.worth import Values
from attribution_core.data import named

# of HiGHS, whose 1e-6 would let another choice pass for the best; where prices follow values there is no end of nodes
TIGHT = {
    "mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "mip_feasibility_tolerance": 1e-10,
    "primal_feasibility_tolerance": 1e-10, "mip_max_nodes": 2000,
}  # fmt: skip
GAP = (
    1e-4  # of the most that can be gained, beyond which a choice not proved to be the best is told
)


class GapWarning(UserWarning):
    """A purchase that may miss some of the best one's gain; the message says how much."""


def _someone_is_good(values: Values) -> None:
    """Raise where no value is positive, or their signs say nothing: then there is nothing to buy."""
    are_values(values)
    total, size = float(values.values.sum()), float(np.abs(values.values).sum())
    if not (values.values > 0).any():
        raise ValueError(
            "expected a player of positive value, got none: there is nothing to buy; if the outputs are losses, data "
            "lower them: pass -values"
        )
    if math.isnan(values.change) and abs(total) <= 1e-6 * size:
        raise ValueError(
            "expected values whose sign means good or bad, got a sum of 0, as of values up to a common constant; also "
            "retrain on everyone and on nobody"
        )
    if total < -1e-6 * size:
        warnings.warn(
            f"the values sum to {total:.4g}; values where high is good rarely have a negative sum. If the output is a loss, "
            "pass -values: `buy` prefers what raises the output",
            SignWarning,
            stacklevel=3,
        )


def buy(
    values: Values,
    prices: ByPlayer,
    budget: float,
    *,
    whole: bool = True,
    discount: float = 0.0,
) -> Decision:
    """Choose the players whose data are worth most within a budget.

        max Σ_i (value_i − discount · standard error_i) x_i    s.t.  Σ_i price_i x_i ≤ budget,  x_i in {0, 1}

    Args:
        values: high is good; of a loss, pass `-values`.
        prices: positive; [k] in the order of `values.players` (tables are sorted by value), or player -> price.
        budget: the most that is spent; players of negative value are never bought.
        whole: take a player or leave it; else fractions in [0, 1].
        discount: standard errors that are taken off.

    Returns:
        A decision over examples (of players that are owners, over their examples; an owner's price is spread
        evenly over them). Its one output is minus the utility, so that it is to become small: the loss
        itself, for the values of a loss. Predicted from f(nobody), or from 0 where that is unknown. It is the best
        choice, and `.meta["gap"]` is 0, but where many players cost nearly in proportion to their values: of their
        many choices that are as good as equal, one is taken, and the gap is the share of the most that can be
        gained by which it may miss the best, usually 1e-6.

    Raises:
        ValueError: no player of positive value (a loss, whose sign was not turned); values known up to a common
            constant; prices that do not fit; a budget that is too small for any of them.
        RuntimeError: the solver found no optimum.

    Warns:
        SignWarning: values with a negative sum.
        GapWarning: a gap of more than 1e-4.

    >>> one = Values([3.0, 2.0, 2.0], [0.0] * 3, [0, 1, 2], [[3.0], [2.0], [2.0]])
    >>> buy(one, [3, 2, 2], budget=4).ids.tolist()
    [1, 2]
    """
    # rewrite: gain of a choice x, in units of the output; however bad the others are, they are left
    _someone_is_good(values)
    price = in_order("prices", prices, values)
    if price.shape != values.values.shape:
        raise ValueError(
            f"expected one positive price per player [{len(values)}], got {price.shape}"
        )
    if len(wrong := np.flatnonzero(~((price > 0) & (price < np.inf)))):
        dear = ", ".join(f"{price[i]:g} for {values.players[i]}" for i in wrong[:5])
        raise ValueError(
            f"expected positive, finite prices, got {dear}; mend them, or leave these players out"
        )
    if not isinstance(budget, Real):
        raise ValueError(f"expected a budget that is a number, got {budget!r}")
    most = budget * (1 + SLACK)  # .1 + .2 is a little above .3
    if not most >= price.min():
        raise ValueError(
            f"expected a budget for the cheapest player, {price.min():g}, got {budget}"
        )
    refuse_discount(values, discount)

    # plug in: values add up, so the gain is linear
    gain = values.values - (discount * values.standard_error if discount else 0.0)
    wanted = price[gain > 0]
    if not len(wanted):
        raise ValueError(
            f"expected a player of positive value at discount {discount:g}, got none; lower it"
        )
    if whole and most < wanted.min():
        raise ValueError(
            f"expected a budget for a player of positive value, got {budget:g}, while the cheapest of "
            f"{len(wanted)} costs {wanted.min():g}"
        )

    # optimize
    chosen, open_ = _sure(gain, price, budget) if whole else (np.zeros(len(gain)), gain > 0)
    proved = True
    if open_.any():
        rest = budget - float(price @ chosen)
        chosen[open_], proved = _best(gain[open_], price[open_], rest, whole)
    if whole:
        _spend_the_rest(chosen, gain, price, budget)
    return _decision(values, *_within_gap(chosen, proved, gain, price, budget), price, budget)


def _best(
    gain: NDArray[Any], price: NDArray[Any], budget: float, whole: bool
) -> tuple[NDArray[np.float64], bool]:
    """(max gain · x with price · x ≤ budget, x in {0, 1} or in [0, 1]; whether it is proved to be the best)."""
    import cvxpy as cp

    x = cp.Variable(len(gain), boolean=True) if whole else cp.Variable(len(gain), bounds=[0, 1])
    limits = [(price / budget) @ x <= 1]
    while True:
        problem = cp.Problem(cp.Maximize((gain / np.abs(gain).max()) @ x), limits)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")  # see `_within_gap`
            problem.solve(solver="HIGHS", **TIGHT)
        proved = problem.status == cp.OPTIMAL
        if not proved and problem.status != cp.USER_LIMIT:
            raise RuntimeError(f"expected an optimum, got solver status {problem.status!r}")
        if x.value is None:  # stopped before it found any
            return np.zeros(len(gain)), False
        found = np.asarray(x.value)
        chosen = np.round(found) if whole else np.clip(found, 0.0, 1.0)
        spent = float(price @ chosen)
        if not whole:
            return chosen * (budget / spent) if spent > budget else chosen, proved
        if spent <= budget * (1 + SLACK):
            return chosen, proved
        # a solver keeps to the budget up to a tolerance: not all of these, then
        taken = np.flatnonzero(chosen)
        limits.append(cp.sum(x[taken]) <= len(taken) - 1)


def _at_hand(
    gain: NDArray[Any], price: NDArray[Any], budget: float
) -> tuple[NDArray[np.float64], float, float]:
    """(a choice by gain per price, the gain per price λ at which the budget runs out, what no choice exceeds)."""
    good = np.flatnonzero(gain > 0)
    order = good[np.argsort(-gain[good] / price[good], kind="stable")]
    whole = int(np.searchsorted(np.cumsum(price[order]), budget, side="right"))
    chosen = np.zeros(len(gain))
    chosen[order[:whole]] = 1.0
    if whole == len(order):  # all of them can be had
        return chosen, 0.0, float(gain @ chosen)
    rate = gain[order[whole]] / price[order[whole]]
    bound = float(gain @ chosen) + rate * (budget * (1 + SLACK) - float(price @ chosen))
    _spend_the_rest(chosen, gain, price, budget)
    return chosen, float(rate), bound


def _sure(
    gain: NDArray[Any], price: NDArray[Any], budget: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(who is in every best choice, who may be in one), by reduced costs: a small program is left of a large one.

    With λ the gain per price at which the budget runs out, no choice that goes against the sign of gain − λ price
    gains more than the bound (fractions allowed) less |gain − λ price|; where that is less than a choice at hand,
    it is settled.
    """
    chosen, rate, bound = _at_hand(gain, price, budget)
    if not rate:
        return chosen, np.zeros(len(gain), dtype=bool)
    room = bound - float(gain @ chosen) + SLACK * bound
    apart = gain - rate * price
    chosen = (apart > room).astype(float)
    rest = budget * (1 + SLACK) - float(price @ chosen)
    return chosen, (gain > 0) & (np.abs(apart) <= room) & (price <= rest)


def _within_gap(
    chosen: NDArray[np.float64],
    proved: bool,
    gain: NDArray[Any],
    price: NDArray[Any],
    budget: float,
) -> tuple[NDArray[np.float64], float]:
    """(the choice, by which share of what no choice exceeds it may miss the best), with a warning where that is much."""
    if proved:
        return chosen, 0.0
    simple, _, bound = _at_hand(gain, price, budget)
    if gain @ simple > gain @ chosen:
        chosen = simple
    gap = max(0.0, 1 - float(gain @ chosen) / bound)
    if gap > GAP:
        warnings.warn(
            f"expected a choice within {GAP:.2%} of the best, got one that may miss {gap:.2%} of it: many players cost "
            "nearly in proportion to their values; buy among fewer players, or in fractions (whole=False)",
            GapWarning,
            stacklevel=3,
        )
    return chosen, gap


def _spend_the_rest(
    chosen: NDArray[Any], gain: NDArray[Any], price: NDArray[Any], budget: float
) -> None:
    """Add players that the rest of the budget buys: beside others, their gain is below a solver's tolerance."""
    spent, most = float(price @ chosen), budget * (1 + SLACK)
    left = np.flatnonzero((gain > 0) & (chosen == 0))
    for k in left[np.argsort(-gain[left], kind="stable")]:
        if spent + price[k] <= most:
            chosen[k] = 1.0
            spent = float(price @ chosen)


def _decision(
    values: Values, chosen: NDArray[Any], gap: float, price: NDArray[Any], budget: float
) -> Decision:
    """The choice of players as weights of examples."""
    start = 0.0 if math.isnan(values.empty) else values.empty
    spent = float(price @ chosen)
    players = np.asarray(values.players)
    if values.labels is None:
        weights, costs, ids = chosen, price, players
    else:
        index = named(values.labels, len(values.labels))[1]
        weights = chosen[index]
        costs = (price / np.bincount(index))[index]
        ids = np.arange(len(index))
    alike = np.unique(costs, return_inverse=True)[1]
    drawn = expected_choice(partial(random_subset, costs, spent), alike)
    by_player = drawn if values.labels is None else np.bincount(index, drawn) / np.bincount(index)
    return Decision(
        weights=weights, ids=ids[weights > 0], costs=costs,
        predicted=np.array([-(start + values.values @ chosen)]),
        baseline=np.array([-(start + values.values @ by_player)]),
        targets=np.array(["minus the utility"]),
        meta={
            "application": "valuation", "budget": float(budget), "spent": spent,
            "players": players[chosen > 0].tolist(), "kind": values.kind, "gap": gap,
        },
    )  # fmt: skip
