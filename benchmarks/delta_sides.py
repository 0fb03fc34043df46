"""The sides of delta.py: ckptcoord's delta codec, its peers, and full saves.

A side turns an array of bytes, with or without a base, into parts that can be stored, and back. A
peer that knows nothing of a base gets what a user would give it: the raw bytes, their XOR with the
base, or (zipnn) the difference of the two, and counts with the smallest.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import zstandard
from blake3 import blake3
from numba import njit

from ckptcoord.codec import delta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

Bytes: TypeAlias = "NDArray[np.uint8]"
WordArray: TypeAlias = "NDArray[np.unsignedinteger]"
Parts: TypeAlias = "list[bytes]"

OURS, AGGRESSIVE, FULL = "ckptcoord auto", "ckptcoord aggressive", "full"
PEERS = ("zstd-1 on XOR", "zipnn", "blosc2 shuffle+zstd")
SIDES = (OURS, AGGRESSIVE, *PEERS, FULL)
_ZSTD_PART_BYTES = 1 << 20
ELEMENT_BYTES = {"F32": 4, "BF16": 2}


class Side(Protocol):
    """One way to code an array.

    Attributes:
        name: the side, one of `SIDES`.
        variant: how it is given the array; `name` and `variant` together are unique.
    """

    name: str
    variant: str

    def takes(self, base: Bytes | None) -> bool:
        """Whether it can do without a base where there is none."""
        ...

    def encode(self, new: Bytes, base: Bytes | None, dtype: str, threads: int) -> Parts:
        """The parts to store."""
        ...

    def decode(self, parts: Parts, out: Bytes, dtype: str, threads: int) -> None:
        """Fill `out`, which holds the base."""
        ...


def make_sides(pool: Executor) -> tuple[list[Side], list[str]]:
    """All sides, in all variants, and the names of those that are not installed."""
    sides: list[Side] = [
        _Ours(OURS, delta.Level.AUTO),
        _Ours(AGGRESSIVE, delta.Level.AGGRESSIVE),
        _Peer(FULL, Given.RAW, _Copy(), pool),
        _Peer(PEERS[0], Given.RAW, _Zstd(), pool, part_bytes=_ZSTD_PART_BYTES, deltas=False),
        _Peer(PEERS[0], Given.XOR, _Zstd(), pool, part_bytes=_ZSTD_PART_BYTES),
    ]
    absent = []
    try:
        zipnn = _ZipNN()
        sides += [_Peer(PEERS[1], given, zipnn, pool) for given in Given]
    except ImportError:
        absent.append(PEERS[1])
    try:
        blosc2 = _Blosc2()
        sides += [_Peer(PEERS[2], given, blosc2, pool) for given in (Given.RAW, Given.XOR)]
    except ImportError:
        absent.append(PEERS[2])
    return sides, absent


class _Ours:
    """ckptcoord; its encoding takes a BLAKE3 digest of the bytes, as a save does."""

    def __init__(self, name: str, level: delta.Level) -> None:
        self.name, self.variant, self._level = name, "delta", level

    def takes(self, base: Bytes | None) -> bool:
        del base
        return True

    def encode(self, new: Bytes, base: Bytes | None, dtype: str, threads: int) -> Parts:
        blake3(new.data, max_threads=threads).digest()
        return [delta.encode(new, base, dtype=dtype, level=self._level, threads=threads)]

    def decode(self, parts: Parts, out: Bytes, dtype: str, threads: int) -> None:
        delta.decode(memoryview(parts[0]), out, dtype=dtype, threads=threads)


# --- what a peer is given -------------------------------------------------------------------------


class Given(StrEnum):
    """What a peer compresses."""

    RAW = "raw"
    XOR = "XOR"
    DIFFERENCE = "difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """Kernels over the elements of a float dtype as unsigned words.

    Attributes:
        subtract: `(new, base, out)`, each `[elements]`.
        add: `(difference, out)`, in place: `out` is the base on entry.
    """

    word: type[np.unsignedinteger]
    subtract: Callable[..., None]
    add: Callable[..., None]


def _prepare(given: Given, new: Bytes, base: Bytes | None, scratch: Bytes, dtype: str) -> Bytes:
    """What a peer compresses: `new` itself or `scratch`, filled; arrays are `[bytes]`."""
    if given is Given.RAW:
        return new
    assert base is not None
    if given is Given.XOR:
        return np.bitwise_xor(new, base, out=scratch)
    words = _words(dtype)
    words.subtract(new.view(words.word), base.view(words.word), scratch.view(words.word))
    return scratch


def _restore(given: Given, prepared: Bytes, out: Bytes, dtype: str) -> None:
    """The inverse of `_prepare`, into `out`, which holds the base."""
    if given is Given.RAW:
        out[:] = prepared
    elif given is Given.XOR:
        np.bitwise_xor(out, prepared, out=out)
    else:
        words = _words(dtype)
        words.add(prepared.view(words.word), out.view(words.word))


@functools.cache
def _words(dtype: str) -> _Words:
    """The kernels for a dtype, compiled at their first call.

    Floats map to integers of the same order. Their difference is folded, so that small ones of
    either sign are small words, and then rotated right by one, which zipnn's own rotation, meant to
    bring an exponent's bits together, takes back.
    """
    kinds: dict[str, type[np.unsignedinteger]] = {"F32": np.uint32, "BF16": np.uint16}
    word = kinds[dtype]
    top = 8 * ELEMENT_BYTES[dtype] - 1

    @njit(nogil=True)
    def ordered(value: np.unsignedinteger) -> np.unsignedinteger:
        return word(value ^ (word(word(0) - word(value >> top)) >> 1))  # its own inverse

    @njit(nogil=True)
    def subtract(new: WordArray, base: WordArray, out: WordArray) -> None:
        for i in range(out.size):
            d = word(ordered(new[i]) - ordered(base[i]))
            z = word(word(d << 1) ^ word(word(0) - word(d >> top)))
            out[i] = word(z >> 1) | word(z << top)

    @njit(nogil=True)
    def add(difference: WordArray, out: WordArray) -> None:
        for i in range(out.size):
            r = difference[i]
            z = word(word(r << 1) | word(r >> top))
            d = word(word(z >> 1) ^ word(word(0) - word(z & word(1))))
            out[i] = ordered(word(ordered(out[i]) + d))

    return _Words(word=word, subtract=subtract, add=add)


# --- the peers ------------------------------------------------------------------------------------


class _Codec(Protocol):
    """A compressor that knows of no base."""

    def compress(self, data: Bytes, dtype: str, threads: int, *, keep: bool) -> bytes:
        """The coded bytes; where `keep` is false the data may be destroyed."""
        ...

    def decompress(self, coded: bytes, size: int, dtype: str, threads: int) -> bytes | bytearray:
        """The `size` bytes again."""
        ...


class _Peer:
    """A compressor, and what it is given.

    Args:
        part_bytes: for a compressor of one thread: the data is cut into parts of this size, which
            are shared out; else it gets all at once, and runs the threads itself.
        deltas: whether this variant also stands for the side where there is a base.
    """

    def __init__(
        self,
        name: str,
        given: Given,
        codec: _Codec,
        pool: Executor,
        *,
        part_bytes: int | None = None,
        deltas: bool = True,
    ) -> None:
        self.name, self.variant = name, str(given)
        self._given, self._codec, self._pool = given, codec, pool
        self._part_bytes, self._deltas = part_bytes, deltas
        self._scratch = np.empty(0, np.uint8)

    def takes(self, base: Bytes | None) -> bool:
        return self._given is Given.RAW if base is None else self._deltas

    def encode(self, new: Bytes, base: Bytes | None, dtype: str, threads: int) -> Parts:
        if self._scratch.size < new.size:
            self._scratch = np.empty_like(new)
        inner = threads if self._part_bytes is None else 1

        def one(start: int, end: int) -> bytes:
            scratch = self._scratch[start:end]
            before = None if base is None else base[start:end]
            data = _prepare(self._given, new[start:end], before, scratch, dtype)
            return self._codec.compress(data, dtype, inner, keep=self._given is Given.RAW)

        return self._over_parts(one, new.size, threads)

    def decode(self, parts: Parts, out: Bytes, dtype: str, threads: int) -> None:
        size = self._part_bytes or out.size
        inner = threads if self._part_bytes is None else 1

        def one(start: int, end: int) -> bytes:
            data = self._codec.decompress(parts[start // size], end - start, dtype, inner)
            _restore(self._given, np.frombuffer(data, np.uint8), out[start:end], dtype)
            return b""

        self._over_parts(one, out.size, threads)

    def _over_parts(self, work: Callable[[int, int], bytes], size: int, threads: int) -> Parts:
        """What `work` returns for each part, in order."""
        step = self._part_bytes or size
        starts = [min(size, step * index) for index in range(math.ceil(size / step))]
        ends = [min(size, start + step) for start in starts]
        run: Callable[..., object] = map if threads == 1 or len(starts) == 1 else self._pool.map
        found = run(work, starts, ends)
        return list(found)  # type: ignore[call-overload,no-any-return]


class _Copy:
    """No compression: a full save's bytes."""

    def compress(self, data: Bytes, dtype: str, threads: int, *, keep: bool) -> bytes:
        del dtype, threads, keep
        return data.tobytes()

    def decompress(self, coded: bytes, size: int, dtype: str, threads: int) -> bytes:
        del size, dtype, threads
        return coded


class _Zstd:
    """zstd at level 1, with a context a thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def compress(self, data: Bytes, dtype: str, threads: int, *, keep: bool) -> bytes:
        del dtype, threads, keep
        return self._contexts()[0].compress(data.data)

    def decompress(self, coded: bytes, size: int, dtype: str, threads: int) -> bytes:
        del dtype, threads
        return self._contexts()[1].decompress(coded, max_output_size=size)

    def _contexts(self) -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
        if not hasattr(self._of_thread, "contexts"):
            self._of_thread.contexts = (
                zstandard.ZstdCompressor(level=1),
                zstandard.ZstdDecompressor(),
            )
        contexts: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]
        contexts = self._of_thread.contexts
        return contexts


class _ZipNNObject(Protocol):
    """What is used of `zipnn.ZipNN`."""

    def compress(self, data: bytearray | memoryview) -> bytes: ...

    def decompress(self, data: bytes) -> bytearray: ...


class _ZipNN:
    """zipnn with its own settings for the dtype."""

    def __init__(self) -> None:
        self._make = importlib.import_module("zipnn").ZipNN
        self._made: dict[tuple[str, int], _ZipNNObject] = {}

    def compress(self, data: Bytes, dtype: str, threads: int, *, keep: bool) -> bytes:
        # zipnn rotates the bits of its input where they lie, even those of immutable `bytes`.
        given = bytearray(data) if keep else data.data
        return self._of(dtype, threads).compress(given)

    def decompress(self, coded: bytes, size: int, dtype: str, threads: int) -> bytearray:
        del size
        return self._of(dtype, threads).decompress(coded)

    def _of(self, dtype: str, threads: int) -> _ZipNNObject:
        key = (dtype, threads)
        if key not in self._made:
            name = {"F32": "float32", "BF16": "bfloat16"}[dtype]
            self._made[key] = self._make(input_format="byte", bytearray_dtype=name, threads=threads)
        return self._made[key]


class _Blosc2:
    """blosc2 with its shuffle and zstd at its level 1; higher ones save under 1 % at a fourth."""

    def __init__(self) -> None:
        self._blosc2 = importlib.import_module("blosc2")

    def compress(self, data: Bytes, dtype: str, threads: int, *, keep: bool) -> bytes:
        del keep
        coded: bytes = self._blosc2.compress2(
            data,
            codec=self._blosc2.Codec.ZSTD,
            clevel=1,
            filters=[self._blosc2.Filter.SHUFFLE],
            filters_meta=[0],
            typesize=ELEMENT_BYTES[dtype],
            nthreads=threads,
        )
        return coded

    def decompress(self, coded: bytes, size: int, dtype: str, threads: int) -> bytes:
        del size, dtype
        decoded: bytes = self._blosc2.decompress2(coded, nthreads=threads)
        return decoded


def stored_bytes(parts: Sequence[bytes]) -> int:
    """What the parts take."""
    return sum(map(len, parts))
