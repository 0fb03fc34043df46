"""Threads of ckptcoord's own, and the error where the system starts no more of them."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ckptcoord.errors import ThreadLimitError

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_T = TypeVar("_T")

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


class Threads(ThreadPoolExecutor):
    """A pool whose `submit`, and so `map`, says in ckptcoord's words that no thread could start."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """As a ThreadPoolExecutor's.

        Raises:
            ThreadLimitError: the system starts no more; what is in the pool is done all the same.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if is_refusal(error):
                raise ThreadLimitError from error
            raise


def is_refusal(error: BaseException) -> bool:
    """Whether Python says with it that no thread could be started, as a pool's `submit` may."""
    return isinstance(error, RuntimeError) and _REFUSED in str(error)
