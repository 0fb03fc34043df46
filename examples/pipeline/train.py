"""Train a small byte-level GPT in stages, one a rank, on the standard library's own source.

    torchrun --nproc_per_node=4 examples/pipeline/train.py --output-dir runs/pp --max-steps 200

Every field of TrainingArguments is an option. `--resume-from-checkpoint true` goes on from the
latest checkpoint, on any number of ranks from 1 to the number of blocks and two more.
`--export FOLDER`, in one process, writes the newest checkpoint's whole model as one Hugging Face
folder instead. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ckptcoord import PipelineTrainer, TrainingArguments, export_model
from ckptcoord.trainers.callbacks import LossLogCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ByteGPT, GPTConfig, model_options, run, split, standard_library_text

DEFAULTS = {**common.DEFAULTS, "output_dir": "runs/pipeline", "pipeline_microbatches": 4}


class Embed(nn.Module):
    """Tokens and their places, by the model's own tables."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, positions

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[batch, time]` to `[batch, time, width]`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden: Tensor = self.tokens(input_ids) + self.positions(places)
        return hidden


class LayeredGPT(ByteGPT):
    """The GPT of the other examples, which says what its layers are."""

    def pipeline_layers(self) -> list[nn.Module]:
        """Embedding, blocks, and the output layer, whose weights are the embedding's."""
        head = nn.Sequential(self.norm, self.head)
        return [Embed(self.tokens, self.positions), *self.blocks, head]


def main() -> int:
    """Train, and leave a checkpoint repository and `losses.jsonl` in the output directory."""
    parser = model_options(str(__doc__))
    parser.add_argument("--export", metavar="FOLDER", help="write the model there; do not train")
    args, own = TrainingArguments.parse(None, parser, **DEFAULTS)
    settings = vars(own)
    text_bytes, folder = settings.pop("text_bytes"), settings.pop("export")
    if folder is not None:
        sys.stdout.write(f"{export_model(args.output_dir, folder)}\n")
        return 0
    return train(args, GPTConfig(**settings), text_bytes)


def train(args: TrainingArguments, config: GPTConfig, text_bytes: int) -> int:
    """One run, from the start or from a checkpoint; returns the exit code."""
    torch.manual_seed(args.seed)  # the same model on every rank, which keeps a part of it
    training, held_out = split(standard_library_text(text_bytes), config.context)
    callbacks = [LossLogCallback()]
    trainer = PipelineTrainer(LayeredGPT(config), args, training, held_out, callbacks=callbacks)
    try:
        return trainer.train().exit_code
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(run(main))
