"""attribution_core.trak: against influence functions and dense formulas, its invariances, folders, digits."""

import time
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
    influence,
    lds,
    margin,
    random_subsets,
    retrain,
    squared_error,
    train,
)
from attribution_core.projection import project
from attribution_core.trak import loss_margin, margin_of, trak
from tests import menagerie

EXACT = {"rtol": 1e-9, "atol": 1e-11}
ALL = 10**6  # dimensions: nothing is projected


def formula(problems, function, weights, shift, phis=None, drawn=None, alpha=1.0):
    """The docstring of `trak` with plain autograd, or with the features given: [n, t] for an Outputs' rows."""
    f = margin_of(problems[0].loss)
    n = problems[0].n
    drawn = n if drawn is None else drawn
    kernels, missed = [], []
    for c, problem in enumerate(problems):
        if phis is None:
            phi, a = (
                menagerie.row_gradients(problem, f),
                menagerie.row_gradients(*function(problem)),
            )
        else:
            phi, a = phis[c]
        p = torch.sigmoid(menagerie.losses_at(problem, menagerie.flat_params(problem), f)).detach()
        h = phi.T @ (phi * (torch.as_tensor(weights) * p * (1 - p))[:, None]) / drawn
        added = shift(h) if callable(shift) else shift
        kernels.append(phi @ torch.linalg.solve(h + added * torch.eye(len(h)).double(), a.T))
        missed.append(1 - p)
    mean = torch.stack(kernels).mean(0) * torch.stack(missed).mean(0)[:, None]
    return (mean / (alpha * drawn)).detach().numpy()


def shaken(problem, count):
    """The problem at `count` places around its own parameters."""
    flat = menagerie.flat_params(problem)
    generator = torch.Generator().manual_seed(7)
    moves = torch.randn(count, len(flat), generator=generator).double()
    return [menagerie.with_params(problem, flat + 0.1 * move) for move in moves]


def states(problems):
    return [problem.model.state_dict() for problem in problems]


def _mlp(n=6):
    problem = menagerie.mlp(n)
    return problem, Outputs(margin, problem.train)


# --- exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ones", "uneven"])
def test_unprojected_it_is_the_influence_function_of_logistic_regression(weights):
    """One margin per example: p (1 − p) ∇f ∇fᵀ is the whole Hessian, and the weight decay is the ridge."""
    problem = menagerie.logistic()
    w = np.ones(problem.n) if weights == "ones" else np.linspace(0, 1.5, problem.n)
    fitted = menagerie.refit(problem, w)
    for outputs in (menagerie.unseen(problem), menagerie.unseen(problem).mean()):
        expected = influence(fitted, outputs, curvature="hessian", weights=w, exposure=0.5)
        found = trak(fitted, outputs, projection_dim=ALL, ridge=0, weights=w, exposure=0.5)
        np.testing.assert_allclose(found.scores, expected.scores, **EXACT)
        np.testing.assert_allclose(found.base, expected.base, rtol=1e-12)
        np.testing.assert_array_equal(found.anchor, 0.5 * w)
        assert found.meta["ridge"] == pytest.approx(0.03)


def test_scores_are_the_slopes_of_refits():
    """Sign and size, by brute force: weights moved by ±.001 and the logistic regression fitted anew."""
    problem = menagerie.logistic()
    fitted, outputs = menagerie.refit(problem), menagerie.unseen(problem)
    found = trak(fitted, outputs, projection_dim=ALL, ridge=0).scores
    step = 1e-3 * np.eye(problem.n)
    up, down = (menagerie.outputs_of_refits(problem, outputs, 1 + s) for s in (step, -step))
    slopes = (up - down) / 2e-3
    # the differences err by h² f'''/6, near 1e-7 of f'
    assert np.abs(found - slopes).max() < 1e-5 * np.abs(slopes).max()


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1, momentum=0.5), AdamW(0.01), SGD(0.1, weight_decay=0.1)]
)
def test_a_run_is_damped_by_its_own_length_parameter_by_parameter(optimizer):
    problem = replace(menagerie.logistic(), weight_decay=0.0)
    w = np.linspace(0.5, 1.5, problem.n)
    run = train(problem, Recipe(optimizer, 4, 5), w, exposure=0.5)
    outputs = menagerie.unseen(problem)
    damping = torch.cat([value.flatten() for value in run.damping.values()])
    expected = influence(run, outputs, curvature="hessian", damping=damping)
    found = trak(run, outputs, projection_dim=ALL)
    np.testing.assert_allclose(found.scores, expected.scores, **EXACT)
    np.testing.assert_array_equal(found.anchor, 0.5 * w)
    assert found.meta["exposure"] == 0.5


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "llama"])
def test_unprojected_scores_equal_the_dense_formula(name):
    """Three checkpoints, with uneven weights: means of the kernels and of 1 − p multiplied."""
    problem = menagerie.ARCHITECTURES[name]()
    several = shaken(problem, 3)
    w = np.linspace(0.5, 1.5, problem.n)
    outputs = Outputs(problem.loss, problem.train)
    found = trak(
        problem, outputs, checkpoints=states(several), projection_dim=ALL, ridge=0.5,
        weights=w, exposure=0.25,
    )  # fmt: skip
    n = problem.n
    expected = formula(
        several, lambda q: (q, problem.loss), w, lambda h: 0.5 * h.trace() / n, alpha=0.25
    )
    np.testing.assert_allclose(found.scores, expected, rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(found.base, np.mean([outputs.evaluate(q.model) for q in several], 0))
    assert found.meta["checkpoints"] == 3
    assert found.meta["kind"] == "exact"


@pytest.mark.parametrize("kind", ["factored", "rademacher", "gaussian"])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_projected_scores_equal_the_formula_in_projected_features(name, kind):
    """Training rows and targets through one projection, another one for each checkpoint."""
    problem = menagerie.ARCHITECTURES[name]()
    several = shaken(problem, 2)
    outputs = Outputs(problem.loss, problem.train)
    f = margin_of(problem.loss)
    phis = [
        tuple(project(q, g, 10, 4 + c, kind=kind).detach() for g in (f, problem.loss))
        for c, q in enumerate(several)
    ]
    settings = {"checkpoints": states(several), "projection_dim": 10, "seed": 4, "kind": kind}
    found = trak(problem, outputs, ridge=0.5, **settings)
    w, n = np.ones(problem.n), problem.n
    expected = formula(several, None, w, lambda h: 0.5 * h.trace() / n, phis)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-7, atol=1e-11)
    mean = trak(problem, outputs.mean(), ridge=0.5, **settings)
    np.testing.assert_allclose(mean.scores, found.mean().scores, **EXACT)
    assert mean.targets.tolist() == ["mean"]


def test_weight_decay_and_ridge_add_up():
    problem = replace(menagerie.mlp(), weight_decay=0.2)
    f = trak(problem, Outputs(margin, problem.train), projection_dim=ALL, ridge=0)
    expected = formula([problem], lambda q: (q, margin), np.ones(6), 0.2)
    np.testing.assert_allclose(f.scores, expected, **EXACT)


def test_rows_of_weight_0_count_in_no_curvature_but_have_scores():
    problem, outputs = _mlp()
    w = np.array([1.0, 1, 0, 1, 1, 1])
    f = trak(problem, outputs, weights=w, ridge=1.0)
    shift = lambda h: h.trace() / 6  # noqa: E731
    np.testing.assert_allclose(
        f.scores, formula([problem], lambda q: (q, margin), w, shift), **EXACT
    )
    assert (f.scores[2] != 0).all()


# --- margins of losses -------------------------------------------------------------------------


def test_the_margin_of_a_loss_is_the_margin():
    """For cross entropy of probability p: log p/(1 − p), and ∇loss = −(1 − p) ∇margin."""
    problem, outputs = _mlp()

    def own(model, batch):
        return cross_entropy(model, batch)

    assert margin_of(cross_entropy) is margin
    batch = problem.train[list(range(6))]
    with torch.no_grad():
        torch.testing.assert_close(
            loss_margin(own, problem.model, batch), margin(problem.model, batch)
        )
    expected = trak(problem, outputs).scores
    found = trak(replace(problem, loss=own), outputs).scores
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(
        trak(replace(problem, loss=own), outputs, features=margin).scores, expected
    )


def test_losses_too_small_for_a_margin_have_no_say():
    """In float32 a loss below 1e-7 is 0 and −log(e^loss − 1) infinite; such examples score 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)

    def own(model, batch):
        return nn.functional.softplus(-model(batch[0])[:, 0])

    x = torch.tensor([[1.0], [200.0], [-200.0]])
    values = loss_margin(own, model, (x,))
    assert torch.isfinite(values).all()
    assert values[0].item() == pytest.approx(1.0, rel=1e-5)
    assert values[2].item() == pytest.approx(-200)
    f = trak(Problem(model, own, (x,)), Outputs(own, (x[:1],)), ridge=1.0)
    assert f.scores[1, 0] == 0
    assert (f.scores[[0, 2], 0] != 0).all()


def test_losses_that_are_no_log_probabilities_are_refused():
    problem, outputs = _mlp()

    def shifted(model, batch):
        return cross_entropy(model, batch) - 3.0

    with pytest.raises(
        ValueError, match=r"losses −log p of at least 0, got negative ones.*features="
    ):
        trak(replace(problem, loss=shifted), outputs)
    assert np.isfinite(trak(replace(problem, loss=shifted), outputs, features=margin).scores).all()
    ridge = menagerie.ridge()  # squares are as good as any −log p
    squares = trak(ridge, Outputs(squared_error, ridge.train))
    assert np.isfinite(squares.scores).all()


# --- what must not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [7, ALL])
def test_batch_size_changes_nothing(dim):
    problem, outputs = _mlp(7)
    expected = trak(problem, outputs, projection_dim=dim).scores
    for size in (1, 4):
        found = trak(problem, outputs, projection_dim=dim, batch_size=size).scores
        np.testing.assert_allclose(found, expected, **EXACT)


def test_the_order_of_checkpoints_changes_nothing_but_the_projections():
    problem, outputs = _mlp()
    several = states(shaken(problem, 3))
    one, other = (
        trak(problem, outputs, checkpoints=some, projection_dim=ALL)
        for some in (several, several[::-1])
    )
    np.testing.assert_allclose(one.scores, other.scores, **EXACT)
    np.testing.assert_allclose(one.base, other.base, rtol=1e-12)
    one, other = (
        trak(problem, outputs, checkpoints=several, projection_dim=7, seed=seed) for seed in (0, 1)
    )
    assert np.abs(one.scores - other.scores).max() > 1e-3


def test_row_order_permutes_the_scores():
    problem, outputs = _mlp(20)
    order = np.random.default_rng(0).permutation(problem.n)
    x, y = problem.train.columns
    w = np.linspace(0.5, 1.5, problem.n)
    first = trak(problem, outputs, weights=w, projection_dim=9)
    second = trak(
        replace(problem, train=(x[order], y[order])), outputs, weights=w[order], projection_dim=9
    )
    np.testing.assert_allclose(second.scores, first.scores[order], **EXACT)


def test_one_checkpoint_works_twice_and_leaves_the_model_alone():
    problem, outputs = _mlp()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    state = states(shaken(problem, 1))
    first, second = (trak(problem, outputs, checkpoints=state, projection_dim=7) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())


def test_buffers_in_state_dicts_are_taken_over():
    """Batch norm in eval mode normalises by the checkpoint's own statistics."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    x, y = menagerie.mlp().train.columns
    problem = Problem(model, cross_entropy, (x, y))
    state = {k: v.clone() for k, v in model.state_dict().items()} | {"unused": torch.zeros(3)}
    state["1.running_mean"] += 1.0
    outputs = Outputs(margin, (x, y))
    found = trak(problem, outputs, checkpoints=[state])
    model.load_state_dict({k: v for k, v in state.items() if k != "unused"})
    np.testing.assert_array_equal(found.scores, trak(problem, outputs).scores)


# --- runs --------------------------------------------------------------------------------------

RECIPE = Recipe(SGD(0.1), batch_size=2, epochs=4)


def test_several_runs_are_the_ensemble():
    problem = menagerie.softmax()
    outputs = menagerie.unseen(problem)
    w = np.linspace(0.5, 1.5, problem.n)
    runs = [train(problem, replace(RECIPE, seed=seed), w, exposure=0.5) for seed in range(3)]
    found = trak(runs, outputs, projection_dim=ALL)
    trained = [run.trained() for run in runs]
    shift = 0.03 + 1 / (0.1 * 20)  # weight decay; lr .1, 4 epochs · .5 · 20 rows / 2 = 20 steps
    expected = formula(trained, lambda q: (q, outputs.function, outputs.data), w, shift, alpha=0.5)
    np.testing.assert_allclose(found.scores, expected, **EXACT)
    np.testing.assert_allclose(found.base, np.mean([run.outputs(outputs) for run in runs], axis=0))
    assert found.meta["ridge"] == pytest.approx(shift)


def test_a_run_that_removed_rows_averages_over_those_it_kept():
    problem = menagerie.softmax()
    kept = (np.arange(problem.n) % 2 == 0).astype(float)
    run = train(problem, RECIPE, kept, drop="row")
    outputs = menagerie.unseen(problem)
    shift = 0.03 + 1 / (0.1 * len(run.order))
    expected = formula(
        [run.trained()], lambda q: (q, outputs.function, outputs.data), kept, shift, drawn=10
    )
    found = trak(run, outputs, projection_dim=ALL)
    np.testing.assert_allclose(found.scores, expected, **EXACT)


def test_what_runs_cannot_be_given():
    problem = menagerie.softmax()
    outputs = menagerie.unseen(problem)
    run, part = (train(problem, RECIPE, exposure=e) for e in (1.0, 0.5))
    with pytest.raises(ValueError, match="a run brings its own weights and exposure"):
        trak(run, outputs, exposure=0.5)
    with pytest.raises(ValueError, match="several runs instead of checkpoints"):
        trak(run, outputs, checkpoints=[run.params])
    with pytest.raises(ValueError, match="expected runs of one anchor"):
        trak([run, part], outputs)
    other = train(Problem(nn.Linear(4, 4).double(), cross_entropy, problem.train), RECIPE)
    with pytest.raises(ValueError, match="expected runs of one model"):
        trak([run, other], outputs)
    with pytest.raises(ValueError, match="at least one run"):
        trak([], outputs)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection_dim": 0}, "at least 1 dimension, got 0"),
        ({"projection_dim": -3}, "at least 1 dimension, got -3"),
        ({"ridge": -0.1}, "ridge of at least 0, got -0.1"),
        ({"ridge": float("nan")}, "ridge of at least 0, got nan"),
        ({"kind": "sparse"}, "unknown kind 'sparse'"),
        ({"weights": np.ones(3)}, "expected one weight per training example"),
        ({"exposure": 2.0}, r"an exposure in \(0, 1\]"),
        ({"checkpoints": []}, "at least one checkpoint, got none"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        trak(*_mlp(), **settings)


@pytest.mark.parametrize("dim", [7, 30, ALL])
def test_without_a_ridge_more_dimensions_than_examples_are_refused(dim):
    with pytest.raises(
        ValueError, match=r"full rank.*got rank \d+ of \d+ dimensions from 6 examples"
    ):
        trak(*_mlp(), projection_dim=dim, ridge=0)
    assert np.isfinite(trak(*_mlp(), projection_dim=dim).scores).all()


def test_examples_that_repeat_lower_the_rank():
    problem, outputs = _mlp()
    x, y = problem.train.columns
    twice = replace(problem, train=(x[[0, 1, 2, 0, 1, 2]], y[[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="got rank 3 of 4 dimensions"):
        trak(twice, outputs, projection_dim=4, ridge=0)


def test_checkpoints_of_another_model_are_refused():
    problem, outputs = _mlp()
    state = problem.model.state_dict()
    lacking = {k: v for k, v in state.items() if k != "3.weight"}
    with pytest.raises(ValueError, match=r"'3.weight'\] are missing or of other shapes"):
        trak(problem, outputs, checkpoints=[state, lacking])
    with pytest.raises(ValueError, match=r"'3.weight'\] are missing or of other shapes"):
        trak(problem, outputs, checkpoints=[{**state, "3.weight": torch.zeros(6, 5)}])


def test_rows_of_nan_are_named():
    problem, outputs = _mlp()
    x, y = problem.train.columns
    x = x.clone()
    x[4, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[4\]"):
        trak(replace(problem, train=(x, y)), outputs, projection_dim=7)
    with pytest.raises(ValueError, match=r"finite output.*NaN or infinity in rows \[4\]"):
        trak(problem, Outputs(margin, (x, y)))


def test_what_is_told_about_it():
    problem = menagerie.ODD["frozen"]()
    f = trak(problem, Outputs(margin, problem.train), projection_dim=8, seed=3, exposure=0.5)
    every = [p.numel() for p in problem.model.parameters()]
    held = [p.numel() for p in problem.model.parameters() if p.requires_grad]
    assert f.meta["covered"] == pytest.approx(sum(held) / sum(every))
    ridge = f.meta.pop("ridge")
    assert ridge > 0
    assert f.meta.pop("covered") < 1
    assert f.meta == {
        "method": "trak", "dimension": 8, "kind": "factored", "checkpoints": 1, "exposure": 0.5,
        "seed": 3,
    }  # fmt: skip


# --- folders -----------------------------------------------------------------------------------


class Counted:
    """A progress that counts blocks of rows and may be killed in one."""

    def __init__(self, stop=None):
        self.seen, self.stop = 0, stop

    def __call__(self, items):
        for item in items:
            if self.seen == self.stop:
                raise KeyboardInterrupt
            yield item
            self.seen += 1


def _stored(n=600):
    problem = menagerie.softmax(n)
    several = shaken(problem, 2)
    return problem, {"checkpoints": states(several), "projection_dim": 9, "seed": 1}


def test_a_folder_gives_the_same_scores_and_serves_other_outputs(tmp_path):
    """Features are kept in the model's own precision; blocks of 256 rows, three a checkpoint."""
    problem, settings = _stored()
    outputs, others = menagerie.unseen(problem), menagerie.unseen(problem, margin, 9).mean()
    first, again, other, damped = (Counted() for _ in range(4))
    expected = trak(problem, outputs, **settings)
    found = trak(problem, outputs, **settings, folder=tmp_path, progress=first)
    np.testing.assert_allclose(found.scores, expected.scores, **EXACT)
    assert first.seen == 6
    found = trak(problem, outputs, **settings, folder=tmp_path, progress=again)
    np.testing.assert_allclose(found.scores, expected.scores, **EXACT)
    found = trak(problem, others, **settings, folder=tmp_path, progress=other)
    np.testing.assert_allclose(found.scores, trak(problem, others, **settings).scores, **EXACT)
    more = {**settings, "ridge": 5.0, "weights": np.linspace(0, 2, problem.n), "exposure": 0.5}
    found = trak(problem, outputs, **more, folder=tmp_path, progress=damped)
    np.testing.assert_allclose(found.scores, trak(problem, outputs, **more).scores, **EXACT)
    assert again.seen == other.seen == damped.seen == 0


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_killed_call_resumes(tmp_path, stop):
    problem, settings = _stored()
    outputs = menagerie.unseen(problem)
    with pytest.raises(KeyboardInterrupt):
        trak(problem, outputs, **settings, folder=tmp_path, progress=Counted(stop))
    rest = Counted()
    found = trak(problem, outputs, **settings, folder=tmp_path, progress=rest)
    assert rest.seen == 6 - stop
    np.testing.assert_allclose(found.scores, trak(problem, outputs, **settings).scores, **EXACT)


def test_a_folder_of_something_else_is_refused(tmp_path):
    problem, settings = _stored(60)
    outputs = menagerie.unseen(problem)
    trak(problem, outputs, **settings, folder=tmp_path)
    x, y = problem.train.columns
    for other, change in (
        (replace(problem, train=(x + 1, y)), {}),
        (problem, {"seed": 2}),
        (problem, {"projection_dim": 8}),
        (problem, {"kind": "gaussian"}),
        (problem, {"features": cross_entropy}),
        (problem, {"checkpoints": settings["checkpoints"][::-1]}),
    ):
        with pytest.raises(ValueError, match="was written by another run"):
            trak(other, outputs, **{**settings, **change}, folder=tmp_path)


def test_runs_in_a_folder(tmp_path):
    problem = menagerie.softmax()
    runs = [train(problem, replace(RECIPE, optimizer=AdamW(0.01), seed=s)) for s in range(2)]
    outputs = menagerie.unseen(problem)
    expected = trak(runs, outputs, projection_dim=9).scores
    for _ in range(2):
        found = trak(runs, outputs, projection_dim=9, folder=tmp_path).scores
        np.testing.assert_allclose(found, expected, **EXACT)


def test_further_outputs_cost_little(tmp_path):
    """One target more, with 3,000 rows' features at hand, in a fifth of the first call's time.

    (5 % on a quiet machine; the rest is for a busy one.)
    """
    problem = menagerie.gpt2(3000)
    target = Outputs(problem.loss, problem.train[[0, 1, 2]])
    spent = []
    for outputs in (target, target.mean()):
        start = time.perf_counter()
        trak(problem, outputs, projection_dim=256, folder=tmp_path)
        spent.append(time.perf_counter() - start)
    assert spent[1] < 0.2 * spent[0]


# --- digits ------------------------------------------------------------------------------------

ROWS, TARGETS = 400, 20


def test_digits_halves_are_predicted_at_any_dimension(capsys):
    """The acceptance, small: retrained halves with fresh seeds, predicted from five runs at exposure .5."""
    x, y = menagerie.digits_arrays()
    problem = Problem(menagerie.digits_model(0), cross_entropy, (x[:ROWS], y[:ROWS]))
    outputs = Outputs(margin, (x[-TARGETS:], y[-TARGETS:]))
    recipe = Recipe(SGD(0.05, momentum=0.9), 50, 15, init=menagerie.digits_model)
    halves = random_subsets(ROWS, 32, keep=0.5)
    table = retrain(problem, recipe, outputs, halves, seeds=5, drop="row")
    runs = [train(problem, replace(recipe, seed=100 + k), exposure=0.5) for k in range(5)]
    best = lds(trak(runs, outputs), table)
    dims = {k: lds(trak(runs, outputs, projection_dim=k), table) for k in (50, 100, 400, 800)}
    # the runs' state dicts alone, whose damping is not known
    kept = [run.params for run in runs]
    alone = lds(trak(problem, outputs, checkpoints=kept, exposure=0.5), table)
    with capsys.disabled():
        print()
        for name, score in {"default": best, **dims, "state dicts": alone}.items():
            print(f"  digits, halves removed, trak, {name}: {score}")
    assert best.mean >= 0.66
    assert 0.7 <= best.slope <= 1.4
    # from n/4 on the dimension hardly matters; n/8 = 50 directions tell apart a little less
    assert min(score.mean for k, score in dims.items() if k >= 100) > best.mean - 0.05
    assert dims[50].mean > best.mean - 0.1
    assert alone.mean > best.mean - 0.05
