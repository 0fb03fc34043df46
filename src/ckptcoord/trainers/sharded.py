"""What trainers of several ranks have in common."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.batch import sample_count, to_device
from ckptcoord.trainers.grouploader import read_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.trainers.base import BaseTrainer
    from ckptcoord.trainers.mesh import Place

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


def redeclared(
    components: Iterable[StateComponent], changes: Mapping[str, Mapping[str, Any]]
) -> list[StateComponent]:
    """The same components with other fields, by key."""
    return [replace(one, **changes.get(one.key, {})) for one in components]


def sum_losses(
    trainer: BaseTrainer,
    dataset: Any,  # noqa: ANN401 (any dataset)
    loss_of: Callable[[Any], torch.Tensor],
    data: Place,
    stages: Place,
) -> tuple[float, float]:
    """The losses of this rank's part of the samples, in as many forwards on every rank.

    A forward is collective; a rank without a batch of its own for the last one works on the first
    sample, which does not count.

    Args:
        trainer: whose model is evaluated.
        dataset: the first stage reads it; the others ask for its length.
        loss_of: a batch on the trainer's device.
        data: of this rank, which has every size-th sample from its index on.
        stages: that work on one batch together.

    Returns:
        The sum over samples, and their number.
    """
    batch_size, model = trainer.args.per_device_eval_batch_size, trainer.model
    own = range(data.index, len(dataset), data.size)
    rounds = math.ceil(len(range(0, len(dataset), data.size)) / batch_size)
    chunks = [own[place * batch_size : (place + 1) * batch_size] for place in range(rounds)]
    loader: DataLoader[Any] | None = None
    if stages.index == 0:
        loader = DataLoader(
            dataset,
            batch_sampler=[list(chunk) or [0] for chunk in chunks],
            collate_fn=trainer.data_collator,
        )
    batches = read_together(None if loader is None else iter(loader), stages)
    was_training = model.training
    model.eval()
    total = samples = 0.0
    for chunk, batch in trainer.evaluations.batches(zip(chunks, batches, strict=True)):
        loss = float(loss_of(to_device(batch, trainer.device)))
        count = sample_count(batch) if chunk else 0
        total += loss * count if count else 0.0  # a loss that is not counted may be NaN
        samples += count
    model.train(was_training)
    return total, samples
