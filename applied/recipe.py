"""The words that every application shares: a decision, and the retraining that proves it.

An application rewrites its goal in terms of model outputs, plugs in the datamodel f̂(w) and
optimises; that gives a `Decision`. An optimum sits exactly where a first-order model is least
true, so a fourth step follows always: `verify` retrains with the decision and with a control of
the same cost, and shows predicted beside actual beside control.

    decision = selection.select(datamodel, budget=1000)
    verified = verify(decision, functools.partial(retrain, problem, recipe, outputs), seeds=5)
    print(verified.table())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribution_core.seeds import listed

# draws for a mean of random choices; how many weights they are at most, and their seed
DRAWS, DRAWN, SEED = 200, 4_000_000, 0xBA5E
SLACK = 1e-9  # relative; costs that differ by less are the same sum, added in another order
ROWS = 10  # a table shows so many targets one by one, then their mean


class Retrained(Protocol):
    """What a retraining returns: `.per_seed` [m, s, t] for m rows of weights, s seeds, t targets."""

    @property
    def per_seed(self) -> ArrayLike: ...


class Retrain(Protocol):
    """Trains once for every row of weights [m, n] and every seed, and reads the outputs."""

    def __call__(self, weights: NDArray[Any], *, seeds: list[int]) -> Retrained: ...


@dataclass(frozen=True, eq=False)
class Decision:
    """Training weights that an application chose, and what the datamodel predicts of them.

    Whatever was decided, the outputs are to become small: they are losses, or were made so.

    Args:
        weights: [n], 0 or 1, or fractional; the training weights that were chosen.
        ids: the names of the examples with weight > 0, in row order.
        predicted: [t], f̂ at `weights`, output units.
        baseline: [t], f̂ at the control's expected weights (a random choice of the same cost).
        targets: [t], names of the outputs.
        costs: [n], what weight 1 of each example costs; ones unless given.
        meta: how it was decided.
        draw: source of randomness -> weights [n] of a random choice under the same constraints; where costs
            are all there is, as with no quotas, it is left out.

    Raises:
        ValueError: shapes that do not fit, weights or costs that are negative or not finite.
    """

    weights: NDArray[Any]
    ids: NDArray[Any]
    predicted: NDArray[Any]
    baseline: NDArray[Any]
    targets: NDArray[Any]
    costs: NDArray[Any] = field(default_factory=lambda: np.ones(()))
    meta: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[np.random.Generator], NDArray[Any]] | None = None

    def __post_init__(self) -> None:
        n, t = np.size(self.weights), np.size(self.predicted)
        for name, array, shape in (
            ("weights", np.asarray(self.weights, dtype=float), (n,)),
            ("costs", np.asarray(self.costs, dtype=float), (n,)),
            ("ids", np.asarray(self.ids), (int((np.asarray(self.weights) > 0).sum()),)),
            ("predicted", np.asarray(self.predicted, dtype=float), (t,)),
            ("baseline", np.asarray(self.baseline, dtype=float), (t,)),
            ("targets", np.asarray(self.targets), (t,)),
        ):
            if name == "costs" and array.ndim == 0:
                array = np.full(n, float(array))
            if array.shape != shape:
                raise ValueError(
                    f"expected {name} of shape {shape}, got {array.shape}; pass one cost per weight, "
                    "one id per weight > 0, one prediction and one baseline per target"
                )
            if name in ("weights", "costs") and not (np.isfinite(array) & (array >= 0)).all():
                row = int((~(array >= 0) | np.isinf(array)).argmax())
                raise ValueError(
                    f"expected finite {name} >= 0, got {array[row]} in row {row}; mend that row"
                )
            object.__setattr__(self, name, array)

    @property
    def cost(self) -> float:
        """What the decision spends: costs · weights."""
        return float(self.costs @ self.weights)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; low and high are nan where one value allows none."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return f"{self.mean:.4g}" + (f" [{self.low:.4g}, {self.high:.4g}]" if known else "")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text whose columns stand below each other.

    >>> aligned([["a", "bcd"], ["ef", "g"]])
    ['a   bcd', 'ef  g']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def paired_interval(a: ArrayLike, b: ArrayLike = 0.0) -> Interval:
    """Mean of a − b over paired values, with its 95 % t interval: d̄ ± t₀.₉₇₅,ₛ₋₁ · sd(d)/√s.

    Args:
        a: [s], e.g. one value per training seed.
        b: [s], the values with the same seeds; or one number for all.

    Raises:
        ValueError: a and b are not paired, or are empty.

    >>> print(paired_interval([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]))  # the shared noise is gone
    1 [1, 1]
    """
    from scipy.stats import t as student

    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim != 1 or not len(first) or second.shape not in ((), first.shape):
        raise ValueError(
            f"expected paired values a [s] and b [s], got {first.shape} and {second.shape}; "
            "pass one value per seed, the same seeds in both"
        )
    d = first - second
    half = math.nan
    if len(d) > 1:
        half = float(student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return Interval(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half)


def expected_choice(
    draw: Callable[[np.random.Generator], NDArray[Any]], alike: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Weights [n] of random choices on average: the mean of up to 200 draws by a fixed seed.

    Examples that are alike, such as those of equal cost, are drawn equally often: the mean is taken over them, too.

    Args:
        draw: random generator -> weights [n] of a choice.
        alike: [n], a number for each kind of example.
    """
    n = len(alike)
    rng, many = np.random.default_rng(SEED), max(10, min(DRAWS, DRAWN // n))
    total = np.zeros(n)
    for _ in range(many):
        total += draw(rng)
    return (np.bincount(alike, total) / np.maximum(np.bincount(alike), 1))[alike] / many


def random_subset(costs: ArrayLike, budget: float, rng: np.random.Generator) -> NDArray[Any]:
    """Weights [n], 0 or 1, of random examples that spend `budget` as nearly as they can, never more.

    A random order is taken up to the first example that no longer fits; then examples that do
    fit, in the same order. With equal costs every subset of the right size is equally likely.

    Args:
        costs: [n], positive.
        budget: in units of cost.
        rng: source of randomness.

    Raises:
        ValueError: the budget is larger than the costs of all examples together.
    """
    costs = np.asarray(costs, dtype=float)
    if not budget <= costs.sum() * (1 + SLACK):
        raise ValueError(
            f"expected a budget of at most {costs.sum():g}, the cost of all {len(costs)} examples, "
            f"got {budget:g}; a random subset cannot spend more: pass the control's weights"
        )
    weights, left, slack = np.zeros(len(costs)), budget, SLACK * budget
    queue = rng.permutation(len(costs))
    while len(queue):
        fits = np.cumsum(costs[queue]) <= left + slack
        weights[queue[fits]] = 1.0
        left -= costs[queue[fits]].sum()
        queue = queue[~fits]
        queue = queue[costs[queue] <= left + slack]
    return weights


def random_controls(decision: Decision, seeds: Sequence[int]) -> NDArray[Any]:
    """Weights [s, n] of a random choice of the decision's cost and quotas, drawn anew for each seed."""
    # a stream of its own: one that a training also draws its batches from would tie the subset to
    # the order in which its examples are seen
    streams = [np.random.default_rng([seed, 0xC0]) for seed in seeds]
    if decision.draw is not None:
        return np.stack([decision.draw(rng) for rng in streams])
    return np.stack([random_subset(decision.costs, decision.cost, rng) for rng in streams])


@dataclass(frozen=True, eq=False)
class Verified:
    """A decision after retraining: predicted beside actual beside control, paired by seed.

    Args:
        decision: what was verified.
        actual: [s, t], outputs retrained with the decision's weights.
        control: name -> [s, t], outputs retrained with the control's weights, same seeds.
        cost: name -> what that control spent, the mean over seeds.
        seeds: [s], the training seeds.
    """

    decision: Decision
    actual: NDArray[Any]
    control: Mapping[str, NDArray[Any]]
    cost: Mapping[str, float]
    seeds: Sequence[int]

    @property
    def predicted(self) -> NDArray[Any]:
        """Outputs [t] that the datamodel predicts of the decision."""
        return self.decision.predicted

    def difference(self, name: str = "random") -> Interval:
        """Actual − control, mean over targets, with a paired 95 % t interval over seeds.

        Raises:
            KeyError: no control of that name; the message lists those there are.
        """
        if name not in self.control:
            raise KeyError(f"no control {name!r}; there are {list(self.control)}")
        return paired_interval(self.actual.mean(axis=1), self.control[name].mean(axis=1))

    def table(self) -> str:
        """The result as text: one row per target, their mean, and the difference to each control."""
        columns = {"actual": self.actual, **self.control}
        rows = [["target", "predicted", *columns]]

        def add(label: str, predicted: float, pick: Any) -> None:
            cells = [str(paired_interval(pick(values))) for values in columns.values()]
            rows.append([label, f"{predicted:.4g}", *cells])

        targets = self.decision.targets
        for j, target in enumerate(targets[:ROWS]):
            add(str(target), self.predicted[j], lambda values, j=j: values[:, j])
        if len(targets) > 1:
            label = f"mean of {len(targets)}"
            add(label, self.predicted.mean(), lambda values: values.mean(axis=1))
        spent = [f"{cost:g}" for cost in (self.decision.cost, *self.cost.values())]
        rows.append(["cost", "", *spent])
        lines = aligned(rows)
        expected = float((self.predicted - self.decision.baseline).mean())
        for name in self.control:
            line = f"actual - {name}: {self.difference(name)}, paired by seed"
            lines.append(line + (f"; predicted {expected:.4g}" if name == "random" else ""))
        many = len(self.seeds)
        lines.append(
            f"{many} training seeds: [95 % t interval over seeds]"
            if many > 1
            else "1 training seed: an interval needs >= 2 seeds"
        )
        return "\n".join(lines)


def verify(
    decision: Decision,
    retrain: Retrain,
    *,
    control: str | ArrayLike | Mapping[str, Any] = "random",
    seeds: int | Sequence[int] = 3,
) -> Verified:
    """Retrain with a decision and with controls, paired by training seed.

    Args:
        decision: what to prove.
        retrain: weights [m, n], seeds=[...] -> object with `.per_seed` [m, s, t]; the same outputs
            as the decision's targets, better read on data that was not used to decide. Called
            once for the decision and all given controls, and once per seed for "random".
        control: "random" (for each seed a fresh random subset that spends the same cost, under the
            quotas that the decision was made under), or
            weights [n] or [c, n], or a mapping of names to "random", weights [n], or weights [s, n], one
            draw for each seed.
        seeds: training seeds; a number k means 0 .. k−1.

    Raises:
        ValueError: no seeds, weights or outputs of a wrong shape, outputs that are not finite.
    """
    seeds = distinct_seeds(seeds)
    controls = _controls(control, decision, seeds)
    fixed = {name: weights for name, weights in controls.items() if weights.ndim == 1}
    t = len(decision.targets)
    outputs = retrained_outputs(
        retrain, np.stack([decision.weights, *fixed.values()]), seeds, t, ["decision", *fixed]
    )
    results = dict(zip(fixed, outputs[1:], strict=True))
    for name in (name for name in controls if name not in fixed):
        pairs = zip(controls[name], seeds, strict=True)
        rows = [
            retrained_outputs(retrain, row[None], [seed], t, [name])[0, 0] for row, seed in pairs
        ]
        results[name] = np.stack(rows)
    return Verified(
        decision=decision,
        actual=outputs[0],
        control={name: results[name] for name in controls},
        cost={name: float(np.mean(rows @ decision.costs)) for name, rows in controls.items()},
        seeds=seeds,
    )


def distinct_seeds(seeds: int | Sequence[int]) -> list[int]:
    """The list of training seeds; one that repeats would be counted as new evidence."""
    chosen = listed(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise ValueError(
            f"expected at least one seed >= 0, each once, got {seeds}; pass a number such as 3, "
            "or different seeds"
        )
    return chosen


def _controls(control: Any, decision: Decision, seeds: list[int]) -> dict[str, NDArray[Any]]:
    """Weights of every control by name: [n] if given, [s, n] if drawn anew for each seed."""
    if isinstance(control, str):
        control = {control: control}
    elif not isinstance(control, Mapping):
        given = np.atleast_2d(np.asarray(control, dtype=float))
        names = ["control"] if len(given) == 1 else [f"control {k + 1}" for k in range(len(given))]
        control = dict(zip(names, given, strict=True))
    if not control:
        raise ValueError("expected at least one control, got none; pass 'random' if in doubt")
    n, found = len(decision.weights), {}
    for name, weights in control.items():
        if isinstance(weights, str) and weights != "random":
            raise ValueError(
                f"expected control 'random' or weights, got {weights!r}; pass one of these"
            )
        if isinstance(weights, str):
            found[name] = random_controls(decision, seeds)
            continue
        array = np.asarray(weights, dtype=float)
        shapes = ((n,), (len(seeds), n))
        if array.shape not in shapes or not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(
                f"expected finite weights >= 0 of shape [n={n}] (or [seeds={len(seeds)}, n]) for control {name!r}, "
                f"got {array.shape}; pass one training weight per example"
            )
        found[name] = array
    return found


def retrained_outputs(
    retrain: Retrain, weights: NDArray[Any], seeds: list[int], t: int, names: list[str]
) -> NDArray[Any]:
    """Retrained outputs [m, s, t], checked."""
    found = retrain(weights, seeds=seeds)
    if not hasattr(found, "per_seed"):
        raise ValueError(
            "expected retrain to return outputs as .per_seed [rows, seeds, targets], as `retrain` and `refit` do, got "
            f"{type(found).__name__}"
        )
    outputs = np.asarray(found.per_seed, dtype=float)
    shape = (len(weights), len(seeds), t)
    if outputs.shape != shape:
        raise ValueError(
            f"expected retrained outputs [rows, seeds, targets] of shape {shape}, got "
            f"{outputs.shape}; retrain must read the outputs that the decision was made for"
        )
    bad = np.argwhere(~np.isfinite(outputs))
    if len(bad):
        row, seed, target = bad[0]
        raise ValueError(
            f"expected finite retrained outputs, got {outputs[row, seed, target]} for "
            f"{names[row]!r} with seed {seeds[seed]}; look at that training (learning rate, data)"
        )
    return outputs
