"""One byte plane as bytes, in the way that its bytes suit.

A plane holds one byte of each of N elements. Which kind it gets is decided from a count of its
bytes; docs/codec.md has the layouts.

    VERBATIM   the bytes
    SPARSE     one byte everywhere, but for a few exceptions; no exceptions: a constant
    ZSTD       a zstandard frame that declares its size
    MASKED     one byte mostly: a bit a byte for where it is not, and what is there instead, both
               as planes. Codes have whole bits: too many for a byte that needs half of one
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zstandard

from ckptcoord.codec.delta import PLANE_HEADER, DecodeError, PlaneKind
from ckptcoord.codec.huffman import (
    BLOCK,
    FINE_BLOCK,
    MIN_BYTES,
    LiteralWriter,
    count_bytes,
    frame_bound,
    put_bytes,
    put_little,
    write_blocks,
)
from ckptcoord.codec.jit import compiled, inlined, load64
from ckptcoord.codec.kernels import PAYS_BITS, entropy
from ckptcoord.codec.literals import copy_bytes, decoding_tables, fill_bytes, little, read_frame
from ckptcoord.codec.masks import EACH, SPARE, count_ones, mask_plane, unmask_plane

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Plane: TypeAlias = NDArray[np.uint8]
    Bits: TypeAlias = NDArray[np.float64]
    Fills: TypeAlias = NDArray[np.int64]
    Counts: TypeAlias = NDArray[np.unsignedinteger[Any]]
    Mask: TypeAlias = NDArray[np.bool_]

SEGMENT = 1 << 16  # positions of exceptions are 16 bits within one
_FINE_BITS = 4.0  # below, smaller blocks pay
MASKED_BITS = 1.8  # below, a plane is masked
_SPARSE_BITS = 0.4  # above, there are more exceptions than pay
_EXCEPTION_BYTES = 3  # a position and a value
_EXCEPTIONS_IN = 64  # bytes of a plane to one exception, at least
_GROUP = 32  # bytes looked at together for exceptions
_PLANE_HEAD = PLANE_HEADER.size
_MASKED_HEAD = 1 + 2 * _PLANE_HEAD
_VERBATIM, _SPARSE = int(PlaneKind.VERBATIM), int(PlaneKind.SPARSE)
_ZSTD, _MASKED = int(PlaneKind.ZSTD), int(PlaneKind.MASKED)


class PlaneCoder:
    """Codes planes; it keeps zstandard's contexts, so one thread at a time uses it."""

    __slots__ = ("_decompressor", "_tables", "literals")

    def __init__(self) -> None:
        self.literals = LiteralWriter()
        self._tables = decoding_tables()
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, plane: Plane, bits: Bits, fill: int, room: Plane) -> tuple[PlaneKind, Plane]:
        """Code a plane (N,): `encode_all` of a single one."""
        (coded,) = self.encode_all(plane, plane.size, bits[None], np.array([fill]), room)
        return coded

    def encode_all(
        self, planes: Plane, size: int, bits: Bits, fills: Fills, room: Plane
    ) -> list[tuple[PlaneKind, Plane]]:
        """Code the first `size` bytes of each of several planes.

        Args:
            planes: one after another, (W * N,).
            size: at most N.
            bits: of each plane estimates of the entropy of its bytes, in P equal parts, (W, P).
            fills: of each the byte that seems to be the most frequent, (W,).
            room: for W times `plane_bound(size)` bytes.

        Returns:
            Of each its kind, and the coded bytes: a view of `room` or of the plane.
        """
        kinds, sizes = np.empty(fills.size, np.int64), np.empty(fills.size, np.int64)
        code_planes(planes, size, bits, fills, *self.literals.tables, room, kinds, sizes)
        stride, bound = planes.size // fills.size, room.size // fills.size
        coded = []
        for k, (kind, found) in enumerate(zip(kinds.tolist(), sizes.tolist(), strict=True)):
            verbatim = kind == PlaneKind.VERBATIM
            held, at = (planes, k * stride) if verbatim else (room, k * bound)
            coded.append((PlaneKind(kind), held[at : at + found]))
        return coded

    def decode_most(self, coded: Plane, size: int, planes: Plane, room: Plane) -> list[bool]:
        """Fill the first `size` bytes of planes (W, N) that were coded together.

        Args:
            coded: headers and bytes of all, as `plane_spans` found them sound.
            size: at most N.
            planes: in one piece.
            room: for `plane_bound(size)` bytes.

        Returns:
            Of which that was done. The others are verbatim, or for `decode`, which says what of
            them is damaged if anything is.
        """
        done = np.empty(planes.shape[0], np.bool_)
        coded.flags.writeable = False  # one type, one compilation
        read_planes(coded, size, planes.reshape(-1), room, *self._tables, done)
        return done.tolist()

    def decode(self, kind: int, coded: memoryview, out: Plane) -> None:
        """Fill `out` (N,).

        Raises:
            DecodeError: `coded` is no plane of that kind and size.
        """
        if kind == PlaneKind.VERBATIM:
            _check(len(coded) == out.size, "a verbatim plane has another size")
            out[:] = np.frombuffer(coded, np.uint8)
        elif kind == PlaneKind.SPARSE:
            _fill_sparse(coded, out)
        elif kind == PlaneKind.ZSTD:
            out[:] = self._decompress(coded, out.size)
        elif kind == PlaneKind.MASKED:
            self._unmask(coded, out)
        else:
            raise DecodeError(f"a plane has the unknown kind {kind}")

    def found(self, kind: int, coded: memoryview, size: int) -> Plane | None:
        """A plane (`size`,) that comes without being copied; None where it has to be filled.

        Raises:
            DecodeError: as for `decode`.
        """
        if kind == PlaneKind.VERBATIM and len(coded) == size:
            return np.frombuffer(coded, np.uint8)
        return self._decompress(coded, size) if kind == PlaneKind.ZSTD else None

    def _unmask(self, coded: memoryview, out: Plane) -> None:
        begin = 1 + 2 * PLANE_HEADER.size
        _check(len(coded) >= begin, "a masked plane ends within its header")
        bitmap = np.empty(-(-out.size // 8), np.uint8)
        middle = begin + self._part(coded, 1, begin, bitmap)
        spare = out.size % 8
        _check(not spare or not bitmap[-1] >> spare, "a masked plane marks bytes out of bounds")
        values = np.empty(count_ones(bitmap) + SPARE, np.uint8)
        end = middle + self._part(coded, 1 + PLANE_HEADER.size, middle, values[:-SPARE])
        _check(end == len(coded), "a masked plane is not filled by its parts")
        unmask_plane(bitmap, values, coded[0], out)

    def _part(self, coded: memoryview, head: int, begin: int, out: Plane) -> int:
        """Decode a part of a masked plane, and return its size."""
        kind, size = PLANE_HEADER.unpack_from(coded, head)
        _check(kind != PlaneKind.MASKED, "a masked plane is within another")
        _check(size <= len(coded) - begin, "a masked plane ends within a part")
        self.decode(kind, coded[begin : begin + size], out)
        return int(size)

    def _decompress(self, coded: memoryview, size: int) -> Plane:
        # zstandard allocates what the frame declares, whatever its caller allows.
        try:
            declared = zstandard.get_frame_parameters(coded).content_size
            _check(declared == size, "a compressed plane declares another size")
            found = self._decompressor.decompress(coded, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DecodeError(f"a compressed plane is damaged: {error}") from error
        _check(len(found) == size, "a compressed plane has another size")
        return np.frombuffer(found, np.uint8)


@compiled
def find_exceptions(
    plane: Plane, fill: int, counts: Counts, positions: Counts, values: Plane
) -> int:
    """Where a plane (N,) is not `fill`: by segment how often, then positions in it, and values.

    Returns how many there are; -1 where there are more than have room.
    """
    counts[:] = 0
    found, at, fills = 0, 0, np.uint64(fill) * EACH
    while at < plane.size and found >= 0:
        end = min(at + _GROUP, plane.size)
        differs = np.uint64(1)
        if end - at == _GROUP:
            differs = load64(plane, np.uint64(at)) ^ fills
            differs |= load64(plane, np.uint64(at + 8)) ^ fills
            differs |= load64(plane, np.uint64(at + 16)) ^ fills
            differs |= load64(plane, np.uint64(at + 24)) ^ fills
        if differs:
            found = _note_exceptions(plane, at, end, fill, found, counts, positions, values)
        at = end
    return found


@compiled
def _note_exceptions(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    plane: Plane,
    begin: int,
    end: int,
    fill: int,
    found: int,
    counts: Counts,
    positions: Counts,
    values: Plane,
) -> int:
    """The same of a few bytes of a plane, where some are found already."""
    for i in range(begin, end):
        if plane[i] != fill:
            if found == positions.size:
                return -1
            counts[i // SEGMENT] += 1
            positions[found] = i % SEGMENT
            values[found] = plane[i]
            found += 1
    return found


@compiled
def put_exceptions(coded: Plane, out: Plane) -> int:
    """The inverse, from the bytes of a sparse plane that has exceptions.

    How many were put: another number than there are where the counts are not theirs, and -1 where
    one is out of bounds.
    """
    fill = coded[0]
    for i in range(out.size):
        out[i] = fill
    segments = (out.size + SEGMENT - 1) // SEGMENT
    begin = 1 + 2 * segments
    exceptions = (coded.size - begin) // _EXCEPTION_BYTES
    put = 0
    for s in range(segments):
        end = put + int(coded[1 + 2 * s]) + (int(coded[2 + 2 * s]) << 8)
        if end > exceptions:
            return end
        for k in range(put, end):
            at = begin + 2 * k
            i = s * SEGMENT + int(coded[at]) + (int(coded[at + 1]) << 8)
            if i >= out.size:
                return -1
            out[i] = coded[begin + 2 * exceptions + k]
        put = end
    return put


def plane_bound(nbytes: int) -> int:
    """The most bytes that coding a plane takes, or touches: it may be masked, in vain."""
    return _MASKED_HEAD + frame_bound(nbytes // 8 + 1) + frame_bound(nbytes)


@compiled
def code_planes(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    planes: Plane,
    size: int,
    bits: Bits,
    fills: Fills,
    states: Fills,
    description: Plane,
    pairs: Counts,
    room: Plane,
    kinds: Fills,
    sizes: Fills,
) -> None:
    """Code as `PlaneCoder.encode_all` says; kinds and sizes (W,) are filled.

    Each plane is coded at the beginning of its share of `room`, unless it is VERBATIM.
    """
    stride, bound = planes.size // kinds.size, room.size // kinds.size
    for k in range(kinds.size):
        plane, out = planes[k * stride : k * stride + size], room[k * bound : (k + 1) * bound]
        kinds[k], sizes[k] = _code_plane(plane, bits[k], fills[k], states, description, pairs, out)


@inlined
def _code_plane(  # noqa: PLR0913, PLR0917 (as above)
    plane: Plane,
    bits: Bits,
    fill: int,
    states: Fills,
    description: Plane,
    pairs: Counts,
    out: Plane,
) -> tuple[int, int]:
    """Kind and size of a plane."""
    mean = 0.0
    for estimate in bits:
        mean += estimate
    mean /= bits.size
    if mean < _SPARSE_BITS:
        end = _write_sparse(plane, fill, out, 0)
        if end:
            return _SPARSE, end
    if mean < MASKED_BITS and plane.size >= MIN_BYTES:
        end = _write_masked(plane, fill, states, description, pairs, out)
        if end < plane.size:
            return _MASKED, end
    elif bits.min() < PAYS_BITS:
        block = FINE_BLOCK if mean < _FINE_BITS else BLOCK
        end = write_blocks(plane, bits, PAYS_BITS, block, states, description, pairs, out)
        if end < plane.size:
            return _ZSTD, end
    return _VERBATIM, plane.size


@inlined
def _write_masked(
    plane: Plane, fill: int, states: Fills, description: Plane, pairs: Counts, out: Plane
) -> int:
    """Write a masked plane; its size."""
    bitmap = np.empty((plane.size + 7) // 8, np.uint8)
    values = np.empty(plane.size + SPARE, np.uint8)
    found = mask_plane(plane, fill, bitmap, values)
    end = _MASKED_HEAD
    for p in range(2):
        part = values[:found] if p else bitmap
        end = _write_part(part, states, description, pairs, out, 1 + p * _PLANE_HEAD, end)
    out[0] = fill
    return end


@inlined
def _write_part(  # noqa: PLR0913, PLR0917 (as above)
    part: Plane,
    states: Fills,
    description: Plane,
    pairs: Counts,
    out: Plane,
    head: int,
    begin: int,
) -> int:
    """Write a plane that is part of a masked one, and its header; where it ends."""
    counts = np.empty(256, np.uint32)
    count_bytes(part, counts)
    fill = int(np.argmax(counts))
    kind, end = _VERBATIM, begin + part.size
    if part.size and entropy(counts) < PAYS_BITS:
        sparse = _write_sparse(part, fill, out, begin)
        if sparse:
            kind, end = _SPARSE, sparse
        else:
            whole = np.zeros(1, np.float64)
            size = write_blocks(
                part, whole, PAYS_BITS, BLOCK, states, description, pairs, out[begin:]
            )
            if size < part.size:
                kind, end = _ZSTD, begin + size
    if kind == _VERBATIM:
        put_bytes(part, out, begin)
    put_little(out, put_little(out, head, kind, 1), end - begin, 4)
    return end


@compiled
def _write_sparse(plane: Plane, fill: int, out: Plane, at: int) -> int:
    """Write a sparse plane; where it ends, or 0 where it has too many exceptions."""
    counts = np.empty((plane.size + SEGMENT - 1) // SEGMENT, np.uint16)
    positions = np.empty(plane.size // _EXCEPTIONS_IN, np.uint16)
    values = np.empty(positions.size, np.uint8)
    found = find_exceptions(plane, fill, counts, positions, values)
    if found < 0:
        return 0
    out[at] = fill
    at += 1
    if found == 0:
        return at
    for count in counts:
        at = put_little(out, at, int(count), 2)
    for position in positions[:found]:
        at = put_little(out, at, int(position), 2)
    return put_bytes(values[:found], out, at)


@compiled
def read_planes(  # noqa: PLR0913, PLR0917 (as above)
    coded: Plane,
    size: int,
    planes: Plane,
    room: Plane,
    singles: Counts,
    doubles: Counts,
    done: Mask,
) -> None:
    """Decode as `PlaneCoder.decode_most` says; `done` (W,) is filled."""
    stride, begin = planes.size // done.size, _PLANE_HEAD * done.size
    for k in range(done.size):
        kind, end = coded[_PLANE_HEAD * k], begin + little(coded, _PLANE_HEAD * k + 1, 4)
        part, out = coded[begin:end], planes[k * stride : k * stride + size]
        if kind == _MASKED:
            done[k] = _read_masked(part, out, room, singles, doubles)
        else:
            done[k] = kind != _VERBATIM and _read_part(kind, part, out, singles, doubles)
        begin = end


@inlined
def _read_masked(coded: Plane, out: Plane, room: Plane, singles: Counts, doubles: Counts) -> bool:
    """Decode a masked plane, if that can be done."""
    if coded.size < _MASKED_HEAD:
        return False
    bitmap = room[: (out.size + 7) // 8]
    values = room[bitmap.size :]
    begin, into = _MASKED_HEAD, bitmap
    for p in range(2):
        end = begin + little(coded, 2 + p * _PLANE_HEAD, 4)
        kind, part = coded[1 + p * _PLANE_HEAD], coded[begin:end]
        if end > coded.size or not _read_part(kind, part, into, singles, doubles):
            return False
        begin, into = end, values[: count_ones(bitmap)]
    if begin != coded.size or (out.size % 8 and bitmap[-1] >> (out.size % 8)):
        return False
    unmask_plane(bitmap, values, coded[0], out)
    return True


@compiled
def _read_part(kind: int, coded: Plane, out: Plane, singles: Counts, doubles: Counts) -> bool:
    """Decode a plane, or a part of a masked one, if that can be done."""
    if kind == _VERBATIM and coded.size == out.size:
        copy_bytes(coded, out)
        return True
    if kind == _SPARSE and coded.size == 1:
        fill_bytes(out, coded[0])
        return True
    if kind == _SPARSE:
        rest = coded.size - 1 - 2 * ((out.size + SEGMENT - 1) // SEGMENT)
        exceptions = rest // _EXCEPTION_BYTES
        sound = exceptions > 0 and rest % _EXCEPTION_BYTES == 0
        return sound and put_exceptions(coded, out) == exceptions
    return kind == _ZSTD and read_frame(coded, out, singles, doubles)


def _fill_sparse(coded: memoryview, out: Plane) -> None:
    _check(len(coded) > 0, "a sparse plane is empty")
    if len(coded) == 1:
        out[:] = coded[0]
        return
    head = 1 + 2 * -(-out.size // SEGMENT)
    exceptions, rest = divmod(len(coded) - head, _EXCEPTION_BYTES)
    _check(exceptions > 0 and rest == 0, "a sparse plane has no sound size")
    raw = np.frombuffer(coded, np.uint8)
    raw.flags.writeable = False  # one type, one compilation
    put = put_exceptions(raw, out)
    _check(put >= 0, "a sparse plane has an exception out of bounds")
    _check(put == exceptions, "a sparse plane's counts do not add up")


def _check(holds: bool, why: str) -> None:  # noqa: FBT001
    if not holds:
        raise DecodeError(why)
