"""The state of one call, as copies: some made at the call, the others before the next step."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.capture import CapturedComponent, CapturedTensor
from ckptcoord.dist.copying import SideStreams, copy_flat, copy_whole, is_flat
from ckptcoord.dist.outcomes import is_failure
from ckptcoord.dist.pieces import Pieces
from ckptcoord.dist.replication import tensor_digest
from ckptcoord.errors import CkptError, ClosedError, StateMovedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import numpy as np

    from ckptcoord.dist.deferral import Name, Watch
    from ckptcoord.dist.schedule import Schedule
    from ckptcoord.dist.staginglayout import Place, StagingLayout
    from ckptcoord.dist.stagingpool import Buffer

PIECE_BYTES = 8 << 20
"""Of a copy: what a step waits for at most of what another thread has begun."""
_log = logging.getLogger("ckptcoord")


class StagedTensor(CapturedTensor):
    """A tensor in a buffer. Once that was released, it raises ClosedError when it is read."""

    __slots__ = ("_buffer", "_dtype", "_offset")
    _buffer: Buffer
    _dtype: torch.dtype | np.dtype
    _offset: int

    def __init__(self, leaf: Leaf, buffer: Buffer) -> None:
        place = leaf.place
        for name, value in (
            *(("spec", place.spec), ("digest", leaf.digest)),
            *(("_buffer", buffer), ("_dtype", place.dtype), ("_offset", place.offset)),
        ):
            object.__setattr__(self, name, value)

    @property
    def value(self) -> torch.Tensor | np.ndarray:
        """A view of the buffer."""
        start, stop = self._offset, self._offset + self.spec.nbytes
        if isinstance(self._dtype, torch.dtype):
            return self._buffer.tensor[start:stop].view(self._dtype).view(self.spec.shape)
        return self._buffer.array[start:stop].view(self._dtype).reshape(self.spec.shape)

    def read(self) -> np.ndarray:
        """Its bytes, 1-D uint8, row-major; a view of the buffer."""
        return self._buffer.array[self._offset : self._offset + self.spec.nbytes]


class Leaf:
    """One tensor of a snapshot.

    Attributes:
        place: what is to become of it.
        value: the live one, for as long as it is needed.
        deferred: whether it is copied after the call.
        address: of its first byte at the call, where it is deferred.
        digest: its digest, once taken.
    """

    __slots__ = ("address", "deferred", "digest", "place", "value")

    def __init__(self, place: Place, value: torch.Tensor | np.ndarray | None) -> None:
        self.place = place
        self.value = value
        self.deferred = False
        self.address = 0
        self.digest: bytes | None = None

    def defer(self, value: torch.Tensor) -> None:
        """It will be copied after the call, from here."""
        self.value = value
        self.deferred = True
        self.address = value.data_ptr()

    @property
    def undigested(self) -> bool:
        """Whether its digest is still to be taken."""
        return self.digest is None and self.place.level is not ValidationLevel.NONE

    def take_digest(self, value: torch.Tensor | np.ndarray | None = None) -> None:
        """Take the digest of its live value, or of this one."""
        value = self.value if value is None else value
        captured = CapturedTensor(spec=self.place.spec, value=value)
        self.digest = tensor_digest(captured, self.place.level)

    def copy(self, buffer: Buffer, span: tuple[int, int] | None = None) -> None:
        """Copy its bytes; a part of them, if it is flat."""
        value, offset = self.value, self.place.offset
        if isinstance(value, torch.Tensor) and is_flat(value):
            copy_flat(buffer, offset, value, span or (0, self.place.nbytes))
        elif value is not None:
            copy_whole(buffer, offset, value)

    def captured(self, buffer: Buffer) -> CapturedTensor:
        """It, as it is staged."""
        if self.place.offset < 0:
            return CapturedTensor(spec=self.place.spec, value=None, digest=self.digest)
        return StagedTensor(self, buffer)


_Piece: TypeAlias = "tuple[Leaf, tuple[int, int]]"  # and a range of its bytes


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """What a snapshot is made of.

    Attributes:
        components: without their tensors.
        layout: of all tensors.
        schedule: what is to be done with them when.
        leaves: the tensors at work, by their rows.
        buffer: for the copies.
        streams: for copies from devices.
        watch: of the deferred leaves, in order; None: there are none.
        helpers: runs a function in other threads as well, if any start, without waiting for them.
        avoid: has later snapshots copy components at the call.
        learns: whether they do.
        probe: called with "copy" before each piece of a deferred copy, in the thread that makes it;
            for tests and tracing.
    """

    components: Sequence[CapturedComponent]
    layout: StagingLayout
    schedule: Schedule
    leaves: dict[int, Leaf]
    buffer: Buffer
    streams: SideStreams
    watch: Watch | None
    helpers: Callable[[Callable[[], None]], None]
    avoid: Callable[[Collection[str]], None]
    learns: bool
    probe: Callable[[str], None]


class Snapshot:
    """One save's staged state on one rank.

    What is not copied at the call is copied by whichever thread claims a piece first: the staging
    thread, or the one that is about to step (`finish`). When all pieces are copied, whoever comes
    first looks whether the tensors kept still, before it lets them change.

    Attributes:
        staged: done when every copy is made and every digest taken; or why there are none.
        blocked_s: what the training thread has spent on it so far.
        waited_s: the part of it that was waiting for room.
        moved: keys of components that changed before they were copied.
    """

    def __init__(self, work: Work) -> None:
        self.staged: Future[None] = Future()
        self.staged.set_running_or_notify_cancel()  # nobody cancels it
        self.blocked_s = 0.0
        self.waited_s = 0.0
        self.moved: frozenset[str] = frozenset()
        self._work = work
        self._buffer = work.buffer
        self._later = Pieces(_batches([work.leaves[row] for row in work.schedule.deferred]))
        self._failure: BaseException | None = None
        self._looked = False
        self._looking = threading.Lock()
        self._released = False
        self._releasing = threading.Lock()

    # --- the training thread ---------------------------------------------------------------------

    def start(self) -> bool:
        """Copy what is not deferred; returns whether the rest is left to `run`.

        Raises:
            MemoryError: and whatever else keeps a tensor from being read.
        """
        work = self._work
        work.streams.fork()
        try:
            with torch.no_grad(), work.streams.entered():
                self._copy_now()
        except BaseException:
            work.streams.drain()  # the buffer will be given back
            raise
        work.streams.join()
        if work.watch or work.streams or work.layout.digested:
            return True
        self._end()
        return False

    def finish(self) -> None:
        """Take part in the copies that are left and wait for them: the state is about to change.

        It raises nothing: what fails is in `staged`. Again: nothing.
        """
        if self.staged.done():
            return
        began_s = time.perf_counter()
        try:
            self._later.work(self._copy)
            self._later.wait()
            self._look()
            self._work.streams.join()
        except BaseException as error:
            if not is_failure(error):
                raise
            self._failure = self._failure or error  # the save fails of it, not the training
        self.blocked_s += time.perf_counter() - began_s

    # --- the staging thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Do all that is left. Like `finish`, it raises nothing."""
        try:
            self._later.work(self._copy)
            self._later.wait()
            self._work.streams.drain()
            self._look()
            self._conclude()
        except BaseException as error:  # noqa: BLE001 (the thread serves the next snapshot)
            self._failure = self._failure or error
        try:
            self._end()
        except BaseException:  # noqa: BLE001 (it ends its callback, as an Exception does)
            _log.exception("a callback of PendingSave.staged failed")

    # --- the save --------------------------------------------------------------------------------

    def components(self) -> dict[str, CapturedComponent]:
        """The state at the call, once it is staged; what was not to be kept has no value.

        Raises:
            StateMovedError: some of it changed before it was copied.
            ClosedError: it was released.
            MemoryError: a copy could not be made.
        """
        self.staged.result()
        _ = self._buffer.address  # raises where it was released
        rows = itertools.count()
        found = {}
        for captured, places in zip(self._work.components, self._work.layout.parts, strict=True):
            tensors = {
                place.spec.name: (
                    self._leaf(next(rows)).captured(self._buffer)
                    if place.concerned
                    else CapturedTensor(spec=place.spec, value=None)
                )
                for place in places
            }
            found[captured.component.key] = replace(captured, tensors=tensors)
        return found

    def release(self) -> None:
        """Give the buffer back, as soon as no thread uses it any more; again: nothing.

        What is not copied yet will not be: `staged` then raises ClosedError.
        """
        with self._releasing:
            self._released = True
            if self.staged.done():
                self._buffer.release()
        self._later.stop()

    # --- how -------------------------------------------------------------------------------------

    def _copy_now(self) -> None:
        """Large copies are begun in other threads first, and go on beside all else."""
        schedule = self._work.schedule
        pieces = Pieces(_batches([self._work.leaves[row] for row in schedule.shared]))
        try:
            if schedule.shared:
                self._work.helpers(lambda: pieces.work(self._copy_batch))
            self._copy_alone()
            pieces.work(self._copy_batch)
            pieces.wait()
        except BaseException:  # also an interrupt of the wait: the buffer will be given back
            pieces.stop()
            pieces.wait()
            raise
        if pieces.failure is not None:
            raise pieces.failure

    def _copy_alone(self) -> None:
        """What only this thread copies, and the digests of live tensors."""
        work, leaves, schedule = self._work, self._work.leaves, self._work.schedule
        schedule.small.make(work.buffer)
        for row in schedule.single:
            leaves[row].copy(work.buffer)
        for row in schedule.digested:
            leaves[row].take_digest()

    def _copy(self, batch: Sequence[_Piece]) -> None:
        self._work.probe("copy")
        with torch.no_grad(), self._work.streams.entered():
            self._copy_batch(batch)

    def _copy_batch(self, batch: Sequence[_Piece]) -> None:
        for leaf, span in batch:
            if leaf.deferred and _address(leaf) != leaf.address:
                continue  # its memory has gone, which `_look` will find
            if leaf.place.offset >= 0:
                leaf.copy(self._buffer, span)
            if leaf.deferred and leaf.place.digested_live and leaf.undigested:
                leaf.take_digest()

    def _look(self) -> None:
        """See whether the deferred tensors kept still, now that they are copied; once."""
        with self._looking:
            if self._looked or self._later.failure is not None or self._released:
                return
            self._looked = True
            if self._work.watch is not None:
                with self._work.streams.entered():
                    self._work.watch.look()

    def _conclude(self) -> None:
        """Compare samples with what they were, and take the digests that the copies serve for."""
        if self._later.failure is not None:
            raise self._later.failure
        if self._released:
            raise ClosedError(thing="snapshot")
        work = self._work
        if work.watch is not None:
            deferred = [work.layout.places[row] for row in work.schedule.deferred]
            with work.streams.entered():
                moved = work.watch.moved()
            moved |= work.watch.differing(self._buffer, [place.offset for place in deferred])
            self._refuse([deferred[index].name for index in sorted(moved)])
        for row in range(len(work.layout.places) if work.layout.digested else 0):
            leaf = self._leaf(row)
            if leaf.undigested:
                leaf.take_digest(StagedTensor(leaf, self._buffer).value)

    def _leaf(self, row: int) -> Leaf:
        """Also one that was copied without."""
        leaves = self._work.leaves
        if row not in leaves:
            leaves[row] = Leaf(self._work.layout.places[row], None)
        return leaves[row]

    def _refuse(self, moved: Sequence[Name]) -> None:
        if moved:
            self.moved = frozenset(key for key, _ in moved)
            if self._work.learns:
                self.avoid(self.moved)
            names = tuple(map(".".join, moved))
            raise StateMovedError(component=moved[0][0], tensors=names, learned=self._work.learns)

    def avoid(self, keys: Collection[str]) -> None:
        """Later snapshots copy these components at the call, where it is learned what to defer."""
        self._work.avoid(keys)

    def _end(self) -> None:
        """Nothing of the live state is held, and no thread writes into the buffer, from here on."""
        self._later.stop()
        self._later.wait()
        with self._looking:
            if self._work.watch is not None:
                self._work.watch.let_go()
        for leaf in self._work.leaves.values():
            leaf.value = None
        try:
            self._tell()
        finally:
            with self._releasing:
                if self._released:
                    self._buffer.release()

    def _tell(self) -> None:
        """Runs callbacks."""
        if self._failure is None:
            self.staged.set_result(None)
        elif isinstance(self._failure, Exception):
            self.staged.set_exception(self._failure)
        else:  # as by Ctrl-C, which ends the thread it came to; the save is to hear of it in words
            failure = CkptError(what=f"copying was interrupted: {self._failure!r}")
            self.staged.set_exception(failure)


def _address(leaf: Leaf) -> int:
    return leaf.value.data_ptr() if isinstance(leaf.value, torch.Tensor) else 0


def _batches(leaves: Iterable[Leaf]) -> list[Sequence[_Piece]]:
    """Pieces of about PIECE_BYTES together."""
    batches: list[Sequence[_Piece]] = []
    batch: list[_Piece] = []
    room = PIECE_BYTES
    for leaf in leaves:
        for start, stop in _spans(leaf):
            batch.append((leaf, (start, stop)))
            room -= stop - start
            if room <= 0:
                batches.append(batch)
                batch, room = [], PIECE_BYTES
    if batch:
        batches.append(batch)
    return batches


def _spans(leaf: Leaf) -> list[tuple[int, int]]:
    """What of a tensor may be copied at a time: all, where its bytes are not as they are stored."""
    place = leaf.place
    if place.nbytes <= PIECE_BYTES or place.offset < 0 or not place.flat:
        return [(0, place.nbytes)]
    return [
        (start, min(start + PIECE_BYTES, place.nbytes))
        for start in range(0, place.nbytes, PIECE_BYTES)
    ]
