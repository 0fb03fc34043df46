"""What ranks do with DTensors in every layout that torch makes of them; `run_job` starts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as OldShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.plan.lineage import Compression

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "none": (0, 4),
    "half": (6, 5),  # as bfloat16
    "even": (8, 6),
    "three": (3, 4),
    "five": (5, 3),
    "nine": (9, 2),
    "one": (1, 1),
    "large": (301, 130),  # enough to be deferred, and for deltas
}
STRIDED = _StridedShard(0, split_factor=2)
GRIDS = {
    "grid": (Shard(0), Shard(1)),
    "columns": (Replicate(), Shard(1)),
    "hybrid": (Replicate(), Shard(0)),
    "rows": (Shard(0), Shard(0)),
    "fsdp-tp": (STRIDED, Shard(0)),
    "gaps": (STRIDED, Replicate()),
    "whole": (Replicate(), Replicate()),
}
LINES = {"rows": (Shard(0),), "columns": (Shard(1),), "whole": (Replicate(),)}
PER_RANK, PER_GROUP = SharingPattern.PER_RANK, SharingPattern.PER_GROUP


def placed(name: str, layout: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tensor without dimensions is whole everywhere."""
    return layout if SHAPES[name] else (Replicate(),) * len(layout)


def full(name: str, step: int) -> torch.Tensor:
    """A whole tensor, as it is after so many steps."""
    shape = SHAPES[name]
    one = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    whole = one + 1e-3 * step * torch.arange(one.numel()).reshape(shape)
    return whole.bfloat16() if name == "half" else whole


def part(name: str, step: int, mesh: DeviceMesh, placements: tuple[Any, ...]) -> torch.Tensor:
    """What this rank holds of it, as torch itself splits."""
    local = full(name, step)
    places = mesh.get_coordinate()
    assert places is not None
    for one, count, place in zip(placements, mesh.shape, places, strict=True):
        if not one.is_replicate():
            local = one._split_tensor(local, count, with_padding=False)[0][place]
    return local.clone()


class Held:
    """Every tensor in every layout of a mesh."""

    def __init__(self, mesh: DeviceMesh, layouts: Mapping[str, tuple[Any, ...]], step: int) -> None:
        self.mesh, self.layouts = mesh, layouts
        self.states = {
            key: {name: self._made(name, step, placements) for name in SHAPES}
            for key, placements in layouts.items()
        }

    def _made(self, name: str, step: int, layout: tuple[Any, ...]) -> DTensor:
        placements, whole = placed(name, layout), full(name, step)
        return DTensor.from_local(
            part(name, step, self.mesh, placements),
            self.mesh,
            placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    @torch.no_grad()
    def become(self, step: int) -> None:
        """In place."""
        for key, state in self.states.items():
            for name, tensor in state.items():
                tensor.copy_(self._made(name, step, self.layouts[key]))

    def wrong(self, step: int) -> list[str]:
        """What is not, bit for bit, as it is after so many steps."""
        return [
            f"{key}.{name}"
            for key, state in self.states.items()
            for name, tensor in state.items()
            if not torch.equal(
                tensor.to_local(), part(name, step, self.mesh, placed(name, self.layouts[key]))
            )
        ]

    def components(self) -> list[StateComponent]:
        """Each layout as one of them."""
        return [
            StateComponent(
                key,
                state,
                PER_GROUP if index % 2 else PER_RANK,
                "all" if index % 2 else None,
            )
            for index, (key, state) in enumerate(self.states.items())
        ]


def coordinator(
    repository: str | Path, parts: Iterable[StateComponent], size: int = 1, **settings: Any
) -> CheckpointCoordinator:
    """One with a group of all ranks."""
    settings = {"timeout_s": 60, "compression": Compression(level="auto"), **settings}
    return CheckpointCoordinator(
        list(parts),
        {"all": list(range(size))},
        output_dir=repository,
        config=CoordinatorConfig(**settings),
    )


def save(repository: str) -> None:
    """Four saves of a 2 x 2 mesh in the background, with the next step at once after each."""
    dist.init_process_group("gloo")
    held = Held(init_device_mesh("cpu", (2, 2)), GRIDS, 1)
    with coordinator(repository, held.components(), 4, deferred=True, queue_depth=4) as one:
        for step in range(1, 5):
            held.become(step)
            one.save_checkpoint_async(step=step)
        held.become(9)


def load(repository: str, refs: dict[str, int], *, grid: bool) -> dict[str, list[str]]:
    """Load what each layout saved into every layout of a mesh; which tensors are wrong then."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2)) if grid else init_device_mesh("cpu", (size,))
    targets = list((GRIDS if grid else LINES).values())
    wrong = {}
    for ref, step in refs.items():
        for turn in range(len(targets)):
            layouts = {
                source: targets[(place + turn) % len(targets)] for place, source in enumerate(GRIDS)
            }
            held = Held(mesh, layouts, 0)
            with coordinator(repository, held.components(), size) as one:
                one.load_checkpoint(ref)
            wrong[f"{ref}, turn {turn}"] = held.wrong(step)
    return wrong


# --- torch's older class, a mesh of some ranks, results under way ---------------------------------


def odd(repository: str) -> list[Any]:
    """Saved, and loaded over other values in the same layout."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    inner = DeviceMesh("cpu", [1, 2])

    def states(step: int) -> list[dict[str, Any]]:
        whole = full("nine", step)
        rows = whole[3 * rank : 3 * rank + 3].clone()
        shards = [OldShard.from_tensor_and_offsets(rows, [3 * rank, 0], rank)] if rank < 3 else []
        old = init_from_local_shards(shards, 9, 2)
        local = whole[5 * (rank - 1) : 5 * rank].clone() if rank in (1, 2) else torch.empty(0)
        some = DTensor.from_local(
            local, inner, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        every = init_device_mesh("cpu", (4,))
        there = whole[3 * rank : 3 * rank + 3].clone()
        late = DTensor.from_local(there, every, [Shard(0)], shape=whole.shape, stride=(2, 1))
        under_way = late.redistribute(placements=[Replicate()], async_op=True)
        return [{"old": old}, {"some": some}, {"late": under_way}]

    def parts(held: list[dict[str, Any]]) -> list[StateComponent]:
        return [StateComponent(next(iter(state)), state, PER_RANK) for state in held]

    with coordinator(repository, parts(states(1)), 4) as one:
        one.save_checkpoint(step=1)
    live = states(2)
    with coordinator(repository, parts(live), 4) as one:
        one.load_checkpoint()
    wanted = states(1)
    return [
        [
            torch.equal(a.tensor, b.tensor)
            for a, b in zip(x.local_shards(), y.local_shards(), strict=True)
        ]
        if key == "old"
        else torch.equal(torch.as_tensor(x.to_local()), torch.as_tensor(y.to_local()))
        for one, other in zip(live, wanted, strict=True)
        for key, x in one.items()
        for y in (other[key],)
    ]


# --- a model --------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """Odd sizes, of which some ranks have no part, and weights that two layers share."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(3, hidden)
        self.down = nn.Linear(hidden, 3)
        self.out = nn.Linear(3, 3, bias=False)
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.out(self.down(self.up(x).relu())))


def trained(way: str, size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model on all ranks, and its optimizer; alike for every way, but for where it is."""
    torch.manual_seed(3)
    model = Narrow()
    if way == "fsdp-tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif way == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[str]:
    """The same batch on every rank; losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = (model(torch.randn(4, 3)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """All tensors by full name, whole; collective."""
    found = dict(model.state_dict())
    for name, entry in OptimizerState(optimizer, model).state_dict()["state"].items():
        found |= {f"{name}.{key}": value for key, value in entry.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).flatten().tolist()
        for name, value in found.items()
    }


def parts_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[StateComponent]:
    """In pieces, if there are any."""
    return [
        StateComponent("model", model, PER_GROUP, "all", validate_replication=True),
        StateComponent("optimizer", OptimizerState(optimizer, model), PER_GROUP, "all"),
    ]


def save_model(repository: str, way: str) -> dict[Any, Any]:
    """Three steps, each saved while the next one runs; the state, and the loss of one more."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    model, optimizer = trained(way, size)
    states: dict[Any, Any] = {}
    with coordinator(repository, parts_of(model, optimizer), size, deferred=True) as one:
        for step in range(1, 4):
            train(model, optimizer, [step])
            one.save_checkpoint_async(step=step)
            states[step] = state_of(model, optimizer)
        states["next"] = train(model, optimizer, [4])
    return states


def load_model(repository: str, way: str) -> dict[Any, Any]:
    """Each checkpoint of `save_model` into another layout, and a step from the last."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    states: dict[Any, Any] = {}
    for step in (1, 2, 3):
        model, optimizer = trained(way, size)
        with coordinator(repository, parts_of(model, optimizer), size) as one:
            one.load_checkpoint(f"main@{step}")
        states[step] = state_of(model, optimizer)
    states["next"] = train(model, optimizer, [4])
    return states
