"""attribution_core.safeguards.swapping: models that are not what their parameters by name make of them are refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    margin,
    retrain,
    tracin,
    train,
    trak,
)
from attribution_core.gradients import directional
from attribution_core.in_run import in_run
from tests import menagerie


class Block(nn.Module):
    """Its activations may be computed again during the backward pass."""

    def __init__(self, again):
        super().__init__()
        self.a, self.c, self.again = nn.Linear(4, 6), nn.Linear(6, 3), again

    def inner(self, x):
        return torch.tanh(self.a(x)).square()

    def forward(self, x):
        hidden = checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)
        return self.c(hidden)


class HandTied(nn.Module):
    """A weight that is reached through a list."""

    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = [self.e.weight]

    def forward(self, x):
        return F.linear(torch.tanh(self.l(self.e(x))), self.tied[0])[:, :3]


ELSEWHERE = Block(False).double()


def of_another(model, batch):
    """A loss that does not look at the model it is given."""
    return F.cross_entropy(ELSEWHERE(batch[0]), batch[1], reduction="none")


def data(n=20, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=drawn, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=drawn)


RECIPE = Recipe(SGD(0.5), 5, 2)
OUTPUTS = Outputs(margin, data(3, 1))
ACTIONS = {
    "train": lambda p: train(p, RECIPE),
    "retrain": lambda p: retrain(p, RECIPE, OUTPUTS, np.ones((2, 20)), seeds=1),
    "in_run": lambda p: in_run(p, RECIPE, OUTPUTS),
    "influence": lambda p: influence(p, OUTPUTS, curvature="identity", damping=1.0),
    "trak": lambda p: trak(p, OUTPUTS),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("model", [Block(True), HandTied()], ids=["computed again", "hand tied"])
def test_what_swapping_does_not_reach_is_refused(model, action):
    problem = Problem(copy.deepcopy(model).double(), cross_entropy, data())
    with pytest.raises(
        ValueError, match=r"a function of the model's parameters by name.*checkpointing off"
    ):
        ACTIONS[action](problem)


@pytest.mark.parametrize("action", ["train", "retrain", "in_run"])
def test_a_loss_of_the_original_is_refused_where_the_model_is_copied(action):
    with pytest.raises(ValueError, match="let the loss call the model that it is given"):
        ACTIONS[action](Problem(ELSEWHERE, of_another, data()))


def test_what_is_not_copied_may_look_at_itself():
    """A loss of the original, a patched forward: swapping reaches both where no copy is made."""
    found = ACTIONS["influence"](Problem(ELSEWHERE, of_another, data())).scores
    expected = ACTIONS["influence"](Problem(ELSEWHERE, cross_entropy, data())).scores
    np.testing.assert_array_equal(found, expected)
    patched = copy.deepcopy(ELSEWHERE)
    inner = patched.a.forward
    patched.a.forward = lambda z: inner(z)
    found = ACTIONS["influence"](Problem(patched, cross_entropy, data())).scores
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_float64_is_float64_on_both_sides():
    """A loss that casts to float32, of rows that are learned: gradients are differences of nearly equal numbers."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(40)

    def cast(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    x, _ = data(200)
    labels = model(x).argmax(1)
    ACTIONS["influence"](Problem(model, cast, (x, labels)))
    for k in range(0, 40, 2):
        directional(
            Problem(model, cast, (x[k : k + 2], labels[k : k + 2])), torch.ones(1, 15).double()
        )


def test_sparse_gradients_and_frozen_parameters():
    table = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)).double()

    def of_words(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    words = (torch.arange(12).reshape(6, 2) % 9, torch.arange(6) % 3)
    problem = Problem(table, of_words, words)
    found = directional(problem, torch.ones(1, 36 + 15).double())
    assert found.shape == (6, 1)
    with pytest.raises(ValueError, match=r"sparse=True in '0'"):
        train(problem, Recipe(SGD(0.1), 2, 1))
    table[0].weight.requires_grad_(False)
    before = copy.deepcopy(table.state_dict())
    train(Problem(table, of_words, words), Recipe(SGD(0.1), 2, 1))
    assert all(torch.equal(v, before[k]) for k, v in table.state_dict().items())


@pytest.mark.parametrize("action", ACTIONS)
def test_a_sound_model_passes_and_nothing_else_changes(action, monkeypatch):
    def numbers():
        found = ACTIONS[action](Problem(copy.deepcopy(ELSEWHERE), cross_entropy, data()))
        return {
            "train": lambda: found.outputs(OUTPUTS).numpy(),
            "retrain": lambda: found.outputs,
            "in_run": lambda: found.datamodel.scores,
        }.get(action, lambda: found.scores)()

    looked = numbers()
    monkeypatch.setattr(
        "attribution_core.safeguards.purity.refuse_hidden_parameters", lambda *_, **__: None
    )
    for where in ("gradients", "projection", "stepwise.trained"):
        monkeypatch.setattr(f"attribution_core.{where}.refuse_unsound", lambda *_: None)
    np.testing.assert_array_equal(looked, numbers())


def test_a_transformer_that_saves_memory_is_refused_and_said_how_to_mend():
    problem = menagerie.gpt2()
    model = copy.deepcopy(problem.model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"activation .gradient. checkpointing off"):
        train(Problem(model, problem.loss, problem.train), Recipe(SGD(0.1), 2, 1))
    model.activation_checkpointing_disable()
    train(Problem(model, problem.loss, problem.train), Recipe(SGD(0.1), 2, 1))


def test_the_model_and_the_generator_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    kept, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    from attribution_core.safeguards.swapping import refuse_hidden_parameters

    refuse_hidden_parameters(model, cross_entropy, lambda: data())
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_left_by_checkpointing_do_not_matter_in_eval_mode():
    """transformers asks an embedding's output for gradients, which no transformed function may."""
    problem = menagerie.gpt2()
    outputs = Outputs(problem.loss, problem.train)
    expected = influence(problem, outputs, damping=0.1).scores
    model = copy.deepcopy(problem.model)
    model.enable_input_require_grads()
    hooks = list(model.get_input_embeddings()._forward_hooks.values())
    asking = Problem(model.eval(), problem.loss, problem.train)
    np.testing.assert_array_equal(influence(asking, outputs, damping=0.1).scores, expected)
    assert in_run(asking, Recipe(SGD(0.1), 2, 1), outputs).run is not None
    assert list(model.get_input_embeddings()._forward_hooks.values()) == hooks


@pytest.mark.parametrize("name", ["make_inputs_require_grads", "make_inputs_require_grad"])
def test_such_hooks_anywhere_are_put_back_in_their_order(name):
    seen = []

    def asks(module, args, output):
        seen.append("asks")
        output.requires_grad_(True)

    def watches(module, args, output):
        seen.append("watches")

    asks.__name__ = name
    model = copy.deepcopy(ELSEWHERE)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(asks), layer.register_forward_hook(watches)
    problem = Problem(model, cross_entropy, data())
    directional(problem, {k: v[None] for k, v in problem.params.items()}, engine="rows")
    assert "asks" not in seen
    assert "watches" in seen
    assert [hook.__name__ for hook in layer._forward_hooks.values()] == [name, "watches"]


def _pruned():
    layer = nn.Linear(4, 3)
    prune.random_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.1)  # a container of two
    return layer


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (_pruned, "prune.remove on it for 'weight'"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), "torch.nn.utils.parametrizations"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), "torch.nn.utils.parametrizations"),
    ],
)
def test_layers_that_torch_cannot_copy_are_told_before_the_training(make, cure):
    x, y = data()
    problem = Problem(nn.Sequential(make()).double().eval(), cross_entropy, (x, y))
    outputs, recipe = Outputs(margin, (x[:2], y[:2])), Recipe(SGD(0.1), 2, 1)
    for act in (
        lambda: train(problem, recipe),
        lambda: retrain(problem, recipe, outputs, np.ones((1, len(x))), seeds=1),
        lambda: tracin(problem, outputs, checkpoints=[problem.params], lr=0.1, steps=2),
    ):
        with pytest.raises(ValueError, match=f"got a layer '0' whose weight a hook.*{cure}"):
            act()


def test_a_layer_whose_pruning_is_removed_trains():
    x, y = data()
    layer = _pruned()
    prune.remove(layer, "weight")
    run = train(
        Problem(nn.Sequential(layer).double(), cross_entropy, (x, y)), Recipe(SGD(0.1), 2, 1)
    )
    assert run.model[0].weight.shape == (3, 4)
