"""Masked planes: where a byte is not the most frequent one, and what is there instead.

A word of eight bytes is worked on at a time: those that a byte's bits choose go to its low end, or
from there to their places. Where the processor has an instruction for that, it is used.

Shapes: N bytes of a plane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.jit import (
    HAS_BIT_MOVES,
    Value,
    compiled,
    count_bits,
    gather_bits,
    load64,
    spread_bits,
    store64,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Plane: TypeAlias = NDArray[np.uint8]
    Word: TypeAlias = Value  # of 64 bits

SPARE = 8  # bytes behind what `mask_plane` writes and `unmask_plane` reads, which both touch
U64 = np.uint64
I64: Value = np.int64  # of unsigned ones: with others they would make floats
EACH, _TOPS = U64(0x0101010101010101), U64(0x8080808080808080)


def _moves() -> NDArray[np.uint64]:
    """For each bits of eight bytes, which bytes that are, and which go down by 1, then 2, then 4.

    (256, 4), as masks of words. Where a byte's bit is set, it goes down past those where it is not.
    """
    table = np.zeros((256, 4), np.uint64)
    for bits in range(256):
        chosen = [j for j in range(8) if bits >> j & 1]
        table[bits, 0] = sum(255 << (8 * j) for j in chosen)
        for stage in range(3):
            # Having gone by the lower digits of its way, a byte is here.
            here = [j - ((j - to) & ((1 << stage) - 1)) for to, j in enumerate(chosen)]
            goes = [(j - to) >> stage & 1 for to, j in enumerate(chosen)]
            table[bits, 1 + stage] = sum(
                255 << (8 * h) for h, g in zip(here, goes, strict=True) if g
            )
    return table


_MOVES = _moves()


@compiled
def gathered_by_table(word: Word, bits: Word) -> Word:
    """The bytes of a word that the lowest eight bits choose, at its low end; zeros above."""
    word &= _MOVES[bits, 0]
    goes = word & _MOVES[bits, 1]
    word = (word ^ goes) | (goes >> U64(8))
    goes = word & _MOVES[bits, 2]
    word = (word ^ goes) | (goes >> U64(16))
    goes = word & _MOVES[bits, 3]
    return (word ^ goes) | (goes >> U64(32))


@compiled
def spread_by_table(word: Word, bits: Word) -> Word:
    """The inverse: bytes from its low end to where the bits are; zeros elsewhere."""
    goes = word & (_MOVES[bits, 3] >> U64(32))
    word = (word & ~(_MOVES[bits, 3] | goes)) | (goes << U64(32))
    goes = word & (_MOVES[bits, 2] >> U64(16))
    word = (word & ~(_MOVES[bits, 2] | goes)) | (goes << U64(16))
    goes = word & (_MOVES[bits, 1] >> U64(8))
    word = (word & ~(_MOVES[bits, 1] | goes)) | (goes << U64(8))
    return word & _MOVES[bits, 0]


@compiled
def gathered_at_once(word: Word, bits: Word) -> Word:
    """As `gathered_by_table`, by an instruction."""
    return gather_bits(word, _chosen(bits))


@compiled
def spread_at_once(word: Word, bits: Word) -> Word:
    """As `spread_by_table`, by an instruction."""
    return spread_bits(word, _chosen(bits))


@compiled
def _chosen(bits: Word) -> Word:
    """The bytes that eight bits choose, as a mask."""
    return spread_bits(bits, EACH) * U64(255)


_gathered: Value = gathered_at_once if HAS_BIT_MOVES else gathered_by_table
_spread: Value = spread_at_once if HAS_BIT_MOVES else spread_by_table


@compiled
def mask_plane(plane: Plane, fill: int, bitmap: Plane, values: Plane) -> int:
    """Mark where a plane (N,) is not `fill`, lowest bit first; what is there goes to `values`.

    `bitmap` has a bit for each byte; `values` (at least N + SPARE,) gets as many as are returned.
    """
    rows = plane.size // 8
    found = U64(0)
    for r in range(rows):
        word = load64(plane, U64(8 * r))
        differs = word ^ (U64(fill) * EACH)
        differs = (((differs & ~_TOPS) + ~_TOPS) | differs) & _TOPS  # the top of each that does
        bits = ((differs >> U64(7)) * U64(0x0102040810204080)) >> U64(56)
        bitmap[r] = bits
        store64(values, found, _gathered(word, bits))
        found += count_bits(bits)
    if 8 * rows < plane.size:
        left = 0
        for i in range(8 * rows, plane.size):
            values[found] = plane[i]
            other = plane[i] != np.uint8(fill)
            left |= other << (i - 8 * rows)
            found += U64(other)
        bitmap[rows] = left
    return int(found)


@compiled
def unmask_plane(bitmap: Plane, values: Plane, fill: int, out: Plane) -> None:
    """The inverse of `mask_plane`; `values` has SPARE bytes more than there are bits."""
    rows = out.size // 8
    at = U64(0)
    for r in range(rows):
        bits = U64(bitmap[r])
        elsewhere = _spread(U64(255) * EACH, bits) ^ (U64(255) * EACH)
        word = _spread(load64(values, at), bits) | (elsewhere & (U64(fill) * EACH))
        store64(out, U64(8 * r), word)
        at += count_bits(bits)
    for i in range(8 * rows, out.size):
        differs = (I64(bitmap[rows]) >> (i - 8 * rows)) & 1
        out[i] = fill ^ ((fill ^ values[at]) & -differs)
        at += U64(differs)


@compiled
def count_ones(bitmap: Plane) -> int:
    """How many bits are set."""
    count = 0
    words = bitmap.size // 8
    for i in range(words):
        word = load64(bitmap, U64(8 * i))
        count += I64(count_bits(word))
    for i in range(8 * words, bitmap.size):
        count += I64(count_bits(U64(bitmap[i])))
    return count
