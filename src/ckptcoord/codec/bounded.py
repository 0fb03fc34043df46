"""Approximations of floats with a stated error. All is IEEE arithmetic: every machine agrees.

*Updates*: what a tensor has changed by since its base, in whole steps. The step is a fraction of
the root mean square of the change, so the error is at most half of that fraction of a usual change;
a whole one where the sign would be another one otherwise. Zeros and signs stay.
*Relative*: each value with fewer bits of mantissa: a grid that is logarithmic but for the steps
between powers of two. Signs, zeros, denormals, infinities and NaNs stay.
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
_LEAST_SUM = 1e-200  # of squares: beside that, those that are no normal doubles are nothing
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
    from ckptcoord.codec.boundedkernels import change_of  # late: numba takes a second

    kind = UPDATE_DTYPES[dtype]
    squares, largest, most = change_of(new.view(kind), base.view(kind))
    scale = math.sqrt(squares / max(1, new.nbytes // kind.itemsize))
    step = fraction * scale
    # A NaN compares false, too; and no whole number of steps may lead beyond the largest float.
    if not (0.0 < step < math.inf) or not (largest / step < _MOST_STEPS):
        return 0.0
    if not (most + step < float(np.finfo(kind).max)):
        return 0.0
    return step


def to_steps(
    new: NDArray[np.uint8], base: NDArray[np.uint8], dtype: str, step: float
) -> NDArray[np.uint32]:
    """The change in whole steps, (elements,), zigzag: 0, -1, 1, -2 are 0, 1, 2, 3."""
    from ckptcoord.codec.boundedkernels import to_whole_steps

    kind = UPDATE_DTYPES[dtype]
    coded = np.empty(new.nbytes // kind.itemsize, np.uint32)
    to_whole_steps(new.view(kind), base.view(kind), step, coded)
    return coded


def keep_signs(
    steps: NDArray[np.uint32],
    new: NDArray[np.uint8],
    base: NDArray[np.uint8],
    dtype: str,
    step: float,
) -> bool:
    """Mend steps that would give an element another sign, or make it a zero: one more, in place.

    Returns:
        Whether all elements have their sign then, and all zeros are zeros. If not, the change
        cannot be taken in steps.
    """
    from ckptcoord.codec.boundedkernels import keep_signs as keep_all_signs

    kind = UPDATE_DTYPES[dtype]
    nothing = float(np.finfo(kind).smallest_subnormal) / 2  # of doubles: zero itself
    return keep_all_signs(new.view(kind), base.view(kind), step, nothing, steps)


def add_steps(steps: NDArray[np.uint32], out: NDArray[np.uint8], dtype: str, step: float) -> None:
    """Make `out`, which holds the base, what a reader takes for the tensor."""
    from ckptcoord.codec.boundedkernels import add_whole_steps

    add_whole_steps(steps, step, out.view(UPDATE_DTYPES[dtype]))


def round_mantissa(data: NDArray[np.uint8], dtype: str, bits: int) -> NDArray[np.uint8]:
    """The tensor with `bits` bits of mantissa, rounded: a relative error of 2**-(bits+1).

    Where rounding up would make an infinity of a finite value, it is cut instead. Denormals, whose
    grid is not logarithmic, stay. Exact for dtypes that have no more bits, and for non-floats.
    """
    if dtype not in _MANTISSA or bits >= _MANTISSA[dtype][1]:
        return data.copy()
    from ckptcoord.codec.boundedkernels import round_words

    kind, mantissa = _MANTISSA[dtype]
    magnitude = (1 << (8 * kind.itemsize - 1)) - 1
    infinity = magnitude & ~((1 << mantissa) - 1)
    rounded = np.empty_like(data)
    drop, least = np.uint64(mantissa - bits), np.uint64(1 << mantissa)
    masks = np.uint64(magnitude), np.uint64(infinity)
    round_words(data.view(kind), drop, least, *masks, rounded.view(kind))
    return rounded


def distance(new: NDArray[np.uint8], other: NDArray[np.uint8], dtype: str) -> GivenUp:
    """How far `other` is from `new`; infinitely, where not the same elements are not finite."""
    from ckptcoord.codec.boundedkernels import apart_of, extremes_of, norms_of

    if not new.size:
        return GivenUp(max_abs=0.0, relative_l2=0.0)
    values, others = _floats(new, dtype), _floats(other, dtype)
    sizes, differences, max_abs = apart_of(values, others)
    # A NaN compares false: what is not finite has no finite sum.
    alike = differences == max_abs == 0.0
    if _LEAST_SUM < sizes < math.inf and (alike or _LEAST_SUM < differences < math.inf):
        return GivenUp(max_abs=max_abs, relative_l2=math.sqrt(differences / sizes))
    alike, largest, max_abs = extremes_of(values, others)
    if not alike or math.isinf(max_abs):
        return GivenUp(max_abs=math.inf, relative_l2=math.inf)
    if not max_abs or not largest:
        return GivenUp(max_abs=max_abs, relative_l2=1.0 if max_abs else 0.0)
    # Squares of a double's extremes are none: each norm is taken in units near its largest.
    units = (_unit_of(largest), _unit_of(max_abs))
    sizes, differences = norms_of(values, others, 1.0 / units[0], 1.0 / units[1])
    relative_l2 = math.sqrt(differences / sizes) * (units[1] / units[0])
    return GivenUp(max_abs=max_abs, relative_l2=relative_l2)


def _unit_of(largest: float) -> float:
    """A power of two near a positive float; its inverse is a float, too."""
    return math.ldexp(1.0, max(-1020, min(1020, math.frexp(largest)[1])))


def _floats(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.view({"F32": np.float32, "F64": np.float64}[dtype])
