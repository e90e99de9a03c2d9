"""Gauss–Newton matching against dense ridge solutions, and as `unlearn` takes it."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import helmert
from torch import nn

from applied.forgetting import gauss_newton, matching
from applied.forgetting.gauss_newton import GaussNewton, match_by_gauss_newton, row_cost
from applied.forgetting.matching import Goal
from applied.unlearners import Steps, centred_logits, match
from attribution_core import SGD, Adam
from attribution_core.data import Rows, as_data
from recipes.data.classification import network

CLASSES = 4


def data_of(n, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, 5)))
    return x, torch.from_numpy(rng.integers(0, CLASSES, n))


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def wanted_of(model, forget, retain, seed=1):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        z = [model(data[0]) for data in (forget, retain)]
    moves = [torch.from_numpy(rng.normal(size=part.shape)) for part in z]
    return dict(
        zip(
            ("forget_logits", "retain_logits"),
            (a + b for a, b in zip(z, moves, strict=True)),
            strict=True,
        )
    )


def dense(model, forget, retain, wanted, damping):
    """(JᵀJ + damping · tr(JᵀJ)/p · I)⁻¹ Jᵀ r, by autograd one logit at a time."""
    x = torch.cat([forget[0], retain[0]])
    contrasts = torch.from_numpy(helmert(CLASSES))
    z = (model(x) @ contrasts.T).flatten()
    target = (torch.cat(list(wanted.values())) @ contrasts.T).flatten()
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in z]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    h = j.T @ j
    shift = damping * h.diagonal().mean()
    return torch.linalg.solve(
        h + shift * torch.eye(len(h), dtype=h.dtype), j.T @ (target - z.detach())
    )


@pytest.mark.parametrize("n", [4, 30])  # fewer logits than parameters, and more
@pytest.mark.parametrize("damping", [0.003, 0.3])
def test_one_step_is_the_dense_ridge_solution(n, damping):
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()
    forget, retain = data_of(n // 2), data_of(n // 2, 1)
    wanted = wanted_of(model, forget, retain)
    before = parameters(model).clone()
    how = GaussNewton((damping,), rows=n)
    new = match_by_gauss_newton(model, forget, retain, **wanted, how=how)
    expected = dense(model, forget, retain, wanted, damping)
    # float64; a system of condition below 1 / damping · p, solved in its other form
    torch.testing.assert_close(parameters(new) - before, expected, rtol=1e-8, atol=1e-10)
    assert (parameters(model) == before).all()  # its input is left alone


def test_softmax_does_not_see_a_constant_and_neither_does_matching():
    model = nn.Linear(5, CLASSES).double()
    forget, retain = data_of(3), data_of(3, 1)
    wanted = wanted_of(model, forget, retain)
    shifted = {name: z + torch.arange(3.0)[:, None] for name, z in wanted.items()}
    how = GaussNewton(rows=6)
    one, two = (
        match_by_gauss_newton(model, forget, retain, **w, how=how) for w in (wanted, shifted)
    )
    torch.testing.assert_close(parameters(one), parameters(two), rtol=0, atol=1e-12)


def test_a_linear_model_is_there_at_once_by_the_shortest_way():
    model = nn.Linear(5, CLASSES).double()
    forget, retain = data_of(2), data_of(2, 1)
    wanted = wanted_of(model, forget, retain)
    for steps in (1, 3):
        how = GaussNewton((1e-12,) * steps, rows=4)
        new = match_by_gauss_newton(model, forget, retain, **wanted, how=how)
        for data, z in zip((forget, retain), wanted.values(), strict=True):
            off = centred_logits(new, data)[0] - (z - z.mean(1, keepdim=True))
            assert off.abs().max() < 1e-8  # the damping of 1e-12, times the condition
        # of all ways there the shortest has no part that does not move these logits: it is made of their gradients
        away = parameters(new) - parameters(model)
        x = torch.cat([forget[0], retain[0]])
        made_of = torch.kron(torch.eye(CLASSES, dtype=x.dtype), torch.cat([x, torch.ones(4, 1)], 1))
        by_class = torch.cat([p.detach() for p in (away[:20].reshape(4, 5), away[20:, None])], 1)
        rest = (
            by_class.flatten()
            - made_of.T @ torch.linalg.lstsq(made_of.T, by_class.flatten()[:, None]).solution[:, 0]
        )
        assert rest.abs().max() < 1e-8


def test_frozen_parameters_and_statistics_stay():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, CLASSES))
    model.double().eval()
    model[0].weight.requires_grad_(False)
    forget, retain = data_of(5), data_of(5, 1)
    new = match_by_gauss_newton(model, forget, retain, **wanted_of(model, forget, retain))
    assert torch.equal(new[0].weight, model[0].weight)
    assert not torch.equal(new[0].bias, model[0].bias)
    assert torch.equal(new[1].running_mean, model[1].running_mean)


def test_rows_of_dicts_and_their_order():
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = Named(5, CLASSES).double()
    forget, retain = data_of(6), data_of(9, 1)
    wanted = wanted_of(model, forget, retain)
    as_dicts = [{"x": x, "labels": y} for x, y in (forget, retain)]
    how = GaussNewton((0.003,), rows=15)
    one = match_by_gauss_newton(model, forget, retain, **wanted, how=how)
    two = match_by_gauss_newton(model, *as_dicts, **wanted, how=replace(how, seed=5))
    torch.testing.assert_close(parameters(one), parameters(two), rtol=0, atol=1e-10)
    fewer = replace(how, rows=8)
    a, b, c = (
        match_by_gauss_newton(model, forget, retain, **wanted, how=replace(fewer, seed=s))
        for s in (0, 0, 1)
    )
    assert torch.equal(parameters(a), parameters(b))
    assert not torch.equal(parameters(a), parameters(c))


def test_nearer_than_gradients_at_the_same_cost():
    """To the logits of another training, 18 rows twice at 7/3 of a training row each: 84 rows, 4 batches of 21."""
    model, other = (network(5, CLASSES, 16, seed).double() for seed in (0, 1))
    forget, retain = data_of(9), data_of(9, 1)
    wanted = {
        "forget_logits": other(forget[0]).detach(),
        "retain_logits": other(retain[0]).detach(),
    }
    assert row_cost(CLASSES - 1) == pytest.approx(7 / 3)

    def off(new):
        pairs = zip((forget, retain), wanted.values(), strict=True)
        return sum(float((new(d[0]) - z).detach().var(1).sum()) for d, z in pairs)

    solved = match_by_gauss_newton(model, forget, retain, **wanted, how=GaussNewton(rows=18))
    rates = (0.02, 0.06, 0.18, 0.5)
    descended = [
        match(
            model, forget, retain, **wanted,
            how=Steps(4, lr, momentum=0.8, batch_size=21, decay=True, clip=1.0),
        )
        for lr in rates
    ]  # fmt: skip
    assert off(solved) < 0.2 * min(off(m) for m in descended)


@pytest.mark.parametrize("shape", [(6, 3, CLASSES), (5, CLASSES), (6, 1)])
def test_logits_of_another_shape_are_refused(shape):
    model, data = nn.Linear(5, CLASSES).double(), data_of(6)
    with pytest.raises(ValueError, match=r"expected logits \[rows=6, classes >= 2\]"):
        match_by_gauss_newton(
            model, data, data, forget_logits=torch.zeros(shape), retain_logits=torch.zeros(shape)
        )


# --- as unlearn takes it ---------------------------------------------------------------------------


def goal_and_runs(count=3, optimizer=None, n=40, few=8):
    optimizer = optimizer or SGD(0.1)
    rows = as_data(data_of(n))
    runs = [
        SimpleNamespace(
            model=network(5, CLASSES, 8, seed).double(), order=[np.arange(10)] * 50,
            recipe=SimpleNamespace(optimizer=optimizer),
        )
        for seed in range(count)
    ]  # fmt: skip
    return Goal(Rows(rows, np.arange(few)), Rows(rows, np.arange(few, n))), runs


def change_of(goal, size=1.0, seed=3):
    """To the logits of another network, a part of the way: something that a network can do."""
    there, here = network(5, CLASSES, 8, 100).double(), network(5, CLASSES, 8, 0).double()
    return tuple(size * (goal.logits(there)[k] - goal.logits(here)[k]) for k in matching.KINDS)


def missed_by(before, after, goal, change):
    """Mean square of the models' mean logits less those wanted, both sets alike."""
    total = 0.0
    for name, part in zip(matching.KINDS, change, strict=True):
        moved = [
            goal.logits(a)[name] - goal.logits(b)[name] for a, b in zip(after, before, strict=True)
        ]
        total += float((torch.stack(moved).mean(0) - part).square().mean())
    return total


def test_classifiers_are_solved_within_the_budget():
    goal, runs = goal_and_runs()
    change = change_of(goal)
    models, how, steps = goal.matched(runs, change, left=20.0, seed=4)
    assert isinstance(how, GaussNewton)
    assert steps <= 20.0
    cost = len(how.dampings) * row_cost(CLASSES - 1)  # of a row in each step
    assert steps * 10 == pytest.approx(how.rows * cost)
    for k, run in enumerate(runs):
        again = goal.reached(run.model, change, replace(how, seed=4 + k))
        assert torch.equal(parameters(models[k]), parameters(again))
    models, _, _ = goal.matched(runs, change, left=80.0, seed=4)  # as many rows as there are
    missed = goal.share_missed(runs[0].model, models[0], change)
    assert missed < 0.5  # the change is one that the first run can make


def test_much_budget_takes_more_steps_not_larger_ones():
    goal, runs = goal_and_runs(n=600)
    _, how, steps = goal.matched(runs, change_of(goal), left=16.0, seed=0)
    # nothing left for another row in each step: settling the damping takes none
    assert how.rows == int(160 / row_cost(CLASSES - 1) / 2)
    _, how, steps = goal.matched(runs, change_of(goal), left=200.0, seed=0)
    assert len(how.dampings) == round(2000 / row_cost(CLASSES - 1) / matching.ROWS)
    assert abs(how.rows - matching.ROWS) <= 10
    assert steps <= 200


def test_jacobians_too_large_to_hold_are_left_to_gradients(monkeypatch):
    goal, runs = goal_and_runs()
    monkeypatch.setattr(gauss_newton, "LARGEST", 10)
    _, how, steps = goal.matched(runs, change_of(goal), left=20.0, seed=0)
    assert isinstance(how, Steps)
    assert how.momentum == 0.8
    assert steps <= 20.0
    goal, runs = goal_and_runs(optimizer=Adam(0.01))
    _, how, _ = goal.matched(runs, change_of(goal), left=20.0, seed=0)
    assert how.momentum is None


def test_what_is_all_noise_is_damped_or_not_done():
    """Rows are asked for changes that their inputs do not tell: fitting some of them moves the others elsewhere."""
    goal, runs = goal_and_runs(n=200, few=4)
    rng = np.random.default_rng(0)
    noise = tuple(
        torch.from_numpy(rng.normal(size=(len(d), CLASSES))) for d in (goal.forget, goal.retain)
    )
    models, how, _ = goal.matched(runs, noise, left=3.0, seed=0)
    assert missed_by([run.model for run in runs], models, goal, noise) <= sum(
        float(part.square().mean()) for part in noise
    )
    assert how is None or max(how.dampings) > 10 * gauss_newton.DAMPINGS[0]
    nothing = tuple(0 * part for part in noise)
    models, how, _ = goal.matched(runs, nothing, left=3.0, seed=0)
    assert how is None
    for model, run in zip(models, runs, strict=True):
        assert torch.equal(parameters(model), parameters(run.model))
        assert model is not run.model


def test_the_damping_is_the_least_that_brings_the_mean_nearest():
    """Each tried by itself, on rows of which some were not in the step."""
    goal, runs = goal_and_runs(count=4, n=58)  # 50 retained rows: all of them are read
    models = [run.model for run in runs]
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(50, CLASSES)))
    forget, retain = change_of(goal)
    change = (forget, retain + 0.3 * noise)  # small dampings fit what no other row shares
    _, how = goal._by_solving(matching.Plan(2, 40, 1.0, 4), runs, change, seed=0)
    half, taken = tuple(part / 2 for part in change), how.dampings[0]

    def missed(damping):
        """After the first of two steps, on its way to half of the change."""
        step = [GaussNewton((damping,), 40, seed) for seed in range(4)]
        some = [goal.reached(m, half, how) for m, how in zip(models, step, strict=True)]
        return missed_by(models, some, goal, half)

    ladder = {damping: missed(damping) for damping in gauss_newton.DAMPINGS}
    least = gauss_newton.NEARLY * min(ladder.values())
    assert taken == min(damping for damping, far in ladder.items() if far <= least)
    assert taken > gauss_newton.DAMPINGS[0]  # which is not where it began


def test_few_models_tell_the_mean_of_many():
    """E mean_of² of 12 models, from 3 of them: over 4,000 numbers within four standard errors."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(3, 4000)) * 2 + 1)  # mean 1, variance 4
    told = gauss_newton.squares_of_means([[v] for v in values], 12)
    each = values.mean(0).square() - values.var(0) * (1 / 3 - 1 / 12)
    assert told == pytest.approx(float(each.mean()))
    assert abs(told - (1 + 4 / 12)) < 4 * float(each.std()) / 4000**0.5
    first = [[v] for v in values[:1]]
    assert gauss_newton.squares_of_means(first, 12) == pytest.approx(
        float(values[0].square().mean())
    )


def test_models_that_scatter_more_than_they_miss_have_a_damping():
    """The first models miss evenly on both sides: less than noise, but no less than the noise of all."""
    apart = [[torch.full((7,), sign)] for sign in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert gauss_newton.squares_of_means(apart, 100) == pytest.approx(2.5 / 100)
    goal, runs = goal_and_runs(count=60, n=200)
    small = change_of(goal, size=1e-3)
    models, how, _ = goal.matched(runs, small, left=3.0, seed=0)
    assert len(models) == 60
    assert how is None or set(how.dampings) <= set(gauss_newton.DAMPINGS)


def test_what_is_not_finite_is_left_alone(monkeypatch):
    goal, runs = goal_and_runs()

    def broken(system, damping):
        raise ValueError("expected a finite step")

    monkeypatch.setattr(gauss_newton._System, "solved", broken)
    models, how, _ = goal.matched(runs, change_of(goal), left=20.0, seed=0)
    assert how is None
    for model, run in zip(models, runs, strict=True):
        assert torch.equal(parameters(model), parameters(run.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Inputs around 100: products of gradients are beyond 65,504, the largest number of float16."""
    goal, runs = goal_and_runs(count=1)
    x, y = goal.forget[np.arange(8)]
    data = as_data((100 * x.to(dtype), y))
    model = nn.Linear(5, CLASSES).to(dtype)
    both = Goal(Rows(data, np.arange(2)), Rows(data, np.arange(2, 5)))  # fewer logits than weights
    change = torch.randn(2, CLASSES), torch.randn(3, CLASSES)
    run = SimpleNamespace(model=model, order=runs[0].order, recipe=runs[0].recipe)
    models, how, _ = both.matched([run], change, left=20.0, seed=0)
    assert how is not None
    assert both.share_missed(model, models[0], change) < 0.5


def test_layers_of_two_precisions():
    data = as_data(data_of(12))
    body, head = nn.Linear(5, 8), nn.Linear(8, CLASSES).double()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            return self.head(self.body(x.to(self.body.weight)).double())

    model = Mixed()
    goal = Goal(Rows(data, np.arange(4)), Rows(data, np.arange(4, 12)))
    change = change_of(goal)
    how = GaussNewton((0.003,), rows=12)
    new = goal.reached(model, change, how)
    same = goal.reached(copy.deepcopy(model).double(), change, how)
    # gradients of the body are rounded to float32, 1e-7, and enter a system of condition 1e3 or so
    assert torch.allclose(parameters(new), parameters(same), atol=1e-3)
    assert goal.share_missed(model, new, change) < 0.9


def test_as_many_models_settle_it_as_jacobians_can_be_held(monkeypatch):
    goal, runs = goal_and_runs(count=3)
    model = runs[0].model
    each = 44 * 3 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(gauss_newton, "LARGEST", 2 * each)
    plan = goal._solving(model, 44 * 2 * row_cost(3), change_of(goal))
    assert (plan.rows, plan.at_once) == (40, 2)  # all rows there are: 40 in the place of 44
    models, how, _ = goal.matched(runs, change_of(goal), left=20.0, seed=4)
    again = goal.reached(model, change_of(goal), replace(how, seed=6))
    assert len(models) == 3
    assert not torch.equal(parameters(models[2]), parameters(again))
    third = goal.reached(runs[2].model, change_of(goal), replace(how, seed=6))
    assert torch.equal(parameters(models[2]), parameters(third))


def test_trust_reads_the_labels_logits():
    goal, _ = goal_and_runs()
    change = torch.randn(5, 8, CLASSES)
    own = goal.own("forget logits", change)
    labels = data_of(40)[1][:8]
    expected = torch.stack([change[:, i, y] for i, y in enumerate(labels)], 1)
    assert torch.equal(own, expected)
    ids = torch.tensor([[1, 2, 3, 0], [2, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 3, -100], [-100, 1, -100, -100]])
    sequences = Rows(as_data({"input_ids": ids, "labels": labels}), np.arange(2))
    change = torch.randn(3, 2, 4, CLASSES)
    own = Goal(sequences, sequences).own("retain logits", change)
    assert own.shape == (3, 2, 3)
    assert torch.equal(own[:, 0, 1], change[:, 0, 1, 3])  # the position before predicts it
    assert torch.equal(own[:, 1, 0], change[:, 1, 0, 1])
    numbers = Rows(as_data((ids.double(), torch.zeros(2))), np.arange(2))
    change = torch.randn(3, 2, 1)
    assert Goal(numbers, numbers).own("forget logits", change) is change


def test_models_are_copies():
    goal, runs = goal_and_runs()
    kept = copy.deepcopy(runs[0].model)
    goal.matched(runs, change_of(goal), left=20.0, seed=0)
    assert torch.equal(parameters(kept), parameters(runs[0].model))
