"""From a stream of a stored piece's bytes into the boxes of memory that they belong to (ADR 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
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

    After `begin` they start anew, for a second pass.

    Args:
        piece: the box that the bytes are of, row-major.
        item_bytes: B, bytes an element.
        targets: boxes of the same tensor; of any of them that is outside of the piece, nothing is
            touched.

    Attributes:
        nbytes: of the piece.
        wanted: the first byte that is wanted, and that after the last one; others need not come.
        memory: where those are wanted in one run, the flat, writable bytes that they belong to:
            they may be put there instead of being taken.

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
        self._row_bytes = max(1, math.prod(self._row_shape))  # an empty piece has no rows
        self._lengths = shape[: self._depth + 1]
        self._copies = [
            (common.seen_from(piece), target.data[common.seen_from(target.box)])
            for target in targets
            if (common := piece.meet(target.box)) is not None
        ]
        spans = [_span(where, piece.size, item_bytes) for where, _ in self._copies]
        first, last = min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)
        self.memory = self._run(last - first)
        if self.memory is None:
            first -= first % self._row_bytes
            last = min(last + -last % self._row_bytes, self.nbytes)
        self.wanted = first, last
        self._carry = bytearray()
        self.begin()

    def begin(self, at: int = 0) -> None:
        """The bytes will come from this one on, which is none after the first that is wanted."""
        self._carry.clear()
        self._at = at  # if they are put into `memory`; else they are put by rows
        self._row = -(-at // self._row_bytes)
        self._skip = self._row * self._row_bytes - at  # the end of a row that nobody wants

    def take(self, part: memoryview) -> None:
        """The next bytes."""
        if self.memory is not None:
            first, last = self.wanted
            low, high = max(self._at, first), min(self._at + part.nbytes, last)
            if low < high:
                self.memory[low - first : high - first] = part[low - self._at : high - self._at]
            self._at += part.nbytes
            return
        skipped = min(self._skip, part.nbytes)
        self._skip -= skipped
        begun = min(-len(self._carry) % self._row_bytes, part.nbytes - skipped)
        self._carry += part[skipped : skipped + begun]
        if len(self._carry) == self._row_bytes:
            self._put(self._carry)
            self._carry = bytearray()
        rest = part[skipped + begun :]
        whole = rest.nbytes - rest.nbytes % self._row_bytes
        self._put(rest[:whole])
        self._carry += rest[whole:]

    def _run(self, nbytes: int) -> memoryview | None:
        """The memory of so many bytes, if what is wanted is one run of the piece and of memory."""
        if len(self._copies) != 1:
            return None
        ((_, out),) = self._copies
        return out.reshape(-1).data if out.nbytes == nbytes and out.flags.c_contiguous else None

    def _put(self, data: memoryview | bytearray) -> None:
        """Rows one after another, of which those in a run lie in one slice of the last index."""
        import numpy as np  # late: commands that only look import this module too

        rows = np.frombuffer(data, np.uint8).reshape(-1, *self._row_shape)
        while len(rows):
            *outer, first = np.unravel_index(self._row, self._lengths)
            run = min(len(rows), self._lengths[-1] - int(first))
            for where, out in self._copies:
                _copy(rows[:run], [int(i) for i in outer], int(first), where, out)
            rows = rows[run:]
            self._row += run


def _span(where: tuple[slice, ...], shape: tuple[int, ...], item_bytes: int) -> tuple[int, int]:
    """The first byte of a part of a row-major array, and that after the last one."""
    first, last = 0, 0
    for axis, size in zip(where, shape, strict=True):
        first, last = first * size + axis.start, last * size + axis.stop - 1
    return first * item_bytes, (last + 1) * item_bytes


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
