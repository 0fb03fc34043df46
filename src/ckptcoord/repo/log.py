"""The log: append-only, one small file an entry, created exclusively under consecutive numbers."""

from __future__ import annotations

import random
import re
import threading
import time
from typing import TYPE_CHECKING

from ckptcoord.core.entries import (
    MAX_ENTRY_BYTES,
    MAX_SNAPSHOT_BYTES,
    Entry,
    EntryBody,
    Snapshot,
    timestamp_of,
)
from ckptcoord.errors import (
    CommitUnknownError,
    ConfigError,
    CorruptError,
    ManifestError,
    MissingFileError,
    StorageError,
)
from ckptcoord.plan.commit import (
    SNAPSHOT_EVERY,
    LogState,
    refusal,
    replay,
    snapshot_of,
    state_from_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from ckptcoord.store.base import Store

LOG = ".ckptcoord/log"
_NAME = re.compile(r"([0-9]{20})\.json")
_MAX_LOST_RACES = 200
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_GAP_PAUSES_S = (0.0, 0.05, 0.2, 0.75)


class Log:
    """The log of a repository, and what it says (INV-3). Safe in several threads.

    Args:
        store: where it lives; the folder `prefix` exists.
        clock: an aware time; stamps entries.
        prefix: the log's folder.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], datetime],
        prefix: str = LOG,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._prefix = prefix
        self._sleep = sleep
        self._jitter = random.SystemRandom()  # a fork must not share it
        self._lock = threading.RLock()
        self._state: LogState | None = None

    def refresh(self) -> LogState:
        """What the log says now; reads only what is new, from the newest snapshot at first.

        Raises:
            ManifestError: an entry is malformed, or one is missing between others.
            FormatVersionError: a newer ckptcoord wrote an entry.
            StorageError: the storage does not answer.
        """
        with self._lock:
            state, highest = (self._state, 0) if self._state else self._start()
            for pause_s in _GAP_PAUSES_S:
                self._sleep(pause_s)  # a network file system may show a name late
                state = self._read_on(state)
                if not self._gap_after(state.number, highest):
                    self._state = state
                    return state
            raise ManifestError(
                path=self._path(state.number + 1), why="is missing, though later entries exist"
            )

    def append(self, make: Callable[[LogState], EntryBody]) -> Entry:
        """Append what `make` says to the state that it is given; durable on return.

        Other writers may come first: `make` is then called again with what they said. Where two
        append the very same entry, writer and time included, it stands once and both succeed.

        Raises:
            CkptError: whatever `make` raises, or why the entry may not be appended (FencedError,
                CheckpointExistsError, RefNotFoundError, …: see `plan.commit.refusal`).
            CommitUnknownError: the storage failed, and does not say whether it took the entry.
            StorageError: the storage failed, and did not take it.
        """
        with self._lock:
            for lost in range(_MAX_LOST_RACES):
                state = self.refresh()
                body = make(state)
                due = (state.number + 1) % SNAPSHOT_EVERY == 0
                entry = self._entry(state, _snapshot(state, body.writer) if due else body)
                if not self._try(state, entry):
                    self._back_off(lost)
                elif not due:
                    return entry
            raise StorageError(
                operation="append", path=self._prefix, why=f"lost {_MAX_LOST_RACES} races in a row"
            )

    def entries(self, *, after: int = 0) -> Iterator[Entry]:
        """The entries that are listed, in order, with numbers above `after`.

        Raises:
            CorruptError: an entry is malformed, or vanished since it was listed.
        """
        for number in self._listed():
            if number > after:
                yield self._read(number)

    def entry(self, number: int) -> Entry:
        """One entry.

        Raises:
            MissingFileError: there is none of this number.
            CorruptError: it is malformed.
        """
        return self._read(number)

    # --- reading ---------------------------------------------------------------------------------

    def _start(self) -> tuple[LogState, int]:
        """The state at the newest snapshot, and the highest number that is listed."""
        highest = max(self._listed(), default=0)
        number = highest - highest % SNAPSHOT_EVERY
        if number == 0:
            return LogState(), highest
        entry = self._read(number)
        path = self._path(number)
        if not isinstance(entry.body, Snapshot):
            raise ManifestError(path=path, why=f"is a {entry.body.kind}, not a snapshot")
        before = state_from_snapshot(entry.body.state, path=path)
        return replay(before, (entry,)), highest

    def _listed(self) -> list[int]:
        """The numbers of all entries that a listing shows, which may lag; sorted."""
        matches = (_NAME.fullmatch(entry.name) for entry in self._store.list(self._prefix))
        return sorted(int(match[1]) for match in matches if match)

    def _read_on(self, state: LogState) -> LogState:
        """Read entry after entry until the next number is not there."""
        found: list[Entry] = []
        number = state.number + 1
        while True:
            try:
                entry = self._read(number)
            except MissingFileError:
                return replay(state, found) if found else state
            if number % SNAPSHOT_EVERY == 0:
                state, found = replay(state, found), []
                why = refusal(state, entry)
                if why is not None:
                    raise ManifestError(path=self._path(number), why=why.what)
            found.append(entry)
            number += 1

    def _gap_after(self, number: int, highest: int) -> bool:
        """Whether entries stand beyond a missing one."""
        beyond = highest > number or self._store.exists(self._path(number + 2))
        return beyond and not self._store.exists(self._path(number + 1))

    def _read(self, number: int) -> Entry:
        path = self._path(number)
        limit = MAX_ENTRY_BYTES if number % SNAPSHOT_EVERY else MAX_SNAPSHOT_BYTES
        entry = Entry.parse(self._store.read(path, limit_bytes=limit), path=path)
        if entry.number != number:
            raise ManifestError(path=path, why=f"number: is {entry.number}")
        return entry

    def _path(self, number: int) -> str:
        return f"{self._prefix}/{number:020d}.json"

    # --- appending -------------------------------------------------------------------------------

    def _entry(self, state: LogState, body: EntryBody) -> Entry:
        timestamp = timestamp_of(self._clock())
        return Entry(number=state.number + 1, timestamp=timestamp, body=body)

    def _try(self, state: LogState, entry: Entry) -> bool:
        """Append an entry if it may follow the state; False when another took its number."""
        why = refusal(state, entry)
        if why is not None:
            raise why
        path, data = self._path(entry.number), self._checked(entry)
        try:
            appended = self._store.put_new(path, data) or self._is_ours(path, data)  # INV-1
        except StorageError as error:
            appended = self._settle(path, data, error)
        if appended:
            self._state = replay(state, (entry,))
        return appended

    def _back_off(self, lost: int) -> None:
        longest_s = min(_FIRST_PAUSE_S * 2 ** min(lost, 10), _LONGEST_PAUSE_S)
        self._sleep(longest_s * self._jitter.random())

    def _checked(self, entry: Entry) -> bytes:
        """The entry's bytes. One that nobody could read would end the log for everybody."""
        path, data = self._path(entry.number), entry.to_bytes()
        limit = MAX_SNAPSHOT_BYTES if isinstance(entry.body, Snapshot) else MAX_ENTRY_BYTES
        if len(data) > limit:
            raise ConfigError(field=entry.body.kind, why=f"makes {len(data):,} bytes of log entry")
        if Entry.parse(data, path=path) != entry:
            raise ConfigError(field=entry.body.kind, why="does not read back as written")
        return data

    def _is_ours(self, path: str, data: bytes) -> bool:
        """Whether the entry that is there is this one: a repeated request finds its own trace."""
        try:
            return self._store.read(path, limit_bytes=len(data)) == data
        except MissingFileError as error:
            raise CommitUnknownError(entry=path, why="it is there and cannot be read") from error
        except CorruptError:  # it is longer
            return False

    def _settle(self, path: str, data: bytes, error: StorageError) -> bool:
        """INV-6: an append whose reply was lost is settled by reading the entry back.

        Raises:
            StorageError: the first error; the entry is not there.
            CommitUnknownError: nobody can tell. Nothing is deleted.
        """
        try:
            ours = self._store.read(path, limit_bytes=len(data)) == data
            if ours:
                self._store.sync_dir(self._prefix)  # it may be visible and not yet durable
        except MissingFileError:
            raise error from None
        except CorruptError:  # it is longer
            return False
        except StorageError as second:
            raise CommitUnknownError(entry=path, why=f"{error.what}; then {second.what}") from error
        return ours


def _snapshot(state: LogState, writer: str) -> Snapshot:
    return Snapshot(writer=writer, state=snapshot_of(state))
