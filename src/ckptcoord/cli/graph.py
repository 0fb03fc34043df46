"""History as lines beside the checkpoints, as git draws it. Pure.

Every checkpoint has one parent at most, so lines never part on their way down: they only join.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

K = TypeVar("K", bound="Hashable")

NODE, LINE, BLANK = "●", "│", " "
_TARGET, _ACROSS, _CROSSING, _JOINS, _LAST = "├", "─", "┼", "┴", "╯"
GLYPHS = f"{NODE}{LINE}{_TARGET}{_ACROSS}{_CROSSING}{_JOINS}{_LAST}"
_ASCII = str.maketrans(GLYPHS, "*||_|//")


@dataclass(frozen=True, slots=True)
class Node(Generic[K]):
    """One checkpoint, and where the line below it goes; None: nowhere."""

    key: K
    parent: K | None


@dataclass(frozen=True, slots=True)
class Row(Generic[K]):
    """One line of the picture.

    Attributes:
        node: the checkpoint that stands in it; None where lines join only.
        glyphs: a column for each line, one character wide, with a connector between two columns.
        colors: for each glyph, the number of the line that it is of.
    """

    node: Node[K] | None
    glyphs: str
    colors: tuple[int, ...]

    def in_ascii(self) -> str:
        """The glyphs, as many, where there is nothing but ASCII."""
        text = self.glyphs
        if _JOINS not in text:
            text = text.replace(f"{_ACROSS}{_LAST}", f"{_LAST}{BLANK}")
        return text.translate(_ASCII)


def children_first(nodes: Iterable[Node[K]]) -> list[Node[K]]:
    """The same nodes, as near to the given order as it is with every parent below its children.

    A parent that is not among them is None then; so is one link of a circle, which only a forged
    history has.
    """
    given = list(nodes)
    places = {node.key: place for place, node in enumerate(given)}
    parents = [None if node.parent is None else places.get(node.parent) for node in given]
    waiting = Counter(parent for parent in parents if parent is not None)
    ready = [place for place in range(len(given)) if not waiting[place]]
    found: list[Node[K]] = []
    done: set[int] = set()
    for fallback in range(len(given) + 1):  # the first that is left breaks a circle
        while ready:
            place = heapq.heappop(ready)
            done.add(place)
            parent = parents[place]
            if parent in done:
                parent = None
            found.append(Node(given[place].key, None if parent is None else given[parent].key))
            if parent is not None:
                waiting[parent] -= 1
                if not waiting[parent]:
                    heapq.heappush(ready, parent)
        if fallback < len(given) and fallback not in done:
            ready = [fallback]
            waiting[fallback] = 0
    return found


def draw(nodes: Sequence[Node[K]]) -> Iterator[Row[K]]:
    """The picture, from above: a row for each node, and one before it where lines join there.

    Args:
        nodes: as of `children_first`, or the first so many of these: the line to a parent that is
            not among them runs down to the end.
    """
    lanes = _Lanes[K]()
    for node in nodes:
        here = lanes.waiting_for(node.key)
        if len(here) > 1:
            yield lanes.join(here)
        yield lanes.stand(node, here[0] if here else lanes.free())


class _Lanes(Generic[K]):
    """The lines that are on their way down, by column; None where a column is free."""

    def __init__(self) -> None:
        self._waiting: list[K | None] = []
        self._colors: list[int] = []
        self._begun = 0

    def waiting_for(self, key: K) -> list[int]:
        return [column for column, one in enumerate(self._waiting) if one == key]

    def free(self) -> int:
        """A column for a new line."""
        if None not in self._waiting:
            self._waiting.append(None)
            self._colors.append(0)
        column = self._waiting.index(None)
        self._colors[column] = self._begun
        self._begun += 1
        return column

    def stand(self, node: Node[K], column: int) -> Row[K]:
        """The row of a node; below it, its column is a line to its parent."""
        glyphs, colors = self._plain()
        glyphs[2 * column], colors[2 * column] = NODE, self._colors[column]
        self._waiting[column] = node.parent
        self._trim()
        return Row(node, "".join(glyphs).rstrip(), tuple(colors))

    def join(self, columns: Sequence[int]) -> Row[K]:
        """The row in which these lines go over into the first of them."""
        glyphs, colors = self._plain()
        target, *others = columns
        glyphs[2 * target] = _TARGET
        for at in range(2 * target + 1, 2 * others[-1] + 1):
            glyphs[at] = _CROSSING if glyphs[at] == LINE else _ACROSS
            if glyphs[at] == _ACROSS:
                colors[at] = self._colors[next(one for one in others if 2 * one >= at)]
        for column in others:
            glyphs[2 * column] = _LAST if column == others[-1] else _JOINS
            colors[2 * column] = self._colors[column]
            self._waiting[column] = None
        self._trim()
        return Row(None, "".join(glyphs).rstrip(), tuple(colors))

    def _plain(self) -> tuple[list[str], list[int]]:
        """All lines going straight down."""
        glyphs, colors = [], []
        for waiting, color in zip(self._waiting, self._colors, strict=True):
            glyphs += [BLANK if waiting is None else LINE, BLANK]
            colors += [color, color]
        return glyphs[:-1], colors[:-1]

    def _trim(self) -> None:
        while self._waiting and self._waiting[-1] is None:
            self._waiting.pop()
            self._colors.pop()
