"""How often to save so that saving costs a given part of the time."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 3  # saves that the next one's cost is judged by
_GUESSED_BYTES_PER_S = 100e6
_GUESSED_LATENCY_S = 0.1


class SavePacer:
    """Says when the next save fits the budget. It is told durations and reads no clock.

    A save is due when, with it, saves would have taken at most `max_overhead` of the run so far.
    Its cost is judged by the slowest of the last three; the first one's is guessed from the bytes
    that this rank would write, pessimistically, so that the first save errs on the late side.

    Args:
        max_overhead: between 0 and 1.
        state_bytes: what a save writes, roughly.
    """

    def __init__(self, max_overhead: float, state_bytes: int) -> None:
        self._budget = max_overhead / (1 - max_overhead)  # seconds of saving a second of training
        self._recent = deque([_GUESSED_LATENCY_S + state_bytes / _GUESSED_BYTES_PER_S])
        self._guessed = True
        self.training_s = 0.0
        self.saving_s = 0.0

    def trained(self, seconds: float) -> None:
        """A step took so long, without any save."""
        self.training_s += seconds

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.saving_s += seconds
        if self._guessed:
            self._recent, self._guessed = deque(maxlen=_REMEMBERED), False
        self._recent.append(seconds)

    @property
    def due(self) -> bool:
        """Whether a save now would stay within the budget."""
        return self.saving_s + max(self._recent) <= self._budget * self.training_s

    @property
    def overhead(self) -> float:
        """The part of the time so far that saves took."""
        whole = self.training_s + self.saving_s
        return self.saving_s / whole if whole else 0.0
