"""How far tensors are apart: against numpy, in any parts, whatever the bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec.compare import Difference, Tally, scalar_of
from ckptcoord.codec.smallfloats import float_values
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError

REALS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
INTEGERS = {f"{s}{8 * w}": f"<{s.lower()}{w}" for s in "IU" for w in (1, 2, 4, 8)}


def difference(dtype: str, old: bytes, new: bytes, *cuts: int) -> Difference:
    tally = Tally(dtype)
    a, b = (np.frombuffer(one, np.uint8) for one in (old, new))
    for begin, end in zip((0, *cuts), (*cuts, a.size), strict=True):
        part = Tally(dtype)
        part.add(a[begin:end], b[begin:end])
        tally.merge(part)
    return tally.difference()


def values_of(dtype: str, data: bytes) -> np.ndarray:
    """As float64; small floats by their table, bfloat16 by its bits."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype in REALS:
        return np.frombuffer(data, REALS[dtype]).astype(np.float64)
    if dtype in INTEGERS:
        return np.frombuffer(data, INTEGERS[dtype]).astype(np.float64)
    if dtype == "BOOL":
        return np.frombuffer(data, np.uint8).astype(np.float64)
    return float_values(dtype)[np.frombuffer(data, np.uint8)].astype(np.float64)


def expected(dtype: str, old: bytes, new: bytes) -> dict[str, object]:
    with np.errstate(all="ignore"):
        a, b = (values_of(dtype, one).astype(np.longdouble) for one in (old, new))
        both = np.isfinite(a) & np.isfinite(b)
        x, y = a[both], b[both]
        norms = [float(np.sqrt(np.square(one).sum())) for one in (y - x, x, y)]
        product = np.float64((x * y).sum() / norms[1] / norms[2]) if norms[1] * norms[2] else None
    return {
        "norms": norms,
        "max_abs": float(abs(y - x).max(initial=0)),
        "cosine": product,
        "nans": (int(np.isnan(a).sum()), int(np.isnan(b).sum())),
        "infinities": (int(np.isinf(a).sum()), int(np.isinf(b).sum())),
    }


def check(dtype: str, old: bytes, new: bytes, *cuts: int) -> None:
    found, want = difference(dtype, old, new, *cuts), expected(dtype, old, new)
    width = ITEM_BYTES[dtype]
    rows = (np.frombuffer(one, np.uint8).reshape(-1, width) for one in (old, new))
    assert found.elements == len(old) // width
    assert found.differing == int(np.not_equal(*rows).any(axis=1).sum())
    assert (found.nans, found.infinities) == (want["nans"], want["infinities"])
    norms = [found.l2, found.l2_old, found.l2_new]
    assert norms == pytest.approx(want["norms"], rel=1e-9, abs=0)
    assert found.max_abs == pytest.approx(want["max_abs"], rel=1e-12, abs=0)
    if want["cosine"] is not None:
        assert found.cosine == pytest.approx(want["cosine"], abs=1e-6)


COMPARED = [*REALS, "BF16", *INTEGERS, "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E8M0"]


@pytest.mark.parametrize("dtype", COMPARED)
@given(data=st.data())
def test_any_bits_of_any_dtype_are_compared_as_numpy_does(dtype, data):
    width = ITEM_BYTES[dtype]
    count = data.draw(st.integers(0, 12))
    old = data.draw(st.binary(min_size=count * width, max_size=count * width))
    new = data.draw(st.binary(min_size=count * width, max_size=count * width))
    if dtype in ("I64", "U64"):  # numpy's differences of doubles are not exact there
        old, new = (
            bytes(b & 0x1F if i % 8 == 7 else b for i, b in enumerate(o)) for o in (old, new)
        )
        old, new = (bytes(0 if i % 8 < 2 else b for i, b in enumerate(o)) for o in (old, new))
    cut = data.draw(st.integers(0, count)) * width
    check(dtype, old, new, cut)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16", "F8_E4M3", "I32", "I64", "BOOL"])
@pytest.mark.parametrize("spoiled", [0, 1, 3])
def test_rows_and_lanes_have_no_edges(dtype, spoiled):
    rng = np.random.default_rng(7)
    count, width = 3 * 4096 + 17, ITEM_BYTES[dtype]
    if dtype in REALS:
        pair = [rng.standard_normal(count).astype(REALS[dtype]) for _ in range(2)]
        for one in pair[:spoiled]:
            one[rng.integers(0, count, 9)] = np.nan
            one[rng.integers(0, count, 9)] = -np.inf
    else:
        pair = [
            rng.integers(0, 2 if dtype == "BOOL" else 60, count * width).astype("u1") for _ in "ab"
        ]
    check(dtype, *(one.tobytes() for one in pair), 4096 * width, 5000 * width)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-160, 1e150, 1e200, 1e300])
def test_doubles_whose_squares_have_no_room_have_norms(size):
    a = np.array([size, -2 * size, 0.0])
    found = difference("F64", a.tobytes(), (a * 1.5).tobytes())
    assert found.relative_l2 == pytest.approx(0.5)
    assert found.l2_old == pytest.approx(size * math.sqrt(5))
    assert found.cosine == pytest.approx(1.0)
    assert found.max_abs == pytest.approx(size)


def test_large_and_small_rows_together_have_the_norm_of_both():
    a = np.concatenate([np.full(4096, 1e200), np.full(4096, 1.0), np.full(4096, 1e-200)])
    found = difference("F64", a.tobytes(), (2 * a).tobytes())
    assert found.l2_old == pytest.approx(1e200 * 64)
    assert found.relative_l2 == pytest.approx(1.0)


def test_a_difference_that_no_double_holds_is_infinite_not_lost():
    found = difference("F64", np.array([1.7e308]).tobytes(), np.array([-1.7e308]).tobytes())
    assert (found.max_abs, found.l2) == (math.inf, math.inf)
    assert found.infinities == (0, 0)


def test_neighbours_among_large_integers_differ_by_one():
    for dtype, numpy in (("I64", "<i8"), ("U64", "<u8")):
        a = np.array([2**62 + 1, 5], numpy)
        found = difference(dtype, a.tobytes(), (a - np.array([1, 0], numpy)).tobytes())
        assert (found.max_abs, found.l2, found.differing) == (1.0, 1.0, 1)
    ends = np.array([-(2**63), 2**63 - 1], "<i8")
    assert difference("I64", ends[:1].tobytes(), ends[1:].tobytes()).max_abs == 2.0**64


def test_a_nan_that_stays_is_counted_and_is_no_difference():
    a = np.array([1.0, np.nan, 3.0], "<f4").tobytes()
    found = difference("F32", a, a)
    assert (found.differing, found.nans, found.l2, found.max_abs) == (0, (1, 1), 0.0, 0.0)
    assert found.l2_old == pytest.approx(math.sqrt(10))


def test_zero_and_minus_zero_differ_in_a_bit_and_in_nothing_else():
    old, new = (np.array([x], "<f4").tobytes() for x in (0.0, -0.0))
    found = difference("F32", old, new)
    assert (found.differing, found.relative_l2, found.cosine) == (1, 0.0, None)


def test_from_zero_the_relative_change_is_infinite():
    found = difference("F32", bytes(8), np.ones(2, "<f4").tobytes())
    assert found.relative_l2 == math.inf
    assert found.cosine is None


def test_complex_numbers_count_by_their_parts_and_pairs_of_four_bits_by_their_values():
    a = np.array([1 + 2j], "<c8")
    found = difference("C64", a.tobytes(), (a + 1j).tobytes())
    assert (found.elements, found.differing, found.max_abs) == (2, 1, 1.0)
    pair = difference("F4", bytes([0x21]), bytes([0xA1]))  # 0.5 and 1.0; 0.5 and -1.0
    assert (pair.elements, pair.differing, pair.max_abs) == (1, 1, 2.0)
    assert pair.l2_old == pytest.approx(math.hypot(0.5, 1.0))


def test_every_dtype_has_a_comparison_and_unaligned_bytes_are_no_hindrance():
    for dtype, width in ITEM_BYTES.items():
        data = np.arange(3 * width + 1, dtype=np.uint8)[1:]
        tally = Tally(dtype)
        tally.add(data, data)
        assert tally.difference().differing == 0


def test_parts_that_are_no_whole_elements_are_refused():
    for old, new in ((bytes(8), bytes(4)), (bytes(6), bytes(6))):
        with pytest.raises(ConfigError):
            difference("F32", old, new)
    with pytest.raises(ConfigError):
        Tally("F31")


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("F32", np.float32(1.5).tobytes(), 1.5),
        ("F64", np.float64(-0.1).tobytes(), -0.1),
        ("F16", np.float16(0.5).tobytes(), 0.5),
        ("BF16", b"\xc0\x3f", 1.5),
        ("F8_E4M3", b"\x38", 1.0),
        ("I64", b"\xff" * 8, -1),
        ("U64", b"\xff" * 8, 2**64 - 1),
        ("BOOL", b"\1", True),
        ("C64", np.complex64(1 + 2j).tobytes(), "(1+2j)"),
        ("C128", np.complex128(1 - 2j).tobytes(), "(1-2j)"),
        ("C32", np.array([1, 2], np.float16).tobytes(), "(1+2j)"),
        ("F4", b"\xa1", "(0.5, -1.0)"),
    ],
)
def test_one_element_has_a_value(dtype, data, value):
    assert scalar_of(dtype, data) == value
    assert type(scalar_of(dtype, data)) is type(value)
    with pytest.raises(ConfigError):
        scalar_of(dtype, data + b"\0")
