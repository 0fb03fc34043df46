"""Tensors of which a rank holds boxes: DTensor, ShardedTensor, and a user's own (ADR 11)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ckptcoord.core.box import Box
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

Pieces: TypeAlias = "tuple[tuple[Box, torch.Tensor], ...]"


@dataclass(frozen=True, slots=True, eq=False)
class Sharded:
    """A part of a tensor whose other parts other ranks hold, where torch has no type for it.

    Args:
        tensor: the part that this rank holds; a load fills it in place.
        offset: where it begins in the whole tensor, in elements.
        shape: of the whole tensor.

    Raises:
        ConfigError: the part is not inside of it.
    """

    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", tuple(self.offset))
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.offset) != self.tensor.dim() or not self.box.within(self.shape):
            raise ConfigError(
                field="Sharded",
                why=f"{list(self.tensor.shape)} at {self.offset} is no part of {list(self.shape)}",
                help="Give where the part begins in every dimension, and the whole tensor's shape",
            )

    @property
    def box(self) -> Box:
        """Which part it is."""
        return Box(offset=self.offset, size=tuple(self.tensor.shape))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """How a rank holds a tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        pieces: the boxes that this rank holds, each with its elements, live.
        sharded: other ranks hold other boxes; else it is here as a whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Pieces
    sharded: bool


def is_tensor(value: object) -> bool:
    """Whether it is a tensor, or stands for a part of one."""
    return isinstance(value, torch.Tensor | Sharded) or _is_sharded_tensor(value)


def layout_of(value: object) -> Layout:
    """How this rank holds a tensor.

    Raises:
        ValueError: its ranks hold terms of a sum, which are no parts of it.
    """
    if isinstance(value, Sharded):
        pieces = ((value.box, value.tensor),) if value.tensor.numel() else ()
        return Layout(shape=value.shape, dtype=value.tensor.dtype, pieces=pieces, sharded=True)
    if _is_sharded_tensor(value):
        return _of_sharded_tensor(value)
    assert isinstance(value, torch.Tensor), "nothing else is a tensor"
    if is_dtensor(value):
        return _of_dtensor(value)
    whole = ((Box.whole(value.shape), value),)
    return Layout(shape=tuple(value.shape), dtype=value.dtype, pieces=whole, sharded=False)


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor; torch's module for them is not imported to tell."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def rebuilt(live: object, pieces: Sequence[torch.Tensor]) -> object:
    """A tensor in the layout of `live`, of these pieces of its boxes, in their order there."""
    if isinstance(live, Sharded):
        return Sharded(pieces[0] if pieces else live.tensor, live.offset, live.shape)
    if is_dtensor(live):
        module: Any = sys.modules["torch.distributed.tensor"]
        dtensor: Any = live
        local = dtensor.detach().to_local()
        own = pieces[0].to(local.device) if pieces else torch.empty_like(local)
        return module.DTensor.from_local(
            own.view(local.shape),
            dtensor.device_mesh,
            dtensor.placements,
            run_check=False,
            shape=dtensor.shape,
            stride=dtensor.stride(),
        )
    if _is_sharded_tensor(live):
        return live  # its shards are filled in place
    return pieces[0]


def _of_dtensor(value: Any) -> Layout:  # noqa: ANN401 (torch's DTensor, imported late)
    box, sharded = _place_of(value.shape, value.device_mesh, tuple(value.placements))
    local = value.detach().to_local()
    if box.size != tuple(local.shape):
        raise ValueError(f"its part has shape {list(local.shape)} where torch says {box.size}")
    pieces = ((box, local),) if local.numel() or not sharded else ()
    return Layout(shape=tuple(value.shape), dtype=value.dtype, pieces=pieces, sharded=sharded)


@lru_cache(maxsize=100_000)
def _place_of(shape: torch.Size, mesh: Any, placements: tuple[Any, ...]) -> tuple[Box, bool]:  # noqa: ANN401 (torch's, imported late)
    """The box that this rank holds of a DTensor, and whether others hold other boxes.

    Raises:
        ValueError: there is no such box.
    """
    from torch.distributed.tensor._utils import (  # torch has no public name for it
        compute_local_shape_and_global_offset,
    )

    if any(one.is_partial() for one in placements):
        raise ValueError("its ranks hold the terms of a sum; reduce it first")
    size, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    sharded = any(
        not one.is_replicate() and mesh.size(dim) > 1 for dim, one in enumerate(placements)
    )
    return Box(offset=tuple(offset), size=tuple(size)), sharded


def _is_sharded_tensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


def _of_sharded_tensor(value: Any) -> Layout:  # noqa: ANN401 (torch's, which is deprecated)
    metadata = value.metadata()
    return Layout(
        shape=tuple(metadata.size),
        dtype=metadata.tensor_properties.dtype,
        pieces=tuple(
            (
                Box(
                    offset=tuple(shard.metadata.shard_offsets),
                    size=tuple(shard.metadata.shard_sizes),
                ),
                shard.tensor,
            )
            for shard in value.local_shards()
            if shard.tensor.numel()
        ),
        sharded=True,
    )
