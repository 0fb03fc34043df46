"""Benchmarks in several processes: ranks are started, work side by side, and leave what they found.

Every rank runs a function of (rank, settings) in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.context import ForkServerContext, ForkServerProcess
    from pathlib import Path

    from sides import Job, Side

_RESULT = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every rank is told.

    Attributes:
        size_bytes: of the state.
        rounds: that count.
        threads: of every side, a rank.
        folder: to write below.
        ranks: how many.
        port: where they meet; `run_ranks` finds one.
    """

    size_bytes: int
    rounds: int
    threads: int
    folder: Path
    ranks: int = 1
    port: int = 0


_Settings = TypeVar("_Settings", bound=Settings)


# --- in every rank --------------------------------------------------------------------------------


@contextmanager
def member(rank: int, settings: Settings, *, grouped: bool = False) -> Iterator[Job]:
    """A rank among the others, from their meeting to the end of the process.

    Args:
        rank: which.
        settings: of the job.
        grouped: one process alone has a process group, too.
    """
    import torch
    import torch.distributed as dist
    from sides import Job

    from ckptcoord.dist.shutdown import shutdown

    if settings.ranks > 1 or grouped:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings.port))
        dist.init_process_group("gloo", rank=rank, world_size=settings.ranks)
    if settings.ranks > 1:
        torch.set_num_threads(1)  # as torchrun does
    yield Job(rank=rank, size=settings.ranks, threads=settings.threads, folder=settings.folder)
    shutdown()


def leave(job: Job, found: object) -> None:
    """On rank 0: what `run_ranks` is to return, as JSON; of dataclasses, their fields."""
    if job.rank == 0:
        (job.folder / _RESULT).write_text(json.dumps(found, default=asdict))


class RankRun:
    """The state of one rank, and its sides.

    Args:
        job: the rank.
        state: that the sides save and load.
        sides: by name.
    """

    def __init__(self, job: Job, state: dict[str, object], sides: Mapping[str, Side]) -> None:
        self.job, self.state, self.sides = job, state, sides

    def timed(self, work: Callable[[dict[str, object]], None]) -> float:
        """Seconds, from when all ranks begin until all are done."""
        self.barrier()
        began_s = time.perf_counter()
        work(self.state)
        self.barrier()
        return time.perf_counter() - began_s

    def barrier(self) -> None:
        """All ranks wait for all."""
        import torch.distributed as dist

        if self.job.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 (anything that can be pickled)
        """What each rank has."""
        import torch.distributed as dist

        found = [value] * self.job.size
        if self.job.size > 1:
            dist.all_gather_object(found, value)
        return found

    def remove(self, folder: Path) -> None:
        """Delete what a side wrote, durably: that is not billed to the next one."""
        from sides import sync

        self.barrier()
        if self.job.rank == 0:
            shutil.rmtree(folder)
            sync(folder.parent)
        self.barrier()

    def close(self) -> None:
        """End what runs for the sides."""
        for side in self.sides.values():
            side.close()


# --- in the parent --------------------------------------------------------------------------------


def run_ranks(
    context: ForkServerContext, main: Callable[[int, _Settings], None], settings: _Settings
) -> Any:  # noqa: ANN401 (whatever was left)
    """Run the ranks of a job; returns what its rank 0 has left."""
    inside = replace(settings, port=_free_port())
    children = [context.Process(target=main, args=(rank, inside)) for rank in range(inside.ranks)]
    for child in children:
        child.start()
    _join(children)
    return json.loads((settings.folder / _RESULT).read_text())


def label(ranks: int) -> str:
    """How the names of ratios and figures end."""
    return "1proc" if ranks == 1 else f"{ranks}rank"


def _join(children: Sequence[ForkServerProcess]) -> None:
    """Wait for all; when one fails, end the others, and the benchmark."""
    running = {child.sentinel: child for child in children}
    while running:
        for sentinel in wait(list(running)):
            assert isinstance(sentinel, int)
            child = running.pop(sentinel)
            child.join()
            if child.exitcode:
                for other in running.values():
                    other.kill()
                sys.exit(f"a rank failed with exit code {child.exitcode}")


def _free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
