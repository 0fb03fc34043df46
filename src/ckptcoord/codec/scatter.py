"""From a stream of a stored piece's bytes into the boxes of memory that they belong to (ADR 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ckptcoord.core.box import Box

_ROW_BYTES = 256 << 10
"""Rows are as many whole trailing dimensions as have at most so many bytes."""


class Sink(Protocol):
    """Takes the bytes of an entry, all in order.

    Attributes:
        nbytes: how many.
    """

    nbytes: int

    def begin(self) -> None:
        """The bytes will come from the first one on, for the first time or again."""
        ...

    def take(self, part: memoryview) -> None:
        """The next bytes; they are the caller's again afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Memory for one box.

    Attributes:
        box: of the tensor.
        data: its bytes, uint8 of shape (*box.size, B): B bytes an element; may be strided.
    """

    box: Box
    data: NDArray[np.uint8]


class Scatter:
    """Takes a piece's bytes in order and puts those that are wanted where they belong.

    Bytes before `begin` again start anew, for a second pass.

    Args:
        piece: the box that the bytes are of, row-major.
        item_bytes: B, bytes an element.
        targets: boxes of the same tensor; of any of them that is outside of the piece, nothing is
            touched.

    Raises:
        ConfigError: memory of another shape than its box.
    """

    def __init__(self, piece: Box, item_bytes: int, targets: Sequence[Target]) -> None:
        for target in targets:
            if target.data.shape != (*target.box.size, item_bytes):
                raise ConfigError(
                    field="target", why=f"has shape {target.data.shape} for {target.box.size}"
                )
        self.nbytes = piece.volume * item_bytes
        self._piece = piece
        # A piece without dimensions is one row of one element.
        shape = piece.size or (1,)
        self._depth = _depth(shape, item_bytes)
        self._row_shape = (*shape[self._depth + 1 :], item_bytes)
        self._row_bytes = math.prod(self._row_shape)
        self._lengths = shape[: self._depth + 1]
        self._copies = [
            (common.seen_from(piece), target.data[common.seen_from(target.box)])
            for target in targets
            if (common := piece.meet(target.box)) is not None
        ]
        self._carry = bytearray()
        self._row = 0

    def begin(self) -> None:
        """The bytes will come from the first one on."""
        self._carry.clear()
        self._row = 0

    def take(self, part: memoryview) -> None:
        """The next bytes."""
        if self._carry or part.nbytes % self._row_bytes:
            self._carry += part
            whole = len(self._carry) // self._row_bytes * self._row_bytes
            rows = np.frombuffer(bytes(self._carry[:whole]), np.uint8)
            del self._carry[:whole]
        else:
            rows = np.frombuffer(part, np.uint8)
        self._put(rows.reshape(-1, *self._row_shape))

    def _put(self, rows: NDArray[np.uint8]) -> None:
        """Rows one after another, of which those in a run lie in one slice of the last index."""
        while len(rows):
            *outer, first = np.unravel_index(self._row, self._lengths)
            run = min(len(rows), self._lengths[-1] - int(first))
            for where, out in self._copies:
                _copy(rows[:run], [int(i) for i in outer], int(first), where, out)
            rows = rows[run:]
            self._row += run


def _depth(shape: Sequence[int], item_bytes: int) -> int:
    """The first dimension whose slices are small enough to be handled as rows."""
    nbytes = math.prod(shape) * item_bytes
    for depth, size in enumerate(shape):
        nbytes = nbytes // size if size else 0
        if nbytes <= _ROW_BYTES:
            return depth
    return len(shape) - 1


def _copy(
    rows: NDArray[np.uint8],
    outer: Sequence[int],
    first: int,
    where: tuple[slice, ...],
    out: NDArray[np.uint8],
) -> None:
    """Rows `first` and on, at `outer` of the piece, into `out`, which is the piece at `where`."""
    if not where:
        out[...] = rows[0]
        return
    at = []
    for index, axis in zip(outer, where, strict=False):
        if not axis.start <= index < axis.stop:
            return
        at.append(index - axis.start)
    axis, inner = where[len(outer)], where[len(outer) + 1 :]
    start, stop = max(axis.start, first), min(axis.stop, first + len(rows))
    if start < stop:
        part = rows[(slice(start - first, stop - first), *inner)]
        out[(*at, slice(start - axis.start, stop - axis.start))] = part
