"""attribution_core.stepwise.stacked: a slice of a stack is the training by itself; what cannot be stacked is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import (
    SGD,
    Adam,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    random_subsets,
    retrain,
    train,
)
from attribution_core.outputs import cross_entropy, margin, squared_error
from attribution_core.stepwise.stacked import Stack, saved_bytes, stack_size
from tests import menagerie

# the same operations in batched kernels: sums in another order, through some dozen steps
EXACT = {"rtol": 1e-9, "atol": 1e-11}

RECIPES = {
    "SGD": Recipe(SGD(0.1), 4, 3),
    "momentum, clipped": Recipe(SGD(0.1, 0.9), 4, 3, clip=0.1),
    "Nesterov, cosine": Recipe(SGD(0.1, 0.9, nesterov=True), 4, 3, schedule="cosine"),
    "Adam, decay by name": Recipe(Adam(0.01, weight_decay={"weight": 0.1}), 4, 3),
    "AdamW, linear": Recipe(AdamW(0.01, weight_decay=0.1), 4, 3, schedule="linear"),
}


def subsets(n, rows=6):
    """Subsets of different sizes: different numbers of steps, and batches that are not full."""
    return np.concatenate([random_subsets(n, rows // 2, keep=k, seed=1) for k in (0.15, 0.7)])


def compared(problem, recipe, outputs, weights, drop, seeds=(0, 1)):
    one, stacked = (
        retrain(problem, recipe, outputs, weights, seeds=seeds, drop=drop, stack=stack).per_seed
        for stack in (1, 5)
    )
    np.testing.assert_allclose(stacked, one, **EXACT)
    return stacked


@pytest.mark.parametrize("drop", ["row", "weight"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_stack_is_its_trainings(name, drop):
    problem = menagerie.softmax()
    if "decay" in name or "AdamW" in name:
        problem = replace(problem, weight_decay=0.0)
    outputs = menagerie.unseen(problem)
    found = compared(problem, RECIPES[name], outputs, subsets(problem.n), drop)
    assert np.ptp(found, axis=0).min() > 1e-3  # the subsets do differ


@pytest.mark.parametrize(
    "make", [menagerie.mlp, menagerie.conv, menagerie.gpt2, menagerie.weight_normed]
)
def test_networks(make):
    problem = make()
    outputs = Outputs(problem.loss, problem.train)
    weights = random_subsets(problem.n, 4, keep=0.67)
    found = compared(problem, Recipe(SGD(0.05, 0.9), 3, 3), outputs, weights, "row", seeds=(0,))
    assert np.ptp(found, axis=0).max() > 1e-3  # the subsets do differ


def test_initial_models_by_seed_fractional_weights_and_averages():
    problem = menagerie.softmax()

    def init(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(*reversed(problem.model.weight.shape)).double()

    recipe = Recipe(SGD(0.1), 5, 2, init=init)
    weights = np.random.default_rng(0).uniform(0.2, 2, (4, problem.n))
    found = compared(problem, recipe, menagerie.unseen(problem).mean(), weights, "weight")
    assert found.shape == (4, 2, 1)
    assert (found[:, 0] != found[:, 1]).all()


def test_initial_models_with_tied_weights():
    """The tied one stands in the state dict under both names, and is trained under one."""
    from transformers import GPT2LMHeadModel

    problem = menagerie.gpt2(6)

    def start(seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(problem.model.config).double()

    recipe = Recipe(SGD(0.1), 3, 2, init=start)
    outputs = Outputs(problem.loss, problem.train).mean()
    found = compared(problem, recipe, outputs, np.ones((2, 6)), "row")
    assert abs(found[0, 0] - found[0, 1]) > 1e-4  # the seeds do differ


def test_nobody_gives_the_initial_model():
    problem = menagerie.softmax()
    outputs = menagerie.unseen(problem)
    weights = np.concatenate([np.zeros((1, problem.n)), random_subsets(problem.n, 4, keep=0.5)])
    found = compared(problem, RECIPES["SGD"], outputs, weights, "row")
    np.testing.assert_allclose(found[0, 0], outputs.evaluate(problem.model), **EXACT)
    # with batches kept and weight 0 throughout, weight decay still acts
    kept = compared(problem, RECIPES["SGD"], outputs, weights, "weight")
    run = train(problem, RECIPES["SGD"], np.zeros(problem.n))
    np.testing.assert_allclose(kept[0, 0], run.outputs(outputs), **EXACT)
    assert (found[0, 0] != kept[0, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_else_is_in_the_stack_changes_no_bit(dtype):
    """So a table that was killed and resumed is the same, however its stacks were cut."""
    x, y = menagerie.digits_arrays()
    model = menagerie.digits_model(0, 16).to(dtype)
    problem = Problem(
        model, cross_entropy, (torch.tensor(x[:300]).to(dtype), torch.tensor(y[:300]))
    )
    outputs = Outputs(margin, (torch.tensor(x[300:310]).to(dtype), torch.tensor(y[300:310])))
    recipe = Recipe(AdamW(0.003), 20, 2)
    weights = np.concatenate([random_subsets(300, 6, keep=k) for k in (0.5, 0.43, 0.9)])
    whole = retrain(problem, recipe, outputs, weights, seeds=1, stack=18).per_seed
    for size in (2, 7):
        some = retrain(problem, recipe, outputs, weights[3:12], seeds=1, stack=size).per_seed
        np.testing.assert_array_equal(some, whole[3:12])


def test_a_training_that_repeats_is_done_once():
    problem = menagerie.softmax()
    done = []

    def progress(items):
        for item in items:
            done.append(item[0])
            yield item

    weights = np.ones((3, problem.n))
    table = retrain(
        problem, RECIPES["SGD"], menagerie.unseen(problem), weights, seeds=2, progress=progress
    )
    assert done == [0, 1]
    assert (table.per_seed == table.per_seed[0]).all()


# --- what cannot be stacked ------------------------------------------------------------------------


class Branching(nn.Module):
    """Its forward pass asks for a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3).double()

    def forward(self, x):
        out = self.linear(x)
        return out * 2 if float(out.sum().detach()) > 0 else out


class ByRow(nn.Module):
    """Its loss depends on how many dimensions it sees: another function when stacked."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3).double()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.linear(x)


def odd(model):
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).double()
    problem = Problem(model, cross_entropy, (x, torch.arange(12) % 3))
    return problem, Outputs(cross_entropy, (x[:4], torch.arange(4) % 3))


def test_control_flow_falls_back_to_one_by_one():
    problem, outputs = odd(Branching())
    recipe, weights = Recipe(SGD(0.1), 4, 2), random_subsets(12, 5, keep=0.5)
    one = retrain(problem, recipe, outputs, weights, seeds=1, stack=1)
    auto = retrain(problem, recipe, outputs, weights, seeds=1)
    np.testing.assert_array_equal(auto.per_seed, one.per_seed)
    with pytest.raises(ValueError, match="expected trainings that can be stacked, got"):
        retrain(problem, recipe, outputs, weights, seeds=1, stack=5)


def test_initial_models_that_differ_in_buffers():
    def init(seed):
        model = ByRow()
        model.seen.fill_(seed)
        return model

    problem, outputs = odd(ByRow())
    recipe = Recipe(SGD(0.1), 4, 2, init=init)
    with pytest.raises(ValueError, match="frozen parameters or buffers differ"):
        retrain(problem, recipe, outputs, np.ones((3, 12)), seeds=2, stack=6)


class RandomFeatures(nn.Module):
    """Its fixed features are no buffer: a plain tensor, drawn with the model."""

    def __init__(self, seed, private):
        super().__init__()
        drawn = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
        self.features, self._features = (None, drawn) if private else (drawn, None)
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.linear(
            torch.cos(x @ (self.features if self._features is None else self._features))
        )


@pytest.mark.parametrize("private", [False, True])
def test_initial_models_that_differ_in_plain_attributes_go_one_by_one(private):
    """The stack computed the first seed's features for all."""

    def init(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return RandomFeatures(seed, private)

    problem, outputs = odd(init(0))
    recipe = Recipe(SGD(0.1), 4, 2, init=init)
    weights = random_subsets(12, 3, keep=0.5)
    auto, one = (
        retrain(problem, recipe, outputs, weights, seeds=2, stack=stack).per_seed
        for stack in ("auto", 1)
    )
    np.testing.assert_array_equal(auto, one)
    with pytest.raises(ValueError, match="stacked, got initial models whose layers or settings"):
        retrain(problem, recipe, outputs, weights, seeds=2, stack=6)


def test_another_function_when_stacked_is_found_out():
    """A loss that looks at where it is: under vmap it would train on something else."""

    def loss(model, batch):
        inside = torch._C._functorch.is_batchedtensor(model.linear.weight)
        return cross_entropy(model, batch) * (2 if inside else 1)

    problem, outputs = odd(ByRow())
    problem = replace(problem, loss=loss)
    cells = [(np.ones(12), 0)] * 4
    with pytest.raises(ValueError, match="differs when stacked"):
        Stack(problem, Recipe(SGD(0.1), 4, 2), cells, "row").outputs(outputs)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"masks": 1}, "dropout masks"),
        ({"augment": lambda batch, rows, step: batch}, "augmentation"),
        ({"accumulate": 2}, "batches in parts"),
    ],
)
def test_recipes_that_are_not_stacked(settings, reason):
    problem = menagerie.softmax()
    recipe = replace(RECIPES["SGD"], **settings)
    assert stack_size(problem, recipe, 100) == (1, reason)


def test_weights_and_orders_that_train_refuses():
    problem, outputs = odd(ByRow())
    recipe = Recipe(SGD(0.1), 4, 2)
    weights = np.ones((5, 12))
    weights[3, 2] = -1.0
    with pytest.raises(
        ValueError, match=r"retraining 3 \(seed 0\) failed: expected finite weights"
    ):
        retrain(problem, recipe, outputs, weights, seeds=1)
    fixed = replace(recipe, order=[[0, 1], [2, 3]])
    halves = random_subsets(12, 5, keep=0.5)
    with pytest.raises(ValueError, match="expected drop='weight' with an explicit order"):
        retrain(problem, fixed, outputs, halves, seeds=1)
    compared(problem, fixed, outputs, halves, "weight", seeds=(0,))


def test_sizes():
    problem, recipe = menagerie.softmax(), RECIPES["SGD"]
    assert stack_size(problem, recipe, 3)[0] == 1  # not worth it
    assert stack_size(problem, recipe, 100)[0] == 128
    wide = Problem(nn.Linear(64, 1000), cross_entropy, (torch.zeros(4, 64), torch.zeros(4).long()))
    assert stack_size(wide, recipe, 100)[0] == 1
    frozen = nn.Sequential(nn.Linear(64, 1000).requires_grad_(False), nn.Linear(1000, 2))
    adapter = Problem(frozen, cross_entropy, (torch.zeros(4, 64), torch.zeros(4).long()))
    assert stack_size(adapter, recipe, 100)[0] == 1  # few are trained, but all are computed
    normed = Problem(nn.BatchNorm1d(3), cross_entropy, (torch.zeros(4, 3), torch.zeros(4).long()))
    assert stack_size(normed, recipe, 100) == (1, "batch norm in training mode")


def test_what_a_step_keeps_is_counted():
    problem = menagerie.mlp()
    assert saved_bytes(problem, 6) > saved_bytes(problem, 3) > 0


def test_a_batch_of_scalars_is_refused():
    problem = replace(
        menagerie.softmax(), loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    )
    with pytest.raises(ValueError, match="expected one loss per row"):
        retrain(
            problem,
            RECIPES["SGD"],
            menagerie.unseen(menagerie.softmax()),
            np.ones((5, 20)),
            seeds=2,
        )


def test_threads_are_given_back():
    before = torch.get_num_threads()
    problem = menagerie.softmax()
    retrain(problem, RECIPES["SGD"], menagerie.unseen(problem), np.ones((2, 20)), seeds=3)
    assert torch.get_num_threads() == before


def test_losses_that_depend_on_their_batch_go_one_by_one():
    """Short batches of a stack are filled up with other rows, which such a loss would see."""

    def centred(model, batch):
        z = model(batch[0])
        return F.cross_entropy(z, batch[1], reduction="none") + 0.5 * (z - z.mean(0)).square().sum(1)  # fmt: skip

    problem = replace(menagerie.softmax(20), loss=centred)
    recipe, outputs = Recipe(SGD(0.1), 8, 3), menagerie.unseen(problem, cross_entropy)
    weights = np.concatenate([np.ones((3, 20)), random_subsets(20, 3, keep=0.25)])
    found, one = (
        retrain(problem, recipe, outputs, weights, seeds=1, stack=stack).per_seed
        for stack in ("auto", 1)
    )
    np.testing.assert_array_equal(found, one)
    with pytest.raises(ValueError, match="depend on the other rows"):
        retrain(problem, recipe, outputs, weights, seeds=1, stack=4)


def test_losses_of_pairs_of_rows_go_as_they_did():
    """They cannot be had of one row; where no batch is filled up nobody asks for that."""

    def pairs(model, batch):
        z = model(batch[0])
        assert len(z) > 1
        return F.cross_entropy(z, batch[1], reduction="none") + (z - z.roll(1, 0)).square().sum(1)

    problem = replace(menagerie.softmax(20), loss=pairs)
    outputs = menagerie.unseen(problem, cross_entropy)
    weights = np.ones((6, 20))
    weights[range(6), range(6)] = 0
    for drop, size in (("weight", 5), ("row", 8)):
        recipe = Recipe(SGD(0.1), size, 2)
        found, one = (
            retrain(problem, recipe, outputs, weights, seeds=1, drop=drop, stack=stack).per_seed
            for stack in ("auto", 1)
        )
        np.testing.assert_allclose(found, one, rtol=1e-9)


def test_a_stack_of_a_given_size_takes_no_augmentation():
    """It would train on the rows as they are."""
    problem = Problem(nn.Linear(3, 1), squared_error, (torch.randn(12, 3), torch.randn(12, 1)))
    recipe = Recipe(
        SGD(0.02), 4, 2, augment=lambda batch, rows, step: (batch[0] * (1 + step), batch[1])
    )
    with pytest.raises(ValueError, match=r"got augmentation, .* use stack=1 or 'auto'"):
        retrain(
            problem,
            recipe,
            Outputs(squared_error, problem.train),
            np.ones((3, 12)),
            seeds=2,
            stack=4,
        )
