"""The default optimizer and learning rate schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

import torch
from torch.optim.lr_scheduler import LambdaLR

from ckptcoord.trainers.arguments import SchedulerType, TrainingArguments

if TYPE_CHECKING:
    from torch import nn


def default_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters; what has fewer than two dimensions does not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate)


def default_scheduler(
    optimizer: torch.optim.Optimizer, args: TrainingArguments, max_steps: int
) -> LambdaLR:
    """A linear warm-up, then what `lr_scheduler_type` says, down to 0 at `max_steps`."""
    kind, warmup = args.lr_scheduler_type, args.warmup_steps

    # A plain function keeps its settings out of the scheduler's state: a resumed run follows its
    # own arguments.
    def factor(step: int) -> float:
        return lr_factor(kind, step, warmup, max_steps)

    return LambdaLR(optimizer, factor)


def lr_factor(kind: SchedulerType, step: int, warmup: int, max_steps: int) -> float:
    """The part of the peak learning rate at a step."""
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    match kind:
        case SchedulerType.CONSTANT:
            return 1.0
        case SchedulerType.LINEAR:
            return 1.0 - done
        case SchedulerType.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(kind)
