"""Train a small byte-level GPT on the Python standard library's own source.

    torchrun --nproc_per_node=4 examples/ddp/train.py --output-dir runs/ddp --max-steps 200

Every field of TrainingArguments is an option; `--resume-from-checkpoint true` goes on from the
latest checkpoint. Runs on one process too, without torchrun. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ckptcoord import DDPTrainer, TrainingArguments
from ckptcoord.trainers.callbacks import LossLogCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ByteGPT, GPTConfig, model_options, run, split, standard_library_text

DEFAULTS = {**common.DEFAULTS, "output_dir": "runs/ddp"}


def main() -> int:
    """Train, and leave a checkpoint repository and `losses.jsonl` in the output directory."""
    parser = model_options(str(__doc__))
    args, own = TrainingArguments.parse(None, parser, **DEFAULTS)
    text_bytes = vars(own).pop("text_bytes")
    return train(args, GPTConfig(**vars(own)), text_bytes)


def train(args: TrainingArguments, config: GPTConfig, text_bytes: int) -> int:
    """One run, from the start or from a checkpoint; returns the exit code."""
    torch.manual_seed(args.seed)
    training, held_out = split(standard_library_text(text_bytes), config.context)
    trainer = DDPTrainer(ByteGPT(config), args, training, held_out, callbacks=[LossLogCallback()])
    try:
        return trainer.train().exit_code
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(run(main))
