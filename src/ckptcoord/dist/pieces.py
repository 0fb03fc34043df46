"""Work in pieces that whoever has time takes, one after the other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")


class Pieces(Generic[_T]):
    """Each piece is taken by one thread; none waits for another but at the end.

    So a thread that the system keeps from running delays the others by one piece, not by its share.

    Attributes:
        failure: what a piece first raised; those that nobody had taken then are left undone.
    """

    def __init__(self, pieces: Sequence[_T]) -> None:
        self.failure: BaseException | None = None
        self._pieces = pieces
        self._next = 0
        self._busy = 0
        self._changed = threading.Condition()

    def work(self, do: Callable[[_T], None]) -> None:
        """Do one piece after the other until none is left to take.

        Raises:
            BaseException: that is no Exception, as an interrupt by the user.
        """
        while (piece := self._take()) is not None:
            try:
                do(piece)
            except BaseException as error:
                self.stop(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def stop(self, failure: BaseException | None = None) -> None:
        """Let no more pieces be taken."""
        with self._changed:
            self.failure = self.failure or failure
            self._pieces = ()
            self._changed.notify_all()

    def wait(self) -> None:
        """Until no piece is left to take and none is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._next >= len(self._pieces) and not self._busy)

    def _take(self) -> _T | None:
        with self._changed:
            if self._next >= len(self._pieces):
                return None
            self._next += 1
            self._busy += 1
            return self._pieces[self._next - 1]
