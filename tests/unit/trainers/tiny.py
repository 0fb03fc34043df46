"""A model and a dataset small enough to train in milliseconds, and what a run leaves behind."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptcoord.trainers.arguments import TrainingArguments
from ckptcoord.trainers.callbacks import TrainerCallback


class Noisy:
    """Points with noise from the process's generators, so that a resume must restore them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.linspace(0, 1, 8) * (index + 1) / self.length
        return {"x": x + 0.1 * torch.rand(8) + 0.1 * random.random(), "y": x.sum().reshape(1)}


class Struck(Noisy):
    """The process gets a signal while the second of these is read.

    Attributes:
        reads: so many were read.
    """

    def __init__(self, length: int, *, strikes: bool = True) -> None:
        super().__init__(length)
        self.strikes, self.reads = strikes, 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        if self.strikes and self.reads == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().__getitem__(index)


class Net(nn.Module):
    """Dropout draws from the generators; batch norm has buffers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.2, self.training)
        return {"loss": ((self.second(hidden) - y) ** 2).mean()}


class Spy(TrainerCallback):
    """Records events; stops, saves or acts where told."""

    def __init__(self, *, stop_at: int = -1, save_at: tuple[int, ...] = (), at: Any = None) -> None:
        self.stop_at, self.save_at, self.at = stop_at, save_at, at or {}
        self.losses: dict[int, float] = {}
        self.saved: list[str] = []
        self.events: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step}")
        if state.global_step in self.at:
            self.at[state.global_step]()
        if state.global_step == self.stop_at:
            control.should_training_stop = control.should_save = True
        if state.global_step in self.save_at:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses[state.global_step] = kwargs["logs"]["loss"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(Path(kwargs["checkpoint"]).name)
        self.events.append(f"save {state.global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"evaluate {state.global_step}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"epoch {state.epoch:g}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("substep")


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Nine steps of two samples, logged one by one, saved only when asked."""
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "warmup_steps": 2,
        "save_timeout_s": 60,
        "use_cpu": True,
    }
    return TrainingArguments(**{**defaults, **settings})


def model(width: int = 8) -> Net:
    """The same at every call."""
    torch.manual_seed(11)
    return Net(width)


def plain(value: Any) -> Any:
    """A state with its tensors as bits, for comparison."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.hex() if isinstance(value, float) else value


def remains(trainer: Any) -> dict[str, Any]:
    """All that a run leaves behind, and what it would draw next."""
    return {
        "model": plain(trainer.model.state_dict()),
        "optimizer": plain(trainer.optimizer.state_dict()),
        "scheduler": plain(trainer.lr_scheduler.state_dict()),
        "dataset": plain(trainer.train_dataloader.state_dict()),
        "progress": plain(trainer.state.state_dict()),
        "draws": (random.random(), plain(torch.rand(4))),
    }
