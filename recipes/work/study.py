"""What is fixed before the first training: texts, tokens, budget, the training problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from applied.recipe import SLACK
from applied.selection import relaxed
from attribution_core import AdamW, Outputs, Problem, Recipe, causal_lm_loss
from attribution_core.processes import first_goes_first, world
from recipes import embedded
from recipes.command import bar, device_of
from recipes.data.corpus import Blocks, SomeBlocks, in_both, once, read_documents, without_text
from recipes.data.language_model import (
    LanguageModel,
    bits_per_byte,
    fingerprint_of,
    language_model,
    refuse_lossy,
)
from recipes.embedded import Document
from recipes.select_data import Flags

PARTS = ("score", "settle", "report")  # of the target text


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before the first training."""

    flags: Flags
    pool: list[Document]
    held_out: list[Document]  # target and test
    part: NDArray[np.str_]  # of each held-out document: score, settle, report or test
    model: LanguageModel
    blocks: Blocks  # of the pool
    held_out_blocks: Blocks
    tokens: NDArray[np.int64]  # of each pool document
    budget: float  # in tokens
    quotas: dict[str, tuple[float, float]]
    problem: Problem
    recipe: Recipe
    notes: dict[str, Any]

    @property
    def exposure(self) -> float:
        """The share of the pool's tokens that will be trained on."""
        return self.budget / float(self.tokens.sum())

    @property
    def domains(self) -> NDArray[np.str_]:
        return np.array([doc.domain for doc in self.pool])

    def outputs(self, *parts: str) -> Outputs:
        """Mean loss of the held-out documents of each part, nats per block position."""
        rows = np.flatnonzero(np.isin(self.part[self.held_out_blocks.document], parts))
        labels = self.part[self.held_out_blocks.document][rows]
        return Outputs(self.problem.loss, SomeBlocks(self.held_out_blocks, rows)).mean(by=labels)

    def bits(self, outputs: Outputs) -> NDArray[np.float64]:
        """Factors [t] that turn these outputs into bits per byte of text."""
        factors = []
        for part in outputs.names:
            documents = [d for d, p in zip(self.held_out, self.part, strict=True) if p == part]
            count = int((self.part[self.held_out_blocks.document] == part).sum())
            factors.append(bits_per_byte(count * self.blocks.length, documents))
        return np.array(factors)


def say(text: str) -> None:
    """A line on standard output, from the first process only."""
    if world()[0] == 0:
        print(text, flush=True)


def prepare(flags: Flags) -> Study:
    """Read and check all text, tokenise it, and set up the training problem."""
    if flags.model == "tiny":  # its tensors are so small that threads wait more than they work
        torch.set_num_threads(1)
    notes: dict[str, Any] = {}
    device = device_of(flags.device)
    pool, target, test = _read(flags)
    pool = _checked_pool(flags, pool, [*target, *test], notes)
    different = once(target)
    if len(different) < len(target):
        notes["target_repeats"] = len(target) - len(different)
        say(f"left out {notes['target_repeats']} target documents whose text comes twice")
    if also := in_both(test, different):
        notes["test_in_target"] = also
        say(f"warning: {len(also)} test documents are also target text: {also[:10]}")
    parts = _three_parts(different)
    held_out = [*parts[0], *parts[1], *parts[2], *test]
    labels = np.repeat([*PARTS, "test"], [*map(len, parts), len(test)])

    out = flags.out
    with first_goes_first():
        model = language_model(flags.model, pool, out)
        for documents in (pool, held_out):
            refuse_lossy(model, documents, flags.model)
        preset = model.preset
        cut = partial(
            Blocks.cut, encode=model.encode, start=model.start, length=preset.length,
            made_by=fingerprint_of(model.tokenizer), progress=bar("tokenising"),
        )  # fmt: skip
        blocks = cut(pool, folder=out / "tokens" / "pool")
        held_out_blocks = cut(held_out, folder=out / "tokens" / "held_out")
    tokens = blocks.token_counts()
    total = float(tokens.sum())
    budget = flags.budget * total if flags.budget <= 1 else flags.budget
    if not 0 < budget <= total:
        raise ValueError(
            f"expected a budget above 0 and up to the pool's {total:,.0f} tokens, got {budget:,.0f}; "
            "numbers up to 1 are shares of the pool"
        )
    quotas = parse_quotas(flags.quota)
    domains = [doc.domain for doc in pool]
    # a budget and quotas that clash say so now, not after hours of scoring
    relaxed(np.zeros(len(pool)), tokens, budget, domains=domains, quotas=quotas or None, fill=False)
    refuse_unspent(budget, tokens, domains, quotas)
    refuse_small(budget, tokens, domains, quotas)
    problem = Problem(
        model.make(0).to(device), partial(causal_lm_loss, tokens=preset.length), blocks
    )
    recipe = Recipe(
        AdamW(flags.lr or preset.lr, betas=(0.9, 0.99), eps_root=0.0),
        flags.batch_size or preset.batch_size,
        flags.epochs,
        schedule="linear",
        clip=1.0,
        init=model.make if model.from_scratch else None,
    )
    say(
        f"pool: {len(pool):,} documents, {total:,.0f} tokens; budget {budget:,.0f} tokens "
        f"({budget / total:.0%})\ntarget: "
        + ", ".join(f"{(labels == part).sum()} documents to {part}" for part in PARTS)
        + (f"; test: {len(test)} documents" if test else "")
    )
    return Study(
        flags, pool, held_out, labels, model, blocks, held_out_blocks, tokens, budget,
        quotas, problem, recipe, notes,
    )  # fmt: skip


def _read(flags: Flags) -> tuple[list[Document], list[Document], list[Document]]:
    if flags.pool == "embedded":
        pool = embedded.text_pool(flags.documents)
    else:
        pool = read_documents(flags.pool, text=flags.text, domain=flags.domain, id=flags.id)
    if flags.target == "embedded":
        target = embedded.text_target()
    else:  # a target needs no domain or id of its own
        target = read_documents(flags.target, text=flags.text)
    if flags.test is not None and flags.test != "embedded":
        return pool, target, read_documents(flags.test, text=flags.text)
    return pool, target, embedded.text_test(200) if "embedded" in (flags.target, flags.test) else []


def _checked_pool(
    flags: Flags, pool: list[Document], held_out: list[Document], notes: dict[str, Any]
) -> list[Document]:
    """The pool without empty documents and held-out text, as the flags say; both are reported."""
    for name, documents in (("pool", pool), ("target and test", held_out)):
        empty = without_text(documents)
        if empty and not (flags.skip_empty and name == "pool"):
            raise ValueError(
                f"expected text in every document, got none in {len(empty)} of the {name}: "
                f"{empty[:10]}; remove them, or pass --skip-empty for the pool"
            )
        if empty:
            say(f"left out {len(empty)} documents without text: {empty[:10]}")
            notes["without_text"] = empty
    leaked = in_both(pool, held_out)
    notes["also_held_out"] = leaked
    if leaked:
        done = "kept" if flags.keep_overlap else "left out"
        say(
            f"warning: {len(leaked)} pool documents are also target or test text, {done}: {leaked[:10]}"
        )
    drop = set(notes.get("without_text", [])) | (set() if flags.keep_overlap else set(leaked))
    kept = [doc for doc in pool if doc.id not in drop]
    if not kept:
        raise ValueError(
            "expected a pool to choose from, got no document that is not target text too"
        )
    firsts = {doc.id for doc in once(kept)}
    copies = [doc.id for doc in kept if doc.id not in firsts]
    notes["copies"] = copies
    if copies:
        say(f"{len(copies)} pool documents repeat others' text, kept: {copies[:10]}")
    return kept


def _three_parts(target: Sequence[Document]) -> list[list[Document]]:
    """Half to score with, a quarter to settle what is open, a quarter to report; split by file."""
    if len(target) < 3:
        raise ValueError(
            f"expected at least 3 target documents, to score, settle and report, got {len(target)}"
        )
    if len({doc.file for doc in target}) < 12:  # too few files to split by: split by document
        renamed = [replace(doc, source=f"{k}:0") for k, doc in enumerate(target)]
        parts = embedded.split_by_source(renamed, (0.5, 0.25, 0.25))
        return [[target[int(doc.file)] for doc in part] for part in parts]
    return embedded.split_by_source(target, (0.5, 0.25, 0.25))


def refuse_unspent(
    budget: float,
    tokens: NDArray[np.int64],
    domains: Sequence[str],
    quotas: Mapping[str, tuple[float, float]],
) -> None:
    """Raise where the high quotas, and what domains hold, leave a part of the budget.

    Raises:
        ValueError: they do; says what each domain may have.
    """
    names, index = np.unique(np.asarray(domains), return_inverse=True)
    held = np.bincount(index, tokens)
    room = {
        str(name): min(float(holds), quotas.get(str(name), (0.0, 1.0))[1] * budget)
        for name, holds in zip(names, held, strict=True)
    }
    if sum(room.values()) < budget * (1 - SLACK):
        most = sorted(room.items(), key=lambda item: -item[1])[:10]
        told = ", ".join(f"{name!r} {held_most:,.0f}" for name, held_most in most)
        raise ValueError(
            f"expected --quota that leaves room for the budget of {budget:,.0f} tokens, got room for "
            f"{sum(room.values()):,.0f}: {told}; raise the high quotas, or where domains hold no more, lower --budget"
        )


def refuse_small(
    budget: float,
    tokens: NDArray[np.int64],
    domains: Sequence[str],
    quotas: Mapping[str, tuple[float, float]],
) -> None:
    """Raise where no whole document fits into the budget and its domain's high quota.

    Raises:
        ValueError: none does; says how short the one is that comes nearest, and what room it has.
    """
    high = np.array([quotas.get(domain, (0.0, 1.0))[1] for domain in domains])
    if (tokens > high * budget + SLACK * budget).all():
        needs = np.divide(tokens, high, out=np.full(len(tokens), np.inf), where=high > 0)
        k = int(np.argmin(needs))  # of the budget, as the quotas are
        room = f"{budget:,.0f} tokens"
        if high[k] < 1:
            room = f"{high[k] * budget:,.0f} tokens of {domains[k]!r} (its high quota of {budget:,.0f})"
        raise ValueError(
            f"expected a budget and quotas for at least one document, got {room} where the shortest "
            f"document has {tokens[k]:,}; raise --budget or the high quotas"
        )


def parse_quotas(quotas: Sequence[str]) -> dict[str, tuple[float, float]]:
    """'domain:low:high' -> {domain: (low, high)}.

    Raises:
        ValueError: another form; a domain that comes twice.
    """
    found: dict[str, tuple[float, float]] = {}
    for quota in quotas:
        try:
            name, low, high = quota.rsplit(":", 2)
            limits = (float(low), float(high))
        except ValueError:
            raise ValueError(
                f"expected --quota domain:low:high, got {quota!r}; e.g. web:0:0.6"
            ) from None
        if name in found:
            raise ValueError(
                f"expected one --quota a domain, got {name!r} twice; write both limits in one, {name}:low:high"
            )
        found[name] = limits
    return found
