"""Data on any machine: text from the Python standard library, tables from scikit-learn.

    pool, target, test = text_split()                     # three lists of Document
    score, choose, report = split_by_source(target, parts=(0.5, 0.25, 0.25))
    table = digits(mislabel=0.1)                          # .x .y .test_x .test_y .mislabelled

The task of the text: docstrings of modules that the pool never sees are the target; the pool is a
mixture of eight domains, few of them prose, and is to be chosen from. Every top-level module belongs
to the pool, to the target or to the test, so the three never share a file.

Nothing is downloaded and nothing is imported: the library's .py files are read and parsed. The same
Python version gives the same documents on every machine (modules that some distributions leave out,
such as tkinter, are only ever in the pool, so target and test do not depend on them).

The domains are where a document came from, not whether it helps: a word-shuffled docstring can be
useful to a short-context model. Judge a selection by retraining, never by domains.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sys
import sysconfig
import tokenize
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 200, 1200  # characters of a document, about; less than 100 is left out
SHARES = {  # of the pool, in documents
    "code": 0.42,  # source without docstrings and comments
    "tables": 0.12,  # the long tables of the encodings package
    "shuffled": 0.10,  # docstrings, words in random order
    "noised": 0.10,  # docstrings, a quarter of the characters replaced
    "prose": 0.08,  # docstrings
    "topics": 0.08,  # the reference manual, from pydoc_data.topics
    "comments": 0.05,
    "near-duplicates": 0.05,  # of other documents of the pool
}
COPIES = 10  # near-duplicates of one document
POOL_ONLY = {  # their own domains, or missing from some distributions and versions
    *("encodings", "pydoc_data", "tkinter", "idlelib", "turtle", "turtledemo"),
    *("lib2to3", "distutils", "ensurepip"),
}

Lines = list[tuple[int, str]]  # (line number in the file, text)


@dataclass(frozen=True)
class Document:
    """A piece of text and where it came from.

    Args:
        id: unique and stable, such as "code/ast.py#12".
        text: 100 to about 1200 printable characters, tabs as spaces, lines ended by newlines.
        domain: a key of SHARES; "prose" in target and test.
        source: file and lines, "json/decoder.py:12-40"; a topic counts as a file of its own,
            "pydoc_data/calls:3-9".
    """

    id: str
    text: str
    domain: str
    source: str

    @property
    def file(self) -> str:
        return self.source.rpartition(":")[0]


def text_split(
    documents: int = 6000, *, target: int = 800, test: int = 500, seed: int = 0
) -> tuple[list[Document], list[Document], list[Document]]:
    """Pool, target and test documents, from three disjoint sets of top-level modules.

    The numbers are upper limits: where the library holds less, all of it is taken. The seed draws
    the documents, not the split by modules and not the cutting into documents.
    """
    return (
        text_pool(documents, seed=seed),
        text_target(target, seed=seed),
        text_test(test, seed=seed),
    )


def text_pool(documents: int = 6000, *, seed: int = 0) -> list[Document]:
    """A mixture of eight domains in about the proportions of SHARES, in random order.

    Shuffled and noised documents are made of other docstrings than the prose documents. A domain
    of which the library holds too little stays smaller; the others do not grow.
    """
    _at_least(20, documents)
    library, rng = _library("pool"), np.random.default_rng(seed)
    want = {domain: round(share * documents) for domain, share in SHARES.items()}
    pool = []
    for domain in ("code", "tables", "topics", "comments"):
        pool += _draw(library.get(domain, []), want[domain], rng)

    spoil = {"prose": lambda text, rng: text, "shuffled": _shuffled, "noised": _noised}
    labels = rng.permutation(np.repeat(list(spoil), [want[domain] for domain in spoil])).tolist()
    docstrings = _draw(library["prose"], len(labels), rng)
    for domain, d in zip(labels[: len(docstrings)], docstrings, strict=True):
        id = d.id.replace("prose", domain, 1)
        pool.append(replace(d, id=id, domain=domain, text=spoil[domain](d.text, rng)))

    domain, number = "near-duplicates", want["near-duplicates"]
    copied = [d for d in _draw(pool, -(-number // COPIES), rng) for _ in range(COPIES)][:number]
    for k, d in enumerate(copied):
        id = f"{domain}/{d.id}~{k % COPIES}"
        pool.append(replace(d, id=id, domain=domain, text=_edited(d.text, rng)))
    return _draw(pool, len(pool), rng)


def text_target(documents: int = 800, *, seed: int = 0) -> list[Document]:
    """Docstrings of modules that are neither in the pool nor in the test."""
    _at_least(1, documents)
    return _draw(_library("target")["prose"], documents, np.random.default_rng(seed))


def text_test(documents: int = 500, *, seed: int = 0) -> list[Document]:
    """Docstrings of yet other modules: a shifted test, touched only to report."""
    _at_least(1, documents)
    return _draw(_library("test")["prose"], documents, np.random.default_rng(seed))


def split_by_source(
    documents: Sequence[Document], parts: Sequence[float] = (0.5, 0.25, 0.25), *, seed: int = 0
) -> list[list[Document]]:
    """Cut a list in parts of about the given shares of characters, never through a file.

    The files come in random order; each goes to the part that is furthest below its share. The
    documents of a part keep the order that they had.
    """
    shares = np.asarray(parts, dtype=float)
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.file] += len(document.text)
    if shares.ndim != 1 or not shares.size or shares.min() <= 0 or len(sizes) < len(shares):
        raise ValueError(
            f"expected positive shares, one per part, and at least as many files as parts, got "
            f"parts={parts!r} and {len(sizes)} files; pass fewer parts or more documents"
        )
    filled = np.zeros(len(shares))
    home: dict[str, int] = {}
    files = sorted(sizes)
    for i in np.random.default_rng(seed).permutation(len(files)):
        part = int(np.argmin(filled / shares))
        home[files[i]] = part
        filled[part] += sizes[files[i]]
    return [[d for d in documents if home[d.file] == part] for part in range(len(shares))]


# --- the library, read once -----------------------------------------------------------------------


def _module_split(top: str) -> str:
    """pool, target or test, by a hash that is the same in every process and version.

    `_pyio` goes with `io` and `_strptime` with `strptime`: they repeat one another's docstrings.
    """
    family = top.removeprefix("_py").lstrip("_")
    if top in POOL_ONLY:
        return "pool"
    share = int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "big") / 2**32
    return "pool" if share < 0.42 else "target" if share < 0.77 else "test"


@lru_cache(maxsize=3)
def _library(split: str) -> dict[str, list[Document]]:
    """All documents of the split's modules by domain; target and test need the docstrings only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Document]] = defaultdict(list)
    # These names leave out site-packages, sitecustomize and the build's generated _sysconfigdata.
    for top in sorted(name for name in sys.stdlib_module_names if _module_split(name) == split):
        files = [*root.glob(f"{top}.py"), *(root / top).rglob("*.py")]
        for path in sorted(files, key=Path.as_posix):
            name = path.relative_to(root)
            if not {"test", "tests", "idle_test"} & set(name.parts):
                for domain, file, lines in _domains(path, name.as_posix(), split != "pool"):
                    found[domain].extend(_documents(domain, file, lines))
    if not found["prose"]:
        raise FileNotFoundError(
            f"expected the standard library as .py files under {root}, found no docstrings of the "
            f"{split} modules; run with a Python whose library is not zipped, or pass your own text"
        )
    return dict(found)


def _domains(path: Path, name: str, only_prose: bool) -> Iterator[tuple[str, str, Lines]]:
    """(domain, file, lines) of one file of the library."""
    with tokenize.open(path) as stream:
        source = stream.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not our concern
        tree = ast.parse(source)
    lines = list(enumerate(source.split("\n"), 1))
    if name == "pydoc_data/topics.py":
        (topics,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
        for topic, text in ast.literal_eval(topics).items():
            yield "topics", f"pydoc_data/{topic}", list(enumerate(text.split("\n"), 1))
    elif name.startswith("encodings/"):
        tables = [n for n in tree.body if isinstance(n, ast.Assign) and _last(n) - n.lineno > 40]
        yield "tables", name, [line for n in tables for line in lines[n.lineno : _last(n) - 1]]
    else:
        docstrings = list(_docstrings(tree))
        yield "prose", name, [line for docstring in docstrings for line in _numbered(*docstring)]
        if not only_prose:
            documented = {i for first, last, _ in docstrings for i in range(first, last + 1)}
            code, comments = _code_and_comments(source)
            yield "code", name, [line for line in code if line[0] not in documented]
            yield "comments", name, comments


def _last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, text) of every docstring, in file order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, owners) and (text := ast.get_docstring(node, clean=False)):
            found.append((node.body[0].lineno, _last(node.body[0]), text))
    yield from sorted(found)


def _numbered(first: int, last: int, text: str) -> Lines:
    """The cleaned docstring by lines, and a blank one; escapes may shift the numbers, never past `last`."""
    lines = cleandoc(text).split("\n")
    return [(min(first + i, last), line) for i, line in enumerate(lines)] + [(last, "")]


def _code_and_comments(source: str) -> tuple[Lines, Lines]:
    """The source cut in two; comments that do not follow one another get a blank line between."""
    code = source.split("\n")
    comments: Lines = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            code[row - 1] = code[row - 1][:column].rstrip()
            if comments and row > comments[-1][0] + 1:
                comments.append((row, ""))
            comments.append((row, token.string.lstrip("#!: ").rstrip()))
    return list(enumerate(code, 1)), comments


def _documents(domain: str, file: str, lines: Lines) -> Iterator[Document]:
    """Cut lines into documents of 200 to 1200 characters, log-uniform, at a blank line if one is near."""
    rng = np.random.default_rng(zlib.crc32(f"{domain}/{file}".encode()))
    number, size, kept = 0, 0, Lines()
    limit = _length(rng)
    for row, line in [*lines, (0, "")]:
        line = line.expandtabs().rstrip()
        if not line.isprintable() or len(line) > LONGEST // 3:
            continue  # form feeds, escapes, embedded data
        ends = row == 0 or size + len(line) > limit or (not line and size > 0.7 * limit)
        text = dedent("\n".join(s for _, s in kept)).strip("\n") if ends else ""
        if len(text) >= SHORTEST / 2:
            rows = f"{kept[0][0]}-{kept[-1][0]}"
            yield Document(f"{domain}/{file}#{number}", text, domain, f"{file}:{rows}")
            number, size, kept, limit = number + 1, 0, Lines(), _length(rng)
        if line or (kept and kept[-1][1]):  # no blank line at the start, never two
            kept.append((row, line))
            size += len(line) + 1


def _length(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST))))


# --- drawing and spoiling -------------------------------------------------------------------------


def _draw(documents: Sequence[Document], number: int, rng: np.random.Generator) -> list[Document]:
    return [documents[i] for i in rng.permutation(len(documents))[:number]]


def _shuffled(text: str, rng: np.random.Generator) -> str:
    """The words in random order, the white space where it was."""
    words = re.findall(r"\S+", text)
    order = iter(rng.permutation(len(words)))
    return re.sub(r"\S+", lambda _: words[next(order)], text)


def _noised(text: str, rng: np.random.Generator) -> str:
    """A quarter of the characters redrawn from printable ASCII; line ends stay."""
    redraw = rng.random(len(text)) < 0.25
    drawn = rng.integers(32, 127, len(text))
    return "".join(
        chr(d) if r and c != "\n" else c for c, r, d in zip(text, redraw, drawn, strict=True)
    )


def _edited(text: str, rng: np.random.Generator) -> str:
    """About three words in a hundred, one at least, replaced by other words of the same text."""
    words = re.findall(r"\S+", text)
    edited = list(words)
    for i in rng.choice(len(words), max(1, round(0.03 * len(words))), replace=False):
        edited[i] = words[rng.integers(len(words))]
    following = iter(edited)
    return re.sub(r"\S+", lambda _: next(following), text)


# --- tables from scikit-learn ---------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A classification table: x [n, d] floats, y [n] integers, a test set, and which labels were flipped."""

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    test_x: NDArray[np.float64]
    test_y: NDArray[np.int64]
    mislabelled: NDArray[np.bool_]


def digits(
    n_train: int = 1500, n_test: int | None = None, *, mislabel: float = 0.0, seed: int = 0
) -> Table:
    """Handwritten digits, 8 x 8 pixels in [0, 1], ten classes; 1797 in all, the rest is the test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _table(x / 16.0, y, n_train, n_test, mislabel, seed)


def breast_cancer(
    n_train: int = 400, n_test: int | None = None, *, mislabel: float = 0.0, seed: int = 0
) -> Table:
    """Thirty measurements of a tumour, two classes, 569 in all; mean 0 and variance 1 over the training rows."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    table = _table(x, y, n_train, n_test, mislabel, seed)
    mean, spread = table.x.mean(axis=0), table.x.std(axis=0)
    return replace(table, x=(table.x - mean) / spread, test_x=(table.test_x - mean) / spread)


def _table(
    x: NDArray[Any], y: NDArray[Any], n_train: int, n_test: int | None, mislabel: float, seed: int
) -> Table:
    """Random rows; exactly round(mislabel * n_train) training labels moved to another class."""
    n_test = len(x) - n_train if n_test is None else n_test
    if min(n_train, n_test) < 1 or n_train + n_test > len(x) or not 0 <= mislabel <= 1:
        raise ValueError(
            f"expected n_train and n_test positive with a sum of at most {len(x)} and mislabel in "
            f"[0, 1], got n_train={n_train}, n_test={n_test}, mislabel={mislabel}; ask for fewer rows"
        )
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(x))
    train, test = rows[:n_train], rows[n_train : n_train + n_test]
    labels, classes = y[train].astype(np.int64), int(y.max()) + 1
    flip = rng.permutation(n_train)[: round(mislabel * n_train)]
    labels[flip] = (labels[flip] + rng.integers(1, classes, len(flip))) % classes
    mislabelled = np.zeros(n_train, dtype=bool)
    mislabelled[flip] = True
    return Table(
        x[train].astype(float), labels, x[test].astype(float), y[test].astype(np.int64), mislabelled
    )


def _at_least(least: int, documents: int) -> None:
    if documents < least:
        raise ValueError(f"expected {least} documents or more, got {documents}; ask for more")
