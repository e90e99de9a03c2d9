"""TRAK by traker (0.3.2), in its own environment: python run_traker.py TASK OUT.npz --projection-dim 256

Two settings make it faster than its defaults on a CPU, and are on: float32 instead of half precision, and
a projection held as one block; by default it is drawn anew in blocks of 100 columns for every batch
(--default-projector). It needs two checkpoints or more: with one, `finalize_features` frees the projection
that `score` then looks for.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile

import torch
from task import arguments, load, measured, write
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

parser = arguments(__doc__)
parser.add_argument("--ridge", type=float, default=0.0, help="lambda_reg")
parser.add_argument("--default-projector", action="store_true")
flags = parser.parse_args()
torch.set_num_threads(flags.threads)
task = load(flags.folder)
model, states = task.model(), task.states[: flags.checkpoints]
p = sum(value.numel() for value in model.parameters())

with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stderr(io.StringIO()),
    measured() as found,
):
    k = flags.projection_dim
    projector = None
    if not flags.default_projector:
        projector = BasicProjector(p, k, flags.seed, ProjectionType.normal, "cpu", block_size=k)
    traker = TRAKer(
        model, "image_classification", train_set_size=len(task.train[0]), save_dir=folder,
        device="cpu", projector=projector, proj_dim=k, projector_seed=flags.seed, use_half_precision=False,
        lambda_reg=flags.ridge, logging_level=logging.ERROR,
    )  # fmt: skip
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for batch in task.loader("train", flags.batch_size):
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, len(task.test[0]))
        for batch in task.loader("test", flags.batch_size):
            traker.score(batch, num_samples=len(batch[0]))
    # of margins, with the 1 − p of the training rows: larger where weight raises the output, as ours
    scores = traker.finalize_scores("test").copy()
write(flags.out, scores, found)
