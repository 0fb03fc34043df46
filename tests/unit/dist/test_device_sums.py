"""Checksums where tensors live: what they are, and which kernel may take them."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.dist import devicesums
from ckptcoord.dist.devicesums import MULTIPLIERS, device_checksum, sums_by_torch

WORDS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


def in_words(sums: list[int]) -> list[int]:
    return [(total + 2**63) % 2**64 - 2**63 for total in sums]


@given(WORDS, st.integers(1, 50))
def test_sums_are_of_words_times_odd_weights(words, chunk_words):
    right = [
        sum((word ^ (word >> 29)) * (2 * at + 1) * multiplier for at, word in enumerate(words))
        for multiplier in MULTIPLIERS
    ]
    tensor = torch.tensor(words, dtype=torch.int64)
    assert sums_by_torch(tensor, chunk_words=chunk_words).tolist() == in_words(right)


def test_the_device_checksum_sees_order_and_layout_as_bytes_do():
    tensor = torch.arange(1000, dtype=torch.float32)
    whole = device_checksum(tensor)
    assert device_checksum(tensor.flip(0)) != whole
    assert device_checksum(tensor.view(10, 100).T) != whole
    assert device_checksum(tensor.view(10, 100)) == whole
    assert device_checksum(torch.zeros(0)) == bytes(16)


def test_bytes_that_begin_within_a_word_are_summed_as_if_they_did_not():
    data = torch.arange(101, dtype=torch.uint8)
    for start in range(9):
        part = data[start:]
        assert device_checksum(part) == device_checksum(part.clone())


# --- which kernel --------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def fused(monkeypatch, caplog):
    """What is chosen where the compiled kernel is the one given."""
    devicesums._fused.cache_clear()
    caplog.set_level(logging.WARNING)

    def choose(kernel):
        monkeypatch.setattr(devicesums, "find_spec", lambda _: object())
        module = SimpleNamespace(fused_sums=kernel)
        monkeypatch.setitem(sys.modules, "ckptcoord.dist.fusedsums", module)
        return devicesums._fused(CPU)

    yield choose
    devicesums._fused.cache_clear()


def test_a_kernel_that_finds_what_torch_finds_is_taken(fused, caplog):
    assert fused(sums_by_torch) is sums_by_torch
    assert not caplog.messages


def test_a_kernel_that_finds_something_else_is_not(fused, caplog):
    assert fused(lambda words: sums_by_torch(words) ^ 1) is None
    assert "its kernel finds" in caplog.text
    assert devicesums._fused(CPU) is None
    assert len(caplog.messages) == 1, "said once"


def test_a_kernel_that_does_not_compile_is_not(fused, caplog):
    def kernel(words):
        raise RuntimeError("Failed to find C compiler")

    assert fused(kernel) is None
    assert "RuntimeError: Failed to find C compiler" in caplog.text


def test_without_triton_there_is_none(monkeypatch, fused, caplog):
    monkeypatch.setattr(devicesums, "find_spec", lambda _: None)
    assert devicesums._fused(CPU) is None
    assert "Triton is not installed" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, which comes with CUDA builds"
)
def test_the_kernel_finds_what_torch_finds_in_tritons_interpreter():
    text = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from ckptcoord.dist.devicesums import sums_by_torch
from ckptcoord.dist.fusedsums import fused_sums
for size in (0, 1, 4095, 4096, 4097, 100_001):
    words = torch.randint(-2**63, 2**63 - 1, (size,))
    assert fused_sums(words).tolist() == sums_by_torch(words).tolist(), size
"""
    subprocess.run([sys.executable, "-c", text], check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_has_a_kernel_and_finds_what_the_host_finds():
    device = torch.device("cuda", torch.cuda.current_device())
    assert devicesums._fused(device) is not None
    for size in (1, 4095, 1_000_003):
        tensor = torch.randn(size)
        assert device_checksum(tensor.to(device)) == device_checksum(tensor)
