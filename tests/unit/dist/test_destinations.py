"""What is read beside the live state gets there in the form that it has there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent


@pytest.fixture
def one_rank_mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)])
def test_dtensors_that_are_not_filled_in_place_stay_dtensors(one_rank_mesh, tmp_path, placement):
    memory = torch.arange(12.0)
    # Two tensors of one memory are read beside it.
    halves = [
        DTensor.from_local(half, one_rank_mesh, [placement], run_check=False)
        for half in memory.view(2, 6)
    ]
    live = {"a": halves[0], "b": halves[1]}
    components = [StateComponent("m", live, SharingPattern.PER_RANK)]
    with CheckpointCoordinator(components, output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=1)
        memory.zero_()
        coordinator.load_checkpoint()
    assert torch.equal(memory, torch.arange(12.0))
    assert live["a"] is halves[0]
    assert live["b"] is halves[1]
