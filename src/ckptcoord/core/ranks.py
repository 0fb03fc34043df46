"""Sequences of ranks as text: "0-3,6" for 0, 1, 2, 3, 6."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_WORLD_SIZE = 1_000_000
_RUN = re.compile(r"(0|[1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?")

Runs: TypeAlias = tuple[tuple[int, int], ...]


def format_ranks(ranks: Iterable[int]) -> str:
    """The text of a sequence of ranks; the order is kept: (1, 0, 2, 3) is "1,0,2-3"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_runs(text: str) -> Runs:
    """The runs in a text as (first, last), not expanded: a short text can name many ranks.

    Raises:
        ValueError: the text is not what `format_ranks` writes for at least one rank.
    """
    runs: list[tuple[int, int]] = []
    for part in text.split(","):
        match = _RUN.fullmatch(part)
        if match is None:
            raise ValueError(f"{_shown(text)} is not runs of ranks such as '0-3,6'")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if match[2] is not None and last <= first:
            raise ValueError(f"{_shown(text)} has a run that ends where it begins, or before")
        if runs and runs[-1][1] + 1 == first:
            raise ValueError(f"{_shown(text)} has two runs that are one")
        runs.append((first, last))
    return tuple(runs)


def parse_ranks(text: str) -> tuple[int, ...]:
    """The ranks that `format_ranks` was given.

    Raises:
        ValueError: the text is anything else, or names over a million ranks.
    """
    runs = parse_runs(text)
    if sum(last - first + 1 for first, last in runs) > MAX_WORLD_SIZE:
        raise ValueError(f"{_shown(text)} names more than {MAX_WORLD_SIZE} ranks")
    return tuple(rank for first, last in runs for rank in range(first, last + 1))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")
