"""Run by torchrun on every rank: save, load over other values, and say what came back.

Arguments: the repository, and a folder for each rank's answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    shutdown,
)


def main(repo: str, answers: str) -> None:
    """A coordinator with one PER_NODE and one PER_RANK component."""
    dist.init_process_group("gloo")
    rank, node = dist.get_rank(), int(os.environ["GROUP_RANK"])  # noqa: TID251 (torchrun's)
    cache, own = {"x": torch.full((8,), 100.0 + node)}, {"x": torch.full((8,), 1.0 * rank)}
    coordinator = CheckpointCoordinator(
        [
            StateComponent("cache", cache, SharingPattern.PER_NODE),
            StateComponent("own", own, SharingPattern.PER_RANK),
        ],
        output_dir=repo,
        config=CoordinatorConfig(timeout_s=60),
    )
    coordinator.save_checkpoint(step=1)
    for state in (cache, own):
        state["x"].fill_(-1)
    coordinator.load_checkpoint()
    answer = {
        "rank": rank,
        "node": node,
        "local_rank": int(os.environ["LOCAL_RANK"]),  # noqa: TID251 (torchrun's)
        "cache": sorted(set(cache["x"].tolist())),
        "own": sorted(set(own["x"].tolist())),
    }
    (Path(answers) / f"{rank}.json").write_text(json.dumps(answer))
    shutdown(coordinator)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
