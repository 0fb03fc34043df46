"""Two tensors, read side by side in parts: one that is stored whole, in pieces, or as deltas.

Shapes: B bytes an element.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ckptcoord.codec.digest import Hasher
from ckptcoord.codec.recipe import PART_BYTES
from ckptcoord.core.box import Box
from ckptcoord.repo.deltas import DeltaReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ckptcoord.codec.compare import Tally
    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.repo.readers import TensorEntry, TensorReader

Stored: TypeAlias = "tuple[TensorReader, TensorEntry]"
"""Where a piece is read from."""
GoOn: TypeAlias = "Callable[[int], None]"
"""Is told how many bytes were read, and raises where no more should be."""

_SLAB_BYTES = 4 << 20
_KEPT_PARTS = 32  # of deltas that are cut otherwise: each is decoded once while it is among these
_MAX_LINKS = 100  # as many as deltas may have


class Pieces(Protocol):
    """A tensor that is there in boxes."""

    @property
    def spec(self) -> TensorSpec:
        """Of the whole."""
        ...

    def meeting(self, box: Box) -> list[int]:
        """Which boxes have elements of this one."""
        ...


class Room:
    """Memory for comparing, of one thread; about 8 MiB, and up to 128 where deltas are cut."""

    def __init__(self) -> None:
        size = max(PART_BYTES, _SLAB_BYTES)
        self.old = np.empty(size, np.uint8)
        self.new = np.empty(size, np.uint8)
        self.scratch = np.empty(0, np.uint8)
        self.parts: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()

    def part(self, key: tuple[int, int]) -> NDArray[np.uint8]:
        """Memory for one more part, that of the oldest where there are many."""
        if len(self.parts) < _KEPT_PARTS:
            found = np.empty(PART_BYTES, np.uint8)
        else:
            _, found = self.parts.popitem(last=False)
        self.parts[key] = found
        return found


class _Checked:
    """A piece whose bytes are hashed as they come, in order."""

    def __init__(self, stored: Stored, number: int = 0) -> None:
        self._reader, self._entry = stored
        self._number = number
        self._hasher = Hasher()
        self._hashed = 0

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with its bytes from one on, a multiple of what is read at a time."""
        size = self._reader.part_bytes
        for at in range(0, out.size, size):  # what is hashed at once is in the core's cache yet
            part = out[at : at + size]
            self._reader.read_range(self._entry, start + at, part.data)
            self.take(start + at, part)

    def apply(self, start: int, out: NDArray[np.uint8]) -> None:
        """Make a part out of that of its source, which `out` holds."""
        assert isinstance(self._reader, DeltaReader), "it is made out of another"
        self._reader.apply(self._entry, start, out.data)
        self.take(start, out)

    def read_any(self, start: int, out: NDArray[np.uint8], room: Room) -> None:
        """The same from any byte on; of what is decoded, parts are kept in `room`."""
        if not isinstance(self._reader, DeltaReader):
            self.read(start, out)
            return
        stop = start + out.size
        for number in range(start // PART_BYTES, -(-stop // PART_BYTES)):
            first = number * PART_BYTES
            part = self._part(number, room)
            low, high = max(start, first), min(stop, first + part.size)
            out[low - start : high - start] = part[low - first : high - first]

    def take(self, start: int, data: NDArray[np.uint8]) -> None:
        """Hash bytes that came for the first time."""
        if start == self._hashed:
            self._hasher.update(data.data)
            self._hashed += data.size

    def finish(self) -> None:
        """All bytes came.

        Raises:
            DigestMismatchError: they are not those that were written.
        """
        assert self._hashed == self._entry.spec.nbytes, "every byte is compared once"
        self._reader.check_digest(self._entry, self._hasher.digest())

    def _part(self, number: int, room: Room) -> NDArray[np.uint8]:
        first = number * PART_BYTES
        size = min(PART_BYTES, self._entry.spec.nbytes - first)
        key = (self._number, number)
        if key in room.parts:
            room.parts.move_to_end(key)
            return room.parts[key][:size]
        part = room.part(key)[:size]
        self.read(first, part)
        return part


def compare_pieces(old: Stored, new: Stored, tally: Tally, room: Room, go_on: GoOn) -> None:
    """Add a piece of the same box on both sides.

    Raises:
        CorruptError, StorageError: it cannot be read, or is not what was written.
    """
    nbytes = old[1].spec.nbytes
    size = max(old[0].part_bytes, new[0].part_bytes)
    is_equal = old[1].digest is not None and old[1].digest == new[1].digest
    before, after = _Checked(old), None if is_equal else _Checked(new)
    is_over = _is_over(new, old)
    for start in range(0, nbytes, size):
        length = min(size, nbytes - start)
        a, b = room.old[:length], room.new[:length]
        before.read(start, a)
        if after is None or _is_shared(old, new, start):
            b = a  # equal, and read once for the norms
        elif is_over:
            b[:] = a
            after.apply(start, b)
        else:
            after.read(start, b)
        if after is not None:
            after.take(start, b)  # what was read was taken
        tally.add(a, b)
        go_on(length if b is a else 2 * length)
    for one in (before, after):
        if one is not None:
            one.finish()


def compare_slabs(
    old: tuple[Pieces, Sequence[tuple[Box, Stored]]],
    new: tuple[Pieces, Sequence[tuple[Box, Stored]]],
    tally: Tally,
    room: Room,
    go_on: GoOn,
) -> None:
    """Add a tensor that is cut in one way on one side, and in another on the other.

    Each side's boxes have every element once.

    Raises:
        CorruptError, StorageError: it cannot be read, or is not what was written.
    """
    spec = old[0].spec
    before = _Cut(*old, room, 0)
    after = _Cut(*new, room, len(old[1]))
    for slab in _slabs(spec.shape, spec.item_bytes):
        length = slab.volume * spec.item_bytes
        a, b = room.old[:length], room.new[:length]
        before.fill(slab, a)
        after.fill(slab, b)
        tally.add(a, b)
        go_on(2 * length)
    before.finish()
    after.finish()
    room.parts.clear()


def slabs_of(
    tensor: Pieces, pieces: Sequence[tuple[Box, Stored]], room: Room
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in row-major order, a few MiB at a time; each is good until the next.

    Args:
        tensor: which.
        pieces: its boxes, which have every element once.
        room: for what is read.

    Raises:
        CorruptError, StorageError: it cannot be read, or at its end is not what was written.
    """
    cut = _Cut(tensor, pieces, room, 0)
    for slab in _slabs(tensor.spec.shape, tensor.spec.item_bytes):
        data = room.old[: slab.volume * tensor.spec.item_bytes]
        cut.fill(slab, data)
        yield data
    cut.finish()
    room.parts.clear()


class _Cut:
    """One side of a tensor in pieces."""

    def __init__(
        self, tensor: Pieces, pieces: Sequence[tuple[Box, Stored]], room: Room, first: int
    ) -> None:
        self._tensor = tensor
        self._pieces = [
            (box, _Checked(stored, first + at)) for at, (box, stored) in enumerate(pieces)
        ]
        self._room = room

    def fill(self, slab: Box, out: NDArray[np.uint8]) -> None:
        """Put the bytes of a slab together."""
        item_bytes = self._tensor.spec.item_bytes
        rows = out.reshape(*slab.size, item_bytes)
        for index in self._tensor.meeting(slab):
            box, piece = self._pieces[index]
            part = box.meet(slab)
            assert part is not None, "it meets the slab"
            # One run of the piece: a slab has whole trailing dimensions.
            start = _place(part.offset, box) * item_bytes
            length = part.volume * item_bytes
            if length == out.size:
                piece.read_any(start, out, self._room)
                continue
            if self._room.scratch.size < length:
                self._room.scratch = np.empty(_SLAB_BYTES, np.uint8)
            data = self._room.scratch[:length]
            piece.read_any(start, data, self._room)
            rows[part.seen_from(slab)] = data.reshape(*part.size, item_bytes)

    def finish(self) -> None:
        """All slabs came."""
        for box, piece in self._pieces:
            if box.volume:
                piece.finish()


def _place(index: Sequence[int], box: Box) -> int:
    """How many elements of a box, row-major, stand before one."""
    place = 0
    for at, offset, size in zip(index, box.offset, box.size, strict=True):
        place = place * size + at - offset
    return place


def _slabs(shape: Sequence[int], item_bytes: int) -> Iterator[Box]:
    """A tensor in row-major boxes of at most `_SLAB_BYTES` whose trailing dimensions are whole."""
    if 0 in shape:
        return
    depth, row_bytes = 0, math.prod(shape) * item_bytes
    for depth, size in enumerate(shape):  # noqa: B007 (where it stops)
        row_bytes //= size
        if row_bytes <= _SLAB_BYTES:
            break
    inner = shape[depth + 1 :]
    run = max(1, _SLAB_BYTES // row_bytes)
    for outer in np.ndindex(*shape[:depth]):
        for start in range(0, shape[depth] if shape else 1, run):
            length = min(run, shape[depth] - start) if shape else 1
            yield Box(
                offset=(*outer, *((start,) if shape else ()), *(0 for _ in inner)),
                size=(*(1 for _ in outer), *((length,) if shape else ()), *inner),
            )


def _is_over(new: Stored, old: Stored) -> bool:
    """Whether the new tensor is a delta whose source is the old one."""
    reader, entry = new
    if not isinstance(reader, DeltaReader) or old[1].spec.dtype != entry.spec.dtype:
        return False
    origin = reader.origin(entry.spec.name)
    if origin is None:
        return False
    return (origin[0].path, origin[1].spec.name) == (old[0].path, old[1].spec.name)


def _is_shared(old: Stored, new: Stored, start: int) -> bool:
    """Whether a part is one and the same file's on both sides, through deltas that keep it."""
    if not (old[0].recipes or new[0].recipes):
        return False
    number = start // PART_BYTES
    return _home(old, number) == _home(new, number)


def _home(stored: Stored, number: int) -> tuple[str, str]:
    """The file and the name there of what makes a part what it is."""
    reader, name = stored[0], stored[1].spec.name
    for _ in range(_MAX_LINKS):
        if not (isinstance(reader, DeltaReader) and reader.is_unchanged(name, number)):
            break
        origin = reader.origin(name)
        if origin is None:
            break
        reader, name = origin[0], origin[1].spec.name
    return reader.path, name
