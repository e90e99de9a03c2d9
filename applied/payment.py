"""What to pay for data: values turned into money. High is good here: of a loss, pass `-values`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import SLACK
from applied.worth import Values

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
    refuse_discount(values, discount)
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
    given, k = in_order(name, limits, values), len(values)
    if given.shape not in ((), (1,), (k,)):
        raise ValueError(f"expected {name} as one number or one a player [{k}], got {given.shape}")
    return np.broadcast_to(given, (k,))


def in_order(name: str, given: ByPlayer, values: Values) -> NDArray[np.float64]:
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


def refuse_discount(values: Values, discount: float) -> None:
    """Raise for a negative discount, and for one without standard errors."""
    if not 0 <= discount < math.inf:
        raise ValueError(f"expected a discount of 0 or more standard errors, got {discount}")
    if discount and not np.isfinite(values.standard_error).all():
        raise ValueError(
            "expected standard errors for a discount, got none; value with several seeds, runs or "
            "permutations, or use discount=0"
        )


def are_values(values: Values) -> None:
    """Raise for anything but Values."""
    if not isinstance(values, Values):
        raise ValueError(
            f"expected Values, got {type(values).__name__}; make them by applied.valuation.values"
        )


def _good_is_high(values: Values) -> None:
    """Raise where the values look like those of a loss, or are known up to a constant only."""
    are_values(values)
    total, size = float(values.values.sum()), float(np.abs(values.values).sum())
    if total <= 1e-6 * size:
        raise ValueError(
            f"expected values of which high is good, got a sum of {total:.4g}; if the outputs are losses, "
            "data lower them: pass -values. A sum of 0 means values up to a common constant: also "
            "retrain on everyone and on nobody"
        )


class SignWarning(UserWarning):
    """Values that may be those of a loss, whose sign was not turned."""


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
