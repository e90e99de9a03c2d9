"""The work of value_data.py: rows and owners valued in several ways, and what retraining says of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from applied import valuation
from applied.payment import SignWarning
from applied.recipe import Verified, verify
from applied.valuation import Payments, Values
from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Recipe,
    RetrainingTable,
    all_subsets,
    aumann_shapley,
    correct,
    cross_entropy,
    fit_datamodel,
    in_run,
    influence,
    join_outputs,
    knn_values,
    margin,
    permutation_subsets,
    random_subsets,
    retrain,
    split_outputs,
    train,
)
from recipes.command import bar, forget_report
from recipes.data.classification import Classification, problem_of

if TYPE_CHECKING:
    from recipes.value_data import Flags

CLEAN = "held-out targets"  # what some methods need and others do not
NEIGHBOURS = 5
ENOUGH, MOST_SEEDS = 60, 10  # trainings of all sets of owners together: seconds, stacked
PERMUTATIONS = 64  # of owners, where there are too many to list all sets


@dataclass(frozen=True, eq=False)
class Study:
    """What all steps share: the data, how it is trained on, what is predicted and what judges."""

    flags: Flags
    data: Classification
    problem: Any
    recipe: Recipe
    target: Outputs  # mean loss of the target rows
    test: Outputs  # mean loss of the test rows

    def retrain(self, weights: Any, **settings: Any) -> RetrainingTable:
        """On rows really removed, judged by the test rows; kept in the folder."""
        given = {
            "folder": self.flags.out / "retraining", "jobs": self.flags.jobs,
            "progress": bar("retraining"), **settings,
        }  # fmt: skip
        outputs = given.pop("outputs", self.test)
        return retrain(self.problem, self.recipe, outputs, weights, **given)


@dataclass(frozen=True, eq=False)
class Valued:
    """Rows valued: name -> values of which high is good; whether a method needs held-out targets."""

    found: dict[str, Values]
    needs: dict[str, str]
    datamodel: LinearDatamodel  # of the mean target loss, by retrainings and influence
    remainder: float  # of f(1) − f(0), what the metagradients' points left to be shared


@dataclass(frozen=True, eq=False)
class Owned:
    """Owners valued: by real retraining first, then by datamodels; what they are paid, who is bought, or why not."""

    found: dict[str, Values]
    payments: Payments | str
    bought: Verified | str


def start(flags: Flags, data: Classification) -> Study:
    """The problem, the recipe and the outputs."""
    import torch

    problem, make = problem_of(data, flags.width, flags.weight_decay)
    size = min(flags.batch_size, problem.n)
    optimizer = SGD(flags.lr, momentum=0.9)
    recipe = Recipe(optimizer, size, flags.epochs, schedule="linear", init=make)
    held = [
        Outputs(cross_entropy, (torch.tensor(x), torch.tensor(y))).mean()
        for x, y in ((data.target_x, data.target_y), (data.test_x, data.test_y))
    ]
    return Study(flags, data, problem, recipe, *held)


def halves(flags: Flags, n: int) -> NDArray[np.float64]:
    """Weights [retrainings, n] of the random halves that held-out readings are made of."""
    return random_subsets(n, flags.retrainings, keep=0.5, seed=flags.seed)


def readings(study: Study) -> tuple[RetrainingTable, RetrainingTable]:
    """Retrainings on random halves: (margins of the training rows themselves, mean target loss)."""
    import torch

    flags, data = study.flags, study.data
    own = Outputs(margin, (torch.tensor(data.x), torch.tensor(data.y)))
    parts = {"own": own, "target": replace(study.target, matrix=None, names=())}
    table = study.retrain(
        halves(flags, len(own)),
        seeds=[0],
        outputs=join_outputs(parts),
        folder=flags.out / "halves",
        progress=bar("random halves"),
    )
    found = split_outputs(table.per_seed, parts)
    target = found["target"].mean(2, keepdims=True)
    return replace(table, per_seed=found["own"]), replace(table, per_seed=target)


def value_rows(study: Study) -> Valued:
    """Every row by every method; of losses the values are turned, so that high is good."""
    flags, data = study.flags, study.data
    own, losses = readings(study)
    prior = influence(train(study.problem, study.recipe, exposure=0.5), study.target)
    fitted = fit_datamodel(losses, prior=prior)
    path = aumann_shapley(
        study.problem, study.recipe, study.target, points=flags.points,
        folder=flags.out / "aumann_shapley", progress=bar("metagradients"),
    )  # fmt: skip
    during = in_run(study.problem, study.recipe, study.target, progress=bar("in-run"))
    neighbours = knn_values(data.x, data.y, data.target_x, data.target_y, k=NEIGHBOURS)
    rng = np.random.default_rng([flags.seed, 7])
    nothing = Values(rng.normal(size=len(data.x)), *_unknown(len(data.x)), kind="random")
    found = {
        "held-out margin": (valuation.held_out(own), ""),
        "self-confidence (control)": (
            valuation.self_confidence(data.x, data.y, seed=flags.seed),
            "",
        ),
        "Aumann–Shapley": (-valuation.values(path), CLEAN),
        "retrainings + influence": (-valuation.values(fitted), CLEAN),
        "influence": (-valuation.values(prior), CLEAN),
        "in-run": (-valuation.values(during.datamodel), CLEAN),
        "kNN-Shapley": (valuation.values(neighbours), CLEAN),
        "random (control)": (nothing, ""),
    }
    forget_report(flags.out)
    (flags.out / "owners.csv").unlink(missing_ok=True)  # of an earlier run
    for name, (values, _) in found.items():
        file = "".join(c if c.isalnum() else "-" for c in name.split(" (")[0].lower())
        replace(values, players=data.places).save(flags.out / f"rows-{file}.parquet")
    needs = {name: what for name, (_, what) in found.items()}
    best = {name: values for name, (values, _) in found.items()}
    return Valued(best, needs, fitted, path.meta["remainder"][0])


def _unknown(n: int) -> tuple[Any, Any, Any]:
    return np.full(n, np.nan), np.arange(n), np.zeros((n, 1))


Removed = dict[str, NDArray[np.float64]]  # method -> [seeds, 1 + shares], the whole set first


def judge(study: Study, valued: Valued) -> tuple[Removed, Removed]:
    """(Test loss, accuracy) [seeds, 1 + shares] without the worst rows, by method; the first column is the whole set."""

    flags, n = study.flags, study.problem.n
    rows = [np.ones(n)]
    for values in valued.found.values():
        order = np.argsort(values.values, kind="stable")
        for share in flags.remove:
            weights = np.ones(n)
            weights[order[: round(share * n)]] = 0.0
            rows.append(weights)
    parts = {"loss": study.test, "right": replace(study.test, function=correct)}
    table = study.retrain(
        rows,
        seeds=flags.seeds,
        outputs=join_outputs(parts),
        folder=flags.out / "without",
        progress=bar("without the worst"),
    )
    loss, right = (
        part[:, :, 0].T for part in split_outputs(table.per_seed, parts).values()
    )  # [seeds, rows]
    return _by_method(loss, valued, len(flags.remove)), _by_method(right, valued, len(flags.remove))


def _by_method(read: NDArray[Any], valued: Valued, many: int) -> Removed:
    """[seeds, rows] as method -> [seeds, 1 + many]."""
    return {
        name: np.concatenate([read[:, :1], read[:, 1 + k * many : 1 + (k + 1) * many]], axis=1)
        for k, name in enumerate(valued.found)
    }


def value_owners(study: Study, valued: Valued) -> Owned | None:
    """Owners by retraining on sets of them, by the two datamodels; payments and a purchase."""
    flags, labels = study.flags, study.data.owners
    count = len(np.unique(labels))
    if count < 2:
        return None
    exact = count <= flags.exact
    sets = (
        all_subsets(labels) if exact else permutation_subsets(labels, PERMUTATIONS, seed=flags.seed)
    )
    table = study.retrain(
        sets,
        seeds=seeds_of_owners(flags.seeds, len(sets)),
        outputs=study.target,
        folder=flags.out / "owners",
        progress=bar("sets of owners"),
    )
    path = LinearDatamodel(
        -valued.found["Aumann–Shapley"].per_target, np.zeros(1), np.ones(study.problem.n)
    )
    found = {
        "retraining": -valuation.values(table, owners=labels),
        "Aumann–Shapley": -valuation.values(path, owners=labels),
        "retrainings + influence": -valuation.values(valued.datamodel, owners=labels),
    }
    worth = found["retraining"]
    worth.save(flags.out / "owners.csv")
    return Owned(found, paid(flags, worth), bought(study, worth))


def seeds_of_owners(asked: int, sets: int) -> int:
    """Trainings of every set of owners: as asked, and more where sets are few, since intervals are made of them."""
    return max(2, asked, min(MOST_SEEDS, -(-ENOUGH // sets)))


def paid(flags: Flags, worth: Values) -> Payments | str:
    """The budget shared between owners; or in words why it cannot be."""
    if worth.values.sum() <= 0:
        return f"together the owners' data do not lower the loss (worth {worth.values.sum():.3g})"
    try:
        return valuation.pay(
            worth, flags.budget, floors=flags.floor, caps=flags.cap, discount=flags.discount
        )
    except ValueError as error:
        return str(error)


def bought(study: Study, worth: Values) -> Verified | str:
    """The best owners for half of the price of all, retrained on; or in words why none are bought."""
    prices = np.unique(study.data.owners, return_counts=True)[1].astype(float)  # one a row
    half, good = prices.sum() / 2, worth.values > 0
    if not (good & (prices <= half)).any():
        which = (
            f"the cheapest of them costs {prices[good].min():g}" if good.any() else "there are none"
        )
        return f"no owner whose data lower the loss costs at most {half:g}, half of the price of all: {which}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SignWarning)  # the sign was turned
            best = valuation.buy(worth, prices, half)
    except ValueError as error:
        return str(error)
    told = replace(best, targets=np.array(["loss (predicted of targets, actual of test rows)"]))
    return verify(told, partial(study.retrain, progress=iter), seeds=study.flags.seeds)
