"""Plain files by descriptor: positioned reads and writes that finish or raise."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

from ckptcoord.errors import (
    ClosedError,
    CorruptError,
    MissingFileError,
    StorageError,
    StorageFullError,
    UnsafePathError,
)
from ckptcoord.store.checks import check_range
from ckptcoord.store.direct import DirectFile, take_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ckptcoord.store.base import Buffer

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO would wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AGAIN_ATTEMPTS = 100
_AGAIN_PAUSE_S = 0.01

_T = TypeVar("_T")


def storage_error(operation: str, path: str, error: OSError) -> StorageError:
    """The typed error for what the operating system said."""
    kind = StorageFullError if error.errno in _FULL else StorageError
    return kind(
        operation=operation,
        path=path or ".",
        why=error.strerror or str(error),
        errno=error.errno,
    )


@contextmanager
def storage_errors(operation: str, path: str) -> Iterator[None]:
    """Turn an OSError in the block into a StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_error(operation, path, error) from error


def open_folder(name: str, folder: int, path: str) -> int:
    """A descriptor of the folder `name` within the folder of a descriptor.

    Raises:
        UnsafePathError: it is a symbolic link.
        OSError: anything else.
    """
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder):
            raise UnsafePathError(path=path, why=f"{name!r} is a symbolic link") from error
        raise


def create_file(name: str, folder: int, size_bytes: int = 0) -> int:
    """A descriptor of a new file, 0600 whatever the umask, with the space that it will need.

    Raises:
        OSError: EEXIST when there is one.
    """
    descriptor = os.open(name, _CREATE, FILE_MODE, dir_fd=folder)
    try:
        os.fchmod(descriptor, FILE_MODE)
        if size_bytes:
            take_space(descriptor, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_file(name: str, folder: int, path: str) -> LocalReader:
    """Open a plain file for reading.

    Raises:
        MissingFileError: no such file.
        UnsafePathError: a link, folder, FIFO, device or socket.
        OSError: anything else.
    """
    try:
        descriptor = os.open(name, _READ, dir_fd=folder)
    except FileNotFoundError as error:
        raise MissingFileError(path=path) from error
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device with no driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UnsafePathError(path=path, why="it is no plain file") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafePathError(path=path, why="it is no plain file")
    return LocalReader(descriptor, path, status.st_size)


def write_all(descriptor: int, offset: int, data: Buffer) -> None:
    """Write every byte, through short writes.

    Raises:
        OSError: EIO also where the system claims success and writes nothing.
    """
    rest = memoryview(data).cast("B")
    while rest:
        count = _insist(partial(os.pwrite, descriptor, rest, offset))
        if count == 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        rest = rest[count:]
        offset += count


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _insist(call: Callable[[], _T]) -> _T:
    """Repeat a call that answers EAGAIN, for about a second; Python itself repeats EINTR."""
    for _ in range(_AGAIN_ATTEMPTS):
        try:
            return call()
        except BlockingIOError:
            time.sleep(_AGAIN_PAUSE_S)
    return call()


class LocalWriter:
    """A new file that is being filled. Its threads must have ended before it closes."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path
        self._failed = threading.Event()
        self._direct = DirectFile(descriptor)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`; after a failure the file is abandoned."""
        self._check("write")
        rest = memoryview(data).cast("B")
        with self._poisoning("write"):
            done = self._direct.write(offset, rest)
            write_all(self._descriptor, offset, rest[: done.start])
            write_all(self._descriptor, offset + done.stop, rest[done.stop :])

    def sync(self) -> None:
        """Make the content durable; after a failure the file is abandoned."""
        self._check("fsync")
        with self._poisoning("fsync"):
            os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            try:
                self._direct.close()
            finally:
                os.close(descriptor)
        except OSError as error:
            if exc is None:
                raise storage_error("close", self._path, error) from error
            exc.add_note(f"closing {self._path} failed too: {error.strerror}")

    def _check(self, operation: str) -> None:
        if self._descriptor < 0:
            raise ClosedError(thing=f"writer of {self._path}")
        if self._failed.is_set():
            # A second fsync may answer OK though the failed pages were dropped.
            raise StorageError(
                operation=operation, path=self._path, why="the file was abandoned after a failure"
            )

    @contextmanager
    def _poisoning(self, operation: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed.set()
            raise storage_error(operation, self._path, error) from error


class LocalReader:
    """An open plain file."""

    def __init__(self, descriptor: int, path: str, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._path = path
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """Its size when it was opened."""
        return self._size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        self._check(offset, length)
        out = bytearray(length)
        self._fill(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""
        view = out.cast("B")
        self._check(offset, len(view))
        self._fill(offset, view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with storage_errors("close", self._path):
                os.close(descriptor)

    def _fill(self, offset: int, rest: memoryview) -> None:
        while rest:
            with storage_errors("read", self._path):
                count = _insist(partial(os.preadv, self._descriptor, [rest], offset))
            if count == 0:
                raise CorruptError(path=self._path, why=f"the file ends at byte {offset}")
            rest = rest[count:]
            offset += count

    def _check(self, offset: int, length: int) -> None:
        if self._descriptor < 0:
            raise ClosedError(thing=f"reader of {self._path}")
        check_range(self._path, self._size_bytes, offset, length)
