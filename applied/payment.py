"""What to pay for data, and which to buy: values turned into money.

High is good here: of a loss, pass `-values`. `pay` needs values with a positive sum; `buy` only needs some positive
values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import SLACK, Decision
from applied.worth import Values
from attribution_core.data import named

TIGHT = {
    "mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "mip_feasibility_tolerance": 1e-10,
    "primal_feasibility_tolerance": 1e-10, "mip_max_nodes": 2000,
}  # of HiGHS, whose 1e-6 would let another choice pass for the best; no end of nodes, where prices follow values  # fmt: skip
EVERY = 40  # players, of whom every choice is looked at
GAP = (
    1e-4  # of the most that can be gained, beyond which a choice not proved to be the best is told
)


ByPlayer = ArrayLike | Mapping[Any, float]  # in the order of values.players, or by name


@dataclass(frozen=True, eq=False)
class Payments:
    """Who gets what.

    Args:
        amounts: [k], they add up to the budget.
        low, high: [k] what each would get at the ends of its value's 95 % interval, the others' values
            as they are, before floors and caps; nan where no interval is known.
        proportional: [k], shares of the budget by worth alone.
        players: [k] names.
        budget: what is paid out.
    """

    amounts: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    proportional: NDArray[np.float64]
    players: NDArray[Any]
    budget: float

    def table(self) -> str:
        """One line a player, the largest payment first."""
        width = max([6, *(len(str(p)) for p in self.players)])
        lines = [f"{'player':{width}}  {'payment':>10}  {'by worth':>10}  95 % interval by worth"]
        # cents are too coarse for a small budget
        cents = max(2, 3 - math.floor(math.log10(self.budget))) if self.budget > 0 else 2
        paid, worth, low, high = (
            [f"{x:.{cents}f}" for x in some]
            for some in (self.amounts, self.proportional, self.low, self.high)
        )
        for i in np.argsort(-self.amounts, kind="stable"):
            ends = f"[{low[i]}, {high[i]}]" if math.isfinite(self.low[i]) else "-"
            lines.append(f"{self.players[i]!s:{width}}  {paid[i]:>10}  {worth[i]:>10}  {ends}")
        return "\n".join([*lines, f"{'all':{width}}  {self.amounts.sum():10.{cents}f}"])


def pay(
    values: Values,
    budget: float,
    *,
    floors: ByPlayer = 0.0,
    caps: ByPlayer | None = None,
    discount: float = 0.0,
) -> Payments:
    """Share a budget in proportion to worth, within limits.

        worth_i = max(value_i − discount · standard error_i, 0)
        min Σ_i (x_i − s_i)² / s_i,  s_i = budget · worth_i / Σ worth     s.t.  Σ x = budget, floor ≤ x ≤ cap

    Its optimum is x_i = clip(c · worth_i, floor_i, cap_i), one c for all: whoever is at no limit is paid in
    proportion. Players without worth get their floor.

    Args:
        values: high is good; of a loss, pass `-values`.
        budget: to be paid out in full.
        floors, caps: one number, [k] in the order of `values.players`, or player -> limit; payments are never negative.
        discount: standard errors that are taken off: what is uncertain is paid less.

    Raises:
        ValueError: values with a negative sum (a loss, whose sign was not turned); no player
            with worth; standard errors that a discount needs; limits that the budget cannot meet.

    Source: Shapley shares as payments: Jia et al. 2019; Wang et al. 2024 (royalties).

    >>> one = Values([3.0, 1.0, -1.0], [0.0, 0.0, 0.0], ["a", "b", "c"], [[3.0], [1.0], [-1.0]])
    >>> pay(one, 100).amounts.round(3).tolist()
    [75.0, 25.0, 0.0]
    """
    # rewrite: from what a player adds to what a player is worth
    _good_is_high(values)
    k = len(values)
    _refuse_discount(values, discount)
    off = discount * values.standard_error if discount else 0.0
    worth = np.maximum(values.values - off, 0.0)
    if not worth.sum() > 0:
        raise ValueError(
            f"expected a player of positive worth at discount {discount:g}, got none; lower it"
        )

    # plug in: shares of the budget
    if not (isinstance(budget, Real) and 0 < budget < math.inf):
        raise ValueError(f"expected a positive budget, got {budget!r}")
    share = budget * worth / worth.sum()
    floor, cap = (
        _limits(name, limits, values)
        for name, limits in (("floors", floors), ("caps", budget if caps is None else caps))
    )
    _check_limits(floor, cap, share, budget)

    # optimize
    amounts = _within(share, floor, np.where(share > 0, cap, floor), budget)
    ends = []
    for end in (values.values - values.half, values.values + values.half):
        end = np.maximum(end - off, 0.0)
        others = worth.sum() - worth
        total = others + end
        ends.append(np.divide(budget * end, total, out=np.zeros(k), where=~(total == 0)))
    return Payments(amounts, ends[0], ends[1], share, np.asarray(values.players), float(budget))


def _within(
    share: NDArray[Any], floor: NDArray[Any], cap: NDArray[Any], budget: float
) -> NDArray[Any]:
    """clip(c · share, floor, cap) that adds up to the budget, by a search for the one number c.

    The program's optimum in closed form: a solver for quadratic programs fails where a share is tiny, since the
    objective divides by it.
    """
    from scipy.optimize import brentq

    def over(c: float) -> float:
        return float(np.clip(c * share, floor, cap).sum()) - budget

    if over(0.0) >= 0:  # the floors are all there is
        return floor.copy()
    most = 1.0
    while over(most) < 0 and ((share > 0) & (most * share < cap)).any():
        most *= 2
    if over(most) <= 0:  # the caps are
        return np.clip(most * share, floor, cap)
    c = brentq(over, 0.0, most, xtol=1e-300, rtol=4 * np.finfo(float).eps)
    return np.clip(c * share, floor, cap)


def _limits(name: str, limits: ByPlayer, values: Values) -> NDArray[np.float64]:
    """One limit for each of k players."""
    given, k = _in_order(name, limits, values), len(values)
    if given.shape not in ((), (1,), (k,)):
        raise ValueError(f"expected {name} as one number or one a player [{k}], got {given.shape}")
    return np.broadcast_to(given, (k,))


def _in_order(name: str, given: ByPlayer, values: Values) -> NDArray[np.float64]:
    """Numbers in the order of `values.players`; of a mapping by name, whose players must be those valued."""
    if not isinstance(given, Mapping):
        return np.asarray(given, dtype=float)
    players = np.asarray(values.players).tolist()
    missing = [player for player in players if player not in given]
    unknown = [player for player in given if player not in set(players)]
    if missing or unknown:
        words = [f"none of {missing[:5]}"] * bool(missing) + [f"some of {unknown[:5]}"] * bool(
            unknown
        )
        raise ValueError(
            f"expected {name} of exactly the players in values.players, got {' and '.join(words)}"
        )
    return np.array([given[player] for player in players], dtype=float)


def _refuse_discount(values: Values, discount: float) -> None:
    """Raise for a negative discount, and for one without standard errors."""
    if not 0 <= discount < math.inf:
        raise ValueError(f"expected a discount of 0 or more standard errors, got {discount}")
    if discount and not np.isfinite(values.standard_error).all():
        raise ValueError(
            "expected standard errors for a discount, got none; value with several seeds, runs or "
            "permutations, or use discount=0"
        )


def _are_values(values: Values) -> None:
    """Raise for anything but Values."""
    if not isinstance(values, Values):
        raise ValueError(
            f"expected Values, got {type(values).__name__}; make them by applied.valuation.values"
        )


def _good_is_high(values: Values) -> None:
    """Raise where the values look like those of a loss, or are known up to a constant only."""
    _are_values(values)
    total, size = float(values.values.sum()), float(np.abs(values.values).sum())
    if total <= 1e-6 * size:
        raise ValueError(
            f"expected values of which high is good, got a sum of {total:.4g}; if the outputs are losses, "
            "data lower them: pass -values. A sum of 0 means values up to a common constant: also "
            "retrain on everyone and on nobody"
        )


class SignWarning(UserWarning):
    """Values that may be those of a loss, whose sign was not turned."""


class GapWarning(UserWarning):
    """A purchase that may miss some of the best one's gain; the message says how much."""


def _someone_is_good(values: Values) -> None:
    """Raise where no value is positive, or their signs say nothing: then there is nothing to buy."""
    _are_values(values)
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


def _check_limits(
    floor: NDArray[Any], cap: NDArray[Any], share: NDArray[Any], budget: float
) -> None:
    if (floor < 0).any() or (floor > cap).any() or np.isnan([*floor, *cap]).any():
        raise ValueError("expected 0 <= floors <= caps, got others")
    if floor.sum() > budget * (1 + SLACK):
        raise ValueError(f"expected floors within the budget {budget:g}, got {floor.sum():g}")
    most = np.where(share > 0, cap, floor).sum()
    if most < budget * (1 - SLACK):
        raise ValueError(
            f"expected caps that let the budget {budget:g} be paid, got at most {most:g} for those of worth; "
            "raise the caps or lower the budget"
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
        choice, and `.meta["gap"]` is 0, but where more than 40 players cost nearly in proportion to their values: of
        their many choices that are as good as equal, one is taken, and the gap is the share of the most that
        can be gained by which it may miss the best, usually 1e-6.

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
    price = _in_order("prices", prices, values)
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
    _refuse_discount(values, discount)

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

    if whole and len(gain) <= EVERY:
        return _of_every_choice(gain, price, budget * (1 + SLACK)), True
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


def _of_every_choice(gain: NDArray[Any], price: NDArray[Any], most: float) -> NDArray[np.float64]:
    """max gain · x with price · x ≤ most, x in {0, 1}, of equals the cheapest, in time and memory of 2^(k/2).

    Every choice among the first half of the players is met with the best among the others that the rest buys (Horowitz &
    Sahni 1974): prices may be as near to proportional to gains as they like.
    """
    half = len(gain) // 2
    (gain_1, price_1), (gain_2, price_2) = (
        (_sums(gain[part]), _sums(price[part])) for part in (slice(half), slice(half, None))
    )
    order = np.argsort(price_2, kind="stable")
    best = np.maximum.accumulate(gain_2[order])
    better = np.append(True, best[1:] > best[:-1])
    at_best = order[np.maximum.accumulate(np.where(better, np.arange(len(order)), 0))]
    fits = np.searchsorted(price_2[order], most - price_1, side="right") - 1
    total = np.where(fits >= 0, gain_1 + best[fits], -np.inf)
    equal = np.flatnonzero(total == total.max())
    one = int(equal[(price_1[equal] + price_2[at_best[fits[equal]]]).argmin()])
    other = int(at_best[fits[one]])
    bits = [one >> k & 1 for k in range(half)] + [other >> k & 1 for k in range(len(gain) - half)]
    return np.array(bits, dtype=float)


def _sums(x: NDArray[Any]) -> NDArray[np.float64]:
    """The sums [2^k] of all subsets of x [k]; bit i of a place says whether x_i is in it."""
    sums = np.zeros(1)
    for one in x:
        sums = np.concatenate([sums, sums + one])
    return sums


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
    even = spent / price.sum()  # of every player, at the same cost
    players = np.asarray(values.players)
    if values.labels is None:
        weights, costs, ids = chosen, price, players
    else:
        index = named(values.labels, len(values.labels))[1]
        weights = chosen[index]
        costs = (price / np.bincount(index))[index]
        ids = np.arange(len(index))
    return Decision(
        weights=weights, ids=ids[weights > 0], costs=costs,
        predicted=np.array([-(start + values.values @ chosen)]),
        baseline=np.array([-(start + even * values.values.sum())]),
        targets=np.array(["minus the utility"]),
        meta={
            "application": "valuation", "budget": float(budget), "spent": spent,
            "players": players[chosen > 0].tolist(), "kind": values.kind, "gap": gap,
        },
    )  # fmt: skip
