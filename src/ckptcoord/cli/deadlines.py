"""Calls that may never return, and how long to wait for them."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def within(timeout_s: float, call: Callable[[], _T]) -> _T:
    """What the call returns or raises, from a thread that is left behind when time is up.

    Name look-ups, D-Bus and servers that send a byte now and then have no other end.

    Raises:
        TimeoutError: it took longer.
    """
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody waits)
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result(timeout_s)
