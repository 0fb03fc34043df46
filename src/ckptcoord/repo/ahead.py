"""Tensors on their way into a file: hashed and written side by side, few in memory at a time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from types import TracebackType

    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Writer

_INLINE_BYTES = 256 << 10  # below, handing a tensor to another thread costs more than hashing it
_AHEAD_BYTES = 64 << 20  # tensors that may be in memory at once, unless a single one is larger
_PIECE_BYTES = 8 << 20  # what one thread writes at a time
_WRITERS = 2  # so that the storage always has something to do


class Ahead:
    """Hashes and writes what it is given on threads of its own; a context manager that ends them.

    Args:
        writer: of the file.
        hashers: cores for one digest.
    """

    def __init__(self, writer: Writer, *, hashers: int) -> None:
        self._writer = writer
        self._hashers = hashers
        self._stack = ExitStack()
        self._hashing = self._pool(1, "ckptcoord-hash")
        self._writing = self._pool(_WRITERS, "ckptcoord-write")
        self._digests: list[Digest | Future[Digest]] = []
        self._under_way: deque[tuple[int, list[Future[Digest] | Future[None]]]] = deque()
        self._held_bytes = 0

    def make_room(self, nbytes: int) -> None:
        """Wait until a tensor of this size may be read into memory.

        Raises:
            StorageError: an earlier one could not be written.
        """
        while self._under_way and self._held_bytes + nbytes > _AHEAD_BYTES:
            self._finish_first()

    def put(self, offset: int, data: memoryview) -> None:
        """Hash a tensor, and write it at an offset; it is let go as soon as both are done."""
        if data.nbytes < _INLINE_BYTES:
            self._digests.append(blake3_digest(data))
            self._writer.write_at(offset, data)
            return
        digest = self._hashing.submit(self._hash, [data])
        self._digests.append(digest)
        self._begin(offset, data, [digest])

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes that need no digest; they are let go as soon as that is done."""
        self._begin(offset, data, [])

    def digests(self) -> list[Digest]:
        """Wait for all that was put; their digests in that order.

        Raises:
            StorageError: something could not be written.
        """
        while self._under_way:
            self._finish_first()
        return [one.result() if isinstance(one, Future) else one for one in self._digests]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def _pool(self, size: int, name: str) -> Threads:
        pool = Threads(size, name)
        self._stack.callback(pool.shutdown, cancel_futures=True)
        return pool

    def _begin(self, offset: int, data: memoryview, others: list[Future[Digest]]) -> None:
        writes = [
            self._writing.submit(self._write, offset + at, [data[at : at + _PIECE_BYTES]])
            for at in range(0, data.nbytes, _PIECE_BYTES)
        ]
        self._under_way.append((data.nbytes, [*others, *writes]))
        self._held_bytes += data.nbytes

    def _finish_first(self) -> None:
        nbytes, futures = self._under_way.popleft()
        for future in futures:
            future.result()
        self._held_bytes -= nbytes

    # Each takes its data out of a box: a future that is done would still hold its arguments.

    def _hash(self, box: list[memoryview]) -> Digest:
        return blake3_digest(box.pop(), threads=self._hashers)

    def _write(self, offset: int, box: list[memoryview]) -> None:
        self._writer.write_at(offset, box.pop())
