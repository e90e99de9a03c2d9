"""The proof: retrain on the chosen documents and on controls, and write down what came out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applied import pictures, report
from applied.recipe import Decision, Verified, paired_interval, random_controls, verify
from attribution_core import LinearDatamodel, Outputs, RetrainingTable, Run
from attribution_core.processes import world
from attribution_core.retraining import retrain_pairs
from recipes import filters
from recipes.selection import SCORE_BATCH, choose
from recipes.study import Study, bar, say


@dataclass(frozen=True)
class Evidence:
    """Retrained models: arms under several seeds, and many subsets under one."""

    verified: Verified
    parts: tuple[str, ...]
    arms: dict[str, NDArray[np.float64]]  # name -> [seeds, parts], bits per byte
    weights: dict[str, NDArray[np.float64]]  # name -> [documents]
    kinds: list[str]  # of each subset in the picture
    predicted: NDArray[np.float64]  # [subsets]
    actual: NDArray[np.float64]  # [subsets]


def prove(
    study: Study, proxies: Sequence[Run], datamodel: LinearDatamodel, decision: Decision
) -> Evidence:
    """Retrain on the chosen documents, on random ones and on what each filter chooses."""
    seeds = list(range(study.flags.seeds))
    arms = filter_arms(study, proxies)
    random = random_controls(decision, seeds)
    outputs = study.outputs("report", "test")
    factors = study.bits(outputs)
    extra_kinds, extra = _more_subsets(study, datamodel, decision, len(arms) + 1 + len(seeds))

    def pairs(weights: NDArray[Any], seeds: Sequence[int]) -> list[tuple[NDArray[Any], int]]:
        return [
            (row[study.blocks.document], seed) for row in np.atleast_2d(weights) for seed in seeds
        ]

    retrain = partial(
        retrain_pairs, study.problem, study.recipe, outputs,
        folder=study.flags.out / "retraining", jobs=study.flags.jobs if world()[1] == 1 else 1,
    )  # fmt: skip
    everything = [
        *[pair for w in (decision.weights, *arms.values()) for pair in pairs(w, seeds)],
        *[pair for w, seed in zip(random, seeds, strict=True) for pair in pairs(w, [seed])],
        *pairs(extra, [seeds[0]]),
    ]
    found = retrain(everything, progress=bar("retraining")) * factors
    fixed = found[: (1 + len(arms)) * len(seeds)].reshape(1 + len(arms), len(seeds), -1)
    rest = found[(1 + len(arms)) * len(seeds) :]
    results = dict(zip(("chosen", *arms), fixed, strict=True)) | {"random": rest[: len(seeds)]}

    report = outputs.names.index("report")

    def table(weights: NDArray[Any], *, seeds: list[int]) -> RetrainingTable:
        bits = retrain(pairs(weights, seeds)) * factors  # all of it is in the folder by now
        per_seed = bits[:, report].reshape(len(weights), len(seeds), 1)
        return RetrainingTable(weights, per_seed, tuple(seeds))

    verified = verify(decision, table, control={"random": "random", **arms}, seeds=seeds)
    subsets = [decision.weights, *arms.values(), *random, *extra]
    kinds = ["chosen", *["filters"] * len(arms), *["random"] * len(seeds), *extra_kinds]
    actual = [*fixed.mean(axis=1)[:, report], *rest[:, report]]
    return Evidence(
        verified,
        outputs.names,
        results,
        {"chosen": decision.weights, **arms},
        kinds,
        datamodel.predict(np.stack(subsets))[:, 0],
        np.array(actual),
    )


def filter_arms(study: Study, proxies: Sequence[Run]) -> dict[str, NDArray[np.float64]]:
    """What the cheap filters choose, each from the same target text, budget and quotas."""
    pool = [doc.text for doc in study.pool]
    target = [d.text for d, p in zip(study.held_out, study.part, strict=True) if p == "score"]
    nats = Outputs(study.problem.loss, study.blocks).evaluate(
        proxies[0].model, batch_size=SCORE_BATCH
    )
    per_token = np.bincount(study.blocks.document, nats.numpy()) / study.tokens
    keep = {
        "low perplexity": -per_token,
        "n-gram importance": filters.ngram_importance(pool, target),
        "n-gram classifier": filters.classifier(pool, target),
    }
    return {name: _best(study, values) for name, values in keep.items()}


def _best(study: Study, keep: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of the documents that a filter ranks first, within budget and quotas."""
    ranks = np.argsort(np.argsort(keep, kind="stable")) + 1.0
    ids = np.array([doc.id for doc in study.pool])
    scores = (-ranks * study.tokens)[:, None]
    ranked = LinearDatamodel(scores, np.zeros(1), np.full(len(ids), study.exposure), ids)
    return choose(study, ranked).weights


def _more_subsets(
    study: Study, datamodel: LinearDatamodel, decision: Decision, have: int
) -> tuple[list[str], NDArray[np.float64]]:
    """Random subsets and tempered choices (scores plus noise), to fill the picture."""
    count = max(0, study.flags.subsets - have)
    random = count // 2
    spread = (datamodel.scores[:, 0] / study.tokens).std()
    rows = list(random_controls(decision, range(10_000, 10_000 + random)))
    for k in range(count - random):
        rng = np.random.default_rng([k, 0xA1])
        noise = spread * 2.0 ** (k % 4 - 1) * rng.standard_normal(len(study.pool)) * study.tokens
        noised = replace(datamodel, scores=datamodel.scores + noise[:, None])
        rows.append(choose(study, noised).weights)
    kinds = ["random"] * random + ["tilted"] * (count - random)
    return kinds, np.array(rows).reshape(count, len(study.pool))


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
        "flags": {name: str(value) for name, value in asdict(study.flags).items()},
        "unit": "bits per byte",
        "chosen": {
            "documents": len(decision.ids),
            "tokens": decision.cost,
            "sha256": hashlib.sha256(chosen_ids.encode()).hexdigest(),
        },
        "predicted": {"chosen": decision.predicted[0], "random": decision.baseline[0]},
        "arms": held,
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


def _table(evidence: Evidence, held: dict[str, Any]) -> str:
    """Every arm, the best first: target loss and its difference to random, with 95 % intervals."""
    lines = [
        f"{'held-out bits/byte':22s}"
        + "".join(f"{part:>10s}{'- random':>26s}" for part in evidence.parts)
    ]
    for name in sorted(held, key=lambda arm: held[arm]["report"]["loss"]["mean"]):
        cells = ""
        for part in evidence.parts:
            loss, gap = held[name][part]["loss"], held[name][part]["minus_random"]
            ends = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
            cells += f"{loss['mean']:10.3f}{'' if name == 'random' else ends:>26s}"
        lines.append(f"{name:22s}{cells}")
    seeds = len(evidence.verified.seeds)
    return "\n".join([*lines, f"{seeds} trainings an arm, paired by seed, 95 % t intervals"])


def _page(
    study: Study,
    datamodel: LinearDatamodel,
    decision: Decision,
    evidence: Evidence,
    held: dict[str, Any],
) -> report.Page:
    rows = [
        [
            name,
            *[
                x
                for part in evidence.parts
                for x in (
                    _interval(held[name][part]["loss"]),
                    _interval(held[name][part]["minus_random"]),
                )
            ],
        ]
        for name in sorted(held, key=lambda arm: held[arm]["report"]["loss"]["mean"])
    ]
    header = [
        "trained on",
        *[x for part in evidence.parts for x in (f"{part}, bits/byte", "less random")],
    ]
    loss = [held[name]["report"]["loss"] for name in evidence.arms]
    columns = [[one[k] for one in loss] for k in ("mean", "low", "high")]
    density = datamodel.scores[:, 0] / study.tokens
    order = np.argsort(density, kind="stable")
    gap = evidence.verified.difference("random")
    subtitle = (
        f"{len(decision.ids):,} of {len(study.pool):,} documents, {decision.cost:,.0f} tokens. Retrained "
        f"{len(evidence.verified.seeds)} times, they change held-out target loss by {gap} bits per byte "
        "against random documents of the same cost (95 % interval, paired by seed)."
    )
    names = ["chosen", *["" for _ in evidence.kinds[1:]]]
    filters_ = [name for name in evidence.weights if name != "chosen"]
    names[1 : 1 + len(filters_)] = filters_
    return report.Page(
        "Which documents to train on",
        subtitle,
        {
            "Proof by retraining": [
                report.table(rows, header, best={header[1]: "low"}),
                report.picture(
                    pictures.arms(
                        list(evidence.arms),
                        *columns,
                        xlabel="held-out target loss after retraining, bits per byte (lower is better)",
                    )
                ),
            ],
            "Predicted against actual": [
                report.picture(
                    pictures.calibration(
                        evidence.predicted,
                        evidence.actual,
                        evidence.kinds,
                        names,
                        unit="target loss, bits per byte",
                    )
                ),
                report.paragraph(
                    "Predicted on the part of the target that was used to score; actual on the part kept "
                    "for the report. A first-order prediction is least true at an optimum: its order "
                    "counts for more than its size."
                ),
            ],
            "Composition": [report.picture(pictures.composition(_composition(study, evidence)))],
            "Scores": [
                report.picture(
                    pictures.histogram(density, decision.weights > 0, xlabel="score per token")
                )
            ],
            "Documents predicted to help most": [
                report.documents(_cards(study, datamodel, order[:8]))
            ],
            "Documents predicted to hurt most": [
                report.documents(_cards(study, datamodel, order[::-1][:8]))
            ],
            "How this was made": [report.facts(_facts(study, datamodel))],
        },
    )


def _interval(values: dict[str, float]) -> Any:
    return report.Interval(**values)


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


def _cards(study: Study, datamodel: LinearDatamodel, rows: NDArray[Any]) -> list[report.Document]:
    return [
        report.Document(
            (doc := study.pool[i]).id, doc.source, doc.domain,
            float(datamodel.scores[i, 0]), int(study.tokens[i]), doc.text,
        )
        for i in rows
    ]  # fmt: skip


def _facts(study: Study, datamodel: LinearDatamodel) -> dict[str, Any]:
    meta, gate = datamodel.meta, study.notes["gate"]
    return {
        "model": study.flags.model,
        "method": f"{meta['method']}, {meta['curvature']}, mean damping {meta['damping']:.2g}",
        "parameters covered": f"{meta['covered']:.0%}",
        "anchor": f"exposure {meta['exposure']:.3f}, {study.flags.proxies} proxies",
        "gate": f"proxy {gate['proxy']:.3f} bits/byte, {gate['order']}-grams {gate['ngram']:.3f}",
        "budget": f"{study.budget:,.0f} tokens, {study.exposure:.1%} of the pool",
        "also held-out text": f"{len(study.notes['also_held_out'])} pool documents",
        "truth": "fresh initial weights and order per seed; documents not chosen are removed",
    }
