"""What changed in a tensor, block by block, and by how much: one pass over both arrays.

Shapes: B blocks of DETECTION_BLOCK_BYTES, E elements a block.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ckptcoord.codec.elements import elements_of
from ckptcoord.codec.jit import compiled, summing
from ckptcoord.codec.smallfloats import float_values
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ckptcoord.codec.elements import Elements
    from ckptcoord.codec.jit import Value

    Bytes: TypeAlias = NDArray[np.uint8]
    Mask: TypeAlias = NDArray[np.bool_]
    Sums: TypeAlias = NDArray[np.float64]

DETECTION_BLOCK_BYTES = 4096
_PART_BYTES = 4 << 20  # of a tensor, that one thread looks at in one go
_F16_SCALE = np.float32(2.0**112)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a tensor differs from its base.

    Attributes:
        changed: whether any bit does.
        blocks: by block, whether any bit does.
        l2_change: norm of the difference, over elements that differ in any bit; NaN or infinite
            where such an element is or was not finite.
        l2_base: norm of the base.
    """

    changed: bool
    blocks: Mask
    l2_change: float
    l2_base: float

    @property
    def relative(self) -> float:
        """Norm of the difference, relative to that of the base; infinite against a base of zero."""
        if not self.changed:
            return 0.0
        return self.l2_change / self.l2_base if self.l2_base else math.inf


def detect(
    new: Bytes, base: Bytes, *, dtype: str, block_bytes: int = 64 << 10, threads: int = 1
) -> Change:
    """Compare the bytes of a tensor (N,) with those of its base (N,).

    Complex numbers count by their parts, integers by their values, and bytes behind the last whole
    element not at all in the norms.

    Args:
        new: contiguous.
        base: contiguous.
        dtype: of the elements, by safetensors' name.
        block_bytes: a multiple of DETECTION_BLOCK_BYTES; the last block may be shorter.
        threads: that work on it, the caller's among them.

    Raises:
        ConfigError: the dtype is unknown, the base has another size, or blocks have no such size.
    """
    elements = elements_of(dtype)
    if base.size != new.size:
        raise ConfigError(field="base", why=f"has {base.size} bytes, the tensor {new.size}")
    if block_bytes < 1 or block_bytes % DETECTION_BLOCK_BYTES:
        raise ConfigError(
            field="block_bytes", why=f"{block_bytes} is no multiple of {DETECTION_BLOCK_BYTES}"
        )
    fine = np.zeros(-(-new.size // DETECTION_BLOCK_BYTES), np.bool_)
    compare = _comparison(elements)

    def part(begin: int) -> Sums:
        span = slice(begin, begin + _PART_BYTES)
        first = begin // DETECTION_BLOCK_BYTES
        mask = fine[first : first + _PART_BYTES // DETECTION_BLOCK_BYTES]
        return _part(new[span], base[span], elements.width, mask, compare)

    starts = range(0, new.size, _PART_BYTES)
    if min(threads, len(starts)) > 1:
        with ThreadPoolExecutor(threads, "ckptcoord-detect") as pool:
            sums = list(pool.map(part, starts))
    else:
        sums = [part(begin) for begin in starts]
    change, size = np.sum(sums, axis=0).tolist() if sums else (0.0, 0.0)
    firsts = np.arange(0, fine.size, block_bytes // DETECTION_BLOCK_BYTES)
    blocks = np.logical_or.reduceat(fine, firsts) if fine.size else fine
    return Change(
        changed=bool(fine.any()),
        blocks=blocks,
        l2_change=math.sqrt(change),
        l2_base=math.sqrt(size),
    )


_Compare: TypeAlias = "Callable[[Bytes, Bytes, Mask, Sums], None]"


def _part(new: Bytes, base: Bytes, width: int, mask: Mask, compare: _Compare) -> Sums:
    """Fill the mask (B,) and return the squares of both norms, (2,)."""
    sums = np.zeros(2)
    whole = new.size // DETECTION_BLOCK_BYTES * DETECTION_BLOCK_BYTES
    with np.errstate(over="ignore", invalid="ignore"):
        if whole:
            blocks = mask[: whole // DETECTION_BLOCK_BYTES]
            compare(_aligned(new[:whole]), _aligned(base[:whole]), blocks, sums)
        if whole < new.size:
            compare(_padded(new[whole:], width), _padded(base[whole:], width), mask[-1:], sums)
            mask[-1] = not np.array_equal(new[whole:], base[whole:])
    return sums


def _aligned(data: Bytes) -> Bytes:
    return data if data.ctypes.data % 8 == 0 else data.copy()


def _padded(data: Bytes, width: int) -> Bytes:
    """Whole elements, and zeros up to a block: those change nothing."""
    block = np.zeros(DETECTION_BLOCK_BYTES, np.uint8)
    size = data.size // width * width
    block[:size] = data[:size]
    return block


def _comparison(elements: Elements) -> _Compare:
    """What compares whole blocks of such elements."""
    width = elements.width
    if elements.dtype in ("F32", "F64"):
        bits, real = f"<i{width}", f"<f{width}"
        return lambda new, base, mask, sums: _floats(
            _read_only(new, bits),
            _read_only(base, bits),
            (_read_only(new, real), _read_only(base, real)),
            mask,
            sums,
        )
    if elements.dtype in _HALVES:
        kernel = _HALVES[elements.dtype]
        return lambda new, base, mask, sums: kernel(
            _read_only(new, "<i2"), _read_only(base, "<i2"), mask, sums
        )
    if width == 1:
        values = float_values(elements.dtype)
        return lambda new, base, mask, sums: _bytes(
            _read_only(new, "u1"), _read_only(base, "u1"), values, mask, sums
        )
    signed = "u" if elements.dtype.startswith("U") else "i"
    return lambda new, base, mask, sums: _integers(new, base, f"<{signed}{width}", mask, sums)


def _read_only(data: Bytes, dtype: str) -> NDArray[Any]:
    """Blocks (B, E) that kernels do not write: one type, one compilation."""
    words: NDArray[Any] = data.reshape(-1, DETECTION_BLOCK_BYTES).view(dtype)
    words.flags.writeable = False
    return words


def _integers(new: Bytes, base: Bytes, dtype: str, mask: Mask, sums: Sums) -> None:
    """Integers of two bytes or more are rare among what is trained: numpy will do."""
    a, b = _read_only(new, dtype), _read_only(base, dtype)
    mask[:] = (a != b).any(axis=1)
    old = b.astype(np.float64)
    sums[0] += np.square(a.astype(np.float64) - old).sum()
    sums[1] += np.square(old).sum()


@summing
def _bytes(new: Bytes, base: Bytes, values: NDArray[np.float32], mask: Mask, sums: Sums) -> None:
    for b in range(new.shape[0]):
        change, size, differs = 0.0, 0.0, False
        for j in range(DETECTION_BLOCK_BYTES):
            old = np.float64(values[base[b, j]])
            size += old * old
            if new[b, j] != base[b, j]:
                differs = True
                d = np.float64(values[new[b, j]]) - old
                change += d * d
        mask[b] = differs
        sums[0] += change
        sums[1] += size


@summing
def _norms(u: Value, v: Value, a: Value, o: Value) -> tuple[float, float, Value]:
    """Squares of both norms, and bits that differ, of one block (E,), as integers and as floats."""
    change, size, differs = 0.0, 0.0, u[0] ^ v[0]
    for j in range(u.size):
        old = np.float64(o[j])
        size += old * old
        d = np.float64(a[j]) - old
        # By bits: a NaN that stays is no change, and an infinity less itself is no number.
        change += d * d if u[j] != v[j] else 0.0
        differs |= u[j] ^ v[j]
    return change, size, differs


@compiled
def _floats(new: Value, base: Value, reals: Value, mask: Mask, sums: Sums) -> None:
    """Compare what numpy has as floats: integers (B, E), and both the same as floats."""
    a, o = reals
    for b in range(new.shape[0]):
        change, size, differs = _norms(new[b], base[b], a[b], o[b])
        mask[b] = differs != 0
        sums[0] += change
        sums[1] += size


@compiled
def _bf16(words: Value, b: int, to: Value) -> None:
    for j in range(to.size):
        to[j] = np.int32(words[b, j]) << 16


@compiled
def _f16(words: Value, b: int, to: Value) -> None:
    """Exponent and mantissa moved to their places, then scaled: right for denormals, too."""
    real = to.view(np.float32)
    for j in range(to.size):
        to[j] = (np.int32(words[b, j]) & 0x7FFF) << 13
    for j in range(to.size):
        real[j] *= _F16_SCALE
    for j in range(to.size):
        h = np.int32(words[b, j])
        special = 0x7F800000 if (h & 0x7C00) == 0x7C00 else 0
        to[j] |= special | (h & np.int32(-0x80000000))


@compiled
def _bf16s(new: Value, base: Value, mask: Mask, sums: Sums) -> None:
    u, v = np.empty(new.shape[1], np.int32), np.empty(new.shape[1], np.int32)
    for b in range(new.shape[0]):
        _bf16(new, b, u)
        _bf16(base, b, v)
        _add(u, v, mask, b, sums)


@compiled
def _f16s(new: Value, base: Value, mask: Mask, sums: Sums) -> None:
    u, v = np.empty(new.shape[1], np.int32), np.empty(new.shape[1], np.int32)
    for b in range(new.shape[0]):
        _f16(new, b, u)
        _f16(base, b, v)
        _add(u, v, mask, b, sums)


@compiled
def _add(u: Value, v: Value, mask: Mask, b: int, sums: Sums) -> None:
    """Add a block of floats of four bytes, given as integers."""
    change, size, differs = _norms(u, v, u.view(np.float32), v.view(np.float32))
    mask[b] = differs != 0
    sums[0] += change
    sums[1] += size


_HALVES: dict[str, Callable[..., None]] = {"BF16": _bf16s, "F16": _f16s}
