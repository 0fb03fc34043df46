"""What values are like: against numpy and torch, in any parts, whatever the bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ckptcoord.codec import statistics
from ckptcoord.codec.statistics import Summary, decode_values, values_per_element
from ckptcoord.codec.tensorspec import ITEM_BYTES

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.float32,
    "C128": torch.float64,
    "C32": torch.float16,
}


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.uint8)


def found(dtype: str, data: bytes, *cuts: int, **more: bool) -> statistics.Statistics:
    summary = Summary(dtype, **more)
    whole = array(data)
    for begin, end in zip((0, *cuts), (*cuts, whole.size), strict=True):
        summary.add(whole[begin:end])
    return summary.statistics()


def values_of(dtype: str, data: bytes) -> np.ndarray:
    if not data:
        return np.empty(0)
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).to(torch.float64).numpy()


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(TORCH)))
    size = ITEM_BYTES[dtype]
    special = st.sampled_from([bytes(16), b"\xff" * 16, b"\x00" * 7 + b"\x7f" + b"\xf0\x7f" * 4])
    blocks = draw(st.lists(st.binary(min_size=16, max_size=16) | special, max_size=6))
    data = b"".join(blocks)
    cuts = draw(st.lists(st.integers(0, len(data) // size).map(lambda n: n * size), max_size=3))
    return dtype, data, sorted(cuts)


@given(tensors())
@example(("C128", bytes(15) + b"\1", []))
def test_they_are_what_numpy_finds(one) -> None:
    dtype, data, cuts = one
    with np.errstate(all="ignore"):
        values = values_of(dtype, data)
        got = found(dtype, data, *cuts)
        finite = values[np.isfinite(values)].astype(np.longdouble)

    assert got.count == values.size
    assert got.nans == np.isnan(values).sum()
    assert got.infinities == ((values == -math.inf).sum(), (values == math.inf).sum())
    assert got.zeros == (values == 0).sum()
    assert got.nan_places == tuple(np.flatnonzero(np.isnan(values))[:3])
    assert got.infinity_places == tuple(np.flatnonzero(np.isinf(values))[:3])
    assert (got.minimum is None) == (finite.size == 0)
    if finite.size and np.abs(finite).max() < 1e150:
        assert (float(got.minimum), float(got.maximum)) == (finite.min(), finite.max())
        scale = float(np.abs(finite).max())
        assert got.mean == pytest.approx(float(finite.mean()), abs=1e-12 * scale)
        # Squares of what is under 1e-162 are no doubles.
        assert got.std == pytest.approx(float(finite.std()), rel=1e-6, abs=1e-7 * scale + 1e-150)
        norm = float(np.sqrt(np.square(finite).sum()))
        assert got.norm == pytest.approx(norm, rel=1e-9, abs=1e-150)


@given(tensors())
def test_looking_for_nan_alone_finds_the_same_ones(one) -> None:
    dtype, data, cuts = one
    full, quick = found(dtype, data, *cuts), found(dtype, data, *cuts, only_finite=True)

    for name in ("count", "nans", "infinities", "nan_places", "infinity_places"):
        assert getattr(quick, name) == getattr(full, name)
    assert quick.not_finite == full.not_finite


@given(tensors(), st.integers(0, 6))
def test_parts_together_are_the_whole(one, at) -> None:
    dtype, data, _ = one
    at = min(at * 16, len(data))
    whole, first, second = found(dtype, data), Summary(dtype), Summary(dtype)
    first.add(array(data[:at]))
    second.add(array(data[at:]))
    first.merge(second)
    got = first.statistics()

    for name in ("count", "zeros", "nans", "infinities", "minimum", "maximum"):
        assert getattr(got, name) == getattr(whole, name)
    if whole.norm is not None and math.isfinite(whole.norm):
        assert got.norm == pytest.approx(whole.norm, rel=1e-9)


def test_places_count_over_chunks(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 4)
    values = np.arange(20, dtype="<f4")
    values[[5, 6, 11, 19]] = math.nan
    values[[3, 18]] = math.inf, -math.inf

    got = found("F32", values.tobytes(), 12, 40)

    assert got.nan_places == (5, 6, 11)
    assert got.infinity_places == (3, 18)
    assert (got.nans, got.infinities) == (4, (1, 1))


def test_large_integers_keep_their_digits() -> None:
    values = np.array([2**63 - 1, -(2**63), 0], "<i8")

    got = found("I64", values.tobytes())

    assert (got.minimum, got.maximum, got.zeros) == (-(2**63), 2**63 - 1, 1)
    assert found("U64", np.array([2**64 - 1], "<u8").tobytes()).maximum == 2**64 - 1


def test_a_byte_of_f4_is_two_floats() -> None:
    got = found("F4", bytes([0x7A, 0x00]))

    assert decode_values("F4", array(bytes([0x7A]))).tolist() == [-1.0, 6.0]
    assert (got.count, got.minimum, got.maximum, got.zeros) == (4, -1.0, 6.0, 2)
    assert values_per_element("F4") == 2


def test_complex_numbers_are_their_parts() -> None:
    got = found("C64", np.array([1 + 2j, -3j], "<c8").tobytes())

    assert (got.count, got.minimum, got.maximum, got.zeros) == (4, -3.0, 2.0, 1)
    assert got.norm == pytest.approx(math.sqrt(14))


def test_values_far_from_zero_lose_no_digits() -> None:
    values = 1e8 + np.arange(200_000.0)

    got = found("F64", values.tobytes(), 80, 8000)

    assert got.std == pytest.approx(values.std(), rel=1e-9)
    assert got.mean == pytest.approx(values.mean(), rel=1e-15)
