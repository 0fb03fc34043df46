"""What is in the tensors of a checkpoint: statistics and values, read a few MiB at a time.

Every byte that is read to its end is held to its digest on the way (INV-9).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np

from ckptcoord.codec.statistics import Statistics, Summary, decode_values, values_per_element
from ckptcoord.core.box import Box
from ckptcoord.errors import ConfigError
from ckptcoord.repo.comparing import Room, slabs_of
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.repo.comparing import Stored
    from ckptcoord.repo.diff import Held, Shards
    from ckptcoord.repo.readers import TensorReader

Value: TypeAlias = "complex | float | int | bool"

_MOST_FILES = 64  # open at once
_MOST_TENSORS = 512
_BATCH_BYTES = 4 << 20
_BATCH_TENSORS = 64
_MAX_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    """What was found of a tensor.

    Attributes:
        name: its full name.
        spec: of the whole.
        pieces: in how many it is stored.
        complete: they are all of it, and what follows is of the whole.
        statistics: of the values that are there; its places count within the pieces.
        nan_at: the indices of the first NaNs.
        infinity_at: the same of infinities.
    """

    name: str
    spec: TensorSpec
    pieces: int
    complete: bool
    statistics: Statistics
    nan_at: tuple[tuple[int, ...], ...]
    infinity_at: tuple[tuple[int, ...], ...]


def summarise(
    tensors: Iterable[tuple[str, Held]],
    shards: Shards,
    *,
    only_finite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[TensorSummary]:
    """The statistics of each tensor, in this order; memory does not grow with them.

    Args:
        tensors: by full name.
        shards: opens their files.
        only_finite: look for nothing but NaN and infinities, which is faster.
        progress: is told of bytes that were read, in any thread.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with _Open(shards) as files, Threads(threads, "ckptcoord-cat") as pool:
        for group in _groups(tensors):
            readers = files.of(group)
            look = partial(_one, readers, only_finite, progress)
            work = [pool.submit(_each, look, batch) for batch in _batches(group)]
            try:
                for one in work:
                    yield from one.result()
            finally:
                for one in work:  # none may read from what is about to be closed
                    if not one.cancel():
                        one.exception()


def raw_parts(name: str, held: Held, shards: Shards) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order; each part is good until the next is asked for.

    Raises:
        ConfigError: some of its elements are not there.
        CorruptError, StorageError: it cannot be read, or at the end is not what was written.
    """
    if not held.has(Box.whole(held.spec.shape)):
        raise ConfigError(field=name, why="is one rank's part of a tensor; the rest is not there")
    with _Open(shards) as files:
        for part in slabs_of(held, _stored(held, files.of([(name, held)])), Room()):
            yield part.data


def first_values(name: str, held: Held, shards: Shards, count: int) -> list[Value]:
    """The first so many elements in row-major order, read with a few MiB around and not checked.

    A pair of 4-bit floats is two of them.

    Raises:
        ConfigError: some of its elements are not there.
        CorruptError, StorageError: they cannot be read.
    """
    spec = held.spec
    found: list[Value] = []
    left = count
    for part in raw_parts(name, held, shards):
        data = np.frombuffer(part, np.uint8)[: left * spec.item_bytes]
        left -= data.size // spec.item_bytes
        values = decode_values(spec.dtype, data)
        if spec.dtype.startswith("C"):
            values = values[0::2].astype(np.float64) + 1j * values[1::2].astype(np.float64)
        found += values.astype(np.bool_).tolist() if spec.dtype == "BOOL" else values.tolist()
        if not left:
            break
    return found


def _each(
    look: Callable[[str, Held], TensorSummary], batch: Iterable[tuple[str, Held]]
) -> list[TensorSummary]:
    return [look(*one) for one in batch]


def _one(
    readers: Mapping[str, TensorReader],
    only_finite: bool,  # noqa: FBT001 (handed to a pool)
    progress: Callable[[int], None],
    name: str,
    held: Held,
) -> TensorSummary:
    spec = held.spec
    total = Summary(spec.dtype, only_finite=only_finite)
    nans: list[tuple[int, ...]] = []
    infinities: list[tuple[int, ...]] = []
    for box, (reader, entry) in _stored(held, readers):
        sink = _Sink(spec.dtype, entry.spec.nbytes, progress, only_finite=only_finite)
        reader.read_into(entry, sink)
        found = sink.summary.statistics()
        nans += (_index(box, place, spec.dtype) for place in found.nan_places)
        infinities += (_index(box, place, spec.dtype) for place in found.infinity_places)
        total.merge(sink.summary)
    return TensorSummary(
        name=name,
        spec=spec,
        pieces=len(held.pieces),
        complete=held.has(Box.whole(spec.shape)),
        statistics=total.statistics(),
        nan_at=tuple(sorted(nans)[:3]),
        infinity_at=tuple(sorted(infinities)[:3]),
    )


class _Sink:
    """Takes a piece's bytes and keeps what they are like."""

    def __init__(
        self, dtype: str, nbytes: int, progress: Callable[[int], None], *, only_finite: bool
    ) -> None:
        self.nbytes = nbytes
        self._dtype, self._only_finite = dtype, only_finite
        self.begin()
        self._progress = progress

    def begin(self) -> None:
        self.summary = Summary(self._dtype, only_finite=self._only_finite)

    def take(self, part: memoryview) -> None:
        self.summary.add(np.frombuffer(part, np.uint8))
        self._progress(part.nbytes)


def _index(box: Box, place: int, dtype: str) -> tuple[int, ...]:
    """Where in the tensor a value of one of its boxes is."""
    at = place // values_per_element(dtype)
    index: list[int] = []
    for offset, size in zip(reversed(box.offset), reversed(box.size), strict=True):
        at, inner = divmod(at, size)
        index.append(offset + inner)
    return tuple(reversed(index))


def _stored(held: Held, readers: Mapping[str, TensorReader]) -> list[tuple[Box, Stored]]:
    return [(box, (readers[record.path], entry)) for box, (record, entry) in held.pieces]


class _Open:
    """Files that stay open while there are few: to read a header of many tensors takes long."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._open: dict[str, tuple[ExitStack, TensorReader]] = {}

    def of(self, tensors: Iterable[tuple[str, Held]]) -> Mapping[str, TensorReader]:
        """The readers of the files that these are in, by path; good until the next call."""
        records = {record.path: record for _, held in tensors for _, (record, _) in held.pieces}
        if len(self._open.keys() | records.keys()) > _MOST_FILES:
            self._close(self._open.keys() - records.keys())
        for path, record in records.items():
            if path not in self._open:
                with ExitStack() as stack:
                    reader = stack.enter_context(self._shards.reader(record))
                    self._open[path] = stack.pop_all(), reader
        return {path: self._open[path][1] for path in records}

    def _close(self, paths: Iterable[str]) -> None:
        for path in list(paths):
            stack, _ = self._open.pop(path)
            stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._close(self._open)


def _groups(tensors: Iterable[tuple[str, Held]]) -> Iterator[list[tuple[str, Held]]]:
    """Runs of tensors that are in a few files."""
    group: list[tuple[str, Held]] = []
    files: set[str] = set()
    for name, held in tensors:
        own = {record.path for _, (record, _) in held.pieces}
        if group and (len(files | own) > _MOST_FILES or len(group) >= _MOST_TENSORS):
            yield group
            group, files = [], set()
        group.append((name, held))
        files |= own
    if group:
        yield group


def _batches(group: list[tuple[str, Held]]) -> Iterator[list[tuple[str, Held]]]:
    """Small tensors together: to hand one to a thread takes longer than to look at it."""
    batch: list[tuple[str, Held]] = []
    nbytes = 0
    for name, held in group:
        batch.append((name, held))
        nbytes += held.spec.nbytes
        if nbytes >= _BATCH_BYTES or len(batch) >= _BATCH_TENSORS:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
