"""The pictures of a report: matplotlib figures that carry their own alt text as their label."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.recipe import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attribution_core.comparison import Comparison

# Okabe & Ito's colours, distinct for colour-blind eyes as well
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, YELLOW, GREY, INK = "#56B4E9", "#CC79A7", "#F0E442", "#8A8A8A", "#222222"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY)
PALE = (ORANGE, SKY, PINK, YELLOW)  # dark letters on these
KINDS = {"random": (GREY, "s"), "chosen": (BLUE, "o"), "filters": (ORANGE, "^")}
KINDS["tilted"] = (GREEN, "D")
OTHERS = [((PINK, SKY, RED, INK)[i % 4], "vPXp<"[i % 5]) for i in range(20)]
HATCHES = ("", "///", "...", "xxx")
DOMAINS = 24  # drawn by name; thousands take minutes to draw, and look alike
WIDTH = 5.8  # inches; a phone shows it at two thirds, with letters still readable
TEXT, SMALL = 10.5, 9.0  # points
WORDS: dict[str, Any] = {"fontsize": SMALL, "color": INK}


def png(figure: Figure) -> bytes:
    """A figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with _any_name(figure):
        figure.savefig(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _any_name(figure: Any) -> Iterator[None]:
    """Draw names as they are: $x$ is no formula, letters that the font lacks are boxes."""
    from matplotlib.text import Text

    for words in figure.findobj(Text):
        words.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def axes(height: float, xlabel: str, ylabel: str = "", title: str = "") -> tuple[Any, Any]:
    """A figure and its axes in the common style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=TEXT - 1, colors=INK)
    ax.ticklabel_format(useOffset=False)
    ax.set_xlabel(xlabel, fontsize=TEXT, color=INK)
    ax.set_ylabel(ylabel, fontsize=TEXT, color=INK)
    if title:
        ax.set_title(title, fontsize=TEXT + 0.5, color=INK, loc="left")
    return figure, ax


def rank_correlation(
    predicted: ArrayLike, actual: ArrayLike, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Spearman's rank correlation with its 95 % percentile interval over resampled pairs.

    nan where it is not defined: fewer than three pairs, or a side without variation. The ends alone are
    nan where all resamples agree: of a perfect order they say nothing of how sure it is.
    """
    from scipy.stats import rankdata

    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected pairs, predicted [m] and actual [m], got {x.shape}, {y.shape}")
    if len(x) < 3:
        return Interval(math.nan, math.nan, math.nan)
    again = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    pick = np.concatenate([np.arange(len(x))[None], again])
    a, b = (rankdata(side[pick], axis=1) - (len(x) + 1) / 2 for side in (x, y))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    rho = np.divide((a * b).sum(1), norm, out=np.full(len(norm), math.nan), where=norm > 0)
    known = rho[1:][np.isfinite(rho[1:])] if np.isfinite(rho[0]) else rho[:0]
    agree = not len(known) or np.ptp(known) < 1e-9  # rounding
    low, high = (math.nan, math.nan) if agree else np.quantile(known, [0.025, 0.975])
    return Interval(float(rho[0]), float(low), float(high))


def calibration(
    predicted: ArrayLike,
    actual: ArrayLike,
    kinds: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    *,
    unit: str = "held-out loss, nats",
) -> Figure:
    """Actual against predicted outputs of retrained subsets, with rank correlation and slope.

    Args:
        predicted, actual: [m], one value per retrained subset.
        kinds: [m] how each subset was made (chosen, random, filters, tilted, ...): colour and shape.
        labels: [m] a name to write beside a point, or "" for none.
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    rho = rank_correlation(x, y)
    if not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(
            f"expected finite outputs of at least one retrained subset, got {len(x)} subsets, "
            f"{int((~np.isfinite(x + y)).sum())} with NaN or infinity"
        )
    kinds = ["subsets"] * len(x) if kinds is None else [str(kind) for kind in kinds]
    slope = np.polyfit(x, y, 1)[0] if len(x) > 1 and np.ptp(x) > 0 else math.nan
    words = f"Spearman {_plain(rho, '.2f')}, slope {_plain(slope, '.2f')}, {len(x)} subset{'s'[: len(x) != 1]}"
    figure, ax = axes(4.6, f"predicted ({unit})", f"actual ({unit})", words)
    near = _limits(ax, x, y)
    for kind, (colour, marker) in _styles(kinds).items():
        mine = np.array(kinds) == kind
        own = rank_correlation(x[mine], y[mine], draws=0).mean if mine.sum() >= 5 else math.nan
        name = f"{kind}: {mine.sum()}" + (f", ρ {own:.2f}" if math.isfinite(own) else "")
        look = {"c": colour, "marker": marker, "s": 38, "ec": "white", "lw": 0.7, "zorder": 3}
        ax.scatter(x[mine], y[mine], label=name, **look)
    if math.isfinite(slope):
        dots = (0, (2, 2))
        ax.axline((x.mean(), y.mean()), slope=slope, color=INK, lw=1, ls=dots, label="fitted line")
    if near:
        ax.axline((x[0], x[0]), slope=1, color=GREY, lw=1.2, label="actual = predicted")
    else:
        words += f"\nactual − predicted is {(y - x).mean():+.3g} in the mean"
        ax.set_title(words, fontsize=TEXT + 0.5, color=INK, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    if labels is not None:
        _beside(figure, ax, x, y, [str(label) for label in labels])
    figure.set_label(f"Scatter of actual against predicted {unit}. {words}.".replace("\n", ", "))
    return figure


def _plain(value: Any, form: str) -> str:
    """A number or an interval in words, "undefined" where it is nan."""
    if isinstance(value, Interval):
        known = math.isfinite(value.low) and math.isfinite(value.high)
        ends = f" [{value.low:{form}}, {value.high:{form}}]" if known else ""
        return _plain(value.mean, form) + ends
    return f"{value:{form}}" if math.isfinite(value) else "undefined"


def _styles(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by kind, in order of appearance; the known kinds keep theirs everywhere."""
    seen = list(dict.fromkeys(kinds))
    new = [kind for kind in seen if kind not in KINDS]
    return {k: KINDS[k] if k in KINDS else OTHERS[new.index(k) % len(OTHERS)] for k in seen}


def _limits(ax: Any, x: NDArray[Any], y: NDArray[Any]) -> bool:
    """Set the axes' ranges: one for both where the points still fill it. Is actual = predicted inside?"""
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    near = bool(high - low <= 4 * min(np.ptp(x), np.ptp(y)))
    for values, limit in ((x, ax.set_xlim), (y, ax.set_ylim)):
        start, end = (low, high) if near else (values.min(), values.max())
        pad = 0.08 * (end - start) or 0.01 * abs(end) or 1.0
        limit(start - pad, end + pad)
    return near


def _beside(figure: Any, ax: Any, x: NDArray[Any], y: NDArray[Any], labels: Sequence[str]) -> None:
    """Labels beside their points, each in the first free place of eight around it, or left out."""
    from matplotlib.patheffects import withStroke

    with _any_name(figure):
        figure.draw_without_rendering()  # settles the layout, so that points have places
    scale, frame = figure.dpi / 72, ax.get_window_extent().extents / (figure.dpi / 72)
    places = ax.transData.transform(np.column_stack([x, y])) / scale  # in points, as letters are
    taken = [(px - 3, py - 3, px + 3, py + 3) for px, py in places]
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for (px, py), at, label in zip(places, zip(x, y, strict=True), labels, strict=True):
        wide, tall = 0.29 * SMALL * len(label), 0.58 * SMALL  # half of what the letters take
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            dx, dy = right * (wide + 7), up * (tall + 5)
            box = (px + dx - wide, py + dy - tall, px + dx + wide, py + dy + tall)
            inside = (box[:2] > frame[:2]).all() and (box[2:] < frame[2:]).all()
            if label and inside and not any(_overlap(box, other) for other in taken):
                centred = {"ha": "center", "va": "center", "textcoords": "offset points"}
                ax.annotate(label, at, (dx, dy), **centred, **WORDS, path_effects=halo)
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def arms(
    names: Sequence[str],
    mean: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    reference: str = "random",
    highlight: str = "chosen",
    xlabel: str = "held-out loss after retraining, nats (lower is better)",
) -> Figure:
    """Retrained loss of every arm with its interval, the lowest on top; a line at the reference.

    `low` and `high` [a] may be left out or hold nan where one seed allows no interval.
    """
    middle = np.asarray(mean, dtype=float)
    unknown = np.full(len(middle), math.nan)
    ends = [unknown if end is None else np.asarray(end, dtype=float) for end in (low, high)]
    order = np.argsort(-middle, kind="stable")
    figure, ax = axes(1.1 + 0.36 * len(order), xlabel)
    ax.set_yticks(range(len(order)), [names[i] for i in order], fontsize=TEXT)
    listed = []
    for row, (i, tick) in enumerate(zip(order, ax.get_yticklabels(), strict=True)):
        colour, weight = (BLUE, "bold") if names[i] == highlight else (INK, "normal")
        tick.set(color=colour, weight=weight)
        ax.plot([ends[0][i], ends[1][i]], [row, row], color=colour, lw=2, solid_capstyle="butt")
        ax.plot(middle[i], row, "o", color=colour, ms=6.5)
        right = {"xy": (1.01, row), "xycoords": ("axes fraction", "data"), "va": "center"}
        ax.annotate(digits(middle[i]), **right, fontsize=TEXT - 1, color=colour)
        if names[i] == reference:
            ax.axvline(middle[i], color=GREY, lw=1, ls=(0, (4, 3)), zorder=0)
        listed.append(f"{names[i]} {_plain(Interval(middle[i], ends[0][i], ends[1][i]), '.4g')}")
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.margins(x=0.06)
    figure.set_label(f"Arms by {xlabel}: {'; '.join(reversed(listed))}.")
    return figure


def composition(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """What every arm is made of: share by domain, one stacked bar per arm, the first arm on top.

    Of many domains those are named that are largest in any arm, and the others are one.
    """
    shares = _folded(shares)
    domains = list(dict.fromkeys(domain for arm in shares.values() for domain in arm))
    names, columns = _legend([str(domain) for domain in domains])
    lines = math.ceil(len(names) / columns)
    figure, ax = axes(1.2 + 0.4 * len(shares) + 0.25 * lines, "share")
    ax.set_yticks(range(len(shares)), list(shares), fontsize=TEXT)
    handles, left, edge = [], np.zeros(len(shares)), {"ec": "white", "lw": 0.8}
    for j, domain in enumerate(domains):
        colour, hatch = PALETTE[j % len(PALETTE)], HATCHES[j // len(PALETTE) % len(HATCHES)]
        part = np.array([float(arm.get(domain, 0.0)) for arm in shares.values()])
        handles.append(ax.barh(range(len(part)), part, 0.72, left, fc=colour, hatch=hatch, **edge))
        ink = INK if colour in PALE or hatch else "white"
        ground = {"fc": "white", "ec": "none", "pad": 1} if hatch else None
        for row in np.flatnonzero(part >= 0.07):
            at = (left[row] + part[row] / 2, row)
            style = {
                "ha": "center",
                "va": "center",
                "fontsize": SMALL,
                "color": ink,
                "bbox": ground,
            }
            ax.text(*at, f"{100 * part[row]:.0f}", **style)
        left = left + part
    ax.invert_yaxis()
    ax.set_xlim(0, max(1.0, left.max(initial=0.0)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    below = {"loc": "outside lower center", "handlelength": 1.2, "columnspacing": 1.2}
    figure.legend(handles, names, ncols=columns, **below, fontsize=SMALL, frameon=False)
    listed = [
        f"{arm}: " + ", ".join(f"{name} {100 * x:.0f} %" for name, x in parts.items() if x > 0)
        for arm, parts in shares.items()
    ]
    figure.set_label(f"Share of each domain. {'; '.join(listed)}.")
    return figure


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Names that fit the figure's width, the middle of longer ones left out, in so many columns, 4 at most."""
    width, handle = 72 * WIDTH / SMALL, 3.4  # in sizes of a letter, which is .6 wide
    most = int((width - handle) / 0.6)
    half = (most - 1) // 2
    short = [name if len(name) <= most else f"{name[:half]}…{name[-half:]}" for name in names]
    longest = max(map(len, short), default=1)
    return short, min(4, max(1, int(width / (0.6 * longest + handle))))


def _folded(shares: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """Shares of the largest domains and of "others (k)", in the order that they came in."""
    most: dict[str, float] = {}
    for arm in shares.values():
        for domain, share in arm.items():
            most[domain] = max(share, most.get(domain, 0.0))
    few = set(sorted(most, key=lambda domain: -most[domain])[:DOMAINS])
    if len(most) <= len(few) + 1:  # one other has a name
        return shares
    others = f"others ({len(most) - len(few):,})"
    return {
        name: {
            **{domain: share for domain, share in arm.items() if domain in few},
            others: sum(share for domain, share in arm.items() if domain not in few),
        }
        for name, arm in shares.items()
    }


def finite_with_mask(
    values: ArrayLike, mask: ArrayLike, name: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Numbers [n], one or more, and a mask of them.

    Raises:
        ValueError: none, NaN or infinity among them, or a mask of another length.
    """
    found, which = np.asarray(values, dtype=float), np.asarray(mask).astype(bool)
    if (
        not found.size
        or found.ndim != 1
        or which.shape != found.shape
        or not np.isfinite(found).all()
    ):
        raise ValueError(
            f"expected finite {name} [n >= 1] and a mask of them, got shapes {found.shape} and {which.shape} with "
            f"{int((~np.isfinite(found)).sum())} NaN or infinite"
        )
    return found, which


def histogram(
    scores: ArrayLike, chosen: ArrayLike, *, xlabel: str = "score (negative lowers the loss)"
) -> Figure:
    """Scores of all examples, the chosen ones in colour; half a per cent at each end is folded in."""
    values, mask = finite_with_mask(scores, chosen, "scores")
    low, high = np.quantile(values, [0.005, 0.995])
    outside = int(((values < low) | (values > high)).sum())
    size = max(abs(low), abs(high))
    power = 3 * math.floor(math.log10(size) / 3) if size > 0 else 0
    unit = f" in 1e{power}" if power else ""
    folded = f"; {outside:,} beyond the ends" if outside else ""
    figure, ax = axes(3.0, f"{xlabel}{unit}{folded}", "examples")
    shown = np.clip(values, low, high) / 10.0**power
    bins = np.histogram_bin_edges(shown, min(50, max(5, round(2 * len(values) ** (1 / 3)))))
    names = [f"chosen ({mask.sum():,})", f"left out ({(~mask).sum():,})"]
    both = [shown[mask], shown[~mask]]
    ax.hist(both, bins, stacked=True, color=[BLUE, "#C9CBD1"], label=names)
    figure.legend(loc="outside upper right", ncols=2, fontsize=TEXT - 1, frameon=False)
    figure.set_label(
        f"Histogram of scores: {mask.sum():,} chosen of {len(values):,}, "
        f"median {np.median(values):.3g}, 99 % between {low:.3g} and {high:.3g}."
    )
    return figure


def lds_against_compute(comparison: Comparison, keep: float | None = None) -> Figure:
    """What a method's correlation costs: LDS with its interval against seconds, floors hollow.

    Args:
        keep: which keep fraction; needed where the comparison has several.
    """
    if keep is None and len(comparison.keeps) > 1:
        raise ValueError(f"expected one of the keep fractions {comparison.keeps}, got none")
    rows = comparison.at(comparison.keeps[0] if keep is None else keep)
    if not rows:
        raise ValueError(f"no rows at keep {keep}; the comparison has {comparison.keeps}")
    first = rows[0]
    words = f"{first.lds.rows} retrainings on {first.keep:.0%} of the data, {first.lds.seeds} seeds each"
    figure, ax = axes(
        5.0, "seconds, after training", "LDS (rank correlation with retraining)", words
    )
    x, y = np.array([row.seconds for row in rows]), np.array([row.lds.mean for row in rows])
    ax.set_xscale("log")
    for row in rows:
        colour, fill = (GREY, "white") if row.floor else (BLUE, BLUE)
        low, high = row.lds.interval
        ax.plot([row.seconds] * 2, [low, high], color=colour, lw=1.2, alpha=0.5)
        ax.plot(row.seconds, row.lds.mean, "o", color=colour, mfc=fill, ms=6, zorder=3)
    if math.isfinite(first.lds.ceiling):
        ax.axhline(first.lds.ceiling, color=INK, lw=1, ls=(0, (4, 3)))
        ax.annotate(
            f"ceiling {first.lds.ceiling:.2f} (seed noise)", (0.01, first.lds.ceiling), (0, 4),
            xycoords=("axes fraction", "data"), textcoords="offset points", **WORDS,
        )  # fmt: skip
    ax.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    ax.xaxis.set_minor_formatter("")
    lowest = min(row.lds.interval[0] for row in rows)
    ax.set_ylim(lowest - 0.08 if math.isfinite(lowest) else y.min() - 0.08, 1.02)
    least = math.sqrt(10 * x.min() / x.max())  # a decade at least, so that one tick has a number
    ax.set_xlim(x.min() / max(2.0, least), x.max() * max(2.0, least))
    _column(ax, x, y, [row.method for row in rows], [row.floor for row in rows])
    best = f"{first.method} {first.lds.mean:.2f}"
    figure.set_label(f"LDS against seconds of {len(rows)} methods. {words}. Best: {best}.")
    return figure


def _column(
    ax: Any, x: NDArray[Any], y: NDArray[Any], labels: Sequence[str], pale: Sequence[bool]
) -> None:
    """Labels in a column right of the axes, in the order of y, each tied to its point by a thin line.

    Moved apart by as little as keeps them legible: least squares under a smallest distance.
    """
    from scipy.optimize import isotonic_regression

    low, high = ax.get_ylim()
    # the axes fill about .8 of the figure's height; a line of letters and its space is 1.45 of their size
    gap = 1.45 * SMALL / 72 / (0.8 * ax.figure.get_figheight()) * (high - low)
    order = np.argsort(y, kind="stable")
    apart = gap * np.arange(len(y))
    room = max(low, high - apart[-1])  # of the lowest, so that the highest stays inside
    heights = np.clip(isotonic_regression(y[order] - apart).x, low, room) + apart
    line = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 2, "shrinkB": 4, "zorder": 1}
    for i, height in zip(order, heights, strict=True):
        ax.annotate(
            labels[i], (x[i], y[i]), (1.04, height), textcoords=("axes fraction", "data"), va="center",
            arrowprops={**line, "relpos": (0, 0.5)}, fontsize=SMALL, color=GREY if pale[i] else INK,
        )  # fmt: skip


def digits(number: float) -> str:
    """Four digits, zeros kept, so that the numbers of a column line up."""
    return f"{number:#.4g}".rstrip(".")
