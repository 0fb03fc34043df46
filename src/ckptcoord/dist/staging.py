"""Who stages the state of background saves, and when (ADR 9)."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.copying import SideStreams
from ckptcoord.dist.deferral import Deferral, Mode, StepHook, Watch, is_deferrable, storage_of
from ckptcoord.dist.snapshot import Leaf, Snapshot, Work
from ckptcoord.dist.stagingpool import ALIGN_BYTES, PAGE_BYTES, StagingPool
from ckptcoord.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.stagingpool import Buffer

__all__ = ["Snapshot", "Stager", "StagingPool"]

_COPYING_THREADS = 4  # at the call; more of them do not copy faster
_LARGE_BYTES = 256 << 10  # of a tensor that begins with a page
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
        probe: see `snapshot.Work`.
    """

    def __init__(
        self,
        components: Sequence[StateComponent],
        pool: StagingPool,
        *,
        deferred: Mode = "auto",
        probe: Callable[[str], None] = _ignore,
    ) -> None:
        self.pool = pool
        self._mode = deferred
        self._probe = probe
        self._deferral = Deferral(components)
        self._unfinished: list[Snapshot] = []
        self._streams: dict[frozenset[int], SideStreams] = {}
        self._jobs: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._helpers: ThreadPoolExecutor | None = None
        self._hook: StepHook | None = None
        self._closed = False
        # A stager that nobody closed takes its thread along. (Not the hook: removing one while an
        # optimizer goes through its hooks would break that step. It does nothing then.)
        weakref.finalize(self, self._jobs.put, None)

    def fits(
        self, held: Mapping[str, CapturedComponent], wanted: Callable[[str, str], bool]
    ) -> bool:
        """Whether the pool's budget has room for this state at all."""
        if self.pool.budget_bytes is None:
            return True
        return self.pool.fits(
            sum(
                _padded(tensor.spec.nbytes)
                for key, captured in held.items()
                for name, tensor in captured.tensors.items()
                if wanted(key, name)
            )
        )

    def take(
        self,
        held: Mapping[str, CapturedComponent],
        wanted: Callable[[str, str], bool],
        digests: Mapping[str, ValidationLevel],
        *,
        deferred: Mode | None = None,
        deadline: Deadline | None = None,
    ) -> Snapshot:
        """Copy the state, or see to it that it is copied before an optimizer steps.

        Args:
            held: the state, live.
            wanted: whether to keep the bytes of a tensor, by its component's key and its name.
            digests: the level at which to take the digest of every tensor of a component, by key.
            deferred: in the place of the stager's.
            deadline: of the wait for room in the pool.

        Raises:
            ClosedError: the stager is closed.
            ConfigError: it does not fit into the pool at all.
            CkptError: there was no room in time.
            MemoryError: the system has no more.
        """
        if self._closed:
            raise ClosedError(thing="stager")
        began_s = time.perf_counter()
        mode = self._mode if deferred is None else deferred
        parts, leaves, size = _lay_out(held, wanted, digests)
        devices = frozenset(
            leaf.value.get_device()
            for leaf in leaves
            if isinstance(leaf.value, torch.Tensor) and leaf.value.is_cuda
        )
        waits_s = time.perf_counter()
        buffer = self.pool.acquire(size, pinned=bool(devices), deadline=deadline)
        waited_s = time.perf_counter() - waits_s
        try:
            snapshot = self._snapshot(parts, leaves, buffer, self._side_streams(devices), mode)
            unfinished = snapshot.start()
        except BaseException:
            buffer.release()
            raise
        if unfinished:
            self._hand_over(snapshot)
        snapshot.waited_s = waited_s
        snapshot.blocked_s += time.perf_counter() - began_s
        return snapshot

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
        parts: Sequence[tuple[CapturedComponent, Sequence[Leaf]]],
        leaves: Sequence[Leaf],
        buffer: Buffer,
        streams: SideStreams,
        mode: Mode,
    ) -> Snapshot:
        watch = self._defer(leaves, mode)
        return Snapshot(
            Work(
                components=parts,
                leaves=leaves,
                buffer=buffer,
                streams=streams,
                watch=watch,
                helpers=self._help,
                caught=self._deferral.caught,
                probe=self._probe,
            )
        )

    def _defer(self, leaves: Sequence[Leaf], mode: Mode) -> Watch | None:
        """Mark what is deferred, and watch it; watch, too, what may be deferred later."""
        owned = self._deferral.owned() if mode else {}
        if not owned:
            return None
        able = [leaf for leaf in leaves if leaf.costly and is_deferrable(leaf.value, owned)]
        chosen = self._deferral.choose([leaf.name for leaf in able], mode)
        tensors, owners, learned = [], [], {}
        for leaf, defer in zip(able, chosen, strict=True):
            leaf.deferred = defer
            assert isinstance(leaf.value, torch.Tensor), "nothing else is deferrable"
            if defer:
                owners.append(owned[storage_of(leaf.value)])
                # Its memory, which stays even where the live tensor gets another.
                leaf.value = leaf.value.detach()
                tensors.append(leaf.value)
            else:
                learned[leaf.name] = leaf.value
        if learned and self._deferral.watch(learned, owned):
            self._set_hook()
        return Watch(tensors, owners) if tensors else None

    def _help(self, task: Callable[[], None]) -> None:
        threads = min(_COPYING_THREADS, torch.get_num_threads()) - 1
        if threads and self._helpers is None:
            self._helpers = ThreadPoolExecutor(threads, "ckptcoord-copying")
        if self._helpers is not None:
            for _ in range(threads):
                self._helpers.submit(task)

    def _hand_over(self, snapshot: Snapshot) -> None:
        self._unfinished = [one for one in self._unfinished if not one.staged.done()]
        self._unfinished.append(snapshot)
        self._set_hook()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve, args=(self._jobs,), name="ckptcoord-staging", daemon=True
            )
            self._thread.start()
        self._jobs.put(snapshot)

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


def _serve(jobs: queue.SimpleQueue[Snapshot | None]) -> None:
    while (snapshot := jobs.get()) is not None:
        snapshot.run()
        del snapshot  # nothing of it is held while the next one is awaited


def _lay_out(
    held: Mapping[str, CapturedComponent],
    wanted: Callable[[str, str], bool],
    digests: Mapping[str, ValidationLevel],
) -> tuple[list[tuple[CapturedComponent, list[Leaf]]], list[Leaf], int]:
    """The tensors by component, those that are kept or digested, and the bytes that these take."""
    parts, concerned = [], []
    for key, captured in held.items():
        level = digests.get(key, ValidationLevel.NONE)
        leaves = [Leaf(key, tensor, level) for tensor in captured.tensors.values()]
        parts.append((replace(captured, tensors={}), leaves))
        for leaf in leaves:
            if wanted(key, leaf.spec.name):
                leaf.offset = 0
            elif not leaf.undigested:
                leaf.value = None
                continue
            concerned.append(leaf)
    return parts, concerned, _place(concerned)


def _place(leaves: Sequence[Leaf]) -> int:
    """Give each that is kept its place, the large ones first; returns the bytes they take."""
    size = 0
    for large in (True, False):
        for leaf in leaves:
            if leaf.offset >= 0 and (leaf.nbytes >= _LARGE_BYTES) is large:
                leaf.offset = size
                size += _padded(leaf.nbytes)
    return size


def _padded(nbytes: int) -> int:
    unit = PAGE_BYTES if nbytes >= _LARGE_BYTES else ALIGN_BYTES
    return -(-nbytes // unit) * unit
