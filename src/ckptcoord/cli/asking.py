"""Before something is deleted: who says yes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output


def require_somebody(out: Output, command: str, *, dry_run: bool, yes: bool) -> None:
    """Refuse to delete where nobody can be asked and nobody said yes.

    Raises:
        ConfigError: that is so.
    """
    if not (dry_run or yes) and (out.as_json or not sys.stdin.isatty()):
        raise ConfigError(
            field=command,
            why="deletes, and there is nobody to ask",
            help="Look with `--dry-run`, then give `-y`",
        )


def agreed(question: str) -> bool:
    """Ask on stderr; what is not yes is no."""
    sys.stdout.flush()
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def nonce() -> str:
    """Who appends to the log, for one command."""
    return os.urandom(16).hex()
