"""recipes/attribute.py as a user meets it: one command, the same again, wrong input, a folder of one's own."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_wine

from attribution_core import LinearDatamodel
from recipes.attribute import Flags, curvature, moving, prepare, run
from recipes.data.classification import from_file
from recipes.data.language_model import language_model, no_forward_mode, pretrained
from recipes.data.tasks import from_folder, text_task
from recipes.embedded import text_pool

SMALL = ["--subsets", "6", "--drop", "0.1", "0.5", "--jobs", "1", "--targets", "6"]
pytestmark = pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")


def test_digits_from_start_to_report(tmp_path, capsys):
    flags = [*SMALL, "--rows", "120", "--epochs", "4", "--batch-size", "20", "--out", str(tmp_path)]
    with warnings.catch_warnings():  # four timed steps leave rows out; the training does not
        warnings.filterwarnings("error", ".* are in no batch of the run")
        run(flags)
    said = capsys.readouterr().out
    for words in ("pre-flight", "First order holds", "retrainings about", "Exact derivatives", "10% dropped: LDS"):  # fmt: skip
        assert words in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["lds"]["0.1"]["mean"] > 0.9
    assert metrics["meta"]["check"]["error"] < 0.25
    assert metrics["attributed"] == "1 run at exposure 1"
    assert metrics["truth"].endswith("same initial weights and order, weights set to zero")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 2
    assert "Can it be believed?" in page
    f = LinearDatamodel.load(tmp_path / "datamodel")
    assert f.scores.shape == (120, 6)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "retraining").glob("*.npy")}
    assert len(before) == 12
    run(flags)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "retraining").glob("*.npy")} == before
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("method", ["ekfac", "tracin"])
def test_other_methods_and_fresh_seeds(tmp_path, capsys, method):
    run(
        [*SMALL, "--rows", "80", "--epochs", "2", "--batch-size", "5", "--method", method, "--fresh", "--seeds", "2",
         "--exposure", "0.5", "--runs", "2", "--out", str(tmp_path)]
    )  # fmt: skip
    assert "(6 retrainings × 2 seeds)" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["meta"]["averaged"] == 2


def test_text_with_a_model_from_a_config(tmp_path, capsys):
    """A folder that holds a config and a tokeniser, but no weights; made by transformers itself."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    task = text_task(tmp_path / "first", 40, 6)
    folder = tmp_path / "model"
    tokenizer = tmp_path / "first" / "tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), bos_token="<s>").save_pretrained(folder)
    LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40, bos_token_id=0, eos_token_id=0,
    ).save_pretrained(folder)  # fmt: skip
    model = from_folder(str(folder), 0)
    assert model.config._attn_implementation == "eager"
    assert task.problem.n == 40
    run(
        [*SMALL, "--task", "text", "--rows", "40", "--epochs", "1", "--batch-size", "10", "--model",
         str(folder), "--preflight", "look", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "10% dropped: LDS" in said
    f = LinearDatamodel.load(tmp_path / "out" / "datamodel")
    known = {d.id for d in text_pool(60)}  # rows lead back to documents
    assert {name.rsplit(", block ", 1)[0] for name in f.ids.tolist()} <= known
    assert f.ids[0].endswith(", block 0")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "held-out loss, nats a token; lower is better" in page
    assert f.ids[int(np.argmin(f.mean().scores))] in page
    scores = f.scores
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "text", "--model", "./nowhere"], "expected a folder of a transformers model"),
        (["--task", "text", "--data", "missing/*.parquet"], "missing"),
        (["--data", "mine.jsonl"], "expected --task text with --data, got --task digits"),
        (["--task", "text", "--label", "y"], "expected --task table with --label, got --task text"),
        (["--task", "table"], "expected --data with --task table: 'digits', 'breast_cancer', or a .parquet or .csv"),
        (["--task", "table", "--data", "missing.csv"], "no file missing.csv"),
        (["--task", "digits", "--drop", "1.0"], "expected --drop of shares between 0 and 1, got"),
        (["--task", "digits", "--lr", "0"], "expected --lr of at least 1e-12, got 0"),
        (["--task", "digits", "--targets", "500"], "expected at most 200 target images, got 500"),
        (["--task", "digits", "--subsets", "1"], "expected --subsets of at least 3, got 1"),
        (["--jobs", "0"], "expected --jobs of at least 1, got 0"),
        (["--drop", ".1", ".005"], "expected --drop of at least one of 60 rows .0.017., got 0.005"),
        (["--exposure", "2"], "expected --exposure of at most 1, got 2"),
        (["--exposure", "0"], "expected --exposure of at least 1e-09, got 0"),
        (["--runs", "2"], "expected --fresh with --runs 2"),
        (["--device", "toaster"], "expected --device of a device that is there, got 'toaster'"),
    ],
)  # fmt: skip
def test_wrong_input_is_said_in_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run(["--rows", "60", "--epochs", "1", "--out", str(tmp_path), *flags])
    assert str(stopped.value).startswith("error: ")


def test_text_that_is_both_is_told_and_short_text_is_taken_whole(tmp_path, capsys):
    lines = [json.dumps({"text": d.text}) for d in text_pool(60)]
    for name, some in (("data", lines[:30]), ("target", lines[20:50])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some), encoding="utf-8")
    where = {name: str(tmp_path / f"{name}.jsonl") for name in ("data", "target")}
    task = text_task(tmp_path / "out", None, 4, **where)
    assert 30 <= task.problem.n < 1000
    assert task.facts["training documents that are also target text"] == "10 of 30"
    assert task.facts["data"].startswith(where["data"])
    said = capsys.readouterr().out
    assert "warning: 10 training documents are also target text: [" in said
    assert f"{where['data']}#20" in said
    text_task(tmp_path / "embedded", 40, 4)
    assert "also target text" not in capsys.readouterr().out


def wine(folder):
    """A table of one's own as a file: its flags."""
    x, y = load_wine(return_X_y=True)
    frame = pd.DataFrame(x[:, :4], columns=["alcohol", "acid", "ash", "alkali"])
    frame["kind"] = np.array(["red", "white", "rose"])[y]
    frame["number"] = np.arange(len(y))[::-1]
    frame.to_csv(folder / "wine.csv", index=False)
    file = str(folder / "wine.csv")
    return ["--task", "table", "--data", file, "--label", "kind", "--ignore", "number"]


def test_source_of_few_steps_takes_as_many_segments_as_there_are(tmp_path, capsys):
    few = ["--rows", "40", "--epochs", "1", "--batch-size", "20", "--width", "8"]
    run([*SMALL, *wine(tmp_path), *few, "--method", "source", "--out", str(tmp_path / "out")])
    assert "50% dropped: LDS" in capsys.readouterr().out


def test_a_table_of_ones_own(tmp_path, capsys):
    """Rows are called by their places in the file; of each of the worst outputs it is said what moves it."""
    own, out = wine(tmp_path), tmp_path / "out"
    how = ["--width", "8", "--epochs", "4", "--method", "influence"]
    run([*SMALL, *own, *how, "--out", str(out)])
    assert "10% dropped: LDS" in capsys.readouterr().out
    f = LinearDatamodel.load(out / "datamodel")
    data = from_file(own[3], "kind", None, None, 0, ["number"])
    np.testing.assert_array_equal(f.ids, data.places)
    page = (out / "report.html").read_text()
    table = page[page.index("Rows that move the worst outputs most") :]
    lines = re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines if "held out" in line]
    bad = np.argsort(f.base)[:3]
    assert {c[0] for c in cells} == {
        f"row {data.held_places[j]} held out, {data.classes[data.target_y[j]]}" for j in bad
    }
    assert "Outputs: margin, nats; higher is better" in table
    for _, _, which, does, row, score, kind in cells:
        assert (which, does) in (("lower", "hurts"), ("raise", "helps"))
        assert (which == "lower") == (score.startswith(("-", "−")))
        assert pd.read_csv(own[3])["kind"][int(row)] == kind


@pytest.mark.parametrize(("name", "rows"), [("digits", 1000), ("breast_cancer", 300)])
def test_embedded_tables_are_taken_as_by_the_other_recipes(name, rows):
    task, _ = prepare(Flags(task="table", data=name, width=0, targets=5))
    assert task.problem.n == rows
    assert task.name == f"logistic regression on {name}"
    assert len(task.outputs) == 5


def test_a_linear_model_of_a_table_is_called_one_and_shares_keep_their_digits(tmp_path, capsys):
    x, y = load_wine(return_X_y=True)
    pd.DataFrame(x[:, :4], columns=list("abcd")).assign(kind=y).to_csv(tmp_path / "wine.csv")
    run(
        ["--task", "table", "--data", str(tmp_path / "wine.csv"), "--label", "kind", "--ignore", "Unnamed: 0",
         "--width", "0", "--epochs", "2", "--method", "influence", "--targets", "4", "--subsets", "3", "--jobs", "1",
         "--drop", "0.125", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert "12.5% dropped: LDS" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Predicted against actual, 12.5% dropped" in page
    assert "logistic regression on wine.csv" in page
    assert "MLP on" not in page


def saved(folder, model, tokens):
    """A transformers folder with a byte tokeniser of so many tokens."""
    from transformers import PreTrainedTokenizerFast

    from recipes.data.language_model import train_bpe

    model.save_pretrained(folder)
    bpe = train_bpe(["some words, and some more of them"], tokens)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(folder)
    return str(folder)


def test_models_that_do_not_fit_are_told(tmp_path):
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    both = BertLMHeadModel(BertConfig(vocab_size=300, intermediate_size=16, **small))
    with pytest.raises(ValueError, match="from left to right, got BertLMHeadModel"):
        text_task(tmp_path / "a", 20, 4, model=saved(tmp_path / "bert", both, 270))
    few = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="got 100 embeddings"):
        text_task(tmp_path / "b", 20, 4, model=saved(tmp_path / "gpt2", few, 270))
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_are_to_be_merged_first(tmp_path):
    """They were called models without trainable parameters, or of an unknown kind."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    folder = saved(tmp_path / "lora", adapted, 270)
    words = r"got a LoRA adapter in .*lora'; merge it first: model.merge_and_unload\(\)"
    for load in (
        lambda: text_task(tmp_path / "a", 20, 4, model=folder),
        lambda: language_model(folder, text_pool(60), tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match=words):
            load()
    merged = saved(tmp_path / "merged", adapted.merge_and_unload(), 270)
    assert text_task(tmp_path / "a", 20, 4, model=merged).problem.n == 20


def test_experts_are_plain_and_models_need_not_name_their_positions(tmp_path):
    """Fused experts have neither forward mode nor second derivatives; Bloom's config has no largest length."""
    from transformers import BloomConfig, BloomForCausalLM, MixtralConfig, MixtralForCausalLM

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = MixtralConfig(
        vocab_size=300,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=40,
        **small,
        **ends,
    )
    mixtral = saved(tmp_path / "mixtral", MixtralForCausalLM(config), 270)
    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2, **ends)
    bloom = saved(tmp_path / "bloom", BloomForCausalLM(config), 270)
    assert no_forward_mode(text_task(tmp_path / "a", 20, 4, model=mixtral).problem) == ""
    for model in (from_folder(mixtral, 0), pretrained(mixtral, 0)):
        assert getattr(model.config, "_experts_implementation", "eager") == "eager"
    task = text_task(tmp_path / "b", 20, 4, model=bloom)
    assert no_forward_mode(task.problem)
    plain = {"curvature": "ekfac", "refine": 0}
    assert curvature(Flags(task="text", model=bloom, method="influence"), task) == plain
    assert curvature(Flags(task="text", model=bloom, method="tracin"), task) == {}


def test_rows_are_said_to_lower_or_to_raise_by_the_sign_of_their_score():
    task = SimpleNamespace(show="row {}".format, places=np.arange(4), better=-1)
    for scores, lower, upper in (
        ([-1.0, -3.0, 0.0, 2.0], ["1", "0"], ["3"]), ([-1.0, -2.0], ["1", "0"], ["none"]), ([3.0], ["none"], ["0"]),
    ):  # fmt: skip
        table = moving(LinearDatamodel(np.array(scores)[:, None], [0.0], 1.0), task)
        cells = re.findall(
            r">(lower|raise)</td><td[^>]*>(?:helps|hurts)</td><td[^>]*>(\w+)<", table
        )
        assert dict(re.findall(r">(lower|raise)</td><td[^>]*>(\w+)<", table)) == {
            "lower": "helps",
            "raise": "hurts",
        }  # of losses
        assert cells == [*(("lower", k) for k in lower), *(("raise", k) for k in upper)]
