"""applied.poisoning_pictures: what is drawn is what was given, and the alt text says it."""

import numpy as np
import pytest

from applied import poisoning_pictures as pictures
from applied.pictures import GREY, png

INF, NAN = np.inf, np.nan
EFFECTS = {"random": [[0.1, 0.1], [0.1, 0.3]], "in rounds": [[0.2, 0.5], [0.4, 0.7]]}


def drawn(figure):
    return png(figure).startswith(b"\x89PNG")


def line(ax, label):
    return next(one for one in ax.lines if one.get_label() == label)


def legend(figure):
    return [words.get_text() for words in figure.legends[0].get_texts()]


def test_effects_are_means_over_splits_with_intervals_and_predictions():
    figure = pictures.effect_against_budget(
        [0.05, 0.1], EFFECTS, predicted={"in rounds": [0.25, 0.5]}, ylabel="change"
    )
    ax = figure.axes[0]
    assert ax.get_ylabel() == "change"
    np.testing.assert_allclose(line(ax, "in rounds").get_xdata(), [0, 0.05, 0.1])
    np.testing.assert_allclose(line(ax, "in rounds").get_ydata(), [0, 0.3, 0.6])
    np.testing.assert_allclose(line(ax, "_in rounds").get_ydata(), [0, 0.25, 0.5])
    assert line(ax, "_in rounds").get_linestyle() == "--"
    assert line(ax, "random").get_color() == GREY
    assert legend(figure) == ["no attack", "random", "in rounds", "predicted"]
    ends = [bar.get_segments()[1][:, 1] for bar in ax.collections]  # at the second budget
    half = 12.706 * 0.1  # t of one degree of freedom times the standard error
    np.testing.assert_allclose(
        ends, [[0.2 - half, 0.2 + half], [0.6 - half, 0.6 + half]], rtol=1e-4
    )
    assert drawn(figure)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["5 %", "10 %"]
    assert "predicted 0.25, 0.5" in figure.get_label()
    assert "in rounds 0.3 [-0.971, 1.57] at 5 %" in figure.get_label()


def test_one_split_has_no_interval():
    figure = pictures.effect_against_budget([0.1], {"random": [0.2]})
    assert (
        figure.get_label()
        == "change of the target loss against the share of rows: random 0.2 at 10 %."
    )
    assert drawn(figure)


@pytest.mark.parametrize(
    ("budgets", "effects", "predicted", "words"),
    [
        ([0.1, 0.05], EFFECTS, None, "expected rising budgets between 0 and 1"),
        ([0.0, 0.05], EFFECTS, None, "expected rising budgets between 0 and 1"),
        ([], {}, None, "expected rising budgets between 0 and 1"),
        ([0.1], EFFECTS, None, r"expected finite 'random' \[b=1\] or \[s, b=1\], got \(2, 2\)"),
        ([0.1], {"a": [NAN]}, None, "expected finite 'a'"),
        ([0.1], {}, None, r"expected predictions of the attacks \[\]"),
        ([0.1], {"a": [1.0]}, {"b": [1.0]}, r"of the attacks \['a'\], got \['b'\]"),
    ],
)  # fmt: skip
def test_effects_that_do_not_fit(budgets, effects, predicted, words):
    with pytest.raises(ValueError, match=words):
        pictures.effect_against_budget(budgets, effects, predicted=predicted)


PERFECT = ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
BLIND = ([0.0, 1.0], [0.0, 1.0])


def test_roc_curves_of_several_splits_are_averaged():
    figure = pictures.roc(
        {"loss": [BLIND, BLIND], "combined": [PERFECT, BLIND]}, best="combined", title="one shot"
    )
    ax = figure.axes[0]
    assert legend(figure) == ["chance, AUC 0.5", "combined, AUC 0.7500", "loss, AUC 0.5000"]
    x, y = line(ax, "combined, AUC 0.7500").get_data()
    assert (x[0], y[0]) == (0, 0)
    np.testing.assert_allclose(y[1:], 0.5 + np.asarray(x[1:]) / 2)
    assert max(x) == pytest.approx(0.3)
    assert ax.get_xlim()[1] == pytest.approx(0.3)
    assert line(ax, "chance, AUC 0.5").get_xydata().tolist() == [[0, 0], [1, 1]]
    assert figure.get_label() == "ROC curves of one shot, AUC: combined 0.7500, loss 0.5000."
    assert drawn(figure)


def test_the_auc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(0)
    truth, scores = rng.random(300) < 0.1, rng.integers(0, 20, 300)
    false, true, _ = roc_curve(truth, scores)
    figure = pictures.roc({"x": [(false, true)]}, most=1.0)
    assert legend(figure)[1] == f"x, AUC {roc_auc_score(truth, scores):.4f}"
    x, y = line(figure.axes[0], legend(figure)[1]).get_data()
    np.testing.assert_allclose(np.trapezoid(y, x), roc_auc_score(truth, scores), atol=2e-3)


@pytest.mark.parametrize(
    ("curves", "most", "words"),
    [
        ({}, 0.3, "expected a ROC curve of every detector, got none"),
        ({"a": []}, 0.3, "expected a ROC curve of every detector, got none"),
        ({"a": [BLIND]}, 0.0, r"in \(0, 1\], got 0"),
        ({"a": [([0.0, 1.0], [0.0, 0.5])]}, 0.3, "expected rates of 'a' that rise together from 0 to 1"),
        ({"a": [([0.0, 0.5, 0.2, 1.0], [0.0, 0.1, 0.2, 1.0])]}, 0.3, "rise together"),
        ({"a": [([0.0, 1.0], [0.0, 0.5, 1.0])]}, 0.3, "rise together"),
    ],
)  # fmt: skip
def test_curves_that_are_none(curves, most, words):
    with pytest.raises(ValueError, match=words):
        pictures.roc(curves, most=most)


def test_images_before_after_and_their_difference():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 3, 8, 6))
    figure = pictures.before_after(before, after, titles=["3 as 8", "1 as 7", "0 as 6"])
    panels = figure.axes[:9]
    shown = np.array([ax.images[0].get_array() for ax in panels]).reshape(3, 3, 8, 6)
    np.testing.assert_allclose(shown, [before, after, after - before])
    assert [ax.get_title() for ax in panels] == ["3 as 8", "1 as 7", "0 as 6", *[""] * 6]
    assert [panels[k].get_ylabel() for k in (0, 3, 6)] == ["before", "after", "difference"]
    far = np.abs(after - before).max()
    assert panels[8].images[0].get_clim() == pytest.approx((-far, far))
    both = min(before.min(), after.min()), max(before.max(), after.max())
    assert panels[0].images[0].get_clim() == panels[4].images[0].get_clim() == pytest.approx(both)
    label = figure.get_label()
    assert label.startswith("3 images (3 as 8, 1 as 7, 0 as 6) before and after")
    assert f"at most {far:.3g}" in label
    assert drawn(figure)
    assert drawn(pictures.before_after(before[:1], before[:1]))  # nothing moved


@pytest.mark.parametrize(
    ("before", "after", "titles", "words"),
    [
        (np.zeros((2, 4, 4)), np.zeros((3, 4, 4)), None, r"got \(2, 4, 4\), \(3, 4, 4\)"),
        (np.zeros((4, 4)), np.zeros((4, 4)), None, r"expected 1 to 12 finite images \[k, h, w\]"),
        (np.zeros((13, 4, 4)), np.zeros((13, 4, 4)), None, "expected 1 to 12 finite images"),
        (np.zeros((1, 4, 4)), np.full((1, 4, 4), NAN), None, "expected 1 to 12 finite images"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), ["a"], "expected 2 titles, one an image, got 1"),
    ],
)
def test_images_that_do_not_fit(before, after, titles, words):
    with pytest.raises(ValueError, match=words):
        pictures.before_after(before, after, titles=titles)


def at_height(ax, height):
    return next(one for one in ax.lines if list(one.get_ydata()) == [height])


def test_recovery_beside_random_removal():
    figure = pictures.recovery(
        {"random": [0.6, 0.8], "one shot": [NAN, NAN], "in rounds": [5.0, 9.0]},
        {"random": [-0.1, 0.1], "one shot": [NAN, NAN], "in rounds": 0.25},
        output="loss",
    )
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["random", "one shot", "in rounds"]
    assert ax.yaxis_inverted()
    assert at_height(ax, -0.12).get_xdata() == pytest.approx([0.7])
    assert at_height(ax, 0.12).get_xdata() == pytest.approx([0.0])
    beyond = at_height(ax, 1.88)
    assert (beyond.get_xdata()[0], beyond.get_marker()) == (2.0, ">")
    assert legend(figure) == ["without suspects", "as many at random"]
    assert [words.get_text() for words in ax.texts] == ["0.70", "–", "7.00", "0.00", "–", "0.25"]
    assert ax.get_xlabel() == "share recovered of the loss (1: all of it)"
    assert figure.get_label() == (
        "loss recovered, without suspects against at random: random 0.70 against 0.00; one shot – against –; "
        "in rounds 7.00 against 0.25."
    )
    assert drawn(figure)
    assert legend(pictures.recovery({"a": 0.5})) == ["without suspects"]
    with pytest.raises(
        ValueError, match=r"expected random removal of the attacks \['a'\], got \['b'\]"
    ):
        pictures.recovery({"a": 0.5}, {"b": 0.1})
    with pytest.raises(ValueError, match=r"expected random removal of the attacks \[\]"):
        pictures.recovery({})


def test_flip_budgets_against_the_diagonal():
    predicted = np.array([1, 1, 2, 10, 100, INF, 5, INF])
    actual = np.array([1, 1, 3, 20, 80, 7, INF, INF])
    figure = pictures.flip_budgets(predicted, actual)
    ax = figure.axes[0]
    dots = {one.get_label(): one for one in ax.collections}
    assert dots["outputs"].get_offsets().tolist() == [[1, 1], [2, 3], [10, 20], [100, 80]]
    sizes = dots["outputs"].get_sizes()
    assert sizes[0] > sizes[1] == sizes[2]  # two outputs stand at (1, 1)
    edge = 200.0  # twice the largest number
    assert dots["out of reach"].get_offsets().tolist() == [[5, edge], [edge, 7], [edge, edge]]
    ticks = dict(zip((t.get_text() for t in ax.get_xticklabels()), ax.get_xticks(), strict=True))
    assert ticks["∞"] == edge
    assert ax.get_xscale() == ax.get_yscale() == "log"
    band = dots["± 30 % or one row"].get_paths()[0].vertices
    near = band[np.abs(band[:, 1] - 50) < 1]
    assert {round(x / y, 3) for x, y in near} == {0.7, 1.3}
    # 100 against 80 is within 30 %, 2 against 3 within a row, 10 against 20 is neither
    assert ax.get_title(loc="left") == "4 of 5 within 30 %, 3 out of reach"
    factor = np.exp(np.log([1, 1, 1.5, 2, 0.8]).mean())
    assert f"actual is {factor:.3g} times predicted" in figure.get_label()
    assert drawn(figure)


def test_flip_budgets_agree_with_the_audit_itself():
    from applied.audit.flip_budget import FlipBudgets

    rng = np.random.default_rng(0)
    predicted = rng.integers(1, 60, 40).astype(float)
    actual = np.maximum(1, np.round(predicted * rng.uniform(0.5, 1.6, 40)))
    found = FlipBudgets(np.arange(40), np.ones(40), predicted, actual, [], [], None)
    words = f"{round(40 * found.within())} of 40 within 30 %"
    assert pictures.flip_budgets(predicted, actual).axes[0].get_title(loc="left") == words


@pytest.mark.parametrize("pair", [([1.0], [NAN]), ([0.0], [1.0]), ([1, 2], [1]), ([], []), ([[1]], [[1]])])  # fmt: skip
def test_numbers_of_rows_that_are_none(pair):
    with pytest.raises(ValueError, match="expected numbers of rows >= 1"):
        pictures.flip_budgets(*pair)


def test_nothing_can_be_turned():
    figure = pictures.flip_budgets([INF, INF], [INF, 3.0])
    assert "0 of 0 within 30 %, 2 out of reach; actual is undefined times" in figure.get_label()
    assert drawn(figure)
    assert drawn(pictures.flip_budgets([INF], [INF]))
