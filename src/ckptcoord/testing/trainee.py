"""One run of a trainer that a function makes, as a program; `TrainerSuite` starts it.

    python -m ckptcoord.testing.trainee my_tests.trainers:make_trainer --output-dir runs/a

The function takes the `TrainingArguments` of the command line and returns the trainer. Losses go to
`losses.jsonl` in the output directory; the exit code is that of the run.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from ckptcoord.dist.shutdown import shutdown
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import TrainingArguments
from ckptcoord.trainers.base import BaseTrainer
from ckptcoord.trainers.callbacks import LossLogCallback


def main() -> int:
    """Train from the start, or from where `--resume-from-checkpoint` says."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("factory", metavar="MODULE:FUNCTION", help="makes the trainer")
    args, own = TrainingArguments.parse(None, parser)
    module, _, name = own.factory.partition(":")
    trainer = getattr(import_module(module), name)(args)
    if not isinstance(trainer, BaseTrainer):
        raise ConfigError(field=own.factory, why=f"made a {type(trainer).__name__}, no trainer")
    trainer.callbacks.callbacks.append(LossLogCallback())
    try:
        return trainer.train().exit_code
    finally:
        shutdown(trainer)


if __name__ == "__main__":
    sys.exit(main())
