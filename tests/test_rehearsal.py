"""Rehearsals against whole trainings, which they are where batches are as large."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attribution_core import (
    SGD,
    Adam,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    margin,
    retrain,
    train,
)
from attribution_core.rehearsal import SEED, Pace, Rehearsal, rehearse
from recipes.data.classification import network
from recipes.embedded import digits

MOMENTUM = SGD(0.1, momentum=0.9)


def small(optimizer=MOMENTUM, schedule=None, dtype=torch.float64):
    data = digits(60, 20)
    x, y = torch.tensor(data.x, dtype=dtype), torch.tensor(data.y)
    problem = Problem(network(64, 10, 4, 0).to(dtype), cross_entropy, (x, y))
    recipe = Recipe(optimizer, 20, 4, schedule=schedule)
    outputs = Outputs(
        margin, (torch.tensor(data.test_x[:5], dtype=dtype), torch.tensor(data.test_y[:5]))
    )
    return problem, recipe, outputs


def without(n, rows):
    weights = np.ones(n)
    weights[rows] = 0.0
    return weights


@pytest.mark.parametrize("schedule", [None, "linear"])
@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), Adam(0.01)])
def test_whole_batches_are_two_trainings_in_another_order(optimizer, schedule):
    problem, recipe, outputs = small(optimizer, schedule)
    run, w = train(problem, recipe), without(60, [1, 5, 7])
    found = rehearse(run, w, outputs.evaluate, pace=Pace(share=1, tail=1e-9))
    again = replace(recipe, seed=recipe.seed + SEED)
    there, here = (train(problem, again, weights).outputs(outputs) for weights in (w, np.ones(60)))
    torch.testing.assert_close(
        found.mean, there - here, rtol=0, atol=1e-12
    )  # sums in another order
    assert found.steps == 2 * 12


@pytest.mark.parametrize(("optimizer", "faster"), [(MOMENTUM, MOMENTUM), (Adam(0.01), Adam(0.02))])
def test_batches_are_smaller_and_the_tail_is_averaged(optimizer, faster):
    """On a quarter of the rows Adam's gradients are twice as noisy, and so is what it divides by."""
    problem, recipe, outputs = small(optimizer)
    run, w = train(problem, recipe), without(60, [0])
    found = rehearse(run, w, outputs.evaluate, pace=Pace(share=0.25))
    order = replace(recipe, seed=SEED, batch_size=5, epochs=1).draw(np.arange(60))
    assert [len(rows) for rows in order] == [5] * 12
    model = {}
    for name, weights in (("there", w), ("here", np.ones(60))):
        ends = [
            train(
                problem, replace(recipe, optimizer=faster, order=order[:k], batch_size=5), weights
            ).params
            for k in (10, 11, 12)
        ]
        mean = {key: sum(end[key] for end in ends) / 3 for key in ends[0]}
        model[name] = outputs.evaluate(problem.model, mean)
    torch.testing.assert_close(found.mean, model["there"] - model["here"], rtol=0, atol=1e-12)
    assert found.steps == 2 * 12 / 4


def test_the_same_weights_change_nothing():
    problem, recipe, outputs = small()
    run = train(problem, recipe)
    found = rehearse(run, np.ones(60), outputs.evaluate)
    assert (found.changes == 0).all()
    assert found.trust == 0


def test_a_run_is_ahead_by_its_own_reading_less_that_of_its_rehearsal():
    """Read at the run, at the rehearsal without changes and at that with them, in this order."""
    problem, recipe, outputs = small()
    runs, read = [train(problem, replace(recipe, seed=s)) for s in (0, 1)], []

    def reading(model):
        read.append(outputs.evaluate(model))
        return read[-1]

    found = rehearse(runs, without(60, [3]), reading)
    own = torch.stack([run.outputs(outputs) for run in runs])
    assert torch.equal(torch.stack(read[::3]), own)
    assert torch.equal(found.ahead, own - torch.stack(read[1::3]))
    assert torch.equal(found.changes, torch.stack(read[2::3]) - torch.stack(read[1::3]))


def test_the_run_is_left_as_it_was_and_readings_have_any_shape():
    problem, recipe, _ = small()
    run = train(problem, recipe)
    kept = {name: value.clone() for name, value in run.params.items()}
    first = {name: value.clone() for name, value in problem.params.items()}
    x = problem.train[[0, 1, 2]][0]
    found = rehearse([run, run], without(60, [3]), lambda model: model(x))
    assert found.changes.shape == (2, 3, 10)
    assert torch.equal(found.changes[0], found.changes[1])
    assert all(torch.equal(run.params[name], value) for name, value in kept.items())
    assert all(torch.equal(problem.params[name], value) for name, value in first.items())


def test_trust_is_james_steins_factor():
    rng = np.random.default_rng(0)
    changes = torch.tensor(rng.normal(0.5, 1.0, (8, 30)))
    mean = changes.mean(0)
    noise = ((changes - mean) ** 2).sum(0).mean() / 7 / 7
    level = torch.zeros_like(changes)
    expected = float(1 - noise / mean.square().mean())
    assert Rehearsal(changes, level, 0).trust == pytest.approx(expected)
    assert Rehearsal(changes[:1], level[:1], 0).trust == 1.0
    assert Rehearsal(torch.zeros(3, 4), torch.zeros(3, 4), 0).trust == 0.0
    alone = torch.tensor([[1.0], [-1.0], [0.1]])
    assert Rehearsal(alone, torch.zeros(3, 1), 0).trust == 0.0  # noise alone


def test_what_runs_are_ahead_of_rehearsals_is_carried_but_for_a_tenth_of_a_large_effect():
    rng, n = np.random.default_rng(1), 4000
    growth, effect = (torch.tensor(rng.normal(0, s, n)) for s in (1.0, 5.0))
    off = torch.tensor(rng.normal(0, 0.1, n)) * effect  # what rehearsals miss of the effect

    def several(reading):
        return reading.expand(3, n)

    none, changes = several(0 * effect), several(-effect)
    assert Rehearsal(none, several(growth), 0).carried == 1.0
    assert Rehearsal(changes, none, 0).carried == 1.0  # nothing is ahead
    # 1 - .25 / (1 + .25) and 1 - .25 / .25; n readings leave some 2 %
    found = Rehearsal(changes, several(growth + off), 0)
    assert found.carried == pytest.approx(0.8, abs=0.03)
    assert Rehearsal(changes, several(off), 0).carried == pytest.approx(0, abs=0.05)
    # the true change is -(effect + off): its error falls from .25 to .25 * .8, the best that one factor can do
    wrong = [float((x + effect + off).square().mean()) for x in (found.mean, found.corrected)]
    assert wrong[1] == pytest.approx(0.8 * wrong[0], rel=0.05)


def test_a_coherent_removal_is_followed_where_influence_is_not():
    """Rows of one kind, which the model comes to see otherwise: the mean margin moves by several nats."""
    data = digits(300, 50)
    rows = np.flatnonzero(data.y == 1)
    x, y = torch.tensor(data.x, dtype=torch.float32), torch.tensor(data.y)
    make = partial(network, 64, 10, 16)
    problem = Problem(make(0), cross_entropy, (x, y))
    recipe = Recipe(SGD(0.1, momentum=0.9), 50, 15, init=make)
    outputs = Outputs(margin, (x[rows], y[rows]))
    runs = [train(problem, replace(recipe, seed=s), states=0) for s in range(5)]
    before = np.mean([run.outputs(outputs).numpy() for run in runs], axis=0)
    w = without(300, rows)
    after = retrain(problem, recipe, outputs, w, seeds=range(100, 110)).per_seed[0].mean(0)
    predicted = rehearse(runs, w, outputs.evaluate).mean.numpy()
    assert np.abs(after - before).mean() > 8  # there is something to follow
    # within .35 of the change: the measured share over data draws is .05 to .2
    assert np.abs(before + predicted - after).mean() < 0.35 * np.abs(after - before).mean()


def test_what_cannot_be_rehearsed_says_so():
    problem, recipe, outputs = small()
    run = train(problem, recipe)
    with pytest.raises(ValueError, match="at least one run"):
        rehearse([], np.ones(60), outputs.evaluate)
    with pytest.raises(ValueError, match=r"\[n=60\]"):
        rehearse(run, np.ones(59), outputs.evaluate)
    with pytest.raises(ValueError, match="share in"):
        Pace(share=0)
    wild = replace(run, recipe=replace(recipe, optimizer=SGD(1e250)))
    with pytest.raises(ValueError, match="larger `share`"):
        rehearse(wild, without(60, [0]), outputs.evaluate, pace=Pace(share=0.5))


def test_rows_that_were_removed_are_not_rehearsed_either():
    """A run drawn from half of the rows is rehearsed as it would be on a problem of that half."""
    problem, recipe, outputs = small()
    half = np.arange(0, 60, 2)
    kept = without(60, np.arange(1, 60, 2))
    run = train(problem, recipe, kept, drop="row")
    alone = train(replace(problem, train=problem.train[half.tolist()]), recipe)
    w = kept.copy()
    w[half[:5]] = 0.0
    found = rehearse(run, w, outputs.evaluate)
    expected = rehearse(alone, w[half], outputs.evaluate)
    torch.testing.assert_close(found.changes, expected.changes, rtol=0, atol=1e-12)  # rounding
    torch.testing.assert_close(found.ahead, expected.ahead, rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match="got 1 for row 1, which the run's training was drawn with"
    ):
        rehearse(run, np.ones(60), outputs.evaluate)


def test_weights_act_from_the_same_step():
    """Up to the last step there is nothing to tell trainings apart by."""
    problem, recipe, outputs = small()
    w = without(60, np.arange(30))
    late, early = (
        rehearse(train(problem, recipe, since=k), w, outputs.evaluate, pace=Pace(tail=1e-9)).mean
        for k in (11, 0)
    )
    assert 0 < late.norm() < 0.3 * early.norm()
