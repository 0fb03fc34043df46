"""Buffers for staged state: few, large, and used again."""

from __future__ import annotations

import errno
import mmap
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ckptcoord.errors import CkptError, ClosedError, ConfigError

if TYPE_CHECKING:
    from ckptcoord.dist.deadline import Deadline

ALIGN_BYTES = 64  # of every tensor in a buffer: a cache line, and any element's size divides it
PAGE_BYTES = 4096  # of a buffer: what begins with a page can go to a device from where it is
_STALE = 8  # acquisitions after which an idle buffer of a size that nobody asked for goes


@dataclass(slots=True, eq=False)
class _Arena:
    """Memory: `array` and `tensor` are the same bytes, 1-D uint8."""

    array: np.ndarray
    tensor: torch.Tensor
    address: int
    pinned: bool
    idle_since: int = 0

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class Buffer:
    """A loan of the pool's memory. After `release`, it has none."""

    __slots__ = ("_arena", "_pool")

    def __init__(self, pool: StagingPool, arena: _Arena) -> None:
        self._pool = pool
        self._arena: _Arena | None = arena

    def _held(self) -> _Arena:
        if self._arena is None:
            raise ClosedError(thing="staging buffer")
        return self._arena

    @property
    def array(self) -> np.ndarray:
        """The bytes, 1-D uint8, at least as many as were asked for.

        Raises:
            ClosedError: it was released.
        """
        return self._held().array

    @property
    def tensor(self) -> torch.Tensor:
        """The same bytes. Raises as `array`."""
        return self._held().tensor

    @property
    def address(self) -> int:
        """Of the first byte, a multiple of a page's. Raises as `array`."""
        return self._held().address

    def release(self) -> None:
        """Give the memory back; again: nothing."""
        arena, self._arena = self._arena, None
        if arena is not None:
            self._pool.take_back(arena)


class StagingPool:
    """At most `budget_bytes` of memory, on loan or idle; None: as much as is asked for.

    Thread safe. An idle buffer is used again where it is large enough and at most twice as large
    as needed.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._budget = budget_bytes
        self._idle: list[_Arena] = []
        self._loaned_bytes = 0
        self._acquired = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """On loan and idle together."""
        with self._changed:
            return self._held_bytes()

    @property
    def budget_bytes(self) -> int | None:
        """The most that it holds."""
        return self._budget

    def fits(self, nbytes: int) -> bool:
        """Whether so much may ever be on loan at once."""
        return self._budget is None or nbytes <= self._budget

    def acquire(
        self, nbytes: int, *, pinned: bool = False, deadline: Deadline | None = None
    ) -> Buffer:
        """A buffer of at least `nbytes`, its content undefined. Waits while others hold too much.

        Args:
            nbytes: how many.
            pinned: page-locked, which a device copies into by itself.
            deadline: how long to wait for others; None: as long as it takes.

        Raises:
            ConfigError: it can never fit.
            CkptError: nothing was given back in time.
            MemoryError: the system has no more.
        """
        if not self.fits(nbytes):
            raise ConfigError(
                field="staging_bytes", why=f"is {self._budget}, and {nbytes} bytes are to be staged"
            )
        with self._changed:
            timeout_s = None if deadline is None else deadline.remaining_s()
            if not self._changed.wait_for(lambda: self._has_room(nbytes), timeout_s):
                raise CkptError(
                    what=f"no room to stage {nbytes:,} bytes: earlier saves hold "
                    f"{self._loaned_bytes:,} of {self._budget:,}",
                    help="Raise staging_bytes or timeout_s, or save less often",
                )
            self._acquired += 1
            arena = self._reuse(nbytes, pinned=pinned)
            if arena is None:
                self._make_room(nbytes)
                arena = _pinned_arena(nbytes) if pinned else _plain_arena(nbytes)
            self._loaned_bytes += arena.nbytes
        return Buffer(self, arena)

    def take_back(self, arena: _Arena) -> None:
        """What `Buffer.release` calls."""
        with self._changed:
            self._loaned_bytes -= arena.nbytes
            arena.idle_since = self._acquired
            if not self._closed:
                self._idle.append(arena)
            self._changed.notify_all()

    def close(self) -> None:
        """Free what is idle, and what comes back from now on."""
        with self._changed:
            self._closed = True
            self._idle.clear()

    def _held_bytes(self) -> int:
        return self._loaned_bytes + sum(arena.nbytes for arena in self._idle)

    def _has_room(self, nbytes: int) -> bool:
        return self._budget is None or self._loaned_bytes + nbytes <= self._budget

    def _reuse(self, nbytes: int, *, pinned: bool) -> _Arena | None:
        fitting = [
            arena
            for arena in self._idle
            if arena.pinned == pinned and nbytes <= arena.nbytes <= 2 * nbytes
        ]
        if not fitting:
            return None
        arena = min(fitting, key=lambda one: one.nbytes)
        self._idle.remove(arena)
        return arena

    def _make_room(self, nbytes: int) -> None:
        """Drop idle buffers: those of sizes out of use, then the largest, as the budget asks."""
        self._idle = [one for one in self._idle if self._acquired - one.idle_since <= _STALE]
        self._idle.sort(key=lambda one: one.nbytes)
        while self._idle and self._budget is not None:
            if self._held_bytes() + nbytes <= self._budget:
                return
            self._idle.pop()


def _plain_arena(nbytes: int) -> _Arena:
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not for forked children: a device that reads pages (O_DIRECT) must not see them shared.
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, name):
            _advise(memory, getattr(mmap, name))
    array = np.frombuffer(memory, dtype=np.uint8, count=nbytes)
    return _Arena(array, torch.from_numpy(array), array.ctypes.data, pinned=False)


def _advise(memory: mmap.mmap, advice: int) -> None:
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this system does not know it
            raise


def _pinned_arena(nbytes: int) -> _Arena:
    tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return _Arena(tensor.numpy(), tensor, tensor.data_ptr(), pinned=True)
