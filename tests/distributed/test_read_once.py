"""With `read_once`, the ranks of a job read each byte of a checkpoint once, all together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.program import said, say, torchrun

from ckptcoord import CheckpointCoordinator, CkptError, SharingPattern, StateComponent
from ckptcoord.dist.sharded import Sharded

pytestmark = pytest.mark.dist
SHAPE = (1024, 4096)  # 16 MiB
PARTS = 3


def full() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def declare(kept: dict[str, Any], small: torch.Tensor) -> list[StateComponent]:
    return [
        StateComponent("m", kept, SharingPattern.PER_RANK),
        StateComponent("s", {"x": small, "e": torch.zeros(0)}, SharingPattern.REPLICATED),
    ]


def save(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    starts = [SHAPE[0] * part // size for part in range(size + 1)]
    rows = full()[starts[rank] : starts[rank + 1]].clone()
    kept = {"w": Sharded(rows, (starts[rank], 0), SHAPE)}
    with CheckpointCoordinator(
        declare(kept, torch.arange(300_000)), output_dir=folder / "run"
    ) as coordinator:
        coordinator.save_checkpoint(step=1)


def read_bytes() -> int:
    """What this process has asked the kernel for, of files and pipes."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def load(folder: Path, repository: str, once: bool) -> None:
    """Columns of what was saved in rows: every rank needs every piece."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    start, stop = (SHAPE[1] * part // size for part in (rank, rank + 1))
    kept = {"w": Sharded(torch.zeros(SHAPE[0], stop - start), (0, start), SHAPE)}
    small = torch.zeros(300_000, dtype=torch.int64)
    with CheckpointCoordinator(declare(kept, small), output_dir=Path(repository)) as coordinator:
        dist.barrier()
        before = read_bytes()
        try:
            report = coordinator.load_checkpoint(read_once=once)
        except CkptError as error:
            say(folder, "error", str(error))
            assert not kept["w"].tensor.any()
            assert not small.any()
            return
        read = read_bytes() - before
    assert torch.equal(kept["w"].tensor, full()[:, start:stop])
    assert torch.equal(small, torch.arange(300_000))
    say(folder, "read", [read, report.bytes_read])


def test_each_byte_is_read_once_in_the_whole_job(tmp_path):
    torchrun(save, tmp_path / "saved", PARTS)
    repository = str(tmp_path / "saved" / "run")
    nbytes = full().nbytes + 300_000 * 8
    totals = {}
    for once in (True, False):
        folder = tmp_path / str(once)
        torchrun(load, folder, 2, repository=repository, once=once)
        answers = said(folder, "read", 2)
        totals[once] = sum(read for read, _ in answers)
        reported = sum(one for _, one in answers)
        assert reported == nbytes if once else reported > 1.9 * nbytes
    assert nbytes <= totals[True] <= 1.05 * nbytes
    assert totals[False] > 1.9 * nbytes


def test_damage_that_one_rank_reads_is_an_error_on_all_before_anything_changes(tmp_path):
    torchrun(save, tmp_path / "saved", PARTS)
    repository = tmp_path / "saved" / "run"
    shard = next(repository.glob("checkpoint-1/m.rank00001*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    torchrun(load, tmp_path / "damaged", 2, repository=str(repository), once=True)
    answers = said(tmp_path / "damaged", "error", 2)
    assert answers[0] == answers[1]
    assert "m.rank00001" in answers[0]
