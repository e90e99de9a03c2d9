"""recipes/unlearn.py as a user meets it: one command, the same again, a file of one's own, wrong input."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_breast_cancer
from torch.nn import functional as F

from recipes.data.classification import from_file
from recipes.data.forget_sets import cluster
from recipes.unlearn import run
from recipes.work import unlearning

QUICK = [
    "--models", "6", "--epochs", "10", "--batch-size", "25", "--width", "8", "--size", "10",
    "--rates", "0.1",
]  # fmt: skip
METHODS = {
    "auto (models)", "auto (predicted outputs)", "outputs only", "fine-tune", "gradient ascent",
    "gradient difference", "SCRUB", "NPO", "oracle matching (needs an oracle)",
}  # fmt: skip


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.filterwarnings("ignore:the models are left as they were")  # six models show little
@pytest.mark.filterwarnings("ignore:rehearsals learn less than half")
def test_three_forget_sets_from_start_to_report(tmp_path, capsys):
    flags = [*QUICK, "--rows", "150", "--out", str(tmp_path)]
    run(flags)
    said = capsys.readouterr().out
    for words in (
        "cluster: ",
        "of 150 rows",
        "floor (oracle vs oracle)",
        "KL(unlearned || oracle)",
    ):
        assert words in said
    metrics = read(tmp_path)
    for kind in ("random", "cluster", "mislabelled"):
        found = metrics[kind]
        assert set(found["methods"]) > METHODS
        assert found["direction"] == "KL(unlearned || oracle)"
        assert found["k"] == 6
        assert set(found["cost"]) == METHODS
        assert 0 < found["cost"]["auto (models)"] <= 0.25
        assert set(found["methods"]["auto (models)"]) > {"forget", "retain", "validation"}
        table = pq.read_table(tmp_path / f"points-{kind}.parquet")
        assert {"method", "split", "point", "score", "floor"} <= set(table.column_names)
        saved = sorted((tmp_path / "unlearned" / kind).glob("*.safetensors"))
        assert len(saved) == 6
        assert load_file(saved[0])["0.weight"].shape == (8, 64)
    assert len(metrics["random"]["rows"]) == len(metrics["mislabelled"]["rows"]) == 10
    # rows that were learnt with wrong labels come out otherwise without them
    nothing, floor = (
        metrics["mislabelled"]["methods"][name]["margin error"]
        for name in ("do nothing (ceiling)", "floor (oracle vs oracle)")
    )
    assert nothing > 2 * floor
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 9
    assert "Share of the gap closed" in page

    kept = [p for part in ("runs", "oracles") for p in (tmp_path / part).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in kept}
    assert len(before) > 36
    run(flags)
    assert {p: p.stat().st_mtime_ns for p in kept} == before
    assert read(tmp_path) == metrics


def written(tmp_path):
    """A user's table in two files, and rows to forget."""
    x, y = load_breast_cancer(return_X_y=True)
    frame = pd.DataFrame({"radius": x[:, 0], "texture": x[:, 1], "outcome": np.where(y, "benign", "malignant")})  # fmt: skip
    frame["side"] = np.where(x[:, 2] > 90, "left", "right")
    frame.iloc[:120].to_parquet(tmp_path / "mine.parquet")
    frame.iloc[120:180].to_csv(tmp_path / "held.csv", index=False)
    (tmp_path / "ids.txt").write_text("3, 17\n44\n")
    return ["--data", str(tmp_path / "mine.parquet"), "--label", "outcome"]


@pytest.mark.filterwarnings("ignore:the models are left as they were")
def test_rows_of_a_file_of_ones_own(tmp_path, capsys):
    own = [*written(tmp_path), "--test", str(tmp_path / "held.csv")]
    out = tmp_path / "out"
    run([*QUICK, *own, "--forget-file", str(tmp_path / "ids.txt"), "--out", str(out)])
    metrics = read(out)
    assert set(metrics) == {"file", "facts", "flags"}
    assert metrics["file"]["rows"] == [3, 17, 44]
    assert "file: 3 of 120 rows" in capsys.readouterr().out
    assert metrics["facts"]["rows"].endswith("as in mine.parquet, validation rows as in held.csv")
    found = pq.read_table(out / "points-file.parquet").to_pandas()
    found = found[found["method"] == "SCRUB"]
    rows = {split: part["row"].tolist() for split, part in found.groupby("split")}
    assert rows["forget"] == [3, 17, 44]
    assert rows["retain"] == [k for k in range(120) if k not in rows["forget"]]
    half = from_file(own[1], "outcome", None, own[-1], 0).held_places[:30]
    assert rows["validation"] == half.tolist()
    assert half.tolist() != list(range(30))


@pytest.mark.filterwarnings("ignore:the models are left as they were")
def test_an_unlearned_model_is_used_with_what_is_saved_beside_it(tmp_path):
    """Margins of held-out rows, from the table, model.json and the weights alone."""
    own = [*written(tmp_path), "--test", str(tmp_path / "held.csv")]
    out = tmp_path / "out"
    run([*QUICK, *own, "--forget-file", str(tmp_path / "ids.txt"), "--out", str(out)])
    about = json.loads((out / "unlearned" / "file" / "model.json").read_text())
    assert about["classes"] == ["benign", "malignant"]
    found = pq.read_table(out / "points-file.parquet").to_pandas()
    found = found[(found["method"] == "auto (models)") & (found["split"] == "validation")]
    held = pd.read_csv(tmp_path / "held.csv").iloc[found["row"]]
    columns = [
        held[one["column"]] == one["is"]
        if "is" in one
        else (held[one["column"]] - one["less"]) / one["over"]
        for one in about["inputs"]
    ]
    x = torch.tensor(np.column_stack(columns).astype(np.float32))
    margins = []
    for path in sorted((out / "unlearned" / "file").glob("*.safetensors")):
        w = load_file(path)
        logits = F.linear(
            F.gelu(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"]
        )
        sign = np.where(held["outcome"] == "malignant", 1, -1)
        margins.append(sign * (logits[:, 1] - logits[:, 0]).numpy())
    np.testing.assert_allclose(np.mean(margins, 0), found["mean"], atol=1e-5)  # float32


def test_a_cluster_is_of_one_class_and_about_as_large_as_asked():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [30, 40, 50])
    x = rng.normal(size=(120, 2)) + 9 * y[:, None]
    x[70:87] += 40  # seventeen of the third class lie apart
    rows = cluster(x[y == 2], y[y == 2], 17)
    np.testing.assert_array_equal(rows, np.arange(17))
    for size in (5, 10, 30):
        rows = cluster(x, y, size)
        assert len(set(y[rows])) == 1
        assert abs(len(rows) - size) < 5


def test_a_cluster_of_many_rows_is_cut_to_its_middle():
    """Fifths of classes of 500 rows are larger than asked for: the 25 rows nearest to the middle of one stay."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 500)
    x = rng.normal(size=(1500, 2)) + 20 * y[:, None]
    rows = cluster(x, y, 25)
    assert len(rows) == 25
    assert len(set(y[rows])) == 1
    assert (np.diff(rows) > 0).all()
    # of a fifth of a normal cloud, some 100 rows, those within half of its reach
    assert np.ptp(x[rows], axis=0).max() < 1.5 < np.ptp(x[y == 0], axis=0).min() / 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--forget", "all"], "unknown forget set ['all']; expected some of random, cluster"),
        (["--models", "3"], "expected at least 4 models, got 3"),
        (["--budget", "2"], "expected a --budget in (0, 1] of a training's steps, got 2"),
        (["--budget", "0.01"], "expected a budget that rehearsals fit in, got 0.01 of 200 steps"),
        (["--size", "400"], "expected --size from 1 to 250"),
        (["--forget-file", "nowhere.txt"], "no file nowhere.txt"),
        (["--forget-file", "HIGH"], "expected row numbers from 0 to 499"),
        (["--forget-file", "WORDS"], "got ['two']"),
        (["--forget-file", "EMPTY"], "got none"),
        (["--forget-file", "TWICE"], "expected some of 500 rows, each once"),
        (["--data", "nothing.csv"], "no file nothing.csv; give a .parquet or .csv file, 'digits'"),
        (["--data", __file__], "expected a .parquet or .csv file, 'digits'"),
        (["--data", "mine.csv", "--forget-file", "TWICE"], "expected --test beside --forget-file"),
    ],
)
def test_wrong_input_is_said_in_one_line(tmp_path, flags, words):
    files = {"HIGH": "1 500", "WORDS": "1 two", "EMPTY": "", "TWICE": "4 4"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = [str(tmp_path / flag) if flag in files else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        run([*given, "--out", str(tmp_path / "out")])
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:the models are left as they were")
def test_results_of_an_earlier_run_do_not_stay_beside_new_ones(tmp_path, monkeypatch):
    quick = [*QUICK, "--rows", "60", "--forget", "random", "--out", str(tmp_path)]
    for kind in ("random", "cluster"):
        (tmp_path / "unlearned" / kind).mkdir(parents=True)
        for seed in range(8):
            (tmp_path / "unlearned" / kind / f"{seed}.safetensors").write_text("old")
        (tmp_path / f"points-{kind}.parquet").write_text("old")
    reports = [tmp_path / name for name in ("report.html", "metrics.json")]
    for report in reports:
        report.write_text("old")
    work, seen = unlearning.train, []

    def train(*given, **more):
        seen.append(any(report.exists() for report in reports))
        return work(*given, **more)

    monkeypatch.setattr(unlearning, "train", train)
    run(quick)
    assert seen[0]  # the first training is accepted, then the old results go
    assert len(seen) > 6
    assert not any(seen[1:])  # none while a run is under way
    assert all(report.exists() for report in reports)
    assert len(list((tmp_path / "unlearned" / "random").glob("*.safetensors"))) == 6
    assert not (tmp_path / "unlearned" / "cluster").exists()
    assert [p.name for p in tmp_path.glob("points-*")] == ["points-random.parquet"]


@pytest.mark.filterwarnings("ignore:the models are left as they were")
@pytest.mark.parametrize("other", [["--epochs", "12"], ["--size", "11"]])
def test_results_stay_where_another_run_is_refused(tmp_path, other):
    """Other epochs are told by the models, another forget set of the same data by the oracles."""
    quick = [*QUICK, "--rows", "60", "--forget", "random", "--out", str(tmp_path)]
    run(quick)
    results = (
        "report.html",
        "metrics.json",
        "points-random.parquet",
        "unlearned/random/5.safetensors",
    )
    before = {name: (tmp_path / name).read_bytes() for name in results}
    with pytest.raises(SystemExit, match="choose another folder or delete this one"):
        run([*quick, *other])
    assert {name: (tmp_path / name).read_bytes() for name in results} == before
