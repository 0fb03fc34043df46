"""What ranks say to one another between two steps, and what is left of a grace period."""

from __future__ import annotations

import signal
from dataclasses import astuple, dataclass
from typing import Self

_MOST_MS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What one rank says; all act on the largest of each. Whole numbers of 31 bits.

    Attributes:
        due: whether a save fits the budget (adaptive), on rank 0.
        signal: the number of the signal that asks the run to end; 0: none.
        since_ms: milliseconds since the first such signal came.
        unfinished: whether a save is under way.
        failed: whether a save has failed that nobody has heard of.
        drain_ms: milliseconds until the saves under way have ended, by what saves have taken.
        save_ms: milliseconds of one more save.
    """

    due: int = 0
    signal: int = 0
    since_ms: int = 0
    unfinished: int = 0
    failed: int = 0
    drain_ms: int = 0
    save_ms: int = 0

    def to_flags(self) -> tuple[int, ...]:
        """In the order of the fields."""
        return tuple(map(int, astuple(self)))

    @classmethod
    def from_flags(cls, flags: tuple[int, ...]) -> Self:
        """The inverse of `to_flags`."""
        return cls(**dict(zip(cls.__slots__, flags, strict=True)))


def to_ms(seconds: float) -> int:
    """Whole milliseconds, as many as a word holds."""
    return round(min(max(0.0, seconds * 1000), _MOST_MS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grace:
    """Why a last save is begun or not; the same on every rank, in seconds.

    Attributes:
        signal: its number.
        total_s: what whoever sent it is taken to wait.
        gone_s: how much of it was over when the ranks agreed, from when the first one had it.
        drain_s: what the saves under way still take.
        save_s: what one more takes.
    """

    signal: int
    total_s: float
    gone_s: float
    drain_s: float
    save_s: float

    @classmethod
    def of(cls, word: Word, total_s: float) -> Self:
        """As the ranks agreed."""
        return cls(
            signal=word.signal,
            total_s=total_s,
            gone_s=word.since_ms / 1000,
            drain_s=word.drain_ms / 1000,
            save_s=word.save_ms / 1000,
        )

    @property
    def left_s(self) -> float:
        """What was left of it when the ranks agreed."""
        return max(0.0, self.total_s - self.gone_s)

    @property
    def fits(self) -> bool:
        """Whether one more save would be committed in time."""
        return self.drain_s + self.save_s <= self.left_s

    def why_not(self) -> str:
        """Why no last save was begun, in numbers."""
        behind = f", behind about {self.drain_s:.1f} s of others" if self.drain_s else ""
        return (
            f"{signal.Signals(self.signal).name} came {self.gone_s:.1f} s before, {self.left_s:.1f}"
            f" s of the {self.total_s:g} s of grace were left, and a save takes about "
            f"{self.save_s:.1f} s{behind}"
        )
