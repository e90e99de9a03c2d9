"""recipes/value_data.py as a user meets it: one command, the same again, a file of one's own, wrong input."""

import contextlib
import html
import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_breast_cancer

from applied import value_pictures
from applied.valuation import Values
from attribution_core import LinearDatamodel
from recipes import poison, unlearn
from recipes.data import forget_sets
from recipes.data.classification import embedded, facts_of, from_file
from recipes.data.tasks import table_task
from recipes.reports.valuation import _ends, payments_of, purchase_of, removal, rows_of, verdict
from recipes.value_data import Flags, run
from recipes.value_data import main as value_main
from recipes.work import poisoning, valuing
from recipes.work.valuing import Owned, Valued, bought, paid, seeds_of_owners, start, value_owners

QUICK = [
    "--retrainings",
    "30",
    "--points",
    "3",
    "--epochs",
    "4",
    "--seeds",
    "2",
    "--remove",
    "0.1",
    "--jobs",
    "1",
    "--width",
    "8",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::attribution_core.RemainderWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]


def test_embedded_data_from_start_to_report(tmp_path, capsys):
    flags = [
        *QUICK,
        "--data",
        "breast_cancer",
        "--owners",
        "4",
        "--mislabel",
        "0.2",
        "--out",
        str(tmp_path),
    ]
    run(flags)
    said = capsys.readouterr().out
    for words in (
        "held-out margin",
        "self-confidence (control)",
        "payment",
        "actual - random",
        "Without the worst 10 %: ",
        "written to",
    ):
        assert words in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["rows"]["held-out margin"]["auc"] > 0.8
    assert 0.3 < metrics["rows"]["random (control)"]["auc"] < 0.7
    for name in ("influence", "random (control)"):  # of 135 test rows
        assert abs(metrics["rows"][name]["accuracy"]["mean"]) < 30
    assert sum(metrics["owners"]["payments"].values()) == pytest.approx(1000)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 5
    for heading in (
        "What each method finds",
        "Wrong labels found",
        "Owners",
        "Sharing 1000",
        "Buying half",
        "training rows",
    ):
        assert heading in page
    held = pq.read_table(tmp_path / "rows-held-out-margin.parquet")
    assert held.column_names == ["player", "value", "standard_error"]
    assert held.num_rows == 300
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    assert len(before) > 50
    run(flags)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")} == before
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def written(tmp_path, rows=160, **more):
    """A user's table: two numbers, a word, a label in words, an owner."""
    x, y = load_breast_cancer(return_X_y=True)
    frame = pd.DataFrame({
        "radius": x[:rows, 0], "texture": x[:rows, 1], "side": np.where(x[:rows, 4] > 0.1, "left", "right"),
        "outcome": np.where(y[:rows] == 1, "benign", "malignant"), "hospital": [f"h{i % 12}" for i in range(rows)],
        **more,
    })  # fmt: skip
    path = tmp_path / "mine.csv"
    frame.to_csv(path, index=False)
    return path, frame


def test_a_file_of_ones_own_with_many_owners(tmp_path, capsys):
    path, frame = written(tmp_path)
    frame.iloc[:40].to_parquet(tmp_path / "held.parquet")
    run(
        [*QUICK, "--data", str(path), "--label", "outcome", "--owner", "hospital", "--test", str(tmp_path / "held.parquet"),
         "--exact", "4", "--budget", "500", "--floor", "5", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["owners"]["payments"]) == 12  # by permutations: more than --exact
    assert min(metrics["owners"]["payments"].values()) >= 5 - 1e-6
    assert sum(metrics["owners"]["payments"].values()) == pytest.approx(500)
    assert "auc" not in metrics["rows"]["held-out margin"]  # nobody knows which labels are wrong
    assert ">AUC<" not in (tmp_path / "out" / "report.html").read_text()


def test_tables_are_made_ready(tmp_path):
    path, frame = written(tmp_path)
    data = from_file(str(path), "outcome", "hospital", None, 0)
    assert data.x.shape == (96, 4)  # two numbers, two indicators
    assert data.classes == ["benign", "malignant"]
    assert len(data.target_y) + len(data.test_y) == 64
    np.testing.assert_allclose(data.x[:, :2].mean(0), 0, atol=1e-5)
    assert set(data.owners) == set(frame["hospital"])
    assert data.bad is None
    kept = frame.iloc[data.places]  # rows are called what they are in the file
    assert (data.owners == kept["hospital"]).all()
    assert (np.array(data.classes)[data.y] == kept["outcome"]).all()


def test_held_out_rows_are_called_what_they_are_in_their_file(tmp_path):
    path, frame = written(tmp_path)
    other = frame.iloc[::-1].iloc[:60]
    for test, there in ((None, frame), (saved(tmp_path, other, "held.csv"), other)):
        data = from_file(str(path), "outcome", "hospital", test, 0)
        held = there.iloc[data.held_places]
        y = np.concatenate([data.target_y, data.test_y])
        x = np.concatenate([data.target_x, data.test_x])[:, 0]
        assert (np.array(data.classes)[y] == held["outcome"]).all()
        assert np.corrcoef(x, held["radius"])[0, 1] > 1 - 1e-6
    assert embedded("digits", 0.0, 1, 0).held_places.tolist() == list(range(797))


def test_embedded_owners_are_unequal_and_spoiled():
    data = embedded("digits", 0.0, 10, 0)
    names, size = np.unique(data.owners, return_counts=True)
    assert len(names) == 10
    assert size.max() > 8 * size.min()
    share = [data.bad[data.owners == name].mean() for name in names]
    assert share[1] == 1.0
    np.testing.assert_allclose([share[3], share[6]], [0.5, 0.3], atol=0.02)
    assert sum(share) == pytest.approx(share[1] + share[3] + share[6])
    none = embedded("digits", 0.1, 0, 0)
    assert len(np.unique(none.owners)) == 1
    assert none.bad.sum() == 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nothing.csv"], "no file nothing.csv; give a .parquet or .csv file, 'digits'"),
        (["--data", __file__], "expected a .parquet or .csv file, 'digits'"),
        (["--data", "MINE", "--label", "result"], "expected columns ['result']"),
        (
            ["--data", "MINE", "--label", "outcome", "--owner", "clinic"],
            "expected columns ['clinic']",
        ),
        (
            ["--data", "HOLES", "--label", "outcome"],
            "expected no empty cells, got some in ['radius']",
        ),
        (["--data", "SMALL", "--label", "outcome"], "expected at least 20 training rows"),
        (["--data", "MINE", "--label", "one"], "expected two classes or more in 'one'"),
        (
            ["--data", "MINE", "--label", "outcome", "--test", "LESS"],
            "expected columns ['texture'] in",
        ),
        (["--remove", "1.5"], "expected --remove of shares between 0 and 1, got [1.5]"),
        (["--remove"], "expected --remove of shares"),
        (
            ["--data", "MINE", "--label", "outcome", "--remove", ".1", ".004"],
            "expected --remove of at least one of 96 rows (0.01), got 0.004",
        ),
        (["--seeds", "0"], "expected --seeds of at least 1, got 0"),
        (["--width", "-1"], "expected --width of at least 0, got -1"),
        (["--budget", "0"], "expected --budget of at least"),
        (
            ["--data", "MINE", "--label", "outcome", "--retrainings", "2"],
            "expected --retrainings on so many random halves that each training row is left out of one, got 2,",
        ),
        (["--floor", "101"], "that 10 owners can be paid with, got a floor of 101"),
        (["--cap", "99"], "and a cap of 99 each"),
        (["--out", "MINE"], "File exists"),
    ],
)
def test_wrong_input_is_said_in_one_line(tmp_path, flags, words):
    path, frame = written(tmp_path, one="same")
    frame.drop(columns="texture").to_csv(tmp_path / "less.csv", index=False)
    frame.loc[3, "radius"] = np.nan
    frame.to_csv(tmp_path / "holes.csv", index=False)
    frame.iloc[4:20].to_csv(tmp_path / "small.csv", index=False)
    files = {
        "MINE": str(path),
        "HOLES": str(tmp_path / "holes.csv"),
        "SMALL": str(tmp_path / "small.csv"),
        "LESS": str(tmp_path / "less.csv"),
    }
    with pytest.raises(SystemExit) as stopped:
        run(["--out", str(tmp_path / "out"), *(files.get(flag, flag) for flag in flags)])
    assert words in str(stopped.value)


def test_shares_are_taken_in_order_and_once(tmp_path, monkeypatch):
    """In another order the picture went back and forth, and its caption and the verdict named another share."""
    given = []
    monkeypatch.setattr(valuing, "start", lambda flags, data: given.append(flags.remove) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([*QUICK, "--out", str(tmp_path), "--remove", "0.3", "0.05", "0.3"])
    assert given == [(0.05, 0.3)]


def saved(tmp_path, frame, name="own.csv"):
    frame.to_csv(tmp_path / name, index=False)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Unnamed: 0": range(160)}, r"that name or number rows: \['Unnamed: 0'\]"),
        ({"patient": [f"p{k}" for k in range(160)]}, r"--ignore patient"),
        ({"outcome": np.linspace(0, 1, 160)}, "160|96 different numbers"),
        ({"outcome": range(160)}, "96 different numbers in 96 rows; these recipes are for classes"),
        ({"day": range(1, 161)}, r"that name or number rows: \['day'\]"),
        ({"radius": [1e300, *range(159)]}, "numbers that float32 holds"),
    ],
)
def test_columns_that_are_no_features_and_labels_that_are_no_classes(tmp_path, change, words):
    _, frame = written(tmp_path)
    path = saved(tmp_path, frame.assign(**change))

    with pytest.raises(ValueError, match=words):
        from_file(path, "outcome", "hospital", None, 0)


def test_ignored_columns_are_no_features(tmp_path):
    _, frame = written(tmp_path)
    plain = from_file(saved(tmp_path, frame), "outcome", "hospital", None, 0)
    more = frame.assign(id=range(160), visit=[f"2020-01-{k}" for k in range(160)])
    data = from_file(saved(tmp_path, more), "outcome", "hospital", None, 0, ("id", "visit"))
    np.testing.assert_array_equal(data.x, plain.x)
    assert data.features == plain.features
    assert str(plain.x.shape[1]) in facts_of(data)["features"]
    with pytest.raises(ValueError, match="nothing else needs"):
        from_file(saved(tmp_path, more), "outcome", None, None, 0, ("outcome",))
    with pytest.raises(ValueError, match=r"expected columns \['visits'\]"):
        from_file(saved(tmp_path, more), "outcome", None, None, 0, ("visits",))


def test_columns_that_the_held_out_file_alone_has_are_left_out(tmp_path):
    _, frame = written(tmp_path)
    path, plain = saved(tmp_path, frame), saved(tmp_path, frame.iloc[:40], "held.csv")
    without = from_file(path, "outcome", "hospital", plain, 0)
    more = frame.assign(note=["seen", *[None] * 159], hospital=None).iloc[:40]
    held = saved(tmp_path, more, "more.csv")
    for ignore in ((), ("note",)):
        data = from_file(path, "outcome", "hospital", held, 0, ignore)
        np.testing.assert_array_equal(data.test_x, without.test_x)
        assert data.features == without.features
    with pytest.raises(ValueError, match=r"expected columns \['notes'\]"):
        from_file(path, "outcome", "hospital", held, 0, ("note", "notes"))
    holes = saved(tmp_path, more.assign(texture=None), "more.csv")
    with pytest.raises(ValueError, match=r"got some in \['texture'\]"):
        from_file(path, "outcome", "hospital", holes, 0)


@pytest.mark.parametrize("names", [["0012", "12", "1E3", "1000"], ["true", "True", "TRUE"]])
def test_owners_are_the_words_of_the_file(tmp_path, names):
    """pandas read 0012 and 12 as one number, so that two owners were paid as one."""
    _, frame = written(tmp_path)
    frame["hospital"] = np.resize(names, 160)
    data = from_file(saved(tmp_path, frame), "outcome", "hospital", None, 0)
    assert sorted(set(data.owners)) == sorted(names)
    assert (data.owners == frame["hospital"].to_numpy()[data.places]).all()
    frame.loc[7, "hospital"] = None
    with pytest.raises(ValueError, match=r"expected no empty cells, got some in \['hospital'\]"):
        from_file(saved(tmp_path, frame), "outcome", "hospital", None, 0)


@pytest.mark.parametrize("forms", [["01", "1"], ["1", "1.0"], ["TRUE", "True"]])
def test_labels_of_one_value_are_written_in_one_way(tmp_path, forms):
    _, frame = written(tmp_path)
    other = "False" if forms[0] == "TRUE" else "2"
    both = saved(tmp_path, frame.assign(outcome=[*forms, other, other] * 40))
    message = rf"'outcome' of .*own.csv that are written in one way each, got .*'{forms[1]}'"
    with pytest.raises(ValueError, match=message):
        from_file(both, "outcome", "hospital", None, 0)
    one = saved(tmp_path, frame.assign(outcome=[forms[0], other] * 80), "one.csv")
    two = saved(tmp_path, frame.assign(outcome=[forms[1], other] * 80), "two.csv")
    assert (
        from_file(one, "outcome", "hospital", two, 0).repeated == 160
    )  # across files values agree
    with pytest.raises(ValueError, match=message):
        from_file(one, "outcome", "hospital", both, 0)


def test_files_that_hold_no_table_are_named(tmp_path):
    for name, content in (("empty.csv", ""), ("ragged.csv", "a,b\n1,2\n1,2,3\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"expected a table in .*{name}, got none: "):
            from_file(str(tmp_path / name), "outcome", None, None, 0)


def test_an_owner_whose_rows_are_all_held_out_is_told(tmp_path):
    _, frame = written(tmp_path)
    path = saved(tmp_path, frame)
    held = np.setdiff1d(np.arange(160), from_file(path, "outcome", None, None, 0).places)
    frame.loc[held[:2], "hospital"] = "lone"
    path = saved(tmp_path, frame)
    with pytest.raises(ValueError, match=r"of every owner in .* got none of \['lone'\]"):
        from_file(path, "outcome", "hospital", None, 0)
    data = from_file(path, "outcome", "hospital", path, 0)  # with a test file all rows train
    assert "lone" in data.owners


def test_files_that_do_not_go_together(tmp_path):
    _, frame = written(tmp_path)
    train = saved(tmp_path, frame)
    other = frame.assign(radius=[f"about {x:.0f}" for x in frame["radius"]])
    with pytest.raises(ValueError, match=r"numbers in one and text in the other in \['radius'\]"):
        from_file(train, "outcome", "hospital", saved(tmp_path, other, "held.csv"), 0)
    coded = frame.assign(outcome=(frame["outcome"] == "benign").astype(int))
    held = saved(tmp_path, coded.assign(outcome=coded["outcome"].astype(float)), "held.csv")
    data = from_file(saved(tmp_path, coded), "outcome", "hospital", held, 0)
    assert data.classes == ["0", "1"]  # 1.0 is the label 1
    assert data.repeated == 160
    assert facts_of(data)["held-out rows that are also training rows"] == "160 of 160"
    (tmp_path / "latin.csv").write_bytes("outcome,ort\na,Köln\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv in UTF-8"):
        from_file(str(tmp_path / "latin.csv"), "outcome", None, None, 0)
    frame.assign(radius=[[1.0, 2.0]] * 160).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"got \{'radius': 'ndarray'\}"):
        from_file(str(tmp_path / "lists.parquet"), "outcome", "hospital", None, 0)


def owned(tmp_path, values, sizes, **more):
    """Payments and a purchase of owners of these values and sizes."""
    labels = np.repeat([f"o{k}" for k in range(len(sizes))], sizes)
    worth = Values(
        values, [0.1] * len(values), np.unique(labels), [[v] for v in values], labels=labels
    )
    flags = Flags(out=tmp_path, **more)
    study = SimpleNamespace(flags=flags, data=SimpleNamespace(owners=labels))
    return {"retraining": worth}, paid(flags, worth), bought(study, worth)


def test_shares_and_small_payments_keep_their_digits(tmp_path, capsys):
    flags, labels = Flags(out=tmp_path, budget=0.02, remove=(0.125,)), np.repeat(["o0", "o1"], 10)
    worth = Values([3.0, 1.0], [0.1, 0.1], ["o0", "o1"], [[3.0], [1.0]], labels=labels)
    study = SimpleNamespace(flags=flags, data=SimpleNamespace(owners=labels, bad=None))
    both = Owned({"retraining": worth}, paid(flags, worth), "")
    (table,) = payments_of(study, both)[0]["Sharing 0.02"]
    assert "0.0147 to 0.0152" in table  # 0 to 0, as whole numbers
    assert "0.01500  " in capsys.readouterr().out  # of the owner of three quarters
    one = {"influence": Values([1.0, 2.0], [0.0] * 2, [0, 1], np.zeros((2, 1)))}
    valued = Valued(one, {"influence": ""}, None, 0.0)
    losses, right = np.array([[1.0, 1.1], [1.0, 1.2]]), np.array([[0.9, 0.88], [0.9, 0.86]])
    removed = {"influence": losses, "random (control)": losses}
    sections, _ = rows_of(study, valued, removed, {"influence": right})
    _, table, _ = sections["What each method finds"]
    assert "accuracy, points, change" in table
    assert ">-3.0" in table.replace("−", "-")
    assert "without the worst 12.5%, change" in table


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.004, 0.01, "-0.00400 to 0.0100"),  # -0 to
        (9.996, 99.96, "10.0 to 100"),  # a digit more than three
        (0.999, 9.999, "0.999 to 10.0"),
        (0.0, 12345.0, "0 to 12345"),
        (-5.0, 0.00123, "-5.00 to 0.00123"),
    ],
)
def test_ends_have_three_digits(low, high, words):
    assert _ends(low, high) == words


def test_owners_who_cannot_be_paid_or_bought_from_do_not_cost_the_report(tmp_path, capsys):
    for values, sizes, more, unpaid, unbought in (
        ([-1.0, -2.0], [10, 10], {}, "do not lower the loss (worth -3)", "there are none"),
        ([3.0, -2.0], [80, 20], {"cap": 300.0}, "at most 300", "the cheapest of them costs 80"),
        ([2.0, -2.0], [10, 10], {}, "do not lower the loss (worth 0)", "means good or bad"),
    ):
        found = owned(tmp_path, values, sizes, **more)
        assert unpaid in found[1]
        assert unbought in found[2]
        study = SimpleNamespace(flags=Flags(out=tmp_path), data=None)
        for sections, metrics in (
            payments_of(study, Owned(*found)), purchase_of(Owned(*found)),
        ):  # fmt: skip
            assert len(sections) == len(metrics) == 1
    said = capsys.readouterr().out
    assert "nobody is paid: expected caps" in said
    assert "nothing is bought: no owner" in said


def test_tables_that_are_as_they_should_be(tmp_path):
    """Years that go up, few rows of many classes, labels of which the held-out file has the whole ones alone."""
    _, frame = written(tmp_path)
    data = from_file(
        saved(tmp_path, frame.assign(year=range(1860, 2020))), "outcome", "hospital", None, 0
    )
    assert "year" in data.features
    many = frame.assign(outcome=[k % 16 for k in range(160)])
    for seed in range(3):
        data = from_file(saved(tmp_path, many), "outcome", "hospital", None, seed)
        assert len(data.classes) == 16
    many = frame.assign(outcome=[k % 25 for k in range(160)])
    assert len(from_file(saved(tmp_path, many), "outcome", "hospital", None, 0).classes) == 25
    few = frame.iloc[:34].assign(outcome=[k % 10 for k in range(34)])
    assert len(from_file(saved(tmp_path, few), "outcome", None, None, 3).classes) == 10
    halves = saved(tmp_path, frame.assign(outcome=[1.0, 1.5, 2.0, 1e19] * 40))
    whole = saved(tmp_path, frame.assign(outcome=[1.0, 2.0] * 80), "held.csv")
    data = from_file(halves, "outcome", "hospital", whole, 0)
    assert data.classes == ["1", "1.5", "1e+19", "2"]
    yes = saved(tmp_path, frame.assign(smokes=frame["radius"] > 12))
    ones = saved(tmp_path, frame.assign(smokes=(frame["radius"] > 12).astype(int)), "held.csv")
    data = from_file(yes, "outcome", "hospital", ones, 0)
    assert data.repeated == 160


def test_a_class_of_one_row_is_told_before_anything_is_trained(tmp_path):
    _, frame = written(tmp_path)
    held = saved(tmp_path, frame, "held.csv")
    path = saved(tmp_path, frame.assign(outcome=["rare", *frame["outcome"][1:]]))
    with pytest.raises(
        SystemExit, match=r"two training rows or more of every class, got one of \['rare'\]"
    ):
        run(["--data", path, "--label", "outcome", "--test", held, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_values_of_owners_do_not_outlive_a_run_without_owners(tmp_path, capsys):
    path, _ = written(tmp_path, 60, clinic="north")
    out = tmp_path / "out"
    out.mkdir()
    (out / "owners.csv").write_text("of an earlier run")
    few = ["--retrainings", "20", "--points", "1", "--epochs", "1", "--seeds", "1"]
    run([*QUICK, *few, "--data", str(path), "--label", "outcome", "--out", str(out)])
    assert "one owner" not in capsys.readouterr().out  # nobody asked for owners
    assert (out / "rows-influence.parquet").exists()
    assert not (out / "owners.csv").exists()
    run(
        [
            *QUICK,
            *few,
            "--data",
            str(path),
            "--label",
            "outcome",
            "--owner",
            "clinic",
            "--out",
            str(out / "one"),
        ]
    )
    words = "Column 'clinic' names one owner alone, 'north'"
    assert words in capsys.readouterr().out
    assert words in html.unescape((out / "one" / "report.html").read_text())


@pytest.mark.parametrize(
    ("asked", "sets", "seeds"), [(3, 4, 10), (3, 8, 8), (3, 16, 4), (3, 64, 3), (12, 4, 12), (1, 1024, 2)]
)  # fmt: skip
def test_owners_are_trained_on_with_the_seeds_asked_for_or_more(asked, sets, seeds):
    assert seeds_of_owners(asked, sets) == seeds


def test_more_seeds_of_owners_go_on_in_the_same_folder(tmp_path):
    data = embedded("breast_cancer", 0.0, 3, 0)
    n = len(data.x)
    values = Values(np.ones(n), np.zeros(n), np.arange(n), np.ones((n, 1)))
    valued = Valued(
        {"Aumann–Shapley": values}, {}, LinearDatamodel(np.ones((n, 1)), [0.0], 1.0), 0.0
    )
    kept = {}
    for seeds in (2, 9):
        flags = Flags(out=tmp_path, seeds=seeds, epochs=0.5, width=0, jobs=1)
        found = value_owners(start(flags, data), valued).found["retraining"]
        assert found.meta["seeds"] == max(8, seeds)  # 8 sets: 8 seeds make some 60 trainings
        files = {p: p.stat().st_mtime_ns for p in (tmp_path / "owners").rglob("*.npy")}
        assert kept.items() <= files.items()
        kept = files


def test_the_report_says_whether_rows_should_go():
    """Every method lost to random removal, and neither table nor page said so."""
    noise = np.array([[0.0], [0.01], [-0.01]])

    def said(**losses):
        named = {name.replace("_", " "): value for name, value in losses.items()}
        named["self-confidence (control)"] = named.pop("control", 0.9)
        named["random (control)"] = 0.9
        return verdict({k: noise + np.array([0.88, v]) for k, v in named.items()}, 1, 0.1)

    none = said(influence=1.4, in_run=0.9)
    assert none == (
        "Without the worst 10 %: no method's removal lowers test loss significantly more than random removal (that of "
        "influence raises it): nothing says that rows should go."
    )
    some = said(influence=0.7, in_run=0.8)
    assert "lower than without random rows by influence (-0.2 [-0.2, -0.2]), in run (-0.1" in some
    assert "nothing says" not in some
    assert "control" not in some
    assert "The control self-confidence does as well as the best value, in run." in said(
        in_run=0.8, control=0.8
    )
    assert "not significantly lower than with all rows, so nothing says" in said(influence=0.89)
    one = {name: np.array([[0.9, 0.8]]) for name in ("influence", "random (control)")}
    assert "use more --seeds" in verdict(one, 1, 0.1)


def test_removal_is_drawn_against_random_rows_by_seed(monkeypatch):
    """Two seeds that scatter drew bands over one another from -0.3 to 1.2 nats."""
    drawn = []
    curves = value_pictures.curves
    monkeypatch.setattr(
        value_pictures,
        "curves",
        lambda x, lines, **kw: drawn.append(lines) or curves(x, lines, **kw),
    )
    random = np.array([[0.2, 0.3, 0.5], [0.6, 0.7, 0.7]])
    losses = {"influence": random - [0.0, 0.1, 0.3], "random (control)": random}
    html = removal(losses, [0.1, 0.2])
    np.testing.assert_allclose(drawn[0]["influence"], [[0.0, -0.1, -0.3]] * 2)
    assert not drawn[0]["random (control)"].any()
    assert "influence from 0 to -0.3; random (control) from 0 to 0." in html
    assert "0.4 with all rows, 0.6 without 20 % at random. Means of 2 seeds, bands: 95 %" in html
    once = removal({name: some[:1] for name, some in losses.items()}, [0.1, 0.2])
    assert "One training each.</figcaption>" in once


def test_held_out_rows_that_are_trained_on_are_told_before_anything_starts(
    tmp_path, capsys, monkeypatch
):
    """A report's last facts told it alone, and attribute's did not."""
    _, frame = written(tmp_path)
    path = saved(tmp_path, frame)
    own = {"data": path, "label": "outcome", "test": path, "ignore": ("hospital",), "out": tmp_path}
    monkeypatch.setattr("recipes.work.valuing.start", lambda *_: sys.exit())
    loaders = (
        lambda: value_main(Flags(**own)),
        lambda: forget_sets.checked(unlearn.Flags(**own)),
        lambda: poisoning.checked(poison.Flags(**own)),
        lambda: table_task(path, "outcome", path, ["hospital"], targets=4).facts,
    )
    for load in loaders:
        with contextlib.suppress(SystemExit):
            found = load()
        assert "warning: 160 of 160 held-out rows are also training rows" in capsys.readouterr().out
    assert found["held-out rows that are also training rows"] == "160 of 160"
    frame.iloc[:80].to_csv(path, index=False)
    frame.iloc[80:].to_csv(tmp_path / "held.csv", index=False)
    table_task(path, "outcome", str(tmp_path / "held.csv"), ["hospital"], targets=4)
    assert not capsys.readouterr().out
