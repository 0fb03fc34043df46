"""A real training on one rank that saves every step in the background, and keeps a record.

The record is the rank's own file of lines: the digest of the state at each call, and which saves it
was told are committed. What was written to it is there after a SIGKILL. Imports no pytest.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.errors import RefNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord import PendingSave

STEPS = 40
WIDTH, HIDDEN = 64, 400  # each weight is larger than what is always copied at the call
_CALLED, _COMMITTED = "called", "committed"


class Trainee:
    """State of a rank, coordinator, and record.

    Args:
        rank: of this process.
        folder: for the repository and the records.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.record = Record(folder / f"record-{rank}")
        torch.manual_seed(7)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, WIDTH)
        )
        self.parallel = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.cursor = {"step": torch.zeros(1, dtype=torch.int64), "noise": torch.zeros(2000)}
        replicated = SharingPattern.REPLICATED
        self.coordinator = CheckpointCoordinator(
            [
                StateComponent("model", self.model, replicated, validate_replication=True),
                StateComponent("optimizer", self.optimizer, replicated),
                StateComponent("average", self.average, replicated),
                StateComponent("cursor", self.cursor, SharingPattern.PER_RANK),
            ],
            output_dir=folder / "run",
            config=CoordinatorConfig(
                deferred=True,
                queue_depth=2,
                timeout_s=60.0,
                # Of every other training; what is in them must be the same.
                compression="auto" if folder.name.endswith(tuple("13579")) else "off",
            ),
        )

        # Copies that are slow enough for the next step to come before their end.
        self.coordinator._background._stager._probe = _dawdle

    def train(self) -> int:
        """From the newest checkpoint to the end; returns the step that it began at."""
        self.step()  # so that the optimizer has its state
        try:
            first = self.load()
        except RefNotFoundError:
            first = 0
        for step in range(first + 1, STEPS + 1):
            self.step()
            self.record.add(_CALLED, step, self.digest())
            self.note(self.coordinator.save_checkpoint_async(step=step), step)
        self.coordinator.wait()
        return first

    def load(self, ref: str | None = None) -> int:
        """Load a checkpoint, which must be the state at its call; its step."""
        step = self.coordinator.load_checkpoint(ref).step
        called = self.record.read(_CALLED)
        assert self.digest() == called[step], f"rank {self.rank}: not the state of step {step}"
        return step

    def step(self) -> None:
        """One step of training; what the optimizer does not own changes right after its step."""
        number = int(self.cursor["step"]) + 1
        own = torch.Generator().manual_seed(1000 * number + self.rank)
        self.optimizer.zero_grad()
        self.parallel(torch.randn(8, WIDTH, generator=own)).square().mean().backward()
        self.optimizer.step()
        for name, param in self.model.named_parameters():
            self.average[name].lerp_(param.detach(), 0.1)
        self.cursor["step"].fill_(number)
        self.cursor["noise"].copy_(torch.randn(2000, generator=own))

    def note(self, pending: PendingSave, step: int) -> None:
        """Have the record say when the save is committed."""

        def done(committed: Any) -> None:
            if committed.exception() is None:
                self.record.add(_COMMITTED, step, "")

        pending.committed.add_done_callback(done)

    def digest(self) -> str:
        """Of every bit of the state that this rank saves."""
        found = hashlib.sha256()
        moments = self.optimizer.state_dict()["state"]
        held = [self.model.state_dict(), self.average, self.cursor, *moments.values()]
        for tensors in held:
            for name in sorted(tensors):
                found.update(tensors[name].detach().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()


def _dawdle(_: str) -> None:
    if threading.current_thread().name == "ckptcoord-staging":
        time.sleep(0.005)


class Record:
    """A file of lines, each written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, step: int, digest: str) -> None:
        """One more line."""
        line = json.dumps([what, step, digest]) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, line.encode())
        os.close(handle)

    def read(self, what: str) -> dict[int, str]:
        """Step to digest; a step that was trained twice must have had the same state."""
        found: dict[int, str] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            kind, step, digest = json.loads(line)
            if kind == what:
                assert found.setdefault(step, digest) == digest, f"{self.path.name}, step {step}"
        return found

    def committed(self) -> set[int]:
        """The steps whose saves were acknowledged."""
        return set(self.read(_COMMITTED))

    def called(self) -> set[int]:
        """The steps that were to be saved."""
        return set(self.read(_CALLED))


def train(rank: int, folder: Path) -> int:
    """A whole training, or the rest of one."""
    return Trainee(rank, folder).train()


def check(rank: int, folder: Path, steps: list[int]) -> int:
    """Load every one of these checkpoints; how many there were."""
    trainee = Trainee(rank, folder)
    trainee.step()
    for step in steps:
        assert trainee.load(f"main@{step}") == step
    dist.barrier()
    trainee.coordinator.close()
    return len(steps)
