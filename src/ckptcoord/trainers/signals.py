"""A signal asks the run to end; the run decides when."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Self

from ckptcoord.errors import ThreadLimitError
from ckptcoord.repo.threads import started

if TYPE_CHECKING:
    from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_NOBODY = -1  # no wake-up descriptor is set
_END = b"\0"  # there is no signal 0
_READ_BYTES = 64
_log = logging.getLogger("ckptcoord")


class StopSignals:
    """Remembers SIGTERM and SIGUSR1 while it is entered, and puts the old handlers back.

    Handlers can be set from the main thread only; elsewhere nothing is caught. A forked child has
    the old handlers from its beginning. But a SIGUSR1 that would end it does nothing: launchers
    send that to whole process groups, and loaders' workers are such children.

    Attributes:
        received: the number of the last such signal; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._came_s: float | None = None
        self._old: dict[signal.Signals, object] = {}
        self._arrivals: _Arrivals | None = None

    @property
    def since_s(self) -> float:
        """Seconds since the first such signal came; 0 where none has."""
        if not self.received or self._came_s is None:
            return 0.0
        seen_s = self._arrivals.first_s if self._arrivals is not None else None
        came_s = self._came_s if seen_s is None else min(seen_s, self._came_s)
        return time.monotonic() - came_s

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            _heed_forks()
            self._arrivals = _Arrivals.watch()
            _entered.append(self)
            self._old = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self in _entered:  # else nothing was caught, or this is a forked child
            self._put_back()
            if self._arrivals is not None:
                self._arrivals.end()
            _entered.remove(self)

    def leave_to_parent(self) -> None:
        """Catch nothing in this forked child, and tell the parent of none of its signals."""
        if self._arrivals is not None:
            signal.set_wakeup_fd(_NOBODY)
        if self._old.get(signal.SIGUSR1) is signal.SIG_DFL:
            del self._old[signal.SIGUSR1]
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._old.items():
            # None: it was installed from C and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._came_s is None:
            self._came_s = time.monotonic()


_entered: list[StopSignals] = []  # of this process


@cache
def _heed_forks() -> None:
    os.register_at_fork(after_in_child=_leave_to_parent)


def _leave_to_parent() -> None:
    while _entered:
        _entered.pop().leave_to_parent()


class _Arrivals:
    """Sees when a signal comes. The handler may run later: not before a backward pass has ended.

    Attributes:
        first_s: when the first stop signal came, by the monotonic clock; None: none has.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.first_s: float | None = None
        self._reader, self._writer = reader, writer
        self._thread = started(self._note, "ckptcoord-signals")

    @classmethod
    def watch(cls) -> Self | None:
        """Begin, in the main thread.

        None where the process's wake-up descriptor is in use, or no thread starts: when a signal
        came is then when its handler runs.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            if before == _NOBODY:
                return cls(reader, writer)
        except ThreadLimitError as error:
            _log.warning("%s; how long ago a signal came may be told late", error.what)
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        return None

    def end(self) -> None:
        """Let go of the descriptor and of the thread."""
        signal.set_wakeup_fd(_NOBODY)
        # Not by closing it: forked workers of a data loader may hold it too.
        os.write(self._writer, _END)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _note(self) -> None:
        while True:
            numbers = os.read(self._reader, _READ_BYTES)
            if self.first_s is None and any(number in STOP_SIGNALS for number in numbers):
                self.first_s = time.monotonic()
            if _END in numbers:
                return
