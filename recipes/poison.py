"""How far could a few wrong labels move a model, would anybody notice, and what comes back?

    python recipes/poison.py                                        # digits, logistic regression: about a minute
    python recipes/poison.py --width 32 --budgets 0.05              # a small network, fresh victims for every seed
    python recipes/poison.py --data mine.parquet --label outcome --test held_out.parquet --out runs/mine

An audit of your own model. Four attacks on labels (random, the confident ones, the plug-in attack at once and in
rounds), each beside no attack; five detectors beside each; then the suspects are removed and the model is trained
again. One table, one report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flags:
    """Attack a classifier's labels, predict, retrain, detect and repair; write a report."""

    data: str = "digits"
    """'digits', 'breast_cancer', or a .parquet or .csv file of features with a label column."""
    label: str = "label"
    """Column that holds the label."""
    ignore: tuple[str, ...] = ()
    """Columns of a file that are no features, such as ids and dates."""
    test: str | None = None
    """File of held-out rows; by default two fifths of the data."""
    budgets: tuple[float, ...] = (0.05, 0.1)
    """Shares of the training labels that may be changed."""
    rounds: int = 10
    """In which the strongest attack spends its budget, each on a retrained surrogate."""
    splits: int = 3
    """Repetitions, each with other training, target, trusted and test rows (the same training rows with --test)."""
    width: int = 0
    """Of the network's hidden layer; 0 for logistic regression, whose victims are fitted exactly."""
    decay: float = 0.001
    """Weight decay of the logistic regression, 1 / (C rows); as it stands scikit-learn's own C = 1 on 1,000 rows."""
    lr: float = 0.05
    """Of the network: learning rate of SGD with momentum .9."""
    epochs: float = 15
    """Of the network: passes over the rows."""
    batch_size: int = 50
    """Of the network: rows a step."""
    victims: int = 5
    """Of the network: trainings, each from a fresh seed, that every attack is judged on."""
    jobs: int = 2
    """Splits side by side, each on one thread."""
    seed: int = 0
    """Of the first split."""
    out: Path = Path("runs/poison")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """The steps, in order; splits that an earlier call has finished are read back."""
    from recipes.reports.poisoning import print_table, write_report
    from recipes.work.poisoning import checked, study

    data = checked(flags)
    flags.out.mkdir(parents=True, exist_ok=True)
    outcomes, lost = study(flags)
    print_table(outcomes, lost)
    write_report(flags, data, outcomes, lost)


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
