"""Write and read shard files: every byte hashed once, on its way to or from the storage."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from ckptcoord.codec.digest import Fingerprint, Hasher, blake3_digest
from ckptcoord.codec.tensorfile import (
    TensorEntry,
    TensorHeader,
    TensorSpec,
    encode_header,
    parse_header,
    plan_layout,
    shard_digest,
)
from ckptcoord.core.jsonio import JsonValue, dump_json
from ckptcoord.errors import ConfigError, CorruptError, DigestMismatchError, InvalidNameError
from ckptcoord.repo.ahead import Ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.codec.recipe import Recipe
    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Reader, Store, Writer

__all__ = [
    "Input",
    "Proof",
    "ReadJob",
    "ShardReader",
    "TensorEntry",
    "TensorReader",
    "TensorSource",
    "TensorSpec",
    "WrittenFile",
    "check_inputs",
    "check_tensors",
    "fill_tensors",
    "hf_index",
    "read_tensors",
    "write_file",
    "write_shard",
]

_CACHED_BYTES = 512 << 10  # what is read and hashed while it is still in the core's cache

_T = TypeVar("_T")

Proof: TypeAlias = "bytes | None"
"""What a tensor is held to when it is read after its check: the fingerprint of the bytes that were
found sound; None where they are only made when it is read, and are held to its digest then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        read: gives the bytes, 1-D contiguous uint8. Called once, when the tensor's turn comes; the
            array is let go as soon as it is hashed and written.
    """

    spec: TensorSpec
    read: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A durable file; its name is durable once its folder is synced.

    Attributes:
        digest: `shard_digest` of a shard, BLAKE3 of the bytes of any other file.
        entries: a shard's tensors with their digests, in offset order.
    """

    path: str
    size_bytes: int
    digest: Digest
    entries: tuple[TensorEntry, ...] = ()


def write_shard(
    store: Store,
    path: str,
    sources: Iterable[TensorSource],
    *,
    metadata: Mapping[str, str] | None = None,
    threads: int = 2,
) -> WrittenFile:
    """Write tensors as a new safetensors file, and sync it.

    This thread reads the sources while one more, with `threads - 1` cores, hashes their bytes and
    two write them, which is mostly waiting. Of what the sources give, 64 MiB or one larger tensor
    is held at a time. With one thread, all is done on this one.

    Raises:
        StorageError: the storage refused; what was written is to be abandoned.
        ConfigError: a source gives other bytes than its spec says, or the header gets too long.
        InvalidNameError: a name is given twice.
    """
    sources = tuple(sources)
    layout = plan_layout((source.spec for source in sources), metadata)
    named = {source.spec.name: source for source in sources}
    with store.create(path, size_bytes=layout.size_bytes) as writer:
        if threads < 2:
            digests = _write_through(writer, layout.entries, named)
        else:
            digests = _write_ahead(writer, layout.entries, named, threads - 1)
        header = encode_header(layout, digests)
        # The header comes last: a file that was cut off has none, and is no safetensors file.
        writer.write_at(0, header)
        writer.sync()
    return WrittenFile(
        path=path,
        size_bytes=layout.size_bytes,
        digest=shard_digest(header, digests),
        entries=tuple(
            replace(entry, digest=digest)
            for entry, digest in zip(layout.entries, digests, strict=True)
        ),
    )


def write_file(store: Store, path: str, data: bytes) -> WrittenFile:
    """Write any other file, new, and sync it.

    Raises:
        StorageError: the storage refused; what was written is to be abandoned.
    """
    with store.create(path) as writer:
        writer.write_at(0, data)
        writer.sync()
    return WrittenFile(path=path, size_bytes=len(data), digest=blake3_digest(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Stored bytes that tensors are read from, and how they are checked.

    Attributes:
        key: the file's path and the name there; equal keys are the same bytes.
        entry: of those bytes.
        check: takes `entry` and raises as `TensorReader.check` does.
    """

    key: tuple[str, str]
    entry: TensorEntry
    check: Callable[[TensorEntry], Proof]


class TensorReader(ABC):
    """An open file of tensors. Safe in several threads; a context manager that closes it.

    Attributes:
        path: in the store.
        header: what is in it.
        authentic: the header is the one of a digest that somebody else vouches for.
        recipes: of a delta file, how each tensor is made again.
        slow: making a part of a tensor takes so long that several threads should share a tensor.
    """

    path: str
    header: TensorHeader
    authentic: bool
    recipes: Mapping[str, Recipe] = MappingProxyType({})
    slow = False

    def __init__(self) -> None:
        self._by_name: dict[str, TensorEntry] | None = None
        self._indexing = threading.Lock()

    def read_into(self, entry: TensorEntry, out: memoryview) -> None:
        """Fill `out`, flat writable bytes, with a tensor, and check its digest if it has one.

        Raises:
            DigestMismatchError: the bytes are not those that were written; `out` holds them.
            ConfigError: `out` does not fit the tensor.
        """
        _check_fits(entry, out)
        if entry.digest is None:
            self.read_range(entry, 0, out)
            return
        hasher = Hasher()
        for part in self._parts(entry, out):
            hasher.update(part)
        self.check_digest(entry, hasher.digest())

    def check(self, entry: TensorEntry) -> bytes:
        """Check a tensor's digest without keeping its bytes; returns their fingerprint.

        Raises:
            DigestMismatchError: the bytes are not those that were written.
        """
        hasher, fingerprint = Hasher(), Fingerprint()
        scratch = memoryview(bytearray(min(entry.spec.nbytes, self.part_bytes)))
        for part in self._parts(entry, scratch):
            hasher.update(part)
            fingerprint.update(part)
        self.check_digest(entry, hasher.digest())
        return fingerprint.digest()

    def inputs(self, entry: TensorEntry) -> list[Input]:
        """All that has to be sound for a tensor to be read; no data is read to tell.

        Raises:
            CorruptError, StorageError: something of it cannot be read, or does not fit.
        """
        return [Input(key=(self.path, entry.spec.name), entry=entry, check=self.check)]

    def fill(self, entry: TensorEntry, out: memoryview, proof: Proof) -> None:
        """Fill `out` with a tensor whose inputs were found sound.

        Raises:
            CorruptError: the file has changed since, or where nothing else was proven, its bytes
                are not those of its digest; `out` holds what it is now.
            ConfigError: `out` does not fit the tensor.
        """
        if proof is None:
            self.read_into(entry, out)
            return
        _check_fits(entry, out)
        found = Fingerprint()
        for part in self._parts(entry, out):
            found.update(part)
        if found.digest() != proof:
            raise CorruptError(
                path=self.path,
                why=f"tensor {entry.spec.name!r} changed between the check and the read",
            )

    def find(self, name: str) -> TensorEntry | None:
        """The tensor of that name."""
        with self._indexing:
            if self._by_name is None:
                self._by_name = {entry.spec.name: entry for entry in self.header.entries}
            return self._by_name.get(name)

    @property
    @abstractmethod
    def part_bytes(self) -> int:
        """How much is best read at a time."""

    @abstractmethod
    def read_range(self, entry: TensorEntry, offset: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from an offset, a multiple of `part_bytes`, unchecked.

        Raises:
            CorruptError, StorageError: they cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def _parts(self, entry: TensorEntry, out: memoryview) -> Iterator[memoryview]:
        """A tensor's bytes in parts, each in its place in `out`, or all at its start."""
        whole = out.nbytes == entry.spec.nbytes
        for start in range(0, entry.spec.nbytes, self.part_bytes):
            size = min(self.part_bytes, entry.spec.nbytes - start)
            part = out[start : start + size] if whole else out[:size]
            self.read_range(entry, start, part)
            yield part

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
        size_bytes: what its manifest says.

    Raises:
        CorruptError: the size, the header or the digest is not what it should be.
        FormatVersionError: a newer ckptcoord wrote it.
        StorageError: it cannot be read.
    """

    part_bytes = _CACHED_BYTES

    def __init__(
        self, store: Store, path: str, *, expected: Digest | None, size_bytes: int | None = None
    ) -> None:
        super().__init__()
        self.path = path
        self.authentic = expected is not None
        with ExitStack() as stack:
            self._reader: Reader = stack.enter_context(store.open(path))
            found = self._reader.size_bytes
            if size_bytes is not None and found != size_bytes:
                raise CorruptError(
                    path=path, why=f"the file has {found} bytes, its manifest says {size_bytes}"
                )
            self.header = parse_header(self._reader.read, found, path=path)
            if expected is not None:
                _authenticate(self.header, expected, path)
            self._stack = stack.pop_all()

    def read_range(self, entry: TensorEntry, offset: int, out: memoryview) -> None:
        """Any part of a tensor's stored bytes."""
        self._reader.read_into(entry.begin + offset, out)

    def close(self) -> None:
        """Let go of the file."""
        self._stack.close()


ReadJob: TypeAlias = tuple[TensorReader, TensorEntry, memoryview]


def read_tensors(jobs: Iterable[ReadJob], *, threads: int) -> None:
    """Read tensors in `threads` threads, the largest first; none is left running at the end.

    Raises:
        CorruptError, StorageError: the first failure; what was not begun by then is left out.
    """
    fill_tensors(((job, None) for job in jobs), threads=threads)


def check_tensors(jobs: Iterable[ReadJob], *, threads: int) -> list[bytes]:
    """Check tensors without touching the memory that they are for; returns their fingerprints.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    jobs = list(jobs)
    found = [b""] * len(jobs)

    def check(at: int) -> None:
        reader, entry, _ = jobs[at]
        found[at] = reader.check(entry)

    by_size = sorted(range(len(jobs)), key=lambda at: -jobs[at][1].spec.nbytes)
    _in_threads(check, by_size, threads)
    return found


def check_inputs(
    jobs: Iterable[ReadJob], known: dict[tuple[str, str], Proof], *, threads: int
) -> list[Proof]:
    """Check all that tensors are read from, and touch no memory that they are for.

    Args:
        jobs: what will be read.
        known: by an input's key, what was checked already; what is checked here is added.
        threads: that check.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    jobs = list(jobs)
    new: dict[tuple[str, str], Input] = {}
    for reader, entry, _ in jobs:
        new |= {one.key: one for one in reader.inputs(entry) if one.key not in known}

    def check(one: Input) -> None:
        known[one.key] = one.check(one.entry)

    by_size = sorted(new.values(), key=lambda one: one.entry.begin - one.entry.end)
    _in_threads(check, by_size, threads)
    return [known.get((reader.path, entry.spec.name)) for reader, entry, _ in jobs]


def fill_tensors(proven: Iterable[tuple[ReadJob, Proof]], *, threads: int) -> None:
    """Read tensors whose inputs `check_inputs` found sound into their memory.

    Raises:
        CorruptError, StorageError: the first failure; some memory is filled then, some is not.
    """
    steps: list[Callable[[], None]] = []
    for job, proof in sorted(proven, key=lambda one: _largest_first(one[0])):
        reader, entry, out = job
        if reader.slow and proof is None and out.nbytes > reader.part_bytes:
            steps += _Shared(reader, entry, out).steps()
        else:
            steps.append(partial(reader.fill, entry, out, proof))
    _in_threads(lambda step: step(), steps, threads)


class _Shared:
    """A tensor that several threads fill; its bytes are hashed in order, by one at a time."""

    def __init__(self, reader: TensorReader, entry: TensorEntry, out: memoryview) -> None:
        _check_fits(entry, out)
        self._reader = reader
        self._entry = entry
        self._out = out
        self._hasher = Hasher()
        self._lock = threading.Lock()
        self._filled: set[int] = set()
        self._next = 0  # the first byte that was not given to anyone to hash
        self._hashing = False

    def steps(self) -> list[Callable[[], None]]:
        """What is to be done, in any threads, best begun in this order."""
        starts = range(0, self._out.nbytes, self._reader.part_bytes)
        return [partial(self._fill, start) for start in starts]

    def _fill(self, start: int) -> None:
        self._reader.read_range(self._entry, start, self._part(start))
        with self._lock:
            self._filled.add(start)
            if self._hashing:
                return  # whoever it is goes on with this part
            self._hashing = True
        while (part := self._take()) is not None:
            self._hasher.update(part)

    def _take(self) -> memoryview | None:
        """The next part to be hashed, if it is filled; after the last one, check the digest."""
        with self._lock:
            if self._next in self._filled:
                part = self._part(self._next)
                self._next += part.nbytes
                return part
            self._hashing = False
            if self._next == self._out.nbytes:
                self._reader.check_digest(self._entry, self._hasher.digest())
            return None

    def _part(self, start: int) -> memoryview:
        return self._out[start : start + self._reader.part_bytes]


def hf_index(files: Mapping[str, Sequence[str]], total_size: int) -> bytes:
    """The `model.safetensors.index.json` by which transformers finds a sharded model's tensors.

    Args:
        files: file name to the names of its tensors.
        total_size: bytes of all tensors.

    Raises:
        InvalidNameError: a tensor stands in two files.
    """
    weights: dict[str, JsonValue] = {}
    for file, names in files.items():
        for name in names:
            if name in weights:
                raise InvalidNameError(kind="tensor", name=name, why="stands in two files")
            weights[name] = file
    return dump_json({"metadata": {"total_size": total_size}, "weight_map": weights}, indent=2)


def _write_through(
    writer: Writer, entries: Sequence[TensorEntry], named: Mapping[str, TensorSource]
) -> list[Digest]:
    """Hash and write on this thread alone."""
    digests = []
    for entry in entries:
        data = _read(named[entry.spec.name])
        digests.append(blake3_digest(data))
        writer.write_at(entry.begin, data)
        del data  # before the next tensor is read
    return digests


def _write_ahead(
    writer: Writer, entries: Sequence[TensorEntry], named: Mapping[str, TensorSource], hashers: int
) -> list[Digest]:
    """Read on this thread; hash, with `hashers` cores, and write on others."""
    with Ahead(writer, hashers=hashers) as ahead:
        for entry in entries:
            ahead.make_room(entry.spec.nbytes)
            ahead.put(entry.begin, _read(named[entry.spec.name]))
        return ahead.digests()


def _read(source: TensorSource) -> memoryview:
    data = source.read()
    spec = source.spec
    if data.dtype != "uint8" or data.ndim != 1 or not data.flags.c_contiguous:
        raise ConfigError(
            field=f"tensor {spec.name!r}", why="is not read as contiguous, flat uint8"
        )
    if data.nbytes != spec.nbytes:
        raise ConfigError(
            field=f"tensor {spec.name!r}",
            why=f"gives {data.nbytes} bytes, its shape and dtype say {spec.nbytes}",
            help="It was changed while it was being saved",
        )
    return data.data


def _authenticate(header: TensorHeader, expected: Digest, path: str) -> None:
    digests = [entry.digest for entry in header.entries if entry.digest is not None]
    if len(digests) != len(header.entries):
        raise CorruptError(path=path, why="its header records no digests")
    found = shard_digest(header.raw, digests)
    if found != expected:
        raise DigestMismatchError(path=path, expected=str(expected), found=str(found))


def _check_fits(entry: TensorEntry, out: memoryview) -> None:
    if out.nbytes != entry.spec.nbytes or out.ndim != 1 or out.itemsize != 1 or out.readonly:
        raise ConfigError(
            field="out",
            why=f"is not the {entry.spec.nbytes} flat, writable bytes that tensor "
            f"{entry.spec.name!r} needs",
        )


def _largest_first(job: ReadJob) -> int:
    return -job[2].nbytes


def _in_threads(work: Callable[[_T], None], items: Iterable[_T], threads: int) -> None:
    queue = deque(items)
    threads = min(threads, len(queue))
    if threads < 2:
        _drain(queue, work)
        return
    with ThreadPoolExecutor(threads, "ckptcoord-read") as pool:
        try:
            for worker in [pool.submit(_drain, queue, work) for _ in range(threads)]:
                worker.result()
        finally:
            queue.clear()


def _drain(queue: deque[_T], work: Callable[[_T], None]) -> None:
    """Work until nothing is left; after a failure nothing is left for the others either."""
    try:
        while True:
            try:
                item = queue.popleft()
            except IndexError:
                return
            work(item)
    except BaseException:
        queue.clear()
        raise
