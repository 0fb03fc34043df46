"""Approximations of floats with a stated error. All is IEEE arithmetic: every machine agrees.

*Updates*: what a tensor has changed by since its base, in whole steps. The step is a fraction of
the root mean square of the change, so the error is at most half of that fraction of a usual change.
*Relative*: each value with fewer bits of mantissa: a grid that is logarithmic but for the steps
between powers of two. Signs, zeros, infinities and NaNs stay; a value never changes its sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

UPDATE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_MANTISSA: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F16": (np.dtype(np.uint16), 10),
    "BF16": (np.dtype(np.uint16), 7),
    "F32": (np.dtype(np.uint32), 23),
    "F64": (np.dtype(np.uint64), 52),
}
FLOAT_DTYPES = frozenset(_MANTISSA)
_MOST_STEPS = 2**30  # zigzag takes one bit of 31


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """How far an approximation is from the tensor; of one without elements, zeros.

    Attributes:
        max_abs: the largest difference of an element.
        relative_l2: the norm of the difference over the norm of the tensor.
    """

    max_abs: float
    relative_l2: float


def step_of(new: NDArray[np.uint8], base: NDArray[np.uint8], dtype: str, fraction: float) -> float:
    """The step for the change from `base` to `new`; 0.0 where it cannot be taken in steps.

    Args:
        new: the bytes of a tensor.
        base: those of another one.
        dtype: of both, of UPDATE_DTYPES.
        fraction: of the root mean square of the change.
    """
    kind = UPDATE_DTYPES[dtype]
    with np.errstate(all="ignore"):  # what is not finite is looked at below
        change = new.view(kind).astype(np.float64) - base.view(kind)
        largest = float(np.max(np.abs(change), initial=0.0))
        scale = math.sqrt(float(np.mean(np.square(change)))) if change.size else 0.0
    step = fraction * scale
    # A NaN compares false, too.
    if not (0.0 < step < math.inf) or not (largest / step < _MOST_STEPS):
        return 0.0
    return step


def to_steps(
    new: NDArray[np.uint8], base: NDArray[np.uint8], dtype: str, step: float
) -> NDArray[np.uint32]:
    """The change in whole steps, (elements,), zigzag: 0, -1, 1, -2 are 0, 1, 2, 3."""
    kind = UPDATE_DTYPES[dtype]
    change = new.view(kind).astype(np.float64) - base.view(kind)
    steps = np.rint(change / step).astype(np.int32)
    coded: NDArray[np.uint32] = ((steps << 1) ^ (steps >> 31)).view(np.uint32)
    return coded


def add_steps(steps: NDArray[np.uint32], out: NDArray[np.uint8], dtype: str, step: float) -> None:
    """Make `out`, which holds the base, what a reader takes for the tensor."""
    values = out.view(UPDATE_DTYPES[dtype])
    signed = (steps >> np.uint32(1)).astype(np.int64) ^ -(steps & np.uint32(1)).astype(np.int64)
    with np.errstate(all="ignore"):  # hostile steps may lead out of range; the digest says so
        values[:] = (values.astype(np.float64) + signed * np.float64(step)).astype(values.dtype)


def round_mantissa(data: NDArray[np.uint8], dtype: str, bits: int) -> NDArray[np.uint8]:
    """The tensor with `bits` bits of mantissa, rounded: a relative error of 2**-(bits+1).

    Where rounding up would make an infinity of a finite value, it is cut instead. Denormals keep as
    many bits as the grid has there. Exact for dtypes that have no more bits, and for non-floats.
    """
    if dtype not in _MANTISSA or bits >= _MANTISSA[dtype][1]:
        return data.copy()
    kind, mantissa = _MANTISSA[dtype]
    one = kind.type(1)
    drop = kind.type(mantissa - bits)
    keep = ~((one << drop) - one)
    magnitude = kind.type((1 << (8 * kind.itemsize - 1)) - 1)
    infinity = magnitude & ~kind.type((1 << mantissa) - 1)
    words = data.view(kind)
    special = (words & magnitude) >= infinity
    up = (words & magnitude) + (one << (drop - one))
    up &= keep
    rounded = np.where(up >= infinity, words & magnitude & keep, up)
    # A value next to zero would become zero: it keeps the least magnitude that the grid has.
    rounded = np.where((rounded == 0) & ((words & magnitude) != 0), one << drop, rounded)
    found = np.where(special, words, rounded | (words & ~magnitude)).astype(kind)
    flat: NDArray[np.uint8] = found.view(np.uint8)
    return flat


def distance(new: NDArray[np.uint8], other: NDArray[np.uint8], dtype: str) -> GivenUp:
    """How far `other` is from `new`; infinitely, where not the same elements are not finite."""
    a, b = _floats(new, dtype), _floats(other, dtype)
    finite = np.isfinite(a)
    if not a.size:
        return GivenUp(max_abs=0.0, relative_l2=0.0)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return GivenUp(max_abs=math.inf, relative_l2=math.inf)
    size = np.where(finite, a, 0.0)
    with np.errstate(over="ignore"):
        apart = size - np.where(finite, b, 0.0)
    largest, max_abs = float(np.max(np.abs(size))), float(np.max(np.abs(apart)))
    if math.isinf(max_abs):
        return GivenUp(max_abs=math.inf, relative_l2=math.inf)
    if not max_abs or not largest:
        return GivenUp(max_abs=max_abs, relative_l2=1.0 if max_abs else 0.0)
    # Squares of a double's extremes are none: each norm is taken in units of its largest.
    ratio = float(np.linalg.norm(apart / max_abs)) / float(np.linalg.norm(size / largest))
    return GivenUp(max_abs=max_abs, relative_l2=ratio * (max_abs / largest))


def _floats(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":
        wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    return data.view(kind).astype(np.float64)
