"""Tensors in another floating-point dtype, and whether what was written is that.

torch rounds, and `codec.cast`, which is another program, says what it should have come to.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ckptcoord.codec.cast import cast
from ckptcoord.codec.tensorspec import ITEM_BYTES, TensorSpec
from ckptcoord.errors import ConfigError, CorruptError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_CHUNK = 1 << 17  # elements at a time
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "F64": ("float64", "double", "fp64", "f64"),
        "F32": ("float32", "float", "fp32", "f32"),
        "F16": ("float16", "half", "fp16", "f16"),
        "BF16": ("bfloat16", "bf16"),
    }
)


def parse_dtype(text: str) -> str:
    """The code of `float16`, `bf16`, ...

    Raises:
        ConfigError: it names no floating-point dtype that tensors are cast to.
    """
    for code, names in _NAMES.items():
        if text.lower().removeprefix("torch.") in names:
            return code
    known = ", ".join(names[0] for names in _NAMES.values())
    raise ConfigError(field="--dtype", why=f"is {text[:40]!r}, not {known}")


def dtype_name(code: str) -> str:
    """Torch's name of it: `bfloat16`."""
    return _NAMES[code][0]


def cast_spec(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    """What a tensor becomes: integers, bools, complex numbers and 8-bit floats stay what they are.

    Args:
        spec: of the tensor.
        dtype: a code; None: every tensor stays.
    """
    if dtype is None or spec.dtype not in _NAMES:
        return spec
    return TensorSpec(name=spec.name, dtype=dtype, shape=spec.shape)


def check_cast(
    source: NDArray[np.uint8], spec: TensorSpec, written: NDArray[np.uint8], dtype: str
) -> int:
    """Hold a cast to its law; returns how many finite elements became infinite.

    To the nearest, ties to even; by way of float32 where float64 goes to 16 bits, as torch does. A
    NaN stays one.

    Args:
        source: bytes of the tensor as it was.
        spec: of that.
        written: bytes as they are now.
        dtype: of these.

    Raises:
        CorruptError: it is not the cast.
    """
    count = source.size // spec.item_bytes
    if written.size != count * ITEM_BYTES[dtype]:
        raise _broken(spec, dtype)
    overflowed, bits = 0, f"<u{ITEM_BYTES[dtype]}"
    for begin in range(0, count, _CHUNK):
        stop = min(begin + _CHUNK, count)
        old = widened(part(source, spec.dtype, begin, stop), spec.dtype)
        new = part(written, dtype, begin, stop)
        wide = widened(new, dtype)
        same = narrowed(old, dtype).view(bits) == new.view(bits)
        if not (same | (np.isnan(old) & np.isnan(wide))).all():
            raise _broken(spec, dtype)
        overflowed += int((np.isinf(wide) & np.isfinite(old)).sum())
    return overflowed


def _broken(spec: TensorSpec, dtype: str) -> CorruptError:
    why = f"is not {spec.dtype} rounded to {dtype}"
    return CorruptError(
        path=f"tensor {spec.name!r}", why=why, help="Nothing was exported; try again"
    )


def part(data: NDArray[np.uint8], dtype: str, begin: int, stop: int) -> NDArray[np.uint8]:
    """The bytes of some of the elements; a view."""
    return data[begin * ITEM_BYTES[dtype] : stop * ITEM_BYTES[dtype]]


def widened(data: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    """The same values as float32 or float64; exact."""
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype == "F16":
        with np.errstate(invalid="ignore"):
            return data.view("<f2").astype("<f4")
    return data.view("<f4" if dtype == "F32" else "<f8")


def narrowed(values: NDArray[np.floating], dtype: str) -> NDArray[np.uint8]:
    """Bytes of these values in a dtype, rounded as torch rounds; float32 or float64 in."""
    wide = "F32" if values.dtype == np.float32 else "F64"
    if dtype == "F64":
        with np.errstate(invalid="ignore"):
            return values.astype("<f8").view(np.uint8)
    data = np.ascontiguousarray(values).view(np.uint8)
    for narrow in ("F32", dtype):
        if wide != narrow:
            out = np.empty(values.size * ITEM_BYTES[narrow], np.uint8)
            cast(data, wide, out, narrow)
            data, wide = out, narrow
    return data
