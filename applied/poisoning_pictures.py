"""Pictures of an audit: damage against budget, who would have seen it, what was changed, what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.pictures import BLUE, GREY, INK, PALETTE, SMALL, TEXT, WIDTH, _plain, axes
from applied.recipe import Interval, paired_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
CONTROL = "random"  # drawn in grey
DASHES, DOTS = (0, (4, 3)), (0, (1, 2))
PREDICTED: dict[str, Any] = {"ls": DASHES, "lw": 1.3, "mfc": "white", "ms": 5}
SHARES = (-1.0, 2.0)  # recovered: what an axis shows at most
GRID = np.linspace(0, 1, 2001)  # of false alarm rates
BAND = 0.3  # around a predicted number of rows


def effect_against_budget(
    budgets: ArrayLike,
    effects: Mapping[str, ArrayLike],
    *,
    predicted: Mapping[str, ArrayLike] | None = None,
    ylabel: str = "change of the target loss",
) -> Figure:
    """What each attack changes of one output against the share of rows it may change; no attack is at 0.

    Args:
        budgets: [b] shares of the rows, rising.
        effects: attack -> [b], or [s, b] with a row for each split: mean and 95 % t interval. "random" is grey.
        predicted: attack -> what was predicted, of the same shapes; dashed, in the attack's colour.

    Raises:
        ValueError: budgets that are no rising shares, no attack, other lengths, a prediction for another attack.
    """
    at = np.asarray(budgets, dtype=float)
    if at.ndim != 1 or not len(at) or not (np.diff([0.0, *at, 1.0]) > 0).all():
        raise ValueError(f"expected rising budgets between 0 and 1, got {at.tolist()}")
    means, said = _rows(effects, len(at)), _rows(predicted or {}, len(at))
    _some_of(said, means, "predictions")
    figure, ax = axes(3.9, "share of the rows that may be changed", ylabel)
    ax.axhline(0, color=INK, lw=0.9, label="no attack")
    colours, told, later = cycle(PALETTE[:7]), [], slice(1, None)  # no marker at 0
    for place, (name, rows) in enumerate(means.items()):
        colour = GREY if name == CONTROL else next(colours)
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[place % len(MARKERS)]}
        ends = [paired_interval(column) for column in rows.T]
        beside = at + at[-1] * 0.008 * (place - (len(means) - 1) / 2)  # so that none hides another
        low, high = np.transpose([(e.low, e.high) for e in ends])
        ax.vlines(beside, low, high, colors=colour, lw=2, alpha=0.5)
        ax.plot([0, *at], [0, *rows.mean(0)], lw=1.7, ms=5.5, label=name, markevery=later, **style)
        points = [f"{_plain(e, '.3g')} at {100 * b:g} %" for b, e in zip(at, ends, strict=True)]
        if name in said:
            mean = said[name].mean(0)
            ax.plot([0, *at], [0, *mean], label=f"_{name}", markevery=later, **PREDICTED, **style)
            points.append(f"predicted {', '.join(f'{x:.3g}' for x in mean)}")
        told.append(f"{name} {', '.join(points)}")
    if said:
        ax.plot([], [], color=INK, marker="o", label="predicted", **PREDICTED)
    if len(at) <= 6:
        ax.set_xticks(at)
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ax.set_xlim(0, at[-1] * 1.06)
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    figure.set_label(f"{ylabel} against the share of rows: {'; '.join(told)}.")
    return figure


def roc(
    curves: Mapping[str, Sequence[Any]], *, most: float = 0.3, title: str = "", best: str = ""
) -> Figure:
    """Changed rows found against false alarms, a line a detector: the mean over splits at equal false alarms.

    Args:
        curves: detector -> (false, true) rates of each split, from (0, 0) to (1, 1).
        most: the largest false alarm rate that is shown; the AUC in the legend is of the whole curve.
        best: a detector to draw thicker, such as "combined".

    Raises:
        ValueError: no curves; rates that do not rise from 0 to 1; a share to show outside (0, 1].
    """
    if not 0 < most <= 1:
        raise ValueError(f"expected the largest false alarm rate in (0, 1], got {most}")
    if not curves or not all(len(some) for some in curves.values()):
        raise ValueError("expected a ROC curve of every detector, got none")
    figure, ax = axes(4.3, "false alarms, share of the unchanged rows", "changed rows found", title)
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=DOTS, label="chance, AUC 0.5")
    told, shown = [], GRID[: round(most * (len(GRID) - 1)) + 1]
    for j, (name, some) in enumerate(sorted(curves.items(), key=lambda item: item[0] != best)):
        pairs = [_curve(name, *pair) for pair in some]
        auc = float(np.mean([np.trapezoid(true, false) for false, true in pairs]))
        mean = np.mean([np.interp(shown, false, true) for false, true in pairs], axis=0)
        wide, label = 2.8 if name == best else 1.6, f"{name}, AUC {auc:.4f}"
        x, y = [0, *shown], [0, *mean]  # up from the corner
        ax.plot(x, y, color=PALETTE[j % 7], lw=wide, label=label, zorder=1 + wide)
        told.append(f"{name} {auc:.4f}")
    ax.set(xlim=(-0.01 * most, most), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    figure.set_label(f"ROC curves{f' of {title}' if title else ''}, AUC: {', '.join(told)}.")
    return figure


def before_after(
    original: ArrayLike, changed: ArrayLike, *, titles: Sequence[str] | None = None
) -> Figure:
    """Images as they were, as they were trained on, and the difference (blue lower, red higher).

    Args:
        original, changed: [k, h, w] grey scale, up to 12; a common scale.
        titles: a title for each image.

    Raises:
        ValueError: images of other shapes, too many, values that are not finite; titles that do not match.
    """
    from matplotlib.figure import Figure

    a, b = np.asarray(original, dtype=float), np.asarray(changed, dtype=float)
    fits = a.shape == b.shape and a.ndim == 3 and 1 <= len(a) <= 12
    if not fits or not np.isfinite([a, b]).all():
        raise ValueError(
            f"expected 1 to 12 finite images [k, h, w], twice, got {a.shape}, {b.shape}"
        )
    k = len(a)
    if titles is not None and len(titles) != k:
        raise ValueError(f"expected {k} titles, one an image, got {len(titles)}")
    side = min(1.3, (WIDTH - 1.4) / k)
    size = (k * side + 1.6, 3 * side * a.shape[1] / a.shape[2] + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(3, k, squeeze=False)
    grey = {"cmap": "gray", "vmin": min(a.min(), b.min()), "vmax": max(a.max(), b.max())}
    far = float(np.abs(b - a).max())
    moved = {"cmap": "RdBu_r", "vmin": -(far or 1.0), "vmax": far or 1.0}
    rows = (("before", a, grey), ("after", b, grey), ("difference", b - a, moved))
    for line, (name, images, scale) in zip(panels, rows, strict=True):
        for ax, image in zip(line, images, strict=True):
            drawn = ax.imshow(image, interpolation="nearest", **scale)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=SMALL, color=INK, rotation=0, ha="right", va="center")
    for ax, words in zip(panels[0], titles or [], strict=False):
        ax.set_title(words, fontsize=SMALL, color=INK)
    bar = figure.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.3, anchor=(0, 0), aspect=9)
    bar.set_ticks([-far, 0.0, far], labels=[f"{x:+.2g}" for x in (-far, 0, far)])
    bar.ax.tick_params(labelsize=SMALL - 1, colors=INK)
    bar.outline.set_visible(False)
    names = f" ({', '.join(titles)})" if titles is not None else ""
    moves = f"values move by at most {far:.3g}, in the mean by {np.abs(b - a).mean():.3g}"
    figure.set_label(f"{k} image{'s'[: k != 1]}{names} before and after; {moves}.")
    return figure


def recovery(
    shares: Mapping[str, ArrayLike],
    by_random: Mapping[str, ArrayLike] | None = None,
    *,
    output: str = "held-out loss",
) -> Figure:
    """The share of the damage that comes back without the suspects, beside removing as many rows at random.

    Means over splits with 95 % t intervals, without those that are nan (no suspects, no damage). Values beyond the
    axis are marked at its edge and written as numbers.

    Args:
        shares, by_random: attack -> share recovered, a number or [s], one a split; 1 is all of it.
        output: what was damaged.

    Raises:
        ValueError: no attacks; random removal of other attacks.
    """
    control = {} if by_random is None else by_random
    _some_of(control, shares, "random removal")
    figure, ax = axes(1.5 + 0.42 * len(shares), f"share recovered of the {output} (1: all of it)")
    ax.axvline(0, color=INK, lw=0.8)
    ax.axvline(1, color=GREY, lw=1, ls=DASHES)
    told: dict[str, list[str]] = {name: [] for name in shares}
    for kind, given, style, up, right in (
        ("without suspects", shares, {"color": BLUE, "marker": "o"}, 0.12, 1.02),
        ("as many at random", control, {"color": GREY, "marker": "s"}, -0.12, 1.14),
    ):
        for row, name in enumerate(shares):
            if name in given:
                found = _mean(given[name])
                words = _plain(found.mean, ".2f").replace("undefined", "–")
                _dot(ax, found, row - up, style)
                at = {"xy": (right, row), "xycoords": ("axes fraction", "data"), "va": "center"}
                ax.annotate(words, **at, fontsize=SMALL, color=style["color"])
                told[name].append(words)
        if given:
            ax.plot([], [], ms=6.5, ls="", label=kind, **style)
    ax.set_yticks(range(len(shares)), list(shares), fontsize=TEXT)
    ax.set_ylim(len(shares) - 0.5, -0.5)
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, SHARES[0] - 0.05), min(max(high, 1.1), SHARES[1] + 0.05))
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    listed = "; ".join(f"{name} {' against '.join(words)}" for name, words in told.items())
    figure.set_label(f"{output} recovered, without suspects against at random: {listed}.")
    return figure


def flip_budgets(predicted: ArrayLike, actual: ArrayLike) -> Figure:
    """The number of rows that turns each output: predicted against found by retraining, and ± 30 %.

    Larger dots are several outputs; triangles at the edge are infinite on one side or both.

    Args:
        predicted, actual: [t], at least 1; infinite where no number within the budget turns it.

    Raises:
        ValueError: no pairs; nan, as where nothing was retrained; numbers below 1.
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x) or not ((x >= 1) & (y >= 1)).all():
        raise ValueError(
            f"expected numbers of rows >= 1, predicted [t] and actual [t], got {x.shape} and {y.shape}; "
            "without a victim budget_to_flip finds no actual ones"
        )
    both, beyond = np.isfinite(x) & np.isfinite(y), int((~np.isfinite(x + y)).sum())
    edge = 2.0 * float(max(filter(math.isfinite, [*x, *y]), default=1.0))  # where infinity is drawn
    near = int((np.abs(x[both] - y[both]) <= np.maximum(BAND * y[both], 1.0)).sum())
    words = f"{near} of {both.sum()} within 30 %" + (f", {beyond} out of reach" if beyond else "")
    figure, ax = axes(4.4, "predicted number of rows", "number that retraining needs", words)
    _log_both(ax, 1.25 * edge, edge if beyond else None)
    line = np.geomspace(0.5, 1.25 * edge, 400)
    room = np.maximum(BAND * line, 1.0)
    low, name = np.maximum(line - room, 0.1), "± 30 % or one row"
    ax.fill_betweenx(line, low, line + room, color=BLUE, alpha=0.1, lw=0, label=name)
    ax.axline((1, 1), (2, 2), color=GREY, lw=1.2, label="as predicted")
    for name, mask, look in (
        ("outputs", both, {"marker": "o", "c": BLUE, "ec": "white"}),
        ("out of reach", ~both, {"marker": "^", "c": "white", "ec": INK}),
    ):
        if mask.any():
            pairs = np.minimum(np.column_stack([x, y])[mask], edge)
            at, many = np.unique(pairs, axis=0, return_counts=True)
            ax.scatter(*at.T, s=20 + 16 * many, lw=0.9, zorder=3, label=name, **look)
    figure.legend(loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    factor = math.exp(np.log(y[both] / x[both]).mean()) if both.any() else math.nan
    told = f"{words}; actual is {_plain(factor, '.3g')} times predicted"
    figure.set_label(f"Scatter of rows needed, retrained against predicted: {told}.")
    return figure


def _log_both(ax: Any, high: float, infinity: float | None) -> None:
    """Equal logarithmic axes with ticks at 1, 2, 5 and where infinity is drawn."""
    ax.set(xscale="log", yscale="log", xlim=(0.8, high), ylim=(0.8, high))
    ticks = [m * 10.0**k for k in range(9) for m in (1, 2, 5) if m * 10.0**k < high / 3]
    names = [f"{tick:g}" for tick in ticks]
    if infinity is not None:
        ticks, names = [*ticks, infinity], [*names, "∞"]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, names)
        axis.set_ticks([], minor=True)


def _rows(given: Mapping[str, ArrayLike], b: int) -> dict[str, NDArray[np.float64]]:
    """Values [s, b] by name, checked."""
    found = {name: np.atleast_2d(np.asarray(x, dtype=float)) for name, x in given.items()}
    for name, rows in found.items():
        if rows.ndim != 2 or rows.shape[1] != b or not len(rows) or not np.isfinite(rows).all():
            raise ValueError(f"expected finite {name!r} [b={b}] or [s, b={b}], got {rows.shape}")
    return found


def _some_of(names: Iterable[str], attacks: Mapping[str, Any], what: str) -> None:
    if not attacks or not set(names) <= set(attacks):
        raise ValueError(f"expected {what} of the attacks {list(attacks)}, got {list(names)}")


def _curve(name: str, false: ArrayLike, true: ArrayLike) -> tuple[Any, Any]:
    x, y = np.asarray(false, dtype=float), np.asarray(true, dtype=float)
    fits = x.ndim == 1 and x.shape == y.shape and len(x) > 1
    if not fits or not all(z[0] == 0 and z[-1] == 1 and (np.diff(z) >= 0).all() for z in (x, y)):
        raise ValueError(f"expected rates of {name!r} that rise together from 0 to 1, got {x}, {y}")
    return x, y


def _mean(values: ArrayLike) -> Interval:
    """Over the splits that have a value."""
    flat = np.ravel(np.asarray(values, dtype=float))
    known = flat[np.isfinite(flat)]
    return paired_interval(known) if len(known) else Interval(math.nan, math.nan, math.nan)


def _dot(ax: Any, found: Interval, height: float, style: dict[str, Any]) -> None:
    """A mean with its interval, at the edge where it lies beyond the axis."""
    shown = float(np.clip(found.mean, *SHARES))
    if shown != found.mean and math.isfinite(found.mean):
        style = {**style, "marker": "<" if found.mean < shown else ">"}
    ends = np.clip([found.low, found.high], *SHARES)
    ax.plot(ends, [height] * 2, color=style["color"], lw=2, alpha=0.5, solid_capstyle="butt")
    ax.plot(shown, height, ms=6.5, ls="", clip_on=False, zorder=3, **style)
