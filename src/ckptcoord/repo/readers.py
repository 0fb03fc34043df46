"""Read shard files: every byte hashed once, on its way from the storage."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypeAlias

from ckptcoord.codec.digest import XXH3_BYTES, Hasher, xxh3
from ckptcoord.codec.scatter import Scatter, Sink, Target
from ckptcoord.codec.tensorfile import (
    TensorEntry,
    TensorHeader,
    parse_header,
    shard_digest,
)
from ckptcoord.errors import ConfigError, CorruptError, DigestMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from ckptcoord.codec.bounded import GivenUp
    from ckptcoord.codec.recipe import Recipe
    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Reader, Store

__all__ = [
    "Input",
    "Out",
    "Proof",
    "Scatter",
    "ShardReader",
    "Sink",
    "Target",
    "TensorEntry",
    "TensorReader",
    "check_fits",
]

_CACHED_BYTES = 512 << 10  # what is read and hashed while it is still in the core's cache

Out: TypeAlias = "memoryview | Sink"
"""Where a tensor is read to: flat writable bytes, as many as it has, or what takes them."""

Span: TypeAlias = "tuple[int, int]"
"""From the first byte of a tensor to that after the last one."""

Proof: TypeAlias = "bytes | None"
"""What a tensor is held to when it is read after its check: the fingerprints of its parts, which
were found sound, in order; None where they are only made when it is read, and are held to its
digest then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Stored bytes that tensors are read from, and how they are checked.

    Attributes:
        key: the file's path and the name there; equal keys are the same bytes.
        entry: of those bytes.
        check: takes `entry` and raises as `TensorReader.check` does.
        proves: it returns what will prove this very tensor, rather than only what is made of it.
    """

    key: tuple[str, str]
    entry: TensorEntry
    check: Callable[[TensorEntry], Proof]
    proves: bool = True


class TensorReader(ABC):
    """An open file of tensors. Safe in several threads; a context manager that closes it.

    Attributes:
        path: in the store.
        authentic: the header is the one of a digest that somebody else vouches for.
        recipes: of a delta file, how each tensor is made again.
        slow: making a part of a tensor takes so long that several threads should share a tensor.
    """

    path: str
    authentic: bool
    recipes: Mapping[str, Recipe] = MappingProxyType({})
    slow = False

    def __init__(self) -> None:
        self._by_name: dict[str, TensorEntry] | None = None
        self._indexing = threading.Lock()

    def read_into(self, entry: TensorEntry, out: Out) -> None:
        """Fill `out` with a tensor, and check its digest if it has one.

        Raises:
            DigestMismatchError: the bytes are not those that were written; `out` holds them.
            ConfigError: `out` does not fit the tensor.
        """
        check_fits(entry, out)
        hasher = Hasher()
        for part in self._pour(entry, out, (0, entry.spec.nbytes)):
            if entry.digest is not None:
                hasher.update(part)
        self.check_digest(entry, hasher.digest())

    def check(self, entry: TensorEntry) -> bytes:
        """Check a tensor's digest without keeping its bytes; returns the proof for `fill`.

        Raises:
            DigestMismatchError: the bytes are not those that were written.
        """
        found = bytearray()
        self.examine(entry, lambda part: found.extend(xxh3(part)))
        return bytes(found)

    def examine(
        self, entry: TensorEntry, seen: Callable[[memoryview], object] | None = None
    ) -> None:
        """As `check`, where nothing has to be proven later on; `seen` gets each part.

        Raises:
            DigestMismatchError: the bytes are not those that were written.
        """
        hasher, scratch = Hasher(), self._scratch(entry)
        for start, stop in self._parts(entry, (0, entry.spec.nbytes)):
            part = scratch[: stop - start]
            self.read_range(entry, start, part)
            hasher.update(part)
            if seen is not None:
                seen(part)
        self.check_digest(entry, hasher.digest())

    def inputs(self, entry: TensorEntry, *, proves: bool = True) -> list[Input]:
        """All that has to be sound for a tensor to be read; no data is read to tell.

        Args:
            entry: the tensor.
            proves: whether that is to prove it when it is filled in; not what is made out of it.

        Raises:
            CorruptError, StorageError: something of it cannot be read, or does not fit.
        """
        check = self.check if proves else self.examine
        return [Input(key=(self.path, entry.spec.name), entry=entry, check=check, proves=proves)]

    def given_up(self) -> dict[str, GivenUp]:
        """How far tensors are from what the trainer had, of those that are not exactly that.

        Raises:
            CorruptError: what is said of it is malformed.
        """
        from ckptcoord.codec.givenup import given_up_in  # late: few need it

        return given_up_in(self.header, path=self.path)

    def home(self, entry: TensorEntry) -> tuple[TensorReader, TensorEntry]:
        """Where the very bytes of a tensor stand, whose proof is also the tensor's."""
        return self, entry

    def fill(self, entry: TensorEntry, out: Out, proof: Proof) -> None:
        """Fill `out` with a tensor whose inputs were found sound, by reading the parts it wants.

        Raises:
            CorruptError: the file has changed since, or where nothing else was proven, its bytes
                are not those of its digest; `out` holds what it is now.
            ConfigError: `out` does not fit the tensor.
        """
        if proof is None:
            self.read_into(entry, out)
            return
        check_fits(entry, out)
        first, last = wanted = out.wanted if isinstance(out, Scatter) else (0, entry.spec.nbytes)
        parts = slice(first // self.part_bytes, -(-last // self.part_bytes))
        expected = proof[parts.start * XXH3_BYTES : parts.stop * XXH3_BYTES]
        poured = self._pour(entry, out, wanted, proven=True)
        found = b"".join(xxh3(part) for part in poured)
        if found != expected:
            raise self.changed(entry)

    def changed(self, entry: TensorEntry) -> CorruptError:
        """What to raise for a tensor that is not what was proven."""
        return CorruptError(
            path=self.path,
            why=f"tensor {entry.spec.name!r} changed between the check and the read",
        )

    def find(self, name: str) -> TensorEntry | None:
        """The tensor of that name.

        Raises:
            CorruptError: of a delta file: its recipe is not sound.
        """
        with self._indexing:
            if self._by_name is None:
                self._by_name = {entry.spec.name: entry for entry in self.header.entries}
            return self._by_name.get(name)

    @property
    @abstractmethod
    def header(self) -> TensorHeader:
        """What is in it.

        Raises:
            CorruptError: of a delta file: a recipe is not sound.
        """

    @property
    @abstractmethod
    def part_bytes(self) -> int:
        """How much is best read at a time."""

    @abstractmethod
    def read_range(
        self, entry: TensorEntry, offset: int, out: memoryview, *, proven: bool = False
    ) -> None:
        """Fill `out` with a tensor's bytes from an offset, a multiple of `part_bytes`, unchecked.

        `proven`: what comes is held to its fingerprints; no checksum is looked at on the way.

        Raises:
            CorruptError, StorageError: they cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def _pour(
        self, entry: TensorEntry, out: Out, wanted: Span, *, proven: bool = False
    ) -> Iterator[memoryview]:
        """The parts of a tensor that have any of the wanted bytes, each put where it belongs."""
        if isinstance(out, memoryview):
            return self._place(entry, out, 0, wanted, proven=proven)
        if isinstance(out, Scatter) and out.memory is not None:
            return self._place(entry, out.memory, out.wanted[0], wanted, proven=proven)
        return self._feed(entry, out, wanted, proven=proven)

    def _place(
        self, entry: TensorEntry, memory: memoryview, first: int, wanted: Span, *, proven: bool
    ) -> Iterator[memoryview]:
        """Read parts to memory that is for the bytes from the first one on; no copy but of ends."""
        last = first + memory.nbytes
        scratch = self._scratch(entry) if memory.nbytes < entry.spec.nbytes else memory
        for start, stop in self._parts(entry, wanted):
            low, high = max(start, first), min(stop, last)
            inside = (low, high) == (start, stop)
            part = memory[start - first : stop - first] if inside else scratch[: stop - start]
            self.read_range(entry, start, part, proven=proven)
            if not inside and low < high:
                memory[low - first : high - first] = part[low - start : high - start]
            yield part

    def _feed(
        self, entry: TensorEntry, sink: Sink, wanted: Span, *, proven: bool
    ) -> Iterator[memoryview]:
        """Read parts and have them taken."""
        scratch = self._scratch(entry)
        if isinstance(sink, Scatter):
            sink.begin(wanted[0] // self.part_bytes * self.part_bytes)
        else:
            sink.begin()
        for start, stop in self._parts(entry, wanted):
            part = scratch[: stop - start]
            self.read_range(entry, start, part, proven=proven)
            sink.take(part)
            yield part

    def _parts(self, entry: TensorEntry, wanted: Span) -> Iterator[Span]:
        """Where parts that have any of the wanted bytes begin and end."""
        size = self.part_bytes
        for start in range(wanted[0] // size * size, wanted[1], size):
            yield start, min(start + size, entry.spec.nbytes)

    def _scratch(self, entry: TensorEntry) -> memoryview:
        """Memory for one part."""
        return memoryview(bytearray(min(entry.spec.nbytes, self.part_bytes)))

    def check_digest(self, entry: TensorEntry, found: Digest) -> None:
        """Hold what was found of a tensor to its digest, if it has one.

        Raises:
            DigestMismatchError: they differ.
        """
        if entry.digest is not None and found != entry.digest:
            raise DigestMismatchError(
                path=self.path, tensor=entry.spec.name, expected=str(entry.digest), found=str(found)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ShardReader(TensorReader):
    """An open shard whose header is sound and, given the file's digest, authentic.

    The file's digest covers the header and the tensors' digests in it, so the data need not be
    read to trust the header; `read_into` then checks each tensor.

    Args:
        store: where.
        path: in the store.
        expected: the file's digest, from its manifest; None for a file of unknown origin, whose
            tensors are then checked only if it records their digests.
        size_bytes: what it should have.
        stated_by: who says so, for errors.

    Raises:
        CorruptError: the size, the header or the digest is not what it should be.
        FormatVersionError: a newer ckptcoord wrote it.
        StorageError: it cannot be read.
    """

    part_bytes = _CACHED_BYTES

    def __init__(
        self,
        store: Store,
        path: str,
        *,
        expected: Digest | None,
        size_bytes: int | None = None,
        stated_by: str = "its manifest",
    ) -> None:
        super().__init__()
        self.path = path
        self.authentic = expected is not None
        with ExitStack() as stack:
            self._reader: Reader = stack.enter_context(store.open(path))
            found = self._reader.size_bytes
            if size_bytes is not None and found != size_bytes:
                raise CorruptError(
                    path=path, why=f"the file has {found} bytes, {stated_by} says {size_bytes}"
                )
            self._header = parse_header(self._reader.read, found, path=path)
            if expected is not None:
                _authenticate(self._header, expected, path)
            self._stack = stack.pop_all()

    @property
    def header(self) -> TensorHeader:
        """As it is in the file."""
        return self._header

    def read_range(
        self, entry: TensorEntry, offset: int, out: memoryview, *, proven: bool = False
    ) -> None:
        """Any part of a tensor's stored bytes; they have no checksums but the tensor's digest."""
        del proven
        self._reader.read_into(entry.begin + offset, out)

    def close(self) -> None:
        """Let go of the file."""
        self._stack.close()


def _authenticate(header: TensorHeader, expected: Digest, path: str) -> None:
    digests = [entry.digest for entry in header.entries if entry.digest is not None]
    if len(digests) != len(header.entries):
        raise CorruptError(path=path, why="its header records no digests")
    found = shard_digest(header.raw, digests)
    if found != expected:
        raise DigestMismatchError(path=path, expected=str(expected), found=str(found))


def check_fits(entry: TensorEntry, out: Out) -> None:
    """Refuse memory that a tensor cannot be read into.

    Raises:
        ConfigError: it is not flat, writable bytes, as many as the tensor has.
    """
    if not isinstance(out, memoryview):
        if out.nbytes != entry.spec.nbytes:
            raise ConfigError(
                field="out",
                why=f"takes {out.nbytes} bytes of the {entry.spec.nbytes} of {entry.spec.name!r}",
            )
    elif out.nbytes != entry.spec.nbytes or out.ndim != 1 or out.itemsize != 1 or out.readonly:
        raise ConfigError(
            field="out",
            why=f"is not the {entry.spec.nbytes} flat, writable bytes that tensor "
            f"{entry.spec.name!r} needs",
        )
