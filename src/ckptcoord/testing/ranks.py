"""Several ranks in one process: threads that agree over an in-memory store."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch.distributed as c10d

from ckptcoord.dist.world import TorchWorld

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._C._distributed_c10d import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcomes(Generic[T]):
    """What each rank returned, or raised."""

    futures: tuple[Future[T], ...]

    @property
    def values(self) -> list[T]:
        """All results, by rank; raises the first failure."""
        return [future.result() for future in self.futures]

    @property
    def errors(self) -> list[BaseException]:
        """All failures, by rank; an AssertionError when a rank succeeded."""
        errors = []
        for rank, future in enumerate(self.futures):
            error = future.exception()
            assert error is not None, f"rank {rank} returned {future.result()!r}"
            errors.append(error)
        return errors


def run_ranks(
    size: int, work: Callable[[TorchWorld], T], *, store: Store | None = None
) -> Outcomes[T]:
    """Run `work` as every rank of a world, each on a thread of its own, and wait for all.

    The rounds are those of a real job, over a HashStore; the trainer's own collectives are not
    there. Use processes for what kills or stops a rank.
    """
    shared = store or c10d.HashStore()  # type: ignore[attr-defined]  # it does export it

    def one(rank: int) -> T:
        world = TorchWorld(shared, rank, size, host="this process", host_is_rank_0=False)
        try:
            return work(world)
        finally:
            world.close()

    with ThreadPoolExecutor(size, "rank") as pool:
        return Outcomes(tuple([pool.submit(one, rank) for rank in range(size)]))
