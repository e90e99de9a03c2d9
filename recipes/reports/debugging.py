"""The table and the report of debug_model.py: decisions, the rows that each hangs on, groups of mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from applied import debugging_pictures as pictures
from applied import report
from applied.recipe import aligned
from attribution_core.disk.files import write_parquet
from recipes.command import as_given
from recipes.data import classification
from recipes.data.classification import Classification
from recipes.work.debugging import NEAR, Asked, Groups, held_out

if TYPE_CHECKING:
    from recipes.debug_model import Flags

HEAD = (
    "row", "label", "model says", "margin", "predicted", "actual", "nearest", "random", "training rows (label)",
)  # fmt: skip
SHOWN = 4  # training rows in a line
SIDE = 8  # pixels of a digit
DRAWN = 6  # mistakes with images


def lines_of(data: Classification, found: Sequence[Asked]) -> list[list[str]]:
    """A line of text for each decision, those that hang on the fewest rows first."""

    def number(rows: float, most: int) -> str:
        return f"{rows:.0f}" if np.isfinite(rows) else f"> {most}"

    lines = []
    for x in fewest_first(found):
        numbers = [number(n, x.most) for n in (x.predicted, x.actual, x.nearest, x.random)]
        said = [str(x.id), x.label, x.said, f"{x.margin:.2f}"]
        lines.append([*said, *numbers, listed(data, x.rows)])
    return lines


def fewest_first(found: Sequence[Asked]) -> list[Asked]:
    """By the rows that they hang on."""
    return sorted(found, key=lambda x: (x.actual, x.predicted, x.margin))


def listed(data: Classification, rows: Sequence[int]) -> str:
    """The first training rows of a list, with their labels."""
    first = [f"{data.places[i]} ({data.classes[data.y[i]]})" for i in rows[:SHOWN]]
    return ", ".join(first) + f", {len(rows) - SHOWN} more" * (len(rows) > SHOWN)


def parts_of(found: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Mistakes and right decisions, those that there are."""
    parts = {
        "mistakes": [x for x in found if x.wrong],
        "right decisions": [x for x in found if not x.wrong],
    }
    return {name: some for name, some in parts.items() if some}


def words_of(data: Classification, found: Sequence[Asked]) -> list[str]:
    """What the numbers come to."""
    words = [f"{name.capitalize()}: {medians(some)}" for name, some in parts_of(found).items()]
    if not any(x.wrong for x in found):
        words.insert(0, "No mistake is among the decisions that were asked about.")
    words.append(agreement(found))
    if data.bad is not None and (rows := behind(found)):
        words.append(
            f"Of the {len(rows)} training rows that mistakes hang on, {100 * data.bad[rows].mean():.0f} % have a wrong "
            f"label ({100 * data.bad.mean():.0f} % of all rows do)."
        )
    return words


def behind(found: Sequence[Asked]) -> list[int]:
    """The training rows without which mistakes are not made, by retraining."""
    turned = [x for x in found if x.wrong and np.isfinite(x.actual)]
    return sorted({i for x in turned for i in x.rows})


def half(numbers: Any) -> float:
    """The number of rows without which at least half of the decisions turn."""
    return float(np.sort(numbers)[(len(numbers) - 1) // 2])


def medians(some: Sequence[Asked]) -> str:
    """How many rows it takes to turn half of the decisions, beside the controls."""
    ours, near = (np.array([getattr(x, name) for x in some]) for name in ("actual", "nearest"))
    fewer, more = int((ours < near).sum()), int((ours > near).sum())

    def rows(name: str) -> str:
        middle = half([getattr(x, name) for x in some])
        return f"{middle:g}" if np.isfinite(middle) else f"more than {max(x.most for x in some)}"

    return (
        f"to turn half of {len(some)} takes {rows('actual')} rows by the datamodel, {rows('nearest')} of the nearest and "
        f"{rows('random')} random ones. The datamodel needs fewer rows than the nearest in {fewer}, more in {more}."
    )


def agreement(found: Sequence[Asked]) -> str:
    """How predicted numbers compare with those of retraining."""
    both = [x for x in found if np.isfinite(x.predicted) and np.isfinite(x.actual)]
    near = sum(abs(x.predicted - x.actual) <= max(0.3 * x.actual, 1) for x in both)
    lost = sum(np.isfinite(x.predicted) != np.isfinite(x.actual) for x in found)
    return (
        f"Predicted numbers are within 30 % (or one row) of retraining in {near} of the {len(both)} decisions that turn in "
        f"both; in {lost} one of the two finds none."
    )


def print_table(found: Sequence[Asked], groups: Groups | None, data: Classification) -> None:
    """A line for each decision, what they add up to, and the groups."""
    for name, some in parts_of(found).items():
        print(f"\n{name}: the fewest training rows without which each would be another")
        print("\n".join(aligned([list(HEAD), *lines_of(data, some)])))
    print("\n" + "\n".join(words_of(data, found)))
    if groups is not None:
        print(f"\nall {len(groups.places)} mistakes, by the rows that raise their losses")
        print(groups.found.table())


def write_report(
    flags: Flags, data: Classification, found: Sequence[Asked], groups: Groups | None
) -> None:
    """report.html, metrics.json and decisions.parquet."""
    words, facts = words_of(data, found), facts_of(flags, data, found)
    sections: dict[str, list[str]] = {"What was found": [report.paragraph(some) for some in words]}
    for name, some in parts_of(found).items():
        heading = f"{name.capitalize()}, and the training rows that each hangs on"
        sections[heading] = [
            report.table(lines_of(data, some), HEAD),
            *map(report.picture, drawn(flags, data, some)),
        ]
    if groups is not None:
        sections["Mistakes that hang on the same rows"] = group_parts(data, groups)
    sections["How this was made"] = [report.paragraph(METHOD), report.facts(facts)]
    page = report.Page("The training rows behind this model's decisions", facts["data"], sections)
    page.save(flags.out / "report.html")
    report.write_metrics(
        flags.out / "metrics.json",
        {
            "decisions": [written(data, x) for x in found], "words": words, "facts": facts, "flags": as_given(flags),
            "groups": None if groups is None else written_groups(data, groups),
        },
    )  # fmt: skip
    write_decisions(flags, data, found)
    print(f"\nwritten to {flags.out}/report.html")


def written(data: Classification, asked: Asked) -> dict[str, Any]:
    """A decision as files hold it: rows are called what they are called in the data's own file."""
    kept = {name: value for name, value in asdict(asked).items() if name != "place"}
    return {**kept, "rows": data.places[asked.rows].tolist()}


def written_groups(data: Classification, groups: Groups) -> dict[str, Any]:
    """Groups as files hold them: the mistakes (`ids`, with the `group` of each) and the groups' rows by the same names."""
    rows = [data.places[some].tolist() for some in groups.found.rows]
    ids = data.held_places[groups.places].tolist()
    return {**asdict(groups.found), "rows": rows, "ids": ids}


METHOD = (
    "Predicted: the fewest rows, by a linear program on the datamodel, whose removal takes the decision's margin to 0, asked "
    "again on the way. Actual: the fewest rows of that order without which retraining gives another decision, by bisection. "
    "Nearest and random: the same along the rows in the order of their nearest-neighbour values, and in random order."
)


def drawn(flags: Flags, data: Classification, some: Sequence[Asked]) -> list[Any]:
    """The curves of how few rows turn decisions, and images of digits."""
    most = max(x.most for x in some)
    numbers = {
        name: [getattr(x, attribute) for x in some]
        for name, attribute in (
            ("datamodel", "actual"),
            ("nearest", "nearest"),
            ("random", "random"),
        )
    }
    figures = [pictures.turned(numbers, most)]
    if flags.data == "digits":
        x, _ = held_out(data)
        first = fewest_first(some)[:DRAWN]
        figures.append(
            pictures.images(
                [
                    (
                        f"{a.label}, says {a.said}",
                        x[a.place].reshape(SIDE, SIDE),
                        [(data.classes[data.y[i]], data.x[i].reshape(SIDE, SIDE)) for i in a.rows],
                    )
                    for a in first
                ]
            )
        )
    return figures


GROUPS = (
    "group", "mistakes", "labels", "loss without its rows: predicted", "actual", "random rows", "training rows (label)",
)  # fmt: skip


def group_parts(data: Classification, groups: Groups) -> list[str]:
    """The table, the heat map and what mistakes are in each group."""
    _, y = held_out(data)
    found, rows = groups.found, []
    for g, strongest in enumerate(found.rows):
        count = np.bincount(y[groups.places[found.of(g)]], minlength=len(data.classes))
        often = [c for c in np.argsort(-count, kind="stable")[:3] if count[c]]
        labels = ", ".join(f"{data.classes[c]} ×{count[c]}" for c in often)
        change = [float(x[g, g]) for x in (found.predicted, found.actual, found.random)]
        rows.append([g, int(count.sum()), labels, *change, listed(data, strongest.tolist())])
    words = (
        f"All {len(groups.places)} mistakes on held-out rows, in groups whose losses the same training rows raise; a "
        "group's rows are left out together and the model is trained again. Changes of the mean loss: below 0 is better."
    )
    heat = report.picture(pictures.specificity(found))
    return [report.paragraph(words), report.table(rows, GROUPS), heat]


def facts_of(flags: Flags, data: Classification, found: Sequence[Asked]) -> dict[str, str]:
    """What the numbers stand on."""
    if flags.width:
        model = f"hidden layer of {flags.width}"
        how = f"SGD, lr {flags.lr:g}, momentum .9, batches of {flags.batch_size}, {flags.epochs:g} epochs"
        datamodel = f"influence (EK-FAC), mean of {flags.seeds} trainings"
        judges = f"mean margin of {flags.seeds} trainings by the same seeds, rows really removed"
    else:
        model, how = "logistic regression", f"to the optimum, weight decay {flags.decay:g}"
        datamodel, judges = (
            "influence (exact Hessian) at the optimum",
            "fitted to the optimum without the rows",
        )
    return {
        "data": Path(flags.data).name, "training rows": str(len(data.x)), "model": model, "training": how,
        "datamodel": f"{datamodel}; asked up to {flags.rounds} times a decision", "retraining": judges,
        "nearest": f"Shapley values of a {NEAR}-nearest-neighbour classifier on the model's representations",
        "rows left out": f"{found[0].most} at most",
        "decisions": f"{len(found)}: the surest mistakes, and right ones at random (seed {flags.seed})",
        **classification.facts_of(data),
    }  # fmt: skip


def write_decisions(flags: Flags, data: Classification, found: Sequence[Asked]) -> None:
    """decisions.parquet: a line for each decision; infinite numbers are empty."""
    import pyarrow

    def plain(x: Asked) -> dict[str, Any]:
        kept, numbers = written(data, x), ("predicted", "actual", "nearest", "random")
        return {**kept, **{k: int(kept[k]) if np.isfinite(kept[k]) else None for k in numbers}}

    lines = pyarrow.Table.from_pylist([plain(x) for x in found])
    write_parquet(flags.out / "decisions.parquet", lines)
