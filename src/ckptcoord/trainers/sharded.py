"""What trainers whose ranks hold parts of the model have in common."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.utils.data import DataLoader

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.batch import sample_count, to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.trainers.base import BaseTrainer

# All ranks as one group: what several of them hold alike is written by one. With a group for each
# copy of the model, each copy would be written.
JOB = "job"


def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse an optimizer of parameters that are no longer the model's.

    Raises:
        ConfigError: it is.
    """
    live = {id(parameter) for parameter in model.parameters()}
    strays = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in live]
    if strays:
        raise ConfigError(
            field="optimizer",
            why=f"steps {len(strays)} parameters that the model no longer has: the trainer has put "
            "parts in their place",
            help="Override create_optimizer(), which is called when they are there",
        )


def share_buffers(model: torch.nn.Module, group: c10d.ProcessGroup | None, first: int) -> None:
    """Give every rank of a group the first one's buffers, as DDP does. Collective.

    Args:
        model: whose persistent buffers they are; without any, nothing happens.
        group: None: all ranks.
        first: its global rank.
    """
    state = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in state:
            c10d.broadcast(buffer, src=first, group=group)


def sum_losses(
    trainer: BaseTrainer,
    dataset: Any,  # noqa: ANN401 (any dataset)
    rank: int,
    size: int,
    loss_of: Callable[[Any], torch.Tensor] | None = None,
) -> tuple[float, float]:
    """The losses of every size-th sample from `rank` on, in as many forwards on every rank.

    A forward is collective; a rank without a batch of its own for the last one works on the first
    sample, which does not count. `loss_of` a batch is by default the trainer's of its plain model.

    Returns:
        The sum over samples, and their number.
    """
    batch_size, model = trainer.args.per_device_eval_batch_size, trainer.model
    own = range(rank, len(dataset), size)
    rounds = math.ceil(len(range(0, len(dataset), size)) / batch_size)
    chunks = [own[place * batch_size : (place + 1) * batch_size] for place in range(rounds)]
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=[list(chunk) or [0] for chunk in chunks],
        collate_fn=trainer.data_collator,
    )
    loss_of = loss_of or partial(trainer.compute_loss, model)
    was_training = model.training
    model.eval()
    total = samples = 0.0
    for chunk, batch in zip(chunks, loader, strict=True):
        loss = float(loss_of(to_device(batch, trainer.device)))
        count = sample_count(batch) if chunk else 0
        total += loss * count if count else 0.0  # a loss that is not counted may be NaN
        samples += count
    model.train(was_training)
    return total, samples
