"""The pictures of debugging: how few rows turn decisions, what groups do without their rows, images beside rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.debugging import Subpopulations
from applied.pictures import BLUE, GREY, INK, ORANGE, PALETTE, SMALL, WIDTH, axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {"nearest": (ORANGE, "--"), "random": (GREY, ":")}
FIRST = (BLUE, "-")
OTHERS = [colour for colour in PALETTE if colour not in (BLUE, ORANGE, GREY)]
TICKS = [m * 10**k for k in range(6) for m in (1, 2, 5)]


def turned(numbers: Mapping[str, ArrayLike], most: int, *, title: str = "") -> Figure:
    """Share of decisions that are others without k rows, a step curve for each order of rows.

    Args:
        numbers: order -> the number of rows at which each decision turned; infinite where none did.
        most: rows that were looked at.

    Raises:
        ValueError: no orders; numbers below 1.
    """
    if not numbers:
        raise ValueError("expected at least one order of rows, got none")
    figure, ax = axes(3.2, "rows left out", "share of decisions that turn", title)
    k = np.r_[0.8, np.arange(1, most + 1)]
    for i, (name, given) in enumerate(numbers.items()):
        found = np.asarray(given, dtype=float)
        if not (found >= 1).all():
            raise ValueError(
                f"expected numbers of rows of at least 1 for {name!r}, got {found[:5].tolist()}"
            )
        share = (found[:, None] <= k).mean(axis=0)
        other = (OTHERS[i % len(OTHERS)], "-.")
        colour, line = STYLES.get(name, other if i else FIRST)
        ax.step(k, share, where="post", color=colour, linestyle=line, linewidth=2, label=name)
    ax.set_xscale("log")
    ax.set_xlim(0.8, 1.1 * most)
    ticks = [x for x in TICKS if x <= most]
    ax.set_xticks(ticks, [f"{x:,}" for x in ticks])
    ax.minorticks_off()
    ax.set_ylim(-0.02, 1.03)
    ax.legend(frameon=False, fontsize=SMALL, loc="upper left")
    figure.set_label(
        f"Step curves: share of decisions that turn against rows left out, up to {most}, one curve each for "
        f"{', '.join(numbers)}. {title}"
    )
    return figure


def specificity(found: Subpopulations, names: Sequence[str] | None = None) -> Figure:
    """Heat map [G, G]: the change of each group's mean output (columns) without each group's rows (lines).

    Retrained changes where there are some, else predicted ones.
    """
    change = found.predicted if np.isnan(found.actual).any() else found.actual
    groups = len(change)
    labels = [str(g) for g in range(groups)] if names is None else list(names)
    figure, ax = axes(1.3 + 0.42 * groups, "mean output of group", "without the rows of")
    size = float(np.abs(change).max()) or 1.0
    image = ax.imshow(change, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    for (g, h), value in np.ndenumerate(change):
        dark = abs(value) > 0.6 * size
        ax.text(
            h,
            g,
            f"{value:+.2f}",
            ha="center",
            va="center",
            fontsize=SMALL,
            color="white" if dark else INK,
        )
    ax.set_xticks(range(groups), labels)
    ax.set_yticks(range(groups), labels)
    figure.colorbar(image, ax=ax, label="change")
    figure.set_label(
        f"Heat map of {groups} by {groups} changes: own group {np.diag(change).mean():+.2f} in the mean, others "
        f"{change[~np.eye(groups, dtype=bool)].mean() if groups > 1 else 0:+.2f}."
    )
    return figure


def images(
    rows: Sequence[tuple[str, NDArray[Any], Sequence[tuple[str, NDArray[Any]]]]], most: int = 6
) -> Figure:
    """A line for each decision: its image, then the training images that it hangs on, each below its words.

    Args:
        rows: (words, image [h, w], (words, image) of the training rows, the strongest first).
        most: training images in a line.

    Raises:
        ValueError: no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("expected at least one decision, got none")
    figure = Figure(figsize=(WIDTH, 1.15 * len(rows)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(rows), 1 + most, squeeze=False)
    for line, (words, image, others) in zip(grid, rows, strict=True):
        for ax in line:
            ax.set_axis_off()
        for ax, (name, pixels) in zip(line, [(words, image), *others[:most]], strict=False):
            ax.imshow(pixels, cmap="gray_r")
            first = ax is line[0]
            ax.set_title(name, fontsize=SMALL - 1, color=BLUE if first else INK, pad=2)
    figure.set_label(
        f"A grid of images, {len(rows)} decisions with up to {most} training rows each: "
        + "; ".join(
            f"{words}: {', '.join(name for name, _ in others[:most])}" for words, _, others in rows
        )
        + "."
    )
    return figure
