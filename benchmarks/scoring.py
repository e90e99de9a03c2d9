"""What scoring costs beside training: `directional` per batch over a forward and backward pass.

    python benchmarks/scoring.py                          # GPT-2 of 4 layers, width 256; 1 and 16 directions
    python benchmarks/scoring.py --arch llama --threads 1
    python benchmarks/scoring.py --vocab 50257 --batches 10

Every batch is trained on (forward, backward, weight gradients) and then scored, one right after the
other in one process, so that both see the same machine; the ratio of the two is taken per batch and the
median over batches is shown with its quartiles: of wall time, and of CPU time, which is the steadier
one where others use the machine. What `directional` does once per call (it tries its engine on two
rows) is shown by itself. Peak memory is that of three batches in a process of its own for each row,
above what the process holds once model, data and directions stand (Linux).

The goal is at most 1.25 with one direction, 1.5 with 16.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

LIMITS = {1: 1.25, 16: 1.5}


@dataclass(frozen=True)
class Setting:
    """The model and the batches to time.

    Args:
        arch: which transformers architecture, built from its config.
        layers, width, heads, vocab: its size.
        batch, tokens: sequences per batch, tokens per sequence.
        directions: how many directions to score along; one row of the table each.
        batches: batches to time for each of them.
        warmup: untimed batches before them.
        threads: of torch; its own choice if not given.
    """

    arch: Literal["gpt2", "llama"] = "gpt2"
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 8192
    batch: int = 16
    tokens: int = 128
    directions: tuple[int, ...] = (1, 16)
    batches: int = 24
    warmup: int = 2
    threads: int | None = None


def build(s: Setting) -> Any:
    """A problem of random tokens for a model with dropout 0."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from attribution_core import Problem
    from attribution_core.outputs import causal_lm_loss

    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model: Any
    if s.arch == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_embd": s.width, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.tokens}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=s.vocab, **size, **off, **none))
    else:
        size = {
            "hidden_size": s.width,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
        }
        more = {"intermediate_size": 3 * s.width, "max_position_embeddings": s.tokens}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=s.vocab, **size, **more, **none))
    ids = torch.randint(0, s.vocab, (s.batch * (s.batches + s.warmup), s.tokens))
    return Problem(model, causal_lm_loss, {"input_ids": ids})


def directions_of(problem: Any, k: int) -> dict[str, Any]:
    """k random directions over all parameters."""
    import torch

    return {name: torch.randn(k, *value.shape) for name, value in problem.params.items()}


def training_step(problem: Any, rows: Any) -> None:
    """Forward and backward of the mean loss, with weight gradients; no optimizer."""
    from attribution_core.data import take

    problem.loss(problem.model, take(problem.train, rows)).mean().backward()
    problem.model.zero_grad(set_to_none=True)


def clocks() -> tuple[float, float]:
    """Wall time and this process's CPU time, seconds."""
    return time.perf_counter(), time.process_time()


def timed(problem: Any, k: int, s: Setting) -> tuple[Any, float]:
    """Seconds [batches, (train, score), (wall, CPU)], and the seconds of the one-off check."""
    import numpy as np

    from attribution_core.gradients import directional

    found = []
    marks = []

    def interleave(batches: Iterable[Any]) -> Iterator[Any]:
        marks.append(time.perf_counter())
        for rows in batches:
            start = clocks()
            training_step(problem, rows)
            middle = clocks()
            yield rows  # directional scores this batch, then asks for the next
            found.append((start, middle, clocks()))

    vectors = directions_of(problem, k)
    begun = time.perf_counter()
    directional(problem, vectors, engine="ghost", batch_size=s.batch, progress=interleave)
    return np.diff(np.array(found), axis=1)[s.warmup :], marks[0] - begun


def peak(k: int, s: Setting) -> float:
    """MiB above the start: of training steps (k = 0) or of scoring along k directions."""
    import numpy as np

    from attribution_core.gradients import directional

    problem = build(s)
    vectors = directions_of(problem, k)
    rows = np.arange(3 * s.batch)
    with open("/proc/self/statm") as pages:
        before = int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    if k:
        directional(problem, vectors, rows, engine="ghost", batch_size=s.batch)
    else:
        for some in np.split(rows, 3):
            training_step(problem, some)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def peaks(s: Setting) -> list[float]:
    """The peak of training steps, then of scoring for each number of directions, MiB."""
    # every array of its own pages, given back when freed: the peak is what is held, not malloc's holes
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(peak, [(k, s) for k in (0, *s.directions)], chunksize=1)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return found


def main(s: Setting) -> None:
    """Time, measure and print."""
    import numpy as np
    import torch

    from attribution_core.layerwise.coverage import coverage_of

    memory = peaks(s)
    if s.threads:
        torch.set_num_threads(s.threads)
    problem = build(s)
    parameters = sum(value.numel() for value in problem.params.values())
    uncovered = sorted(coverage_of(problem, np.arange(2)).wrong)
    print(
        f"{s.arch}: {s.layers} layers, width {s.width}, vocabulary {s.vocab}, {parameters:,} parameters "
        f"({'all' if not uncovered else 'not ' + str(uncovered)} covered); batches of {s.batch} x {s.tokens} "
        f"tokens, {s.batches} per row; float32, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':14}{'s/batch':>9}{'wall ratio':>22}{'CPU ratio':>22}{'limit':>7}{'once s':>8}{'peak MiB':>10}"
    )
    rows, trained = [], []
    for k, held in zip(s.directions, memory[1:], strict=True):
        found, once = timed(problem, k, s)
        trained.append(found[:, 0, 0])
        ratios = (found[:, 1] / found[:, 0]).T
        limit = f"{LIMITS[k]:.2f}" if k in LIMITS else ""
        rows.append(
            f"{k:>3} directions{np.median(found[:, 1, 0]):>9.3f}{spread(ratios[0]):>22}"
            f"{spread(ratios[1]):>22}{limit:>7}{once:>8.2f}{held:>10.0f}"
        )
    step = np.median(np.concatenate(trained))
    print(f"{'training step':14}{step:>9.3f}{'':>59}{memory[0]:>10.0f}", *rows, sep="\n")


def spread(values: Any) -> str:
    """Median and quartiles."""
    import numpy as np

    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Setting, description=__doc__))
