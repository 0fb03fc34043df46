"""HybridTrainer on meshes of 4 and 8 ranks: kills, resumes, DDPTrainer's own numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.distributed.program import Record, remains, said, say, torchrun
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Spy, arguments
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ckptcoord import (
    DDPTrainer,
    FSDPTrainer,
    HybridTrainer,
    SharingPattern,
    StateComponent,
    open_repository,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

pytestmark = pytest.mark.dist
WIDTH = 12


class Points:
    """Points, maybe with noise from the process's generators: what ranks share must be the same."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.linspace(-1, 1, 6) * (index + 1) / 200
        return {"x": x + self.noise * torch.rand(6), "labels": x.sum().reshape(1)}


class Block(nn.Module):
    """Two matrices to part, a norm that all hold, dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.down(self.up(self.norm(hidden)).relu())
        return hidden + nn.functional.dropout(inner, self.dropout, self.training)


class Net(nn.Sequential):
    """Layers that may be stages; the first and the last share a weight."""

    def __init__(self, dropout: float) -> None:
        super().__init__(
            nn.Linear(6, WIDTH),
            *(Block(dropout) for _ in range(3)),
            Back(),
        )
        self[4].weight = self[0].weight


class Back(nn.Module):
    """The first layer's weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, 6))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.weight).sum(-1, keepdim=True)


class Loss:
    """The loss, where there are stages and where there are none."""

    def output_loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output, targets)

    def compute_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self.output_loss(model(batch["x"]), batch["labels"])


class Hybrid(Loss, HybridTrainer):  # type: ignore[misc]
    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        for block in model:
            if isinstance(block, Block):
                parallelize_module(
                    block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
                )


class ByInstance(Hybrid):
    """A copy for each instance of each group: in pieces or by other names, and whole."""

    def get_state_components(self) -> list[StateComponent]:
        (part,) = set(self.mesh_shape) - {"dp"}
        group = SharingPattern.PER_GROUP
        own = self.mesh.tp.index + self.mesh.pp.index  # the same on the members of "dp" only
        self.whole = {"copy": torch.full((4,), float(own))}
        return [
            StateComponent(one.key, one.stateful, group, part, validate_replication=True)
            if one.key in ("model", "optimizer")
            else one
            for one in super().get_state_components()
        ] + [StateComponent("whole", self.whole, group, "dp", validate_replication=True)]


class Replicated(Loss, DDPTrainer):  # type: ignore[misc]
    pass


class Parted(Loss, FSDPTrainer):  # type: ignore[misc]
    pass


def train(
    folder: Path | str,
    *,
    mesh: dict[str, int] | None = None,
    kill_at: int = 0,
    stop_at: int = -1,
    kind: type = Hybrid,
    noise: float = 0.1,
    **settings: Any,
) -> Any:
    """One run; what it leaves behind, and its losses."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    repository = folder / "run"
    standard = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 8}
    if stop_at > 0:  # the schedule goes on to the end all the same
        standard["max_steps"] = 18
    args = arguments(repository, learning_rate=0.01, **{**standard, **settings})
    torch.manual_seed(5)
    record = Record(repository, kill_at, after=3)
    extra = {"mesh_shape": mesh} if mesh else {}
    made = kind(
        Net(noise),
        args,
        Points(noise),
        Points(noise),
        callbacks=[record, Spy(stop_at=stop_at)],
        **extra,
    )
    made.train()
    weights = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
        for name, tensor in made.model.state_dict().items()
    }
    left = [record.lines, remains(made), weights, made.evaluate()]
    made.close()
    say(folder, "left", left)
    return left


def train_by_instance(folder: Path, **settings: Any) -> Any:
    """With other groups than by default."""
    return train(folder, kind=ByInstance, **settings)


MESHES = [{"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}]


CUBE = {"dp": 2, "pp": 2, "tp": 2}
EIGHT = [{"dp": 4, "tp": 2}, {"tp": 4, "dp": 2}, {"dp": 2, "pp": 4}, CUBE]
PAIR_OF_STAGES = pytest.param(MESHES[1], marks=pytest.mark.slow, id=str(MESHES[1]))
SLOW = [pytest.param(mesh, marks=pytest.mark.slow, id=str(mesh)) for mesh in EIGHT]


@pytest.mark.parametrize("mesh", [MESHES[0], *SLOW[:3], PAIR_OF_STAGES], ids=str)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, mesh: dict[str, int]) -> None:
    straight, killed = tmp_path / "a", tmp_path / "b"
    settings = {"mesh": mesh, "gradient_accumulation_steps": 2}
    size = math.prod(mesh.values())
    torchrun(train_by_instance, straight, size, **settings)
    torchrun(train_by_instance, killed, size, succeeds=False, kill_at=5, **settings)
    torchrun(train_by_instance, killed, size, resume_from_checkpoint=True, **settings)
    repository = open_repository(killed / "run")
    manifest = repository.manifest(repository.resolve("main@3"))
    groups = {one.name: one.instances for one in manifest.topology.to_topology().groups}
    ranks = torch.arange(size).reshape(*mesh.values())
    for dim, name in enumerate(mesh):
        lines = ranks.movedim(dim, -1).reshape(-1, mesh[name]).tolist()
        assert groups[name] == tuple(map(tuple, lines))
    for (losses, left, *_), (again, found, *_) in zip(
        said(straight, "left", size), said(killed, "left", size), strict=True
    ):
        assert found == left
        assert again.items() <= losses.items()
        assert len(again) == 6


ALIKE = {"noise": 0.0, "max_grad_norm": 0.5}


def samples(data_ranks: int) -> dict[str, int]:
    """The same sixteen samples a step, whoever works on them."""
    return {"per_device_train_batch_size": 16 // data_ranks}


@pytest.mark.parametrize("mesh", [*MESHES, *SLOW], ids=str)
def test_it_trains_as_ddp_does(tmp_path: Path, mesh: dict[str, int]) -> None:
    settings = {**ALIKE, "save_strategy": "no", "max_steps": 5}
    wanted = run_job(train, tmp_path, kind=Replicated, size=2, **samples(2), **settings)
    size = math.prod(mesh.values())
    found = run_job(train, tmp_path, mesh=mesh, size=size, **samples(mesh["dp"]), **settings)
    assert_alike(found, wanted[0])


@pytest.mark.slow
def test_a_job_goes_on_in_other_layouts(tmp_path: Path) -> None:
    settings = {**ALIKE, "save_strategy": "no", "max_steps": 18}
    wanted = run_job(train, tmp_path / "a", kind=Replicated, size=2, **samples(2), **settings)
    legs: list[tuple[type, dict[str, int] | None, int, int]] = [
        (Replicated, None, 2, 2),
        (Hybrid, {"dp": 2, "tp": 2}, 4, 2),
        (Hybrid, {"dp": 2, "pp": 2}, 4, 2),
        (Parted, None, 4, 4),
        (Hybrid, CUBE, 8, 2),
        (Replicated, None, 2, 2),
    ]
    lines: dict[str, list[str]] = {}
    for number, (kind, mesh, size, data_ranks) in enumerate(legs, start=1):
        more = {"resume_from_checkpoint": number > 1, **samples(data_ranks), "mesh": mesh}
        left = run_job(
            train, tmp_path / "b", kind=kind, size=size, stop_at=3 * number, **more, **ALIKE
        )
        lines |= left[0][0]
    assert_alike([[lines, *left[0][1:]]], wanted[0])


def assert_alike(found: list[Any], wanted: Any) -> None:
    """The same numbers, but for the order of sums."""
    losses, _, weights, metrics = wanted
    for found_losses, _, found_weights, found_metrics in found:
        assert numbers(found_losses) == pytest.approx(numbers(losses), rel=1e-4)
        assert found_metrics == pytest.approx(metrics, rel=1e-4)
        for name, values in found_weights.items():
            assert torch.allclose(torch.tensor(values), torch.tensor(weights[name]), atol=1e-4)


def numbers(lines: dict[str, list[str]]) -> list[float]:
    """Losses and gradient norms."""
    return [float.fromhex(one) for line in lines.values() for one in line]
