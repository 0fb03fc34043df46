"""What a save costs training on an accelerator; skipped, with the reason, where there is none.

The measure is the same run's own bandwidth from the device to pinned memory, and within the device.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist.devicesums import device_checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE_BYTES = 1 << 30
ROUNDS = 7
EAGER, DEFERRED, CHECKSUM = 1.1, 0.1, 2.0  # of the copy's time; of a read's time at full bandwidth


def median_s(work, *, rounds: int = ROUNDS) -> float:
    """Seconds until the device has done what `work` asks it for; after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def copy_to_host_s() -> float:
    source = torch.zeros(SIZE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty(SIZE_BYTES, dtype=torch.uint8, pin_memory=True)
    return median_s(lambda: target.copy_(source, non_blocking=True))


class Job:
    """A model and its momenta on the device, SIZE_BYTES together, and a step that changes both."""

    def __init__(self, folder) -> None:
        count, each = 32, SIZE_BYTES // 8 // 32
        self.model = torch.nn.ParameterList(torch.zeros(each) for _ in range(count)).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.in_step_s = 0.0
        parts = [
            StateComponent("model", self.model, SharingPattern.GLOBAL),
            StateComponent("optimizer", self.optimizer, SharingPattern.GLOBAL),
        ]
        self.coordinator = CheckpointCoordinator(
            parts, output_dir=folder, config=CoordinatorConfig(keep_last=2)
        )
        self.saves = 0
        self.step()

    def step(self) -> None:
        """Backward, as it were, while copies are made; then the optimizer's step is timed."""
        for parameter in self.model:
            parameter.grad = torch.full_like(parameter, 0.5)
        time.sleep(0.5)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        self.optimizer.step()
        torch.cuda.synchronize()
        self.in_step_s = time.perf_counter() - began_s

    def stalls_s(self, *, deferred: bool) -> list[float]:
        """What each of some saves takes from training: its call, and what a step takes longer."""
        self.step()
        usual_s = self.in_step_s
        found = []
        for _ in range(ROUNDS + 2):
            self.saves += 1
            began_s = time.perf_counter()
            pending = self.coordinator.save_checkpoint_async(step=self.saves, deferred=deferred)
            called_s = time.perf_counter() - began_s
            self.step()
            found.append(called_s + max(0.0, self.in_step_s - usual_s))
            pending.result()
        return found[2:]


@pytest.mark.parametrize(("deferred", "bar"), [(False, EAGER), (True, DEFERRED)])
def test_a_save_stalls_training_for_no_more_than_its_copy(tmp_path, deferred, bar):
    copy_s = copy_to_host_s()
    job = Job(tmp_path)
    with job.coordinator:
        stall_s = statistics.median(job.stalls_s(deferred=deferred))
    assert stall_s <= bar * copy_s, f"{stall_s:.4f} s where the copy takes {copy_s:.4f}"


def test_pinned_memory_is_reused_from_save_to_save(tmp_path):
    job = Job(tmp_path)
    with job.coordinator:
        pool = job.coordinator._background._stager.pool
        job.stalls_s(deferred=True)
        held = pool.held_bytes
        assert held >= SIZE_BYTES
        job.stalls_s(deferred=True)
        assert pool.held_bytes == held


def test_a_checksum_on_the_device_takes_at_most_twice_as_long_as_reading():
    tensor = torch.randn(SIZE_BYTES // 4, device="cuda")
    other = torch.empty_like(tensor)
    copy_s = median_s(lambda: other.copy_(tensor))  # reads it once, and writes as much
    checksum_s = median_s(lambda: device_checksum(tensor))
    assert checksum_s <= CHECKSUM * copy_s / 2, f"{checksum_s:.4f} s, a read {copy_s / 2:.4f}"
