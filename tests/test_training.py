"""attribution_core.training: pure optimizers against torch.optim, weights, order, exposure, refusals."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    Adam,
    AdamW,
    MetagradientWarning,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    magic,
    margin,
    source,
    tracin,
    train,
)
from attribution_core.stepwise.optimizers import clipped
from tests import menagerie

RECIPE = Recipe(SGD(0.1, momentum=0.9), 4, 2)
STEPS = 100
# 100 steps of rounding 1e-16, grown by training by less than 1e4
EXACT = {"rtol": 1e-12, "atol": 1e-12}
OPTIMIZERS = {
    "sgd": (SGD(0.05), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (SGD(0.05, 0.9), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        SGD(0.05, 0.9, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "adam": (
        Adam(0.01, betas=(0.8, 0.99), eps=1e-6, eps_root=0, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adamw": (
        AdamW(0.01, eps_root=0, weight_decay=0.1),
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
    ),
}
SCHEDULES = {
    None: lambda step: 1.0,
    "linear": lambda step: 1 - step / STEPS,
    "cosine": lambda step: 0.5 * (1 + np.cos(np.pi * step / STEPS)),
}


def by_torch(problem, order, optimizer, settings, factor=lambda step: 1.0, weights=None, clip=None):
    """The textbook loop: sum of weighted losses over the number of rows, backward, clip, step."""
    model = copy.deepcopy(problem.model)
    weights = torch.ones(problem.n) if weights is None else torch.as_tensor(weights)
    tool = optimizer(model.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(tool, factor)
    losses = []
    for rows in order:
        tool.zero_grad()
        values = problem.loss(model, problem.train[list(rows)])
        loss = (values * weights[list(rows)].to(values)).sum() / len(rows)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        tool.step()
        schedule.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), np.array(losses)


def assert_same(run, params, losses):
    np.testing.assert_allclose(run.losses, losses, **EXACT)
    assert list(run.params) == list(params)
    for name, value in params.items():
        torch.testing.assert_close(run.params[name], value.detach(), **EXACT)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_equal_torch(name, schedule):
    ours, theirs, settings = OPTIMIZERS[name]
    problem = menagerie.mlp()
    run = train(
        problem, Recipe(ours, batch_size=2, epochs=STEPS * 2 / problem.n, schedule=schedule)
    )
    assert len(run.order) == STEPS
    assert_same(run, *by_torch(problem, run.order, theirs, settings, SCHEDULES[schedule]))


def test_a_schedule_of_ones_own_and_clipping_equal_torch():
    problem = menagerie.conv()

    def warmup(step):
        return min(1.0, (step + 1) / 10)

    recipe = Recipe(SGD(0.1, 0.9), 3, 20, schedule=warmup, clip=0.2)
    run = train(problem, recipe)
    settings = {"lr": 0.1, "momentum": 0.9}
    expected = by_torch(problem, run.order, torch.optim.SGD, settings, warmup, clip=0.2)
    assert_same(run, *expected)
    free = train(problem, replace(recipe, clip=None))
    assert not np.allclose(free.losses, run.losses)  # the limit was met on the way


def test_weight_norm_trains_as_torchs():
    problem = menagerie.weight_normed()
    run = train(problem, Recipe(SGD(0.1, 0.9), 3, 20))
    settings = {"lr": 0.1, "momentum": 0.9}
    assert_same(run, *by_torch(problem, run.order, torch.optim.SGD, settings))


def test_clipping_leaves_small_gradients_alone():
    g = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([[4.0]]).double()}
    assert clipped(g, 5.1) == g
    torch.testing.assert_close(clipped(g, 1.0)["b"], torch.tensor([[4 / (5 + 1e-6)]]).double())


def test_the_problems_weight_decay_is_the_optimizers():
    problem = menagerie.mlp()
    recipe = Recipe(SGD(0.1), 2, 3)
    inside = train(replace(problem, weight_decay=0.2), recipe)
    beside = train(problem, replace(recipe, optimizer=SGD(0.1, weight_decay=0.2)))
    for name in inside.params:
        assert torch.equal(inside.params[name], beside.params[name])
    assert inside.trained().weight_decay == beside.trained().weight_decay == 0.2


BY_NAME = {"0.weight": 0.2, "3.weight": 0.05}


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (SGD(0.05, 0.9), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (Adam(0.01, eps_root=0), torch.optim.Adam, {"lr": 0.01}),
        (AdamW(0.01, eps_root=0), torch.optim.AdamW, {"lr": 0.01}),
    ],
)
def test_weight_decay_by_name_equals_torchs_parameter_groups(ours, theirs, settings):
    """Stated in the problem or in the optimizer; names left out have none."""
    problem = menagerie.mlp()
    recipe = Recipe(ours, batch_size=2, epochs=STEPS * 2 / problem.n)

    def grouped(params):  # `by_torch` hands over the parameters of its own copy, in order
        groups = [
            {"params": [value], "weight_decay": BY_NAME.get(name, 0.0)}
            for name, value in zip(problem.params, params, strict=True)
        ]
        return theirs(groups, **settings)

    inside = train(replace(problem, weight_decay=BY_NAME), recipe)
    assert_same(inside, *by_torch(problem, inside.order, grouped, {}))
    beside = train(problem, replace(recipe, optimizer=replace(ours, weight_decay=BY_NAME)))
    for name in inside.params:
        assert torch.equal(inside.params[name], beside.params[name])
    assert inside.trained().weight_decay == beside.trained().weight_decay == BY_NAME


def test_the_gradient_of_a_weighted_batch():
    problem = menagerie.mlp()
    w, rows = torch.tensor([0.5, 0.0, 2.0]), [4, 1, 2]
    weights = np.ones(6)
    weights[rows] = w
    steps = train(problem, Recipe(SGD(0.1), 3, 1, order=[rows]), weights).steps
    loss, packed, _ = steps.gradient(steps.start(), 0)
    flat = torch.cat([g.flatten() for g in steps.packing.unpack(packed).values()])
    torch.testing.assert_close(flat, w.double() @ menagerie.row_gradients(problem)[rows] / 3)
    expected = w.double() @ menagerie.losses_at(problem, menagerie.flat_params(problem))[rows] / 3
    assert loss == pytest.approx(expected.item(), rel=1e-12)


# --- weights and order -----------------------------------------------------------------------


def test_weight_zero_is_left_out_of_the_sum_and_changes_nothing_else():
    """Same batches, same steps, same denominator: as torch's loop with these weights."""
    problem = menagerie.mlp()
    w = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 2.0])
    recipe = Recipe(Adam(0.01, eps_root=0), batch_size=4, epochs=10)
    run, full = train(problem, recipe, w), train(problem, recipe)
    assert all(np.array_equal(a, b) for a, b in zip(run.order, full.order, strict=True))
    assert_same(run, *by_torch(problem, run.order, torch.optim.Adam, {"lr": 0.01}, weights=w))
    np.testing.assert_array_equal(run.anchor, w)


def test_dropped_rows_are_never_seen():
    problem = menagerie.ridge()
    w = (np.arange(problem.n) % 4 > 0).astype(float)
    run = train(problem, Recipe(SGD(0.01), batch_size=5, epochs=4), w, drop="row")
    seen = np.bincount(np.concatenate(run.order), minlength=problem.n)
    # 15 of 20 rows are left: 4 epochs are 12 batches of 5, every row 4 times
    np.testing.assert_array_equal(seen, 4 * w)
    assert len(run.order) == 12


def test_dropped_rows_with_fewer_left_than_a_batch():
    problem = menagerie.ridge()
    w = np.zeros(problem.n)
    w[[3, 7]] = 1.0
    run = train(problem, Recipe(SGD(0.01), batch_size=5, epochs=3), w, drop="row")
    assert [sorted(batch.tolist()) for batch in run.order] == [[3, 7]] * 3


def test_exposure_takes_fewer_steps_from_the_whole_set():
    problem = menagerie.ridge()
    recipe = Recipe(SGD(0.01), batch_size=5, epochs=8, schedule="linear")
    full, half = train(problem, recipe), train(problem, recipe, exposure=0.5)
    seen = np.bincount(np.concatenate(half.order), minlength=problem.n)
    np.testing.assert_array_equal(seen, 4)  # every row half as often as in 8 epochs
    assert len(half.order) == len(full.order) / 2
    np.testing.assert_array_equal(half.anchor, 0.5)
    # and the schedule is that of the shorter run
    rates = [recipe.lr_factor(k, len(half.order)) for k in range(len(half.order))]
    np.testing.assert_allclose(rates, 1 - np.arange(16) / 16)


def test_exposure_has_the_steps_of_a_run_on_a_fraction():
    problem = menagerie.ridge()
    recipe = Recipe(SGD(0.01), batch_size=3, epochs=7)
    w = np.arange(problem.n) % 2
    half, removed = train(problem, recipe, exposure=0.5), train(problem, recipe, w, drop="row")
    assert len(half.order) == len(removed.order)


def test_a_run_is_replayed_from_its_order():
    problem = menagerie.mlp()
    run = train(problem, Recipe(AdamW(0.01, weight_decay=0.1), 2, 5, seed=3))
    again = train(problem, replace(run.recipe, order=run.order, seed=99))
    for name in run.params:
        assert torch.equal(run.params[name], again.params[name])


def test_equal_seeds_give_equal_runs_and_other_seeds_other_orders():
    problem = menagerie.mlp()
    recipe = Recipe(SGD(0.1), 2, 5)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = train(problem, recipe), train(problem, recipe)
    other = train(problem, replace(recipe, seed=1))
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
    assert any((a != b).any() for a, b in zip(first.order, other.order, strict=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_every_pass_sees_every_row_once():
    rows = np.arange(10)
    order = Recipe(SGD(0.1), batch_size=4, epochs=6).draw(rows)
    assert len(order) == 15
    stream = np.concatenate(order)
    for start in range(0, 60, 10):
        np.testing.assert_array_equal(np.sort(stream[start : start + 10]), rows)


def test_init_by_seed():
    problem = menagerie.mlp()

    def init(seed):
        model = copy.deepcopy(problem.model)
        nn.init.constant_(model[0].bias, seed)
        return model

    recipe = Recipe(SGD(0.0), 2, 1, init=init, seed=4)
    assert train(problem, recipe).params["0.bias"].eq(4).all()


@pytest.mark.parametrize("name", ["mlp", "gpt2", "frozen"])
def test_the_problems_model_is_left_as_it_was(name):
    problem = {**menagerie.ARCHITECTURES, **menagerie.ODD}[name]()
    before = copy.deepcopy(problem.model.state_dict())
    run = train(problem, Recipe(SGD(0.1), 2, 2))
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in problem.model.parameters())
    trained = run.model
    moved = {
        key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])
    }
    trainable = {key for key, p in problem.model.named_parameters() if p.requires_grad}
    # every trainable parameter moved (a tied one under all its names), no other did
    tied = {"lm_head.weight"} if name == "gpt2" else set()
    assert moved - tied == trainable
    outputs = Outputs(problem.loss, problem.train)
    torch.testing.assert_close(run.outputs(outputs), outputs.evaluate(trained))


def test_a_run_is_kept_in_a_folder(tmp_path):
    """The second call reads what the first one wrote; another recipe is another run."""
    problem = menagerie.mlp()
    recipe = Recipe(Adam(0.01), 2, 5)
    steps = []

    def progress(items):
        for item in items:
            steps.append(item)
            yield item

    w = np.linspace(0.5, 1, problem.n)
    runs = [
        train(problem, recipe, w, 0.5, folder=tmp_path / "run", progress=progress) for _ in range(2)
    ]
    assert len(steps) == len(runs[0].order)
    plain = train(problem, recipe, w, 0.5)
    for run in runs:
        for name in plain.params:
            assert torch.equal(run.params[name], plain.params[name])
            assert torch.equal(run.damping[name], plain.damping[name])
        np.testing.assert_array_equal(run.anchor, plain.anchor)
        np.testing.assert_array_equal(run.losses, plain.losses)
        assert all(np.array_equal(a, b) for a, b in zip(run.order, plain.order, strict=True))


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9), AdamW(0.01)])
def test_checkpoints_are_the_middles_of_equal_stretches(optimizer):
    """Parameters before the middle step and the state after it, as shorter runs of the same order end."""
    problem = menagerie.mlp()
    run = train(problem, Recipe(optimizer, 2, 5, "linear"), checkpoints=4)
    assert len(run.order) == 15
    where = [(at.step, at.first, at.last) for at in run.checkpoints]
    assert where == [(2, 0, 4), (6, 4, 8), (9, 8, 11), (13, 11, 15)]

    def after(steps):
        same = replace(
            run.recipe, order=run.order[:steps], schedule=lambda k: run.recipe.lr_factor(k, 15)
        )
        return train(problem, same)

    for at in run.checkpoints:
        for name, value in after(at.step).params.items():
            assert torch.equal(at.params[name], value)
        for group, held in after(at.step + 1).state.items():
            for name, value in held.items():
                assert torch.equal(at.state[group][name], value)
    plain = train(problem, run.recipe)
    assert plain.checkpoints == ()
    assert all(torch.equal(plain.params[name], run.params[name]) for name in run.params)


def test_a_checkpoint_for_every_step_is_the_whole_way():
    problem = menagerie.mlp()
    run = train(problem, Recipe(SGD(0.1), 2, 1), checkpoints=3)
    assert [(at.step, at.first, at.last) for at in run.checkpoints] == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 2, 3),
    ]
    assert all(torch.equal(run.checkpoints[0].params[k], v) for k, v in problem.params.items())
    with pytest.raises(
        ValueError, match="expected 0 to 3 checkpoints, one for each step at most, got 4"
    ):
        train(problem, run.recipe, checkpoints=4)


def test_checkpoints_are_kept_in_the_folder_and_their_number_is_part_of_it(tmp_path):
    problem, recipe = menagerie.mlp(), Recipe(Adam(0.01), 2, 5)
    made = train(problem, recipe, checkpoints=3, folder=tmp_path / "three")
    read = train(problem, recipe, checkpoints=3, folder=tmp_path / "three")
    plain = train(problem, recipe, checkpoints=3)
    for other in (made, read):
        for a, b in zip(plain.checkpoints, other.checkpoints, strict=True):
            assert (a.step, a.first, a.last) == (b.step, b.first, b.last)
            assert list(a.params) == list(b.params)
            for group, held in {"params": a.params, **a.state}.items():
                found = {"params": b.params, **b.state}[group]
                assert all(torch.equal(held[name], found[name]) for name in held)
    for count in (0, 2):
        with pytest.raises(ValueError, match="the number of checkpoints has changed"):
            train(problem, recipe, checkpoints=count, folder=tmp_path / "three")
    train(problem, recipe, folder=tmp_path / "none")
    with pytest.raises(ValueError, match="the number of checkpoints has changed"):
        train(problem, recipe, checkpoints=3, folder=tmp_path / "none")


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": np.ones(3)}, r"expected one weight per training example, \[n=6\], got \(3,\)"),
        ({"weights": -np.ones(6)}, r"expected finite weights >= 0, got \[-1.*rows \[0, 1"),
        ({"weights": np.full(6, np.nan)}, "expected finite weights >= 0, got .nan"),
        ({"weights": np.zeros(6), "drop": "row"}, "expected something to train on"),
        ({"exposure": 0.0}, r"expected an exposure in \(0, 1\], got 0"),
        ({"exposure": 1.5}, r"expected an exposure in \(0, 1\], got 1.5"),
        ({"drop": "both"}, "unknown drop 'both'"),
    ],
)
def test_arguments_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        train(menagerie.mlp(), Recipe(SGD(0.1), 2, 1), **settings)


def test_an_explicit_order_cannot_lose_rows():
    recipe = Recipe(SGD(0.1), 2, 1, order=[[0, 1], [2, 3]])
    with pytest.raises(
        ValueError, match="expected drop='weight' with an explicit order, got drop='row' and 1 rows"
    ):
        train(menagerie.mlp(), recipe, [1, 1, 1, 1, 1, 0], drop="row")


def test_two_weight_decays():
    problem = replace(menagerie.mlp(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"got 0.1 in the problem and 0.2 in the optimizer"):
        train(problem, Recipe(SGD(0.1, weight_decay=0.2), 2, 1))


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        ({"body": 0.1}, r"weight decays of trainable parameters, got \['body'\]"),
        ({"0.weight": -0.1}, "expected a weight decay of at least 0"),
    ],
)
def test_a_weight_decay_of_the_optimizer_that_makes_no_sense(decay, message):
    with pytest.raises(ValueError, match=message):
        train(menagerie.mlp(), Recipe(SGD(0.1, weight_decay=decay), 2, 1))


@pytest.mark.parametrize("lr", [-0.1, np.inf, np.nan])
def test_a_learning_rate_that_makes_no_sense(lr):
    with pytest.raises(ValueError, match="expected a finite learning rate of at least 0, got"):
        train(menagerie.mlp(), Recipe(AdamW(lr), 2, 1))


def test_one_weight_decay_said_twice_is_one():
    problem = replace(menagerie.mlp(), weight_decay=0.1)
    by_name = dict.fromkeys(problem.params, 0.1)
    run = train(problem, Recipe(SGD(0.1, weight_decay=by_name), 2, 1))
    assert run.trained().weight_decay == by_name


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'step'; linear, cosine"):
        train(menagerie.mlp(), Recipe(SGD(0.1), 2, 1, schedule="step"))


def with_layer(layer):
    problem = menagerie.mlp()
    model = nn.Sequential(problem.model, layer).double()
    return Problem(model, problem.loss, problem.train)


def test_dropout_must_say_which_masks():
    with pytest.raises(ValueError, match=r"active dropout in '1' \(p=0.5\); say which masks"):
        train(with_layer(nn.Dropout(0.5)), Recipe(SGD(0.1), 2, 1))


def test_masks_of_a_model_in_eval_mode_are_refused():
    """They would be drawn for nothing; one layer in training mode is enough."""
    problem = menagerie.mlp()
    recipe = Recipe(SGD(0.1), batch_size=4, epochs=1, masks=0)

    def trained(*layers, mode=True):
        model = nn.Sequential(copy.deepcopy(problem.model), *layers).double().train(mode)
        return model, lambda: train(replace(problem, model=model), recipe, states=0)

    model, again = trained(nn.Dropout(0.5), nn.Dropout(0.2), mode=False)
    with pytest.raises(
        ValueError,
        match=r"got one with '1' and all else in eval mode; call model.train\(\), or leave masks out",
    ):
        again()
    model[2].train()
    again()
    trained(mode=False)[1]()  # without dropout masks are harmless
    trained()[1]()


def test_a_loss_of_nan_names_the_step_and_the_rows():
    x, y = menagerie.mlp().train.columns
    x[4, 0] = float("nan")
    problem = Problem(menagerie.mlp().model, menagerie.mlp().loss, (x, y))
    recipe = Recipe(SGD(0.1), 2, 1, order=[[0, 1], [2, 3], [5, 4]])
    with pytest.raises(ValueError, match=r"stopped at step 2 of 3:.*NaN or infinity in rows \[4\]"):
        train(problem, recipe)


def test_a_learning_rate_that_explodes_says_so():
    recipe = Recipe(SGD(1e200), 2, 5)
    with pytest.raises(
        ValueError, match=r"stopped at step .*; look at these examples, or at the lea"
    ):
        train(menagerie.ridge(), recipe)


def test_a_loss_of_one_number():
    problem = menagerie.mlp()

    def mean(model, batch):
        return margin(model, batch).mean()

    with pytest.raises(ValueError, match="expected one loss per row"):
        train(Problem(problem.model, mean, problem.train), Recipe(SGD(0.1), 2, 1))


@pytest.mark.parametrize("by_name", [False, True])
def test_an_optimizers_state_comes_back_in_the_order_of_the_parameters(tmp_path, by_name):
    """Who flattens it goes by its order, and files are ordered by the alphabet."""
    model = nn.Sequential()
    model.add_module("z", nn.Linear(3, 4))
    model.add_module("a", nn.Linear(4, 3))
    x, y = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    problem = Problem(model.double(), cross_entropy, (x.double(), y))
    decay = {"z.weight": 0.1, "z.bias": 0.0, "a.weight": 0.1, "a.bias": 0.0} if by_name else 0.1
    recipe = Recipe(AdamW(0.05, weight_decay=decay), 3, 3)
    one = train(problem, recipe, checkpoints=3)
    two = train(problem, recipe, checkpoints=3, folder=tmp_path)
    names = list(dict(model.named_parameters()))
    for held in (two, *two.checkpoints):
        assert all(list(of) == names for of in held.state.values())
    outputs = Outputs(margin, (x[:2].double(), y[:2]))
    for method in (tracin, source, influence, partial(magic, check=False)):
        np.testing.assert_array_equal(method(one, outputs).scores, method(two, outputs).scores)


def test_checkpoints_and_the_step_that_weights_act_from_are_not_mixed_up(tmp_path):
    problem = menagerie.mlp(12)
    w = np.arange(12.0) / 6
    train(problem, RECIPE, w, checkpoints=3, folder=tmp_path)
    with pytest.raises(ValueError, match="another training"):
        train(problem, RECIPE, w, since=3, folder=tmp_path)


def test_states_of_a_killed_training_of_another_recipe_are_forgotten(tmp_path):
    problem = menagerie.mlp(12)

    def killed(steps):
        for step in steps:
            if step == 4:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        train(problem, replace(RECIPE, seed=7), states="all", folder=tmp_path, progress=killed)
    run = train(problem, RECIPE, states=1, folder=tmp_path)
    assert list(run.states) == [0]
    outputs = menagerie.unseen(problem)
    expected = magic(train(problem, RECIPE), outputs, check=False).scores
    np.testing.assert_array_equal(magic(run, outputs, check=False).scores, expected)


def test_rows_are_removed_by_drop_and_not_by_chance():
    """Rows of weight 0 that a short run did not come to are still among those it draws from."""
    problem, n = menagerie.mlp(12), 12
    short = Recipe(SGD(0.1), 2, 0.5)
    seen = np.unique(np.concatenate(train(problem, short).order))
    w = np.ones(n)
    w[np.setdiff1d(np.arange(n), seen)] = 0.0
    chance, removed = (train(problem, short, w, drop=drop) for drop in ("weight", "row"))
    assert (chance.drawn, removed.drawn) == (n, len(seen))
    np.testing.assert_array_equal(removed.pool, seen)
    np.testing.assert_array_equal(removed.removed, np.flatnonzero(w == 0))
    scores = magic(chance, menagerie.unseen(problem), check=False).scores
    assert (scores[w == 0] == 0).all()  # in no batch: nothing moves the run
    # and where a kept row is in no batch, removed ones are looked at all the same
    w = np.ones(n)
    w[0] = 0.0
    run = train(problem, short, w, drop="row")
    assert run.drawn == n - 1
    with pytest.warns(MetagradientWarning, match="rows are in no batch"):
        scores = magic(run, menagerie.unseen(problem), check=False).scores
    assert scores[0].any()


def test_a_run_keeps_its_weights_to_itself():
    problem, w = menagerie.mlp(12), np.ones(12)
    run = train(problem, RECIPE, w)
    w[:] = 0.0
    assert run.anchor.min() == 1.0


def test_a_run_and_its_states_are_told_in_a_line():
    problem = menagerie.softmax()
    run = train(problem, replace(RECIPE, seed=3))
    assert repr(run) == f"Run(n=20 rows, 10 steps, seed 3, last loss {run.losses[-1]:.4g})"
    count = sum(value.numel() for value in run.params.values())
    told = f"TrainingState({count:,} parameters, momentum, {16 * count:,} bytes)"
    assert repr(run.last) == told


def test_how_many_shared_a_run_is_kept_with_it(tmp_path):
    problem = menagerie.mlp(12)
    run = train(problem, RECIPE, folder=tmp_path)
    held = dict(np.load(tmp_path / "run.npz"))
    np.savez(tmp_path / "run.npz", **{**held, "shards": 2})
    assert run.shards == 1
    with pytest.raises(
        ValueError, match="expected 2 processes, as the run was trained with, got 1"
    ):
        magic(train(problem, RECIPE, folder=tmp_path), menagerie.unseen(problem))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs above 0"),
        ({"epochs": -1}, "epochs above 0"),
        ({"batch_size": 0}, "batch_size of at least one row"),
        ({"batch_size": 2.5}, "batch_size of at least one row"),
        ({"clip": -1.0}, "clip to be a largest norm above 0"),
        ({"clip": 0.0}, "clip to be a largest norm above 0"),
    ],
)
def test_recipes_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"optimizer": SGD(0.1), "batch_size": 2, "epochs": 1, **given})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (SGD(0.1, momentum=1.0), "momentum or betas of 0 to below 1"),
        (Adam(0.1, betas=(0.9, 1.5)), "momentum or betas of 0 to below 1"),
        (Adam(0.1, eps=-1.0), "eps of at least 0"),
    ],
)
def test_optimizers_that_make_no_sense(optimizer, message):
    with pytest.raises(ValueError, match=message):
        train(menagerie.ridge(), Recipe(optimizer, 2, 1))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[0, 20]], r"rows of 0 to 19, got \[20\]"),
        ([[-1]], r"rows of 0 to 19, got \[-1\]"),
        ([[True] * 5 + [False] * 6], "flatnonzero of a mask"),
        ([[]], "batches with rows in them"),
        ([], "batches with rows in them"),
    ],
)
def test_orders_that_make_no_sense(order, message):
    with pytest.raises(ValueError, match=message):
        train(menagerie.ridge(20), Recipe(SGD(0.1), 2, 1, order=order))


class Either(nn.Module):
    """One number for rows of 0, another for rows of 1; a batch without such rows does not reach it."""

    def __init__(self):
        super().__init__()
        self.ends = nn.ParameterList([torch.ones(1).double(), torch.ones(1).double()])

    def forward(self, x):
        out = torch.zeros(len(x)).double()
        for k, end in enumerate(self.ends):
            if (x == k).any():
                out = out + torch.where(x == k, end, 0.0)
        return out


def test_parameters_that_a_batch_does_not_reach_have_gradients_of_zero():
    """torch leaves out what has no gradient, where momentum moves it on here; given zeros, it does as well."""
    x = torch.tensor([0, 0, 1, 1])
    problem = Problem(Either(), lambda m, b: m(b[0]) ** 2, (x,))
    run = train(problem, Recipe(SGD(0.1, 0.9), 2, 1, order=[[0, 1], [2, 3]]))

    def by_torch(zeros):
        model = Either()
        tool = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for rows in run.order:
            tool.zero_grad()
            (model(x[rows]) ** 2).mean().backward()
            for p in model.parameters() if zeros else ():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            tool.step()
        return torch.cat([p.detach() for p in model.parameters()])

    found = torch.cat(list(run.params.values()))
    torch.testing.assert_close(found, by_torch(zeros=True), rtol=1e-12, atol=0)
    assert (found - by_torch(zeros=False)).abs()[0] > 0.1
