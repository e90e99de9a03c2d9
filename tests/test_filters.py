"""The n-gram gate and the filters, against dictionaries that do the same slowly."""

from __future__ import annotations

import doctest
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from recipes.data import filters
from recipes.data.filters import NgramModel, classifier, ngram_importance
from recipes.embedded import text_target, text_test

SMALL = ["the cat sat on the mat", "a cat, a hat; à la mode", "mat"]
WORDS = ["data", "model", "loss", "weight", "train", "test", "score", "seed", "order", "batch"]


def babble(number: int, words: list[str], seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, 20)) for _ in range(number)]


def kneser_ney(texts: list[str], order: int):
    """p(byte | history) by dictionaries over tuples of symbols; 256 is the start of a document."""
    counts: list[Counter] = [Counter() for _ in range(order + 1)]
    for text in texts:
        symbols = [256] * (order - 1) + list(text.encode())
        for end in range(order, len(symbols) + 1):
            counts[order][tuple(symbols[end - order : end])] += 1
    for k in range(order - 1, 0, -1):
        before = defaultdict(set)
        for gram in counts[k + 1]:
            before[gram[1:]].add(gram[0])
        counts[k] = Counter({gram: len(seen) for gram, seen in before.items()})

    def p(byte: int, history: tuple[int, ...]) -> float:
        k = len(history) + 1
        lower = p(byte, history[1:]) if k > 1 else 1 / 256
        n1 = sum(c == 1 for c in counts[k].values())
        n2 = sum(c == 2 for c in counts[k].values())
        D = (n1 + 0.5) / (n1 + 2 * n2 + 1)
        after = {gram[-1]: c for gram, c in counts[k].items() if gram[:-1] == history}
        N = sum(after.values())
        return (max(after.get(byte, 0) - D, 0) + D * len(after) * lower) / N if N else lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_model_equals_a_dictionary(order):
    p = kneser_ney(SMALL, order)
    unseen = ["the hat à", "zq"]
    expected = []
    for text in unseen:
        symbols = [256] * (order - 1) + list(text.encode())
        ends = range(order - 1, len(symbols))
        expected.append(
            sum(-math.log(p(symbols[i], tuple(symbols[i - order + 1 : i]))) for i in ends)
        )
    nats = NgramModel.fit(SMALL, order).document_nats(unseen)
    assert nats == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("order", range(1, 8))
@pytest.mark.parametrize("context", ["", "t", "the ca", "à l", "never seen 0123"])
def test_probabilities_of_the_next_byte_sum_to_one(order, context):
    p = NgramModel.fit(SMALL, order).probabilities(context)
    assert p.shape == (256,)
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_bits_per_byte_are_the_nats_of_the_documents():
    model = NgramModel.fit(SMALL, 3)
    alone = [model.document_nats([text])[0] for text in SMALL]
    assert model.document_nats(SMALL) == pytest.approx(alone)  # documents do not see one another
    size = sum(len(text.encode()) for text in SMALL)
    assert model.bits_per_byte(SMALL) == pytest.approx(sum(alone) / math.log(2) / size)


@pytest.mark.parametrize(("order", "excess"), [(1, 2e-3), (2, 0.08)])
def test_uniform_random_bytes_cost_their_entropy(order, excess):
    # A text holds 128 one-byte characters, so the entropy is 7 bits, and no model does better on
    # fresh bytes, up to sampling noise. Estimating 127 free chances from N counts costs
    # 127 / (2 N ln 2) bits: .0005 for N = 200,000, and .06 where each of 128 contexts has N / 128.
    rng = np.random.default_rng(0)
    train, test = ("".join(map(chr, rng.integers(0, 128, 200_000))) for _ in range(2))
    bits = NgramModel.fit([train], order).bits_per_byte([test])
    assert 7 - 1e-3 < bits < 7 + excess


def test_an_unseen_alphabet_costs_eight_bits_and_more():
    assert NgramModel.fit(["aaaa" * 100], 3).bits_per_byte(["zzzz"]) > 8


def test_longer_contexts_predict_unseen_modules_better():
    train, test = ([d.text for d in documents] for documents in (text_target(), text_test(200)))
    bits = [NgramModel.fit(train, order).bits_per_byte(test) for order in (1, 2, 3, 4)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 4 > 3 > bits[3]


@pytest.mark.parametrize("per_feature", [True, False])
def test_ngram_importance_equals_a_dictionary(per_feature):
    pool = ["The cat, sat!", "dogs run; dogs bark", "cat"]
    target = ["a cat sat", "the cat"]
    buckets = 2**20  # so many that no two of these n-grams share one

    def features(text: str) -> list[str]:
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        return words + [f"{a} {b}" for a, b in pairwise(words)]

    def log_p(texts: list[str]):
        counts = Counter(f for text in texts for f in features(text))
        return lambda f: math.log((counts[f] + 1.0) / (counts.total() + buckets))

    to, of = log_p(target), log_p(pool)
    expected = []
    for text in pool:
        found = features(text)
        gain = sum(to(f) - of(f) for f in found)
        expected.append(gain / len(found) if per_feature else gain)
    keep = ngram_importance(pool, target, buckets=buckets, per_feature=per_feature)
    assert keep == pytest.approx(expected, abs=1e-10)


def test_ngram_importance_of_a_pool_for_itself_is_nothing():
    assert ngram_importance(SMALL, SMALL) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("keep", [ngram_importance, classifier])
def test_filters_rank_documents_like_the_target_first(keep):
    planted, other = babble(30, WORDS[:7], 0), babble(60, WORDS[3:], 1)
    score = keep([*planted, *other], babble(40, WORDS[:7], 2))
    assert score.shape == (90,)
    assert score[:30].min() > score[30:].max()
    assert (score == keep([*planted, *other], babble(40, WORDS[:7], 2))).all()


def test_classifier_scores_documents_that_it_has_not_seen():
    # Pool and target from one source: fresh documents lean neither way. Scored in-sample, every
    # pool document would fall on the negative side, by its own label.
    letters = list("abcdefghijklmnopqrst")
    score = classifier(babble(100, letters, 0), babble(100, letters, 1))
    assert 0.2 < (score > 0).mean() < 0.8


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "at least one text, got none"),
        ("text", ValueError, "got one string"),
        (["text", " \n", ""], ValueError, r"none in 2 rows: \[1, 2\]; leave"),
        (["text", b"bytes"], TypeError, "got bytes in row 1"),
    ],
)
def test_texts_that_are_none_are_refused_by_row(texts, error, message):
    for call in (
        lambda: NgramModel.fit(texts),
        lambda: NgramModel.fit(SMALL).bits_per_byte(texts),
        lambda: ngram_importance(texts, SMALL),
        lambda: ngram_importance(SMALL, texts),
        lambda: classifier(SMALL, texts),
    ):
        with pytest.raises(error, match=message):
            call()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="order of 1 to 7"):
        NgramModel.fit(SMALL, 8)
    with pytest.raises(ValueError, match="smoothing above 0"):
        ngram_importance(SMALL, SMALL, smoothing=0)
    with pytest.raises(ValueError, match="2 to 3 folds"):
        classifier(SMALL, SMALL, folds=4)


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(filters).failed == 0
