"""The code of the README and the guide runs as printed."""

import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"


def names_after(page: Path, count: int) -> dict[str, Any]:
    """What the page's blocks leave behind, run in their order."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return names


def assert_first_order(predicted, actual):
    """Dropping one row is a step of 1: first order is right in direction."""
    assert predicted @ actual > 0.9 * (predicted**2).sum() ** 0.5 * (actual**2).sum() ** 0.5


def test_the_readme_runs():
    names = names_after(README, count=8)
    # a third of the labels are wrong: leaving out half of the rows by their scores beats chance
    assert names["verified"].difference("random").high < 0
    # exact values add up
    worth, attack, exact = names["worth"], names["attack"], names["exact"]
    assert abs(worth.remainder) < 1e-9 * abs(worth.change)
    assert attack.effect("mean").mean > 2 * attack.effect("mean", "random").mean
    assert_first_order(exact.without([0]) - exact.base, names["actual"].numpy() - exact.base)
    # the decision turns, without fewer rows than of the nearest, as was predicted to a half
    behind = names["behind"]
    actual = behind.actual[0]
    assert actual < behind.controls["nearest"][0]
    assert 0.5 <= behind.predicted[0] / actual <= 1.5


def test_the_guide_runs():
    names = names_after(GUIDE, count=8)
    # those of a few metagradients nearly add up
    rows = names["rows"]
    assert abs(rows.remainder) < 0.05 * abs(rows.change)
    # flips cost what was predicted, to a third, are found, and mostly undone
    attack, found, mended = names["attack"], names["found"], names["mended"]
    assert 0.67 < attack.predicted[1] / attack.effect("target loss").mean < 1.1
    assert attack.effect("target loss").mean > 2 * attack.effect("target loss", "random").mean
    assert found.auc() > 0.99
    assert mended.recovered("target loss").mean > 0.5
    # groups of mistakes lose what was predicted without their own rows, to a half, and others move half as much at most
    alike = names["alike"]
    own, off = np.diag(alike.actual), ~np.eye(len(alike.rows), dtype=bool)
    np.testing.assert_allclose(own, np.diag(alike.predicted), rtol=0.5)
    assert abs(alike.actual[off].mean()) < 0.5 * abs(own.mean())
    exact, run, tests = names["exact"], names["run"], names["tests"]
    actual = run.again([0.0] + [1.0] * 499).outputs(tests).numpy()
    assert_first_order(exact.without([0]) - exact.base, actual - exact.base)


def test_links_lead_to_headings_and_files():
    for page in (README, GUIDE):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            file = page.parent / path
            assert file.exists(), target
            titles = (
                re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M) if heading else []
            )
            assert not heading or heading in [t.lower().replace(" ", "-") for t in titles], target


def test_the_tree_is_the_tree():
    tree = README.read_text(encoding="utf-8").split("## The tree")[1].split("Layers:")[0]
    drawn, folder = set(), ROOT
    for line in tree.splitlines():
        if found := re.match(r"    (\w+)/ ", line):
            package = folder = ROOT / found[1]
        elif found := re.match(r"      (\w+)/ ", line):
            folder = package / found[1]
        elif found := re.match(r"      (?:  )?(\w+\.py) ", line):
            drawn.add(folder / found[1])
    there = {
        file
        for package in ("attribution_core", "applied", "recipes")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert drawn == there
