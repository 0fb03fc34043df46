"""An evaluation that does not keep a run from ending when it is told to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptcoord.trainers.ranks import Ranks
    from ckptcoord.trainers.signals import StopSignals

_T = TypeVar("_T")


class Evaluations:
    """Gives out the batches of evaluations, on all ranks together.

    Args:
        ranks: all that evaluate.

    Attributes:
        was_cut: whether an evaluation of the run under way ended early, since a signal had come on
            some rank; later ones, as of an `evaluate()` of several, leave it so.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._signals: StopSignals | None = None
        self.was_cut = False

    @contextmanager
    def heeding(self, signals: StopSignals) -> Iterator[None]:
        """While a run goes on that these end."""
        self._signals = signals
        try:
            yield
        finally:
            self._signals, self.was_cut = None, False

    def batches(self, own: Iterable[_T]) -> Iterator[_T]:
        """This rank's batches, until all ranks have had theirs or are told to stop. Collective."""
        left = iter(own)
        while True:
            batch = next(left, None)
            told = 0 if self._signals is None else self._signals.received
            more, told = self._ranks.agree((int(batch is not None), told))
            if more and told:
                self.was_cut = True
                return
            if not more:
                return
            if batch is not None:
                yield batch
