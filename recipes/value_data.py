"""What is each example and each owner worth? Valued in several ways, judged by retraining, paid for.

    python recipes/value_data.py                                    # digits in ten owners, a few minutes
    python recipes/value_data.py --data breast_cancer --mislabel .2 --owners 0
    python recipes/value_data.py --data mine.parquet --label outcome --owner hospital --test held_out.parquet \\
        --budget 50000 --floor 1000 --out runs/mine

Trains a small network on many subsets at once, values every row and owner, retrains without the worst rows,
shares a budget between owners and buys the best for half of the price of all. The same command again resumes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.work.valuing import Valued


@dataclass(frozen=True)
class Flags:
    """Value training rows and owners, check by retraining, share a budget, write a report."""

    data: str = "digits"
    """'digits', 'breast_cancer', or a .parquet or .csv file of features with a label column."""
    label: str = "label"
    """Column that holds the label."""
    owner: str | None = None
    """Column that says whose a row is; training rows are what is valued, priced and paid for."""
    ignore: tuple[str, ...] = ()
    """Columns of a file that are no features, such as ids and dates."""
    test: str | None = None
    """File of held-out rows; by default two fifths of the data."""
    mislabel: float = 0.1
    """Of embedded data: share of random rows whose label is made wrong, to be found."""
    owners: int = 10
    """Of embedded data: owners of unequal sizes, some with wrong labels; 0 for none."""
    width: int = 32
    """Of the network's hidden layer; 0 for logistic regression."""
    lr: float = 0.1
    """First learning rate of SGD with momentum .9; it falls to 0."""
    weight_decay: float = 0.02
    """Keeps the network from memorising wrong labels."""
    batch_size: int = 50
    """Rows a step."""
    epochs: float = 15
    """Passes over the rows."""
    retrainings: int = 200
    """On random halves: held-out readings and the regression are made of them."""
    points: int = 8
    """Metagradients for Aumann–Shapley values."""
    seeds: int = 3
    """Trainings of every subset that judges and of every set of owners; of few sets more, up to 10, and never below 2."""
    remove: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """Shares of the worst rows that are taken away."""
    exact: int = 10
    """Up to so many owners, all 2^owners sets of them are trained on; beyond, permutations."""
    budget: float = 1000.0
    """To be paid to owners."""
    floor: float = 0.0
    """The least that an owner gets."""
    cap: float | None = None
    """The most that an owner gets."""
    discount: float = 0.0
    """Standard errors taken off an owner's value."""
    jobs: int = 2
    """Stacks of trainings side by side, each on one thread."""
    seed: int = 0
    """Of the embedded data, of splits and of subsets."""
    out: Path = Path("runs/value_data")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """The steps, in order; each reads back what an earlier call has finished."""
    import torch

    from recipes.command import at_least, shares, some_rows
    from recipes.data.classification import embedded, from_file, warn_of_repeated
    from recipes.reports.valuation import write_report
    from recipes.work.valuing import judge, start, value_owners, value_rows

    torch.set_num_threads(1)  # small tensors: threads wait more than they work
    at_least(flags, seeds=1, jobs=1, width=0, budget=1e-9, floor=0, cap=0, retrainings=1, points=1)
    shares(flags, "remove")
    flags = replace(flags, remove=tuple(sorted(set(flags.remove))))  # curves go from left to right
    if flags.data in ("digits", "breast_cancer"):
        data = embedded(flags.data, flags.mislabel, flags.owners, flags.seed)
    else:
        data = from_file(flags.data, flags.label, flags.owner, flags.test, flags.seed, flags.ignore)
    some_rows(flags, "remove", len(data.x))
    payable(flags, data)
    told(data)
    enough(flags, data)
    warn_of_repeated(data)
    flags.out.mkdir(parents=True, exist_ok=True)
    study = start(flags, data)
    valued: Valued = value_rows(study)
    removed, accuracy = judge(study, valued)
    owned = value_owners(study, valued)
    write_report(study, valued, removed, owned, accuracy)


def payable(flags: Flags, data: Any) -> None:
    """Raise where floors and caps leave no way to pay the owners.

    Raises:
        ValueError: they do.
    """
    owners = len(set(data.owners.tolist()))
    most = flags.budget if flags.cap is None else flags.cap
    if not flags.floor * owners <= flags.budget <= most * owners or flags.floor > most:
        raise ValueError(
            f"expected a budget of {flags.budget:g} that {owners} owners can be paid with, got a floor of "
            f"{flags.floor:g} and a cap of {most:g} each"
        )


def told(data: Any) -> None:
    """Raise where a class has one training row, of which cross-validation, a control here, could say nothing.

    Raises:
        ValueError: it has.
    """
    alone = [name for k, name in enumerate(data.classes) if (data.y == k).sum() < 2]
    if alone:
        raise ValueError(
            f"expected two training rows or more of every class, got one of {alone[:5]}; leave these classes out or join "
            "them to others, or take another --seed, which splits differently"
        )


def enough(flags: Flags, data: Any) -> None:
    """Raise where a row is in every random half, so that no model says anything of it as a held-out row.

    Raises:
        ValueError: one is.
    """
    from recipes.work.valuing import halves

    always: Any = halves(flags, len(data.x)).all(axis=0)
    if always.any():
        raise ValueError(
            f"expected --retrainings on so many random halves that each training row is left out of one, got {flags.retrainings}, "
            f"all of them with {int(always.sum())} of the {len(always)} rows, such as {data.places[always][:5].tolist()}; raise it "
            f"({Flags.retrainings} by default)"
        )


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
