"""How far two tensors are apart, from their bytes, which may come in parts and in any order.

    tally(a, b).difference() == tally(a[:k], b[:k]) + tally(a[k:], b[k:])   but for rounding

What is not finite is counted, and is in no sum: a NaN in one element would hide all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ckptcoord.codec import comparekernels as kernels
from ckptcoord.codec.elements import elements_of
from ckptcoord.codec.smallfloats import float_values
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ckptcoord.codec.elements import Elements

    Bytes: TypeAlias = NDArray[np.uint8]
    Compare: TypeAlias = Callable[[Bytes, Bytes, "Tally"], None]

_SCALES = (0, 512, -512)  # of the rows of sums: values were multiplied by 2 to minus that


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a tensor is from an older one; norms are over elements that are finite in both.

    Complex numbers count by their parts, a pair of 4-bit floats as one element.

    Attributes:
        elements: that were compared.
        differing: how many of them differ in any bit.
        l2: norm of the difference; infinite where a double cannot hold it, as all that follow.
        l2_old: norm of the old values.
        l2_new: norm of the new ones.
        max_abs: the largest difference.
        cosine: of the angle between them, from -1 to 1; None where one of them is zero.
        nans: how many there are, old and new.
        infinities: the same of infinities.
    """

    elements: int
    differing: int
    l2: float
    l2_old: float
    l2_new: float
    max_abs: float
    cosine: float | None
    nans: tuple[int, int]
    infinities: tuple[int, int]

    @property
    def relative_l2(self) -> float:
        """Norm of the difference over that of the old values; infinite where only that is zero."""
        return relative(self.l2, self.l2_old)

    @property
    def has_not_finite(self) -> bool:
        """Whether there is any NaN or infinity, old or new."""
        return any((*self.nans, *self.infinities))


def relative(change: float, size: float) -> float:
    """`change / size`; 0 for no change, infinite for one from zero."""
    if change == 0.0:
        return 0.0
    return change / size if size else math.inf


class Tally:
    """What was found of a pair of tensors so far. For one thread; `merge` takes another's.

    Args:
        dtype: of both.

    Raises:
        ConfigError: the dtype is unknown.
    """

    __slots__ = ("_compare", "_elements", "_width", "counts", "most", "sums")

    def __init__(self, dtype: str) -> None:
        elements = elements_of(dtype)
        self._width = elements.width
        self._compare = _comparison(elements)
        self._elements = 0
        self.sums = np.zeros((3, 4))
        self.most = np.zeros(1)
        self.counts = np.zeros(5, np.int64)

    def add(self, old: Bytes, new: Bytes) -> None:
        """Take in some elements of both, contiguous bytes; for what is equal, the same twice.

        Raises:
            ConfigError: they are not as many whole elements.
        """
        if old.size != new.size or old.size % self._width:
            raise ConfigError(
                field="new", why=f"has {new.size} bytes, the old one {old.size}, of {self._width}"
            )
        self._elements += old.size // self._width
        self._compare(_aligned(old, self._width), _aligned(new, self._width), self)

    def merge(self, other: Tally) -> None:
        """Take in what another one has found of other elements of the same tensors."""
        self._elements += other._elements
        self.sums += other.sums
        self.counts += other.counts
        np.maximum(self.most, other.most, out=self.most)

    def difference(self) -> Difference:
        """What that is together."""
        norms = [_norm(self.sums[:, at].tolist()) for at in range(3)]
        # A norm is no smaller than its largest part, whose square may have vanished.
        most = float(self.most[0])
        differing, nans_old, infs_old, nans_new, infs_new = self.counts.tolist()
        return Difference(
            elements=self._elements,
            differing=differing,
            l2=max(norms[0], most),
            l2_old=norms[1],
            l2_new=norms[2],
            max_abs=most,
            cosine=_cosine(self.sums[:, 3].tolist(), norms[1], norms[2]),
            nans=(nans_old, nans_new),
            infinities=(infs_old, infs_new),
        )


def scalar_of(dtype: str, data: bytes) -> bool | int | float | str:
    """The value of one element; of a complex number or a pair of 4-bit floats, its text.

    Raises:
        ConfigError: the dtype is unknown, or the bytes are not one element of it.
    """
    if len(data) != ITEM_BYTES.get(dtype, 0):
        raise ConfigError(field="data", why=f"{len(data)} bytes are no {dtype!r:.40}")
    if dtype == "BOOL":
        return data != b"\0"
    if dtype[0] in "IU":
        return int.from_bytes(data, "little", signed=dtype[0] == "I")
    elements = elements_of(dtype)
    if elements.width > 2:
        values = np.frombuffer(data, f"<f{elements.width}").tolist()
    else:
        values = _small_values(elements.dtype, data)
    if len(values) == 1:
        return float(values[0])
    return str(complex(*values)) if dtype.startswith("C") else str(tuple(values))


def _small_values(dtype: str, data: bytes) -> list[float]:
    """The values of elements of one or two bytes."""
    values: NDArray[Any]
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype == "F16":
        values = np.frombuffer(data, "<f2")
    else:
        values = _values(dtype)[np.frombuffer(data, np.uint8)].reshape(-1)
    return list(map(float, values))


def _norm(squares: list[float]) -> float:
    if not (squares[1] or squares[2]):
        return math.sqrt(squares[0])
    return math.hypot(*(_scaled(math.sqrt(s), at) for s, at in zip(squares, _SCALES, strict=True)))


def _scaled(value: float, by: int) -> float:
    try:
        return math.ldexp(value, by)
    except OverflowError:
        return math.inf


def _cosine(products: list[float], one: float, other: float) -> float | None:
    if not (one and other):
        return None
    found = 0.0
    for product, by in zip(products, _SCALES, strict=True):
        found += product / _scaled(one, -by) / _scaled(other, -by) if product else 0.0
    return min(1.0, max(-1.0, found))


def _aligned(data: Bytes, width: int) -> Bytes:
    return data if data.ctypes.data % width == 0 else data.copy()


def _comparison(elements: Elements) -> Compare:
    """What compares such elements."""
    width, signed = elements.width, "u" if elements.dtype.startswith("U") else "i"
    if elements.dtype in _HALVES:
        return _halves(_HALVES[elements.dtype])
    if elements.dtype in ("F32", "F64"):
        return _floats(f"<i{width}", f"<f{width}")
    if elements.dtype == "F4" or elements.dtype.startswith("F8"):
        return _listed(_values(elements.dtype))
    if elements.dtype == "BOOL":
        signed = "u"
    return _integers(f"<{signed}{width}")


def _values(dtype: str) -> NDArray[np.float32]:
    """The values (256, V) of each byte."""
    if dtype != "F4":
        return float_values(dtype).reshape(256, 1)
    sizes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
    of_four = np.concatenate([sizes, -sizes])
    every = np.arange(256)
    return np.stack([of_four[every & 15], of_four[every >> 4]], axis=1)


def _read_only(data: Bytes, dtype: str) -> NDArray[Any]:
    """What kernels do not write: one type, one compilation."""
    words: NDArray[Any] = data.view(dtype)
    words.flags.writeable = False
    return words


def _floats(bits: str, real: str) -> Compare:
    def compare(old: Bytes, new: Bytes, to: Tally) -> None:
        reals = _read_only(old, real), _read_only(new, real)
        pair = _read_only(old, bits), _read_only(new, bits)
        kernels.floats(*pair, reals, to.sums, to.most, to.counts)

    return compare


def _halves(kernel: Callable[..., None]) -> Compare:
    def compare(old: Bytes, new: Bytes, to: Tally) -> None:
        rooms = np.empty(kernels.ROW, np.float32), np.empty(kernels.ROW, np.float32)
        pair = _read_only(old, "<i2"), _read_only(new, "<i2")
        kernel(*pair, rooms, to.sums, to.most, to.counts)

    return compare


def _listed(values: NDArray[np.float32]) -> Compare:
    def compare(old: Bytes, new: Bytes, to: Tally) -> None:
        pair = _read_only(old, "u1"), _read_only(new, "u1")
        kernels.listed(*pair, values, to.sums, to.most, to.counts)

    return compare


def _integers(dtype: str) -> Compare:
    def compare(old: Bytes, new: Bytes, to: Tally) -> None:
        pair = _read_only(old, dtype), _read_only(new, dtype)
        kernels.integers(*pair, to.sums, to.most, to.counts)

    return compare


_HALVES: dict[str, Callable[..., None]] = {
    "BF16": kernels.brain_floats,
    "F16": kernels.half_floats,
}
