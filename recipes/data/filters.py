"""The strong cheap text filters, to stand beside every selection as controls, and the n-gram gate.

    keep = classifier(pool, target)               # [n], higher = keep
    keep = ngram_importance(pool, target)         # [n], higher = keep
    gate = NgramModel.fit(pool, order=4).bits_per_byte(target)

These are filter scores: one number per pool document, and HIGHER MEANS KEEP. They are not the
`scores` of a datamodel (there a negative score on a loss means that a document helps), they predict
no loss, and they have no units in common. Texts are plain strings; every filter gets the same target
text as the selection that it is compared with.

The gate: a neural proxy that predicts held-out target text no better than an n-gram model fitted on
the same training text has learned to count letters, and its gradients select by letter counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

START = 256  # the symbol before a document's first byte
SYMBOLS = 257
LONGEST = 7  # 257⁷ fits in 63 bits


@dataclass(frozen=True)
class Level:
    """Counts of one order: sorted packed contexts [c] and context-byte events [e]."""

    contexts: Ints
    totals: Ints  # [c] N(h), the counts of all bytes after h
    types: Ints  # [c] T(h), the number of different bytes after h
    events: Ints
    counts: Ints  # [e] C(h, b)
    discount: float


@dataclass(frozen=True)
class NgramModel:
    """Byte n-gram model, interpolated Kneser–Ney: p_k(b | h) falls back on one byte of context less.

        p_k(b | h) = (max(C(h, b) − D_k, 0) + D_k T(h) p_{k−1}(b | h')) / N(h),   p_0 = 1/256
        D_k        = (n₁ + ½) / (n₁ + 2 n₂ + 1)

    h is the last k − 1 bytes and h' is h without its oldest byte; where N(h) = 0, p_k = p_{k−1}.
    C counts occurrences at the highest order and, below it, the different symbols seen before
    (h, b). n₁ and n₂ are the numbers of events counted once and twice; the ½ keeps D inside (0, 1)
    in small texts, so that every byte always has a chance. A document's first bytes see a start
    symbol; its end is not predicted.

    Source: Chen and Goodman 1999, "An empirical study of smoothing techniques", eq. 24 to 26 and
    section 2.8.

    >>> model = NgramModel.fit(["abracadabra"] * 20, order=3)
    >>> model.bits_per_byte(["abracadabra"]) < 1 < model.bits_per_byte(["cabbarradaa"])
    True
    """

    order: int
    levels: tuple[Level, ...]

    @classmethod
    def fit(cls, texts: Sequence[str], order: int = 3) -> NgramModel:
        """Count the n-grams of n = 1 to `order` bytes; a few seconds for a few megabytes."""
        if not 1 <= order <= LONGEST:
            raise ValueError(
                f"expected an order of 1 to {LONGEST} bytes (context included), got {order}; "
                f"longer n-grams do not fit in 64 bits and would hardly repeat"
            )
        history, following, _ = _rows(_checked(texts, "texts"), order)
        events, counts = np.unique(_packed(history) * SYMBOLS + following, return_counts=True)
        levels = [_level(events, counts)]
        for k in range(order - 1, 0, -1):  # drop the oldest byte: count what was seen before
            events, counts = np.unique(events % SYMBOLS**k, return_counts=True)
            levels.append(_level(events, counts))
        return cls(order, tuple(reversed(levels)))

    def document_nats(self, texts: Sequence[str]) -> Floats:
        """−log p of each document, summed over its bytes: [n], nats."""
        history, following, document = _rows(_checked(texts, "texts"), self.order)
        nats = -np.log(self._probability(history, following))
        return np.bincount(document, weights=nats, minlength=len(texts)).astype(np.float64)

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Mean −log₂ p over all bytes of all documents; 8 is chance."""
        size = sum(len(text.encode()) for text in _checked(texts, "texts"))
        return float(self.document_nats(texts).sum() / np.log(2) / size)

    def probabilities(self, context: str = "") -> Floats:
        """p(b | context) of the 256 bytes that may follow: [256]."""
        history, _, _ = _rows([context + "?"], self.order)  # the last row sees the whole context
        return self._probability(np.repeat(history[-1:], 256, axis=0), np.arange(256))

    def _probability(self, history: Ints, following: Ints) -> Floats:
        """history [m, order − 1], oldest first, following [m] -> p [m]."""
        p = np.full(len(following), 1 / 256)
        for k, level in enumerate(self.levels):
            context = _packed(history[:, self.order - 1 - k :])
            count = _lookup(level.events, level.counts, context * SYMBOLS + following)
            total = _lookup(level.contexts, level.totals, context)
            types = _lookup(level.contexts, level.types, context)
            mixed = np.maximum(count - level.discount, 0) + level.discount * types * p
            p = np.where(total > 0, mixed / np.maximum(total, 1), p)
        return p


def ngram_importance(
    pool: Sequence[str],
    target: Sequence[str],
    *,
    buckets: int = 10_000,
    smoothing: float = 1.0,
    per_feature: bool = True,
) -> Floats:
    """Log importance weight of each pool document under hashed word uni- and bigrams: [n], higher = keep.

        keep_i = Σ_b c_ib (log p_target(b) − log p_pool(b))  [ / Σ_b c_ib  if per_feature ]
        p(b)   = (C_b + smoothing) / (Σ C + smoothing · buckets)

    c_ib counts the features of document i that hash to bucket b (murmurhash3, the same everywhere).
    DSIR sums, for pieces of equal length, and adds 1e-8 to each p where this adds `smoothing` counts
    to each bucket. Here the default is the mean per feature, because documents differ in length and
    a budget is in characters or tokens: the best use of one is by gain per token. DSIR then draws
    with Gumbel noise; to draw likewise, add noise to `per_feature=False` weights.

    Source: Xie et al. 2023, arXiv 2302.03169, section 3; the code of p-lambda/dsir.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    pool, target = _checked(pool, "pool"), _checked(target, "target")
    if buckets < 1 or smoothing <= 0:
        raise ValueError(
            f"expected buckets of 1 or more and smoothing above 0, got buckets={buckets}, "
            f"smoothing={smoothing}; without smoothing an unseen n-gram weighs infinitely"
        )
    vectorizer = HashingVectorizer(
        n_features=buckets,
        ngram_range=(1, 2),
        token_pattern=r"\w+|[^\w\s]+",  # words and runs of punctuation, as DSIR's wordpunct
        norm=None,
        alternate_sign=False,
    )
    counts = vectorizer.transform(pool)

    def log_p(features: Any) -> Floats:
        summed = np.asarray(features.sum(axis=0)).ravel() + smoothing
        return np.log(summed / summed.sum())

    keep = counts @ (log_p(vectorizer.transform(target)) - log_p(counts))
    return keep / np.asarray(counts.sum(axis=1)).ravel() if per_feature else keep


def classifier(
    pool: Sequence[str],
    target: Sequence[str],
    *,
    C: float = 3.0,
    folds: int = 3,
    features: int = 2**18,
    seed: int = 0,
) -> Floats:
    """Log-odds of being target text rather than pool text: [n], higher = keep.

    Logistic regression (L2, weight C on the balanced loss) on hashed character 2- to 4-grams, log
    counts times inverse document frequency, rows of length one: a quality classifier in the manner
    of fastText filters. Each pool document is a negative, and is scored by the fold that has not
    seen it; scored in-sample, it would be pushed down by its own label. Its near-duplicates in the
    other folds do push it down a little.

    Source: Brown et al. 2020, arXiv 2005.14165, appendix A (classifier of quality); Li et al. 2024,
    arXiv 2406.11794 (fastText filter).
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    pool, target = _checked(pool, "pool"), _checked(target, "target")
    if not 2 <= folds <= len(pool):
        raise ValueError(
            f"expected 2 to {len(pool)} folds for {len(pool)} pool documents, got {folds}; "
            f"every document has to be scored by a model that has not seen it"
        )
    vectorizer = HashingVectorizer(
        analyzer="char", ngram_range=(2, 4), n_features=features, norm=None, alternate_sign=False
    )
    counts = vectorizer.transform([*pool, *target])
    x = TfidfTransformer(sublinear_tf=True).fit_transform(counts)  # sees texts, not labels
    is_target = np.arange(x.shape[0]) >= len(pool)
    keep = np.zeros(len(pool))
    for seen, unseen in KFold(folds, shuffle=True, random_state=seed).split(pool):
        rows = np.concatenate([seen, np.flatnonzero(is_target)])
        model = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
        model.fit(x[rows], is_target[rows])
        keep[unseen] = model.decision_function(x[unseen])
    return keep


def _checked(texts: Sequence[str], name: str) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        came = "one string" if isinstance(texts, str) else "none"
        raise ValueError(
            f"expected {name} to be a list of at least one text, got {came}; pass a list"
        )
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(
            f"expected every one of {name} to be a string, got {type(texts[wrong[0]]).__name__} in "
            f"row {wrong[0]}; pass the texts alone, such as [d.text for d in documents]"
        )
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(
            f"expected text in every row of {name}, got none in {len(empty)} rows: {empty[:5]}"
            f"{' ...' if len(empty) > 5 else ''}; leave these documents out first"
        )
    return list(texts)


def _rows(texts: Sequence[str], order: int) -> tuple[Ints, Ints, Ints]:
    """One row per byte: its history [m, order − 1], oldest first, the byte [m], its document [m]."""
    encoded = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
    start = np.full(order - 1, START)
    symbols = np.concatenate([part for text in encoded for part in (start, text)]).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(symbols, order)
    windows = windows[windows[:, -1] != START]  # also drops histories that cross documents
    document = np.repeat(np.arange(len(texts)), [len(text) for text in encoded])
    return windows[:, :-1], windows[:, -1], document


def _packed(history: Ints) -> Ints:
    """[m, k] symbols -> [m] numbers in base 257, oldest symbol most significant."""
    packed = np.zeros(len(history), dtype=np.int64)
    for column in history.T:
        packed = packed * SYMBOLS + column
    return packed


def _level(events: Ints, counts: Ints) -> Level:
    contexts, first, types = np.unique(events // SYMBOLS, return_index=True, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    return Level(
        contexts=contexts,
        totals=np.add.reduceat(counts, first),
        types=types,
        events=events,
        counts=counts,
        discount=float((once + 0.5) / (once + 2 * twice + 1)),
    )


def _lookup(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """values at the wanted keys, 0 where a key is missing; keys sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
