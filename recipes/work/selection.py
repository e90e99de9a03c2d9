"""From proxies to a chosen subset: train, gate, score, choose, write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from applied.recipe import SLACK, Decision
from applied.selection import select
from attribution_core import LinearDatamodel, Run, influence, train
from attribution_core.disk.files import write_parquet
from attribution_core.processes import world
from recipes.command import bar, forget_report
from recipes.data import filters
from recipes.data.language_model import no_forward_mode
from recipes.work.study import Study, say

SHARD = 50_000  # documents in a parquet file of the subset
SCORE_BATCH = 16  # blocks a pass; larger batches leave the processor's caches


def train_proxies(study: Study) -> list[Run]:
    """Models anchored where the answer will be used: random text, as many steps as the budget gives."""
    runs = []
    for k in range(study.flags.proxies):
        recipe = replace(study.recipe, seed=1000 + k)  # no seed that verifies
        folder = study.flags.out / "proxies" / str(k)
        progress = bar(f"proxy {k + 1} of {study.flags.proxies}")
        runs.append(
            train(study.problem, recipe, exposure=study.exposure, folder=folder, progress=progress)
        )
    return runs


def gate(study: Study, proxies: Sequence[Run]) -> None:
    """Refuse to score with a proxy that byte n-grams beat: its gradients would count letters.

    Raises:
        ValueError: the proxy's bits per byte on the target's settle part are not below those of an
            n-gram model fitted on the very text that the proxy was trained on.
    """
    settle = study.outputs("settle")
    proxy = float(np.mean([run.outputs(settle).numpy() * study.bits(settle) for run in proxies]))
    drawn = np.unique(np.concatenate(proxies[0].order))
    order = study.flags.gate_order
    seen = study.model.decode(study.blocks.tokens[drawn])
    counts = filters.NgramModel.fit([text for text in seen if text.strip()], order=order)
    texts = [d.text for d, p in zip(study.held_out, study.part, strict=True) if p == "settle"]
    ngram = counts.bits_per_byte(texts)
    study.notes["gate"] = {"proxy": proxy, "ngram": ngram, "order": order}
    line = f"proxy {proxy:.3f} bits/byte on held-out target text, {order}-grams {ngram:.3f}"
    say(f"gate: {line}")
    if proxy < ngram or study.flags.gate == "off":
        return
    reason = (
        f"the proxy predicts the target no better than letter counts ({line}), so its scores would "
        "say little; train longer (--epochs), on more text (--budget), or a larger --model, each in another --out, since "
        "this one holds proxies of these settings"
    )
    if study.flags.gate == "refuse":
        raise ValueError(f"{reason}; --gate warn scores all the same")
    say(f"warning: {reason}")


def refinement(study: Study) -> int | None:
    """How EK-FAC is refined: not at all where the model has no products with its exact curvature, tried on a block.

    Raises:
        ValueError: the curvature asked for is made of such products.
    """
    flags = study.flags
    if study.model.from_scratch or flags.curvature not in ("gauss_newton", "ekfac"):
        return None
    why = no_forward_mode(study.problem)
    if not why:
        return None
    if flags.curvature == "gauss_newton":
        raise ValueError(
            f"expected a model with forward-mode derivatives for --curvature gauss_newton, got {flags.model!r}: {why}; "
            "take --curvature ekfac"
        )
    say(
        f"warning: EK-FAC is not refined, as {flags.model!r} has no forward-mode derivatives: {why}"
    )
    return 0


def score(study: Study, proxies: Sequence[Run], refine: int | None = None) -> LinearDatamodel:
    """Target loss, bits per byte, as a function of document weights; averaged over proxies."""
    outputs = study.outputs("score")
    flags = study.flags
    settings = (flags.curvature, flags.curvature_rows, flags.damping, refine)
    kept = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    per_block = influence(
        proxies,
        outputs,
        curvature=study.flags.curvature,
        curvature_rows=study.flags.curvature_rows,
        damping=study.flags.damping,
        refine=refine,
        tolerance=0.05,  # of a solve whose curvature is itself an estimate from a sample
        batch_size=SCORE_BATCH,
        folder=flags.out / "scores" / kept,
        progress=bar("solving, scoring"),
    )
    bits = per_block.combine(np.diag(study.bits(outputs)), targets=["target"])
    documents = bits.grouped(study.blocks.document)
    meta = {**documents.meta, "unit": "bits per byte"}
    found = replace(documents, ids=np.array([doc.id for doc in study.pool]), meta=meta)
    if world()[0] == 0:
        found.save(study.flags.out / "datamodel")
    say(
        f"scored {len(study.blocks):,} blocks by {meta['method']} ({meta['curvature']}), "
        f"{meta['covered']:.0%} of the parameters covered, mean damping {meta['damping']:.2g}"
    )
    return found


def choose(study: Study, datamodel: LinearDatamodel) -> Decision:
    """The documents that minimise the predicted target loss within budget and quotas."""
    return select(
        datamodel,
        budget=study.budget,
        costs=study.tokens,
        domains=study.domains,
        quotas=study.quotas or None,
    )


def missed(study: Study, weights: NDArray[np.float64]) -> str:
    """Low quotas that these documents, weights [n], do not fill, in words; empty where they fill all.

    The optimum in parts of documents fills them; where a domain's documents are long, whole ones may not.
    """
    words = []
    for domain, (low, _) in study.quotas.items():
        least = low * study.budget
        got = float(weights @ (study.tokens * (study.domains == domain)))
        if got < least - SLACK * study.budget:
            words.append(f"{domain} has {got:,.0f} of at least {least:,.0f} tokens")
    return ", ".join(words)


def warn_of_missed(study: Study, name: str, weights: NDArray[np.float64]) -> None:
    """Say which quotas an arm misses."""
    if words := missed(study, weights):
        say(
            f"warning: low quotas missed by {name}: {words}; whole documents do not fill them: raise --budget, lower "
            "the quotas, or cut long documents"
        )


def write_subset(study: Study, datamodel: LinearDatamodel, decision: Decision) -> None:
    """selected.parquet (what and why) and subset/*.parquet (the text, to stream)."""
    if world()[0] != 0:
        return
    import pyarrow

    density = datamodel.scores[:, 0] / study.tokens
    rank = np.empty(len(density), dtype=int)
    rank[np.argsort(density, kind="stable")] = np.arange(1, len(density) + 1)
    chosen = np.flatnonzero(decision.weights > 0)
    best_first = chosen[np.argsort(rank[chosen])]
    documents = [study.pool[i] for i in best_first]
    columns = {
        "id": [d.id for d in documents],
        "source": [d.source for d in documents],
        "domain": [d.domain for d in documents],
        "tokens": study.tokens[best_first],
        "score": datamodel.scores[best_first, 0],
        "rank": rank[best_first],
    }
    forget_report(study.flags.out)
    write_parquet(study.flags.out / "selected.parquet", pyarrow.table(columns))
    folder = study.flags.out / "subset"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    for k, start in enumerate(range(0, len(chosen), SHARD)):
        some = [study.pool[i] for i in chosen[start : start + SHARD]]
        table = pyarrow.table(
            {name: [getattr(d, name) for d in some] for name in ("id", "text", "domain", "source")}
        )
        write_parquet(folder / f"part-{k:05d}.parquet", table)
    say(
        f"chose {len(chosen):,} of {len(study.pool):,} documents, {decision.cost:,.0f} tokens; "
        f"predicted target loss {decision.predicted[0]:.3f} bits/byte, random "
        f"{decision.baseline[0]:.3f}"
    )
    warn_of_missed(study, "chosen", decision.weights)
