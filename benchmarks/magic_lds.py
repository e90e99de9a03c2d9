"""How well metagradients predict retrained models: same order, rows really removed, and fresh seeds.

    python benchmarks/magic_lds.py                         # digits MLP, AdamW, same order
    python benchmarks/magic_lds.py --truth removed         # the same seed, rows really removed
    python benchmarks/magic_lds.py --truth fresh           # fresh seeds, exposure anchors, keep .2 .5 .8
    python benchmarks/magic_lds.py --task text             # a tiny GPT-2 from scratch

Beside them stand influence functions and TRAK on the same models and the same subsets; the last line of each
table is MAGIC less the better of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Flags:
    """LDS of MAGIC, influence functions and TRAK."""

    task: Literal["digits", "text"] = "digits"
    """An MLP of width 64 on 1,500 digits, or a GPT-2 of 120,000 parameters on embedded text."""
    optimizer: Literal["sgd", "momentum", "adamw"] = "adamw"
    """Of digits: SGD at .1; SGD at .05 with momentum .9; AdamW at .001. Text has what the pre-flight found."""
    batch_size: int = 50
    """Digits a step."""
    truth: Literal["same", "removed", "fresh"] = "same"
    """Same order with weights set to zero; the same seed with rows removed; fresh seeds with rows removed."""
    drop: tuple[float, ...] = ()
    """Fractions dropped; by default .01 .05 .1 .5, and for fresh seeds .2 .5 .8."""
    subsets: int = 100
    """Random subsets for each fraction."""
    seeds: int = 5
    """Trainings of each subset, for fresh seeds."""
    runs: int = 5
    """Runs that are averaged, for fresh seeds."""
    first: int = 1000
    """Seed of the first attributed run, for fresh seeds."""
    jobs: int = 2
    """Trainings side by side."""
    out: Path = Path("runs/magic_lds")
    """Folder for the retrainings; the same command resumes."""


def setting(flags: Flags) -> tuple[Any, Any, Any]:
    """Problem, recipe and outputs."""
    from attribution_core import SGD, AdamW, Recipe
    from recipes.data.tasks import digits_task, text_task

    if flags.task == "text":
        task = text_task(flags.out / "text")
        recipe = Recipe(AdamW(0.001, eps_root=1e-5), 20, 4, schedule="linear", init=task.make)
        return task.problem, recipe, task.outputs
    task = digits_task()
    optimizers = {"sgd": SGD(0.1), "momentum": SGD(0.05, momentum=0.9), "adamw": AdamW(0.001)}
    return (
        task.problem,
        Recipe(optimizers[flags.optimizer], flags.batch_size, 15, init=task.make),
        task.outputs,
    )


def same_order(flags: Flags, problem: Any, recipe: Any, outputs: Any) -> dict[str, Any]:
    """Methods on one run with every row, whatever the fraction dropped."""
    from attribution_core import influence, magic, train, trak

    run = cache(lambda: train(problem, recipe))
    models = cache(lambda: [train(problem, replace(recipe, seed=s), states=0) for s in range(5)])
    once = {
        "MAGIC": cache(lambda: magic(run(), outputs)),
        "influence": cache(lambda: influence(run(), outputs)),
        "TRAK, 5 models": cache(lambda: trak(models(), outputs)),
    }
    return {name: lambda keep, method=method: method() for name, method in once.items()}


def fresh_seeds(flags: Flags, problem: Any, recipe: Any, outputs: Any) -> dict[str, Any]:
    """Methods on runs at the exposure of the kept fraction, and plain MAGIC beside them."""
    from attribution_core import average, influence, magic, train, trak

    @cache
    def runs(exposure: float) -> list[Any]:
        seeds = range(flags.first, flags.first + flags.runs)
        return [train(problem, replace(recipe, seed=s), exposure=exposure) for s in seeds]

    @cache
    def each(exposure: float) -> list[Any]:
        return [magic(run, outputs, check=False) for run in runs(exposure)]

    return {
        "MAGIC, exposure, 1 run": lambda keep: each(keep)[0],
        f"MAGIC, exposure, {flags.runs} runs": lambda keep: average(each(keep)),
        "MAGIC, plain, 1 run": lambda keep: each(1.0)[0],
        f"MAGIC, plain, {flags.runs} runs": lambda keep: average(each(1.0)),
        "influence, exposure, 1 run": lambda keep: influence(runs(keep)[0], outputs),
        f"influence, exposure, {flags.runs} runs": lambda keep: influence(runs(keep), outputs),
        f"TRAK, exposure, {flags.runs} runs": lambda keep: trak(runs(keep), outputs),
    }


def lead(found: Any, keep: float) -> str:
    """MAGIC less the best of the others, for one keep fraction."""
    rows = found.at(keep)
    ours = max(row.lds.mean for row in rows if row.method.startswith("MAGIC"))
    best = max(
        (row for row in rows if not row.method.startswith("MAGIC")), key=lambda r: r.lds.mean
    )
    return f"keep {keep:g}: MAGIC less {best.method}: {ours - best.lds.mean:+.3f}"


def main(flags: Flags) -> None:
    """Retrain, attribute, compare."""
    import warnings

    import torch
    from tqdm import tqdm

    from attribution_core import compare, random_subsets, retrain
    from attribution_core.safeguards.smoothness import MetagradientWarning

    warnings.simplefilter("ignore", MetagradientWarning)
    torch.set_num_threads(1)
    problem, recipe, outputs = setting(flags)
    fresh = flags.truth == "fresh"
    methods = (fresh_seeds if fresh else same_order)(flags, problem, recipe, outputs)
    bar = partial(tqdm, desc="retraining", mininterval=5)
    tables = {}
    for drop in flags.drop or ((0.2, 0.5, 0.8) if fresh else (0.01, 0.05, 0.1, 0.5)):
        subsets = random_subsets(problem.n, flags.subsets, keep=1 - drop)
        tables[round(1 - drop, 6)] = retrain(
            problem, recipe, outputs, subsets, seeds=flags.seeds if fresh else [recipe.seed],
            drop="weight" if flags.truth == "same" else "row", jobs=flags.jobs, progress=bar,
            folder=flags.out / f"{flags.task}-{flags.optimizer}-{flags.batch_size}-{flags.truth}",
        )  # fmt: skip
    found = compare(methods, tables)
    print(f"{flags.task}, {recipe.optimizer}, truth: {flags.truth}\n{found.table()}\n")
    print("\n".join(lead(found, keep) for keep in sorted(tables, reverse=True)))


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
