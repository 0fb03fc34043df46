"""Digests of buffers."""

import blake3
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec.digest import XXH3_BYTES, Hasher, blake3_digest, xxh3
from ckptcoord.core.digest import Digest


@given(data=st.binary(max_size=5000), threads=st.integers(1, 3))
def test_a_digest_is_blake3_of_the_bytes_whatever_holds_them(data, threads):
    want = Digest(blake3.blake3(data).digest())
    array = np.frombuffer(data, dtype=np.uint8)
    for buffer in (data, bytearray(data), memoryview(data), array.data):
        assert blake3_digest(buffer, threads=threads) == want


@given(parts=st.lists(st.binary(max_size=2000), max_size=5))
def test_parts_give_the_digest_of_the_whole(parts):
    hasher = Hasher()
    for part in parts:
        hasher.update(part)
    assert hasher.digest() == blake3_digest(b"".join(parts))


def test_several_threads_give_the_digest_of_one():
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).data
    hasher = Hasher(threads=2)
    hasher.update(data)
    assert blake3_digest(data, threads=2) == blake3_digest(data) == hasher.digest()


def test_what_is_not_bytes_is_refused():
    with pytest.raises(BufferError):
        blake3_digest(np.arange(12, dtype=np.float32).data)


def test_a_buffer_with_gaps_is_refused():
    with pytest.raises((BufferError, ValueError)):
        blake3_digest(np.arange(10, dtype=np.uint8)[::2].data)


def test_xxh3_is_sixteen_bytes_big_endian():
    assert xxh3(b"abc") == xxhash.xxh3_128(b"abc").intdigest().to_bytes(XXH3_BYTES, "big")
