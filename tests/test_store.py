"""attribution_core.store: resuming after a kill, refusing what is foreign or damaged."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from attribution_core import (
    SGD,
    Recipe,
    aumann_shapley,
    influence,
    magic,
    retrain,
    train,
)
from attribution_core.store import Store
from tests import menagerie

BLOCKS = 12


def run_python(code, **environment):
    """A child process that can import the tests."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=menagerie.ROOT,
        env={**os.environ, "PYTHONPATH": str(menagerie.ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_when(process, ready, limit=60):
    """SIGKILL once `ready()`; fails if the process ends before."""
    end = time.monotonic() + limit
    while not ready():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < end, "nothing to kill in time"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def scored(folder, pause=0.0):
    """Score 12 blocks of 256 rows into a folder; returns the datamodel and the blocks computed here."""
    problem = menagerie.softmax(256 * BLOCKS)
    computed = []

    def progress(blocks):
        for rows in blocks:
            yield rows  # the block is written when the loop comes back
            computed.append(int(rows[0]) // 256)
            time.sleep(pause)

    outputs = menagerie.unseen(problem)
    return influence(problem, outputs, folder=folder, progress=progress), computed


def test_a_killed_scoring_resumes_with_the_same_bytes(tmp_path):
    """kill -9 after some blocks; the same call computes only the others."""
    whole, all_blocks = scored(tmp_path / "whole")
    assert all_blocks == list(range(BLOCKS))
    folder = tmp_path / "killed"
    done = folder / "done.npy"
    child = run_python(
        f"from tests import test_store; test_store.scored({str(folder)!r}, pause=0.3)"
    )
    kill_when(
        child, lambda: done.exists() and len(done.read_bytes()) > 128 and np.load(done).sum() >= 3
    )
    before = np.flatnonzero(np.load(done))
    assert 3 <= len(before) < BLOCKS
    resumed, computed = scored(folder)
    assert sorted([*before, *computed]) == list(range(BLOCKS))
    assert (folder / "scores.npy").read_bytes() == (tmp_path / "whole" / "scores.npy").read_bytes()
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    np.testing.assert_array_equal(resumed.base, whole.base)
    assert resumed.meta == whole.meta
    again, computed = scored(folder)
    assert computed == []
    np.testing.assert_array_equal(again.scores, whole.scores)


def test_stored_scores_are_the_scores_in_single_precision(tmp_path):
    problem = menagerie.softmax(600)
    outputs = menagerie.unseen(problem)
    stored = influence(problem, outputs, folder=tmp_path)
    assert isinstance(stored.scores, np.memmap)
    expected = influence(problem, outputs).scores.astype(np.float32)
    np.testing.assert_array_equal(stored.scores, expected)


def test_a_stored_datamodel_can_be_saved_into_its_own_folder(tmp_path):
    problem = menagerie.softmax(300)
    outputs = menagerie.unseen(problem)
    stored = influence(problem, outputs, folder=tmp_path)
    expected = np.array(stored.scores)
    stored.save(tmp_path)
    np.testing.assert_array_equal(type(stored).load(tmp_path).scores, expected)
    np.testing.assert_array_equal(influence(problem, outputs, folder=tmp_path).scores, expected)


def test_a_folder_of_other_scores_is_not_overwritten(tmp_path):
    problem = menagerie.softmax(30)
    outputs = menagerie.unseen(problem)
    influence(problem, outputs).save(tmp_path)
    before = (tmp_path / "scores.npy").read_bytes()
    with pytest.raises(ValueError, match=r"holds a scores\.npy that is not a store's"):
        influence(problem, outputs, folder=tmp_path)
    assert (tmp_path / "scores.npy").read_bytes() == before


# --- the store by itself ---------------------------------------------------------------------


def test_blocks_are_missing_until_written(tmp_path):
    store = Store.open(tmp_path, (10, 2), "print", block=4)
    assert [rows.tolist() for rows in store.missing()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(
        ValueError, match=r"3 of 3 blocks in .* are not written; run the same command"
    ):
        store.read()
    for rows in store.missing()[1:]:
        store.write(rows, np.tile(rows[:, None], 2))
    again = Store.open(tmp_path, (10, 2), "print", block=4)
    assert [rows.tolist() for rows in again.missing()] == [[0, 1, 2, 3]]
    again.write(again.missing()[0], np.zeros((4, 2)))
    expected = [0, 0, 0, 0, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(again.read(), np.tile(np.array(expected)[:, None], 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "other"}, "another run .different fingerprint"),
        ({"shape": (10, 3)}, "another run .different shape"),
        ({"dtype": "float64"}, "another run .different dtype"),
        ({"block": 5}, "another run .different block"),
    ],
)
def test_a_foreign_store(tmp_path, changes, message):
    settings = {"shape": (10, 2), "fingerprint": "print", "block": 4}
    Store.open(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        Store.open(tmp_path, **{**settings, **changes})


@pytest.mark.parametrize("name", ["scores.npy", "done.npy", "store.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_store(tmp_path, name, damage):
    Store.open(tmp_path, (10, 2), "print")
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"")
    if (name, damage) == ("store.json", "gone"):  # as a kill during creation leaves it: made anew
        assert len(Store.open(tmp_path, (10, 2), "print").missing()) == 1
        return
    with pytest.raises(ValueError, match=r"is damaged .*; delete it and run again"):
        Store.open(tmp_path, (10, 2), "print")


def test_values_that_are_not_finite_are_not_written(tmp_path):
    store = Store.open(tmp_path, (10, 2), "print", block=4)
    values = np.zeros((4, 2))
    values[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[5\]"):
        store.write(np.arange(4, 8), values)
    assert len(store.missing()) == 3


def test_what_is_remembered_is_made_once(tmp_path):
    store = Store.open(tmp_path, (10, 2), "print")
    made = []

    def make():
        made.append(1)
        return torch.arange(3.0), {"damping": 0.5}

    for _ in range(2):
        tensor, about = store.remember("directions", make)
        assert tensor.tolist() == [0, 1, 2]
        assert about == {"damping": 0.5}
    assert len(made) == 1


@pytest.mark.parametrize("method", ["retrain", "influence", "magic", "aumann_shapley"])
def test_two_calls_into_one_folder_do_not_write_into_one_another(method, tmp_path, monkeypatch):
    """Another process writes the same file between a call's writing and its renaming."""
    problem, recipe = menagerie.softmax(8), Recipe(SGD(0.1), 4, 1)
    outputs = menagerie.unseen(problem)
    run = train(problem, recipe)
    call = {
        "retrain": lambda folder: retrain(problem, recipe, outputs, np.ones(8), seeds=2, folder=folder, stack=1).outputs,
        "influence": lambda folder: influence(problem, outputs, damping=0.1, folder=folder).scores,
        "magic": lambda folder: magic(run, outputs, folder=folder, check=False).scores,
        "aumann_shapley": lambda folder: aumann_shapley(problem, recipe, outputs, points=1, path="exposure", folder=folder).scores,
    }[method]  # fmt: skip
    expected = np.array(call(tmp_path / "by itself"))
    beside = []

    def writing(save):
        def saved(*given, **named):
            save(*given, **named)
            if not beside:
                beside.append(1)
                with monkeypatch.context() as other:
                    other.setattr(os, "getpid", lambda: 1)
                    np.testing.assert_array_equal(call(tmp_path / "shared"), expected)

        return saved

    for name in ("save", "savez"):
        monkeypatch.setattr(np, name, writing(getattr(np, name)))
    np.testing.assert_array_equal(call(tmp_path / "shared"), expected)
    assert beside
    assert not list((tmp_path / "shared").rglob("*.part*"))
