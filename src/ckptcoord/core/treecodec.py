"""Single values of a state and their tagged form in a document, in pairs.

Every pair keeps the law `decode(encode(value)) == value`, type for type and bit for bit. Decoders
take what may be hostile and raise ValueError, with what is wrong as its text.
"""

from __future__ import annotations

import binascii
import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from ckptcoord.core.jsonio import JsonValue

MAX_EXACT_INT = 2**53  # from there on, readers that hold numbers as doubles lose digits
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX_INT = re.compile(r"-?(?:0|[1-9a-f][0-9a-f]*)")
_DTYPE = re.compile(r"[<>|](?:[biufcSU][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[A-Za-zμ]{1,2}\])?)|[qQ]")
_ITEM_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}


# --- numbers and text --------------------------------------------------------------------------


def encode_int(value: int) -> JsonValue:
    """Itself below 2**53, hex digits from there on."""
    return value if -MAX_EXACT_INT < value < MAX_EXACT_INT else {"$": "int", "hex": f"{value:x}"}


def decode_hex_int(text: str) -> int:
    """The int of hex digits, of any length."""
    if _HEX_INT.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is no hex integer")
    return int(text, 16)


def encode_float(value: float) -> JsonValue:
    """Itself when finite; the bits of a NaN or an infinity, big-endian in hex."""
    if value - value == 0.0:
        return value
    return {"$": "float", "bits": struct.pack(">d", value).hex()}


def encode_complex(value: complex) -> JsonValue:
    """The bits of both parts."""
    return {"$": "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}


def encode_str(value: str) -> JsonValue:
    """Itself, unless it has surrogates, which no UTF-8 text can hold."""
    if is_plain_text(value):
        return value
    return {"$": "str", "base64": _base64(value.encode("utf-8", "surrogatepass"))}


def is_plain_text(value: str) -> bool:
    """Whether JSON holds this text exactly."""
    return value.isascii() or _SURROGATE.search(value) is None


def encode_bytes(value: bytes) -> JsonValue:
    """Base64."""
    return {"$": "bytes", "base64": _base64(value)}


def encode_bytearray(value: bytearray) -> JsonValue:
    """Base64."""
    return {"$": "bytearray", "base64": _base64(value)}


def _base64(data: bytes | bytearray) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _from_base64(text: str) -> bytes:
    if not text.isascii():
        raise ValueError(f"{text[:40]!r} is no base64")
    return binascii.a2b_base64(text, strict_mode=True)


def _from_bits(text: str, length_bytes: int) -> bytes:
    if re.fullmatch(r"[0-9a-f]*", text) is None or len(text) != 2 * length_bytes:
        raise ValueError(f"{text[:40]!r} is not {2 * length_bytes} hex digits")
    return bytes.fromhex(text)


def _float(bits: str) -> float:
    (value,) = struct.unpack(">d", _from_bits(bits, 8))
    return float(value)


def _complex(bits: str) -> complex:
    return complex(*struct.unpack(">dd", _from_bits(bits, 16)))


def _str(base64: str) -> str:
    return _from_base64(base64).decode("utf-8", "surrogatepass")


# --- numpy ---------------------------------------------------------------------------------------


def dtype_text(dtype: np.dtype[np.generic]) -> str | None:
    """How a dtype is written: `<f4`, `>i8`, `<U5`; None for one that is not stored."""
    text = dtype.str
    if _DTYPE.fullmatch(text) is None or not dtype.itemsize or np.dtype(text) != dtype:
        return None
    # On most machines two of C's integer types are 64 bits wide, and numpy has a class for each.
    return text if np.dtype(text).type is dtype.type else dtype.char


def _parse_dtype(text: str) -> np.dtype[np.generic]:
    try:
        dtype = np.dtype(text) if _DTYPE.fullmatch(text) else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no numpy dtype here") from error
    if dtype is None or dtype_text(dtype) != text:
        raise ValueError(f"{text[:40]!r} is no numpy dtype that is stored")
    return dtype


def encode_numpy_scalar(value: np.generic) -> JsonValue | None:
    """Its dtype and bytes; None for one that is not stored.

    Text and bytes stand apart: numpy's own buffers forget the zeros at their ends.
    """
    if type(value) is np.str_:
        return {"$": "numpy.str", "base64": _base64(value.encode("utf-8", "surrogatepass"))}
    if type(value) is np.bytes_:
        return {"$": "numpy.bytes", "base64": _base64(bytes(value))}
    text = dtype_text(value.dtype)
    if text is None or value.dtype.type is not type(value):
        return None
    return {"$": "numpy", "dtype": text, "base64": _base64(value.tobytes())}


def _numpy_scalar(dtype: str, base64: str) -> object:
    parsed, data = _parse_dtype(dtype), _from_base64(base64)
    if parsed.kind in "SU" or len(data) != parsed.itemsize:
        raise ValueError(f"{len(data)} bytes are no scalar of dtype {dtype!r}")
    found: object = np.frombuffer(data, parsed)[0]
    return found


def _numpy_str(base64: str) -> np.str_:
    return np.str_(_str(base64))


def _numpy_bytes(base64: str) -> np.bytes_:
    return np.bytes_(_from_base64(base64))


def stored_array(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A row-major array of a dtype that safetensors has: a view where that is possible.

    Other byte orders are swapped, times become int64, and what remains (text, bytes, long double)
    becomes uint8 with a last dimension of the item's size.
    """
    plain = np.asarray(array, order="C")
    if plain.dtype.kind in "mM":
        plain = plain.view(plain.dtype.str[0] + "i8")
    elif not _is_standard(plain.dtype):
        return plain.reshape(*plain.shape, 1).view(np.uint8)
    return _native(plain)


def restored_array(stored: object, dtype: str) -> NDArray[np.generic]:
    """The array of dtype `dtype` that `stored_array` took apart; shares its memory if it can.

    Args:
        stored: an array, or what numpy sees as one (a CPU tensor).
        dtype: as `dtype_text` wrote it.
    """
    target, plain = _parse_dtype(dtype), _as_array(stored)
    if not _is_standard(target) and target.kind not in "mM":
        if plain.dtype != np.uint8 or plain.shape[-1:] != (target.itemsize,):
            raise ValueError(f"{_described(plain)} cannot hold items of dtype {dtype!r}")
        return np.ascontiguousarray(plain).view(target).reshape(plain.shape[:-1])
    kept = target.newbyteorder("=") if target.kind not in "mM" else np.dtype(np.int64)
    if plain.dtype != kept:
        raise ValueError(f"{_described(plain)} is not the stored form of dtype {dtype!r}")
    if plain.dtype == target:
        return plain
    return plain.view(target) if target.isnative else plain.byteswap().view(target)


def _as_array(value: object) -> NDArray[np.generic]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # numpy lacks a tensor's dtype, or it is on a GPU
        raise ValueError(f"a {type(value).__name__} is no array: {error}") from error


def parse_array_dtype(text: str) -> None:
    """Check the dtype of an array.

    Raises:
        ValueError: `dtype_text` writes no such thing.
    """
    _parse_dtype(text)


def array_identity(array: NDArray[np.generic]) -> tuple[object, ...]:
    """Equal for two views of the same elements; an empty array equals itself only."""
    if not array.size:
        return (id(array),)
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


def _is_standard(dtype: np.dtype[np.generic]) -> bool:
    return dtype.itemsize in _ITEM_SIZES.get(dtype.kind, ())


def _native(array: NDArray[np.generic]) -> NDArray[np.generic]:
    # Bytes are swapped and then named anew: a conversion could quieten a signalling NaN.
    return array if array.dtype.isnative else array.byteswap().view(array.dtype.newbyteorder("="))


def _described(array: NDArray[np.generic]) -> str:
    return f"an array of {array.dtype} and shape {array.shape}"


CONSTANTS: Mapping[type, Callable[[Any], JsonValue]] = {
    type(None): lambda value: None,
    bool: bool,
    int: encode_int,
    float: encode_float,
    complex: encode_complex,
    str: encode_str,
    bytes: encode_bytes,
    bytearray: encode_bytearray,
}
"""Exact type of a plain Python constant to its encoder."""
SCALARS: Mapping[str, tuple[tuple[str, ...], Callable[..., object]]] = {
    "int": (("hex",), decode_hex_int),
    "float": (("bits",), _float),
    "complex": (("bits",), _complex),
    "str": (("base64",), _str),
    "bytes": (("base64",), _from_base64),
    "bytearray": (("base64",), lambda base64: bytearray(_from_base64(base64))),
    "numpy": (("dtype", "base64"), _numpy_scalar),
    "numpy.str": (("base64",), _numpy_str),
    "numpy.bytes": (("base64",), _numpy_bytes),
}
"""Tag of a scalar to its fields, all text, and the decoder that takes them in this order."""
