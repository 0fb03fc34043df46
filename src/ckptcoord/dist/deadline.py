"""One deadline goes down; every wait takes it (INV-7)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock, and the span that led to it."""

    at_s: float
    span_s: float

    @classmethod
    def after(cls, span_s: float) -> Self:
        """`span_s` seconds from now."""
        return cls(time.monotonic() + span_s, span_s)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    def missed_by_s(self) -> float:
        """Seconds since it passed, never negative."""
        return max(0.0, time.monotonic() - self.at_s)

    def extended(self, extra_s: float) -> Deadline:
        """The same deadline, a little later."""
        return Deadline(self.at_s + extra_s, self.span_s + extra_s)
