"""The loops of `compare.py`: two tensors' elements beside one another.

Shapes: E elements of a row. `sums` is float64 (4,): of the squares of the differences, of the old
values and of the new ones, and of the products of these. `counts` is int64 (5,): elements that
differ in any bit, then NaNs and infinities of the old ones and of the new ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ckptcoord.codec.jit import compiled, summing

if TYPE_CHECKING:
    from ckptcoord.codec.jit import Value

ROW = 4096  # elements: rows of both tensors and what is made of them stay in the nearest cache
_LANES = 64  # a largest for each place in a row takes vectors, a single one does not
_F16_LEAST = np.float32(2.0**-14)  # of the float16s that have an exponent
# Squares of doubles beyond these overflow, or vanish.
_LEAST, _MOST = 2.0**-600, 2.0**900
_DOWN, _UP = 2.0**-512, 2.0**512


@compiled
def floats(old: Value, new: Value, reals: Value, sums: Value, most: Value, counts: Value) -> None:
    """Compare floats that numpy has.

    Args:
        old: their bits as integers (E,).
        new: the same of the new ones.
        reals: both as floats.
        sums: (3, 4): of values as they are, of those times 2**-512 and of those times 2**512.
        most: float64 (1,): the largest difference of finite values.
        counts: see above.
    """
    a, b = reals
    largest = np.zeros(_LANES)
    for begin in range(0, old.size, ROW):
        span = slice(begin, begin + ROW)
        _row(old[span], new[span], (a[span], b[span]), (sums, most, counts), largest)
    most[0] = max(most[0], largest.max())


@compiled
def brain_floats(
    old: Value, new: Value, reals: Value, sums: Value, most: Value, counts: Value
) -> None:
    """The same of bfloat16, given as int16; `reals` is room for a row of each, float32."""
    a, b = reals
    largest = np.zeros(_LANES)
    for begin in range(0, old.size, ROW):
        u, v = old[begin : begin + ROW], new[begin : begin + ROW]
        x, y = a[: u.size], b[: u.size]
        _widen_brain(u, x.view(np.int32))
        _widen_brain(v, y.view(np.int32))
        _row(u, v, (x, y), (sums, most, counts), largest)
    most[0] = max(most[0], largest.max())


@compiled
def half_floats(
    old: Value, new: Value, reals: Value, sums: Value, most: Value, counts: Value
) -> None:
    """The same of float16, given as int16."""
    a, b = reals
    largest = np.zeros(_LANES)
    for begin in range(0, old.size, ROW):
        u, v = old[begin : begin + ROW], new[begin : begin + ROW]
        x, y = a[: u.size], b[: u.size]
        _widen_half(u, x)
        _widen_half(v, y)
        _row(u, v, (x, y), (sums, most, counts), largest)
    most[0] = max(most[0], largest.max())


@compiled
def listed(old: Value, new: Value, values: Value, sums: Value, most: Value, counts: Value) -> None:
    """Compare bytes (E,) that each stand for some values, float32 (256, V)."""
    count = values.shape[1]
    a, b = np.empty(ROW, np.float32), np.empty(ROW, np.float32)
    largest = np.zeros(_LANES)
    for begin in range(0, old.size, ROW):
        u, v = old[begin : begin + ROW], new[begin : begin + ROW]
        for one in range(count):
            x, y = a[: u.size], b[: u.size]
            for at in range(u.size):
                x[at], y[at] = values[u[at], one], values[v[at], one]
            # The bytes of a pair differ once.
            bits = u if one == 0 else v
            _row(bits, v, (x, y), (sums, most, counts), largest)
    most[0] = max(most[0], largest.max())


@summing
def integers(old: Value, new: Value, sums: Value, most: Value, counts: Value) -> None:
    """Compare integers (E,); differences are exact before they become doubles."""
    differ, change, below, above, product = 0, 0.0, 0.0, 0.0, 0.0
    largest = np.uint64(0)
    for at in range(old.size):
        u, v = old[at], new[at]
        # Modulo 2**64, which is right for both signs.
        apart = np.uint64(v) - np.uint64(u) if v > u else np.uint64(u) - np.uint64(v)
        largest = max(largest, apart)
        differ += u != v
        x, y, d = np.float64(u), np.float64(v), np.float64(apart)
        change += d * d
        below += x * x
        above += y * y
        product += x * y
    counts[0] += differ
    most[0] = max(most[0], np.float64(largest))
    sums[0, 0] += change
    sums[0, 1] += below
    sums[0, 2] += above
    sums[0, 3] += product


@compiled
def _row(old: Value, new: Value, reals: Value, found: Value, largest: Value) -> None:
    """Add a row to what was found.

    One that has what is not finite, or whose squares have no room in a double, is gone through
    once more.
    """
    a, b = reals
    sums, most, counts = found
    differ, change, below, above, product = _sums(old, new, a, b, largest)
    counts[0] += differ
    fits = below + above + change <= _MOST
    if a.itemsize == 8:
        fits = fits and below >= _LEAST and above >= _LEAST
    if fits:
        sums[0, 0] += change
        sums[0, 1] += below
        sums[0, 2] += above
        sums[0, 3] += product
        return
    for at in range(a.size):
        _add(np.float64(a[at]), np.float64(b[at]), sums, most, counts)


@summing
def _sums(
    old: Value, new: Value, a: Value, b: Value, largest: Value
) -> tuple[int, float, float, float, float]:
    """How many differ, and the sums; of what is not finite, some sum is not finite either.

    `largest`, float64 (L,), is the largest difference by place; an element that is not finite
    changes none, or makes it infinite only where both are finite.
    """
    differ, change, below, above, product = 0, 0.0, 0.0, 0.0, 0.0
    for at in range(old.size):
        x, y = np.float64(a[at]), np.float64(b[at])
        d = y - x
        change += d * d
        below += x * x
        above += y * y
        product += x * y
        differ += old[at] != new[at]
    if below + above <= _MOST:
        for begin in range(0, old.size, _LANES):
            x, y = a[begin : begin + _LANES], b[begin : begin + _LANES]
            for at in range(x.size):
                largest[at] = max(largest[at], abs(np.float64(y[at]) - np.float64(x[at])))
    return differ, change, below, above, product


@compiled
def _add(x: float, y: float, sums: Value, most: Value, counts: Value) -> None:
    """Count a pair that is not finite, else add it."""
    if not (math.isfinite(x) and math.isfinite(y)):
        counts[1] += math.isnan(x)
        counts[2] += math.isinf(x)
        counts[3] += math.isnan(y)
        counts[4] += math.isinf(y)
        return
    d = y - x
    most[0] = max(most[0], abs(d))
    if math.isinf(d):
        d = y * _DOWN - x * _DOWN
        sums[1, 0] += d * d
    else:
        _add_product(d, d, sums, 0)
    _add_product(x, x, sums, 1)
    _add_product(y, y, sums, 2)
    _add_product(x, y, sums, 3)


@compiled
def _add_product(x: float, y: float, sums: Value, at: int) -> None:
    """Add where it neither overflows nor vanishes."""
    product = x * y
    if abs(product) > _MOST:
        sums[1, at] += (x * _DOWN) * (y * _DOWN)
    elif abs(product) < _LEAST:
        sums[2, at] += (x * _UP) * (y * _UP)
    else:
        sums[0, at] += product


@compiled
def _widen_brain(words: Value, to: Value) -> None:
    for at in range(words.size):
        to[at] = np.int32(words[at]) << 16


@compiled
def _widen_half(words: Value, to: Value) -> None:
    """Exponent and mantissa moved to their places; what has no exponent gets one and loses it."""
    bits = to.view(np.int32)
    for at in range(words.size):
        size = (np.int32(words[at]) & 0x7FFF) << 13
        exponent = size & 0x0F800000
        more = 0x70000000 if exponent == 0x0F800000 else 0x38000000
        bits[at] = size + (0x38800000 if exponent == 0 else more)
    for at in range(words.size):
        small = (np.int32(words[at]) & 0x7C00) == 0
        to[at] -= _F16_LEAST if small else np.float32(0.0)
    for at in range(words.size):
        bits[at] |= np.int32(words[at]) & np.int32(-0x80000000)
