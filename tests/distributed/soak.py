"""Very many saves of a small state in the background, one after the other, in one process.

`python -m tests.distributed.soak 10000 7`: so many saves, seed 7. A third number is the growth of
memory that is let pass, in bytes a save. Imports no pytest.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.core.entries import Commit
from ckptcoord.repo.log import Log
from ckptcoord.store.local import LocalStore

PAGE_BYTES = 4096
MOST_GROWTH = 1024.0  # bytes a save
# Of the saves: buffers and the heap find their sizes, and so do what the log's state knows of
# sweeps (at most 1,000 attempts) and the cache of parsed names (4,096).
WARM_UP = 0.45
KEEP_LAST = 3
LOOKS = 50
PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the process has after so many saves, when none is under way."""

    saves: int
    resident_bytes: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What came of it.

    Attributes:
        growth: of resident memory after the warm-up, a straight line through it, bytes a save.
    """

    saves: int
    growth: float
    files: int
    threads: int
    resident_bytes: int


def soak(folder: Path, saves: int, rng: random.Random, most_growth: float = MOST_GROWTH) -> Soaked:
    """Save, train, save; then look at the log, and load the last one.

    Raises:
        AssertionError: something grows, or a commit is missing, out of order or not as it was.
    """
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    progress = {"step": 0}
    parts = [
        StateComponent("model", model, SharingPattern.REPLICATED),
        StateComponent("optimizer", optimizer, SharingPattern.REPLICATED),
        StateComponent("progress", progress, SharingPattern.GLOBAL),
    ]
    looks: list[Look] = []
    every = max(1, saves // LOOKS)
    config = CoordinatorConfig(keep_last=KEEP_LAST)
    with CheckpointCoordinator(parts, output_dir=folder, config=config) as coordinator:
        for step in range(1, saves + 1):
            progress["step"] = step
            coordinator.save_checkpoint_async(
                step=step, deferred=rng.choice((None, None, True, False))
            )
            want = {name: value.clone() for name, value in model.state_dict().items()}
            train(model, optimizer)
            if step % every == 0:
                coordinator.wait()
                looks.append(look(step, looks[-1] if looks else None))
        coordinator.wait()
        coordinator.load_checkpoint()
    assert progress["step"] == saves, "the last commit is not of the last save"
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]), f"{name} is not as it was at the call"
    check_commits(folder, saves)
    return judged(looks, saves, most_growth)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model(torch.randn(2, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def look(saves: int, before: Look | None) -> Look:
    """Count now; threads and files that are just ending are given the time to."""
    until = time.monotonic() + PATIENCE_S
    while True:
        now = count(saves)
        flat = before is None or (now.files, now.threads) == (before.files, before.threads)
        if flat or time.monotonic() > until:
            return now
        time.sleep(0.01)


def count(saves: int) -> Look:
    """Count at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Look(
        saves=saves,
        resident_bytes=pages * PAGE_BYTES,
        files=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=sum(1 for _ in Path("/proc/self/task").iterdir()),
    )


def check_commits(folder: Path, saves: int) -> None:
    """All steps were committed, each once, in the order of the calls; what is left is few."""
    with LocalStore(str(folder)) as store:
        bodies = [entry.body for entry in Log(store, clock=_no_clock).entries()]
    steps = [body.checkpoint_id.step for body in bodies if isinstance(body, Commit)]
    assert steps == list(range(1, saves + 1)), "commits are missing or out of order"
    left = len(list(folder.glob("checkpoint-*")))
    assert left <= KEEP_LAST + 1, f"{left} checkpoints are left"


def judged(looks: list[Look], saves: int, most_growth: float) -> Soaked:
    """The straight line, and whether all is flat after the warm-up."""
    warm = [one for one in looks if one.saves >= WARM_UP * saves]
    growth = float(
        np.polyfit([one.saves for one in warm], [one.resident_bytes for one in warm], 1)[0]
    )
    files, threads = {one.files for one in warm}, {one.threads for one in warm}
    assert len(files) == 1, f"open files: {[one.files for one in warm]}"
    assert len(threads) == 1, f"threads: {[one.threads for one in warm]}"
    assert growth < most_growth, (
        f"memory grows by {growth:.0f} bytes a save: "
        f"{[(one.saves, one.resident_bytes) for one in warm]}"
    )
    return Soaked(
        saves=saves,
        growth=growth,
        files=files.pop(),
        threads=threads.pop(),
        resident_bytes=warm[-1].resident_bytes,
    )


def _no_clock() -> None:
    raise AssertionError("reading needs no clock")


if __name__ == "__main__":
    growth = float(sys.argv[3]) if len(sys.argv) > 3 else MOST_GROWTH
    with tempfile.TemporaryDirectory() as temporary:
        found = soak(
            Path(temporary) / "run", int(sys.argv[1]), random.Random(int(sys.argv[2])), growth
        )
    print(  # noqa: T201 (a script)
        f"{found.saves} saves in the background, all committed in order; memory "
        f"{found.growth:+.0f} bytes a save, {found.resident_bytes >> 20} MiB at the end; "
        f"{found.files} open files and {found.threads} threads throughout"
    )
