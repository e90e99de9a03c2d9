"""What metagradients cost: time against plain torch training, states and memory against steps.

    python benchmarks/magic.py                    # a tiny GPT-2, 1, 8 and 32 targets
    python benchmarks/magic.py --model mlp
    python benchmarks/magic.py --memory           # states held and their bytes for 100 to 1,600 steps

Time is CPU time of one thread, in multiples of training the same run by torch.optim; the fastest of
several repeats, all in one process.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Flags:
    """Cost of magic."""

    model: Literal["gpt2", "mlp"] = "gpt2"
    """A GPT-2 of 130,000 parameters on 16 × 32 tokens a step, or a digits MLP of 4,800 on 50 rows."""
    targets: tuple[int, ...] = (1, 8, 32)
    """Numbers of targets."""
    steps: int = 100
    """Steps of the run."""
    repeats: int = 3
    """Repeats of every timing."""
    forms: bool = False
    """Time both forms of the second-order pass."""
    memory: bool = False
    """Count states instead."""


def setting(model: str, steps: int) -> tuple[Any, Any, Callable[[int], Any]]:
    """Problem, recipe, and outputs by their number."""
    import torch

    from attribution_core import AdamW, Outputs, Problem, Recipe, causal_lm_loss
    from recipes.data.tasks import digits_task, gpt2

    if model == "mlp":
        task = digits_task(targets=200)
        x, y = task.outputs.data.columns
        recipe = Recipe(AdamW(1e-3), 50, steps * 50 / task.problem.n)
        return task.problem, recipe, lambda k: replace(task.outputs, data=(x[:k], y[:k]))
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (512, 32), generator=rng)
    test = torch.randint(0, 512, (64, 32), generator=rng)
    problem = Problem(gpt2(0), causal_lm_loss, {"input_ids": ids})
    recipe = Recipe(AdamW(1e-3), 16, steps * 16 / 512)
    return problem, recipe, lambda k: Outputs(causal_lm_loss, {"input_ids": test[:k]})


def plain(problem: Any, recipe: Any, order: list[Any]) -> None:
    """The textbook loop."""
    import torch

    model = copy.deepcopy(problem.model)
    tool = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=0.0)
    for rows in order:
        tool.zero_grad()
        problem.loss(model, problem.train[rows.tolist()]).mean().backward()
        tool.step()


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least CPU time of several repeats, and the last result."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        found = run()
        best = min(best, time.process_time() - start)
    return best, found


def cost(flags: Flags) -> None:
    """Multiples of plain training, by number of targets."""
    import numpy as np

    from attribution_core import magic, train

    problem, recipe, outputs = setting(flags.model, flags.steps)
    order = recipe.draw(np.arange(problem.n))
    base, _ = seconds(lambda: plain(problem, recipe, order), flags.repeats)
    own, run = seconds(lambda: train(problem, recipe), flags.repeats)
    print(
        f"{flags.model}, {len(order)} steps: plain training {base:.2f} s = 1, train {own / base:.2f}"
    )
    walks = {}
    for count in flags.targets:
        for form in ("double", "vmap") if flags.forms else ("auto",):
            repeats = flags.repeats if count < 8 else 1
            spent, _ = seconds(
                lambda form=form, count=count: magic(run, outputs(count), form=form, check=False),
                repeats,
            )
            walks[count] = spent / base
            more = (walks[count] - walks[flags.targets[0]]) / max(1, count - flags.targets[0])
            print(
                f"{count:4d} targets, {form:6}: walk {walks[count]:6.2f}, training included "
                f"{walks[count] + own / base:6.2f}, each further target {more:5.2f}"
            )
    one, most = flags.targets[0], flags.targets[-1]
    if one == 1:
        single = most * (walks[1] + own / base)
        print(
            f"{most} targets at once: {(walks[most] + own / base) / single:.2f} of {most} single runs with their "
            f"trainings, {walks[most] / (most * walks[1]):.2f} of {most} walks"
        )


def memory(flags: Flags) -> None:
    """States held, and the bytes of one."""
    from attribution_core import magic, train

    print(f"{'steps':>6}{'schedule':>10}{'states':>8}{'KiB':>10}")
    for states in ("all", "sqrt", 20):
        for steps in (100, 400, 1600):
            problem, recipe, outputs = setting("mlp", steps)
            run = train(problem, recipe, states=states)
            held = magic(run, outputs(1), states=states, check=False).meta["states_held"]
            print(f"{steps:6d}{states!s:>10}{held:8d}{held * run.last.bytes / 2**10:10.0f}")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    flags = tyro.cli(Flags, description=__doc__)
    (memory if flags.memory else cost)(flags)
