"""What a plain shard says of tensors that are approximations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec.bounded import GivenUp
from ckptcoord.codec.givenup import GIVEN_UP_KEY, given_up_in, given_up_metadata
from ckptcoord.codec.tensorfile import encode_header, parse_header, plan_layout
from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.digest import DIGEST_BYTES, Digest
from ckptcoord.errors import CorruptError

NAMES = ("a", "b.c", "Ünter")
AMOUNTS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


def header(metadata):
    layout = plan_layout(
        [TensorSpec(name=name, dtype="U8", shape=(0,)) for name in NAMES], metadata
    )
    data = encode_header(layout, [Digest(bytes(DIGEST_BYTES))] * len(NAMES))
    return parse_header(lambda at, size: data[at : at + size], len(data), path="f")


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.builds(lambda a, b: GivenUp(max_abs=a, relative_l2=b), AMOUNTS, AMOUNTS),
    )
)
def test_what_is_written_is_read(said):
    assert given_up_in(header(given_up_metadata(said)), path="f") == said
    assert bool(given_up_metadata(said)) is bool(said)


MALFORMED = (
    *("", "[]", "7", '{"x":[0.0,0.0]}', '{"a":[0.0]}', '{"a":[0,0.0]}', '{"a":[-1.0,0.0]}'),
    *('{"a":[0.0,-1.0]}', '{"a":null}', '{"a":[0.0,NaN]}', '{"a":[0.0,0.0],"a":[0.0,0.0]}'),
)


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_malformed_is_corrupt_and_the_file_is_named(text):
    with pytest.raises(CorruptError) as caught:
        given_up_in(header({GIVEN_UP_KEY: text}), path="folder/f")
    assert caught.value.path == "folder/f"
