"""The embedded data: disjoint, reproducible, traceable to the file, and spoiled as promised."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from recipes import embedded
from recipes.embedded import Document, breast_cancer, digits, split_by_source, text_split


@pytest.fixture(scope="module")
def split():
    return text_split(2000, target=300, test=200)


def test_pool_target_and_test_share_no_module(split):
    tops = [{d.file.split("/")[0].removesuffix(".py") for d in part} for part in split]
    assert not tops[0] & tops[1]
    assert not tops[0] & tops[2]
    assert not tops[1] & tops[2]


def test_documents_are_what_they_say(split):
    everything = [d for part in split for d in part]
    assert len({d.id for d in everything}) == len(everything)
    assert all(d.id.startswith(f"{d.domain}/") for d in everything)
    assert all(90 <= len(d.text) <= 1300 for d in everything)
    assert all(line.isprintable() for d in everything for line in d.text.split("\n"))
    assert {d.domain for d in split[1] + split[2]} == {"prose"}


def test_pool_has_the_promised_proportions(split):
    counts = Counter(d.domain for d in split[0])
    assert counts == {domain: round(share * 2000) for domain, share in embedded.SHARES.items()}


def test_a_larger_pool_than_the_library_takes_what_there_is():
    pool = embedded.text_pool(200_000)
    counts = Counter(d.domain for d in pool)
    held = {domain: len(documents) for domain, documents in embedded._library("pool").items()}
    for domain in ("code", "tables", "topics", "comments"):
        assert counts[domain] == held[domain]
    assert counts["prose"] + counts["shuffled"] + counts["noised"] == held["prose"]
    assert counts["prose"] / held["prose"] == pytest.approx(8 / 28, abs=0.05)


def test_same_seed_same_documents_other_seed_others(split):
    again = text_split(2000, target=300, test=200)
    other = text_split(2000, target=300, test=200, seed=1)
    assert again == split
    assert all(a != b for a, b in zip(other, split, strict=True))


def test_the_split_of_modules_never_moves():
    # Pinned: published tables rest on it. Twins such as _pyio and io stay together.
    names = ("json", "email", "asyncio", "unittest", "typing", "encodings", "tkinter")
    assert [embedded._module_split(name) for name in names] == [
        *("pool", "target", "target", "test", "test", "pool", "pool")
    ]
    assert embedded._module_split("_pyio") == embedded._module_split("io")


def test_nothing_is_imported(split):
    assert "antigravity" not in sys.modules  # importing it opens a browser
    assert "pydoc_data.topics" not in sys.modules


def test_source_names_the_file_and_the_lines(split):
    root = Path(sysconfig.get_paths()["stdlib"])
    for d in [d for d in split[0] if d.domain == "code"][:100]:
        first, last = map(int, d.source.rpartition(":")[2].split("-"))
        lines = (root / d.file).read_text(encoding="utf-8").split("\n")[first - 1 : last]
        there = "\n".join(line.expandtabs() for line in lines)
        assert all(line.strip() in there for line in d.text.split("\n")), d.id


def test_code_and_comments_are_told_apart():
    source = 's = "# no comment"  # one\n\n# two\n# three\nx = 1\n'
    code, comments = embedded._code_and_comments(source)
    assert [text for _, text in code] == ['s = "# no comment"', "", "", "", "x = 1", ""]
    assert comments == [(1, "one"), (3, ""), (3, "two"), (4, "three")]


def test_spoiled_documents_differ_from_their_originals_as_stated(split):
    pool = {d.id: d for d in split[0]}
    prose = {d.id: d.text for d in embedded._library("pool")["prose"]}
    changed, edited = [], []
    for d in pool.values():
        if d.domain in ("shuffled", "noised"):
            original = prose[d.id.replace(d.domain, "prose", 1)]
            assert f"prose/{d.id.partition('/')[2]}" not in pool  # no docstring is used twice
        if d.domain == "shuffled":
            assert Counter(d.text.split()) == Counter(original.split())
        if d.domain == "noised":
            assert len(d.text) == len(original)
            changed.append(np.mean([a != b for a, b in zip(d.text, original, strict=True)]))
        if d.domain == "near-duplicates":
            original = pool[d.id.removeprefix("near-duplicates/").rpartition("~")[0]].text
            words = zip(d.text.split(), original.split(), strict=True)
            edited.append(np.mean([a != b for a, b in words]))
    assert np.mean(changed) == pytest.approx(
        0.25 * 94 / 95 * 0.98, abs=0.02
    )  # 1 in 95 redrawn as it was; line ends stay
    assert 0 < np.mean(edited) < 0.06


def test_split_by_source_keeps_files_whole(split):
    parts = split_by_source(split[1], (0.5, 0.25, 0.25), seed=3)
    files = [{d.file for d in part} for part in parts]
    assert sum(map(len, files)) == len(set().union(*files))
    assert sorted(d.id for part in parts for d in part) == sorted(d.id for d in split[1])
    sizes = np.array([sum(len(d.text) for d in part) for part in parts])
    assert sizes / sizes.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.08)
    assert split_by_source(split[1], seed=4) != parts


@pytest.mark.parametrize("parts", [(), (0.5, -0.5), (0.5, 0.25, 0.25)])
def test_split_by_source_refuses_parts_that_cannot_be(parts):
    two = [Document("a", "text", "prose", "a.py:1-2"), Document("b", "text", "prose", "b.py:1-2")]
    with pytest.raises(ValueError, match="positive shares"):
        split_by_source(two, parts)


def test_a_missing_library_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="not zipped"):
        embedded._library.__wrapped__("pool")


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="expected 20 documents or more, got 3"):
        embedded.text_pool(3)


def test_digits_are_scaled_and_split():
    table = digits(seed=1)
    assert table.x.shape == (1500, 64)
    assert table.test_x.shape == (297, 64)
    assert (table.x.min(), table.x.max()) == (0.0, 1.0)
    assert set(table.y) == set(range(10))
    assert not table.mislabelled.any()
    rows = {row.tobytes() for row in table.x}
    assert not any(row.tobytes() in rows for row in table.test_x)


def test_breast_cancer_is_standardised_on_the_training_rows():
    table = breast_cancer(n_test=100)
    assert table.test_x.shape == (100, 30)
    assert table.x.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert table.x.std(axis=0) == pytest.approx(1)


def test_mislabel_flips_exactly_the_marked_labels():
    clean, spoiled = digits(n_train=1000), digits(n_train=1000, mislabel=0.1)
    assert spoiled.mislabelled.sum() == 100
    assert ((clean.y != spoiled.y) == spoiled.mislabelled).all()
    assert (clean.x == spoiled.x).all()
    assert (clean.test_y == spoiled.test_y).all()


def test_tables_refuse_more_rows_than_there_are():
    with pytest.raises(ValueError, match="at most 1797"):
        digits(n_train=1797)
