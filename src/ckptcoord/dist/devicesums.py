"""A checksum of a tensor where it lives: by a kernel in one pass, else by torch (ADR 22)."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ckptcoord.dist.capture import flat_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Sums: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

MULTIPLIERS = (0x1E3779B97F4A7C15, 0x42B2AE3D27D4EB4F)
"""Odd; of the two sums."""
_CHUNK_WORDS = 8 << 20
_TRIAL_WORDS = 10_000  # of the tensor by which a kernel is held to what torch finds
_log = logging.getLogger("ckptcoord")


def device_checksum(tensor: torch.Tensor) -> bytes:
    """A 128-bit checksum by integer arithmetic on the tensor's own device, which is waited for.

    Two sums over 64-bit words, each word times its own odd weight, modulo 2**64: an odd weight is
    invertible, so any change of a single word changes both sums.
    """
    data = flat_bytes(tensor)
    if data.data_ptr() % 8:
        data = data.clone()
    tail = data.numel() % 8
    if tail:
        data = torch.cat([data, data.new_zeros(8 - tail)])
    words = data.view(torch.int64)
    fused = _fused(words.device) if words.is_cuda else None
    sums = (fused or sums_by_torch)(words).tolist()
    return b"".join((total % (1 << 64)).to_bytes(8, "little") for total in sums)


def sums_by_torch(words: torch.Tensor, *, chunk_words: int = _CHUNK_WORDS) -> torch.Tensor:
    """The two sums of an int64 tensor, [2], by torch's own operations: a dozen passes over memory.

    Args:
        words: [n].
        chunk_words: at a time.
    """
    sums = words.new_zeros(len(MULTIPLIERS))
    for start in range(0, words.numel(), chunk_words):
        chunk = words[start : start + chunk_words]
        odd = torch.arange(start, start + chunk.numel(), device=chunk.device) * 2 + 1
        mixed = (chunk ^ (chunk >> 29)) * odd
        for k, multiplier in enumerate(MULTIPLIERS):
            sums[k] += (mixed * multiplier).sum()
    return sums


@cache
def _fused(device: torch.device) -> Sums | None:
    """The kernel for a device; None, and a warning, where none finds there what torch finds."""
    try:
        sums = _compiled()
        why = "" if sums is None else _fault(sums, device)
    except Exception as error:  # noqa: BLE001 (no compiler, no driver: Triton raises anything)
        sums, why = None, f"{type(error).__name__}: {error}"
    if sums is not None and not why:
        return sums
    why = why or "Triton is not installed"
    _log.warning("checksums on %s are taken by torch, which takes a dozen passes: %s", device, why)
    return None


def _compiled() -> Sums | None:
    """The kernel, where Triton is installed."""
    if find_spec("triton") is None:
        return None
    from ckptcoord.dist.fusedsums import fused_sums

    return fused_sums


def _fault(sums: Sums, device: torch.device) -> str:
    """What is wrong with a kernel; empty: nothing."""
    words = torch.arange(_TRIAL_WORDS, device=device) * MULTIPLIERS[1]
    found, right = sums(words).tolist(), sums_by_torch(words).tolist()
    return "" if found == right else f"its kernel finds {found} where torch finds {right}"
