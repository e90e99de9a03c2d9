"""Images moved by metagradients through training, beside label flips and gradient matching, on fresh victims.

    python benchmarks/poisoning.py --model mlp --split 0            # about ten minutes; cnn: about forty
    python benchmarks/poisoning.py --model cnn --split 0 --out runs/poisoning

Digits: 800 training images of which 2.5 % may be changed, 700 target images that the adversary holds, 297 held out
that nobody chose on. Every attack is judged on victims of fresh seeds, paired by seed; the other architecture is the
row of transfer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from applied.poisoning import Attack, ThreatModel, flip_labels, perturb
from applied.recipe import Interval, paired_interval
from attribution_core import (
    SGD,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    correct,
    cross_entropy,
    gradient_matching,
    influence,
    input_influence,
    join_outputs,
    magic,
    retrain,
    train,
)
from recipes.embedded import digits

TARGET, HELD_OUT, ACCURACY = "target loss", "held-out loss", "held-out accuracy"
FIRST_VICTIM = 1000
TARGETS = 700  # images that the adversary holds
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
    steps: int = 150
    """Of the ascent, each through one training."""
    victims: int = 8
    """Trainings from fresh seeds."""
    rounds: int = 5
    """Of the stronger label flips."""
    out: Path = Path("runs/poisoning")
    """Inputs on their way and results; the same call goes on."""


def mlp(seed: int) -> Any:
    """64 pixels, 64 GELUs, 10 classes."""
    nn = torch.nn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def cnn(seed: int) -> Any:
    """Two convolutions with GELUs, 10 classes."""
    nn = torch.nn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(384, 10),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """Digits, two architectures, and what is read of them.

    Args:
        problem: training images, with the audited architecture.
        recipes: architecture -> how it is trained.
        reading: losses and accuracy of victims; losses: of targets and held-out images; goal: of targets.
    """

    problem: Problem
    recipes: dict[str, Recipe]
    reading: Outputs
    losses: Outputs
    goal: Outputs
    own: str

    @property
    def recipe(self) -> Recipe:
        return self.recipes[self.own]

    def victim(self, which: str, data: Problem, weights: Any, seeds: Any) -> Any:
        """Outputs of one architecture, retrained."""
        make: Any = self.recipes[which].init
        at = replace(data, model=make(0))
        return retrain(at, self.recipes[which], self.reading, weights, seeds=seeds)

    def trained(self, data: Problem, seed: int, **how: Any) -> Any:
        """One training of the audited architecture."""
        return train(data, replace(self.recipe, seed=seed), **how)

    def flips(self, data: Problem, w: Any) -> Any:
        """The datamodel of labels."""
        runs = [self.trained(data, k, weights=w, drop="row", states=0) for k in range(SURROGATES)]
        return influence(runs, self.losses, curvature="ekfac", batch_size=1024)

    def through(self, data: Problem, rows: Any, step: int) -> Any:
        """The datamodel of inputs, through training."""
        return magic(self.trained(data, step), self.goal, wrt="inputs", rows=rows, check=False)

    def by_influence(self, data: Problem, rows: Any, step: int) -> Any:
        """The same by one curvature solve."""
        run = self.trained(data, step, states=0)
        return input_influence(run, self.goal, rows=rows, curvature="ekfac")

    def by_matching(self, data: Problem, rows: Any, step: int) -> Any:
        """The baseline, alignment of gradients."""
        return gradient_matching(self.trained(data, step, states=0), self.goal, rows=rows)


def prepared(flags: Flags) -> Setting:
    """The split and the two ways to train."""
    table = digits(800, seed=flags.split)
    x, others = (torch.tensor(a).float().reshape(-1, 1, 8, 8) for a in (table.x, table.test_x))
    labels = torch.tensor(table.test_y)
    target, held = (
        Outputs(cross_entropy, (others[some], labels[some])).mean()
        for some in (slice(TARGETS), slice(TARGETS, None))
    )
    losses = {TARGET: target, HELD_OUT: held}
    recipes = {
        "mlp": Recipe(SGD(0.05, momentum=0.9), 50, 15, init=mlp),
        "cnn": Recipe(AdamW(3e-3), 50, 15, schedule="cosine", init=cnn),
    }
    first: Any = recipes[flags.model].init
    return Setting(
        Problem(first(0), cross_entropy, (x, torch.tensor(table.y))), recipes,
        join_outputs({**losses, ACCURACY: replace(held, function=correct)}),
        join_outputs(losses), join_outputs({TARGET: target}),
        flags.model,
    )  # fmt: skip


def attacks(flags: Flags, setting: Setting, where: Path) -> Iterator[Attack]:
    """One attack after the other; the last is the transfer of the one before."""
    other = "cnn" if flags.model == "mlp" else "mlp"
    own, foreign = (partial(setting.victim, which) for which in (flags.model, other))
    shared: Any = {
        "targets": setting.reading.names,
        "seeds": range(FIRST_VICTIM, FIRST_VICTIM + flags.victims),
    }
    for rounds in (1, flags.rounds):
        labels = ThreatModel(flags.budget, "labels")
        yield flip_labels(
            setting.problem, labels, setting.flips, own, goal=TARGET, rounds=rounds, **shared
        )
    ways: list[tuple[str, Any, str, Any]] = [
        ("gradient matching", setting.by_matching, "alignment", own),
        ("influence", setting.by_influence, TARGET, own),
        ("metagradients", setting.through, TARGET, own),
        (f"metagradients of {flags.model} on {other}", setting.through, TARGET, foreign),
    ]
    for name, surrogate, goal, victim in ways:
        inputs = ThreatModel(
            flags.budget, "inputs", "white-box" if victim is own else "grey-box", epsilon=1.0, box=(0.0, 1.0)
        )  # fmt: skip
        yield perturb(
            setting.problem, inputs, surrogate, victim, goal=goal, steps=flags.steps,
            name=name,
            folder=where / name.partition(" of ")[0].replace(" ", "-"), **shared,
        )  # fmt: skip


def compared(gains: Mapping[str, NDArray[np.float64]]) -> dict[str, Interval]:
    """Metagradients beside every other attack, and beside twice the label flips, paired by seed."""
    best = gains["metagradients"]
    others = {k: v for k, v in gains.items() if not k.startswith("metagradients")}
    once = {k: paired_interval(best, v) for k, v in others.items()}
    twice = {
        k: paired_interval(best, 2 * v) for k, v in others.items() if k.startswith("flip_labels")
    }
    return {
        **{f"metagradients - {k}": found for k, found in once.items()},
        **{f"metagradients - 2 x {k}": found for k, found in twice.items()},
    }


def main(flags: Flags) -> None:
    """Every attack, its table, and the paired differences."""
    torch.set_num_threads(1)
    setting, where = prepared(flags), flags.out / f"{flags.model}-{flags.split}"
    j = setting.reading.names.index(HELD_OUT)
    gains, result = {}, {}
    for attack in attacks(flags, setting, where):
        print(attack.table(), flush=True)
        gains[attack.name] = attack.outputs()[:, j] - attack.outputs("no attack")[:, j]
        result[attack.name] = attack.outputs().tolist()
    print(f"\n{HELD_OUT}, paired by seed")
    for words, interval in compared(gains).items():
        print(f"  {words:45} {interval}")
    (where / "results.json").write_text(json.dumps({"targets": setting.reading.names, **result}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Flags, description=__doc__))
