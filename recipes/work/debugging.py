"""The work of debug_model.py: decisions, the rows that each hangs on, and mistakes that hang on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from applied.debugging import Subpopulations, subpopulations, support
from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    knn,
    logit_margin,
    refit,
    refitted,
    retrain,
    train,
)
from recipes.command import at_least, bar
from recipes.data.classification import (
    Classification,
    load,
    problem_of,
    warn_of_repeated,
)

if TYPE_CHECKING:
    from recipes.debug_model import Flags

CLEAR = 1e-3  # margin: less is decided by rounding
BATCH = 1024  # rows that are scored at a time
NEAR = 10  # neighbours
OF_A_GROUP = 20  # rows
FEWEST_MISTAKES = 4  # to be grouped


@dataclass(frozen=True)
class Asked:
    """A decision about one held-out row, and how few training rows it hangs on.

    Args:
        place: of the row among the held-out ones; id: what it is called in whatever is written.
        margin: logit of `said` less the largest other one, mean over trainings.
        predicted, actual, nearest, random: numbers of rows; infinite beyond `most`.
        rows: their places among the training rows, the strongest first.
    """

    place: int
    id: int
    label: str
    said: str
    margin: float
    predicted: float
    actual: float
    nearest: float
    random: float
    most: int
    rows: list[int]

    @property
    def wrong(self) -> bool:
        """Whether the decision is a mistake."""
        return self.label != self.said


@dataclass(frozen=True, eq=False)
class Model:
    """How a model is made of some rows, and asked.

    Args:
        problem: the training data, with a trained model.
        datamodel: (problem, weights, outputs) -> LinearDatamodel around these weights.
        retrained: (problem, weights [m, n], seeds, outputs) -> what `retrain` gives.
    """

    problem: Problem
    datamodel: Callable[[Problem, NDArray[np.float64], Outputs], LinearDatamodel]
    retrained: Callable[[Problem, Any, Any, Outputs], Any]
    seeds: list[int]


def checked(flags: Flags) -> Classification:
    """The data.

    Raises:
        ValueError: numbers that are none; data that are no table of classes.
        FileNotFoundError: no such data.
    """
    at_least(
        flags,
        mistakes=0,
        right=0,
        most=1,
        rounds=1,
        groups=1,
        width=0,
        decay=1e-12,
        seeds=1,
        jobs=1,
        mislabel=0,
    )
    if flags.mistakes + flags.right == 0:
        raise ValueError(
            "expected decisions to ask about, got --mistakes 0 --right 0; ask about one"
        )
    data = data_of(flags)
    warn_of_repeated(data)
    rows = np.bincount(data.y, minlength=len(data.classes))
    if rows.min() < 2:
        raise ValueError(
            f"expected two training rows of every class or more, got one of {data.classes[rows.argmin()]!r}; leave that class "
            "out, or join it to another"
        )
    if (most := room(flags, data)) < flags.most:
        print(
            f"note: {most} rows are left out at most, not {flags.most}: more could be all rows of "
            f"{data.classes[rows.argmin()]!r}",
            flush=True,
        )
    return data


def data_of(flags: Flags) -> Classification:
    """The table, split."""
    return load(flags.data, flags.label, flags.ignore, flags.test, flags.seed, flags.mislabel)


def held_out(data: Classification) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All held-out rows: nothing is chosen on them."""
    return np.concatenate([data.target_x, data.test_x]), np.concatenate(
        [data.target_y, data.test_y]
    )


def room(flags: Flags, data: Classification) -> int:
    """Rows that may go without the last one of a class."""
    return min(flags.most, int(np.bincount(data.y).min()) - 1)


def model_of(flags: Flags, data: Classification) -> Model:
    """Logistic regression at the optimum, or a small network over fresh seeds."""
    torch.set_num_threads(1)  # small tensors: threads wait more than they work
    return exact(flags, data) if flags.width == 0 else network(flags, data)


def exact(flags: Flags, data: Classification) -> Model:
    """Logistic regression."""
    from sklearn.linear_model import LogisticRegression

    strength = 1.0 / (flags.decay * len(data.x))
    fitted = LogisticRegression(C=strength, tol=1e-6, max_iter=5000).fit(data.x, data.y)

    def datamodel(table: Problem, w: NDArray[np.float64], outputs: Outputs) -> LinearDatamodel:
        at = refitted(fitted, table, w)
        return influence(at, outputs, weights=w, drop="row", curvature="hessian", batch_size=BATCH)

    def retrained(table: Problem, w: Any, seeds: Any, outputs: Outputs) -> Any:
        return refit(fitted, table, outputs, w, seeds=seeds)

    return Model(Problem.from_sklearn(fitted, data.x, data.y), datamodel, retrained, [0])


def network(flags: Flags, data: Classification) -> Model:
    """One hidden layer."""
    problem, make = problem_of(data, flags.width, 0.0)
    recipe = Recipe(
        SGD(flags.lr, momentum=0.9), min(flags.batch_size, problem.n), flags.epochs, init=make
    )

    seeds = list(range(flags.seeds))

    def trained(table: Problem, w: Any, seed: int) -> Any:
        return train(table, replace(recipe, seed=seed), w, drop="row", states=0)

    def datamodel(table: Problem, w: NDArray[np.float64], outputs: Outputs) -> LinearDatamodel:
        runs = [trained(table, w, seed) for seed in seeds]
        return influence(runs, outputs, curvature="ekfac", batch_size=BATCH)

    def retrained(table: Problem, w: Any, seeds: Any, outputs: Outputs) -> Any:
        return retrain(table, recipe, outputs, w, seeds=seeds)

    shown = trained(problem, np.ones(problem.n), seeds[0]).trained()
    return Model(shown, datamodel, retrained, seeds)


def rows_of(model: Model, x: NDArray[np.float32], y: NDArray[np.int64], function: Any) -> Outputs:
    """Outputs of some rows, in the model's precision."""
    like = next(model.problem.model.parameters())
    return Outputs(function, (torch.tensor(x).to(like), torch.tensor(y)))


def decided(model: Model, data: Classification) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(class [t] that trainings decide for together, the mean margin [t] by which they do) of the held-out rows.

    A margin may be negative where trainings contradict one another: then nothing is decided.
    """
    x, _ = held_out(data)
    classes = len(data.classes)
    every = rows_of(
        model, np.repeat(x, classes, axis=0), np.tile(np.arange(classes), len(x)), logit_margin
    )
    full = np.ones((1, model.problem.n))
    margins = model.retrained(model.problem, full, model.seeds, every).per_seed[0].mean(axis=0)
    by_class = margins.reshape(len(x), classes)
    return by_class.argmax(axis=1), by_class.max(axis=1)


def chosen(flags: Flags, data: Classification, said: Any, margin: Any) -> NDArray[np.intp]:
    """Places of the decisions that are asked about: the surest mistakes, then right ones at random."""
    _, y = held_out(data)
    wrong = np.flatnonzero((said != y) & (margin > CLEAR))
    wrong = wrong[np.argsort(-margin[wrong], kind="stable")][: flags.mistakes]
    right = np.flatnonzero((said == y) & (margin > CLEAR))
    drawn = np.random.default_rng([flags.seed, 0xDB]).permutation(right)[: flags.right]
    return np.concatenate([wrong, drawn])


def study(
    flags: Flags, data: Classification, said: NDArray[np.int64], margin: NDArray[np.float64]
) -> list[Asked]:
    """Every decision that is asked about, side by side on `jobs` cores; what is finished is read back.

    Raises:
        ValueError: no decision to ask about.
    """
    from joblib import Parallel, delayed, parallel_config

    places = chosen(flags, data, said, margin)
    if not len(places):
        raise ValueError(
            "expected decisions to ask about, got none: no held-out row is decided wrongly, and --right is 0; ask about right ones"
        )
    with parallel_config(
        backend="loky", n_jobs=min(flags.jobs, len(places)), inner_max_num_threads=1
    ):
        found = Parallel(return_as="generator")(
            delayed(one)(flags, int(j), int(said[j])) for j in places
        )
        return list(bar("decisions")(found, total=len(places)))


def one(flags: Flags, place: int, said: int) -> Asked:
    """One decision, asked or read back."""
    from attribution_core.disk.files import write_text
    from attribution_core.disk.fingerprint import fingerprint

    data = data_of(flags)
    shared = ("out", "jobs", "mistakes", "right", "groups")
    settings = {name: value for name, value in asdict(flags).items() if name not in shared}
    made_of = fingerprint(data, settings, place, said, [field.name for field in fields(Asked)])
    path = flags.out / "decisions" / f"{place}-{made_of[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = ask(flags, data, model_of(flags, data), place, said)
        write_text(path, json.dumps(asdict(found)))
    return Asked(**json.loads(path.read_text(encoding="utf-8")))


def ask(flags: Flags, data: Classification, model: Model, place: int, said: int) -> Asked:
    """How few rows a decision hangs on."""
    x, y = held_out(data)
    output = rows_of(model, x[[place]], np.array([said]), logit_margin)
    most = room(flags, data)
    found = support(
        model.problem,
        lambda table, w: model.datamodel(table, w, output),
        lambda table, w, seeds: model.retrained(table, w, seeds, output),
        most=most, rounds=flags.rounds, orders={"nearest": knn(model.problem, output, k=NEAR)}, seeds=model.seeds,
    )  # fmt: skip
    near, random = found.controls["nearest"], found.controls["random"]
    return Asked(
        place, int(data.held_places[place]), data.classes[y[place]], data.classes[said], float(found.margin[0]),
        float(found.predicted[0]), float(found.actual[0]), float(near[0]), float(random[0]), most, found.rows(0).tolist(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Groups:
    """Mistakes that hang on the same rows."""

    places: NDArray[np.intp]  # of the mistakes among the held-out rows
    found: Subpopulations


def grouped(
    flags: Flags, data: Classification, model: Model, said: NDArray[np.int64]
) -> Groups | None:
    """All mistakes, in groups; None where there are too few."""
    x, y = held_out(data)
    places = np.flatnonzero(said != y)
    if len(places) < FEWEST_MISTAKES:
        return None
    losses = rows_of(model, x[places], y[places], cross_entropy)
    datamodel = model.datamodel(model.problem, np.ones(model.problem.n), losses)
    k = min(OF_A_GROUP, room(flags, data))
    groups = None if flags.groups is None else min(flags.groups, len(places))
    return Groups(
        places,
        subpopulations(
            datamodel, groups, k=k, seed=flags.seed, seeds=model.seeds,
            retrain=lambda w, seeds: model.retrained(model.problem, w, seeds, losses),
        ),
    )  # fmt: skip
