"""FSDPTrainer under torchrun: kills, resumes, DDPTrainer's own numbers, other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.program import Record, remains, said, say, torchrun
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Noisy, Spy, arguments
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ckptcoord import DDPTrainer, FSDPTrainer, open_repository

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


def train(
    folder: Path | str, *, kinds: list[str], kill_at: int = 0, stop_at: int = -1, **settings: Any
) -> Any:
    """A run of each of these trainers; what it leaves behind, and its losses."""
    folder = Path(folder)
    left = []
    for kind in kinds:
        standard = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.003}
        args = arguments(folder / kind, **{**standard, **settings})
        torch.manual_seed(5)
        record = Record(folder / kind, kill_at, after=3)
        spy = Spy(stop_at=stop_at)
        made = KINDS[kind](Layered(), args, Noisy(100), Noisy(7), callbacks=[record, spy])
        made.train()
        weights = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
            for name, tensor in made.model.state_dict().items()
        }
        left.append([record.lines, remains(made), weights, made.evaluate()])
        say(folder, kind, left[-1])
        made.close()
    return left


def test_it_trains_as_ddp_does_and_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, killed = tmp_path / "a", tmp_path / "b"
    settings = {"gradient_accumulation_steps": 2}
    torchrun(train, straight, 2, kinds=["fsdp", "ddp"], **settings)
    assert_close(said(straight, "fsdp", 2), said(straight, "ddp", 2))
    torchrun(train, killed, 2, kinds=["fsdp"], succeeds=False, kill_at=5, **settings)
    torchrun(train, killed, 2, kinds=["fsdp"], resume_from_checkpoint=True, **settings)
    assert_resumed(said(straight, "fsdp", 2), said(killed, "fsdp", 2))


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_four_ranks_write_their_parts_and_resume(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    settings = {"kinds": [kind], "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 4}
    straight = run_job(train, tmp_path / "a", **settings)
    run_job(train, tmp_path / "b", stop_at=4, **settings)
    resumed = run_job(train, tmp_path / "b", resume_from_checkpoint=True, **settings)
    assert_resumed([left for (left,) in straight], [left for (left,) in resumed])
    repository = open_repository(tmp_path / "b" / kind)
    manifest = repository.manifest(repository.resolve("main@4"))
    assert {one.writer_rank for one in manifest.files if one.component == "model"} == {0, 1, 2, 3}
    folder = tmp_path / "b" / kind / "checkpoint-4"
    state = {id(tensor): tensor for tensor in Layered().state_dict(keep_vars=True).values()}
    assert sum(map(tensor_bytes, folder.glob("model*.safetensors"))) == sum(
        tensor.nbytes for tensor in state.values()
    ), "equal copies are stored once"


def tensor_bytes(path: Path) -> int:
    """Of a safetensors file, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def assert_resumed(straight: list[Any], resumed: list[Any]) -> None:
    """The same to the last bit."""
    for (losses, left, *_), (again, found, *_) in zip(straight, resumed, strict=True):
        assert found == left
        assert again.items() <= losses.items()
        assert 0 < len(again) < len(losses)


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
