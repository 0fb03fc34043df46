"""The sums of `devicesums` in one pass over a device's memory; needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ckptcoord.dist.devicesums import MULTIPLIERS

_BLOCK = 4096


def fused_sums(words: torch.Tensor) -> torch.Tensor:
    """As `sums_by_torch`, in one pass.

    Args:
        words: [n], on a device that Triton has a driver for.
    """
    blocks = max(1, triton.cdiv(words.numel(), _BLOCK))
    partial = words.new_zeros((blocks, len(MULTIPLIERS)))
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        _sum_blocks[(blocks,)](words, partial, words.numel(), *MULTIPLIERS, BLOCK=_BLOCK)
    return partial.sum(dim=0)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_blocks(words, sums, count, first, second, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    word = tl.load(words + index, mask=index < count, other=0)
    mixed = (word ^ (word >> 29)) * (index * 2 + 1)
    tl.store(sums + 2 * block, tl.sum(mixed * first))
    tl.store(sums + 2 * block + 1, tl.sum(mixed * second))
