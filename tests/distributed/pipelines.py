"""A pipeline small enough to train in a second.

`python -m tests.distributed.pipelines FOLDER SETTINGS` is what torchrun runs on every rank.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainers.tiny import Spy, arguments, plain
from torch import nn

from ckptcoord import HybridTrainer, shutdown
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers.callbacks import LossLogCallback
from ckptcoord.trainers.pipeline import PipelineTrainer

VOCABULARY, WIDTH, CONTEXT = 17, 12, 6


class Tokens:
    """Pairs of tokens and their successors; drawn anew from the process's generators by a bit."""

    def __init__(self, length: int = 200) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = (index * 7 + int(torch.randint(0, 3, ()))) % VOCABULARY
        line = (torch.arange(CONTEXT + 1) * 3 + start) % VOCABULARY
        return {"input_ids": line[:-1], "labels": line[1:]}


class Embed(nn.Module):
    """Borrows a module and a parameter of the model itself."""

    def __init__(self, tokens: nn.Embedding, places: nn.Parameter, scale: torch.Tensor) -> None:
        super().__init__()
        self.table, self.where = tokens, places
        self.register_buffer("scale", scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.table(tokens) + self.where) * self.scale


class Block(nn.Module):
    """Draws numbers, counts batches, and passes on two tensors."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CONTEXT)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.drop(self.inner(self.norm(hidden)).relu())


class Tiny(nn.Module):
    """Embedding, blocks, head; the head's weights may be the embedding's."""

    def __init__(self, blocks: int = 4, dropout: float = 0.0, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5), persistent=False)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def pipeline_layers(self) -> list[nn.Module]:
        scale = self.get_buffer("scale")
        return [Embed(self.tokens, self.places, scale), *self.blocks, self.norm, self.head]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = input_ids
        for layer in self.pipeline_layers():
            hidden = layer(hidden)
        return nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten())


def make_trainer(
    folder: Path, callbacks: Any = (), data: Any = None, **settings: Any
) -> PipelineTrainer:
    """On every rank alike; on a mesh of its own if there is a `mesh`."""
    torch.manual_seed(5)
    model = Tiny(dropout=settings.pop("dropout", 0.0), tied=settings.pop("tied", False))
    make: Any = PipelineTrainer
    if "mesh" in settings:
        make = partial(HybridTrainer, mesh_shape=settings.pop("mesh"))
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.1}
    args = arguments(folder, **{**defaults, **settings})
    trainer: PipelineTrainer = make(model, args, data or Tokens(), Tokens(20), callbacks=callbacks)
    return trainer


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train from the start or from a checkpoint; what there is to know of this rank afterwards."""
    spy = Spy(stop_at=settings.pop("stop_at", -1))
    trainer = make_trainer(folder / "run", [LossLogCallback(), spy], **settings)
    trainer.train()
    facts = {
        "losses": spy.losses,
        "grad_norms": [line["grad_norm"] for line in _logged(trainer) if "grad_norm" in line],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": plain(trainer.model.state_dict()),
        "optimizer": plain(OptimizerState(trainer.optimizer, trainer.model).state_dict()["state"]),
        "samples": trainer.state.samples_seen,
        "left": trainer.train_dataloader.batches_left,
        "draws": plain(torch.rand(3)),
    }
    trainer.close()
    return facts


def _logged(trainer: PipelineTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


class Broken(Tokens):
    """Cannot be read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError("disk on fire")


def try_all(folder: Path) -> list[str]:
    """What is said of settings and data that make no sense; four ranks."""
    said = []
    for settings in ({"per_device_train_batch_size": 6}, {"pipeline_microbatches": 2}):
        with pytest.raises(ConfigError) as caught:
            make_trainer(folder, **settings)
        said.append(str(caught.value))
    trainer = make_trainer(folder, data=Broken())
    kind = OSError if trainer.ranks.rank == 0 else CkptError
    with pytest.raises(kind) as failed:
        trainer.train()
    return [*said, str(failed.value)]


def main(folder: Path, settings: dict[str, Any]) -> int:
    """As `train`, with the exit code of torchrun's workers."""
    trainer = make_trainer(folder, [LossLogCallback()], **settings)
    output = trainer.train()
    shutdown(trainer)
    return output.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
