"""Large writes past the page cache (O_DIRECT): less CPU, and nobody else's pages are pushed out.

A copy into the page cache costs more CPU than all the rest of a save: pages are allocated, filled,
and walked again by the writeback, which begins late. Here the bytes go straight to the device: from
where they are, if that is aligned as devices want it, else through aligned buffers. Durability is
unchanged: it still takes the file's fsync.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Never less than a page: a page must not be written both through the cache and past it.
_ALIGN_BYTES = max(4096, mmap.PAGESIZE)
_SECTOR_BYTES = 512  # what most devices want memory to be aligned to
_LEAST_BYTES = 1 << 20  # below, the wait for the device costs more than the copy
_CALL_BYTES = 8 << 20  # given to the system at a time, of what lies as the device wants it
_BUFFER_BYTES = 2 << 20  # a huge page
_CANNOT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN})  # the page cache can
_IDLE: deque[mmap.mmap] = deque(maxlen=2)  # its ends are taken and given by any thread


@contextmanager
def _buffer() -> Iterator[mmap.mmap]:
    """Aligned memory that is this thread's until the block ends.

    It is kept for the next file: fresh memory can cost more CPU than all the rest of a small one.
    It is private, as a forked child's must be its own. What lies together in memory goes to the
    device in fewer requests.
    """
    try:
        buffer = _IDLE.pop()
    except IndexError:
        buffer = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without huge pages
                buffer.madvise(mmap.MADV_HUGEPAGE)
    yield buffer
    _IDLE.append(buffer)


class DirectFile:
    """The way past the page cache to a file that is open already, for any number of threads.

    Where the system or the file system offers no such way, nothing is written, and no error raised.

    Args:
        descriptor: of the file, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._cached = descriptor
        self._direct = -1
        self._possible = hasattr(os, "O_DIRECT")
        self._in_place = True
        self._opening = threading.Lock()

    def write(self, offset: int, data: memoryview) -> slice:
        """Write the aligned middle of `data`, as far as it goes; returns the part that is written.

        Raises:
            OSError: the device refused.
        """
        first = -offset % _ALIGN_BYTES
        last = first + (data.nbytes - first) // _ALIGN_BYTES * _ALIGN_BYTES
        if last - first < _LEAST_BYTES or not self._open():
            return slice(0, 0)
        if self._in_place and _address(data[first:last]) % _SECTOR_BYTES == 0:
            count = self._write_in_place(offset + first, data[first:last])
            if count:
                return slice(first, first + count)
        with _buffer() as buffer:
            for start in range(first, last, _BUFFER_BYTES):
                part = data[start : min(start + _BUFFER_BYTES, last)]
                count = self._write(offset + start, part, buffer)
                if count < part.nbytes:
                    return slice(first, start + count)
        return slice(first, last)

    def close(self) -> None:
        """Let go of the descriptor, once no thread writes. Safe to call twice."""
        self._possible = False
        if self._direct >= 0:
            descriptor, self._direct = self._direct, -1
            os.close(descriptor)

    def _open(self) -> bool:
        """Open the very same file once more; whether that was possible."""
        with self._opening:
            if self._possible and self._direct < 0:
                flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
                try:
                    self._direct = os.open(f"/proc/self/fd/{self._cached}", flags)
                except OSError:
                    # No /proc, no O_DIRECT, no descriptor left: the page cache will do.
                    self._possible = False
            return self._possible

    def _write_in_place(self, offset: int, data: memoryview) -> int:
        """Write from where the bytes are; returns how many, in whole pages."""
        done = 0
        try:
            while done < data.nbytes:
                count = os.pwrite(self._direct, data[done : done + _CALL_BYTES], offset + done)
                done += count
                if not count or count % _ALIGN_BYTES:  # full, which the page cache will say
                    return done // _ALIGN_BYTES * _ALIGN_BYTES
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self._in_place = False  # this device wants another alignment
        return done

    def _write(self, offset: int, part: memoryview, buffer: mmap.mmap) -> int:
        with memoryview(buffer) as whole, whole[: part.nbytes] as filled:
            filled[:] = part
            try:
                return os.pwrite(self._direct, filled, offset)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
        self._possible = False  # this file system wants another alignment, or none of it
        return 0


def _address(data: memoryview) -> int:
    """Where its first byte is."""
    import numpy as np  # late: commands that only read start faster

    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


def take_space(descriptor: int, size_bytes: int) -> None:
    """Give a new file its size and its space on the device, where the file system can.

    Writes that do not make a file longer can go on at the same time, and a full device says so
    before anything is written.

    Raises:
        OSError: the device is full, or failed.
    """
    import ctypes  # late: commands that only read start faster

    try:
        # Not os.posix_fallocate: where the file system cannot, that writes to every block.
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):  # a system without it
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(descriptor, 0, 0, size_bytes):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
