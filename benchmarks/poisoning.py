"""Images moved by metagradients through training, beside label flips and gradient matching, on fresh victims.

    python benchmarks/poisoning.py --model mlp --split 0            # about four minutes; cnn: about fifteen
    python benchmarks/poisoning.py --model cnn --split 0 --out runs/poisoning

Digits: 800 training images of which 2.5 % may be changed, 700 target images that the adversary holds, 297 held out
that nobody chose on. Every attack is judged on victims of fresh seeds, paired by seed; the other architecture is the
row of transfer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

TARGET, HELD_OUT, ACCURACY = "target loss", "held-out loss", "held-out accuracy"
FIRST_VICTIM = 1000
SURROGATES = 3  # trainings that the datamodel of flips is the mean of


@dataclass(frozen=True)
class Flags:
    """Compare attacks on images at one budget."""

    model: Literal["mlp", "cnn"] = "mlp"
    """Of surrogate and victim; the other one is the transfer row."""
    split: int = 0
    """Which images are trained on, targets, held out."""
    budget: float = 0.025
    """Share of the training images."""
    steps: int = 60
    """Of the ascent, each through one training."""
    step_size: float = 0.1
    """First step of every pixel, of its range; it falls to a tenth."""
    victims: int = 8
    """Trainings from fresh seeds."""
    rounds: int = 5
    """Of the stronger label flips."""
    out: Path = Path("runs/poisoning")
    """Inputs on their way and results; the same call goes on."""


def mlp(seed: int) -> Any:
    """64 pixels, 64 GELUs, 10 classes."""
    import torch

    nn = torch.nn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def cnn(seed: int) -> Any:
    """Two convolutions with GELUs, 10 classes."""
    import torch

    nn = torch.nn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(384, 10),
        )  # fmt: skip


def main(flags: Flags) -> None:
    """Every attack, its table, and the paired differences."""
    import numpy as np
    import torch

    from applied.poisoning import ThreatModel, flip_labels, perturb
    from applied.recipe import paired_interval
    from attribution_core import (
        SGD,
        AdamW,
        Outputs,
        Problem,
        Recipe,
        cross_entropy,
        gradient_matching,
        influence,
        input_influence,
        magic,
        retrain,
        train,
    )
    from recipes.embedded import digits
    from recipes.poisoning import loss_or_hit

    torch.set_num_threads(1)
    table = digits(800, seed=flags.split)
    x = torch.tensor(table.x).float().reshape(-1, 1, 8, 8)
    others = torch.tensor(table.test_x).float().reshape(-1, 1, 8, 8)
    labels = torch.tensor(table.test_y)
    target, held = np.arange(700), np.arange(700, len(others))
    kinds = [TARGET] * len(target) + [HELD_OUT] * len(held)
    read = np.r_[target, held, held]
    hit = torch.tensor([0.0] * len(others) + [1.0] * len(held))
    reading = Outputs(loss_or_hit, (others[read], labels[read], hit)).mean(by=[*kinds, *[ACCURACY] * len(held)])  # fmt: skip
    losses = Outputs(cross_entropy, (others, labels)).mean(by=kinds)
    goal = Outputs(cross_entropy, (others[target], labels[target])).mean(by=[TARGET] * len(target))

    recipes = {
        "mlp": Recipe(SGD(0.05, momentum=0.9), 50, 15, init=mlp),
        "cnn": Recipe(AdamW(3e-3), 50, 15, schedule="cosine", init=cnn),
    }
    recipe, other = recipes[flags.model], "cnn" if flags.model == "mlp" else "mlp"
    problem = Problem(recipe.init(0), cross_entropy, (x, torch.tensor(table.y)))  # type: ignore[misc]
    seeds = range(FIRST_VICTIM, FIRST_VICTIM + flags.victims)

    def victim(which: str, data: Any, weights: Any, seeds: Any) -> Any:
        make = recipes[which].init
        assert make is not None
        return retrain(replace(data, model=make(0)), recipes[which], reading, weights, seeds=seeds)

    def flips(data: Any, w: Any) -> Any:
        runs = [train(data, replace(recipe, seed=k), w, drop="row", states=0) for k in range(SURROGATES)]  # fmt: skip
        return influence(runs, losses, curvature="ekfac", batch_size=1024)

    def through(data: Any, rows: Any, step: int) -> Any:
        return magic(train(data, replace(recipe, seed=step)), goal, wrt="inputs", rows=rows, check=False)  # fmt: skip

    def by_influence(data: Any, rows: Any, step: int) -> Any:
        run = train(data, replace(recipe, seed=step), states=0)
        return input_influence(run, goal, rows=rows, curvature="ekfac")

    def by_matching(data: Any, rows: Any, step: int) -> Any:
        return gradient_matching(train(data, replace(recipe, seed=step), states=0), goal, rows=rows)

    labels_may = ThreatModel(flags.budget, "labels")
    inputs_may = ThreatModel(flags.budget, "inputs", epsilon=1.0, box=(0.0, 1.0))
    shared = {"targets": reading.names, "seeds": list(seeds)}
    own = partial(victim, flags.model)
    where = flags.out / f"{flags.model}-{flags.split}"
    attacks = {}
    for name, rounds in (("label flips", 1), (f"label flips, {flags.rounds} rounds", flags.rounds)):
        attacks[name] = flip_labels(problem, labels_may, flips, own, goal=TARGET, rounds=rounds, **shared)  # fmt: skip
        print(attacks[name].table(), flush=True)
    ways = {
        "gradient matching": (by_matching, "alignment"), "influence": (by_influence, TARGET),
        "metagradients": (through, TARGET),
    }  # fmt: skip
    for name, (surrogate, asked) in ways.items():
        how = {"goal": asked, "steps": flags.steps, "step_size": flags.step_size, "momentum": 0.8}
        folder = where / name.replace(" ", "-")
        attacks[name] = perturb(problem, inputs_may, surrogate, own, name=name, folder=folder, **how, **shared)  # fmt: skip
        print(attacks[name].table(), flush=True)
    moved = perturb(
        problem, replace(inputs_may, knowledge="grey-box"), through, partial(victim, other),
        name=f"metagradients of {flags.model} on {other}", folder=where / "metagradients", goal=TARGET,
        steps=flags.steps, step_size=flags.step_size, momentum=0.8, **shared,
    )  # fmt: skip
    print(moved.table())

    j = reading.names.index(HELD_OUT)
    gains = {k: a.outputs()[:, j] - a.outputs("no attack")[:, j] for k, a in attacks.items()}
    print(f"\n{HELD_OUT}, paired by seed")
    best = gains["metagradients"]
    lines = {f"metagradients - {k}": paired_interval(best, v) for k, v in gains.items() if k != "metagradients"}  # fmt: skip
    lines |= {f"metagradients - 2 x {k}": paired_interval(best, 2 * v) for k, v in gains.items() if "flips" in k}  # fmt: skip
    for words, interval in lines.items():
        print(f"  {words:45} {interval}")
    result = {k: a.verified.actual.tolist() for k, a in attacks.items()}
    (where / "results.json").write_text(json.dumps({"targets": reading.names, **result}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Flags, description=__doc__))
