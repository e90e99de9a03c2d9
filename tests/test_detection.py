"""applied.audit.detection: votes against dense refits, traces and repairs against victims that are linear."""

import warnings
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import expon, kstest, rankdata
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from applied.audit.detection import (
    COMBINED,
    NEIGHBOURS,
    PENALTY,
    Detection,
    _Vote,
    detect,
)
from applied.audit.repairing import Repair, shares_recovered
from applied.poisoning import ThreatModel, flip_labels, insert, repair, trace
from applied.recipe import Decision, Verified
from attribution_core import LinearDatamodel, Outputs, Problem, cross_entropy, influence
from attribution_core.data import batches
from attribution_core.refitting import refit


def clusters(n=90, classes=3, gap=4.0, seed=0):
    """Classes that lie apart: (x [n, 2], y)."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    angle = 2 * np.pi * y / classes
    return gap * np.c_[np.cos(angle), np.sin(angle)] + rng.normal(size=(n, 2)), y


def planted_flips(y, k=7, classes=3, seed=1):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(y), k, replace=False))
    wrong = y.copy()
    wrong[rows] = (y[rows] + rng.integers(1, classes, k)) % classes
    return rows, wrong


# --- single detectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 200])
def test_neighbours_by_brute_force(k):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(25, 3, 2)), rng.integers(0, 3, 25)
    found = detect(x, y, neighbours=k).scores[NEIGHBOURS]
    flat = x.reshape(25, 6)
    for i in range(25):
        distance = np.linalg.norm(flat - flat[i], axis=1)
        distance[i] = np.inf  # not its own
        near = np.argsort(distance)[: min(k, 24)]
        assert found[i] == pytest.approx((y[near] != y[i]).mean(), abs=1e-15)


@pytest.mark.parametrize("k", [1, 10, 39])
def test_rows_equally_far_share_the_last_places(k):
    """Three answers of 40 rows: places by exact distances, whole numbers; every order of rows is the same."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, (40, 3)).astype(float), rng.integers(0, 2, 40)
    found = detect(x, y, neighbours=k).scores[NEIGHBOURS]
    for i in range(40):
        rest = np.delete(np.arange(40), i)
        distance = ((x[rest] - x[i]) ** 2).sum(1)
        left, disputed = float(k), 0.0
        for r in np.unique(distance):
            at = distance == r
            taken = min(left, at.sum())
            disputed += taken * (y[rest][at] != y[i]).mean()
            left -= taken
        assert found[i] == pytest.approx(disputed / k, abs=1e-12)  # rounding of a few sums
    for order in (np.argsort(y), np.argsort(-y), rng.permutation(40)):
        turned = detect(x[order], y[order], neighbours=k).scores[NEIGHBOURS]
        np.testing.assert_allclose(turned, found[order], rtol=0, atol=1e-12)


def test_ties_of_long_rows_stay_ties():
    """Twins of 300 columns, whose distances round; in the order of the file one label would win."""
    rng = np.random.default_rng(0)
    x = np.repeat(10 * rng.normal(size=(5, 300)), 8, axis=0)
    y = np.tile(np.repeat([0, 1], 4), 5)
    found = detect(x, y, neighbours=3).scores[NEIGHBOURS]
    np.testing.assert_allclose(found, 4 / 7, rtol=1e-12)


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, planted = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3  # with ties
    found = Detection({COMBINED: scores, "other": -scores}, planted)
    a, b = scores[planted][:, None], scores[~planted]
    pairs = ((a > b) + 0.5 * (a == b)).mean()
    assert found.auc() == pytest.approx(pairs, abs=1e-12)
    assert found.auc() == pytest.approx(roc_auc_score(planted, scores), abs=1e-12)
    assert found.auc("other") == pytest.approx(1 - pairs, abs=1e-12)
    first, *rest = found.table().splitlines()
    assert first.split() == ["detector", "AUC"]
    assert [line.split()[0] for line in rest] == (
        [COMBINED, "other"] if pairs > 0.5 else ["other", COMBINED]
    )
    assert f"{found.auc():.4f}" in found.table()
    with pytest.raises(ValueError, match=r"expected planted=\[n\]"):
        Detection({COMBINED: scores}).auc()


def test_suspects_come_the_most_suspicious_first():
    found = Detection({COMBINED: np.array([0.1, -1.0, 2.0, 0.0, 0.5])})
    assert found.suspects.tolist() == [2, 4, 0]


@pytest.mark.parametrize("labelled", [False, True])
def test_without_trusted_rows_it_is_the_mean_surprise(labelled):
    """−log(1 − rank/(n + 1)), ties at their mean rank; signals are shown as they are."""
    rng = np.random.default_rng(0)
    x, y = clusters(50)
    signals = {"loss": rng.exponential(size=50), "ties": rng.integers(0, 3, 50)}
    found = detect(x, y, signals=signals) if labelled else detect(signals=signals)
    names = ["loss", "ties", *([NEIGHBOURS] if labelled else [])]
    assert list(found.scores) == [*names, COMBINED]
    expected = np.mean([-np.log(1 - rankdata(found.scores[name]) / 51) for name in names], axis=0)
    np.testing.assert_allclose(found.combined, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.scores["loss"], signals["loss"])
    assert found.suspects.tolist() == []
    assert found.table(3).splitlines()[1:][0].split()[-1] != "suspect"
    assert found.table(3).endswith("no trusted rows, so no suspects among 50 rows")


def test_surprise_of_a_signal_of_nothing_is_exponential():
    found = detect(signals={"noise": np.random.default_rng(0).normal(size=500)}).combined
    # ranks are a grid: the distance of its distribution function is 1/n at most, by construction
    assert kstest(found, expon.cdf).statistic < 2 / 500


# --- the vote --------------------------------------------------------------------------------------


def vote(n=30, m=6, width=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    eye = np.eye(classes)
    return _Vote(
        rng.normal(size=(n, width)), eye[rng.integers(0, classes, n)],
        rng.normal(size=(m, width)), eye[rng.integers(0, classes, m)],
    )  # fmt: skip


def dense_margins(v, believed):
    """The larger of every row's margins by two ridge regressions that never saw it, one solve a row and regression.

    In the second every class counts as much as another, by how many of its rows are believed.
    """
    voters = np.concatenate([v.trusted_own, v.own[believed]])
    count = voters.sum(0)
    even = len(voters) / ((count > 0).sum() * np.maximum(count, 1))
    return np.maximum(dense_vote(v, believed, np.ones(len(count))), dense_vote(v, believed, even))


def dense_vote(v, believed, of_class):
    found = []
    for i in range(len(v.phi)):
        voters = believed.copy()
        voters[i] = False
        phi = np.concatenate([v.trusted_phi, v.phi[voters]])
        own = np.concatenate([v.trusted_own, v.own[voters]])
        each = np.diag(own @ of_class)
        theta = np.linalg.solve(phi.T @ each @ phi + PENALTY * np.eye(phi.shape[1]), phi.T @ each @ own)  # fmt: skip
        p = v.phi[i] @ theta
        mine = int(v.own[i].argmax())
        found.append(p[mine] - np.delete(p, mine).max())
    return np.array(found)


@pytest.mark.parametrize("who", ["nobody", "some", "all"])
@pytest.mark.parametrize("classes", [2, 3])
def test_nobody_votes_on_itself(classes, who):
    v = vote(classes=classes)
    believed = {
        "nobody": np.zeros(30, dtype=bool),
        "some": np.random.default_rng(1).random(30) < 0.6,
        "all": np.ones(30, dtype=bool),
    }[who]
    # exact leave-one-out of a ridge; float64, matrices of a condition below 1e3
    np.testing.assert_allclose(v.one(believed), dense_margins(v, believed), rtol=0, atol=1e-11)
    if who == "all":  # a row's own vote would have been seen
        phi, own = (np.concatenate(p) for p in ((v.trusted_phi, v.phi), (v.trusted_own, v.own)))
        theta = np.linalg.solve(phi.T @ phi + PENALTY * np.eye(5), phi.T @ own)
        biased = (v.phi @ theta * v.own).sum(1)
        plain = v.weighed(believed, np.ones(classes))
        right = plain + np.where(v.own > 0, -np.inf, v.phi @ theta).max(1)
        assert np.abs(biased - right).max() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_who_votes_by_the_long_way(seed):
    """First 70 % of the rows, those doubted least; then twice those that the vote before agrees with."""
    v = vote(n=40, seed=seed)
    doubt = 3 * np.random.default_rng(seed).exponential(size=40)
    by_trusted = -np.log(1 - rankdata(-dense_margins(v, np.zeros(40, dtype=bool))) / 41)
    believed = np.isin(np.arange(40), np.argsort(by_trusted + doubt)[:28])
    for _ in range(2):
        believed = dense_margins(v, believed) > 0
    np.testing.assert_allclose(v.margins(doubt), dense_margins(v, believed), rtol=0, atol=1e-11)


def test_features_of_the_vote_are_those_of_its_kernel():
    """With fewer rows than landmarks Nyström is exact: phi phiᵀ is the Gaussian kernel, width the median."""
    x, y = clusters(30)
    v = _Vote.of(x[6:], y[6:], x[:6], y[:6])
    phi = np.concatenate([v.trusted_phi, v.phi])
    squared = ((x[:, None] - x[None]) ** 2).sum(2)
    middle = np.median(squared[np.triu_indices(30, 1)])
    np.testing.assert_allclose(phi @ phi.T, np.exp(-squared / middle), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(v.own, np.eye(3)[y[6:]])
    np.testing.assert_array_equal(v.trusted_own, np.eye(3)[y[:6]])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_suspects_are_exactly_the_planted_ones(seed, classes):
    x, y = clusters(120, classes, gap=5.0, seed=seed)
    clean, right = clusters(30, classes, gap=5.0, seed=seed + 50)
    nothing = detect(x, y, trusted=(clean, right))
    assert nothing.suspects.tolist() == []
    rows, wrong = planted_flips(y, 10, classes, seed)
    truth = np.isin(np.arange(120), rows)
    found = detect(x, wrong, trusted=(clean, right), planted=truth)
    assert sorted(found.suspects) == rows.tolist()
    assert found.auc() == 1.0
    assert found.combined[rows].min() > 0.3  # a margin of 1 is a sure vote
    assert found.combined[~truth].max() < -0.3


def test_many_flips_of_one_region_need_trusted_rows():
    """Wrong labels that outnumber the right ones of their region; a few trusted rows vote them down."""
    x, y = clusters(120, 2, gap=5.0)
    region = np.flatnonzero(y == 0)[:45]  # of 60
    wrong = y.copy()
    wrong[region] = 1
    truth = np.isin(np.arange(120), region)
    clean, right = clusters(60, 2, gap=5.0, seed=9)
    with_trusted = detect(x, wrong, trusted=(clean, right), planted=truth)
    without = detect(x, wrong, planted=truth)
    assert with_trusted.auc() == 1.0
    near, rest = without.scores[NEIGHBOURS], (y == 0) & ~truth
    assert (
        near[rest].min() > near[truth].max()
    )  # neighbours side with the majority, which is planted
    assert without.auc() < 1.0
    assert len(np.intersect1d(with_trusted.suspects, region)) == 45


def uneven(seed, share, flipped, n=600, clean=150):
    """Two classes, the second a small share of the rows: (x, y as it stands, truth, trusted), nearly separable."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + clean, 6))
    z = 1.2 * x[:, 0] - x[:, 1] + 0.2 * rng.normal(size=n + clean)
    y = (z > np.quantile(z, 1 - share)).astype(int)
    bad = np.isin(np.arange(n), rng.choice(n, round(flipped * n), replace=False))
    return x[:n], np.where(bad, 1 - y[:n], y[:n]), bad, (x[n:], y[n:])


@pytest.mark.parametrize(("share", "flipped"), [(0.2, 0.05), (0.1, 0.0)])
def test_a_small_class_is_not_suspected_for_being_small(share, flipped):
    """Of its honest rows .07 and .15 are suspected in the mean of three seeds, by a vote in which rows count alike .41 and .48.

    Of the large class .01; wrong labels are found nearly as before (.88 of them, .91).
    """
    small, large, caught = [], [], []
    for seed in range(3):
        x, y, bad, trusted = uneven(seed, share, flipped)
        suspects = np.isin(np.arange(len(x)), detect(x, y, trusted=trusted).suspects)
        small.append(suspects[(y == 1) & ~bad].mean())
        large.append(suspects[(y == 0) & ~bad].mean())
        caught.append(suspects[bad].mean() if flipped else 1.0)
    assert np.mean(small) < 0.2
    assert np.mean(large) < 0.03
    assert np.mean(caught) > 0.8


def test_row_order_does_not_matter():
    x, y = clusters(80, gap=2.0)
    clean, right = clusters(20, gap=2.0, seed=7)
    _, wrong = planted_flips(y, 9)
    signal = np.random.default_rng(0).normal(size=80)
    order = np.random.default_rng(1).permutation(80)
    first = detect(x, wrong, trusted=(clean, right), signals={"s": signal})
    second = detect(
        x[order], wrong[order], trusted=(clean[::-1], right[::-1]), signals={"s": signal[order]}
    )
    for name in first.scores:
        # inverses and Nyström's root of a Gaussian kernel, whose small eigenvalues round at 1e-8
        np.testing.assert_allclose(
            second.scores[name], first.scores[name][order], rtol=0, atol=1e-6
        )
    assert order[second.suspects].tolist() == first.suspects.tolist()


def test_labels_may_have_any_names():
    x, y = clusters(60)
    clean, right = clusters(15, seed=5)
    _, wrong = planted_flips(y, 5)
    first = detect(x, wrong, trusted=(clean, right))
    second = detect(x, 10 * wrong - 3, trusted=(clean, 10 * right - 3))
    np.testing.assert_allclose(second.combined, first.combined, rtol=0, atol=1e-12)


def test_signals_that_say_what_is_wrong_help():
    """A signal decides who is believed first; one that points at the planted rows cannot harm.

    In the mean of six seeds, whose differences have a spread of .004: a standard error of .0016.
    """
    gained, beside = [], []
    for seed in range(6):
        x, y = clusters(120, gap=1.5, seed=seed)
        clean, right = clusters(15, gap=1.5, seed=seed + 50)
        rows, wrong = planted_flips(y, 40, seed=seed + 1)
        truth = np.isin(np.arange(120), rows)
        alone = detect(x, wrong, trusted=(clean, right), planted=truth)
        signals = {"oracle": truth + 0.0}
        told = detect(x, wrong, trusted=(clean, right), planted=truth, signals=signals)
        assert told.auc("oracle") == 1.0
        gained.append(told.auc() - alone.auc())
        beside.append(told.auc() - told.auc(NEIGHBOURS))
    assert np.mean(gained) > -0.003
    assert min(beside) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": None, "labels": None}, "to detect with; got neither"),
        ({"labels": None}, "to detect with; got neither"),
        ({"features": np.zeros((0, 2)), "labels": np.zeros(0)}, "to detect with; got neither"),
        ({"labels": np.zeros(19, dtype=int)}, r"finite labels \[n=20\], got shape \(19,\)"),
        ({"planted": np.zeros(5)}, r"finite planted \[n=20\]"),
        ({"signals": {"loss": np.zeros(21)}}, r"finite loss \[n=20\], got shape \(21,\)"),
        ({"signals": {"loss": np.full(20, np.nan)}}, "finite loss"),
        ({"features": np.full((20, 2), np.inf)}, "finite features, got NaN or infinity"),
        (
            {"trusted": (np.zeros((3, 5)), np.zeros(3))},
            r"trusted features \[m, 2\] .* got \(3, 5\)",
        ),
        ({"trusted": (np.zeros((3, 2)), np.zeros(4))}, r"labels \[m\], got \(3, 2\) and \(4,\)"),
    ],
)
def test_what_cannot_be_detected_with(given, message):
    x, y = clusters(20)
    with pytest.raises(ValueError, match=message):
        detect(**{"features": x, "labels": y, **given})


# --- traces ----------------------------------------------------------------------------------------


@dataclass
class Linear:
    """Outputs c + w S, and the weights that were asked for."""

    scores: np.ndarray
    asked: list = field(default_factory=list)

    def __call__(self, weights, *, seeds):
        self.asked.append((np.array(weights), list(seeds)))
        values = 1.0 + np.asarray(weights) @ self.scores
        noise = np.stack([np.random.default_rng(s).normal(size=values.shape[1]) for s in seeds])
        return SimpleNamespace(per_seed=values[:, None] + noise)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_trace_finds_the_rows_whose_removal_lowers_it_most(k):
    rng = np.random.default_rng(0)
    scores, anchor = rng.normal(size=(9, 2)), rng.choice([0.0, 0.5, 1.0, 2.0], 9)
    ids = np.array([f"row{i}" for i in range(9)])
    f = LinearDatamodel(
        scores, 1 + anchor @ scores, anchor, ids=ids, targets=np.array(["good", "bad"])
    )
    world = Linear(scores)
    found = trace(f, "bad", k=k, retrain=world, seeds=[4, 2])
    best = max(
        (rows for size in range(1, k + 1) for rows in combinations(range(9), size)),
        key=lambda rows: (anchor * scores[:, 1])[list(rows)].sum(),
    )
    assert sorted(found.ids) == ids[list(best)].tolist()
    effect = (anchor * scores[:, 1])[f.rows(found.ids)]
    assert (np.diff(effect) <= 0).all()  # the strongest first
    np.testing.assert_array_equal(found.scores, scores[f.rows(found.ids), 1])
    # a linear world does what was predicted; its noise is shared with the control and goes
    control = found.verified.control["nothing removed"]
    np.testing.assert_allclose(
        (found.verified.actual - control)[:, 1], found.predicted, rtol=0, atol=1e-12
    )
    assert found.predicted == pytest.approx(-effect.sum(), rel=1e-12)
    assert (found.weights[list(best)] == 0).all()
    rest = np.setdiff1d(np.arange(9), best)
    np.testing.assert_array_equal(found.weights[rest], anchor[rest])
    for (w,), _ in world.asked[1:]:  # as many random rows, of those that are there
        assert (w != anchor).sum() == len(best)
        assert (w[w != anchor] == 0).all()
    assert len(world.asked) == 3
    assert trace(f, "bad", k=k).verified is None


def test_a_target_by_name_or_by_its_column():
    scores = np.array([[1.0, -1.0], [2.0, 3.0]])
    named = LinearDatamodel(scores, np.zeros(2), 1.0, targets=np.array(["mean", "worst"]))
    for target in ("worst", 1, np.int64(1)):
        assert trace(named, target, k=1).ids.tolist() == [1]
        assert trace(named, target).predicted == -3.0
    assert trace(named).predicted == -3.0  # the first column: 1 + 2
    assert trace(named).ids.tolist() == [1, 0]
    numbered = LinearDatamodel(scores, np.zeros(2), 1.0, targets=np.array([7, 3]))
    assert trace(numbered, 3).predicted == -3.0
    assert trace(numbered, 3).ids.tolist() == [1]
    for target in ("best", 2, -1, None, 1.5):
        with pytest.raises(ValueError, match=r"a target among \['mean', 'worst'\], got"):
            trace(named, target)


def test_a_trace_without_a_culprit():
    f = LinearDatamodel([[-1.0], [2.0], [0.0]], [0.0], [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="rows that raise '0', got none; is it a loss"):
        trace(f)  # the only one that raises it was not there
    few = LinearDatamodel([[-1.0], [2.0], [3.0]], [0.0], 1.0)
    assert trace(few, k=10).ids.tolist() == [2, 1]


def test_a_trace_of_a_logistic_regression():
    """A wrong twin of a row stands behind its loss, and refitting without it says so."""
    x, y = clusters(60, 2, gap=1.5)
    x = np.r_[x, x[:1] * 1.1]
    y = np.r_[y, 1 - y[0]]
    estimator = LogisticRegression(C=5.0, solver="newton-cholesky", tol=1e-10).fit(x, y)
    problem = Problem.from_sklearn(estimator, x, y)
    outputs = Outputs(cross_entropy, problem.train[[0]])
    f = influence(problem, outputs, curvature="hessian")

    def retrain(weights, *, seeds):
        return refit(estimator, problem, outputs, weights, seeds=seeds)

    found = trace(f, k=1, retrain=retrain, seeds=3)
    assert found.ids.tolist() == [60]
    actual = (found.verified.actual - found.verified.control["nothing removed"])[:, 0]
    random = (found.verified.control["random"] - found.verified.control["nothing removed"])[:, 0]
    assert (actual < random).all()
    assert 0.5 < found.predicted / actual[0] < 2  # a row that takes itself out moves its own weight


# --- repairs ---------------------------------------------------------------------------------------


@dataclass
class World:
    """A victim 3 + w S, with noise of the seed."""

    scores: np.ndarray

    def surrogate(self, table, w):
        return LinearDatamodel(self.scores, 3 + w @ self.scores, w, targets=np.array(["loss", "b"]))

    def victim(self, table, weights, seeds):
        noise = np.stack([np.random.default_rng(s).normal(size=2) for s in seeds])
        return SimpleNamespace(per_seed=(3 + np.asarray(weights) @ self.scores)[:, None] + noise)


N = 10


def attacked(kind="labels", seeds=3):
    rng = np.random.default_rng(0)
    y = torch.arange(N) % 2
    problem = Problem(
        nn.Linear(2, 2), cross_entropy, (torch.from_numpy(rng.normal(size=(N, 2))), y)
    )
    if kind == "labels":
        world = World(rng.normal(size=(2 * N, 2)))
        return flip_labels(
            problem, ThreatModel(3, "labels"), world.surrogate, world.victim, goal="loss", seeds=seeds
        ), world  # fmt: skip
    world = World(rng.normal(size=(N + 6, 2)))
    pool = (torch.zeros(6, 2).double(), torch.zeros(6).long())
    return insert(
        problem, pool, ThreatModel(3, "rows"), world.surrogate, world.victim, goal="loss", seeds=seeds
    ), world  # fmt: skip


def test_without_the_rows_brought_in_all_of_it_comes_back():
    attack, world = attacked("rows")
    places = attack.places
    suspicion = np.zeros(N + 3)
    suspicion[places] = 1.0
    mended = repair(attack, suspicion, world.victim, remove=3)
    assert sorted(mended.removed) == places.tolist()
    assert mended.planted == 3
    for j in (0, "b", "loss", 1):
        share = mended.recovered(j)
        assert share.mean == pytest.approx(1.0, abs=1e-10)  # noise of size 1 added and taken away
        assert share.high - share.low < 1e-10
        assert mended.recovered(j, arm="planted").mean == pytest.approx(1.0, abs=1e-10)
    lines = mended.table().splitlines()
    assert lines[0] == "3 rows removed, 3 of them planted"
    assert lines[2].split()[0] == "loss"
    assert str(mended.recovered(0)) in lines[2]


def test_flipped_rows_are_lost_with_their_flips():
    """Removing the flipped rows undoes the new labels, not the loss of the old ones:

    recovered = Σ new / (Σ new − Σ old) of a linear victim, whichever rows are removed beside.
    """
    attack, world = attacked("labels")
    s = world.scores
    places = attack.places
    new = np.flatnonzero((attack.weights > 0) & (attack.versions.clean == 0))
    old = np.flatnonzero((attack.weights == 0) & (attack.versions.clean > 0))
    there = np.flatnonzero(attack.weights)
    other = np.setdiff1d(np.arange(N), places)[:1]
    for removed in (places, places[:2], np.r_[places, other]):
        suspicion = np.zeros(N)
        suspicion[removed] = np.linspace(2, 1, len(removed))
        mended = repair(attack, suspicion, world.victim, remove=len(removed))
        assert mended.removed.tolist() == removed.tolist()  # the most suspicious first
        assert mended.planted == len(np.intersect1d(removed, places))
        for j in range(2):
            expected = s[there[removed], j].sum() / (s[new, j].sum() - s[old, j].sum())
            assert mended.recovered(j).mean == pytest.approx(expected, rel=1e-9)
            # the best that taking rows away can do: exactly the planted ones
            best = s[new, j].sum() / (s[new, j].sum() - s[old, j].sum())
            assert mended.recovered(j, arm="planted").mean == pytest.approx(best, rel=1e-9)


def mended_by(attacked, clean, repaired):
    """A repair of one output of some victims, [s] each; random removal brings nothing back."""
    attacked, clean, repaired = (np.array(x)[:, None] for x in (attacked, clean, repaired))
    decision = Decision(np.ones(4), np.arange(4), np.zeros(1), np.zeros(1), np.array(["loss"]))
    arms, seeds = {"random": attacked, "planted": clean}, list(range(len(clean)))
    verified = Verified(decision, repaired, arms, dict.fromkeys(arms, 1.0), seeds)
    return Repair(np.arange(2), 2, verified, attacked, clean, ["loss"])


def test_ties_are_looked_for_only_where_the_next_row_is_as_far(monkeypatch):
    """Without ties no row is compared with all others; of 200 rows two of which have a twin, some are."""
    asked = []
    monkeypatch.setattr(
        "applied.audit.detection.batches",
        lambda rows, size: asked.append(len(rows)) or batches(rows, size),
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)), rng.integers(0, 3, 200)
    detect(x, y, neighbours=5)
    x[[7, 50]] = x[[8, 51]]
    mixed = detect(x, y, neighbours=5).scores[NEIGHBOURS]
    assert asked[0] == 0
    assert 0 < asked[1] < 30
    far = ((x[:, None] - x) ** 2).sum(-1)
    np.fill_diagonal(far, np.inf)
    for i in range(200):
        fifth = np.sort(far[i])[4]
        nearer, at = far[i] < fifth - 1e-9, np.abs(far[i] - fifth) <= 1e-9
        share = (5 - nearer.sum()) / at.sum()
        other = y != y[i]
        assert mixed[i] == pytest.approx(((other & nearer).sum() + share * (other & at).sum()) / 5)


def test_what_came_back_is_not_ruled_by_victims_of_hardly_any_damage():
    """Of each .05 did not come back, of one there was but .002: a mean of ratios is −3.4. The interval is by hand."""
    damage = np.array([0.6, 0.002, 0.5, 0.55, 0.6, 0.5])
    found = mended_by(0.4 + damage, np.full(6, 0.4), np.full(6, 0.45)).recovered()
    r = (damage - 0.05).sum() / damage.sum()
    assert found.mean == pytest.approx(r, rel=1e-12)
    off = ((damage - 0.05) - r * damage) / damage.mean()
    half = student.ppf(0.975, 5) * np.sqrt((off**2).sum() / 5 / 6)
    assert (found.low, found.high) == pytest.approx((r - half, r + half), rel=1e-9)


def test_no_damage_no_share_of_it():
    """None, or rounding's, of one victim or three, and damage whose interval holds 0; of one victim the interval is unknown."""
    for attacked in ([0.4], [0.4] * 3, [0.4 + 1e-15] * 3, [0.7, 0.2, 0.35]):
        mended = mended_by(attacked, [0.4] * len(attacked), [0.45] * len(attacked))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isnan(mended.recovered().mean)
            assert mended.table().splitlines()[-1].split()[-1] == "-"
    one = mended_by([1.0], [0.4], [0.55]).recovered()
    assert one.mean == pytest.approx(0.75)
    lowered = mended_by([0.7, 0.8], [0.9, 1.0], [0.85, 0.95])  # an accuracy: damage below 0
    assert lowered.recovered().mean == pytest.approx(0.75)


def test_two_victims_have_a_share_without_a_test():
    """Damage .5 and .6, whose interval of two holds 0; the same of three is tested, and of a fall where none counts, none."""
    mended = mended_by([0.9, 1.0], [0.4, 0.4], [0.5, 0.5])
    assert mended.recovered().mean == pytest.approx(0.9 / 1.1)
    assert mended.table().splitlines()[-1].split()[-1] != "-"
    three = np.array([0.7, 0.05, -0.2])
    assert len(shares_recovered(three[:2], three[:2])) == 2
    assert len(shares_recovered(three, three)) == 0
    fall = np.array([-0.5, -0.6, -0.55])
    assert len(shares_recovered(fall, fall)) == 3
    assert len(shares_recovered(fall, fall, rises=True)) == 0
    assert len(shares_recovered(-fall, fall, 0.6, rises=True)) == 0
    assert len(shares_recovered(fall[:0], fall[:0])) == 0


def test_a_detection_says_how_many():
    attack, world = attacked("labels")
    scores = -np.ones(N)
    scores[[4, 7]] = 0.5, 1.5
    mended = repair(attack, Detection({COMBINED: scores}), world.victim)
    assert mended.removed.tolist() == [7, 4]
    one = repair(attack, Detection({COMBINED: scores}), world.victim, remove=1)
    assert one.removed.tolist() == [7]


def test_random_removal_takes_as_many_of_the_rows_that_are_there():
    attack, world = attacked("labels", seeds=[5, 1, 9])
    asked = []

    def victim(table, weights, seeds):
        assert table is attack.versions.problem
        asked.append((np.array(weights), list(seeds)))
        return world.victim(table, weights, seeds)

    mended = repair(attack, np.arange(N), victim, remove=4)
    (fixed, seeds), *drawn = asked
    assert seeds == [5, 1, 9]
    assert [s for _, s in drawn] == [[5], [1], [9]]
    np.testing.assert_array_equal(fixed[1], attack.weights * attack.versions.clean)
    for w in (fixed[0], *(one[0] for one, _ in drawn)):
        assert ((attack.weights > 0) & (w == 0)).sum() == 4
        assert (w[attack.weights == 0] == 0).all()
    assert len({tuple(w) for (w,), _ in drawn}) == 3
    random = mended.recovered(0, arm="random")
    lost = attack.outputs()[:, 0] - attack.outputs("no attack")[:, 0]
    expected = (attack.outputs()[:, 0] - mended.verified.control["random"][:, 0]) / lost
    assert random.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert random.low < random.mean < random.high


def test_row_order_of_suspicion_is_that_of_the_poisoned_data():
    attack, world = attacked("labels")
    _, labels = attack.poisoned.train[list(range(N))]
    changed = np.flatnonzero(labels.numpy() != np.arange(N) % 2)
    mended = repair(attack, np.isin(np.arange(N), changed).astype(float), world.victim, remove=3)
    assert mended.planted == 3


@pytest.mark.parametrize(
    ("suspicion", "given", "message"),
    [
        (np.ones(N - 1), {"remove": 1}, r"suspicion \[n=10\], got \(9,\)"),
        (np.ones(2 * N), {"remove": 1}, r"suspicion \[n=10\], got \(20,\)"),
        (np.ones(N), {}, "`remove` beside plain scores"),
        (
            Detection({COMBINED: np.ones(N)}, signed=False),
            {},
            "`remove` beside a detection without trusted",
        ),
        (np.ones(N), {"remove": 0}, "some, not all, of 10 rows to remove, got 0"),
        (np.ones(N), {"remove": N}, "some, not all, of 10 rows to remove, got 10"),
        (Detection({COMBINED: -np.ones(N)}), {}, "some, not all, of 10 rows to remove, got 0"),
        (np.ones(N), {"remove": 1, "seeds": 2}, r"the attack's seeds \[0, 1, 2\], got \[0, 1\]"),
        (np.ones(N), {"remove": 1, "seeds": [0, 2, 1]}, "pairs need the same"),
    ],
)
def test_repairs_that_make_no_sense(suspicion, given, message):
    attack, world = attacked("labels")
    with pytest.raises(ValueError, match=message):
        repair(attack, suspicion, world.victim, **given)


def test_a_trace_is_predicted_beside_the_random_removal_that_it_is_compared_with():
    scores, seeds = np.arange(1.0, 9.0)[:, None], range(400)
    f = LinearDatamodel(scores, scores.sum(0), 1.0)
    found = trace(f, k=3, retrain=Linear(scores), seeds=seeds)
    told = (found.verified.decision.predicted - found.verified.decision.baseline)[0]
    assert told == pytest.approx(-21 + 3 * 4.5)
    real = found.verified.difference("random")
    assert abs(real.mean - told) < 4 * scores.std() * np.sqrt(
        3 / len(seeds)
    )  # of three random rows


def test_names_of_detectors_are_taken_and_one_class_is_no_label():
    x = np.random.default_rng(0).normal(size=(6, 2))
    y = np.array([0, 1, 0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"other names of signals than \['combined', 'neighbours'\]"
    ):
        detect(x, y, signals={"neighbours": np.ones(6), "combined": np.ones(6)})
    with pytest.raises(ValueError, match="two classes or more"):
        detect(x, np.zeros(6, int), trusted=(x, np.zeros(6, int)))


def test_suspicion_of_nan_is_refused():
    attack, world = attacked("labels")
    suspicion = np.r_[np.nan, np.zeros(N - 1)]
    with pytest.raises(ValueError, match="suspicion of each row, got 1 NaN"):
        repair(attack, suspicion, world.victim, remove=1)


@pytest.mark.parametrize("moved", ["constant column", "offset"])
def test_where_the_origin_lies_does_not_matter(moved):
    x, y = clusters(120)
    _, wrong = planted_flips(y)
    far = np.c_[x, np.full(len(x), 1e9)] if moved == "constant column" else x + 1e9
    clean = slice(0, 30)
    here = detect(x[30:], wrong[30:], trusted=(x[clean], y[clean]))
    there = detect(far[30:], wrong[30:], trusted=(far[clean], y[clean]))
    # features of 1e9 keep 7 digits of differences
    np.testing.assert_allclose(there.combined, here.combined, atol=1e-4)


def test_labels_that_are_no_numbers():
    x, y = clusters()
    with pytest.raises(ValueError, match=r"expected numbers for labels, got <U.*np.unique"):
        detect(x, y.astype(str))
    with pytest.raises(ValueError, match="at least one neighbour"):
        detect(x, y, neighbours=0)
    with pytest.raises(ValueError, match="finite trusted features"):
        detect(x, y, trusted=(np.full((3, 2), np.nan), [0, 1, 2]))


@pytest.mark.parametrize(("x", "y"), [(np.zeros((0, 2)), []), (np.ones((2, 2)), [0.0, np.nan])])
def test_trusted_rows_that_are_none(x, y):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="finite trusted features and labels"):
        detect(rng.normal(size=(20, 2)), np.arange(20) % 2, trusted=(x, np.array(y)))


def test_trusted_labels_that_are_text_are_to_be_numbered():
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    with pytest.raises(ValueError, match="numbers for trusted labels, got <U1; number the classes"):
        detect(x, y, trusted=(x[:4], ["0", "1", "0", "1"]))
    broken = np.where(np.arange(4)[:, None] == 2, np.nan, x[:4])
    with pytest.raises(ValueError, match="got NaN or infinity in 1 of 4 rows"):
        detect(x, y, trusted=(broken, y[:4]))
    with pytest.raises(ValueError, match="in 0 of 0 rows"):
        detect(x, y, trusted=(x[:0], y[:0]))


@pytest.mark.parametrize("planted", [0, 30])
def test_detectors_are_not_judged_where_nothing_or_everything_is_planted(planted):
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    found = detect(x, y, planted=np.full(30, planted > 0))
    with pytest.raises(
        ValueError, match=f"planted rows and others .*, got {planted} planted of 30"
    ):
        found.auc()
    assert found.table(3).splitlines()[-1] == "no trusted rows, so no suspects among 30 rows"


def test_the_order_of_many_rows_is_nothing():
    """Of 680 rows 500 are landmarks; drawn by place, they moved scores by up to .04."""
    rng = np.random.default_rng(0)
    x, clean = rng.normal(size=(600, 6)), rng.normal(size=(80, 6))
    y, clean_y = ((some[:, 0] > 0).astype(int) for some in (x, clean))
    y[:40] ^= 1
    order = rng.permutation(600)
    one = detect(x, y, trusted=(clean, clean_y))
    two = detect(x[order], y[order], trusted=(clean, clean_y))
    # sums of 680 rows in another order, through the inverse of a matrix of condition 1e3
    np.testing.assert_allclose(two.combined, one.combined[order], atol=1e-9)
