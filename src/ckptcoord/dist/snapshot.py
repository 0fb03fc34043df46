"""The state of one call, as copies: some made at the call, the others before the next step."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.capture import CapturedComponent, CapturedTensor
from ckptcoord.dist.copying import SideStreams, copy_flat, copy_whole, is_flat
from ckptcoord.dist.replication import tensor_digest
from ckptcoord.errors import ClosedError, StateMovedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.deferral import Watch
    from ckptcoord.dist.stagingpool import Buffer
    from ckptcoord.repo.shards import TensorSpec

PIECE_BYTES = 16 << 20
"""Of a deferred copy: what a step waits for at most of what another thread has begun."""


class StagedTensor(CapturedTensor):
    """A tensor in a buffer. Once that was released, it raises ClosedError when it is read."""

    __slots__ = ("_buffer", "_dtype", "_offset")
    _buffer: Buffer
    _dtype: torch.dtype | np.dtype
    _offset: int

    def __init__(self, leaf: Leaf, buffer: Buffer) -> None:
        for name, value in (
            *(("spec", leaf.spec), ("digest", leaf.digest)),
            *(("_buffer", buffer), ("_dtype", leaf.dtype), ("_offset", leaf.offset)),
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
        component: its component's key.
        spec: what it is.
        dtype: torch's or numpy's.
        value: the live one, for as long as it is needed.
        nbytes: its size.
        offset: of its copy in the buffer; negative: it is not kept.
        deferred: whether it is copied after the call.
        address: of its first byte at the call, where it is deferred.
        level: at which its digest is to be taken; NONE: it is not.
        digest: its digest, once taken.
    """

    __slots__ = (
        *("address", "component", "deferred", "digest", "dtype"),
        *("level", "nbytes", "offset", "spec", "value"),
    )

    def __init__(self, component: str, captured: CapturedTensor, level: ValidationLevel) -> None:
        value = captured.value
        self.component = component
        self.spec: TensorSpec = captured.spec
        self.value = value
        self.nbytes = 0 if value is None else value.nbytes
        self.dtype = None if value is None else value.dtype
        self.offset = -1
        self.deferred = False
        self.address = 0
        self.level = level
        self.digest = captured.digest

    @property
    def name(self) -> tuple[str, str]:
        """The component's key and the tensor's name."""
        return self.component, self.spec.name

    @property
    def undigested(self) -> bool:
        """Whether its digest is still to be taken."""
        return self.digest is None and self.level is not ValidationLevel.NONE

    @property
    def costly(self) -> bool:
        """Whether what is asked of it takes long: all of it must be read."""
        return self.offset >= 0 or self.level in (ValidationLevel.TENSOR, ValidationLevel.FULL)

    @property
    def digested_live(self) -> bool:
        """Whether its digest must be of the live tensor: there is no copy, or a device is fast."""
        if self.level is ValidationLevel.NONE:
            return False
        on_device = isinstance(self.value, torch.Tensor) and self.value.device.type != "cpu"
        return self.offset < 0 or (on_device and self.level is ValidationLevel.TENSOR)

    def take_digest(self, value: torch.Tensor | np.ndarray | None = None) -> None:
        """Take the digest of its live value, or of this one."""
        value = self.value if value is None else value
        self.digest = tensor_digest(CapturedTensor(spec=self.spec, value=value), self.level)

    def copy_now(self, buffer: Buffer) -> None:
        """Copy it in the calling thread."""
        value = self.value
        if isinstance(value, torch.Tensor) and is_flat(value):
            copy_flat(buffer, self.offset, value, (0, self.nbytes), parallel=True)
        elif value is not None:
            copy_whole(buffer, self.offset, value)

    def captured(self, buffer: Buffer) -> CapturedTensor:
        """It, as it is staged."""
        if self.offset < 0:
            return CapturedTensor(spec=self.spec, value=None, digest=self.digest)
        return StagedTensor(self, buffer)


_Piece: TypeAlias = "tuple[Leaf, int, int]"  # a range of its bytes, to copy; (0, 0): all of it


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """What a snapshot is made of.

    Attributes:
        components: with their documents, and the tensors of each, in order.
        leaves: those tensors that are kept or digested.
        buffer: for the copies.
        streams: for copies from devices.
        watch: of the deferred leaves, in order; None: there are none.
        caught: told which leaves moved.
        probe: called with "copy" before each piece of a deferred copy, in the thread that makes it;
            for tests and tracing.
    """

    components: Sequence[tuple[StateComponent, bytes, Sequence[Leaf]]]
    leaves: Sequence[Leaf]
    buffer: Buffer
    streams: SideStreams
    watch: Watch | None
    caught: Callable[[Iterable[tuple[str, str]]], None]
    probe: Callable[[str], None]
    deferred: list[Leaf] = field(init=False)

    def __post_init__(self) -> None:
        self.deferred = [leaf for leaf in self.leaves if leaf.deferred]


class Snapshot:
    """One save's staged state on one rank.

    What is not copied at the call is copied by whichever thread claims a piece first: the staging
    thread, or the one that is about to step (`finish`). When all pieces are copied, whoever comes
    first looks whether the tensors kept still, before it lets them change.

    Attributes:
        staged: done when every copy is made and every digest taken; or why there are none.
        blocked_s: what the training thread has spent on it so far.
        waited_s: the part of it that was waiting for room.
    """

    def __init__(self, work: Work) -> None:
        self.staged: Future[None] = Future()
        self.staged.set_running_or_notify_cancel()  # nobody cancels it
        self.blocked_s = 0.0
        self.waited_s = 0.0
        self._work = work
        self._buffer = work.buffer
        self._batches = _batches(work.deferred)
        self._next = 0
        self._users = 0  # threads that read or write the buffer
        self._released = False
        self._failure: BaseException | None = None
        self._looked = False
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._copied = threading.Event()  # no live tensor will be read for a copy from here on

    # --- the training thread ---------------------------------------------------------------------

    def start(self) -> bool:
        """Copy what is not deferred; returns whether the rest is left to `run`."""
        work = self._work
        work.streams.fork()
        try:
            with torch.no_grad(), work.streams.entered():
                for leaf in work.leaves:
                    self._start(leaf)
        except BaseException:
            work.streams.drain()  # the buffer will be given back
            raise
        work.streams.join()
        with self._lock:
            self._check_copied()
        if work.deferred or work.streams or any(leaf.undigested for leaf in work.leaves):
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
            self._copy(parallel=True)
            self._copied.wait()
            self._look()
            self._work.streams.join()
        except Exception as error:  # noqa: BLE001 (training must not fail for it; the save does)
            self._fail(error)
        self.blocked_s += time.perf_counter() - began_s

    # --- the staging thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Do all that is left. Like `finish`, it raises nothing."""
        try:
            self._copy(parallel=False)
            self._copied.wait()
            self._work.streams.drain()
            self._look()
            with self._work.streams.entered():
                self._conclude()
        except BaseException as error:  # noqa: BLE001 (the thread serves the next snapshot)
            self._fail(error)
        self._end()

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
        return {
            component.key: CapturedComponent(
                component=component,
                document=document,
                tensors={leaf.spec.name: leaf.captured(self._buffer) for leaf in leaves},
            )
            for component, document, leaves in self._work.components
        }

    def release(self) -> None:
        """Give the buffer back, as soon as no thread uses it any more; again: nothing.

        What is not copied yet will not be: `staged` then raises ClosedError.
        """
        with self._lock:
            self._released = True
            self._check_copied()
            self._give_back()

    def _start(self, leaf: Leaf) -> None:
        if leaf.deferred:
            leaf.address = _address(leaf)
        elif leaf.offset >= 0:
            leaf.copy_now(self._buffer)
        if leaf.digested_live and not (leaf.deferred and leaf.costly):
            leaf.take_digest()

    # --- the copies ------------------------------------------------------------------------------

    def _copy(self, *, parallel: bool) -> None:
        while (batch := self._claim()) is not None:
            try:
                self._work.probe("copy")
                with torch.no_grad(), self._work.streams.entered():
                    for leaf, start, stop in batch:
                        self._copy_piece(leaf, start, stop, parallel=parallel)
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._leave()

    def _copy_piece(self, leaf: Leaf, start: int, stop: int, *, parallel: bool) -> None:
        value = leaf.value
        if not isinstance(value, torch.Tensor) or _address(leaf) != leaf.address:
            return  # its memory has gone, which `_look` will find
        if leaf.offset >= 0 and stop:
            copy_flat(self._buffer, leaf.offset, value, (start, stop), parallel=parallel)
        elif leaf.offset >= 0:
            copy_whole(self._buffer, leaf.offset, value)
        if leaf.digested_live and leaf.undigested:
            leaf.take_digest()

    def _look(self) -> None:
        """See whether the deferred tensors kept still, now that they are copied; once."""
        with self._looking:
            if self._looked or self._failure is not None or self._released:
                return
            self._looked = True
            if self._work.watch is not None:
                with self._work.streams.entered():
                    self._work.watch.look()

    def _conclude(self) -> None:
        """Compare copies and samples, and take the digests that the copies are good for."""
        if not self._enter():
            return
        try:
            self._check_still()
            for leaf in self._work.leaves:
                if leaf.undigested:
                    leaf.take_digest(StagedTensor(leaf, self._buffer).value)
        finally:
            self._leave()

    def _check_still(self) -> None:
        watch, deferred = self._work.watch, self._work.deferred
        if watch is None:
            return
        indices = watch.moved() | watch.differing(self._buffer, [leaf.offset for leaf in deferred])
        if indices:
            moved = [deferred[index].name for index in sorted(indices)]
            self._work.caught(moved)
            raise StateMovedError(component=moved[0][0], tensors=tuple(map(".".join, moved)))

    # --- who uses the buffer ---------------------------------------------------------------------

    def _claim(self) -> Sequence[_Piece] | None:
        with self._lock:
            if not self._has_more():
                return None
            self._next += 1
            self._users += 1
            return self._batches[self._next - 1]

    def _enter(self) -> bool:
        with self._lock:
            if self._released or self._failure is not None:
                return False
            self._users += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._check_copied()
            self._give_back()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._check_copied()

    def _has_more(self) -> bool:
        whole = not self._released and self._failure is None
        return whole and self._next < len(self._batches)

    def _check_copied(self) -> None:
        if not self._users and not self._has_more():
            self._copied.set()

    def _give_back(self) -> None:
        # Not before the end: a device may still be copying.
        if self._released and not self._users and self.staged.done():
            self._buffer.release()

    def _end(self) -> None:
        """Nothing of the live state is held from here on."""
        work = self._work
        with self._looking:
            if work.watch is not None:
                work.watch.let_go()
        for leaf in work.leaves:
            leaf.value = None
        with self._lock:
            failure = self._failure
            if failure is None and self._released:
                failure = ClosedError(thing="snapshot")
        if failure is None:
            self.staged.set_result(None)
        else:
            self.staged.set_exception(failure)
        with self._lock:
            self._give_back()


def _address(leaf: Leaf) -> int:
    return leaf.value.data_ptr() if isinstance(leaf.value, torch.Tensor) else 0


def _batches(leaves: Iterable[Leaf]) -> list[Sequence[_Piece]]:
    """Pieces of deferred copies, about PIECE_BYTES together."""
    batches: list[Sequence[_Piece]] = []
    batch: list[_Piece] = []
    room = PIECE_BYTES
    for leaf in leaves:
        for piece in _pieces(leaf):
            batch.append(piece)
            room -= leaf.nbytes if not piece[2] else piece[2] - piece[1]
            if room <= 0:
                batches.append(batch)
                batch, room = [], PIECE_BYTES
    if batch:
        batches.append(batch)
    return batches


def _pieces(leaf: Leaf) -> Iterable[_Piece]:
    flat = isinstance(leaf.value, torch.Tensor) and is_flat(leaf.value)
    if leaf.offset < 0 or leaf.digested_live or not flat:
        return [(leaf, 0, 0)]
    return [
        (leaf, start, min(start + PIECE_BYTES, leaf.nbytes))
        for start in range(0, leaf.nbytes, PIECE_BYTES)
    ]
