"""recipes.command: one run in a folder, reports that are not left beside other results."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.command import alone_in, as_given, forget_report, run_command
from tests import menagerie


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    other = (
        "import sys; from pathlib import Path; from recipes.command import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); sys.stdin.readline()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path)], cwd=menagerie.ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="one is at work"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path / "another"):
        pass
    started.kill()  # what is killed keeps nobody out
    started.wait()
    started.stdout.close()
    started.stdin.close()
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_processes_of_one_run_do_not_refuse_each_other(tmp_path, monkeypatch):
    with alone_in(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with alone_in(tmp_path):
            pass


@dataclass(frozen=True)
class Flags:
    """Flags of a recipe."""

    rate: float = 0.5
    """A number."""
    out: Path = Path("runs/none")
    """Where to."""


def test_what_a_recipe_refuses_is_one_line_and_leaves_no_folder(tmp_path):
    def main(flags):
        raise NotImplementedError(f"not at {flags.rate}")

    with pytest.raises(SystemExit, match=r"error: not at 0.25"):
        run_command(Flags, main, None, ["--rate", ".25", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    assert as_given(Flags()) == {"rate": 0.5, "out": "runs/none"}


def test_what_is_interrupted_is_one_line(tmp_path, capsys):
    def main(flags):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(Flags, main, None, ["--out", str(tmp_path / "x")])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped; the same command goes on\n"


def test_an_old_report_goes_and_nothing_else(tmp_path):
    for name in ("report.html", "metrics.json", "owners.csv"):
        (tmp_path / name).touch()
    forget_report(tmp_path)
    forget_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["owners.csv"]
