"""TRAK and EK-FAC by dattri (0.3.0), in its own environment: python run_dattri.py TASK OUT.npz --method trak

TRAK draws its projection anew for every batch; larger batches were no faster, and took more memory. EK-FAC
takes the gradients of the test rows anew for every batch of training rows, so large batches serve it. It fits its curvature to the task's target function: the losses are
given there (of labels drawn from the model, or of the data with --labels data), and the margins after
the fit.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from task import arguments, cross_entropies, damping, load, measured, outputs, write
from torch import Tensor
from torch.func import functional_call

parser = arguments(__doc__)
parser.add_argument("--method", choices=("trak", "ekfac"), default="trak")
parser.add_argument("--ridge", type=float, default=0.0, help="regularization of TRAK")
flags = parser.parse_args()
torch.set_num_threads(flags.threads)
torch.manual_seed(flags.seed)
task = load(flags.folder)
model = task.model()
of, n = outputs(task), len(task.train[0])


def at(params: Any) -> Any:
    """The model at other parameters, as a function of the inputs."""
    return lambda inputs: functional_call(model, params, (inputs,))


def row_output(params: Any, row: Any) -> Tensor:
    """The output of one row."""
    return of(at(params), (row[0][None], row[1][None]))[0]


def probability(params: Any, row: Any) -> Tensor:
    """Of the label of one row."""
    logits = at(params)(row[0][None])
    return torch.exp(-cross_entropies(logits, row[1][None]))[0]


def mean_loss(params: Any, batch: Any) -> Tensor:
    """The mean loss of a batch."""
    inputs, labels = batch
    return cross_entropies(at(params)(inputs), labels).mean()


def drawn_loss(params: Any, batch: Any) -> Tensor:
    """The mean loss of a batch for labels drawn from the model."""
    inputs, labels = batch
    logits = at(params)(inputs)
    if flags.labels == "model":
        p = logits.detach().flatten(0, -2).softmax(-1)
        labels = torch.multinomial(p, 1).reshape(labels.shape)
    return cross_entropies(logits, labels).mean()


def mean_output(params: Any, batch: Any) -> Tensor:
    """The mean output of a batch."""
    return of(at(params), batch).mean()


with measured() as found, contextlib.redirect_stderr(io.StringIO()):
    if flags.method == "trak":
        states = task.states[: flags.checkpoints]
        attributor = TRAKAttributor(
            AttributionTask(row_output, model, states), probability,
            projector_kwargs={"proj_dim": flags.projection_dim, "proj_seed": flags.seed}, regularization=flags.ridge,
        )  # fmt: skip
        attributor.cache(task.loader("train", flags.batch_size))
        scores = attributor.attribute(task.loader("test", len(task.test[0])))
    else:
        state = task.states[0]
        fit = AttributionTask(mean_loss, model, state, target_func=drawn_loss)
        attributor = IFAttributorEKFAC(fit, damping=damping(flags.damping, task) or 0.0)
        attributor.cache(task.loader("train", flags.batch_size))
        attributor.task = AttributionTask(mean_loss, model, state, target_func=mean_output)
        train, test = task.loader("train", flags.batch_size), task.loader("test", len(task.test[0]))
        scores = -attributor.attribute(train, test) / n
write(flags.out, scores.detach().numpy(), found)
