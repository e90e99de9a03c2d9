"""How well every method predicts retrained digits MLPs: one table, with floors and ceiling.

    python benchmarks/digits_lds.py
    python benchmarks/digits_lds.py --keep .25 .5 .9 --optimizer adamw --out runs/digits

Truth: a part of the 1,500 examples removed, fresh initial weights and order for every seed. Outputs: the
margins of 20 held-out images. What is attributed are models trained at the exposure of the kept fraction,
with seeds that the truth does not use; no setting is tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Flags:
    """LDS of every method on a digits MLP of width 64."""

    optimizer: Literal["sgd", "momentum", "adamw"] = "sgd"
    """SGD at .1; SGD at .05 with momentum .9; AdamW at .003."""
    keep: tuple[float, ...] = (0.5,)
    """Fractions of the data that are kept."""
    subsets: int = 60
    """Random subsets retrained for each fraction."""
    seeds: int = 5
    """Trainings of each subset."""
    full: bool = False
    """Attribute full runs instead of runs at the kept fraction's exposure."""
    first: int = 1000
    """Seed of the first attributed model."""
    jobs: int = 2
    """Trainings side by side."""
    out: Path | None = None
    """Folder for the retrainings (resumed), the table and the picture."""


def setting(optimizer: str) -> tuple[Any, Any, Any]:
    """The problem, the recipe and the outputs."""
    from attribution_core import SGD, AdamW, Recipe
    from recipes.data.tasks import digits_task

    task = digits_task()
    optimizers = {
        "sgd": SGD(0.1),
        "momentum": SGD(0.05, momentum=0.9),
        "adamw": AdamW(0.003, eps_root=0.0),
    }
    recipe = Recipe(optimizers[optimizer], batch_size=50, epochs=15, init=task.make)
    return task.problem, recipe, task.outputs


def main(flags: Flags) -> None:
    """Train, retrain, and print one line a method."""
    from tqdm import tqdm

    from applied.pictures import lds_against_compute, png
    from attribution_core import (
        compare,
        influence,
        knn,
        random_subsets,
        representation_similarity,
        retrain,
        source,
        tracin,
        train,
        trak,
    )

    problem, recipe, margins = setting(flags.optimizer)

    @cache
    def run(keep: float, k: int = 0) -> Any:
        exposure = 1.0 if flags.full else keep
        how = replace(recipe, seed=flags.first + k)
        return train(problem, how, exposure=exposure, checkpoints=6)

    def at(keep: float) -> Any:  # for floors: they know no anchor of their own
        return run(keep).trained()

    methods = {
        "influence, Gauss-Newton": lambda keep: influence(
            run(keep), margins, curvature="gauss_newton"
        ),
        "influence, EK-FAC": lambda keep: influence(run(keep), margins, curvature="ekfac"),
        "influence, EK-FAC alone": lambda keep: influence(
            run(keep), margins, curvature="ekfac", refine=0
        ),
        "influence, EK-FAC, size": lambda keep: influence(
            run(keep), margins, curvature="ekfac", refine="size"
        ),
        "influence, EK-FAC, 5 models": lambda keep: influence(
            [run(keep, k) for k in range(5)], margins, curvature="ekfac"
        ),
        "SOURCE, 3 segments": lambda keep: source(run(keep), margins),
        "TRAK": lambda keep: trak(run(keep), margins),
        "TRAK, 5 models": lambda keep: trak([run(keep, k) for k in range(5)], margins),
        "TracIn, 6 checkpoints": lambda keep: tracin(run(keep), margins),
        "grad-dot": lambda keep: influence(run(keep), margins, curvature="identity"),
        "kNN": lambda keep: knn(at(keep), margins),
        "representation similarity": lambda keep: representation_similarity(at(keep), margins),
    }
    tables = {}
    for keep in flags.keep:
        weights = random_subsets(problem.n, flags.subsets, keep=keep)
        folder = None if flags.out is None else flags.out / "retraining"
        tables[keep] = retrain(
            problem, recipe, margins, weights, seeds=flags.seeds, jobs=flags.jobs, folder=folder,
            progress=lambda items: tqdm(items, desc="retraining", mininterval=5),
        )  # fmt: skip
        for k in range(5):
            run(keep, k)  # training the attributed models is not part of a method's seconds
    found = compare(methods, tables, floors=("grad-dot", "kNN", "representation similarity"))
    print(f"{recipe.optimizer}\n{found.table()}")
    if flags.out is not None:
        (flags.out / "methods.md").write_text(found.markdown(), encoding="utf-8")
        for keep in flags.keep:
            (flags.out / f"methods-{keep:g}.png").write_bytes(png(lds_against_compute(found, keep)))


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
