"""applied.audit.flip_budget: fewest rows against brute force, and against victims that are exactly linear."""

from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import nn

from applied.audit.flip_budget import FlipBudgets
from applied.poisoning import ThreatModel, budget_to_flip
from attribution_core import LinearDatamodel, Outputs, Problem, cross_entropy, influence, margin
from attribution_core.refitting import refit, refitted

N, CLASSES = 7, 3


@dataclass
class World:
    """Margins base + (w − clean) S · factor for a victim, with factor 1 for a surrogate."""

    scores: np.ndarray  # [N, t]
    base: np.ndarray  # [t]
    factor: float = 1.0
    trained: list = field(default_factory=list)
    clean: np.ndarray = None

    def surrogate(self, table, w):
        self.clean = w.copy()
        names = np.array([f"out{j}" for j in range(len(self.base))])
        return LinearDatamodel(self.scores, self.base, w, targets=names)

    def value(self, w):
        return self.base + self.factor * (np.asarray(w) - self.clean) @ self.scores

    def victim(self, table, weights, seeds):
        assert len(table.train) == len(self.scores)
        self.trained.append(len(weights))
        return SimpleNamespace(per_seed=np.repeat(self.value(weights)[:, None], len(seeds), axis=1))


def labelled(n=N, seed=0):
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(np.r_[0, 1, 2, rng.integers(0, 3, n - 3)])
    return Problem(nn.Linear(2, 3), cross_entropy, (torch.from_numpy(rng.normal(size=(n, 2))), y))


def world(kind, n=N, t=5, seed=0, reach=(0.5, 4.0), **settings):
    rng = np.random.default_rng(seed)
    rows = n * CLASSES if kind == "labels" else n
    return World(rng.normal(size=(rows, t)), rng.uniform(*reach, t), **settings)


def changes(kind, problem, clean):
    """Every choice of what to do with the rows: (changed rows, weights), the few first."""
    n = problem.n
    y = problem.train.columns[1].numpy()
    for size in range(1, n + 1):
        for rows in combinations(range(n), size):
            if kind == "rows":
                w = clean.copy()
                w[list(rows)] = 0
                yield rows, w
                continue
            for shifts in product((1, 2), repeat=size):
                labels = y.copy()
                labels[list(rows)] = (labels[list(rows)] + shifts) % CLASSES
                w = np.zeros(n * CLASSES)
                w[np.arange(n) * CLASSES + labels] = 1
                yield rows, w


def fewest(kind, problem, truth, most, quota=None, sources=None):
    """[t] by brute force."""
    found = np.full(len(truth.base), np.inf)
    for rows, w in changes(kind, problem, truth.clean):
        if len(rows) > most:
            break
        if quota and max(sum(sources[i] == s for i in rows) for s in sources) > quota:
            continue
        turned = truth.value(w) <= 0
        found[turned] = np.minimum(found[turned], len(rows))
    return found


SOURCES = list("aaabbbc")


@pytest.mark.parametrize("quota", [None, 1, 2])
@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("seed", [0, 1])
def test_predicted_is_the_fewest_by_brute_force(kind, quota, seed):
    """Whole rows, though the program is solved over shares of rows; and a linear victim turns there."""
    problem, truth = labelled(seed=seed), world(kind, seed=seed)
    most = 5 if quota is None else 3
    threat = ThreatModel(most, kind, source_quota=quota)
    sources = SOURCES if quota else None
    found = budget_to_flip(problem, threat, truth.surrogate, truth.victim, sources=sources)
    expected = fewest(kind, problem, truth, most, quota, SOURCES)
    np.testing.assert_array_equal(found.predicted, expected)
    np.testing.assert_array_equal(found.actual, expected)
    assert len(np.unique(expected)) > 1  # not the same for all
    np.testing.assert_array_equal(found.margin, truth.base)
    assert found.targets.tolist() == [f"out{j}" for j in range(5)]
    for j, k in enumerate(expected):
        rows, into = found.rows[j], found.into[j]
        assert len(rows) <= most
        assert len(set(rows)) == len(rows)
        if np.isfinite(k):  # its own rows turn it, and one fewer do not
            for many, turned in ((int(k), True), (int(k) - 1, False)):
                w = truth.clean.copy()
                w[found.versions.current(w)[rows[:many]]] = 0
                w[into[:many][into[:many] >= 0]] = 1
                assert (truth.value(w)[j] <= 0) == turned
                if quota and many:
                    assert max(sum(SOURCES[i] == s for i in rows[:many]) for s in SOURCES) <= quota
        if kind == "labels":
            assert (into // CLASSES == rows).all()
        else:
            assert (into == -1).all()


def test_out_of_reach_is_infinite():
    problem = labelled()
    truth = world("labels", reach=(200.0, 300.0))
    found = budget_to_flip(problem, ThreatModel(N, "labels"), truth.surrogate, truth.victim)
    assert np.isinf(found.predicted).all()
    assert np.isinf(found.actual).all()
    helpful = World(-np.ones((N, 2)), np.ones(2))  # leaving rows out only raises it
    alone = budget_to_flip(problem, ThreatModel(N, "rows"), helpful.surrogate, helpful.victim)
    assert np.isinf(alone.predicted).all()
    assert np.isinf(alone.actual).all()
    assert all(len(rows) == 0 for rows in alone.rows)
    assert not sum(helpful.trained)
    text = alone.table()
    assert text.count("inf") == 4
    assert "within" not in text
    assert np.isnan(budget_to_flip(problem, ThreatModel(3, "labels"), truth.surrogate).actual).all()


def test_a_margin_of_nearly_nothing_takes_one_row():
    """Not none, and its victim is asked."""
    truth = World(np.ones((N, 1)), np.array([1e-9]))
    found = budget_to_flip(labelled(), ThreatModel(3, "rows"), truth.surrogate, truth.victim)
    assert found.predicted.tolist() == found.actual.tolist() == [1.0]


def test_rows_that_just_suffice_suffice():
    """At an output of exactly 0 it has turned: a margin of 3 takes 3 rows of 1, not 4."""
    truth = World(np.ones((N, 2)), np.array([3.0, 5.0]))
    found = budget_to_flip(labelled(), ThreatModel(6, "rows"), truth.surrogate, truth.victim)
    assert found.predicted.tolist() == found.actual.tolist() == [3.0, 5.0]


def test_the_budget_bounds_the_search():
    truth = world("rows", n=9)
    free = budget_to_flip(labelled(9), ThreatModel(9, "rows"), truth.surrogate, truth.victim)
    tight = budget_to_flip(labelled(9), ThreatModel(2, "rows"), truth.surrogate, truth.victim)
    for name in ("predicted", "actual"):
        whole, cut = getattr(free, name), getattr(tight, name)
        np.testing.assert_array_equal(cut, np.where(whole <= 2, whole, np.inf))
    assert 0 < np.isfinite(tight.predicted).sum() < np.isfinite(free.predicted).sum()


def test_row_order_does_not_matter():
    problem, truth = labelled(), world("labels")
    order = np.random.default_rng(1).permutation(N)
    x, y = problem.train.columns
    places = (order[:, None] * CLASSES + np.arange(CLASSES)).ravel()
    other = World(truth.scores[places], truth.base)
    threat = ThreatModel(5, "labels")
    first = budget_to_flip(problem, threat, truth.surrogate)
    second = budget_to_flip(replace(problem, train=(x[order], y[order])), threat, other.surrogate)
    np.testing.assert_array_equal(first.predicted, second.predicted)
    for one, two in zip(first.rows, second.rows, strict=True):
        assert order[two].tolist() == one.tolist()


# --- what it really takes --------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.2, 0.5, 1.0, 2.0, 7.0])
def test_bisection_finds_what_a_linear_scan_finds(factor):
    n = 60
    truth = world("labels", n=n, t=8, seed=3, reach=(5.0, 30.0), factor=factor)
    found = budget_to_flip(
        labelled(n), ThreatModel(40, "labels"), truth.surrogate, truth.victim, seeds=2
    )
    for j in range(8):
        scan = np.inf
        for k in range(1, len(found.rows[j]) + 1):
            w = truth.clean.copy()
            w[found.versions.current(w)[found.rows[j][:k]]] = 0
            w[found.into[j][:k]] = 1
            if truth.value(w)[j] <= 0:
                scan = k
                break
        assert found.actual[j] == scan
    assert np.isfinite(found.actual).any()
    # doubling and halving: 2 log2(40) tables at most, not 40
    assert len(truth.trained) <= 12


def test_seeds_decide_by_their_mean():
    truth = World(np.ones((N, 1)), np.array([2.5]))
    asked = []

    def victim(table, weights, seeds):
        asked.append(list(seeds))
        noise = np.array([1.4, -1.4])[: len(seeds)]
        return SimpleNamespace(per_seed=truth.value(weights)[:, None] + noise[:, None])

    one, two = (
        budget_to_flip(labelled(), ThreatModel(6, "rows"), truth.surrogate, victim, seeds=seeds)
        for seeds in ([8], [8, 9])
    )
    assert one.actual.tolist() == [4.0]  # 2.5 + 1.4 needs four rows
    assert two.actual.tolist() == [3.0]
    assert asked[0] == [8]
    assert asked[-1] == [8, 9]


def test_calibration_is_the_factor_from_predicted_to_actual():
    """A victim that is moved twice as far needs half the rows, but for rounding up."""
    n = 200
    rng = np.random.default_rng(0)
    truth = World(1.0 + 0.01 * rng.random((n, 12)), rng.uniform(40, 120, 12), factor=2.0)
    found = budget_to_flip(labelled(n), ThreatModel(n, "rows"), truth.surrogate, truth.victim)
    factor = found.calibration()
    # both are rounded up to whole rows, of 40 to 120 and 20 to 60: each ratio errs by 1/20 at most
    assert factor.mean == pytest.approx(0.5, rel=0.05)
    assert factor.low < factor.mean < factor.high
    np.testing.assert_allclose(found.ratio, 2.0, rtol=0.05)
    logs = -np.log(found.ratio)
    assert factor.mean == pytest.approx(np.exp(logs.mean()), rel=1e-12)
    assert found.within(0.3) == 0.0
    assert found.within(1.1) == 1.0


def budgets(predicted, actual):
    t = len(predicted)
    none = [np.zeros(0, dtype=int)] * t
    return FlipBudgets(
        np.array([f"o{j}" for j in range(t)]), np.linspace(1, 2, t), np.array(predicted, dtype=float),
        np.array(actual, dtype=float), [np.full(1, j) for j in range(t)], none, None,
    )  # fmt: skip


def test_numbers_and_table_of_outputs():
    inf, nan = np.inf, np.nan
    found = budgets([10, 1, inf, 7, 20, 3], [12, 2, 5, inf, 10, nan])
    np.testing.assert_allclose(found.ratio, [10 / 12, 0.5, 2.0])
    # 10 of 12 is within 30 %, 1 of 2 is one row off, 20 of 10 is neither
    assert found.within() == pytest.approx(2 / 3)
    assert found.within(0.1) == pytest.approx(1 / 3)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["o1", "o5", "o3", "o0", "o4", "o2"]
    assert lines[-1].startswith("67% within 30 %; actual = ")
    assert len(found.table(2).splitlines()) == 4
    assert found.some(slice(None, None, 2)).targets.tolist() == found.targets[::2].tolist()
    few = found.some([4, 0])
    assert few.targets.tolist() == ["o4", "o0"]
    assert few.predicted.tolist() == [20, 10]
    assert few.actual.tolist() == [10, 12]
    assert [rows.tolist() for rows in few.rows] == [[4], [0]]
    assert found.some(np.isfinite(found.actual)).targets.tolist() == ["o0", "o1", "o2", "o4"]
    assert "within" not in found.some([2, 3, 5]).table()  # no output turns in both


# --- caution ---------------------------------------------------------------------------------------


def ensemble(kind, m=4, seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    truth = world(kind, n=12, t=6, seed=seed, reach=(1.0, 4.0))
    moved = [truth.scores + spread * rng.normal(size=truth.scores.shape) for _ in range(m)]
    return lambda table, w: [LinearDatamodel(s, truth.base, w) for s in moved]


@pytest.mark.parametrize("kind", ["labels", "rows"])
def test_caution_asks_more_rows_the_more_there_is(kind):
    surrogate = ensemble(kind)
    threat = ThreatModel(12, kind)
    found = [
        budget_to_flip(labelled(12), threat, surrogate, caution=c).predicted
        for c in (0.0, 0.5, 1.0, 3.0)
    ]
    for less, more in pairwise(found):
        assert (more >= less).all()
    assert (found[-1] > found[0]).any()
    agreed = ensemble(kind, spread=0.0)
    np.testing.assert_array_equal(
        budget_to_flip(labelled(12), threat, agreed, caution=3.0).predicted,
        budget_to_flip(labelled(12), threat, agreed).predicted,
    )


def test_caution_is_the_norm_of_the_disagreement():
    """Two datamodels, ±s around −1 a row, equal for all rows: k rows turn it where
    margin − k + caution · k s ≤ 0, so k = margin / (1 − caution · s)."""
    s, base = 0.25, 5.5
    pair = lambda table, w: [  # noqa: E731
        LinearDatamodel(np.full((40, 1), 1 + sign * s), [base], w) for sign in (1, -1)
    ]
    for caution in (0.0, 1.0, 2.0, 3.0):
        found = budget_to_flip(labelled(40), ThreatModel(40, "rows"), pair, caution=caution)
        assert found.predicted.tolist() == [np.ceil(base / (1 - caution * s))]
    beyond = budget_to_flip(labelled(40), ThreatModel(40, "rows"), pair, caution=4.5)
    assert np.isinf(beyond.predicted).all()


def test_several_datamodels_are_averaged():
    surrogate = ensemble("labels")
    table = {}

    def mean(problem, w):
        several = surrogate(problem, w)
        table["n"] = len(several)
        return LinearDatamodel(np.mean([f.scores for f in several], axis=0), several[0].base, w)

    threat = ThreatModel(8, "labels")
    first = budget_to_flip(labelled(12), threat, surrogate)
    second = budget_to_flip(labelled(12), threat, mean)
    assert table["n"] == 4
    np.testing.assert_array_equal(first.predicted, second.predicted)


# --- refusals --------------------------------------------------------------------------------------


def test_budgets_that_make_no_sense():
    truth = world("labels")
    problem = labelled()
    wrong = World(truth.scores, np.array([1.0, -0.5, 2.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"got 2 that are wrong already: \['out1', 'out3'\]"):
        budget_to_flip(problem, ThreatModel(2, "labels"), wrong.surrogate)
    with pytest.raises(
        ValueError, match=r"several datamodels to disagree for caution=1\.0, got one"
    ):
        budget_to_flip(problem, ThreatModel(2, "labels"), truth.surrogate, caution=1.0)
    with pytest.raises(ValueError, match="may_change='labels' or 'rows', got 'inputs'"):
        budget_to_flip(problem, ThreatModel(2, "inputs", epsilon=1.0), truth.surrogate)
    with pytest.raises(ValueError, match="expected sources"):
        budget_to_flip(problem, ThreatModel(2, "labels", source_quota=1), truth.surrogate)
    with pytest.raises(ValueError, match="cannot be met"):
        budget_to_flip(problem, ThreatModel(N + 1, "labels"), truth.surrogate)
    with pytest.raises(ValueError, match="labels 0 to 2"):
        budget_to_flip(problem, ThreatModel(2, "labels"), truth.surrogate, classes=2)


# --- rounds: asked again on the way -----------------------------------------------------------------


@dataclass
class Curved:
    """Margins base − bend(m), m [t] what the changes from the clean data add up to; the surrogate is the tangent."""

    scores: np.ndarray  # [N, t]
    base: np.ndarray  # [t]
    bend: object
    slope: object
    asked: list = field(default_factory=list)
    clean: np.ndarray = None

    def moved(self, w):
        return (self.clean - np.asarray(w)) @ self.scores

    def surrogate(self, table, w):
        self.clean = w.copy() if self.clean is None else self.clean
        self.asked.append(w)
        m = self.moved(w)
        return LinearDatamodel(self.scores * self.slope(m), self.base - self.bend(m), w)

    def victim(self, table, weights, seeds):
        values = self.base - self.bend(self.moved(weights))
        return SimpleNamespace(per_seed=values[:, None])


def saturating(n, t, **settings):
    """The more rows are changed the less another one does."""
    base = np.linspace(5.0, 30.0, t)
    ones = np.ones((n, t)) + 1e-6 * np.arange(n)[:, None]
    return Curved(ones, base, lambda m: m / (1 + m / 60), lambda m: 1 / (1 + m / 60) ** 2)


def accelerating(n, t):
    """The more rows are changed the more another one does."""
    base = np.linspace(5.0, 200.0, t)
    ones = np.ones((n, t)) + 1e-6 * np.arange(n)[:, None]
    return Curved(ones, base, lambda m: m + m**2 / 40, lambda m: 1 + m / 20)


@pytest.mark.parametrize("quota", [None, 2])
@pytest.mark.parametrize("kind", ["labels", "rows"])
def test_rounds_change_nothing_where_first_order_is_exact(kind, quota):
    problem, flat = labelled(seed=1), world(kind, seed=1)
    truth = Curved(flat.scores, flat.base, lambda m: m, np.ones_like)
    threat = ThreatModel(5 if quota is None else 3, kind, source_quota=quota)
    sources = SOURCES if quota else None
    once = budget_to_flip(problem, threat, truth.surrogate, truth.victim, sources=sources)
    assert len(truth.asked) == 1
    for rounds in (2, 3, 9):
        found = budget_to_flip(
            problem, threat, truth.surrogate, truth.victim, rounds=rounds, sources=sources
        )
        np.testing.assert_array_equal(found.predicted, once.predicted)
        np.testing.assert_array_equal(found.actual, once.actual)
        for j in np.flatnonzero(np.isfinite(once.predicted)):
            k = int(once.predicted[j])  # the same set; the path may have taken a later row first
            assert set(found.rows[j][:k]) == set(once.rows[j][:k])


@pytest.mark.parametrize("kind", [saturating, accelerating])
def test_rounds_follow_a_bend(kind):
    n, t = 200, 8
    errors = []
    for rounds in (1, 3, 12):
        truth = kind(n, t)
        found = budget_to_flip(
            labelled(n), ThreatModel(n, "rows"), truth.surrogate, truth.victim, rounds=rounds
        )
        assert np.isfinite(found.actual).all()
        assert len(truth.asked) <= 1 + t * (rounds - 1)
        errors.append(np.abs(np.log(found.ratio)).max())
        if (
            kind is saturating
        ):  # a tangent of a saturating curve asks too few, from wherever it is laid
            assert (found.predicted <= found.actual).all()
    assert errors[0] > 2 * errors[1] >= 2 * errors[2]
    assert errors[0] > 0.6  # first order is off by a factor of 1.8 or more
    assert errors[2] < 0.1  # twelve tangents by a tenth at most


def test_a_step_too_far_is_divided_in_proportion():
    """Two rounds of a margin of 30: half of 30 rows do 15 + 15² / 10 = 37.5 > 30, so 12 = 15 · 30 / 37.5 of them."""
    truth = accelerating(60, 1)
    truth.base = np.array([30.0])
    truth.bend, truth.slope = (lambda m: m + m**2 / 10), (lambda m: 1 + m / 5)
    found = budget_to_flip(labelled(60), ThreatModel(60, "rows"), truth.surrogate, rounds=2)
    assert found.predicted.tolist() == [12.0]
    assert len(found.rows[0]) == 60  # all that could be changed, for the search by retraining


def test_an_output_out_of_reach_stays_so():
    truth = saturating(30, 3)
    truth.base = np.array([5.0, 61.0, 200.0])  # 30 rows move 20
    found = budget_to_flip(
        labelled(30), ThreatModel(30, "rows"), truth.surrogate, truth.victim, rounds=3
    )
    assert np.isfinite(found.predicted).tolist() == [True, False, False]
    assert np.isinf(found.actual).tolist() == [False, True, True]


def test_no_rounds_are_refused():
    truth = world("labels")
    with pytest.raises(ValueError, match="rounds >= 1, got 0"):
        budget_to_flip(labelled(), ThreatModel(3, "labels"), truth.surrogate, rounds=0)


# --- a real victim ---------------------------------------------------------------------------------


def test_budgets_of_a_logistic_regression():
    """Found by exact refits: the rows named turn it, one fewer do not, and first order has the order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    y = (x[:, 0] + 0.6 * rng.normal(size=120) > 0).astype(int)
    estimator = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(x, y)
    problem = Problem.from_sklearn(estimator, x, y)
    fresh = rng.normal(size=(12, 3)) * 0.5
    fresh[:, 0] = np.abs(fresh[:, 0])
    outputs = Outputs(margin, problem.model.encode(fresh, np.ones(12, dtype=int)))
    right = np.flatnonzero(outputs.evaluate(problem.model).numpy() > 0)
    outputs = Outputs(margin, problem.model.encode(fresh[right], np.ones(len(right), dtype=int)))
    assert len(right) >= 8

    def surrogate(table, w):
        at = refitted(estimator, table, w)
        return influence(at, outputs, curvature="hessian", weights=w, drop="row")

    def victim(table, w, seeds):
        return refit(estimator, table, outputs, w, seeds=seeds)

    found = budget_to_flip(problem, ThreatModel(0.4, "labels"), surrogate, victim)
    reached = np.flatnonzero(np.isfinite(found.actual))
    assert len(reached) >= 5
    for j in reached[:4]:
        k = int(found.actual[j])
        for many, turned in ((k, True), (k - 1, False)):
            w = found.versions.clean.copy()
            w[found.versions.current(w)[found.rows[j][:many]]] = 0
            w[found.into[j][:many]] = 1
            value = refit(estimator, found.versions.problem, outputs, w).outputs[0, j]
            assert (value <= 0) == turned
    # a flip moves the fit the less the more there are: first order asks too few rows, in the right order
    # (a rank correlation of 12 unrelated pairs has an sd of .3)
    assert (found.predicted[reached] <= found.actual[reached]).all()
    assert spearmanr(found.predicted[reached], found.actual[reached]).statistic > 0.9
    again = budget_to_flip(problem, ThreatModel(0.4, "labels"), surrogate, victim, rounds=3)
    assert (np.isfinite(again.actual) >= np.isfinite(found.actual)).all()
    assert np.abs(np.log(again.ratio)).mean() < 0.5 * np.abs(np.log(found.ratio)).mean()
    assert again.within(0.3) >= 0.9


@pytest.mark.parametrize(
    ("per_seed", "seeds", "message"),
    [
        (lambda t: np.full((1, 1, t), np.nan), 1, "expected finite retrained outputs"),
        (lambda t: np.zeros((1, 1, t + 3)), 1, "expected retrained outputs .* of shape"),
        (lambda t: np.zeros((1, 1, t)), 0, "at least one seed"),
    ],
)
def test_victims_that_say_nothing(per_seed, seeds, message):
    there = world("rows", t=1)

    def victim(table, weights, seeds):
        return SimpleNamespace(per_seed=per_seed(1))

    with pytest.raises(ValueError, match=message):
        budget_to_flip(labelled(), ThreatModel(4, "rows"), there.surrogate, victim, seeds=seeds)


def test_a_surrogate_around_other_weights_is_told():
    """Around every row under every label, say: one that trains without the weights it is given."""
    problem, truth = labelled(), world("labels")

    def forgetful(table, w):
        return replace(truth.surrogate(table, w), anchor=np.ones(len(w)))

    with pytest.raises(
        ValueError, match=f"{N} of {3 * N} versions of rows, got one around {3 * N}"
    ):
        budget_to_flip(problem, ThreatModel(3, "labels"), forgetful)
