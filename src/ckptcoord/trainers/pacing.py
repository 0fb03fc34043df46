"""How often to save so that saving costs a given part of the time."""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED = 3  # saves that the next one's cost is judged by
_REMEMBERED_STEPS = 32  # steps that say how long one takes undisturbed
_GUESSED_BYTES_PER_S = 100e6
_GUESSED_LATENCY_S = 0.1


def guessed_save_s(state_bytes: int) -> float:
    """The seconds of a save that nobody has measured; rather too many than too few."""
    return _GUESSED_LATENCY_S + state_bytes / _GUESSED_BYTES_PER_S


class SavePacer:
    """Says when the next save fits the budget. It is told durations and reads no clock.

    A save is due when, with it, saves would have taken at most `max_overhead` of the run so far.
    What a save takes is what training loses by it: the time of the call, and by how much the steps
    until its end are longer than the median of the last 32 steps without a save. Its cost is judged
    by the dearest of the last three; the first one's is guessed from the bytes that this rank would
    write, pessimistically, so that the first save errs on the late side. While one is unfinished,
    none is due: what it costs is not known.

    Args:
        max_overhead: between 0 and 1.
        state_bytes: what a save writes, roughly.
    """

    def __init__(self, max_overhead: float, state_bytes: int) -> None:
        self._budget = max_overhead / (1 - max_overhead)  # seconds of saving a second of training
        self._recent = deque([guessed_save_s(state_bytes)])
        self._guessed = True
        self._quiet: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._open = 0  # saves begun and not ended
        self._open_s = 0.0  # what they have cost so far
        self.training_s = 0.0
        self.saving_s = 0.0

    def trained(self, seconds: float) -> None:
        """Something that is no step took so long: an evaluation."""
        self.training_s += seconds

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        lost_s = 0.0
        if not self._open:
            self._quiet.append(seconds)
        elif self._quiet:
            lost_s = max(0.0, seconds - median(self._quiet))
        self.training_s += seconds - lost_s
        self.saving_s += lost_s
        self._open_s += lost_s

    def began(self, seconds: float) -> None:
        """A call that begins a save took so long."""
        self.saving_s += seconds
        self._open_s += seconds
        self._open += 1

    def ended(self) -> None:
        """No save is unfinished."""
        if not self._open:
            return
        if self._guessed:
            self._recent, self._guessed = deque(maxlen=_REMEMBERED), False
        self._recent.append(self._open_s / self._open)
        self._open, self._open_s = 0, 0.0

    @property
    def due(self) -> bool:
        """Whether a save now would stay within the budget."""
        return (
            not self._open and self.saving_s + max(self._recent) <= self._budget * self.training_s
        )

    @property
    def overhead(self) -> float:
        """The part of the time so far that saves took."""
        whole = self.training_s + self.saving_s
        return self.saving_s / whole if whole else 0.0
