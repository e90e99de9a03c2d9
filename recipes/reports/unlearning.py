"""The report of unlearn.py: how near every method comes to models retrained without the forget set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from applied import report
from applied import unlearning_pictures as pictures
from applied.yardstick import CEILING, FLOOR
from recipes.command import as_given
from recipes.data import classification
from recipes.work.unlearning import AUTO, MATCHING, PREDICTED, Study

if TYPE_CHECKING:
    from recipes.unlearn import Flags

QUANTILES = (0.05, 0.35, 0.65, 0.95)  # of the forget rows' true changes: which are shown


def write_report(flags: Flags, studies: list[Study]) -> None:
    """report.html and metrics.json."""
    sections: dict[str, list[str]] = {"Share of the gap closed": summary(studies)}
    for study in studies:
        sections |= sections_of(study)
    facts = facts_of(flags, studies)
    sections["How this was made"] = [report.facts(facts)]
    name = studies[0].forget.data.name
    page = report.Page("Unlearned, judged by retraining", name, sections)
    page.save(flags.out / "report.html")
    metrics = {study.forget.kind: metrics_of(study) for study in studies}
    report.write_metrics(
        flags.out / "metrics.json", {**metrics, "facts": facts, "flags": as_given(flags)}
    )
    print(f"\nwritten to {flags.out}/report.html")


def print_table(study: Study) -> None:
    """The evaluation's table with the cost before it."""
    evaluation = study.evaluation
    cost = [*(f"{100 * study.cost[m]:.0f} %" for m in evaluation.methods), "100 %", "0 %", ""]
    lines = evaluation.table().split("\n")
    print(f"\n{heading(study)}; cost in share of a training")
    for share, line in zip(["cost", *cost], lines, strict=True):
        print(f"{share:>6}  {line}")
    if silent := believes_nothing(study):
        print(silent)


def believes_nothing(study: Study) -> str:
    """A line where auto saw no change beyond noise and so left the models about as they were; else empty."""
    least = max(study.trust[name] for name in study.trust if name.startswith("forget"))
    if least > 0.1:
        return ""
    return (
        f"auto saw no change of the forget set beyond noise (trust {least:.2f}) and left the models about as they "
        "were; more models detect smaller changes"
    )


def heading(study: Study) -> str:
    """The forget set in a few words."""
    return f"{study.forget.kind}: {len(study.forget.rows)} of {len(study.forget.data.x)} rows"


def summary(studies: list[Study]) -> list[str]:
    """A table over all forget sets."""
    methods = [*studies[0].evaluation.methods]
    rows = []
    for method in methods:
        gaps = [study.evaluation.gap_closed(method) for study in studies]
        cost = np.mean([study.cost[method] for study in studies])
        cells = [gap if math.isfinite(gap) else "no effect" for gap in gaps]
        rows.append((method, f"{100 * cost:.0f} %", *cells))
    head = ("method", "cost", *(study.forget.kind for study in studies))
    return [
        report.table(rows, head),
        report.paragraph(
            "1 is as near to retrained models as other retrained models are, 0 is doing nothing, below 0 is worse "
            "than that; on the forget set. 'No effect': retraining without these rows hardly changes their outputs, "
            "so the set tests nothing. Learning rates of the baselines and of oracle matching were chosen with the "
            "oracles, in their favour; 'auto' sees none. Oracle matching needs a retrained model, whose cost is not "
            "counted: it shows what could be reached."
        ),
    ]


def sections_of(study: Study) -> dict[str, list[str]]:
    """Table and pictures of one forget set."""
    found, names = study.evaluation, []
    rows: list[Any] = []
    for method in (*found.methods, FLOOR, CEILING):
        cells = {
            name: value if math.isfinite(value) else None
            for name, value in found.readings(method).items()
        }
        names = list(cells)
        cost = study.cost.get(method, 1.0 if method == FLOOR else 0.0)
        flag = "over-forgets" if found.over(method) else ""
        rows.append((method, f"{100 * cost:.0f} %", *cells.values(), flag))
    words = (
        f"{found.direction} in nats, {found.kind}, {found.k} models of each kind; the floor is the distance "
        "between two sets of oracles, so no method is asked to go below. Of that, from means: by how much the distance "
        "would fall if every row's mean output were the oracles'; the rest is how models scatter. Margin error in the unit of margins. "
        "Attack AUC: how well an attacker distinguishes unlearned models from oracles: .5 is chance; the floor is the AUC between two sets of oracles of this size."
    )
    table = report.table(rows, ("method", "cost", *names, "flags"))
    return {
        heading(study): [
            table,
            report.paragraph(words),
            *map(report.paragraph, filter(None, [believes_nothing(study)])),
        ],
        f"{study.forget.kind}: margins of some rows": [report.picture(histograms(study))],
        f"{study.forget.kind}: distance and cost": [report.picture(against_cost(study))],
        f"{study.forget.kind}: predicted and true changes": [report.picture(changes(study))],
    }


def together(splits: Any) -> Any:
    """Margins of all splits side by side, [models, z]."""
    return np.concatenate(list(splits.values()), axis=1)


def histograms(study: Study) -> Any:
    """Four forget rows, from little to much true change, and the retained and validation rows that move most."""
    before, oracle = study.before, study.oracle
    start, chosen, names = 0, [], []
    for split, rows in study.points.items():
        moved = np.abs(oracle[split].mean(0) - before[split].mean(0))
        order = np.argsort(moved, kind="stable")
        shown = (
            np.unique([round(q * (len(order) - 1)) for q in QUANTILES])
            if split == "forget"
            else [len(order) - 1]
        )
        for place in shown:
            chosen.append(start + int(order[place]))
            names.append(f"{split}, row {rows[order[place]]}")
        start += len(rows)
    old, new, without = (together(x) for x in (before, study.methods[AUTO], oracle))
    return pictures.histograms(old, new, without, chosen, names=names)


def against_cost(study: Study) -> Any:
    """Without the predicted outputs of auto, so that no two methods share a colour."""
    found = study.evaluation
    scores = {name: x for name, x in found.scores.items() if name != PREDICTED}
    return pictures.against_cost(replace(found, scores=scores), study.cost)


def changes(study: Study) -> Any:
    """Mean change of every row that was read, as auto predicted it."""
    before = together(study.before).mean(0)
    predicted = together(study.methods[PREDICTED]).mean(0) - before
    return pictures.changes(predicted, together(study.oracle).mean(0) - before)


def metrics_of(study: Study) -> dict[str, Any]:
    """The table's numbers, cost, learning rates and the rows themselves."""
    return {
        **study.evaluation.to_dict(), "cost": study.cost, "rates": study.rates,
        "trust": study.trust,
        "rows": study.forget.data.places[study.forget.rows], "needs an oracle": [MATCHING],
    }  # fmt: skip


def facts_of(flags: Flags, studies: list[Study]) -> dict[str, str]:
    """What the numbers stand on."""
    data = studies[0].forget.data
    return {
        "data": f"{data.name}: {len(data.x):,} rows, {len(studies[0].points['validation']):,} held out",
        "model": f"hidden layer of {flags.width}" if flags.width else "logistic regression",
        "training": f"SGD, lr {flags.lr:g}, momentum .9, batches of {flags.batch_size}, {flags.epochs:g} epochs, "
        f"weight decay {flags.weight_decay:g}",
        "models": f"{flags.models} trained, {2 * flags.models} retrained without each forget set",
        "budget": f"{flags.budget:.0%} of a training's steps",
        "learning rates tried": ", ".join(f"{rate * flags.lr:g}" for rate in flags.rates),
        "distance": studies[0].evaluation.direction,
        "rows": rows_are(flags, data),
        **classification.facts_of(data),
    }


def rows_are(flags: Flags, data: classification.Classification) -> str:
    """What the numbers of rows mean, in pictures and in points-*.parquet."""
    if flags.test is not None:
        return f"numbered from 0 as in {data.name}, validation rows as in {Path(flags.test).name}"
    if data.ids is None:
        return "numbered from 0, training and held-out rows by themselves"
    return f"numbered from 0 as in {data.name}"
