"""Every method gives inside torch.no_grad() what it gives outside."""

import numpy as np
import pytest
import torch

from applied.unlearning import unlearn
from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    aumann_shapley,
    cross_entropy,
    fit_certified,
    in_run,
    influence,
    leave_one_out,
    magic,
    margin,
    newton,
    random_subsets,
    retrain,
    self_influence,
    source,
    tracin,
    train,
    trak,
)
from attribution_core.input_influence import gradient_matching, input_influence
from tests import menagerie

HOW = Recipe(SGD(0.1), 2, 2)
NET, LINEAR = menagerie.mlp(), menagerie.softmax()
OUT, LINEAR_OUT = (menagerie.unseen(p, margin, rows=3) for p in (NET, LINEAR))


def longer():
    """Runs that a rehearsal fits in."""
    return [train(NET, Recipe(SGD(0.1), 3, 10, seed=seed)) for seed in range(4)]


def fresh():
    """A problem of its own at every call, whose losses are looked at first."""
    problem = menagerie.mlp()
    return influence(Problem(problem.model, cross_entropy, problem.train), OUT).scores


METHODS = {
    "influence": fresh,
    "groups": lambda: influence(train(NET, HOW), OUT, groups=[0, 0, 1, 1, 2, 2]).scores,
    "inputs": lambda: input_influence(train(NET, HOW), OUT, rows=[0, 1]).scores,
    "matching": lambda: gradient_matching(train(NET, HOW), OUT.mean(), rows=[0, 1]).scores,
    "self": lambda: self_influence(train(NET, HOW)),
    "trak": lambda: trak(train(NET, HOW), OUT, projection_dim=8).scores,
    "tracin": lambda: tracin(train(NET, HOW, checkpoints=2), OUT).scores,
    "source": lambda: source(train(NET, HOW, checkpoints=2), OUT, segments=2).scores,
    "leave_one_out": lambda: leave_one_out(train(NET, HOW), OUT).scores,
    "newton": lambda: newton(LINEAR, LINEAR_OUT).predict(np.r_[0.0, np.ones(LINEAR.n - 1)]),
    "certified": lambda: fit_certified(LINEAR, sigma=0.1).remove([0]).bound,
    "magic": lambda: magic(train(NET, HOW), OUT).scores,
    "domains": lambda: magic(train(NET, HOW), OUT, wrt="domains", groups=[0, 0, 0, 1, 1, 1]).scores,
    "in_run": lambda: in_run(NET, HOW, OUT).datamodel.scores,
    "aumann_shapley": lambda: aumann_shapley(NET, HOW, OUT, points=2).scores,
    "stacked": lambda: retrain(NET, HOW, OUT, random_subsets(NET.n, 4, keep=0.5), seeds=2).per_seed,
    "unlearn": lambda: unlearn(
        longer(), [0], {"all": Outputs(margin, NET.train)}, budget=1.0
    ).predicted["all"],
}


@pytest.mark.filterwarnings("ignore")  # of models that are hardly trained: not what is asked here
@pytest.mark.parametrize("name", METHODS)
def test_no_grad_changes_nothing(name):
    outside = METHODS[name]()
    with torch.no_grad():
        inside = METHODS[name]()
    # rounding: a trial that failed inside would take another engine in silence
    np.testing.assert_allclose(inside, outside, rtol=1e-12, atol=1e-15)
