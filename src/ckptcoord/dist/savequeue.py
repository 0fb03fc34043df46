"""The queue of saves in the background: one worker, in the order of the calls (ADR 9)."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ckptcoord.core.jsonio import JsonValue
from ckptcoord.dist.config import OnFailure
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.niceness import be_nice
from ckptcoord.dist.outcomes import is_by, is_common
from ckptcoord.dist.report import watched
from ckptcoord.dist.saving import save, verify
from ckptcoord.dist.session import heard
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    StateMovedError,
    StorageError,
    StorageFullError,
)
from ckptcoord.repo.threads import started

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.dist.saving import SaveTask
    from ckptcoord.dist.session import Session
    from ckptcoord.dist.staging import Snapshot

_RETRY_AFTER_S = (1.0, 4.0)
_IDLE_S = 30.0  # after which the worker ends; the next save starts another
_NOTHING_ELSE = "The call that raises this did nothing else"
_log = logging.getLogger("ckptcoord")


class PendingSave:
    """A save in the background.

    Attributes:
        checkpoint_id: what it will be; empty where the request itself was wrong.
        staged: done when all that this rank writes was copied, so that its state may change.
        committed: gives the checkpoint's folder, absolute, or raises why there is none. Both are
            this rank's view; a failure is the same on all ranks.
    """

    def __init__(self, checkpoint_id: str, staged: Future[None]) -> None:
        self.checkpoint_id = checkpoint_id
        self.staged = staged
        self.is_own_thread: Callable[[], bool] = _never  # of those that it waits for
        self.committed: Future[str] = Future()
        self.committed.set_running_or_notify_cancel()  # a save under way is no one rank's to cancel

    def done(self) -> bool:
        """Whether it has been committed, or has failed."""
        return self.committed.done()

    def result(self, timeout: float | None = None) -> str:
        """The checkpoint's folder, absolute; waits at most `timeout` seconds for it.

        A failure is raised here, and all the same by a later call of the coordinator.

        Raises:
            TimeoutError: it is not done yet.
            ConfigError: it is waited for by what saves wait for, as by `on_saved` or a callback.
            CkptError: why there is no such checkpoint.
        """
        if not self.committed.done() and self.is_own_thread():
            raise ConfigError(
                field="PendingSave.result",
                why="is called by a save itself, as from on_saved or a callback",
            )
        return self.committed.result(timeout)


@dataclass(slots=True, kw_only=True)
class Job:
    """A save in the queue.

    Attributes:
        task: for the protocol.
        pending: what the caller has of it.
        snapshot: the copies that it writes; None: it writes the live tensors, and the caller waits.
        owner: the coordinator; while a save is unfinished it must not go, since the end of the
            process waits for the saves of those that are there.
    """

    task: SaveTask
    pending: PendingSave
    owner: object
    snapshot: Snapshot | None = None

    def release(self) -> None:
        """Give the copies' memory back."""
        if self.snapshot is not None:
            self.snapshot.release()

    def end(self, end: _End) -> None:
        """Tell the caller, who may keep what it has of it: no more than how it ended."""
        pending = self.pending
        try:
            if end.error is None:
                pending.committed.set_result(end.path)
            else:
                pending.committed.set_exception(end.error)
        finally:  # a callback may raise anything
            pending.is_own_thread = _never


@dataclass(frozen=True, slots=True)
class _End:
    """How a save ended: its folder, or why there is none, and whether all ranks have heard that."""

    path: str = ""
    error: CkptError | None = None
    heard: bool = True


@dataclass(frozen=True, slots=True)
class _Failure:
    """What the first call from this number on raises, and of which save."""

    call: int
    error: CkptError
    label: str = ""

    @property
    def save(self) -> str:
        """In words."""
        return f"the save of {self.label}" if self.label else "a save"


@dataclass(slots=True)
class SaveQueue:
    """The saves of one coordinator that are not finished, and what became of those that failed.

    Calls are counted, and every rank makes the same ones in the same order; so a failure that is
    due at a number is raised by the same call on every rank.
    """

    session: Session
    _jobs: deque[Job] = field(default_factory=deque)  # the first one is under way
    _failures: list[_Failure] = field(default_factory=list)
    _calls: int = 0
    _settling: bool = False  # the ranks agree on which call raises a failure
    _ended: deque[tuple[Job, _End]] = field(default_factory=deque)  # whose callers are to be told
    _worker: threading.Thread | None = None
    _teller: threading.Thread | None = None
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def unfinished(self) -> int:
        """How many saves are in it."""
        return len(self._jobs)

    def enter(self, *, alone: bool, after: str = _NOTHING_ELSE) -> None:
        """A collective call begins.

        Args:
            alone: once all saves before it are finished.
            after: what the call has done where it raises, for people.

        Raises:
            CkptError: a save in the background failed. The call does nothing else.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._settling)
            self._calls += 1
            if alone:
                self._changed.wait_for(self._is_idle)
            due = [one for one in self._failures if alone or one.call <= self._calls]
            self._failures = [one for one in self._failures if one not in due]
        if due:
            _raise(due, self.session.repository.url, after)

    def await_room(self) -> float:
        """Wait until one more save may be in the queue; returns the seconds that took."""
        began_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < self.session.config.queue_depth)
        return time.perf_counter() - began_s

    def submit(self, job: Job) -> None:
        """Put a save behind the others. Where no thread starts for it, it fails here and now."""
        with self._changed:
            refused = heard(self._start)
            if refused is None:
                self._jobs.append(job)
                self._changed.notify_all()
        if refused is not None:
            self._refuse(job, refused)

    def drain(self, tick: Callable[[int], None], *, every_s: float) -> None:
        """Wait for all saves to finish; `tick` is told how many are left from time to time."""
        with self._changed:
            while not self._changed.wait_for(self._is_idle, timeout=every_s):
                tick(len(self._jobs))

    def close(self) -> None:
        """End both threads, which hold the state, as soon as no save is left."""
        with self._changed:
            self._closed = True
            threads = [one for one in (self._worker, self._teller) if one is not None]
            self._changed.notify_all()
        deadline = self.session.deadline()
        for thread in threads:
            thread.join(deadline.remaining_s())

    def _is_idle(self) -> bool:
        return not (self._jobs or self._settling or self._ended)

    def is_worker(self) -> bool:
        """Whether the calling thread is one that saves wait for."""
        return threading.current_thread() in (self._worker, self._teller)

    def _start(self) -> None:
        """Have both threads. Neither ends while there is a save: then neither has to start."""
        if self._worker is None:
            self._worker = started(self._work, "ckptcoord-saves")
        if self._teller is None:
            self._teller = started(self._tell, "ckptcoord-ends")

    def _refuse(self, job: Job, why: CkptError) -> None:
        """Have all ranks hear why a save cannot run here, in its first round.

        In the caller's thread, since there is no other. It is the next in turn: where a thread is
        missing, the queue is empty.
        """
        job.task.state = partial(_raised, why)
        end = self._outcome(job)
        if end.error is not None:
            self._fail(job, end.error, heard=end.heard)
        job.end(end)

    # --- the worker ------------------------------------------------------------------------------

    def _work(self) -> None:
        """The worker's life; what ends it but idleness fails all that is in the queue."""
        try:
            be_nice(self.session.config.background_nice)
            while self._next():
                pass
        except BaseException as error:  # noqa: BLE001 (it is raised by whoever waits)
            self._abandon(error)

    def _next(self) -> bool:
        """Work off the first save, once there is one; False: there was none for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed, timeout=_IDLE_S)
            if not self._jobs:
                self._worker = None
                return False
            job = self._jobs[0]
        end = self._run(job)
        if end.error is not None:
            self._fail(job, end.error, heard=end.heard)
        with self._changed:
            self._ended.append((self._jobs.popleft(), end))
            self._changed.notify_all()
        return True

    def _tell(self) -> None:
        """Tell callers how their saves ended.

        In a thread of its own and with no lock held: a callback may take a lock that is held around
        a call which waits for room in the queue, and that is for the worker to make.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._closed, timeout=_IDLE_S)
                self._changed.wait_for(lambda: self._ended or not self._jobs)
                if not self._ended:
                    self._teller = None
                    return
                job, end = self._ended[0]
            what = f"a callback of the save of {job.task.label}"
            watched(partial(job.end, end), what, background=True)
            del job, end  # nothing of it is held while the next one is awaited
            with self._changed:
                self._ended.popleft()
                self._changed.notify_all()

    def _abandon(self, error: BaseException) -> None:
        failure = _as_failure("in the background", error)
        with self._changed:
            jobs = tuple(self._jobs)
            self._ended.extend((job, _End(error=failure)) for job in jobs)
            self._jobs.clear()
            self._failures.append(_Failure(0, failure))
            self._settling = False
            self._worker = None
            self._changed.notify_all()
        for job in jobs:
            job.release()

    def _run(self, job: Job) -> _End:
        """One save to its end; whatever ends it is a value here, for nobody would see it raised."""
        try:
            return self._outcome(job)
        except BaseException as error:  # noqa: BLE001 (the thread must not die in silence)
            return _End(error=_as_failure(job.task.label, error), heard=False)

    def _outcome(self, job: Job) -> _End:
        """What comes of one save; an interrupt is raised."""
        try:
            path = self._save(job)
            return _End(str(Path(self.session.repository.url) / path))
        except CkptError as error:
            return _End(error=_light(error))
        finally:
            job.release()

    def _save(self, job: Job) -> str:
        path = self._commit(job.task)
        if job.task.validate:
            verify(self.session, job.task)
        return path

    def _commit(self, task: SaveTask) -> str:
        again = self.session.config.on_failure is OnFailure.RETRY
        for delay_s in _RETRY_AFTER_S if again else ():
            try:
                return save(self.session, task)
            except CkptError as error:
                if not is_by(error, StorageError, StorageFullError):
                    raise
                _log.warning("save %s failed, again in %g s: %s", task.label, delay_s, error.what)
            time.sleep(delay_s)  # for the storage to come back; only the worker waits
        return save(self.session, task)

    def _fail(self, job: Job, error: CkptError, *, heard: bool) -> None:
        """Agree with the other ranks on the call that raises it: one that none of them has made.

        What "auto" had to learn, on all ranks, is no reason to end a training.
        """
        failure = _Failure(0, error, job.task.label)
        with self._changed:
            self._settling = True
            calls = self._calls
        due, learned = calls + 1, False
        try:
            if heard and is_common(error):
                due, learned = self._agree(job, error, calls)
        except CkptError as lost:
            _log.warning("the ranks could not agree on how to go on from a failure: %s", lost)
        finally:
            goes_on = learned or self.session.config.on_failure is OnFailure.WARN
            with self._changed:
                self._settling = False
                if not goes_on:
                    self._failures.append(replace(failure, call=due))
                self._changed.notify_all()
        if goes_on:
            _log.warning("%s in the background failed, training goes on: %s", failure.save, error)

    def _agree(self, job: Job, error: CkptError, calls: int) -> tuple[int, bool]:
        """The call that raises a failure, and whether all ranks had only to learn from it.

        What moved on any is avoided on each: it would else cost each of them a save.
        """
        moved: JsonValue = None
        if job.task.deferred == "auto" and is_by(error, StateMovedError):
            moved = list[JsonValue](sorted(job.snapshot.moved if job.snapshot else ()))
        session = self.session
        word: JsonValue = {"calls": calls, "moved": moved}
        found = as_dict(
            session.world.agree("failed", word, _how_to_go_on, deadline=session.deadline())
        )
        if found["avoid"] is not None and job.snapshot is not None:
            job.snapshot.avoid([str(key) for key in as_list(found["avoid"])])
        return as_int(found["call"]), found["avoid"] is not None


def _how_to_go_on(said: list[JsonValue]) -> JsonValue:
    words = [as_dict(word) for word in said]
    moved = [word["moved"] for word in words]
    keys = sorted({str(key) for some in moved if some is not None for key in as_list(some)})
    return {
        "call": 1 + max(as_int(word["calls"]) for word in words),
        "avoid": None if None in moved else list[JsonValue](keys),
    }


def _raise(due: list[_Failure], url: str, after: str) -> NoReturn:
    first = due[0]
    what = f"{first.save} in the background to {url} failed"
    first.error.add_note(f"{what[0].upper()}{what[1:]}. {after}")
    for other in due[1:]:
        first.error.add_note(f"After it {other.save} failed: {other.error}")
    raise first.error


def _as_failure(label: str, error: BaseException) -> CkptError:
    failure = CkptError(
        what=f"save {label}: {type(error).__name__}: {error}",
        help="The last committed checkpoint is intact",
    )
    failure.__cause__ = error
    return _light(failure)


def _never() -> bool:
    return False


def _raised(error: CkptError) -> NoReturn:
    raise error


def _light(error: CkptError) -> CkptError:
    """The same error without what its frames hold: the state that was to be saved."""
    seen: set[int] = set()  # as by `raise error from error`
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error
