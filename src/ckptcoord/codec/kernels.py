"""Compiled loops that take tensors apart: changed blocks, differences, byte planes.

Shapes: B blocks of a frame, E elements a block, W bytes an element. A *block* is
delta.BLOCK_BYTES of a tensor. An element of W bytes is a signed integer here, whatever it stands for; `flip` and `sign`
(see `ordering`) say whether it is a float.

A float's bits become an integer that orders as the floats do: neighbouring values are neighbouring
integers, also across zero. Differences are taken modulo 2^(8W), so every bit pattern survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ckptcoord.codec.delta import BLOCK_BYTES
from ckptcoord.codec.detection import Change, detect
from ckptcoord.codec.jit import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ckptcoord.codec.elements import Elements

    Words: TypeAlias = NDArray[np.signedinteger[Any]]
    Planes: TypeAlias = NDArray[np.uint8]
    Mask: TypeAlias = NDArray[np.bool_]

__all__ = [
    "Change",
    "Transforms",
    "changed_blocks",
    "detect",
    "ordering",
    "transforms",
]

_WORDS = BLOCK_BYTES // 8


class Transforms(NamedTuple):
    """The loops for elements of one width. `words` are (B, E), `planes` (W, at least B, E).

    Blocks that `mask` (B,) leaves out are skipped in `words` and have no place in `planes`.

    Attributes:
        split_difference: (new, base, mask, flip, sign, planes): planes of new less base, zigzag.
        join_difference: (planes, mask, flip, sign, out): the inverse; `out` holds the base.
        split_raw: (new, mask, rotate, planes): planes of the bits, rotated left by one if asked,
            which brings an exponent of eight bits into a plane of its own.
        join_raw: (planes, mask, rotate, out): the inverse.
        sample: (new, base, mask, step, flip, sign, bits, fills): looks at every `step`-th block of
            the mask. By what the planes could hold, rotated raw and then difference, (2, W): the
            estimated entropy of their bytes, and their most frequent byte.
    """

    split_difference: Callable[..., int]
    join_difference: Callable[..., int]
    split_raw: Callable[..., int]
    join_raw: Callable[..., int]
    sample: Callable[..., None]


@compiled
def changed_blocks(new: Words, base: Words, mask: Mask) -> int:
    """Which blocks differ in any bit, and how many: (B, 128) of int64, the same, (B,)."""
    count = 0
    for b in range(new.shape[0]):
        differs = np.int64(0)
        for j in range(_WORDS):
            differs |= new[b, j] ^ base[b, j]
        mask[b] = differs != 0
        count += differs != 0
    return count


@compiled
def entropy(counts: NDArray[np.uint32]) -> float:
    """Bits a byte of what bytes were sampled from; they occurred as often as `counts` (256,)."""
    total, different, weighted = 0, 0, 0.0
    for k in range(256):
        if counts[k]:
            total += counts[k]
            different += 1
            weighted += counts[k] * np.log2(counts[k])
    plain = np.log2(total) - weighted / total
    # Miller and Madow: a sample shows too little of a distribution.
    return plain + (different - 1) / (2 * total * np.log(2))


def ordering(elements: Elements) -> tuple[Any, Any]:
    """`flip` and `sign` of elements, as numpy scalars: all bits and the sign bit, or zeros."""
    signed = _SIGNED[elements.width]
    if not elements.is_float:
        return signed(0), signed(0)
    return signed(-1), signed(np.iinfo(signed).min)


def transforms(width: int) -> Transforms:
    """The loops for elements of `width` bytes: 1, 2, 4 or 8."""
    return _TRANSFORMS[width]


# The widths are constants to the compiler: shifts by a variable halve the speed, as do indices that
# it cannot prove to be in order, hence two-dimensional arrays with a constant number of columns.
def _difference(width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    S, U, E, top = _SIGNED[width], _UNSIGNED[width], BLOCK_BYTES // width, 8 * width - 1

    @compiled
    def forward(a: Any, b: Any, flip: Any, sign: Any) -> Any:
        u = S(a ^ S(S(S(a >> top) & flip) | sign))
        v = S(b ^ S(S(S(b >> top) & flip) | sign))
        d = S(u - v)
        return U(S(S(d << 1) ^ S(d >> top)))

    @compiled
    def backward(z: Any, b: Any, flip: Any, sign: Any) -> Any:
        v = S(b ^ S(S(S(b >> top) & flip) | sign))
        d = S(S(U(z >> 1)) ^ S(-S(z & 1)))
        u = S(v + d)
        return S(u ^ S(S(S(~u >> top) & flip) | sign))

    return forward, backward


def _scatter(width: int) -> Callable[..., Any]:
    """Spread a block's integers over the planes."""
    E = BLOCK_BYTES // width

    @compiled
    def scatter(z: Any, planes: Planes, at: int) -> None:
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

    return scatter


def _gather(width: int) -> Callable[..., Any]:
    """Collect a block's integers from the planes."""
    E, U = BLOCK_BYTES // width, _UNSIGNED[width]

    @compiled
    def gather(planes: Planes, at: int, z: Any) -> None:
        p = planes
        if width == 1:
            for j in range(E):
                z[j] = p[0, at, j]
        if width == 2:
            for j in range(E):
                z[j] = U(U(p[0, at, j]) | U(U(p[1, at, j]) << 8))
        if width >= 4:
            for j in range(E):
                low = U(U(p[0, at, j]) | U(U(p[1, at, j]) << 8))
                z[j] = U(low | U(U(U(p[2, at, j]) << 16) | U(U(p[3, at, j]) << 24)))
        if width == 8:
            for j in range(E):
                low = U(U(p[4, at, j]) | U(U(p[5, at, j]) << 8))
                high = U(low | U(U(U(p[6, at, j]) << 16) | U(U(p[7, at, j]) << 24)))
                z[j] = U(z[j] | U(high << 32))

    return gather


def _make(width: int) -> Transforms:
    S, U, E, top = _SIGNED[width], _UNSIGNED[width], BLOCK_BYTES // width, 8 * width - 1
    forward, backward = _difference(width)
    scatter, gather = _scatter(width), _gather(width)

    @compiled
    def split_difference(
        new: Words, base: Words, mask: Mask, flip: Any, sign: Any, planes: Planes
    ) -> int:
        z = np.empty(E, U)
        at = 0
        for b in range(new.shape[0]):
            if mask[b]:
                for j in range(E):
                    z[j] = forward(new[b, j], base[b, j], flip, sign)
                scatter(z, planes, at)
                at += 1
        return at

    @compiled
    def join_difference(planes: Planes, mask: Mask, flip: Any, sign: Any, out: Words) -> int:
        z = np.empty(E, U)
        at = 0
        for b in range(out.shape[0]):
            if mask[b]:
                gather(planes, at, z)
                for j in range(E):
                    out[b, j] = backward(z[j], out[b, j], flip, sign)
                at += 1
        return at

    @compiled
    def split_raw(new: Words, mask: Mask, rotate: bool, planes: Planes) -> int:  # noqa: FBT001
        z = np.empty(E, U)
        at = 0
        for b in range(new.shape[0]):
            if mask[b]:
                if rotate:
                    for j in range(E):
                        z[j] = U(U(U(new[b, j]) << 1) | U(U(new[b, j]) >> top))
                else:
                    for j in range(E):
                        z[j] = U(new[b, j])
                scatter(z, planes, at)
                at += 1
        return at

    @compiled
    def join_raw(planes: Planes, mask: Mask, rotate: bool, out: Words) -> int:  # noqa: FBT001
        z = np.empty(E, U)
        at = 0
        for b in range(out.shape[0]):
            if mask[b]:
                gather(planes, at, z)
                if rotate:
                    for j in range(E):
                        out[b, j] = S(U(z[j] >> 1) | U(z[j] << top))
                else:
                    for j in range(E):
                        out[b, j] = S(z[j])
                at += 1
        return at

    @compiled
    def sample(
        new: Words, base: Words, mask: Mask, step: int, flip: Any, sign: Any, bits: Any, fills: Any
    ) -> None:
        counts = np.zeros((2, width, 256), np.uint32)
        seen = 0
        for b in range(new.shape[0]):
            if mask[b]:
                if seen % step == 0:
                    for j in range(E):
                        u = U(new[b, j])
                        raw = U(U(u << 1) | U(u >> top)) if flip != 0 else u
                        z = forward(new[b, j], base[b, j], flip, sign)
                        for k in range(width):
                            counts[0, k, (raw >> (8 * k)) & 255] += 1
                            counts[1, k, (z >> (8 * k)) & 255] += 1
                seen += 1
        for t in range(2):
            for k in range(width):
                bits[t, k] = entropy(counts[t, k])
                fills[t, k] = np.argmax(counts[t, k])

    return Transforms(split_difference, join_difference, split_raw, join_raw, sample)


_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_TRANSFORMS = {width: _make(width) for width in _SIGNED}
