"""What a save of sharded tensors, and a load into another layout, take of a rank's memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from tests.distributed.program import said, say, torchrun

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.dist, pytest.mark.alone]

RANKS = 2
ROWS, COLUMNS = 10 << 10, 8 << 10
PIECE_BYTES = ROWS * COLUMNS * 4 // RANKS
MOST_TO_SAVE, MOST_TO_LOAD = 64 << 20, 256 << 20
# Two threads that held a piece each, or one copy of what a rank saves, would be over the bars.
assert PIECE_BYTES > MOST_TO_SAVE
assert RANKS * PIECE_BYTES > MOST_TO_LOAD


def peak_memory(work: Callable[[], object]) -> int:
    """The most resident bytes during `work`, beyond those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # from here the peak counts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def declared(by: int, value: float) -> tuple[torch.Tensor, list[StateComponent]]:
    """One tensor in pieces by that dimension; what this rank has of it, and the component."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shape = [ROWS, COLUMNS]
    shape[by] //= RANKS
    local = torch.full(shape, value)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = {"w": DTensor.from_local(local, mesh, [Shard(by)], run_check=False)}
    return local, [StateComponent("m", state, SharingPattern.PER_RANK)]


def save(folder: Path) -> None:
    """By rows, as FSDP does."""
    dist.init_process_group("gloo")
    _, components = declared(0, 1.0 + dist.get_rank())
    with CheckpointCoordinator(components, output_dir=folder / "run") as coordinator:
        say(folder, "extra", peak_memory(lambda: coordinator.save_checkpoint(step=1)))


def load(folder: Path, repository: str) -> None:
    """By columns, as TP does: every rank needs half of every row."""
    dist.init_process_group("gloo")
    local, components = declared(1, 0.0)
    with CheckpointCoordinator(components, output_dir=Path(repository)) as coordinator:
        say(folder, "extra", peak_memory(coordinator.load_checkpoint))
    assert (local[: ROWS // RANKS] == 1).all()
    assert (local[ROWS // RANKS :] == 2).all()


def test_saves_and_loads_of_pieces_stay_within_their_bars(tmp_path):
    torchrun(save, tmp_path / "saved", RANKS)
    assert max(said(tmp_path / "saved", "extra", RANKS)) <= MOST_TO_SAVE
    torchrun(load, tmp_path / "loaded", RANKS, repository=str(tmp_path / "saved" / "run"))
    assert max(said(tmp_path / "loaded", "extra", RANKS)) <= MOST_TO_LOAD
