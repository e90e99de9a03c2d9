"""The report of value_data.py: what each method finds, what retraining says, who is paid what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from applied import report, value_pictures
from applied.recipe import paired_interval
from recipes.command import as_given
from recipes.data import classification
from recipes.work.valuing import Owned, Removed, Study, Valued

CONTROL, RANDOM = " (control)", "random (control)"
INSPECTED = np.linspace(0, 0.5, 51)  # shares of the rows, worst first


def write_report(
    study: Study, valued: Valued, removed: Removed, owned: Owned | None, accuracy: Removed
) -> None:
    """report.html and metrics.json; the same table is printed."""
    sections, metrics = rows_of(study, valued, removed, accuracy)
    if owned is not None:
        more, numbers = owners_of(study, owned)
        sections, metrics = {**sections, **more}, {**metrics, **numbers}
    elif study.flags.owner is not None:
        words = one_owner(study)
        print(words)
        sections["Owners"] = [report.paragraph(words)]
    facts = {**facts_of(study), **classification.facts_of(study.data)}
    sections["How this was made"] = [report.facts(facts)]
    out = study.flags.out
    report.Page("What the data are worth", study.data.name, sections).save(out / "report.html")
    given = as_given(study.flags)
    report.write_metrics(out / "metrics.json", {**metrics, **facts, "flags": given})
    print(f"written to {out}/report.html")


def one_owner(study: Study) -> str:
    """Why the owners who were asked for are not valued."""
    return f"Column {study.flags.owner!r} names one owner alone, {study.data.owners[0]!r}: owners are not valued, paid or bought."


def rows_of(
    study: Study, valued: Valued, removed: Removed, accuracy: Removed
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sections, metrics) of single rows."""
    from sklearn.metrics import roc_auc_score

    bad, shares = study.data.bad, study.flags.remove
    last = min(len(shares), 2)  # the share shown in the table: the second, usually a tenth
    rows: list[Any] = []
    metrics: dict[str, Any] = {}
    for name, values in valued.found.items():
        change = paired_interval(removed[name][:, last], removed[name][:, 0])
        row: list[Any] = [name, valued.needs[name] or "nothing clean"]
        if bad is not None and 0 < bad.sum() < len(bad):
            auc = float(roc_auc_score(bad, -values.values))
            row += [auc, float(found_by(values.values, bad)[10])]
            metrics[name] = {"auc": auc}
        points = paired_interval(100 * accuracy[name][:, last], 100 * accuracy[name][:, 0])
        rows.append((*row, change, points))
        metrics.setdefault(name, {}).update(removal=change, accuracy=points)
    head = ["method", "needs", *(["AUC", "found in a tenth"] if len(rows[0]) > 4 else [])]
    loss = f"test loss without the worst {100 * shares[last - 1]:g}%, change"
    head += [loss, "accuracy, points, change"]
    sections: dict[str, list[str]] = {
        "What each method finds": [
            report.table(
                rows, head, best={loss: "low", **({"AUC": "high"} if "AUC" in head else {})}
            ),
            report.paragraph(
                "AUC: how well low values identify the rows with planted wrong labels; found in a tenth: their share "
                "among the 10 % of rows with the lowest values. Changes: retrained without the lowest rows, less "
                f"retrained on all, {study.flags.seeds} seeds, paired, 95 % t interval."
                if bad is not None
                else "Changes: retrained without the lowest rows, less retrained on all, paired by seed."
            ),
        ]
    }
    print(text_table(rows, head))
    words = verdict(removed, last, shares[last - 1])
    print(words)
    sections["What each method finds"].insert(0, report.paragraph(words))
    metrics["verdict"] = words
    if "AUC" in head and bad is not None:
        curves = {name: found_by(v.values, bad) for name, v in valued.found.items()}
        one, two = "held-out margin", "Aumann–Shapley"
        sections["Wrong labels found"] = [
            report.picture(value_pictures.curves(
                INSPECTED, curves, xlabel="share of rows looked at, lowest values first",
                ylabel="share of wrong labels found", grey=("random (control)",),
            )),
            report.picture(value_pictures.marked(valued.found[one].values, bad, xlabel=one + ", nats")),
            report.picture(value_pictures.marked(valued.found[two].values, bad, xlabel=two + " worth, nats")),
        ]  # fmt: skip
    sections["Without the worst rows"] = [removal(removed, shares)]
    return sections, {"rows": metrics, "remainder": valued.remainder}


def removal(removed: Removed, shares: Sequence[float]) -> str:
    """Test loss against the share of rows taken away, less that without random rows by the same seeds.

    Seeds scatter more than methods differ: losses themselves would be bands over one another.
    """
    many = len(removed[RANDOM])
    gaps = {name: losses - removed[RANDOM] for name, losses in removed.items()}
    figure = value_pictures.curves(
        [0.0, *shares], gaps, xlabel="share of rows taken away, lowest values first",
        ylabel="test loss less random rows', nats", grey=(RANDOM,),
    )  # fmt: skip
    words = (
        "Test loss after retraining without the lowest rows, less that after retraining without as many random rows by the "
        "same seed: below 0 the rows taken away are worse than random ones. "
    )
    first, last = (losses.mean() for losses in removed[RANDOM].T[[0, -1]])
    levels = f"The loss is {first:.3g} with all rows, {last:.3g} without {100 * shares[-1]:g} % at random. "
    bands = f"Means of {many} seeds, bands: 95 % t intervals." if many > 1 else "One training each."
    return report.picture(figure, words + levels + bands)


def verdict(removed: Removed, place: int, share: float) -> str:
    """Whose worst rows are better removed than random ones, by intervals paired by seed."""
    at = {name: losses[:, place] for name, losses in removed.items()}
    random, start = at.pop(RANDOM), f"Without the worst {100 * share:g} %: "
    if len(random) < 2:
        return f"{start}with one training per method no difference from random removal can be shown; use more --seeds."
    gaps = {name: paired_interval(loss, random) for name, loss in at.items()}
    better = sorted((n for n in gaps if gaps[n].high < 0), key=lambda n: gaps[n].mean)
    if not better:
        worse = [name for name, gap in gaps.items() if gap.low > 0]
        return (
            f"{start}no method's removal lowers test loss significantly more than random removal"
            + (f" (that of {', '.join(worse)} raises it)" if worse else "")
            + ": nothing says that rows should go."
        )
    words = f"{start}test loss is lower than without random rows by {_each(better, gaps)}"
    all_rows = {name: paired_interval(at[name], removed[name][:, 0]) for name in better}
    if not any(gap.high < 0 for gap in all_rows.values()):
        words += "; it is not significantly lower than with all rows, so nothing says that rows should go"
    return f"{words}.{_control_does_as_well(at)}"


def _each(names: list[str], gaps: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({gaps[name]})" for name in names)


def _control_does_as_well(at: dict[str, Any]) -> str:
    """A sentence on controls that are not significantly worse than the best value; "" where there are none."""
    values = {name: loss.mean() for name, loss in at.items() if CONTROL not in name}
    if not values:
        return ""
    best = min(values, key=lambda name: values[name])
    good = [
        name.replace(CONTROL, "")
        for name, loss in at.items()
        if CONTROL in name and not paired_interval(loss, at[best]).low > 0
    ]
    return f" The control {', '.join(good)} does as well as the best value, {best}." if good else ""


def found_by(values: Any, bad: Any) -> Any:
    """Share of the bad rows among the lowest values, at each of INSPECTED."""
    order = np.argsort(values, kind="stable")
    count = np.concatenate([[0], np.cumsum(bad[order])])
    return count[np.round(INSPECTED * len(bad)).astype(int)] / max(1, bad.sum())


def owners_of(study: Study, owned: Owned) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sections, metrics) of owners."""
    exact = owned.found["retraining"]
    agree = {
        name: float(np.corrcoef(v.values, exact.values)[0, 1])
        for name, v in owned.found.items()
        if name != "retraining"
    }
    names = exact.players.tolist()
    print(exact.table())
    how, seeds = exact.meta["from"], exact.meta["seeds"]
    words = (
        f"Shapley values of owners, from {exact.meta['rows']} retrainings ({how}) with rows really removed, {seeds} seeds. "
        f"They add up to {exact.values.sum():.4g}, the target rows' loss without data less that with all. "
        + "; ".join(f"{name}: correlation {value:.3f}" for name, value in agree.items())
        + "."
    )
    picture = value_pictures.owners(owned.found, xlabel="worth: loss taken away, nats")
    worth = dict(zip(names, exact.values.tolist(), strict=True))
    sections = {"Owners": [report.picture(picture), report.paragraph(words)]}
    metrics: dict[str, Any] = {"correlation": agree, "worth": worth}
    for part, numbers in (payments_of(study, owned), purchase_of(owned)):
        sections, metrics = {**sections, **part}, {**metrics, **numbers}
    return sections, {"owners": metrics}


def payments_of(study: Study, owned: Owned) -> tuple[dict[str, Any], dict[str, Any]]:
    """(section, metrics) of what each owner is paid."""
    pay, exact = owned.payments, owned.found["retraining"]
    title = f"Sharing {study.flags.budget:g}"
    if isinstance(pay, str):
        print(f"\nnobody is paid: {pay}")
        return {title: [report.paragraph(f"Nobody is paid: {pay}.")]}, {"not_paid": pay}
    print(f"\n{pay.table()}")
    names, size = np.unique(study.data.owners, return_counts=True)
    rows = [
        (str(names[i]), int(size[i]), exact.interval(names[i]), float(pay.amounts[i]), _ends(pay.low[i], pay.high[i]))
        for i in np.argsort(-pay.amounts, kind="stable")
    ]  # fmt: skip
    head = ("owner", "training rows", "worth", "payment", "by the interval of worth")
    amounts = dict(zip(names.tolist(), pay.amounts.tolist(), strict=True))
    return {title: [report.table(rows, head)]}, {"payments": amounts}


def _ends(low: float, high: float) -> str | None:
    """Two amounts; None where they are not known."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return f"{_amount(low)} to {_amount(high)}"


def _amount(value: float) -> str:
    """To three digits, and no power of ten for money.

    >>> [_amount(value) for value in (9.996, -0.004, 12345.0, 0.0)]
    ['10.0', '-0.00400', '12345', '0']
    """
    if value == 0:
        return "0"
    power = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 9.996 is a ten
    return f"{value:.{max(0, 2 - power)}f}"


def purchase_of(owned: Owned) -> tuple[dict[str, Any], dict[str, Any]]:
    """(section, metrics) of the best owners for half of the price of all."""
    bought = owned.bought
    if isinstance(bought, str):
        print(f"\nnothing is bought: {bought}")
        return {"Buying half": [report.paragraph(f"Nothing is bought: {bought}.")]}, {
            "not_bought": bought
        }
    print(f"\n{bought.table()}")
    players = bought.decision.meta["players"]
    words = (
        f"Each training row costs 1, and half of the price of all may be spent: the best purchase is then the rows of "
        f"{', '.join(map(str, players))}. Retrained on them, "
        f"the test loss is {paired_interval(bought.actual[:, 0])} (predicted for the targets: {float(bought.predicted[0]):.4g}); "
        f"on random rows of the same price {paired_interval(bought.control['random'][:, 0])}."
    )
    metrics = {"bought": players, "bought_less_random": bought.difference()}
    return {"Buying half": [report.paragraph(words)]}, metrics


def text_table(rows: list[Any], head: list[str]) -> str:
    """The same rows for a terminal."""
    cells = [head, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def facts_of(study: Study) -> dict[str, str]:
    """What the numbers stand on."""
    data, flags = study.data, study.flags
    spoiled = "unknown" if data.bad is None else f"{int(data.bad.sum())}"
    p = sum(value.numel() for value in study.problem.params.values())
    return {
        "data": f"{data.name}: {len(data.x):,} training rows, {len(data.target_x):,} targets, {len(data.test_x):,} to judge",
        "wrong labels planted": spoiled,
        "model": f"{p:,} parameters, "
        + (f"hidden layer of {flags.width}" if flags.width else "logistic regression"),
        "training": f"{study.recipe.optimizer}, batches of {study.recipe.batch_size}, {flags.epochs:g} epochs, "
        f"weight decay {flags.weight_decay:g}",
        "random halves": f"{flags.retrainings}, one seed each",
    }
