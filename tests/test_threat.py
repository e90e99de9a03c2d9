"""applied.audit.threat: what cannot be met is refused, and the ball is a projection."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from applied.audit.threat import ThreatModel

INPUTS = {"budget": 1, "may_change": "inputs", "epsilon": 0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, "at least one row.* got 0"),
        ({"budget": -1}, "got -1"),
        ({"budget": 2.5}, "got 2.5"),
        ({"budget": float("inf")}, "got inf"),
        ({"budget": float("nan")}, "got nan"),
        ({"may_change": "features"}, "labels, inputs or rows, got 'features'"),
        ({"knowledge": "nothing"}, "'white-box', .*, got 'nothing'"),
        ({"clean_label": True}, "cannot be met: clean_label"),
        ({"source_quota": 0}, "source_quota of at least 1, got 0"),
        ({"epsilon": 0.1}, "epsilon for inputs and for nothing else, got may_change='labels'"),
        ({"may_change": "rows", "epsilon": 0.1}, "epsilon for inputs and for nothing else"),
        ({"may_change": "inputs"}, "may_change='inputs' with epsilon=None"),
        ({**INPUTS, "epsilon": 0.0}, "positive epsilon, got 0.0"),
        ({**INPUTS, "epsilon": float("inf")}, "positive epsilon, got inf"),
        ({**INPUTS, "epsilon": float("nan")}, "positive epsilon, got nan"),
        ({**INPUTS, "norm": "1"}, "norm 'inf' or '2', got '1'"),
        ({**INPUTS, "box": (1.0, 0.0)}, r"box \(low, high\), got \(1.0, 0.0\)"),
        ({**INPUTS, "box": (1.0, 1.0)}, r"box \(low, high\)"),
    ],
)
def test_threats_that_are_none_are_refused(given, message):
    sound = {"budget": 3, "may_change": "labels"}
    ThreatModel(**sound)
    with pytest.raises(ValueError, match=message):
        ThreatModel(**{**sound, **given})


@pytest.mark.parametrize("may_change", ["inputs", "rows"])
def test_clean_labels_leave_the_rest_within_reach(may_change):
    epsilon = 0.5 if may_change == "inputs" else None
    threat = ThreatModel(1, may_change, clean_label=True, epsilon=epsilon)
    assert "labels beyond reach" in str(threat)


@pytest.mark.parametrize(
    ("budget", "n", "rows"), [(0.5, 10, 5), (0.06, 10, 1), (0.99, 10, 10), (1, 10, 1), (10, 10, 10), (7.0, 9, 7)]
)  # fmt: skip
def test_a_budget_in_rows(budget, n, rows):
    found = ThreatModel(budget, "labels").rows(n)
    assert found == rows
    assert isinstance(found, int)


@pytest.mark.parametrize(("budget", "n"), [(11, 10), (0.04, 10), (1, 0)])
def test_a_budget_that_the_rows_do_not_hold(budget, n):
    with pytest.raises(ValueError, match=f"cannot be met: expected a budget of 1 to {n} rows"):
        ThreatModel(budget, "labels").rows(n)


# --- sources ---------------------------------------------------------------------------------------


def test_sources_are_needed_with_a_quota_only():
    free = ThreatModel(2, "labels")
    assert free.check("labels", None, 6) is None
    assert free.check("labels", ["a"], 6) is None  # nothing is asked of them
    threat = ThreatModel(2, "labels", source_quota=1)
    with pytest.raises(ValueError, match=r"expected sources \[n=6\] beside source_quota=1, got no"):
        threat.check("labels", None, 6)
    with pytest.raises(ValueError, match=r"expected sources \[n=6\], got \(5,\)"):
        threat.check("labels", list("aabbc"), 6)
    assert threat.check("labels", list("aabbcc"), 6).tolist() == list("aabbcc")


@pytest.mark.parametrize("nobody", [float("nan"), None])
@pytest.mark.parametrize("kind", [list, lambda labels: np.array(labels, dtype=object)])
def test_rows_of_no_source_are_refused_beside_a_quota(kind, nobody):
    """NaN is no other NaN: each such row was a source of its own, with a quota of its own."""
    threat = ThreatModel(2, "labels", source_quota=1)
    with pytest.raises(ValueError, match=r"got none for \[1, 2\]; name them"):
        threat.check("labels", kind(["a", nobody, nobody, "b"]), 4)
    if nobody is not None:
        with pytest.raises(ValueError, match=r"got none for \[1, 2\]; name them"):
            threat.check("labels", np.array([0.0, nobody, nobody, 1.0]), 4)


def test_a_quota_that_leaves_too_few_rows():
    """Sources of 3, 2 and 1 rows with a quota of 2 leave 2 + 2 + 1 = 5."""
    sources = list("aaabbc")
    assert ThreatModel(5, "labels", source_quota=2).check("labels", sources, 6) is not None
    with pytest.raises(ValueError, match="6 rows, while a quota of 2 a source leaves 5"):
        ThreatModel(6, "labels", source_quota=2).check("labels", sources, 6)


def test_another_kind_of_attack_is_refused():
    with pytest.raises(
        ValueError, match="may_change='rows', got 'labels'; this attack changes row"
    ):
        ThreatModel(1, "labels").check("rows", None, 5)


# --- the ball --------------------------------------------------------------------------------------


def nearest(threat, x, original):
    """The plain way, one row after another; the box holds the originals."""
    found = []
    for a, b in zip(x, original, strict=True):
        moved = a - b
        if threat.norm == "inf":
            moved = np.minimum(np.maximum(moved, -threat.epsilon), threat.epsilon)
        elif np.sqrt((moved**2).sum()) > threat.epsilon:
            moved = moved * threat.epsilon / np.sqrt((moved**2).sum())
        low, high = threat.box or (-np.inf, np.inf)
        found.append(np.minimum(np.maximum(b + moved, low), high))
    return np.stack(found)


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3, 3)])
def test_within_is_the_projection(norm, box, shape):
    rng = np.random.default_rng(0)
    original = rng.uniform(0, 1, shape)
    threat = ThreatModel(1, "inputs", norm=norm, epsilon=0.3, box=box)
    x = original + rng.normal(size=shape)
    x[0] = original[0]  # no move, whose length is 0
    x[1] = original[1] + 0.01 * rng.choice([-1.0, 1.0], shape[1:])
    found = threat.within(x, original)
    # float64; one multiplication and one division in another order
    np.testing.assert_allclose(found, nearest(threat, x, original), rtol=0, atol=1e-14)
    size = np.abs(found - original).reshape(len(x), -1)
    length = size.max(1) if norm == "inf" else np.linalg.norm(size, axis=1)
    assert (length <= 0.3 + 1e-14).all()
    assert (length > 0.29).any() or box is not None  # some were brought back to its edge
    np.testing.assert_allclose(threat.within(found, original), found, rtol=0, atol=1e-14)
    if box is None:
        np.testing.assert_array_equal(found[0], original[0])
        np.testing.assert_allclose(found[1], x[1], rtol=0, atol=1e-15)  # inside: as it is
    else:
        assert found.min() >= 0
        assert found.max() <= 1


@given(seed=st.integers(0, 10**6), norm=st.sampled_from(["inf", "2"]))
def test_nothing_in_the_ball_is_nearer(seed, norm):
    rng = np.random.default_rng(seed)
    original, x = rng.normal(size=(2, 1, 3))
    threat = ThreatModel(1, "inputs", norm=norm, epsilon=0.5)
    found = threat.within(x, original)
    others = original + rng.uniform(-0.5, 0.5, (200, 3))
    if norm == "2":
        others = others[np.linalg.norm(others - original, axis=1) <= 0.5]
    best = np.linalg.norm(others - x, axis=1).min()
    assert np.linalg.norm(found - x) <= best + 1e-12


def test_it_says_what_it_is():
    text = str(ThreatModel(0.05, "inputs", "grey-box", "2", 0.5, (0.0, 1.0), source_quota=3))
    for words in ("inputs of 0.05 of the rows", "grey-box", "within 0.5 (2 norm)",
                  "inputs in [0, 1]", "at most 3 rows a source"):  # fmt: skip
        assert words in text
    assert str(ThreatModel(4, "labels")) == "may change labels of 4 rows, white-box"


@pytest.mark.parametrize(
    ("given", "kept"), [("linf", "inf"), (np.inf, "inf"), ("L2", "2"), (2, "2"), (2.0, "2")]
)
def test_norms_by_other_names(given, kept):
    assert ThreatModel(1, "inputs", norm=given, epsilon=1.0).norm == kept


def test_originals_outside_the_box_cannot_be_met():
    threat = ThreatModel(1, "inputs", epsilon=0.1, box=(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"originals in the box \[0, 1\], got some in \[1.5, 1.5\]"
    ):
        threat.within(np.array([[1.5]]), np.array([[1.5]]))


def test_normalised_inputs_are_in_their_box_to_rounding():
    box = ((0 - 0.1307) / 0.3081, (1 - 0.1307) / 0.3081)
    white = ((np.float32(1) - np.float32(0.1307)) / np.float32(0.3081)).astype(np.float32)
    x = np.array([[white, np.float32(box[0])]])
    threat = ThreatModel(1, "inputs", epsilon=0.1, box=box)
    assert threat.within(x, x).max() <= box[1]
