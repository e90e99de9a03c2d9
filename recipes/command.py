"""A recipe as a command: flags in, and one line where the input is wrong."""

from __future__ import annotations

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
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
