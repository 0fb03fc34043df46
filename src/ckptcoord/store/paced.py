"""A store that is written to at no more than so many bytes a second."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from ckptcoord.store.base import Buffer, Entry, Reader, Store, Writer

_PIECE_S = 0.05  # what is written at a time takes about so long at the pace
_LEAST_PIECE_BYTES = 1 << 20


class PacedStore:
    """Another store, whose new files fill at a bounded rate; all else is as it is there.

    Args:
        store: the other one.
        bytes_per_s: of all files together.
    """

    def __init__(self, store: Store, bytes_per_s: float) -> None:
        self._store = store
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    @property
    def url(self) -> str:
        """For people: where it is."""
        return self._store.url

    @property
    def piece_bytes(self) -> int:
        """What is written at a time."""
        return max(_LEAST_PIECE_BYTES, int(self._bytes_per_s * _PIECE_S))

    def pause(self, nbytes: int) -> None:
        """Wait until so many bytes more may be written."""
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(now_s, self._free_at_s)
            self._free_at_s = begin_s + nbytes / self._bytes_per_s
        if begin_s > now_s:
            time.sleep(begin_s - now_s)  # this is the pace

    def create(self, path: str, *, size_bytes: int = 0) -> Writer:
        """A new, empty file that fills at the pace."""
        return _PacedWriter(self, self._store.create(path, size_bytes=size_bytes))

    def open(self, path: str) -> Reader:
        """Open a plain file for reading."""
        return self._store.open(path)

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """All of a file."""
        return self._store.read(path, limit_bytes=limit_bytes)

    def put_new(self, path: str, data: bytes) -> bool:
        """Create the file with this content; False when it exists already."""
        return self._store.put_new(path, data)

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a file."""
        self._store.put(path, data)

    def list(self, path: str) -> tuple[Entry, ...]:
        """The names in a folder."""
        return self._store.list(path)

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        return self._store.exists(path)

    def make_dirs(self, path: str) -> None:
        """Create a folder and its parents."""
        self._store.make_dirs(path)

    def sync_dir(self, path: str) -> None:
        """Make the names in a folder durable."""
        self._store.sync_dir(path)

    def move_dir(self, source: str, target: str) -> None:
        """Rename a folder."""
        self._store.move_dir(source, target)

    def remove_tree(self, path: str) -> None:
        """Delete a folder or file with all in it."""
        self._store.remove_tree(path)


class _PacedWriter:
    def __init__(self, pace: PacedStore, writer: Writer) -> None:
        self._pace, self._writer = pace, writer

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data`, a piece after the other."""
        whole = memoryview(data).cast("B")
        for at in range(0, whole.nbytes, self._pace.piece_bytes):
            piece = whole[at : at + self._pace.piece_bytes]
            self._pace.pause(piece.nbytes)
            self._writer.write_at(offset + at, piece)

    def sync(self) -> None:
        """Make the content durable."""
        self._writer.sync()

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(exc_type, exc, traceback)
