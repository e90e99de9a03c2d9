"""What both sides of a comparison see: models, losses, and the files that pass between two environments.

Needs torch, numpy and safetensors only. A task is a folder that `compare.py` writes:

    task.json                    kind, sizes, seed, damping (1/(ηK) of the run), exposure
    data.npz                     x [n, ...], y [n, ...], test_x [t, ...], test_y [t, ...]
    checkpoint0.safetensors ...  parameters of the trained models

A scorer reads it and writes an npz: scores [n, t] as d output / d weight (up to a factor where a library
drops the units), seconds, CPU seconds, MiB above what the process held before it began.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Batch = Any  # (inputs, labels)
Size = dict[str, Any]


def build(size: Size, seed: int = 0) -> nn.Module:
    """A fresh model: an MLP for digits, a transformer for text; weights from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if size["kind"] == "digits":
            w = size["width"]
            return nn.Sequential(
                nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10)
            )
        return Transformer(size)


class Transformer(nn.Module):
    """A small causal language model; every matrix but the embeddings is an nn.Linear."""

    def __init__(self, size: Size):
        super().__init__()
        w = size["width"]
        self.tokens = nn.Embedding(size["vocab"], w)
        self.positions = nn.Embedding(size["length"], w)
        self.blocks = nn.ModuleList(Block(w, size["heads"]) for _ in range(size["layers"]))
        self.norm = nn.LayerNorm(w)
        self.head = nn.Linear(w, size["vocab"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, T] -> logits [b, T, vocab]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention, then an MLP, each beside a residual connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, T, width] -> the same."""
        b, t, w = x.shape
        split = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split[0], split[1], split[2]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        seen = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(label) in nats, [b]; of text, the mean over tokens."""
    inputs, labels = batch
    return cross_entropies(model(inputs), labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits [b, ..., classes] and labels [b, ...]."""
    nats = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return nats.reshape(len(labels), -1).mean(1)


def margins(model: nn.Module, batch: Batch) -> Tensor:
    """log p/(1 − p) of the label, [b]."""
    inputs, labels = batch
    logits = model(inputs)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own[:, 0] - others.logsumexp(1)


def outputs(task: Task) -> Any:
    """What is attributed: margins of digits, losses of text."""
    return margins if task.size["kind"] == "digits" else losses


@dataclass(frozen=True)
class Task:
    """A folder, read."""

    size: Size
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    states: list[dict[str, Tensor]]

    def model(self, checkpoint: int = 0) -> nn.Module:
        """A trained model, in eval mode."""
        model = build(self.size)
        model.load_state_dict(self.states[checkpoint])
        return model.eval()

    def loader(self, split: str, batch_size: int) -> DataLoader[Any]:
        """Batches in order."""
        return DataLoader(TensorDataset(*getattr(self, split)), batch_size=batch_size)


def save(folder: Path, task: Task) -> None:
    """Write a task."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("x", "y", "test_x", "test_y")
    columns = dict(zip(names, (*task.train, *task.test), strict=True))
    np.savez(folder / "data.npz", **{name: column.numpy() for name, column in columns.items()})
    for k, state in enumerate(task.states):
        save_file(
            {n: v.contiguous() for n, v in state.items()}, folder / f"checkpoint{k}.safetensors"
        )
    size = {**task.size, "checkpoints": len(task.states)}
    (folder / "task.json").write_text(json.dumps(size), encoding="utf-8")


def load(folder: Path) -> Task:
    """Read a task."""
    size = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    with np.load(folder / "data.npz") as held:
        x, y, test_x, test_y = (torch.from_numpy(held[k]) for k in ("x", "y", "test_x", "test_y"))
    states = [load_file(folder / f"checkpoint{k}.safetensors") for k in range(size["checkpoints"])]
    return Task(size, (x, y), (test_x, test_y), states)


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fills in seconds, CPU seconds, and MiB of peak memory above what the process holds at the start."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
    before, start, cpu = held(), time.perf_counter(), time.process_time()
    yield found
    found["seconds"] = time.perf_counter() - start
    found["cpu"] = time.process_time() - cpu
    found["mib"] = peak() - before


def held() -> float:
    """MiB that the process holds now; where there is no /proc, the most that it ever held."""
    return _status("VmRSS")


def peak() -> float:
    """MiB at the peak."""
    return _status("VmHWM")


def _status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that all scorers share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a task, as compare.py writes it")
    parser.add_argument("out", type=Path, help="the npz to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--damping", default="run", help="run (that of the task), none, or a number"
    )
    parser.add_argument(
        "--labels", choices=("model", "data"), default="model", help="of the curvature of EK-FAC"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn labels and projections")
    parser.add_argument("--projection-dim", type=int, default=256, help="of TRAK")
    parser.add_argument(
        "--checkpoints", type=int, help="of TRAK: use the first few; all if not given"
    )
    return parser


def damping(flag: str, task: Task) -> float | None:
    """The damping that a flag names; None is a library's own rule."""
    if flag == "none":
        return None
    return float(task.size["damping"] if flag == "run" else flag)


def write(out: Path, scores: Any, found: dict[str, float], **more: Any) -> None:
    """Write a scorer's result."""
    np.savez(out, scores=np.asarray(scores, dtype=np.float32), **found, **more)
