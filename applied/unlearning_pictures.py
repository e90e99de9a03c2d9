"""Pictures of unlearning: margins beside the oracles', distance against cost, predictions, the noise floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.pictures import BLUE, GREY, INK, PALETTE, SMALL, TEXT, WIDTH, axes
from applied.recipe import Interval
from applied.yardstick import CEILING, FLOOR, Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
PALE_GREY = "#C9CBD1"


def histograms(
    before: ArrayLike,
    unlearned: ArrayLike,
    oracle: ArrayLike,
    points: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    xlabel: str = "margin",
) -> Figure:
    """Outputs of models before, after and without, a panel for each of a few points; same bins within one.

    Args:
        before, unlearned, oracle: [models, z].
        points: which of the z, up to 6.
        names: a title for each; "point 3" and so on unless given.

    Raises:
        ValueError: no points, or more than 6; names that do not match them.
    """
    titles = [f"point {j}" for j in points] if names is None else list(names)
    if not 1 <= len(points) <= 6 or len(titles) != len(points):
        raise ValueError(
            f"expected 1 to 6 points and a name for each, got {len(points)} and {len(titles)}"
        )
    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure, panels = _panels(rows, columns, 0.7 + 1.6 * rows)
    told, sets = [], {"before": before, "unlearned": unlearned, "oracle": oracle}
    for ax, j, title in zip(panels, points, titles, strict=False):
        values = {name: np.asarray(x, dtype=float)[:, j] for name, x in sets.items()}
        bins = np.histogram_bin_edges(np.concatenate(list(values.values())), 30)
        ax.hist(values["before"], bins, density=True, color=PALE_GREY, label="before")
        ax.hist(values["unlearned"], bins, density=True, color=BLUE, alpha=0.6, label="unlearned")
        ax.hist(
            values["oracle"], bins, density=True, histtype="step", color=INK, lw=1.4, label="oracle"
        )
        ax.set_title(title, fontsize=SMALL, color=INK, loc="left")
        ax.set_yticks([])
        told.append(f"{title} " + ", ".join(f"{n} {x.mean():.3g}" for n, x in values.items()))
    for ax in panels[len(points) :]:
        ax.set_visible(False)
    figure.supxlabel(xlabel, fontsize=TEXT, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=3, fontsize=SMALL, frameon=False
    )
    figure.set_label(f"Histograms of {xlabel} over models, means: {'; '.join(told)}.")
    return figure


def against_cost(evaluation: Evaluation, steps: Mapping[str, float]) -> Figure:
    """Mean divergence of every method against its cost, a panel a split, with floor and ceiling.

    The grey band is the floor, from its mean to its 95th percentile over points; the dashed line is what
    models show that forgot nothing.

    Args:
        evaluation: of the methods.
        steps: method -> cost, as a share of a retraining's steps.

    Raises:
        ValueError: a method without a cost.
    """
    missing = [method for method in evaluation.methods if method not in steps]
    if missing:
        raise ValueError(
            f"expected the cost of every method, got none for {missing}; pass steps[method]"
        )
    splits = evaluation.splits
    lines = math.ceil(len(evaluation.methods) / 3)
    figure, panels = _panels(1, len(splits), 3.3 + 0.2 * lines, sharex=True, sharey=True)
    told = []
    for ax, split in zip(panels, splits, strict=True):
        low, high = evaluation.mean(FLOOR, split), evaluation.p95(FLOOR, split)
        ceiling = evaluation.mean(CEILING, split)
        ax.axhspan(low, high, color=PALE_GREY, lw=0, alpha=0.7, label="floor, mean to p95")
        ax.axhline(ceiling, color=INK, lw=1, ls=(0, (4, 3)), label="do nothing")
        for j, method in enumerate(evaluation.methods):
            mark = MARKERS[j % len(MARKERS)]
            style: dict[str, Any] = {"color": PALETTE[j % len(PALETTE)], "mec": "white", "mew": 0.5}
            style["ms"] = 13 if mark == "*" else 8  # a star's arms are thin
            ax.plot(steps[method], evaluation.mean(method, split), mark, label=method, **style)
        found = [f"{m} {evaluation.mean(m, split):.3g}" for m in evaluation.methods]
        told.append(f"{split}: floor {low:.3g}, do nothing {ceiling:.3g}, {', '.join(found)}")
        ax.set_title(split, fontsize=TEXT, color=INK, loc="left")
        ax.margins(x=0.12)
    every = [evaluation.mean(m, s) for m in evaluation.scores for s in splits]
    if min(every) > 0 and max(every) > 10 * min(every):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if max(every) < 100 * min(
            every
        ):  # a decade or two: its 1 2 5, so that no axis has one number
            from matplotlib.ticker import LogLocator

            panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panels[0].yaxis.set_minor_formatter("")
    else:
        panels[0].set_ylim(bottom=0)
    panels[0].set_xlim(left=min(0.0, *steps.values()))
    panels[0].xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    panels[0].set_ylabel(f"mean {evaluation.direction}, nats", fontsize=SMALL, color=INK)
    cost = "cost, % of a retraining's steps"
    panels[len(splits) // 2].set_xlabel(cost, fontsize=TEXT, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False
    )
    figure.set_label(f"Mean {evaluation.direction} against cost. {'; '.join(told)}.")
    return figure


def changes(predicted: ArrayLike, actual: ArrayLike, *, unit: str = "margin") -> Figure:
    """What forgetting does to each point's mean output: predicted against retrained, and the identity.

    Args:
        predicted, actual: [z] changes, output units.

    Raises:
        ValueError: no pairs, or values that are not finite.
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not np.isfinite([x, y]).all():
        raise ValueError(
            f"expected finite pairs, predicted [z] and actual [z] with z >= 2, got {x.shape}, {y.shape}"
        )
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    slope = np.polyfit(x, y, 1)[0] if varied else math.nan
    fit = "no fit: one side is constant"
    if varied:
        fit = f"slope {slope:.2f}, correlation {np.corrcoef(x, y)[0, 1]:.2f}"
    words = f"{fit}, {len(x)} points"
    figure, ax = axes(
        4.4, f"predicted change of the {unit}", f"change of the {unit} after retraining", words
    )
    ax.axline((0, 0), slope=1, color=GREY, lw=1.2, label="as predicted")
    if math.isfinite(slope):
        line = {"color": INK, "lw": 1, "ls": (0, (2, 2))}
        ax.axline((x.mean(), y.mean()), slope=slope, label="fitted line", **line)
    ax.scatter(x, y, s=26, c=BLUE, ec="white", lw=0.6, zorder=3)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.06 * (high - low) or 1.0
    ax.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    figure.set_label(f"Scatter of the {unit}'s change, retrained against predicted: {words}.")
    return figure


def floors(ns: ArrayLike, bins: Sequence[Any], values: ArrayLike) -> Figure:
    """The divergence of two samples of one distribution against the number of models, a line a number of bins.

    Args:
        ns: [n] numbers of models.
        bins: [b], numbers of bins, or names such as "normal fits".
        values: [n, b] mean divergences, nats.

    Raises:
        ValueError: values of another shape.
    """
    at, found = np.asarray(ns, dtype=float), np.asarray(values, dtype=float)
    if found.shape != (len(at), len(bins)):
        raise ValueError(
            f"expected values [n={len(at)}, b={len(bins)}], got {found.shape}; pass one row per number "
            "of models and one column per number of bins"
        )
    figure, ax = axes(3.6, "models of each kind", "floor: mean divergence, nats")
    ax.set(xscale="log", yscale="log")
    told = []
    for j, given in enumerate(bins):
        name = given if isinstance(given, str) else f"{given} bins"
        style: dict[str, Any] = {
            "color": PALETTE[j % len(PALETTE)],
            "lw": 1.7,
            "ms": 5,
            "label": name,
        }
        ax.plot(at, found[:, j], marker=MARKERS[j % len(MARKERS)], **style)
        told.append(f"{name} from {found[0, j]:.3g} to {found[-1, j]:.3g}")
    ax.set_xticks(at, [f"{n:g}" for n in at])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter("")
    figure.legend(loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    ends = f"{at[0]:g} models to {at[-1]:g}"
    figure.set_label(
        f"Divergence of two samples of one distribution, from {ends}: {'; '.join(told)}."
    )
    return figure


def gaps(table: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The share of the gap to the oracles that each method closes, a group of bars a forget set.

    Args:
        table: method -> forget set -> share; or an `Interval`; nan where there is no effect to undo.
    """
    sets = list(dict.fromkeys(name for row in table.values() for name in row))
    figure, ax = axes(3.5, "", "share of the gap closed")
    wide, told = 0.8 / len(table), []
    for j, (method, row) in enumerate(table.items()):
        place = np.arange(len(sets)) + wide * (j + 0.5) - 0.4
        mean, low, high = (np.array([_end(row.get(s), k) for s in sets]) for k in range(3))
        colour = PALETTE[j % len(PALETTE)]
        ax.bar(place, np.nan_to_num(mean), wide * 0.88, color=colour, label=method)
        ax.vlines(place, low, high, color=INK, lw=1.1)
        told.append(
            f"{method} "
            + ", ".join(
                f"{s} {m:.2f}" if math.isfinite(m) else f"{s} no effect"
                for s, m in zip(sets, mean, strict=True)
            )
        )
    for at, name in enumerate(sets):
        if not any(math.isfinite(_end(row.get(name), 0)) for row in table.values()):
            ax.text(at, 0.02, "no effect", ha="center", va="bottom", fontsize=SMALL, color=INK)
    ax.axhline(1, color=GREY, lw=1, ls=(0, (4, 3)))
    ax.axhline(0, color=INK, lw=0.8)
    ax.annotate(
        "oracle", (1, 1), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", fontsize=SMALL, color=INK,
    )  # fmt: skip
    ax.set_xticks(range(len(sets)), sets, fontsize=TEXT)
    ax.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    figure.set_label(f"Share of the gap closed: {'; '.join(told)}.")
    return figure


def _end(value: Any, which: int) -> float:
    """Mean, low or high of an interval; a number has no ends."""
    if isinstance(value, Interval):
        return (value.mean, value.low, value.high)[which]
    return math.nan if value is None or which else float(value)


def _panels(rows: int, columns: int, height: float, **shared: Any) -> tuple[Any, NDArray[Any]]:
    """A figure and its axes, row by row, in the common style of `pictures.axes`."""
    from matplotlib.figure import Figure

    size = (max(WIDTH, 2.1 * columns), height)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    found = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for ax in found:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, colors=INK)
    return figure, found
