"""attribution_core.groups: group gradients are sums of rows, and grouping costs no fidelity."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    AnchorWarning,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    RetrainingTable,
    cross_entropy,
    group_subsets,
    group_table,
    influence,
    kmeans_groups,
    lds,
    magic,
    margin,
    random_groups,
    random_subsets,
    train,
)
from attribution_core.data import named
from attribution_core.gradients import directional
from attribution_core.groups import group_directional
from attribution_core.layerwise.representations import activation_gradients, representations
from attribution_core.layerwise.vectors import unflatten
from tests import menagerie

LABELS = np.array(["b", "a", "b", "c", "a", "b"])  # six rows, as the menagerie's networks have


def directions_of(problem, count=3):
    p = sum(value.numel() for value in problem.params.values())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, p, generator=generator).double()


def folded(rows, labels=LABELS):
    """Sums of rows [n, t] by label, in the order of np.unique."""
    return np.stack([np.asarray(rows)[labels == name].sum(0) for name in np.unique(labels)])


# --- group gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 256])
@pytest.mark.parametrize("name", [*menagerie.ARCHITECTURES, "odd"])
def test_groups_are_sums_of_rows(name, size):
    """float64: 1e-10 of the largest entry, rounding of sums over all parameters."""
    problem = menagerie.ODD["outside"]() if name == "odd" else menagerie.ARCHITECTURES[name]()
    v = directions_of(problem)
    names, found = group_directional(problem, v, LABELS, batch_size=size)
    expected = folded(directional(problem, v, engine="rows"))
    assert names.tolist() == ["a", "b", "c"]
    assert np.abs(found.numpy() - expected).max() < 1e-10 * np.abs(expected).max()
    by_name = group_directional(problem, unflatten(v, problem.params), LABELS, batch_size=size)[1]
    np.testing.assert_array_equal(by_name, found)


def test_weights_count_within_groups():
    problem = menagerie.mlp()
    v, w = directions_of(problem), np.linspace(0, 2, 6)
    found = group_directional(problem, v, LABELS, weights=w)[1]
    expected = folded(w[:, None] * directional(problem, v).numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_float32_agrees_to_its_precision():
    """1e-6 of the largest entry: 2^-24 times a few for the sums of 4,810 products."""
    x, y = menagerie.digits_arrays()
    problem = Problem(menagerie.digits_model(0), cross_entropy, (x[:600], y[:600]))
    v, labels = directions_of(problem).float(), random_groups(600, 50)
    found = group_directional(problem, v, labels)[1]
    assert found.dtype == torch.float32
    expected = folded(directional(problem, v).double(), labels)
    assert np.abs(found.numpy() - expected).max() < 1e-6 * np.abs(expected).max()


def test_parameters_that_no_loss_reaches_add_nothing():
    problem = menagerie.mlp()
    model = nn.Sequential(problem.model)
    model.idle = nn.Linear(2, 2).double()

    def loss(model, batch):
        return cross_entropy(model[0], batch)

    wider = Problem(model, loss, problem.train)
    v = directions_of(wider)
    own = sum(value.numel() for value in problem.params.values())
    found = group_directional(wider, v, LABELS)[1]
    np.testing.assert_allclose(found, group_directional(problem, v[:, :own], LABELS)[1], rtol=1e-12)


# --- scores of groups ------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "diagonal", "ekfac"])
def test_influence_of_groups_is_the_sum_of_its_members(curvature):
    """Whatever the grouping: the curvature is the examples' own and does not see it."""
    problem = menagerie.refit(menagerie.softmax())
    outputs = menagerie.unseen(problem, margin)
    points = influence(problem, outputs, curvature=curvature)
    for labels in (np.arange(20), np.arange(20) // 2, np.arange(20) % 5, np.zeros(20, int)):
        found = influence(problem, outputs, curvature=curvature, groups=labels)
        expected = points.grouped(labels)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.anchor, expected.anchor)


class Labels:
    """Labels that count how often an array is made of them."""

    def __init__(self, labels):
        self.labels, self.made = labels, 0

    def __array__(self, dtype=None, copy=None):
        self.made += 1
        return np.array(self.labels, dtype=dtype)


def test_labels_are_read_a_few_times_and_not_once_a_group():
    problem = menagerie.softmax(40)
    labels, weights = Labels(np.arange(40) % 20), np.tile(np.linspace(0.5, 1, 20), 2)
    found = influence(
        problem, menagerie.unseen(problem), groups=labels, weights=weights, curvature="identity", damping=1.0
    )  # fmt: skip
    np.testing.assert_allclose(found.anchor, weights[:20], rtol=1e-15)
    assert labels.made < 5


@pytest.mark.parametrize("mode", ["forward", "reverse", None])
def test_a_group_of_unequal_anchors_is_told(mode):
    """Scores are the sum over members and hold for a common shift: away from the mean anchor, not to removal."""
    problem = menagerie.softmax(12)
    outputs, labels = menagerie.unseen(problem), np.repeat(["a", "b"], [3, 9])
    w = np.ones(12)
    w[:3] = 0.0, 0.0, 3.0

    def both(w):
        if mode is None:
            by = partial(influence, problem, outputs, weights=w, curvature="identity", damping=1.0)
            return by(), lambda: by(groups=labels)
        run = train(problem, Recipe(SGD(0.1), 4, 2), w)
        return magic(run, outputs, check=False), lambda: magic(
            run, outputs, groups=labels, mode=mode, check=False
        )

    rows, by_group = both(w)
    with pytest.raises(ValueError, match="different anchors"):
        rows.grouped(labels)
    with pytest.warns(AnchorWarning, match=r"got 0 to 3 in group 'a'.*not the group's removal"):
        found = by_group()
    np.testing.assert_array_equal(found.anchor, [1.0, 1.0])
    shifted = rows.predict(w + 0.5 * (labels == "a"))
    np.testing.assert_allclose(found.predict([1.5, 1.0]), shifted, rtol=1e-10)  # order of sums
    w[:3] = 0.0
    rows, by_group = both(w)
    by_group = by_group()  # no warning: the suite takes them for errors
    np.testing.assert_allclose(by_group.scores, rows.grouped(labels).scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(by_group.anchor, [0.0, 1.0])


def test_a_curvature_of_group_sums_would_be_another():
    """Σ_G g_G g_Gᵀ depends on the grouping, by as much as its own size: why none is built from sums."""
    problem = menagerie.refit(menagerie.softmax())
    g = menagerie.row_gradients(problem)
    ours = (g.T @ g).numpy()
    sums = folded(g, np.arange(20) // 10)
    assert np.linalg.norm(sums.T @ sums - ours) > 0.5 * np.linalg.norm(ours)


# --- their truth -----------------------------------------------------------------------------

N, TARGETS, ROWS = 1024, 60, 128


@cache
def digits_problem():
    """Low digits against high ones, by logistic regression with decay: 65 parameters, one optimum."""
    x, y = menagerie.digits_arrays()
    x, side = torch.from_numpy(x).double(), torch.from_numpy(np.where(y < 5, -1.0, 1.0))
    problem = Problem(
        nn.Linear(64, 1).double(), menagerie.softplus_loss, (x[:N], side[:N]), weight_decay=1e-3
    )
    return problem, Outputs(menagerie.softplus_loss, (x[N : N + TARGETS], side[N : N + TARGETS]))


def exact_outputs(problem, outputs, weights):
    """Outputs [m, t] at the optima for weights [m, n], by Newton's method in numpy; and one optimum."""
    x, y = (c.numpy() for c in problem.train.columns)
    q, z = (c.numpy() for c in outputs.data.columns)
    x, q = (np.column_stack([a, np.ones(len(a))]) for a in (x, q))
    theta, found = np.zeros(x.shape[1]), []
    for w in weights:
        for _ in range(50):
            p = 1 / (1 + np.exp(y * (x @ theta)))  # of the wrong side
            gradient = -x.T @ (w * y * p) / N + problem.weight_decay * theta
            if np.linalg.norm(gradient) < 1e-12:
                break
            h = (x.T * (w * p * (1 - p))) @ x / N + problem.weight_decay * np.eye(len(theta))
            theta = theta - np.linalg.solve(h, gradient)
        found.append(np.logaddexp(0, -z * (q @ theta)))
    assert np.linalg.norm(gradient) < 1e-12
    return np.stack(found), theta


def fisher_of_sums(problem, outputs, labels):
    """Group scores with a curvature made of group sums, Σ_G g_G g_Gᵀ / n, as published; and as warned of."""
    g, a = (
        menagerie.row_gradients(problem).numpy(),
        menagerie.row_gradients(problem, outputs.function, outputs.data).numpy(),
    )
    sums = folded(g, labels)
    h = sums.T @ sums / N + problem.weight_decay * np.eye(g.shape[1])
    return LinearDatamodel(-sums @ np.linalg.solve(h, a.T) / N, np.zeros(TARGETS), 0.5)


def test_group_lds_is_flat_in_the_size_of_the_groups(capsys):
    """The acceptance: halves of the groups kept, exact refits, the influence function at weight ½.

    Random groups of 1, 4, 16 and 64 of 1,024 examples. The LDS differs by less than .02 between the
    sizes (its sampling error here is below .005: 128 subsets, 60 targets); that of a curvature of group
    sums falls with the size.
    """
    problem, outputs = digits_problem()
    half = np.full(N, 0.5)
    _, theta = exact_outputs(problem, outputs, half[None])
    anchored = menagerie.with_params(problem, torch.from_numpy(theta))
    found, of_sums = {}, {}
    for size in (1, 4, 16, 64):
        labels = random_groups(N, size, seed=size)
        weights = group_subsets(labels, ROWS, keep=0.5)
        truth = exact_outputs(problem, outputs, weights)[0]
        table = group_table(RetrainingTable(weights, truth[:, None], (0,)), labels)
        f = influence(anchored, outputs, curvature="hessian", weights=half, groups=labels)
        found[size] = lds(f, table)
        of_sums[size] = lds(fisher_of_sums(anchored, outputs, labels), table)
    with capsys.disabled():
        print()
        for size, score in found.items():
            print(
                f"  digits, random groups of {size}: {score}; Fisher of sums {of_sums[size].mean:.3f}"
            )
    means = [score.mean for score in found.values()]
    assert min(means) > 0.9
    assert max(means) - min(means) < 0.02
    assert of_sums[64].mean < of_sums[1].mean - 0.05


def test_the_table_of_groups_is_the_same_truth():
    """Predictions for groups are those for their members, row by row; so is everything lds says."""
    rng = np.random.default_rng(0)
    labels = random_groups(30, 4)
    weights = group_subsets(labels, 40, keep=0.5) * 0.5 + 0.25
    table = RetrainingTable(weights, rng.normal(size=(40, 2, 3)), (0, 1), {"drop": "row"})
    f = LinearDatamodel(rng.normal(size=(30, 3)), rng.normal(size=3), 1.0)
    folded_table = group_table(table, labels)
    assert folded_table.weights.shape == (40, 8)
    assert folded_table.meta == {"drop": "row", "groups": 8}
    fold = f.grouped(labels)
    predicted = fold.predict(folded_table.weights)
    np.testing.assert_allclose(predicted, f.predict(weights), rtol=1e-10, atol=1e-12)
    whole, parts = lds(f, table), lds(fold, folded_table)
    np.testing.assert_allclose(parts.per_target, whole.per_target, rtol=1e-12)
    assert parts.slope == pytest.approx(whole.slope)


def test_members_of_a_group_must_share_their_weight():
    weights = np.ones((4, 6))
    weights[2, 0] = 0.0  # a "b"
    table = RetrainingTable(weights, np.zeros((4, 1, 1)), (0,))
    with pytest.raises(ValueError, match=r"in row 2 of the table group 'b' has 0 and 1"):
        group_table(table, LABELS)
    with pytest.raises(ValueError, match=r"one group label per example, \[n=6\], got \(5,\)"):
        group_table(table, LABELS[:5])
    with pytest.raises(ValueError, match="group 'b' has"):  # as a column of pandas is
        group_table(table, LABELS.astype(object))


# --- ways to form groups ---------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(10, 1), (10, 3), (10, 10), (1024, 64)])
def test_random_groups_are_even_and_seeded(n, size):
    labels = random_groups(n, size, seed=3)
    counts = np.bincount(labels)
    assert counts.sum() == n
    assert counts.max() <= size
    assert np.ptp(counts) <= 1
    np.testing.assert_array_equal(labels, random_groups(n, size, seed=3))
    if 1 < size < n:
        assert (labels != random_groups(n, size, seed=4)).any()


def test_subsets_keep_whole_groups():
    weights = group_subsets(LABELS, 50, keep=0.67, seed=1)
    assert set(weights.ravel()) == {0.0, 1.0}
    for name in np.unique(LABELS):
        assert (np.ptp(weights[:, name == LABELS], axis=1) == 0).all()
    kept = group_table(RetrainingTable(weights, np.zeros((50, 1, 1)), (0,)), LABELS).weights
    np.testing.assert_array_equal(kept, random_subsets(3, 50, keep=0.67, seed=1))
    assert (kept.sum(1) == 2).all()


def test_kmeans_finds_clusters_far_apart():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 90)
    labels = kmeans_groups(10 * np.eye(3)[truth] + 0.1 * rng.normal(size=(90, 3)), 3)
    assert labels.shape == (90,)
    assert len(set(zip(truth, labels, strict=True))) == 3  # one label a cluster, and the other way
    again = kmeans_groups(torch.from_numpy(10 * np.eye(3)[truth]), 3, seed=1)
    assert len(set(zip(truth, again, strict=True))) == 3


def test_gradient_clusters_go_by_label_where_representations_do_not():
    """∂ℓ/∂h = Wᵀ(p − e_y) knows the label, so that a wrong one leaves its cluster; h does not."""
    x, y = menagerie.digits_arrays()
    problem = Problem(menagerie.digits_model(0), cross_entropy, (x[:600], y[:600]))
    flipped = replace(problem, train=(x[:600], (y[:600] + 1) % 10))
    before, after = (representations(p.model, p.loss, p.train) for p in (problem, flipped))
    np.testing.assert_array_equal(before, after)
    labels = kmeans_groups(activation_gradients(problem), 10)
    purity = sum(np.bincount(y[:600][labels == c]).max() for c in np.unique(labels)) / 600
    assert purity > 0.95  # at an untrained model p is near uniform, and e_y all that differs


# --- refusals --------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    problem = menagerie.mlp()
    v = directions_of(problem)
    with pytest.raises(ValueError, match=r"one group label per example, \[n=6\], got \(3,\)"):
        group_directional(problem, v, LABELS[:3])
    with pytest.raises(ValueError, match=r"expected weights \[n=6\], got \(2,\)"):
        group_directional(problem, v, LABELS, weights=[1, 2])
    with pytest.raises(ValueError, match="directions"):
        group_directional(problem, v[:, 1:], LABELS)
    with pytest.raises(ValueError, match="groups of 1 to n=6 examples, got size 7"):
        random_groups(6, 7)
    with pytest.raises(ValueError, match=r"features \[n, d\] and 1 to n clusters, got \(6,\)"):
        kmeans_groups(np.ones(6), 2)
    with pytest.raises(ValueError, match="got \\(6, 2\\) and 7 clusters"):
        kmeans_groups(np.ones((6, 2)), 7)
    active = Problem(
        nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), cross_entropy, problem.train
    )
    with pytest.raises(ValueError, match="active dropout"):
        group_directional(active, directions_of(active), LABELS)


def test_gradients_that_are_not_finite_name_their_group():
    problem = menagerie.mlp()

    def loss(model, batch):
        """√0 has a finite value and an infinite slope."""
        values = cross_entropy(model, batch)
        return values + 0.0 * (values - values.detach()).sqrt()

    bad = replace(problem, loss=loss)
    with pytest.raises(ValueError, match="NaN or infinity in group 'a'"):
        group_directional(bad, directions_of(problem), LABELS)
    with pytest.raises(ValueError, match="NaN or infinity in group 'a'"):
        group_directional(bad, directions_of(problem), LABELS.astype(object))


@pytest.mark.parametrize("nobody", [None, float("nan"), np.datetime64("NaT")])
def test_rows_of_no_group_are_told(nobody):
    with pytest.raises(ValueError, match=r"none for \[1\]"):
        named(["a", nobody, "b"], 3)
