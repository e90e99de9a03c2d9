"""Notebooks are kept executed: every code cell ran, in order, without an error, and shows what it says."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

OWN = ("attribution_core", "applied", "recipes")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"valuation", "owners_and_payments"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_executed_and_whole(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for cell in cells:
        tree = compile("".join(cell["source"]), str(path), "exec", ast.PyCF_ONLY_AST)
        for line in ast.walk(tree):  # what it takes from this repository is still there
            if isinstance(line, ast.ImportFrom) and line.module.partition(".")[0] in OWN:
                module = importlib.import_module(line.module)
                for name in line.names:
                    part = f"{line.module}.{name.name}"
                    assert hasattr(module, name.name) or importlib.util.find_spec(part), part
