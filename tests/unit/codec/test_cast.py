"""Casts are torch's, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec.cast import cast, is_cast
from ckptcoord.errors import ConfigError

CASTS = [
    ("F32", "BF16", np.uint32, torch.float32, torch.bfloat16),
    ("F32", "F16", np.uint32, torch.float32, torch.float16),
    ("F64", "F32", np.uint64, torch.float64, torch.float32),
]
cases = pytest.mark.parametrize(("wide", "narrow", "words", "dtype", "to"), CASTS)


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def ours(data, wide, narrow):
    out = np.empty(data.size // 2, np.uint8)
    cast(data, wide, out, narrow)
    return out


def check(values, wide, narrow, dtype, to):
    tensor = torch.from_numpy(values.copy()).view(dtype)
    want = bytes_of(tensor.to(to))
    data = bytes_of(tensor)
    got = ours(data, wide, narrow)
    assert got.tobytes() == want.tobytes()
    assert is_cast(data, wide, want, narrow)


@cases
def test_every_kind_of_bits_is_cast_as_torch_does(wide, narrow, words, dtype, to):
    """All signs and exponents, with mantissas around each tie, and what is no number."""
    width = np.dtype(words).itemsize * 8
    mantissa = {32: 23, 64: 52}[width]
    top = np.arange(1 << (width - mantissa), dtype=words) << words(mantissa)
    lost = {"BF16": 16, "F16": 13, "F32": 29}[narrow]
    ties = [0, 1, 1 << (lost - 1), (1 << (lost - 1)) + 1, (1 << (lost - 1)) - 1, 1 << lost]
    ties += [(1 << lost) + (1 << (lost - 1)), (1 << mantissa) - 1, 1 << (mantissa - 1)]
    values = np.concatenate([top | words(low) for low in ties])
    check(values, wide, narrow, dtype, to)


@cases
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 300))
def test_random_bits_are_cast_as_torch_does(wide, narrow, words, dtype, to, seed, size):
    values = np.random.default_rng(seed).integers(0, np.iinfo(words).max, size, words, True)
    check(values, wide, narrow, dtype, to)


@given(seed=st.integers(0, 2**32 - 1))
def test_denormal_halves_are_cast_as_torch_does(seed):
    values = np.random.default_rng(seed).normal(scale=3e-6, size=500).astype(np.float32)
    check(values.view(np.uint32), "F32", "F16", torch.float32, torch.float16)


@cases
def test_one_bit_more_or_less_is_no_cast(wide, narrow, words, dtype, to):
    data = np.random.default_rng(0).normal(size=200_001)
    data = data.astype(np.float32 if wide == "F32" else np.float64).view(np.uint8)
    made = ours(data, wide, narrow)
    assert is_cast(data, wide, made, narrow)
    for at in (0, made.size // 2, made.size - 1):
        wrong = made.copy()
        wrong[at] ^= 1
        assert not is_cast(data, wide, wrong, narrow)


def test_other_numbers_of_elements_are_no_cast():
    assert not is_cast(np.zeros(8, np.uint8), "F32", np.zeros(6, np.uint8), "BF16")
    assert not is_cast(np.zeros(6, np.uint8), "F32", np.zeros(3, np.uint8), "BF16")
    with pytest.raises(ConfigError, match="8 bytes of F32 do not become 6"):
        cast(np.zeros(8, np.uint8), "F32", np.zeros(6, np.uint8), "BF16")


def test_a_cast_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="BF16 is not cast to F16"):
        is_cast(np.zeros(2, np.uint8), "BF16", np.zeros(1, np.uint8), "F16")
