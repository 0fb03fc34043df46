"""What the ranks of a job do that goes on with another number of ranks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from tests.unit.trainers.tiny import Noisy, Spy, arguments
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptcoord import DDPTrainer
from ckptcoord.dist.rng import RNGState
from ckptcoord.trainers.callbacks import TrainerCallback


class Recorded(Noisy):
    """Remembers which samples it was asked for."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked.append(index)
        return super().__getitem__(index)


class Plain(nn.Linear):
    """A line, and dropout, which draws."""

    def __init__(self) -> None:
        super().__init__(8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": ((super().forward(nn.functional.dropout(x, 0.1)) - y) ** 2).mean()}


class Draws(TrainerCallback):
    """Where the generator stands as training begins, and as its last step ends."""

    def __init__(self) -> None:
        self.began = self.ended = b""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = torch.get_rng_state().numpy().tobytes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = torch.get_rng_state().numpy().tobytes()


class Foreign(DDPTrainer):
    """Reads by torchdata."""

    on_change = "refuse"

    def get_train_dataloader(self) -> Any:
        return StatefulDataLoader(self.train_dataset, batch_size=1)

    def get_state_components(self) -> Any:
        return [
            dataclasses.replace(c, on_world_size_change=self.on_change) if c.key == "dataset" else c
            for c in super().get_state_components()
        ]


class Skipping(Foreign):
    """Begins the epoch again."""

    on_change = "skip"


def go_on(folder: str, samples: int, stop_at: int, kind: type = DDPTrainer, **given: Any) -> Any:
    """Train on from the last checkpoint, and save at a step; what this rank saw and drew."""
    rank = int(os.environ["RANK"])  # noqa: TID251 (as torchrun says)
    torch.manual_seed(5)
    dataset, draws = Recorded(samples), Draws()
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1, **given}
    args = arguments(Path(folder), resume_from_checkpoint=True, warmup_steps=0, **settings)
    spy = Spy(stop_at=stop_at)
    trainer = kind(Plain(), args, dataset, callbacks=[spy, draws])
    trainer.train()
    trainer.close()
    began = trainer.state.state_dict(), trainer.state.max_steps, trainer.state.epoch
    RNGState(args.seed).derive_state(stop_at, rank)
    derived = torch.get_rng_state().numpy().tobytes()
    return dataset.asked, began, draws.began, draws.ended, derived
