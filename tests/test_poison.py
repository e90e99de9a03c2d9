"""recipes/poison.py as a user meets it: one command, the same again, a file of one's own, wrong input."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_breast_cancer

from applied.pictures import digits
from applied.recipe import paired_interval
from recipes.data.classification import embedded
from recipes.poison import run
from recipes.reports.poisoning import print_table, rows_of, write_report
from recipes.work import poisoning
from recipes.work.poisoning import ATTACKS, Emptied, Outcome, parted

ROOT = Path(__file__).parents[1]
QUICK = ["--data", "breast_cancer", "--splits", "2", "--jobs", "1", "--budgets", "0.1", "--rounds", "2"]  # fmt: skip
NETWORK = ["--width", "4", "--victims", "2", "--epochs", "1", "--batch-size", "75"]
DETECTORS = ("loss", "self-influence", "influence on trusted rows", "neighbours", "combined")


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def splits(folder, attack):
    """What was kept of every split."""
    found = sorted((folder / "splits").glob(f"*-{attack.replace(' ', '-')}-*.json"))
    return [json.loads(path.read_text()) for path in found]


def check_files(folder, said):
    """Table, report, metrics and parquet hold the same numbers, those of the splits."""
    rows = read(folder)["rows"]
    assert [row["attack"] for row in rows] == list(ATTACKS)
    page = (folder / "report.html").read_text()
    table = pq.read_table(folder / "outcomes.parquet").to_pandas()
    assert len(table) == 2 * len(ATTACKS)
    for row in rows:
        kept = splits(folder, row["attack"])
        target = paired_interval([x["changed"]["target loss"] for x in kept])
        assert row["target"] == pytest.approx(vars(target))
        half = target.high - target.mean
        line = next(x for x in said.splitlines() if f"10 %  {row['attack']} " in x)
        points = 100 * np.mean([x["changed"]["held-out accuracy"] for x in kept])
        assert f" {points:+.1f} ±" in line
        assert f" {target.mean:+.3f} ±{half:.3f} " in line
        assert digits(target.mean) in page
        mine = table[table.attack == row["attack"]]
        assert mine["changed.target loss"].mean() == pytest.approx(target.mean)
        assert tuple(row["auc"]) == tuple(sorted(DETECTORS))
        for detector, value in row["auc"].items():
            assert value == pytest.approx(mine[f"auc.{detector}"].mean())
            star = "*" if value == max(row["auc"].values()) else ""
            assert f"{value:.4f}{star}" in line
            assert f"{value:.4f}{star}" in page
        assert f"{mine.removed.mean():.0f} / {mine.caught.mean():.0f}" in line
        assert_recovered(row["recovered"]["mean"], kept, page)
        assert row["random"] == pytest.approx(mine["random.target loss"].mean())
    clean = table["clean.held-out loss"].mean()
    assert f"held-out loss {clean:.4f}" in said
    assert "2 splits" in said
    assert page.count("<img") == 3 + len(ATTACKS) + 1
    for words in ("An audit of your own model", "other labels to 10 %", "may change labels of 0.1"):  # fmt: skip
        assert words in page
    return rows


def assert_recovered(told, kept, page):
    """What came back of all damage, or a dash where there was hardly any, or none that can be told."""
    damage = [x["changed"]["held-out loss"] for x in kept]
    back = [d * x["recovered"]["held-out loss"] for d, x in zip(damage, kept, strict=True)]
    clean = np.mean([x["clean"]["held-out loss"] for x in kept])
    untold = len(damage) > 2 and paired_interval(damage).low <= 0
    if np.mean(damage) <= 0.01 * clean or untold:
        assert told is None
    else:
        assert told == pytest.approx(sum(back) / sum(damage))
        assert digits(told) in page


def test_logistic_regression_from_start_to_report_and_again(tmp_path, capsys, monkeypatch):
    run([*QUICK, "--out", str(tmp_path)])
    rows = check_files(tmp_path, said := capsys.readouterr().out)
    assert "Judged on one victim an attack and split, fitted to the optimum." in said
    by = {row["attack"]: row for row in rows}
    assert by["in rounds"]["target"]["mean"] > 2 * by["in rounds"]["random"] > 0
    for name in ("random", "confident"):
        assert by[name]["predicted"] is None
    ratio = by["in rounds"]["predicted"] / by["in rounds"]["target"]["mean"]
    assert f"in rounds at 10 % {100 * ratio - 100:+.0f} %" in said
    assert all(row["auc"]["combined"] > 0.9 for row in rows)

    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "splits").iterdir()}
    metrics = read(tmp_path)
    monkeypatch.setattr(poisoning, "judged", None)  # would be called to attack and to retrain
    run([*QUICK, "--out", str(tmp_path)])
    assert capsys.readouterr().out == said
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "splits").iterdir()} == kept
    assert read(tmp_path) == metrics


def outcome_of(split, damage, recovered):
    """An outcome of which only the held-out loss matters."""
    held = "held-out loss"
    return Outcome(
        split=split, budget=0.1, attack="random", rows=3, clean={held: 0.5}, changed={held: damage}, random={},
        predicted={}, auc={}, suspects=1, removed=1, caught=1, spared=[], recovered={held: recovered}, by_random={}, possible={}, curves={},
    )  # fmt: skip


def test_what_came_back_is_not_ruled_by_splits_of_hardly_any_damage():
    from recipes.reports.poisoning import comes_back

    pairs = [(0.2, 0.8), (0.1, 0.5), (0.15, 0.6), (0.18, 0.9), (0.0001, 2309.96)]
    some = [outcome_of(split, *pair) for split, pair in enumerate(pairs)]
    shares = comes_back(some, "recovered")
    gains = sum(damage * share for damage, share in pairs)
    assert np.mean(shares) == pytest.approx(gains / 0.6301)
    assert comes_back(some, "by_random") == []  # nothing was removed
    more = comes_back([*some, outcome_of(5, -0.01, 0.5)], "recovered")
    assert np.mean(more) == pytest.approx((gains - 0.005) / 0.6201)
    assert comes_back([outcome_of(0, 0.004, 0.5)], "recovered") == []  # under a hundredth of .5


def test_nothing_is_said_to_come_back_of_damage_that_is_not_told_from_none():
    from recipes.reports.poisoning import comes_back, spread

    some = [outcome_of(split, damage, 0.5) for split, damage in enumerate((0.3, -0.2, -0.05))]
    assert comes_back(some, "recovered") == []  # a mean above the limit, whose interval holds 0
    held = "held-out loss"
    several = [
        made_up(split, changed={**made_up().changed, held: damage})
        for split, damage in enumerate((0.3, -0.2, -0.05))
    ]
    row = rows_of(several)[0]
    assert spread(row.recovered, ".2f") == spread(row.possible, ".2f") == "-"
    assert comes_back([outcome_of(0, 0.3, 0.5)], "recovered") == [0.5]  # one split has no interval


def test_a_network_is_judged_on_fresh_victims(tmp_path, capsys):
    run([*QUICK, *NETWORK, "--out", str(tmp_path)])
    check_files(tmp_path, said := capsys.readouterr().out)
    assert "Judged on 2 victims an attack and split, fresh seeds." in said
    assert read(tmp_path)["facts"]["model"] == "hidden layer of 4"


def written(tmp_path, rows=200):
    """A user's table in a file."""
    x, y = load_breast_cancer(return_X_y=True)
    frame = pd.DataFrame(
        {"radius": x[:, 0], "texture": x[:, 1], "outcome": np.where(y, "benign", "malignant")}
    )
    frame.iloc[:rows].to_csv(tmp_path / "mine.csv", index=False)
    return ["--data", str(tmp_path / "mine.csv"), "--label", "outcome"]


def test_a_file_of_ones_own_and_one_split(tmp_path, capsys):
    own = [*written(tmp_path), "--splits", "1", "--jobs", "1", "--budgets", "0.1", "--rounds", "1"]
    run([*own, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "1 split." in said
    assert "±" not in said
    assert read(tmp_path / "out")["facts"]["data"] == "mine.csv"
    assert read(tmp_path / "out")["rows"][0]["rows"] == 12  # a tenth of three fifths of 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budgets", "0"], "expected budgets in (0, 1), shares of the labels, got (0.0,)"),
        (["--budgets", "0.1", "1"], "expected budgets in (0, 1)"),
        (["--budgets", "0.0001"], "expected a budget of 1 to 300 rows"),
        (["--splits", "0"], "expected at least one of --splits, got 0"),
        (["--rounds", "0"], "expected at least one of --rounds, got 0"),
        (["--data", "nothing.csv"], "no file nothing.csv; give a .parquet or .csv file, 'digits'"),
        (["--data", __file__], "expected a .parquet or .csv file, 'digits'"),
        (["--data", "OWN", "--label", "diagnosis"], "expected columns ['diagnosis']"),
    ],
)
def test_wrong_input_is_said_in_one_line(tmp_path, flags, words):
    written(tmp_path)
    given = [str(tmp_path / "mine.csv") if flag == "OWN" else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        run([*QUICK, *given, "--out", str(tmp_path / "out")])
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("data", ["nothing.csv", __file__])
def test_no_folder_is_made_for_data_that_are_not_there(tmp_path, data):
    with pytest.raises(SystemExit, match=r"no file nothing|expected a \.parquet or \.csv file"):
        run([*QUICK, "--data", data, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "OWN", "--label", "diagnosis"], r"expected columns \['diagnosis'\]"),
        (
            ["--data", "OWN", "--label", "outcome", "--budgets", "0.001"],
            "a budget of 1 to 120 rows",
        ),
    ],
)
def test_input_is_looked_at_before_a_bar_begins_and_a_folder_is_made(
    tmp_path, capsys, flags, words
):
    written(tmp_path)
    given = [str(tmp_path / "mine.csv") if flag == "OWN" else flag for flag in flags]
    with pytest.raises(SystemExit, match=words):
        run([*QUICK, *given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "splits x budgets" not in capsys.readouterr().err


def test_held_out_rows_that_are_trained_on_stand_in_the_report(tmp_path):
    own = [*written(tmp_path, 60), "--test", str(tmp_path / "mine.csv")]
    quick = ["--splits", "1", "--jobs", "1", "--budgets", "0.1", "--rounds", "1"]
    run([*own, *quick, "--out", str(tmp_path / "out")])
    facts = read(tmp_path / "out")["facts"]
    assert facts["held-out rows that are also training rows"] == "60 of 60"
    assert facts["features"].startswith("2 columns (radius, texture)")
    assert "held-out rows that are also training rows" in (tmp_path / "out/report.html").read_text()


def test_suspects_that_are_a_whole_class_are_not_removed_and_it_is_said(
    tmp_path, capsys, monkeypatch
):
    """Every row of the small class is disputed: nothing is removed; what the best removal does is known all the same."""
    found = poisoning.detect

    def whole(x, y, **given):
        told = found(x, y, **given)
        small = y == np.bincount(y).argmin()
        return replace(told, scores={**told.scores, "combined": np.where(small, 1.0, -1.0)})

    monkeypatch.setattr(poisoning, "detect", whole)
    quick = ["--splits", "1", "--jobs", "1", "--budgets", "0.1", "--rounds", "1"]
    run([*written(tmp_path), *quick, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    table = pq.read_table(tmp_path / "out" / "outcomes.parquet").to_pandas()
    assert (table.suspects > 0).all()
    assert table.removed.tolist() == table.caught.tolist() == [0] * len(ATTACKS)
    assert table["recovered.held-out loss"].isna().all()
    assert table["by_random.held-out loss"].isna().all()
    assert np.isfinite(table["possible.held-out loss"]).all()
    for row, (_, kept) in zip(read(tmp_path / "out")["rows"], table.iterrows(), strict=True):
        line = next(x for x in said.splitlines() if f"10 %  {row['attack']} " in x)
        assert re.search(r" 0 / 0 +- +\S+$", line)
        if row["possible"]["mean"] is not None:
            assert line.endswith(f"{kept['possible.held-out loss']:.2f}")
        told = f"{row['attack']} at 10 % in split 0 ({kept['suspects']} suspects, class '{kept['spared'][0]}')"
        assert told in said
    assert "Nothing was removed where that" in said
    assert "Nothing was removed where that" in (tmp_path / "out" / "report.html").read_text()


def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys, recipes.poison as r\n"
        "try: r.run(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--budgets" in done.stdout


def made_up(split=0, attack="one shot", auc=(0.7, 0.8), **other):
    """An outcome in round numbers."""
    names = ("target loss", "held-out loss", "held-out accuracy")
    curves = {name: ([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]) for name in ("combined", "loss")}
    given = {
        "split": split, "budget": 0.05, "attack": attack, "rows": 5,
        "clean": dict(zip(names, (0.5, 0.4, 0.9), strict=True)),
        "changed": dict(zip(names, (0.2 + 0.1 * split, 0.1, -0.02), strict=True)),
        "random": dict.fromkeys(names, 0.01), "predicted": {"target loss": 0.125, "held-out loss": 0.15},
        "auc": dict(zip(("combined", "loss"), auc, strict=True)), "suspects": 8, "removed": 8, "caught": 4, "spared": [],
        "recovered": dict.fromkeys(names, 0.75), "by_random": dict.fromkeys(names, -0.5), "possible": dict.fromkeys(names, 0.9), "curves": curves,
    }  # fmt: skip
    return Outcome(**{**given, **other})


def test_rows_are_means_and_the_combined_detector_comes_last():
    first, second = rows_of([made_up(0), made_up(0, "in rounds"), made_up(1), made_up(1, "in rounds")])[:2]  # fmt: skip
    assert (first.attack, second.attack) == ("one shot", "in rounds")
    assert first.accuracy.mean == pytest.approx(-2)  # points
    assert vars(first.target) == pytest.approx(vars(paired_interval([0.2, 0.3])))
    assert list(first.auc) == ["loss", "combined"]


def test_the_table_says_which_detector_won_and_how_good_predictions_were(capsys):
    print_table([made_up(), made_up(attack="in rounds", auc=(0.9, 0.8))])
    said = capsys.readouterr().out
    assert "best in 1 of 2 rows; not in one shot at 5 %: loss 0.8000, combined 0.7000." in said
    assert "of the target loss: one shot at 5 % -38 %" in said  # .125 / .2 − 1
    assert "of the held-out loss: one shot at 5 % +50 %" in said  # the dashes of its picture
    assert "accuracy is 0.9000, held-out loss 0.4000 and target loss 0.5000" in said
    lines = said.splitlines()
    assert len({line.index("8 / 4") for line in lines if "8 / 4" in line}) == 1
    print_table([made_up(auc=(0.8, 0.8))])
    assert "The combined detector was the best in every row (1 of 1)." in capsys.readouterr().out


def test_nobody_suspected_and_nothing_predicted(tmp_path, capsys):
    from recipes.poison import Flags

    none = {
        "predicted": {},
        "suspects": 0,
        "removed": 0,
        "caught": 0,
        "recovered": {},
        "by_random": {},
        "possible": {},
    }
    outcomes = [made_up(k, **none) for k in range(2)]
    print_table(outcomes)
    write_report(replace(Flags(), out=tmp_path), embedded("digits", 0.0, 0, 0), outcomes)
    said = capsys.readouterr().out
    assert "nothing was predicted" in said
    line = next(x for x in said.splitlines() if "one shot" in x)
    assert re.search(r"0 / 0 +- +-$", line)
    assert "nan" not in said
    assert read(tmp_path)["rows"][0]["recovered"]["mean"] is None
    assert pq.read_table(tmp_path / "outcomes.parquet").num_rows == 2


def test_an_attack_that_takes_a_class_away_does_not_cost_the_others(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 25, 300)
    x = np.c_[np.cos(y), np.sin(y), y / 10] + 0.1 * rng.normal(size=(300, 3))
    pd.DataFrame(x, columns=list("abc")).assign(label=y).to_csv(tmp_path / "many.csv", index=False)
    flags = [
        "--data",
        str(tmp_path / "many.csv"),
        "--splits",
        "1",
        "--jobs",
        "1",
        "--budgets",
        "0.1",
    ]
    flags += ["--rounds", "2", "--out", str(tmp_path / "out")]
    run(flags)
    said = capsys.readouterr().out
    words = "no row of a class, without which nothing can be fitted: "
    assert words in said
    assert words in (tmp_path / "out" / "report.html").read_text()
    judged = [row["attack"] for row in read(tmp_path / "out")["rows"]]
    assert 0 < len(judged) < len(ATTACKS)
    told = said.split(words)[1]
    assert all((f"{name} at 10 % in split 0 ('" in told) != (name in judged) for name in ATTACKS)
    monkeypatch.setattr(poisoning, "judged", None)  # would be called to attack again
    run(flags)
    assert capsys.readouterr().out == said


def test_an_attack_is_left_out_where_it_took_a_class_in_any_split(tmp_path, capsys):
    from recipes.poison import Flags

    found = [
        made_up(split, name, budget=budget)
        for split in range(2)
        for budget in (0.05, 0.1)
        for name in ("random", "one shot")
    ]
    found[-1] = Emptied(1, 0.1, "one shot", ["rare"])
    outcomes, lost = parted(found)
    assert len(outcomes) == 6
    assert [(x.budget, x.attack) for x in outcomes].count((0.1, "one shot")) == 0
    print_table(outcomes, lost)
    write_report(replace(Flags(), out=tmp_path), embedded("digits", 0.0, 0, 0), outcomes, lost)
    assert "one shot at 10 % in split 1 ('rare')" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text().count("<img") == 3 + 1 + 1
    with pytest.raises(ValueError, match=r"leaves rows of every class, got none.*\['rare'\]"):
        parted([made_up(0), Emptied(1, 0.05, "one shot", ["rare"])])
