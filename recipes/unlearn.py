"""Models as if they had never seen some rows: unlearned in several ways, judged by retraining without them.

    python recipes/unlearn.py                                       # digits, three forget sets, two minutes
    python recipes/unlearn.py --models 100 --forget cluster         # enough models for the binned distance
    python recipes/unlearn.py --data mine.parquet --label outcome --test held_out.parquet \\
        --forget-file ids.txt --out runs/mine

Trains some models, unlearns each, retrains twice as many without the forget set, and measures how far the unlearned
models are from the retrained ones, beside the distance between two halves of the latter. unlearned/ keeps the models
that `auto` made, and model.json what their inputs and classes are. The same command again resumes; another command in
the same folder replaces its results, not its trainings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flags:
    """Unlearn forget sets in several ways, compare with retrained models, write a report."""

    data: str = "digits"
    """'digits', 'breast_cancer', or a .parquet or .csv file of features with a label column."""
    label: str = "label"
    """Column that holds the label."""
    ignore: tuple[str, ...] = ()
    """Columns of a file that are no features, such as ids and dates."""
    test: str | None = None
    """File of held-out rows; by default two fifths of the data. With --forget-file it is needed."""
    forget: tuple[str, ...] = ("random", "cluster", "mislabelled")
    """Which forget sets: 'random' rows, a 'cluster' inside one class, rows 'mislabelled' before training."""
    forget_file: Path | None = None
    """Text file of row numbers of the training data, counted from 0; in the place of --forget."""
    size: int = 25
    """Rows of a forget set; a cluster has about as many."""
    models: int = 20
    """Trained and unlearned; twice as many are retrained. From 50 on distances are binned (KLoM)."""
    rows: int = 500
    """Of embedded data: training rows."""
    width: int = 16
    """Of the network's hidden layer; 0 for logistic regression."""
    lr: float = 0.1
    """Learning rate of SGD with momentum .9."""
    weight_decay: float = 0.0
    """Of the training."""
    batch_size: int = 50
    """Rows a step."""
    epochs: float = 20
    """Passes over the rows."""
    budget: float = 0.2
    """Steps of an unlearner, as a share of a training's."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Learning rates of the baselines, in the training's; the best on 5 models is taken, judged by oracles."""
    jobs: int = 1
    """Stacks of retrainings side by side, each on one thread."""
    seed: int = 0
    """Of the embedded data, of splits and of forget sets."""
    out: Path = Path("runs/unlearn")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """A forget set at a time; trainings are read back where an earlier call has finished them."""
    import torch

    from recipes.data.forget_sets import checked, forget_set
    from recipes.reports.unlearning import print_table, write_report
    from recipes.work.unlearning import Trainings, affordable, forget_results, study

    torch.set_num_threads(1)  # small tensors: threads wait more than they work
    data, kinds = checked(flags)
    affordable(flags, len(data.x))
    flags.out.mkdir(parents=True, exist_ok=True)
    every = [Trainings.of(flags, forget_set(flags, data, kind)) for kind in kinds]
    for trainings in every:  # folders of other settings are refused before old results go
        trainings.begin()
    forget_results(flags.out)
    studies = []
    for trainings in every:
        studies.append(study(trainings))
        print_table(studies[-1])
    write_report(flags, studies)


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
