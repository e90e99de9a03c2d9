"""recipes/debug_model.py as a user meets it: one command, the same again, a file of one's own, wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_wine

from recipes.data.classification import embedded
from recipes.debug_model import Flags, run
from recipes.reports.debugging import agreement, lines_of, medians, words_of
from recipes.work import debugging
from recipes.work.debugging import Asked

ROOT = Path(__file__).parents[1]
QUICK = [
    "--data",
    "breast_cancer",
    "--mistakes",
    "2",
    "--right",
    "2",
    "--most",
    "20",
    "--jobs",
    "1",
]


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_logistic_regression_from_start_to_report_and_again(tmp_path, capsys, monkeypatch):
    run([*QUICK, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    found, page = read(tmp_path), (tmp_path / "report.html").read_text()
    assert [x["label"] != x["said"] for x in found["decisions"]] == [True, True, False, False]
    data = debugging.data_of(Flags(data="breast_cancer"))
    table = pq.read_table(tmp_path / "decisions.parquet").to_pandas()
    for x, (_, kept) in zip(found["decisions"], table.iterrows(), strict=True):
        assert kept["id"] == x["id"]
        assert kept["rows"].tolist() == x["rows"]
        assert x["margin"] > 0
        assert x["most"] == 20
        assert f" {x['margin']:.2f} " in said
        if x["actual"] is not None:
            assert len(x["rows"]) == x["actual"] == kept["actual"]
            check_it_turns(data, x)
        else:
            assert np.isnan(kept["actual"])
    for words in found["words"]:
        assert words in said
    assert any(x["actual"] is not None for x in found["decisions"])
    assert "wrong label" in said
    groups = found["groups"]
    assert "Mistakes that hang on the same rows" in page
    own = np.diag(groups["actual"])
    assert (own < np.diag(groups["random"])).all()
    monkeypatch.setattr(debugging, "ask", None)  # nothing is asked again
    before = (tmp_path / "metrics.json").read_bytes()
    run([*QUICK, "--out", str(tmp_path)])
    assert (tmp_path / "metrics.json").read_bytes() == before


def check_it_turns(data, x):
    """Another fit, by scikit-learn alone, without the rows, and with the last of them."""
    from sklearn.linear_model import LogisticRegression

    held, _ = debugging.held_out(data)
    for rows, turned in ((x["rows"], True), (x["rows"][:-1], False)):
        left = np.setdiff1d(np.arange(len(data.x)), rows)
        fitted = LogisticRegression(C=1 / (0.001 * len(data.x)), tol=1e-6, max_iter=5000)
        fitted.fit(data.x[left], data.y[left])
        said = data.classes[fitted.predict(held[[x["id"]]])[0]]
        assert (said != x["said"]) == turned


def test_a_network_decides_by_its_seeds(tmp_path, capsys):
    flags = [
        "--width",
        "4",
        "--seeds",
        "2",
        "--epochs",
        "4",
        "--rounds",
        "1",
        "--mistakes",
        "1",
        "--right",
        "1",
    ]
    run(["--data", "breast_cancer", "--jobs", "1", "--most", "12", *flags, "--out", str(tmp_path)])
    facts = read(tmp_path)["facts"]
    assert (
        facts["retraining"] == "mean margin of 2 trainings by the same seeds, rows really removed"
    )
    assert "influence (EK-FAC), mean of 2 trainings" in facts["datamodel"]
    assert len(read(tmp_path)["decisions"]) == 2


def test_a_file_of_ones_own(tmp_path, capsys):
    wine = load_wine(as_frame=True)
    frame = wine.data.assign(
        kind=np.array(["red", "white", "rosé"])[wine.target], bottle=range(100, 278)
    )
    frame.to_csv(tmp_path / "wine.csv", index=False)
    flags = [
        "--data",
        str(tmp_path / "wine.csv"),
        "--label",
        "kind",
        "--ignore",
        "bottle",
        "--jobs",
        "1",
    ]
    run([*flags, "--mistakes", "1", "--right", "2", "--most", "10", "--out", str(tmp_path / "out")])
    said, found = capsys.readouterr().out, read(tmp_path / "out")
    assert {x["said"] for x in found["decisions"]} <= {"red", "white", "rosé"}
    assert found["groups"] is None  # hardly any mistake is made
    none = not any(x["said"] != x["label"] for x in found["decisions"])
    assert ("No mistake is among the decisions" in said) == none
    assert "wrong label" not in said
    shown = pd.read_csv(tmp_path / "wine.csv").kind
    for x in found["decisions"]:
        assert shown[x["id"]] == x["label"]  # the file's own row


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mistakes", "0", "--right", "0"], "expected decisions to ask about"),
        (["--most", "0"], "expected --most of at least 1, got 0"),
        (["--rounds", "0"], "expected --rounds of at least 1"),
        (["--groups", "0"], "expected --groups of at least 1"),
        (["--data", "nowhere.csv"], "no file nowhere.csv"),
    ],
)
def test_wrong_input_is_said_in_one_line(tmp_path, flags, words):
    with pytest.raises(SystemExit, match="error: ") as caught:
        run([*QUICK, *flags, "--out", str(tmp_path / "out")])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rare_class_keeps_a_row_and_a_report_of_other_settings_goes(tmp_path, capsys):
    wine = load_wine(as_frame=True)
    frame = wine.data.assign(kind=wine.target)
    frame = pd.concat([frame[frame.kind < 2], frame[frame.kind == 2].iloc[:8]])
    held = pd.concat([frame[frame.kind < 2].iloc[::4], frame[frame.kind == 2].iloc[:4]])
    train = frame.drop(held.index)
    for name, some in (("train", train), ("test", held)):
        some.to_csv(tmp_path / f"{name}.csv", index=False)
    flags = [
        "--data",
        str(tmp_path / "train.csv"),
        "--test",
        str(tmp_path / "test.csv"),
        "--label",
        "kind",
    ]
    flags += [
        "--jobs",
        "1",
        "--mistakes",
        "1",
        "--right",
        "1",
        "--groups",
        "60",
        "--out",
        str(tmp_path / "out"),
    ]
    run(flags)
    assert (
        "note: 3 rows are left out at most, not 100: more could be all rows of '2'"
        in capsys.readouterr().out
    )
    assert read(tmp_path / "out")["facts"]["rows left out"] == "3 at most"
    train[train.kind < 2].assign(kind=lambda x: x.kind).pipe(
        lambda x: pd.concat([x, train[train.kind == 2].iloc[:1]])
    ).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(
        SystemExit, match="two training rows of every class or more, got one of '2'"
    ):
        run(flags)
    train.to_csv(tmp_path / "train.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(debugging, "study", None)  # killed on the way
        with pytest.raises(TypeError):
            run([*flags, "--decay", "0.1"])
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom recipes.debug_model import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'sklearn'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--mistakes" in done.stdout


def asked(place, actual, near, said="1", predicted=None):
    numbers = {
        "predicted": actual if predicted is None else predicted,
        "actual": actual,
        "nearest": near,
    }
    rows = list(range(int(actual))) if np.isfinite(actual) else []
    return Asked(place, place, "0", said, 1.0, **numbers, random=np.inf, most=30, rows=rows)


def test_rows_in_metrics_are_those_of_the_file(tmp_path, capsys):
    """They were places after the split, beside ids and a table of rows of the file."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 2))
    kind = np.where(x[:, 0] + rng.normal(size=150) > 0, "yes", "no")
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "kind": kind})
    frame.to_csv(tmp_path / "mine.csv", index=False)
    mine = ["--data", str(tmp_path / "mine.csv"), "--label", "kind", "--jobs", "1"]
    run([*mine, "--mistakes", "2", "--right", "1", "--most", "20", "--out", str(tmp_path / "out")])
    said, found = capsys.readouterr().out, read(tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pandas()
    assert [x["rows"] for x in found["decisions"]] == [some.tolist() for some in table.rows]
    assert found["decisions"][0].keys() == set(table.columns)
    for x in found["decisions"]:
        shown = ", ".join(f"{i} ({kind[i]})" for i in x["rows"][:4])
        assert shown in said
    groups, page = found["groups"], (tmp_path / "out" / "report.html").read_text()
    assert all(", ".join(f"{i} ({kind[i]})" for i in some[:4]) in page for some in groups["rows"])
    trained = set(debugging.data_of(Flags(data=mine[1], label="kind")).places.tolist())
    assert len(groups["ids"]) == len(groups["group"])
    assert trained.isdisjoint(groups["ids"])
    assert {x["id"] for x in found["decisions"] if x["said"] != x["label"]} <= set(groups["ids"])


def test_words_count_what_is_in_the_table():
    data = embedded("breast_cancer", 0.1, 0, 0)
    some = [asked(0, 2, 8), asked(1, 4, 4), asked(2, np.inf, 9), asked(3, 6, 5, predicted=20)]
    assert medians(some[:3]).startswith(
        "to turn half of 3 takes 4 rows by the datamodel, 8 of the nearest and more than 30 random"
    )
    assert "half of 2 takes 2 rows" in medians([some[0], some[2]])
    assert "half of 1 takes more than 30 rows" in medians([some[2]])
    assert medians(some).endswith("fewer rows than the nearest in 1, more in 2.")
    assert "in 2 of the 3 decisions" in agreement(some)
    lines = lines_of(data, some)
    assert [line[5] for line in lines] == ["2", "4", "6", "> 30"]
    assert lines[2][-1].endswith(", 2 more")
    wrong = data.bad[:6].mean()
    assert (
        f"Of the 6 training rows that mistakes hang on, {100 * wrong:.0f} % have a wrong label"
        in words_of(data, some)[-1]
    )
