"""The same task by this package: python ours.py TASK OUT.npz --method ekfac"""

from __future__ import annotations

import torch
from task import arguments, damping, load, losses, measured, outputs, write

from attribution_core import Outputs, Problem, influence

parser = arguments(__doc__)
parser.add_argument("--method", choices=("ekfac", "trak"), default="ekfac")
parser.add_argument("--refine", default="0", help="of EK-FAC: steps, or 'size', as for a large run")
parser.add_argument("--linear-only", action="store_true", help="freeze all but nn.Linear layers")
flags = parser.parse_args()
torch.set_num_threads(flags.threads)
task = load(flags.folder)
model = task.model()
if flags.linear_only:
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    model.requires_grad_(False)
    for layer in linear:
        layer.requires_grad_(True)
problem, targets = Problem(model, losses, task.train), Outputs(outputs(task), task.test)
if flags.method == "trak":  # not before the clock starts: what a library loads on import is no work
    from attribution_core.trak import trak

with measured() as found:
    if flags.method == "ekfac":
        datamodel = influence(
            problem, targets, curvature="ekfac", damping=damping(flags.damping, task), labels=flags.labels,
            refine="size" if flags.refine == "size" else int(flags.refine), exposure=task.size["exposure"], batch_size=flags.batch_size,
        )  # fmt: skip
    else:
        datamodel = trak(
            problem, targets, checkpoints=task.states[: flags.checkpoints],
            projection_dim=flags.projection_dim, seed=flags.seed, exposure=task.size["exposure"],
        )  # fmt: skip
    scores = datamodel.scores
print(datamodel.meta)
write(flags.out, scores, found, base=datamodel.base, anchor=datamodel.anchor)
