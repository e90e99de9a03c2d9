"""Side by side with other libraries: the same checkpoints, the same targets, both timed in one run.

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch numpy scipy safetensors accelerate tqdm
    peers/bin/pip install einconv==0.1.0 einops==0.8.2 opt_einsum==3.4.0
    peers/bin/pip install --no-deps traker==0.3.2 kronfluence==1.0.1 dattri==0.3.0
    python benchmarks/peers/compare.py --peers-python peers/bin/python
    python benchmarks/peers/compare.py --peers-python peers/bin/python --task text

Each scorer (`ours.py`, `run_traker.py`, `run_kronfluence.py`, `run_dattri.py`) runs in a process of its
own, ours and the peer's alternating, with as many threads and rows a batch; seconds and peak memory are from
after the model and the data are loaded until the scores stand, what is written to disk on the way
included; medians are shown, and ratios are ours over the peer's (below 1: ours is faster or smaller).
Truth: halves of the data really removed, fresh initial weights and order for each seed. Agreement is of
the scores of one target over the training rows, averaged over targets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

HERE = Path(__file__).parent
CASES = {  # name: flags of ours, the peer's script and flags
    "digits": {
        "EK-FAC, labels of the data / kronfluence": (  # nothing is drawn: the scores must agree
            "--method ekfac --labels data",
            "run_kronfluence.py --labels data",
        ),
        "EK-FAC, run damping / kronfluence": (
            "--method ekfac --damping run",
            "run_kronfluence.py --damping run",
        ),
        "EK-FAC, .1 mean / kronfluence": (
            "--method ekfac --damping none",
            "run_kronfluence.py --damping none",
        ),
        "EK-FAC, what a large run gets / kronfluence, .1 mean": (
            "--method ekfac --damping run --refine size",
            "run_kronfluence.py --damping none",
        ),
        "EK-FAC, what a large run gets / kronfluence's default 1e-8": (
            "--method ekfac --damping run --refine size",
            "run_kronfluence.py --damping 1e-8",
        ),
        "EK-FAC, 4 refining steps / kronfluence, .1 mean": (
            "--method ekfac --damping run --refine 4",
            "run_kronfluence.py --damping none",
        ),
        "EK-FAC, run damping / dattri": (
            "--method ekfac --damping run",
            "run_dattri.py --method ekfac --damping run --batch-size 1500",
        ),
        "TRAK / traker": ("--method trak", "run_traker.py"),
        "TRAK / traker, default projector": ("--method trak", "run_traker.py --default-projector"),
        "TRAK / dattri": ("--method trak", "run_dattri.py --method trak"),
    },
    "text": {
        "EK-FAC, labels of the data, linear layers / kronfluence": (
            "--method ekfac --labels data --linear-only",
            "run_kronfluence.py --labels data",
        ),
        "EK-FAC, .1 mean, linear layers / kronfluence": (
            "--method ekfac --damping none --linear-only",
            "run_kronfluence.py --damping none",
        ),
        "EK-FAC, run damping, linear layers / kronfluence": (
            "--method ekfac --damping run --linear-only",
            "run_kronfluence.py --damping run",
        ),
        "EK-FAC, run damping, everything / kronfluence": (
            "--method ekfac --damping run",
            "run_kronfluence.py --damping run",
        ),
    },
}


@dataclass(frozen=True)
class Flags:
    """Side by side with traker, kronfluence and dattri."""

    peers_python: Path
    """The interpreter of the environment that the peers are installed in."""
    task: Literal["digits", "text"] = "digits"
    """An MLP on 1,500 digits, 100 margins; or a transformer of bytes, 512 texts, losses of 20 others."""
    width: int | None = None
    """Of the model: 256 for digits, 128 for text."""
    exposure: float = 1.0
    """Of the attributed runs: 1 is the usual full run, .5 what this package advises (see `train`)."""
    checkpoints: int = 5
    """For TRAK; the others take the first."""
    projection_dim: int = 128
    """Of TRAK, on both sides; of 64 to 512 traker's best on this task."""
    subsets: int | None = None
    """Random halves that are retrained: 40 for digits; 0, no truth, for text."""
    seeds: int = 3
    """Trainings of each half."""
    jobs: int = 2
    """Trainings side by side."""
    repeats: int = 3
    """Timings of each side."""
    threads: int = 1
    """Of torch, on both sides."""
    batch_size: int = 256
    """Rows a batch, on both sides (text: 64)."""
    only: str = ""
    """Only the comparisons with this in their name."""
    side: Literal["both", "ours", "peers"] = "both"
    """Run one side alone."""
    out: Path = Path("runs/peers")
    """Where tasks, scores and truths are kept; finished truths are read from there."""


def main(flags: Flags) -> None:
    """Make the task, run both sides, print one line a comparison."""
    size = {
        "kind": flags.task,
        "width": flags.width or {"digits": 256, "text": 128}[flags.task],
        "exposure": flags.exposure,
    }
    if flags.task == "text":
        size |= {"layers": 2, "heads": 4, "length": 64, "vocab": 128}
        flags = replace(flags, batch_size=min(flags.batch_size, 64))
    folder = flags.out / f"{flags.task}-{size['width']}-{flags.exposure}"
    folder.mkdir(parents=True, exist_ok=True)
    subsets = flags.subsets if flags.subsets is not None else {"digits": 40, "text": 0}[flags.task]
    truth = prepare(flags, size, folder, subsets)
    print(versions(flags.peers_python))
    print(
        f"{flags.task}, width {size['width']}, exposure {flags.exposure}, {flags.checkpoints} checkpoints, "
        f"projection to {flags.projection_dim}, {flags.threads} threads, batches of {flags.batch_size}, "
        f"medians of {flags.repeats}"
    )
    if truth is not None:
        from attribution_core.evaluation import ceiling

        print(f"{subsets} halves x {flags.seeds} seeds, ceiling {ceiling(truth):.3f}")
    print(
        "| ours / peer | LDS ours | LDS peer | difference | s ours | s peer | ratio (range) "
        "| CPU s ours | CPU s peer | ratio (range) | MiB ours | MiB peer | ratio | Spearman | Pearson |\n"
        + "|---" * 15
        + "|"
    )
    for name, (ours, peer) in CASES[flags.task].items():
        if flags.only in name:
            print(line(name, *both(flags, folder, ours, peer), truth, flags.exposure), flush=True)


def prepare(flags: Flags, size: dict[str, Any], folder: Path, subsets: int) -> Any:
    """Train what is attributed and write the task; retrain the halves (None without any)."""
    from functools import partial

    import torch
    from task import Task, build, losses, outputs, save

    from attribution_core import (
        SGD,
        AdamW,
        Outputs,
        Problem,
        Recipe,
        random_subsets,
        retrain,
        train,
    )

    data, test = digits_data() if flags.task == "digits" else text_data(size)
    problem = Problem(build(size), losses, data)
    recipe = Recipe(
        SGD(0.05, momentum=0.9) if flags.task == "digits" else AdamW(0.003, eps_root=0.0),
        batch_size=50 if flags.task == "digits" else 16,
        epochs=15 if flags.task == "digits" else 8,
        init=partial(build, size),
    )
    count = flags.checkpoints if flags.task == "digits" else 1
    runs = [
        train(problem, replace(recipe, seed=1000 + k), exposure=flags.exposure)
        for k in range(count)
    ]
    numbers = torch.cat([value.flatten() for value in runs[0].damping.values()])
    size |= {"damping": float(numbers.mean())}
    task = Task(size, data, test, [dict(run.params) for run in runs])
    save(folder, task)
    print(
        f"loss of the last steps {runs[0].losses[-20:].mean():.4f}, damping {size['damping']:.3g}"
    )
    if not subsets:
        return None
    halves = random_subsets(problem.n, subsets, keep=0.5)
    return retrain(
        problem, recipe, Outputs(outputs(task), test), halves,
        seeds=flags.seeds, jobs=flags.jobs, folder=folder / "truth",
    )  # fmt: skip


def digits_data() -> Any:
    """(x, y) of 1,500 digits and of 100 others."""
    import torch

    from recipes.embedded import digits

    data = digits(1500, 100)
    x, test_x = (torch.tensor(a, dtype=torch.float32) for a in (data.x, data.test_x))
    return (x, torch.tensor(data.y)), (test_x, torch.tensor(data.test_y))


def text_data(size: dict[str, Any]) -> Any:
    """(bytes, next bytes) of 512 docstrings and others, and of 20 of other modules."""
    import torch

    from recipes.embedded import text_pool, text_target

    def rows(documents: Any, count: int) -> Any:
        length = size["length"] + 1
        texts = [d.text.encode("ascii", "replace")[:length] for d in documents]
        whole = [list(text) for text in texts if len(text) == length][:count]
        ids = torch.tensor(whole)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return rows(text_pool(1000), 512), rows(text_target(100), 20)


def both(flags: Flags, folder: Path, ours: str, peer: str) -> list[Any]:
    """What each side wrote, alternating: [(scores, seconds [r], CPU [r], MiB [r])] of ours and of the peer."""
    sides = {
        "ours": (sys.executable, f"ours.py {ours}"),
        "peers": (str(flags.peers_python), peer),
    }
    found: dict[str, list[Any]] = {"ours": [], "peers": []}
    for round_ in range(flags.repeats):
        for side in list(sides)[:: 1 if round_ % 2 == 0 else -1]:
            if flags.side in ("both", side):
                result = score(flags, folder, *sides[side])
                if result is not None:
                    found[side].append(result)
    return [(r[0][0], *np.array([x[1:] for x in r]).T) if r else None for r in found.values()]


def score(flags: Flags, folder: Path, python: str, command: str) -> Any:
    """(scores, seconds, CPU seconds, MiB) of one scorer in a process of its own; None, and why, where it fails."""
    script, *more = command.split()
    out = folder / "scores.npz"
    shared = {
        "--threads": flags.threads,
        "--batch-size": flags.batch_size,
        "--projection-dim": flags.projection_dim,
    }
    args = [str(x) for pair in shared.items() for x in pair]
    call = [python, str(HERE / script), str(folder), str(out), *args, *more]
    env = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "TQDM_DISABLE": "1"}
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"failed: {command}: {(done.stderr.strip() or '?').splitlines()[-1]}", flush=True)
        return None
    kept = folder / f"{command.replace(' ', '_').replace('.py', '')}.npz"
    shutil.move(out, kept)
    with np.load(kept) as held:
        return held["scores"].astype(float), *(float(held[k]) for k in ("seconds", "cpu", "mib"))


def line(name: str, ours: Any, peer: Any, truth: Any, exposure: float) -> str:
    """A row of the table."""
    cells = [name]
    scored = [correlations(side[0], truth, exposure) if side else None for side in (ours, peer)]
    for s in scored:
        cells.append("" if s is None else interval(s))
    together = ours and peer
    cells.append(interval(scored[0] - scored[1]) if together and truth is not None else "")
    for k, digits in ((1, 2), (2, 2), (3, 0)):
        a, b = (side[k] if side else None for side in (ours, peer))
        cells += ["" if x is None else f"{np.median(x):.{digits}f}" for x in (a, b)]
        ratio = ""
        if together:
            ratio = f"**{np.median(a) / np.median(b):.2f}**"
            if k < 3 and len(a) == len(b):
                ratio += f" ({(a / b).min():.2f}–{(a / b).max():.2f})"
        cells.append(ratio)
    if together:
        from attribution_core.evaluation import spearman

        pearson = np.mean(
            [np.corrcoef(x, y)[0, 1] for x, y in zip(ours[0].T, peer[0].T, strict=True)]
        )
        cells += [f"{spearman(ours[0], peer[0]).mean():.3f}", f"{pearson:.3f}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def correlations(scores: NDArray[Any], truth: Any, exposure: float) -> Any:
    """The rank correlation of each target, or None."""
    if truth is None:
        return None
    from attribution_core import LinearDatamodel, lds

    return lds(LinearDatamodel(scores, np.zeros(scores.shape[1]), exposure), truth).per_target


def interval(values: NDArray[Any]) -> str:
    """The mean over targets with its 95 % bootstrap interval."""
    from attribution_core.evaluation import bootstrap_interval

    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def versions(python: Path) -> str:
    """The peers' versions, from their own environment."""
    code = (
        "import json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in "
        "('traker', 'kronfluence', 'dattri', 'torch', 'numpy')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return ", ".join(f"{k} {v}" for k, v in json.loads(done.stdout).items())


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
