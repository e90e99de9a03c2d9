"""Moved inputs: killed and resumed, shown to other victims, refused where they break the threat model."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from applied.poisoning import ThreatModel, perturb
from attribution_core import LinearDatamodel, Problem, cross_entropy

THREAT = ThreatModel(3, "inputs", epsilon=0.3, box=(0.0, 1.0))
FAILS_AT = "PERTURB_FAILS_AT"  # in the environment: what a surrogate reads else is part of its folder's fingerprint


def small():
    rng = np.random.default_rng(0)
    x, y = torch.tensor(rng.random((10, 4))), torch.tensor(rng.integers(0, 2, 10))
    model = torch.nn.Linear(4, 2).double()
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    return Problem(model, cross_entropy, (x, y))


def surrogate(problem, rows, step):
    if str(step) == os.environ.get(FAILS_AT):
        raise KeyboardInterrupt
    x = problem.train[rows.tolist()][0].numpy()
    wave = np.cos(3 * x + step + np.arange(4)).reshape(-1, 1)  # depends on the step and the inputs
    return LinearDatamodel(wave, [float(np.sin(3 * x + step).sum())], x.ravel(), targets=["loss"])


def victim(table, weights, seeds):
    rows = table.train[list(range(table.n))][0].numpy().sum(1)
    return SimpleNamespace(
        per_seed=np.stack([[[w @ rows + seed] for seed in seeds] for w in np.atleast_2d(weights)])
    )


def moved(folder=None, **changes):
    settings = {"steps": 6, "rows": [1, 4, 7], "folder": folder, "seeds": 2, **changes}
    return perturb(small(), settings.pop("threat", THREAT), surrogate, victim, **settings)


def inputs(attack):
    return attack.poisoned.train[attack.places.tolist()][0].numpy()


def test_a_killed_attack_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = moved()
    monkeypatch.setenv(FAILS_AT, "3")
    with pytest.raises(KeyboardInterrupt):
        moved(tmp_path)
    monkeypatch.setenv(FAILS_AT, "2")  # steps that are done are not asked for again
    again = moved(tmp_path)
    assert np.array_equal(inputs(again), inputs(whole))
    assert np.array_equal(again.predicted, whole.predicted)
    assert np.array_equal(again.outputs(), whole.outputs())


def test_other_victims_see_the_same_inputs(tmp_path, monkeypatch):
    first = moved(tmp_path)
    monkeypatch.setenv(FAILS_AT, "0")  # nothing is asked of the surrogate
    other = moved(tmp_path, threat=replace(THREAT, knowledge="grey-box"), seeds=4)
    assert np.array_equal(inputs(first), inputs(other))
    assert len(other.outputs()) == 4
    assert "grey-box" in other.table()


def test_the_first_step_is_a_fifth_of_the_ball_however_many_follow():
    for steps in (1, 7):
        attack = moved(steps=steps)
        assert attack.meta["step_size"] == pytest.approx(0.2 * THREAT.epsilon, rel=1e-15)
    before = small().train[[1, 4, 7]][0].numpy()
    after = inputs(moved(steps=1))
    inside = (after > 0) & (after < 1)
    assert inside.sum() > 6
    np.testing.assert_allclose(np.abs(after - before)[inside], 0.06, rtol=0, atol=1e-15)


def test_a_folder_of_another_attack_is_refused(tmp_path):
    moved(tmp_path)
    with pytest.raises(ValueError, match="another run"):
        moved(tmp_path, momentum=0.5)


def test_a_folder_of_other_sources_is_refused(tmp_path):
    """With candidates enough for all rows nothing else differs, and the rows kept would break the quota."""
    threat = replace(THREAT, source_quota=1)
    settings = {"folder": tmp_path, "rows": None, "candidates": 4, "threat": threat}
    first = moved(sources=list("aabbccddee"), **settings)
    assert len(set(first.changed // 2)) == len(first.changed)
    with pytest.raises(ValueError, match="another run"):
        moved(sources=list("abcdeabcde"), **settings)


def test_inputs_stay_in_ball_and_box_and_labels_stay():
    attack, problem = moved(steps=20), small()
    old, labels = problem.train[attack.changed.tolist()]
    assert (np.abs(inputs(attack) - old.numpy()) <= 0.3 + 1e-12).all()
    assert inputs(attack).min() >= 0
    assert inputs(attack).max() <= 1
    assert torch.equal(attack.poisoned.train[attack.places.tolist()][1], labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [1, 2, 3, 4]}, "at most|1 to 3"),
        ({"rows": [1, 1]}, "different rows"),
        ({"rows": [10]}, "of 0 to 9"),
        ({"rows": []}, "expected 1 to 3 rows"),
        ({"rows": [True, False]}, "flatnonzero"),
        ({"steps": 0}, "steps >= 1"),
        ({"step_size": -1.0}, "positive step_size"),
        ({"column": 1}, "floating"),
        ({"goal": "accuracy"}, "among the outputs"),
        ({"threat": ThreatModel(3, "labels")}, "may_change='inputs'"),
    ],
)
def test_what_breaks_the_threat_model_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        moved(**changes)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("rows", [[1, 4, 7], None])
def test_what_is_predicted_holds_the_last_step(steps, rows):
    """Of an output that is linear in the inputs the surrogate is exact, rows that are given up on the way included."""
    slope = np.random.default_rng(1).normal(size=(10, 4))

    def total(problem):
        return float((problem.train[list(range(10))][0].numpy() * slope).sum())

    def linear(problem, rows, step):
        x = problem.train[rows.tolist()][0].numpy()
        return LinearDatamodel(
            slope[rows].reshape(-1, 1), [total(problem)], x.ravel(), targets=["loss"]
        )

    attack = perturb(small(), THREAT, linear, victim, steps=steps, rows=rows, seeds=1)
    # float64, sums of 40 numbers
    assert attack.predicted[0] == pytest.approx(total(attack.poisoned) - total(small()), abs=1e-12)
    assert attack.predicted[0] > 0.1
