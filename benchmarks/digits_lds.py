"""How well influence functions predict retrained digits MLPs: anchors and damping, side by side.

    python benchmarks/digits_lds.py
    python benchmarks/digits_lds.py --subsets 100 --optimizer adamw

Truth: half of the 1,500 examples removed, fresh initial weights and order for every seed. Outputs: the
margins of 20 held-out images. One model is attributed, with a seed that the truth does not use.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Flags:
    """LDS of influence functions on a digits MLP of width 64."""

    optimizer: Literal["sgd", "momentum", "adamw"] = "momentum"
    """SGD at .1; SGD at .05 with momentum .9; AdamW at .003."""
    subsets: int = 60
    """Random halves that are retrained."""
    seeds: int = 5
    """Trainings of each half."""
    jobs: int = 2
    """Trainings side by side."""


def mlp(seed: int) -> Any:
    """64 pixels, 64 hidden units, 10 classes; weights from the seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn = torch.nn
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def main(flags: Flags) -> None:
    """Train, retrain, and print one line a setting."""
    import torch

    from attribution_core import (
        SGD,
        AdamW,
        Outputs,
        Problem,
        Recipe,
        cross_entropy,
        influence,
        lds,
        margin,
        random_subsets,
        retrain,
        train,
    )  # fmt: skip
    from recipes.embedded import digits

    data = digits(1500, 200)
    x, test_x = (torch.tensor(a, dtype=torch.float32) for a in (data.x, data.test_x))
    problem = Problem(mlp(0), cross_entropy, (x, torch.tensor(data.y)))
    margins = Outputs(margin, (test_x[:20], torch.tensor(data.test_y[:20])))
    optimizer = {
        "sgd": SGD(0.1),
        "momentum": SGD(0.05, momentum=0.9),
        "adamw": AdamW(0.003),
    }[flags.optimizer]
    recipe = Recipe(optimizer, batch_size=50, epochs=15, init=mlp)
    halves = random_subsets(problem.n, flags.subsets, keep=0.5)
    truth = retrain(problem, recipe, margins, halves, seeds=flags.seeds, jobs=flags.jobs)
    print(f"{optimizer}, {flags.subsets} halves x {flags.seeds} fresh seeds")
    for exposure in (1.0, 0.5):
        run = train(problem, replace(recipe, seed=1000), exposure=exposure)
        for name, settings in {
            "default: the run's own damping": {},
            "damping .1 x mean eigenvalue": {"damping": None, "problem": run.trained()},
            "damping .03": {"damping": 0.03},
            "diagonal": {"curvature": "diagonal"},
            "identity (grad-dot)": {"curvature": "identity"},
        }.items():
            start = time.perf_counter()
            source = settings.pop("problem", run)
            more = {"exposure": exposure} if source is not run else {}
            f = influence(source, margins, **settings, **more)
            spent = time.perf_counter() - start
            print(f"exposure {exposure}  {name:32s} {lds(f, truth)}  {spent:.1f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
