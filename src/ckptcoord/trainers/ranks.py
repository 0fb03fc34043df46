"""The few words that the ranks of a trainer exchange while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as c10d

from ckptcoord.trainers.wire import broadcast

if TYPE_CHECKING:
    from collections.abc import Sequence


class Ranks(Protocol):
    """All ranks of the job. Every method is collective."""

    rank: int
    size: int

    def agree(self, flags: Sequence[int]) -> tuple[int, ...]:
        """The largest value of each flag on any rank."""
        ...

    def total(self, values: Sequence[float]) -> tuple[float, ...]:
        """The sum of each value over the ranks, the same bits on every rank."""
        ...

    def from_first(self, value: str) -> str:
        """Rank 0's value."""
        ...


class OneRank:
    """A job of one process."""

    rank = 0
    size = 1

    def agree(self, flags: Sequence[int]) -> tuple[int, ...]:
        """The flags as they are."""
        return tuple(flags)

    def total(self, values: Sequence[float]) -> tuple[float, ...]:
        """The values as they are."""
        return tuple(values)

    def from_first(self, value: str) -> str:
        """The value as it is."""
        return value


class TorchRanks:
    """The ranks of torch.distributed; made on all of them together.

    Words travel over gloo on the CPU, in a group of their own where the job's backend is another:
    on a GPU every word would wait for all kernels launched so far.
    """

    def __init__(self) -> None:
        self.rank, self.size = c10d.get_rank(), c10d.get_world_size()
        shared = c10d.get_backend() == "gloo"
        self.group: c10d.ProcessGroup | None = None if shared else c10d.new_group(backend="gloo")

    def agree(self, flags: Sequence[int]) -> tuple[int, ...]:
        """One all-reduce of a few bytes."""
        words = torch.tensor(flags, dtype=torch.int32)
        c10d.all_reduce(words, op=c10d.ReduceOp.MAX, group=self.group)
        return tuple(words.tolist())

    def total(self, values: Sequence[float]) -> tuple[float, ...]:
        """One gather of 64-bit floats, added in rank order."""
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        c10d.all_gather(gathered, own, group=self.group)
        return tuple(sum(column) for column in zip(*(g.tolist() for g in gathered), strict=True))

    def from_first(self, value: str) -> str:
        """One broadcast."""
        return str(broadcast(value, group=self.group))
