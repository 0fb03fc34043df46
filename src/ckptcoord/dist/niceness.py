"""Threads that let training go first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def be_nice(niceness: int) -> None:
    """Add to this thread's niceness. On Linux it is its own, and that of the threads it starts.

    Where the system does not let it, as some sandboxes do, it stays as it is.
    """
    if niceness and sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            now = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(19, now + niceness))
