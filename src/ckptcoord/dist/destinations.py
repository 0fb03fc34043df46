"""Where a load puts what it reads: memory for a tensor, and which saved pieces fill it (ADR 11)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ckptcoord.core.box import Box
from ckptcoord.dist.capture import DTYPE_NAMES
from ckptcoord.dist.restore import empty_like, in_plain_memory, memory_of
from ckptcoord.dist.sharded import Pieces, is_dtensor, layout_of, rebuilt
from ckptcoord.errors import ConfigError
from ckptcoord.repo.readers import Scatter, Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.core.treemerge import Keys
    from ckptcoord.dist.restore import Live
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.dist.shardset import Want


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """New memory for a tensor.

    Attributes:
        pieces: the boxes to read, each with contiguous memory on the CPU.
        template: in whose layout the tensor is to be; None: the one piece is the tensor.
        adopted: the template is new, and is what the component gets.
    """

    pieces: Pieces
    template: object = None
    adopted: bool = False

    def value(self) -> object:
        """The tensor, once its pieces are read."""
        if self.template is None:
            return self.pieces[0][1]
        if not self.adopted:
            return rebuilt(self.template, [tensor for _, tensor in self.pieces])
        for (_, tensor), (_, read) in zip(
            layout_of(self.template).pieces, self.pieces, strict=True
        ):
            if tensor is not read:
                with torch.no_grad():
                    tensor.copy_(read)
        return self.template

    def late(self, value: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Live memory and what it is yet to hold, where the `value` is the live tensor itself."""
        if self.adopted or self.template is None or value is not self.template:
            return []
        live = [tensor for _, tensor in layout_of(value).pieces]
        return list(zip(live, [tensor for _, tensor in self.pieces], strict=True))


def beside_live(live: Live, saved: SavedTensor, name: str) -> Destination:
    """New memory for a tensor that fits the live one, in the layout that the rank holds it in.

    Raises:
        ConfigError: this torch has no such dtype.
        CkptError: there is no memory for it.
    """
    layout, spec = live.layouts.get(name), saved.spec
    if layout is not None and layout.sharded:
        pieces = tuple((box, _beside(tensor)) for box, tensor in layout.pieces)
        return Destination(pieces=pieces, template=live.values[name])
    if not saved.pieces:
        spec = replace(spec, dtype=live.specs[name].dtype)
    value = live.values.get(name)
    return Destination(
        pieces=((Box.whole(spec.shape), empty_like(spec, file=saved.file)),),
        template=value if is_dtensor(value) else None,  # one that every rank has as a whole
    )


def new_destination(stateful: object, saved: SavedTensor, keys: Keys) -> Destination | None:
    """Memory for a tensor that is not there yet; None: the saved pieces do not fill it.

    Args:
        stateful: what it is for; one that has `new_state(keys, dtype, shape)` says how it would
            hold the tensor.
        saved: what is to be read.
        keys: the keys that lead to it.

    Raises:
        ConfigError: this torch has no such dtype, or `new_state` gave another shape or dtype.
        CkptError: there is no memory for it.
    """
    spec, template = saved.spec, None
    new_state = getattr(stateful, "new_state", None)
    if callable(new_state) and saved.pieces:
        template = new_state(keys, empty_like(spec, size=()).dtype, torch.Size(spec.shape))
    if template is None:
        # Asked first: a document may name any shape.
        whole = Box.whole(spec.shape)
        if not saved.has(whole):
            return None
        return Destination(pieces=((whole, empty_like(spec, file=saved.file)),))
    layout = layout_of(template)
    if (DTYPE_NAMES.get(layout.dtype), layout.shape) != (spec.dtype, spec.shape):
        raise ConfigError(
            field=f"{type(stateful).__name__}.new_state",
            why=f"gives {layout.dtype} of {list(layout.shape)} for {spec.name!r}, which is "
            f"{spec.dtype} of {list(spec.shape)}",
        )
    if not all(saved.has(box) for box, _ in layout.pieces):
        return None
    pieces = tuple(
        (box, tensor if in_plain_memory(tensor) else _beside(tensor))
        for box, tensor in layout.pieces
    )
    return Destination(pieces=pieces, template=template, adopted=True)


def wants_for(saved: SavedTensor, pieces: Iterable[tuple[Box, torch.Tensor]]) -> list[Want]:
    """What is read to fill pieces of memory; each saved piece at most once."""
    wants: list[Want] = []
    parts: dict[int, list[Target]] = {}
    for box, tensor in pieces:
        meeting = saved.meeting(box)
        if len(meeting) == 1 and saved.pieces[meeting[0]][0] == box:
            wants.append((saved.pieces[meeting[0]][1], memory_of(tensor)))
            continue
        if not meeting:
            continue
        data = np.frombuffer(memory_of(tensor), np.uint8).reshape(*box.size, saved.spec.item_bytes)
        for index in meeting:
            parts.setdefault(index, []).append(Target(box=box, data=data))
    for index, targets in parts.items():
        there, source = saved.pieces[index]
        wants.append((source, Scatter(there, saved.spec.item_bytes, targets)))
    return wants


def _beside(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
