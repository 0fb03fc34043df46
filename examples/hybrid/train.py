"""Train a small byte-level GPT on a mesh: data parallelism beside tensor parallelism or pipelines.

    torchrun --nproc_per_node=4 examples/hybrid/train.py --dp 2 --tp 2 --max-steps 200
    torchrun --nproc_per_node=4 examples/hybrid/train.py --dp 2 --pp 2 --resume-from-checkpoint true

The second goes on from the checkpoint of the first. Every field of TrainingArguments is an option.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptcoord import HybridTrainer, TrainingArguments
from ckptcoord.trainers.callbacks import LossLogCallback

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ByteGPT, GPTConfig, run, split, standard_library_text

DEFAULTS = {**common.DEFAULTS, "output_dir": "runs/hybrid"}


class Embed(nn.Module):
    """Tokens and their places: the model's first layer."""

    def __init__(self, model: ByteGPT) -> None:
        super().__init__()
        self.tokens, self.positions = model.tokens, model.positions

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[batch, time]` to `[batch, time, width]`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.tokens(input_ids) + self.positions(places)


class LayeredGPT(ByteGPT):
    """A ByteGPT that says what its layers are."""

    def pipeline_layers(self) -> list[nn.Module]:
        """In the order in which they are called."""
        return [Embed(self), *self.blocks, self.norm, self.head]


class GPTTrainer(HybridTrainer):
    """How this model is split over the ranks of tp. Over stages, it says so itself."""

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """The two matrices of each MLP, by columns and by rows."""
        for block in model.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def main() -> int:
    """Train; the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in ("dp", "pp", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="ranks in this dimension")
    args, mesh = TrainingArguments.parse(None, parser, **DEFAULTS)
    shape = {name: size for name, size in vars(mesh).items() if size > 1} or {"dp": 1}
    torch.manual_seed(args.seed)
    config = GPTConfig()
    training, held_out = split(standard_library_text(), config.context)
    trainer = GPTTrainer(
        LayeredGPT(config),
        args,
        training,
        held_out,
        callbacks=[LossLogCallback()],
        mesh_shape=shape,
    )
    return trainer.train().exit_code


if __name__ == "__main__":
    sys.exit(run(main))
