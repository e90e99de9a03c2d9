"""applied.poisoning: attacks against brute force, victims that are exactly linear, and small real ones."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from applied.audit.attack import instead
from applied.audit.versions import joined, rewritten
from applied.poisoning import ThreatModel, attempt, flip_labels, insert, perturb, relabelled
from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    magic,
    retrain,
    train,
)
from attribution_core.data import take
from attribution_core.input_influence import gradient_matching, input_influence
from attribution_core.refitting import refit, refitted

N, CLASSES = 6, 3


@dataclass
class World:
    """Outputs c + w S + ½ curve (w·u)², by their tangent for a surrogate and as they are for a victim."""

    scores: np.ndarray  # [N, t]
    names: tuple = ("a", "b")
    curve: float = 0.0
    noise: float = 0.0  # of a training seed
    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.u = np.random.default_rng(9).normal(size=len(self.scores))

    def value(self, w):
        bent = 0.5 * self.curve * (np.asarray(w) @ self.u) ** 2
        return 3.0 + np.asarray(w) @ self.scores + bent[..., None]

    def surrogate(self, table, w):
        assert len(table.train) == len(w) == len(self.scores)
        self.asked.append(w)  # an attack that goes on must not change it
        slope = self.scores + self.curve * (w @ self.u) * self.u[:, None]
        return LinearDatamodel(slope, self.value(w), w, targets=np.array(self.names))

    def victim(self, table, weights, seeds):
        values = self.value(weights)
        drawn = [self.noise * np.random.default_rng(s).normal(size=values.shape[1]) for s in seeds]
        return SimpleNamespace(per_seed=values[:, None] + np.stack(drawn))


def labelled(n=N, seed=0):
    """Rows with every label of 3; the model is never asked."""
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(np.r_[0, 1, 2, rng.integers(0, 3, n - 3)])
    return Problem(nn.Linear(2, 3), cross_entropy, (torch.from_numpy(rng.normal(size=(n, 2))), y))


def world(seed=0, rows=N * CLASSES, **settings):
    return World(np.random.default_rng(seed).normal(size=(rows, 2)), **settings)


def labels_in(attack):
    """[n] labels of the rows that are trained on."""
    return np.flatnonzero(attack.weights) % CLASSES


def legal(rows, sources, quota):
    return quota is None or all(sum(sources[i] == s for i in rows) <= quota for s in set(sources))


# --- labels: the optimum ---------------------------------------------------------------------------


SOURCES = list("aaabbc")


@pytest.mark.parametrize("goal", [None, "a", "b", [1.0, -2.0], [-0.3, 0.1]])
@pytest.mark.parametrize(("k", "quota"), [(1, None), (2, None), (3, None), (2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_flips_are_the_best_of_all_sets_of_flips(seed, k, quota, goal):
    problem, truth = labelled(seed=seed), world(seed)
    y = problem.train.columns[1].numpy()
    v = goal if isinstance(goal, list) else {None: [0.5, 0.5], "a": [1, 0], "b": [0, 1]}[goal]
    threat = ThreatModel(k, "labels", source_quota=quota)
    attack = flip_labels(
        problem, threat, truth.surrogate, truth.victim, goal=goal,
        sources=SOURCES if quota else None, seeds=1,
    )  # fmt: skip
    best = 0.0
    for size in range(1, k + 1):
        for rows in combinations(range(N), size):
            if not legal(rows, SOURCES, quota):
                continue
            for shifts in product((1, 2), repeat=size):
                labels = y.copy()
                labels[list(rows)] = (labels[list(rows)] + shifts) % CLASSES
                w = np.zeros(N * CLASSES)
                w[np.arange(N) * CLASSES + labels] = 1
                gain = (truth.value(w) - truth.value(attack.versions.clean)) @ v
                best = max(best, gain)
    found = (attack.outputs()[0] - attack.outputs("no attack")[0]) @ v
    assert found == pytest.approx(best, abs=1e-12)  # float64, sums of 6 numbers
    assert best > 0
    assert attack.changed.tolist() == np.flatnonzero(labels_in(attack) != y).tolist()
    assert legal(attack.changed, SOURCES, quota)


def test_a_linear_victim_does_what_was_predicted():
    truth = world(noise=5.0)
    attack = flip_labels(
        labelled(), ThreatModel(0.5, "labels"), truth.surrogate, truth.victim, seeds=4
    )
    for j, name in enumerate(("a", "b")):
        effect = attack.effect(name)
        assert effect == attack.effect(j)
        # the seed's noise of size 5 is added to both and taken away again
        assert effect.mean == pytest.approx(attack.predicted[j], abs=1e-12)
        assert effect.high - effect.low < 1e-12
        assert attack.verified.predicted[j] == pytest.approx(
            truth.value(attack.weights)[j], abs=1e-12
        )
    assert attack.outputs().std(axis=0).min() > 0.1  # there was noise to cancel
    assert attack.outputs("random").shape == (4, 2)
    text = attack.table()
    assert text.splitlines()[0].startswith("flip_labels: may change labels of 0.5 of the rows")
    assert "3 rows changed; 4 victims" in text
    assert repr(attack) == "Attack(flip_labels: 3 rows changed, 4 victims)"
    assert f"{attack.predicted[0]:+.4g}" in text
    assert str(attack.effect(1, "random")) in text


def test_what_the_victim_is_given():
    problem, truth = labelled(), world()
    attack = flip_labels(problem, ThreatModel(2, "labels"), truth.surrogate, truth.victim, seeds=1)
    x, y = problem.train.columns
    given, labels = take(attack.poisoned.train, range(N))
    assert torch.equal(given, x)
    assert np.flatnonzero(labels != y).tolist() == attack.changed.tolist() == attack.places.tolist()
    assert labels.tolist() == labels_in(attack).tolist()
    np.testing.assert_array_equal(attack.weights, attack.verified.decision.weights)


def test_more_outputs_than_the_surrogate_predicts():
    truth, more = world(), world(names=("b", "c", "a"))
    more.scores = np.random.default_rng(1).normal(size=(18, 3))
    attack = flip_labels(
        labelled(), ThreatModel(2, "labels"), truth.surrogate, more.victim,
        targets=["b", "c", "a"], seeds=2,
    )  # fmt: skip
    alone = flip_labels(
        labelled(), ThreatModel(2, "labels"), truth.surrogate, truth.victim, seeds=1
    )
    np.testing.assert_array_equal(attack.predicted[[2, 0]], alone.predicted)
    assert np.isnan(attack.predicted[1])
    line = next(line for line in attack.table().splitlines() if line.startswith("c"))
    assert line.split()[2] == "-"


def test_the_order_of_rows_does_not_matter():
    problem, truth = labelled(), world()
    order = np.random.default_rng(3).permutation(N)
    x, y = problem.train.columns
    places = (order[:, None] * CLASSES + np.arange(CLASSES)).ravel()
    other = World(truth.scores[places])
    threat = ThreatModel(3, "labels")
    first = flip_labels(problem, threat, truth.surrogate, truth.victim, seeds=1)
    second = flip_labels(
        replace(problem, train=(x[order], y[order])), threat, other.surrogate, other.victim, seeds=1
    )
    assert sorted(order[second.changed]) == first.changed.tolist()
    np.testing.assert_allclose(second.predicted, first.predicted, rtol=0, atol=1e-12)


# --- labels: in rounds -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "rounds", "parts"), [
    (12, 5, 5, [1] * 5), (12, 7, 3, [2, 3, 2]), (12, 6, 2, [3, 3]), (12, 1, 1, [1]),
])  # fmt: skip
def test_rounds_see_the_data_poisoned_so_far(n, k, rounds, parts):
    truth = world(rows=n * CLASSES, curve=0.02)
    attack = flip_labels(
        labelled(n), ThreatModel(k, "labels"), truth.surrogate, truth.victim, rounds=rounds, seeds=1
    )
    clean = attack.versions.clean
    assert len(truth.asked) == rounds
    np.testing.assert_array_equal(truth.asked[0], clean)
    spent = [int(((w > 0) & (clean == 0)).sum()) for w in (*truth.asked, attack.weights)]
    assert np.diff(spent).tolist() == parts
    assert len(attack.changed) == k == len(np.unique(attack.changed))
    for w in (*truth.asked, attack.weights):  # one version of a row, and those flipped stay so
        assert (w.reshape(n, CLASSES).sum(1) == 1).all()
    for before, after in zip(truth.asked, [*truth.asked[1:], attack.weights], strict=True):
        flipped = (before > 0) & (clean == 0)
        assert (after[flipped] == 1).all()
    # the last tangent's value, less the first's
    last = World(truth.scores, curve=0.02).surrogate(attack.versions.problem, truth.asked[-1])
    expected = last.predict(attack.weights) - truth.value(clean)
    np.testing.assert_allclose(attack.predicted, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("curve", [0.02, -0.02])
def test_one_round_is_predicted_from_the_middle_of_the_way(curve):
    """Every other change is made, and only the other half is left to first order: a quarter of a parabola's miss."""
    problem, truth = labelled(12), world(rows=12 * CLASSES, curve=curve)
    clean = np.eye(CLASSES)[problem.train.columns[1].numpy()].ravel()
    truth.u = 1 - clean  # counts flips
    attack = flip_labels(problem, ThreatModel(6, "labels"), truth.surrogate, truth.victim, seeds=1)
    start, half = truth.asked
    np.testing.assert_array_equal(start, clean)
    flipped = (half > 0) & (clean == 0)
    assert flipped.sum() == 3
    assert (attack.weights[flipped] == 1).all()
    actual = attack.outputs()[0] - attack.outputs("no attack")[0]
    first = truth.surrogate(attack.versions.problem, clean)
    missed = first.predict(attack.weights) - first.predict(clean) - actual
    np.testing.assert_allclose(missed, -curve / 2 * 6**2, rtol=1e-12)
    np.testing.assert_allclose(attack.predicted - actual, missed / 4, rtol=1e-12)


def test_a_flipped_row_is_not_flipped_again():
    """A surrogate that changes its mind: row 0 is worth most in both rounds, by another label each time."""
    problem = labelled()
    y = problem.train.columns[1].numpy()
    asked = []

    def surrogate(table, w):
        scores = np.zeros((N, CLASSES))
        scores[0, (y[0] + 1 + len(asked)) % CLASSES] = 10.0
        scores[3, (y[3] + 1) % CLASSES] = 1.0
        asked.append(w)
        return LinearDatamodel(scores.reshape(-1, 1), [0.0], w, targets=np.array(["a"]))

    truth = World(np.ones((N * CLASSES, 1)))
    attack = flip_labels(
        problem, ThreatModel(2, "labels"), surrogate, truth.victim, rounds=2, seeds=1
    )
    assert attack.changed.tolist() == [0, 3]
    assert labels_in(attack)[0] == (y[0] + 1) % CLASSES  # as the first round chose
    assert attack.predicted.tolist() == [1.0]


def test_rounds_spend_no_quota_twice():
    truth = world(rows=12 * CLASSES)
    sources = np.array(list("aaaabbbbcccc"))
    attack = flip_labels(
        labelled(12), ThreatModel(5, "labels", source_quota=2), truth.surrogate, truth.victim,
        rounds=5, sources=sources, seeds=3,
    )  # fmt: skip
    assert len(attack.changed) == 5
    assert np.unique(sources[attack.changed], return_counts=True)[1].max() == 2
    one = flip_labels(
        labelled(12), ThreatModel(5, "labels", source_quota=2), truth.surrogate, truth.victim,
        sources=sources, seeds=1,
    )  # fmt: skip
    assert (
        one.changed.tolist() == attack.changed.tolist()
    )  # of a linear world rounds change nothing


def test_rounds_find_more_where_effects_bend():
    """Effects that add up more than linearly: one shot cannot see it, rounds can."""
    gains = []
    for rounds in (1, 6):
        found = []
        for seed in range(6):
            truth = world(seed, rows=20 * CLASSES, curve=0.3)
            attack = flip_labels(
                labelled(20, seed), ThreatModel(6, "labels"), truth.surrogate, truth.victim,
                rounds=rounds, goal="a", seeds=1,
            )  # fmt: skip
            found.append(attack.effect("a").mean)
        gains.append(found)
    assert np.mean(gains[1]) > np.mean(gains[0])


# --- rows that are brought in ----------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("k", "quota"), [(2, None), (3, None), (2, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_brought_in_are_the_best_of_all(seed, k, quota, rounds):
    problem = labelled()
    pool = labelled(7, seed=5).train.columns
    sources = list("aabbbcc")
    truth = world(seed, rows=N + 7)
    attack = insert(
        problem, pool, ThreatModel(k, "rows", source_quota=quota), truth.surrogate, truth.victim,
        goal="b", rounds=rounds, sources=sources if quota else None, seeds=3,
    )  # fmt: skip
    best = max(
        truth.scores[[N + i for i in rows], 1].sum()
        for size in range(k + 1)
        for rows in combinations(range(7), size)
        if legal(rows, sources, quota)
    )
    effect = attack.effect("b")
    assert effect.mean == pytest.approx(best, abs=1e-12)
    assert attack.predicted[1] == pytest.approx(best, abs=1e-12)
    assert best > 0
    assert (attack.weights[:N] == 1).all()
    assert attack.changed.tolist() == (N + np.flatnonzero(attack.weights[N:])).tolist()
    given = take(attack.poisoned.train, attack.places)
    for column, own in zip(given, pool, strict=True):
        assert torch.equal(column, own[attack.changed - N])


def test_a_share_is_of_the_training_rows_with_quotas_too():
    """10 % of 40 rows are 4, of a pool of 6 or of 60."""
    for size in (6, 60):
        truth = world(rows=40 + size)
        sources = np.arange(size) % 2
        attack = insert(
            labelled(40), labelled(size).train.columns, ThreatModel(0.1, "rows", source_quota=2),
            truth.surrogate, truth.victim, sources=sources, goal="a", seeds=2,
        )  # fmt: skip
        assert np.unique(sources[attack.changed - 40], return_counts=True)[1].max() <= 2
        assert 2 <= len(attack.changed) <= 4
    with pytest.raises(ValueError, match="4 rows, while a quota of 1 a source leaves 2"):
        insert(
            labelled(40), labelled(60).train.columns, ThreatModel(0.1, "rows", source_quota=1),
            truth.surrogate, truth.victim, sources=np.arange(60) % 2,
        )  # fmt: skip


# --- controls --------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A victim that keeps the weights it was given, by seed."""

    truth: World
    seen: list = field(default_factory=list)

    def __call__(self, table, weights, seeds):
        self.seen.append((np.array(weights), list(seeds)))
        return self.truth.victim(table, weights, seeds)


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("quota", [None, 2])
def test_controls_are_no_attack_and_as_many_random_rows(kind, quota):
    n, k, pool = 12, 5, 15
    rows = n * CLASSES if kind == "labels" else n + pool
    truth = world(rows=rows)
    victim = Recorder(truth)
    threat = ThreatModel(k, kind, source_quota=quota)
    sources = np.arange(n if kind == "labels" else pool) % 4
    attack = (
        flip_labels(labelled(n), threat, truth.surrogate, victim, sources=sources, seeds=[3, 8, 4])
        if kind == "labels"
        else insert(
            labelled(n), labelled(pool).train.columns, threat, truth.surrogate, victim,
            sources=sources, seeds=[3, 8, 4],
        )
    )  # fmt: skip
    clean = attack.versions.clean
    (fixed, seeds), *drawn = victim.seen
    assert seeds == [3, 8, 4]
    np.testing.assert_array_equal(fixed[0], attack.weights)
    np.testing.assert_array_equal(fixed[1], clean)
    assert [s for _, s in drawn] == [[3], [8], [4]]
    chosen = []
    for (w,), _ in drawn:
        new = attack.versions.row[(w > 0) & (clean == 0)]
        assert len(new) == k == len(np.unique(new))
        if quota:
            assert (
                np.unique(sources[new % n if kind == "labels" else new - n], return_counts=True)[
                    1
                ].max()
                <= quota
            )
        if kind == "labels":
            assert (w.reshape(n, CLASSES).sum(1) == 1).all()
        else:
            assert (w[:n] == 1).all()
        chosen.append(tuple(w))
    assert len(set(chosen)) == 3
    again = Recorder(truth)
    if kind == "labels":
        flip_labels(labelled(n), threat, truth.surrogate, again, sources=sources, seeds=[3, 8, 4])
        assert [tuple(w) for (w,), _ in again.seen[1:]] == chosen  # a seed says which


def test_random_flips_take_every_row_and_label_equally_often():
    from applied import poisoning

    table = relabelled(labelled(8), CLASSES)
    free = poisoning.Quota(None, None)
    draws = 3000
    counts = sum(poisoning._random_flips(table, 2, free, seed) for seed in range(draws)) / draws
    other = counts[table.clean == 0]
    # one label of one row: 2/8 · 1/2 = .125, sd sqrt(.125 · .875 / 3000) = .006; five of them
    assert other == pytest.approx(np.full(16, 0.125), abs=0.03)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"goal": "c"}, r"a goal among the outputs \['a', 'b'\], got 'c'"),
        ({"goal": [1.0]}, r"a finite goal \[t=2\], got \(1,\)"),
        ({"goal": [1.0, np.nan]}, r"a finite goal \[t=2\]"),
        ({"goal": [0.0, 0.0]}, "a flip that is predicted to raise the goal, got none"),
        ({"rounds": 3}, "1 to 2 rounds for 2 flips, got 3"),
        ({"rounds": 0}, "1 to 2 rounds"),
        ({"threat": ThreatModel(2, "rows")}, "may_change='labels', got 'rows'"),
        ({"threat": ThreatModel(7, "labels")}, "cannot be met: expected a budget of 1 to 6"),
        ({"threat": ThreatModel(2, "labels", source_quota=1)}, "expected sources"),
        ({"classes": 2}, "classes=2 >= 2, got labels 0 to 2"),
        ({"column": 0}, "expected labels, one integer a row"),
        ({"seeds": 0}, "at least one"),
    ],
)
def test_flips_that_make_no_sense(given, message):
    truth = world()
    asked = {"threat": ThreatModel(2, "labels"), **given}
    threat = asked.pop("threat")
    with pytest.raises(ValueError, match=message):
        flip_labels(labelled(), threat, truth.surrogate, truth.victim, **asked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"goal": "c"}, "a goal among the outputs"),
        ({"goal": [0.0, 0.0]}, "a row of the pool that is predicted to raise the goal, got none"),
        ({"rounds": 0}, "1 to 2 rounds for 2 rows, got 0"),
        ({"rounds": 3}, "1 to 2 rounds for 2 rows, got 3"),
        ({"threat": ThreatModel(2, "labels")}, "may_change='rows', got 'labels'"),
        ({"threat": ThreatModel(5, "rows")}, "5 rows of a pool of 4"),
        ({"threat": ThreatModel(2, "rows", source_quota=1)}, r"expected sources \[n=4\]"),
        ({"threat": ThreatModel(2, "rows", source_quota=1), "sources": list("aaaa")}, "leaves 1"),
    ],
)
def test_insertions_that_make_no_sense(given, message):
    truth = world(rows=N + 4)
    asked = {"threat": ThreatModel(2, "rows"), **given}
    threat = asked.pop("threat")
    with pytest.raises(ValueError, match=message):
        insert(
            labelled(), labelled(4).train.columns, threat, truth.surrogate, truth.victim, **asked
        )


def test_a_surrogate_of_the_original_rows_is_told():
    problem, truth = labelled(), world()
    short = LinearDatamodel(np.ones((problem.n, 2)), [0.0, 0.0], 1.0)
    with pytest.raises(ValueError, match=r"scores the \d+ rows of the problem it is given"):
        flip_labels(problem, ThreatModel(2, "labels"), lambda *_: short, truth.victim)


def test_pools_with_other_columns():
    problem, truth = labelled(), world()
    x, y = take(problem.train, range(3))
    for pool in ((x[:, :1], y), (x,), (x, y.double()), {"x": x, "y": y}):
        with pytest.raises(ValueError, match="a pool with the columns of the data"):
            insert(problem, pool, ThreatModel(2, "rows"), truth.surrogate, truth.victim)


# --- what a threat model lets change ----------------------------------------------------------------


def test_attempts_that_the_threat_model_does_not_cover():
    problem, truth = pictures()
    x = problem.train.columns[0].numpy()
    ball = ThreatModel(2, "inputs", epsilon=0.1)
    asked = {"victim": truth.victim, "targets": ["a", "b"], "seeds": 1}
    moved, places = rewritten(problem, [1, 2], x[[1, 2]] + 5, 0)
    control = {"random": lambda seed: moved.clean}
    with pytest.raises(ValueError, match=r"within epsilon=0.1 .* got 2 rows farther off: \[1, 2\]"):
        attempt(moved, instead(moved, places), ball, **asked, **control)
    with pytest.raises(ValueError, match="may_change='inputs', got 'labels'"):
        attempt(moved, instead(moved, places), ThreatModel(2, "labels"), **asked, **control)
    near, places = rewritten(problem, [1, 2], x[[1, 2]] + 0.1, 0)
    attempt(near, instead(near, places), ball, **asked, random=lambda seed: near.clean)
    with pytest.raises(ValueError, match=r"expected random, seed -> weights \[N\]"):
        attempt(near, instead(near, places), ball, **asked)
    labels = relabelled(labelled(), CLASSES)
    with pytest.raises(ValueError, match="may_change='labels', got 'inputs'"):
        attempt(labels, flipped(labels, [1]), ball, **asked)
    fewer = labels.clean.copy()
    fewer[labels.current(fewer)[3]] = 0.0
    with pytest.raises(ValueError, match="may_change='rows', got 'labels'"):
        attempt(labels, fewer, ThreatModel(2, "labels"), **asked)


@pytest.mark.parametrize("pool", [3, 8, 16])
def test_the_random_control_of_rows_brought_in_brings_in_as_many(pool):
    problem, more = pictures()[0], pictures(pool, seed=1)[0]
    table, places = joined(problem, more.train)
    weights = table.clean.copy()
    weights[places[:2]] = 1.0
    victim = Recorder(Slopes(np.zeros((16, 4, 2))))
    attempt(table, weights, ThreatModel(2, "rows"), victim, targets=["a", "b"], seeds=4)
    for w, _ in victim.seen[1:]:
        assert (np.atleast_2d(w)[0] - table.clean).sum() == 2


# --- attempts --------------------------------------------------------------------------------------


def flipped(table, rows, by=1):
    w = table.clean.copy().reshape(-1, CLASSES)
    w[rows] = np.roll(w[rows], by, axis=1)
    return w.ravel()


def test_an_attempt_is_verified_beside_random_labels():
    truth, table = world(), relabelled(labelled(), CLASSES)
    w = flipped(table, [1, 4])
    victim = Recorder(truth)
    attack = attempt(table, w, ThreatModel(2, "labels"), victim, targets=["a", "b"], seeds=3)
    assert attack.changed.tolist() == [1, 4]
    assert np.isnan(attack.predicted).all()
    assert attack.effect("a").mean == pytest.approx(
        ((w - table.clean) @ truth.scores)[0], abs=1e-12
    )
    for (drawn,), _ in victim.seen[1:]:
        assert ((drawn > 0) & (table.clean == 0)).sum() == 2
    f = truth.surrogate(table.problem, w)  # around other weights
    said = attempt(table, w, ThreatModel(2, "labels"), victim, datamodel=f, seeds=1, name="mine")
    np.testing.assert_allclose(said.predicted, (w - table.clean) @ truth.scores, rtol=0, atol=1e-12)
    assert said.table().startswith("mine: ")
    own = attempt(
        table, w, ThreatModel(2, "labels"), truth.victim, datamodel=f, seeds=2,
        random=lambda seed: flipped(table, [seed]),
    )  # fmt: skip
    np.testing.assert_allclose(
        own.outputs("random"),
        truth.value(np.stack([flipped(table, [s]) for s in (0, 1)])),
        atol=1e-12,
    )


def test_rows_left_out_are_changed_rows():
    truth, (table, places) = world(rows=N + 2), joined(labelled(), labelled(3).train[[0, 1]])
    w = table.clean.copy()
    w[places[0]] = 1
    w[[2, 3]] = 0
    random = lambda seed: table.clean  # noqa: E731
    asked = {"targets": ["a", "b"], "random": random, "seeds": 1}
    attack = attempt(table, w, ThreatModel(3, "rows"), truth.victim, **asked)
    assert attack.changed.tolist() == [2, 3, 6]
    assert attack.places.tolist() == [4]
    with pytest.raises(ValueError, match="1 to 2 changed rows, as the budget says, got 3"):
        attempt(table, w, ThreatModel(2, "rows"), truth.victim, **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], r"weights 0 or 1 \[N=18\], got shape \(17,\)"),
        (lambda w: 0.5 * w, "weights 0 or 1"),
        (lambda w: np.ones(18), "rows in two versions"),
        (lambda w: w.reshape(6, 3)[:, [1, 2, 0]].ravel(), "1 to 2 changed rows.* got 6"),
        (lambda w: w, "1 to 2 changed rows.* got 0"),
    ],
)
def test_attempts_that_make_no_sense(change, message):
    truth, table = world(), relabelled(labelled(), CLASSES)
    with pytest.raises(ValueError, match=message):
        attempt(
            table, change(table.clean), ThreatModel(2, "labels"), truth.victim, targets=["a", "b"]
        )
    with pytest.raises(ValueError, match=r"expected targets, .* or a datamodel; got neither"):
        attempt(table, flipped(table, [1]), ThreatModel(2, "labels"), truth.victim)


# --- a real victim ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0, 1, 2])
def test_flips_raise_the_loss_of_a_logistic_regression(split):
    """10 % of the labels of breast cancer data: more than random flips on targets and on rows beside them."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import scale

    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(split).permutation(len(x))
    x, y = scale(x)[order], y[order]
    estimator = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10).fit(x[:150], y[:150])
    problem = Problem.from_sklearn(estimator, x[:150], y[:150])
    encode = problem.model.encode
    known = Outputs(cross_entropy, encode(x[150:250], y[150:250])).mean(np.full(100, "known"))
    names = np.where(np.arange(419) < 100, "known", "unseen")
    both = Outputs(cross_entropy, encode(x[150:], y[150:])).mean(names)

    def surrogate(table, w):
        at = refitted(estimator, table, w)
        return influence(at, known, curvature="hessian", weights=w, drop="row")

    def victim(table, w, seeds):
        return refit(estimator, table, both, w, seeds=seeds)

    attacks = [
        flip_labels(
            problem, ThreatModel(0.1, "labels"), surrogate, victim, goal="known", rounds=rounds,
            targets=list(both.names), seeds=4,
        )
        for rounds in (1, 5)
    ]  # fmt: skip
    shot, rounds = attacks
    for attack in attacks:
        assert len(attack.changed) == 15
        for name in ("known", "unseen"):
            attacked = attack.effect(name).mean
            random = attack.outputs("random") - attack.outputs("no attack")
            j = attack.targets.index(name)
            assert attacked > random[:, j].max()  # than each of four random ones
        # what is left to first order is half of the flips, or the last round's
        j = attack.targets.index("known")
        assert attack.predicted[j] == pytest.approx(attack.effect("known").mean, rel=0.2)
    assert rounds.effect("known").mean >= shot.effect("known").mean


# --- inputs ----------------------------------------------------------------------------------------


@dataclass
class Slopes:
    """Outputs linear in the inputs of training rows: Σ_i a_i · x_i; the label of row i is i."""

    a: np.ndarray  # [n, numbers, t]
    asked: list = field(default_factory=list)

    def value(self, problem, places):
        x, label = take(problem.train, places)
        return np.einsum("ij,ijt->t", x.flatten(1).double().numpy(), self.a[label.numpy()])

    def surrogate(self, problem, rows, step):
        x, label = take(problem.train, np.arange(problem.n))
        assert label.tolist() == list(range(problem.n))  # rows as they stand in the problem
        self.asked.append((x.numpy().copy(), np.array(rows), step))
        scores = self.a[rows].reshape(-1, self.a.shape[2])
        anchor = x[rows].flatten().double().numpy()
        return LinearDatamodel(scores, self.value(problem, np.arange(problem.n)), anchor)

    def victim(self, table, weights, seeds):
        values = [self.value(table, np.flatnonzero(w)) for w in weights]
        return SimpleNamespace(per_seed=np.repeat(np.stack(values)[:, None], len(seeds), axis=1))


def pictures(n=8, shape=(1, 2, 2), seed=0, outputs=2):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(0, 1, (n, *shape)))
    problem = Problem(nn.Linear(2, 2).double(), cross_entropy, (x, torch.arange(n)))
    return problem, Slopes(rng.normal(size=(n, int(np.prod(shape)), outputs)))


def inputs_of(attack):
    return take(attack.poisoned.train, range(attack.poisoned.n))[0].numpy()


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_ascent_ends_at_the_edge_of_the_ball(norm, box):
    problem, truth = pictures()
    threat = ThreatModel(3, "inputs", norm=norm, epsilon=0.4, box=box)
    attack = perturb(
        problem, threat, truth.surrogate, truth.victim, goal="1", rows=[6, 1, 3], seeds=2
    )
    x = problem.train.columns[0].numpy()
    slope = truth.a[:, :, 1].reshape(x.shape)
    found = inputs_of(attack)
    assert attack.changed.tolist() == [1, 3, 6] == attack.places.tolist()
    still = [0, 2, 4, 5, 7]
    np.testing.assert_array_equal(found[still], x[still])
    moved = (found - x)[[1, 3, 6]].reshape(3, -1)
    length = np.abs(moved).max(1) if norm == "inf" else np.linalg.norm(moved, axis=1)
    assert (length <= 0.4 + 1e-12).all()
    if box is not None:
        assert found.min() >= 0
        assert found.max() <= 1
    if norm == "inf":  # the corner, cut by the box
        corner = np.clip(x + 0.4 * np.sign(slope), *(box or (-9, 9)))
        np.testing.assert_allclose(found[[1, 3, 6]], corner[[1, 3, 6]], rtol=0, atol=1e-12)
    elif box is None:  # the point of the sphere where the slope points
        a = slope[[1, 3, 6]].reshape(3, -1)
        along = 0.4 * a / np.linalg.norm(a, axis=1, keepdims=True)
        np.testing.assert_allclose(moved, along, rtol=0, atol=1e-12)
    if norm == "inf" or box is None:
        # steps add up to 1.375 radii, so the last tenth of them stands still: what the surrogates say
        # of it is what a linear victim does
        change = [attack.effect(j).mean for j in range(2)]
        np.testing.assert_allclose(change, attack.predicted, rtol=0, atol=1e-12)
        assert change[1] > 0
    assert attack.effect(1).mean > attack.effect(1, "random").mean


def test_the_surrogate_sees_the_inputs_as_they_are_now():
    problem, truth = pictures()
    threat = ThreatModel(2, "inputs", epsilon=0.4)
    attack = perturb(
        problem, threat, truth.surrogate, truth.victim, rows=[4, 2], steps=5, step_size=0.01,
        momentum=0.0, goal="0", seeds=1,
    )  # fmt: skip
    x = problem.train.columns[0].numpy()
    sign = np.sign(truth.a[:, :, 0].reshape(x.shape))
    sign[[0, 1, 3, 5, 6, 7]] = 0
    way = 0.0
    for step, (seen, rows, number) in enumerate(truth.asked):
        assert number == step
        assert rows.tolist() == [2, 4]
        np.testing.assert_allclose(seen, x + way * sign, rtol=0, atol=1e-12)
        way += 0.01 * (1 - 0.9 * step / 4)  # falling to a tenth
    np.testing.assert_allclose(inputs_of(attack), x + way * sign, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_rows_of_largest_reach_by_default(norm):
    problem, truth = pictures()
    slope = truth.a.mean(axis=2)
    reach = np.abs(slope).sum(1) if norm == "inf" else np.linalg.norm(slope, axis=1)
    threat = ThreatModel(3, "inputs", norm=norm, epsilon=0.4)
    found = perturb(problem, threat, truth.surrogate, truth.victim, steps=2, seeds=1).changed
    assert found.tolist() == np.sort(np.argsort(-reach)[:3]).tolist()
    # and the set of 3 with the most first-order gain of all, one of a source
    sources = np.arange(8) // 2
    quota = replace(threat, source_quota=1)
    found = perturb(
        problem, quota, truth.surrogate, truth.victim, sources=sources, steps=2, seeds=1
    ).changed
    best = max(
        (rows for rows in combinations(range(8), 3) if len({i // 2 for i in rows}) == 3),
        key=lambda rows: reach[list(rows)].sum(),
    )
    assert tuple(found) == best


@pytest.mark.parametrize("quota", [None, 1])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_chosen_by_what_their_moves_do(seed, quota):
    """A box lets some rows move less than their slopes promise: with all rows as candidates of a linear victim the
    best rows of all are found, by brute force over rows at their corners."""
    problem, truth = pictures(seed=seed)
    x = problem.train.columns[0].numpy()
    threat = ThreatModel(2, "inputs", epsilon=1.0, box=(0.0, 1.0), source_quota=quota)
    sources = None if quota is None else np.arange(8) // 2
    asked = {"goal": "1", "steps": 30, "seeds": 1, "sources": sources}
    attack = perturb(problem, threat, truth.surrogate, truth.victim, **asked)
    slope = truth.a[:, :, 1].reshape(x.shape)
    corner = np.clip(x + np.sign(slope), 0, 1)
    gain = (slope * (corner - x)).reshape(8, -1).sum(1)
    pairs = [p for p in combinations(range(8), 2) if quota is None or p[0] // 2 != p[1] // 2]
    best = max(pairs, key=lambda rows: gain[list(rows)].sum())
    assert tuple(attack.changed) == best
    assert attack.predicted[1] == pytest.approx(gain[list(best)].sum(), rel=1e-12)
    found, left = inputs_of(attack), np.setdiff1d(range(8), best)
    np.testing.assert_array_equal(found[left], x[left])  # those given up lie where they lay
    few = perturb(problem, threat, truth.surrogate, truth.victim, candidates=1, **asked)
    assert few.predicted[1] <= attack.predicted[1] * (1 + 1e-12)


@pytest.mark.parametrize("candidates", range(1, 8))
def test_any_number_of_candidates_fills_the_budget_within_quotas(candidates):
    problem, truth = pictures(40)
    truth.a[:28] *= 3  # the strongest rows are of 4 of 6 sources
    sources = np.r_[np.arange(28) % 4, 4 + np.arange(12) % 2]
    threat = ThreatModel(8, "inputs", epsilon=0.4, source_quota=2)
    asked = {"steps": 12, "seeds": 1, "sources": sources, "candidates": candidates}
    changed = perturb(problem, threat, truth.surrogate, truth.victim, **asked).changed
    assert len(changed) == 8
    assert np.bincount(sources[changed]).max() <= 2


@pytest.mark.parametrize("scale", [1e-17, 1e9])
def test_the_scale_of_the_goal_chooses_no_other_rows(scale):
    problem, truth = pictures(32)
    threat = ThreatModel(4, "inputs", epsilon=0.4, box=(0.0, 1.0))
    first = perturb(problem, threat, truth.surrogate, truth.victim, steps=6, seeds=1).changed
    truth.a *= scale
    second = perturb(problem, threat, truth.surrogate, truth.victim, steps=6, seeds=1).changed
    assert first.tolist() == second.tolist()


def test_candidates_are_halved_within_two_thirds_of_the_steps():
    problem, truth = pictures(32)
    threat = ThreatModel(2, "inputs", epsilon=0.4)
    perturb(problem, threat, truth.surrogate, truth.victim, steps=12, seeds=1)
    asked = [len(rows) for _, rows, _ in truth.asked]
    assert asked == [32, *[8] * 4, *[4] * 4, *[2] * 4]  # the first looks at every row


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_one_version_of_each_row_and_random_ones_in_the_ball(norm):
    problem, truth = pictures()
    x = problem.train.columns[0].numpy()
    victim = Recorder(truth)
    threat = ThreatModel(3, "inputs", norm=norm, epsilon=0.3, box=(0.0, 1.0))
    attack = perturb(problem, threat, truth.surrogate, victim, steps=3, seeds=[2, 5])
    (fixed, _), *drawn = victim.seen
    np.testing.assert_array_equal(fixed[1], attack.versions.clean)
    assert len(drawn) == 2
    moves = []
    for w in (fixed[0], fixed[1], *(one[0] for one, _ in drawn)):
        there = np.flatnonzero(w)
        assert attack.versions.row[there].tolist() == list(range(8))  # in order: runs are paired
        moves.append(take(attack.versions.problem.train, there)[0].numpy() - x)
    assert (moves[1] == 0).all()
    for move in moves[2:]:
        size = np.abs(move).reshape(8, -1)
        length = size.max(1) if norm == "inf" else np.linalg.norm(size, axis=1)
        assert (length > 0).sum() == 3
        assert length.max() <= 0.3 + 1e-12
        assert (x + move).min() >= 0
        assert (x + move).max() <= 1
    assert np.abs(moves[2] - moves[3]).max() > 0.01


def killed(steps):
    """A loop that is interrupted before its fourth step."""
    for k, step in enumerate(steps):
        if k == 3:
            raise KeyboardInterrupt
        yield step


def test_an_ascent_goes_on_where_it_was_killed(tmp_path):
    problem, whole = pictures()
    threat = ThreatModel(3, "inputs", epsilon=0.4)
    run = partial(perturb, problem, threat, steps=6, rows=[1, 2], seeds=1)
    first, second = (pictures()[1] for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        run(first.surrogate, first.victim, folder=tmp_path, progress=killed)
    found = run(second.surrogate, second.victim, folder=tmp_path)
    assert [step for _, _, step in first.asked] == [0, 1, 2]
    assert [step for _, _, step in second.asked] == [3, 4, 5]
    expected = run(whole.surrogate, whole.victim)
    np.testing.assert_array_equal(inputs_of(found), inputs_of(expected))
    np.testing.assert_array_equal(found.predicted, expected.predicted)
    with pytest.raises(ValueError, match="holds steps of another run"):
        run(whole.surrogate, whole.victim, folder=tmp_path, momentum=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": []}, "1 to 2 rows of 0 to 7"),
        ({"rows": [1, 1]}, "expected different rows of 0 to 7"),
        ({"rows": [1, 2, 3]}, "as the budget says, got 3"),
        ({"rows": [8]}, "expected different rows of 0 to 7"),
        ({"rows": [-1]}, "expected different rows of 0 to 7"),
        ({"steps": 0}, "steps >= 1"),
        ({"candidates": 0}, "candidates >= 1"),
        ({"momentum": 1.0}, "a momentum of 0 to below 1"),
        ({"seeds": 0}, "at least one seed"),
        ({"step_size": 0.0}, "a positive step_size"),
        ({"step_size": np.nan}, "a positive step_size"),
        ({"column": 1}, "a column of floating numbers"),
        ({"goal": "c"}, "a goal among the outputs"),
        ({"threat": ThreatModel(2, "labels")}, "may_change='inputs', got 'labels'"),
    ],
)
def test_moves_that_make_no_sense(given, message):
    problem, truth = pictures()
    asked = {"threat": ThreatModel(2, "inputs", epsilon=0.1), "steps": 2, "rows": [0, 1], **given}
    threat = asked.pop("threat")
    with pytest.raises(ValueError, match=message):
        perturb(problem, threat, truth.surrogate, truth.victim, **asked)


# --- inputs of a real network ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """Two noisy classes, a small smooth network, and the loss on rows that are not trained on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(140, 6))
    y = (x[:, 0] + 0.5 * x[:, 1] + 0.7 * rng.normal(size=140) > 0).astype(int)
    data = (torch.from_numpy(x), torch.from_numpy(y))

    def init(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    problem = Problem(init(0), cross_entropy, tuple(c[:40] for c in data), weight_decay=0.01)
    outputs = Outputs(cross_entropy, tuple(c[40:] for c in data)).mean()
    return problem, Recipe(SGD(0.2, 0.9), 20, 15, init=init), outputs


THREAT = ThreatModel(8, "inputs", epsilon=0.5, box=(-4.0, 4.0))


def test_moved_inputs_raise_the_loss_on_fresh_seeds(network):
    problem, recipe, outputs = network

    def exact(some, rows, step):
        run = train(some, replace(recipe, seed=step), states="all")
        return magic(run, outputs, wrt="inputs", rows=rows)

    def victim(table, w, seeds):
        return retrain(table, recipe, outputs, w, seeds=seeds)

    attack = perturb(problem, THREAT, exact, victim, steps=12, seeds=range(100, 106))
    changed, random = (attack.outputs(arm)[:, 0] for arm in ("attack", "random"))
    assert (changed > random).all()  # on each of six seeds that no surrogate saw
    effect = attack.effect()
    assert effect.low > 0
    assert effect.mean > 3 * abs(attack.effect(0, "random").mean)
    # 12 surrogates of other seeds: the size is right within a factor of 2
    assert 0.5 * effect.mean < attack.predicted[0] < 2 * effect.mean


def test_cheaper_surrogates_are_shown_beside_random_noise(network):
    problem, recipe, outputs = network

    def by_influence(some, rows, step):
        run = train(some, replace(recipe, seed=step), states=0)
        return input_influence(run, outputs, rows=rows, curvature="gauss_newton")

    def by_matching(some, rows, step):
        run = train(some, replace(recipe, seed=step), states=0)
        return gradient_matching(run, outputs, rows=rows)

    def victim(table, w, seeds):
        return retrain(table, recipe, outputs, w, seeds=seeds)

    asked = {"steps": 8, "seeds": range(100, 104)}
    found = perturb(problem, THREAT, by_influence, victim, **asked)
    assert found.effect().mean > found.effect(0, "random").mean
    matched = perturb(problem, THREAT, by_matching, victim, targets=["mean"], **asked)
    assert np.isnan(matched.predicted).all()  # an alignment is no prediction of a loss
    assert matched.targets == ["mean"]
    line = next(line for line in matched.table().splitlines() if line.startswith("mean"))
    assert line.split()[2] == "-"


@pytest.mark.parametrize("rounds", [1, 2])
def test_predictions_start_at_the_clean_data_wherever_the_surrogate_stands(rounds):
    """Of a linear datamodel around half of the weights, as runs at exposure .5 have."""
    problem, truth = labelled(), world()

    def halfway(table, w):
        return LinearDatamodel(
            truth.scores, truth.value(0.5 * w), 0.5 * w, targets=np.array(["a", "b"])
        )

    found = flip_labels(
        problem, ThreatModel(2, "labels"), halfway, truth.victim, rounds=rounds, seeds=1
    )
    clean = np.zeros(N * CLASSES)
    clean[np.arange(N) * CLASSES + problem.train.columns[1].numpy()] = 1.0
    expected = truth.value(found.weights) - truth.value(clean)
    np.testing.assert_allclose(found.predicted, expected, rtol=1e-12)


def test_pools_of_classes_that_the_model_does_not_know():
    problem = replace(labelled(), model=nn.Linear(2, CLASSES).double())
    x, y = labelled(5, seed=5).train.columns
    truth = world(rows=N + 5)
    with pytest.raises(ValueError, match=rf"a pool with labels 0 .. {CLASSES - 1}, got"):
        insert(problem, (x, y + 7), ThreatModel(2, "rows"), truth.surrogate, truth.victim)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"budget": "5"}, "in numbers"), ({"budget": 2, "box": (0.0,)}, r"box .low, high.")],
)
def test_threat_models_of_no_numbers(given, words):
    with pytest.raises(ValueError, match=words):
        ThreatModel(**{"may_change": "inputs", "epsilon": 0.1, **given})


def test_bringing_rows_in_leaves_the_model_as_it_was():
    norm = nn.Sequential(nn.Linear(2, CLASSES), nn.BatchNorm1d(CLASSES)).double().train()
    problem, pool = replace(labelled(), model=norm), labelled(5, seed=5).train.columns
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    truth = world(rows=N + 5)
    insert(problem, pool, ThreatModel(2, "rows"), truth.surrogate, truth.victim, goal="b")
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm.training


def test_labels_are_beyond_reach_of_a_threat_to_inputs():
    """A table of unknown kind, whose inputs stay and whose labels do not."""
    problem = labelled(12)
    versions = replace(relabelled(problem, 3), kind=None)
    row = 3 * 4 + int((problem.train.columns[1][4] + 1) % 3)
    weights = versions.clean.copy()
    weights[versions.row == 4] = 0.0
    weights[row] = 1.0
    threat = ThreatModel(3, "inputs", epsilon=0.1)
    with pytest.raises(ValueError, match="expected labels as they were"):
        attempt(
            versions,
            weights,
            threat,
            world(rows=36).victim,
            targets=["a"],
            random=lambda _: weights,
        )


@pytest.mark.parametrize("attack", ["flips", "rows"])
def test_a_surrogate_that_forgets_the_weights_is_told(attack):
    """It trains on every row under every label; its predictions of what flips do were wrong without a word."""
    problem, how = labelled(12), Recipe(SGD(0.1), batch_size=12, epochs=2)
    problem = replace(problem, model=problem.model.double())
    outputs = Outputs(cross_entropy, problem.train).mean()

    def act(surrogate, rounds=1):
        if attack == "rows":
            pool, threat = problem.train, ThreatModel(2, "rows")
            return insert(problem, pool, threat, surrogate, victim, rounds=rounds, seeds=1)
        return flip_labels(
            problem, ThreatModel(2, "labels"), surrogate, victim, rounds=rounds, seeds=1
        )

    def victim(table, weights, seeds):
        return retrain(table, how, outputs, weights, seeds=seeds)

    many = {"flips": 36, "rows": 24}[attack]
    with pytest.raises(
        ValueError, match=f"12 of {many} versions of rows, got one around {many}: pass weights on"
    ):
        act(lambda table, w: influence(train(table, how), outputs))
    first = act(lambda table, w: influence(train(table, how, w, drop="row"), outputs))
    assert len(first.changed) == 2

    # a regression stands at the mean of its weights, and holds all over the table
    def regressed(table, w):
        found = influence(train(table, how, w, drop="row"), outputs)
        return replace(found, anchor=np.full(many, 0.5), meta={"method": "regression"})

    assert len(act(regressed).changed) == 2
