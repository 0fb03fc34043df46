"""Read, check and fill many tensors in a few threads."""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ckptcoord.codec.digest import XXH3_BYTES, Hasher, xxh3
from ckptcoord.codec.tensorfile import (
    TensorEntry,
)
from ckptcoord.repo.readers import Input, Out, Proof, TensorReader, check_fits
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


_T = TypeVar("_T")

ReadJob: TypeAlias = tuple[TensorReader, TensorEntry, Out]


def read_tensors(jobs: Iterable[ReadJob], *, threads: int) -> None:
    """Read tensors in `threads` threads, the largest first; none is left running at the end.

    Raises:
        CorruptError, StorageError: the first failure; what was not begun by then is left out.
    """
    fill_tensors(((job, None) for job in jobs), threads=threads)


def check_tensors(jobs: Iterable[ReadJob], *, threads: int) -> None:
    """Check tensors without touching the memory that they are for.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    by_size = sorted(jobs, key=lambda job: -job[1].spec.nbytes)
    _in_threads(lambda job: job[0].examine(job[1]), by_size, threads)


def check_inputs(
    jobs: Iterable[ReadJob], known: dict[tuple[str, str], Proof], *, threads: int
) -> list[Proof]:
    """Check all that tensors are read from, and touch no memory that they are for.

    Args:
        jobs: what will be read.
        known: by an input's key, what was checked already; what is checked here is added.
        threads: that check.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    jobs = list(jobs)
    new: dict[tuple[str, str], Input] = {}
    for reader, entry, _ in jobs:
        for one in reader.inputs(entry):
            if one.key not in known and (one.proves or one.key not in new):
                new[one.key] = one

    def check(one: Input) -> None:
        known[one.key] = one.check(one.entry)

    by_size = sorted(new.values(), key=lambda one: one.entry.begin - one.entry.end)
    _in_threads(check, by_size, threads)
    homes = (reader.home(entry) for reader, entry, _ in jobs)
    return [known.get((reader.path, entry.spec.name)) for reader, entry in homes]


def fill_tensors(proven: Iterable[tuple[ReadJob, Proof]], *, threads: int) -> None:
    """Read tensors whose inputs `check_inputs` found sound into their memory.

    Raises:
        CorruptError, StorageError: the first failure; some memory is filled then, some is not.
    """
    steps: list[Callable[[], None]] = []
    for job, proof in sorted(proven, key=lambda one: _largest_first(one[0])):
        reader, entry, out = job
        shares = reader.slow and out.nbytes > reader.part_bytes and reader.home(entry)[0] is reader
        if shares and isinstance(out, memoryview):
            steps += _Shared(reader, entry, out, proof).steps()
        else:
            steps.append(partial(reader.fill, entry, out, proof))
    _in_threads(lambda step: step(), steps, threads)


class _Shared:
    """A tensor that several threads fill.

    Each part is held to its fingerprint in the proof. Without one, the bytes are hashed in order,
    by one thread at a time.
    """

    def __init__(
        self, reader: TensorReader, entry: TensorEntry, out: memoryview, proof: Proof
    ) -> None:
        check_fits(entry, out)
        self._proof = proof
        self._reader = reader
        self._entry = entry
        self._out = out
        self._hasher = Hasher()
        self._lock = threading.Lock()
        self._filled: set[int] = set()
        self._next = 0  # the first byte that was not given to anyone to hash
        self._hashing = False

    def steps(self) -> list[Callable[[], None]]:
        """What is to be done, in any threads, best begun in this order."""
        starts = range(0, self._out.nbytes, self._reader.part_bytes)
        return [partial(self._fill, start) for start in starts]

    def _fill(self, start: int) -> None:
        part = self._part(start)
        self._reader.read_range(self._entry, start, part, proven=self._proof is not None)
        if self._proof is not None:
            at = start // self._reader.part_bytes * XXH3_BYTES
            if xxh3(part) != self._proof[at : at + XXH3_BYTES]:
                raise self._reader.changed(self._entry)
            return
        with self._lock:
            self._filled.add(start)
            if self._hashing:
                return  # whoever it is goes on with this part
            self._hashing = True
        while (due := self._take()) is not None:
            self._hasher.update(due)

    def _take(self) -> memoryview | None:
        """The next part to be hashed, if it is filled; after the last one, check the digest."""
        with self._lock:
            if self._next in self._filled:
                part = self._part(self._next)
                self._next += part.nbytes
                return part
            self._hashing = False
            if self._next == self._out.nbytes:
                self._reader.check_digest(self._entry, self._hasher.digest())
            return None

    def _part(self, start: int) -> memoryview:
        return self._out[start : start + self._reader.part_bytes]


def _largest_first(job: ReadJob) -> int:
    return -job[2].nbytes


def _in_threads(work: Callable[[_T], None], items: Iterable[_T], threads: int) -> None:
    queue = deque(items)
    threads = min(threads, len(queue))
    if threads < 2:
        _drain(queue, work)
        return
    with Threads(threads, "ckptcoord-read") as pool:
        try:
            for worker in [pool.submit(_drain, queue, work) for _ in range(threads)]:
                worker.result()
        finally:
            queue.clear()


def _drain(queue: deque[_T], work: Callable[[_T], None]) -> None:
    """Work until nothing is left; after a failure nothing is left for the others either."""
    try:
        while True:
            try:
                item = queue.popleft()
            except IndexError:
                return
            work(item)
    except BaseException:
        queue.clear()
        raise
