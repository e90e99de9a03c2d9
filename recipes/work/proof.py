"""The proof: retrain on the chosen documents and on controls, and write down what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applied.recipe import Decision, Verified, random_controls, verify
from attribution_core import LinearDatamodel, Outputs, RetrainingTable, Run
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.processes import world
from attribution_core.retraining import retrain_pairs
from recipes.command import bar
from recipes.data import filters
from recipes.work.selection import SCORE_BATCH, choose, warn_of_missed
from recipes.work.study import Study, say


@dataclass(frozen=True)
class Length:
    """How long an arm is trained: steps go by blocks, of which a short document has one of its own."""

    tokens: float
    blocks: float
    steps: float


@dataclass(frozen=True)
class Evidence:
    """Retrained models: arms under several seeds, and many subsets under one."""

    verified: Verified
    parts: tuple[str, ...]
    arms: dict[str, NDArray[np.float64]]  # name -> [seeds, parts], bits per byte
    weights: dict[str, NDArray[np.float64]]  # name -> [documents]
    lengths: dict[str, Length]  # by arm; of the random ones the mean
    kinds: list[str]  # of each subset in the picture
    predicted: NDArray[np.float64]  # [subsets]
    actual: NDArray[np.float64]  # [subsets]


def prove(
    study: Study, proxies: Sequence[Run], datamodel: LinearDatamodel, decision: Decision
) -> Evidence:
    """Retrain on the chosen documents, on random ones and on what each filter chooses."""
    seeds = list(range(study.flags.seeds))
    say("asking the filters ...")
    datamodel, decision = _on_the_report(study, proxies, datamodel, decision)
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
        folder=study.flags.out / "retraining" / fingerprint(outputs)[:8],  # by the text that judges
        jobs=study.flags.jobs if study.problem.device.type == "cpu" and world()[1] == 1 else 1,
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
        {
            name: length(study, np.atleast_2d(of))
            for name, of in {"chosen": decision.weights, **arms, "random": random}.items()
        },
        kinds,
        datamodel.predict(np.stack(subsets))[:, 0],
        np.array(actual),
    )


def length(study: Study, weights: NDArray[Any]) -> Length:
    """The mean length of trainings on these documents, weights [k, documents]."""
    rows = [np.flatnonzero(row[study.blocks.document]) for row in weights]
    return Length(
        float((weights @ study.tokens).mean()),
        float(np.mean([len(some) for some in rows])),
        float(np.mean([len(study.recipe.draw(some)) for some in rows])),
    )


def _on_the_report(
    study: Study, proxies: Sequence[Run], datamodel: LinearDatamodel, decision: Decision
) -> tuple[LinearDatamodel, Decision]:
    """The same scores on top of the proxies' loss on the report part, which the truth is read on."""
    outputs = study.outputs("report")
    base = np.mean([run.outputs(outputs).numpy() * study.bits(outputs) for run in proxies], axis=0)
    shift = base - datamodel.base
    moved = replace(
        decision, predicted=decision.predicted + shift, baseline=decision.baseline + shift
    )
    return replace(datamodel, base=base), moved


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
    arms = {name: _best(study, values) for name, values in keep.items()}
    for name, weights in arms.items():
        warn_of_missed(study, name, weights)
    return arms


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
    rows = list(random_controls(decision, range(10_000, 10_000 + random))) if random else []
    for k in range(count - random):
        rng = np.random.default_rng([k, 0xA1])
        noise = spread * 2.0 ** (k % 4 - 1) * rng.standard_normal(len(study.pool)) * study.tokens
        noised = replace(datamodel, scores=datamodel.scores + noise[:, None])
        rows.append(choose(study, noised).weights)
    kinds = ["random"] * random + ["tilted"] * (count - random)
    return kinds, np.array(rows).reshape(count, len(study.pool))
