"""Large writes past the page cache (O_DIRECT): less CPU, and nobody else's pages are pushed out.

A copy into the page cache costs more CPU than all the rest of a save: pages are allocated, filled,
and walked again by the writeback, which begins late. Here the bytes go through one aligned buffer
straight to the device. Durability is unchanged: it still takes the file's fsync.
"""

from __future__ import annotations

import errno
import mmap
import os

# Never less than a page: a page must not be written both through the cache and past it.
_ALIGN_BYTES = max(4096, mmap.PAGESIZE)
_LEAST_BYTES = 1 << 20  # below, the wait for the device costs more than the copy
_BUFFER_BYTES = 8 << 20
_CANNOT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN})  # the page cache can


class DirectFile:
    """The way past the page cache to a file that is open already; for one thread at a time.

    Where the system or the file system offers none, nothing is written here, and no error raised.

    Args:
        descriptor: of the file, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._cached = descriptor
        self._direct = -1
        self._buffer: mmap.mmap | None = None
        self._possible = hasattr(os, "O_DIRECT")

    def write(self, offset: int, data: memoryview) -> slice:
        """Write the aligned middle of `data`, as far as it goes; returns the part that is written.

        Raises:
            OSError: the device refused.
        """
        first = -offset % _ALIGN_BYTES
        last = first + (data.nbytes - first) // _ALIGN_BYTES * _ALIGN_BYTES
        if last - first < _LEAST_BYTES or not self._open():
            return slice(0, 0)
        for start in range(first, last, _BUFFER_BYTES):
            part = data[start : min(start + _BUFFER_BYTES, last)]
            count = self._write(offset + start, part)
            if count < part.nbytes:
                return slice(first, start + count)
        return slice(first, last)

    def close(self) -> None:
        """Let go of the descriptor and the buffer. Safe to call twice."""
        self._possible = False
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        if self._direct >= 0:
            descriptor, self._direct = self._direct, -1
            os.close(descriptor)

    def _open(self) -> bool:
        """Open the very same file once more; whether that was possible."""
        if self._possible and self._direct < 0:
            flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
            try:
                self._direct = os.open(f"/proc/self/fd/{self._cached}", flags)
            except OSError:
                # No /proc, no O_DIRECT, no descriptor left: the page cache will do.
                self._possible = False
            else:
                self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        return self._possible

    def _write(self, offset: int, part: memoryview) -> int:
        """How many bytes were written; fewer where the rest has to go through the page cache."""
        assert self._buffer is not None, "made with the descriptor"
        with memoryview(self._buffer) as buffer, buffer[: part.nbytes] as filled:
            filled[:] = part
            try:
                return os.pwrite(self._direct, filled, offset)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
        self.close()  # this file system wants another alignment, or none of it
        return 0
