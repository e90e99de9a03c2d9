"""Pictures of values: who is worth what, what the values find, what happens when the worst are taken away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.pictures import BLUE, GREY, INK, PALETTE, RED, SMALL, TEXT, axes, finite_with_mask
from applied.recipe import paired_interval
from applied.worth import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
ENDS = 24  # owners drawn at either end of the order


def marked(values: ArrayLike, bad: ArrayLike, *, xlabel: str, name: str = "wrong label") -> Figure:
    """A histogram of values with the bad examples in colour; half a per cent at each end is folded in."""
    numbers, mask = finite_with_mask(values, bad, "values")
    low, high = np.quantile(numbers, [0.005, 0.995])
    shown = np.clip(numbers, low, high)
    figure, ax = axes(3.0, xlabel, "examples")
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    bins = np.histogram_bin_edges(shown, 40)
    labels = [f"{name} ({mask.sum():,})", f"others ({(~mask).sum():,})"]
    ax.hist([shown[mask], shown[~mask]], bins, stacked=True, color=[RED, "#C9CBD1"], label=labels)
    figure.legend(loc="outside upper right", ncols=2, fontsize=TEXT - 1, frameon=False)
    figure.set_label(
        f"Histogram of {xlabel}: {mask.sum():,} of {len(numbers):,} with a {name}; their median is "
        f"{np.median(numbers[mask]) if mask.any() else math.nan:.3g}, that of the others {np.median(numbers[~mask]):.3g}."
    )
    return figure


def curves(
    x: ArrayLike,
    lines: Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    grey: Sequence[str] = ("random",),
) -> Figure:
    """Lines over x [k] with 95 % bands over seeds.

    Args:
        lines: name -> [k], or [s, k] with a row for each seed (mean and t interval are drawn).
        grey: names of controls that are drawn behind.
    """
    at = np.asarray(x, dtype=float)
    figure, ax = axes(3.8, xlabel, ylabel)
    told = []
    colours = cycle(PALETTE)
    for place, (name, given) in enumerate(lines.items()):
        rows = np.atleast_2d(np.asarray(given, dtype=float))
        colour = GREY if name in grey else next(colours)
        style = "--" if name in grey else "-"
        every = max(1, len(at) // 8)
        mark = {"marker": MARKERS[place % len(MARKERS)], "markevery": every, "ms": 5}
        ax.plot(at, rows.mean(0), style, color=colour, lw=1.7, label=name, **mark)
        if len(rows) > 1:
            ends = [paired_interval(column) for column in rows.T]
            ax.fill_between(
                at, [e.low for e in ends], [e.high for e in ends], color=colour, alpha=0.15, lw=0
            )
        told.append(f"{name} from {rows.mean(0)[0]:.3g} to {rows.mean(0)[-1]:.3g}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    figure.set_label(f"{ylabel} against {xlabel}: {'; '.join(told)}.")
    return figure


def owners(found: Mapping[str, Values], *, xlabel: str) -> Figure:
    """Values of owners by several methods as bars with 95 % intervals, the highest owner on top.

    Of many owners the highest and the lowest by the first method are drawn.
    """
    first = next(iter(found.values()))
    order = np.argsort(first.values, kind="stable")
    between = max(0, len(order) - 2 * ENDS)
    order = np.r_[order[:ENDS], order[-ENDS:]] if between else order
    left_out = f"; {between:,} owners between are left out" if between else ""
    figure, ax = axes(1.2 + 0.13 * len(order) * (1 + len(found)), xlabel + left_out)
    height = 0.8 / len(found)
    for j, (name, values) in enumerate(found.items()):
        where = {str(player): k for k, player in enumerate(values.players)}
        if where.keys() != {str(player) for player in first.players}:
            raise ValueError(
                f"expected values of the same owners by every method, got {values.players[:5]} by {name!r} beside {first.players[:5]}"
            )
        rows = np.array([where[str(first.players[i])] for i in order])
        place = np.arange(len(order)) + 0.4 - height * (j + 0.5)
        error = np.nan_to_num(values.half[rows])
        ax.barh(
            place, values.values[rows], height * 0.9, xerr=error, color=PALETTE[j % len(PALETTE)], label=name,
            error_kw={"lw": 1, "ecolor": INK},
        )  # fmt: skip
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_yticks(range(len(order)), [str(first.players[i]) for i in order], fontsize=TEXT - 1)
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    listed = [f"{first.players[i]} {first.values[i]:.3g}" for i in order[::-1]]
    figure.set_label(f"{xlabel} by {next(iter(found))}: {', '.join(listed)}{left_out}.")
    return figure


def frontier(spent: ArrayLike, gained: ArrayLike, *, xlabel: str, ylabel: str) -> Figure:
    """What the best purchase for every budget gains."""
    x, y = np.asarray(spent, dtype=float), np.asarray(gained, dtype=float)
    figure, ax = axes(3.0, xlabel, ylabel)
    ax.step(x, y, where="post", color=BLUE, lw=1.8)
    ax.plot(x, y, "o", color=BLUE, ms=4)
    figure.set_label(
        f"{ylabel} against {xlabel}: from {y[0]:.3g} at {x[0]:.3g} to {y[-1]:.3g} at {x[-1]:.3g}."
    )
    return figure


def along_p(p: ArrayLike, gradient: NDArray[Any], names: Sequence[str], *, ylabel: str) -> Figure:
    """Marginal effects [p, k] of some players against the share p of others that are kept.

    At p = 1 it is leave-one-out, at ½ Banzhaf's value, and the mean over p is Shapley's (dotted).
    """
    at = np.asarray(p, dtype=float)
    figure, ax = axes(3.6, "share p of the others that is kept", ylabel)
    for j, name in enumerate(names):
        colour = PALETTE[j % len(PALETTE)]
        ax.plot(at, gradient[:, j], color=colour, lw=1.7, label=name)
        if len(at) > 1:
            mean = np.trapezoid(gradient[:, j], at) / np.ptp(at)
            ax.axhline(mean, color=colour, lw=0.9, ls=":")
    ax.axvline(0.5, color=GREY, lw=0.8, ls="--")
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    listed = [
        f"{name} from {g[0]:.3g} to {g[-1]:.3g}" for name, g in zip(names, gradient.T, strict=True)
    ]
    figure.set_label(f"{ylabel} along p: {'; '.join(listed)}.")
    return figure
