"""attribution_core.datamodel: the affine law, its folds and combinations, its folder, its refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution_core import LinearDatamodel, average

N, T = 7, 3
# a handful of float64 additions
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make(seed=0, **changes):
    rng = np.random.default_rng(seed)
    given = {
        "scores": rng.normal(size=(N, T)),
        "base": rng.normal(size=T),
        "anchor": rng.uniform(size=N),
        "ids": [f"doc{i}" for i in range(N)],
        "targets": ["a", "b", "c"],
        "meta": {"method": "test", "damping": 0.5},
    }
    return LinearDatamodel(**{**given, **changes})


@given(st.lists(st.floats(-5, 5), min_size=N, max_size=N))
def test_predict_is_affine_in_the_weights(weights):
    f = make()
    expected = [
        f.base[j]
        + sum((w - a) * s for w, a, s in zip(weights, f.anchor, f.scores[:, j], strict=True))
        for j in range(T)
    ]
    np.testing.assert_allclose(f.predict(weights), expected, **EXACT)


def test_predict_at_the_anchor_is_the_base_and_rows_are_independent():
    f = make()
    np.testing.assert_allclose(f.predict(f.anchor), f.base, **EXACT)
    many = np.random.default_rng(1).normal(size=(4, N))
    np.testing.assert_allclose(f.predict(many), [f.predict(row) for row in many], **EXACT)


def test_scores_are_the_slopes():
    f = make()
    for i in range(N):
        up = f.anchor + np.eye(N)[i]
        np.testing.assert_allclose(f.predict(up) - f.base, f.scores[i], **EXACT)


def test_without_sets_weights_to_zero_and_others_to_one():
    f = make()
    w = np.ones(N)
    w[[5, 2]] = 0
    np.testing.assert_array_equal(f.without(["doc5", "doc2"]), f.predict(w))
    np.testing.assert_array_equal(f.without([]), f.predict(np.ones(N)))


def test_rows_of_ids_in_the_order_asked_for():
    f = make(ids=[30, 10, 20, 70, 60, 50, 40])
    assert f.rows([70, 10, 30]).tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("ids", "asked"), [(list("abcdefg"), ["a", "z"]), (range(N), [0, 99]), (range(N), ["a"])]
)
def test_unknown_ids(ids, asked):
    with pytest.raises(KeyError, match="unknown ids"):
        make(ids=list(ids)).without(asked)


def test_groups_add_up():
    f = make(anchor=1.0)
    groups = np.array(["x", "y", "x", "x", "z", "y", "z"])
    g = f.grouped(groups)
    assert g.ids.tolist() == ["x", "y", "z"]
    shared = np.array([0.3, 0.0, 2.0])
    by_member = shared[np.searchsorted(g.ids, groups)]
    np.testing.assert_allclose(g.predict(shared), f.predict(by_member), **EXACT)


def test_groups_of_half_precision_scores_add_up_exactly():
    f = make(anchor=1.0, scores=np.full((N, T), 0.1, dtype=np.float16))
    g = f.grouped(np.zeros(N))
    np.testing.assert_allclose(g.scores, N * np.float64(np.float16(0.1)), **EXACT)


def test_combine_and_mean_commute_with_predict():
    f = make()
    matrix = np.random.default_rng(1).normal(size=(T, 2))
    w = np.linspace(0, 1, N)
    np.testing.assert_allclose(f.combine(matrix).predict(w), f.predict(w) @ matrix, **EXACT)
    assert f.combine(matrix).targets.tolist() == [0, 1]
    assert f.combine(matrix, targets=["p", "q"]).targets.tolist() == ["p", "q"]
    np.testing.assert_allclose(f.mean().predict(w), [f.predict(w).mean()], **EXACT)
    assert f.mean().targets.tolist() == ["mean"]


def test_average_predicts_the_average():
    several = [make(seed, anchor=1.0) for seed in range(3)]
    w = np.linspace(0, 1, N)
    f = average(several)
    np.testing.assert_allclose(f.predict(w), np.mean([g.predict(w) for g in several], 0), **EXACT)
    assert f.meta["averaged"] == 3


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"ids": range(N)}, "ids"), ({"targets": range(T)}, "targets"), ({"anchor": 0.5}, "anchor")],
)
def test_average_of_different_things(changes, name):
    with pytest.raises(ValueError, match=f"datamodels with different {name} cannot be averaged"):
        average([make(), make(**changes)])


def with_parts(seed=0):
    f = make(seed, anchor=1.0)
    parts = np.random.default_rng(seed).standard_normal((3, N, T))
    return replace(f, scores=parts.sum(0), parts=parts, spread=np.ones((N, T)))


def test_parts_move_with_the_scores_and_spread_does_not():
    f = with_parts()
    labels = np.arange(N) % 2
    for g in (f.grouped(labels), f.combine(np.ones((T, 2))), average([f, with_parts(1)])):
        np.testing.assert_allclose(g.parts.sum(0), g.scores, **EXACT)
    assert f.grouped(labels).spread is None
    assert f.combine(np.ones((T, 2))).spread is None
    np.testing.assert_allclose(f.part(0, 2).scores, f.parts[0] + f.parts[2], **EXACT)
    np.testing.assert_array_equal(f.part(1).base, f.base)
    with pytest.raises(ValueError, match="expected a datamodel with parts"):
        make().part(0)


def test_spread_is_the_deviation_over_what_is_averaged():
    several = [make(seed, anchor=1.0) for seed in range(3)]
    expected = np.std([f.scores for f in several], axis=0, ddof=1)
    np.testing.assert_allclose(average(several).spread, expected, **EXACT)
    assert average(several[:1]).spread is None


def test_another_anchor_is_the_same_function():
    f, w = make(), np.random.default_rng(5).uniform(size=N)
    for anchor in (0.0, np.linspace(0, 1, N)):
        np.testing.assert_allclose(f.at(anchor).predict(w), f.predict(w), **EXACT)
        np.testing.assert_array_equal(f.at(anchor).anchor, np.broadcast_to(anchor, N))


def test_parts_and_spread_on_disk(tmp_path):
    f = with_parts()
    f.save(tmp_path)
    g = LinearDatamodel.load(tmp_path)
    np.testing.assert_array_equal(g.parts, f.parts)
    np.testing.assert_array_equal(g.spread, f.spread)
    make().save(tmp_path)
    g = LinearDatamodel.load(tmp_path)
    assert (g.parts, g.spread) == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": np.zeros((N, T))}, r"expected parts \[k, n, t\] beside scores \[n=7"),
        ({"spread": np.zeros((2, N, T))}, r"expected spread \[n, t\] beside scores"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make(), **changes)


def test_average_of_nothing():
    with pytest.raises(ValueError, match="at least one datamodel to average, got none"):
        average([])


# --- the folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, range(N), [f"doc{i}" for i in range(N)]])
def test_saved_and_loaded_is_the_same(tmp_path, ids):
    f = make(ids=ids)
    f.save(tmp_path / "deep" / "folder")
    for mmap in (True, False):
        g = LinearDatamodel.load(tmp_path / "deep" / "folder", mmap=mmap)
        assert isinstance(g.scores, np.memmap) == mmap
        for name in ("scores", "base", "anchor", "ids", "targets"):
            np.testing.assert_array_equal(getattr(g, name), getattr(f, name))
        assert g.meta == f.meta


def test_ids_of_any_type_come_back_as_text(tmp_path):
    f = make(ids=np.array([f"doc{i}" for i in range(N)], dtype=object))
    f.save(tmp_path)
    assert LinearDatamodel.load(tmp_path).ids.tolist() == f.ids.tolist()


def test_a_loaded_datamodel_can_be_saved_where_it_came_from(tmp_path):
    """Its scores are a map of the very file that is written."""
    f = make()
    f.save(tmp_path)
    loaded = LinearDatamodel.load(tmp_path)
    replace(loaded, meta={"note": "again"}).save(tmp_path)
    again = LinearDatamodel.load(tmp_path)
    np.testing.assert_array_equal(again.scores, f.scores)
    np.testing.assert_array_equal(loaded.scores, f.scores)
    assert again.meta == {"note": "again"}


def test_no_datamodel_in_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no datamodel in .*datamodel.json is missing"):
        LinearDatamodel.load(tmp_path)


def test_a_folder_of_another_format(tmp_path):
    make().save(tmp_path)
    path = tmp_path / "datamodel.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match=r"cannot read .*format 99, this version reads 1"):
        LinearDatamodel.load(tmp_path)


@pytest.mark.parametrize("name", ["scores.npy", "ids.npy", "datamodel.json"])
def test_a_damaged_folder(tmp_path, name):
    make().save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cannot read .* save the datamodel again"):
        LinearDatamodel.load(tmp_path)


def test_a_folder_with_a_file_missing(tmp_path):
    make().save(tmp_path)
    (tmp_path / "base.npy").unlink()
    with pytest.raises(ValueError, match=r"cannot read .* save the datamodel again"):
        LinearDatamodel.load(tmp_path)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(N)}, r"expected scores \[n, t\], got shape \(7,\)"),
        (
            {"base": np.zeros(2)},
            r"expected base of shape \(3,\) beside scores \[n=7, t=3\], got \(2,\)",
        ),
        ({"anchor": np.zeros(2)}, r"expected anchor of shape \(7,\)"),
        ({"ids": [1, 2]}, r"expected ids of shape \(7,\)"),
        ({"targets": ["a"]}, r"expected targets of shape \(3,\)"),
        ({"ids": list("abcdeff")}, r"expected unique ids, got \['f'\] more than once"),
        ({"base": np.array([0, np.nan, 0])}, r"base is not finite at \[1\]"),
        ({"anchor": np.inf}, "anchor is not finite"),
    ],
)
def test_shapes_and_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_name_their_examples(value):
    scores = np.zeros((N, T))
    scores[4, 1] = value
    with pytest.raises(ValueError, match=r"not finite for 1 of 7 examples, first ids \['doc4'\]"):
        make(scores=scores)


@pytest.mark.parametrize("weights", [np.ones(3), np.ones((2, 3)), 1.0, np.ones((1, 1, N))])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match=r"expected weights \[n=7\] or \[m, n=7\]"):
        make().predict(weights)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one group label per example, \[n=7\], got \(3,\)"):
        make().grouped([1, 2, 3])
    with pytest.raises(ValueError, match="members of one group have different anchors"):
        make().grouped(np.zeros(N))


@pytest.mark.parametrize("matrix", [np.ones(T), np.ones((2, 2))])
def test_matrices_that_do_not_fit(matrix):
    with pytest.raises(ValueError, match=r"expected a matrix \[t=3, k\]"):
        make().combine(matrix)


def test_arrays_that_it_was_made_of_may_change_afterwards():
    base, anchor = np.zeros(1), np.ones(2)
    f = LinearDatamodel([[1.0], [2.0]], base, anchor)
    base[0], anchor[0] = 9.0, 9.0
    assert f.predict([1, 1]).tolist() == [0.0]


def test_numbers_stay_numbers_on_disk(tmp_path):
    ids, meta = np.array([7, 5], dtype=object), {"seed": np.int64(4), "at": np.arange(2)}
    LinearDatamodel([[1.0], [2.0]], [0.0], 1.0, ids=ids, meta=meta).save(tmp_path)
    found = LinearDatamodel.load(tmp_path)
    assert found.rows([5]).tolist() == [1]
    assert found.meta == {"seed": 4, "at": [0, 1]}


def test_a_mask_is_no_list_of_ids():
    f = LinearDatamodel([[1.0], [2.0], [4.0], [8.0]], [0.0], 1.0)
    mask = np.array([False, False, True, True])
    with pytest.raises(ValueError, match=r"a mask of 4; give ids\[mask\]"):
        f.without(mask)
    assert f.without(np.flatnonzero(mask)).tolist() == [-12.0]


def test_what_meta_says_of_each_output_does_not_outlive_the_outputs():
    f = LinearDatamodel(np.ones((3, 2)), [0.0, 1.0], 1.0, meta={"prior_scale": [1.0, 2.0]})
    assert "prior_scale" not in f.mean().meta


def test_ids_beyond_64_bits_are_words_on_disk(tmp_path):
    ids = np.array([2**70, 3], dtype=object)
    LinearDatamodel(np.ones((2, 1)), [1.0], 1.0, ids=ids).save(tmp_path)
    assert LinearDatamodel.load(tmp_path).ids.tolist() == [str(2**70), "3"]


def test_groups_without_a_name_are_refused():
    f = LinearDatamodel(np.ones((3, 1)), [1.0], 1.0)
    for groups in ([0, np.nan, np.nan], ["a", None, "b"]):
        with pytest.raises(ValueError, match="a group label for every example"):
            f.grouped(groups)
