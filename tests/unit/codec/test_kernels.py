"""Compiled loops do what plain numpy does, and the frames they write are zstandard's."""

import math

import numba.core.caching
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec import contexts, huffman, jit, kernels, masks, planes
from ckptcoord.codec.delta import BLOCK_BYTES
from ckptcoord.codec.elements import elements_of
from ckptcoord.codec.smallfloats import float_values
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError

DTYPES = sorted(ITEM_BYTES)
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
seeds = st.integers(0, 2**32 - 1)
slow = settings(deadline=None, max_examples=20)


def rng(seed):
    return np.random.default_rng(seed)


def random_bytes(seed, size):
    return rng(seed).integers(0, 256, size, dtype=np.uint8)


def words(data, width, *, read_only=True):
    found = data.reshape(-1, BLOCK_BYTES).view(f"<i{width}")
    found.flags.writeable = not read_only
    return found


# --- differences and planes -----------------------------------------------------------------------


def ordered(bits, elements):
    """Integers modulo 2^(8W) that order as the values do: the definition, in Python's integers."""
    size = 8 * elements.width
    if not elements.is_float:
        return bits
    return bits ^ (2**size - 1) if bits >> (size - 1) else bits | (1 << (size - 1))


def zigzag(new, base, elements):
    size = 8 * elements.width
    difference = (ordered(new, elements) - ordered(base, elements)) % 2**size
    if difference >> (size - 1):
        return 2 * (2**size - difference) - 1
    return 2 * difference


def numbers(data, width):
    return data.view(f"<u{width}").tolist()


def planes_of(values, width):
    return np.array([[(v >> (8 * k)) & 255 for v in values] for k in range(width)], np.uint8)


def turned(value, place):
    """The lowest bit made the highest of plane `place` - 1, by strings."""
    if not place:
        return value
    digits = f"{value:064b}"
    head, tail = digits[: -8 * place], digits[-8 * place :]
    return int(head + tail[-1] + tail[:-1], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@slow
@given(seed=seeds, blocks=st.integers(1, 4), data=st.data())
def test_planes_of_differences_are_those_of_the_definition(dtype, seed, blocks, data):
    elements = elements_of(dtype)
    width = elements.width
    place = data.draw(st.integers(0, width))
    at = kernels.sign_bit(width, place)
    new, base = (random_bytes(seed + k, blocks * BLOCK_BYTES) for k in (0, 1))
    mask = rng(seed + 2).random(blocks) < 0.7
    count = int(mask.sum())
    out = np.zeros((width, count, BLOCK_BYTES // width), np.uint8)
    flip, sign = kernels.ordering(elements)
    kernels.split_difference(words(new, width), words(base, width), mask, flip, sign, at, out)
    kept = [data.reshape(-1, BLOCK_BYTES)[mask].reshape(-1) for data in (new, base)]
    pairs = zip(*(numbers(data, width) for data in kept), strict=True)
    want = planes_of([turned(zigzag(a, b, elements), place) for a, b in pairs], width)
    assert out.reshape(width, -1).tolist() == want.tolist()

    joined = base.copy()
    rows = kernels.tuple_of(out.reshape(width, -1))
    kernels.join_difference(rows, mask, flip, sign, at, words(joined, width, read_only=False))
    expected = np.where(mask[:, None], new.reshape(blocks, -1), base.reshape(blocks, -1))
    assert (joined.reshape(blocks, -1) == expected).all()


@slow
@given(bits=st.binary(max_size=100))
def test_the_bits_of_a_bitmap_are_counted(bits):
    assert masks.count_ones(np.array([*bits], np.uint8)) == sum(map(int.bit_count, bits))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("rotate", [False, True])
@slow
@given(seed=seeds, blocks=st.integers(1, 4))
def test_raw_planes_are_the_bytes_of_the_rotated_bits(width, rotate, seed, blocks):
    new = random_bytes(seed, blocks * BLOCK_BYTES)
    mask = rng(seed + 2).random(blocks) < 0.7
    out = np.zeros((width, int(mask.sum()), BLOCK_BYTES // width), np.uint8)
    kernels.split_raw(words(new, width), mask, rotate, out)
    bits = numbers(new.reshape(-1, BLOCK_BYTES)[mask].reshape(-1), width)
    size = 8 * width
    turned = [((v << 1) | (v >> (size - 1))) % 2**size if rotate else v for v in bits]
    assert out.reshape(width, -1).tolist() == planes_of(turned, width).tolist()

    joined = np.zeros_like(new)
    rows = kernels.tuple_of(out.reshape(width, -1))
    kernels.join_raw(rows, mask, rotate, words(joined, width, read_only=False))
    assert (joined.reshape(blocks, -1) == new.reshape(blocks, -1) * mask[:, None]).all()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_neighbouring_floats_are_one_apart_also_across_zero(dtype):
    elements = elements_of(dtype)
    real = np.dtype(f"f{elements.width}")
    values = np.array([1.0, -1.0, 0.0, 1000.0, -3e-5, 2.0**-14], real)
    above = np.nextafter(values, real.type(np.inf))
    bits = [numbers(a.view(np.uint8), elements.width) for a in (above, values)]
    assert [zigzag(a, b, elements) for a, b in zip(*bits, strict=True)][:2] == [2, 2]
    # -0 lies between 0 and the first below it.
    assert zigzag(0, 1 << (8 * elements.width - 1), elements) == 2


@slow
@given(seed=seeds, blocks=st.integers(1, 70))
def test_changed_blocks_are_those_with_any_other_bit(seed, blocks):
    new = random_bytes(seed, blocks * BLOCK_BYTES)
    base = new.copy()
    hit = rng(seed).integers(0, new.size, 5)
    base[hit] ^= (1 << rng(seed).integers(0, 8, 5)).astype(np.uint8)
    mask = np.zeros(blocks, np.bool_)
    count = kernels.changed_blocks(words(new, 8), words(base, 8), mask)
    want = (new != base).reshape(blocks, -1).any(axis=1)
    assert mask.tolist() == want.tolist()
    assert count == want.sum()


def test_entropy_of_all_bytes_is_that_of_the_definition():
    data = (rng(0).normal(scale=9, size=400_000)).astype(np.int8).view(np.uint8)
    counts = np.bincount(data, minlength=256).astype(np.uint32)
    share = counts[counts > 0] / data.size
    assert kernels.entropy(counts) == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-3)


def test_a_sample_of_noise_is_seen_to_be_noise():
    counts = np.bincount(random_bytes(1, 2000), minlength=256).astype(np.uint32)
    assert kernels.entropy(counts) > 7.95


# --- the kinds of planes --------------------------------------------------------------------------


@st.composite
def skewed(draw):
    size = draw(st.one_of(st.integers(1, 300), st.sampled_from([65_535, 65_536, 131_080])))
    spread = draw(st.sampled_from([0.1, 0.3, 0.5, 1.0, 4.0, 30.0, 90.0]))
    data = np.abs(rng(draw(seeds)).normal(scale=spread, size=size)).clip(0, 255)
    return data.astype(np.uint8) ^ np.uint8(draw(st.sampled_from([0, 7, 255])))


@slow
@given(plane=skewed())
def test_every_plane_comes_back(plane):
    coder = planes.PlaneCoder()
    counts = np.bincount(plane, minlength=256).astype(np.uint32)
    room = np.full(planes.plane_bound(plane.size), 0xA5, np.uint8)
    kind, coded = coder.encode(
        plane, np.array([kernels.entropy(counts)]), int(counts.argmax()), room
    )
    out = np.empty_like(plane)
    coder.decode(kind, coded.data, out)
    assert (out == plane).all()
    assert coded.size <= plane.size


@slow
@given(
    plane=skewed(),
    estimates=st.lists(st.floats(0, 8), min_size=1, max_size=4),
    fill=st.integers(0, 255),
    more=st.integers(0, 9),
)
def test_planes_stay_within_their_room_however_wrong_the_estimates_are(
    plane, estimates, fill, more
):
    coder = planes.PlaneCoder()
    both = np.zeros((2, plane.size + more), np.uint8)
    both[0, : plane.size] = plane
    both[1, : plane.size] = random_bytes(plane.size, plane.size)  # in vain, at the end
    bound = 2 * planes.plane_bound(plane.size)
    memory = np.full(bound + 4096, 0xA5, np.uint8)
    found = coder.encode_all(
        both.reshape(-1),
        plane.size,
        np.array([estimates] * 2),
        np.array([fill, fill]),
        memory[:bound],
    )
    assert (memory[bound:] == 0xA5).all()
    for row, (kind, coded) in zip(both, found, strict=True):
        out = np.empty(plane.size, np.uint8)
        coder.decode(kind, coded.data, out)
        assert (out == row[: plane.size]).all()
        assert coded.size <= plane.size


@slow
@given(plane=skewed(), seed=seeds)
def test_literals_are_a_frame_that_zstandard_reads(plane, seed):
    cuts = np.unique(rng(seed).integers(1, plane.size + 1, 3))
    sizes = np.diff(cuts, prepend=0, append=plane.size)
    for parts in ((), sizes[sizes > 0].tolist()):
        room = np.full(huffman.frame_bound(plane.size, 4), 0xA5, np.uint8)
        coded = huffman.LiteralWriter().encode(plane, room, parts)
        found = zstandard.ZstdDecompressor().decompress(coded.data, allow_extra_data=False)
        assert found == plane.tobytes()


@slow
@given(
    seeds=st.lists(seeds, min_size=1, max_size=5),
    pays=st.lists(st.booleans(), min_size=1),
    block=st.sampled_from([huffman.BLOCK, huffman.FINE_BLOCK]),
)
def test_blocks_that_differ_have_codes_of_their_own(seeds, pays, block):
    """Of some blocks the bytes are alike, of others not, and some are not worth a look."""
    kinds = [rng(seed % 3).integers(0, 3 + seed % 200, 40_000, dtype=np.uint8) for seed in seeds]
    plane = np.concatenate(kinds)
    room = np.full(huffman.frame_bound(plane.size), 0xA5, np.uint8)
    bits = np.where(pays, 1.0, 8.0)
    tables = huffman.LiteralWriter().tables
    coded = room[: huffman.write_blocks(plane, bits, 7.95, block, *tables, room)]
    found = zstandard.ZstdDecompressor().decompress(coded.data, allow_extra_data=False)
    assert found == plane.tobytes()
    assert coded.size <= huffman.frame_bound(plane.size) - 8


@slow
@given(data=st.data())
def test_trees_of_any_shape_are_read(data):
    """From two bytes to all, evenly or so unevenly that codes must be cut to their longest."""
    different = data.draw(st.integers(2, 256))
    base = data.draw(st.sampled_from([1.0, 1.05, 1.3, 1.7, 2.5]))
    symbols = rng(data.draw(seeds)).permutation(256)[:different].astype(np.uint8)
    repeats = np.maximum(1, (3000 * base ** -np.arange(different)).astype(np.int64))
    plane = rng(1).permutation(np.repeat(symbols, repeats))
    counts = np.bincount(plane, minlength=256).astype(np.uint32)
    lengths = np.empty(256, np.uint8)
    bits = huffman.code_lengths(counts, lengths)
    used = lengths[lengths > 0].astype(np.int64)
    assert (lengths > 0).tolist() == (counts > 0).tolist()
    assert used.max() <= huffman.MAX_BITS
    assert (1 << (huffman.MAX_BITS - used)).sum() == 1 << huffman.MAX_BITS
    assert bits == (lengths.astype(np.int64) * counts).sum()
    coded = huffman.LiteralWriter().encode(
        plane, np.empty(huffman.frame_bound(plane.size), np.uint8)
    )
    assert zstandard.ZstdDecompressor().decompress(coded.data) == plane.tobytes()


def least_bits(counts):
    """What codes of up to MAX_BITS cost at least: package-merge, by sets of bytes."""
    leaves = sorted((int(count), (k,)) for k, count in enumerate(counts) if count)
    pairs = []
    for _ in range(huffman.MAX_BITS):
        items = sorted(pairs + leaves)
        halves = zip(items[::2], items[1::2], strict=False)
        pairs = [(a + b, of_a + of_b) for (a, of_a), (b, of_b) in halves]
    return sum(weight for weight, _ in pairs[: len(leaves) - 1])


@slow
@given(
    seed=seeds,
    different=st.integers(2, 256),
    base=st.sampled_from([1.0, 1.05, 1.1, 1.3, 1.7, 2.5]),
    most=st.sampled_from([3, 200, 60_000]),
)
def test_codes_are_as_short_as_their_limit_allows(seed, different, base, most):
    counts = np.zeros(256, np.uint32)
    repeats = np.maximum(1, (most * base ** -np.arange(different)).astype(np.uint32))
    counts[rng(seed).permutation(256)[:different]] = repeats
    assert huffman.code_lengths(counts, np.empty(256, np.uint8)) == least_bits(counts)


@slow
@given(plane=skewed(), fill=st.integers(0, 255))
def test_masks_and_exceptions_are_where_a_byte_is_another(plane, fill):
    bitmap, values = np.empty(-(-plane.size // 8), np.uint8), np.empty(plane.size + 8, np.uint8)
    found = masks.mask_plane(plane, fill, bitmap, values)
    other = plane != fill
    assert np.packbits(other, bitorder="little").tolist() == bitmap.tolist()
    assert values[:found].tolist() == plane[other].tolist()
    out = np.empty_like(plane)
    masks.unmask_plane(bitmap, values[: found + masks.SPARE], fill, out)
    assert (out == plane).all()

    counts = np.empty(-(-plane.size // planes.SEGMENT), np.uint32)
    positions, seen = np.empty(found, np.uint16), np.empty(found, np.uint8)
    assert planes.find_exceptions(plane, fill, counts, positions, seen) == found
    assert positions.tolist() == (np.flatnonzero(other) % planes.SEGMENT).tolist()
    assert seen.tolist() == plane[other].tolist()
    if found:
        assert planes.find_exceptions(plane, fill, counts, positions[1:].copy(), seen) == -1


@slow
@given(seed=seeds, size=st.integers(1, 3000), groups=st.integers(1, 16))
def test_groups_are_gathered_in_order_and_spread_again(seed, size, groups):
    plane, exponent = random_bytes(seed, size), random_bytes(seed + 1, size)
    group_of = np.sort(rng(seed).integers(0, groups, 256)).astype(np.uint8)
    of = group_of[exponent]
    sizes = np.bincount(of, minlength=groups)
    starts = np.cumsum(sizes) - sizes
    out = np.empty_like(plane)
    contexts.gather_groups(plane, exponent, group_of, starts, out)
    assert out.tolist() == plane[np.argsort(of, kind="stable")].tolist()
    back = np.empty_like(plane)
    contexts.spread_groups(out, exponent, group_of, starts, back)
    assert (back == plane).all()


# --- detection ------------------------------------------------------------------------------------


def values_of(data, dtype):
    """By torch, or by numpy for integers; (N,) of float64."""
    elements = elements_of(dtype)
    data = data[: data.size // elements.width * elements.width]
    if elements.dtype in TORCH:
        if not data.size:
            return np.empty(0)
        return torch.from_numpy(data.copy()).view(TORCH[elements.dtype]).double().numpy()
    if elements.width == 1:
        return float_values(elements.dtype)[data].astype(np.float64)
    signed = "u" if elements.dtype.startswith("U") else "i"
    return data.view(f"<{signed}{elements.width}").astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@slow
@given(data=st.data())
def test_detection_is_what_torch_and_numpy_find(dtype, data):
    sizes = (st.integers(0, 40), st.integers(1000, 20_000), st.integers(65_000, 200_000))
    size = data.draw(st.one_of(*sizes))
    seed, blocks = data.draw(seeds), data.draw(st.sampled_from([4096, 8192, 65536]))
    new = random_bytes(seed, size)
    base = new.copy()
    for at in rng(seed).integers(0, max(size, 1), 6 if size else 0):
        base[at : at + 9] = random_bytes(seed + at, base[at : at + 9].size)
    found = kernels.detect(new, base, dtype=dtype, block_bytes=blocks, threads=2)
    other = new != base
    want = [bool(other[at : at + blocks].any()) for at in range(0, size, blocks)]
    assert found.blocks.tolist() == want
    assert found.changed == other.any()
    with np.errstate(all="ignore"):
        a, o = values_of(new, dtype), values_of(base, dtype)
        width = elements_of(dtype).width
        same = ~other[: a.size * width].reshape(-1, width).any(axis=1)
        change = math.sqrt(np.square(np.where(same, 0, a - o)).sum())
        norm = math.sqrt(np.square(o).sum())
    assert found.l2_change == pytest.approx(change, rel=1e-9, nan_ok=True)
    assert found.l2_base == pytest.approx(norm, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_detection_over_several_parts(threads):
    base = rng(0).normal(size=3_000_001).astype(np.float32)
    new = base.copy()
    new[2_500_000] += 1
    found = kernels.detect(new.view(np.uint8), base.view(np.uint8), dtype="F32", threads=threads)
    assert np.flatnonzero(found.blocks).tolist() == [10_000_000 // 65536]
    assert found.l2_change == pytest.approx(1)
    assert found.relative == pytest.approx(1 / np.linalg.norm(base.astype(np.float64)))


def test_a_nan_that_stays_is_no_change_and_one_that_comes_is_one():
    base = np.array([1, np.nan, np.inf, 3], np.float32)
    same = kernels.detect(base.view(np.uint8), base.view(np.uint8).copy(), dtype="F32")
    assert (same.changed, same.l2_change, same.relative) == (False, 0.0, 0.0)
    other = base.copy()
    other.view(np.uint32)[1] ^= 1
    assert kernels.detect(other.view(np.uint8), base.view(np.uint8), dtype="F32").changed


def test_a_change_of_nothing_is_infinite():
    new, base = np.ones(4, np.float32), np.zeros(4, np.float32)
    assert kernels.detect(new.view(np.uint8), base.view(np.uint8), dtype="F32").relative == math.inf


def test_arrays_at_odd_addresses_are_compared():
    room = random_bytes(0, 20_001)
    other = room.copy()
    other[5000] ^= 1
    found = kernels.detect(room[1:], other[1:], dtype="BF16", block_bytes=4096)
    assert np.flatnonzero(found.blocks).tolist() == [4999 // 4096]


def test_detection_refuses_what_it_cannot_compare():
    data = np.zeros(4, np.uint8)
    with pytest.raises(ConfigError, match="has 3 bytes, the tensor 4"):
        kernels.detect(data, data[:3], dtype="F32")
    with pytest.raises(ConfigError, match="1000 is no multiple of 4096"):
        kernels.detect(data, data, dtype="F32", block_bytes=1000)
    with pytest.raises(ConfigError, match="unknown"):
        kernels.detect(data, data, dtype="F33")


@pytest.mark.parametrize("dtype", [name for name in TORCH if name.startswith("F8")])
def test_small_floats_have_torchs_values(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(float_values(dtype), every)


# --- compilation ----------------------------------------------------------------------------------


def test_a_loop_is_compiled_also_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    @jit.compiled
    def twice(x):
        return 2 * x

    assert twice(4) == 8


def test_a_loop_is_compiled_once_for_all_constants_that_others_pass():
    @jit.compiled
    def plus(x, y):
        return x + y

    @jit.compiled
    def many(x):
        return plus(plus(plus(x, 1), 2), 3)

    assert many(4) == 10
    assert len(plus.signatures) == 1


def test_warming_leaves_nothing_to_compile():
    kernels.warm()
    before = len(kernels.split_difference.signatures)
    kernels.warm()
    assert len(kernels.split_difference.signatures) == before == 4
