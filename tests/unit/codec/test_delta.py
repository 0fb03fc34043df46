"""The delta codec gives back what it was given, and refuses what it was not."""

from contextlib import suppress

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec import delta
from ckptcoord.codec.delta import DecodeError, FrameKind, Level, PlaneKind
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError

DTYPES = sorted(ITEM_BYTES)
LEVELS = list(Level)
FLOATS = {"F32": np.float32, "F64": np.float64, "F16": np.float16}


def rng(seed=0):
    return np.random.default_rng(seed)


def coded(new, base, dtype="F32", **how):
    return delta.encode(new, base, dtype=dtype, **how)


def decoded(data, base, size, dtype="F32", threads=1):
    out = np.full(size, 0xA5, np.uint8) if base is None else base.copy()
    delta.decode(memoryview(data), out, dtype=dtype, threads=threads)
    return out


def check(new, base, dtype, level=Level.AUTO, threads=1):
    data = coded(new, base, dtype, level=level, threads=threads)
    if base is None:
        assert not delta.needs_base(memoryview(data))
    under = base if delta.needs_base(memoryview(data)) else None
    out = decoded(data, under, new.size, dtype, threads)
    assert out.tobytes() == new.tobytes()
    assert sum(delta.summary(memoryview(data)).values()) == len(data)
    return data


def trained(size, dtype, seed=0, step=1e-4):
    """A base and what a small step makes of it."""
    base = rng(seed).normal(scale=0.02, size=size)
    new = base + rng(seed + 1).normal(scale=step * 0.02, size=size)
    if dtype == "BF16":
        return tuple(
            (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            for array in (new, base)
        )
    return tuple(array.astype(FLOATS[dtype]).view(np.uint8) for array in (new, base))


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_what_was_encoded_is_decoded_bit_for_bit(dtype, level, data):
    """Any bits, of any length, against any base."""
    size = data.draw(st.one_of(st.integers(0, 70), st.integers(1000, 5000)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    new = rng(seed).integers(0, 256, size, dtype=np.uint8)
    kind = data.draw(st.sampled_from(["none", "other", "same", "near", "sparse"]))
    base = {
        "none": None,
        "other": rng(seed + 1).integers(0, 256, size, dtype=np.uint8),
        "same": new.copy(),
        "near": new + rng(seed + 2).integers(0, 3, size, dtype=np.uint8),
        "sparse": np.where(rng(seed).random(size) < 0.01, new ^ 1, new),
    }[kind]
    check(new, base, dtype, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_every_special_value_survives_against_every_other(dtype, level):
    real = FLOATS[dtype]
    word = np.dtype(f"u{np.dtype(real).itemsize}")
    info = np.finfo(real)
    values = np.array([0.0, -0.0, np.inf, -np.inf, info.max, info.min, info.tiny, -info.tiny], real)
    bits = values.view(word).tolist()
    bits += [int(b) ^ 1 for b in bits] + [2 ** (8 * word.itemsize) - 1, 1, 2]  # NaNs, denormals
    new = np.array([a for a in bits for _ in bits] * 9, word).view(np.uint8)
    base = np.array([b for _ in bits for b in bits] * 9, word).view(np.uint8)
    check(new, base, dtype, level)
    check(new, None, dtype, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("extra", [0, 1, 1024, 1025])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_training_step_over_several_frames(dtype, level, extra, threads):
    new, base = trained((2 * delta.FRAME_BYTES) // ITEM_BYTES[dtype], dtype)
    tail = rng(5).integers(0, 256, extra, dtype=np.uint8)
    new = np.concatenate((new, tail))
    base = np.concatenate((base, tail[::-1]))
    one = check(new, base, dtype, level)
    assert check(new, base, dtype, level, threads) == one
    assert len(one) < 0.9 * new.size


def test_arrays_at_odd_addresses_and_read_only_ones():
    new, base = trained(50_000, "F32")
    room = np.empty(3 * new.size + 64, np.uint8)
    odd_new, odd_base = room[1 : 1 + new.size], room[new.size + 10 :][: new.size]
    odd_new[:], odd_base[:] = new, base
    odd_new.flags.writeable = False
    want = coded(new, base)
    assert coded(odd_new, odd_base) == want
    out = room[2 * new.size + 19 :][: new.size]
    out[:] = base
    delta.decode(memoryview(want), out, dtype="F32")
    assert out.tobytes() == new.tobytes()


def test_encoding_changes_neither_array():
    new, base = trained(300_000, "F32")
    copies = new.copy(), base.copy()
    coded(new, base, threads=2)
    assert (new == copies[0]).all()
    assert (base == copies[1]).all()


# --- the choice -----------------------------------------------------------------------------------


def test_an_unchanged_tensor_costs_a_header_a_frame():
    base = rng().integers(0, 256, 3 * delta.MAX_FRAME_BYTES, dtype=np.uint8)
    data = check(base, base.copy(), "F32")
    assert len(data) == 3 * delta.HEADER.size
    assert delta.needs_base(memoryview(data))
    assert delta.summary(memoryview(data)) == {"header": len(data)}


@pytest.mark.parametrize("missing", [0, 4, 700 << 10])
@pytest.mark.parametrize("offset", [0, 4], ids=["", "unaligned"])
def test_a_frame_holds_a_mebibyte_of_changes_and_four_in_all(missing, offset):
    mib = delta.FRAME_BYTES
    new, base = trained(10 * mib // 4, "F32")
    mixed = np.empty(10 * mib + offset, np.uint8)[offset:]
    mixed[:] = base
    for start, end in ((0, 3), (4, 5), (5.25, 5.5), (6, 6.25), (7, 7.75), (9, 10)):
        mixed[int(start * mib) : int(end * mib)] = new[int(start * mib) : int(end * mib)]
    size = 10 * mib - missing
    data = memoryview(check(mixed[:size], base[:size], "F32"))
    spans = [frame.raw_bytes for frame in delta.frames(data)]
    assert sum(spans) == size
    wanted = [mib] * 10 if offset else [mib, mib, 2 * mib, mib, 2 * mib, 2 * mib, mib]
    wanted[-1] -= missing
    assert spans == wanted


def test_a_changed_row_costs_little_more_than_itself():
    new, base = trained(delta.FRAME_BYTES, "F32")
    sparse = base.copy()
    sparse[70_000:73_072] = new[70_000:73_072]
    data = check(sparse, base, "F32")
    assert len(data) < 3072 + 2048 + delta.FRAME_BYTES // 8192 + 200


@pytest.mark.parametrize(
    ("dtype", "step", "ratio"), [("F32", 1e-4, 1.7), ("BF16", 1e-3, 6.0), ("F64", 1e-4, 1.2)]
)
def test_a_small_step_is_coded_as_a_difference(dtype, step, ratio):
    new, base = trained(500_000, dtype, step=step)
    data = check(new, base, dtype)
    assert any(key.startswith("difference") for key in delta.summary(memoryview(data)))
    assert new.size / len(data) > ratio


@pytest.mark.parametrize(("dtype", "step", "gain"), [("F32", 1e-4, 1.01), ("BF16", 1e-3, 1.1)])
def test_the_exponents_of_the_base_make_it_smaller(dtype, step, gain):
    new, base = trained(500_000, dtype, step=step)
    auto, small = (check(new, base, dtype, level) for level in LEVELS)
    assert any(key.endswith(".contexts") for key in delta.summary(memoryview(small)))
    assert len(auto) / len(small) > gain


def test_a_sparse_plane_a_masked_one_and_one_of_codes_are_chosen():
    new, base = trained(500_000, "F32")
    found = delta.summary(memoryview(check(new, base, "F32")))
    late = delta.summary(memoryview(check(*trained(500_000, "BF16", step=2e-3), "BF16")))
    kinds = {key.partition(".")[2] for key in {**found, **late}}
    assert {"verbatim", "sparse", "zstd", "masked"} <= kinds


def test_the_base_is_left_out_where_it_does_not_help():
    new, _ = trained(500_000, "F32")
    _, base = trained(500_000, "F32", seed=9)
    data = check(new, base, "F32")
    assert not delta.needs_base(memoryview(data))
    assert new.size / len(data) > 1.1


def test_noise_is_stored_and_costs_a_header():
    new = rng().integers(0, 256, 100_000, dtype=np.uint8)
    for base in (None, rng(1).integers(0, 256, new.size, dtype=np.uint8)):
        data = check(new, base, "I32")
        assert len(data) == new.size + delta.HEADER.size


@pytest.mark.parametrize("dtype", ["F32", "I64"])
def test_zeros_cost_next_to_nothing(dtype):
    data = check(np.zeros(delta.FRAME_BYTES, np.uint8), None, dtype)
    assert len(data) < 100


def test_coded_bytes_are_never_many_more():
    for size in (*range(1, 40), 1000, 2048, 5000):
        new = rng(size).integers(0, 256, size, dtype=np.uint8)
        base = new ^ rng(size + 1).integers(0, 2, size, dtype=np.uint8)
        assert len(check(new, base, "F32")) <= size + delta.HEADER.size + 8


# --- hostile input --------------------------------------------------------------------------------


def sample_of(dtype="F32", level=Level.AUTO):
    new, base = trained(30_000, dtype)
    new[:4096] = base[:4096]
    return new, base, coded(new, base, dtype, level=level)


def refused(data, base, dtype="F32", why=None):
    with pytest.raises(DecodeError, match=why) as caught:
        decoded(data, base, base.size, dtype)
    assert caught.value.why


@pytest.mark.parametrize("level", LEVELS)
def test_any_flipped_bit_is_refused(level):
    _, base, data = sample_of(level=level)
    for at in [*range(120), *rng(3).integers(120, len(data), 100).tolist()]:
        wrong = bytearray(data)
        wrong[at] ^= 1 << (at % 8)
        refused(wrong, base)


@pytest.mark.parametrize("level", LEVELS)
def test_where_the_result_is_proven_damage_is_refused_or_changes_it(level):
    """Nothing but a DecodeError comes of any flipped bit, where no checksum is looked at."""
    new, base, data = sample_of(level=level)
    whole = bytearray(data)
    passed = 0
    for at in (*range(0, 8 * 400, 7), *range(8 * 400, 8 * len(whole), 8 * len(whole) // 300)):
        whole[at // 8] ^= 1 << at % 8
        out = base.copy()
        try:
            delta.decode(memoryview(bytes(whole)), out, dtype="F32", proven=True)
            passed += 1
        except DecodeError:
            pass
        whole[at // 8] ^= 1 << at % 8
    assert passed > 100, "of noise every value means something"
    out = base.copy()
    whole[delta.CHECKED_BYTES] ^= 1
    delta.decode(memoryview(bytes(whole)), out, dtype="F32", proven=True)
    assert (out == new).all(), "the checksum alone"


def test_signs_that_depend_on_sizes_are_coded_with_them():
    """Second moments: all shrink a little, but for those few that grow much."""
    size = delta.FRAME_BYTES // 4
    old = rng(1).lognormal(-20, 2, size).astype(np.float32)
    seen = rng(2).lognormal(-20, 2, size) * (rng(3).random(size) < 0.2)
    new = (old * 0.999 + 0.001 * seen).astype(np.float32)
    data = check(new.view(np.uint8), old.view(np.uint8), "F32")
    (found,) = delta.frames(memoryview(data))
    assert found.sign_place > 0


@pytest.mark.parametrize("place", range(5))
def test_signs_are_read_from_any_place(place):
    """A difference of one in each element: its zigzag is 2, or 1 where it is negative."""
    base = np.full(512, 1000, np.int32)
    new = base + np.where(np.arange(512) % 3, 1, -1).astype(np.int32)
    negative = new < base
    z = np.where(negative, 1, 2).astype(np.int64)
    if place:
        z = (z >> 1) | (negative.astype(np.int64) << (8 * place - 1))
    parts = [(PlaneKind.VERBATIM, (z >> (8 * k)).astype(np.uint8).tobytes()) for k in range(4)]
    data = frame(FrameKind.DIFFERENCE, planes(*parts), 2048, flags=place << 1)
    assert (decoded(data, base.view(np.uint8), 2048, "I32") == new.view(np.uint8)).all()


def test_a_cut_or_longer_stream_is_refused():
    _, base, data = sample_of()
    for cut in (0, 1, 19, 20, 21, len(data) // 2, len(data) - 1):
        refused(data[:cut], base)
    refused(data + b"\0", base)
    refused(data + data, base)


def test_frames_in_another_order_are_refused():
    new = rng().integers(0, 256, 2 * delta.FRAME_BYTES, dtype=np.uint8)
    data = coded(new, None)
    half = len(data) // 2
    refused(data[half:] + data[:half], new, why="checksum")


def test_another_dtype_or_size_is_refused():
    _, base, data = sample_of()
    refused(data, base, "F64", "elements of 4 bytes, not 8")
    refused(data, base[:-1], why="not of")
    with pytest.raises(ConfigError, match="unknown"):
        decoded(data, base, base.size, "F33")


def frame(kind, payload, raw_bytes, *, width=4, flags=0):
    """A frame with a right checksum: what someone with intent would write."""
    head = delta.HEADER.pack(kind, width, flags, raw_bytes, len(payload), 0)
    head = head[: delta.CHECKED_BYTES]
    return head + xxhash.xxh3_64(head + payload).intdigest().to_bytes(8, "little") + payload


def planes(*parts):
    heads = b"".join(delta.PLANE_HEADER.pack(kind, len(part)) for kind, part in parts)
    return heads + b"".join(part for _, part in parts)


def one_plane(kind, payload, size=2048):
    return frame(FrameKind.RAW, planes((kind, payload)), size, width=1)


def masked(*parts):
    return b"\0" + planes(*parts)


def grouped(firsts, busy, data=bytes(2048), kind=0):
    return bytes([len(firsts), busy, *firsts]) + planes((kind, data), (0, b""))


def by_exponent(payload):
    return frame(FrameKind.DIFFERENCE, planes((PlaneKind.CONTEXTS, payload)), 2048, width=1)


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 20))
FINE = zstandard.ZstdCompressor().compress(bytes(2048))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2048))
HOSTILE = {
    "no header": (
        "end within a frame's header",
        b"\0" * 5,
    ),
    "kind": (
        "begins with 9",
        frame(9, b"", 2048, width=1),
    ),
    "width": (
        "begins with 2, 3",
        frame(FrameKind.RAW, b"", 2048, width=3),
    ),
    "flags": (
        "begins with 2, 1, 2",
        frame(FrameKind.RAW, b"", 2048, width=1, flags=2),
    ),
    "signs of no difference": (
        "begins with 2, 2, 4",
        frame(FrameKind.RAW, b"", 2048, width=2, flags=4),
    ),
    "signs in no plane": (
        "begins with 3, 2, 6",
        frame(FrameKind.DIFFERENCE, b"", 2048, width=2, flags=6),
    ),
    "no bytes": (
        "claims 0 bytes",
        frame(FrameKind.STORED, b"", 0, width=1),
    ),
    "huge": (
        "claims 4194305 bytes",
        frame(FrameKind.STORED, b"", delta.MAX_FRAME_BYTES + 1, width=1),
    ),
    "unchanged with payload": (
        "unchanged frame",
        frame(FrameKind.UNCHANGED, b"x", 2048, width=1),
    ),
    "stored short": (
        "stored frame has another size",
        frame(FrameKind.STORED, bytes(2047), 2048, width=1),
    ),
    "no plane headers": (
        "within its planes' headers",
        frame(FrameKind.RAW, b"", 2048, width=1),
    ),
    "planes do not fill": (
        "planes do not fill",
        frame(FrameKind.RAW, planes((0, bytes(2048))) + b"x", 2048, width=1),
    ),
    "no bitmap": (
        "within its bitmap",
        frame(FrameKind.STORED, b"", 2048, width=1, flags=1),
    ),
    "empty bitmap": (
        "bitmap has no block",
        frame(FrameKind.STORED, b"\0", 2048, width=1, flags=1),
    ),
    "full bitmap": (
        "bitmap has no block",
        frame(FrameKind.STORED, b"\3" + bytes(2048), 2048, width=1, flags=1),
    ),
    "long bitmap": (
        "bitmap has no block",
        frame(FrameKind.STORED, b"\5" + bytes(1024), 2048, width=1, flags=1),
    ),
    "plane kind": (
        "unknown kind 77",
        one_plane(77, bytes(2048)),
    ),
    "verbatim short": (
        "verbatim plane",
        one_plane(PlaneKind.VERBATIM, bytes(2047)),
    ),
    "sparse empty": (
        "sparse plane is empty",
        one_plane(PlaneKind.SPARSE, b""),
    ),
    "sparse cut": (
        "no sound size",
        one_plane(PlaneKind.SPARSE, b"\0\1"),
    ),
    "sparse no exception": (
        "no sound size",
        one_plane(PlaneKind.SPARSE, b"\0\0\0"),
    ),
    "sparse miscounted": (
        "do not add up",
        one_plane(PlaneKind.SPARSE, b"\0\2\0\0\0\1"),
    ),
    "sparse out of bounds": (
        "out of bounds",
        one_plane(PlaneKind.SPARSE, b"\0\1\0\0\x08\1"),
    ),
    "masked without header": (
        "within its header",
        one_plane(PlaneKind.MASKED, bytes(5)),
    ),
    "masked within masked": (
        "within another",
        one_plane(PlaneKind.MASKED, masked((3, b""), (0, b""))),
    ),
    "masked cut": (
        "within a part",
        one_plane(PlaneKind.MASKED, masked((0, bytes(256)), (0, b""))[:-1]),
    ),
    "masked more values": (
        "verbatim plane",
        one_plane(PlaneKind.MASKED, masked((0, bytes(256)), (0, b"x"))),
    ),
    "masked fewer values": (
        "verbatim plane",
        one_plane(PlaneKind.MASKED, masked((0, b"\xff" * 256), (0, bytes(2047)))),
    ),
    "masked trailing": (
        "not filled",
        one_plane(PlaneKind.MASKED, masked((0, bytes(256)), (0, b"")) + b"x"),
    ),
    "masked out of bounds": (
        "out of bounds",
        one_plane(PlaneKind.MASKED, masked((0, b"\x80"), (0, b"x")), 7),
    ),
    "exponents of nothing": (
        "unknown kind 4",
        one_plane(PlaneKind.CONTEXTS, grouped([0], 1)),
    ),
    "no exponents": ("number of groups", by_exponent(b"")),
    "no groups": ("number of groups", by_exponent(grouped([], 0))),
    "too many groups": ("number of groups", by_exponent(grouped(range(17), 1))),
    "more busy groups": ("number of groups", by_exponent(grouped([0], 2))),
    "no first group": ("do not follow", by_exponent(grouped([1], 1))),
    "groups out of order": ("do not follow", by_exponent(grouped([0, 9, 9], 1))),
    "groups short": ("verbatim plane", by_exponent(grouped([0], 1, bytes(2047)))),
    "groups cut": ("verbatim plane", by_exponent(grouped([0], 1)[:-1])),
    "groups trailing": ("not filled", by_exponent(grouped([0], 1) + b"x")),
    "groups within groups": ("unknown kind 4", by_exponent(grouped([0], 1, kind=4))),
    "bomb": (
        "declares another size",
        one_plane(PlaneKind.ZSTD, BOMB),
    ),
    "no size": (
        "declares another size",
        one_plane(PlaneKind.ZSTD, UNSIZED),
    ),
    "trailing": (
        "damaged",
        one_plane(PlaneKind.ZSTD, FINE + b"x"),
    ),
    "second frame": (
        "damaged",
        one_plane(PlaneKind.ZSTD, FINE + FINE),
    ),
    "no zstandard": (
        "damaged",
        one_plane(PlaneKind.ZSTD, b"nothing of the kind"),
    ),
    "cut zstandard": (
        "damaged",
        one_plane(PlaneKind.ZSTD, FINE[:-2]),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused(name):
    why, data = HOSTILE[name]
    size = 7 if name == "masked out of bounds" else 2048
    refused(data, np.zeros(size, np.uint8), "U8", why)


def test_the_hostile_frames_are_fine_but_for_their_fault():
    base = np.zeros(2048, np.uint8)
    for kind, payload in (
        (PlaneKind.ZSTD, FINE),
        (PlaneKind.SPARSE, b"\0\1\0\xff\x07\1"),
        (PlaneKind.VERBATIM, bytes(2048)),
        (PlaneKind.MASKED, masked((0, bytes(256)), (0, b""))),
        (PlaneKind.MASKED, masked((0, b"\xff" * 256), (0, bytes(2048)))),
    ):
        decoded(one_plane(kind, payload), base, 2048, "U8")
    decoded(one_plane(PlaneKind.MASKED, masked((0, b"\x40"), (0, b"x")), 7), base[:7], 7, "U8")
    decoded(by_exponent(grouped([0], 1)), base, 2048, "U8")
    decoded(frame(FrameKind.STORED, b"\2" + bytes(1024), 2048, width=1, flags=1), base, 2048, "U8")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_planes_raise_nothing_else(payload):
    for kind in PlaneKind:
        with suppress(DecodeError):
            decoded(by_exponent(payload), np.zeros(2048, np.uint8), 2048, "U8")
        with suppress(DecodeError):
            decoded(one_plane(kind, payload), np.zeros(2048, np.uint8), 2048, "U8")


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="has 3 bytes, the tensor 4"):
        coded(np.zeros(4, np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ConfigError, match="unknown"):
        coded(np.zeros(4, np.uint8), None, "F33")
