"""attribution_core.safeguards.smoothness: what it sees before and after a metagradient, against its definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    magic,
    preflight,
    train,
)
from attribution_core.preflight import candidates
from attribution_core.safeguards.smoothness import (
    FiniteDifference,
    compared,
    describe,
    finite_difference,
    look,
    metasmoothness,
    moved_weights,
)
from attribution_core.training import steps_of
from tests import menagerie

pytestmark = pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")


def problem_with(*layers):
    @menagerie.seeded
    def make():
        model = nn.Sequential(*layers).double()
        return Problem(model, cross_entropy, (torch.randn(40, 1, 6, 6).double(), torch.randint(0, 3, (40,))))  # fmt: skip

    return make()


def seen(problem):
    order = [np.arange(10)]
    return look(steps_of(problem, Recipe(SGD(0.1), 10, 1), order, np.ones(problem.n)))


def test_the_share_of_kinked_activations_counts_numbers():
    """16 from a ReLU and 48 from a GELU: a quarter. Linear models have none."""
    flat = nn.Flatten()
    mixed = problem_with(
        flat, nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 3)
    )
    assert seen(mixed).kinked == 0.25
    assert seen(problem_with(flat, nn.Linear(36, 3))).kinked == 0.0
    pooled = problem_with(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), flat, nn.Linear(8, 3))
    assert seen(pooled).kinked == 1.0
    smooth = problem_with(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.AvgPool2d(2), flat, nn.Linear(8, 3))
    assert seen(smooth).kinked == 0.0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_have_no_kinks_and_no_half_precision(name):
    found = seen(replace(menagerie.ARCHITECTURES[name](12)))
    assert (found.kinked, found.half, found.precision) == (0.0, None, "torch.float64")


def small():
    problem = menagerie.mlp(12)
    x, y = problem.train.columns
    return problem, Outputs(cross_entropy, (x + 0.3, y))


def test_the_finite_difference_is_one_training_at_moved_weights():
    problem, outputs = small()
    w = np.array([1.0, 0, *[1] * 10])
    run = train(problem, Recipe(SGD(0.1), 3, 5), w, exposure=0.5)
    f = magic(run, outputs)
    found = finite_difference(run, f, outputs, h=0.01)
    moved = moved_weights(run, 0.01)
    assert moved[1] == 0
    other = train(problem, run.recipe, moved, exposure=0.5)
    actual = (other.outputs(outputs) - run.outputs(outputs)).numpy()
    predicted = f.predict(0.5 * moved) - f.base
    assert found.error == pytest.approx(np.linalg.norm(predicted - actual) / np.linalg.norm(actual))
    assert found.holds
    assert found.slope == pytest.approx(1, abs=0.05)  # second order in h = .01
    far = finite_difference(run, replace(f, scores=-f.scores), outputs, h=0.01)
    assert far.agreement == pytest.approx(-found.agreement)
    assert not far.holds


def test_what_is_compared():
    found = compared(np.array([3.0, 4.0]), np.array([6.0, 8.0]), 0.1)
    assert found == FiniteDifference(error=0.5, agreement=1.0, slope=2.0, h=0.1, targets=2)
    assert not found.holds


def test_metasmoothness_by_its_definitions():
    problem, outputs = small()
    run = train(problem, Recipe(AdamW(0.02), 3, 5))
    found = metasmoothness(run, outputs, h=0.1, seed=4)
    v = np.random.default_rng(4).standard_normal(12)
    runs = [train(problem, run.recipe, 1 + step * v) for step in (0, 0.1, 0.2)]
    f0, f1, f2 = (each.outputs(outputs).numpy() for each in runs)
    assert found.curvature == pytest.approx(np.abs(f2 - 2 * f1 + f0).mean() / 0.01)
    p0, p1, p2 = (np.concatenate([v.numpy().ravel() for v in r.params.values()]) for r in runs)
    d = np.abs(p2 - p0)
    signs = (d / d.sum() * np.sign(p1 - p0) * np.sign(p2 - p1)).sum()
    assert found.signs == pytest.approx(signs)
    assert -1 <= found.signs <= 1


def test_candidates_go_from_mild_to_strong():
    tried = candidates(Recipe(AdamW(0.03, eps_root=1e-6), 3, 5))
    pairs = [(round(r.optimizer.lr, 6), r.optimizer.eps_root) for r in tried]
    assert pairs == [
        (0.03, 1e-6), (0.03, 1e-5), (0.01, 1e-6), (0.01, 1e-5), (0.003, 1e-6), (0.003, 1e-5),
    ]  # fmt: skip
    assert [r.optimizer.lr for r in candidates(Recipe(SGD(0.3), 3, 5))] == pytest.approx(
        [0.3, 0.1, 0.03]
    )


def test_preflight_passes_a_smooth_recipe_as_it_is():
    problem, outputs = small()
    recipe = Recipe(SGD(0.1), 3, 5)
    found = preflight(problem, recipe, outputs)
    assert found.holds
    assert found.best.recipe.optimizer == recipe.optimizer
    assert len(found.tried) == 1
    run = train(problem, recipe)
    expected = finite_difference(run, magic(run, outputs), outputs)
    assert found.tried[0].check.error == pytest.approx(expected.error, rel=1e-9)
    assert found.tried[0].growth == pytest.approx(magic(run, outputs.mean()).meta["growth"])
    assert "First order holds with lr 0.1." in str(found)


def test_preflight_finds_what_is_smooth_and_says_so():
    """A learning rate at which training jumps about, and a tenth of it."""
    problem, outputs = small()
    rough = Recipe(SGD(1.0, 0.9), 3, 5)
    found = preflight(problem, rough, outputs)
    assert not found.holds
    assert [one.check.holds for one in found.tried] == [False, False, True]
    assert found.best.recipe.optimizer.lr == pytest.approx(0.1)
    assert "does not hold with lr 1; it does with lr 0.1" in str(found)
    assert found.table().count("\n") == len(found.tried)
    alone = preflight(problem, rough, outputs, search=False)
    assert (alone.best, len(alone.tried)) == (None, 1)
    assert "search for a recipe with which it does" in str(alone)
    assert "nor with" not in str(alone)  # any other: none was tried


def test_preflight_goes_on_from_a_recipe_that_diverges():
    problem = menagerie.ridge()
    x, y = problem.train.columns
    outputs = Outputs(problem.loss, (x + 0.1, y))
    found = preflight(problem, Recipe(SGD(10.0), 5, 80), outputs)
    assert found.tried[0].check.error == np.inf
    assert "nan" in found.table()
    assert len(found.tried) > 1


def test_preflight_looks_at_training_rows_by_itself_and_refuses_half_precision():
    problem, _ = small()
    assert preflight(problem, Recipe(SGD(0.1), 3, 2)).tried[0].check.targets == 12
    half = replace(problem, model=problem.model.bfloat16())
    with pytest.raises(ValueError, match=r"parameters in torch\.bfloat16"):
        preflight(half, Recipe(SGD(0.1), 3, 2))


def test_preflight_looks_at_the_model_that_is_trained():
    problem, _ = small()
    kinked = replace(problem, model=nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double())

    def init(seed):
        return problem.model

    found = preflight(kinked, Recipe(SGD(0.1), 3, 1, init=init), search=False)
    assert found.look.kinked == 0


def test_a_paragraph():
    problem, outputs = small()
    runs = [train(problem, Recipe(SGD(0.1), 3, 5, seed=s), exposure=0.5) for s in (0, 1)]
    text = describe(magic(runs, outputs, check=True))
    assert text.startswith("Exact derivatives through 10 of 10 steps, by weights, at exposure 0.5")
    assert "No activation has kinks." in text
    assert text.count("One training at weights moved by 0.1") == 2
    assert text.endswith("Mean of 2 runs.")
