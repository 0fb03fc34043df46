"""The Store protocol: all access to files goes through it.

A path is relative to the store's root, POSIX, normalised ("checkpoint-5/model.safetensors"); the
root is "". Every method raises `StorageError` (or `StorageFullError`, `UnsafePathError`,
`MissingFileError`) and nothing else for what the storage does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

Buffer = memoryview | bytes | bytearray


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One name in a folder."""

    name: str
    is_dir: bool
    size_bytes: int


class Writer(Protocol):
    """A new file that is being filled; a context manager that always closes."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`. Several threads may write disjoint ranges."""
        ...

    def sync(self) -> None:
        """Make the content durable. After a failure the file must be abandoned."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Reader(Protocol):
    """An open file, bound to its descriptor: what is renamed or replaced later doesn't matter."""

    @property
    def size_bytes(self) -> int:
        """Its length when it was opened."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; a short file is a CorruptError."""
        ...

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`; a short file is a CorruptError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Store(Protocol):
    """A tree of files with the few operations that the commit protocol needs."""

    @property
    def url(self) -> str:
        """For people: where it is."""
        ...

    def create(self, path: str, *, size_bytes: int = 0) -> Writer:
        """A new, empty file; its folder exists. An existing one is a StorageError.

        `size_bytes`, where known, is what it will hold in the end: a store may take the space at
        once. What has not been written by then is zeros or absent.
        """
        ...

    def open(self, path: str) -> Reader:
        """Open a plain file for reading without following links."""
        ...

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """All of a file; a larger one than the limit is a CorruptError before it is read."""
        ...

    def put_new(self, path: str, data: bytes) -> bool:
        """Create the file with this content, atomically and durably; False when it exists already.

        When the outcome is unknown (an error after the name may have appeared) it raises
        StorageError; the caller reads back.
        """
        ...

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically and durably. For derived files only."""
        ...

    def list(self, path: str) -> tuple[Entry, ...]:
        """The names in a folder, sorted; an absent folder is empty."""
        ...

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        ...

    def make_dirs(self, path: str) -> None:
        """Create a folder and its parents, durably; fine when it exists."""
        ...

    def sync_dir(self, path: str) -> None:
        """Make the names in a folder durable."""
        ...

    def move_dir(self, source: str, target: str) -> None:
        """Rename a folder, atomically and durably; an existing target is a StorageError."""
        ...

    def remove_tree(self, path: str) -> None:
        """Delete a folder or file with all in it; fine when it is absent."""
        ...
