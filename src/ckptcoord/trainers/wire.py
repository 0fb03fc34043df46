"""Batches on their way from one rank to others: state trees and bytes, nothing pickled."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as c10d

from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.core.tree import unflatten
from ckptcoord.dist.capture import TorchAdapter, capture
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.restore import empty_like, memory_of
from ckptcoord.repo.shards import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

_LENGTHS = struct.Struct("<QQ")  # of the state document and of the list of tensors
_NAME = "batch"


def pack(value: object) -> torch.Tensor:
    """Any state tree as 1-D uint8 on the CPU.

    Raises:
        UnsupportedStateError: it holds something that is neither tensor, array nor plain data.
    """
    captured = capture(StateComponent(_NAME, None, SharingPattern.GLOBAL, get_state=lambda: value))
    specs: JsonValue = [
        [tensor.spec.name, tensor.spec.dtype, list(tensor.spec.shape)]
        for tensor in captured.tensors.values()
    ]
    listed = dump_json(specs)
    parts = [_LENGTHS.pack(len(captured.document), len(listed)), captured.document, listed]
    data = bytearray(b"".join(parts))
    for tensor in captured.tensors.values():
        data += tensor.read().data
    return torch.frombuffer(data, dtype=torch.uint8)


def plain(batch: object) -> object:
    """A batch whose outermost mapping is a dict: collators return mappings of their own."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def unpack(packed: torch.Tensor) -> object:
    """The tree that `pack` was given; tensors are on the CPU."""
    data = packed.cpu().numpy().data
    documents, listed = _LENGTHS.unpack(data[: _LENGTHS.size])
    at = _LENGTHS.size
    tree = as_dict(parse_json(bytes(data[at : at + documents]), path=_NAME))["tree"]
    at += documents
    specs = as_list(parse_json(bytes(data[at : at + listed]), path=_NAME))
    at += listed
    tensors = {}
    for spec in map(_spec, specs):
        tensors[spec.name] = empty_like(spec)
        memory_of(tensors[spec.name])[:] = data[at : at + spec.nbytes]
        at += spec.nbytes
    return unflatten(tree, tensors, TorchAdapter(), path=_NAME)


def broadcast(value: object, *, source: int = 0, group: c10d.ProcessGroup | None = None) -> object:
    """One rank's value, on every rank of the group. Collective.

    Args:
        value: there; what the others give is not looked at.
        source: its global rank.
        group: None: the default group.
    """
    packed = pack(value) if c10d.get_rank() == source else None
    length = torch.tensor([0 if packed is None else packed.numel()])
    c10d.broadcast(length, src=source, group=group)
    if packed is None:
        packed = torch.empty(int(length), dtype=torch.uint8)
    c10d.broadcast(packed, src=source, group=group)
    return unpack(packed)


def scatter(
    packed: Sequence[torch.Tensor] | None, group: c10d.ProcessGroup | None = None
) -> object:
    """This rank's of the packed values that rank 0 gives, one a rank in rank order. Collective."""
    mine = torch.zeros(1, dtype=torch.int64)
    lengths = None if packed is None else [torch.tensor([one.numel()]) for one in packed]
    c10d.scatter(mine, lengths, src=0, group=group)
    # gloo scatters pieces of one length only.
    longest = mine.clone()
    c10d.all_reduce(longest, c10d.ReduceOp.MAX, group=group)
    room = torch.empty(int(longest), dtype=torch.uint8)
    c10d.scatter(room, None if packed is None else [_padded(p, room) for p in packed], 0, group)
    return unpack(room[: int(mine)])


def _padded(packed: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros_like(room)
    padded[: packed.numel()] = packed
    return padded


def _spec(value: JsonValue) -> TensorSpec:
    name, dtype, shape = as_list(value)
    return TensorSpec(
        name=str(name), dtype=str(dtype), shape=tuple(as_int(size) for size in as_list(shape))
    )
