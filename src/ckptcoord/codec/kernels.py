"""Compiled loops that take tensors apart: changed blocks, differences, byte planes.

Shapes: B blocks of a frame, E elements a block, W bytes an element. A *block* is BLOCK_BYTES of a
tensor; blocks that a mask (B,) leaves out are skipped, and have no place in planes. An element is a
signed integer here, whatever it stands for; `flip` and `sign` (see `ordering`) say whether it is a
float.

A float's bits become an integer that orders as the floats do: neighbouring values are neighbouring
integers, also across zero. Differences are taken modulo 2^(8W), so every bit pattern survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ckptcoord.codec.delta import BLOCK_BYTES
from ckptcoord.codec.detection import Change, detect
from ckptcoord.codec.jit import compiled

if TYPE_CHECKING:
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
    "join_difference",
    "join_raw",
    "ordering",
    "sample",
    "sign_at",
    "split_difference",
    "split_raw",
    "warm",
    "width_of",
]

_WORDS = BLOCK_BYTES // 8
_FIRST_WORDS = 8
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


def ordering(elements: Elements) -> tuple[Any, Any]:
    """`flip` and `sign` of elements, as numpy scalars: all bits and the sign bit, or zeros."""
    signed = _SIGNED[elements.width]
    if not elements.is_float:
        return signed(0), signed(0)
    return signed(-1), signed(np.iinfo(signed).min)


def sign_at(width: int, place: int) -> Value:
    """The bit where `Frame.sign_place` has the signs, as a numpy scalar; -1 if it is negative."""
    return _SIGNED[width](8 * place - 1 if place > 0 else place)


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
def _forward(T: Value, new: Value, base: Value, flip: Value, sign: Value) -> Value:
    """Difference of two integers, zigzag: small ones of either sign become small."""
    u = T(new ^ T(T(T(-T(new < 0)) & flip) | sign))
    v = T(base ^ T(T(T(-T(base < 0)) & flip) | sign))
    d = T(u - v)
    return T(T(d << 1) ^ T(-T(d < 0)))


@compiled
def _backward(T: Value, z: Value, base: Value, flip: Value, sign: Value) -> Value:
    v = T(base ^ T(T(T(-T(base < 0)) & flip) | sign))
    d = T(_half(T, z) ^ T(-T(z & 1)))
    u = T(v + d)
    return T(u ^ T(T(T(-T(u >= 0)) & flip) | sign))


@compiled
def _turned(T: Value, z: Value, at: Value) -> Value:
    """The lowest bit, which is the difference's sign, moved up to bit `at`; those between, down."""
    low = T(T(T(2) << at) - T(1))
    return T(T(z & T(~low)) | T(_half(T, T(z & low)) | T(T(z & 1) << at)))


@compiled
def _turned_back(T: Value, z: Value, at: Value) -> Value:
    low = T(T(T(2) << at) - T(1))
    return T(T(z & T(~low)) | T(T(T(z << 1) & low) | T(T(z >> at) & 1)))


@compiled
def _half(T: Value, z: Value) -> Value:
    """All bits one place down."""
    top = T(T(1) << (8 * width_of(T) - 1))
    return T(T(z >> 1) & T(~top))


@compiled
def _rotated(T: Value, u: Value) -> Value:
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
def _gather(planes: Planes, at: int, z: Words) -> None:  # noqa: C901 (a loop a width)
    """Collect a block's integers from the planes."""
    p = planes
    width = width_of(z.dtype.type)
    T = z.dtype.type
    E = BLOCK_BYTES // width
    if width == 1:
        for j in range(E):
            z[j] = T(p[0, at, j])
    if width == 2:
        for j in range(E):
            z[j] = T(T(p[0, at, j]) | T(T(p[1, at, j]) << 8))
    if width >= 4:
        for j in range(E):
            low = T(T(p[0, at, j]) | T(T(p[1, at, j]) << 8))
            z[j] = T(low | T(T(T(p[2, at, j]) << 16) | T(T(p[3, at, j]) << 24)))
    if width == 8:
        for j in range(E):
            low = T(T(p[4, at, j]) | T(T(p[5, at, j]) << 8))
            high = T(low | T(T(T(p[6, at, j]) << 16) | T(T(p[7, at, j]) << 24)))
            z[j] = T(z[j] | T(high << 32))


@compiled
def split_difference(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    new: Words, base: Words, mask: Mask, flip: Value, sign: Value, at: Value, planes: Planes
) -> None:
    """Planes (W, at least as many blocks as are in the mask, E) of `new` less `base` (B, E).

    The difference's sign becomes bit `at` of each integer.
    """
    T = new.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, new.dtype)
    to = 0
    for b in range(new.shape[0]):
        if mask[b]:
            for j in range(E):
                z[j] = _turned(T, _forward(T, new[b, j], base[b, j], flip, sign), at)
            _scatter(z, planes, to)
            to += 1


@compiled
def join_difference(
    planes: Planes, mask: Mask, flip: Value, sign: Value, at: Value, out: Words
) -> None:
    """The inverse of `split_difference`; `out` (B, E) holds the base."""
    T = out.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, out.dtype)
    block = 0
    for b in range(out.shape[0]):
        if mask[b]:
            _gather(planes, block, z)
            for j in range(E):
                out[b, j] = _backward(T, _turned_back(T, z[j], at), out[b, j], flip, sign)
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
                z[j] = _rotated(T, new[b, j]) if rotate else new[b, j]
            _scatter(z, planes, at)
            at += 1


@compiled
def join_raw(planes: Planes, mask: Mask, rotate: bool, out: Words) -> None:  # noqa: FBT001
    """The inverse of `split_raw`."""
    T = out.dtype.type
    E = BLOCK_BYTES // width_of(T)
    z = np.empty(E, out.dtype)
    at = 0
    for b in range(out.shape[0]):
        if mask[b]:
            _gather(planes, at, z)
            for j in range(E):
                out[b, j] = _rotated_back(T, z[j]) if rotate else z[j]
            at += 1


@compiled
def sample(  # noqa: PLR0913, PLR0917 (as above)
    new: Words,
    base: Words,
    mask: Mask,
    step: int,
    flip: Value,
    sign: Value,
    at: Value,
    bits: Value,
    fills: Value,
) -> float:
    """Look at every `step`-th block of the mask, as it is or as a difference.

    That has its sign at bit `at`; where `at` is negative, elements stay (rotated, if floats).

    Gives by plane the most frequent byte, (W,), and for P parts of the blocks, one after another,
    the estimated entropy of the plane's bytes, (W, P). Returns how many bits an element will take.
    """
    T = new.dtype.type
    width = width_of(T)
    parts = bits.shape[1]
    counts = np.zeros((parts, width, 256), np.uint32)
    z = np.empty(BLOCK_BYTES // width, new.dtype)
    changed = np.count_nonzero(mask)
    seen = 0
    for b in range(new.shape[0]):
        if mask[b]:
            if seen % step == 0:
                _sampled(T, new[b], base[b], flip, sign, at, z)
                _count(z, counts[seen * parts // changed])
            seen += 1
    cost = 0.0
    for k in range(width):
        total = counts[0, k]
        for p in range(parts):
            bits[k, p] = entropy(counts[p, k])
            cost += (bits[k, p] if bits[k, p] < PAYS_BITS else 8.0) / parts
            if p:
                total += counts[p, k]
        fills[k] = np.argmax(total)
    return cost


@compiled
def _sampled(  # noqa: PLR0913, PLR0917 (as above)
    T: Value, new: Words, base: Words, flip: Value, sign: Value, at: Value, z: Words
) -> None:
    if at >= 0:
        for j in range(z.size):
            z[j] = _turned(T, _forward(T, new[j], base[j], flip, sign), at)
    elif flip != 0:
        for j in range(z.size):
            z[j] = _rotated(T, new[j])
    else:
        for j in range(z.size):
            z[j] = new[j]


@compiled
def _count(z: Words, counts: NDArray[np.uint32]) -> None:
    """Count the bytes of integers by their planes, (W, 256)."""
    width = width_of(z.dtype.type)
    for j in range(z.size):
        for k in range(width):
            counts[k, np.uint64((z[j] >> (8 * k)) & 255)] += np.uint32(1)


_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
