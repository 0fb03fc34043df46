"""Threads of ckptcoord's own, and the error where the system starts no more of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ckptcoord.errors import ThreadLimitError

if TYPE_CHECKING:
    from collections.abc import Callable

_REFUSED = "can't start new thread"  # CPython's words for it; it has no class for it


def started(work: Callable[..., None], name: str, *args: object) -> threading.Thread:
    """A thread that runs, and that the end of the process does not wait for.

    Raises:
        ThreadLimitError: the system starts no more.
    """
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        if is_refusal(error):
            raise ThreadLimitError from error
        raise
    return thread


def is_refusal(error: BaseException) -> bool:
    """Whether Python says with it that no thread could be started, as a pool's `submit` may."""
    return isinstance(error, RuntimeError) and _REFUSED in str(error)
