"""attribution_core.input_influence: slopes by inputs, against refits, metagradients and finite differences."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from attribution_core import (
    SGD,
    MetagradientWarning,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    fit_curvature,
    magic,
    margin,
    squared_error,
    train,
)
from attribution_core.input_influence import gradient_matching, input_influence
from tests import menagerie

LAYOUT = ("wrt", "shape")


def fitted(classes=3, n=40):
    """A tightly converged logistic regression: (estimator, x, y, problem, held-out outputs)."""
    rng = np.random.default_rng(classes)
    x = rng.normal(size=(n, 4))
    y = (x @ rng.normal(size=(4, classes)) + rng.normal(size=(n, classes))).argmax(1)
    estimator = LogisticRegression(C=0.7, solver="newton-cholesky", tol=1e-12).fit(x, y)
    problem = Problem.from_sklearn(estimator, x, y)
    held = problem.model.encode(rng.normal(size=(5, 4)), rng.integers(0, classes, 5))
    return estimator, x, y, problem, Outputs(margin, held)


def refit_outputs(estimator, x, y, outputs, weights=None):
    again = type(estimator)(**estimator.get_params()).fit(x, y, sample_weight=weights)
    return outputs.evaluate(Problem.from_sklearn(again, x, y, weights=weights).model).numpy()


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_slopes_of_refits_by_single_inputs(classes, curvature):
    estimator, x, y, problem, outputs = fitted(classes)
    rows = [7, 0, 31]
    f = input_influence(problem, outputs, rows=rows, curvature=curvature)
    assert f.scores.shape == (12, 5)
    np.testing.assert_allclose(f.base, outputs.evaluate(problem.model), rtol=1e-12)
    np.testing.assert_array_equal(f.anchor, x[rows].ravel())
    assert f.ids.tolist() == [4 * i + j for i in rows for j in range(4)]
    h = 1e-3
    for k, (i, j) in enumerate((i, j) for i in rows for j in range(4)):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i, j] += sign * h
            ends.append(refit_outputs(estimator, moved, y, outputs))
        slope = (ends[0] - ends[1]) / (2 * h)
        # h² f'''/6 ~ 1e-6 of the largest slope; refits to 1e-12 add 1e-8
        assert np.abs(f.scores[k] - slope).max() < 1e-5 * np.abs(f.scores).max()


def test_of_a_linear_regression_by_its_closed_form():
    """ridge θ = (XᵀX + α)⁻¹ Xᵀy: ∂θ/∂x_ij = A⁻¹ (e_j (y_i − x_iᵀθ) − x_i θ_j)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    estimator = Ridge(alpha=0.7, fit_intercept=False).fit(x, y)
    problem = Problem.from_sklearn(estimator, x, y)
    fresh = rng.normal(size=(4, 3))
    outputs = Outputs(menagerie.prediction, (torch.from_numpy(fresh), torch.zeros(4)))
    f = input_influence(problem, outputs, rows=[11, 2], curvature="hessian")
    theta = np.linalg.solve(x.T @ x + 0.7 * np.eye(3), x.T @ y)
    solve = fresh @ np.linalg.inv(x.T @ x + 0.7 * np.eye(3))
    expected = [
        solve @ (np.eye(3)[j] * (y[i] - x[i] @ theta) - x[i] * theta[j])
        for i in (11, 2)
        for j in range(3)
    ]
    np.testing.assert_allclose(f.scores, expected, rtol=1e-10, atol=1e-13)  # float64


def test_training_weights_of_a_run_count():
    """A row of weight 0 moves nothing; one of weight 2 moves the fit as two equal rows would."""
    problem = menagerie.softmax()
    outputs = menagerie.unseen(problem, margin)
    w = np.ones(problem.n)
    w[[3, 4]] = 0.0, 2.0
    # full batches until the optimum: of a curvature of .03 and more, 500 steps of rate .5/(1 − .9)
    # leave e^{−75} of the way
    run = train(problem, Recipe(SGD(0.5, 0.9), problem.n, 500), w, states=0)
    found = input_influence(run, outputs, rows=[3, 4, 5], curvature="hessian", damping=0.0)
    assert (found.scores[:4] == 0).all()
    h = 1e-3
    for place, i, j in ((4, 4, 0), (7, 4, 3), (9, 5, 1)):
        ends = []
        for sign in (1, -1):
            x, y = problem.train.columns
            moved = x.clone()
            moved[i, j] += sign * h
            other = menagerie.refit(replace(problem, train=(moved, y)), w)
            ends.append(outputs.evaluate(other.model).numpy())
        slope = (ends[0] - ends[1]) / (2 * h)
        # h² f'''/6 ~ 1e-6 of the largest slope
        assert np.abs(found.scores[place] - slope).max() < 1e-5 * np.abs(found.scores).max()


# --- the layout of metagradients -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_it_is_laid_out_as_metagradients_are(name):
    problem = menagerie.ARCHITECTURES[name]()
    outputs = Outputs(margin, problem.train).mean()
    run = train(problem, Recipe(SGD(0.05), 3, 2))
    rows = [4, 1]
    f = input_influence(run, outputs, rows=rows)
    g = gradient_matching(run, outputs, rows=rows)
    kinks = pytest.warns(MetagradientWarning, match="kinks")
    with kinks if name == "conv" else nullcontext():
        expected = magic(run, outputs, wrt="inputs", rows=rows)
    for other in (f, g):
        np.testing.assert_array_equal(other.ids, expected.ids)
        np.testing.assert_array_equal(other.anchor, expected.anchor)
        assert other.scores.shape == expected.scores.shape
        for key in LAYOUT:
            assert other.meta[key] == expected.meta[key]
    np.testing.assert_array_equal(f.base, expected.base)
    assert f.targets.tolist() == ["mean"]
    assert g.targets.tolist() == ["alignment"]
    assert (f.meta["method"], g.meta["method"]) == ("input_influence", "gradient_matching")


def test_it_agrees_with_metagradients_where_training_has_converged():
    """Full-batch descent to the optimum of a small smooth network: the two are one derivative."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(30, 4).double()
        y = (x @ torch.randn(4, 3).double() + torch.randn(30, 3).double()).argmax(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        held = (torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))
    problem = Problem(model, cross_entropy, (x, y), weight_decay=0.05)
    run = train(problem, Recipe(SGD(1.0, 0.9), 30, 400), states="all")
    at = run.trained()
    flat, total = menagerie.flat_params(at), menagerie.objective(at, np.ones(30))
    assert torch.func.grad(total)(flat).norm() < 1e-9
    least = torch.linalg.eigvalsh(torch.func.hessian(total)(flat)).min()
    assert least > 4e-3
    outputs = Outputs(cross_entropy, held)
    rows = np.arange(8)
    exact = magic(run, outputs, wrt="inputs", rows=rows).scores
    found = input_influence(run, outputs, rows=rows, curvature="hessian").scores
    # 400 steps of rate 1/(1 − .9) leave (1 − 4e-3 · 10)^400 = 8e-8 of what came first, and the implicit
    # function theorem holds to the gradient that is left, 1e-9, over the least eigenvalue
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    cheap = input_influence(run, outputs, rows=rows, curvature="gauss_newton").scores
    # the Gauss–Newton leaves out the curvature of the network; its directions are near
    assert np.corrcoef(cheap.ravel(), exact.ravel())[0, 1] > 0.8
    shuffled = np.random.default_rng(0).permutation(exact.ravel())
    assert abs(np.corrcoef(shuffled, exact.ravel())[0, 1]) < 0.3  # which a wrong order is not


# --- what must not matter ------------------------------------------------------------------------------


def test_batches_row_order_and_number_of_outputs_change_nothing():
    _, _, _, problem, outputs = fitted()
    rows = np.array([5, 0, 17, 9])
    f = input_influence(problem, outputs, rows=rows, curvature="hessian")
    small = input_influence(problem, outputs, rows=rows, curvature="hessian", batch_size=1)
    np.testing.assert_allclose(small.scores, f.scores, rtol=1e-10, atol=1e-14)
    order = [2, 3, 0, 1]
    other = input_influence(problem, outputs, rows=rows[order], curvature="hessian")
    blocks = f.scores.reshape(4, 4, -1)[order].reshape(16, -1)
    np.testing.assert_allclose(other.scores, blocks, rtol=1e-10, atol=1e-14)
    mean = input_influence(problem, outputs.mean(), rows=rows, curvature="hessian")
    np.testing.assert_allclose(mean.scores[:, 0], f.scores.mean(1), rtol=1e-10, atol=1e-14)
    alone = input_influence(problem, outputs, rows=9, curvature="hessian")
    np.testing.assert_allclose(alone.scores, f.scores[12:], rtol=1e-10, atol=1e-14)
    curve = fit_curvature(problem, "hessian")
    again = input_influence(problem, outputs, rows=rows, curvature=curve)
    np.testing.assert_allclose(again.scores, f.scores, rtol=1e-10, atol=1e-14)


def test_inputs_that_the_model_never_reads_move_nothing():
    problem = menagerie.softmax()
    x, y = problem.train.columns

    def loss(model, batch):
        return cross_entropy(model, (batch["x"], batch["y"]))

    named = replace(problem, loss=loss, train={"spare": torch.ones(20, 2).double(), "y": y, "x": x})
    outputs = Outputs(margin, (x[:3], y[:3]))
    spare = input_influence(named, outputs, rows=[1, 2])  # the first floating column
    assert spare.meta["shape"] == [2, 2]
    assert (spare.scores == 0).all()
    found = input_influence(named, outputs, rows=[1, 2], column="x")
    expected = input_influence(problem, outputs, rows=[1, 2])
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-10, atol=1e-14)
    assert np.abs(found.scores).max() > 1e-3


# --- gradient matching ---------------------------------------------------------------------------------


def cosine_by_hand(problem, goal, rows, x):
    """cos(−∇ goal, Σ ∇ loss), one backward pass a row."""
    columns = problem.train.columns
    other = columns[0].clone()
    other[rows] = torch.as_tensor(x)
    moved = replace(problem, train=(other, columns[1]))
    g = menagerie.row_gradients(moved)[rows].sum(0)
    a = -menagerie.row_gradients(problem, goal.function, goal.data).mean(0)
    return float((g @ a) / (g.norm() * a.norm()))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_alignment_is_the_cosine_and_scores_its_slope(name):
    problem = menagerie.ARCHITECTURES[name]()
    goal = Outputs(cross_entropy, problem.train[[0, 5]])
    rows = [3, 1]
    f = gradient_matching(problem, goal.mean(), rows=rows)
    x = problem.train.columns[0][rows].numpy()
    # float64, sums in another order
    assert f.base[0] == pytest.approx(cosine_by_hand(problem, goal, rows, x), rel=1e-10)
    assert -1 <= f.base[0] <= 1
    assert f.anchor.tolist() == x.ravel().tolist()
    rng = np.random.default_rng(0)
    size = np.abs(f.scores).max()
    assert size > 1e-4
    for _ in range(4):
        move = rng.normal(size=x.shape)
        h = 1e-5  # second-order terms ~ h² = 1e-10, rounding 1e-16 / h = 1e-11
        up, down = (cosine_by_hand(problem, goal, rows, x + s * h * move) for s in (1, -1))
        slope = (up - down) / (2 * h)
        assert move.ravel() @ f.scores[:, 0] == pytest.approx(slope, rel=1e-6, abs=1e-7 * size)


def test_a_row_that_raises_the_goal_is_aligned():
    """A step of descent along a gradient of cosine 1 with −∇ goal raises the goal."""
    problem = menagerie.mlp()
    x, y = problem.train.columns
    own = Outputs(cross_entropy, (x[:1], y[:1])).mean()
    f = gradient_matching(problem, own, rows=[0])
    assert f.base[0] == pytest.approx(-1.0, abs=1e-12)  # training on a row lowers its own loss
    against = Outputs(lambda model, batch: -cross_entropy(model, batch), (x[:1], y[:1])).mean()
    assert gradient_matching(problem, against, rows=[0]).base[0] == pytest.approx(1.0, abs=1e-12)


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [3, 3], [-1], [6]])
@pytest.mark.parametrize("method", [input_influence, gradient_matching])
def test_rows_that_are_none(method, rows):
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match="expected different rows of 0 to 5"):
        method(problem, Outputs(margin, problem.train).mean(), rows=rows)


@pytest.mark.parametrize("column", [1, 7, "x"])
@pytest.mark.parametrize("method", [input_influence, gradient_matching])
def test_columns_without_a_derivative(method, column):
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match="expected a column of floating numbers"):
        method(problem, Outputs(margin, problem.train).mean(), rows=[0], column=column)


def test_several_goals_are_refused():
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match=r"expected one goal, got 6 outputs; pass goal\.mean"):
        gradient_matching(problem, Outputs(margin, problem.train), rows=[0])


def test_token_ids_have_no_derivative():
    problem = menagerie.gpt2()
    outputs = Outputs(problem.loss, problem.train).mean()
    with pytest.raises(ValueError, match="token ids have no derivative"):
        input_influence(problem, outputs, rows=[0])
    with pytest.raises(ValueError, match="brings its damping"):
        input_influence(
            menagerie.mlp(), Outputs(margin, menagerie.mlp().train), rows=[0],
            curvature=fit_curvature(menagerie.mlp()), damping=0.1,
        )  # fmt: skip


def test_an_exposure_is_no_larger_weight():
    """At half of the steps a converged run stands where a whole one does, and a row counts w/n there."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(12, 3)))
    problem = Problem(nn.Linear(3, 1).double(), squared_error, (x, x.sum(1, keepdim=True) + 1))
    recipe = Recipe(SGD(0.2), 12, 800)
    outputs = Outputs(lambda m, b: m(b[0])[:, 0], (x[:2],))
    whole, half = (
        input_influence(train(problem, recipe, exposure=a, states=0), outputs, rows=[3]).scores
        for a in (1.0, 0.5)
    )
    np.testing.assert_allclose(
        half, whole, rtol=0.02
    )  # the run's own damping differs by its length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fused_attention_has_a_second_derivative_here(attention):
    problem = weighted_tokens(attention)
    outputs = Outputs(problem.loss, problem.train).mean()
    for method in (gradient_matching, input_influence):
        more = {} if method is gradient_matching else {"curvature": "identity", "damping": 1.0}
        found = method(problem, outputs, rows=[1, 4], **more).scores
        other = method(weighted_tokens("eager"), outputs, rows=[1, 4], **more).scores
        np.testing.assert_allclose(found, other, rtol=1e-8, atol=1e-12)


def weighted_tokens(attention):
    """A tiny GPT-2 whose rows have floating weights of their tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    ids = torch.randint(11, (6, 6))
    batch = {"input_ids": ids, "token_weights": torch.rand(6, 6, dtype=torch.float64)}

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )
        return (each * batch["token_weights"][:, 1:]).mean(1)

    return Problem(GPT2LMHeadModel(config).double().eval(), loss, batch)
