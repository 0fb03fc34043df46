"""Compare the tensors of two checkpoints, a few MiB at a time, in a few threads.

Every byte that is read is held to its digest on the way (INV-9). What is equal by digest is not
read; of a part that a delta leaves as it is, one side is, for the norms.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ckptcoord.core.box import Box
from ckptcoord.core.statediff import Status
from ckptcoord.repo.changes import TensorChange
from ckptcoord.repo.comparing import Pieces, Room, compare_pieces, compare_slabs
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from ckptcoord.codec.compare import Difference
    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.core.manifest import FileRecord
    from ckptcoord.core.statediff import Value
    from ckptcoord.repo.comparing import Stored
    from ckptcoord.repo.readers import TensorEntry, TensorReader

Source: TypeAlias = "tuple[FileRecord, TensorEntry]"

_MOST_FILES = 64  # of one side that are open for a group of tensors
_BATCH_BYTES = 8 << 20  # of small tensors that one thread takes at once
_BATCH_TENSORS = 512


class Held(Pieces, Protocol):
    """A tensor of a checkpoint."""

    @property
    def pieces(self) -> tuple[tuple[Box, Source], ...]:
        """The boxes that are there, each with the entry that holds it."""
        ...

    def has(self, box: Box) -> bool:
        """Whether the pieces cover a box, each element once."""
        ...


class Shards(Protocol):
    """Opens a checkpoint's files."""

    def reader(self, record: FileRecord) -> AbstractContextManager[TensorReader]:
        """One of them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tensor of either checkpoint, or of both."""

    name: str
    old: Held | None
    new: Held | None

    @property
    def nbytes(self) -> int:
        """Of the tensor on one side."""
        held = self.new or self.old
        return 0 if held is None else held.spec.nbytes

    def paths(self, side: Held | None) -> tuple[str, ...]:
        """The files that one side of it is in."""
        return () if side is None else tuple({record.path: None for _, (record, _) in side.pieces})


class Comparison:
    """Compares tensors of two checkpoints.

    Args:
        old: opens the files of the first.
        new: opens those of the second.
        threads: that read, decode and compare.
        progress: is told of bytes that were read, in any thread.

    Attributes:
        read_bytes: how many were, on both sides.
    """

    def __init__(
        self,
        old: Shards,
        new: Shards,
        *,
        threads: int,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._shards = old, new
        self._threads = max(1, threads)
        self._progress = progress
        self._lock = threading.Lock()
        self._rooms = threading.local()
        self._stopped = False
        self.read_bytes = 0

    def compare(self, pairs: Sequence[Pair]) -> list[TensorChange]:
        """What became of each tensor, in this order.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        known = {pair.name: _known_change(pair) for pair in pairs}
        unknown = [pair for pair in pairs if known[pair.name] is None]
        with Threads(self._threads, "ckptcoord-diff") as pool:
            for group in _groups(unknown):
                known |= self._compare_group(pool, group)
        return [one for pair in pairs if (one := known[pair.name]) is not None]

    def _compare_group(self, pool: Threads, group: Sequence[Pair]) -> dict[str, TensorChange]:
        with ExitStack() as stack:
            readers = tuple(
                _opened(stack, shards, [pair.old if at == 0 else pair.new for pair in group])
                for at, shards in enumerate(self._shards)
            )
            work = [pool.submit(self._batch, batch, *readers) for batch in _batches(group)]
            try:
                found = [change for one in work for change in one.result()]
            except BaseException:
                self._stopped = True
                for one in work:
                    one.cancel()
                for one in work:  # none may read from what is about to be closed
                    if not one.cancelled():
                        one.exception()
                raise
        return {change.name: change for change in found}

    def _batch(
        self,
        pairs: Sequence[Pair],
        old: Mapping[str, TensorReader],
        new: Mapping[str, TensorReader],
    ) -> list[TensorChange]:
        return [self._one(pair, old, new) for pair in pairs]

    def _one(
        self, pair: Pair, old: Mapping[str, TensorReader], new: Mapping[str, TensorReader]
    ) -> TensorChange:
        from ckptcoord.codec.compare import Tally  # late: numba, which equal states do not need

        assert pair.old is not None, "what is to be compared is there"
        assert pair.new is not None, "on both sides"
        room = self._room()
        before, after = _stored(pair.old, old), _stored(pair.new, new)
        spec = pair.old.spec
        tally = Tally(spec.dtype)
        if {box for box, _ in before} == {box for box, _ in after}:
            there = dict(after)
            for box, stored in before:
                compare_pieces(stored, there[box], tally, room, self._go_on)
        else:
            compare_slabs((pair.old, before), (pair.new, after), tally, room, self._go_on)
        difference = tally.difference()
        if not difference.differing:
            return _change(pair, Status.EQUAL, difference)
        values = None if spec.shape else (_value(before), _value(after))
        return _change(pair, Status.CHANGED, difference, values)

    def _go_on(self, nbytes: int) -> None:
        if self._stopped:
            raise _StoppedError
        with self._lock:
            self.read_bytes += nbytes
            self._progress(nbytes)

    def _room(self) -> Room:
        room = getattr(self._rooms, "room", None)
        if not isinstance(room, Room):
            room = self._rooms.room = Room()
        return room


class _StoppedError(Exception):
    """Another thread has failed, or the user has had enough."""


def _known_change(pair: Pair) -> TensorChange | None:
    """What is to be said of a tensor without reading it; None where it has to be."""
    old, new = pair.old, pair.new
    if old is None or new is None:
        return _change(pair, Status.ADDED if old is None else Status.REMOVED)
    # Of what no piece is there, nothing says the dtype.
    dtypes = {held.spec.dtype for held in (old, new) if held.pieces}
    if old.spec.shape != new.spec.shape or len(dtypes) > 1:
        return _change(pair, Status.RESHAPED)
    if _digests(old) == _digests(new):
        return _change(pair, Status.EQUAL)
    whole = Box.whole(old.spec.shape)
    if not (old.has(whole) and new.has(whole)):
        return _change(pair, Status.PARTIAL)
    return None if whole.volume else _change(pair, Status.EQUAL)


def _change(
    pair: Pair,
    status: Status,
    difference: Difference | None = None,
    values: tuple[Value, Value] | None = None,
) -> TensorChange:
    return TensorChange(
        name=pair.name,
        status=status,
        old=_form(pair.old),
        new=_form(pair.new),
        difference=difference,
        values=values,
    )


def _form(held: Held | None) -> TensorSpec | None:
    return None if held is None or not held.pieces else held.spec


def _digests(held: Held) -> dict[Box, object]:
    """By box; of what has no digest, something that equals nothing else."""
    return {box: entry.digest or object() for box, (_, entry) in held.pieces}


def _stored(held: Held, readers: Mapping[str, TensorReader]) -> list[tuple[Box, Stored]]:
    return [(box, (readers[record.path], entry)) for box, (record, entry) in held.pieces]


def _value(pieces: Sequence[tuple[Box, Stored]]) -> Value:
    """That of a tensor without dimensions, whose bytes were just held to their digest."""
    from ckptcoord.codec.compare import scalar_of

    ((_, (reader, entry)),) = pieces
    data = bytearray(entry.spec.nbytes)
    reader.read_range(entry, 0, memoryview(data))
    return scalar_of(entry.spec.dtype, bytes(data))


def _opened(
    stack: ExitStack, shards: Shards, held: Sequence[Held | None]
) -> dict[str, TensorReader]:
    """The files that tensors are in, open as long as the stack is."""
    records = {
        record.path: record for one in held if one is not None for _, (record, _) in one.pieces
    }
    return {path: stack.enter_context(shards.reader(one)) for path, one in records.items()}


def _groups(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Runs of tensors that are in a few files, those of one file together."""
    group: list[Pair] = []
    files: tuple[set[str], set[str]] = set(), set()
    for pair in sorted(pairs, key=lambda one: (one.paths(one.new), one.paths(one.old), one.name)):
        more = files[0].union(pair.paths(pair.old)), files[1].union(pair.paths(pair.new))
        if group and max(map(len, more)) > _MOST_FILES:
            yield group
            group, more = [], (set(pair.paths(pair.old)), set(pair.paths(pair.new)))
        group.append(pair)
        files = more
    if group:
        yield group


def _batches(group: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The largest first, each alone; small ones together."""
    batch: list[Pair] = []
    nbytes = 0
    for pair in sorted(group, key=lambda one: (-one.nbytes, one.name)):
        batch.append(pair)
        nbytes += pair.nbytes
        if nbytes >= _BATCH_BYTES or len(batch) >= _BATCH_TENSORS:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
