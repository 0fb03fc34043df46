"""The command line. Data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]
_INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        args: the words after the program's name; those of this process by default.
    """
    try:
        return _main(args)
    except KeyboardInterrupt:  # before there is a command: it says so itself
        if args is not None:
            raise
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED


def _main(args: Sequence[str] | None) -> int:
    words = sys.argv[1:] if args is None else args
    # A shell waits for these while somebody types: typer is imported only where they need it.
    if words and words[0] == "__complete":
        from ckptcoord.cli.completion import complete

        return complete(words[1:])
    from ckptcoord.cli.app import main as run

    return run(args)
