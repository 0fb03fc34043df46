"""How far apart two replicas are, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ckptcoord.core.jsonio import JsonValue

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_INTEGERS = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "BOOL": np.uint8,
}


def describe_distance(reference: bytes, other: bytes, dtype: str) -> str:
    """The largest difference between equal-length runs of elements of a safetensors dtype.

    Dtypes that numpy has no arithmetic for are compared byte by byte.
    """
    left, right = _values(reference, dtype), _values(other, dtype)
    count = int(np.count_nonzero(_bits(left) != _bits(right)))
    if not count:
        return "the values are the same again: they changed while they were being compared"
    if left.dtype.kind != "f":
        apart = max(
            abs(int(a) - int(b))
            for a, b in zip(left[left != right], right[left != right], strict=True)
        )
        return f"{count} of {left.size} compared elements differ, by at most {apart}"
    with np.errstate(all="ignore"):
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
    finite = difference[np.isfinite(difference)]
    largest = f"{finite.max():.3g}" if finite.size else "nan"
    odd = int(np.count_nonzero(~np.isfinite(difference)))
    suffix = f", {odd} of them NaN or infinite" if odd else ""
    return f"{count} of {left.size} compared elements differ, by at most {largest}{suffix}"


def first_difference(left: JsonValue, right: JsonValue, path: str = "state") -> tuple[str, str]:
    """The first place where two documents differ, and what stands there on either side."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            if key not in left or key not in right:
                return f"{path}.{key}", "absent on one side"
            if left[key] != right[key]:
                return first_difference(left[key], right[key], f"{path}.{key}")
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            if a != b:
                return first_difference(a, b, f"{path}[{index}]")
    return path, f"{_short(right)} against {_short(left)}"


def _short(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _values(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # a bfloat16 is the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in ("C64", "C128"):
        return np.frombuffer(data, np.float32 if dtype == "C64" else np.float64)
    return np.frombuffer(data, _FLOATS.get(dtype) or _INTEGERS.get(dtype, np.uint8))


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")
