"""Floats rounded to a narrower dtype, as torch rounds them on a CPU, bit for bit.

To the nearest, ties to even. What is no number stays none: it becomes 0xFFFF as bfloat16; else the
top of its payload is kept, and it is quiet. Parameters in bfloat16 beside an fp32 master are such
casts of it, and then need not be stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

_CHUNK = 1 << 16  # elements at a time: what is made of them stays in the cache


def cast(wide: Bytes, wide_dtype: str, out_narrow: Bytes, narrow_dtype: str) -> None:
    """Fill `out_narrow` with the cast of `wide`; contiguous bytes, of as many elements.

    Raises:
        ConfigError: there is no such cast, or the arrays are not of as many whole elements.
    """
    width, to = _cast_of(wide_dtype, narrow_dtype)
    if not _fit(wide, width, out_narrow):
        why = f"{wide.size} bytes of {wide_dtype} do not become {out_narrow.size}"
        raise ConfigError(field="out_narrow", why=why)
    for begin, values in _chunks(wide, width):
        half = to(values).view(np.uint8)
        at = begin // 2
        out_narrow[at : at + half.size] = half


def is_cast(wide: Bytes, wide_dtype: str, narrow: Bytes, narrow_dtype: str) -> bool:
    """Whether `narrow` is exactly the cast of `wide`; both contiguous bytes.

    Raises:
        ConfigError: there is no such cast.
    """
    width, to = _cast_of(wide_dtype, narrow_dtype)
    if not _fit(wide, width, narrow):
        return False
    for begin, values in _chunks(wide, width):
        half = to(values).view(np.uint8)
        at = begin // 2
        if not np.array_equal(half, narrow[at : at + half.size]):
            return False
    return True


_Cast: TypeAlias = "Callable[[Bytes], NDArray[np.generic]]"


def _cast_of(wide_dtype: str, narrow_dtype: str) -> tuple[int, _Cast]:
    """Bytes of a wide element, and what casts them; a narrow element has half of them."""
    found = _CASTS.get((wide_dtype, narrow_dtype))
    if found is None:
        raise ConfigError(field="dtype", why=f"{wide_dtype} is not cast to {narrow_dtype}")
    return found


def _fit(wide: Bytes, width: int, narrow: Bytes) -> bool:
    return wide.size == 2 * narrow.size and wide.size % width == 0


def _chunks(wide: Bytes, width: int) -> Iterator[tuple[int, Bytes]]:
    step = _CHUNK * width
    for begin in range(0, wide.size, step):
        yield begin, wide[begin : begin + step]


def _to_bf16(data: Bytes) -> NDArray[np.generic]:
    bits = data.view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # what is no number may overflow
    narrow = (rounded >> 16).astype("<u2")
    none = np.isnan(data.view("<f4"))
    if none.any():
        narrow[none] = 0xFFFF
    return narrow


def _to_f16(data: Bytes) -> NDArray[np.generic]:
    values = data.view("<f4")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = values.astype("<f2")
    none = np.isnan(values)
    if none.any():  # numpy may leave it signalling, or make an infinity of it
        bits = data.view("<u4")[none]
        sign, payload = (bits >> 16) & 0x8000, (bits >> 13) & 0x3FF
        narrow.view("<u2")[none] = sign | 0x7E00 | payload
    return narrow


def _to_f32(data: Bytes) -> NDArray[np.generic]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = data.view("<f8").astype("<f4")
    none = np.isnan(data.view("<f8"))
    if none.any():
        bits = data.view("<u8")[none]
        sign, payload = (bits >> 32) & 0x80000000, (bits >> 29) & 0x7FFFFF
        narrow.view("<u4")[none] = sign | 0x7FC00000 | payload
    return narrow


_CASTS: Mapping[tuple[str, str], tuple[int, _Cast]] = {
    ("F32", "BF16"): (4, _to_bf16),
    ("F32", "F16"): (4, _to_f16),
    ("F64", "F32"): (8, _to_f32),
}
