"""Write a shard whose tensors' sizes come out one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.codec.tensorfile import Layout, TensorEntry, encode_header, shard_digest
from ckptcoord.repo.ahead import Ahead
from ckptcoord.repo.shards import WrittenFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from ckptcoord.codec.tensorfile import TensorSpec
    from ckptcoord.store.base import Writer

_SMALL_BYTES = 256 << 10  # of a tensor that is written together with others
_TOGETHER_BYTES = 3 << 19  # past the page cache, and while others are coded


class ShardStream:
    """A safetensors file under way: tensors are hashed and written as they come, the header last.

    A context manager that ends its threads; the writer is its owner's to close.

    Args:
        writer: of a new file.
        path: of that, in the store.
        room_bytes: that the header will not exceed (`room_for_header`).
        threads: cores for one digest.
    """

    def __init__(self, writer: Writer, path: str, *, room_bytes: int, threads: int) -> None:
        self._writer = writer
        self._path = path
        self._room_bytes = room_bytes
        self._end = room_bytes
        self._entries: list[TensorEntry] = []
        self._small: list[memoryview] = []
        self._small_bytes = 0
        self._ahead = Ahead(writer, hashers=threads)

    def put(self, spec: TensorSpec, data: memoryview) -> None:
        """Take a tensor; of those that are under way, 64 MiB or one larger one are held.

        Raises:
            StorageError: an earlier one could not be written.
        """
        self._ahead.make_room(data.nbytes)
        begin, self._end = self._end, self._end + data.nbytes
        digest = None
        if data.nbytes < _SMALL_BYTES:
            digest = blake3_digest(data)
            self._small.append(data)
            self._small_bytes += data.nbytes
            if self._small_bytes >= _TOGETHER_BYTES:
                self._write_small(self._end)
        else:
            self._write_small(begin)
            self._ahead.put(begin, data)
        self._entries.append(TensorEntry(spec=spec, begin=begin, end=self._end, digest=digest))

    def finish(self, metadata: Mapping[str, str]) -> WrittenFile:
        """Write the header, and sync.

        Raises:
            StorageError: the storage refused; what was written is to be abandoned.
        """
        self._write_small(self._end)
        large = iter(self._ahead.digests())
        entries = [
            entry if entry.digest is not None else replace(entry, digest=next(large))
            for entry in self._entries
        ]
        entries.sort(key=lambda one: (one.begin, one.end, one.spec.name))  # as readers see them
        digests = [entry.digest for entry in entries if entry.digest is not None]
        layout = Layout(
            entries=tuple(entries),
            metadata=metadata,
            data_start=self._room_bytes,
            size_bytes=self._end,
        )
        header = encode_header(layout, digests)
        # The header comes last: a file that was cut off has none, and is no safetensors file.
        self._writer.write_at(0, header)
        self._writer.sync()
        return WrittenFile(
            path=self._path,
            size_bytes=self._end,
            digest=shard_digest(header, digests),
            entries=tuple(entries),
        )

    def _write_small(self, end: int) -> None:
        """Write what is held of small tensors, which ends there, in one go."""
        if self._small:
            data = memoryview(b"".join(self._small))
            self._ahead.write(end - data.nbytes, data)
        self._small, self._small_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ahead.__exit__(exc_type, exc, traceback)
