"""The table and the report of poison.py: what was moved, who would have noticed, what comes back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from applied import poisoning_pictures as pictures
from applied import report
from applied.detection import COMBINED
from applied.recipe import Interval, paired_interval
from applied.threat import ThreatModel
from recipes.poisoning import ACCURACY, HELD_OUT, SURROGATES, TARGET, Outcome

if TYPE_CHECKING:
    from recipes.poison import Flags

AUDIT = (
    "An audit of one's own model. No attack and a random attack of the same budget stand beside every attack; what "
    "would have detected it and what repair brings back stand beside every success."
)
ADVERSARY = (
    "The adversary gives other labels to {budgets} of the training rows, knows the model, how it is trained and the "
    "target rows, and wants their loss high. No input changes and no row comes or goes; the held-out rows have no "
    "part in the attack. The defender sees the poisoned data and a few trusted rows, and does not know who changed "
    "what, nor how much."
)
WIDE = 9  # letters of a heading before it goes on below


@dataclass(frozen=True)
class Row:
    """A line of the table: means over splits.

    Args:
        accuracy: change in points; held_out, target: change of losses; predicted, random: of the target loss.
        auc: detector -> AUC, the combined one last.
        recovered, by_random: share of the held-out loss's damage; nan where there were no suspects.
    """

    budget: float
    attack: str
    rows: float
    accuracy: Interval
    held_out: Interval
    target: Interval
    predicted: float
    random: float
    auc: dict[str, float]
    suspects: float
    caught: float
    recovered: Interval
    by_random: Interval

    @property
    def best(self) -> list[str]:
        """The detectors of the highest AUC."""
        return [name for name, value in self.auc.items() if value == max(self.auc.values())]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for every budget and attack, in their order."""
    keys = dict.fromkeys((x.budget, x.attack) for x in outcomes)
    return [row_of([x for x in outcomes if (x.budget, x.attack) == key]) for key in keys]


def row_of(some: Sequence[Outcome]) -> Row:
    """Over the splits of one budget and attack."""

    def over(value: Callable[[Outcome], float]) -> Interval:
        found = [value(x) for x in some]
        known = [x for x in found if math.isfinite(x)]
        return paired_interval(known) if known else Interval(math.nan, math.nan, math.nan)

    detectors = sorted(some[0].auc, key=lambda name: name == COMBINED)
    return Row(
        budget=some[0].budget, attack=some[0].attack, rows=over(lambda x: x.rows).mean,
        accuracy=over(lambda x: 100 * x.changed[ACCURACY]),
        held_out=over(lambda x: x.changed[HELD_OUT]),
        target=over(lambda x: x.changed[TARGET]),
        predicted=over(lambda x: x.predicted.get(TARGET, math.nan)).mean,
        random=over(lambda x: x.random[TARGET]).mean,
        auc={name: float(np.mean([x.auc[name] for x in some])) for name in detectors},
        suspects=over(lambda x: x.suspects).mean, caught=over(lambda x: x.caught).mean,
        recovered=over(lambda x: x.recovered.get(HELD_OUT, math.nan)),
        by_random=over(lambda x: x.by_random.get(HELD_OUT, math.nan)),
    )  # fmt: skip


# --- the printed table -------------------------------------------------------------------------------


def print_table(outcomes: Sequence[Outcome]) -> None:
    """A line for every budget and attack, and below it what they add up to in words."""
    rows = rows_of(outcomes)
    head = [
        "budget", "attack", "rows", "accuracy, points", "held-out loss", "target loss", "predicted",
        "random attack", *rows[0].auc, "removed / caught", "recovered",
    ]  # fmt: skip
    print(f"\n{columns(head, [cells(row) for row in rows])}\n")
    print("\n".join(words_of(outcomes, rows)))


def cells(row: Row) -> list[str]:
    """Text of a line."""
    return [
        f"{100 * row.budget:g} %", row.attack, f"{row.rows:g}", spread(row.accuracy, "+.1f"),
        spread(row.held_out, "+.3f"), spread(row.target, "+.3f"), number(row.predicted, "+.3f"),
        number(row.random, "+.3f"),
        *starred(row).values(),
        f"{row.suspects:.0f} / {row.caught:.0f}" if row.suspects else "none", spread(row.recovered, ".2f"),
    ]  # fmt: skip


def starred(row: Row) -> dict[str, str]:
    """AUC of every detector, a star at the best."""
    return {k: f"{v:.4f}{'*' if k in row.best else ' '}" for k, v in row.auc.items()}


def number(value: float, form: str) -> str:
    """A number, or a dash."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def spread(found: Interval, form: str) -> str:
    """A mean, with half of its interval where there is one."""
    half = found.high - found.mean
    return number(found.mean, form) + (f" ±{half:{form[-3:]}}" if math.isfinite(half) else "")


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned text; headings go over as many lines as they need."""
    broken = [wrap(name, WIDE, break_long_words=False) for name in head]
    tall = max(map(len, broken))
    above = list(zip(*([""] * (tall - len(name)) + name for name in broken), strict=True))
    every = [*above, *lines]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    text = []
    for line in every:
        pairs = zip(line, widths, strict=True)
        aligned = [x.ljust(w) if j == 1 else x.rjust(w) for j, (x, w) in enumerate(pairs)]
        text.append("  ".join(aligned).rstrip())
    return "\n".join([*text[:tall], "-" * sum(widths, 2 * len(widths) - 2), *text[tall:]])


def words_of(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> list[str]:
    """What the table stands on and what it comes to."""
    splits = len({x.split for x in outcomes})
    first = [x for x in outcomes if (x.budget, x.attack) == (rows[0].budget, rows[0].attack)]
    clean = {name: np.mean([x.clean[name] for x in first]) for name in (ACCURACY, HELD_OUT, TARGET)}
    noise = "means over splits ± half of the 95 % t interval" if splits > 1 else "no intervals"
    return [
        f"Changes beside no attack, whose accuracy is {clean[ACCURACY]:.4f}, held-out loss {clean[HELD_OUT]:.4f} and "
        f"target loss {clean[TARGET]:.4f}; {splits} split{'s'[: splits != 1]}, {noise}.",
        f"Detectors by AUC, * the best. {verdict(rows)}",
        agreement(rows),
        "Removed: rows whose label the combined detector disputes, and how many of them were changed; recovered: of "
        "the damage to the held-out loss, without them.",
    ]  # fmt: skip


def verdict(rows: Sequence[Row]) -> str:
    """Whether the combined detector was the best everywhere, and where it was not."""
    lost = [row for row in rows if COMBINED not in row.best]
    if not lost:
        return f"The combined detector was the best in every row ({len(rows)} of {len(rows)})."
    where = "; ".join(
        f"{name_of(row)}: {row.best[0]} {max(row.auc.values()):.4f}, combined {row.auc[COMBINED]:.4f}"
        for row in lost
    )
    return f"The combined detector was the best in {len(rows) - len(lost)} of {len(rows)} rows; not in {where}."


def agreement(rows: Sequence[Row]) -> str:
    """By how much what was predicted of the target loss differs from what came."""
    said = [row for row in rows if math.isfinite(row.predicted) and row.target.mean]
    each = [f"{name_of(row)} {100 * row.predicted / row.target.mean - 100:+.0f} %" for row in said]
    told = "; ".join(each) or "nothing was predicted"
    return f"Predicted less actual change of the target loss, in % of the actual one: {told}."


def name_of(x: Row | Outcome) -> str:
    """Attack and budget."""
    return f"{x.attack} at {100 * x.budget:g} %"


# --- the report --------------------------------------------------------------------------------------


def write_report(flags: Flags, outcomes: Sequence[Outcome]) -> None:
    """report.html, metrics.json and outcomes.parquet."""
    rows, facts = rows_of(outcomes), facts_of(flags, outcomes)
    budgets = " or ".join(f"{100 * budget:g} %" for budget in dict.fromkeys(x.budget for x in rows))
    words = words_of(outcomes, rows)
    sections = {
        "What was asked": [report.paragraph(AUDIT), report.paragraph(ADVERSARY.format(budgets=budgets))],
        "What the attacks moved": [moved(rows), report.paragraph(words[0]), report.paragraph(words[2]),
                                   *map(report.picture, effects(outcomes))],
        "Who would have noticed": [noticed(rows), report.paragraph(words[1]), *map(report.picture, rocs(outcomes))],
        "What comes back": [mended(rows), report.paragraph(words[3]), report.picture(recovery(outcomes))],
        "How this was made": [report.facts(facts)],
    }  # fmt: skip
    page = report.Page("How far a few wrong labels move this model", facts["data"], sections)
    page.save(flags.out / "report.html")
    report.write_metrics(flags.out / "metrics.json", {"rows": rows, "words": words, "facts": facts})
    write_outcomes(flags, outcomes)
    print(f"Judged on {facts['victims']}.\n\nwritten to {flags.out}/report.html")


def moved(rows: Sequence[Row]) -> str:
    """Changes of the outputs."""
    head = (
        "attack",
        "rows",
        "accuracy, points",
        "held-out loss",
        "target loss",
        "predicted",
        "random attack",
    )
    lines = [
        (name_of(x), f"{x.rows:g}", x.accuracy, x.held_out, x.target, x.predicted, x.random)
        for x in rows
    ]
    return report.table(lines, head)


def noticed(rows: Sequence[Row]) -> str:
    """AUC of every detector."""
    lines = [(name_of(x), *starred(x).values()) for x in rows]
    return report.table(lines, ("attack", *rows[0].auc))


def mended(rows: Sequence[Row]) -> str:
    """Rows removed, and what that brings back."""
    head = (
        "attack",
        "removed",
        "of them changed",
        "changed in all",
        "recovered",
        "removing at random",
    )
    lines = [
        (name_of(x), *(f"{n:.0f}" for n in (x.suspects, x.caught, x.rows)), x.recovered, x.by_random)
        for x in rows
    ]  # fmt: skip
    return report.table(lines, head)


def effects(outcomes: Sequence[Outcome]) -> list[Any]:
    """Both losses and the accuracy against the budget."""
    budgets = sorted({x.budget for x in outcomes})
    figures = []
    for output in (TARGET, HELD_OUT, ACCURACY):
        found: dict[str, Any] = {}
        said: dict[str, Any] = {}
        for attack in dict.fromkeys(x.attack for x in outcomes):
            mine = sorted(
                (x for x in outcomes if x.attack == attack), key=lambda x: (x.split, x.budget)
            )
            shape = (-1, len(budgets))
            found[attack] = np.reshape([x.changed[output] for x in mine], shape)
            if all(output in x.predicted for x in mine):
                said[attack] = np.reshape([x.predicted[output] for x in mine], shape)
        label = f"change of the {output}"
        figures.append(pictures.effect_against_budget(budgets, found, predicted=said, ylabel=label))
    return figures


def rocs(outcomes: Sequence[Outcome]) -> list[Any]:
    """A picture for each attack, at the largest budget."""
    largest, figures = max(x.budget for x in outcomes), []
    for attack in dict.fromkeys(x.attack for x in outcomes):
        some = [x for x in outcomes if (x.attack, x.budget) == (attack, largest)]
        curves = {name: [x.curves[name] for x in some] for name in some[0].curves}
        figures.append(pictures.roc(curves, title=name_of(some[0]), best=COMBINED))
    return figures


def recovery(outcomes: Sequence[Outcome]) -> Any:
    """Of the held-out loss, all budgets and attacks."""
    shares: dict[str, list[float]] = {}
    random: dict[str, list[float]] = {}
    for x in outcomes:
        shares.setdefault(name_of(x), []).append(x.recovered.get(HELD_OUT, math.nan))
        random.setdefault(name_of(x), []).append(x.by_random.get(HELD_OUT, math.nan))
    return pictures.recovery(shares, random, output=HELD_OUT)


def facts_of(flags: Flags, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What the numbers stand on."""
    threats = dict.fromkeys(str(ThreatModel(x.budget, "labels")) for x in outcomes)
    if flags.width:
        model = f"hidden layer of {flags.width}"
        how = f"SGD, lr {flags.lr:g}, momentum .9, batches of {flags.batch_size}, {flags.epochs:g} epochs"
        surrogate = f"influence (EK-FAC), mean of {SURROGATES} trainings"
        victims = (
            f"{flags.victims} victim{'s'[: flags.victims != 1]} an attack and split, fresh seeds"
        )
    else:
        model, how = "logistic regression", f"to the optimum, weight decay {flags.decay:g}"
        surrogate = "influence (exact Hessian) at the optimum"
        victims = "one victim an attack and split, fitted to the optimum"
    splits = len({x.split for x in outcomes})
    return {
        "data": Path(flags.data).name, "model": model, "training": how, "threat model": "; ".join(threats),
        "surrogate": f"{surrogate}; attacks in rounds ask it up to {flags.rounds} times", "victims": victims,
        "splits": f"{splits}, with other training, target, trusted and held-out rows each",
    }  # fmt: skip


def write_outcomes(flags: Flags, outcomes: Sequence[Outcome]) -> None:
    """outcomes.parquet: a line for every split, budget and attack."""
    import pyarrow
    from pyarrow import parquet

    lines = [flat(asdict(x)) for x in outcomes]
    names = dict.fromkeys(name for line in lines for name in line)
    table = pyarrow.table({name: [line.get(name) for line in lines] for name in names})
    part = flags.out / "outcomes.part"
    parquet.write_table(table, part)
    os.replace(part, flags.out / "outcomes.parquet")


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as columns, their names joined by points; the two sides of a curve apart."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "curves":
            value = {k: {"false": false, "true": true} for k, (false, true) in value.items()}
        if isinstance(value, dict):
            found |= {f"{name}.{k}": v for k, v in flat(value).items()}
        else:
            found[name] = value
    return found
