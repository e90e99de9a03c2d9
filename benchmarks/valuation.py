"""Stacked retraining, owners valued without retraining, wrong labels found: the figures behind valuation.

python benchmarks/valuation.py --part stacked     # 100 MLPs side by side against one after the other
python benchmarks/valuation.py --part owners      # Aumann–Shapley against exact Shapley values of ten owners
python benchmarks/valuation.py --part labels      # AUC by method, 2 data sets × 2 rates × 5 seeds
"""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro


@dataclass(frozen=True)
class Flags:
    """One of three tables, on one thread."""

    part: Literal["stacked", "owners", "labels"] = "stacked"
    """Which."""
    seeds: int = 5
    """Of the labels' table."""
    jobs: int = 1
    """Stacks side by side, for the owners."""


def main(flags: Flags) -> None:
    torch.set_num_threads(1)
    {"stacked": stacked, "owners": owners, "labels": labels}[flags.part](flags)


# --- stacks ------------------------------------------------------------------------------------------


def stacked(flags: Flags) -> None:
    """CPU seconds of 100 trainings on random halves of 1,000 digits, 10 epochs in batches of 50."""
    from attribution_core import (
        SGD,
        AdamW,
        Outputs,
        Problem,
        Recipe,
        cross_entropy,
        margin,
        random_subsets,
        retrain,
    )
    from recipes.data.tasks import mlp
    from recipes.embedded import digits

    data = digits(1000)
    print(
        "| width | precision | optimizer | one by one | stacked | ratio | largest difference |\n|---|---|---|---|---|---|---|"
    )
    for width, dtype, optimizer in (
        (16, torch.float32, SGD(0.1, 0.9)), (16, torch.float64, SGD(0.1, 0.9)), (32, torch.float32, SGD(0.1, 0.9)),
        (32, torch.float64, SGD(0.1, 0.9)), (32, torch.float32, AdamW(0.003)), (64, torch.float32, SGD(0.1, 0.9)),
    ):  # fmt: skip
        x, test_x = (torch.tensor(a).to(dtype) for a in (data.x, data.test_x[:50]))
        problem = Problem(mlp(0, width).to(dtype), cross_entropy, (x, torch.tensor(data.y)))
        outputs = Outputs(margin, (test_x, torch.tensor(data.test_y[:50])))
        recipe = Recipe(optimizer, 50, 10, init=lambda s, w=width, d=dtype: mlp(s, w).to(d))
        subsets, took, found = random_subsets(1000, 100, keep=0.5), {}, {}
        for size in (100, 1):
            retrain(
                problem, recipe, outputs, subsets[: 2 * min(size, 2)], seeds=1, stack=size
            )  # warm
            start = time.process_time()
            found[size] = retrain(problem, recipe, outputs, subsets, seeds=1, stack=size).per_seed
            took[size] = time.process_time() - start
        gap = np.abs(found[100] - found[1]).max()
        print(
            f"| {width} | {str(dtype)[6:]} | {type(optimizer).__name__} | {took[1]:.2f} | {took[100]:.2f} | "
            f"{took[1] / took[100]:.1f} | {gap:.0e} |", flush=True,
        )  # fmt: skip


# --- owners ------------------------------------------------------------------------------------------


def owners(flags: Flags) -> None:
    """Ten owners of digits, three of them with wrong labels; exact values by 2^10 retrainings a seed."""
    from applied.valuation import values
    from attribution_core import (
        SGD,
        AdamW,
        Outputs,
        Recipe,
        all_subsets,
        aumann_shapley,
        cross_entropy,
        influence,
        magic,
        retrain,
        train,
    )  # fmt: skip
    from recipes.data.classification import embedded, problem_of

    warnings.simplefilter("ignore")
    data = embedded("digits", 0.0, 10, 0)
    problem, make = problem_of(data, 32, 0.0)
    held = (
        np.concatenate([data.target_x, data.test_x]),
        np.concatenate([data.target_y, data.test_y]),
    )
    target = Outputs(cross_entropy, tuple(torch.tensor(a) for a in held)).mean()
    size, sets = np.unique(data.owners, return_counts=True)[1], all_subsets(data.owners)
    print(
        "| optimizer | path, points | remainder | same order | rows removed, 3 fresh seeds | CPU s |\n|---|---|---|---|---|---|"
    )
    for name, optimizer in {"SGD .1, momentum .9": SGD(0.1, 0.9), "SGD .02, momentum .9": SGD(0.02, 0.9), "AdamW .003": AdamW(0.003)}.items():  # fmt: skip
        recipe = Recipe(optimizer, 50, 6, init=make)
        clock = time.process_time()
        same = values(
            retrain(problem, recipe, target, sets, seeds=[0], drop="weight", jobs=flags.jobs),
            owners=data.owners,
        )
        clock = time.process_time() - clock
        gone = values(
            retrain(problem, recipe, target, sets, seeds=[11, 12, 13], jobs=flags.jobs),
            owners=data.owners,
        )

        def line(
            what: str, found: Any, remainder: str = "", seconds: float = 0.0, name: str = name
        ) -> None:
            by = [np.corrcoef(found, exact.values)[0, 1] for exact in (same, gone)]  # noqa: B023
            print(
                f"| {name} | {what} | {remainder} | {by[0]:.4f} | {by[1]:.4f} | {seconds:.1f} |",
                flush=True,
            )

        for path, points in (("weight", 4), ("weight", 8), ("weight", 16), ("exposure", 8)):
            start = time.process_time()
            f = aumann_shapley(problem, recipe, target, points=points, path=path)
            left = "" if path == "exposure" else f"{f.meta['remainder'][0]:+.2%}"
            line(
                f"{path}, {points}",
                values(f, owners=data.owners).values,
                left,
                time.process_time() - start,
            )
        run = train(problem, recipe)
        line("metagradient at w = 1", values(magic(run, target), owners=data.owners).values)
        half = influence(train(problem, recipe, exposure=0.5), target)
        line("influence, exposure .5", values(half, owners=data.owners).values)
        line("rows of the owner", -size.astype(float))
        line(f"exact, same order (1,024 retrainings: {clock:.0f} CPU s)", same.values)


# --- labels ------------------------------------------------------------------------------------------


def labels(flags: Flags) -> None:
    """AUC of values for planted wrong labels, as recipes/value_data.py takes them."""
    from sklearn.metrics import roc_auc_score

    from recipes.data.classification import embedded
    from recipes.value_data import Flags as Recipe
    from recipes.work.valuing import start, value_rows

    warnings.simplefilter("ignore")
    found: dict[str, list[list[float]]] = {}
    needs: dict[str, str] = {}
    settings = [(name, rate) for name in ("digits", "breast_cancer") for rate in (0.1, 0.2)]
    for name, rate in settings:
        for seed in range(flags.seeds):
            data = embedded(name, rate, 0, seed)
            with tempfile.TemporaryDirectory() as folder:
                recipe = replace(
                    Recipe(),
                    data=name,
                    mislabel=rate,
                    owners=0,
                    seed=seed,
                    jobs=1,
                    out=Path(folder),
                )
                valued = value_rows(start(recipe, data))
            needs = valued.needs
            for method, v in valued.found.items():
                rows = found.setdefault(method, [[] for _ in settings])
                rows[settings.index((name, rate))].append(float(roc_auc_score(data.bad, -v.values)))
    print(
        "| method | needs | "
        + " | ".join(f"{name} {rate:.0%}" for name, rate in settings)
        + " | mean |\n|---" * 1
        + "|---" * (len(settings) + 2)
        + "|"
    )
    for method, rows in found.items():
        cells = [f"{np.mean(row):.3f} ({min(row):.3f})" for row in rows]
        print(
            f"| {method} | {needs[method] or 'nothing clean'} | "
            + " | ".join(cells)
            + f" | {np.mean(rows):.4f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Flags))
