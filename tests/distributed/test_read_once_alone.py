"""With `read_once`, ranks of which some share nothing of what they want with any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from tests.distributed.program import said, say, torchrun

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist.sharded import Sharded

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.dist, pytest.mark.alone]
SHAPE = (9, 4)
FULL = torch.arange(36.0).reshape(SHAPE)


def rows(first: int, stop: int, source: torch.Tensor) -> Sharded:
    return Sharded(source[first:stop].clone(), (first, 0), SHAPE)


def coordinator(state: dict, folder: Path) -> CheckpointCoordinator:
    component = StateComponent("m", state, SharingPattern.PER_RANK)
    config = CoordinatorConfig(timeout_s=20)
    return CheckpointCoordinator([component], output_dir=folder, config=config)


def save_and_load(folder: Path) -> None:
    """Ranks 0 and 1 want the same rows, rank 2 others, rank 3 nothing."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    saved = {"w": rows(*[(0, 3), (3, 6), (6, 9), (9, 9)][rank], FULL)}
    with coordinator(saved, folder / "run") as one:
        one.save_checkpoint(step=1)
    first, stop = [(0, 5), (1, 6), (6, 9), (9, 9)][rank]
    live = {"w": rows(first, stop, torch.zeros(SHAPE))}
    with coordinator(live, folder / "run") as one:
        one.load_checkpoint(read_once=True)
        one.load_checkpoint(read_once=True)
    assert torch.equal(live["w"].tensor, FULL[first:stop])
    # The trainer's own groups are numbered by all ranks alike.
    group = dist.new_group([0, 3])
    if rank in (0, 3):
        dist.barrier(group)
    say(folder, "done", rank)


def test_ranks_that_share_nothing_do_not_keep_the_others_waiting(tmp_path):
    torchrun(save_and_load, tmp_path, 4)
    assert said(tmp_path, "done", 4) == [0, 1, 2, 3]
