"""What values read off during training cost, and how far their sum is from the change of the output.

    python benchmarks/in_run.py                   # a tiny GPT-2, batches of 50, 20 held-out rows
    python benchmarks/in_run.py --model mlp       # digits, batches of 50, 200 held-out rows

CPU time of one thread, trainings with and without reading in turns in one process; the ratio of the
fastest and the median of the ratios.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Flags:
    """Cost and remainder of in_run."""

    model: Literal["gpt2", "mlp"] = "gpt2"
    """The tiny GPT-2 on text, or the digits MLP."""
    batch: int = 50
    """Rows of a batch."""
    held_out: int = 20
    """Rows of the mean output of the GPT-2; the MLP's are 200."""
    epochs: float = 5
    """Passes over 1,000 blocks or 1,500 digits."""
    repeats: int = 5
    """Repeats of every timing."""
    order: Literal[1, 2] = 2
    """The rule along a segment."""
    folder: Path = Path("runs/in_run")
    """Where tokeniser and blocks are kept."""


def setting(flags: Flags) -> tuple[Any, dict[str, Any]]:
    """The task, and optimizers that train it."""
    from attribution_core import SGD, AdamW
    from recipes.data.tasks import digits_task, text_task

    if flags.model == "mlp":
        optimizers = {"SGD": SGD(0.1), "momentum": SGD(0.02, 0.9), "AdamW": AdamW(3e-3)}
        return digits_task(targets=200), optimizers
    optimizers = {"SGD": SGD(0.1), "momentum": SGD(0.02, 0.9), "AdamW": AdamW(1e-3)}
    return text_task(flags.folder, 1000, flags.held_out), optimizers


def main(flags: Flags) -> None:
    """One line an optimizer."""
    import numpy as np

    from attribution_core import Recipe, train
    from attribution_core.in_run import in_run

    task, optimizers = setting(flags)
    outputs = task.outputs.mean()
    print(
        f"{'optimizer':>10}{'steps':>7}{'gradients':>11}{'change':>9}{'remainder':>11}{'cost':>7}"
    )
    for name, optimizer in optimizers.items():
        recipe = Recipe(optimizer, flags.batch, flags.epochs)
        plain, read, meta = [], [], {}
        for _ in range(flags.repeats):
            start = time.process_time()
            run = train(task.problem, recipe, states=0)
            plain.append(time.process_time() - start)
            start = time.process_time()
            meta = in_run(task.problem, recipe, outputs, order=flags.order).datamodel.meta
            read.append(time.process_time() - start)
        median = np.median(np.array(read) / plain)
        print(
            f"{name:>10}{len(run.order):7d}{meta['gradients']:11d}{meta['change'][0]:9.3f}"
            f"{meta['relative_remainder'][0]:11.1%}{min(read) / min(plain):7.2f} (median {median:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(tyro.cli(Flags, description=__doc__))
