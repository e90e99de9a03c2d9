"""What is to be forgotten: random rows, a cluster, rows with wrong labels, or rows named in a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recipes.command import at_least
from recipes.data.classification import Classification, from_file, warn_of_repeated

if TYPE_CHECKING:
    from recipes.unlearn import Flags

KINDS = ("random", "cluster", "mislabelled")
HELD = 500  # rows at most that validate
LARGER = 1.5  # than asked for: a cluster that is cut to its middle
FEWEST = 4  # models; a spread of fewer says nothing


@dataclass(frozen=True, eq=False)
class Forget:
    """A forget set and the data that it belongs to: wrong labels are planted before training."""

    kind: str
    rows: NDArray[np.intp]
    data: Classification


def checked(flags: Flags) -> tuple[Classification, tuple[str, ...]]:
    """The data and the kinds of forget sets.

    Raises:
        ValueError: unknown kinds, too few models, a budget or sizes that do not fit, a forget file beside rows
            that are split at random.
        FileNotFoundError: no such file.
    """
    unknown = [kind for kind in flags.forget if kind not in KINDS]
    if unknown or not flags.forget:
        raise ValueError(f"unknown forget set {unknown}; expected some of {', '.join(KINDS)}")
    if flags.models < FEWEST:
        raise ValueError(
            f"expected at least {FEWEST} models, got {flags.models}: distances are between two sets of them"
        )
    if not 0 < flags.budget <= 1:
        raise ValueError(
            f"expected a --budget in (0, 1] of a training's steps, got {flags.budget:g}"
        )
    at_least(flags, width=0, jobs=1, epochs=1e-9)
    own = flags.data not in ("digits", "breast_cancer")
    if flags.forget_file is not None and not flags.forget_file.exists():
        raise FileNotFoundError(f"no file {flags.forget_file}")
    if flags.forget_file is not None and own and flags.test is None:
        raise ValueError(
            "expected --test beside --forget-file: without it some rows of the data are held out, "
            "and row numbers would mean others"
        )
    file = (flags.data, flags.label, None, flags.test, flags.seed, flags.ignore)
    data = from_file(*file) if own else bare(flags)
    warn_of_repeated(data)
    if flags.forget_file is None and not 1 <= flags.size <= len(data.x) // 2:
        raise ValueError(
            f"expected --size from 1 to {len(data.x) // 2}, half of the rows, got {flags.size}"
        )
    if flags.forget_file is None:
        return data, tuple(dict.fromkeys(flags.forget))
    from_text(flags.forget_file, len(data.x))  # wrong rows are reported before anything is trained
    return data, ("file",)


def bare(flags: Flags) -> Classification:
    """Embedded data as it is; the first held-out rows validate."""
    from recipes.embedded import breast_cancer, digits

    table = (digits if flags.data == "digits" else breast_cancer)(flags.rows, seed=flags.seed)
    x, held, y = table.x.astype(np.float32), table.test_x.astype(np.float32), table.test_y
    return Classification(
        flags.data, x, table.y, np.full(len(x), "all"), held[:HELD], y[:HELD], held[HELD:], y[HELD:],
        [str(c) for c in range(int(y.max()) + 1)], None,
    )  # fmt: skip


def forget_set(flags: Flags, data: Classification, kind: str) -> Forget:
    """Rows of one kind, with the data as they are trained on."""
    rng, n = np.random.default_rng([flags.seed, 3]), len(data.x)
    if kind == "file" and flags.forget_file is not None:
        return Forget(kind, from_text(flags.forget_file, n), data)
    if kind == "cluster":
        return Forget(kind, cluster(data.x, data.y, flags.size, flags.seed), data)
    rows, y = np.sort(rng.choice(n, flags.size, replace=False)), data.y.copy()
    if kind == "mislabelled":
        classes = len(data.classes)
        y[rows] = (y[rows] + rng.integers(1, classes, len(rows))) % classes
    return Forget(kind, rows, replace(data, y=y))


def from_text(path: Path, n: int) -> NDArray[np.intp]:
    """Row numbers, one a line or with spaces or commas between.

    Raises:
        ValueError: no numbers, rows outside the data, twice, or all of them.
    """
    words = path.read_text(encoding="utf-8-sig").replace(",", " ").split()
    wrong = [w for w in words if not (w.isascii() and w.isdigit() and int(w) < n)]
    if wrong or not words:
        raise ValueError(
            f"expected row numbers from 0 to {n - 1} in {path}, got {wrong[:5] or 'none'}"
        )
    rows = np.unique([int(word) for word in words])
    if len(rows) < len(words) or len(rows) == n:
        raise ValueError(
            f"expected some of {n} rows, each once, got {len(words)} of which {len(rows)} differ in {path}"
        )
    return rows.astype(np.intp)


def cluster(x: NDArray[Any], y: NDArray[Any], size: int, seed: int = 0) -> NDArray[np.intp]:
    """Rows of one class that lie together: the k-means cluster inside a class nearest to the size.

    Where that is `LARGER` times as large or more, as in classes of many rows, those nearest to its middle.
    """
    from sklearn.cluster import KMeans

    found: list[NDArray[np.intp]] = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        for k in range(1, min(5, len(np.unique(x[rows], axis=0))) + 1):
            if k == 1 and len(np.unique(y)) < 3:
                continue  # one of two classes whole: nothing would be left to distinguish
            labels = KMeans(k, n_init=3, random_state=seed).fit_predict(x[rows])
            found += [rows[labels == j] for j in range(k)]
    best = min(found, key=lambda rows: abs(len(rows) - size))
    if len(best) < LARGER * size:
        return best
    far = np.linalg.norm(x[best] - x[best].mean(axis=0), axis=1)
    return np.sort(best[np.argsort(far, kind="stable")[:size]])
