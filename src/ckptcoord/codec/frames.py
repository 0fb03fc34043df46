"""Codes the frames of a tensor: chooses, takes apart, and puts together again.

Shapes: B blocks of a frame, E elements a block, W bytes an element. The last block of a tensor may
be short; it is then worked on in a copy that zeros make whole, and its planes leave them out.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import xxhash

from ckptcoord.codec import kernels
from ckptcoord.codec.contexts import (
    Contexts,
    choose_contexts,
    decode_contexts,
    encode_contexts,
    exponents,
)
from ckptcoord.codec.delta import (
    BLOCK_BYTES,
    CHECKED_BYTES,
    FRAME_BYTES,
    HAS_BITMAP,
    HEADER,
    MAX_FRAME_BYTES,
    PLANE_HEADER,
    SIGN_SHIFT,
    DecodeError,
    Frame,
    FrameKind,
    Level,
    PlaneKind,
    bitmap_bytes,
    plane_spans,
)
from ckptcoord.codec.planes import PlaneCoder, plane_bound
from ckptcoord.codec.survey import survey
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ckptcoord.codec.elements import Elements

    Bytes: TypeAlias = NDArray[np.uint8]
    Mask: TypeAlias = NDArray[np.bool_]
    Bits: TypeAlias = NDArray[np.float64]

_SMALL_BYTES = 4096  # of a tensor that is not worth the fixed cost of coding it
_NOTHING = np.empty(0, np.uint8)
_ALL = np.ones(MAX_FRAME_BYTES // BLOCK_BYTES, np.bool_)  # a mask of every block; never written


class _Scratch:
    """What one thread needs to work on frames of up to `nbytes`."""

    __slots__ = ("_base", "_new", "_planes", "_room", "coder", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.coder = PlaneCoder()
        self._new = np.empty(nbytes, np.uint8)
        self._base = np.empty(nbytes, np.uint8)
        self._planes = np.empty(nbytes, np.uint8)
        self._room = np.empty(8 * plane_bound(-(-nbytes // 8)), np.uint8)

    def new(self, data: Bytes) -> Bytes:
        """`data`, or a copy of it, as whole blocks at an address that suits the kernels."""
        return _whole(data, self._new)

    def base(self, data: Bytes) -> Bytes:
        """The same for a second array."""
        return _whole(data, self._base)

    def planes(self, width: int, blocks: int) -> Bytes:
        """Room for planes, (W, B, E)."""
        return self._planes[: blocks * BLOCK_BYTES].reshape(width, blocks, BLOCK_BYTES // width)

    def room(self, width: int, size: int) -> Bytes:
        """Room for planes of `size` bytes, coded."""
        return self._room[: width * plane_bound(size)]


def _whole(data: Bytes, room: Bytes) -> Bytes:
    size = _round_up(data.size)
    if size == data.size and data.ctypes.data % 8 == 0:
        return data
    room[: data.size] = data
    room[data.size : size] = 0
    return room[:size]


def _round_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


_IDLE: deque[_Scratch] = deque(maxlen=8)  # its ends are taken and given by any thread


@contextmanager
def _scratch(nbytes: int) -> Iterator[_Scratch]:
    """Scratch that is this thread's until the block ends: fresh memory costs as much as coding."""
    try:
        found = _IDLE.pop()
    except IndexError:
        found = _Scratch(nbytes)
    scratch = found if found.nbytes >= nbytes else _Scratch(nbytes)
    yield scratch
    _IDLE.append(scratch)


def _spread(
    jobs: int, threads: int, frame_bytes: int, work: Callable[[_Scratch, int], None]
) -> None:
    """Do `work(scratch, number)` for all numbers below `jobs`, on several threads."""
    numbers = count()

    def run() -> None:
        with _scratch(_round_up(frame_bytes)) as scratch:
            while (number := next(numbers)) < jobs:
                work(scratch, number)

    helpers = min(threads, jobs) - 1
    if helpers < 1:
        run()
        return
    with ThreadPoolExecutor(helpers, "ckptcoord-codec") as pool:
        others = [pool.submit(run) for _ in range(helpers)]
        run()
    for other in others:
        other.result()


# --- encode ---------------------------------------------------------------------------------------


def encode_frames(
    new: Bytes, base: Bytes | None, elements: Elements, level: Level, threads: int
) -> bytes:
    """`delta.encode`, with its dtype looked up."""
    if base is not None and base.size != new.size:
        raise ConfigError(field="base", why=f"has {base.size} bytes, the tensor {new.size}")
    spans = _spans(new, base)
    threads = min(threads, len(spans))
    coded = [b""] * len(spans)

    def work(scratch: _Scratch, number: int) -> None:
        span = spans[number]
        under = None if base is None else base[span]
        found = _Encoder(scratch, elements, level).encode(new[span], under)
        coded[number] = _frame_bytes(found, elements.width, new[span].size, number)

    _spread(len(spans), threads, max((s.stop - s.start for s in spans), default=0), work)
    return b"".join(coded)


def _spans(new: Bytes, base: Bytes | None) -> list[slice]:
    """What each frame is to hold: FRAME_BYTES, or more where so much has not changed in all."""
    starts = range(0, new.size, FRAME_BYTES)
    if base is None or len(starts) < 2 or (new.ctypes.data | base.ctypes.data) % 8:
        return [slice(start, min(start + FRAME_BYTES, new.size)) for start in starts]
    mask = np.ones(_round_up(new.size) // BLOCK_BYTES, np.bool_)
    whole = new.size // BLOCK_BYTES * BLOCK_BYTES
    kernels.changed_blocks(
        _words(new[:whole], 8), _words(base[:whole], 8), mask[: whole // BLOCK_BYTES]
    )
    spans: list[slice] = []
    room = 0
    for start in starts:
        end = min(start + FRAME_BYTES, new.size)
        changed = int(np.count_nonzero(mask[start // BLOCK_BYTES : _round_up(end) // BLOCK_BYTES]))
        if spans and changed <= room and end - spans[-1].start <= MAX_FRAME_BYTES:
            spans[-1] = slice(spans[-1].start, end)
        else:
            spans.append(slice(start, end))
            room = FRAME_BYTES // BLOCK_BYTES
        room -= changed
    return spans


class _Found(NamedTuple):
    """A frame to be written: its kind, its bitmap or nothing, and what follows that."""

    kind: FrameKind
    bitmap: Bytes
    parts: Sequence[Bytes]
    sign_place: int = 0


def _frame_bytes(found: _Found, width: int, raw_bytes: int, number: int) -> bytes:
    parts = (found.bitmap, *found.parts)
    payload_bytes = sum(part.size for part in parts)
    flags = (HAS_BITMAP if found.bitmap.size else 0) | (found.sign_place << SIGN_SHIFT)
    header = HEADER.pack(found.kind, width, flags, raw_bytes, payload_bytes, 0)[:CHECKED_BYTES]
    checksum = xxhash.xxh3_64(header, seed=number)
    for part in parts:
        checksum.update(part.data)
    return b"".join(
        (header, checksum.intdigest().to_bytes(8, "little"), *(part.data for part in parts))
    )


class _Work(NamedTuple):
    """A frame that is being coded.

    Attributes:
        new: whole blocks.
        base: whole blocks; `new` where there is none.
        mask: the blocks that have changed.
        nbytes: how many bytes of the tensor are in them.
    """

    new: Bytes
    base: Bytes
    mask: Mask
    nbytes: int


class _Seen(NamedTuple):
    """What `survey` returns."""

    changed: int
    kind: int
    sign_place: int
    bits: Bits
    fills: NDArray[np.int64]


class _Encoder:
    """Codes one frame at a time."""

    __slots__ = ("_elements", "_level", "_scratch")

    def __init__(self, scratch: _Scratch, elements: Elements, level: Level) -> None:
        self._scratch = scratch
        self._elements = elements
        self._level = level

    def encode(self, data: Bytes, under: Bytes | None) -> _Found:
        """Code a frame; what it returns may be views of the scratch and of `data`."""
        if under is None and data.size <= _SMALL_BYTES and self._level is Level.AUTO:
            return _Found(FrameKind.STORED, _NOTHING, (data,))
        new = self._scratch.new(data)
        base = new if under is None else self._scratch.base(under)
        mask = np.empty(new.size // BLOCK_BYTES, np.bool_)
        seen = self._look(new, base, mask, has_base=under is not None)
        if seen.kind == FrameKind.UNCHANGED:
            return _Found(FrameKind.UNCHANGED, _NOTHING, ())
        bitmap = np.packbits(mask, bitorder="little") if seen.changed < mask.size else _NOTHING
        work = _Work(new, base, mask, _changed_bytes(mask, seen.changed, data.size))
        if seen.kind != FrameKind.STORED:
            parts = self._planes(seen, work)
            if sum(part.size for part in parts) < work.nbytes:
                return _Found(FrameKind(seen.kind), bitmap, parts, seen.sign_place)
        stored = _blocks(new)[mask].reshape(-1)[: work.nbytes] if bitmap.size else data
        return _Found(FrameKind.STORED, bitmap, (stored,))

    def _look(self, new: Bytes, base: Bytes, mask: Mask, *, has_base: bool) -> _Seen:
        """What is to be coded, and how; the mask is filled."""
        width = self._elements.width
        words = (_words(new, width), _words(base, width), _words(new, 8), _words(base, 8))
        return _Seen(*survey(*words, has_base, *kernels.ordering(self._elements), mask))

    def _planes(self, seen: _Seen, work: _Work) -> list[Bytes]:
        """The planes' headers, then the planes."""
        width = self._elements.width
        planes = self._scratch.planes(width, seen.changed)
        new, base = _words(work.new, width), _words(work.base, width)
        differ = seen.kind == FrameKind.DIFFERENCE
        if differ:
            ordering = kernels.ordering(self._elements)
            bit = kernels.sign_bit(width, seen.sign_place)
            kernels.split_difference(new, base, work.mask, *ordering, bit, planes)
        else:
            kernels.split_raw(new, work.mask, self._elements.is_float, planes)
        size = -(-work.nbytes // width)
        room = self._scratch.room(width, size)
        contexts = None
        if differ and self._level is Level.AGGRESSIVE:
            contexts = choose_contexts(_exponents(base, work.mask, seen.changed)[:size])
        coded = self._coded(planes.reshape(-1), size, seen, room, contexts)
        heads = b"".join(PLANE_HEADER.pack(kind, part.size) for kind, part in coded)
        return [np.frombuffer(heads, np.uint8), *(part for _, part in coded)]

    def _coded(
        self, planes: Bytes, size: int, seen: _Seen, room: Bytes, contexts: Contexts | None
    ) -> list[tuple[PlaneKind, Bytes]]:
        coder = self._scratch.coder
        if contexts is None:
            return coder.encode_all(planes, size, seen.bits, seen.fills, room)
        width = self._elements.width
        rows, rooms = planes.reshape(width, -1)[:, :size], room.reshape(width, -1)
        found = []
        for row, bits, fill, own in zip(rows, seen.bits, seen.fills, rooms, strict=True):
            coded = encode_contexts(row, contexts, coder, float(bits.mean()))
            if coded is None:
                found.append(coder.encode(row, bits, int(fill), own))
            else:
                found.append((PlaneKind.CONTEXTS, coded))
        return found


def _words(data: Bytes, width: int) -> NDArray[Any]:
    """Whole blocks as (B, E) integers that kernels do not write: one type, one compilation."""
    words: NDArray[Any] = _blocks(data).view(f"<i{width}")
    words.flags.writeable = False
    return words


def _exponents(base: NDArray[Any], mask: Mask, changed: int) -> Bytes:
    """Of the elements in blocks of the mask."""
    found = np.empty(changed * base.shape[1], np.uint8)
    exponents(base, mask, found)
    return found


def _blocks(data: Bytes) -> Bytes:
    return data.reshape(-1, BLOCK_BYTES)


def _changed_bytes(mask: Mask, changed: int, nbytes: int) -> int:
    """Bytes of a frame that are in blocks of the mask; only the last block may be short."""
    missing = mask.size * BLOCK_BYTES - nbytes
    return changed * BLOCK_BYTES - (missing if mask[-1] else 0)


# --- decode ---------------------------------------------------------------------------------------


def decode_frames(
    coded: memoryview,
    found: Sequence[Frame],
    out: Bytes,
    elements: Elements,
    threads: int,
    *,
    proven: bool,
) -> None:
    """`delta.decode`, with its dtype looked up and headers read: together they fill `out`."""
    ends = list(accumulate(frame.raw_bytes for frame in found))

    def work(scratch: _Scratch, number: int) -> None:
        frame = found[number]
        if not proven:
            _verify(coded, frame, number)
        if frame.kind is not FrameKind.UNCHANGED:
            part = out[ends[number] - frame.raw_bytes : ends[number]]
            _decode(coded, frame, part, elements, scratch)

    _spread(len(found), threads, max((f.raw_bytes for f in found), default=0), work)


def _verify(coded: memoryview, frame: Frame, number: int) -> None:
    start = frame.begin - HEADER.size
    checksum = xxhash.xxh3_64(coded[start : start + CHECKED_BYTES], seed=number)
    checksum.update(coded[frame.begin : frame.end])
    if checksum.intdigest().to_bytes(8, "little") != coded[start + CHECKED_BYTES : frame.begin]:
        raise DecodeError(f"frame {number} fails its checksum")


def _decode(
    coded: memoryview, frame: Frame, out: Bytes, elements: Elements, scratch: _Scratch
) -> None:
    mask, at = _mask(coded, frame)
    nbytes = out.size
    if frame.has_bitmap:
        nbytes = _changed_bytes(mask, int(np.count_nonzero(mask)), nbytes)
    whole = scratch.base(out)
    if frame.kind is FrameKind.STORED:
        if frame.end - at != nbytes:
            raise DecodeError("a stored frame has another size")
        data = np.frombuffer(coded[at : frame.end], np.uint8)
        if not frame.has_bitmap:
            out[:] = data
            return
        _blocks(whole)[mask] = _blocks(_whole(data, np.empty(_round_up(nbytes), np.uint8)))
    else:
        rows = _decode_planes(coded, frame, at, (whole, mask, nbytes), scratch)
        _join(frame, rows, mask, whole, elements)
    if whole is not out:
        out[:] = whole[: out.size]


def _decode_planes(
    coded: memoryview,
    frame: Frame,
    at: int,
    base: tuple[Bytes, Mask, int],
    scratch: _Scratch,
) -> list[Bytes]:
    """The planes of whole blocks, coded from `at` on.

    `base` is blocks, their mask and how many bytes matter.
    """
    whole, mask, nbytes = base
    spans = plane_spans(coded, frame, at)
    size = -(-nbytes // frame.width)
    changed = _round_up(nbytes) // BLOCK_BYTES
    exponent = None
    rows: list[Bytes] = []
    planes = scratch.planes(frame.width, changed).reshape(frame.width, -1)
    together = np.frombuffer(coded[at : frame.end], np.uint8)
    done = scratch.coder.decode_most(together, size, planes, scratch.room(1, size))
    for (kind, begin, end), plane, filled in zip(spans, planes, done, strict=True):
        if filled:
            rows.append(plane)
            continue
        part = coded[begin:end]
        if size == plane.size:
            found = scratch.coder.found(kind, part, size)
            if found is not None:
                rows.append(found)  # it need not be copied
                continue
        rows.append(plane)
        if kind == PlaneKind.CONTEXTS and frame.kind is FrameKind.DIFFERENCE:
            if exponent is None:
                exponent = _exponents(_words(whole, frame.width), mask, changed)[:size]
            decode_contexts(part, exponent, scratch.coder, plane[:size])
        else:
            scratch.coder.decode(kind, part, plane[:size])
    return rows


def _join(frame: Frame, rows: list[Bytes], mask: Mask, whole: Bytes, elements: Elements) -> None:
    words = _blocks(whole).view(f"<i{frame.width}")
    planes = kernels.tuple_of(rows)
    if frame.kind is FrameKind.DIFFERENCE:
        bit = kernels.sign_bit(frame.width, frame.sign_place)
        kernels.join_difference(planes, mask, *kernels.ordering(elements), bit, words)
    else:
        kernels.join_raw(planes, mask, elements.is_float, words)


def _mask(coded: memoryview, frame: Frame) -> tuple[Mask, int]:
    """Which blocks a frame codes, and where its payload goes on behind that."""
    blocks = -(-frame.raw_bytes // BLOCK_BYTES)
    if not frame.has_bitmap:
        return _ALL[:blocks], frame.begin
    at = frame.begin + bitmap_bytes(frame)
    if at > frame.end:
        raise DecodeError("a frame ends within its bitmap")
    bits = np.unpackbits(np.frombuffer(coded[frame.begin : at], np.uint8), bitorder="little")
    if not bits.any() or bits[blocks:].any() or bits[:blocks].all():
        raise DecodeError("a frame's bitmap has no block, all, or more than there are")
    return bits[:blocks].view(np.bool_), at
