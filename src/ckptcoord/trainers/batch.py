"""What a trainer needs to know of a batch, whatever its shape: mappings, sequences, tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ckptcoord.errors import ConfigError


def to_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 (a batch is the user's own)
    """The batch with its tensors on `device`; dicts, lists and tuples are rebuilt."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def sample_count(batch: object) -> int:
    """The first dimension of the first tensor; 1 where there is none."""
    first = next(_tensors(batch), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def token_count(batch: object) -> int:
    """Elements of `input_ids`; 0 where a batch has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, torch.Tensor) else 0


def loss_of(output: object) -> torch.Tensor:
    """The loss in a model's output: itself, `.loss`, `["loss"]` or the first of a sequence.

    Raises:
        ConfigError: there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    found = getattr(found, "loss", found)
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise ConfigError(
            field="model",
            why=f"returned a {type(output).__name__} without a loss of one element",
            help="Return the loss first, as .loss or as ['loss'], or override compute_loss()",
        )
    return found


def _tensors(batch: object) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
