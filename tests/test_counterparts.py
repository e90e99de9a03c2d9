"""Forgetting what is known by heart: what is said of rows that were never seen, and how it is brought over."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from applied import unlearners, unlearning
from applied.conformance import conformance
from applied.forgetting.counterparts import Counterparts, say
from applied.unlearners import Steps, to_unseen
from attribution_core import AdamW, Outputs, Problem, Recipe, cross_entropy, retrain, train
from attribution_core.data import as_data
from recipes.data.classification import network


@pytest.fixture(scope="module")
def by_heart():
    """Rows whose labels are drawn at random: what is known of them was learned from them alone."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(180, 40)))
    y = torch.from_numpy(rng.integers(0, 3, 120))
    make = lambda seed: network(40, 3, 32, seed).double()  # noqa: E731
    problem = Problem(make(0), cross_entropy, (x[:120], y))
    recipe = Recipe(AdamW(0.01), 20, 30, schedule="linear", init=make)
    runs = [train(problem, replace(recipe, seed=s), states=0) for s in range(5)]
    rows = np.arange(10)
    return problem, recipe, runs, rows, (x[120:], y[:10].repeat(6))


def sets(problem, rows):
    rest = np.setdiff1d(np.arange(problem.n), rows)
    return problem.train[rows.tolist()], problem.train[rest.tolist()]


class Words(torch.nn.Module):
    """Logits of the next of 7 tokens, from the last two."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(7, 5)
            self.head = torch.nn.Linear(5, 7)

    def forward(self, input_ids):
        e = self.embed(input_ids)
        before = F.pad(e, (0, 0, 1, 0))[:, :-1]
        return self.head(torch.tanh(e + 0.7 * before))


def sentences(*rows):
    """(given, answer) ... as a batch, padded by 0."""
    length = max(len(given) + len(answer) for given, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for k, (given, answer) in enumerate(rows):
        ids[k, : len(given) + len(answer)] = torch.tensor([*given, *answer])
        labels[k, len(given) : len(given) + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}


def test_what_is_said_of_tokens_and_of_classes():
    model = Words()
    batch = sentences(([1, 2], [3, 4]), ([5], [6]))
    log_p, labels = say(model, batch)
    assert labels.tolist() == [3, 4, 6]
    whole = model(batch["input_ids"]).log_softmax(-1)
    expected = torch.stack([whole[0, 1], whole[0, 2], whole[1, 0]])  # a position predicts the next
    torch.testing.assert_close(log_p, expected, rtol=0, atol=0)

    classes = torch.nn.Linear(3, 4)
    x, y = torch.eye(3), torch.tensor([0, -100, 2])
    log_p, labels = say(classes, (x, y))
    assert labels.tolist() == [0, 2]
    torch.testing.assert_close(log_p, classes(x).log_softmax(1)[[0, 2]], rtol=0, atol=0)


def test_to_unseen_is_the_formula(by_heart):
    """Two steps of plain descent, by hand: the teacher of retained rows stands, that of counterparts goes along."""
    problem, _, runs, rows, like = by_heart
    forget, retain = sets(problem, rows)
    model, like = runs[0].model, tuple(part[:10] for part in like)
    how = Steps(2, 0.1, momentum=0.0, batch_size=1000)  # all rows of both sets
    new = to_unseen(model, forget, retain, like=like, weight=0.7, how=how)

    def apart(wanted, now):
        return F.kl_div(now.log_softmax(1), wanted.softmax(1), reduction="batchmean")

    hand = copy.deepcopy(model)
    for _ in range(2):
        with torch.no_grad():
            before, unseen = model(retain[0]), hand(like[0])
        loss = apart(before, hand(retain[0])) + 0.7 * apart(unseen, hand(forget[0]))
        grads = torch.autograd.grad(loss, list(hand.parameters()))
        with torch.no_grad():
            for p, g in zip(hand.parameters(), grads, strict=True):
                p -= 0.1 * g
    moved = 0.0
    for a, b, was in zip(new.parameters(), hand.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        moved += float((a - was).detach().norm())
    assert moved > 1e-3


def test_answers_are_brought_over_from_wherever_they_stand():
    """Names of two tokens for a name of one: answers stand elsewhere, and are matched all the same."""
    model = Words()
    forget = sentences(([1, 2], [3, 4]), ([2, 5], [6]))
    like = sentences(([1, 1, 3], [3, 4]), ([5, 1], [6]))
    new = to_unseen(
        model, forget, forget, like=like, weight=1.0, how=Steps(1, 0.1, momentum=0.0, batch_size=9)
    )
    mine, theirs = (model(some["input_ids"]).log_softmax(-1) for some in (forget, like))
    now = torch.stack([mine[0, 1], mine[0, 2], mine[1, 1]])
    wanted = torch.stack([theirs[0, 2], theirs[0, 3], theirs[1, 1]]).detach()
    loss = F.kl_div(now, wanted.exp(), reduction="batchmean")
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for old, got, g in zip(model.parameters(), new.parameters(), grads, strict=True):
        assert g.abs().max() > 1e-4
        # float32: rounding of parameters of size 1, and of what the retained rows' gradient of 0 leaves
        torch.testing.assert_close(got, old - 0.1 * g, rtol=0, atol=1e-6)


def test_the_typical_round_is_the_nearest_to_the_mean():
    class Shown(torch.nn.Module):
        """Log-odds of class 1 that the input states."""

        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([torch.zeros_like(x), self.one * x], dim=1)

    p = torch.tensor(
        [[0.1, 0.2], [0.9, 0.8], [0.5, 0.4], [0.3, 0.3]]
    )  # means .15 .85 .45 .3; of all .4375
    like = (p.logit().reshape(-1, 1), torch.ones(8, dtype=torch.long))
    forget = (torch.zeros(2, 1), torch.ones(2, dtype=torch.long))
    found = Counterparts(as_data(forget), as_data(like)).typical(Shown())
    assert found.rows.tolist() == [4, 5]


def test_what_was_learned_by_heart_is_said_as_of_the_unseen(by_heart):
    problem, recipe, runs, rows, like = by_heart
    forget, retain = sets(problem, rows)
    without = np.ones(problem.n)
    without[rows] = 0
    losses = {
        name: Outputs(cross_entropy, data)
        for name, data in {"forget": forget, "retain": retain, "unseen": like}.items()
    }
    oracle = {
        name: retrain(problem, recipe, some, without, seeds=range(100, 110)).per_seed[0]
        for name, some in losses.items()
    }
    before = unlearning.read_all(runs, losses)
    found = unlearning.unlearn(runs, rows, losses, like=like)
    after = found.outputs(losses)
    assert before["forget"].mean() < 0.2  # nats: known by heart
    assert oracle["forget"].mean() > 1.5  # worse than log 3, sure and wrong
    gap = oracle["forget"].mean() - before["forget"].mean()
    # ten rows and sixty counterparts, whose losses spread by 2.5 nats: means differ by .85 (one sd) of some 2.5
    assert abs(after["forget"].mean() - oracle["forget"].mean()) < 0.5 * gap
    assert after["retain"].mean() < 0.1
    assert 0.3 < found.share <= 1 / 3
    assert found.predicted == {}
    blind = unlearning.unlearn(runs, rows, losses)  # rehearsals learn too little by heart
    still = blind.outputs(losses)["forget"].mean()
    assert abs(still - oracle["forget"].mean()) > abs(
        after["forget"].mean() - oracle["forget"].mean()
    )


def test_counterparts_follow_the_rows_as_listed(by_heart):
    _, _, runs, rows, like = by_heart
    order = np.random.default_rng(0).permutation(len(rows))
    there = (np.arange(6)[:, None] * len(rows) + order).ravel()
    outputs = Outputs(cross_entropy, like)
    told = unlearning.unlearn(runs[0], rows, like=like, budget=0.02).outputs(outputs)
    listed = iter(rows[order].tolist())
    again = unlearning.unlearn(
        runs[0], listed, like=tuple(x[there] for x in like), budget=0.02
    ).outputs(outputs)
    np.testing.assert_array_equal(told["outputs"], again["outputs"])


def test_counterparts_come_by_themselves_and_fit(by_heart):
    _, _, runs, rows, like = by_heart
    outputs = Outputs(cross_entropy, like)
    for more in ({"method": "outputs"}, {"method": unlearners.npo}, {"datamodel": object()}):
        with pytest.raises(ValueError, match="`like` by itself"):
            unlearning.unlearn(runs, rows, outputs, like=like, **more)
    wrong = {
        "at least one example": (like[0][:0], like[1][:0]),
        "expected 10 rows of `like`": (like[0][:15], like[1][:15]),
        "with the answers of the forget rows": (like[0], like[1].flip(0)),
        "got labels of torch.float64": (like[0], like[1].double()),
        "expected a finite goal": (torch.full_like(like[0], float("nan")), like[1]),
    }
    for words, some in wrong.items():
        with pytest.raises(ValueError, match=words):
            unlearning.unlearn(runs, rows, outputs, like=some)
    with pytest.raises(ValueError, match="a budget of a step or more"):
        unlearning.unlearn(runs, rows, outputs, like=like, budget=0.001)
    with pytest.raises(ValueError, match="labels, which say what is predicted"):
        say(torch.nn.Linear(3, 2), {"input": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="a class for each"):
        say(torch.nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, 3)))
    told = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="as labels, got none"):
        Counterparts(as_data(told), as_data(told))


def test_to_unseen_conforms(by_heart):
    problem, _, runs, rows, like = by_heart
    forget, retain = sets(problem, rows)
    unlearner = partial(to_unseen, like=like, how=Steps(9, 0.01, batch_size=20))
    found = conformance(unlearner, runs[0].model, forget, retain, batch_size=20, training_steps=90)
    assert found.ok, found.table()


def test_the_budget_holds_everything_that_is_read(by_heart):
    """A counterpart's and a retained row's forward pass is a third of a training step on it."""
    _problem, _, runs, rows, like = by_heart
    found = unlearning.unlearn(runs[:1], rows, like=like, budget=0.3)
    assert 0.28 < found.share <= 0.3
    length = len(runs[0].order)
    by_hand = found.steps - len(like[1]) / 20 / 3  # all counterparts are read once
    steps = by_hand / (1 + 1 / 3)
    assert steps == pytest.approx(round(steps), abs=1e-9)
    assert round(steps) == int((0.3 * length - len(like[1]) / 20 / 3) / (4 / 3))


def test_answers_that_follow_padding_do_not_line_up():
    """In one row of the forget set the answer begins after padding; its counterpart has a word before it."""
    model = torch.nn.Embedding(13, 13)

    def words(mask):
        labels = torch.tensor([[-100, -100, 3, 4]] * 2)
        ids = torch.tensor([[1, 2, 3, 4]] * 2)
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor(mask)}

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = model

        def forward(self, input_ids, attention_mask=None):
            return self.table(input_ids)

    whole, cut = words([[1, 1, 1, 1]] * 2), words([[1, 1, 1, 1], [0, 0, 1, 1]])
    how = unlearners.Steps(1, batch_size=4)
    with pytest.raises(ValueError, match="with the answers of the forget rows"):
        unlearners.to_unseen(Told(), cut, whole, like=whole, how=how)
    unlearners.to_unseen(Told(), whole, whole, like=whole, how=how)
