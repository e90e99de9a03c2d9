"""attribution_core.in_run: against dense gradients, all subsets of a batch, and the change that happened."""

import copy
import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    Adam,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    margin,
    train,
)
from attribution_core.in_run import MISS, MovementWarning, _Reading, ends_of, in_run
from attribution_core.stepwise.passes import Passes
from tests import menagerie
from tests.test_gradients import KINDS, FromZero, RareRow, RareTokens, TwoHeads, of_kinds

# sums of some hundred products of rounding 1e-16, in another order
EXACT = {"rtol": 1e-10, "atol": 1e-12}
OPTIMIZERS = {
    "sgd": SGD(0.1),
    "momentum": SGD(0.05, 0.8),
    "nesterov": SGD(0.05, 0.8, nesterov=True, weight_decay=0.1),
    "adam": Adam(0.01, weight_decay=0.1),
    "adamw": AdamW(0.01, weight_decay=0.1),
}


def held_out(problem, rows=3):
    """Losses on shifted training inputs, averaged."""
    return menagerie.unseen(problem, rows=rows).mean()


def every_state(problem, recipe, weights=None):
    """The run, θ_k [steps + 1, p] and Adam's second moments after each step."""
    run = train(problem, recipe, weights, states="all")
    states = [run.states[k] for k in range(len(run.order))] + [run.last]
    flat = [torch.cat([x.flatten() for x in s.params.values()]) for s in states]
    second = [s.moments.get("second", {}) for s in states[1:]]
    return run, torch.stack(flat), [next(iter(s.values()), None) for s in second]


def slope(problem, outputs, flat):
    """∇f [t, p], one output after the other."""
    at = flat.clone().requires_grad_()
    values = menagerie.losses_at(problem, at, outputs.function, outputs.data)
    values = values if outputs.matrix is None else values @ outputs.matrix
    return torch.stack([torch.autograd.grad(v, at, retain_graph=True)[0] for v in values])


def dense(problem, recipe, outputs, weights=None):
    """(Σ_k w_i −(1/B) ⟨∇ℓ_i(θ_k), u_k⟩, the part of weight decay), every step a segment, order 2."""
    run, theta, second = every_state(problem, recipe, weights)
    optimizer, count = recipe.optimizer, len(run.order)
    w = np.ones(problem.n) if weights is None else np.asarray(weights)
    ends = [slope(problem, outputs, at) for at in theta]
    g = [(ends[k] + ends[k + 1]) / 2 for k in range(count)]
    scores, decays = (
        torch.zeros(problem.n, len(outputs)).double(),
        torch.zeros(len(outputs)).double(),
    )
    for k, rows in enumerate(run.order):
        moved = torch.zeros_like(g[0])
        for later in range(k, count):
            lr = optimizer.lr * recipe.lr_factor(later, count)
            if isinstance(optimizer, SGD):
                share = optimizer.momentum ** (later - k)
                if optimizer.nesterov:
                    share = share * optimizer.momentum + (later == k)
                moved += lr * share * g[later]
            else:
                one, two = optimizer.betas
                share = (1 - one) * one ** (later - k) / (1 - one ** (later + 1))
                v = second[later] / (1 - two ** (later + 1)) + optimizer.eps_root
                moved += lr * share * g[later] / (v.sqrt() + optimizer.eps)
        now = menagerie.row_gradients(at_flat(problem, theta[k]))
        mean = torch.as_tensor(w[rows]) @ now[rows] / len(rows)
        clip = 1.0 if recipe.clip is None else min(1.0, recipe.clip / (mean.norm() + 1e-6))
        weighted = torch.as_tensor(w[rows])[:, None] * now[rows] / len(rows)
        scores.index_add_(0, torch.as_tensor(rows), -clip * weighted @ moved.T)
        decoupled = getattr(optimizer, "decoupled", False)
        lr = optimizer.lr * recipe.lr_factor(k, count)
        decays -= (optimizer.weight_decay or 0.0) * (lr * g[k] if decoupled else moved) @ theta[k]
    return scores.numpy(), decays.numpy()


def at_flat(problem, flat):
    return menagerie.with_params(problem, flat)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_a_segment_equals_dense_gradients(name, clip):
    problem = menagerie.mlp()
    recipe = Recipe(OPTIMIZERS[name], 2, 4, schedule="cosine", clip=clip)
    outputs = held_out(problem)
    got = in_run(problem, recipe, outputs, every=1)
    scores, decay = dense(problem, recipe, outputs)
    np.testing.assert_allclose(got.datamodel.scores, scores, **EXACT)
    np.testing.assert_allclose(got.datamodel.meta["weight_decay"], decay, **EXACT)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_trains(name, order):
    """Hooks and reading change no bit of the training."""
    problem = menagerie.mlp()
    recipe = Recipe(OPTIMIZERS[name], 2, 6, schedule="linear", clip=0.5)
    plain, got = (
        train(problem, recipe),
        in_run(problem, recipe, held_out(problem), order=order).run,
    )
    for key, value in plain.params.items():
        assert torch.equal(got.params[key], value)
    np.testing.assert_array_equal(got.losses, plain.losses)
    assert all((a == b).all() for a, b in zip(got.order, plain.order, strict=True))
    for group, held in plain.state.items():
        assert all(torch.equal(got.state[group][k], v) for k, v in held.items())


def test_one_step_is_the_shapley_value_of_its_batch_to_third_order():
    """All 2^6 subsets of a batch: the error falls with lr³, by 8 for every halving."""
    problem, lrs = menagerie.mlp(), (0.4, 0.2, 0.1)
    outputs, n = held_out(problem), problem.n
    rows, flat = menagerie.row_gradients(problem), menagerie.flat_params(problem)
    errors = []
    for lr in lrs:
        value = {}
        for size in range(n + 1):
            for team in itertools.combinations(range(n), size):
                moved = flat - lr / n * rows[list(team)].sum(0)
                at = menagerie.losses_at(problem, moved, outputs.function, outputs.data)
                value[team] = at.mean().item()
        shapley = np.zeros(n)
        for team in value:
            for i in set(range(n)) - set(team):
                share = math.factorial(len(team)) * math.factorial(n - len(team) - 1)
                gain = value[tuple(sorted((*team, i)))] - value[team]
                shapley[i] += share / math.factorial(n) * gain
        got = in_run(problem, Recipe(SGD(lr), n, 1), outputs, every=1).datamodel
        errors.append(np.abs(got.scores[:, 0] - shapley).max())
        assert shapley.sum() == pytest.approx(got.meta["change"][0], rel=1e-9)
    assert errors[0] / errors[1] > 7  # 8 in the limit
    assert errors[1] / errors[2] > 7


def test_the_first_order_is_the_left_rule():
    problem = menagerie.mlp()
    got = in_run(problem, Recipe(SGD(0.1), 6, 1), held_out(problem), order=1).datamodel
    flat = menagerie.flat_params(problem)
    expected = (
        -0.1 / 6 * menagerie.row_gradients(problem) @ slope(problem, held_out(problem), flat)[0]
    )
    np.testing.assert_allclose(got.scores[:, 0], expected.numpy(), **EXACT)


def test_a_quadratic_output_is_shared_out_whole():
    """Both ends of a segment are exact for quadratics, whatever the segments."""
    problem = menagerie.ridge()
    recipe = Recipe(SGD(0.05, weight_decay=0.03), 5, 5)
    problem = replace(problem, weight_decay=0.0)
    got = in_run(problem, recipe, held_out(problem), every=8).datamodel
    assert got.meta["relative_remainder"][0] < 1e-10  # rounding
    assert got.meta["weight_decay"][0] != 0
    total = got.scores.sum(0) + got.meta["weight_decay"]
    np.testing.assert_allclose(total, got.meta["change"], **EXACT)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_many_outputs_beside_few_rows_leave_little(name):
    """Segments may be as long as the training, but are as short as f's change asks for. Goal: 5 %."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    problem = Problem(model, cross_entropy, (x[:400], torch.tensor(y[:400])))
    outputs = Outputs(cross_entropy, (x[400:], torch.tensor(y[400:]))).mean()
    found = in_run(problem, Recipe(replace(OPTIMIZERS[name], lr=0.01), 20, 20), outputs)
    assert found.datamodel.meta["every"] > 100
    assert found.datamodel.meta["gradients"] < 40  # of 400 steps
    assert found.datamodel.meta["relative_remainder"][0] < 0.05


def test_large_steps_of_adam_are_shared_out_too():
    """Many passes that share the mean of their directions leave 6 to 8 % here, as they once did. Goal: 5 %."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 24), nn.GELU(), nn.Linear(24, 2))
    problem = Problem(model, cross_entropy, (x[:400], torch.tensor(y[:400])))
    outputs = Outputs(cross_entropy, (x[400:], torch.tensor(y[400:]))).mean()
    meta = in_run(problem, Recipe(Adam(0.02), 20, 20), outputs).datamodel.meta
    assert meta["relative_remainder"][0] < 0.05


def test_segments_grow_where_f_is_quadratic_and_are_split_where_it_is_not():
    """Quadratic: nothing is missed, so each is four times as long as the one before: 5 for 160 steps."""
    problem, recipe = menagerie.ridge(), Recipe(SGD(0.05), 5, 40)
    meta = in_run(problem, recipe, held_out(problem)).datamodel.meta
    assert meta["gradients"] == meta["segments"] + 1 == 6  # at their ends
    assert meta["relative_remainder"][0] < 1e-10  # rounding
    bent = menagerie.mlp(12)
    wild = in_run(bent, Recipe(SGD(0.5, 0.9), 4, 20), held_out(bent)).datamodel.meta
    assert wild["segments"] + 1 < wild["gradients"]  # some were measured again


@pytest.mark.parametrize("order", [1, 2])
def test_the_sum_of_segments_stays_near_the_change_that_happened(order, monkeypatch):
    """`MISS` of the largest change by the halves of what is left, as much again by shares of steps. Without
    momentum a segment's shares add up to its sum."""
    problem = menagerie.mlp(12)
    outputs, recipe, values = held_out(problem), Recipe(SGD(0.05), 4, 60), []
    original = _Reading.point
    monkeypatch.setattr(
        _Reading, "point", lambda *a: values.append(original(*a).value) or original(*a)
    )
    meta = in_run(problem, recipe, outputs, order=order).datamodel.meta
    largest = max(float((v - values[0]).abs().sum()) for v in values)
    assert abs(meta["remainder"][0]) <= 2 * MISS * largest
    assert meta["segments"] < 180 / 2  # of 180 steps


def test_a_line_along_which_f_bends_is_measured_in_its_middle_too():
    """One step too long for its ends: Simpson's rule comes near the integral, which 400 places take."""
    problem = menagerie.mlp()
    recipe, outputs = Recipe(SGD(3.0), 6, 1), held_out(problem)
    ends, got = (in_run(problem, recipe, outputs, every=e).datamodel for e in (1, "auto"))
    _, (begin, end), _ = every_state(problem, recipe)
    places = (torch.arange(400).double() + 0.5) / 400
    mean = torch.stack([slope(problem, outputs, begin.lerp(end, at)) for at in places]).mean(0)
    exact = -3.0 / 6 * menagerie.row_gradients(problem) @ mean[0]
    far, near = (np.abs(of.scores[:, 0] - exact.numpy()).max() for of in (ends, got))
    assert got.meta["gradients"] == 3
    assert near < 0.2 * far
    assert got.meta["relative_remainder"][0] < 0.2 * ends.meta["relative_remainder"][0]


def test_parts_of_a_split_segment_are_segments(monkeypatch):
    """No miss is allowed: every segment is split down to single steps, from parameters kept on the way."""
    monkeypatch.setattr(sys.modules[_Reading.__module__], "MARKS", 100)
    monkeypatch.setattr(_Reading, "room", lambda *_: 0.0)
    monkeypatch.setattr(_Reading, "close", tenfold(_Reading.close))
    problem, recipe = menagerie.mlp(), Recipe(SGD(0.1), 2, 7)
    got, once = (
        in_run(problem, recipe, held_out(problem), order=1, every=every).datamodel
        for every in ("auto", 1)
    )
    assert got.meta["segments"] == once.meta["segments"] == 21
    assert got.meta["gradients"] == 22  # each end is looked at once
    np.testing.assert_allclose(got.scores, once.scores, **EXACT)


def tenfold(close):
    """A rule for the next segment's length that never learns."""
    return lambda *a: close(*a) and 10


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_of_outputs_per_pass_do_not_matter(size):
    problem = menagerie.mlp(12)
    outputs, recipe = held_out(problem, 6), Recipe(AdamW(0.02), 4, 20)
    whole = in_run(problem, recipe, outputs).datamodel
    parts = in_run(problem, recipe, outputs, batch_size=size).datamodel
    assert whole.meta["segments"] == parts.meta["segments"]
    np.testing.assert_allclose(parts.scores, whole.scores, **EXACT)


def test_the_bound_on_memory_holds_and_parameters_count(monkeypatch):
    """Waiting passes, and the parameters that splits start from, stay below the bound."""
    held = []
    original = _Reading.close

    def close(self, passes, *rest):
        waiting = [*passes, *(of for segment in self.open for of in segment.passes)]
        held.append(sum(of.bytes for of in waiting))
        return original(self, passes, *rest)

    monkeypatch.setattr(_Reading, "close", close)
    problem = menagerie.mlp(12)
    bound = 20_000
    with pytest.warns(MovementWarning, match=r"give memory=\d+ bytes"):
        found = in_run(problem, Recipe(AdamW(0.01), 4, 30), held_out(problem), memory=bound)
    meta = found.datamodel.meta
    assert max(held) <= bound
    assert meta["segments"] > 10


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_the_second_order_leaves_less_than_the_first(name):
    problem = menagerie.mlp(12)
    recipe = Recipe(replace(OPTIMIZERS[name], lr=0.03), 4, 40)
    first, second = (
        in_run(problem, recipe, held_out(problem), order=order, every=40).datamodel.meta
        for order in (1, 2)
    )
    assert second["relative_remainder"][0] < 0.2 * first["relative_remainder"][0]


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "conv", "padding", "twice", "own norm", "frozen", "positions", "hand tied"],
)
def test_layers_of_every_kind_equal_row_gradients(name):
    """Tied, looked-up, normalised, convolved: as per-example gradients multiplied out."""
    problem = {**menagerie.ARCHITECTURES, **menagerie.ODD}[name]()
    outputs = Outputs(problem.loss, problem.train[[0, 1]]).mean()
    recipe = Recipe(SGD(0.1, 0.5), 3, 2, clip=1.0)
    got = in_run(problem, recipe, outputs, every=2).datamodel
    rows = in_run(problem, recipe, outputs, every=2, engine="rows").datamodel
    assert rows.meta["engine"] == "rows"
    np.testing.assert_allclose(got.scores, rows.scores, rtol=1e-8, atol=1e-12)
    if name == "gpt2":
        scores, _ = dense(problem, recipe, outputs)
        once = in_run(problem, recipe, outputs, every=1).datamodel
        np.testing.assert_allclose(once.scores, scores, **EXACT)


def test_a_layer_that_is_not_linear_in_its_parameters_is_taken_where_it_stood():
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

        def forward(self, x):
            return torch.sin(self.scale * x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Power(), nn.Linear(4, 3)).double()
    mlp = menagerie.mlp()
    problem = Problem(model, mlp.loss, mlp.train)
    recipe, outputs = Recipe(SGD(0.3), 2, 3), held_out(problem)
    got = in_run(problem, recipe, outputs, every=1).datamodel
    assert got.meta["engine"] == "ghost"
    np.testing.assert_allclose(got.scores, dense(problem, recipe, outputs)[0], **EXACT)


@pytest.mark.parametrize("optimizer", [SGD(0.5), AdamW(0.05)], ids=["sgd", "adamw"])
def test_a_last_layer_that_starts_at_zero(optimizer):
    """It hides what a parameter of the model's own does, which no layer's product has."""
    problem = of_kinds(FromZero, KINDS["in turns"])
    outputs, recipe = held_out(problem), Recipe(optimizer, 8, 4)
    auto, rows = (
        in_run(problem, recipe, outputs, engine=engine, every=3).datamodel
        for engine in ("auto", "rows")
    )
    np.testing.assert_allclose(auto.scores, rows.scores, **EXACT)


def test_heads_that_see_rows_of_their_own():
    problem = of_kinds(TwoHeads, KINDS["in halves"])
    outputs, recipe = held_out(problem), Recipe(SGD(0.5), 8, 4)
    auto, rows = (
        in_run(problem, recipe, outputs, engine=engine, every=3).datamodel
        for engine in ("auto", "rows")
    )
    np.testing.assert_allclose(auto.scores, rows.scores, **EXACT)


@pytest.mark.parametrize(("model", "rare"), [(RareTokens, [5, 6, 7, 8]), (RareRow, [6])])
def test_a_layer_that_the_trial_did_not_show_is_read_in_another_way(model, rare):
    """The sixteen rare tokens of one batch would pass for its sixteen rows, the one row for one that all share."""
    problem = of_kinds(model, np.zeros(400, bool))
    problem.train.columns[0][rare] = 60.0 + torch.arange(4.0, dtype=torch.float64)
    order = [list(range(20, 36)), list(range(16)), list(range(40, 56))]
    outputs, recipe = held_out(problem), Recipe(SGD(0.5), 16, 1, order=order)
    auto, rows = (
        in_run(problem, recipe, outputs, engine=engine, every=3).datamodel
        for engine in ("auto", "rows")
    )
    assert auto.meta["engine"] == "jvp"
    np.testing.assert_allclose(auto.scores, rows.scores, **EXACT)
    with pytest.raises(ValueError, match="layers that see every row of a batch"):
        in_run(problem, recipe, outputs, engine="ghost")


def test_several_outputs_are_read_each_by_itself():
    problem = menagerie.mlp()
    recipe = Recipe(AdamW(0.01), 2, 4)
    outputs = menagerie.unseen(problem, margin, rows=3)
    got, mean = (in_run(problem, recipe, of, every=4).datamodel for of in (outputs, outputs.mean()))
    assert got.scores.shape == (6, 3)
    np.testing.assert_allclose(got.scores.mean(1), mean.scores[:, 0], **EXACT)
    np.testing.assert_allclose(got.base.mean(), mean.base[0], **EXACT)


def test_the_order_of_rows_within_a_batch_and_a_bound_on_memory_change_little_or_nothing():
    problem = menagerie.mlp()
    order = [[0, 1, 2], [3, 4], [5, 0, 3], [2, 1, 4]]
    outputs = held_out(problem)
    one, two = (
        in_run(problem, Recipe(SGD(0.1), 3, 1, order=o), outputs, every=2).datamodel
        for o in (order, [batch[::-1] for batch in order])
    )
    np.testing.assert_allclose(one.scores, two.scores, **EXACT)
    # no room: every step ends a segment
    tight, short = (
        in_run(problem, Recipe(SGD(0.1), 3, 1, order=order), outputs, **how).datamodel
        for how in ({"every": 100, "memory": 1}, {"every": 1})
    )
    assert tight.meta["segments"] == 4
    np.testing.assert_allclose(tight.scores, short.scores, **EXACT)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_passes_multiplied_together_are_as_if_alone(name, targets, monkeypatch):
    """Each keeps its own rate, clipping and direction."""
    problem = menagerie.mlp(30)
    recipe = Recipe(replace(OPTIMIZERS[name], lr=0.02), 4, 8, schedule="cosine", clip=0.3)
    outputs = menagerie.unseen(problem, rows=3)
    outputs, counts, scores = outputs.mean() if targets == 1 else outputs, [], []
    original = Passes.products
    for bound in (2**22, 0):
        calls = []
        monkeypatch.setattr("attribution_core.stepwise.passes.JOINED", bound)
        monkeypatch.setattr(Passes, "products", lambda *a, c=calls: c.append(0) or original(*a))
        scores.append(in_run(problem, recipe, outputs, every=16).datamodel.scores)
        counts.append(len(calls))
    assert counts[1] == 60 > 2 * counts[0]  # the number of steps
    np.testing.assert_allclose(*scores, **EXACT)


@pytest.mark.parametrize("drop", ["weight", "row"])
def test_weights(drop):
    """Scores are per unit of weight: w @ scores is the change; weight 0 is 0, and so is a row never seen."""
    problem = menagerie.mlp()
    w = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    recipe = Recipe(SGD(0.1), 2, 4)
    got = in_run(problem, recipe, held_out(problem), w, drop=drop, every=1)
    assert got.datamodel.scores[1, 0] == 0
    np.testing.assert_array_equal(got.datamodel.anchor, w)
    change = got.datamodel.meta["change"][0]
    gap = w @ got.datamodel.scores[:, 0] - change
    assert gap == pytest.approx(got.datamodel.meta["remainder"][0], abs=1e-12)
    assert abs(gap) < 0.05 * abs(change)  # third order in lr: 1 % here
    plain = train(problem, recipe, w, drop=drop)
    assert all(torch.equal(got.run.params[k], v) for k, v in plain.params.items())
    if drop == "weight":
        scores, _ = dense(problem, recipe, held_out(problem), w)
        np.testing.assert_allclose(w[:, None] * got.datamodel.scores, scores, **EXACT)


def test_augmentation_is_what_the_model_saw():
    problem = menagerie.mlp()

    def shift(batch, rows, step):
        return batch[0] + 0.1 * step, batch[1]

    recipe = Recipe(SGD(0.1), 2, 2, augment=shift)
    got, rows = (
        in_run(problem, recipe, held_out(problem), engine=e).datamodel for e in ("ghost", "rows")
    )
    np.testing.assert_allclose(got.scores, rows.scores, **EXACT)
    plain = in_run(problem, replace(recipe, augment=None), held_out(problem)).datamodel
    assert not np.allclose(plain.scores, got.scores)


def test_the_problems_model_is_left_as_it_was():
    problem = menagerie.gpt2()
    before = copy.deepcopy(problem.model.state_dict())
    in_run(problem, Recipe(SGD(0.1), 2, 2), Outputs(problem.loss, problem.train).mean())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert not any(m._forward_hooks for m in problem.model.modules())


def test_segments_cover_the_run():
    ends = sorted(ends_of(100, 9))
    assert ends[-1] == 100
    for start, end in zip([0, *ends], ends, strict=False):
        assert 1 <= end - start <= min(9, max(1, start // 6))
    assert ends_of(3, 1) == {1, 2, 3}
    assert ends_of(5, 1000) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ({"accumulate": 2}, {}, "expected batches in one part, got accumulate=2"),
        ({}, {"order": 3}, "expected order 1 or 2, got 3"),
        ({}, {"every": 0}, "expected segments of at least one step or 'auto', got every=0"),
        ({}, {"engine": "fast"}, "unknown engine 'fast'"),
        ({}, {"drop": "both"}, "unknown drop 'both'"),
        ({"order": [[0, 1]]}, {"drop": "row", "weights": [0, 1, 1, 1, 1, 1]}, "explicit order"),
    ],
)
def test_arguments_that_make_no_sense(recipe, settings, message):
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match=message):
        in_run(problem, Recipe(SGD(0.1), 2, 1, **recipe), held_out(problem), **settings)


def test_other_optimizers_are_refused():
    class Own(SGD):
        pass

    problem = menagerie.mlp()
    with pytest.raises(ValueError, match=r"expected SGD, Adam or AdamW.*got Own; use one of them"):
        in_run(problem, Recipe(Own(0.1), 2, 1), held_out(problem))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), "active dropout in '1'"),
        (nn.BatchNorm1d(3), "batch norm in training mode"),
    ],
)
def test_random_and_mixing_layers_are_refused(layer, message):
    problem = menagerie.mlp()
    model = nn.Sequential(problem.model, layer).double()
    with pytest.raises(ValueError, match=message):
        in_run(
            Problem(model, problem.loss, problem.train),
            Recipe(SGD(0.1), 2, 1, masks=0),
            held_out(problem),
        )


def test_a_loss_of_nan_names_the_step():
    x, y = menagerie.mlp().train.columns
    x[4, 0] = float("nan")
    problem = Problem(menagerie.mlp().model, menagerie.mlp().loss, (x, y))
    recipe = Recipe(SGD(0.1), 2, 1, order=[[0, 1], [2, 3], [5, 4]])
    with pytest.raises(ValueError, match=r"stopped at step 2 of 3:.*rows \[4\]"):
        in_run(problem, recipe, Outputs(problem.loss, problem.train[[0, 1]]).mean())
