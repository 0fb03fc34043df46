"""The delta codec: a tensor's bytes as frames, alone or against the bytes of a base.

    decode(encode(new, base), out=base) == new, bit for bit, whatever the bytes stand for.

A frame codes at most FRAME_BYTES of a tensor and carries its own checksum. How it does so is chosen
from its data, frame by frame and plane by plane; a name decides nothing. docs/codec.md has the
layout. This module walks frames; `frames` codes them, and is imported late, since numba takes a
second.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from ckptcoord.codec.elements import elements_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

FRAME_BYTES = 1 << 20
MAX_FRAME_BYTES = 4 << 20
HEADER = struct.Struct("<BBHIIQ")  # kind, width, flags, raw bytes, payload bytes, checksum
PLANE_HEADER = struct.Struct("<BI")  # kind, bytes
CHECKED_BYTES = HEADER.size - 8  # of the header, by the checksum
HAS_BITMAP = 1  # the lowest flag
SIGN_SHIFT, SIGN_MASK = 1, 0b11110  # flags that say where the signs of differences are
BLOCK_BYTES = 1024  # what one bit of a bitmap stands for


class Level(StrEnum):
    """How much time a smaller result is worth; both are exact."""

    AUTO = "auto"
    AGGRESSIVE = "aggressive"


class FrameKind(IntEnum):
    """What the planes of a frame hold; the numbers are the format's."""

    UNCHANGED = 0
    STORED = 1
    RAW = 2
    DIFFERENCE = 3


class PlaneKind(IntEnum):
    """How a plane is stored; the numbers are the format's.

    VERBATIM: its bytes. SPARSE: one byte everywhere, but for a few exceptions. ZSTD: a zstandard
    frame. MASKED: where one byte is not, and what is there. CONTEXTS: its bytes, sorted by the
    exponents of the base.
    """

    VERBATIM = 0
    SPARSE = 1
    ZSTD = 2
    MASKED = 3
    CONTEXTS = 4


_KINDS = frozenset(FrameKind)
_PLANE_NAMES = {int(kind): kind.name.lower() for kind in PlaneKind}


class DecodeError(ValueError):
    """Bytes that are no frames of the tensor they are decoded for.

    Attributes:
        why: what about them is wrong.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame's header, and where its payload is.

    Attributes:
        sign_place: of differences: 0 for their lowest bit, p + 1 for the highest of plane p.
        begin: of the payload in the coded bytes.
        end: of the payload.
    """

    kind: FrameKind
    width: int
    has_bitmap: bool
    sign_place: int
    raw_bytes: int
    begin: int
    end: int

    @property
    def needs_base(self) -> bool:
        """Whether it codes something of the tensor by what the base has there."""
        return self.has_bitmap or self.kind in (FrameKind.UNCHANGED, FrameKind.DIFFERENCE)


def encode(
    new: NDArray[np.uint8],
    base: NDArray[np.uint8] | None,
    *,
    dtype: str,
    level: Level = Level.AUTO,
    threads: int = 1,
) -> bytes:
    """Code a tensor's bytes (N,), against those of a base (N,) if there is one.

    Args:
        new: contiguous.
        base: contiguous.
        dtype: of the elements, by safetensors' name. It decides how well, not whether, the bytes
            are kept: there may be any number of them.
        level: how much time to spend.
        threads: that work on frames, the caller's among them.

    Raises:
        ConfigError: the dtype is unknown, or the base has another size.
    """
    from ckptcoord.codec.frames import encode_frames

    return encode_frames(new, base, elements_of(dtype), Level(level), threads)


def decode(
    coded: memoryview,
    out: NDArray[np.uint8],
    *,
    dtype: str,
    threads: int = 1,
    proven: bool = False,
) -> None:
    """Turn the base's bytes into the tensor's, in place.

    Args:
        coded: what `encode` gave.
        out: contiguous; the base's bytes where `needs_base(coded)`, else anything. After an error
            its content is undefined.
        dtype: as for `encode`.
        threads: as for `encode`.
        proven: the caller holds the result to a digest or fingerprint of its own, so that frames
            need not be held to their checksums. Damage is then found there, if not before.

    Raises:
        DecodeError: `coded` is damaged, or is of a tensor of another size or dtype.
        ConfigError: the dtype is unknown.
    """
    from ckptcoord.codec.frames import decode_frames

    elements = elements_of(dtype)
    found = list(frames(coded))
    if sum(frame.raw_bytes for frame in found) != out.size:
        raise DecodeError(f"the frames are not of {out.size} bytes")
    for frame in found:
        if frame.width != elements.width:
            raise DecodeError(f"a frame has elements of {frame.width} bytes, not {elements.width}")
    decode_frames(coded, found, out, elements, threads, proven=proven)


def needs_base(coded: memoryview) -> bool:
    """Whether any frame needs the base's bytes. Only headers are read; no checksum is.

    Raises:
        DecodeError: the headers are not sound.
    """
    return any(frame.needs_base for frame in frames(coded))


def check_frames(coded: memoryview, nbytes: int, *, dtype: str, has_base: bool) -> None:
    """Check all of coded bytes that can be without decoding any; no checksum is.

    What passes is `nbytes` bytes of a tensor to `decode`, unless a checksum or a plane's content is
    wrong.

    Args:
        coded: what `encode` gave.
        nbytes: of the tensor.
        dtype: as for `encode`.
        has_base: whether `decode` will find a base's bytes in `out`.

    Raises:
        DecodeError: `coded` is not sound, is of a tensor of another size or dtype, or needs a base.
        ConfigError: the dtype is unknown.
    """
    width, total = elements_of(dtype).width, 0
    for frame in frames(coded):
        total += frame.raw_bytes
        if frame.width != width:
            raise DecodeError(f"a frame has elements of {frame.width} bytes, not {width}")
        if frame.needs_base and not has_base:
            raise DecodeError("a frame needs a base, and there is none")
        if frame.kind is not FrameKind.UNCHANGED:
            _check_payload(coded, frame)
    if total != nbytes:
        raise DecodeError(f"the frames are not of {nbytes} bytes")


def _check_payload(coded: memoryview, frame: Frame) -> None:
    """Whether the parts of a frame that codes something fill it and are of known kinds."""
    at, size = frame.begin, frame.raw_bytes
    if frame.has_bitmap:
        at += bitmap_bytes(frame)
        if at > frame.end:
            raise DecodeError("a frame ends within its bitmap")
        size = _marked_bytes(int.from_bytes(coded[frame.begin : at], "little"), frame.raw_bytes)
    if frame.kind is FrameKind.STORED:
        if frame.end - at != size:
            raise DecodeError("a stored frame has another size")
        return
    for kind, begin, end in plane_spans(coded, frame, at):
        if kind not in _PLANE_NAMES:
            raise DecodeError(f"a plane has the unknown kind {kind}")
        if kind == PlaneKind.VERBATIM and end - begin != -(-size // frame.width):
            raise DecodeError("a verbatim plane has another size")


def _marked_bytes(bitmap: int, nbytes: int) -> int:
    """Bytes of a frame of `nbytes` that are in the blocks of its bitmap."""
    blocks = -(-nbytes // BLOCK_BYTES)
    if not 0 < bitmap < (1 << blocks) - 1:
        raise DecodeError("a frame's bitmap has no block, all, or more than there are")
    missing = blocks * BLOCK_BYTES - nbytes if bitmap >> (blocks - 1) else 0
    return bitmap.bit_count() * BLOCK_BYTES - missing


def summary(coded: memoryview) -> dict[str, int]:
    """How many coded bytes there are of each kind.

    The keys are `header`, `bitmap`, `unchanged` and `stored`, and `raw` and `difference` with the
    planes' kinds behind them: `difference.verbatim`. Only those that occur are there.

    Raises:
        DecodeError: the headers are not sound.
    """
    sizes: Counter[str] = Counter()
    for frame in frames(coded):
        kind = frame.kind.name.lower()
        at = frame.begin
        sizes["header"] += HEADER.size
        if frame.has_bitmap:
            sizes["bitmap"] += (bitmap := bitmap_bytes(frame))
            at += bitmap
        if frame.kind is FrameKind.UNCHANGED:
            continue
        if frame.kind is FrameKind.STORED:
            sizes[kind] += frame.end - at
            continue
        sizes["header"] += frame.width * PLANE_HEADER.size
        for plane, begin, end in plane_spans(coded, frame, at):
            sizes[f"{kind}.{_PLANE_NAMES.get(plane, 'unknown')}"] += end - begin
    return dict(sizes)


def frames(coded: memoryview) -> Iterator[Frame]:
    """The frames, by their headers alone.

    Raises:
        DecodeError: a header is not sound, or the bytes end within a frame.
    """
    at = 0
    while at < len(coded):
        if len(coded) - at < HEADER.size:
            raise DecodeError("the bytes end within a frame's header")
        yield (frame := _frame(coded, at))
        at = frame.end


def _frame(coded: memoryview, at: int) -> Frame:
    kind, width, flags, raw_bytes, payload_bytes, _ = HEADER.unpack_from(coded, at)
    begin = at + HEADER.size
    known = HAS_BITMAP | (SIGN_MASK if kind == FrameKind.DIFFERENCE else 0)
    sign_place = (flags & SIGN_MASK) >> SIGN_SHIFT
    if kind not in _KINDS or width not in (1, 2, 4, 8) or flags & ~known or sign_place > width:
        raise DecodeError(f"a frame's header begins with {kind}, {width}, {flags}")
    if not 0 < raw_bytes <= MAX_FRAME_BYTES:
        raise DecodeError(f"a frame claims {raw_bytes} bytes, {MAX_FRAME_BYTES} at most")
    if payload_bytes > len(coded) - begin:
        raise DecodeError("the bytes end within a frame")
    frame = Frame(
        kind=FrameKind(kind),
        width=width,
        has_bitmap=bool(flags & HAS_BITMAP),
        sign_place=sign_place,
        raw_bytes=raw_bytes,
        begin=begin,
        end=begin + payload_bytes,
    )
    if frame.kind is FrameKind.UNCHANGED and (payload_bytes or frame.has_bitmap):
        raise DecodeError("an unchanged frame has a payload")
    return frame


def bitmap_bytes(frame: Frame) -> int:
    """Bytes of a frame's bitmap: a bit for each block, the last of which may be short."""
    return -(-frame.raw_bytes // (8 * BLOCK_BYTES))


def plane_spans(coded: memoryview, frame: Frame, at: int) -> list[tuple[int, int, int]]:
    """Kind, begin and end of each plane of a frame whose plane headers are at `at`.

    Raises:
        DecodeError: they do not fill the payload exactly.
    """
    begin = at + frame.width * PLANE_HEADER.size
    if begin > frame.end:
        raise DecodeError("a frame ends within its planes' headers")
    spans: list[tuple[int, int, int]] = []
    for number in range(frame.width):
        kind, size = PLANE_HEADER.unpack_from(coded, at + number * PLANE_HEADER.size)
        spans.append((kind, begin, begin + size))
        begin += size
    if begin != frame.end:
        raise DecodeError("a frame's planes do not fill it")
    return spans
