"""The README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    # a third of the labels are wrong: leaving out half of the rows by their scores beats chance
    assert names["verified"].difference("random").high < 0
    # exact values add up; those of a few metagradients nearly
    worth, rows = names["worth"], names["rows"]
    assert abs(worth.remainder) < 1e-9 * abs(worth.change)
    assert abs(rows.remainder) < 0.05 * abs(rows.change)
    # flips cost what was predicted, to a third, are found, and mostly undone
    attack, found, mended = names["attack"], names["found"], names["mended"]
    assert 0.67 < attack.predicted[1] / attack.effect("target loss").mean < 1.1
    assert attack.effect("target loss").mean > 2 * attack.effect("target loss", "random").mean
    assert found.auc() > 0.99
    assert mended.recovered("target loss").mean > 0.5
    exact, run, tests = names["exact"], names["run"], names["tests"]
    predicted = exact.without([0]) - exact.base
    actual = run.again([0.0] + [1.0] * 499).outputs(tests).numpy() - exact.base
    # dropping one row is a step of 1: first order is right in direction
    assert predicted @ actual > 0.9 * (predicted**2).sum() ** 0.5 * (actual**2).sum() ** 0.5


def test_every_file_of_the_tree_exists():
    tree = README.read_text(encoding="utf-8").split("## The tree")[1].split("Floors:")[0]
    root, folder = README.parent, README.parent
    for line in tree.splitlines():
        if found := re.match(r"    (\w+)/ ", line):
            folder = root / found[1]
        elif found := re.match(r"      (\w+\.py) ", line):
            assert (folder / found[1]).exists(), line
