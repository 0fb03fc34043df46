"""What the elements of a dtype are to the delta codec: their width, and whether they are floats.

A complex element is its two parts. Where several small elements share a byte, the byte is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PART = {"C128": "F64", "C64": "F32", "C32": "F16"}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """How a tensor's bytes are taken apart.

    Attributes:
        dtype: of an element, by its safetensors name; that of the parts of complex numbers.
        width: bytes an element: 1, 2, 4 or 8.
        is_float: it has a sign bit on top, then exponent and mantissa: with the sign taken off,
            bits order as values do. F8_E8M0 has no sign and orders as it is.
    """

    dtype: str
    width: int
    is_float: bool


def _elements(name: str) -> Elements:
    part = _PART.get(name, name)
    return Elements(dtype=part, width=ITEM_BYTES[part], is_float=part in _FLOATS)


_ELEMENTS: Mapping[str, Elements] = {name: _elements(name) for name in ITEM_BYTES}


def elements_of(dtype: str) -> Elements:
    """The elements of a dtype.

    Raises:
        ConfigError: it is none of ITEM_BYTES.
    """
    found = _ELEMENTS.get(dtype)
    if found is None:
        raise ConfigError(field="dtype", why=f"{dtype!r:.40} is unknown")
    return found
