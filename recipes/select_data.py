"""Which documents should a language model train on, for a given target? Chosen, then proved.

    python recipes/select_data.py                               # embedded data, a few minutes
    python recipes/select_data.py --pool 'pool/*.parquet' --target target.jsonl --test test.jsonl \\
        --domain source --quota web:0:0.6 --budget 2000000 --model small --out runs/mine
    torchrun --nproc_per_node 2 recipes/select_data.py ...      # or accelerate launch, on GPUs

The same command again resumes: tokens, proxies, scores and trainings are read back from --out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from recipes.work.study import Study


@dataclass(frozen=True)
class Flags:
    """Choose training documents for a target, retrain on them and on controls, write a report."""

    pool: str = "embedded"
    """Documents to choose from: 'embedded', a glob of .parquet/.jsonl/.txt files, a saved dataset, or a hub name."""
    target: str = "embedded"
    """What the model shall be good at; same forms. Split by file in three: to score, to settle, to report."""
    test: str | None = None
    """More held-out text, reported beside the target. With an embedded target: docstrings of other modules."""
    text: str = "text"
    """Column that holds the text."""
    domain: str | None = None
    """Column that holds a document's domain, for quotas and the report; by default the name of its file, for .txt of its folder."""
    id: str | None = None
    """Column that holds unique ids; by default file and row."""
    documents: int = 2500
    """How many documents the embedded pool has."""
    budget: float = 0.2
    """Tokens to choose; up to 1 it is a share of the pool."""
    quota: tuple[str, ...] = ()
    """Shares of the budget as domain:low:high, e.g. --quota code:0:0.3 prose:0.1:1."""
    model: str = "tiny"
    """'tiny', 'small' or 'medium' (trained from scratch), or a transformers folder or hub name."""
    epochs: float = 1.0
    """Passes over the chosen documents in every training."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default the model's."""
    batch_size: int | None = None
    """Blocks a step; by default the model's."""
    curvature: Literal["identity", "diagonal", "ekfac", "gauss_newton"] = "gauss_newton"
    """Of the influence function."""
    curvature_rows: int = 64
    """Blocks on which the curvature is estimated."""
    damping: float = 0.01
    """Added to the curvature's eigenvalues: larger is faster and more cautious."""
    proxies: int = 2
    """Proxy models, trained on random text for as long as the budget lasts; scores are averaged."""
    gate: Literal["refuse", "warn", "off"] = "refuse"
    """What to do when the proxy predicts held-out target text no better than byte n-grams."""
    gate_order: int = 3
    """n of these n-grams."""
    seeds: int = 5
    """Trainings of every arm, with fresh initial weights and order."""
    subsets: int = 20
    """Subsets in the picture of predicted against actual loss."""
    skip_empty: bool = False
    """Leave out documents without text instead of stopping."""
    keep_overlap: bool = False
    """Keep pool documents that are also target text; they are reported either way."""
    jobs: int = 2
    """Trainings side by side on the CPU, each on one thread."""
    device: str = "auto"
    """Where to score and train: cpu, cuda, ...; auto is this process's GPU where there is one."""
    out: Path = Path("runs/select_data")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """The steps, in order; each reads back what an earlier run has finished."""
    from recipes.command import at_least, at_most
    from recipes.data.filters import LONGEST
    from recipes.reports.selection import write_report
    from recipes.work.proof import prove
    from recipes.work.selection import choose, gate, refinement, score, train_proxies, write_subset
    from recipes.work.study import prepare

    at_least(flags, seeds=1, jobs=1, proxies=1, subsets=0, epochs=1e-9, lr=1e-12, batch_size=1)
    at_least(flags, curvature_rows=1, damping=0, gate_order=1)
    at_most(flags, damping=1e30, gate_order=LONGEST, lr=1e30, epochs=1e9)
    study: Study = prepare(flags)
    refine = refinement(study)
    proxies = train_proxies(study)
    gate(study, proxies)
    datamodel = score(study, proxies, refine)
    decision = choose(study, datamodel)
    write_subset(study, datamodel, decision)
    evidence = prove(study, proxies, datamodel, decision)
    write_report(study, datamodel, decision, evidence)


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
