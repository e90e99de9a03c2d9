"""applied.value_pictures: what is drawn is what was given, and the alt text says it."""

import numpy as np
import pytest

from applied import value_pictures as pictures
from applied.pictures import png
from applied.worth import Values


def line(ax, label):
    return next(one for one in ax.lines if one.get_label() == label)


def test_curves_draw_means_and_bands_over_seeds():
    rows = np.array([[1.0, 2.0, 4.0], [3.0, 4.0, 8.0]])
    figure = pictures.curves(
        [0, 1, 2], {"a": rows, "random": [1.0, 1.0, 1.0]}, xlabel="x", ylabel="y"
    )
    ax = figure.axes[0]
    np.testing.assert_allclose(line(ax, "a").get_ydata(), rows.mean(0))
    assert line(ax, "random").get_linestyle() == "--"
    assert len(ax.collections) == 1  # a band for the one with seeds
    assert figure.get_label() == "y against x: a from 2 to 6; random from 1 to 1."
    assert png(figure).startswith(b"\x89PNG")


def test_marked_counts_both_kinds():
    rng = np.random.default_rng(0)
    values, bad = rng.normal(size=200), np.arange(200) < 20
    figure = pictures.marked(values, bad, xlabel="value")
    heights = sum(patch.get_height() for patch in figure.axes[0].patches)
    assert heights == 200
    assert "20 of 200 with a wrong label" in figure.get_label()


def test_owners_are_sorted_by_the_first_method():
    names = np.array(["a", "b", "c"])
    one = Values([1.0, 3.0, 2.0], [0.1, 0.1, 0.1], names, np.zeros((3, 1)), freedom=4)
    two = Values([2.0, 1.0, 0.0], [np.nan] * 3, names, np.zeros((3, 1)))
    figure = pictures.owners({"exact": one, "fast": two}, xlabel="worth")
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "c", "b"]
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [1.0, 2.0, 3.0, 2.0, 0.0, 1.0]
    assert figure.get_label() == "worth by exact: b 3, c 2, a 1."


def test_of_many_owners_both_ends_are_drawn():
    many = 600
    names = np.array([f"o{k}" for k in range(many)])
    one = Values(np.arange(many), np.zeros(many), names, np.zeros((many, 1)))
    figure = pictures.owners({"exact": one, "fast": one}, xlabel="worth")
    ax = figure.axes[0]
    drawn = [tick.get_text() for tick in ax.get_yticklabels()]
    assert drawn == [f"o{k}" for k in [*range(24), *range(576, 600)]]
    assert [patch.get_width() for patch in ax.patches] == [*range(24), *range(576, 600)] * 2
    assert "552 owners between are left out" in ax.get_xlabel()
    assert "o576 576, o23 23" in figure.get_label()
    assert figure.get_size_inches()[1] < 25


def test_frontier_and_the_axis_of_p():
    figure = pictures.frontier([1, 2, 3], [0.0, 2.0, 3.0], xlabel="spent", ylabel="gain")
    assert figure.get_label() == "gain against spent: from 0 at 1 to 3 at 3."
    p = np.linspace(0, 1, 11)
    figure = pictures.along_p(p, np.stack([p, 1 - p], axis=1), ["i", "j"], ylabel="worth")
    flat = [one for one in figure.axes[0].lines if one.get_linestyle() == ":"]
    assert [one.get_ydata()[0] for one in flat] == pytest.approx([0.5, 0.5])  # the means over p


def test_owners_are_found_by_name_and_many_methods_have_colours():
    one = Values([1.0, 3.0, 2.0], [0.1] * 3, np.array(["a", "b", "c"]), np.zeros((3, 1)))
    two = Values([2.0, 3.0, 1.0], [0.1] * 3, np.array(["c", "b", "a"]), np.zeros((3, 1)))
    figure = pictures.owners(
        {"one": one, "two": two, **{f"m{k}": one for k in range(8)}}, xlabel="x"
    )
    bars = figure.axes[0].containers
    widths = [[bar.get_width() for bar in held] for held in bars if hasattr(held, "patches")]
    assert widths[0] == widths[1] == [1.0, 2.0, 3.0]
    other = Values([1.0, 3.0, 2.0], [0.1] * 3, np.array(["a", "b", "d"]), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="the same owners"):
        pictures.owners({"one": one, "other": other}, xlabel="x")
    pictures.curves([0, 1], {str(k): [0.0, 1.0] for k in range(30)}, xlabel="x", ylabel="y")


def test_numbers_that_cannot_be_drawn_are_refused():
    from applied.pictures import calibration, histogram

    for values in ([], [1.0, np.nan], [np.inf, 2.0]):
        for draw in (histogram, lambda v, m: pictures.marked(v, m, xlabel="x")):
            with pytest.raises(ValueError, match="expected finite"):
                draw(values, np.zeros(len(values), dtype=bool))
    with pytest.raises(ValueError, match=r"2 subsets, 1 with NaN or infinity"):
        calibration([1.0, np.nan], [1.0, 2.0])
    pictures.along_p([0.5], np.ones((1, 1)), ["a"], ylabel="y")
