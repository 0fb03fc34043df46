"""Digests of buffers, without copying them.

BLAKE3 names content and proves it; XXH3 only says quickly whether two buffers differ by accident.
A buffer is contiguous bytes; that of a uint8 array is its `.data`.
"""

from __future__ import annotations

from typing import TypeAlias

import xxhash
from blake3 import blake3

from ckptcoord.core.digest import Digest

Buffer: TypeAlias = bytes | bytearray | memoryview

XXH3_BYTES = 16


class Hasher:
    """BLAKE3 of bytes that come in parts.

    Args:
        threads: at most so many cores for one `update`; more than one pays from about 1 MiB.
    """

    __slots__ = ("_state",)

    def __init__(self, *, threads: int = 1) -> None:
        self._state = blake3(max_threads=threads)

    def update(self, data: Buffer) -> None:
        """Take in the next bytes; other Python threads run meanwhile."""
        self._state.update(data)

    def digest(self) -> Digest:
        """The digest of all bytes so far."""
        return Digest(self._state.digest())


def blake3_digest(data: Buffer, *, threads: int = 1) -> Digest:
    """The BLAKE3 digest of a buffer; `threads` as for `Hasher`."""
    return Digest(blake3(data, max_threads=threads).digest())


def xxh3(data: Buffer) -> bytes:
    """The 16 bytes of a buffer's XXH3-128, big-endian. No defence against intent."""
    return xxhash.xxh3_128_digest(data)
