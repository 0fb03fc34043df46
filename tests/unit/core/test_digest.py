"""Digests: one text for each value, and nothing else is one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.digest import DIGEST_BYTES, Digest
from ckptcoord.errors import InvalidNameError

VALUES = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)


@given(VALUES)
@settings(max_examples=50)
def test_a_digests_text_is_parsed_back(value):
    digest = Digest(value)
    assert Digest.parse(str(digest)) == digest
    assert str(digest) == f"blake3:{value.hex()}" == f"blake3:{digest.hex}"


@given(VALUES, VALUES)
@settings(max_examples=50)
def test_digests_are_equal_hashed_and_ordered_by_their_bytes(a, b):
    assert (Digest(a) == Digest(b)) is (a == b)
    assert (Digest(a) < Digest(b)) is (a < b)
    assert len({Digest(a), Digest(a), Digest(b)}) == len({a, b})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blake3:",
        "blake3:" + "0" * 63,
        "blake3:" + "0" * 65,
        "blake3:" + "A" * 64,
        "BLAKE3:" + "a" * 64,
        "sha256:" + "a" * 64,
        "a" * 64,
        "blake3:" + "a" * 64 + "\n",
        " blake3:" + "a" * 64,
        "blake3:" + "٣" * 64,
    ],
)
def test_any_other_text_is_no_digest(text):
    with pytest.raises(InvalidNameError, match="is not blake3:<64 hex digits>"):
        Digest.parse(text)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_digest_of_another_length_is_refused(length):
    with pytest.raises(InvalidNameError, match="32 bytes"):
        Digest(bytes(length))
