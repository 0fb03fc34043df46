"""The files of a source: opened through no link, never outside of it, never written to."""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.jsonio import JsonValue, parse_json
from ckptcoord.errors import (
    CorruptError,
    FormatError,
    ManifestError,
    MissingFileError,
    UnsafePathError,
)
from ckptcoord.store.checks import check_folder, check_path, check_size
from ckptcoord.store.files import open_folder, storage_error
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from ckptcoord.store.base import Entry

MAX_JSON_BYTES = 64 << 20
MAX_ENTRIES = 100_000  # in one folder
RECOPY = "Copy it again from where it was written; nothing was imported"
# Without O_NONBLOCK, opening a FIFO would wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SourceFolder:
    """A folder that another tool has written.

    Args:
        path: it; links on the way to it are followed, links in it are not.

    Raises:
        FormatError: it is no folder, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no path"
            raise FormatError(path=os.fspath(path), why=why) from error

    def names(self, inside: str = "") -> dict[str, Entry]:
        """What is in it, or in a folder in it, by name.

        Raises:
            FormatError: there is too much.
        """
        with LocalStore(self.path) as store:
            found = store.list(inside)
        if len(found) > MAX_ENTRIES:
            raise FormatError(path=self.shown(inside), why=f"has over {MAX_ENTRIES} files")
        return {entry.name: entry for entry in found}

    def shown(self, name: str) -> str:
        """A file's path for people."""
        return str(self.path / name) if "\0" not in name else ascii(name)

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """All of a file.

        Raises:
            CorruptError, UnsafePathError: it is too large, missing, or no plain file of the folder.
        """
        with self.opened(name) as descriptor:
            size_bytes = os.fstat(descriptor).st_size
            check_size(self.shown(name), size_bytes, limit_bytes)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(limit_bytes)

    def read_json(self, name: str) -> dict[str, JsonValue]:
        """A file that holds a JSON object.

        Raises:
            CorruptError: it holds anything else.
        """
        data = self.read(name, limit_bytes=MAX_JSON_BYTES)
        return json_object(data, self.shown(name))

    def mapped(self, name: str) -> mmap.mmap:
        """A file in memory, page by page as it is read; what is written there is not in the file.

        Raises:
            CorruptError: it is empty.
            StorageError: the system has no room for one more.
        """
        with self.opened(name) as descriptor:
            if not os.fstat(descriptor).st_size:
                raise CorruptError(path=self.shown(name), why="is empty", help=RECOPY)
            try:
                return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            except OSError as error:  # each keeps a descriptor: of over 1,000 files, one too many
                raise storage_error("map", self.shown(name), error) from error

    def size_bytes(self, name: str) -> int:
        """Of a plain file of the folder. Raises as `opened`."""
        with self.opened(name) as descriptor:
            return os.fstat(descriptor).st_size

    @contextmanager
    def part(self, name: str, begin: int, length: int) -> Iterator[io.BufferedReader]:
        """What stands in the middle of a file, as a file of its own. Raises as `opened`."""
        with self.opened(name) as descriptor, _Part(descriptor, begin, length) as raw:
            yield io.BufferedReader(raw)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of a plain file of the folder.

        Raises:
            UnsafePathError: the name leads elsewhere, through a link, or to no plain file.
            MissingFileError: there is none.
        """
        parts = check_path(name)
        with _folder(self.path, parts[:-1]) as folder:
            descriptor = _open(parts[-1], folder, self.shown(name))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnsafePathError(path=self.shown(name), why="it is no plain file")
            yield descriptor
        finally:
            os.close(descriptor)

    def below(self, name: str) -> SourceFolder:
        """A folder in it.

        Raises:
            UnsafePathError: the name leads elsewhere, or through a link.
        """
        with _folder(self.path, check_folder(name)):
            return SourceFolder(self.path / name)


class _Part(io.RawIOBase):
    """Bytes of an open file, from `begin` on; read by their place, so that nobody's moves."""

    def __init__(self, descriptor: int, begin: int, length: int) -> None:
        self._descriptor, self._begin, self._length, self._at = descriptor, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        done = os.preadv(self._descriptor, [wanted], self._begin + self._at) if wanted else 0
        self._at += done
        return done

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "a place before the file")
        self._at = at
        return at


def json_object(data: bytes, path: str) -> dict[str, JsonValue]:
    """A JSON object of a source.

    Raises:
        CorruptError: it is anything else.
    """
    try:
        value = parse_json(data, path=path)
    except ManifestError as error:
        raise CorruptError(path=path, why=error.why, help=RECOPY) from error
    if not isinstance(value, dict):
        raise CorruptError(path=path, why="is no JSON object", help=RECOPY)
    return value


@contextmanager
def _folder(root: Path, parts: tuple[str, ...]) -> Iterator[int]:
    shown = str(root.joinpath(*parts))
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error("open", shown, error) from error
    try:
        for part in parts:
            try:
                child = open_folder(part, folder, shown)
            except FileNotFoundError as error:
                raise MissingFileError(path=shown) from error
            except OSError as error:
                raise storage_error("open", shown, error) from error
            os.close(folder)
            folder = child
        yield folder
    finally:
        os.close(folder)


def _open(name: str, folder: int, shown: str) -> int:
    try:
        return os.open(name, _READ, dir_fd=folder)
    except FileNotFoundError as error:
        raise MissingFileError(path=shown) from error
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device with no driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UnsafePathError(path=shown, why="it is a link, or no plain file") from error
        raise storage_error("open", shown, error) from error
