"""FSDPTrainer under torchrun: kills, resumes, DDPTrainer's own numbers, other layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.distributed.program import Record, remains, said, say, torchrun
from tests.unit.trainers.tiny import Noisy, arguments
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ckptcoord import DDPTrainer, FSDPTrainer
from ckptcoord.trainers.sharded import share_buffers

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


class Layered(nn.Module):
    """Uneven sizes, a parameter of one element, tied weights, batch norm, layers that are units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 30, bias=False)  # its gradient would be rounding alone
        self.norm = nn.BatchNorm1d(30)
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(3))
        self.again = nn.Linear(8, 30, bias=False)
        self.again.weight = self.first.weight
        self.last = nn.Linear(30, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.first(x) + self.again(x))
        for layer in self.layers:
            hidden = nn.functional.dropout(layer(hidden).relu(), 0.1, self.training)
        return {"loss": ((self.last(hidden) - y) ** 2).mean()}


class Replicating(FSDPTrainer):
    """HSDP: two groups of shards."""

    def create_mesh(self) -> Any:
        return init_device_mesh("cpu", (2, self.ranks.size // 2), mesh_dim_names=("copies", "fsdp"))


KINDS = {"fsdp": FSDPTrainer, "hsdp": Replicating, "ddp": DDPTrainer}


def train(folder: Path, *, kinds: list[str], kill_at: int = 0, **settings: Any) -> None:
    """A run of each of these trainers; what it leaves behind, and its losses."""
    for kind in kinds:
        standard = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.003}
        if kind == "ddp":  # ranks of it differ in running statistics until the next forward
            standard["save_strategy"] = "no"
        args = arguments(folder / kind, **{**standard, **settings})
        torch.manual_seed(5)
        record = Record(folder / kind, kill_at, after=3)
        made = KINDS[kind](Layered(), args, Noisy(100), Noisy(7), callbacks=[record])
        made.train()
        share_buffers(made.model, None, 0)  # DDP does it at the next forward only
        weights = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
            for name, tensor in made.model.state_dict().items()
        }
        say(folder, kind, [record.lines, remains(made), weights, made.evaluate()])
        made.close()


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_trains_as_ddp_does_and_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path, ranks: int
) -> None:
    straight, killed = tmp_path / "a", tmp_path / "b"
    settings = {"gradient_accumulation_steps": 2}
    torchrun(train, straight, ranks, kinds=["fsdp", "ddp"], **settings)
    assert_close(said(straight, "fsdp", ranks), said(straight, "ddp", ranks))
    torchrun(train, killed, ranks, kinds=["fsdp"], succeeds=False, kill_at=5, **settings)
    torchrun(train, killed, ranks, kinds=["fsdp"], resume_from_checkpoint=True, **settings)
    for (losses, left, *_), (again, found, *_) in zip(
        said(straight, "fsdp", ranks), said(killed, "fsdp", ranks), strict=True
    ):
        assert found == left
        assert again.items() <= losses.items()
        assert len(again) == 6


def assert_close(found: list[Any], wanted: list[Any]) -> None:
    """The same numbers, but for the order of sums."""
    losses, _, weights, metrics = wanted[0]
    for found_losses, _, found_weights, found_metrics in found:
        assert numbers(found_losses) == pytest.approx(numbers(losses), rel=1e-5)
        assert found_metrics == pytest.approx(metrics, rel=1e-5)
        assert found_weights.keys() == weights.keys()
        for name, values in weights.items():
            assert torch.allclose(
                torch.tensor(found_weights[name]), torch.tensor(values), atol=1e-5
            )


def numbers(lines: dict[str, list[str]]) -> list[float]:
    """Losses and gradient norms."""
    return [float.fromhex(one) for line in lines.values() for one in line]
