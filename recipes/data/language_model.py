"""The language model of a selection: a size preset trained from scratch, or a transformers model.

A preset brings its own byte-level BPE, trained on the pool; a folder or hub name its tokeniser and
weights, and every training starts from those.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from recipes.embedded import Document


@dataclass(frozen=True)
class Preset:
    """A small Llama and how to train it."""

    width: int
    layers: int
    vocabulary: int
    length: int  # tokens of a block
    batch_size: int
    lr: float


PRESETS = {
    "tiny": Preset(width=64, layers=1, vocabulary=2048, length=64, batch_size=4, lr=7e-3),
    "small": Preset(width=256, layers=4, vocabulary=8192, length=128, batch_size=16, lr=2e-3),
    "medium": Preset(width=512, layers=8, vocabulary=16384, length=256, batch_size=32, lr=1e-3),
}
PRETRAINED = Preset(width=0, layers=0, vocabulary=0, length=256, batch_size=8, lr=5e-5)
SOME = 500  # documents that a tokeniser has to give back
LOST = 1e-3  # of their characters at most: rare signs, which hardly move a printed digit


@dataclass(frozen=True)
class LanguageModel:
    """A tokeniser and a way to make the initial model."""

    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    make: Any  # seed -> model
    preset: Preset
    from_scratch: bool

    @property
    def start(self) -> int:
        """The token that opens every block."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("expected a tokeniser with a bos or eos token, got neither; set one")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, rows: Any) -> list[str]:
        """Texts of blocks of tokens, start and padding left out."""
        return self.texts([[t for t in row[1:] if t >= 0] for row in rows.tolist()])

    def texts(self, ids: list[list[int]]) -> list[str]:
        """Texts of token ids, spaces before punctuation kept."""
        return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)


def language_model(model: str, pool: Sequence[Document], folder: Path) -> LanguageModel:
    """A preset by name, or a transformers folder or hub name.

    Raises:
        ValueError: neither a preset nor anything that transformers can load.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if model in PRESETS:
        preset = PRESETS[model]
        path = kept_bpe(folder, [doc.text for doc in pool], preset.vocabulary)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>")
        return LanguageModel(tokenizer, partial(llama, preset), preset, True)
    refuse_missing(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        make = partial(pretrained, model)
        one = make(0)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a preset ({', '.join(PRESETS)}) or a transformers model, got {model!r}: {error}"
        ) from None
    refuse_unfit(one, tokenizer, model)
    # a block has a start token before its own
    length = int(min(PRETRAINED.length, positions_of(one) - 1))
    return LanguageModel(tokenizer, make, replace(PRETRAINED, length=length), False)


def kept_bpe(folder: Path, texts: list[str], vocabulary: int) -> Path:
    """The tokeniser of these texts in a folder; trained again where other texts or another size had left one."""
    from attribution_core.disk.files import whole, write_text
    from attribution_core.disk.fingerprint import fingerprint

    path, about = folder / "tokenizer.json", folder / "tokenizer.of"
    made_of = fingerprint(texts, vocabulary)
    if not (path.exists() and about.exists() and about.read_text(encoding="utf-8") == made_of):
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        with whole(path) as part:
            train_bpe(texts, vocabulary).save(str(part))
        write_text(about, made_of)  # last: it vouches for the other
    return path


def train_bpe(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE of the tokenizers library; the same texts give the same tokeniser."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def llama(preset: Preset, seed: int) -> Any:
    """A Llama with random weights from the seed; the global random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.width,
        intermediate_size=2 * preset.width,
        num_hidden_layers=preset.layers,
        num_attention_heads=max(1, preset.width // 32),
        max_position_embeddings=preset.length + 1,
        tie_word_embeddings=True,
        initializer_range=0.5
        * preset.width**-0.5,  # the usual .02 wastes much of so short a training
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def pretrained(name: str, seed: int) -> Any:
    """The stored weights in float32, dropout off; the seed only orders the data."""
    return eager_experts(stored(name)).eval()


def stored(name: str, **settings: Any) -> Any:
    """A causal language model with the weights that a folder or hub name holds, in float32.

    Raises:
        ValueError: it does not hold all of them: the others would be drawn anew at every call.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # other sizes are told below, with what lacks: by itself transformers raises a line about a report above it
    model, found = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **settings,
    )
    # older transformers list names, newer ones sizes, too
    others = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    if lacking := sorted([*found["missing_keys"], *others]):
        kind = type(model).__name__
        more = f" and {len(lacking) - 3} more" * (len(lacking) > 3)
        raise ValueError(
            f"expected all weights of a {kind} in {name!r}, got none of the right size for {', '.join(lacking[:3])}{more}; "
            f"save the whole model there, as a {kind}: model.save_pretrained(folder)"
        )
    return model


def eager_experts(model: Any) -> Any:
    """The model with plain code for its experts, if it has some: fused ones lack forward mode and second derivatives."""
    can = getattr(model, "_can_set_experts_implementation", None)  # transformers 5
    if can is not None and can():
        model.set_experts_implementation("eager")
    return model


def positions_of(model: Any) -> float:
    """How many tokens a model takes; without a bound where its config names none (ALiBi, state spaces)."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def no_forward_mode(problem: Any) -> str:
    """Why a model has no products with its exact curvature, tried on one row; "" where it has them."""
    import torch

    from attribution_core import Problem
    from attribution_core.curvature import products
    from attribution_core.data import Rows
    from attribution_core.layerwise.vectors import size_of

    one = Problem(problem.model, problem.loss, Rows(problem.train, np.arange(1)))
    try:
        products(one, "gauss_newton", torch.ones(1, size_of(one.params)), np.ones(1))
    except NotImplementedError as error:
        return str(error.__cause__ or error).splitlines()[0]
    return ""


def refuse_missing(model: str) -> None:
    """Raise for a path to nothing, which transformers takes for a name on the hub, and for an adapter alone.

    Raises:
        ValueError: no such folder; one that holds a LoRA adapter, of which no parameter would be trained.
    """
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"expected a folder of a whole transformers model, got a LoRA adapter in {model!r}; merge it first: "
            "model.merge_and_unload().save_pretrained(folder), with its tokeniser beside it"
        )
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if is_path and not path.is_dir():
        raise ValueError(f"expected a folder of a transformers model, got no folder {model!r}")


def refuse_unfit(model: Any, tokenizer: Any, name: str) -> None:
    """Raise for a tokeniser of nothing, a model that lacks tokens, or that sees the tokens it is to predict.

    Raises:
        ValueError: one of these.
    """
    import torch

    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"expected a tokeniser in {name!r}, got one that makes no tokens of text; save the model's there: "
            "tokenizer.save_pretrained(folder)"
        )
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(
            f"expected a model that knows its tokeniser's {len(tokenizer):,} tokens, got {known:,} embeddings in {name!r}"
        )
    length = int(min(8, positions_of(model)))
    ids = torch.arange(length)[None] % known
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % known
    with torch.no_grad():
        one, two = (model(input_ids=some).logits[0, :-1] for some in (ids, other))
    if not torch.allclose(one, two, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"expected a model that predicts from left to right, got {type(model).__name__} in {name!r}, whose logits depend "
            "on later tokens"
        )


def refuse_lossy(model: LanguageModel, documents: Sequence[Document], name: str) -> None:
    """Raise where the tokeniser does not give text back: what it drops costs no nats, but its bytes are counted.

    Outer white space and the form of accents (NFC), which some tokenisers change, lose nothing.

    Raises:
        ValueError: more than LOST of the characters of some documents do not come back; shows where.
    """
    some = documents[:: -(-len(documents) // SOME)]
    read = model.texts(model.encode([doc.text for doc in some]))
    pairs = [(_plain(doc.text), _plain(back)) for doc, back in zip(some, read, strict=True)]
    lost = [(Counter(text) - Counter(back)).total() for text, back in pairs]
    share = sum(lost) / max(1, sum(len(text) for text, _ in pairs))
    if share > LOST:
        worst = lost.index(max(lost))
        text, back = pairs[worst]
        at = next(k for k, sign in enumerate(text) if back[k : k + 1] != sign)
        raise ValueError(
            f"expected a tokeniser that gives text back, got one in {name!r} that loses {share:.1%} of the characters, "
            f"{text[at : at + 30]!r} read back as {back[at : at + 30]!r} in {some[worst].id!r}; bits per byte and the "
            "gate need every byte: take a model with a byte-level tokeniser"
        )


def _plain(text: str) -> str:
    return normalize("NFC", text).strip()


def bits_per_byte(nats: float, documents: Sequence[Document]) -> float:
    """Total nats over documents as bits per byte of their text, a figure no tokeniser that gives text back changes."""
    return nats / math.log(2) / sum(len(doc.text.encode(errors="replace")) for doc in documents)


def fingerprint_of(tokenizer: Any) -> str:
    """Names a tokeniser: its vocabulary and merges."""
    import hashlib

    if hasattr(tokenizer, "backend_tokenizer"):
        return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
