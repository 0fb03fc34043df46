"""AccelTrainer under torchrun: kills, resumes, and DDPTrainer's own losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.distributed.program import Record, remains, said, say, torchrun
from tests.unit.trainers.job import Wide
from tests.unit.trainers.tiny import Noisy, arguments

from ckptcoord import AccelTrainer, DDPTrainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


def train(folder: Path, *, kinds: list[str], kill_at: int = 0, **settings: Any) -> None:
    """A run of each of these trainers; what it leaves behind, and its losses."""
    for kind in kinds:
        repository = folder / kind
        standard = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.003}
        args = arguments(repository, **standard, **settings)
        torch.manual_seed(5)
        record = Record(repository, kill_at, after=3)
        made = {"accel": AccelTrainer, "ddp": DDPTrainer}[kind](
            Wide(), args, Noisy(100), callbacks=[record]
        )
        made.train()
        say(folder, kind, [record.lines, remains(made)])
        made.close()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_trains_as_ddp_does_and_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path, ranks: int
) -> None:
    straight, killed = tmp_path / "a", tmp_path / "b"
    settings = {"gradient_accumulation_steps": 2}
    torchrun(train, straight, ranks, kinds=["accel", "ddp"], **settings)
    torchrun(train, killed, ranks, kinds=["accel"], succeeds=False, kill_at=5, **settings)
    torchrun(train, killed, ranks, kinds=["accel"], resume_from_checkpoint=True, **settings)
    accel, ddp = (said(straight, kind, ranks) for kind in ("accel", "ddp"))
    assert accel == ddp
    for (losses, left), (again, found) in zip(accel, said(killed, "accel", ranks), strict=True):
        assert found == left
        assert again.items() <= losses.items()
        assert len(again) == 6
