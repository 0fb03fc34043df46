"""A signal asks the run to end; the run decides when."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers SIGTERM and SIGUSR1 while it is entered, and puts the old handlers back.

    Handlers can be set from the main thread only; elsewhere nothing is caught.

    Attributes:
        received: the number of the last such signal; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            # None: it was installed from C and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
