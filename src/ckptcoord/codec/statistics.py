"""What the values of a tensor are like, from its bytes, which come in parts and in order.

What is not finite is counted, and is in no sum: a NaN in one element would hide all others. A
complex number counts by its two parts, a byte of F4 by its two floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ckptcoord.codec.elements import elements_of
from ckptcoord.codec.smallfloats import F4_VALUES, float_values
from ckptcoord.codec.tensorspec import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Values: TypeAlias = NDArray[Any]

_CHUNK = 1 << 16  # values at a time: what is made of them stays in the core's cache
_PLACES = 3
_NATIVE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "u1"}
_NATIVE |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_NATIVE |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_NOT_FINITE = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23)}
_NOT_FINITE |= {"F16": ("<u2", 0x1F << 10), "BF16": ("<u2", 0xFF << 7)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was found of some values.

    Attributes:
        count: how many there are.
        zeros: of either sign.
        nans: that are no numbers.
        infinities: below and above.
        minimum: of the finite ones, as all that follow; None where there is none. Of integers,
            and the maximum too, an int.
        mean: infinite where a double cannot hold the sum.
        std: the standard deviation, of the values as they are: divided by their number; of values
            whose squares no double holds, 0 or infinite.
        norm: the L2 norm, likewise, but no less than the largest value.
        nan_places: the places of the first NaNs among the values, from 0, in order.
        infinity_places: the same of infinities.
    """

    count: int
    zeros: int
    nans: int
    infinities: tuple[int, int]
    minimum: int | float | None
    maximum: int | float | None
    mean: float | None
    std: float | None
    norm: float | None
    nan_places: tuple[int, ...]
    infinity_places: tuple[int, ...]

    @property
    def not_finite(self) -> int:
        """NaNs and infinities together."""
        return self.nans + sum(self.infinities)


class Summary:
    """Statistics in the making.

    Args:
        dtype: of the tensor.
        only_finite: count what is not finite and look at nothing else: several times faster.

    Raises:
        ConfigError: the dtype is unknown.
    """

    def __init__(self, dtype: str, *, only_finite: bool = False) -> None:
        elements = elements_of(dtype)
        self._item_bytes = elements.width
        self._decode = _decoder(elements.dtype)
        self._suspect = _NOT_FINITE.get(elements.dtype)
        self._is_float = elements.is_float or elements.dtype in ("F8_E8M0", "F4")
        self._only_finite = only_finite
        self._count = self._zeros = self._nans = 0
        self._infinities = [0, 0]
        self._least: list[int | float] = []
        self._most: list[int | float] = []
        self._sum = _Moments()
        self._nan_places: list[int] = []
        self._infinity_places: list[int] = []

    def add(self, data: Bytes) -> None:
        """Take in the next values: contiguous bytes, of whole elements."""
        step = _CHUNK * self._item_bytes
        for start in range(0, data.size, step):
            self._add(data[start : start + step])

    def merge(self, other: Summary) -> None:
        """Take in what another one found of further values of the same dtype, but for places."""
        self._count += other._count
        self._zeros += other._zeros
        self._nans += other._nans
        self._infinities = [a + b for a, b in zip(self._infinities, other._infinities, strict=True)]
        self._least += other._least
        self._most += other._most
        self._sum.merge(other._sum)

    def statistics(self) -> Statistics:
        """What was found so far."""
        moments = self._sum
        some = bool(moments.count)
        largest = max((abs(one) for one in (*self._least, *self._most)), default=0.0)
        return Statistics(
            count=self._count,
            zeros=self._zeros,
            nans=self._nans,
            infinities=(self._infinities[0], self._infinities[1]),
            minimum=min(self._least, default=None),
            maximum=max(self._most, default=None),
            mean=moments.mean if some else None,
            std=moments.std if some else None,
            norm=max(moments.norm, float(largest)) if some else None,
            nan_places=tuple(self._nan_places),
            infinity_places=tuple(self._infinity_places),
        )

    def _add(self, data: Bytes) -> None:
        at = self._count
        self._count += data.size // self._item_bytes * (2 if self._decode is _pairs else 1)
        if self._only_finite and not self._is_suspect(data):
            return
        raw = self._decode(data)
        with np.errstate(invalid="ignore", over="ignore"):
            values = raw.astype(np.float64)
        if self._is_float:
            finite = np.isfinite(values)
            if not finite.all():
                self._note(values, at)
                values = raw = values[finite]
        if values.size and not self._only_finite:
            self._zeros += int(values.size - np.count_nonzero(values))
            self._least.append(raw.min().item())
            self._most.append(raw.max().item())
            self._least, self._most = [min(self._least)], [max(self._most)]
            self._sum.add(values)

    def _is_suspect(self, data: Bytes) -> bool:
        """Whether there may be anything in it that is not finite."""
        if self._suspect is None:
            return self._is_float
        dtype, mask = self._suspect
        words = data.view(dtype)
        return bool(((words & words.dtype.type(mask)) == words.dtype.type(mask)).any())

    def _note(self, values: NDArray[np.float64], at: int) -> None:
        nans, infinities = np.isnan(values), np.isinf(values)
        self._nans += int(np.count_nonzero(nans))
        below = int(np.count_nonzero(values == -math.inf))
        self._infinities[0] += below
        self._infinities[1] += int(np.count_nonzero(infinities)) - below
        for places, mask in ((self._nan_places, nans), (self._infinity_places, infinities)):
            first = np.flatnonzero(mask)[: _PLACES - len(places)]
            places += [at + int(one) for one in first]


def values_per_element(dtype: str) -> int:
    """How many values count for one element: 2 of a complex number, and of a pair of F4."""
    return 2 if dtype == "F4" else ITEM_BYTES[dtype] // elements_of(dtype).width


class _Moments:
    """Number, mean and sum of squared distances from it, of values that come in chunks.

    Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values.mean())
            away = values - mean
            self._join(values.size, mean, float(away @ away))

    def merge(self, other: _Moments) -> None:
        if other.count:
            self._join(other.count, other.mean, other._squares)

    def _join(self, count: int, mean: float, squares: float) -> None:
        apart, total = mean - self.mean, self.count + count
        self._squares += squares + apart * apart * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.count)

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares + self.count * self.mean * self.mean)


# --- from bytes to values ------------------------------------------------------------------------


def decode_values(dtype: str, data: Bytes) -> Values:
    """The values of a tensor's bytes: `values_per_element` for each, widened where numpy has none.

    Raises:
        ConfigError: the dtype is unknown.
    """
    return _decoder(elements_of(dtype).dtype)(data)


def _decoder(dtype: str) -> Callable[[Bytes], Values]:
    if dtype in _NATIVE:
        native = _NATIVE[dtype]
        return lambda data: data.view(native)
    if dtype == "BF16":
        return _brain_floats
    if dtype == "F4":
        return _pairs
    table = float_values(dtype)
    return lambda data: table[data]


def _brain_floats(data: Bytes) -> Values:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _pairs(data: Bytes) -> Values:
    found = np.empty((data.size, 2), np.float32)
    found[:, 0], found[:, 1] = F4_VALUES[data & 15], F4_VALUES[data >> 4]
    return found.reshape(-1)
