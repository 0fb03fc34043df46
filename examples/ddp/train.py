"""Train a small byte-level GPT on the Python standard library's own source.

    torchrun --nproc_per_node=4 examples/ddp/train.py --output-dir runs/ddp --max-steps 200

Every field of TrainingArguments is an option; `--resume-from-checkpoint true` goes on from the
latest checkpoint. Runs on one process too, without torchrun. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ckptcoord import CkptError, DDPTrainer, TrainingArguments, shutdown
from ckptcoord.trainers.callbacks import LossLogCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ByteGPT, GPTConfig, split, standard_library_text

DEFAULTS = {
    "output_dir": "runs/ddp",
    "max_steps": 100,
    "save_steps": 25,
    "logging_steps": 5,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.1,
}


def main() -> int:
    """Train, and leave a checkpoint repository and `losses.jsonl` in the output directory."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    model = parser.add_argument_group("model and text")
    size = GPTConfig()
    for name in ("layers", "width", "heads", "context"):
        model.add_argument(f"--{name}", type=int, default=getattr(size, name))
    model.add_argument("--dropout", type=float, default=size.dropout)
    model.add_argument("--text-bytes", type=int, default=4 << 20, help="of source to train on")
    try:
        args, own = TrainingArguments.parse(None, parser, **DEFAULTS)
        text_bytes = vars(own).pop("text_bytes")
        return train(args, GPTConfig(**vars(own)), text_bytes)
    except CkptError as error:
        sys.stderr.write(f"error[{error.code}]: {error.what}\n")
        sys.stderr.write(f"help: {error.help}\n" if error.help else "")
        return error.exit_code
    finally:
        shutdown()


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
    sys.exit(main())
