"""The recipe as a user meets it: one command, wrong input, a kill in the middle."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from applied.recipe import paired_interval
from attribution_core import SGD, LinearDatamodel, Recipe
from recipes import embedded
from recipes.data.corpus import Blocks, once, read_documents
from recipes.data.language_model import (
    LanguageModel,
    language_model,
    pretrained,
    refuse_lossy,
    train_bpe,
)
from recipes.data.tasks import from_folder, text_task
from recipes.reports.selection import against_random, beside, ends_of, quotas_missed, unequal
from recipes.select_data import run
from recipes.work.proof import Length, length
from recipes.work.selection import choose, gate, refinement, write_subset
from recipes.work.study import parse_quotas, refuse_small, refuse_unspent
from tests.test_attribute import saved

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "recipes" / "select_data.py")]
SMALL = [
    "--proxies",
    "1",
    "--seeds",
    "2",
    "--subsets",
    "8",
    "--gate",
    "off",
    "--curvature",
    "identity",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A pool in parquet with domains, a target and a test in jsonl."""
    import pyarrow

    folder = tmp_path_factory.mktemp("texts")
    pool = embedded.text_pool(160)
    columns = {
        "body": [d.text for d in pool],
        "kind": [d.domain for d in pool],
        "name": [d.id for d in pool],
    }
    parquet.write_table(pyarrow.table(columns), folder / "pool.parquet")
    for name, documents in (("target", embedded.text_target(60)), ("test", embedded.text_test(20))):
        lines = [json.dumps({"body": d.text}) for d in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def flags(texts, out, *more):
    return [
        *("--pool", str(texts / "pool.parquet"), "--target", str(texts / "target.jsonl")),
        *(
            "--test",
            str(texts / "test.jsonl"),
            "--text",
            "body",
            "--domain",
            "kind",
            "--id",
            "name",
        ),
        *("--jobs", "1", "--out", str(out), *SMALL, *more),
    ]


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(flags(texts, out, "--quota", "code:0:0.3", "prose:0.05:1"))
    return out


def test_the_subset_is_written_in_standard_formats(finished, texts):
    chosen = parquet.read_table(finished / "selected.parquet")
    assert chosen.column_names == ["id", "source", "domain", "tokens", "score", "rank"]
    subset = parquet.read_table(finished / "subset")
    assert set(subset["id"].to_pylist()) == set(chosen["id"].to_pylist())
    pool = parquet.read_table(texts / "pool.parquet").to_pydict()
    text_of = dict(zip(pool["name"], pool["body"], strict=True))
    rows = zip(subset["id"].to_pylist(), subset["text"].to_pylist(), strict=True)
    assert all(text_of[name] == text for name, text in rows)


def test_budget_and_quotas_are_kept(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    chosen = parquet.read_table(finished / "selected.parquet").to_pydict()
    tokens, domain = np.array(chosen["tokens"]), np.array(chosen["domain"])
    assert tokens.sum() <= metrics["selection"]["budget"]
    assert tokens[domain == "code"].sum() <= 0.3 * metrics["selection"]["budget"]


def test_the_report_says_what_was_read_and_how_it_was_trained(finished, texts):
    page = (finished / "report.html").read_text()
    how = page[page.index("How this was made") :]
    for words in (
        str(texts / "pool.parquet"), str(texts / "target.jsonl"), str(texts / "test.jsonl"), "<dd>2 of every arm</dd>",
        "<dd>code 0 to 0.3, prose 0.05 to 1</dd>", "<dt>copies within the pool</dt>", "1 epochs in batches of 4, lr 0.007",
    ):  # fmt: skip
        assert words in how
    assert "against random documents of as many tokens, under the same quotas (95 %" in page


def test_every_arm_is_in_the_table_with_its_interval(finished):
    arms = json.loads((finished / "metrics.json").read_text())["arms"]
    assert set(arms) == {
        "chosen", "random", "low perplexity", "n-gram importance", "n-gram classifier",
    }  # fmt: skip
    for arm in arms.values():
        for part in ("report", "test"):
            loss = arm[part]["loss"]
            assert loss["low"] <= loss["mean"] <= loss["high"]
    assert all(abs(arms["random"][p]["minus_random"]["mean"]) == 0 for p in ("report", "test"))


def test_every_arm_says_how_long_it_is_trained(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    page = (finished / "report.html").read_text()
    assert set(metrics["trained"]) == set(metrics["arms"])
    chosen = parquet.read_table(finished / "selected.parquet").to_pydict()
    blocks = sum(-(-n // 64) for n in chosen["tokens"])  # of 64 tokens, of one document each
    assert metrics["trained"]["chosen"] == {
        "tokens": sum(chosen["tokens"]), "blocks": blocks, "steps": round(blocks / 4),
    }  # fmt: skip
    assert f"{blocks:,}</td>" in page
    far = [
        name
        for name, of in metrics["trained"].items()
        if abs(of["steps"] / metrics["trained"]["random"]["steps"] - 1) > 0.1
    ]
    assert ("Arms trained for other than" in page) == bool(far)


def test_arms_of_short_documents_train_longer_and_it_is_said(tmp_path):
    """Twelve tokens each: one document of three blocks, two of two, six of one; two blocks a step."""
    pool = documents("a" * 12, *["b" * 6] * 2, *["c" * 2] * 6)
    blocks = Blocks.cut(pool, letters, 0, 4, tmp_path)
    study = SimpleNamespace(
        blocks=blocks, tokens=blocks.token_counts(), recipe=Recipe(SGD(0.1), 2, 2)
    )
    weights = np.repeat(np.eye(3), [1, 2, 6], axis=1)
    lengths = [length(study, row[None]) for row in weights]
    assert lengths == [Length(12, 3, 3), Length(12, 4, 4), Length(12, 6, 6)]
    assert length(study, weights[1:]) == Length(12, 5, 5)
    arms = dict(zip(("chosen", "random", "filter"), lengths, strict=True))
    assert "the 4 steps of random documents: chosen 3, filter 6;" in unequal(arms)
    assert unequal({"random": Length(12, 40, 40), "chosen": Length(12, 43, 43)}) == ""


def test_the_report_is_one_file_with_every_section(finished):
    page = (finished / "report.html").read_text()
    for heading in ("Proof by retraining", "Predicted against actual", "Composition", "Scores"):
        assert heading in page
    assert "<script" not in page
    assert "; the best filter, " in page
    assert "; on the test text the chosen documents change the loss by " in page
    assert page.count("data:image/png") >= 4


def test_the_same_command_again_trains_and_scores_nothing(finished, texts, capsys):
    def stamps():
        kept = [*finished.glob("retraining/*/*.npy"), *finished.glob("scores/*/run0/*.npy")]
        return {path: path.stat().st_mtime_ns for path in kept}

    before = stamps()
    run(flags(texts, finished, "--quota", "code:0:0.3", "prose:0.05:1"))
    assert stamps() == before


def test_another_setting_in_the_same_folder_is_refused(finished, texts):
    with pytest.raises(SystemExit, match=r"another training.*choose another folder"):
        run(flags(texts, finished, "--lr", "0.001"))


def test_another_damping_in_the_same_folder_keeps_the_proxies(finished, texts, tmp_path):
    """The scores of another setting were refused, and with them the proxies that they share."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("proxies/**/*")}
    run(flags(texts, out, "--quota", "code:0:0.3", "prose:0.05:1", "--damping", "0.02"))
    assert {path: path.stat().st_mtime_ns for path in out.glob("proxies/**/*")} == before
    assert len(list(out.glob("scores/*/run0/done.npy"))) == 2


def test_other_test_text_in_the_same_folder_keeps_the_scores(finished, texts, tmp_path):
    """No score depends on it, yet the folder was refused; trainings are judged on it, and are done again."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    kept = [path for part in ("proxies", "scores") for path in out.glob(f"{part}/**/*.*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    without = flags(texts, out, "--quota", "code:0:0.3", "prose:0.05:1")
    at = without.index("--test")
    run(without[:at] + without[at + 2 :])
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert len(list(out.glob("scores/*/*/done.npy"))) == 1
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, out))
    assert one["chosen"] == two["chosen"]
    assert len(list(out.glob("retraining/*"))) == 2


def refused(texts, tmp_path, *more):
    with pytest.raises(SystemExit) as caught:
        run(flags(texts, tmp_path, *more))
    return str(caught.value)


def test_wrong_paths_columns_and_formats(texts, tmp_path):
    assert "no file matches" in refused(texts, tmp_path, "--pool", str(tmp_path / "none-*.jsonl"))
    said = refused(texts, tmp_path, "--pool", str(texts))
    assert f"expected a saved dataset in the folder {str(texts)!r}, got none" in said
    said = refused(texts, tmp_path, "--text", "content")
    assert "expected a column 'content'" in said
    assert "body" in said
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"body": "half a li')
    assert "cannot be read" in refused(texts, tmp_path, "--pool", str(broken))
    other = tmp_path / "pool.csv"
    other.write_text("a,b")
    assert "expected .parquet, .jsonl, .txt" in refused(texts, tmp_path, "--pool", str(other))


def test_empty_pools_and_documents(texts, tmp_path):
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    assert "nothing.jsonl" in refused(texts, tmp_path, "--pool", str(nothing))
    blank = tmp_path / "blank.jsonl"
    rows = [
        {"body": "some words", "kind": "x", "name": "a"},
        {"body": " ", "kind": "x", "name": "b"},
    ]
    blank.write_text("\n".join(map(json.dumps, rows)))
    said = refused(texts, tmp_path, "--pool", str(blank))
    assert "['b']" in said
    assert "--skip-empty" in said


def test_budgets_and_quotas_that_cannot_be_met(texts, tmp_path):
    assert "budget above 0" in refused(texts, tmp_path, "--budget", "0")
    assert "up to the pool's" in refused(texts, tmp_path, "--budget", "1e9")
    said = refused(texts, tmp_path, "--budget", "2")
    assert "for at least one document, got 2 tokens where the shortest document has" in said
    assert not (tmp_path / "proxies").exists()  # before anything is trained
    assert "domain:low:high" in refused(texts, tmp_path, "--quota", "code")
    said = refused(texts, tmp_path, "--quota", "code:0:0.3", "code:0.1:1")
    assert "expected one --quota a domain, got 'code' twice" in said
    assert "got ['wen']" in refused(texts, tmp_path, "--quota", "wen:0:1")
    said = refused(texts, tmp_path, "--quota", "code:0.7:1", "prose:0.6:1")
    assert "'code'" in said or "'prose'" in said
    kinds = set(parquet.read_table(texts / "pool.parquet")["kind"].to_pylist())
    said = refused(texts, tmp_path, "--quota", *(f"{kind}:0:0.1" for kind in kinds))
    assert "expected --quota that leaves room for the budget of" in said
    assert "raise the high quotas" in said
    assert "fill=" not in said  # no flag of the command


def test_quotas_that_leave_a_part_of_the_budget_are_refused():
    tokens, domains = np.array([30, 40, 50]), ["a", "b", "b"]
    refuse_unspent(120.0, tokens, domains, {})
    refuse_unspent(100.0, tokens, domains, {"b": (0.0, 0.7)})
    with pytest.raises(ValueError, match=r"got room for 90: 'b' 60, 'a' 30; raise the high quotas"):
        refuse_unspent(100.0, tokens, domains, {"b": (0.0, 0.6)})


def test_target_text_in_the_pool_is_reported_and_left_out(texts, tmp_path, capsys):
    pool = parquet.read_table(texts / "pool.parquet").to_pydict()
    target = tmp_path / "target.jsonl"
    both = [*pool["body"][:3], *[d.text for d in embedded.text_target(30)]]
    target.write_text("\n".join(json.dumps({"body": text}) for text in both))
    refused(texts, tmp_path, "--target", str(target), "--budget", "1e9")  # stops after the checks
    said = capsys.readouterr().out
    assert "3 pool documents are also target or test text" in said
    assert pool["name"][0] in said


def test_copies_within_the_pool_are_told(texts, tmp_path, capsys):
    pool = parquet.read_table(texts / "pool.parquet").to_pydict()
    rows = [dict(zip(pool, row, strict=True)) for row in zip(*pool.values(), strict=True)]
    rows += [{**rows[0], "name": f"copy {k}", "body": rows[0]["body"].upper()} for k in range(3)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    refused(texts, tmp_path / "out", "--pool", str(tmp_path / "pool.jsonl"), "--budget", "1e9")
    assert "3 pool documents repeat others' text, kept: ['copy 0'" in capsys.readouterr().out


def test_packed_json_is_read_as_it_would_be_unpacked(tmp_path):
    lines = "".join(json.dumps({"text": text, "n": k}) + "\n" for k, text in enumerate("abc"))
    (tmp_path / "pool.jsonl").write_text(lines)
    plain = read_documents(str(tmp_path / "pool.jsonl"), id="n")
    for kind in ("jsonl", "json"):
        with gzip.open(tmp_path / f"pool.{kind}.gz", "wt") as packed:
            packed.write(lines)
        found = read_documents(str(tmp_path / f"pool.{kind}.gz"), id="n")
        assert [(d.id, d.text, d.domain) for d in found] == [
            (d.id, d.text, d.domain) for d in plain
        ]
        with pytest.raises(ValueError, match=r"expected a column 'body' .* got \['n', 'text'\]"):
            read_documents(str(tmp_path / f"pool.{kind}.gz"), text="body")
    (tmp_path / "broken.json.gz").write_text(lines)
    with pytest.raises(ValueError, match=r"broken.json.gz' cannot be read as json.gz"):
        read_documents(str(tmp_path / "broken.json.gz"))


def test_the_gate_refuses_a_proxy_that_counts_letters(texts, tmp_path):
    said = refused(texts, tmp_path, "--gate", "refuse", "--lr", "1e-6")
    assert "no better than letter counts" in said
    assert "each in another --out" in said  # here the proxies would be refused
    assert "--epochs" in said


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, recipes.select_data as r\n"
        "try: r.run(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    after = os.times()
    assert done.returncode == 0, done.stderr
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    assert spent < 1.0  # seconds of processor time, which other processes do not lengthen
    assert "--budget" in done.stdout


@pytest.mark.parametrize("stage", ["scores/*/run0/done.npy", "retraining/*/*.npy"])
def test_a_killed_run_resumes_to_the_same_choice(stage, texts, finished, tmp_path):
    """kill -9 in the middle; the same command computes what is missing and chooses the same ids."""
    command = [*SCRIPT, *flags(texts, tmp_path, "--quota", "code:0:0.3", "prose:0.05:1")]
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.time() + 240
    while not _begun(tmp_path, stage):
        assert first.poll() is None, "the run ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {
        p: p.stat().st_mtime_ns for p in tmp_path.glob("retraining/*/*.npy") if "part" not in p.name
    }
    assert not (tmp_path / "metrics.json").exists()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, finished)]
    assert found[0]["chosen"]["sha256"] == found[1]["chosen"]["sha256"]
    assert {p: p.stat().st_mtime_ns for p in done} == done  # nothing finished was trained again


def _begun(folder, stage):
    """Whether some of the stage is done."""
    found = [path for path in folder.glob(stage) if "part" not in path.name]
    if not stage.endswith("done.npy"):
        return bool(found)
    try:
        return any(np.load(path).any() for path in found)
    except (ValueError, EOFError, OSError):  # being created
        return False


def test_a_tokeniser_of_other_texts_is_trained_again(tmp_path):
    pool, other = embedded.text_pool(60), embedded.text_target(60)
    made = [language_model("tiny", docs, tmp_path).tokenizer for docs in (pool, other, other)]
    times = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    fresh = language_model("tiny", other, tmp_path / "fresh").tokenizer
    assert made[1].get_vocab() == made[2].get_vocab() == fresh.get_vocab() != made[0].get_vocab()
    language_model("tiny", other, tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == times  # kept


def lower_case(texts):
    """Whole words in lower case, the rare ones unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=["[UNK]", "<s>"])
    made.train_from_iterator(texts, trainer)
    return made


def composed(texts):
    """Byte-level BPE over composed accents."""
    from tokenizers import normalizers

    made = train_bpe(texts, 300)
    made.normalizer = normalizers.NFC()
    return made


def pieces(texts, fallback=True):
    """SentencePiece's manner: a space before the first word, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = ["<unk>", "<s>", *(f"<0x{k:02X}>" for k in range(256) if fallback), "\u2581"]
    signs += sorted({c for text in texts for c in text if c.isascii() and c.isalpha()})
    made = Tokenizer(
        models.BPE(
            {s: k for k, s in enumerate(signs)}, [], unk_token="<unk>", byte_fallback=fallback
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


TEXTS = ("Größe , for 60 cafe\u0301s .\n\n  a = [1]", "Two\tWords ", "ÀÉ 日本語")


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda texts: train_bpe(texts, 300), False),
        (composed, False),
        (pieces, False),
        (lambda texts: pieces(texts, fallback=False), True),
        (lower_case, True),
    ],
    ids=["bytes", "composed", "pieces", "pieces without bytes", "lower case"],
)
def test_a_tokeniser_that_loses_text_is_refused(make, lost):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make(TEXTS), bos_token="<s>", clean_up_tokenization_spaces=True
    )
    model = LanguageModel(tokenizer, None, None, False)
    if lost:
        with pytest.raises(ValueError, match=r"gives text back, got one in 'mine' that loses"):
            refuse_lossy(model, documents(*TEXTS), "mine")
    else:
        refuse_lossy(model, documents(*TEXTS), "mine")
        rare = documents("plain words " * 500, "one \u2581 sign")  # SentencePiece's own space
        refuse_lossy(model, rare, "mine")


def test_a_model_whose_tokeniser_loses_text_is_refused_before_it_trains(texts, tmp_path):
    """Its bits per byte were far below the n-grams', which count every byte: the gate let it pass."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    made = lower_case([d.text for d in embedded.text_pool(60)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", unk_token="[UNK]"
    )
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "lossy")
    tokenizer.save_pretrained(tmp_path / "lossy")
    said = refused(texts, tmp_path / "out", "--model", str(tmp_path / "lossy"))
    assert "expected a tokeniser that gives text back" in said
    assert not (tmp_path / "out" / "tokens").exists()


def test_a_model_that_lacks_weights_is_refused_before_it_trains(texts, tmp_path):
    """A folder without a head got one at random, another at every command: equal commands chose differently."""
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=300, **small)
    model = saved(tmp_path / "headless", LlamaModel(config), 270)
    said = refused(texts, tmp_path / "out", "--model", model)
    assert (
        f"all weights of a LlamaForCausalLM in {model!r}, got none of the right size for lm_head.weight;"
        in said
    )
    assert not (tmp_path / "out" / "tokens").exists()
    with pytest.raises(ValueError, match="all weights of a LlamaForCausalLM"):
        text_task(tmp_path / "text", 20, 4, model=model)
    other = saved(tmp_path / "other", LlamaForCausalLM(config), 270)
    LlamaConfig(vocab_size=310, **small).save_pretrained(other)
    with pytest.raises(ValueError, match=r"for lm_head.weight, model.embed_tokens.weight; save"):
        pretrained(other, 0)
    tied = GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    tied = saved(tmp_path / "tied", tied, 270)  # whose head is the embeddings
    one, two = (pretrained(tied, seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert from_folder(tied, 0)


def test_as_few_subsets_as_there_are(texts, finished, tmp_path):
    """None is left for the picture beside the arms of the table."""
    run(flags(texts, tmp_path, "--subsets", "6"))
    assert json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("curvature-rows", "0", "at least 1, got 0"),
        ("damping", "-1", "at least 0, got -1"),
        ("damping", "nan", "at least 0, got nan"),
        ("damping", "inf", "at most 1e.30, got inf"),
        ("gate-order", "0", "at least 1, got 0"),
        ("gate-order", "9", "at most 7, got 9"),
    ],
)
def test_scoring_flags_are_looked_at_before_anything_is_trained(
    texts, tmp_path, flag, value, words
):
    said = refused(texts, tmp_path, f"--{flag}", value)
    assert re.match(f"error: expected --{flag} of {words}", said)
    assert not list(tmp_path.iterdir())


def test_a_curvature_that_a_model_has_not_is_told_before_anything_is_trained(texts, tmp_path):
    """Bloom's GELU has no forward mode; it was told after the proxies, with advice for a function's arguments."""
    from transformers import BloomConfig, BloomForCausalLM

    few = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    bloom = BloomForCausalLM(BloomConfig(vocab_size=300, **few))
    model = saved(tmp_path / "bloom", bloom, 270)
    out = tmp_path / "out"
    said = refused(texts, out, "--model", model, "--curvature", "gauss_newton")
    assert "expected a model with forward-mode derivatives for --curvature gauss_newton" in said
    assert said.endswith("take --curvature ekfac")
    assert not (out / "proxies").exists()
    study = SimpleNamespace(
        flags=SimpleNamespace(model=model, curvature="ekfac"),
        model=SimpleNamespace(from_scratch=False),
        problem=text_task(tmp_path / "text", 20, 4, model=model).problem,
    )
    assert refinement(study) == 0


@pytest.mark.parametrize("name", ["seeds", "proxies"])
def test_numbers_that_are_none(texts, tmp_path, name):
    with pytest.raises(SystemExit, match=f"expected --{name} of at least 1, got 0"):
        run(flags(texts, tmp_path, f"--{name}", "0"))


def test_text_is_read_as_it_is_written(tmp_path):
    """Dates that are text stay text, and a column of numbers is none."""
    dates = [{"text": f"2020-01-0{k}", "domain": "2020-01-01"} for k in range(1, 5)]
    for name, rows in {"dates": dates, "numbers": [{"text": 1}, {"text": 2}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_documents(str(tmp_path / "dates.jsonl"), domain="domain")
    assert [d.text for d in found] == [row["text"] for row in dates]
    assert {d.domain for d in found} == {"2020-01-01"}
    with pytest.raises(ValueError, match=r"expected text in column 'text' of .*, got int64"):
        read_documents(str(tmp_path / "numbers.jsonl"))
    with pytest.raises(ValueError, match="expected a column 'body'"):
        read_documents(str(tmp_path / "dates.jsonl"), text="body")
    rows = [{"id": k, "year": 2000 + k, "text": "t"} for k in range(2)]
    (tmp_path / "years.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_documents(str(tmp_path / "years.jsonl"), domain="year", id="id")
    assert [(d.id, d.domain) for d in found] == [("0", "2000"), ("1", "2001")]
    import pyarrow

    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"expected text in column 'text' of .*, got int64"):
        read_documents(str(tmp_path / "numbers.parquet"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("café".encode("latin-1"), r"expected UTF-8 in '.*a.txt', got byte 0xe9 at 3; convert it"),
        ("words".encode("utf-16"), r"expected UTF-8 in '.*a.txt', got byte 0xff at 0"),
        ('{"text": "café"}'.encode("latin-1"), r"'.*a.jsonl' cannot be read as jsonl: .*UTF8"),
    ],
    ids=["latin-1", "utf-16", "latin-1 lines"],
)
def test_text_of_another_encoding_is_refused(tmp_path, content, words):
    """It was chosen and written with U+FFFD in the place of its letters."""
    path = tmp_path / ("a.jsonl" if content.startswith(b"{") else "a.txt")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_documents(str(path))


def test_text_of_another_encoding_that_nobody_asked_for_does_not_matter(tmp_path):
    import pyarrow

    rest = pyarrow.array([b"\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": ["a"], "rest": rest}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b", "rest": "\xe9"}')
    assert [d.text for d in read_documents(str(tmp_path / "*"))] == ["a", "b"]
    with pytest.raises(ValueError, match=r"'.*a.parquet' cannot be read as parquet: .*UTF8"):
        read_documents(str(tmp_path / "a.parquet"), text="rest")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("Käse", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "Käse"}', encoding="utf-8-sig")
    assert [d.text for d in read_documents(str(tmp_path / "[ab].*"))] == ["Käse", "Käse"]


def test_files_of_one_name_in_several_folders_are_several_domains(tmp_path, monkeypatch):
    """They were one domain, without a word, and a quota held for all of them together."""
    for name in ("a/train", "b/c/train", "b/rest"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": f"words {k} of {name}"}) for k in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        folder = tmp_path / name  # one of text files beside it
        folder.mkdir()
        (folder / "1.txt").write_text(f"text of {name}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for start in (f"{tmp_path}/", "./", ""):
        rows = read_documents(f"{start}**/*.jsonl")
        assert [d.domain for d in rows] == ["a/train"] * 2 + ["b/c/train"] * 2 + ["rest"] * 2
        assert [d.domain for d in read_documents(f"{start}**/*.txt")] == [
            "a/train",
            "b/c/train",
            "rest",
        ]
    assert {d.domain for d in read_documents("b/**/*.jsonl")} == {"rest", "train"}
    (tmp_path / "b" / "rest.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    domains = [d.domain for d in read_documents("b/rest.jsonl*")]
    assert domains == ["rest.jsonl"] * 2 + ["rest.jsonl.gz"]
    assert parse_quotas(["b/c/train:0:0.5"]) == {"b/c/train": (0.0, 0.5)}


def test_a_file_with_brackets_in_its_name_is_no_pattern(tmp_path):
    for name in ("br[1].jsonl", "br1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}), encoding="utf-8")
    assert [d.text for d in read_documents(str(tmp_path / "br[1].jsonl"))] == ["br[1].jsonl"]
    assert [d.text for d in read_documents(str(tmp_path / "br[12].jsonl"))] == ["br1.jsonl"]


@pytest.mark.parametrize("rest", [[1, "a"], [{"x": 1}, "a"], [[1], {"y": 2}], ["2020-01-01", 3]])
@pytest.mark.parametrize(
    ("ids", "names"),
    [([1, 2], ["1", "2"]), ([1, 2.5], ["1.0", "2.5"]), ([True, False], ["True", "False"])],
)
def test_what_columns_hold_that_nobody_asked_for_does_not_matter(tmp_path, rest, ids, names):
    rows = [{"text": t, "n": n, "rest": r} for t, n, r in zip((None, "b"), ids, rest, strict=True)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_documents(str(path), domain="n")
    assert [(d.text, d.domain) for d in found] == [("", names[0]), ("b", names[1])]
    with pytest.raises(ValueError, match=r"expected a column 'body' in .*'n', 'rest', 'text'"):
        read_documents(str(path), text="body")
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a column 'body' in .*'n', 'rest', 'text'"):
        read_documents(str(path), text="body")


def test_documents_of_any_length_are_read(tmp_path):
    texts = ["short", "a b " * 800_000, "short, too"]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert [d.text for d in read_documents(str(path))] == texts


def test_whole_numbers_keep_their_digits(tmp_path):
    """Hashes of 64 bits were read as floats, and many became one."""
    path = tmp_path / "a.jsonl"
    ids = [2**64 - 1, 2**63 + 1, 3]
    path.write_text("\n".join(json.dumps({"text": "t", "id": n}) for n in ids))
    assert [d.id for d in read_documents(str(path), id="id")] == list(map(str, ids))
    for ids in ([2**70, 1], [2**63 + 1, -1], [2**53 + 1, 0.5]):
        path.write_text("\n".join(json.dumps({"text": "t", "id": n}) for n in ids))
        for asked in ({"id": "id"}, {"domain": "id"}):
            with pytest.raises(ValueError, match="expected all digits of the numbers in column"):
                read_documents(str(path), **asked)


@pytest.mark.parametrize(("kind", "first"), [("float16", 2**11), ("float32", 2**24)])
def test_short_floats_lose_their_digits_sooner(tmp_path, kind, first):
    """Of 2^24 and 2^24 + 1 in float32, one domain was made."""
    import pyarrow

    for numbers, words in (
        ([first, first - 1], f"got .*, which rounds e.g. {first}"),
        ([1, 2], None),
    ):
        column = pyarrow.array(np.array(numbers, kind))
        for held in (column, column.dictionary_encode())[: 1 if kind == "float16" else 2]:
            table = pyarrow.table({"text": ["a", "b"], "n": held})
            parquet.write_table(table, tmp_path / "a.parquet")
            with pytest.raises(ValueError, match=words) if words else nullcontext():
                read_documents(str(tmp_path / "a.parquet"), domain="n")


def test_columns_that_were_asked_for_are_words_or_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    for cells, words in (
        ([1, "a"], "changed from number to string"),
        ([{"x": 1}] * 2, "expected words or numbers in column 'n' of .*, got struct"),
        ([None] * 2, "expected no empty cells in column 'n'"),
    ):
        path.write_text("\n".join(json.dumps({"text": "t", "n": n}) for n in cells))
        with pytest.raises(ValueError, match=words):
            read_documents(str(path), domain="n")


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["code", None, "prose", None], "got 2 of 4 empty; name them, or leave --domain out"),
        ([None] * 4, "got 4 of 4 empty"),
        ([1.0, float("nan"), 2.0, 3.0], "got 1 of 4 empty"),
        ([{"name": "code"}] * 4, "expected words or numbers in column 'kind' of .*, got struct"),
        ([["code", "prose"]] * 4, "got list.*; name another column with --domain"),
    ],
)
def test_domains_that_are_none(tmp_path, cells, words):
    import pyarrow

    table = pyarrow.table({"text": list("abcd"), "kind": cells, "id": ["a", "b", "c", None]})
    parquet.write_table(table, tmp_path / "pool.parquet")
    with pytest.raises(ValueError, match=words):
        read_documents(str(tmp_path / "pool.parquet"), domain="kind")
    with pytest.raises(ValueError, match="got 1 of 4 empty; name them, or leave --id out"):
        read_documents(str(tmp_path / "pool.parquet"), id="id")
    assert len(read_documents(str(tmp_path / "pool.parquet"))) == 4


def documents(*texts):
    return [embedded.Document(f"d{k}", text, "all", f"f:{k}") for k, text in enumerate(texts)]


def letters(texts):
    return [[ord(c) for c in text] for text in texts]


def test_low_quotas_that_whole_documents_miss_are_told(tmp_path, capsys):
    """Forty tokens of 100 shall be long documents, of which none fits into the budget."""
    pool = [
        embedded.Document(f"d{k}", "text", domain, f"f:{k}")
        for k, domain in enumerate(["short"] * 20 + ["long"] * 2)
    ]
    study = SimpleNamespace(
        pool=pool, tokens=np.array([10] * 20 + [150] * 2), domains=np.array([d.domain for d in pool]),
        budget=100.0, quotas={"long": (0.4, 1.0), "short": (0.5, 1.0)}, flags=SimpleNamespace(out=tmp_path),
    )  # fmt: skip
    scores = LinearDatamodel(-np.arange(22.0)[:, None], np.zeros(1), 1.0, [d.id for d in pool])
    decision = choose(study, scores)
    write_subset(study, scores, decision)
    said = capsys.readouterr().out
    assert "warning: low quotas missed by chosen: long has 0 of at least 40 tokens; whole" in said
    arms = {"chosen": decision.weights, "filter": np.repeat([0.0, 1.0], [20, 2])}
    (paragraph,) = quotas_missed(study, arms)
    assert (
        "chosen: long has 0 of at least 40 tokens; filter: short has 0 of at least 50" in paragraph
    )
    assert quotas_missed(study, {"both": np.repeat([1.0, 0.0, 1.0], [5, 16, 1])}) == []


def test_budgets_below_the_shortest_document_are_refused():
    tokens, domains = np.array([30, 40]), ["a", "b"]
    refuse_small(30.0, tokens, domains, {})
    refuse_small(100.0, tokens, domains, {"a": (0.0, 0.1)})
    refuse_small(100.0, tokens, domains, {"a": (0.0, 0.3), "b": (0.0, 0.3)})  # up to rounding
    with pytest.raises(
        ValueError, match=r"got 29 tokens where the shortest document has 30; raise"
    ):
        refuse_small(29.0, tokens, domains, {})
    for quotas, words in (
        ({"a": (0, 0.2), "b": (0, 0.2)}, r"got 20 tokens of 'a' \(its high quota of 100\) where"),
        ({"a": (0, 0.2), "b": (0, 0.39)}, r"got 39 tokens of 'b' .* the shortest document has 40;"),
        ({"a": (0, 0.0), "b": (0, 0.1)}, r"got 10 tokens of 'b' .* the shortest document has 40;"),
    ):
        with pytest.raises(ValueError, match=words):  # not 100 tokens beside a document of 30
            refuse_small(100.0, tokens, domains, quotas)


def test_blocks_of_a_killed_cut_are_not_believed(tmp_path, monkeypatch):
    """Killed between the two files, the folder holds blocks of one pool under the mark of another."""
    one, two = documents("aaaa", "bbbb"), documents("xxxx", "yyyyyyyy")
    first = Blocks.cut(one, letters, 0, 4, tmp_path)
    seen = first.tokens  # memory-mapped
    save, saved = np.save, []

    def killed(*given):
        saved.append(save(*given))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        Blocks.cut(two, letters, 0, 4, tmp_path)
    monkeypatch.undo()
    assert seen[:, 1].tolist() == [97, 98]  # who reads the old file goes on reading it
    again = Blocks.cut(one, letters, 0, 4, tmp_path)
    assert again.tokens[:, 1].tolist() == [97, 98]
    assert again.document.tolist() == [0, 1]


def test_repeated_target_text_is_in_one_part_alone(texts, tmp_path, capsys):
    target = [*embedded.text_target(30), *embedded.text_target(10)]
    (tmp_path / "target.jsonl").write_text("\n".join(json.dumps({"body": d.text}) for d in target))
    (tmp_path / "test.jsonl").write_text(json.dumps({"body": target[0].text.upper()}))
    refused(
        texts, tmp_path, "--target", str(tmp_path / "target.jsonl"), "--test", str(tmp_path / "test.jsonl"),
        "--budget", "1e9",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "left out 10 target documents whose text comes twice" in said
    assert "1 test documents are also target text" in said
    assert [d.id for d in once(documents("A b", "a  B", "c"))] == ["d0", "d2"]


def test_the_gate_reads_over_blocks_of_white_space():
    """The last block of a long document may be nothing else."""

    proxy = SimpleNamespace(order=[np.arange(3)], outputs=lambda outputs: torch.zeros(1))
    study = SimpleNamespace(
        outputs=lambda part: None, bits=lambda outputs: np.ones(1),
        flags=SimpleNamespace(gate_order=2, gate="refuse"), notes={},
        model=SimpleNamespace(decode=lambda rows: ["abcabcabc", "\n   ", "cab"]),
        blocks=SimpleNamespace(tokens=np.zeros((3, 2))), held_out=documents("abc"), part=np.array(["settle"]),
    )  # fmt: skip
    gate(study, [proxy])
    assert 0 < study.notes["gate"]["ngram"] < 8


def test_documents_help_or_hurt_by_the_sign_of_their_score():
    study = SimpleNamespace(pool=documents(*"abc"), tokens=np.array([2, 1, 1]))
    for scores, helps, hurts in (
        ([-1.0, -3.0, 2.0], 2, 1),
        ([-1.0, -3.0, 0.0], 2, 0),
        ([1.0, 3.0, 2.0], 0, 3),
    ):
        found = ends_of(study, LinearDatamodel(np.array(scores)[:, None], [0.0], 1.0))
        assert list(found) == ["Predicted to help most", "Predicted to hurt most"]
        for (page,), many in zip(found.values(), (helps, hurts), strict=True):
            assert page.count("<article>") == many
            assert ("none" in page) == (many == 0)


def test_the_headline_tells_of_the_best_filter_and_of_other_text():
    """A filter that does as well, and a loss on the user's own test text, stood in the table alone."""
    noise = np.array([[0.0, 0.0], [0.01, -0.01], [-0.01, 0.01]])

    def said(filter_, test, seeds=3):
        losses = {
            "chosen": [1.8, test],
            "n-grams": [filter_, 2.0],
            "poor": [1.99, 2.0],
            "random": [2.0, 2.0],
        }
        arms = {name: (np.array(mean) + noise)[:seeds] for name, mean in losses.items()}
        arms["chosen"] = arms["chosen"] - 0.5 * noise[:seeds]  # or intervals would have no width
        return beside(SimpleNamespace(arms=arms, parts=("report", "test")))

    tie = said(1.8, 2.2)
    assert tie.startswith(
        "; the best filter, n-grams, changes it by -0.2 [-0.2, -0.2]: a tie; on the test text"
    )
    assert tie.endswith(": worse than random")
    assert ": it is better;" in said(1.6, 2.0)
    assert said(1.6, 2.0).endswith(": a tie with random")
    assert ": the chosen documents are better;" in said(1.95, 1.5)
    assert said(1.95, 1.5).endswith(": better than random")
    assert said(1.8, 2.2, 1).endswith("one training, so no interval")
    assert beside(SimpleNamespace(arms={"chosen": noise, "random": noise}, parts=("report",))) == ""


def test_the_headline_of_one_training_claims_no_interval():
    def said(seeds, quotas):
        gap = paired_interval([-0.2, -0.3][: len(seeds)])
        verified = SimpleNamespace(seeds=seeds, difference=lambda name: gap)
        return against_random(SimpleNamespace(verified=verified), quotas)

    assert said([0], False).startswith(
        "Retrained once, they change held-out target loss by -0.2 bits"
    )
    assert said([0], False).endswith("as many tokens (one training tells no noise)")
    assert said([0, 1], False).startswith("Retrained 2 times")
    assert said([0, 1], False).endswith("as many tokens (95 % interval, paired by seed)")
    assert said([0, 1], True).endswith(
        "as many tokens, under the same quotas (95 % interval, paired by seed)"
    )
