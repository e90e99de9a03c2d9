"""attribution_core.comparison, and the picture that applied.pictures makes of it."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.text import Text

from applied.pictures import lds_against_compute, png
from attribution_core import LinearDatamodel, RetrainingTable, compare, lds, random_subsets

N, T = 12, 3


def truth(keep, seeds=3):
    """A table of outputs that are linear in the weights, but for seed noise."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(N, T))
    weights = random_subsets(N, 20, keep=keep)
    noise = 0.1 * rng.normal(size=(len(weights), seeds, T))
    return RetrainingTable(weights, (weights @ scores)[:, None] + noise, tuple(range(seeds)))


def exact(keep):
    scores = np.random.default_rng(0).normal(size=(N, T))
    return LinearDatamodel(scores, scores.sum(0), 1.0)


def blind(keep):
    return LinearDatamodel(np.random.default_rng(9).normal(size=(N, T)), np.zeros(T), 1.0)


TABLES = {0.5: truth(0.5), 0.25: truth(0.25)}
METHODS = {"blind": blind, "exact": exact}


def test_every_method_meets_every_table():
    found = compare(METHODS, TABLES, floors=["blind"])
    assert [(row.method, row.keep) for row in found.rows] == [
        ("blind", 0.5),
        ("exact", 0.5),
        ("blind", 0.25),
        ("exact", 0.25),
    ]
    assert found.keeps == (0.25, 0.5)
    for keep in found.keeps:
        best, floor = found.at(keep)
        assert (best.method, best.floor) == ("exact", False)
        assert (floor.method, floor.floor) == ("blind", True)
        assert best.lds.mean == lds(exact(keep), TABLES[keep]).mean
        assert best.seconds >= 0


def test_methods_are_told_the_keep_fraction():
    told = []
    compare({"exact": lambda keep: told.append(keep) or exact(keep)}, TABLES)
    assert told == [0.5, 0.25]


def test_the_table_states_truth_ceiling_and_floors():
    found = compare(METHODS, TABLES, floors=["blind"])
    text, ceiling = found.table(), found.at(0.25)[0].lds.ceiling
    first = text.splitlines()
    assert first[0] == (
        f"keep 0.25: 20 retrainings, mean over 3 seeds, 3 targets; ceiling {ceiling:.3f}"
    )
    assert first[1].split() == ["method", "LDS", "95", "%", "interval", "slope", "seconds"]
    assert first[2].startswith("exact ")
    assert first[3].startswith("blind (floor) ")
    assert len({len(line) for line in first[1:4]}) == 1  # aligned
    assert "| exact | " in found.markdown()


def test_saved_records_hold_every_target(tmp_path):
    found = compare(METHODS, TABLES)
    found.save(tmp_path / "methods.json")
    records = json.loads((tmp_path / "methods.json").read_text())
    assert len(records) == 4
    assert records[1]["lds"]["per_target"] == found.rows[1].lds.per_target.tolist()


def test_a_failing_method_is_named():
    def fails(keep):
        raise ValueError("no damping")

    with pytest.raises(ValueError, match=r"'mine' at keep fraction .*: no damping"):
        compare({"mine": fails}, TABLES)


@pytest.mark.parametrize(
    ("methods", "tables", "floors"),
    [({}, TABLES, ()), (METHODS, {}, ()), (METHODS, TABLES, ("knn",))],
)
def test_nothing_to_compare(methods, tables, floors):
    with pytest.raises(ValueError, match="expected methods, tables and floors among the methods"):
        compare(methods, tables, floors=floors)


def test_datamodels_in_the_place_of_functions_are_told():
    """They would be judged at no seconds at all, and where they are anchored, not where the table is."""
    with pytest.raises(ValueError, match=r"got {'mine': 'LinearDatamodel'}; pass `lambda keep"):
        compare({"exact": exact, "mine": exact(1.0)}, TABLES)
    same = compare({"mine": lambda keep: exact(1.0)}, TABLES)
    assert [row.lds.mean for row in same.rows] == [lds(exact(1.0), t).mean for t in TABLES.values()]


def test_picture_of_a_comparison():
    found = compare(METHODS, TABLES, floors=["blind"])
    figure = lds_against_compute(found, 0.5)
    assert "Best: exact" in figure.get_label()
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 1
    assert png(figure).startswith(b"\x89PNG")


def test_picture_of_no_single_keep_fraction():
    found = compare(METHODS, TABLES)
    with pytest.raises(ValueError, match="one of the keep fractions"):
        lds_against_compute(found)
    with pytest.raises(ValueError, match="no rows at keep"):
        lds_against_compute(found, 0.9)


@pytest.mark.parametrize("count", [1, 12])
def test_every_method_is_named_beside_the_picture(count):
    """However near their points are, no label is left out, covers another or leaves the figure."""
    found = compare({f"method {k}": METHODS["exact"] for k in range(count)}, {0.5: TABLES[0.5]})
    figure = lds_against_compute(found)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("method")]
    assert len(names) == count
    boxes = sorted(map(Text.get_window_extent, names), key=lambda box: box.y0)  # without lines
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    whole = figure.get_tightbbox()
    assert min(whole.x0, whole.y0) > -0.02  # inches
    assert (whole.max < figure.get_size_inches() + 0.02).all()
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels(which="both")]
    assert any(ticks)
    assert not any("$" in tick for tick in ticks)  # a formula would be drawn as it is written
