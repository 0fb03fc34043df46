"""Errors as people and programs read them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptcoord.cli.text import Painter, Style, printable
from ckptcoord.errors import CkptError

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
"""128 + SIGINT, as a shell says it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE: what a tool that the signal ends leaves behind."""

_SHOWN_CHARS = 200
_ENDLESS = re.compile(r"\S{1000,}")


def error_lines(error: CkptError, paint: Painter) -> list[str]:
    """`error[CC012]: what`, then `cause:` for each error behind it, then `help:`."""
    head = paint(f"error[{error.code}]:", Style.BOLD, Style.RED)
    lines = [f"{head} {_readable(error.what)}"]
    lines += [f"{paint('cause:', Style.BOLD)} {_readable(cause)}" for cause in _causes(error)]
    if error.help:
        lines.append(f"{paint('help:', Style.BOLD, Style.GREEN)} {_readable(error.help)}")
    return lines


def error_document(error: CkptError) -> dict[str, object]:
    """The same as JSON values."""
    return {
        "code": error.code,
        "type": type(error).__name__,
        "exit_code": error.exit_code,
        "what": error.what,
        "help": error.help,
        "causes": list(_causes(error)),
        "facts": error.facts,
    }


def _readable(text: str) -> str:
    """What was given as a name may be anything, pages of it too."""
    return _ENDLESS.sub(lambda word: f"{word[0][:_SHOWN_CHARS]}...", printable(text))


def _causes(error: CkptError) -> Iterator[str]:
    """What is chained behind an error and says something that the error itself does not."""
    seen: set[int] = {id(error)}
    cause = error.__cause__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        text = cause.what if isinstance(cause, CkptError) else str(cause)
        if text and text not in error.what:
            yield text if isinstance(cause, CkptError) else f"{type(cause).__name__}: {text}"
        cause = cause.__cause__
