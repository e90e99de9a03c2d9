"""The table and the report of poison.py: what was moved, who would have noticed, what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from applied import poisoning_pictures as pictures
from applied import report
from applied.audit.detection import COMBINED
from applied.audit.repairing import shares_recovered
from applied.audit.threat import ThreatModel
from applied.recipe import Interval, paired_interval
from attribution_core.disk.files import write_parquet
from recipes.command import as_given
from recipes.data import classification
from recipes.data.classification import Classification
from recipes.work.poisoning import ACCURACY, HELD_OUT, SURROGATES, TARGET, Emptied, Outcome

if TYPE_CHECKING:
    from recipes.poison import Flags

AUDIT = (
    "An audit of your own model. No attack and a random attack of the same budget stand beside every attack; what "
    "would have detected it and what repair brings back stand beside every success."
)
ADVERSARY = (
    "The adversary gives other labels to {budgets} of the training rows, knows the model, how it is trained and the "
    "target rows, and wants their loss high. No input changes and no row comes or goes; the held-out rows have no "
    "part in the attack. The defender sees the poisoned data and a few trusted rows, and does not know who changed "
    "what, nor how much."
)
DAMAGE = 0.01  # of the clean held-out loss, below which nothing is there to be recovered
WIDE = 10  # letters of a heading before it goes on below


@dataclass(frozen=True)
class Row:
    """A line of the table, over splits: accuracy in points, predicted and random of the target loss.

    `recovered`, `by_random` (removal) and `possible` (exactly the changed rows removed) are shares of the damage to the
    held-out loss, over all splits; nan where nothing was removed (but for `possible`) or no damage is significant.
    """

    budget: float
    attack: str
    rows: float
    accuracy: Interval
    held_out: Interval
    target: Interval
    predicted: float
    predicted_held_out: float
    random: float
    auc: dict[str, float]
    suspects: float
    removed: float
    caught: float
    recovered: Interval
    by_random: Interval
    possible: Interval

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
        return mean([found for x in some if math.isfinite(found := value(x))])

    detectors = sorted(some[0].auc, key=lambda name: name == COMBINED)
    return Row(
        budget=some[0].budget, attack=some[0].attack, rows=over(lambda x: x.rows).mean,
        accuracy=over(lambda x: 100 * x.changed[ACCURACY]),
        held_out=over(lambda x: x.changed[HELD_OUT]),
        target=over(lambda x: x.changed[TARGET]),
        predicted=over(lambda x: x.predicted.get(TARGET, math.nan)).mean,
        predicted_held_out=over(lambda x: x.predicted.get(HELD_OUT, math.nan)).mean,
        random=over(lambda x: x.random[TARGET]).mean,
        auc={name: float(np.mean([x.auc[name] for x in some])) for name in detectors},
        suspects=over(lambda x: x.suspects).mean, removed=over(lambda x: x.removed).mean,
        caught=over(lambda x: x.caught).mean,
        **{arm: mean(comes_back(some, arm)) for arm in ("recovered", "by_random", "possible")},
    )  # fmt: skip


def comes_back(some: Sequence[Outcome], arm: str) -> list[float]:
    """Shares of held-out damage, one a split, see `shares_recovered`.

    Nothing where there is less of it than `DAMAGE` of the clean loss, where its own interval over three splits or more
    holds 0, or where nothing was removed.
    """
    pairs = [(x.changed[HELD_OUT], getattr(x, arm).get(HELD_OUT, math.nan)) for x in some]
    known = np.array([(d, d * share) for d, share in pairs if math.isfinite(share)]).reshape(-1, 2)
    clean = np.mean([x.clean[HELD_OUT] for x in some])
    return shares_recovered(known[:, 0], known[:, 1], float(DAMAGE * clean), rises=True).tolist()


def mean(found: Sequence[float]) -> Interval:
    """Over splits; nan of none."""
    return paired_interval(found) if found else Interval(math.nan, math.nan, math.nan)


def print_table(outcomes: Sequence[Outcome], lost: Sequence[Emptied] = ()) -> None:
    """A line for every budget and attack, and below it what they add up to in words."""
    rows = rows_of(outcomes)
    lines = [cells(row) for row in rows]
    print(f"\n{columns(list(lines[0]), [list(line.values()) for line in lines])}\n")
    print("\n".join(words_of(outcomes, rows, lost)))


def cells(row: Row) -> dict[str, str]:
    """Heading -> text of a line."""
    return {
        "budget": f"{100 * row.budget:g} %", "attack": row.attack, "rows": f"{row.rows:g}",
        "accuracy, points": spread(row.accuracy, "+.1f"),
        "held-out loss": spread(row.held_out, "+.3f"), "target loss": spread(row.target, "+.3f"),
        "predicted": number(row.predicted, "+.3f"), "random attack": number(row.random, "+.3f"),
        **starred(row), "removed / caught": f"{row.removed:.0f} / {row.caught:.0f}",
        "recovered": spread(row.recovered, ".2f"), "at most": number(row.possible.mean, ".2f"),
    }  # fmt: skip


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


def words_of(
    outcomes: Sequence[Outcome], rows: Sequence[Row], lost: Sequence[Emptied] = ()
) -> list[str]:
    """What the table rests on and what it shows, in words."""
    splits = len({x.split for x in outcomes})
    first = [x for x in outcomes if (x.budget, x.attack) == (rows[0].budget, rows[0].attack)]
    clean = {name: np.mean([x.clean[name] for x in first]) for name in (ACCURACY, HELD_OUT, TARGET)}
    noise = ", means with 95 % t intervals over splits" if splits > 1 else ""
    return [
        f"Changes beside no attack, whose accuracy is {clean[ACCURACY]:.4f}, held-out loss {clean[HELD_OUT]:.4f} and "
        f"target loss {clean[TARGET]:.4f}; {splits} split{'s'[: splits != 1]}{noise}.",
        f"Detectors by AUC, * the best. {verdict(rows)}",
        agreement(rows),
        "Removed: rows whose label the combined detector disputes, and how many of them were changed; recovered: of "
        "the damage to the held-out loss, without them (- where nothing was removed, where there is hardly any damage, or "
        f"none significantly above 0 over splits); at most: where exactly the changed rows are removed.{untouched(outcomes)}",
        *([left_out(lost)] if lost else []),
    ]  # fmt: skip


def untouched(outcomes: Sequence[Outcome]) -> str:
    """Where suspects are kept, since a class would vanish with them."""
    kept = [x for x in outcomes if x.spared]
    each = [
        f"{name_of(x)} in split {x.split} ({x.suspects} suspects, class {', '.join(map(repr, x.spared[:5]))})"
        for x in kept
    ]
    if not each:
        return ""
    return (
        " Nothing was removed where that, or as many rows at random, would take a class away: "
        f"{'; '.join(each)}. Give more trusted rows of such a class."
    )


def left_out(lost: Sequence[Emptied]) -> str:
    """Which attacks stand in no table, as they left no row of a class in some split."""
    each = [
        f"{name_of(x)} in split {x.split} ({', '.join(map(repr, x.emptied[:5]))})" for x in lost
    ]
    return (
        f"Left out, since they or the random attack beside them leave no row of a class, without which nothing can be "
        f"fitted: {'; '.join(each)}. Use smaller --budgets, a network (--width) or data without such classes."
    )


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
    """By how much predicted changes of the losses differ from actual ones."""
    found = {
        TARGET: [(row, row.predicted, row.target.mean) for row in rows],
        HELD_OUT: [(row, row.predicted_held_out, row.held_out.mean) for row in rows],
    }
    told = []
    for output, some in found.items():
        each = [
            f"{name_of(row)} {100 * said / came - 100:+.0f} %"
            for row, said, came in some
            if math.isfinite(said) and came
        ]
        told.append(f"of the {output}: {'; '.join(each) or 'nothing was predicted'}")
    return f"Predicted less actual change, in % of the actual one, {'. '.join(told)}."


def name_of(x: Row | Outcome | Emptied) -> str:
    """Attack and budget."""
    return f"{x.attack} at {100 * x.budget:g} %"


def write_report(
    flags: Flags,
    data: Classification,
    outcomes: Sequence[Outcome],
    lost: Sequence[Emptied] = (),
) -> None:
    """report.html, metrics.json and outcomes.parquet; data: those of the first split."""
    rows, facts = rows_of(outcomes), facts_of(flags, data, outcomes)
    budgets = " or ".join(f"{100 * budget:g} %" for budget in dict.fromkeys(x.budget for x in rows))
    words = words_of(outcomes, rows, lost)
    sections = {
        "What was asked": [report.paragraph(AUDIT), report.paragraph(ADVERSARY.format(budgets=budgets))],
        "What the attacks moved": [html([moved(row) for row in rows]), report.paragraph(words[0]), report.paragraph(words[2]),
                                   *map(report.paragraph, words[4:]), *map(report.picture, effects(outcomes))],
        "Who would have noticed": [html([{"attack": name_of(row), **starred(row)} for row in rows]), report.paragraph(words[1]), *map(report.picture, rocs(outcomes))],
        "What comes back": [html([mended(row) for row in rows]), report.paragraph(words[3]), report.picture(recovery(outcomes))],
        "How this was made": [report.facts(facts)],
    }  # fmt: skip
    page = report.Page("How far a few wrong labels move this model", facts["data"], sections)
    page.save(flags.out / "report.html")
    report.write_metrics(
        flags.out / "metrics.json",
        {"rows": rows, "words": words, "facts": facts, "flags": as_given(flags)},
    )
    write_outcomes(flags, outcomes)
    print(f"Judged on {facts['victims']}.\n\nwritten to {flags.out}/report.html")


def html(lines: Sequence[dict[str, Any]]) -> str:
    """A table of the report; the keys are its headings."""
    return report.table([list(line.values()) for line in lines], list(lines[0]))


def moved(row: Row) -> dict[str, Any]:
    """Changes of the outputs."""
    return {
        "attack": name_of(row), "rows": f"{row.rows:g}", "accuracy, points": row.accuracy,
        "held-out loss": row.held_out, "target loss": row.target, "predicted": row.predicted,
        "random attack": row.random,
    }  # fmt: skip


def mended(row: Row) -> dict[str, Any]:
    """Rows removed, and what that brings back."""
    counts = {"removed": row.removed, "of them changed": row.caught, "changed in all": row.rows}
    shares = {
        "recovered": row.recovered,
        "at most": row.possible,
        "removing at random": row.by_random,
    }
    return {"attack": name_of(row), **{k: f"{n:.0f}" for k, n in counts.items()}, **shares}


def effects(outcomes: Sequence[Outcome]) -> list[Any]:
    """Both losses and the accuracy against the budget, of the attacks that were judged at all budgets."""
    budgets = sorted({x.budget for x in outcomes})
    pairs = {(x.attack, x.budget) for x in outcomes}
    names = dict.fromkeys(x.attack for x in outcomes)
    attacks = [name for name in names if all((name, budget) in pairs for budget in budgets)]
    if not attacks:
        return []
    ordered = sorted(outcomes, key=lambda x: (x.split, x.budget))

    def of(attack: str, values: str, output: str) -> Any:
        found = [getattr(x, values).get(output, math.nan) for x in ordered if x.attack == attack]
        return np.reshape(found, (-1, len(budgets)))

    figures = []
    for output in (TARGET, HELD_OUT, ACCURACY):
        found = {attack: of(attack, "changed", output) for attack in attacks}
        said = {attack: of(attack, "predicted", output) for attack in attacks}
        said = {attack: x for attack, x in said.items() if np.isfinite(x).all()}
        label = f"change of the {output}"
        figures.append(pictures.effect_against_budget(budgets, found, predicted=said, ylabel=label))
    return figures


def rocs(outcomes: Sequence[Outcome]) -> list[Any]:
    """A picture for each attack, at the largest budget."""
    largest, figures = max(x.budget for x in outcomes), []
    for attack in dict.fromkeys(x.attack for x in outcomes if x.budget == largest):
        some = [x for x in outcomes if (x.attack, x.budget) == (attack, largest)]
        curves = {name: [x.curves[name] for x in some] for name in some[0].curves}
        figures.append(pictures.roc(curves, title=name_of(some[0]), best=COMBINED))
    return figures


def recovery(outcomes: Sequence[Outcome]) -> Any:
    """Of the held-out loss, all budgets and attacks."""
    names = dict.fromkeys(map(name_of, outcomes))

    def of(arm: str) -> dict[str, Any]:
        found = {k: comes_back([x for x in outcomes if name_of(x) == k], arm) for k in names}
        return {k: shares or [math.nan] for k, shares in found.items()}

    return pictures.recovery(of("recovered"), of("by_random"), output=HELD_OUT)


def facts_of(flags: Flags, data: Classification, outcomes: Sequence[Outcome]) -> dict[str, str]:
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
    return {
        "data": Path(flags.data).name, "model": model, "training": how, "threat model": "; ".join(threats),
        "surrogate": f"{surrogate}; attacks in rounds ask it up to {flags.rounds} times", "victims": victims,
        "splits": f"{len({x.split for x in outcomes})}, with other {'training, ' * (flags.test is None)}target, trusted and "
        f"held-out rows each{', the same training rows' * (flags.test is not None)}",
        **classification.facts_of(data),
    }  # fmt: skip


def write_outcomes(flags: Flags, outcomes: Sequence[Outcome]) -> None:
    """outcomes.parquet: a line for every split, budget and attack; a column for every entry of a mapping."""
    import pyarrow

    table = pyarrow.Table.from_pylist([asdict(x) for x in outcomes]).flatten()
    write_parquet(flags.out / "outcomes.parquet", table)
