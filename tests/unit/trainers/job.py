"""A job of several real processes with gloo between them, and what its ranks do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from tests.unit.trainers.tiny import Noisy, Spy, Struck, arguments, remains
from torch import nn

import ckptcoord
from ckptcoord import DDPTrainer
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers.data import DispatchLoader, ResumableLoader
from ckptcoord.trainers.ddp import settle_buckets, start_process_group
from ckptcoord.trainers.ranks import TorchRanks

if TYPE_CHECKING:
    from collections.abc import Callable

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "ckptcoord.dist.coordinator", __name__]
)


def run_job(work: Callable[..., Any], *args: Any, size: int = 4, **kwargs: Any) -> list[Any]:
    """What `work` returned on each rank; raises with the traceback of a rank that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe()
        target = (rank, size, port, theirs, work, args, kwargs)
        process = _CONTEXT.Process(target=_be_rank, args=target, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = [pipe.recv() if pipe.poll(120) else ("silent", "") for pipe in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for rank, (kind, value) in enumerate(answers):
        assert kind == "ok", f"rank {rank}: {kind} {value}"
    return [value for _, value in answers]


def _be_rank(rank: int, size: int, port: int, pipe: Any, work: Any, args: Any, kwargs: Any) -> None:
    os.environ.update(  # noqa: TID251 (as torchrun does)
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        answer = ("ok", work(*args, **kwargs))
        ckptcoord.shutdown()
    except BaseException:  # noqa: BLE001 (whatever it is, the test must see it)
        answer = ("failed", traceback.format_exc())
    pipe.send(answer)
    pipe.close()


# --- what ranks do --------------------------------------------------------------------------------


class Wide(nn.Module):
    """Wide enough that the order of sums over four ranks shows; one part is used first and last."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.last = nn.Linear(64, 1)  # registered first, used last
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.first = nn.Linear(8, 64)
        self.table = nn.Embedding(4, 64, sparse=sparse)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x) + self.table(torch.zeros(len(x), dtype=torch.long))
        for layer in self.layers:
            hidden = nn.functional.dropout(layer(hidden).relu(), 0.1, self.training)
        return {"loss": ((self.last(hidden) - y) ** 2).mean()}


def train(folder: str, *, spy: Any = None, **settings: Any) -> Any:
    """Train on every rank; what is left, the losses and the events."""
    rank = int(os.environ["RANK"])  # noqa: TID251 (as torchrun says)
    torch.manual_seed(5)
    model = Wide(sparse=settings.pop("sparse", False))
    spy = (spy or Spy)(rank) if callable(spy) else Spy(**(spy or {}))
    struck = settings.pop("struck", None)
    held_out = None if struck is None else Struck(9, strikes=rank == struck)
    args = arguments(Path(folder), learning_rate=0.003, **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.01) if model.table.sparse else None
    trainer = DDPTrainer(model, args, Noisy(100), held_out, callbacks=[spy], optimizer=optimizer)
    output = trainer.train()
    trainer.close()
    if held_out is not None:
        spy.events.append(f"{held_out.reads} read")
    return remains(trainer), spy.losses, spy.events, output.stopped_by_signal


def one_stops(rank: int) -> Spy:
    """Only rank 2 gets a signal, in step 3."""
    return Spy(at={3: lambda: os.kill(os.getpid(), signal.SIGUSR1)} if rank == 2 else {})


def one_wishes(rank: int) -> Spy:
    """Only rank 1 asks for a save, at step 2."""
    return Spy(save_at=(2,) if rank == 1 else ())


def words() -> Any:
    """What ranks say to one another."""
    assert start_process_group()
    assert start_process_group()  # it is there already
    ranks = TorchRanks()
    rank = ranks.rank
    return (
        ranks.agree([rank, 7 - rank, 0]),
        ranks.total([0.1 * (rank + 1), 1.0]),
        ranks.from_first(f"of {rank}"),
    )


class Failing(Noisy):
    """Cannot read its fifth sample."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 4:
            raise OSError("disk on fire")
        return super().__getitem__(index)


def dispatch() -> Any:
    """Epochs dealt out by rank 0, one of which breaks."""
    start_process_group()
    first = c10d.get_rank() == 0

    def loader(dataset: Any) -> DispatchLoader:
        source = ResumableLoader(dataset, batch_size=1, shuffle=False) if first else None
        return DispatchLoader(source)

    numbers = [torch.tensor([float(i)]) for i in range(11)]
    whole = loader(numbers)
    seen = [float(batch) for batch in whole]
    length = len(whole)
    whole.set_epoch(1)
    taken = iter(whole)
    next(taken)
    state = whole.state_dict()
    fresh = loader(numbers)
    fresh.load_state_dict(state)
    rest = [float(batch) for batch in fresh]
    fresh.close()
    errors = []
    try:
        list(loader(Failing(8)))
    except (OSError, CkptError) as error:
        errors.append(str(error))
    try:
        DispatchLoader(None)
    except ConfigError as error:
        errors.append(str(error))
    return seen, length, rest, errors


def buckets() -> Any:
    """What settling leaves behind."""
    start_process_group()
    torch.manual_seed(0)
    parallel = nn.parallel.DistributedDataParallel(Wide())
    before = torch.get_rng_state()
    settle_buckets(parallel)
    untouched = torch.equal(before, torch.get_rng_state())
    clean = all(p.grad is None for p in parallel.parameters())
    batch = {"x": torch.ones(2, 8), "y": torch.ones(2, 1)}
    parallel(**batch)["loss"].backward()
    plain_type = type(parallel.module).__name__
    return untouched, clean, plain_type
