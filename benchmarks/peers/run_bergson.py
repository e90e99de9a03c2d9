"""MAGIC by bergson (2.5.1), in its own environment: python run_bergson.py TASK OUT.npz --save-mode all

TASK is a folder that `bergson_side_by_side.py` writes. The steps are those of bergson's own command line
(magic/cli.py: in-place training, the queries' mean gradient, `Trainer.backward`; for single queries its
`compute_per_query_magic_scores`), with torchopt's Adam and a constant learning rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchopt
from bergson.magic.cli import compute_per_query_magic_scores, compute_query_gradients
from bergson.magic.data_stream import DataStream, Padding
from bergson.magic.trainer import BackwardState, Trainer, TrainerState
from bergson.utils import weighted_causal_lm_ce
from datasets import Dataset
from numpy.typing import NDArray
from task import measured
from torchopt.pytree import tree_iter
from transformers import GPT2LMHeadModel

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--save-mode", choices=("all", "sqrt", "log"), default="all")
parser.add_argument("--threads", type=int, default=1)
flags = parser.parse_args()
torch.set_num_threads(flags.threads)
settings = json.loads((flags.folder / "settings.json").read_text(encoding="utf-8"))
dtype = getattr(torch, settings["dtype"])
torch.set_default_dtype(dtype)  # bergson copies tensors into ones of the default type
with np.load(flags.folder / "data.npz") as data:
    train, test, order, directions = (data[k] for k in ("train", "test", "order", "directions"))


def trained(steps: int, save_dir: str | None = None, weights: NDArray[Any] | None = None) -> Any:
    """(trainer, model, stream, final state) of a fresh training of so many steps."""
    model = GPT2LMHeadModel.from_pretrained(
        flags.folder / "model", attn_implementation="eager", dtype=dtype
    ).eval()
    model.loss_function = weighted_causal_lm_ce
    stream = batches(train[order[:steps].flatten()], order.shape[1], order[:steps].flatten())
    if weights is not None:
        stream.weights.data.copy_(torch.from_numpy(weights))
    adam = torchopt.adam(
        settings["lr"], tuple(settings["betas"]), settings["eps"], eps_root=settings["eps_root"]
    )
    trainer, state = Trainer.initialize(model, adam)
    state = trainer.train(
        state, stream, inplace=True, save_dir=save_dir, save_mode=flags.save_mode
    )  # fmt: skip
    return trainer, model, stream, state


def batches(rows: NDArray[Any], size: int, ids: NDArray[Any] | None = None) -> DataStream:
    """Token rows as a stream, with one weight for each id (each row where there are none)."""
    columns = {"input_ids": rows.tolist()}
    if ids is None:
        return DataStream(Dataset.from_dict(columns), size)
    return DataStream(
        Dataset.from_dict({**columns, "doc_ids": ids.tolist()}), size, weight_shape=(len(train),)
    )


def loss(model: Any, state: TrainerState, rows: NDArray[Any]) -> float:
    """The mean loss of a state over these rows."""
    return compute_query_gradients(state, model, batches(rows, len(rows)))[1]


def attributed(trainer: Any, model: Any, stream: Any, state: Any, folder: str) -> NDArray[Any]:
    """∂ mean test loss / ∂ weight, [n]: one walk back."""
    grads, _ = compute_query_gradients(state, model, batches(test, len(test)))
    state.detach_()
    stream.requires_grad = True
    zeros = [
        torch.zeros_like(leaf)
        for leaf in tree_iter(state.opt_state)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]
    start = BackwardState(grads, zeros, torch.zeros_like(stream.weights))
    found = trainer.backward(
        folder, stream, start, state, cleanup=False, inplace=True, save_mode=flags.save_mode
    )
    return found.weight_grads.detach().numpy()


def attributed_each(
    trainer: Any, model: Any, stream: Any, state: Any, folder: str, count: int
) -> NDArray[Any]:
    """∂ loss of a test row / ∂ weight, [n, count]: bergson's own loop over queries."""
    with tempfile.TemporaryDirectory() as scratch:
        config = SimpleNamespace(
            run_path=scratch, query=SimpleNamespace(prompt_column="text"), fsdp=False, debug=False,
            grad_accum_steps=1, resume=False, backward_save_every=0, save_mode=flags.save_mode,
            max_grad_norm=None, double_backward_batch_size=None,
        )  # fmt: skip
        queries = Dataset.from_dict({"input_ids": test[:count].tolist()})
        return compute_per_query_magic_scores(
            trainer, folder, stream, state, model, queries, count, config, 1, 0, Padding()
        ).numpy()


def restored(state: TrainerState, copy: TrainerState) -> TrainerState:
    """The state after training, which a walk back leaves elsewhere."""
    state.detach_()
    state.copy_(copy)
    return state


def differences(width: float) -> NDArray[Any]:
    """The derivatives along the directions, by training again on both sides of the weights."""
    found = np.zeros((2, len(directions)))
    for row, sign in enumerate((1, -1)):
        for k, direction in enumerate(directions):
            _, model, _, state = trained(len(order), weights=1 + sign * width * direction)
            found[row, k] = loss(model, state, test)
    return (found[0] - found[1]) / (2 * width)


def run(steps: int, count: int) -> dict[str, Any]:
    """Train and attribute, timed."""
    with measured() as plain:
        trained(steps)
    with tempfile.TemporaryDirectory() as folder:
        with measured() as kept:
            trainer, model, stream, state = trained(steps, folder)
        final = state.to("cpu").detach_()
        losses = {f"loss_{k}": loss(model, state, v) for k, v in (("train", train), ("test", test))}
        with measured() as one:
            mean = attributed(trainer, model, stream, restored(state, final), folder)
        restored(state, final)
        with measured() as several:
            each = attributed_each(trainer, model, stream, state, folder, count)
    times = {"plain": plain, "kept": kept, "one": one, "several": several}
    cpu = {f"cpu_{k}": v["cpu"] for k, v in times.items()}
    return {"mean": mean, "each": each, **losses, **cpu}


with contextlib.redirect_stdout(io.StringIO()):
    run(3, 2)  # what is loaded at the first call is no work
    result = run(len(order), settings["queries"])
    if settings["check"]:
        result["differences"] = differences(settings["moved"])
np.savez(flags.out, **result)
