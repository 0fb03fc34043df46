"""Approximations keep the error that they state, and what they must not touch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptcoord.codec.bounded import (
    add_steps,
    distance,
    keep_signs,
    round_mantissa,
    step_of,
    to_steps,
)

_SOME = st.floats(-1e100, 1e100, allow_subnormal=False)  # no square of it overflows
KINDS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def raw(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-8, 1e-3, 1.0]))
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_updates_are_off_by_half_a_step_at_most(dtype: str, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    base = random.standard_normal(1000).astype(KINDS[dtype])
    new = (base + scale * random.standard_normal(1000)).astype(KINDS[dtype])
    step = step_of(raw(new), raw(base), dtype, 0.1)
    if step == 0.0:
        assert np.array_equal(new, base)
        return
    out = raw(base).copy()
    add_steps(to_steps(raw(new), raw(base), dtype, step), out, dtype, step)
    found = out.view(KINDS[dtype])
    slack = np.spacing(np.abs(new)).astype(np.float64)
    assert np.all(np.abs(found.astype(np.float64) - new) <= step / 2 * 1.0001 + slack)


_NEAR_ZERO = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, -3e-39, 1e-9, -1e-9, 0.5, -0.5])


@given(
    pairs=st.lists(st.tuples(_NEAR_ZERO, _NEAR_ZERO), min_size=1, max_size=40),
    fraction=st.sampled_from([0.1, 0.25, 0.9]),
)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_no_step_changes_a_sign_or_a_zero(
    dtype: str, pairs: list[tuple[float, float]], fraction: float
) -> None:
    new, base = (np.array(values, KINDS[dtype]) for values in zip(*pairs, strict=True))
    step = step_of(raw(new), raw(base), dtype, fraction)
    if step == 0.0:
        return
    steps, out = to_steps(raw(new), raw(base), dtype, step), raw(base).copy()
    if not keep_signs(steps, raw(new), raw(base), dtype, step):
        assert np.any((new == 0) & (base != 0)) or step < 1e-44, "a new zero, or steps of nothing"
        return
    add_steps(steps, out, dtype, step)
    found = out.view(KINDS[dtype])
    assert np.array_equal(np.sign(found), np.sign(new))
    slack = np.spacing(np.abs(new)).astype(np.float64)
    assert np.all(np.abs(found.astype(np.float64) - new) <= step * 1.0001 + slack)


@given(
    base=hnp.arrays(np.float32, 40, elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    change=hnp.arrays(np.float32, 40, elements=st.floats(-128, 128, width=32)),
    step=st.sampled_from([1e-3, 0.5, 1.0]),
)
def test_steps_are_what_numpy_says_to_the_bit(
    base: np.ndarray, change: np.ndarray, step: float
) -> None:
    """Readers make these bits again on any machine: nothing may be contracted or reordered."""
    new = (base + change).astype(np.float32)
    counts = np.rint((new.astype(np.float64) - base) / step)
    if np.max(np.abs(counts)) >= 2**30:
        return
    found = to_steps(raw(new), raw(base), "F32", step)
    whole = counts.astype(np.int32)
    assert np.array_equal(found, ((whole << 1) ^ (whole >> 31)).view(np.uint32))
    out = raw(base).copy()
    add_steps(found, out, "F32", step)
    assert np.array_equal(
        out.view(np.float32), (base.astype(np.float64) + counts * step).astype("f4")
    )


@given(
    new=hnp.arrays(np.float64, 30, elements=_SOME | st.sampled_from([math.nan, math.inf])),
    other=hnp.arrays(np.float64, 30, elements=_SOME),
    same=st.booleans(),
)
def test_distance_is_what_numpy_says(new: np.ndarray, other: np.ndarray, same: bool) -> None:
    other = np.where(np.isfinite(new) & (not same), other, new)
    found = distance(raw(new), raw(other), "F64")
    finite = np.isfinite(new)
    apart = new[finite] - other[finite]
    assert found.max_abs == np.max(np.abs(apart), initial=0.0)
    norms = [float(np.linalg.norm(values / 1e50)) for values in (apart, new[finite])]
    if all(norms):
        assert found.relative_l2 == pytest.approx(norms[0] / norms[1], rel=1e-9)


@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-170, 1e-160, 1.0, 1e150, 1e160]))
def test_norms_of_the_smallest_and_the_largest_are_as_exact(seed: int, scale: float) -> None:
    """Their squares are no doubles; what is longer than a row of the loops is taken row by row."""
    random = np.random.default_rng(seed)
    new, apart = random.standard_normal((2, 1300))
    found = distance(raw(new * scale), raw((new + apart) * scale), "F64")
    assert found.max_abs == pytest.approx(np.max(np.abs(apart)) * scale)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(new))


def test_a_change_is_measured_in_every_row() -> None:
    base = np.zeros(1300, np.float32)
    for at in (0, 511, 512, 1299):
        new = base.copy()
        new[at] = 1.0
        assert step_of(raw(new), raw(base), "F32", 0.5) == pytest.approx(0.5 / math.sqrt(1300))
        assert distance(raw(new), raw(base), "F32").max_abs == 1.0
        new[at] = 3.4e38
        assert step_of(raw(new), raw(base), "F32", 0.999) == 0.0, "a step leads to infinity"


@pytest.mark.parametrize(
    ("new", "base"),
    [
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [math.inf, 2.0]),
        ([1.0, 2.0], [1.0, 2.0]),
        ([], []),
        ([3e38, -3e38], [-3e38, 3e38]),
    ],
)
def test_what_cannot_be_taken_in_steps_has_none(new: list[float], base: list[float]) -> None:
    arrays = [raw(np.array(values, np.float32)) for values in (new, base)]
    step = step_of(*arrays, "F32", 0.1)
    assert step == 0.0 or new == [3e38, -3e38]


def test_one_change_that_dwarfs_all_others_is_kept() -> None:
    base = np.zeros(1 << 20, np.float32)
    new = base.copy()
    new[7] = 1.0
    step = step_of(raw(new), raw(base), "F32", 1e-7)
    assert step == 0.0, "too many steps: it is stored exactly"
    step = step_of(raw(new), raw(base), "F32", 0.1)
    out = raw(base).copy()
    add_steps(to_steps(raw(new), raw(base), "F32", step), out, "F32", step)
    assert out.view(np.float32)[7] == pytest.approx(1.0, abs=step)


@given(
    values=hnp.arrays(np.uint32, st.integers(0, 300)),
    bits=st.integers(0, 22),
)
def test_fewer_bits_keep_sign_zero_and_what_is_special(values: np.ndarray, bits: int) -> None:
    before = values.view(np.float32)
    after = round_mantissa(raw(values), "F32", bits).view(np.float32)
    with np.errstate(all="ignore"):
        assert np.array_equal(np.signbit(before), np.signbit(after))
        assert np.array_equal(before == 0, after == 0)
        special = ~np.isfinite(before)
        assert np.array_equal(before[special].view(np.uint32), after[special].view(np.uint32))
        assert np.all(np.isfinite(after[~special]))
        normal = ~special & (np.abs(before) >= np.finfo(np.float32).tiny)
        largest = np.abs(before) > 3.4e38 / 2
        error = np.abs(after[normal & ~largest].astype(np.float64) - before[normal & ~largest])
        assert np.all(
            error <= np.abs(before[normal & ~largest].astype(np.float64)) * 2.0 ** -(bits + 1)
        )


@pytest.mark.parametrize("bits", [0, 1, 5])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_the_error_is_relative_for_denormals_and_next_to_infinity_too(
    dtype: str, bits: int
) -> None:
    """Every half-precision float there is; of the wider ones those of the ends."""
    if dtype in ("F16", "BF16"):
        data = np.arange(1 << 16, dtype=np.uint16)
    else:
        kind = KINDS[dtype]
        word = np.dtype(f"u{np.dtype(kind).itemsize}")
        least, infinity = (np.array(v, kind).view(word) for v in (np.finfo(kind).tiny, np.inf))
        ends = [np.arange(3000, dtype=word) + (one - word.type(1500)) for one in (least, infinity)]
        random = np.random.default_rng(0).integers(0, int(least), 3000, word)
        data = np.concatenate([*ends, random, np.arange(100, dtype=word)])
    before, after = (
        one.view(np.uint16).astype(np.uint32) << 16 if dtype == "BF16" else one.view(data.dtype)
        for one in (raw(data), round_mantissa(raw(data), dtype, bits))
    )
    values, found = (
        one.view(np.float32 if dtype == "BF16" else KINDS[dtype]) for one in (before, after)
    )
    real = np.isfinite(values)
    assert np.array_equal(real, np.isfinite(found))
    values, found = (one[real].astype(np.longdouble) for one in (values, found))
    assert np.all(np.abs(found - values) <= np.abs(values) * 2.0 ** -(bits + 1))


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_rounding_twice_is_rounding_once(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(500).astype(KINDS[dtype])
    once = round_mantissa(raw(values), dtype, 3)
    assert np.array_equal(round_mantissa(once, dtype, 3), once)
    assert not np.array_equal(once, raw(values))


def test_bf16_and_what_is_no_float() -> None:
    values = np.arange(40, dtype=np.uint16) + 0x3F80
    rounded = round_mantissa(raw(values), "BF16", 3).view(np.uint16)
    assert np.all(rounded & 0x0F == 0)
    ints = raw(np.arange(9, dtype=np.int64))
    assert np.array_equal(round_mantissa(ints, "I64", 3), ints)
    assert np.array_equal(round_mantissa(raw(values), "BF16", 7).view(np.uint16), values)


def test_distance_says_how_far_apart() -> None:
    one, other = (raw(np.array(v, np.float32)) for v in ([3.0, 4.0], [3.0, 4.5]))
    found = distance(one, other, "F32")
    assert (found.max_abs, found.relative_l2) == (0.5, pytest.approx(0.1))
    assert distance(one[:0], one[:0], "F32").max_abs == 0.0
    zero = raw(np.zeros(2, np.float32))
    assert distance(zero, zero, "F32").relative_l2 == 0.0
    assert distance(zero, one, "F32").relative_l2 == 1.0
    nan = raw(np.array([math.nan, 1.0], np.float32))
    assert distance(nan, nan, "F32").max_abs == 0.0
    assert distance(nan, one, "F32").relative_l2 == math.inf, "a NaN never looks clean"
    assert distance(one, nan, "F32").relative_l2 == math.inf
    ones = raw(np.ones(2, np.float32))
    assert distance(ones, nan, "F32").relative_l2 == math.inf, "what is finite is all alike"
    half = raw(np.array([1.0], np.uint16) * 0 + 0x3F80)
    assert distance(half.astype(np.uint8), half.astype(np.uint8), "BF16").max_abs == 0.0
