"""EK-FAC by kronfluence (1.0.1), in its own environment: python run_kronfluence.py TASK OUT.npz --damping run

Sums over the batch, and labels drawn from the model, as it asks. --damping none is its rule of .1 × the
mean eigenvalue of each layer (its default, 1e-8, is given as a number).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as Described
from task import arguments, cross_entropies, damping, load, measured, outputs, write
from torch import Tensor, nn
from torch.utils.data import TensorDataset

flags = arguments(__doc__).parse_args()
torch.set_num_threads(flags.threads)
torch.manual_seed(flags.seed)
task = load(flags.folder)
model = task.model()
of = outputs(task)


class Describes(Described):
    """The task in kronfluence's terms."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The sum of the losses, of the labels given or of labels drawn from the model."""
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            with torch.no_grad():
                p = logits.detach().flatten(0, -2).softmax(-1)
                labels = torch.multinomial(p, 1).reshape(labels.shape)
        return cross_entropies(logits, labels).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The sum of the outputs."""
        return of(model, batch).sum()


with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stderr(io.StringIO()),
    measured() as found,
):
    train, test = TensorDataset(*task.train), TensorDataset(*task.test)
    described = Describes()
    prepared = prepare_model(model, described)
    analyzer = Analyzer("task", prepared, described, cpu=True, output_dir=folder, disable_tqdm=True)
    analyzer.fit_all_factors(
        "ekfac", train, per_device_batch_size=flags.batch_size, factor_args=FactorArguments("ekfac", use_empirical_fisher=flags.labels == "data")
    )  # fmt: skip
    analyzer.compute_pairwise_scores(
        "scores", "ekfac", test, train, per_device_query_batch_size=len(test),
        per_device_train_batch_size=flags.batch_size,
        score_args=ScoreArguments(damping_factor=damping(flags.damping, task)),
    )  # fmt: skip
    # queries × train, ∇output (H + damping)⁻¹ ∇loss: weight on a row moves outputs the other way
    pairwise = analyzer.load_pairwise_scores("scores")["all_modules"]
    scores = -pairwise.T / len(train)
write(flags.out, scores, found)
