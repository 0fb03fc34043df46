"""Boxes: which part of a tensor a piece is, and how the name of its entry says so (ADR 11)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_RANGES = re.compile(f"{_NUMBER}:{_NUMBER}(?:,{_NUMBER}:{_NUMBER}){{0,31}}")
_MAX_INDEX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Box:
    """A half-open box of a tensor, in elements; of as many dimensions as the tensor.

    Raises:
        ConfigError: the two differ in length, or something is negative.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.size) or min((*self.offset, *self.size), default=0) < 0:
            raise ConfigError(field="box", why=f"is {self.offset} and {self.size}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of that shape."""
        return cls(offset=(0,) * len(shape), size=tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """Where it ends, in every dimension."""
        return tuple(map(sum, zip(self.offset, self.size, strict=True)))

    @property
    def volume(self) -> int:
        """How many elements it has."""
        return math.prod(self.size)

    def within(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape has such a part."""
        return len(shape) == len(self.size) and all(
            stop <= size for stop, size in zip(self.stop, shape, strict=True)
        )

    def meet(self, other: Box) -> Box | None:
        """What both have; None where that is nothing."""
        begin = tuple(map(max, zip(self.offset, other.offset, strict=True)))
        stop = tuple(map(min, zip(self.stop, other.stop, strict=True)))
        size = tuple(b - a for a, b in zip(begin, stop, strict=True))
        return Box(offset=begin, size=size) if min(size, default=1) > 0 else None

    def seen_from(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box in an array of `outer`'s elements."""
        return tuple(
            slice(mine - theirs, mine - theirs + size)
            for mine, theirs, size in zip(self.offset, outer.offset, self.size, strict=True)
        )


def covers_once(boxes: Sequence[Box], target: Box) -> bool:
    """Whether every element of `target` is in one of the boxes, and in no more than one."""
    parts = [part for box in boxes if (part := box.meet(target)) is not None]
    if sum(part.volume for part in parts) != target.volume:
        return False
    # Along the axis on which they lie apart most, each has few that it could meet.
    axes = range(len(target.size))
    axis = max(axes, key=lambda axis: len({part.offset[axis] for part in parts}), default=None)
    if axis is None:
        return len(parts) == 1
    parts.sort(key=lambda part: part.offset[axis])
    for index, part in enumerate(parts):
        for other in parts[index + 1 :]:
            if other.offset[axis] >= part.stop[axis]:
                break
            if part.meet(other) is not None:
                return False
    return True


def piece_name(tensor: str, box: Box) -> str:
    """The name of the entry that holds a part of a tensor: `w[0:512,0:1024]`."""
    ranges = zip(box.offset, box.stop, strict=True)
    return f"{tensor}[{','.join(f'{begin}:{stop}' for begin, stop in ranges)}]"


def parse_piece_name(name: str) -> tuple[str, Box] | None:
    """A tensor's name and the part of it that an entry holds; None: its name is no `piece_name`."""
    if not name.endswith("]"):
        return None
    tensor, _, ranges = name[:-1].rpartition("[")
    box = _parse_ranges(ranges) if tensor else None
    return None if box is None else (tensor, box)


# Most tensors of a model are cut alike.
@lru_cache(maxsize=100_000)
def _parse_ranges(text: str) -> Box | None:
    if _RANGES.fullmatch(text) is None:
        return None
    ranges = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    if any(not begin <= stop <= _MAX_INDEX for begin, stop in ranges):
        return None
    return Box(
        offset=tuple(begin for begin, _ in ranges),
        size=tuple(stop - begin for begin, stop in ranges),
    )
