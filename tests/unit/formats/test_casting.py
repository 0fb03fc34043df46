"""torch casts, and the law that it is held to says the same, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.dist.capture import DTYPE_NAMES, tensor_bytes
from ckptcoord.errors import ConfigError, CorruptError
from ckptcoord.formats.casting import cast_spec, check_cast, dtype_name, parse_dtype

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def check(source, written) -> int:
    spec = TensorSpec(name="w", dtype=DTYPE_NAMES[source.dtype], shape=tuple(source.shape))
    dtype = DTYPE_NAMES[written.dtype]
    return check_cast(tensor_bytes(source), spec, tensor_bytes(written), dtype)


@pytest.mark.parametrize("wide", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
@settings(max_examples=12)
@given(data=st.binary(min_size=8, max_size=400), seed=st.integers(0, 2**31))
def test_what_torch_rounds_obeys_the_law(wide, to, data, seed) -> None:
    size = len(data) // 8 * 8
    raw = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8).view(wide)  # any bits
    near = torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    source = torch.cat([raw, (near * 1e-3).to(wide), (near * 1e5).to(wide)])

    lost = check(source, source.to(to))

    assert lost == int((source.to(to).isinf() & source.isfinite()).sum())


@pytest.mark.parametrize("wide", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
def test_a_bit_that_is_off_breaks_the_law(wide, to) -> None:
    if wide is to:
        return
    source = torch.randn(70_000, generator=torch.Generator().manual_seed(0)).to(wide)
    written = source.to(to)
    tensor_bytes(written)[12_345 * written.itemsize] ^= 1

    with pytest.raises(CorruptError, match="tensor 'w'"):
        check(source, written)
    with pytest.raises(CorruptError, match="tensor 'w'"):
        check(source, source.to(to)[:-1])


def test_a_number_is_not_taken_for_a_nan_nor_a_nan_for_a_number() -> None:
    source = torch.tensor([1.0, float("nan")])

    for wrong in ([float("nan"), float("nan")], [1.0, 1.0], [1.0, float("inf")]):
        with pytest.raises(CorruptError):
            check(source, torch.tensor(wrong).bfloat16())


def test_names_of_dtypes() -> None:
    for text, code in [
        ("bf16", "BF16"),
        ("torch.float16", "F16"),
        ("FLOAT", "F32"),
        ("f64", "F64"),
    ]:
        assert parse_dtype(text) == code
    assert getattr(torch, dtype_name("BF16")) is torch.bfloat16
    for text in ("", "int8", "x" * 10_000, "float8_e4m3fn", "\0"):
        with pytest.raises(ConfigError, match="--dtype"):
            parse_dtype(text)


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "C64", "F8_E4M3", "F4"])
def test_what_is_no_plain_float_stays(dtype) -> None:
    spec = TensorSpec(name="x", dtype=dtype, shape=(2,))

    assert cast_spec(spec, "BF16") is spec
    assert cast_spec(TensorSpec(name="x", dtype="F32", shape=(2,)), None).dtype == "F32"
    assert np.prod(cast_spec(TensorSpec(name="x", dtype="F32", shape=(2,)), "F16").shape) == 2
