"""One self-contained HTML page per run: tables, pictures and documents; no script, nothing loaded.

    Page("Data for docs", "influence at exposure 0.2, 5 seeds", {
        "Held-out loss": [table(rows, ("arm", "loss")), picture(arms(names, mean, low, high))],
        "Highest documents": [documents(highest)],
    }).save(folder / "report.html")

Every fragment is a plain string whose text is escaped; figures come from `applied.pictures`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from applied.pictures import digits, png
from applied.recipe import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN, KEPT = 600, 20_000  # characters of a document shown at once, and at all

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #60646c; --line: #d9dbe0; --paper: #fff; --tint: #f4f5f7; --mark: #0b5f94; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a3a7b0; --line: #3a3d44; --paper: #17181b; --tint: #212328; --mark: #7cc4f0; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #fff; --mark: #000; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 46rem; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; } figcaption, caption { text-align: left; padding: .4rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: 60%; overflow-wrap: normal; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); } th { font-weight: 600; }
.num { text-align: right; white-space: nowrap; } .best { font-weight: 700; color: var(--mark); } td small { color: var(--soft); font-weight: 400; }
figure { margin: 1rem 0; } img { display: block; width: 100%; max-width: 38rem; height: auto; background: #fff; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; } dt { color: var(--soft); } dd { margin: 0; }
article { margin: 1rem 0; padding: .7rem .9rem; background: var(--tint); border: 1px solid var(--line); border-radius: 6px; } article header { font-size: .88rem; }
pre { margin: .5rem 0 0; white-space: pre-wrap; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; } summary { margin-top: .5rem; cursor: pointer; color: var(--mark); font-size: .88rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, article, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Page:
    """A report: a title, a line below it, and sections of fragments by heading."""

    title: str
    subtitle: str
    sections: Mapping[str, Sequence[str]]

    def html(self) -> str:
        """The whole page; its policy forbids scripts and anything loaded from elsewhere."""
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        body = "".join(
            f"<section><h2>{escape(heading)}</h2>\n{''.join(parts)}</section>\n"
            for heading, parts in self.sections.items()
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n<body><main>"
            f'<h1>{escape(self.title)}</h1><p class="soft">{escape(self.subtitle)}</p>\n'
            f"{body}</main></body></html>\n"
        )

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        from attribution_core.disk.files import write_text

        write_text(Path(path), self.html())


def paragraph(words: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(words)}</p>\n"


def facts(mapping: Mapping[str, Any]) -> str:
    """A list of names and values: the method, anchor, seeds and fractions that numbers stand on."""
    rows = (f"<dt>{escape(k)}</dt><dd>{_cell(v, zeros=False)}</dd>" for k, v in mapping.items())
    return f"<dl>{''.join(rows)}</dl>\n"


def table(
    rows: Sequence[Sequence[Any]],
    header: Sequence[str],
    *,
    best: Mapping[str, str] | None = None,
    caption: str = "",
) -> str:
    """Rows as an HTML table; columns of numbers are aligned to the right.

    Args:
        rows: cells are text, numbers, None, or an `Interval` (its mean, with the interval beside it).
        best: header -> "low" or "high": which value of that column is set in bold.

    Raises:
        ValueError: a row of another length than the header; `best` of an unknown column or kind.
    """
    best = best or {}
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} cells {tuple(header)}, got {tuple(row)}")
    if not set(best) <= set(header) or not set(best.values()) <= {"low", "high"}:
        raise ValueError(f"expected best: one of {tuple(header)} -> 'low' or 'high', got {best}")
    columns = [[_number(row[j]) for row in rows] for j in range(len(header))]
    right = [_aligned(rows, j) for j in range(len(header))]
    winners = set()
    for j, way in ((header.index(name), way) for name, way in best.items()):
        values = [v for v in columns[j] if v is not None and math.isfinite(v)]
        first = (min if way == "low" else max)(values, default=None)
        winners |= {(i, j) for i, v in enumerate(columns[j]) if v is not None and v == first}

    def cell(tag: str, content: str, i: int, j: int) -> str:
        names = " ".join(["num"] * right[j] + ["best"] * ((i, j) in winners))
        return f'<{tag} class="{names}">{content}</{tag}>' if names else f"<{tag}>{content}</{tag}>"

    head = "".join(cell("th", escape(name), -1, j) for j, name in enumerate(header))
    body = "\n".join(
        f"<tr>{''.join(cell('td', _cell(x), i, j) for j, x in enumerate(row))}</tr>"
        for i, row in enumerate(rows)
    )
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{top}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _number(value: Any) -> float | None:
    """The number that a cell stands for, or None for text and for empty cells."""
    value = value.mean if isinstance(value, Interval) else value
    isnumber = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return float(value) if isnumber else None


def _aligned(rows: Sequence[Sequence[Any]], j: int) -> bool:
    """Whether a column holds numbers only, apart from empty cells."""
    filled = [row[j] for row in rows if row[j] is not None]
    return bool(filled) and all(_number(value) is not None for value in filled)


def _cell(value: Any, *, zeros: bool = True) -> str:
    """A value as escaped text: numbers to four digits, an interval small beside its mean."""
    if isinstance(value, Interval):
        known = math.isfinite(value.low) and math.isfinite(value.high)
        beside = f" <small>[{digits(value.low)}, {digits(value.high)}]</small>" if known else ""
        return _cell(value.mean) + beside
    number = _number(value)
    if value is None or (number is not None and math.isnan(number)):
        return "–"
    if number is None:
        return escape(str(value))
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    return digits(number) if zeros else f"{number:.4g}"


@dataclass(frozen=True)
class Document:
    """One document of a list; `score` is the mean output's derivative by its weight."""

    id: Any
    source: str
    domain: str
    score: float
    tokens: int
    text: str


def documents(items: Iterable[Document]) -> str:
    """Documents as cards: where they come from, their score, their text with the rest folded away."""
    cards = []
    for item in items:
        about = f"{item.domain} · score {item.score:.4g} · {item.tokens:,} tokens · {item.source}"
        first, rest = item.text[:SHOWN], item.text[SHOWN:KEPT]
        cut = f"\n[{len(item.text) - KEPT:,} more characters]" if len(item.text) > KEPT else ""
        more = (
            f"<details><summary>{len(item.text) - SHOWN:,} more characters</summary>"
            f"<pre>{escape(rest + cut)}</pre></details>"
            if rest
            else ""
        )
        cards.append(
            f"<article><header><b>{escape(str(item.id))}</b> "
            f'<span class="soft">{escape(about)}</span></header>'
            f"<pre>{escape(first)}</pre>{more}</article>\n"
        )
    return "".join(cards)


def picture(figure: Figure, caption: str = "", *, alt: str | None = None) -> str:
    """A figure as HTML with the PNG inside.

    Raises:
        ValueError: no alt text, given or carried by the figure as its label.
    """
    alt = alt or str(figure.get_label())
    if not alt.strip():
        raise ValueError("expected alt text for the figure, got none; say what it shows: alt='...'")
    data = base64.b64encode(png(figure)).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>\n'


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write json with sorted keys; numpy becomes plain, dataclasses mappings, nan and infinity null.

    Raises:
        TypeError: a value that json has no form for.
    """
    from attribution_core.disk.files import write_text

    text = json.dumps(_bare(metrics), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(Path(path), text + "\n")


def _bare(value: Any) -> Any:
    """The value in json's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _bare(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bare(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _bare(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
