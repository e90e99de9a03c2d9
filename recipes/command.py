"""A recipe as a command: flags in, and one line where the input is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro


def run_command(
    flags: type, main: Callable[[Any], None], about: str | None, arguments: list[str] | None
) -> None:
    """Parse and run; what is wrong with the input is said in one line, without a traceback."""
    given: Any = tyro.cli(flags, args=arguments, description=about)
    try:
        main(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def at_least(flags: Any, **least: float) -> None:
    """Raise where a number among the flags is smaller than can be.

    Raises:
        ValueError: it is; names the flag.
    """
    for name, bound in least.items():
        given = getattr(flags, name)
        if given is not None and not given >= bound:
            raise ValueError(
                f"expected --{name.replace('_', '-')} of at least {bound:g}, got {given:g}"
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
