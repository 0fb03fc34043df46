"""Tensors of which a rank holds boxes: DTensor, ShardedTensor, and a user's own (ADR 11)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ckptcoord.core.box import Box
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

Pieces: TypeAlias = "tuple[tuple[Box, torch.Tensor], ...]"
_Runs: TypeAlias = "tuple[tuple[int, int], ...]"
"""Indices of one dimension: runs, each from its first to before its end, in the order held."""
_Cut: TypeAlias = "tuple[int, int, int, int]"
"""A dimension, the number of ranks it is dealt to, this one's place, and the split factor."""


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
        memory: where a DTensor's part is, even one without elements: tied ones have the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Pieces
    sharded: bool
    memory: Hashable | None = None


class _Place:
    """Which part of a DTensor a rank holds.

    Attributes:
        runs: the indices, in each dimension.
        sharded: other ranks hold other parts.
        box: the part, where it is one box; None: it is several, or none.
    """

    __slots__ = ("box", "runs", "sharded")

    def __init__(self, *, runs: tuple[_Runs, ...], sharded: bool) -> None:
        self.runs, self.sharded = runs, sharded
        self.box: Box | None = None
        if all(len(one) == 1 for one in runs):
            first, stop = [one[0][0] for one in runs], [one[0][1] for one in runs]
            size = tuple(b - a for a, b in zip(first, stop, strict=True))
            self.box = Box(offset=tuple(first), size=size)


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
        own = _assembled(dtensor, pieces)
        return module.DTensor.from_local(
            own,
            dtensor.device_mesh,
            dtensor.placements,
            run_check=False,
            shape=dtensor.shape,
            stride=dtensor.stride(),
        )
    if _is_sharded_tensor(live):
        return live  # its shards are filled in place
    return pieces[0]


def _assembled(live: Any, pieces: Sequence[torch.Tensor]) -> torch.Tensor:  # noqa: ANN401 (torch's DTensor)
    """What a rank holds of a DTensor, of these pieces."""
    local = local_part(live)
    if len(pieces) == 1 and pieces[0].shape == local.shape:
        return pieces[0].to(local.device)
    own = torch.empty_like(local)
    for (_, there), piece in zip(_parts(own, _place_of(live, local)), pieces, strict=False):
        there.copy_(piece)
    return own


def _of_dtensor(value: Any) -> Layout:  # noqa: ANN401 (torch's DTensor, imported late)
    local = local_part(value)
    place = _place_of(value, local)
    pieces = _parts(local, place) if local.numel() or not place.sharded else ()
    # An empty tensor has no address; its storage is still one of its own.
    memory = (local.untyped_storage()._cdata, local.storage_offset(), place.runs)  # noqa: SLF001
    return Layout(
        shape=tuple(value.shape),
        dtype=value.dtype,
        pieces=pieces,
        sharded=place.sharded,
        memory=memory,
    )


def local_part(value: Any) -> torch.Tensor:  # noqa: ANN401 (torch's DTensor)
    """What this rank holds of a DTensor, once it has arrived.

    Its version moves with writes to that, not with operations on the DTensor.
    """
    with torch.no_grad():  # where autograd does not look, torch gives the very tensor
        local: torch.Tensor = value.to_local()
    # What is still under way is a tensor of a class of its own.
    wait = getattr(local, "trigger_wait", None)
    return (local if wait is None else wait()).detach()


def _place_of(value: Any, local: torch.Tensor) -> _Place:  # noqa: ANN401 (torch's DTensor)
    """Which part of a DTensor this rank holds. Raises ValueError as `_found_place`."""
    return _found_place(value.shape, local.shape, value.device_mesh, tuple(value.placements))


@lru_cache(maxsize=100_000)
def _found_place(
    shape: torch.Size,
    held: torch.Size,
    mesh: Any,  # noqa: ANN401 (torch's, imported late)
    placements: tuple[Any, ...],
) -> _Place:
    """Where in a tensor a part of this shape is.

    Raises:
        ValueError: there is no saying.
    """
    if any(one.is_partial() for one in placements):
        raise ValueError("its ranks hold the terms of a sum; reduce it first")
    dealt = [
        (one, dim)
        for dim, one in enumerate(placements)
        if not one.is_replicate() and mesh.size(dim) > 1
    ]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        if not dealt:
            raise ValueError("this rank is not in its mesh, whose ranks hold it as a whole")
        return _Place(runs=((),) * len(shape), sharded=True)
    cuts = tuple(
        (one.dim % len(shape), mesh.size(dim), coordinate[dim], getattr(one, "split_factor", 1))
        for one, dim in dealt
    )
    for outside_in in (True, False):
        runs = _indices(shape, cuts, outside_in=outside_in)
        if tuple(map(_length, runs)) == held:
            return _Place(runs=runs, sharded=bool(dealt))
    raise ValueError(f"its part has shape {list(held)}, which its placements do not give")


def _indices(
    shape: tuple[int, ...], cuts: tuple[_Cut, ...], *, outside_in: bool
) -> tuple[_Runs, ...]:
    """Which indices a rank holds in each dimension, after these cuts.

    Args:
        shape: of the whole tensor.
        cuts: by mesh dimension.
        outside_in: as torch defines them. Otherwise in the order in which FSDP over tensor
            parallelism makes them, strided ones last, of what is left: where sizes are uneven, the
            two differ, though torch describes both alike.
    """
    held: list[_Runs] = [((0, size),) for size in shape]
    for dim, count, place, factor in sorted(cuts, key=lambda cut: not outside_in and cut[3] > 1):
        parts = _chunks(held[dim], factor) if outside_in else [held[dim]]
        mine = [run for part in parts for run in _chunks(part, count)[place]]
        held[dim] = _joined(mine)
    return tuple(held)


def _chunks(runs: _Runs, count: int) -> list[_Runs]:
    """So many parts as `torch.chunk` makes them; the last ones may be shorter, or empty."""
    each = -(-_length(runs) // count)
    return [_between(runs, part * each, (part + 1) * each) for part in range(count)]


def _between(runs: _Runs, begin: int, stop: int) -> _Runs:
    """From one place to another among the indices."""
    found, passed = [], 0
    for first, end in runs:
        low = max(first, first + begin - passed)
        high = min(end, first + stop - passed)
        if low < high:
            found.append((low, high))
        passed += end - first
    return tuple(found)


def _joined(runs: Sequence[tuple[int, int]]) -> _Runs:
    """The same, with runs that follow each other as one."""
    found: list[tuple[int, int]] = []
    for first, end in runs:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], end
        else:
            found.append((first, end))
    return tuple(found)


def _length(runs: _Runs) -> int:
    return sum(end - first for first, end in runs)


def _parts(local: torch.Tensor, place: _Place) -> Pieces:
    """The boxes of a tensor of which a rank holds this part, each with its elements.

    There are several where the indices have gaps.
    """
    if place.box is not None:
        return ((place.box, local),)
    found = []
    for chosen in product(*(_placed(one) for one in place.runs)):
        size = tuple(length for _, length, _ in chosen)
        view = local[tuple(slice(place, place + length) for _, length, place in chosen)]
        found.append((Box(offset=tuple(first for first, _, _ in chosen), size=size), view))
    return tuple(found)


def _placed(runs: _Runs) -> list[tuple[int, int, int]]:
    """Of each run: its first index, its length, and where it begins in what the rank holds."""
    lengths = [end - first for first, end in runs]
    places = accumulate(lengths, initial=0)
    return [(first, end - first, place) for (first, end), place in zip(runs, places, strict=False)]


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
