"""What a tensor is: its name, dtype and shape, and how safetensors can hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ckptcoord.errors import ConfigError, InvalidNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DIMS = 32
MAX_NAME_CHARS = 4096
MAX_TENSOR_BYTES = 2**63 - 1
METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""

STORED_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
        **dict.fromkeys(("F32", "I32", "U32"), 4),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    }
)
"""Bytes an element of the dtypes that stand in a header."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType({**STORED_BYTES, "C128": 16, "C32": 4, "F4": 1})
"""Bytes an element of the dtypes that a trainer may have. F4 is a pair of 4-bit floats in a byte,
and its shape counts pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor as the trainer has it.

    Raises:
        InvalidNameError: the name is empty, too long, reserved, has unprintable characters or a
            `..` part.
        ConfigError: the dtype is none of ITEM_BYTES, or the shape cannot be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_tensor_name(self.name)
        _check_shape(self.name, self.dtype, self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes an element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its size in bytes, stored or not."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape under which it stands in the header."""
        if self.dtype in STORED_BYTES:
            return self.dtype, self.shape
        if self.dtype == "C128" and len(self.shape) < MAX_DIMS:
            return "F64", (*self.shape, 2)  # torch.view_as_real of it
        return "U8", (self.nbytes,)


def check_tensor_name(name: str) -> None:
    """Refuse a name that cannot stand in a header.

    Raises:
        InvalidNameError: says why.
    """
    if not 0 < len(name) <= MAX_NAME_CHARS or name == METADATA:
        raise InvalidNameError(
            kind="tensor",
            name=name,
            why=f"is reserved or not 1 to {MAX_NAME_CHARS} characters long",
        )
    if not name.isprintable():
        raise InvalidNameError(kind="tensor", name=name, why="has unprintable characters")
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        raise InvalidNameError(kind="tensor", name=name, why="has a '..' part")


def _check_shape(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    nbytes = ITEM_BYTES.get(dtype, 0)
    if not nbytes:
        raise ConfigError(field=f"tensor {name!r}", why=f"has the unknown dtype {dtype!r:.40}")
    if len(shape) > MAX_DIMS:
        raise ConfigError(
            field=f"tensor {name!r}", why=f"has {len(shape)} dimensions, {MAX_DIMS} at most"
        )
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_TENSOR_BYTES:
            raise ConfigError(field=f"tensor {name!r}", why=f"has the dimension {size!r:.40}")
        # A zero elsewhere is no excuse: strides and other readers' products would overflow.
        nbytes *= size or 1
    if nbytes > MAX_TENSOR_BYTES:
        raise ConfigError(field=f"tensor {name!r}", why="is larger than 2**63 bytes")
