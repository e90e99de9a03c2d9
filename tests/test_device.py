"""What a GPU computes is what the CPU does: every method on a problem there and on the same one here.

Without a GPU a copy on the CPU stands in its place, which keeps this file alive: for every method once, and for all
tests where ATTRIBUTION_DEVICE=cpu asks for it.
"""

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from applied import poisoning, unlearners, unlearning
from applied.conformance import conformance
from applied.poisoning import ThreatModel
from attribution_core import (
    SGD,
    Adam,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    aumann_shapley,
    causal_lm_loss,
    cross_entropy,
    fit_certified,
    fit_curvature,
    gradient_matching,
    in_run,
    influence,
    input_influence,
    kmeans_groups,
    knn,
    leave_one_out,
    magic,
    margin,
    newton,
    preflight,
    project,
    random_subsets,
    refit,
    rehearse,
    remove,
    representation_similarity,
    retrain,
    self_influence,
    source,
    tracin,
    train,
    trak,
)
from attribution_core.gradients import directional
from tests import menagerie

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(
    DEVICE == "cpu" and "ATTRIBUTION_DEVICE" not in os.environ, reason="needs a GPU"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning"),
    pytest.mark.filterwarnings("ignore::attribution_core.RemainderWarning"),
]

# float64 sums in another order: 1e-15 of their terms, times what inverses and adjoints magnify (1e4 here)
EXACT = {"rtol": 1e-8, "atol": 1e-10}
BY_STEPS = Recipe(SGD(0.1, momentum=0.9), batch_size=3, epochs=3)


def there(problem):
    """The same problem with its model on the device; the data stay where they are."""
    return replace(problem, model=copy.deepcopy(problem.model).to(DEVICE))


def wholly(problem):
    """The data as well."""
    batch = problem.train[list(range(problem.n))]
    moved = (
        {name: x.to(DEVICE) for name, x in batch.items()}
        if isinstance(batch, dict)
        else tuple(x.to(DEVICE) for x in batch)
    )
    return replace(there(problem), train=moved)


def outputs_of(problem):
    return Outputs(problem.loss, problem.train)


def halves(problem):
    return Outputs(problem.loss, problem.train).mean(by=np.arange(problem.n) % 2)


def curvatures(problem):
    return [influence(problem, outputs_of(problem), curvature=c, damping=0.1).scores
            for c in ("gauss_newton", "diagonal", "identity", "ekfac")]  # fmt: skip


def trained(problem, recipe=BY_STEPS, **more):
    return train(problem, recipe, **more)


METHODS = {
    "losses": lambda p: trained(p).losses,
    "outputs": lambda p: trained(p).outputs(outputs_of(p)).numpy(),
    "adam": lambda p: trained(p, Recipe(Adam(0.01), 3, 3, clip=0.1)).losses,
    "adamw in parts": lambda p: trained(p, Recipe(AdamW(0.01, weight_decay=0.1), 4, 3, accumulate=2)).losses,
    "removed rows": lambda p: trained(p, weights=[0.0, 2.0] + [1.0] * (p.n - 2), drop="row").losses,
    "ghost, jvp, rows": lambda p: np.stack([
        directional(p, ones(p), engine=engine).cpu().numpy() for engine in ("auto", "jvp", "rows")
    ]),
    "influence": curvatures,
    "influence by conjugate gradients": lambda p: influence(
        p, outputs_of(p), curvature="gauss_newton", damping=0.1, form="cg", tolerance=1e-12).scores,
    "influence of averages, refined": lambda p: influence(
        p, halves(p), curvature="ekfac", damping=0.1, refine=3).scores,
    "influence with labels of the data": lambda p: influence(
        p, outputs_of(p), curvature="ekfac", damping=0.1, labels="data").scores,
    "influence of groups": lambda p: influence(
        p, outputs_of(p), damping=0.1, groups=np.arange(p.n) % 2).scores,
    "influence of a run": lambda p: influence(trained(p), outputs_of(p), damping=0.1).scores,
    "damping found": lambda p: influence(trained(p), outputs_of(p), damping="auto").scores,
    "trak": lambda p: trak(p, outputs_of(p), projection_dim=4, ridge=0.1).scores,
    "trak of runs": lambda p: trak(
        [trained(p), trained(p, replace(BY_STEPS, seed=1))], outputs_of(p), projection_dim=4).scores,
    "tracin": lambda p: tracin(trained(p, checkpoints=2), outputs_of(p)).scores,
    "source": lambda p: source(trained(p, checkpoints=3), outputs_of(p), segments=2).scores,
    "source by ekfac": lambda p: source(
        trained(p, checkpoints=2), outputs_of(p), segments=2, curvature="ekfac").scores,
    "magic": lambda p: magic(trained(p), outputs_of(p)).scores,
    "magic, one target": lambda p: magic(trained(p), outputs_of(p).mean()).scores,
    "magic by either form": lambda p: [
        magic(trained(p), halves(p), form=form).scores for form in ("double", "vmap")],
    "magic of adam, few states": lambda p: magic(
        trained(p, Recipe(AdamW(0.01), 3, 3), states=2), outputs_of(p), states=2).scores,
    "magic by domains": lambda p: [
        magic(trained(p), outputs_of(p), wrt="domains", groups=np.arange(p.n) % 2, mode=mode).scores
        for mode in ("reverse", "forward")],
    "magic by hyperparameters": lambda p: [
        magic(trained(p), outputs_of(p), wrt=wrt, mode=mode).scores
        for wrt in ("lr", "weight_decay") for mode in ("reverse", "forward")],
    "magic of the last steps": lambda p: magic(trained(p), outputs_of(p), since=2).scores,
    "in run": lambda p: in_run(p, BY_STEPS, outputs_of(p)).datamodel.scores,
    "in run, first order": lambda p: in_run(p, BY_STEPS, outputs_of(p).mean(), order=1).datamodel.scores,
    "aumann shapley": lambda p: aumann_shapley(p, replace(BY_STEPS, epochs=1), outputs_of(p), points=2).scores,
    "self influence": lambda p: [
        self_influence(p, damping=0.1), self_influence(p, damping=0.1, curvature="ekfac")],
    "representation similarity": lambda p: representation_similarity(p, outputs_of(p)).scores,
    "table": lambda p: retrain(
        p, BY_STEPS, outputs_of(p), random_subsets(p.n, 5, keep=0.5), seeds=2).per_seed,
    "table, one by one": lambda p: retrain(
        p, BY_STEPS, outputs_of(p), random_subsets(p.n, 5, keep=0.5), seeds=2, stack=1).per_seed,
    "projections": lambda p: [
        project(p, p.loss, 6, seed=3, kind=kind).cpu().numpy()
        for kind in ("rademacher", "gaussian", "factored")],
    "rehearsals": lambda p: rehearse(
        trained(p), [0.0] + [1.0] * (p.n - 1), lambda model: outputs_of(p).evaluate(model)).mean.numpy(),
}  # fmt: skip


def ones(problem):
    return {
        name: torch.linspace(-1, 1, 2 * v.numel()).reshape(2, *v.shape)
        for name, v in problem.params.items()
    }


def assert_same(found, expected):
    for a, b in (
        zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
    ):
        assert np.isfinite(np.asarray(b)).all()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **EXACT)


@needs_gpu
@pytest.mark.parametrize("architecture", menagerie.ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, architecture):
    problem = menagerie.ARCHITECTURES[architecture]()
    expected = METHODS[name](problem)
    assert_same(METHODS[name](there(problem)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_data_there_too(name):
    problem = menagerie.mlp(7)
    assert_same(METHODS[name](wholly(problem)), METHODS[name](problem))


CONVEX = {
    "leave one out": lambda p: leave_one_out(p, menagerie.unseen(p)).scores,
    "newton": lambda p: newton(p, menagerie.unseen(p), steps=2).predict(
        random_subsets(p.n, 3, keep=0.8)),
    "influence": lambda p: influence(p, menagerie.unseen(p), curvature="hessian").scores,
    "certificate": lambda p: [
        numbers(fit_certified(p, sigma=0.1).remove([0, 3])), numbers(remove(p, [1, 2]))],
    "kNN": lambda p: knn(p, menagerie.unseen(p), k=3).scores,
    "curvature fitted before": lambda p: influence(
        p, menagerie.unseen(p), curvature=fit_curvature(p, "gauss_newton")).scores,
    "groups of gradients": lambda p: kmeans_groups(project(p, p.loss, 3, kind="gaussian"), 3),
    "inputs": lambda p: [
        input_influence(p, menagerie.unseen(p), rows=[3, 1], damping=0.1).scores,
        gradient_matching(p, menagerie.unseen(p).mean(), rows=[3, 1]).scores,
        magic(train(p, BY_STEPS), menagerie.unseen(p), wrt="inputs", rows=[3, 1]).scores],
    "influence of inputs by ekfac": lambda p: input_influence(
        p, menagerie.unseen(p), rows=[3, 1], damping=0.1, curvature="ekfac").scores,
    "preflight": lambda p: np.array([
        (one.loss, one.growth, one.smoothness.signs)
        for one in preflight(p, BY_STEPS, menagerie.unseen(p)).tried]),
}  # fmt: skip


def numbers(certified):
    return np.array([certified.residual, certified.distance])


@needs_gpu
@pytest.mark.parametrize("name", CONVEX)
def test_every_method_of_convex_problems(name):
    problem = menagerie.refit(menagerie.softmax(20))
    expected = CONVEX[name](problem)
    assert_same(CONVEX[name](there(problem)), expected)
    assert_same(CONVEX[name](wholly(problem)), expected)


@needs_gpu
@pytest.mark.parametrize("name", menagerie.ODD)
def test_odd_models(name):
    """Layers no rule knows fall back to other engines there as here."""
    problem = menagerie.ODD[name]()
    for method in ("ghost, jvp, rows", "magic", "influence by conjugate gradients"):
        assert_same(METHODS[method](there(problem)), METHODS[method](problem))


# --- what only a device shows --------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("architecture", menagerie.ARCHITECTURES)
def test_metagradients_are_finite_differences_of_trainings_there(architecture):
    problem = there(menagerie.ARCHITECTURES[architecture]())
    recipe = Recipe(AdamW(0.01), batch_size=3, epochs=2)
    f = magic(train(problem, recipe), outputs_of(problem).mean())
    for row, h in ((0, 1e-4), (4, 1e-4)):
        moved = [np.ones(problem.n) for _ in range(2)]
        moved[0][row] += h
        moved[1][row] -= h
        up, down = (
            train(problem, recipe, w).outputs(outputs_of(problem).mean()).item() for w in moved
        )
        # central differences in float64: h² of the third derivative, and 1e-16 / h
        np.testing.assert_allclose(f.scores[row, 0], (up - down) / (2 * h), rtol=1e-5, atol=1e-9)


@needs_gpu
@pytest.mark.parametrize("architecture", menagerie.ARCHITECTURES)
def test_float32_trainings_repeat_bit_for_bit(architecture):
    """Else metagradients, which take steps again, could not be had from few states."""
    whole = menagerie.ARCHITECTURES[architecture]()
    problem = there(replace(whole, model=copy.deepcopy(whole.model).float(), train=floats(whole)))
    recipe = Recipe(AdamW(0.01), batch_size=3, epochs=4)
    run = train(problem, recipe, states=2)
    found = magic(run, outputs_of(problem), states=2, check=False).scores
    again = train(problem, recipe)
    assert all(torch.equal(run.params[name], again.params[name]) for name in run.params)
    np.testing.assert_array_equal(found, magic(again, outputs_of(problem), check=False).scores)


def floats(problem):
    batch = problem.train[list(range(problem.n))]
    if isinstance(batch, dict):
        return batch
    return tuple(x.float() if x.is_floating_point() else x for x in batch)


@needs_gpu
def test_dropout_masks_are_taken_again():
    """Masks are drawn by step from a seed, so that a walk back meets those of the training."""
    problem = menagerie.mlp(7)
    model = nn.Sequential(problem.model[0], nn.Dropout(0.3), *problem.model[1:]).train()
    problem = there(replace(problem, model=model))
    torch.manual_seed(1)
    recipe = Recipe(SGD(0.1, 0.9), batch_size=3, epochs=2, masks=5)
    run = train(problem, recipe)
    torch.manual_seed(2)
    again = train(problem, recipe)
    assert all(torch.equal(run.params[name], again.params[name]) for name in run.params)
    w = np.ones(problem.n)
    w[2] += 1e-5
    f = magic(run, outputs_of(problem), check=False)
    change = (
        train(problem, recipe, w).outputs(outputs_of(problem)) - run.outputs(outputs_of(problem))
    ).numpy()
    np.testing.assert_allclose(f.scores[2], change / 1e-5, rtol=1e-3, atol=1e-7)


def device_state():
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


@needs_gpu
def test_global_random_numbers_are_left_alone():
    problem = there(menagerie.mlp(7))
    before = torch.get_rng_state(), device_state()
    run = train(problem, BY_STEPS)
    influence(run, outputs_of(problem), damping=0.1)
    magic(run, outputs_of(problem))
    trak(run, outputs_of(problem), projection_dim=4)
    for a, b in zip(before, (torch.get_rng_state(), device_state()), strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("name", ["influence", "table", "training"])
def test_folders_are_taken_up_there(name, tmp_path):
    """What was done on the CPU is not done again on the device: it is the same run."""
    problem = menagerie.mlp(7)

    def call(of, folder):
        if name == "training":
            return train(of, BY_STEPS, folder=folder).losses
        if name == "table":
            w = random_subsets(7, 3, keep=0.5)
            return retrain(of, BY_STEPS, outputs_of(of), w, seeds=1, folder=folder).per_seed
        return influence(of, outputs_of(of), damping=0.1, folder=folder).scores

    here = call(problem, tmp_path)
    # kept in float32 by stores
    np.testing.assert_allclose(call(there(problem), tmp_path), here, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_batch_norm_keeps_its_statistics():
    problem = menagerie.mlp(8)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)).double()
    problem = replace(problem, model=model.train())
    recipe = Recipe(SGD(0.1), batch_size=4, epochs=3)
    here, moved = train(problem, recipe), train(there(problem), recipe)
    assert_same(
        moved.outputs(outputs_of(problem)).numpy(), here.outputs(outputs_of(problem)).numpy()
    )
    assert_same(magic(moved, outputs_of(problem)).scores, magic(here, outputs_of(problem)).scores)


# --- decisions -----------------------------------------------------------------------------------


def task(where):
    x, y = menagerie.digits_arrays()
    model = menagerie.digits_model(0, 8).double()
    x = torch.from_numpy(x).double()
    problem = Problem(model, cross_entropy, (x[:60], torch.from_numpy(y[:60])))
    points = {
        "forget": Outputs(margin, (x[:4], torch.from_numpy(y[:4]))),
        "retain": Outputs(margin, (x[4:30], torch.from_numpy(y[4:30]))),
    }
    return where(problem), points


RUNS = Recipe(SGD(0.2, 0.9), batch_size=10, epochs=4)


def unlearned(where):
    problem, points = task(where)
    runs = [train(problem, replace(RUNS, seed=seed), states=0) for seed in range(3)]
    found = unlearning.unlearn(runs, [0, 1, 2, 3], points, budget=0.5)
    return [*found.outputs(points).values(), *found.predicted.values()]


@needs_gpu
def test_unlearning():
    expected = unlearned(lambda p: p)
    for where in (there, wholly):
        for found, right in zip(unlearned(where), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-8)


@needs_gpu
@pytest.mark.parametrize(
    "name", ["fine_tune", "gradient_ascent", "gradient_difference", "npo", "scrub"]
)
def test_unlearners(name):
    found = []
    for where in (lambda p: p, there):
        problem, points = task(where)
        unlearner = getattr(unlearners, name)
        forget, retain = problem.train[[0, 1, 2, 3]], problem.train[list(range(4, 60))]
        new = unlearner(problem.model, forget, retain)
        found.append(points["retain"].evaluate(new).numpy())
        verdict = conformance(
            unlearner, problem.model, forget, retain, batch_size=10, training_steps=24
        )
        found.append(np.array([str(verdict)]))
    assert found[1] == found[3]
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6, atol=1e-8)


def attacks(where):
    problem, points = task(where)
    losses = Outputs(cross_entropy, points["retain"].data).mean(by=["loss"] * 26)

    def victim(table, weights, seeds):
        return retrain(table, RUNS, losses, weights, seeds=seeds)

    flips = poisoning.flip_labels(
        problem, ThreatModel(3, "labels"),
        lambda table, w: influence(train(table, RUNS, w, drop="row"), losses, damping=0.1), victim, seeds=2,
    )  # fmt: skip
    moved = poisoning.perturb(
        problem, ThreatModel(2, "inputs", epsilon=0.5, box=(0.0, 1.0)),
        lambda of, rows, step: magic(train(of, RUNS), losses, wrt="inputs", rows=rows, check=False),
        victim, steps=4, seeds=2,
    )  # fmt: skip
    return [flips, moved]


@needs_gpu
def test_attacks():
    here = attacks(lambda p: p)
    for where in (there, wholly):
        for found, expected in zip(attacks(where), here, strict=True):
            np.testing.assert_array_equal(found.changed, expected.changed)
            np.testing.assert_allclose(found.predicted, expected.predicted, rtol=1e-6)
            np.testing.assert_allclose(found.outputs(), expected.outputs(), rtol=1e-6)


@needs_gpu
def test_fits_of_scikit_learn():
    """A model that was fitted on the CPU may be moved."""
    from sklearn.linear_model import LogisticRegression

    x, y = menagerie.digits_arrays()
    fitted = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000).fit(x[:60].astype(float), y[:60])
    problem = Problem.from_sklearn(fitted, x[:60].astype(float), y[:60])
    outputs = Outputs(cross_entropy, problem.model.encode(x[60:70].astype(float), y[60:70]))
    weights = random_subsets(60, 3, keep=0.9)
    for where in (there, wholly):
        moved = where(problem)
        assert_same(influence(moved, outputs).scores, influence(problem, outputs).scores)
        assert_same(
            refit(fitted, moved, outputs, weights).outputs,
            refit(fitted, problem, outputs, weights).outputs,
        )


@pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA")
def test_half_precision_of_metagradients_is_refused():
    problem = there(menagerie.mlp(7))
    problem = replace(problem, model=problem.model.float(), train=floats(problem))
    with torch.autocast("cuda"), pytest.raises(ValueError, match="autocast"):
        magic(train(problem, BY_STEPS), outputs_of(problem))


@needs_gpu
def test_language_models_in_bfloat16():
    """Half precision is fine for first-order scores: within its 8 bits of those in float32."""
    whole = menagerie.gpt2()
    high, low = (there(replace(whole, model=copy.deepcopy(whole.model).to(dtype)))
                 for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    a, b = (
        influence(p, Outputs(causal_lm_loss, p.train), curvature="identity", damping=1.0).scores
        for p in (high, low)
    )
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
