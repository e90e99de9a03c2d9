"""Unlearners step by step, and unlearning as a whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine

from applied import unlearners, unlearning
from applied.conformance import conformance
from applied.forgetting import rehearsing
from applied.forgetting.matching import KINDS, Goal
from applied.unlearners import Steps, centred_logits, match
from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    causal_lm_loss,
    cross_entropy,
    margin,
    retrain,
    squared_error,
    train,
)
from attribution_core.data import Rows, as_data
from attribution_core.rehearsal import Rehearsal
from recipes.data.classification import network
from recipes.embedded import digits

BASELINES = ("fine_tune", "gradient_ascent", "gradient_difference", "npo", "scrub")
ONE = Steps(steps=1, lr=0.1, momentum=0.0, batch_size=1000)  # all rows of both sets


@pytest.fixture(scope="module")
def trained():
    data = digits(200, 60)
    x, y = torch.tensor(data.x, dtype=torch.float64), torch.tensor(data.y)
    rows = np.flatnonzero(data.y == 1)
    problem = Problem(network(64, 10, 8, 0).double(), cross_entropy, (x, y))
    make = lambda seed: network(64, 10, 8, seed).double()  # noqa: E731
    recipe = Recipe(SGD(0.1, momentum=0.9), 50, 40, init=make)
    held = (torch.tensor(data.test_x[:20]), torch.tensor(data.test_y[:20]))
    outputs = {
        "forget": Outputs(margin, (x[rows], y[rows])),
        "retain": Outputs(margin, (x[:40], y[:40])),
        "validation": Outputs(margin, held),
    }
    runs = [train(problem, replace(recipe, seed=s), states=0) for s in range(5)]
    return problem, recipe, runs, rows, outputs


def sets(problem, rows):
    rest = np.setdiff1d(np.arange(problem.n), rows)
    return problem.train[rows.tolist()], problem.train[rest.tolist()]


def moved(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.cat([(b - a).flatten() for a, b in pairs]).detach()


def slope(model, data):
    loss = cross_entropy(model, data).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_conform(trained, name):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    unlearner = partial(getattr(unlearners, name), how=Steps(4, 0.01, batch_size=20))
    found = conformance(unlearner, runs[0].model, forget, retain, batch_size=50, training_steps=80)
    assert found.ok, found.table()
    a, b = (unlearner(runs[0].model, forget, retain) for _ in range(2))
    assert (moved(a, b) == 0).all()  # a seed says which batches


def test_one_step_is_the_formula(trained):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    model = runs[0].model
    f, r = slope(model, forget), slope(model, retain)
    expected = {
        "fine_tune": -r,
        "gradient_ascent": f,
        "gradient_difference": f - r,
        "npo": f - r,  # at π = π₀ its gradient is that of ascent
        "scrub": 0 * f,  # at π = π₀ the divergence is least: its first step goes nowhere
    }
    for name, direction in expected.items():
        new = getattr(unlearners, name)(model, forget, retain, how=ONE)
        # float64; sums over rows in another order
        torch.testing.assert_close(moved(model, new), 0.1 * direction, rtol=0, atol=1e-12)


def test_npo_fades_where_ascent_grows(trained):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    how = Steps(60, 0.02, batch_size=50)
    up = unlearners.gradient_ascent(runs[0].model, forget, retain, how=how)
    bounded = unlearners.npo(runs[0].model, forget, retain, how=how)
    losses = [cross_entropy(m, forget).mean().detach().item() for m in (runs[0].model, bounded, up)]
    assert losses[0] + 1 < losses[1] < losses[2]


def test_matching_own_logits_moves_nothing_and_others_are_reached(trained):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    model, other = runs[0].model, runs[1].model
    logits = lambda m, data: m(data[0]).detach()  # noqa: E731
    own = {"forget_logits": logits(model, forget) + 3.0, "retain_logits": logits(model, retain)}
    still = match(model, forget, retain, **own)  # a shift of all classes is none
    assert moved(model, still).abs().max() < 1e-12
    theirs = {"forget_logits": logits(other, forget), "retain_logits": logits(other, retain)}
    new = match(model, forget, retain, **theirs, how=Steps(600, 0.02, momentum=0.9, decay=True))

    def apart(m):
        off = logits(m, forget) - logits(other, forget)
        return float((off - off.mean(1, keepdim=True)).square().mean())

    assert apart(new) < 0.05 * apart(model)  # oracle matching
    with pytest.raises(ValueError, match="one row of forget_logits"):
        match(
            model,
            forget,
            retain,
            forget_logits=own["retain_logits"],
            retain_logits=own["retain_logits"],
        )
    with pytest.raises(ValueError, match="logits of shape"):
        match(
            model,
            forget,
            retain,
            forget_logits=own["forget_logits"][:, :5],
            retain_logits=own["retain_logits"],
        )
    with pytest.raises(ValueError, match="smaller lr"):
        match(model, forget, retain, **theirs, how=Steps(50, 1e20, momentum=0.9))


def test_logits_of_a_sequence_count_where_a_next_token_is_predicted():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(7, 7)

        def forward(self, input_ids):
            return self.table(input_ids)

    tokens = torch.tensor([[1, 2, 3, 4], [1, 5, 0, 0]])
    labels = torch.tensor([[1, 2, 3, 4], [1, 5, -100, -100]])
    z, counts = centred_logits(Bigram(), {"input_ids": tokens, "labels": labels})
    assert counts.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert z.shape == (2, 4, 7)
    assert z.sum(-1).abs().max() < 1e-5


def test_auto_forgets_a_class_and_keeps_to_its_budget(trained):
    problem, recipe, runs, rows, outputs = trained
    kept = [{k: v.clone() for k, v in run.params.items()} for run in runs]
    found = unlearning.unlearn(runs, rows, outputs, budget=0.5)
    weights = np.ones(problem.n)
    weights[rows] = 0
    oracle = {
        name: retrain(problem, recipe, some, weights, seeds=range(100, 110)).per_seed[0]
        for name, some in outputs.items()
    }
    before = unlearning.read_all(runs, outputs)
    judged = unlearning.evaluate(
        {"models": found.outputs(outputs), "predicted": found.predicted}, oracle, before
    )
    nothing = np.abs(before["forget"].mean(0) - oracle["forget"].mean(0)).mean()
    assert judged.margin_error("predicted") < 0.35 * nothing
    assert judged.margin_error("models") < 0.45 * nothing
    assert found.share <= 0.5 + 1e-9
    assert len(found.models) == 5
    assert all(
        torch.equal(run.params[k], v)
        for run, old in zip(runs, kept, strict=True)
        for k, v in old.items()
    )
    again = unlearning.unlearn(runs, rows, outputs, budget=0.5)
    assert (moved(found.models[2], again.models[2]) == 0).all()


def test_clean_rows_gain_what_wrong_labels_took_without_overshoot():
    """Wine: rehearsals of fewer, longer steps, begun near the trained model, said about twice the true 4 nats."""
    x, y = load_wine(return_X_y=True)
    pick = np.random.default_rng(1).permutation(len(x))[:120]
    x, y = (x[pick] - x[pick].mean(0)) / x[pick].std(0), y[pick]
    rows = np.arange(6)
    y[rows] = (y[rows] + 1) % 3
    make = lambda seed: network(13, 3, 16, seed).double()  # noqa: E731
    problem = Problem(make(0), cross_entropy, (torch.tensor(x), torch.tensor(y)))
    recipe = Recipe(SGD(0.05, momentum=0.9), 20, 30, schedule="linear", init=make)
    outputs = Outputs(margin, (torch.tensor(x[6:]), torch.tensor(y[6:])))
    runs = [train(problem, replace(recipe, seed=s), states=0) for s in range(10)]
    weights = np.ones(120)
    weights[rows] = 0
    oracle = retrain(problem, recipe, outputs, weights, seeds=range(100, 120)).per_seed[0].mean(0)
    before = unlearning.read_all(runs, outputs)["outputs"].mean(0)
    for several in (runs, runs[:5]):  # on batches of 10 and of 5 rows instead of 20
        found = unlearning.unlearn(several, rows, outputs, method="outputs")
        shift = found.predicted["outputs"] - unlearning.read_all(several, outputs)["outputs"]
        assert (
            np.abs(shift.mean(0) + before - oracle).mean() < 0.35 * np.abs(oracle - before).mean()
        )
        assert found.share <= 0.2 + 1e-9


@pytest.mark.parametrize("runs", [1, 2, 5, 9, 20, 25, 50, 100, 500])
@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
def test_the_forget_set_is_never_retrained_in_full(trained, runs, models, budget):
    """Whatever the budget: pairs on half batches, which cost a training each, and more of them."""
    several = [trained[2][0]] * runs
    pace, pairs = rehearsing.plan_rehearsals(several, budget, None, models)
    assert pace.share <= 0.5
    assert min(2, runs) <= pairs <= runs
    assert pairs * pace.cost(several[0]) <= runs * budget * len(several[0].order) * (
        0.7 if models else 1
    )


def test_batches_of_one_row_have_no_smaller_ones(trained):
    run = replace(trained[2][0], order=[rows[:1] for rows in trained[2][0].order])
    with pytest.raises(ValueError, match="two rows or more"):
        unlearning.unlearn(run, [0, 1])


def test_a_change_that_is_all_noise_leaves_models_alone(trained, monkeypatch):
    _, _, runs, rows, outputs = trained
    noise = torch.tensor(np.random.default_rng(0).normal(size=(2, 20_000)))

    def rehearsed(several, weights, read, **_):
        size = len(read(several[0].model))
        one, other = noise[:, :size]
        changes = torch.stack([one, other - one / 2])  # they agree in places, by chance
        return Rehearsal(changes, torch.zeros_like(changes), 0.0)

    monkeypatch.setattr(rehearsing, "rehearse", rehearsed)
    with pytest.warns(unlearning.UnlearningWarning, match="have forgotten nothing"):
        found = unlearning.unlearn(runs[:2], rows, outputs, budget=0.5)
    assert moved(runs[0].model, found.models[0]).abs().max() < 1e-12
    assert found.meta["missed"] in (0.0, 1.0)  # nothing was wanted, or all of it is missed


@pytest.mark.filterwarnings("ignore:rehearsals learn less than half")
def test_one_run_is_enough(trained):
    _, _, runs, rows, outputs = trained
    with pytest.warns(unlearning.UnlearningWarning, match="with a single run the noise cannot"):
        found = unlearning.unlearn(runs[0], rows, outputs, budget=0.6)
    assert found.share <= 0.6 + 1e-9
    change = (
        found.outputs(outputs)["forget"].mean()
        - unlearning.read_all(runs[:1], outputs)["forget"].mean()
    )
    assert change < -2
    assert found.model is found.models[0]
    assert 0 < found.meta["missed"] < 1  # of the squared change of logits


def test_rehearsals_far_behind_the_runs_are_told(trained, monkeypatch):
    """Of logits √(mean square) 2 rehearsals miss 1.5."""
    none = torch.zeros(2, 4, 3)
    found = Rehearsal(none, none + 1.5, 0)
    assert rehearsing._behind(found, 2 * torch.ones(4, 3)) == pytest.approx(0.75)
    assert rehearsing._behind(Rehearsal(none, none, 0), none[0]) == 0
    _, _, runs, rows, outputs = trained
    monkeypatch.setattr(rehearsing, "BEHIND", 10.0)
    behind = unlearning.unlearn(runs, rows, outputs).meta["behind"]  # in silence
    monkeypatch.setattr(rehearsing, "BEHIND", behind / 2)
    with pytest.warns(
        unlearning.UnlearningWarning, match="learn less than half of what the runs did"
    ):
        unlearning.unlearn(runs, rows, outputs)


def test_logits_are_believed_where_either_part_is_told_from_noise():
    """The labels' logits move alike in both pairs, the others against one another, or the other way around."""
    rows, classes = 6, 3
    labels = torch.zeros(rows, dtype=torch.long)
    data = Rows(as_data((torch.zeros(rows, 2), labels)), np.arange(rows))
    reader = rehearsing._Reader({}, Goal(data, data))
    changes = torch.zeros(2, 2, rows, classes)
    changes[0, :, :, 0] = torch.tensor([1.0, 1.1])[:, None]  # the labels' alike, the others not
    changes[0, :, :, 1] = torch.tensor([1.0, -1.0])[:, None]
    changes[1, :, :, 0] = torch.tensor([1.0, -1.0])[:, None]  # and the other way around
    changes[1, :, :, 1] = torch.tensor([10.0, 11.0])[:, None]
    # 1 - s^2 / mean^2: labels of the first .005 / 1.05^2, all of the second (2 + .5) / 10.5^2
    expected = 1 - 0.005 / 1.05**2, 1 - 2.5 / 10.5**2
    for some, trust in zip(changes, expected, strict=True):
        found = reader.trust({name: Rehearsal(some, torch.zeros_like(some), 0) for name in KINDS})
        assert found == pytest.approx(dict.fromkeys(KINDS, trust), rel=1e-5)


def test_outputs_alone_cost_no_models(trained):
    _, _, runs, rows, outputs = trained
    found = unlearning.unlearn(runs, rows, outputs["forget"], method="outputs")
    assert not found.models
    assert found.share <= 0.2 + 1e-9
    said = f"predicted outputs, {found.share:.2g} of a training each"
    assert repr(found) == f"Unlearned({len(rows)} rows, 0 models, {said})"
    with pytest.raises(ValueError, match="expected one model"):
        _ = found.model
    shift = found.predicted["outputs"] - unlearning.read_all(runs, outputs["forget"])["outputs"]
    assert np.ptp(shift, axis=0).max() < 1e-12  # the mean change, for every run
    assert shift.mean() < -2


def test_any_datamodel_predicts_and_is_matched(trained):
    _problem, _, runs, rows, outputs = trained
    rng = np.random.default_rng(0)
    f = LinearDatamodel(rng.normal(size=(200, len(rows))), np.zeros(len(rows)), np.ones(200))
    found = unlearning.unlearn(runs, rows, outputs["forget"], method="outputs", datamodel=f)
    before = unlearning.read_all(runs, outputs["forget"])["outputs"]
    np.testing.assert_allclose(
        found.predicted["outputs"], before - f.scores[rows].sum(0), rtol=0, atol=1e-12
    )
    rest = unlearning.retained(runs[0], rows)
    nothing = (torch.zeros(len(rows), 10), torch.zeros(len(rest), 10))
    same = unlearning.unlearn(runs[:2], rows, change=nothing)
    assert moved(runs[0].model, same.models[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="a datamodel for each"):
        unlearning.unlearn(runs, rows, outputs, method="outputs", datamodel=f)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ((-1, 10), r"forget logits, of shape \(\d+, 10\), got"),
        ((0, 9), r"got \(\d+, 9\)"),
        (float("nan"), "with NaN"),
    ],
)
def test_changes_that_do_not_fit_are_refused(trained, forget, message):
    _, _, runs, rows, _ = trained
    rest = unlearning.retained(runs[0], rows)
    change = torch.zeros(len(rows), 10)
    if isinstance(forget, tuple):
        change = torch.zeros(len(rows) + forget[0], forget[1])
    else:
        change[0, 0] = forget
    with pytest.raises(ValueError, match=message):
        unlearning.unlearn(runs, rows, change=(change, torch.zeros(len(rest), 10)))


def test_an_unlearner_of_ones_own_is_counted(trained):
    _problem, _, runs, rows, outputs = trained
    method = partial(unlearners.fine_tune, how=Steps(8, 0.01, batch_size=25))
    found = unlearning.unlearn(runs[:2], rows, method=method)
    assert found.steps == 8 * 25 / 50
    assert found.share == found.steps / len(runs[0].order)
    assert found.meta["method"] == "fine_tune"
    assert found.outputs(outputs)["retain"].shape == (2, 40)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget": []}, "some, not all"),
        ({"forget": [1, 1]}, "each once"),
        ({"forget": [200]}, r"0 \.\. 199"),
        ({"forget": range(200)}, "some, not all"),
        ({"forget": [0.5]}, "row numbers"),
        ({"budget": 0}, "budget in"),
        ({"budget": 1e-4}, "raise `budget`"),
        ({"method": "magic"}, "'auto', 'outputs' or an unlearner"),
        ({"method": "outputs"}, "expected outputs"),
        ({"runs": []}, "at least one run"),
    ],
)
def test_what_cannot_be_unlearned_says_so(trained, changed, message):
    given = {"runs": trained[2][:1], "forget": [0, 1], **changed}
    with pytest.raises(ValueError, match=message):
        unlearning.unlearn(**given)


def test_runs_that_never_saw_the_set_are_refused(trained):
    problem, recipe, _, rows, _ = trained
    weights = np.ones(200)
    weights[rows] = 0
    run = train(problem, recipe, weights, drop="row", states=0)
    with pytest.raises(ValueError, match="never saw them"):
        unlearning.unlearn(run, rows)


def test_clips_are_absolute_but_for_matching(trained):
    """SCRUB begins at a stationary point: norms of its first gradient would be none to clip by."""
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    model = runs[0].model
    how = Steps(10, 0.01, momentum=0.0, clip=1e-3, batch_size=20)
    assert (
        1e-6
        < moved(model, unlearners.scrub(model, forget, retain, how=how)).norm()
        <= 10 * 0.01 * 1e-3
    )


def test_a_datamodel_predicts_at_the_exposure_of_its_run(trained):
    problem, recipe, _, rows, outputs = trained
    run = train(problem, recipe, exposure=0.5, states=0)
    rng = np.random.default_rng(0)
    kept = outputs["retain"]
    f = LinearDatamodel(rng.normal(size=(problem.n, len(kept))), np.zeros(len(kept)), run.anchor)
    found = unlearning.unlearn(run, rows, kept, method="outputs", datamodel=f)
    moved = found.predicted["outputs"] - unlearning.read_all([run], kept)["outputs"]
    np.testing.assert_allclose(moved[0], -0.5 * f.scores[rows].sum(0), rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none(trained, share):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    z = torch.zeros(len(rows), 10), torch.zeros(problem.n - len(rows), 10)
    settings = {"forget_logits": z[0], "retain_logits": z[1], "share": share}
    with pytest.raises(ValueError, match=r"expected a share in \(0, 1\]"):
        match(runs[0].model, forget, retain, **settings)


def test_a_retained_row_is_in_every_batch(trained):
    problem, _, runs, rows, _ = trained
    forget, retain = sets(problem, rows)
    z = torch.zeros(len(rows), 10).double(), torch.zeros(problem.n - len(rows), 10).double()
    settings = {"forget_logits": z[0], "retain_logits": z[1], "share": 1.0}
    for batch in (2, len(rows)):
        made = match(runs[0].model, forget, retain, how=Steps(1, 0.1, batch_size=batch), **settings)
        assert moved(runs[0].model, made).abs().max() > 0
    with pytest.raises(ValueError, match="batches of two rows or more"):
        match(runs[0].model, forget, retain, how=Steps(1, 0.1, batch_size=1), **settings)


# --- one output, and sequences without labels ---------------------------------------------------------


@pytest.mark.parametrize("shape", ["column", "flat"])
def test_a_regression_forgets(shape):
    """One output alone is no softmax's: nothing of it may be centred away."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 12), torch.nn.GELU(), torch.nn.Linear(12, 1)
            )

        def forward(self, x):
            return self.net(x) if shape == "column" else self.net(x)[:, 0]

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(120, 4, generator=rng).double()
    y = x.sum(1)
    y[:12] = 4 - y[:12]  # to forget: rows that pull another way
    problem = Problem(One().double(), squared_error, (x, y[:, None] if shape == "column" else y))
    recipe = Recipe(SGD(0.02, 0.9), 20, 20)
    runs = [train(problem, replace(recipe, seed=seed), states=0) for seed in range(4)]
    read = {"forget": Outputs(lambda model, batch: model(batch[0]).reshape(-1), problem.train[list(range(12))])}  # fmt: skip
    found = unlearning.unlearn(runs, range(12), read, budget=0.5)
    weights = np.r_[np.zeros(12), np.ones(108)]
    oracle = retrain(problem, recipe, read["forget"], weights, seeds=range(9, 15)).per_seed[0]
    before, after = unlearning.read_all(runs, read), found.outputs(read)
    missed = [np.abs(some["forget"].mean(0) - oracle.mean(0)).mean() for some in (before, after)]
    assert missed[1] < 0.4 * missed[0]  # by hand: .1 to .2


def sequences(more=0):
    """Ten rows for a tiny GPT-2, padded on the right, with `more` further places of padding."""
    from tests import menagerie

    problem = menagerie.gpt2(10, 7 - more)
    ids = menagerie.gpt2(10, 5).train.columns["input_ids"]
    ids = torch.cat([ids, torch.zeros(10, 3, dtype=torch.long)], 1)[:, : 5 + more]
    mask = (torch.arange(5 + more) < 5).long().expand(10, -1)
    return replace(problem, train={"input_ids": ids, "attention_mask": mask}, loss=causal_lm_loss)


def test_sequences_without_labels_predict_themselves():
    problem = sequences()
    runs = [train(problem, Recipe(SGD(0.5), 5, 4, seed=k), states=0) for k in range(2)]
    outputs = Outputs(causal_lm_loss, problem.train)
    assert len(unlearning.unlearn(runs, [1, 2], outputs, budget=0.9).models) == 2


@pytest.mark.parametrize("name", BASELINES)
def test_padding_changes_no_unlearner(name):
    moved = []
    for more in (0, 2):
        problem = sequences(more)
        forget, retain = problem.train[[0, 1]], problem.train[list(range(2, 10))]
        how = Steps(4, 0.05, momentum=0.0, batch_size=4)
        new = getattr(unlearners, name)(
            sequences(0).model, forget, retain, loss=causal_lm_loss, how=how
        )
        moved.append(torch.cat([p.flatten() for p in new.parameters()]))
    # sums of five or seven terms, of which two are 0
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-12)


def test_models_are_no_runs(trained):
    _, _, runs, rows, outputs = trained
    with pytest.raises(ValueError, match=r"expected runs of `train`.*got"):
        unlearning.unlearn([runs[0].model], rows, outputs)
    some = unlearning.unlearn((run for run in runs[:2]), rows, method=unlearners.fine_tune)
    assert len(some.models) == 2


# --- outputs that are no classes, runs that do not go together ----------------------------------------


def shifted(loss, targets):
    """Runs of two outputs whose first 12 rows pull both of them the same way."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(160, 4, generator=rng).double()
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 2)
    ).double()
    problem = Problem(net, loss, (x, targets(x)))
    recipe = Recipe(SGD(0.05, 0.9), 20, 20)
    return problem, recipe, [train(problem, replace(recipe, seed=s), states=0) for s in range(4)]


def lifted(x):
    y = torch.stack([x.sum(1), x[:, 0]], 1)
    return y + torch.where(torch.arange(len(y)) < 12, 2.0, 0.0)[:, None]


def yes_and_no(model, batch):
    """Labels of which any number is true."""
    from torch.nn import functional as F

    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none").sum(1)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(squared_error, lifted), (yes_and_no, lambda x: (lifted(x) > 0.5).double())],
)
def test_outputs_that_move_alike_are_forgotten(loss, targets):
    """What softmax does not see is what a regression of several outputs says."""
    problem, recipe, runs = shifted(loss, targets)

    def total(model, batch):
        return model(batch[0]).sum(1)

    read = {"forget": Outputs(total, problem.train[list(range(12))])}
    found = unlearning.unlearn(runs, range(12), read, budget=0.5)
    weights = np.r_[np.zeros(12), np.ones(148)]
    oracle = retrain(problem, recipe, read["forget"], weights, seeds=range(9, 15)).per_seed[0]
    before, after = unlearning.read_all(runs, read), found.outputs(read)
    missed = [np.abs(some["forget"].mean(0) - oracle.mean(0)).mean() for some in (before, after)]
    assert missed[1] < 0.6 * missed[0]
    x, y = problem.train[list(range(160))]
    sets = (x[:12], y[:12]), (x[12:], y[12:])
    z = [runs[0].model(part[0]).detach() + 5 for part in sets]
    how = Steps(60, 0.05, 0.9, 40)
    nearer = match(runs[0].model, *sets, forget_logits=z[0], retain_logits=z[1], how=how)
    assert (nearer(x) - runs[0].model(x)).mean() > 1
    with pytest.raises(ValueError, match="labels of classes"):
        unlearners.scrub(runs[0].model, *sets, loss=loss)

    def lower(model, forget, retain):
        import copy

        new = copy.deepcopy(model)
        with torch.no_grad():
            new[2].bias -= 1
        return new

    assert conformance(lower, runs[0].model, *sets, batch_size=20, training_steps=160).ok


def test_runs_at_other_weights_are_refused():
    problem, recipe, runs = shifted(squared_error, lifted)
    other = train(problem, recipe, np.r_[np.ones(100), np.zeros(60)], states=0)
    with pytest.raises(ValueError, match="run 1 at other weights"):
        unlearning.unlearn([runs[0], other], range(12))


# --- models that draw -----------------------------------------------------------------------------------


def with_dropout(seed=0):
    torch.manual_seed(seed)
    middle = [torch.nn.ReLU(), torch.nn.Dropout(0.5)]
    return torch.nn.Sequential(torch.nn.Linear(5, 16), *middle, torch.nn.Linear(16, 3)).double()


def rows_of_classes(n, seed):
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=drawn, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=drawn)


DRAWING = {
    "fine_tune": unlearners.fine_tune,
    "npo": unlearners.npo,
    "scrub": unlearners.scrub,
    "to_unseen": partial(
        unlearners.to_unseen, like=(rows_of_classes(8, 3)[0], rows_of_classes(8, 1)[1])
    ),
    "match": partial(match, forget_logits=torch.zeros(8, 3), retain_logits=torch.ones(30, 3)),
}


@pytest.mark.parametrize("name", DRAWING)
def test_dropout_is_drawn_by_the_seed_of_the_steps(name):
    model, forget, retain = with_dropout().train(), rows_of_classes(8, 1), rows_of_classes(30, 2)
    made = []
    for own, outer in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        how = Steps(3, 0.01, batch_size=100 if name != "to_unseen" else 24, seed=own)
        made.append(DRAWING[name](model, forget, retain, how=how))
        assert torch.equal(torch.get_rng_state(), before)
    assert made[0].training
    assert (moved(made[0], made[1]) == 0).all()  # the same masks, to the bit
    assert moved(made[0], made[2]).abs().max() > 0


def test_a_teacher_answers_without_dropout():
    """A student that draws masks follows what is said without any, not another draw."""
    model, retain = with_dropout().train(), rows_of_classes(30, 2)
    stay = partial(unlearners.scrub, away=0.0, weight=0.0, how=ONE)
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, z):
            seen.append(self.training)
            return z

    watched = torch.nn.Sequential(Watched(), model).train()
    for unlearner in (stay, partial(unlearners.npo, how=ONE)):
        seen.clear()
        unlearner(watched, retain, retain)
        assert seen[0] is False  # the teacher, asked first
        assert seen[1] is True
    seen.clear()
    like = (rows_of_classes(30, 3)[0], retain[1])
    unlearners.to_unseen(watched, retain, retain, like=like, how=ONE)
    # which counterparts are typical, the teacher, the student
    assert seen[:3] == [False, False, True]
    # where the student does not draw either, it has nothing to follow
    still = model.eval()
    # float64: softmax of equal logits differs by its rounding
    assert moved(still, stay(still, retain, retain)).abs().max() < 1e-12


# --- errors in words ------------------------------------------------------------------------------------


def test_what_cannot_descend_says_so():
    model, forget, retain = with_dropout(), rows_of_classes(8, 1), rows_of_classes(30, 2)
    frozen = with_dropout().requires_grad_(False)
    with pytest.raises(ValueError, match="none that requires_grad"):
        unlearners.fine_tune(frozen, forget, retain)
    with pytest.raises(ValueError, match=r"the model's precision, float32, got .*; convert either"):
        unlearners.fine_tune(model.float(), forget, retain)


def test_a_single_model_or_run_is_read_as_one(trained):
    _, _, runs, _, outputs = trained
    several = unlearning.read_all(runs[:1], outputs["retain"])["outputs"]
    model = torch.nn.Sequential(runs[0].model)  # which has a length
    for one in (runs[0], model, [model], torch.nn.ModuleList([model])):
        found = unlearning.read_all(one, outputs["retain"])["outputs"]
        np.testing.assert_array_equal(found, several)


def test_logits_to_match_may_be_arrays():
    model, forget, retain = with_dropout(), rows_of_classes(8, 1), rows_of_classes(30, 2)
    wanted = {"forget_logits": np.zeros((8, 3)), "retain_logits": np.ones((30, 3))}
    tensors = {name: torch.from_numpy(z) for name, z in wanted.items()}
    made = [match(model, forget, retain, **z, how=ONE) for z in (wanted, tensors)]
    assert (moved(*made) == 0).all()
