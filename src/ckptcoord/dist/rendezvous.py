"""Calls to the c10d store that always come back, and who is there to answer them.

A store call can block far past its own timeout when the store's host is stopped or cut off, and
Python signal handlers do not run meanwhile. Each call therefore runs on a helper thread; at the
deadline the caller goes on and the thread, with its connection, is left behind.
"""

from __future__ import annotations

import os
import queue
import secrets
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch.distributed as c10d

from ckptcoord.errors import StoreUnreachableError, ThreadLimitError
from ckptcoord.repo.threads import started

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import Store

    from ckptcoord.dist.deadline import Deadline

T = TypeVar("T")
# Beyond the deadline: a call that was answered in time still has to be handed over.
_PATIENCE_S = 0.25
# Who was stopped past the deadline, or could not run, asks once more before it blames the store.
_OVERSLEPT_S = 1.0
_AWAKE_S = 5.0
_POLL_S = 0.01
_Job: TypeAlias = "tuple[Callable[[Store], object], Future[object]]"


class StoreClient:
    """A private connection to a c10d store.

    Args:
        store: the store; each helper thread works on a clone of its own.
        hosted_by: who runs the server, for messages.
    """

    def __init__(self, store: Store, *, hosted_by: str) -> None:
        self._source = store
        self._prefix = ""
        self._hosted_by = hosted_by
        self._jobs: queue.SimpleQueue[_Job | None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last call was answered, and nobody has closed it since."""
        return self._jobs is not None

    def under(self, prefix: str) -> None:
        """From here on, keys are those under a prefix."""
        self._prefix = prefix

    def set(self, key: str, value: bytes, deadline: Deadline, phase: str) -> None:
        """Publish a value."""
        name = self._prefix + key
        # The stub says str; bytes are taken.
        self._call(lambda store: store.set(name, value), deadline, phase)  # type: ignore[arg-type]

    def delete(self, key: str, deadline: Deadline, phase: str) -> None:
        """Forget a key; fine when it is absent."""
        name = self._prefix + key
        self._call(lambda store: store.delete_key(name), deadline, phase)

    def collect(
        self, keys: Sequence[str], deadline: Deadline, phase: str
    ) -> tuple[bytes | None, ...]:
        """The values of `keys`, None for those that are not there at the deadline."""
        names = [self._prefix + key for key in keys]
        if self._call(lambda store: _wait(store, names, deadline), deadline.extended(0.5), phase):
            values = self._call(lambda store: store.multi_get(names), deadline.extended(1.0), phase)
            return tuple(bytes(value) for value in values)
        return self.peek(keys, deadline.extended(1.0), phase)

    def peek(self, keys: Sequence[str], deadline: Deadline, phase: str) -> tuple[bytes | None, ...]:
        """The values of `keys` that are there now, None for the others."""
        names = [self._prefix + key for key in keys]

        def look(store: Store) -> tuple[bytes | None, ...]:
            return tuple(bytes(store.get(name)) if store.check([name]) else None for name in names)

        return self._call(look, deadline, phase)

    def close(self) -> None:
        """Let the helper thread end."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _call(self, work: Callable[[Store], T], deadline: Deadline, phase: str) -> T:
        future: Future[T] = Future()
        jobs = self._jobs or self._served(phase)
        started_s = time.monotonic()
        jobs.put((work, future))  # type: ignore[arg-type]
        try:
            return _answer(future, deadline)
        except FutureTimeoutError:
            self.close()  # leave that thread and its connection behind; it ends when it can
            waited_s = time.monotonic() - started_s
            why, cause = f"did not answer for {waited_s:.1f} s", None
        except RuntimeError as error:  # torch raises DistError and its kin, all RuntimeErrors
            self.close()
            why, cause = "closed the connection", error
        except BaseException:
            self.close()  # interrupted: the next call must not queue up behind this one
            raise
        raise StoreUnreachableError(phase=phase, host=self._hosted_by, why=why) from cause

    def _served(self, phase: str) -> queue.SimpleQueue[_Job | None]:
        """A queue with a helper thread behind it."""
        jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        try:
            started(_serve, "ckptcoord-store", self._source, jobs)
        except ThreadLimitError as error:
            why = f"was not asked, for {error.what},"
            raise StoreUnreachableError(phase=phase, host=self._hosted_by, why=why) from error
        self._jobs = jobs
        return jobs


def gather(client: StoreClient, size: int, deadline: Deadline, phase: str) -> None:
    """Rank 0's part in having all ranks use keys that no other incarnation of the job has.

    A store may outlive the processes: torchrun starts them again with the one it had, and what
    those before have left there looks like answers. So each rank says a nonce, and goes by what
    rank 0 answers to that very nonce: one of rank 0's own, which all keys from then on begin with.
    Who is not there by the deadline will be missed in the round that follows.

    Raises:
        StoreUnreachableError: the store did not answer.
    """
    meeting = secrets.token_hex(8)
    answered: dict[int, bytes] = {}
    missing = list(range(1, size))
    while True:
        joined = client.peek([f"join/{rank}" for rank in missing], deadline, phase)
        for rank, nonce in zip(missing, joined, strict=True):
            if nonce is not None and answered.get(rank) != nonce:
                client.set(f"answer/{rank}", nonce + f":{meeting}".encode(), deadline, phase)
                answered[rank] = nonce
        met = client.peek([f"met/{meeting}/{rank}" for rank in missing], deadline, phase)
        for rank, word in zip(tuple(missing), met, strict=True):
            if word is not None:
                missing.remove(rank)
                for key in (f"join/{rank}", f"answer/{rank}", f"met/{meeting}/{rank}"):
                    client.delete(key, deadline, phase)
        if not missing or not deadline.remaining_s():
            break
        time.sleep(_POLL_S)  # a store tells nobody that a value has changed
    client.under(f"{meeting}/")


def join(client: StoreClient, rank: int, deadline: Deadline, phase: str) -> bool:
    """Another rank's part in it; whether rank 0 was there by the deadline.

    Raises:
        StoreUnreachableError: the store did not answer.
    """
    nonce = secrets.token_hex(8)
    client.set(f"join/{rank}", nonce.encode(), deadline, phase)
    while True:
        (said,) = client.collect([f"answer/{rank}"], deadline, phase)
        answered, _, meeting = (said or b"").decode().partition(":")
        if answered == nonce:
            client.set(f"met/{meeting}/{rank}", b"1", deadline, phase)
            client.under(f"{meeting}/")
            return True
        if not deadline.remaining_s():
            return False
        time.sleep(_POLL_S)  # that was said to an earlier incarnation


def _serve(source: Store, jobs: queue.SimpleQueue[_Job | None]) -> None:
    store: Store | None = None
    while (job := jobs.get()) is not None:
        work, future = job
        try:
            if store is None:
                store = source.clone()  # type: ignore[attr-defined]  # the stub lacks it
            result = work(store)
        except BaseException as error:  # noqa: BLE001 (it travels to the caller as a value)
            future.set_exception(error)
        else:
            future.set_result(result)


def _answer(future: Future[T], deadline: Deadline) -> T:
    """What a call gives, at the deadline at the latest.

    Raises:
        FutureTimeoutError: nothing came, and this process was there to see it.
    """
    if deadline.missed_by_s() <= _OVERSLEPT_S:
        try:
            return future.result(timeout=deadline.remaining_s() + _PATIENCE_S)
        except FutureTimeoutError:
            if deadline.missed_by_s() <= _OVERSLEPT_S:
                raise
    return future.result(timeout=_AWAKE_S)


def _wait(store: Store, keys: Sequence[str], deadline: Deadline) -> bool:
    try:
        # At least 10 ms: a zero timeout means "for ever" to some stores.
        store.wait(list(keys), timedelta(seconds=max(0.01, deadline.remaining_s())))
    except c10d.DistStoreError:  # only ever the time-out; a lost connection is a DistNetworkError
        return False
    return True


def store_host() -> tuple[str, bool]:
    """Where the c10d store's server runs, and whether that is rank 0 itself."""
    environ = os.environ  # noqa: TID251 (dist is an edge: torchrun tells through the environment)
    where = f"{environ.get('MASTER_ADDR', 'localhost')}:{environ.get('MASTER_PORT', '?')}"
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{where} (the torchrun agent)", False
    return f"{where} (rank 0)", True
