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
_ROW_BYTES = 64 << 10  # what a loop looks at before it notes anything, where blocks are so large
_PARTS = 8  # of a tensor, for each thread
_LEAST_PART, _MOST_PART = 4 << 20, 32 << 20
_F16_SCALE = np.float32(2.0**112)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a tensor differs from its base.

    Attributes:
        changed: whether any bit does.
        blocks: by block, whether any bit does.
        l2_change: norm of the difference, over elements that differ in any bit; NaN or infinite
            where such an element is or was not finite, infinite where no double holds the squares.
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
    row = DETECTION_BLOCK_BYTES if block_bytes % _ROW_BYTES else _ROW_BYTES
    fine = np.zeros(-(-new.size // row), np.bool_)
    compare = _comparison(elements, row)
    share = new.size // max(1, threads * _PARTS) // _ROW_BYTES * _ROW_BYTES
    size = min(max(share, _LEAST_PART), _MOST_PART)

    def part(begin: int) -> Sums:
        span = slice(begin, begin + size)
        mask = fine[begin // row : (begin + size) // row]
        return _part(new[span], base[span], elements.width, mask, compare, row)

    starts = range(0, new.size, size)
    if min(threads, len(starts)) > 1:
        with ThreadPoolExecutor(threads, "ckptcoord-detect") as pool:
            sums = list(pool.map(part, starts))
    else:
        sums = [part(begin) for begin in starts]
    squares: list[float] = np.sum(sums, axis=0).tolist() if sums else [0.0, 0.0]
    firsts = np.arange(0, fine.size, block_bytes // row)
    blocks = np.logical_or.reduceat(fine, firsts) if fine.size else fine
    return Change(
        changed=bool(fine.any()),
        blocks=blocks,
        l2_change=math.sqrt(squares[0]),
        l2_base=math.sqrt(squares[1]),
    )


_Compare: TypeAlias = "Callable[[Bytes, Bytes, Mask, Sums], None]"


def _part(new: Bytes, base: Bytes, width: int, mask: Mask, compare: _Compare, row: int) -> Sums:
    """Fill the mask (B,) of rows and return the squares of both norms, (2,)."""
    sums = np.zeros(2)
    whole = new.size // row * row
    with np.errstate(over="ignore", invalid="ignore"):
        if whole:
            compare(_aligned(new[:whole]), _aligned(base[:whole]), mask[: whole // row], sums)
        if whole < new.size:
            rest, old_rest = (_padded(one[whole:], width, row) for one in (new, base))
            compare(rest, old_rest, mask[-1:], sums)
            mask[-1] = not np.array_equal(new[whole:], base[whole:])
    return sums


def _aligned(data: Bytes) -> Bytes:
    return data if data.ctypes.data % 8 == 0 else data.copy()


def _padded(data: Bytes, width: int, row: int) -> Bytes:
    """Whole elements, and zeros up to a row: those change nothing."""
    block = np.zeros(row, np.uint8)
    size = data.size // width * width
    block[:size] = data[:size]
    return block


def _comparison(elements: Elements, row: int) -> _Compare:
    """What compares whole rows of such elements."""
    width = elements.width

    def rows(data: Bytes, dtype: str) -> NDArray[Any]:
        return _read_only(data.reshape(-1, row), dtype)

    if elements.dtype in ("F32", "F64"):
        bits, real = f"<i{width}", f"<f{width}"
        return lambda new, base, mask, sums: _floats(
            rows(new, bits),
            rows(base, bits),
            (rows(new, real), rows(base, real)),
            mask,
            sums,
        )
    if elements.dtype in _HALVES:
        kernel = _HALVES[elements.dtype]
        return lambda new, base, mask, sums: kernel(rows(new, "<i2"), rows(base, "<i2"), mask, sums)
    if width == 1:
        values = float_values(elements.dtype)
        return lambda new, base, mask, sums: _bytes(
            rows(new, "u1"), rows(base, "u1"), values, mask, sums
        )
    signed = "u" if elements.dtype.startswith("U") else "i"
    whole = f"<{signed}{width}"
    return lambda new, base, mask, sums: _integers(rows(new, whole), rows(base, whole), mask, sums)


def _read_only(data: Bytes, dtype: str) -> NDArray[Any]:
    """Rows (B, E) that kernels do not write: one type, one compilation."""
    words: NDArray[Any] = data.view(dtype)
    words.flags.writeable = False
    return words


def _integers(new: NDArray[Any], base: NDArray[Any], mask: Mask, sums: Sums) -> None:
    """Integers of two bytes or more are rare among what is trained: numpy will do."""
    mask[:] = (new != base).any(axis=1)
    old = base.astype(np.float64)
    sums[0] += np.square(new.astype(np.float64) - old).sum()
    sums[1] += np.square(old).sum()


@summing
def _bytes(new: Bytes, base: Bytes, values: NDArray[np.float32], mask: Mask, sums: Sums) -> None:
    for b in range(new.shape[0]):
        change, size, differs = 0.0, 0.0, False
        for j in range(new.shape[1]):
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
