"""Looks at a frame before it is coded: what has changed, and what its planes had best hold.

Shapes: B blocks of a frame, E elements a block, W bytes an element, P equal parts of a plane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.delta import BLOCK_BYTES, FrameKind
from ckptcoord.codec.huffman import BLOCK
from ckptcoord.codec.jit import Value, compiled, inlined
from ckptcoord.codec.kernels import PAYS_BITS, changed_blocks, entropy, forward, rotated, width_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptcoord.codec.kernels import Mask, Words

    Bits: TypeAlias = NDArray[np.float64]
    Fills: TypeAlias = NDArray[np.int64]

_SAMPLE = 8192  # elements that are looked at
_MAX_PARTS = 4  # of a plane, that are looked at apart: more would each be too few elements
_SIGNED_BITS = 2.0  # of entropy, from which on a plane may have the signs
_TURNS = 0.998  # of the size with signs in the lowest bits
_LESS = 0.99  # of the size without a base: a frame that can do without it should
_PAYS = 0.999  # of the size as it is
_UNCHANGED, _STORED = int(FrameKind.UNCHANGED), int(FrameKind.STORED)
_RAW, _DIFFERENCE = int(FrameKind.RAW), int(FrameKind.DIFFERENCE)


@compiled
def survey(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    new: Words,
    base: Words,
    words: Words,
    base_words: Words,
    has_base: bool,  # noqa: FBT001
    flip: Value,
    sign: Value,
    mask: Mask,
) -> tuple[int, int, int, Bits, Fills]:
    """Find the blocks that have changed, and choose what their planes hold.

    Args:
        new: (B, E).
        base: likewise; any, where there is none.
        words: of `new`, (B, 128) of int64.
        base_words: of `base`, likewise.
        has_base: whether there is one; without it, all has changed.
        flip: as `ordering` has it.
        sign: likewise.
        mask: (B,); is filled.

    Returns:
        How many blocks have changed; the kind of frame; its sign place; of each plane and of equal
        parts of it, the estimated entropy of a byte, (W, P); of each plane the byte that seems to
        be the most frequent, (W,).
    """
    T = new.dtype.type
    width = width_of(T)
    mask[:] = True
    changed = changed_blocks(words, base_words, mask) if has_base else mask.size
    size = changed * BLOCK_BYTES // width
    step = max(1, size // _SAMPLE)
    parts = min(_MAX_PARTS, max(1, (size + BLOCK - 1) // BLOCK))
    # Looks: as it is, as differences, and as differences whose signs are elsewhere.
    bits, fills = np.empty((3, width, parts)), np.empty((3, width), np.int64)
    costs = np.full(3, np.inf)
    place, look, looks = 0, 0, 0 if changed == 0 else 2 if has_base else 1
    while look < looks:
        bit = T(0) if look == 0 else T(1 << max(8 * place - 1, 0))
        costs[look] = _sample(new, base, mask, step, flip, sign, bit, bits[look], fills[look])
        look += 1
        if look == 2 and costs[1] < _LESS * costs[0]:
            place = _busiest(bits[1])
            looks += place > 0
    if changed == 0:
        return 0, _UNCHANGED, 0, bits[0], fills[0]
    if costs[1] < _LESS * costs[0]:
        if costs[2] < _TURNS * costs[1]:
            return changed, _DIFFERENCE, place, bits[2], fills[2]
        return changed, _DIFFERENCE, 0, bits[1], fills[1]
    kind = _RAW if costs[0] < _PAYS * 8 * width else _STORED
    return changed, kind, 0, bits[0], fills[0]


@compiled
def _busiest(bits: Bits) -> int:
    """The sign place of the highest plane that may have the signs; 0 for the lowest plane."""
    for k in range(bits.shape[0] - 1, 0, -1):
        if bits[k].sum() / bits.shape[1] > _SIGNED_BITS:
            return k + 1
    return 0


@inlined
def _sample(  # noqa: PLR0913, PLR0917 (as above)
    new: Words,
    base: Words,
    mask: Mask,
    step: int,
    flip: Value,
    sign: Value,
    bit: Value,
    bits: Value,
    fills: Value,
) -> float:
    """Look at every `step`-th block of the mask, as it is or as a difference.

    That has its sign at `bit`; where that is 0, elements stay (rotated, if floats).

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
                _sampled(T, new[b], base[b], flip, sign, bit, z)
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


@inlined
def _sampled(  # noqa: PLR0913, PLR0917 (as above)
    T: Value, new: Words, base: Words, flip: Value, sign: Value, bit: Value, z: Words
) -> None:
    if bit != 0:
        for j in range(z.size):
            z[j] = forward(T, new[j], base[j], flip, sign, bit)
    elif flip != 0:
        for j in range(z.size):
            z[j] = rotated(T, new[j])
    else:
        for j in range(z.size):
            z[j] = new[j]


@inlined
def _count(z: Words, counts: NDArray[np.uint32]) -> None:
    """Count the bytes of integers by their planes, (W, 256)."""
    width = width_of(z.dtype.type)
    for j in range(z.size):
        for k in range(width):
            counts[k, np.uint64((z[j] >> (8 * k)) & 255)] += np.uint32(1)
