"""attribution_core.joining: joined outputs are their parts, in values, gradients and retrainings; refusals."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    correct,
    cross_entropy,
    influence,
    join_outputs,
    knn,
    logit_margin,
    magic,
    margin,
    representation_similarity,
    retrain,
    split_outputs,
    train,
    trak,
)
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.gradients import output_gradients


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def as_dict(rows):
    return {"input": rows[0], "labels": rows[1]}


def problem():
    torch.manual_seed(0)
    return Problem(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double(), cross_entropy, rows(30, 0))  # fmt: skip


@pytest.fixture
def parts():
    return {
        "own": Outputs(margin, rows(30, 0)),
        "loss": Outputs(cross_entropy, rows(7, 1)).mean(),
        "by class": Outputs(cross_entropy, rows(6, 2)).mean(by=["a", "b", "a", "b", "a", "b"]),
    }


def test_values_and_names_are_those_of_the_parts(parts):
    model, both = problem().model, join_outputs(parts)
    assert len(both) == 33
    assert both.names[0] == "own: 0"
    assert both.names[-3:] == ("loss", "by class: a", "by class: b")
    for size in (1, 4, 32, 100):  # whatever part the rows of a batch are of
        found = split_outputs(both.evaluate(model, batch_size=size).numpy(), parts)
        for name, some in parts.items():
            # sums of other lengths: rounding
            np.testing.assert_allclose(found[name], some.evaluate(model).numpy(), atol=1e-14)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("form", [tuple, as_dict])
def test_gradients_are_those_of_the_parts(averaged, form):
    class Named(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    torch.manual_seed(0)
    model = Named(4, 3).double()
    parts = {
        "a": Outputs(margin, form(rows(5, 1))),
        "b": Outputs(cross_entropy, form(rows(20, 2))),
        "c": Outputs(margin, form(rows(2, 3))),
    }
    if averaged:
        parts = {name: some.mean() for name, some in parts.items()}
    found = output_gradients(model, join_outputs(parts), batch_size=4)
    for name in found:
        expected = torch.cat([output_gradients(model, some)[name] for some in parts.values()])
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stack", ["auto", 1])
def test_one_retraining_is_read_in_every_way(parts, stack):
    data, recipe = problem(), Recipe(SGD(0.1), 10, 2)
    parts = {**parts, "accuracy": Outputs(correct, rows(9, 4)).mean()}
    weights = np.ones((2, 30))
    weights[1, :5] = 0.0
    table = retrain(data, recipe, join_outputs(parts), weights, seeds=2, stack=stack)
    for name, values in split_outputs(table.per_seed, parts).items():
        alone = retrain(data, recipe, parts[name], weights, seeds=2)
        np.testing.assert_allclose(values, alone.per_seed, atol=1e-12)


def test_methods_score_them_like_the_parts(parts):
    run = train(problem(), Recipe(SGD(0.1), 10, 2))
    for method in (influence, magic):
        found = split_outputs(method(run, join_outputs(parts)).scores, parts)
        for name, some in parts.items():
            np.testing.assert_allclose(found[name], method(run, some).scores, rtol=1e-9, atol=1e-12)


def test_an_accuracy_has_no_part_in_a_datamodel():
    """Beside a loss its gradient would be 0, and nobody would hear of it."""
    run = train(problem(), Recipe(SGD(0.1), 10, 2))
    parts = {"loss": Outputs(cross_entropy, rows(50, 1)), "accuracy": Outputs(correct, rows(50, 1))}
    for joined in (parts, {name: some.mean() for name, some in parts.items()}):
        with pytest.raises(ValueError, match="an accuracy"):
            influence(run, join_outputs(joined))


SCORED = {
    "influence": influence,
    "trak": trak,
    "forward": lambda run, outputs: magic(run, outputs, groups=[i % 2 for i in range(30)]),
    "knn": knn,
}


@pytest.mark.parametrize("count", [5, 50])  # a pass for each, or all together
@pytest.mark.parametrize("method", SCORED.values(), ids=SCORED)
def test_an_accuracy_alone_has_no_datamodel(method, count):
    run = train(problem(), Recipe(SGD(0.1), 10, 2))
    with pytest.raises(ValueError, match="an accuracy, an argmax"):
        method(run, Outputs(correct, rows(count, 1)))


def test_what_cannot_be_joined_or_taken_apart_is_refused(parts):
    with pytest.raises(ValueError, match="a name for each, got none"):
        join_outputs({})
    x, y = rows(3, 1)
    for name, other in (
        ("wide", (torch.cat([x, x], 1), y)),
        ("single", (x.float(), y)),
        ("labels", (x, y.double())),  # put together they would all be numbers with a fraction
    ):
        with pytest.raises(ValueError, match=f"the same columns .* in {name!r}"):
            join_outputs({"own": parts["own"], name: Outputs(margin, other)})
    with pytest.raises(ValueError, match="values of 33 targets"):
        split_outputs(np.zeros((2, 32)), parts)


def test_similarities_are_those_of_the_parts():
    """Their class labels are the parts' own, not the numbers of the parts; a join of joins is taken apart."""

    def own_loss(model, batch):
        return cross_entropy(model, (batch[0], batch[1]))

    data = Problem(problem().model, own_loss, rows(30, 0))
    parts = {"a": Outputs(own_loss, rows(5, 1)), "b": Outputs(own_loss, rows(7, 2)).mean()}
    for method in (knn, representation_similarity):
        expected = np.concatenate([method(data, some).scores for some in parts.values()], axis=1)
        again = {"all": join_outputs(parts), "a": parts["a"]}
        for joined in (parts, again):
            found = method(data, join_outputs(joined)).scores[:, :6]
            np.testing.assert_allclose(found, expected, atol=1e-12)


class Bound:
    """A method is another object each time it is named."""

    calls = 0

    def loss(self, model, batch):
        Bound.calls += 1
        return cross_entropy(model, batch)


def test_one_function_is_called_once_a_batch():
    some = Bound()
    parts = {str(k): Outputs(some.loss, rows(3, k)) for k in range(4)}
    join_outputs(parts).evaluate(problem().model)
    assert Bound.calls == 1


@dataclass(frozen=True)
class Weighed:
    """Equal by what it holds, as far as tensors can be."""

    by: torch.Tensor

    def __call__(self, model, batch):
        return self.by[batch[1]] * cross_entropy(model, batch)


def test_functions_are_told_apart_by_themselves():
    """Not by what they compare equal to."""
    model = problem().model
    parts = {
        str(k): Outputs(Weighed(torch.arange(1.0, 4.0).double() * k), rows(4, 1)) for k in (1, 5)
    }
    found = split_outputs(join_outputs(parts).evaluate(model).numpy(), parts)
    np.testing.assert_allclose(found["5"], 5 * found["1"], rtol=1e-12)


def test_an_average_beside_many_rows_is_refused(monkeypatch):
    monkeypatch.setattr("attribution_core.joining.LARGEST", 30 * 31)
    parts = {"rows": Outputs(margin, rows(30, 0)), "mean": Outputs(margin, rows(1, 1)).mean()}
    with pytest.raises(ValueError, match=r"got 31 of 31 rows: join what has a target for each"):
        join_outputs(parts)


def test_a_part_that_mixes_rows_is_refused():
    def beside(model, batch):
        found = cross_entropy(model, batch)
        return found - 5 * found.mean()

    run = train(problem(), Recipe(SGD(0.1), 10, 2))
    parts = {"loss": Outputs(cross_entropy, rows(20, 1)), "beside": Outputs(beside, rows(5, 1))}
    with pytest.raises(ValueError, match="does not depend on the other rows"):
        influence(run, join_outputs(parts))


def test_prints_tell_functions_and_rows_apart():
    def joined(function, seed):
        return join_outputs({"a": Outputs(margin, rows(3, 0)), "b": Outputs(function, rows(3, seed))})  # fmt: skip

    first = fingerprint(joined(cross_entropy, 1))
    assert fingerprint(joined(cross_entropy, 1)) == first
    assert fingerprint(joined(logit_margin, 1)) != first
    assert fingerprint(joined(cross_entropy, 2)) != first
