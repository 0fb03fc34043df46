"""Train a small byte-level GPT with FSDP2: each rank holds, and writes, a part of each tensor.

    torchrun --nproc_per_node=4 examples/fsdp/train.py --output-dir runs/fsdp --max-steps 200

Every field of TrainingArguments is an option; `--resume-from-checkpoint true` goes on from the
latest checkpoint, on any number of ranks. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ckptcoord import FSDPTrainer, TrainingArguments
from ckptcoord.trainers.callbacks import LossLogCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ByteGPT, GPTConfig, run, split, standard_library_text

DEFAULTS = {**common.DEFAULTS, "output_dir": "runs/fsdp"}


def main() -> int:
    """Train; the exit code."""
    args, config = TrainingArguments.from_args(**DEFAULTS), GPTConfig()
    torch.manual_seed(args.seed)
    training, held_out = split(standard_library_text(), config.context)
    # By default the blocks are gathered one by one: `shard_units`.
    trainer = FSDPTrainer(ByteGPT(config), args, training, held_out, callbacks=[LossLogCallback()])
    return trainer.train().exit_code


if __name__ == "__main__":
    sys.exit(run(main))
