"""What a command is asked for by name, and who says yes before something is deleted."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import LATEST
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def name_and_ref(command: str, words: Sequence[str]) -> tuple[str, str] | None:
    """`[NAME [REF]]`, the newest checkpoint by default; None without words.

    Raises:
        ConfigError: there are more.
    """
    if len(words) > 2:
        why = f"takes NAME and REF, and {words[2]!r:.80} stands behind"
        raise ConfigError(field=command, why=why, help=f"See `ckptcoord {command} --help`")
    return (words[0], words[1] if len(words) > 1 else LATEST) if words else None


def only_name(command: str, words: Sequence[str]) -> str:
    """The NAME of what `command -d` deletes.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if len(words) != 1:
        why = f"takes the NAME of one {command}"
        raise ConfigError(field=f"{command} -d", why=why, help=f"See `ckptcoord {command} --help`")
    return words[0]


def agreed(question: str) -> bool:
    """Ask on stderr; what is not yes is no."""
    sys.stdout.flush()
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def nonce() -> str:
    """Who appends to the log, for one command."""
    return os.urandom(16).hex()
