"""Selection: choose the training examples that make the predicted outputs smallest.

    min over w in [0, 1]^n of  mean_j f̂_j(w)     such that  Σ_i cost_i w_i = budget,
                                                   low_k ≤ Σ_{i in domain k} cost_i w_i / budget ≤ high_k

Outputs are losses, so small is good, and an example's gain is minus its mean score. The ranking of
first-order scores is more reliable than their zero point; so the budget is spent (`fill=True`), and
the decision counts how many chosen examples are predicted to hurt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import SLACK, Decision, expected_choice, random_subset
from attribution_core.datamodel import LinearDatamodel, average

SNAP = 1e-6  # of a weight and of the budget; what is smaller is rounding, in a solver or a long sum
LARGEST = 20_000  # examples; beyond this a general solver takes minutes

Quotas = Mapping[Any, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class _Limits:
    """What a choice may spend: costs [n]; low and high [k + 1], in cost, of the domains [n].

    Domains 0 .. k−1 are those with a quota; k stands for all others together, which are free.
    """

    costs: NDArray[Any]
    budget: float
    domain: NDArray[np.intp]
    names: list[Any]
    low: NDArray[Any]
    high: NDArray[Any]  # already no more than the domain holds
    fill: bool

    def spent(self, weights: NDArray[Any]) -> NDArray[Any]:
        """Cost [k + 1] that the weights spend in each domain."""
        return np.bincount(self.domain, self.costs * weights, minlength=len(self.low))


def select(
    datamodel: LinearDatamodel | Sequence[LinearDatamodel],
    *,
    budget: float,
    costs: ArrayLike | None = None,
    domains: ArrayLike | None = None,
    quotas: Quotas | None = None,
    objective: str = "mean",
    risk: float = 0.0,
    fill: bool = True,
    whole: bool = True,
    backend: str = "auto",
) -> Decision:
    """Choose the examples whose training minimises the predicted mean (or worst) output.

        min over w in [0, 1]^n of  max_j [ f̂_j(w) + risk · ‖C_jᵀ (w − anchor)‖₂ ],   Σ cost · w = budget

    with one column j, the mean over targets, for objective "mean", and one per target for "worst".
    C_j [n, M] are the scores of M datamodels minus their mean, divided by √M: the norm is the
    standard deviation over datamodels of the predicted change of output j since the anchor.

    Args:
        datamodel: scores [n, t]; or several, e.g. one per training seed, which are averaged.
        budget: what may be spent, in units of `costs`.
        costs: [n], positive, e.g. tokens; ones unless given.
        domains: [n], the domain of each example; needed for quotas only.
        quotas: domain -> (low, high), shares of the budget. A domain not named is free.
        objective: "mean" or "worst".
        risk: how many standard deviations count as loss; needs several datamodels.
        fill: spend the whole budget; if not, an example is only taken if predicted to help.
        whole: take an example or leave it. The fractional optimum is rounded down, except where
            rounding up fits: first where a low quota would be missed, then by largest fraction. What
            is left is spent on the next best that fit. The budget and high quotas are never
            exceeded. With backend "exact" at most one example per active constraint is fractional, so
            a low quota is missed by less than one example's cost, and the objective moves by at most
            the scores of those examples and of those that came in their place.
        backend: "exact" (sorting; a linear objective), "cvxpy" (any, n ≤ 20 000), or "auto".

    Returns:
        A decision whose baseline is f̂ of random choices of the same cost, of whole examples, as `verify` draws
        them: at equal costs every weight at what is spent / total cost, under quotas at its domain's share; else
        the mean of 200 draws (fewer above 20,000 examples). `draw` gives choices under quotas. Its meta holds
        `relaxed` and `achieved` (the objective of the fractional optimum and of the decision), `hurting` (how many
        chosen examples have a positive mean score), `short` (low quotas missed by rounding: domain -> missing cost).

    Raises:
        ValueError: a budget, costs or quotas that cannot be met; says which clash.
        RuntimeError: the solver found no optimum; names its status.

    Source: Engstrom, Feldmann & Mądry 2024 (DsDm) for the mean over targets.

    >>> f = LinearDatamodel([[-3.0], [-1.0], [2.0]], base=[9.0], anchor=1.0)
    >>> select(f, budget=2).ids.tolist()
    [0, 1]
    """
    # rewrite: the goal is one column, the mean output, or the worst of several columns
    models = [datamodel] if isinstance(datamodel, LinearDatamodel) else list(datamodel)
    f = models[0] if len(models) == 1 else average(models)
    if objective not in ("mean", "worst"):
        raise ValueError(f"expected objective 'mean' or 'worst', got {objective!r}; pass one")
    if not 0 <= risk < math.inf or (risk and len(models) < 2):
        raise ValueError(
            f"expected risk 0, or positive and several datamodels to disagree, got risk={risk} "
            f"with {len(models)} datamodel(s); pass a sequence, e.g. one per training seed"
        )
    columns = [m.mean() if objective == "mean" else m for m in models]

    # plug in: f̂(w) for the output, its spread over datamodels for the risk
    goal = columns[0] if len(columns) == 1 else average(columns)
    spread = np.stack([m.scores - goal.scores for m in columns]) * (risk / math.sqrt(len(models)))
    limits = _limits(len(f.scores), budget, costs, domains, quotas, fill, f.ids)

    # optimize
    linear = goal.scores.shape[1] == 1 and not risk
    method = _backend(backend, linear=linear)
    if method == "exact":
        best = _by_price(-goal.scores[:, 0], limits)
    else:
        best = _by_solver(goal, spread if risk else None, limits)
    weights = _whole(best, -goal.scores.mean(axis=1), limits, linear) if whole else best

    def value(w: NDArray[Any]) -> float:
        risks = np.linalg.norm((w - goal.anchor) @ spread, axis=0)
        return float((goal.predict(w) + risks).max())

    spent, chosen = limits.spent(weights), weights > 0
    missing = limits.low - spent
    alike = _of_cost(limits, float(spent.sum()))
    return Decision(
        weights=weights,
        ids=np.asarray(f.ids)[chosen],
        predicted=f.predict(weights),
        baseline=f.predict(_expected(alike, quotas=bool(quotas), whole=whole)),
        targets=np.asarray(f.targets),
        costs=limits.costs,
        meta={
            "application": "selection",
            "backend": method,
            "objective": objective,
            "risk": risk,
            "fill": fill,
            "budget": float(budget),
            "spent": float(spent.sum()),
            "relaxed": value(best),
            "achieved": value(weights),
            "hurting": int((f.scores[chosen].mean(axis=1) > 0).sum()),
            "short": {limits.names[k]: missing[k] for k in np.where(missing > SLACK * budget)[0]},
            "datamodel": dict(f.meta),
        },
        draw=partial(_random, alike, whole) if quotas else None,
    )


def relaxed(
    gains: ArrayLike,
    costs: ArrayLike | None,
    budget: float,
    *,
    domains: ArrayLike | None = None,
    quotas: Quotas | None = None,
    fill: bool = True,
) -> NDArray[Any]:
    """Fractional optimum w [n]: max Σ gains · w, 0 ≤ w ≤ 1, within budget and quotas; exact.

    O(n log n). At most one fractional weight per active constraint. Among examples of equal gain
    per cost the first rows win. Arguments and errors are those of `select`; gains [n] are minus
    the scores.

    >>> relaxed([3.0, 2.0, 1.0], [2, 2, 2], 3).tolist()
    [1.0, 0.5, 0.0]
    """
    gains = np.asarray(gains, dtype=float)
    if gains.ndim != 1 or not np.isfinite(gains).all():
        raise ValueError(f"expected finite gains [n], got shape {gains.shape}; mend those rows")
    return _by_price(gains, _limits(len(gains), budget, costs, domains, quotas, fill))


def _by_price(gains: NDArray[Any], limits: _Limits) -> NDArray[Any]:
    """Exact optimum of the linear program, by one price per unit of cost.

    Inside a domain examples are bought in order of gain per cost, so its gain is a concave function
    of its spending s_k. Maximising a sum of concave functions under Σ s_k = budget and
    low ≤ s_k ≤ high: spend every low, then buy the rest of all domains in one common order.
    """
    costs, domain, low, high = limits.costs, limits.domain, limits.low, limits.high
    order = np.argsort(-gains / costs, kind="stable")
    inside = order[np.argsort(domain[order], kind="stable")]  # by domain, best first

    # an example fills the stretch [start, start + cost] of its domain's spending
    held = limits.spent(np.ones(len(costs)))
    start = np.empty(len(costs))
    start[inside] = np.cumsum(costs[inside]) - costs[inside]
    start -= (np.cumsum(held) - held)[domain]

    # the part of that stretch between low and high is for sale
    sale = np.minimum(start + costs, high[domain]) - np.maximum(start, low[domain])
    sale = np.maximum(sale, 0.0)
    if not limits.fill:
        sale[gains <= 0] = 0.0
    left = max(limits.budget - low.sum(), 0.0)
    bought = np.diff(np.minimum(np.cumsum(sale[order]), left), prepend=0.0)
    spending = low + np.bincount(domain[order], bought, minlength=len(low))
    return _snap((spending[domain] - start) / costs, limits)


def _by_solver(goal: LinearDatamodel, spread: NDArray[Any] | None, limits: _Limits) -> NDArray[Any]:
    """The same program by cvxpy: a linear one (HiGHS), or with spread a second-order cone (Clarabel)."""
    n, t = goal.scores.shape
    if n > LARGEST:
        raise ValueError(
            f"expected at most {LARGEST} examples for this objective or backend, got {n}; group them "
            "first (datamodel.grouped, costs and domains summed alike), or use backend='exact'"
        )
    import cvxpy as cp

    # solvers stop at absolute tolerances, so outputs and costs are brought near 1 first
    scale = float(np.abs(goal.scores).max()) or 1.0
    price, w = limits.costs / limits.budget, cp.Variable(n, bounds=[0, 1])
    output = (goal.base - goal.anchor @ goal.scores) / scale + w @ (goal.scores / scale)
    if spread is not None:
        flat = spread.transpose(0, 2, 1).reshape(-1, n) / scale
        deviation = cp.reshape(flat @ (w - goal.anchor), (len(spread), t), order="C")
        output = output + cp.norm(deviation, 2, axis=0)
    constraints = [price @ w == 1 if limits.fill else price @ w <= 1]
    for k in range(len(limits.names)):
        rows = np.where(limits.domain == k)[0]
        share = price[rows] @ w[rows]
        constraints.append(share >= limits.low[k] / limits.budget)
        constraints.append(share <= limits.high[k] / limits.budget)
    problem = cp.Problem(cp.Minimize(cp.max(output)), constraints)
    problem.solve(solver="SCIPY" if spread is None else "CLARABEL")
    if problem.status != cp.OPTIMAL:
        raise RuntimeError(
            f"expected an optimum, got solver status {problem.status!r}; group examples "
            "(datamodel.grouped), or look for extreme scores and costs"
        )
    return _snap(w.value, limits)


def _snap(weights: NDArray[Any], limits: _Limits) -> NDArray[Any]:
    """Weights within [0, 1], those next to an end on it."""
    near = SNAP * np.minimum(1.0, limits.budget / limits.costs)
    weights = np.where(weights < near, 0.0, weights)
    return np.where(weights > 1 - near, 1.0, weights)


def _whole(best: NDArray[Any], gains: NDArray[Any], limits: _Limits, linear: bool) -> NDArray[Any]:
    """Fractional weights rounded down; then whatever fits into what is left, missed quotas first.

    The examples that were taken in part come first, the others by gain per cost: one that is longer than what is
    left must not keep the budget from shorter ones behind it. Where the budget need not be spent, they are those
    that help, which gains show for linear goals only.
    """
    weights = np.floor(best)
    spent, slack = limits.spent(weights), SLACK * limits.budget
    queue = np.lexsort((-gains / limits.costs, -best))
    queue = queue[
        (best[queue] < 1) & (limits.fill | (best[queue] > 0) | (linear & (gains[queue] > 0)))
    ]
    for mending in (True, False):
        left = limits.budget - spent.sum() + slack
        rows = queue[(limits.costs[queue] <= left) & (weights[queue] == 0)]
        if mending:
            rows = rows[(spent < limits.low - slack)[limits.domain[rows]]]
        cheapest = limits.costs[rows].min(initial=math.inf)
        for i in rows:
            if left < cheapest:
                break
            k, cost = limits.domain[i], limits.costs[i]
            wanted = not mending or spent[k] < limits.low[k] - slack
            if wanted and cost <= left and spent[k] + cost <= limits.high[k] + slack:
                weights[i] = 1.0
                spent[k] += cost
                left -= cost
    if best.any() and not weights.any():
        raise ValueError(
            f"expected a budget and quotas for at least one whole example, got {limits.budget:g} where the "
            f"cheapest one costs {limits.costs.min():g}; raise them, or pass whole=False"
        )
    return weights


def _of_cost(limits: _Limits, cost: float) -> _Limits:
    """The same quotas, in cost, for choices that spend what a decision spent; lows that it missed are lowered."""
    low = limits.low * min(1.0, cost / max(limits.low.sum(), 1e-300))
    return replace(limits, budget=cost, low=low, fill=True)


def _random(limits: _Limits, whole: bool, rng: np.random.Generator) -> NDArray[Any]:
    """Weights [n] of a random choice: what is chosen by scores that are a random order."""
    gains = limits.costs * (rng.permutation(len(limits.costs)) + 1.0)
    best = _by_price(gains, limits)
    return _whole(best, gains, limits, linear=True) if whole else best


def _expected(limits: _Limits, *, quotas: bool, whole: bool) -> NDArray[Any]:
    """Weights [n] of random choices on average."""
    costs, n = limits.costs, len(limits.costs)
    if np.ptp(costs) <= SLACK * costs.max():
        return _shares(limits) if quotas else np.full(n, limits.budget / costs.sum())
    # as `random_controls` draws them
    draw = (
        partial(_random, limits, whole) if quotas else partial(random_subset, costs, limits.budget)
    )
    alike = np.unique([limits.domain, costs], axis=1, return_inverse=True)[1]
    return expected_choice(draw, alike.ravel())


def _shares(limits: _Limits) -> NDArray[Any]:
    """Weights [n] at one share τ of every domain, within its quota: random choices among equal costs.

    Of many examples in random order domain k spends clip(τ held_k, low_k, high_k), with τ such that the budget is spent.
    """
    held = limits.spent(np.ones(len(limits.costs)))
    some = np.maximum(held, 1e-300)  # the free domains may hold nothing
    shares = np.unique([*limits.low / some, *limits.high / some, 0.0, 1.0])
    spending = np.clip(shares[:, None] * held, limits.low, limits.high)
    share = np.interp(limits.budget, spending.sum(axis=1), shares)
    return (np.clip(share * held, limits.low, limits.high) / some)[limits.domain]


def _backend(backend: str, *, linear: bool) -> str:
    """The way to solve: sorting where the objective is linear, a solver otherwise."""
    if backend not in ("auto", "exact", "cvxpy"):
        raise ValueError(f"expected backend 'auto', 'exact' or 'cvxpy', got {backend!r}; pass one")
    if backend == "exact" and not linear:
        raise ValueError(
            "expected objective 'mean' without risk for backend 'exact', got one that sorting "
            "cannot solve; pass backend='auto'"
        )
    return ("exact" if linear else "cvxpy") if backend == "auto" else backend


def _limits(
    n: int,
    budget: float,
    costs: ArrayLike | None,
    domains: ArrayLike | None,
    quotas: Quotas | None,
    fill: bool,
    ids: NDArray[Any] | None = None,
) -> _Limits:
    """The constraints, in units of cost, after every check that they can be met together."""
    cost = np.ones(n) if costs is None else np.asarray(costs, dtype=float)
    if cost.shape != (n,):
        raise ValueError(f"expected costs [n={n}], got {cost.shape}; pass one per example")
    bad = ~(np.isfinite(cost) & (cost > 0))
    if bad.any():
        names = np.arange(n) if ids is None else ids
        raise ValueError(
            f"expected positive, finite costs, got {cost[bad][0]:g} and the like for "
            f"{int(bad.sum())} examples, first ids {names[bad][:5].tolist()}; drop empty ones first"
        )
    if not 0 < budget < math.inf:
        raise ValueError(f"expected a positive, finite budget, got {budget}; say what to spend")
    total = float(cost.sum())
    if budget > total * (1 + SLACK):
        raise ValueError(
            f"expected a budget of at most {total:g}, the cost of the whole pool, got {budget:g}; "
            "lower it, or enlarge the pool"
        )
    quotas = quotas or {}
    domain = _domains(n, domains, quotas)
    shares = np.array([*quotas.values(), (0.0, 1.0)], dtype=float)  # all other domains are free
    held = np.bincount(domain, cost, minlength=len(shares))
    low, high = shares.T * budget
    limits = _Limits(cost, float(budget), domain, [*quotas], low, np.minimum(high, held), fill)
    _check_together(limits, held)
    return limits


def _domains(n: int, domains: ArrayLike | None, quotas: Quotas) -> NDArray[np.intp]:
    """Row of `quotas` [n] for each example, len(quotas) for examples of a free domain."""
    for name, quota in quotas.items():
        if np.shape(quota) != (2,) or not 0 <= quota[0] <= quota[1] <= 1:
            raise ValueError(
                f"expected shares 0 <= low <= high <= 1, got {quota} for {name!r}; "
                "a quota is a part of the budget, e.g. (0.1, 0.3)"
            )
    if domains is None:
        if quotas:
            raise ValueError(
                f"expected domains [n={n}] beside quotas, got none; pass one label per example"
            )
        return np.zeros(n, dtype=np.intp)
    labels = np.asarray(domains)
    if labels.shape != (n,):
        raise ValueError(f"expected domains [n={n}], got {labels.shape}; pass one per example")
    labels = labels.tolist()
    known = set(labels)
    unknown = [name for name in quotas if name not in known]
    if unknown:
        raise ValueError(
            f"expected quotas for domains among {sorted(known, key=str)[:20]}, got {unknown}; "
            "mend the names"
        )
    row = {name: k for k, name in enumerate(quotas)}
    return np.array([row.get(label, len(row)) for label in labels], dtype=np.intp)


def _check_together(limits: _Limits, held: NDArray[Any]) -> None:
    """Lows within what the domains hold and within the budget; highs enough to spend it."""
    low, high, budget = limits.low, limits.high, limits.budget
    slack = SLACK * budget
    for name, needs, holds in zip(limits.names, low, held, strict=False):
        if needs > holds + slack:
            raise ValueError(
                f"expected domain {name!r} to hold its low quota, got {holds:g} where "
                f"{needs / budget:g} of budget {budget:g} needs {needs:g}; lower either"
            )
    if low.sum() > budget + slack:
        lows = [f"{name!r} {x / budget:g}" for name, x in zip(limits.names, low, strict=False) if x]
        raise ValueError(
            f"expected low quotas that add up to at most 1, got {' + '.join(lows)} = "
            f"{low.sum() / budget:g}; lower one of them"
        )
    if limits.fill and high.sum() < budget - slack:
        ends = [
            f"{name!r} at {most:g} ({'all it holds' if most == holds else 'its high quota'})"
            for name, most, holds in zip(limits.names, high, held, strict=False)
        ]
        ends += [f"free domains at {high[-1]:g} (all they hold)"] if high[-1] else []
        raise ValueError(
            f"expected to spend budget {budget:g}, got exhausted domains: {', '.join(ends)}; "
            f"{budget - high.sum():g} is missing: raise high quotas, add examples, or pass fill=False"
        )
