"""A recipe as a command: flags in, and one line where the input is wrong."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import tyro


def run_command(
    flags: type, main: Callable[[Any], None], about: str | None, arguments: list[str] | None
) -> None:
    """Parse and run; wrong input is reported in one line, without a traceback."""
    given: Any = tyro.cli(flags, args=arguments, description=about)
    try:
        with alone_in(given.out):
            main(given)
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + 2)  # what a shell says of an interrupt


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs on this machine out of a folder for as long as this one lasts.

    Raises:
        ValueError: another run is at work there.
    """
    from filelock import FileLock, Timeout

    if os.environ.get("RANK", "0") != "0":  # of a launched run the first process locks
        yield
        return
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    user = getattr(os, "getuid", int)()  # another's files may not be opened
    locks = Path(tempfile.gettempdir()) / f"applied-attribution-{user}"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"expected --out that no other run is writing to, got {str(folder)!r}, where one is at work; wait for "
            "it, or take another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def bar(what: str) -> Any:
    """A progress bar with the time left, shown by the first process only."""
    from tqdm import tqdm

    other = os.environ.get("RANK", "0") != "0"
    return partial(tqdm, desc=what, disable=other, leave=False, file=sys.stderr, mininterval=0.5)


def forget_report(folder: Path) -> None:
    """Take away the report of an earlier run, whose results are about to be replaced."""
    for name in ("report.html", "metrics.json"):
        (folder / name).unlink(missing_ok=True)


def as_given(flags: Any) -> dict[str, Any]:
    """The flags, for metrics.json."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(flags).items()
    }


def at_least(flags: Any, **least: float) -> None:
    """Raise where a number among the flags is below its smallest value.

    Raises:
        ValueError: it is; names the flag.
    """
    for name, bound in least.items():
        given = getattr(flags, name)
        if given is not None and not given >= bound:
            raise ValueError(
                f"expected --{name.replace('_', '-')} of at least {bound:g}, got {given:g}"
            )


def at_most(flags: Any, **most: float) -> None:
    """Raise where a number among the flags is larger than can be.

    Raises:
        ValueError: it is; names the flag.
    """
    for name, bound in most.items():
        given = getattr(flags, name)
        if given is not None and not given <= bound:
            raise ValueError(
                f"expected --{name.replace('_', '-')} of at most {bound:g}, got {given:g}"
            )


def device_of(name: str) -> Any:
    """The torch.device by name; with "auto" the launched process's own GPU, where there is one.

    Raises:
        ValueError: no such device, or none here.
    """
    import torch

    if name == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected --device of a device that is there, got {name!r}: {reason}"
        ) from None
    return device


def shares(flags: Any, name: str) -> None:
    """Raise where a list of shares among the flags is empty or holds anything outside (0, 1).

    Raises:
        ValueError: it does; names the flag.
    """
    given = getattr(flags, name)
    if not given or not all(0 < share < 1 for share in given):
        raise ValueError(f"expected --{name} of shares between 0 and 1, got {list(given)}")


def some_rows(flags: Any, name: str, n: int) -> None:
    """Raise where a share among the flags rounds to none of n rows.

    Raises:
        ValueError: it does; names the flag.
    """
    few = [share for share in getattr(flags, name) if round(share * n) < 1]
    if few:
        raise ValueError(
            f"expected --{name} of at least one of {n} rows ({1 / n:.2g}), got {few[0]:g}"
        )
