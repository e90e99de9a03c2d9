"""attribution_core.retraining: tables equal to loops of train, side by side, resumed, refused."""

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    RetrainingTable,
    bernoulli_subsets,
    cross_entropy,
    fit_datamodel,
    margin,
    permutation_subsets,
    random_subsets,
    retrain,
    squared_error,
    train,
)
from attribution_core.retraining import retrain_pairs
from tests import menagerie
from tests.test_store import kill_when, run_python

SEEDS = (3, 1)


def world():
    """(problem, recipe, outputs, weights of 3 halves)."""
    problem = menagerie.softmax()
    recipe = Recipe(SGD(0.1, 0.9), batch_size=4, epochs=2)
    return problem, recipe, menagerie.unseen(problem), random_subsets(problem.n, 3, keep=0.5)


@pytest.mark.parametrize("drop", ["row", "weight"])
def test_a_table_is_a_loop_of_train(drop):
    problem, recipe, outputs, weights = world()
    table = retrain(problem, recipe, outputs, weights, seeds=SEEDS, drop=drop)
    assert table.per_seed.shape == (3, 2, 5)
    for row in range(3):
        for s, seed in enumerate(SEEDS):
            run = train(problem, replace(recipe, seed=seed), weights[row], drop=drop)
            # a stack multiplies matrices together, which rounds otherwise on some processors
            np.testing.assert_allclose(table.per_seed[row, s], run.outputs(outputs), rtol=1e-12)
    np.testing.assert_allclose(table.outputs, table.per_seed.mean(1))
    np.testing.assert_array_equal(table.weights, weights)
    assert table.seeds == SEEDS


def test_one_row_of_weights_and_a_number_of_seeds():
    problem, recipe, outputs, weights = world()
    table = retrain(problem, recipe, outputs.mean(), weights[0], seeds=2)
    assert table.per_seed.shape == (1, 2, 1)
    assert table.seeds == (0, 1)


@pytest.mark.parametrize("stack", [1, "auto", 4])
def test_another_meaning_of_weight_0_is_refused(stack):
    """Stacked, any word but "row" was read as "weight"."""
    problem, recipe, outputs, weights = world()
    with pytest.raises(
        ValueError, match="unknown drop 'rows'; 'weight' keeps batches, 'row' removes"
    ):
        retrain(problem, recipe, outputs, weights, seeds=SEEDS, drop="rows", stack=stack)


def initial(seed):
    """In the default dtype, which also says what a seed draws."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))


def test_workers_make_models_in_the_default_dtype_of_the_caller():
    ids = torch.randint(0, 9, (8, 3), generator=torch.Generator().manual_seed(0))
    data = (ids, torch.arange(8) % 2)
    recipe = Recipe(SGD(0.1), 4, 2, init=initial)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            problem = Problem(initial(0), cross_entropy, data)
            one, two = (
                retrain(
                    problem, recipe, Outputs(cross_entropy, data), np.ones((2, 8)) * [[1], [0.5]],
                    seeds=2, stack=1, jobs=jobs,
                ) for jobs in (1, 2)
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(two.per_seed, one.per_seed, rtol=1e-12)


def test_side_by_side_is_one_by_one():
    problem, recipe, outputs, weights = world()
    one, two = (
        retrain(problem, recipe, outputs, weights, seeds=SEEDS, jobs=jobs) for jobs in (1, 2)
    )
    # worker processes may run torch with other thread counts: sums in another order
    np.testing.assert_allclose(two.per_seed, one.per_seed, rtol=1e-12)


def test_pairs_of_weights_and_seeds():
    problem, recipe, outputs, weights = world()
    table = retrain(problem, recipe, outputs, weights, seeds=SEEDS)
    found = retrain_pairs(problem, recipe, outputs, [(weights[2], 1), (weights[0], 3)])
    expected = [table.per_seed[2, 1], table.per_seed[0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)  # other stacks round otherwise


def test_saved_and_loaded_is_the_same(tmp_path):
    table = retrain(*world(), seeds=SEEDS)
    for name in ("table.npz", "table"):
        table.save(tmp_path / name)
        loaded = RetrainingTable.load(tmp_path / name)
        np.testing.assert_array_equal(loaded.weights, table.weights)
        np.testing.assert_array_equal(loaded.per_seed, table.per_seed)
        assert loaded.seeds == table.seeds


def test_an_ending_that_is_not_written_is_refused(tmp_path):
    table = RetrainingTable(np.eye(2), np.ones((2, 1, 1)), (0,))
    with pytest.raises(ValueError, match=r"ends in \.npz or \.parquet, got 'table\.csv'"):
        table.save(tmp_path / "table.csv")
    assert not any(tmp_path.iterdir())


def test_random_subsets_keep_their_share_and_follow_their_seed():
    weights = random_subsets(21, 400, keep=1 / 3)
    assert set(np.unique(weights)) == {0.0, 1.0}
    np.testing.assert_array_equal(weights.sum(1), 7)
    # every example is kept in a third of 400 rows, with a standard error of .024
    assert np.abs(weights.mean(0) - 1 / 3).max() < 5 * 0.024
    np.testing.assert_array_equal(weights, random_subsets(21, 400, keep=1 / 3))
    assert (weights != random_subsets(21, 400, keep=1 / 3, seed=1)).any()


# --- resuming --------------------------------------------------------------------------------


def counted(folder, recipe=None, rows=3, seeds=SEEDS, jobs=1, pause=0.0):
    """The table, and how many trainings were done for it here."""
    import time

    problem, usual, outputs, _ = world()
    seen = []

    def progress(items):
        for item in items:
            yield item  # written when the loop comes back
            seen.append(item[0])
            time.sleep(pause)

    weights = random_subsets(problem.n, rows, keep=0.5)
    table = retrain(
        problem, recipe or usual, outputs, weights, seeds=seeds, folder=folder, jobs=jobs,
        progress=progress,
    )  # fmt: skip
    return table, len(seen)


def test_a_killed_retraining_resumes_with_the_same_table(tmp_path):
    """kill -9 after some trainings; the same call computes only the others."""
    whole, count = counted(tmp_path / "whole", rows=10)
    assert count == 20
    folder = tmp_path / "killed"
    child = run_python(
        f"from tests import test_retraining as t; t.counted({str(folder)!r}, rows=10, pause=0.2)"
    )
    kill_when(child, lambda: len(list(folder.glob("*.npy"))) >= 3)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert 3 <= len(finished) < 20
    resumed, count = counted(folder, rows=10)
    assert count == 20 - len([path for path in finished if ".part" not in path.name])
    np.testing.assert_array_equal(resumed.per_seed, whole.per_seed)
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time
    assert counted(folder, rows=10)[1] == 0


def test_a_larger_table_trains_what_is_new(tmp_path):
    small, count = counted(tmp_path, rows=2, seeds=(0,))
    assert count == 2
    large, count = counted(tmp_path, rows=3, seeds=(0, 1), jobs=2)
    assert count == 4  # one more row and one more seed: 6 cells, 2 of them known
    np.testing.assert_array_equal(large.per_seed[:2, :1], small.per_seed)


def test_a_folder_of_another_run(tmp_path):
    counted(tmp_path)
    with pytest.raises(ValueError, match="holds trainings of another run"):
        counted(tmp_path, recipe=Recipe(SGD(0.2), batch_size=4, epochs=2))
    problem, recipe, outputs, weights = world()
    frozen = menagerie.softmax()
    frozen.model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="holds trainings of another run"):
        retrain(frozen, recipe, outputs, weights, seeds=SEEDS, folder=tmp_path)
    with pytest.raises(ValueError, match="holds trainings of another run"):
        retrain(problem, recipe, outputs, weights, seeds=SEEDS, folder=tmp_path, drop="weight")


def test_a_damaged_cell(tmp_path):
    counted(tmp_path)
    cell = sorted(tmp_path.glob("*.npy"))[0]
    cell.write_bytes(cell.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{cell.name} is damaged .*; delete it and run again"):
        counted(tmp_path)
    cell.unlink()
    assert counted(tmp_path)[1] == 1


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "seeds", "message"),
    [
        (np.ones((2, 3)), 1, r"expected weights \[n=20\] for every training, got \(3,\)"),
        (np.ones((0, 20)), 1, "expected at least one training"),
        (np.ones((1, 20)), 0, "expected at least one seed >= 0"),
        (np.ones((1, 20)), [-1], "expected at least one seed >= 0, each once, got .-1."),
        (-np.ones((1, 20)), 1, r"retraining 0 \(seed 0\) failed: expected finite weights"),
    ],
)
def test_weights_and_seeds_that_make_no_sense(weights, seeds, message):
    problem, recipe, outputs, _ = world()
    with pytest.raises(ValueError, match=message):
        retrain(problem, recipe, outputs, weights, seeds=seeds)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_training_says_which(jobs):
    problem, recipe, outputs, weights = world()
    x, _ = problem.train.columns
    x[int(np.flatnonzero(weights[1] * (1 - weights[0]) * (1 - weights[2]))[0])] = float("nan")
    with pytest.raises(
        ValueError, match=r"retraining 1 \(seed 0\) failed: training stopped at step"
    ):
        retrain(problem, recipe, outputs, weights, seeds=1, jobs=jobs)


def test_tables_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected weights \[m, n\] and per_seed \[m, s=1, t\]"):
        RetrainingTable(np.ones((2, 3)), np.ones((2, 2, 1)), (0,))


@pytest.mark.parametrize("keep", [0, 1.5])
def test_shares_that_make_no_sense(keep):
    with pytest.raises(ValueError, match=r"expected a keep fraction in \(0, 1\]"):
        random_subsets(4, 2, keep=keep)


def test_retraining_leaves_the_model_alone():
    problem, recipe, outputs, weights = world()
    before = menagerie.flat_params(problem)
    retrain(problem, recipe, outputs, weights, seeds=1)
    assert torch.equal(menagerie.flat_params(problem), before)


# --- tables from elsewhere -----------------------------------------------------------------------


def made(rows=4, seeds=(3, 1), t=2):
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (rows, 5)).astype(float)
    weights[:, 0] = np.arange(rows)  # rows that differ
    per_seed = rng.normal(size=(rows, len(seeds), t))
    return RetrainingTable(weights, per_seed, seeds, {"drop": "row"})


def test_parquet_holds_a_line_per_training(tmp_path):
    table = made()
    table.save(tmp_path / "table.parquet")
    held = pq.read_table(tmp_path / "table.parquet").to_pydict()
    assert held["seed"] == [3, 1] * 4
    np.testing.assert_array_equal(held["weights"][2], table.weights[1])
    np.testing.assert_array_equal(held["outputs"][3], table.per_seed[1, 1])
    table.save(tmp_path / "LOUD.PARQUET")
    assert np.array_equal(RetrainingTable.load(tmp_path / "LOUD.PARQUET").weights, table.weights)
    loaded = RetrainingTable.load(tmp_path / "table.parquet")
    np.testing.assert_array_equal(loaded.weights, table.weights)
    assert loaded.seeds == (3, 1)
    np.testing.assert_array_equal(loaded.per_seed, table.per_seed)
    assert loaded.meta == table.meta
    again = table.joined(table)  # rows that repeat, as permutations have them
    again.save(tmp_path / "again.parquet")
    np.testing.assert_array_equal(
        RetrainingTable.load(tmp_path / "again.parquet").weights, again.weights
    )


def test_tables_made_elsewhere(tmp_path):
    table = made(seeds=(0,))
    np.savez(tmp_path / "plain.npz", weights=table.weights > 0, outputs=table.per_seed[:, 0, 0])
    loaded = RetrainingTable.load(tmp_path / "plain.npz")
    assert loaded.seeds == (0,)
    np.testing.assert_array_equal(loaded.outputs, table.outputs[:, :1])
    lines = {"weights": table.weights.tolist(), "outputs": table.outputs[:, 0].tolist()}
    pq.write_table(pa.table(lines), tmp_path / "plain.parquet")
    np.testing.assert_array_equal(
        RetrainingTable.load(tmp_path / "plain.parquet").outputs, table.outputs[:, :1]
    )


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table at"):
        RetrainingTable.load(tmp_path / "none.npz")
    np.savez(tmp_path / "masks.npz", masks=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"expected arrays weights .* got \['masks'\]"):
        RetrainingTable.load(tmp_path / "masks.npz")
    pq.write_table(pa.table({"outputs": [1.0]}), tmp_path / "some.parquet")
    with pytest.raises(ValueError, match="expected columns weights and outputs"):
        RetrainingTable.load(tmp_path / "some.parquet")
    ragged = {"weights": [[1.0, 0.0], [1.0]], "outputs": [1.0, 2.0]}
    pq.write_table(pa.table(ragged), tmp_path / "ragged.parquet")
    with pytest.raises(
        ValueError, match=r"lists of one length as weights in .*, got lengths .2, 1"
    ):
        RetrainingTable.load(tmp_path / "ragged.parquet")
    twice = {"weights": [[1.0, 0.0]] * 3, "outputs": [1.0, 2.0, 3.0], "seed": [0, 1, 1]}
    pq.write_table(pa.table(twice), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="got row 0 2 times with seed 1"):
        RetrainingTable.load(tmp_path / "twice.parquet")


def test_a_row_with_two_sets_of_weights_is_refused(tmp_path):
    """Lines of two tables put together: the second's outputs stood beside the first's weights."""
    for name, weights, seed in (("a", np.eye(3), 0), ("b", 1 - np.eye(3), 1)):
        RetrainingTable(weights, np.zeros((3, 1, 2)), (seed,)).save(tmp_path / f"{name}.parquet")
    parts = [pq.read_table(tmp_path / f"{name}.parquet") for name in "ab"]
    pq.write_table(pa.concat_tables(parts), tmp_path / "both.parquet")
    with pytest.raises(
        ValueError, match=r"got row 0 with other weights in line 3 than in line 0 of .*joined"
    ):
        RetrainingTable.load(tmp_path / "both.parquet")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"seed": [0.1, 0.9, 0.1, 0.9]},
            r"expected whole numbers as seeds in column seed .* got 0\.1",
        ),
        ({"seed": [0, 1, None, 0]}, "expected whole numbers as seeds in .* got None"),
        ({"seed": ["a"] * 4}, "expected whole numbers as seeds in .* got 'a'"),
        ({"row": [0, 1, 2, None]}, "expected a row in every line of .* got none in 1 of 4"),
        ({"row": [0, 1, 2, float("nan")]}, "expected a row in every line of .* got none in 1 of 4"),
    ],
)
def test_seeds_and_rows_of_a_file_that_are_none(tmp_path, columns, words):
    lines = {"weights": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], "outputs": [1.0] * 4}
    pq.write_table(pa.table({**lines, **columns}), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=words):
        RetrainingTable.load(tmp_path / "table.parquet")


def test_a_file_without_lines_is_refused(tmp_path):
    columns = {
        "weights": pa.array([], pa.list_(pa.float64())),
        "outputs": pa.array([], pa.float64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"expected a line per training in .* got none"):
        RetrainingTable.load(tmp_path / "table.parquet")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"seeds": np.array([0.2, 0.7])}, r"expected whole numbers as seeds in .* got 0\.2"),
        ({"seeds": np.array([1, 1])}, r"expected each seed once in .* got \[1, 1\]"),
        ({"seeds": np.array(3)}, r"expected a list of seeds in .* got 3; write \[3\]"),
        ({"per_seed": np.full((3, 2, 1), 1j)}, "expected real numbers as per_seed, got complex"),
        ({"weights": np.full((3, 3), 1j)}, "expected real numbers as weights, got complex"),
    ],
)
def test_arrays_that_are_no_table(tmp_path, arrays, words):
    table = {"weights": np.eye(3), "per_seed": np.zeros((3, 2, 1)), **arrays}
    np.savez(tmp_path / "table.npz", **table)
    with pytest.raises(ValueError, match=words):
        RetrainingTable.load(tmp_path / "table.npz")


def test_parquet_makes_no_object_of_a_weight(tmp_path):
    """Weights twice, in a chunk and whole: Python's floats were 4 times as large."""
    weights = np.arange(4.0 * 50_000).reshape(4, -1)
    RetrainingTable(weights, np.zeros((4, 1, 2)), (0,)).save(tmp_path / "table.parquet")
    tracemalloc.start()
    try:
        loaded = RetrainingTable.load(tmp_path / "table.parquet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(loaded.weights, weights)
    assert peak < 3 * weights.nbytes


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.float32()])
def test_parquet_columns_of_other_kinds(kind, tmp_path):
    """Numbers of any type, in lists of fixed or other length, in several chunks."""
    none, one = (False, True) if pa.types.is_boolean(kind) else (0, 1)
    lines = [[one, none, one], [none, none, one], [one, one, one]]
    for lists in (pa.list_(kind), pa.list_(kind, 3), pa.large_list(kind)):
        column = pa.chunked_array([pa.array(lines, lists)[1:], pa.array(lines, lists)[:1]])
        table = pa.table({"weights": column, "outputs": pa.array([one, none, one], kind)})
        pq.write_table(table, tmp_path / "table.parquet", row_group_size=1)
        loaded = RetrainingTable.load(tmp_path / "table.parquet")
        np.testing.assert_array_equal(loaded.weights, [lines[1], lines[2], lines[0]])
        np.testing.assert_array_equal(loaded.outputs, [[1], [0], [1]])


def test_tables_of_many_seeds_take_no_memory_of_their_weights_by_seed(tmp_path):
    """Thirty seeds of 160 kB of weights, all trained before; their copies alone were 4.8 MB."""
    x = torch.zeros(20_000, 1)
    problem = Problem(nn.Linear(1, 1), squared_error, (x, x))
    recipe, outputs = Recipe(SGD(0.1), 1, 1e-4), Outputs(squared_error, (x[:1], x[:1]))
    how = {"seeds": 30, "folder": tmp_path, "stack": 1, "drop": "weight"}
    first = retrain(problem, recipe, outputs, np.ones(20_000), **how)
    tracemalloc.start()
    try:
        again = retrain(problem, recipe, outputs, np.ones(20_000), **how)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(again.per_seed, first.per_seed)
    assert peak < 2**21


def test_tables_are_joined():
    table = made()
    both = table.joined(table, table)
    assert both.weights.shape == (12, 5)
    np.testing.assert_array_equal(both.per_seed[4:8], table.per_seed)
    with pytest.raises(ValueError, match="expected tables of the same seeds, n and t"):
        table.joined(made(seeds=(0,)))


@pytest.mark.parametrize("draw", [random_subsets, bernoulli_subsets, permutation_subsets])
@pytest.mark.parametrize("m", [-1, 2.0, "3"])
def test_a_number_of_rows_that_is_none(draw, m):
    keep = {} if draw is permutation_subsets else {"keep": 0.5}
    with pytest.raises(ValueError, match=rf"whole number m >= 0 of rows or orders, got {m!r}"):
        draw(4, m, **keep)


def test_stacks_and_seeds_that_are_no_numbers():
    problem = menagerie.mlp(6)
    call = partial(
        retrain, problem, Recipe(SGD(0.1), 3, 1), Outputs(margin, problem.train), np.ones((1, 6))
    )
    with pytest.raises(ValueError, match="stack='auto' or a number of trainings, got 'all'"):
        call(seeds=1, stack="all")
    with pytest.raises(ValueError, match=r"a number of seeds, or which ones, got 2\.0"):
        call(seeds=2.0)


def test_tables_of_other_outputs_are_not_joined():
    def named(*targets, drop="row"):
        return replace(made(t=2), meta={"targets": list(targets), "drop": drop})

    table = named("cat", "dog")
    assert table.joined(named("cat", "dog"), made(t=2)).targets.tolist() == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"outputs in one order, got \['cat' 'dog'\] and \['dog'"):
        table.joined(named("dog", "cat"))
    with pytest.raises(
        ValueError, match=r"expected outputs \['cat', 'dog'\], got \['cat', 'cow'\]"
    ):
        table.joined(named("cat", "cow"))
    with pytest.raises(ValueError, match=r"tables of one drop, got \['row', 'weight'\]"):
        table.joined(named("cat", "dog", drop="weight"))


def test_names_and_drop_of_any_table_hold_for_all():
    """Where the first table tells neither, the others were not compared, and the result had none."""

    def told(**meta):
        return replace(made(t=2), meta=meta)

    joined = told(method="retrained").joined(told(targets=["cat", "dog"]), told(drop="row"))
    assert joined.meta == {"method": "retrained", "targets": ["cat", "dog"], "drop": "row"}
    with pytest.raises(ValueError, match=r"outputs in one order, got \['cat' 'dog'\] and \['dog'"):
        told().joined(told(targets=["cat", "dog"]), told(targets=["dog", "cat"]))
    with pytest.raises(ValueError, match=r"tables of one drop, got \['row', 'weight'\]"):
        told().joined(told(drop="row"), told(drop="weight"))


def test_joblibs_own_configuration_is_taken():
    """jobs=None: any backend that joblib knows, here its threads; a cluster's is set up in the same way."""
    from joblib import parallel_config

    problem, recipe, outputs, weights = world()
    one = retrain(problem, recipe, outputs, weights, seeds=SEEDS, stack=2)
    with parallel_config(backend="threading", n_jobs=1):
        other = retrain(problem, recipe, outputs, weights, seeds=SEEDS, stack=2, jobs=None)
    np.testing.assert_array_equal(one.per_seed, other.per_seed)


@pytest.mark.parametrize("name", ["table.parquet", "table.npz"])
def test_seeds_come_back_in_their_order(tmp_path, name):
    per_seed = np.arange(6.0).reshape(3, 2, 1)
    RetrainingTable(np.eye(3), per_seed, (5, 3)).save(tmp_path / name)
    found = RetrainingTable.load(tmp_path / name)
    assert found.seeds == (5, 3)
    np.testing.assert_array_equal(found.per_seed, per_seed)


def test_a_number_of_seeds_may_be_numpys():
    problem, recipe, outputs, weights = world()
    assert retrain(problem, recipe, outputs, weights[:1], seeds=np.int64(2)).seeds == (0, 1)


def test_a_seed_named_twice_is_no_second_opinion():
    problem = menagerie.softmax(20)
    with pytest.raises(ValueError, match="each once"):
        retrain(
            problem, Recipe(SGD(0.1), 4, 1), menagerie.unseen(problem), np.ones(20), seeds=[3, 3]
        )


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_names_of_outputs_go_with_a_table(tmp_path, suffix):
    problem = menagerie.mlp(9)
    outputs = Outputs(margin, problem.train).mean(by=["b", "a", "c"] * 3)
    table = retrain(
        problem, Recipe(SGD(0.1), 3, 1), outputs, random_subsets(9, 12, keep=0.5), seeds=2
    )
    table = replace(table, meta={**table.meta, "rows": np.int64(3)})
    table.save(tmp_path / f"t.{suffix}")
    again = RetrainingTable.load(tmp_path / f"t.{suffix}")
    assert again.meta["rows"] == 3
    for one in (table, again):
        assert one.targets.tolist() == ["a", "b", "c"]
        assert fit_datamodel(one).targets.tolist() == ["a", "b", "c"]
    assert replace(table, per_seed=table.per_seed[:, :, :2]).targets is None
