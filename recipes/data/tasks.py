"""Small models with data and held-out targets, on any machine: an MLP on digits or a table, a tiny GPT-2 on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recipes.embedded import Document

if TYPE_CHECKING:
    from attribution_core import Outputs, Problem

WIDTH, LAYERS, VOCABULARY, LENGTH = 64, 2, 512, 32  # of the tiny GPT-2
ROWS = 1000  # blocks of text to train on


@dataclass(frozen=True)
class Task:
    """What is trained, and the outputs that are to be predicted.

    Args:
        make: seed -> initial model.
        unit: of the outputs.
        better: 1 where a larger output is a better one, -1 for losses.
        show, show_target: a row of the training data, of the targets -> text.
        ids: [n] what training rows are called where they come from; as they stand, unless given.
        facts: of the data, for the report.
    """

    name: str
    problem: Problem
    outputs: Outputs
    make: Callable[[int], Any]
    unit: str
    better: int
    show: Callable[[int], str]
    show_target: Callable[[int], str]
    ids: NDArray[Any] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> NDArray[Any]:
        """[n] what training rows are called in whatever is written."""
        return np.arange(self.problem.n) if self.ids is None else self.ids

    @property
    def reading(self) -> str:
        """What an output is and which way is good, in a sentence."""
        good, bad = ("raises", "lowers") if self.better > 0 else ("lowers", "raises")
        return (
            f"Outputs: {self.unit}; {'higher' if self.better > 0 else 'lower'} is better, so a row whose weight {good} "
            f"them helps, and one whose weight {bad} them hurts."
        )


def mlp(seed: int, width: int = 64) -> Any:
    """64 pixels, one hidden layer of GELUs, 10 classes; weights from the seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn = torch.nn
        return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))


DIGITS_HELD_OUT = 200  # images


def digits_task(rows: int = 1500, targets: int = 20) -> Task:
    """The margins of held-out digits under an MLP.

    Raises:
        ValueError: more targets than images are held out.
    """
    import torch

    from attribution_core import Outputs, Problem, cross_entropy, margin
    from recipes.embedded import digits

    if targets > DIGITS_HELD_OUT:
        raise ValueError(f"expected at most {DIGITS_HELD_OUT} target images, got {targets}")
    data = digits(rows, DIGITS_HELD_OUT)
    x, test_x = (torch.tensor(a, dtype=torch.float32) for a in (data.x, data.test_x))
    problem = Problem(mlp(0), cross_entropy, (x, torch.tensor(data.y)))
    outputs = Outputs(margin, (test_x[:targets], torch.tensor(data.test_y[:targets])))
    return Task(
        "digits MLP", problem, outputs, mlp, "margin, nats", 1, lambda i: f"image of a {data.y[i]}",
        lambda j: f"image of a {data.test_y[j]}",
    )  # fmt: skip


def table_task(
    path: str,
    label: str,
    test: str | None = None,
    ignore: Sequence[str] = (),
    rows: int | None = None,
    targets: int = 20,
    width: int = 64,
) -> Task:
    """The margins of held-out rows of a table under an MLP of one hidden layer (none: width 0).

    Args:
        path: a .parquet or .csv file, or an embedded table by its name.

    Raises:
        ValueError: fewer rows or held-out rows than asked for; see also `classification.from_file`.
    """
    import torch

    from attribution_core import Outputs, margin
    from recipes.data.classification import facts_of, load, problem_of, warn_of_repeated

    data = load(path, label, ignore, test, seed=0)
    warn_of_repeated(data)
    if len(data.target_x) < targets or len(data.x) < (rows or 0):
        raise ValueError(
            f"expected --targets of at most {len(data.target_x)} held-out rows and --rows of at most {len(data.x)}, got "
            f"{targets} and {rows}"
        )
    data = replace(data, x=data.x[:rows], y=data.y[:rows])
    problem, make = problem_of(data, width, 0.0)
    held = (torch.tensor(data.target_x[:targets]), torch.tensor(data.target_y[:targets]))
    kind = "MLP" if width else "logistic regression"
    return Task(
        f"{kind} on {data.name}", problem, Outputs(margin, held), make, "margin, nats", 1,
        lambda i: data.classes[data.y[i]],
        lambda j: f"row {data.held_places[j]} held out, {data.classes[data.target_y[j]]}",
        data.places[:rows], facts_of(data),
    )  # fmt: skip


def gpt2(seed: int, vocabulary: int = VOCABULARY, length: int = LENGTH) -> Any:
    """A GPT-2 of 130,000 parameters without dropout, eager attention; weights from the seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def from_folder(path: str, seed: int) -> Any:
    """A transformers model from a folder: its weights, or fresh ones where it holds only a config.

    Raises:
        ValueError: a part of the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from recipes.data.language_model import eager_experts, stored

    config = AutoConfig.from_pretrained(path)
    has_weights = any(Path(path).glob("*.safetensors")) or any(Path(path).glob("*.bin"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if has_weights:
            model = stored(path, attn_implementation="eager")
        else:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
    return eager_experts(model).eval()


def text_task(
    folder: Path,
    rows: int | None = None,
    targets: int = 20,
    *,
    data: str = "embedded",
    target: str = "embedded",
    text: str = "text",
    model: str = "gpt2",
) -> Task:
    """The losses of held-out blocks of text under a small language model.

    Args:
        folder: where the tokeniser and the blocks are kept.
        rows: how many blocks to train on, 1,000 (or as many as there are) unless given; data, target: 'embedded' or what `read_documents` takes.
        model: 'gpt2', the tiny one with a BPE of 512 tokens, or a transformers folder with a tokeniser.

    Raises:
        ValueError: too little text; a folder that transformers cannot load.
    """
    from attribution_core import Outputs, Problem, causal_lm_loss
    from attribution_core.data import Rows
    from recipes import embedded
    from recipes.data.corpus import in_both, read_documents

    documents = (
        embedded.text_pool(max(60, (ROWS if rows is None else rows) // 2))
        if data == "embedded"
        else read_documents(data, text=text)
    )
    held_out = (
        embedded.text_target(max(20, targets))
        if target == "embedded"
        else read_documents(target, text=text)
    )
    also = in_both(documents, held_out)
    if also:
        print(
            f"warning: {len(also)} training documents are also target text: {also[:10]}; their loss is no held-out loss: "
            "take them out of one of the two",
            flush=True,
        )
    make, blocks, others, decode = _blocks(folder, documents, held_out, model)
    rows = min(ROWS, len(blocks)) if rows is None else rows
    if len(blocks) < rows or len(others) < targets:
        raise ValueError(
            f"expected text for {rows} training blocks and {targets} target blocks, got {len(blocks)} and "
            f"{len(others)}; ask for fewer by --rows and --targets"
        )
    train = Rows(blocks, _spread(len(blocks), rows))
    first_blocks = np.unique(others.document, return_index=True)[1]  # full ones, a document each
    chosen = first_blocks[:targets] if len(first_blocks) >= targets else np.arange(targets)
    loss = causal_lm_loss
    problem = Problem(make(0), loss, train)
    return Task(
        "GPT-2" if model == "gpt2" else model, problem, Outputs(loss, Rows(others, chosen)), make,
        "held-out loss, nats a token", -1, lambda i: decode(blocks, int(train.rows[i])),
        lambda j: decode(others, int(chosen[j])), _block_names(blocks, documents)[train.rows],
        _facts(data, target, documents, held_out, blocks, also),
    )  # fmt: skip


def _facts(
    data: str,
    target: str,
    documents: Sequence[Document],
    held_out: Sequence[Document],
    blocks: Any,
    also: list[str],
) -> dict[str, str]:
    """What a report says of text: what was read, and target text that was trained on."""
    facts = {
        "data": f"{data}, {len(documents):,} documents, {len(blocks):,} blocks",
        "target": f"{target}, {len(held_out):,} documents",
    }
    if also:
        told = f"{len(also):,} of {len(documents):,}"
        facts["training documents that are also target text"] = told
    return facts


def _block_names(blocks: Any, documents: Sequence[Document]) -> NDArray[np.str_]:
    """[blocks] a document's id and the block's number in it, which lead back to the text."""
    of = np.asarray(blocks.document)
    number = np.arange(len(of)) - np.searchsorted(of, of)  # blocks stand in the order of documents
    return np.array([f"{documents[d].id}, block {k}" for d, k in zip(of, number, strict=True)])


def _blocks(
    folder: Path, documents: Sequence[Document], held_out: Sequence[Document], model: str
) -> tuple[Any, Any, Any, Any]:
    """(seed -> model, blocks of the documents, blocks of the held-out ones, how to read a block)."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from recipes.data.corpus import Blocks
    from recipes.data.language_model import (
        fingerprint_of,
        kept_bpe,
        positions_of,
        refuse_missing,
        refuse_unfit,
    )

    if model == "gpt2":
        path = kept_bpe(folder, [d.text for d in documents], VOCABULARY)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>")
        make, length = gpt2, LENGTH
    else:
        refuse_missing(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            make = partial(from_folder, model)
            one = make(0)
            length = int(min(LENGTH, positions_of(one) - 1))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"expected 'gpt2' or a transformers folder, got {model!r}: {error}"
            ) from None
        refuse_unfit(one, tokenizer, model)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            f"expected a tokeniser with a start or end token, got neither in {model!r}"
        )

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(blocks: Any, row: int) -> str:
        return tokenizer.decode([t for t in blocks.tokens[row, 1:].tolist() if t >= 0])

    def cut(which: Sequence[Document], name: str) -> Any:
        return Blocks.cut(which, encode, start, length, folder / name, fingerprint_of(tokenizer))

    return make, cut(documents, "train"), cut(held_out, "held_out"), decode


def _spread(n: int, rows: int) -> Any:
    """So many of n rows, evenly spread."""
    return np.linspace(0, n - 1, rows).round().astype(int)
