"""What the CLI knows of secrets before it says anything."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from itertools import pairwise
from typing import TYPE_CHECKING

from ckptcoord.redact import TOKEN_VARIABLE, redact, remember, secrets_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

_LOGIN = "login"
_OPEN_OPTION = "--verify-url"


def mask_secrets(words: Sequence[str]) -> None:
    """From here on no output holds the tokens of these words and of the environment."""
    remember(os.environ.get(TOKEN_VARIABLE, ""))
    for secret in (*secrets_in(words), *_mistaken(words)):
        remember(secret)


def mask_tracebacks() -> None:
    """Nor does a traceback, which is a bug of ours, in any thread of this process."""
    sys.excepthook = _show
    threading.excepthook = lambda args: _show(args.exc_type, args.exc_value, args.exc_traceback)


def _show(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _mistaken(words: Sequence[str]) -> Iterator[str]:
    """Tokens that are given to login in a wrong place, whose error would show them."""
    if not words or words[0] != _LOGIN:
        return
    for before, word in pairwise(words):
        option, _, value = word.partition("=")
        if not word.startswith("-"):
            option, value = before, word
        if option != _OPEN_OPTION:
            yield value
