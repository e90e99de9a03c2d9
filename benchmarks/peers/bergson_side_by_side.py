"""`magic` beside bergson's MAGIC: one tiny GPT-2, the same order, Adam and targets, timed in one run.

    python -m venv bergson
    bergson/bin/pip install -c constraints.txt torch==2.13.0 datasets transformers peft simple-parsing \
        natsort ml_dtypes petname jaxtyping accelerate tqdm scipy optree graphviz
    bergson/bin/pip install --no-deps bergson==2.5.1 torchopt==0.7.3
    python benchmarks/peers/bergson_side_by_side.py --bergson-python bergson/bin/python
    python benchmarks/peers/bergson_side_by_side.py --bergson-python bergson/bin/python --kept sqrt

Both sides are d mean target loss / d weight of a training sequence, the batch's sum divided by its size: the
same sign and the same units. Each side runs in processes of its own, alternating; CPU seconds are medians over
them, ratios are ours over bergson's within a pair of runs. "1 target" is the mean over all targets; "several"
are single sequences, which we walk back together and bergson one after the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Flags:
    """Side by side with bergson."""

    bergson_python: Path
    """The interpreter of the environment that bergson is installed in."""
    kept: Literal["all", "sqrt"] = "all"
    """States of the training kept for the walk back: all, or about √T (bergson's default)."""
    repeats: int = 3
    """Runs of each side."""
    steps: int = 100
    """Of the training."""
    batch_size: int = 16
    """Sequences a step."""
    n: int = 512
    """Training sequences, of random tokens."""
    targets: int = 32
    """Target sequences in the mean."""
    queries: int = 8
    """Target sequences that are attributed one by one."""
    width: int = 64
    """Of the GPT-2."""
    layers: int = 2
    """Of the GPT-2."""
    tied: bool = False
    """One matrix for the embeddings and the logits, as GPT-2 has it; bergson's training then differs from ours."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of both sides."""
    check: bool = False
    """Also compare with a finite difference in 4 directions, by each side's own training; meant for float64."""
    threads: int = 1
    """Of torch, on both sides."""


def main(flags: Flags) -> None:
    """Write the task, run both sides in turn, print what they found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_task(flags, folder)
        print(versions(flags.bergson_python))
        print(f"{parameters:,} parameters; {flags}")
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "bergson": []}
        for round_ in range(flags.repeats):
            for side in list(found)[:: 1 if round_ % 2 == 0 else -1]:
                found[side].append(RUNS[side](flags, folder))
        report(flags, found, folder)


def write_task(flags: Flags, folder: Path) -> int:
    """The model, the data and the settings as files; the number of parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=32, n_embd=flags.width, n_layer=flags.layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            attn_implementation="eager", tie_word_embeddings=flags.tied,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    passes = -(-flags.steps * flags.batch_size // flags.n)
    drawn = np.concatenate([rng.permutation(flags.n) for _ in range(passes)])
    np.savez(
        folder / "data.npz",
        train=rng.integers(1, 256, (flags.n, 32)),
        test=rng.integers(1, 256, (flags.targets, 32)),
        order=drawn[: flags.steps * flags.batch_size].reshape(flags.steps, flags.batch_size),
        directions=rng.standard_normal((4, flags.n)),
    )
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "eps_root": 1e-8}
    moved = {"float32": 0.02, "float64": 1e-4}[flags.dtype]
    more = {"queries": flags.queries, "dtype": flags.dtype, "check": flags.check, "moved": moved}
    (folder / "settings.json").write_text(json.dumps({**adam, **more}), encoding="utf-8")
    return sum(value.numel() for value in model.parameters())


def bergson(flags: Flags, folder: Path) -> dict[str, Any]:
    """What bergson finds, in a process of its own."""
    out = folder / "bergson.npz"
    script, options = HERE / "run_bergson.py", ["--save-mode", flags.kept, "--threads"]
    call = [flags.bergson_python, script, folder, out, *options, flags.threads]
    env = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "TQDM_DISABLE": "1"}
    done = subprocess.run([str(x) for x in call], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bergson failed:\n{done.stderr[-3000:]}")
    return read(out)


def ours(flags: Flags, folder: Path) -> dict[str, Any]:
    """What this package finds, in a process of its own."""
    out = folder / "ours.npz"
    process = multiprocessing.get_context("spawn").Process(target=score, args=(flags, folder, out))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("this package's side failed, see above")
    return read(out)


RUNS = {"ours": ours, "bergson": bergson}


def read(out: Path) -> dict[str, Any]:
    """The arrays of a file."""
    with np.load(out) as held:
        return dict(held)


def score(flags: Flags, folder: Path, out: Path) -> None:
    """This package's side, written to a file."""
    import torch

    torch.set_num_threads(flags.threads)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    data = read(folder / "data.npz")
    score_steps(flags, folder, data, settings, 3, 2)  # what is loaded at the first call is no work
    found = score_steps(flags, folder, data, settings, flags.steps, flags.queries)
    run = found.pop("run")
    if flags.check:
        found["differences"] = differences(run, data, settings["moved"])
    np.savez(out, **found)


def score_steps(
    flags: Flags, folder: Path, data: Any, settings: Any, steps: int, count: int
) -> dict[str, Any]:
    """Train and attribute, timed."""
    import torch
    from task import measured
    from transformers import GPT2LMHeadModel, logging

    from attribution_core import AdamW, Outputs, Problem, Recipe, causal_lm_loss, magic, train

    logging.disable_progress_bar()
    dtype = getattr(torch, flags.dtype)
    model = GPT2LMHeadModel.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=dtype
    ).eval()
    rows = {k: {"input_ids": torch.from_numpy(data[k])} for k in ("train", "test")}
    problem = Problem(model, causal_lm_loss, rows["train"])
    adam = {k: v for k, v in settings.items() if k in ("lr", "eps", "eps_root")}
    optimizer = AdamW(**adam, betas=tuple(settings["betas"]), weight_decay=0.0)
    recipe = Recipe(optimizer, flags.batch_size, 1, order=list(data["order"][:steps]))
    with measured() as plain:
        train(problem, recipe, states=0)
    with measured() as kept:
        run = train(problem, recipe, states=flags.kept)
    with measured() as one:
        mean = magic(
            run, Outputs(causal_lm_loss, rows["test"]).mean(), states=flags.kept, check=False
        )
    few = Outputs(causal_lm_loss, {"input_ids": rows["test"]["input_ids"][:count]})
    with measured() as several:
        each = magic(run, few, states=flags.kept, check=False)
    times = {"plain": plain, "kept": kept, "one": one, "several": several}
    cpu = {f"cpu_{k}": v["cpu"] for k, v in times.items()}
    losses = {
        f"loss_{k}": run.outputs(Outputs(causal_lm_loss, v).mean()).item() for k, v in rows.items()
    }
    scores = {"mean": mean.scores[:, 0], "each": each.scores}
    return {**scores, **losses, **cpu, "run": run}


def differences(run: Any, data: Any, width: float) -> NDArray[np.float64]:
    """The derivatives along the directions, by training again on both sides of the weights."""
    import torch

    from attribution_core import Outputs, causal_lm_loss

    target = Outputs(causal_lm_loss, {"input_ids": torch.from_numpy(data["test"])}).mean()
    moved = width * data["directions"]
    up, down = (
        np.array([run.again(1 + sign * v).outputs(target).item() for v in moved])
        for sign in (1, -1)
    )
    return (up - down) / (2 * width)


def report(flags: Flags, found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Print agreement, losses, and CPU seconds with their ratios."""
    a, b = found["ours"][0], found["bergson"][0]
    for name in ("train", "test"):
        x, y = float(a[f"loss_{name}"]), float(b[f"loss_{name}"])
        print(f"final {name} loss: ours {x:.7f}, bergson {y:.7f}, difference {x - y:+.1e}")
    agreement("mean target", a["mean"][:, None], b["mean"][:, None])
    agreement(f"{flags.queries} single targets", a["each"], b["each"])
    if flags.check:
        directions = read(folder / "data.npz")["directions"]
        for side, one in (("ours", a), ("bergson", b)):
            predicted, real = directions @ one["mean"], one["differences"]
            error = np.linalg.norm(predicted - real) / np.linalg.norm(real)
            print(f"{side}: relative error {error:.1e} in {len(real)} directions of the weights")
    print("\n| CPU s | ours | bergson | ratio (range) |\n|---|---|---|---|")
    for label, key in ROWS.items():
        print(line(label.format(flags), *([one[key] for one in found[side]] for side in found)))
    for side, runs in found.items():
        shares = [one["cpu_one"] / one["cpu_plain"] for one in runs]
        each = [one["cpu_several"] / one["cpu_plain"] for one in runs]
        print(
            f"{side}: 1 target costs {np.median(shares):.2f} plain trainings, "
            f"{flags.queries} cost {np.median(each):.2f}"
        )


ROWS = {
    "training, no states kept": "cpu_plain",
    "training, states kept ({0.kept})": "cpu_kept",
    "1 target (mean of {0.targets})": "cpu_one",
    "{0.queries} targets": "cpu_several",
}


def agreement(name: str, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Print correlations over the training rows and distances, the worst of the columns."""
    from attribution_core.evaluation import spearman

    pearson = min(np.corrcoef(p, q)[0, 1] for p, q in zip(x.T, y.T, strict=True))
    norms = np.linalg.norm(x, axis=0) / np.linalg.norm(y, axis=0) - 1
    apart = np.linalg.norm(x - y, axis=0) / np.linalg.norm(y, axis=0)
    print(
        f"{name}: Pearson {pearson:.8f}, Spearman {spearman(x, y).min():.8f}, norms differ by "
        f"{norms[np.abs(norms).argmax()]:+.1e}, |ours - bergson| / |bergson| {apart.max():.1e}"
    )


def line(label: str, ours: list[Any], theirs: list[Any]) -> str:
    """A row of the table."""
    x, y = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    ratio = f"**{np.median(x / y):.2f}** ({(x / y).min():.2f}–{(x / y).max():.2f})"
    return f"| {label} | {np.median(x):.2f} | {np.median(y):.2f} | {ratio} |"


def versions(python: Path) -> str:
    """Of both environments."""
    code = (
        "import json, sys, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in "
        "sys.argv[1:]}))"
    )
    names = {"bergson": ["bergson", "torchopt"], "ours": []}
    lines = []
    for side, interpreter in (("bergson", str(python)), ("ours", sys.executable)):
        call = [interpreter, "-c", code, "torch", "transformers", "numpy", *names[side]]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        held = ", ".join(f"{k} {v}" for k, v in json.loads(done.stdout).items())
        lines.append(f"{side}: {held}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
