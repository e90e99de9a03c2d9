"""The work of unlearn.py: models and oracles, unlearners and how near each comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from applied.forgetting.rehearsing import plan_rehearsals
from applied.unlearners import (
    Steps,
    Unlearner,
    centred_logits,
    fine_tune,
    gradient_ascent,
    gradient_difference,
    match,
    npo,
    scrub,
)
from applied.unlearning import Evaluation, evaluate, read_all, unlearn
from attribution_core import (
    SGD,
    Outputs,
    Recipe,
    join_outputs,
    margin,
    retrain,
    split_outputs,
    train,
)
from attribution_core.data import sample
from attribution_core.disk.files import write_text
from recipes.command import bar, forget_report
from recipes.data.classification import Classification, problem_of
from recipes.data.forget_sets import Forget

if TYPE_CHECKING:
    from recipes.unlearn import Flags

AUTO, PREDICTED, OUTPUTS = "auto (models)", "auto (predicted outputs)", "outputs only"
MATCHING = "oracle matching (needs an oracle)"
BASELINES: Mapping[str, Unlearner] = {
    "fine-tune": fine_tune,
    "gradient ascent": gradient_ascent,
    "gradient difference": gradient_difference,
    "SCRUB": scrub,
    "NPO": npo,
}
READ = 500  # rows at most that each split reads
TRIED = 5  # models that learning rates are chosen on
CLIP = 1.0  # largest gradient norm of the baselines; ascent would not end without
FIRST_ORACLE = 1000  # seed
Splits = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Study:
    """What unlearning one forget set came to.

    Args:
        before, oracle: split -> margins [models, z].
        methods: name -> split -> margins [models, z].
        cost: name -> share of a training's steps.
        rates: name -> learning rate that was chosen.
        trust: kind of reading -> how far auto believed its prediction; 0 leaves outputs as they are.
        points: split -> rows that were read, as the files they come from number them.
    """

    forget: Forget
    evaluation: Evaluation
    before: Splits
    oracle: Splits
    methods: Mapping[str, Splits]
    cost: Mapping[str, float]
    rates: Mapping[str, float]
    trust: Mapping[str, float]
    points: Mapping[str, NDArray[np.intp]]


def recipe_of(flags: Flags, n: int) -> Recipe:
    """How n rows are trained on."""
    return Recipe(SGD(flags.lr, momentum=0.9), min(flags.batch_size, n), flags.epochs)


def affordable(flags: Flags, n: int) -> None:
    """Raise where the budget has no room for rehearsals, before anything is trained.

    Raises:
        ValueError: it has none.
    """
    run = SimpleNamespace(order=recipe_of(flags, n).draw(np.arange(n)))
    plan_rehearsals([run] * flags.models, flags.budget)


def forget_results(folder: Path) -> None:
    """Take away the report, points and unlearned models of an earlier run; its trainings stay."""
    forget_report(folder)
    models = (*folder.glob("unlearned/*/*.safetensors"), *folder.glob("unlearned/*/model.json"))
    for old in (*folder.glob("points-*.parquet"), *models):
        old.unlink()
    for kind in folder.glob("unlearned/*"):
        if kind.is_dir() and not any(kind.iterdir()):
            kind.rmdir()


@dataclass(frozen=True, eq=False)
class Trainings:
    """The models and oracles of one forget set, kept in the folder, and what is read off them.

    Args:
        outputs: split -> margins.
        points: split -> rows that are read, as the files they come from number them.
    """

    flags: Flags
    forget: Forget
    problem: Any
    recipe: Recipe
    outputs: dict[str, Outputs]
    points: dict[str, NDArray[np.intp]]

    @classmethod
    def of(cls, flags: Flags, forget: Forget) -> Trainings:
        """As the flags say."""
        problem, make = problem_of(forget.data, flags.width, flags.weight_decay)
        recipe = replace(recipe_of(flags, problem.n), init=make)
        return cls(flags, forget, problem, recipe, *read_at(forget, flags.seed))

    @property
    def without(self) -> NDArray[np.float64]:
        """[n], the weights that leave the forget set out."""
        weights = np.ones(self.problem.n)
        weights[self.forget.rows] = 0.0
        return weights

    def model(self, seed: int) -> Any:
        """A training on all rows."""
        folder = self.flags.out / "runs" / f"{self.forget.kind}-{seed}"
        return train(self.problem, replace(self.recipe, seed=seed), states=0, folder=folder)

    def oracles(self, count: int) -> Splits:
        """Margins [count, z] of trainings without the forget set."""
        name = self.forget.kind
        table = retrain(
            self.problem, self.recipe, join_outputs(self.outputs), self.without,
            seeds=range(FIRST_ORACLE, FIRST_ORACLE + count), folder=self.flags.out / "oracles" / name,
            jobs=self.flags.jobs, progress=bar(f"{name}: retraining"),
        )  # fmt: skip
        return split_outputs(table.per_seed[0], self.outputs)

    def begin(self) -> None:
        """The first model and the first oracle.

        Raises:
            ValueError: their folders hold trainings by other settings.
        """
        self.model(0)
        self.oracles(1)


def study(trainings: Trainings) -> Study:
    """Train, retrain without, unlearn in every way, compare."""
    flags, forget = trainings.flags, trainings.forget
    rows, name, without = forget.rows, forget.kind, trainings.without
    outputs, points = trainings.outputs, trainings.points
    seeds = bar(f"{name}: training")(range(flags.models))
    runs = [trainings.model(seed) for seed in seeds]
    oracle = trainings.oracles(2 * flags.models)
    before = read_all(runs, outputs)

    auto = unlearn(runs, rows, outputs, budget=flags.budget, progress=bar(f"{name}: auto"))
    only = unlearn(
        runs, rows, outputs, method="outputs", budget=flags.budget, progress=bar(f"{name}: outputs")
    )
    methods = {AUTO: auto.outputs(outputs), PREDICTED: dict(auto.predicted), OUTPUTS: dict(only.predicted)}  # fmt: skip
    # the predicted outputs of auto cost its rehearsals, not the matching after them
    cost = {AUTO: auto.share, PREDICTED: auto.meta["rehearsed"], OUTPUTS: only.share}
    rates = {}
    for title, unlearner in unlearners(runs[0], without, rows).items():
        methods[title], cost[title], rates[title] = at_best_rate(
            flags, runs, rows, outputs, oracle, unlearner, f"{name}: {title}"
        )
    save(auto.models, flags.out / "unlearned" / name, forget.data)
    found = evaluate(methods, oracle, before)
    found.save(flags.out / f"points-{name}.parquet", points)
    return Study(forget, found, before, oracle, methods, cost, rates, auto.meta["trust"], points)


def read_at(forget: Forget, seed: int) -> tuple[dict[str, Outputs], dict[str, NDArray[np.intp]]]:
    """Margins of the forget set, of retained and of validation rows; which rows of the files they are."""
    data = forget.data
    rest = np.setdiff1d(np.arange(len(data.x)), forget.rows)
    rest = rest[sample(len(rest), READ, seed)]
    held = np.arange(min(READ, len(data.target_x)))
    rows = {"forget": forget.rows, "retain": rest, "validation": held}
    outputs = {
        split: Outputs(
            margin,
            (torch.tensor(data.target_x[at]), torch.tensor(data.target_y[at]))
            if split == "validation"
            else (torch.tensor(data.x[at]), torch.tensor(data.y[at])),
        )
        for split, at in rows.items()
    }
    return outputs, {
        split: (data.held_places if split == "validation" else data.places)[at]
        for split, at in rows.items()
    }


def unlearners(
    run: Any, without: NDArray[np.float64], rows: NDArray[np.intp]
) -> dict[str, Callable[[Steps], Unlearner]]:
    """The baselines, and matching to one retrained model: each for given steps."""
    problem, recipe = run.problem, replace(run.recipe, seed=FIRST_ORACLE - 1)
    model = train(problem, recipe, without, drop="row", states=0).model
    rest = np.setdiff1d(np.arange(problem.n), rows)
    with torch.no_grad():
        logits = [
            centred_logits(model, problem.train[some.tolist()])[0].detach() for some in (rows, rest)
        ]

    def matched(how: Steps) -> Unlearner:
        how = replace(how, decay=True, clip=None)
        return partial(match, forget_logits=logits[0], retain_logits=logits[1], how=how)

    def ordinary(unlearner: Any) -> Callable[[Steps], Unlearner]:
        return lambda how: partial(unlearner, how=how)

    return {**{name: ordinary(some) for name, some in BASELINES.items()}, MATCHING: matched}


def at_best_rate(
    flags: Flags, runs: list[Any], rows: NDArray[np.intp], outputs: Mapping[str, Outputs],
    oracle: Splits, unlearner: Callable[[Steps], Unlearner], title: str,
) -> tuple[Splits, float, float]:  # fmt: skip
    """(margins, cost, learning rate): the rate whose mean margins come nearest to the oracles' on few models.

    The choice uses oracles, which a user of these methods does not have; it favours them.
    """
    steps = max(1, round(flags.budget * len(runs[0].order)))
    size = len(runs[0].order[0])

    def at(rate: float, some: list[Any], progress: Any = iter) -> tuple[Splits, float]:
        how = Steps(steps, rate * flags.lr, momentum=0.9, batch_size=size, clip=CLIP)
        found = unlearn(some, rows, outputs, method=unlearner(how), progress=progress)
        return found.outputs(outputs), found.share

    missed = {}
    for rate in flags.rates:
        try:
            margins, _ = at(rate, runs[:TRIED])
        except ValueError:  # diverged
            continue
        missed[rate] = sum(
            float(np.abs(margins[s].mean(0) - oracle[s].mean(0)).mean()) for s in oracle
        )
    if not missed:
        raise ValueError(f"expected a rate at which {title} stays finite, got none of {flags.rates}; pass smaller --rates")  # fmt: skip
    best = min(missed, key=missed.__getitem__)
    return *at(best, runs, bar(title)), best * flags.lr


def save(models: list[Any], folder: Path, data: Classification) -> None:
    """One safetensors file a model, numbered like the runs; model.json says what goes in and comes out."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for seed, model in enumerate(models):
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / f"{seed}.safetensors")
    about = {"layers": str(models[0]), "inputs": list(data.inputs), "classes": data.classes}
    write_text(folder / "model.json", json.dumps(about, indent=1))
