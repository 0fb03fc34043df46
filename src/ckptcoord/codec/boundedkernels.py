"""The loops of `bounded.py`. Without reordering or contraction: every machine gives the same bits.

Shapes: E elements. `summing` is for sums that are only reported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ckptcoord.codec.jit import compiled, summing

if TYPE_CHECKING:
    from ckptcoord.codec.jit import Value

# Added and taken away, this rounds a double of less than 2**51 to the nearest, ties to even.
_TO_WHOLE = 1.5 * 2.0**52
_ROW = 512  # elements: a largest for each place in a row takes vectors, a single one does not


@summing
def change_of(new: Value, base: Value) -> tuple[float, float, float]:
    """Sum of the squares of `new - base`, NaN where one is; largest |new - base|; largest |new|."""
    squares = 0.0
    largest, most = np.zeros(_ROW), np.zeros(_ROW)
    for begin in range(0, new.size, _ROW):
        a, b = new[begin : begin + _ROW], base[begin : begin + _ROW]
        for at in range(a.size):
            change = np.float64(a[at]) - np.float64(b[at])
            squares += change * change
            largest[at] = max(largest[at], abs(change))
            most[at] = max(most[at], abs(np.float64(a[at])))
    return squares, largest.max(), most.max()


@compiled
def to_whole_steps(new: Value, base: Value, step: float, out: Value) -> None:
    """Fill `out`, uint32 (E,), with the change in steps, zigzag."""
    for at in range(new.size):
        change = np.float64(new[at]) - np.float64(base[at])
        steps = np.int32((change / step + _TO_WHOLE) - _TO_WHOLE)
        out[at] = np.uint32((steps << np.int32(1)) ^ (steps >> np.int32(31)))


@compiled
def keep_signs(new: Value, base: Value, step: float, nothing: float, steps: Value) -> bool:
    """Take one step more where the sign would be another one; whether all signs can be kept.

    Args:
        new: (E,), as saved; a zero of either sign is to be a zero.
        base: (E,), what the steps are added to.
        step: of them.
        nothing: what is no larger is rounded to zero.
        steps: zigzag, uint32 (E,).
    """
    for at in range(steps.size):
        one, was = np.float64(new[at]), np.float64(base[at])
        coded = np.int64(steps[at])
        signed = (coded >> 1) ^ -(coded & 1)
        made = was + np.float64(signed) * step
        if one == 0.0:
            if abs(made) > nothing:
                return False
            continue
        sign = 1.0 if one > 0.0 else -1.0
        if made * sign > nothing:
            continue
        signed += np.int64(sign)
        if not (was + np.float64(signed) * step) * sign > nothing:
            return False
        steps[at] = np.uint32((signed << 1) ^ (signed >> 63))
    return True


@compiled
def add_whole_steps(steps: Value, step: float, out: Value) -> None:
    """Add zigzag steps, uint32 (E,), to `out` in double precision."""
    for at in range(out.size):
        coded = np.int64(steps[at])
        signed = (coded >> 1) ^ -(coded & 1)
        out[at] = np.float64(out[at]) + np.float64(signed) * step


@compiled
def round_words(
    words: Value, drop: Value, least: Value, magnitude: Value, infinity: Value, out: Value
) -> None:
    """Fill `out` with floats, as unsigned words, of `drop` bits of mantissa less (see bounded.py).

    Args:
        words: (E,), unsigned.
        drop: how many bits, 1 or more.
        least: the magnitude of the least normal float: what is smaller stays.
        magnitude: the bits of a word that are not the sign.
        infinity: the magnitude of an infinity.
        out: (E,), as `words`.
    """
    unit = np.uint64(1) << np.uint64(drop)
    half, keep = unit >> np.uint64(1), ~(unit - np.uint64(1))
    for at in range(words.size):
        word = np.uint64(words[at])
        size = word & magnitude
        rounded = (size + half) & keep
        if rounded >= infinity:
            rounded = size & keep
        if size >= infinity or size < least:
            rounded = size
        out[at] = rounded | (word & ~magnitude)


@summing
def apart_of(new: Value, other: Value) -> tuple[float, float, float]:
    """Sums of the squares of `new` and `new - other`, and largest |new - other|.

    Where not all is finite, a sum is not, and the largest is of the rest.
    """
    sizes, differences = 0.0, 0.0
    largest = np.zeros(_ROW)
    for begin in range(0, new.size, _ROW):
        a, b = new[begin : begin + _ROW], other[begin : begin + _ROW]
        for at in range(a.size):
            one = np.float64(a[at])
            difference = one - np.float64(b[at])
            sizes += one * one
            differences += difference * difference
            largest[at] = max(largest[at], abs(difference))
    return sizes, differences, largest.max()


@compiled
def extremes_of(new: Value, other: Value) -> tuple[bool, float, float]:
    """Whether the same elements are not finite, and alike; the largest |new| and |new - other|."""
    largest, apart, alike = 0.0, 0.0, True
    for at in range(new.size):
        one, two = np.float64(new[at]), np.float64(other[at])
        difference = one - two
        if math.isfinite(one) and math.isfinite(two):
            largest = max(largest, abs(one))
            apart = max(apart, abs(difference))
        elif one != two and not (math.isnan(one) and math.isnan(two)):
            alike = False
    return alike, largest, apart


@summing
def norms_of(new: Value, other: Value, size: float, apart: float) -> tuple[float, float]:
    """Sums of the squares of `new * size` and `(new - other) * apart`, where `new` is finite."""
    sizes, differences = 0.0, 0.0
    for at in range(new.size):
        one = np.float64(new[at])
        if math.isfinite(one):
            scaled, difference = one * size, (one - np.float64(other[at])) * apart
            sizes += scaled * scaled
            differences += difference * difference
    return sizes, differences
