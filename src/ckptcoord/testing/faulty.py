"""A Store that fails, or dies, at any operation that a test names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

    from ckptcoord.store.base import Buffer, Entry, Reader, Store, Writer

Fail: TypeAlias = Callable[[int, str, str], Exception | None]
FailRead: TypeAlias = Callable[[str, str], Exception | None]


class SimulatedCrash(BaseException):
    """The process is dead from here on; like SIGKILL, no `except Exception` stops it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One mutating call: its name in the Store or Writer protocol (or `close`), and its path."""

    name: str
    path: str


class FaultyStore:
    """Wraps a store; counts every mutating operation from 0 and fails where it is told to.

    Mutating are `create`, `write_at`, `sync`, `close` (a writer's orderly end), `put_new`, `put`,
    `make_dirs`, `sync_dir`, `move_dir` and `remove_tree`. A test runs once to learn `operations`,
    then once for each number. Safe in several threads.

    Args:
        inner: the store that does the work.
        fail: given (number, name, path), the error to raise instead of the operation.
        fail_after: the same, but the operation has taken effect when the error is raised: a
            reply that was lost.
        fail_read: given (name, path), the error to raise instead of a reading call.
        crash_at: the number of the operation before which the process dies: it raises
            SimulatedCrash, and so does every later call of any kind.
    """

    def __init__(
        self,
        inner: Store,
        *,
        fail: Fail | None = None,
        fail_after: Fail | None = None,
        fail_read: FailRead | None = None,
        crash_at: int | None = None,
    ) -> None:
        self._inner = inner
        self._fail, self._fail_after, self._fail_read = fail, fail_after, fail_read
        self._crash_at = crash_at
        self._lock = threading.Lock()
        self._operations: list[Operation] = []
        self._dead = False

    @property
    def inner(self) -> Store:
        """The store that does the work."""
        return self._inner

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The mutating operations that were asked for, in order; each one's place is its number."""
        with self._lock:
            return tuple(self._operations)

    @property
    def url(self) -> str:
        """The inner store's."""
        return self._inner.url

    def create(self, path: str, *, size_bytes: int = 0) -> Writer:
        """A new file whose writes, syncs and close are counted too."""
        with self.mutating("create", path):
            writer = self._inner.create(path, size_bytes=size_bytes)
        return _FaultyWriter(self, writer, path)

    def open(self, path: str) -> Reader:
        """Open for reading."""
        self.reading("open", path)
        return _FaultyReader(self, self._inner.open(path), path)

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """Read a file."""
        self.reading("read", path)
        return self._inner.read(path, limit_bytes=limit_bytes)

    def put_new(self, path: str, data: bytes) -> bool:
        """Create a file atomically."""
        with self.mutating("put_new", path):
            return self._inner.put_new(path, data)

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a file atomically."""
        with self.mutating("put", path):
            self._inner.put(path, data)

    def list(self, path: str) -> tuple[Entry, ...]:
        """List a folder."""
        self.reading("list", path)
        return self._inner.list(path)

    def exists(self, path: str) -> bool:
        """Look whether a name is there."""
        self.reading("exists", path)
        return self._inner.exists(path)

    def make_dirs(self, path: str) -> None:
        """Create folders."""
        with self.mutating("make_dirs", path):
            self._inner.make_dirs(path)

    def sync_dir(self, path: str) -> None:
        """Sync a folder."""
        with self.mutating("sync_dir", path):
            self._inner.sync_dir(path)

    def move_dir(self, source: str, target: str) -> None:
        """Rename a folder; counted under its target's path."""
        with self.mutating("move_dir", target):
            self._inner.move_dir(source, target)

    def remove_tree(self, path: str) -> None:
        """Delete a tree."""
        with self.mutating("remove_tree", path):
            self._inner.remove_tree(path)

    @contextmanager
    def mutating(self, name: str, path: str) -> Iterator[None]:
        """Count one operation around its block, and fail before or after it as told."""
        with self._lock:
            self._die_if_dead()
            number = len(self._operations)
            self._operations.append(Operation(name=name, path=path))
            self._dead = number == self._crash_at
            self._die_if_dead()
        _raise_any(self._fail(number, name, path) if self._fail else None)
        yield
        _raise_any(self._fail_after(number, name, path) if self._fail_after else None)

    def reading(self, name: str, path: str) -> None:
        """Fail a call that reads, as told."""
        with self._lock:
            self._die_if_dead()
        _raise_any(self._fail_read(name, path) if self._fail_read else None)

    def _die_if_dead(self) -> None:
        if self._dead:
            raise SimulatedCrash(f"dead since operation {self._crash_at}")


class _FaultyWriter:
    def __init__(self, store: FaultyStore, inner: Writer, path: str) -> None:
        self._store, self._inner, self._path = store, inner, path

    def write_at(self, offset: int, data: Buffer) -> None:
        with self._store.mutating("write_at", self._path):
            self._inner.write_at(offset, data)

    def sync(self) -> None:
        with self._store.mutating("sync", self._path):
            self._inner.sync()

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The real file closes in any case: this process only plays dead.
        self._inner.__exit__(exc_type, exc, traceback)
        if exc is None:
            with self._store.mutating("close", self._path):
                pass


class _FaultyReader:
    def __init__(self, store: FaultyStore, inner: Reader, path: str) -> None:
        self._store, self._inner, self._path = store, inner, path

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        self._store.reading("read", self._path)
        return self._inner.read(offset, length)

    def read_into(self, offset: int, out: memoryview) -> None:
        self._store.reading("read_into", self._path)
        self._inner.read_into(offset, out)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inner.__exit__(exc_type, exc, traceback)


def _raise_any(error: Exception | None) -> None:
    if error is not None:
        raise error
