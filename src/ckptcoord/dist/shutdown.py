"""Orderly ends: everything closed in the order that cannot deadlock.

A DDP reducer freed after `destroy_process_group()` can hang the process at exit: its destructor
joins a thread that waits for the interpreter's lock. So reducers go first, the group last.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import threading
import weakref
from typing import Protocol, runtime_checkable

import torch.distributed as c10d


@runtime_checkable
class Closable(Protocol):
    """Anything with `close()`."""

    def close(self) -> object:
        """End what runs for it."""
        ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_log = logging.getLogger("ckptcoord")


def register(thing: Closable) -> None:
    """Have `shutdown()`, or else the end of the process, close this if nobody has by then."""
    _open.add(thing)


def forget(thing: Closable) -> None:
    """It was closed."""
    _open.discard(thing)


def shutdown(*things: object) -> None:
    """Close what is given (trainers, coordinators, loaders), what is still open, then the group.

    Safe to call twice, and without torch.distributed. DDP models need not be given: their
    reducers are found. Every thing is closed even when an earlier one fails; the first failure is
    raised at the end.
    """
    failures: list[Exception] = []
    for thing in (*things, *tuple(_open)):
        if isinstance(thing, Closable):
            try:
                thing.close()
            except Exception as error:  # noqa: BLE001 (raised below, once the rest is closed)
                failures.append(error)
    gc.collect()
    if c10d.is_available() and c10d.is_initialized():
        _drop_reducers()
        gc.collect()
        c10d.destroy_process_group()
    if failures:
        raise failures[0]


def _close_at_exit() -> None:
    for thing in tuple(_open):
        try:
            thing.close()
        except Exception:  # noqa: BLE001 (it is in the log; the process ends in any case)
            _log.exception("closing %s at the end of the process failed", type(thing).__name__)


# What is closed may have to start threads, which is no longer possible when atexit's turn comes;
# concurrent.futures has its own end called early in the same way.
getattr(threading, "_register_atexit", atexit.register)(_close_at_exit)


def _drop_reducers() -> None:
    parallel = sys.modules.get("torch.nn.parallel.distributed")
    if parallel is None:
        return
    for thing in gc.get_objects():
        if type(thing) is parallel.DistributedDataParallel:
            for name in ("reducer", "logger"):
                thing.__dict__.pop(name, None)
