"""applied.unlearning_pictures: what is drawn is what was given, and the alt text says it."""

import numpy as np
import pytest

from applied import unlearning_pictures as pictures
from applied.pictures import png
from applied.recipe import Interval
from applied.yardstick import FLOOR, evaluate


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(figure):
    return png(figure).startswith(b"\x89PNG")


def test_histograms_have_a_panel_for_each_point():
    before, after, oracle = normal(30, 9) + 4, normal(30, 9, seed=1) + 1, normal(60, 9, seed=2)
    figure = pictures.histograms(before, after, oracle, [8, 0, 3, 5], names=list("abcd"))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in shown] == list("abcd")
    means = f"a before {before[:, 8].mean():.3g}, unlearned {after[:, 8].mean():.3g}"
    assert means in figure.get_label()
    assert drawn(figure)
    with pytest.raises(ValueError, match="expected 1 to 6 points and a name for each, got 7 and 7"):
        pictures.histograms(before, after, oracle, range(7))


@pytest.mark.parametrize("effect", [0.1, 1.0, 5.0, 50.0])
def test_distance_against_cost(effect):
    sizes = {"forget": 8, "retain": 12, "validation": 12}

    def outputs(n, share, seed):
        return {
            s: normal(n, z, seed=seed) - share * effect * (s == "forget") for s, z in sizes.items()
        }

    methods = {"a": outputs(20, 0.5, 1), "b": outputs(20, 1.0, 2)}
    found = evaluate(methods, outputs(40, 1.0, 3), outputs(20, 0.0, 4))
    figure = pictures.against_cost(found, {"a": 0.2, "b": 0.05})
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(sizes)
    for ax, split in zip(figure.axes, sizes, strict=True):
        for name, cost in (("a", 0.2), ("b", 0.05)):
            line = next(one for one in ax.lines if one.get_label() == name)
            assert line.get_xydata().tolist() == [[cost, found.mean(name, split)]]
        band = (
            ax.patches[0].get_path().get_extents().transformed(ax.patches[0].get_patch_transform())
        )
        assert (band.y0, band.y1) == pytest.approx(
            (found.mean(FLOOR, split), found.p95(FLOOR, split))
        )
    assert f"forget: floor {found.mean(FLOOR):.3g}, do nothing" in figure.get_label()
    assert drawn(figure)
    with pytest.raises(
        ValueError, match=r"expected the cost of every method, got none for \['b'\]"
    ):
        pictures.against_cost(found, {"a": 0.2})


def test_changes_tell_slope_and_correlation():
    figure = pictures.changes([0.0, 1.0, 2.0], [0.5, 2.5, 4.5])
    assert figure.axes[0].get_title(loc="left") == "slope 2.00, correlation 1.00, 3 points"
    assert "slope 2.00, correlation 1.00" in figure.get_label()
    assert drawn(figure)
    assert drawn(pictures.changes([0.0, 0.0], [1.0, 2.0]))  # nothing was predicted
    with pytest.raises(ValueError, match="expected finite pairs"):
        pictures.changes([0.0, np.nan], [1.0, 2.0])


def test_floors_have_a_line_for_each_number_of_bins():
    figure = pictures.floors([10, 100], [20, "normal fits"], [[3.0, 0.3], [0.34, 0.02]])
    assert [line.get_label() for line in figure.axes[0].lines] == ["20 bins", "normal fits"]
    assert "from 10 models to 100: 20 bins from 3 to 0.34" in figure.get_label()
    assert drawn(figure)
    with pytest.raises(ValueError, match=r"expected values \[n=1, b=2\], got \(2, 2\)"):
        pictures.floors([10], [20, 10], [[1.0, 2.0], [3.0, 4.0]])


def test_gaps_are_grouped_by_forget_set():
    table = {
        "SCRUB": {"random": np.nan, "cluster": 0.65},
        "DMM": {"random": np.nan, "cluster": Interval(0.97, 0.9, 1.02)},
    }
    figure = pictures.gaps(table)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["random", "cluster"]
    assert [bar.get_height() for bar in ax.patches] == [0.0, 0.65, 0.0, 0.97]
    assert figure.get_label() == (
        "Share of the gap closed: SCRUB random no effect, cluster 0.65; DMM random no effect, cluster 0.97."
    )
    assert drawn(figure)


def test_a_constant_prediction_has_no_fit():
    figure = pictures.changes(np.zeros(5), np.arange(5.0))
    assert "no fit" in str(figure.get_label())
    assert "nan" not in str(figure.get_label())
