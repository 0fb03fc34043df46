"""A Store in memory that knows what a power loss would leave of it."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeAlias

from ckptcoord.errors import ClosedError, MissingFileError, StorageError, UnsafePathError
from ckptcoord.store.base import Buffer, Entry, Reader, Writer
from ckptcoord.store.checks import check_folder, check_path, check_range, check_size

if TYPE_CHECKING:
    import random
    from types import TracebackType


@dataclass(slots=True, eq=False)
class _File:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.pending.append((offset, data))
        _patch(self.content, offset, data)

    def sync(self) -> None:
        self.durable = bytes(self.content)
        self.pending.clear()


@dataclass(slots=True, eq=False)
class _Folder:
    names: dict[str, _Node] = field(default_factory=dict)
    durable: dict[str, _Node] = field(default_factory=dict)

    def sync(self) -> None:
        self.durable = dict(self.names)


_Node: TypeAlias = "_File | _Folder"


class MemoryStore:
    """Files in memory, with the semantics of LocalStore and a model of what is durable.

    A file's content is durable once its Writer has synced it, a name once its folder is synced;
    `put`, `put_new`, `make_dirs` and `move_dir` do both, as everywhere. Safe in several threads.
    """

    def __init__(self) -> None:
        self._root = _Folder()
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """`memory:`, for there is only this object."""
        return "memory:"

    def crash(self, rng: random.Random | None = None) -> MemoryStore:
        """What is there after a power loss now, as a store of its own; this one is unchanged.

        Args:
            rng: without it, all that was not synced is lost. With it, each unsynced write and
                each unsynced change of a name is kept or lost by chance, and a kept write may be
                torn.
        """
        with self._lock:
            after = MemoryStore()
            after._root = _folder_after(self._root, rng)
            return after

    def create(self, path: str, *, size_bytes: int = 0) -> Writer:
        """A new, empty file; memory has no space to take."""
        with self._lock:
            folder, name = self._beside("create", path)
            if name in folder.names:
                raise _refusal("create", path, errno.EEXIST)
            file = _File()
            folder.names[name] = file
            return _MemoryWriter(self._lock, file, path)

    def open(self, path: str) -> Reader:
        """Open a file for reading."""
        with self._lock:
            node = self._node("open", check_path(path))
            if node is None:
                raise MissingFileError(path=path)
            if not isinstance(node, _File):
                raise UnsafePathError(path=path, why="it is no plain file")
            return _MemoryReader(self._lock, node, path)

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """All of a file."""
        with self.open(path) as reader:
            check_size(path, reader.size_bytes, limit_bytes)
            return reader.read(0, reader.size_bytes)

    def put_new(self, path: str, data: bytes) -> bool:
        """Create the file with this content, atomically and durably; False when it exists."""
        with self._lock:
            folder, name = self._beside("put_new", path)
            if name in folder.names:
                return False
            _put(folder, name, data)
            return True

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically and durably."""
        with self._lock:
            folder, name = self._beside("put", path)
            if isinstance(folder.names.get(name), _Folder):
                raise _refusal("put", path, errno.EISDIR)
            _put(folder, name, data)

    def list(self, path: str) -> tuple[Entry, ...]:
        """The names in a folder, sorted; an absent folder is empty."""
        with self._lock:
            node = self._node("list", check_folder(path))
            if node is None:
                return ()
            if isinstance(node, _File):
                raise _refusal("list", path, errno.ENOTDIR)
            return tuple(_entry(name, below) for name, below in sorted(node.names.items()))

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        with self._lock:
            node: _Node | None = self._root
            for part in check_folder(path):
                node = node.names.get(part) if isinstance(node, _Folder) else None
            return node is not None

    def make_dirs(self, path: str) -> None:
        """Create a folder and its parents, durably."""
        with self._lock:
            folder = self._root
            for part in check_folder(path):
                child = folder.names.setdefault(part, _Folder())
                if not isinstance(child, _Folder):
                    raise _refusal("mkdir", path, errno.ENOTDIR)
                folder.sync()
                folder = child

    def sync_dir(self, path: str) -> None:
        """Make the names in a folder durable."""
        with self._lock:
            self._folder("fsync", check_folder(path), path).sync()

    def move_dir(self, source: str, target: str) -> None:
        """Rename a folder, atomically and durably; an existing target is a StorageError."""
        with self._lock:
            into, new_name = self._beside("move", target)
            out_of, old_name = self._beside("move", source)
            node = out_of.names.get(old_name)
            if node is None:
                raise _refusal("move", source, errno.ENOENT)
            if not isinstance(node, _Folder):
                raise _refusal("move", source, errno.ENOTDIR)
            if new_name in into.names:
                raise _refusal("move", target, errno.EEXIST)
            if f"{target}/".startswith(f"{source}/"):
                raise _refusal("move", source, errno.EINVAL)
            into.names[new_name] = out_of.names.pop(old_name)
            into.sync()
            out_of.sync()

    def remove_tree(self, path: str) -> None:
        """Delete a folder or file with all in it."""
        parts = check_path(path)
        with self._lock:
            folder = self._node("remove", parts[:-1])
            if isinstance(folder, _File):
                raise _refusal("remove", path, errno.ENOTDIR)
            if folder is not None:
                folder.names.pop(parts[-1], None)

    def _node(self, operation: str, parts: tuple[str, ...]) -> _Node | None:
        """What is at a path; None when nothing is."""
        node: _Node | None = self._root
        for part in parts:
            if node is None:
                return None
            if isinstance(node, _File):
                raise _refusal(operation, "/".join(parts), errno.ENOTDIR)
            node = node.names.get(part)
        return node

    def _folder(self, operation: str, parts: tuple[str, ...], path: str) -> _Folder:
        node = self._node(operation, parts)
        if not isinstance(node, _Folder):
            raise _refusal(operation, path, errno.ENOENT if node is None else errno.ENOTDIR)
        return node

    def _beside(self, operation: str, path: str) -> tuple[_Folder, str]:
        """The folder that a path is in, and its last part."""
        parts = check_path(path)
        return self._folder(operation, parts[:-1], path), parts[-1]


class _MemoryWriter:
    """A new file that is being filled."""

    def __init__(self, lock: threading.RLock, file: _File, path: str) -> None:
        self._lock, self._file, self._path = lock, file, path
        self._open = True

    def write_at(self, offset: int, data: Buffer) -> None:
        if not self._open:
            raise ClosedError(thing=f"writer of {self._path}")
        if offset < 0:
            raise _refusal("write", self._path, errno.EINVAL)
        with self._lock:
            self._file.write(offset, bytes(data))

    def sync(self) -> None:
        if not self._open:
            raise ClosedError(thing=f"writer of {self._path}")
        with self._lock:
            self._file.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False


class _MemoryReader:
    """An open file; its size is that at opening, as with a descriptor's fstat."""

    def __init__(self, lock: threading.RLock, file: _File, path: str) -> None:
        self._lock, self._file, self._path = lock, file, path
        self._size_bytes = len(file.content)
        self._open = True

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read(self, offset: int, length: int) -> bytes:
        if not self._open:
            raise ClosedError(thing=f"reader of {self._path}")
        check_range(self._path, self._size_bytes, offset, length)
        with self._lock:
            return bytes(self._file.content[offset : offset + length])

    def read_into(self, offset: int, out: memoryview) -> None:
        view = out.cast("B")
        view[:] = self.read(offset, len(view))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False


def _patch(content: bytearray, offset: int, data: bytes) -> None:
    if data and len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _put(folder: _Folder, name: str, data: bytes) -> None:
    file = _File(content=bytearray(data), durable=bytes(data))
    folder.names[name] = file
    folder.sync()


def _entry(name: str, node: _Node) -> Entry:
    if isinstance(node, _Folder):
        return Entry(name=name, is_dir=True, size_bytes=0)
    return Entry(name=name, is_dir=False, size_bytes=len(node.content))


def _refusal(operation: str, path: str, number: int) -> StorageError:
    return StorageError(
        operation=operation, path=path or ".", why=os.strerror(number), errno=number
    )


def _folder_after(folder: _Folder, rng: random.Random | None) -> _Folder:
    """A folder as a power loss leaves it, all of it durable."""
    names: dict[str, _Node] = {}
    for name in sorted(folder.durable.keys() | folder.names.keys()):
        kept = folder.durable
        if folder.durable.get(name) is not folder.names.get(name) and rng and rng.random() < 0.5:
            kept = folder.names
        node = kept.get(name)
        if isinstance(node, _Folder):
            names[name] = _folder_after(node, rng)
        elif node is not None:
            content = _content_after(node, rng)
            names[name] = _File(content=bytearray(content), durable=content)
    return _Folder(names=names, durable=dict(names))


def _content_after(file: _File, rng: random.Random | None) -> bytes:
    if rng is None:
        return file.durable
    content = bytearray(file.durable)
    for offset, data in file.pending:
        if rng.random() < 0.5:
            whole = rng.random() < 0.5
            _patch(content, offset, data if whole else data[: rng.randint(0, len(data))])
    return bytes(content)
