"""Saves in the background, from the call to the queue: capture, stage, submit (ADR 9)."""

from __future__ import annotations

import logging
import sys
import time
import weakref
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.capturer import form_of
from ckptcoord.dist.config import check_deferred
from ckptcoord.dist.holdings import own_tensors
from ckptcoord.dist.opening import validation_of
from ckptcoord.dist.report import SaveTimer
from ckptcoord.dist.savequeue import Job, PendingSave, SaveQueue
from ckptcoord.dist.saving import SaveTask, declare, hold
from ckptcoord.dist.session import heard
from ckptcoord.dist.staging import Snapshot, Stager, StagingPool
from ckptcoord.errors import CkptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.config import Deferred
    from ckptcoord.dist.request import SaveRequest
    from ckptcoord.dist.session import Session

_TICK_S = 0.2
_log = logging.getLogger("ckptcoord")


class Background:
    """What a coordinator saves in the background.

    Args:
        session: of the coordinator.

    Attributes:
        queue: the saves that are not finished.
    """

    def __init__(self, session: Session) -> None:
        config = session.config
        self.queue = SaveQueue(session)
        self._session = session
        self._said = False
        self._own: tuple[object, Mapping[str, frozenset[str]]] = (None, {})
        pool = StagingPool(config.staging_bytes)
        # Half as nice: a step may have to wait for what its thread has begun.
        niceness = config.background_nice // 2
        self._stager = Stager(
            session.components,
            pool,
            deferred=config.deferred,
            niceness=niceness,
            threads=config.io_threads,
        )

    def save(
        self,
        ask: Callable[[], SaveRequest],
        *,
        deferred: Deferred | None,
        validate: bool,
        owner: object,
    ) -> PendingSave:
        """Take the state as it is now, and put its save into the queue.

        Args:
            ask: makes the request; what it raises is heard on all ranks.
            deferred: as in the settings; None: as they say.
            validate: read every byte back after the commit.
            owner: the coordinator.
        """
        began_s = time.perf_counter()
        timer = SaveTimer(self._session.config.clock)
        waited_s = self.queue.await_room()
        depth = self.queue.unfinished + 1
        request = heard(partial(_requested, ask, deferred))
        held = request if isinstance(request, CkptError) else heard(lambda: hold(self._session))
        declared = heard(lambda: declare(self._session))
        snapshot = (
            held if isinstance(held, CkptError) else heard(lambda: self._stage(held, deferred))
        )
        copies = snapshot if isinstance(snapshot, Snapshot) else None
        waited_s += 0.0 if copies is None else copies.waited_s
        staged = _staged(snapshot, timer)
        pending = PendingSave(_label(request), staged)
        pending.is_own_thread = self.is_own_thread
        task = SaveTask(
            request=request,
            state=_state(held, snapshot),
            timer=timer,
            bytes_per_s=self._session.config.io_budget,
            background=True,
            queue_depth=depth,
            validate=bool(validate),
            # Where that fails, it fails again when it is said.
            declared=None if isinstance(declared, CkptError) else declared,
            deferred=self._session.config.deferred if deferred is None else deferred,
        )
        if snapshot is None:
            timer.block(waited_s=waited_s)
        else:
            timer.stall(time.perf_counter() - began_s, waited_s=waited_s)
        self.queue.submit(Job(task=task, pending=pending, owner=owner, snapshot=copies))
        if snapshot is None:
            _await_end(task, pending, staged)
        return pending

    def is_own_thread(self) -> bool:
        """Whether the calling thread is one that saves wait for."""
        return self.queue.is_worker() or self._stager.is_own_thread()

    def forget(self) -> None:
        """The state is about to change other than by training, as in a load."""
        self._stager.forget()

    def drain(self, *, show: bool) -> None:
        """Finish what is in the queue.

        Args:
            show: how many saves are left, where there is a terminal.
        """
        with _countdown(self.queue.unfinished, show=show) as tick:
            self.queue.drain(tick, every_s=_TICK_S)

    def close(self) -> None:
        """End the threads, and free what copies were made in.

        Raises:
            CkptError: a save failed.
        """
        self._stager.close()
        self._stager.pool.close()
        try:
            self.queue.enter(alone=True, after="The coordinator is closed all the same")
        finally:
            self.queue.close()

    def _stage(
        self, held: Mapping[str, CapturedComponent] | CkptError, deferred: Deferred | None
    ) -> Snapshot | None:
        """Copies of what this rank writes; None where the budget has no room for them.

        Raises:
            CkptError: what the capture came to, or the copying.
        """
        if isinstance(held, CkptError):
            raise held
        own = self._own_tensors(held)
        if not self._stager.fits(held, own):
            self._say_that_calls_wait()
            return None
        levels = {key: validation_of(captured.component) for key, captured in held.items()}
        compared = {key: one for key, one in levels.items() if one is not ValidationLevel.NONE}
        return self._stager.take(held, own, compared, deferred=deferred)

    def _say_that_calls_wait(self) -> None:
        """Once: whoever wonders why saves stall training finds it in the log."""
        if not self._said:
            self._said = True
            _log.warning(
                "staging_bytes is %s, which has no room for what rank %d writes: calls wait until "
                "their saves have ended",
                f"{self._session.config.staging_bytes:,}",
                self._session.world.rank,
            )

    def _own_tensors(self, held: Mapping[str, CapturedComponent]) -> Mapping[str, frozenset[str]]:
        """As `own_tensors`; the same object where all that this depends on is as it was."""
        forms = [form_of(captured) for captured in held.values()]
        session = self._session
        facts = (forms, dict(session.versions), frozenset(session.inventories))
        if None in forms or facts != self._own[0]:
            self._own = (facts, own_tensors(session, held))
        return self._own[1]


def _state(
    held: Mapping[str, CapturedComponent] | CkptError, snapshot: Snapshot | CkptError | None
) -> Callable[[], Mapping[str, CapturedComponent]]:
    """What this rank brings to a save, for the worker to ask for; waits for copies."""
    if isinstance(snapshot, Snapshot):
        return snapshot.components  # and the live state is let go
    return partial(_given, held if snapshot is None else snapshot)


def _given(state: Mapping[str, CapturedComponent] | CkptError) -> Mapping[str, CapturedComponent]:
    if isinstance(state, CkptError):
        raise state
    return state


def _await_end(task: SaveTask, pending: PendingSave, staged: Future[None]) -> None:
    """There was no room for copies: the live state must stay as it is until it is written."""
    try:
        wait([pending.committed])
    except BaseException:
        task.void = True  # whoever goes on may change it
        raise
    staged.set_result(None)


def _staged(snapshot: Snapshot | CkptError | None, timer: SaveTimer) -> Future[None]:
    """Done when the state may change; the timer is told when, and what the hook takes of a step."""
    staged: Future[None] = Future()
    if isinstance(snapshot, CkptError):
        staged.set_exception(snapshot)
    elif snapshot is not None:
        staged = snapshot.staged
        # A caller may keep the future; the timer, which follows the snapshot, ends with the save.
        staged.add_done_callback(partial(_mark, weakref.ref(timer)))
        taken_s = snapshot.blocked_s  # in the call, where it is counted
        timer.follow(lambda: snapshot.blocked_s - taken_s)
    return staged


def _requested(ask: Callable[[], SaveRequest], deferred: Deferred | None) -> SaveRequest:
    check_deferred(deferred)
    return ask()


def _label(request: SaveRequest | CkptError) -> str:
    return "" if isinstance(request, CkptError) else str(request.checkpoint_id)


def _mark(to_mark: weakref.ref[SaveTimer], staged: Future[None]) -> None:
    timer = to_mark()
    if timer is not None and staged.exception() is None:
        timer.mark("staged")


@contextmanager
def _countdown(saves: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar of saves on the terminal's error output, if there are any and there is one."""
    if not (saves and show and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_dumb_terminal:  # rich would leave an empty line there
        yield lambda _: None
        return
    columns = ("[progress.description]{task.description}", MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("finishing saves in the background", total=saves)
        yield lambda left: bar.update(task, completed=saves - left)
