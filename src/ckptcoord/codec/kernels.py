"""Compiled loops that take tensors apart: changed blocks, differences, byte planes.

Shapes: B blocks of a frame, E elements a block, W bytes an element. A *block* is BLOCK_BYTES of a
tensor; blocks that a mask (B,) leaves out are skipped, and have no place in planes. An element is a
signed integer here, whatever it stands for; `flip` and `sign` (see `ordering`) say whether it is a
float.

A float's bits become an integer that orders as the floats do: neighbouring values are neighbouring
integers, also across zero. Differences are taken modulo 2^(8W), so every bit pattern survives.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ckptcoord.codec.delta import BLOCK_BYTES
from ckptcoord.codec.detection import Change, detect
from ckptcoord.codec.jit import compiled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ckptcoord.codec.elements import Elements
    from ckptcoord.codec.jit import Value

    Words: TypeAlias = NDArray[np.signedinteger[Any]]
    Planes: TypeAlias = NDArray[np.uint8]
    Mask: TypeAlias = NDArray[np.bool_]

__all__ = [
    "PAYS_BITS",
    "Change",
    "changed_blocks",
    "detect",
    "entropy",
    "forward",
    "join_difference",
    "join_raw",
    "ordering",
    "rotated",
    "sign_bit",
    "split_difference",
    "split_raw",
    "tuple_of",
    "warm",
    "width_of",
]

_WORDS = BLOCK_BYTES // 8
_FIRST_WORDS = 8
_MISSING = 8 * (np.frombuffer(b"", np.uint8),)
_COUNTS = np.arange(4096.0)
_WEIGHTED = _COUNTS * np.log2(np.maximum(_COUNTS, 1))  # a count times its logarithm
PAYS_BITS = 7.95  # entropy of a byte above which a plane, or a part of it, is left as it is


@compiled
def changed_blocks(new: Words, base: Words, mask: Mask) -> int:
    """Which blocks differ in any bit, and how many: (B, 128) of int64, the same, (B,)."""
    count = 0
    for b in range(new.shape[0]):
        differs = np.int64(0)
        for j in range(_FIRST_WORDS):  # where all change, one cache line tells
            differs |= new[b, j] ^ base[b, j]
        if differs == 0:
            for j in range(_FIRST_WORDS, _WORDS):
                differs |= new[b, j] ^ base[b, j]
        mask[b] = differs != 0
        count += differs != 0
    return count


@compiled
def entropy(counts: NDArray[np.uint32]) -> float:
    """Bits a byte of what bytes were sampled from; they occurred as often as `counts` (256,)."""
    total, different, weighted = 0, 0, 0.0
    for k in range(256):
        count = counts[k]
        total += count
        different += count != 0
        weighted += _WEIGHTED[count] if count < _WEIGHTED.size else count * np.log2(count)
    plain = np.log2(total) - weighted / total
    # Miller and Madow: a sample shows too little of a distribution.
    bits: float = plain + (different - 1) / (2 * total * np.log(2))
    return bits


@cache
def ordering(elements: Elements) -> tuple[Any, Any]:
    """`flip` and `sign` of elements, as numpy scalars: all bits and the sign bit, or zeros."""
    signed = _SIGNED[elements.width]
    if not elements.is_float:
        return signed(0), signed(0)
    return signed(-1), signed(np.iinfo(signed).min)


@cache
def sign_bit(width: int, place: int) -> Value:
    """The bit that `Frame.sign_place` gives to signs, as a numpy scalar."""
    bit = 1 << max(8 * place - 1, 0)
    return np.array(bit, np.dtype(f"u{width}")).view(_SIGNED[width])[()]


def tuple_of(planes: Iterable[Planes]) -> tuple[Planes, ...]:
    """Planes, each with the bytes of all blocks, as `join_*` take them: one type for all widths."""
    rows = [plane.view() for plane in planes]
    for row in rows:
        row.flags.writeable = False
    return (*rows, *_MISSING[len(rows) :])


def warm() -> None:
    """Compile all that encoding, decoding and detection run, or load it from disk."""
    from ckptcoord.codec.delta import Level, decode, encode

    rng = np.random.default_rng(0)
    for dtype, width in (("F8_E4M3", 1), ("BF16", 2), ("F32", 4), ("F64", 8), ("F16", 2)):
        base = rng.integers(0, 256, 2 * BLOCK_BYTES * width, dtype=np.uint8)
        near = base.copy()
        near[::width] ^= rng.integers(0, 3, near[::width].size, dtype=np.uint8)
        sparse = np.zeros_like(base)
        sparse[width::512] = 1
        for new, under in ((near, base), (near, None), (near // 32, None), (sparse, None)):
            for level in Level:
                out = base.copy()
                decode(memoryview(encode(new, under, dtype=dtype, level=level)), out, dtype=dtype)
        detect(near, base, dtype=dtype)


# One source for all widths: the compiler knows the type, and folds what depends on it. Loops are
# over the columns of two-dimensional arrays, of a constant number: it does not vectorise others.


@compiled
def width_of(T: Value) -> int:
    """Bytes of a type, as a constant: where it has room for a bit beyond 1, 2 and 4 of them."""
    width: int = 1 + (T(1 << 8) != 0) + 2 * (T(1 << 16) != 0) + 4 * (T(1 << 32) != 0)
    return width


@compiled
def forward(T: Value, new: Value, base: Value, flip: Value, sign: Value, bit: Value) -> Value:
    """Difference of two integers: how far from 0 or -1 it is, and where `bit` is set, its sign.

    So small ones of either sign become small. With the lowest bit that is zigzag.
    """
    d = T(_ordered(T, new, flip, sign) - _ordered(T, base, flip, sign))
    s = T(-T(d < 0))
    m = T(d ^ s)
    below = T(bit - T(1))
    return T(T(m & below) | T(T(s & bit) | T(T(m << 1) & T(~T(below | bit)))))


@compiled
def _backward(T: Value, z: Value, base: Value, flip: Value, sign: Value, bit: Value) -> Value:
    below = T(bit - T(1))
    m = T(T(z & below) | _half(T, T(z & T(~T(below | bit)))))
    d = T(m ^ T(-T(T(z & bit) != 0)))
    u = T(_ordered(T, base, flip, sign) + d)
    return T(u ^ T(T(T(-T(u >= 0)) & flip) | sign))


@compiled
def _ordered(T: Value, v: Value, flip: Value, sign: Value) -> Value:
    return T(v ^ T(T(T(-T(v < 0)) & flip) | sign))


@compiled
def _half(T: Value, z: Value) -> Value:
    """All bits one place down."""
    top = T(T(1) << (8 * width_of(T) - 1))
    return T(T(z >> 1) & T(~top))


@compiled
def rotated(T: Value, u: Value) -> Value:
    """An integer with its sign in the lowest bit: all others one place up."""
    return T(T(u << 1) | T(u < 0))


@compiled
def _rotated_back(T: Value, z: Value) -> Value:
    top = T(T(1) << (8 * width_of(T) - 1))
    return T(_half(T, z) | T(T(-T(z & 1)) & top))


@compiled
def _scatter(z: Words, planes: Planes, at: int) -> None:  # noqa: C901, PLR0912 (a loop a plane)
    """Spread a block's integers over the planes."""
    width = width_of(z.dtype.type)
    E = BLOCK_BYTES // width
    for j in range(E):
        planes[0, at, j] = np.uint8(z[j])
    if width > 1:
        for j in range(E):
            planes[1, at, j] = np.uint8(z[j] >> 8)
    if width > 2:
        for j in range(E):
            planes[2, at, j] = np.uint8(z[j] >> 16)
        for j in range(E):
            planes[3, at, j] = np.uint8(z[j] >> 24)
    if width > 4:
        for j in range(E):
            planes[4, at, j] = np.uint8(z[j] >> 32)
        for j in range(E):
            planes[5, at, j] = np.uint8(z[j] >> 40)
        for j in range(E):
            planes[6, at, j] = np.uint8(z[j] >> 48)
        for j in range(E):
            planes[7, at, j] = np.uint8(z[j] >> 56)


@compiled
def _gather(planes: Value, begin: int, z: Words) -> None:  # noqa: C901 (a loop a width)
    """Collect the integers of a block, which begins there in each plane."""
    width = width_of(z.dtype.type)
    T = z.dtype.type
    E = BLOCK_BYTES // width
    if width == 1:
        a = planes[0][begin : begin + E]
        for j in range(E):
            z[j] = T(a[j])
    if width == 2:
        a = planes[0][begin : begin + E]
        b = planes[1][begin : begin + E]
        for j in range(E):
            z[j] = T(T(a[j]) | T(T(b[j]) << 8))
    if width >= 4:
        a = planes[0][begin : begin + E]
        b = planes[1][begin : begin + E]
        c = planes[2][begin : begin + E]
        d = planes[3][begin : begin + E]
        for j in range(E):
            low = T(T(a[j]) | T(T(b[j]) << 8))
            z[j] = T(low | T(T(T(c[j]) << 16) | T(T(d[j]) << 24)))
    if width == 8:
        e = planes[4][begin : begin + E]
        f = planes[5][begin : begin + E]
        g = planes[6][begin : begin + E]
        h = planes[7][begin : begin + E]
        for j in range(E):
            low = T(T(e[j]) | T(T(f[j]) << 8))
            high = T(low | T(T(T(g[j]) << 16) | T(T(h[j]) << 24)))
            z[j] = T(z[j] | T(high << 32))


@compiled
def split_difference(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    new: Words, base: Words, mask: Mask, flip: Value, sign: Value, bit: Value, planes: Planes
) -> None:
    """Planes (W, at least as many blocks as are in the mask, E) of `new` less `base` (B, E).

    The difference's sign becomes `bit` of each integer.
    """
    T = new.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, new.dtype)
    to = 0
    for b in range(new.shape[0]):
        if mask[b]:
            for j in range(E):
                z[j] = forward(T, new[b, j], base[b, j], flip, sign, bit)
            _scatter(z, planes, to)
            to += 1


@compiled
def join_difference(
    planes: Value, mask: Mask, flip: Value, sign: Value, bit: Value, out: Words
) -> None:
    """The inverse of `split_difference`; `out` (B, E) holds the base, `planes` is of `tuple_of`."""
    T = out.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, out.dtype)
    block = 0
    for b in range(out.shape[0]):
        if mask[b]:
            _gather(planes, block * E, z)
            for j in range(E):
                out[b, j] = _backward(T, z[j], out[b, j], flip, sign, bit)
            block += 1


@compiled
def split_raw(new: Words, mask: Mask, rotate: bool, planes: Planes) -> None:  # noqa: FBT001
    """Planes of the bits of `new` (B, E), each element rotated left by one if asked.

    That brings an exponent of eight bits into a plane of its own.
    """
    T = new.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, new.dtype)
    at = 0
    for b in range(new.shape[0]):
        if mask[b]:
            for j in range(E):
                z[j] = rotated(T, new[b, j]) if rotate else new[b, j]
            _scatter(z, planes, at)
            at += 1


@compiled
def join_raw(planes: Value, mask: Mask, rotate: bool, out: Words) -> None:  # noqa: FBT001
    """The inverse of `split_raw`; `planes` is of `tuple_of`."""
    T = out.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, out.dtype)
    at = 0
    for b in range(out.shape[0]):
        if mask[b]:
            _gather(planes, at * E, z)
            for j in range(E):
                out[b, j] = _rotated_back(T, z[j]) if rotate else z[j]
            at += 1


_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
