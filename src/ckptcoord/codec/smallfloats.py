"""The values of dtypes of one byte, by the byte."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# Bits of the exponent, its bias, and the bytes (without the sign) that are infinite and from which
# on all are no numbers. FNUZ dtypes have one NaN, where the others have -0.
_FORMATS: Mapping[str, tuple[int, int, int | None, int]] = {
    "F8_E4M3": (4, 7, None, 0x7F),
    "F8_E5M2": (5, 15, 0x7C, 0x7D),
    "F8_E4M3FNUZ": (4, 8, None, 0x80),
    "F8_E5M2FNUZ": (5, 16, None, 0x80),
}
_F4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
F4_VALUES: NDArray[np.float32] = np.array([*_F4, *(-one for one in _F4)], np.float32)
"""The value of each 4-bit float (16,); a byte holds two, the first in its lower half."""


def float_values(dtype: str) -> NDArray[np.float32]:
    """The value of each byte (256,) of a dtype of one byte.

    That of a pair of 4-bit floats is the norm of the pair: enough to say how large it is, but not
    how far another pair is from it.
    """
    return np.array([_value(dtype, byte) for byte in range(256)], np.float32)


def _value(dtype: str, byte: int) -> float:
    if dtype == "I8":
        return float(byte - 256 if byte > 127 else byte)
    if dtype == "F8_E8M0":
        return math.nan if byte == 255 else 2.0 ** (byte - 127)
    if dtype == "F4":
        return math.hypot(_F4[byte & 7], _F4[(byte >> 4) & 7])
    if dtype in _FORMATS:
        return _float(dtype, byte)
    return float(byte)


def _float(dtype: str, byte: int) -> float:
    exponent_bits, bias, infinite, nan = _FORMATS[dtype]
    if byte == 0x80 and dtype.endswith("FNUZ"):
        return math.nan
    sign, bits = (-1.0 if byte & 0x80 else 1.0), byte & 0x7F
    if bits == infinite:
        return sign * math.inf
    if bits >= nan:
        return math.nan
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = bits >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return float(sign * mantissa * 2.0 ** (1 - bias - mantissa_bits))
    return float(sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias))
