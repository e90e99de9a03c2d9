"""What came out, written down: metrics.json, report.html and a table on the screen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applied import pictures, report
from applied.recipe import Decision, Interval, paired_interval
from attribution_core import LinearDatamodel
from attribution_core.processes import world
from recipes.command import as_given
from recipes.reports.ends import ends
from recipes.work.proof import Evidence, Length
from recipes.work.selection import missed
from recipes.work.study import PARTS, Study, say

UNEQUAL = 0.1  # of random's steps: an arm that differs by more is pointed out


def write_report(
    study: Study, datamodel: LinearDatamodel, decision: Decision, evidence: Evidence
) -> None:
    """metrics.json, and report.html with every picture inside."""
    if world()[0] != 0:
        return
    correlation = pictures.rank_correlation(evidence.predicted, evidence.actual)
    held = {name: _against(evidence, name) for name in evidence.arms}
    chosen_ids = "\n".join(map(str, decision.ids))
    metrics = {
        "flags": as_given(study.flags),
        "unit": "bits per byte",
        "chosen": {
            "documents": len(decision.ids),
            "tokens": decision.cost,
            "sha256": hashlib.sha256(chosen_ids.encode()).hexdigest(),
        },
        "predicted": {
            "chosen": evidence.verified.decision.predicted[0],
            "random": evidence.verified.decision.baseline[0],
        },
        "arms": held,
        "trained": {name: asdict(of) for name, of in evidence.lengths.items()},
        "rank_correlation": asdict(correlation),
        "subsets": len(evidence.actual),
        "seeds": list(evidence.verified.seeds),
        "datamodel": dict(datamodel.meta),
        "selection": dict(decision.meta),
        **study.notes,
    }
    report.write_metrics(study.flags.out / "metrics.json", metrics)
    _page(study, datamodel, decision, evidence, held).save(study.flags.out / "report.html")
    say(_table(evidence, held))
    if words := unequal(evidence.lengths):
        say(f"warning: {words}")
    say(
        f"predicted against actual over {len(evidence.actual)} subsets: rank correlation {correlation}\n"
        f"report: {study.flags.out / 'report.html'}"
    )


def _against(evidence: Evidence, name: str) -> dict[str, Any]:
    """Mean loss of an arm on each part, and its difference to random, paired by seed."""
    found = {}
    for j, part in enumerate(evidence.parts):
        arm, random = evidence.arms[name][:, j], evidence.arms["random"][:, j]
        found[part] = {
            "loss": asdict(paired_interval(arm)),
            "minus_random": asdict(paired_interval(arm, random)),
        }
    return found


def unequal(lengths: dict[str, Length]) -> str:
    """Which arms are trained for more or fewer steps than random documents, in a sentence; "" where none is."""
    random = lengths["random"].steps
    far = [
        f"{name} {of.steps:,.0f}"
        for name, of in lengths.items()
        if abs(of.steps / random - 1) > UNEQUAL
    ]
    if not far:
        return ""
    return (
        f"trained for other than the {random:,.0f} steps of random documents: {', '.join(far)}; a step takes a fixed "
        "number of blocks, and a short document fills one of its own, so at equal tokens short documents train longer: "
        "a difference to random is due to the documents and to the steps"
    )


def _table(evidence: Evidence, held: dict[str, Any]) -> str:
    """Every arm, the best first: target loss and its difference to random, with 95 % intervals."""
    lines = [
        f"{'held-out bits/byte':22s}"
        + "".join(f"{part:>10s}{'- random':>26s}" for part in evidence.parts)
        + f"{'blocks':>10s}{'steps':>10s}"
    ]
    for name in sorted(held, key=lambda arm: held[arm]["report"]["loss"]["mean"]):
        cells = ""
        for part in evidence.parts:
            loss, gap = held[name][part]["loss"], held[name][part]["minus_random"]
            ends = f"{gap['mean']:+.3f}"
            if len(evidence.verified.seeds) > 1:
                ends += f" [{gap['low']:+.3f}, {gap['high']:+.3f}]"
            cells += f"{loss['mean']:10.3f}{'' if name == 'random' else ends:>26s}"
        of = evidence.lengths[name]
        lines.append(f"{name:22s}{cells}{of.blocks:10,.0f}{of.steps:10,.0f}")
    seeds = len(evidence.verified.seeds)
    noise = (
        "paired by seed, 95 % t intervals"
        if seeds > 1
        else "which gives no interval: use more --seeds"
    )
    return "\n".join([*lines, f"{seeds} training{'s'[: seeds != 1]} an arm, {noise}"])


def _page(
    study: Study,
    datamodel: LinearDatamodel,
    decision: Decision,
    evidence: Evidence,
    held: dict[str, Any],
) -> report.Page:
    density = datamodel.scores[:, 0] / study.tokens
    subtitle = (
        f"{len(decision.ids):,} of {len(study.pool):,} documents, {decision.cost:,.0f} tokens. "
        f"{against_random(evidence, bool(study.quotas))}{beside(evidence)}."
    )
    histogram = pictures.histogram(
        density, decision.weights > 0, xlabel="score per token, bits per byte"
    )
    sections = {
        "Proof by retraining": _arms(evidence, held),
        "Predicted against actual": _calibration(evidence),
        "Composition": [
            report.picture(pictures.composition(_composition(study, evidence))),
            *quotas_missed(study, evidence.weights),
        ],
        "Scores": [report.picture(histogram)],
        **ends_of(study, datamodel),
        "How this was made": [report.facts(_facts(study, datamodel))],
    }
    return report.Page("Which documents to train on", subtitle, sections)


def against_random(evidence: Evidence, quotas: bool) -> str:
    """The headline's first clause: the difference to random documents, with its interval where seeds give one."""
    seeds = len(evidence.verified.seeds)
    gap = evidence.verified.difference("random")
    return (
        f"Retrained {f'{seeds} times' if seeds > 1 else 'once'}, they change held-out target loss by {gap} bits per "
        f"byte against random documents of as many tokens{', under the same quotas' if quotas else ''} "
        f"({'95 % interval, paired by seed' if seeds > 1 else 'one training tells no noise'})"
    )


def beside(evidence: Evidence) -> str:
    """What the headline must not leave out, as clauses: the best filter, and the chosen documents on other text."""
    arms, words = evidence.arms, ""
    report_part = evidence.parts.index("report")
    filters = [name for name in arms if name not in ("chosen", "random")]
    if filters:
        best = min(filters, key=lambda name: arms[name][:, report_part].mean())
        chosen, other, random = (arms[k][:, report_part] for k in ("chosen", best, "random"))
        told = _told(
            paired_interval(chosen, other),
            "the chosen documents are better",
            "it is better",
            "a tie",
        )
        words += (
            f"; the best filter, {best}, changes it by {paired_interval(other, random)}: {told}"
        )
    if "test" in evidence.parts:
        test = evidence.parts.index("test")
        gap = paired_interval(arms["chosen"][:, test], arms["random"][:, test])
        told = _told(gap, "better than random", "worse than random", "a tie with random")
        words += f"; on the test text the chosen documents change the loss by {gap}: {told}"
    return words


def _told(gap: Interval, less: str, more: str, tie: str) -> str:
    """Which of three holds of a difference of losses; of one training, that there is no interval."""
    if np.isnan(gap.low):
        return "one training, so no interval"
    return less if gap.high < 0 else more if gap.low > 0 else tie


def _arms(evidence: Evidence, held: dict[str, Any]) -> list[str]:
    """Every arm's loss on every part, its difference to random and its length, as a table and a picture."""
    header, rows = ["trained on"], []
    for part in evidence.parts:
        header += [f"{part}, bits/byte", "less random"]
    header += ["blocks", "steps"]
    for name in sorted(held, key=lambda arm: held[arm]["report"]["loss"]["mean"]):
        row: list[Any] = [name]
        for part in evidence.parts:
            row += [Interval(**held[name][part][kind]) for kind in ("loss", "minus_random")]
        row += [round(evidence.lengths[name].blocks), round(evidence.lengths[name].steps)]
        rows.append(row)
    loss = [held[name]["report"]["loss"] for name in evidence.arms]
    columns = [[one[k] for one in loss] for k in ("mean", "low", "high")]
    label = "held-out target loss after retraining, bits per byte (lower is better)"
    words = unequal(evidence.lengths)
    return [
        report.table(rows, header, best={header[1]: "low"}),
        *([report.paragraph(f"Arms {words}.")] if words else []),
        report.picture(pictures.arms(list(evidence.arms), *columns, xlabel=label)),
    ]


def _calibration(evidence: Evidence) -> list[str]:
    """The picture of predicted against actual loss, and how to read it."""
    filters = [name for name in evidence.weights if name != "chosen"]
    labels = ["chosen", *filters, *[""] * (len(evidence.kinds) - 1 - len(filters))]
    figure = pictures.calibration(
        evidence.predicted,
        evidence.actual,
        evidence.kinds,
        labels,
        unit="target loss, bits per byte",
    )
    return [
        report.picture(figure),
        report.paragraph(
            "Predicted: the proxies' loss on the report part, moved by scores that came from another "
            "part of the target. Actual: retrained models on the report part. A first-order prediction "
            "is least true at an optimum, so its order counts for more than its size."
        ),
    ]


def _composition(study: Study, evidence: Evidence) -> dict[str, dict[str, float]]:
    """Shares of tokens by domain, of every arm and of the pool."""
    found = {}
    for name, weights in {"pool": np.ones(len(study.pool)), **evidence.weights}.items():
        counts: Counter[str] = Counter()
        for domain, tokens in zip(study.domains, weights * study.tokens, strict=True):
            counts[str(domain)] += tokens
        total = sum(counts.values())
        found[name] = {domain: count / total for domain, count in counts.items()}
    return found


def quotas_missed(study: Study, arms: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """A paragraph on the low quotas that arms miss; none where all are met."""
    words = {name: missed(study, weights) for name, weights in arms.items()}
    told = "; ".join(f"{name}: {found}" for name, found in words.items() if found)
    if not told:
        return []
    return [report.paragraph(f"Quotas missed, as whole documents do not fill them. {told}.")]


def ends_of(study: Study, datamodel: LinearDatamodel) -> dict[str, list[str]]:
    """The documents of the lowest and of the highest score per token."""
    titles = ("Predicted to help most", "Predicted to hurt most")
    found = ends(datamodel.scores[:, 0] / study.tokens, 8)
    return {
        title: [_cards(study, datamodel, some)] for title, some in zip(titles, found, strict=True)
    }


def _cards(study: Study, datamodel: LinearDatamodel, rows: NDArray[Any]) -> str:
    """Documents as cards, or the word none."""
    cards = [
        report.Document(
            (doc := study.pool[i]).id, doc.source, doc.domain,
            float(datamodel.scores[i, 0]), int(study.tokens[i]), doc.text,
        )
        for i in rows
    ]  # fmt: skip
    return report.documents(cards) if cards else report.paragraph("none")


def _test_text(study: Study) -> dict[str, str]:
    count = int((study.part == "test").sum())
    return {"test": f"{study.flags.test or 'embedded'}, {count:,} documents"} if count else {}


def _facts(study: Study, datamodel: LinearDatamodel) -> dict[str, Any]:
    meta, gate, flags = datamodel.meta, study.notes["gate"], study.flags
    recipe = study.recipe
    optimizer: Any = recipe.optimizer
    quotas = [f"{name} {low:g} to {high:g}" for name, (low, high) in study.quotas.items()]
    parts = [f"{(study.part == part).sum():,} to {part}" for part in PARTS]
    return {
        "pool": f"{flags.pool}, {len(study.pool):,} documents",
        "target": f"{flags.target}, documents: {', '.join(parts)}",
        **_test_text(study),
        "model": study.flags.model,
        "method": f"{meta['method']}, {meta['curvature']}, mean damping {meta['damping']:.2g}",
        "parameters covered": f"{meta['covered']:.0%}",
        "anchor": f"exposure {meta['exposure']:.3f}, {study.flags.proxies} proxies",
        "gate": f"proxy {gate['proxy']:.3f} bits/byte, {gate['order']}-grams {gate['ngram']:.3f}",
        "training": f"{recipe.epochs:g} epochs in batches of {recipe.batch_size}, lr {optimizer.lr:g}",
        "seeds": f"{flags.seeds} of every arm",
        "budget": f"{study.budget:,.0f} tokens, {study.exposure:.1%} of the pool",
        "quotas": ", ".join(quotas) or "none",
        "copies within the pool": f"{len(study.notes['copies']):,} documents",
        "also held-out text": f"{len(study.notes['also_held_out'])} pool documents",
        "truth": "fresh initial weights and order per seed; documents not chosen are removed",
    }
