"""Why does my model say that? The training rows behind its decisions, and what it says without them.

    python recipes/debug_model.py                                      # digits with wrong labels, a minute or two
    python recipes/debug_model.py --data mine.csv --label outcome --out runs/mine
    python recipes/debug_model.py --width 32 --mistakes 6 --right 6    # a small network, five seeds

Mistakes and a sample of right decisions are asked for the fewest training rows that each hangs on: predicted, then
found by retraining, beside the nearest rows and random ones. Mistakes that hang on the same rows are put together, and
what becomes of them without those rows is trained as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flags:
    """Find the training rows behind a classifier's decisions, retrain without them, and write a report."""

    data: str = "digits"
    """'digits', 'breast_cancer', or a .parquet or .csv file of features with a label column."""
    label: str = "label"
    """Column that holds the label."""
    ignore: tuple[str, ...] = ()
    """Columns of a file that are no features, such as ids and dates."""
    test: str | None = None
    """File of held-out rows; by default two fifths of the data."""
    mislabel: float = 0.1
    """Share of wrong labels put into the embedded data, so that there is something to find."""
    mistakes: int = 10
    """Wrong decisions that are asked about, the surest first."""
    right: int = 10
    """Right decisions that are asked about, drawn at random."""
    most: int = 100
    """Rows that may be left out; fewer where a class would lose its last row."""
    rounds: int = 3
    """How often the datamodel is asked on the way to a decision's number."""
    groups: int | None = None
    """Of mistakes that hang on the same rows, at most; by default the number that parts them best."""
    width: int = 0
    """Of the network's hidden layer; 0 for logistic regression, fitted exactly."""
    decay: float = 0.001
    """Weight decay of the logistic regression, 1 / (C rows)."""
    lr: float = 0.05
    """Of the network: learning rate of SGD with momentum .9."""
    epochs: float = 15
    """Of the network: passes over the rows."""
    batch_size: int = 50
    """Of the network: rows a step."""
    seeds: int = 5
    """Of the network: trainings that decide together."""
    jobs: int = 2
    """Decisions side by side, each on one thread."""
    seed: int = 0
    """Of the split and of the sample of right decisions."""
    out: Path = Path("runs/debug")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """The steps, in order; decisions that an earlier call has finished are read back."""
    from recipes.command import forget_report
    from recipes.reports.debugging import print_table, write_report
    from recipes.work.debugging import checked, decided, grouped, model_of, study

    data = checked(flags)
    flags.out.mkdir(parents=True, exist_ok=True)
    forget_report(flags.out)
    model = model_of(flags, data)
    said, margin = decided(model, data)
    found = study(flags, data, said, margin)
    groups = grouped(flags, data, model, said)
    print_table(found, groups, data)
    write_report(flags, data, found, groups)


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
