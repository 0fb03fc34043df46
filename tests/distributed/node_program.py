"""What the ranks of jobs on several nodes do, for `program.py`; a node is a torchrun agent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tests.distributed.program import say

from ckptcoord import (
    CheckpointCoordinator,
    CkptError,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
)

if TYPE_CHECKING:
    from pathlib import Path

PER_NODE, PER_RANK = SharingPattern.PER_NODE, SharingPattern.PER_RANK


class Cache:
    """State of a node that can be made anew."""

    def __init__(self, value: float) -> None:
        self.x = torch.full((8,), value)
        self.derived: list[int] = []

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"x": self.x}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.x = state["x"]

    def derive_state(self, step: int, rank: int) -> None:
        self.derived = [step, rank]


def save(folder: Path, repository: str) -> None:
    """A checkpoint of what is alike on all nodes, what is not, and what is each rank's own."""
    dist.init_process_group("gloo")
    rank, node = dist.get_rank(), _node()
    parts = [
        StateComponent("table", Cache(7.0), PER_NODE),
        StateComponent("cache", Cache(100.0 + node), PER_NODE),
        StateComponent("own", Cache(1.0 * rank), PER_RANK),
    ]
    with _coordinator(repository, parts) as coordinator:
        coordinator.save_checkpoint(step=1)
    say(folder, "place", {"rank": rank, "node": node, "local_rank": _local_rank()})


def load(folder: Path, repository: str, ways: dict[str, list[str]]) -> None:
    """Load `[component, on_world_size_change]`, one after the other; what came of each."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"node": _node()}
    for name, (key, way) in ways.items():
        cache = Cache(-1.0)
        pattern = PER_RANK if key == "own" else PER_NODE
        part = StateComponent(key, cache, pattern, on_world_size_change=way)
        found[name] = {"error": None, "skipped": {}}
        with _coordinator(repository, [part]) as coordinator:
            try:
                report = coordinator.load_checkpoint()
            except CkptError as error:
                found[name]["error"] = str(error)
            else:
                found[name]["skipped"] = dict(report.skipped)
        found[name] |= {"x": sorted(set(cache.x.tolist())), "derived": cache.derived}
    say(folder, "found", found)


def _coordinator(repository: str, parts: list[StateComponent]) -> CheckpointCoordinator:
    config = CoordinatorConfig(timeout_s=60)
    return CheckpointCoordinator(parts, output_dir=repository, config=config)


def _node() -> int:
    return int(os.environ["GROUP_RANK"])  # noqa: TID251 (torchrun's)


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])  # noqa: TID251 (torchrun's)
