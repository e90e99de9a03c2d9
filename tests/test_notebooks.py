"""Notebooks are kept executed: every code cell ran, in order, without an error, and shows what it says; benchmarks import
what there is."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

OWN = ("attribution_core", "applied", "recipes")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


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
        assert missing_imports("".join(cell["source"]), path) == []


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path):
    assert missing_imports(path.read_text(encoding="utf-8"), path) == []


def missing_imports(source, path):
    """What is taken from this repository, inside functions as well, and is not there."""
    missing = []
    for line in ast.walk(compile(source, str(path), "exec", ast.PyCF_ONLY_AST)):
        if isinstance(line, ast.ImportFrom) and line.module.partition(".")[0] in OWN:
            module = importlib.import_module(line.module)
            parts = {name.name: f"{line.module}.{name.name}" for name in line.names}
            missing += [
                part
                for name, part in parts.items()
                if not hasattr(module, name) and not part_exists(part)
            ]
    return missing


def part_exists(part):
    """Whether there is a module of this name."""
    try:
        return importlib.util.find_spec(part) is not None
    except ModuleNotFoundError:  # of something that is no package
        return False
