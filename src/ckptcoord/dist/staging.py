"""Who stages the state of background saves, and when (ADR 9)."""

from __future__ import annotations

import logging
import queue
import time
import weakref
from threading import current_thread
from typing import TYPE_CHECKING

import torch

from ckptcoord.dist.copying import SideStreams
from ckptcoord.dist.deferral import Deferral, Mode, Owned, StepHook, Watch
from ckptcoord.dist.niceness import be_nice
from ckptcoord.dist.schedule import Live, Schedule, tensors_of
from ckptcoord.dist.snapshot import Leaf, Snapshot, Work
from ckptcoord.dist.staginglayout import StagingLayout, Wanted, bare, padded
from ckptcoord.dist.stagingpool import StagingPool
from ckptcoord.errors import ClosedError, ThreadLimitError
from ckptcoord.repo.threads import Threads, started

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from threading import Thread

    from ckptcoord.core.sharing import StateComponent, ValidationLevel
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.stagingpool import Buffer

__all__ = ["Snapshot", "Stager", "StagingPool"]

_COPYING_THREADS = 4  # at the call; more of them do not copy faster
_log = logging.getLogger("ckptcoord")


def _ignore(step: str) -> None:
    """The default probe."""


class Stager:
    """Takes snapshots; owns the staging thread and the hook before optimizers' steps.

    The thread starts, and the hook is set, when a snapshot first needs them.

    Args:
        components: as declared; what their optimizers own may be deferred.
        pool: gives the buffers; it is not closed with the stager.
        deferred: whether to copy that after the call; "auto": what was seen to keep still.
        niceness: added to that of the staging thread.
        threads: that copy at the call; more where torch computes with more, but four at most.
        probe: see `snapshot.Work`.
    """

    def __init__(
        self,
        components: Sequence[StateComponent],
        pool: StagingPool,
        *,
        deferred: Mode = "auto",
        niceness: int = 0,
        threads: int = 1,
        probe: Callable[[str], None] = _ignore,
    ) -> None:
        self.pool = pool
        self._mode = deferred
        self._niceness = niceness
        self._threads = threads
        self._probe = probe
        self._deferral = Deferral(components)
        self._layout = StagingLayout({}, {}, {})
        self._schedule = Schedule(self._layout, [], [], None, chosen=False)
        self._unfinished: list[Snapshot] = []
        self._streams: dict[frozenset[int], SideStreams] = {}
        self._jobs: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._thread: Thread | None = None
        self._helpers: Threads | None = None
        self._hook: StepHook | None = None
        self._closed = False
        # A stager that nobody closed takes its thread along. (Not the hook: removing one while an
        # optimizer goes through its hooks would break that step. It does nothing then.)
        weakref.finalize(self, self._jobs.put, None)

    def fits(self, held: Mapping[str, CapturedComponent], wanted: Wanted) -> bool:
        """Whether the pool's budget has room for this state at all."""
        if self.pool.budget_bytes is None:
            return True
        return self.pool.fits(
            sum(
                padded(tensor.spec.nbytes)
                for key, captured in held.items()
                for name, tensor in captured.tensors.items()
                if name in wanted[key]
            )
        )

    def take(
        self,
        held: Mapping[str, CapturedComponent],
        wanted: Wanted,
        digests: Mapping[str, ValidationLevel],
        *,
        deferred: Mode | None = None,
        deadline: Deadline | None = None,
    ) -> Snapshot:
        """Copy the state, or see to it that it is copied before an optimizer steps.

        Args:
            held: the state, live.
            wanted: the names of the tensors whose bytes to keep.
            digests: the level at which to take the digest of every tensor of a component, by key.
            deferred: in the place of the stager's.
            deadline: of the wait for room in the pool.

        Raises:
            ClosedError: the stager is closed.
            ConfigError: it does not fit into the pool at all.
            CkptError: there was no room in time.
            MemoryError: the system has no more.
            ThreadLimitError: the staging thread could not start; the next call tries again.
        """
        if self._closed:
            raise ClosedError(thing="stager")
        began_s = time.perf_counter()
        mode = self._mode if deferred is None else deferred
        if not self._layout.is_of(held, wanted, digests):
            self._layout = StagingLayout(held, wanted, digests)
        layout = self._layout
        streams = self._side_streams(layout.devices)
        waits_s = time.perf_counter()
        buffer = self.pool.acquire(layout.size, pinned=bool(streams), deadline=deadline)
        waited_s = time.perf_counter() - waits_s
        try:
            snapshot = self._snapshot(held, layout, buffer, streams, mode)
            unfinished = snapshot.start()
        except BaseException:
            buffer.release()
            raise
        if unfinished:
            self._hand_over(snapshot)
        snapshot.waited_s = waited_s
        snapshot.blocked_s += time.perf_counter() - began_s
        return snapshot

    def is_own_thread(self) -> bool:
        """Whether the calling thread is the staging thread."""
        return current_thread() is self._thread

    def forget(self) -> None:
        """What "auto" is watching was meant to change, as by a load: learn nothing from it."""
        self._deferral.forget()

    def close(self) -> None:
        """Finish what was taken; remove the hook, end the thread. Again: nothing."""
        self._closed = True
        if self._hook is not None:
            self._hook.remove()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._helpers is not None:
            self._helpers.shutdown()
        self._deferral.forget()
        self._unfinished.clear()

    def _snapshot(
        self,
        held: Mapping[str, CapturedComponent],
        layout: StagingLayout,
        buffer: Buffer,
        streams: SideStreams,
        mode: Mode,
    ) -> Snapshot:
        live, addresses = layout.live(held), layout.addresses(held)
        owned = self._deferral.owned() if mode else None
        chosen = self._deferral.choice(mode)
        if not self._schedule.is_of(layout, live, addresses, owned, chosen):
            self._schedule = Schedule(layout, live, addresses, owned, chosen)
        schedule = self._schedule
        leaves = {row: Leaf(layout.places[row], live[row]) for row in schedule.busy}
        return Snapshot(
            Work(
                components=bare(held),
                layout=layout,
                schedule=schedule,
                leaves=leaves,
                buffer=buffer,
                streams=streams,
                watch=None if owned is None else self._watch(schedule, live, leaves, owned),
                helpers=self._help,
                avoid=self._deferral.avoid,
                learns=mode == "auto",
                probe=self._probe,
            )
        )

    def _watch(
        self, schedule: Schedule, live: Live, leaves: Mapping[int, Leaf], owned: Owned
    ) -> Watch | None:
        """Watch what is deferred; watch, too, what may be deferred later."""
        learned = tensors_of(live, schedule.learned)
        if learned:
            names = [leaves[row].place.name for row in schedule.learned]
            if self._deferral.watch(dict(zip(names, learned, strict=True)), owned):
                self._set_hook()
        if not schedule.deferred:
            return None
        # Tensors of our own, which stay where they are even where the trainer's get other memory.
        tensors = list(map(torch.Tensor.detach, tensors_of(live, schedule.deferred)))
        for row, tensor in zip(schedule.deferred, tensors, strict=True):
            leaves[row].defer(tensor)
        owners = [owned.tensors[row] for row in schedule.owners]
        return Watch(tensors, owners, schedule.owner_of, schedule.sampling)

    def _help(self, task: Callable[[], None]) -> None:
        # torchrun lets a rank compute with one thread: the slowest of the ranks would copy with it
        # alone, and with half of the memory's speed, when the others have finished.
        threads = min(_COPYING_THREADS, max(self._threads, torch.get_num_threads())) - 1
        if not threads:
            return
        if self._helpers is None:
            self._helpers = Threads(threads, "ckptcoord-copying")
        try:
            for _ in range(threads):
                self._helpers.submit(task)
        except ThreadLimitError as error:
            _log.warning("%s; those that there are copy alone", error.what)
            # Not kept: what it could not begin would wait in it. The next call makes another.
            self._helpers.shutdown(wait=False, cancel_futures=True)
            self._helpers = None

    def _hand_over(self, snapshot: Snapshot) -> None:
        try:
            self._start_thread()
        except BaseException:
            snapshot.release()
            snapshot.run()  # nobody else will
            raise
        self._unfinished = [one for one in self._unfinished if not one.staged.done()]
        self._unfinished.append(snapshot)
        self._set_hook()
        self._jobs.put(snapshot)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = started(_serve, "ckptcoord-staging", self._jobs, self._niceness)

    def _set_hook(self) -> None:
        if self._hook is None:
            self._hook = StepHook(self._before_step)

    def _before_step(self) -> None:
        for snapshot in self._unfinished:
            snapshot.finish()
        self._unfinished = [one for one in self._unfinished if not one.staged.done()]
        try:
            self._deferral.learn()
        except Exception:  # noqa: BLE001
            # Training goes on without what could be learned here.
            _log.exception("what keeps still until the optimizer's step could not be seen")

    def _side_streams(self, devices: frozenset[int]) -> SideStreams:
        return self._streams.setdefault(devices, SideStreams(devices))


def _serve(jobs: queue.SimpleQueue[Snapshot | None], niceness: int) -> None:
    be_nice(niceness)
    while (snapshot := jobs.get()) is not None:
        snapshot.run()
        del snapshot  # nothing of it is held while the next one is awaited
