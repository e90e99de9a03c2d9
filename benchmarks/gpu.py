"""What scoring, values during training, metagradients, curvature and stacks cost on a GPU.

    python benchmarks/gpu.py                             # a GPT-2 of 124 million parameters; some minutes
    python benchmarks/gpu.py --parts scoring --layers 2 --width 128 --vocab 512 --device cpu

Wall time of the device, waited for before every reading of the clock. Training and what is compared with it take turns
in one process. The language model has random weights and tokens: time depends on neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

Part = Literal["scoring", "in_run", "magic", "ekfac", "stacked"]


@dataclass(frozen=True)
class Flags:
    """Cost beside training."""

    parts: tuple[Part, ...] = ("scoring", "in_run", "magic", "ekfac", "stacked")
    """Which tables."""
    device: str = "cuda"
    """Where."""
    layers: int = 12
    """Of the GPT-2."""
    width: int = 768
    """Of the GPT-2."""
    heads: int = 12
    """Of the GPT-2."""
    vocab: int = 50257
    """Of the GPT-2."""
    batch: int = 8
    """Sequences a batch."""
    tokens: int = 512
    """Tokens a sequence."""
    batches: int = 12
    """Batches that are timed, or steps of a training whose metagradients are taken."""
    steps: int = 200
    """Steps of a training whose values are read."""
    settled: int = 100
    """Steps that have gone before, for the rows of a model that has settled."""
    memory: int = 48
    """GiB that waiting passes and kept states may take."""


def main(flags: Flags) -> None:
    import torch

    from recipes.command import device_of

    cuda = device_of(flags.device).type == "cuda"
    name = torch.cuda.get_device_name(flags.device) if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}")
    for part in flags.parts:
        PARTS[part](flags)


def now(flags: Flags) -> float:
    """Seconds, all work of the device done."""
    import torch

    if flags.device.startswith("cuda"):
        torch.cuda.synchronize(flags.device)
    return time.perf_counter()


def took(flags: Flags, act: Callable[..., Any], *given: Any, **settings: Any) -> tuple[float, Any]:
    """Seconds, and what came of act(*given, **settings)."""
    start = now(flags)
    found = act(*given, **settings)
    return now(flags) - start, found


def language_model(flags: Flags, dtype: Any = None) -> Any:
    """Random tokens for a GPT-2 without dropout, on the device."""
    import torch

    from benchmarks.scoring import Setting, build

    setting = Setting(
        layers=flags.layers, width=flags.width, heads=flags.heads, vocab=flags.vocab, batch=flags.batch,
        tokens=flags.tokens, batches=flags.batches,
    )  # fmt: skip
    problem = build(setting)
    return replace(problem, model=problem.model.to(flags.device, dtype or torch.float32).eval())


# --- first-order scores ------------------------------------------------------------------------------


def scoring(flags: Flags) -> None:
    """`directional` over a forward and backward pass of the same batch, by precision."""
    import numpy as np
    import torch

    print(
        "\n| precision | directions | training step, ms | scoring, ms | ratio | tokens a second | peak, GiB (step) |\n|---|---|---|---|---|---|---|"
    )
    for name, dtype, matmul in (
        ("float32", torch.float32, "highest"), ("float32, TF32 products", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):  # fmt: skip
        torch.set_float32_matmul_precision(matmul)
        for k in (1, 16):
            problem = language_model(flags, dtype)
            found, peaks = timed_batches(flags, problem, k)
            step, score = np.median(found, axis=0)
            print(
                f"| {name} | {k} | {1e3 * step:.1f} | {1e3 * score:.1f} | {np.median(found[:, 1] / found[:, 0]):.2f} | "
                f"{flags.batch * flags.tokens / score:,.0f} | {peaks[1]:.1f} ({peaks[0]:.1f}) |", flush=True,
            )  # fmt: skip
    torch.set_float32_matmul_precision("highest")


def timed_batches(flags: Flags, problem: Any, k: int) -> tuple[Any, tuple[float, float]]:
    """Seconds [batches, (training step, scoring)], the first two left out, and peaks of memory in GiB."""
    import numpy as np
    import torch

    from attribution_core.data import take
    from attribution_core.gradients import directional

    vectors = {
        name: torch.randn(k, *value.shape, device=value.device, dtype=value.dtype)
        for name, value in problem.params.items()
    }
    found: list[tuple[float, float]] = []
    step_peak, score_peak = 0.0, 0.0

    def step(rows: Any) -> None:
        batch = take(problem.train, rows, problem.device)
        problem.loss(problem.model, batch).mean().backward()
        problem.model.zero_grad(set_to_none=True)

    def interleave(batches: Iterable[Any]) -> Iterator[Any]:
        nonlocal step_peak, score_peak
        for rows in batches:
            forget_peak(flags)
            spent, _ = took(flags, step, rows)
            step_peak = max(step_peak, peak(flags))
            forget_peak(flags)
            start = now(flags)
            yield rows
            found.append((spent, now(flags) - start))
            score_peak = max(score_peak, peak(flags))

    directional(problem, vectors, engine="ghost", batch_size=flags.batch, progress=interleave)
    return np.array(found)[2:], (step_peak, score_peak)


def forget_peak(flags: Flags) -> None:
    import torch

    if flags.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(flags.device)


def peak(flags: Flags) -> float:
    """GiB of tensors at the most, models and directions included."""
    import torch

    on = flags.device.startswith("cuda")
    return torch.cuda.max_memory_allocated(flags.device) / 2**30 if on else float("nan")


# --- along a training ------------------------------------------------------------------------------


def trainings(flags: Flags) -> Iterator[tuple[str, Any, Any, Any]]:
    """(optimizer, problem, recipe, outputs) on the language model and random tokens."""
    from attribution_core import SGD, AdamW, Outputs, Recipe

    problem = language_model(flags)
    steps = flags.batches * flags.batch / problem.n
    held = {
        "input_ids": problem.train[list(range(problem.n - flags.batch, problem.n))]["input_ids"]
    }
    for name, optimizer in (
        ("SGD", SGD(0.01)),
        ("momentum", SGD(2e-3, 0.9)),
        ("AdamW", AdamW(3e-5)),
    ):
        yield (
            name,
            problem,
            Recipe(optimizer, flags.batch, steps),
            Outputs(problem.loss, held).mean(),
        )


def library_text(flags: Flags, rows: int) -> Any:
    """The bytes of Python's own sources as tokens, [rows, tokens]."""
    import os

    import torch

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: rows * flags.tokens]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(rows, flags.tokens)


def readings(flags: Flags) -> Iterator[tuple[str, Any, Any, Any]]:
    """(what, problem, recipe, outputs): text seen once, by a new model and by one that has settled."""
    from attribution_core import SGD, AdamW, Outputs, Recipe, train

    first, many = flags.settled * flags.batch, flags.steps * flags.batch
    ids = library_text(flags, first + many + flags.batch)
    new = language_model(flags)
    outputs = Outputs(new.loss, {"input_ids": ids[-flags.batch :]}).mean()
    before = replace(new, train={"input_ids": ids[:first]})
    after = replace(new, train={"input_ids": ids[first : -flags.batch]})

    def warm(step: int) -> float:
        return min(1.0, (step + 1) / 20)

    def recipe(optimizer: Any) -> Any:
        return Recipe(optimizer, flags.batch, 1, schedule=warm)

    yield "new, AdamW", after, recipe(AdamW(3e-4)), outputs
    model = train(before, recipe(AdamW(3e-4)), states=0).model
    settled = replace(after, model=model)
    for name, optimizer in (
        ("SGD", SGD(0.03)), ("momentum", SGD(3e-3, 0.9)), ("AdamW", AdamW(1e-4)),
    ):  # fmt: skip
        yield f"settled, {name}", settled, recipe(optimizer), outputs


def in_run(flags: Flags) -> None:
    """A training with values read off, over the training."""
    from attribution_core import train
    from attribution_core.in_run import in_run

    print(
        f"\n| in-run values, {flags.steps} steps of {flags.batch} × {flags.tokens} | training, s | with values, s | ratio "
        "| output gradients | change | remainder |\n|---|---|---|---|---|---|---|"
    )
    for name, problem, recipe, outputs in readings(flags):
        plain, _ = took(flags, train, problem, recipe, states=0)
        memory = flags.memory * 2**30
        read, found = took(flags, in_run, problem, recipe, outputs, memory=memory)
        meta = found.datamodel.meta
        print(
            f"| {name} | {plain:.2f} | {read:.2f} | {read / plain:.2f} | {meta['gradients']} | "
            f"{meta['change'][0]:+.3f} | {meta['relative_remainder'][0]:.1%} |", flush=True,
        )  # fmt: skip


def magic(flags: Flags) -> None:
    """The walk back through a training, over the training."""
    from attribution_core import magic, train

    print(
        f"\n| metagradients, {flags.batches} steps | training, s | walk, s | ratio | states held |\n|---|---|---|---|---|"
    )
    for name, problem, recipe, outputs in trainings(flags):
        memory = flags.memory * 2**30
        train(problem, recipe, memory=memory)
        plain, run = took(flags, train, problem, recipe, memory=memory)
        walk, found = took(flags, magic, run, outputs, check=False, memory=memory)
        print(
            f"| {name} | {plain:.2f} | {walk:.2f} | {walk / plain:.1f} | {found.meta['states_held']} |",
            flush=True,
        )


# --- curvature ---------------------------------------------------------------------------------------


def ekfac(flags: Flags) -> None:
    """EK-FAC influence of every sequence on the mean loss of a batch, beside one epoch of training steps."""
    import torch

    from attribution_core import influence, project

    problem = language_model(flags)
    *_, outputs = next(trainings(flags))
    print("\n| over all sequences | seconds | tokens a second |\n|---|---|---|")
    tokens = problem.n * flags.tokens
    for name, act, given, settings in (
        ("EK-FAC influence, one target", influence, (outputs,), {"curvature": "ekfac", "damping": 1e-3}),
        ("influence, identity", influence, (outputs,), {"curvature": "identity", "damping": 1.0}),
        ("gradients projected to 4,096", project, (problem.loss, 4096), {}),
    ):  # fmt: skip
        try:
            spent, _ = took(flags, act, problem, *given, **settings, batch_size=flags.batch)
        except torch.OutOfMemoryError as error:
            print(f"| {name} | out of memory: {str(error)[:80]} | |", flush=True)
            continue
        print(f"| {name} | {spent:.1f} | {tokens / spent:,.0f} |", flush=True)


# --- stacks ------------------------------------------------------------------------------------------


def stacked(flags: Flags) -> None:
    """Small models trained side by side, over one after the other (of which ten are timed)."""
    import numpy as np

    from attribution_core import random_subsets, retrain

    print(
        "\n| 100 trainings of 200 steps | one by one, s | stacked, s | ratio | apart |\n|---|---|---|---|---|"
    )
    for name, problem, recipe, outputs in small_models(flags):
        subsets = random_subsets(problem.n, 100, keep=0.5)
        table = partial(retrain, problem, recipe, outputs, seeds=1)
        table(subsets[:4], stack=4), table(subsets[:1], stack=1)
        side, many = took(flags, table, subsets, stack=100)
        single, few = took(flags, table, subsets[:10], stack=1)
        apart = np.abs(many.per_seed[:10] - few.per_seed).max()
        print(
            f"| {name} | {10 * single:.1f} | {side:.2f} | {10 * single / side:.0f} | {apart:.0e} |",
            flush=True,
        )


def small_models(flags: Flags) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, problem, recipe, outputs): digits MLPs, and a small GPT-2 on text."""
    from attribution_core import SGD, AdamW, Outputs, Recipe
    from recipes.data.tasks import digits_task, mlp

    for width in (16, 64, 512):
        task = digits_task(1000)
        problem = replace(task.problem, model=mlp(0, width).to(flags.device))
        recipe = Recipe(SGD(0.1, 0.9), 50, 20, init=partial(mlp, width=width))
        yield f"MLP of width {width}", problem, recipe, task.outputs
    small = replace(flags, layers=2, width=128, heads=4, vocab=256, batch=16, tokens=64)
    ids = library_text(small, 820)
    problem = replace(language_model(small), train={"input_ids": ids[:800]})
    outputs = Outputs(problem.loss, {"input_ids": ids[800:]})
    yield "GPT-2, 2 layers of width 128", problem, Recipe(AdamW(1e-3), 16, 8), outputs


PARTS: dict[Part, Callable[[Flags], None]] = {
    "scoring": scoring, "in_run": in_run, "magic": magic, "ekfac": ekfac, "stacked": stacked,
}  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
