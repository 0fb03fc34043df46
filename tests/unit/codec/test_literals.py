"""What reads frames of literals reads all that we write, as zstandard does, and nothing else."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec import huffman, literals, masks, planes
from ckptcoord.codec.delta import PlaneKind

SIZES = [64, 65, 66, 67, 300, 5000, 32 << 10, 64 << 10, 140_001]
TABLES = literals.decoding_tables()
DECOMPRESSOR = zstandard.ZstdDecompressor()
cases = settings(deadline=None, max_examples=60)


def rng(seed):
    return np.random.default_rng(seed)


@st.composite
def a_plane(draw):
    size = draw(st.sampled_from(SIZES))
    spread = draw(st.sampled_from([0.5, 1, 3, 10, 30, 60, 90]))
    data = np.abs(rng(draw(st.integers(0, 999))).normal(scale=spread, size=size)).clip(0, 255)
    return data.astype(np.uint8) + np.uint8(draw(st.integers(0, 255)))


def written(plane):
    room = np.empty(huffman.frame_bound(plane.size), np.uint8)
    return huffman.LiteralWriter().encode(plane, room).tobytes()


def read(frame, size):
    """The plane, or None; and nothing behind it was touched."""
    out = np.full(size + 64, 0xA5, np.uint8)
    done = literals.read_frame(np.frombuffer(frame, np.uint8), out[:size], *TABLES)
    assert (out[size:] == 0xA5).all()
    return out[:size] if done else None


@cases
@given(plane=a_plane())
def test_every_frame_that_we_write_is_read(plane):
    assert read(written(plane), plane.size).tolist() == plane.tolist()


@cases
@given(
    kinds=st.lists(st.sampled_from(["alike", "noise", "one byte", "as before"]), min_size=2),
    seed=st.integers(0, 99),
)
def test_blocks_of_every_kind_are_read(kinds, seed):
    """Codes of a block's own, or those before; blocks as they are, and of one byte."""
    block = {
        "alike": lambda: rng(seed).integers(0, 9, 40_000, np.uint8),
        "noise": lambda: rng(seed).integers(0, 256, 40_000, np.uint8),
        "one byte": lambda: np.full(40_000, seed, np.uint8),
        "as before": lambda: rng(seed + 1).integers(0, 9, 40_000, np.uint8),
    }
    plane = np.concatenate([block[kind]() for kind in kinds])
    assert (read(written(plane), plane.size) == plane).all()


@pytest.mark.parametrize("symbols", [2, 3, 128, 129, 130, 254, 255, 256])
def test_trees_of_any_size_are_read(symbols):
    """Up to 128 weights stand there as they are; more are coded."""
    plane = (rng(symbols).random(60_000) ** 3 * symbols).astype(np.uint8)
    plane[: 2 * symbols] = np.arange(2 * symbols) % symbols
    frame = written(plane)
    assert len(frame) < plane.size, "it is coded"
    assert (read(frame, plane.size) == plane).all()


def check_as_zstandard_does(frame, size):
    """Exactly those are read that zstandard reads, and to the same."""
    found = read(frame, size)
    if found is not None:
        assert DECOMPRESSOR.decompress(frame) == found.tobytes()


@pytest.mark.parametrize("spread", [0.5, 3, 60])
@pytest.mark.parametrize("size", [65, 200])
def test_each_flipped_bit_is_seen_where_zstandard_sees_it(spread, size):
    plane = np.abs(rng(size).normal(scale=spread, size=size)).clip(0, 255).astype(np.uint8)
    frame = written(plane)
    for at in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[at // 8] ^= 1 << at % 8
        check_as_zstandard_does(bytes(flipped), size)


@settings(deadline=None, max_examples=400)
@given(plane=a_plane(), data=st.data())
def test_a_damaged_frame_is_refused_or_is_one_of_other_bytes(plane, data):
    frame = bytearray(written(plane))
    near = st.one_of(st.integers(9, min(len(frame), 160) - 1), st.integers(0, len(frame) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(near)] ^= data.draw(st.integers(1, 255))
    if data.draw(st.integers(0, 5)) == 0:
        del frame[data.draw(near) :]
    check_as_zstandard_does(bytes(frame), plane.size)


def test_a_tree_without_two_longest_codes_is_refused_as_zstandard_does():
    plane = np.tile(np.array([0, 1], np.uint8), 500)
    frame = bytearray(written(plane))
    at = frame.index(b"\x80\x10")  # one weight of 1, and that which it leaves
    frame[at + 1] = 0x20
    assert read(bytes(frame), plane.size) is None
    with pytest.raises(zstandard.ZstdError):
        DECOMPRESSOR.decompress(bytes(frame))


def foreign(plane):
    """A frame with sequences, a checksum and a size of another form."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(plane.tobytes())


def test_other_frames_are_left_to_zstandard():
    plane = np.tile(np.arange(200, dtype=np.uint8), 300)
    assert read(foreign(plane), plane.size) is None
    out = np.empty_like(plane)
    planes.PlaneCoder().decode(PlaneKind.ZSTD, memoryview(foreign(plane)), out)
    assert (out == plane).all()


def coded_planes(*parts):
    heads = b"".join(planes.PLANE_HEADER.pack(kind, len(part)) for kind, part in parts)
    return np.frombuffer(heads + b"".join(part for _, part in parts), np.uint8)


def test_planes_are_decoded_in_one_call_and_what_is_foreign_is_left():
    size = 70_001
    rows = [
        rng(0).integers(0, 256, size, np.uint8),
        rng(0).integers(0, 20, size, np.uint8),
        (rng(0).random(size) < 0.1).astype(np.uint8) * 9,
        (rng(0).random(size) < 0.001).astype(np.uint8),
        np.full(size, 7, np.uint8),
    ]
    coder = planes.PlaneCoder()
    parts = []
    for row in rows:
        counts = np.bincount(row, minlength=256)
        share = counts[counts > 0] / size
        bits = np.array([float(-(share * np.log2(share)).sum())])
        room = np.empty(planes.plane_bound(size), np.uint8)
        kind, coded = coder.encode(row, bits, int(counts.argmax()), room)
        parts.append((kind, coded.tobytes()))
    assert [kind for kind, _ in parts] == [0, 2, 3, 1, 1]
    parts.append((PlaneKind.ZSTD, foreign(rows[1])))
    out = np.zeros((6, size + 5), np.uint8)
    room = np.empty(planes.plane_bound(size), np.uint8)
    done = coder.decode_most(coded_planes(*parts), size, out, room)
    assert done == [False, True, True, True, True, False]
    for row, found in list(zip(rows, out, strict=False))[1:]:
        assert (found[:size] == row).all()
        assert not found[size:].any()


@pytest.mark.skipif(not masks.HAS_BIT_MOVES, reason="this processor has no such instructions")
@given(word=st.integers(0, 2**64 - 1), bits=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_bytes_of_a_word_are_moved_alike_by_instruction_and_by_table(word, bits):
    word, bits = np.uint64(word), np.uint64(bits)
    low = np.uint64(masks.gathered_by_table(word, bits))
    assert masks.gathered_at_once(word, bits) == low
    assert masks.spread_at_once(word, bits) == masks.spread_by_table(word, bits)
    assert masks.spread_by_table(low, bits) == masks.spread_at_once(low, bits)


@given(word=st.integers(0, 2**64 - 1), bits=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_bytes_of_a_word_are_moved_to_its_low_end(word, bits):
    data = word.to_bytes(8, "little")
    chosen = bytes(byte for at, byte in enumerate(data) if bits >> at & 1)
    low = masks.gathered_by_table(np.uint64(word), np.uint64(bits))
    assert int(low) == int.from_bytes(chosen, "little")
