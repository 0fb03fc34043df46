"""A Store in a folder of a POSIX file system."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Self

from ckptcoord.errors import (
    ClosedError,
    MissingFileError,
)
from ckptcoord.store.base import Entry, Reader, Writer
from ckptcoord.store.checks import check_folder, check_path, check_size
from ckptcoord.store.files import (
    FOLDER_MODE,
    LocalWriter,
    create_file,
    open_file,
    open_folder,
    storage_error,
    storage_errors,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

TEMP_PREFIX = ".tmp-"


class LocalStore:
    """Files below one folder, reached from its descriptor, part by part, through no link.

    New files are 0600 and new folders 0700, whatever the umask. A killed `put` or `put_new` can
    leave a file whose name begins with `.tmp-` beside its target; nothing ever reads it.

    Args:
        root: the folder; it may itself be reached through links.
        create: make it, and its parents, when it is absent.

    Raises:
        StorageError: there is no such folder, or it cannot be made or opened.
    """

    def __init__(self, root: str | os.PathLike[str], *, create: bool = False) -> None:
        self._url = os.path.abspath(os.fspath(root))  # noqa: PTH100 (resolve() would follow links)
        with storage_errors("open", self._url):
            if create:
                _make_root(self._url)
            self._root = os.open(self._url, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._closer = weakref.finalize(self, os.close, self._root)

    @property
    def url(self) -> str:
        """The root's absolute path."""
        return self._url

    def close(self) -> None:
        """Give the root's descriptor back; open readers and writers live on."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def create(self, path: str, *, size_bytes: int = 0) -> Writer:
        """A new, empty file."""
        with self._beside("create", path) as (folder, name):
            return LocalWriter(create_file(name, folder, size_bytes), path)

    def open(self, path: str) -> Reader:
        """Open a plain file for reading."""
        with self._beside("open", path, reading=True) as (folder, name):
            return open_file(name, folder, path)

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """All of a file."""
        with self.open(path) as reader:
            check_size(path, reader.size_bytes, limit_bytes)
            return reader.read(0, reader.size_bytes)

    def put_new(self, path: str, data: bytes) -> bool:
        """Create the file with this content, atomically and durably; False when it exists."""
        with (
            self._beside("put_new", path) as (folder, name),
            _temporary(folder, data) as (temp, descriptor),
        ):
            try:
                os.link(temp, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                # NFS repeats a request whose reply was lost: the link may be this very one.
                if not _same_file(name, folder, descriptor):
                    return False
            os.fsync(folder)
            return True

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically and durably."""
        with (
            self._beside("put", path) as (folder, name),
            _temporary(folder, data) as (temp, _),
        ):
            os.replace(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)

    def list(self, path: str) -> tuple[Entry, ...]:
        """The names in a folder, sorted; an absent folder is empty."""
        parts = check_folder(path)
        with storage_errors("list", path):
            try:
                with self._folder(parts, path) as folder:
                    return tuple(sorted(_entries(folder), key=attrgetter("name")))
            except FileNotFoundError:
                return ()

    def exists(self, path: str) -> bool:
        """Whether anything of that name is there, be it a dangling link."""
        parts = check_folder(path)
        if not parts:
            return True
        with storage_errors("stat", path):
            try:
                with self._folder(parts[:-1], path) as folder:
                    os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def make_dirs(self, path: str) -> None:
        """Create a folder and its parents, durably."""
        parts = check_folder(path)
        with storage_errors("mkdir", path):
            folder = os.dup(self._descriptor())
            try:
                for part in parts:
                    child = _make_folder(part, folder, path)
                    os.close(folder)
                    folder = child
            finally:
                os.close(folder)

    def sync_dir(self, path: str) -> None:
        """Make the names in a folder durable."""
        parts = check_folder(path)
        with storage_errors("fsync", path), self._folder(parts, path) as folder:
            os.fsync(folder)

    def move_dir(self, source: str, target: str) -> None:
        """Rename a folder, atomically and durably; an existing target is a StorageError."""
        with (
            self._beside("move", target) as (into, new_name),
            self._beside("move", source) as (out_of, old_name),
        ):
            if not stat.S_ISDIR(os.stat(old_name, dir_fd=out_of, follow_symlinks=False).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            # The system refuses a target with files in it; an empty one, only we do. Between this
            # look and the rename, nothing but an empty folder can be lost.
            if _present(new_name, into):
                raise storage_error(
                    "move", target, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                )
            os.rename(old_name, new_name, src_dir_fd=out_of, dst_dir_fd=into)  # noqa: TID251 (this is the Store)
            os.fsync(into)
            os.fsync(out_of)

    def remove_tree(self, path: str) -> None:
        """Delete a folder or file with all in it, following no link."""
        check_path(path)
        with (
            suppress(MissingFileError),
            self._beside("remove", path, reading=True) as (
                folder,
                name,
            ),
        ):
            _remove(name, folder, path)

    def _descriptor(self) -> int:
        if not self._closer.alive:
            raise ClosedError(thing=f"store {self._url}")
        return self._root

    @contextmanager
    def _folder(self, parts: Sequence[str], path: str) -> Iterator[int]:
        """The descriptor of a folder.

        Raises:
            UnsafePathError: a part is a symbolic link.
            OSError: anything else.
        """
        # Not a duplicate of the root's: threads would share its place in a listing.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        folder = os.open(".", flags, dir_fd=self._descriptor())
        try:
            for part in parts:
                child = open_folder(part, folder, path)
                os.close(folder)
                folder = child
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _beside(
        self, operation: str, path: str, *, reading: bool = False
    ) -> Iterator[tuple[int, str]]:
        """The descriptor of the folder that a path is in, and its last part."""
        parts = check_path(path)
        try:
            with self._folder(parts[:-1], path) as folder:
                yield folder, parts[-1]
        except FileNotFoundError as error:
            if reading:
                raise MissingFileError(path=path) from error
            raise storage_error(operation, path, error) from error
        except OSError as error:
            raise storage_error(operation, path, error) from error


def _make_root(path: str) -> None:
    parent = os.path.dirname(path)  # noqa: PTH120 (a str, as os.open takes it)
    if parent != path and not os.path.isdir(path):  # noqa: PTH112 (as above)
        _make_root(parent)
        folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(_make_folder(os.path.basename(path), folder, path))  # noqa: PTH119 (as above)
        finally:
            os.close(folder)


def _make_folder(name: str, folder: int, path: str) -> int:
    """The descriptor of a folder that is made when it is absent; its name is durable."""
    with suppress(FileExistsError):
        os.mkdir(name, FOLDER_MODE, dir_fd=folder)
        child = open_folder(name, folder, path)
        try:
            os.fchmod(child, FOLDER_MODE)
            os.fsync(folder)
        except BaseException:
            os.close(child)
            raise
        return child
    os.fsync(folder)  # whoever made it may not have come to its own fsync
    return open_folder(name, folder, path)


@contextmanager
def _temporary(folder: int, data: bytes) -> Iterator[tuple[str, int]]:
    """A durable file with this content under a name of its own, which is gone afterwards."""
    name = TEMP_PREFIX + os.urandom(16).hex()
    descriptor = create_file(name, folder)
    try:
        try:
            write_all(descriptor, 0, data)
            os.fsync(descriptor)
            yield name, descriptor
        finally:
            os.close(descriptor)
    finally:
        # What cannot be unlinked stays as debris that nothing reads; the outcome is decided.
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _same_file(name: str, folder: int, descriptor: int) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _present(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _entries(folder: int) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            is_dir = entry.is_dir(follow_symlinks=False)
            with suppress(FileNotFoundError):  # removed since it was listed
                size = 0 if is_dir else entry.stat(follow_symlinks=False).st_size
                yield Entry(name=entry.name, is_dir=is_dir, size_bytes=size)


def _remove(name: str, folder: int, path: str) -> None:
    """Remove a name and what is below it; others may be removing it too."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
        return
    child = open_folder(name, folder, path)
    try:
        with os.scandir(child) as entries:
            names = [entry.name for entry in entries]
        for below in sorted(names):
            with suppress(FileNotFoundError):
                _remove(below, child, path)
    finally:
        os.close(child)
    os.rmdir(name, dir_fd=folder)
