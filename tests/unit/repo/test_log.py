"""The log: exclusive appends, strict reading, and every crash."""

from __future__ import annotations

import errno
import random
import threading
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Claim, Commit, Entry, Snapshot
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import (
    CheckpointExistsError,
    CkptError,
    CommitUnknownError,
    ConfigError,
    CorruptError,
    FencedError,
    FormatVersionError,
    ManifestError,
    MissingFileError,
    StorageError,
    StorageFullError,
)
from ckptcoord.plan.commit import SNAPSHOT_EVERY, LogState, snapshot_of
from ckptcoord.repo import log as log_module
from ckptcoord.repo.log import LOG, Log
from ckptcoord.store.local import LocalStore
from ckptcoord.testing import FaultyStore, MemoryStore, SimulatedCrash

MAIN = BranchName()
ALICE, BOB = "a" * 32, "b" * 32


def clock():
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def no_sleep(_):
    return None


def path(number):
    return f"{LOG}/{number:020d}.json"


def open_log(store, **options):
    return Log(store, clock=clock, **{"sleep": no_sleep, **options})


def claim(writer=ALICE):
    def make(state):
        current = state.claims.get(MAIN)
        epoch = current.epoch + 1 if current else 1
        return Claim(writer=writer, branch=MAIN, epoch=epoch, world_size=1)

    return make


def commit(step, writer=ALICE, epoch=1, **changes):
    checkpoint_id = CheckpointId(MAIN, step)
    whole = {
        "writer": writer,
        "checkpoint_id": checkpoint_id,
        "path": str(checkpoint_id),
        "manifest_digest": Digest(bytes(32)),
        "epoch": epoch,
        "attempt": "0" * 32,
        "size_bytes": 1,
        "stored_bytes": 1,
    }
    body = Commit(**{**whole, **changes})
    return lambda _: body


def steps(state):
    return [checkpoint_id.step for checkpoint_id in state.commits]


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else LocalStore(tmp_path)
    store.make_dirs(LOG)
    return store


@pytest.fixture
def memory():
    store = MemoryStore()
    store.make_dirs(LOG)
    return store


# --- reading and appending -------


def test_an_empty_log_says_nothing(store):
    assert open_log(store).refresh() == LogState()
    assert list(open_log(store).entries()) == []


def test_one_entry_is_read_by_its_number(store):
    log = open_log(store)
    log.append(claim())
    timed = log.append(commit(5, timing={"stall_s": 0.25, "slowest_rank": 0}))
    assert open_log(store).entry(2) == timed
    assert timed.body.timing["stall_s"] == 0.25
    with pytest.raises(MissingFileError):
        log.entry(3)


def test_what_is_appended_is_read_by_everybody(store):
    log, other = open_log(store), open_log(store)
    assert other.refresh().number == 0
    first = log.append(claim())
    second = log.append(commit(5))
    assert (first.number, second.number, second.timestamp) == (1, 2, "2026-01-02T03:04:05Z")
    assert steps(other.refresh()) == steps(open_log(store).refresh()) == [5]
    assert list(log.entries()) == [first, second]
    assert list(log.entries(after=1)) == [second]
    assert [entry.name for entry in store.list(LOG)] == [f"{n:020d}.json" for n in (1, 2)]


def test_a_refused_entry_is_not_written(store):
    log = open_log(store)
    with pytest.raises(FencedError):
        log.append(commit(5))
    log.append(claim())
    log.append(commit(5))
    with pytest.raises(CheckpointExistsError):
        log.append(commit(5))
    assert log.refresh().number == 2


def test_a_stale_writer_learns_of_the_claim_that_fenced_it(store):
    alice, bob = open_log(store), open_log(store)
    alice.append(claim())
    bob.append(claim(BOB))
    with pytest.raises(FencedError) as caught:
        alice.append(commit(5))
    assert (caught.value.holder, caught.value.epoch) == (BOB, 2)
    bob.append(commit(5, BOB, epoch=2))


def test_who_loses_a_race_is_asked_again_with_what_the_winner_said(store):
    log, other = open_log(store), open_log(store)
    seen = []

    def make(state):
        seen.append(state.number)
        if len(seen) == 1:
            other.append(claim(BOB))
        return claim()(state)

    entry = log.append(make)
    assert seen == [0, 1]
    assert (entry.number, entry.body.epoch) == (2, 2)


def test_who_is_fenced_while_it_races_is_refused(store):
    log, other = open_log(store), open_log(store)
    log.append(claim())
    raced = []

    def make(state):
        if not raced:
            raced.append(other.append(claim(BOB)))
        return commit(5)(state)

    with pytest.raises(FencedError):
        log.append(make)
    assert steps(log.refresh()) == []


def test_a_writer_that_always_loses_gives_up(memory, monkeypatch):
    monkeypatch.setattr(log_module, "_MAX_LOST_RACES", 5)
    log, other = open_log(memory), open_log(memory)
    pauses = []
    log._sleep = pauses.append

    def make(state):
        other.append(claim(BOB))
        return claim()(state)

    with pytest.raises(StorageError, match="5 races"):
        log.append(make)
    assert other.refresh().number == 5
    assert all(0 <= pause <= 0.25 for pause in pauses)
    assert len(set(pauses)) > 3


def test_an_error_of_make_ends_the_append(memory):
    def make(state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_log(memory).append(make)
    assert memory.list(LOG) == ()


def test_threads_share_a_log(store):
    log, other = open_log(store), open_log(store)

    def work(log, writer):
        for _ in range(10):
            log.append(claim(writer))

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in ((log, ALICE), (log, ALICE), (other, BOB), (other, BOB))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.refresh().claims[MAIN].epoch == 40
    assert log.refresh() == open_log(store).refresh()


def test_two_who_append_the_very_same_entry_append_it_once(store):
    log, twin = open_log(store), open_log(store)
    raced = []

    def make(state):
        if not raced:
            raced.append(twin.append(claim()))
        return claim()(LogState())

    assert log.append(make) == raced[0]
    assert log.refresh().number == 1


def test_names_that_are_no_entries_are_ignored(store):
    log = open_log(store)
    log.append(claim())
    for name in (".tmp-0123", "2.json", "00000000000000000002.json.bak", "README"):
        store.put(f"{LOG}/{name}", b"junk")
    assert open_log(store).refresh().number == 1


def test_a_refresh_reads_only_what_is_new(memory):
    reads = []
    watched = FaultyStore(memory, fail_read=lambda name, path: reads.append((name, path)))
    log, other = open_log(watched), open_log(memory)
    for _ in range(5):
        other.append(claim())
    log.refresh()
    other.append(claim())
    reads.clear()
    assert log.refresh().number == 6
    assert reads == [("read", path(6)), ("read", path(7)), ("exists", path(8))]


# --- what breaks the format -------


def three_entries(store):
    log = open_log(store)
    log.append(claim())
    log.append(commit(1))
    log.append(commit(2))


def test_a_gap_is_an_error_for_old_readers_and_new(store):
    three_entries(store)
    old = open_log(store)
    old.refresh()
    entry = Entry(number=5, timestamp="2026-01-02T03:04:05Z", body=claim()(LogState()))
    store.put(path(5), entry.to_bytes())
    for log in (open_log(store), old):
        for _ in range(2):
            with pytest.raises(ManifestError, match=r"0004\.json: is missing"):
                log.refresh()
            with pytest.raises(ManifestError, match=r"0004\.json: is missing"):
                log.append(commit(3))
    assert not store.exists(path(4))


def test_a_gap_of_several_is_seen_by_whoever_lists(store):
    three_entries(store)
    store.remove_tree(path(1))
    store.remove_tree(path(2))
    log = open_log(store)
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"0001\.json: is missing"):
            log.refresh()


def test_a_name_that_shows_late_is_waited_for(memory):
    three_entries(memory)
    hidden = [path(2)]

    def hide(name, at):
        return MissingFileError(path=at) if name == "read" and at in hidden else None

    pauses = []

    def sleep(pause_s):
        pauses.append(pause_s)
        if len(pauses) == 3:
            hidden.clear()

    class Lagging(FaultyStore):
        def exists(self, at):
            return at not in hidden and super().exists(at)

    log = open_log(Lagging(memory, fail_read=hide), sleep=sleep)
    assert log.refresh().number == 3
    assert len(pauses) == 3


def test_a_stale_listing_hides_nothing(memory):
    three_entries(memory)

    class Stale(FaultyStore):
        def list(self, path):
            return super().list(path)[:1]

    assert open_log(Stale(memory)).refresh().number == 3

    class Blind(FaultyStore):
        def list(self, path):
            return ()

    assert open_log(Blind(memory)).refresh().number == 3


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda data: data.replace(b'"number":2', b'"number":3'), ManifestError),
        (
            lambda data: data.replace(b'"format_version":1', b'"format_version":9'),
            FormatVersionError,
        ),
        (lambda data: data[:-20], ManifestError),
        (lambda data: b"", ManifestError),
        (lambda data: bytes(len(data)), ManifestError),
        (lambda data: data[:-2] + b"," + b" " * (1 << 20) + b'"x":1}', CorruptError),
    ],
    ids=["another number", "newer format", "torn", "empty", "zeroed", "too large"],
)
def test_a_damaged_entry_is_named(store, change, kind):
    three_entries(store)
    data = store.read(path(2), limit_bytes=1 << 20)
    store.put(path(2), change(data))
    with pytest.raises(kind, match=r"0002\.json"):
        open_log(store).refresh()


def test_an_entry_that_is_too_large_is_not_written(memory):
    log = open_log(memory)
    log.append(claim())
    metrics = {f"{'m' * 1000}{i}": 1.0 for i in range(2000)}
    with pytest.raises(ConfigError, match="commit"):
        log.append(commit(1, metrics=metrics))
    assert log.refresh().number == 1


def test_an_entry_that_does_not_read_back_is_not_written(memory, monkeypatch):
    log = open_log(memory)
    other = Entry(number=1, timestamp="2026-01-02T03:04:05Z", body=claim(BOB)(LogState()))
    data = other.to_bytes()
    monkeypatch.setattr(Entry, "to_bytes", lambda _: data)
    with pytest.raises(ConfigError, match="read back"):
        log.append(claim())
    assert memory.list(LOG) == ()


# --- snapshots -------


@pytest.fixture
def every(monkeypatch):
    """Snapshots at every fourth entry."""
    monkeypatch.setattr("ckptcoord.plan.commit.SNAPSHOT_EVERY", 4)
    monkeypatch.setattr(log_module, "SNAPSHOT_EVERY", 4)
    return 4


def test_every_so_many_entries_is_a_snapshot(store, every):
    log, reader = open_log(store), open_log(store)
    reader.refresh()
    log.append(claim())
    numbers = [log.append(commit(step)).number for step in range(10)]
    assert numbers == [2, 3, 5, 6, 7, 9, 10, 11, 13, 14]
    snapshots = [entry.number for entry in log.entries() if isinstance(entry.body, Snapshot)]
    assert snapshots == [4, 8, 12]
    assert reader.refresh() == log.refresh() == open_log(store).refresh()


def test_reading_starts_at_the_newest_snapshot(memory, every):
    log = open_log(memory)
    for _ in range(11):
        log.append(claim())
    for number in range(1, 12):
        memory.remove_tree(path(number))
    assert open_log(memory).refresh() == log.refresh()
    assert log.refresh().claims[MAIN].epoch == 11


def test_a_snapshot_that_another_wrote_first_serves_as_well(memory, every):
    log, other = open_log(memory), open_log(memory)
    for _ in range(3):
        other.append(claim())
    raced = []

    def make(state):
        if state.number == 3 and not raced:
            raced.append(other.append(claim(BOB)))
        return claim()(state)

    assert log.append(make).number == 6
    assert open_log(memory).refresh().number == 6


def test_a_snapshot_is_written_even_if_the_writer_is_then_refused(memory, every):
    log = open_log(memory)
    for _ in range(3):
        log.append(claim())
    with pytest.raises(FencedError):
        log.append(commit(1, epoch=2))
    assert open_log(memory).refresh().number == 4


def test_a_snapshot_that_lies_is_found_by_who_reads_past_it(memory, every):
    log, reader = open_log(memory), open_log(memory)
    for _ in range(3):
        log.append(claim())
    reader.refresh()
    lie = Snapshot(writer=BOB, state=snapshot_of(LogState()))
    memory.put(path(4), Entry(number=4, timestamp="2026-01-02T03:04:05Z", body=lie).to_bytes())
    for log in (reader, open_log(memory)):
        with pytest.raises(ManifestError):
            log.refresh()


def test_another_entry_in_the_place_of_a_snapshot_is_refused(memory, every):
    log, reader = open_log(memory), open_log(memory)
    for _ in range(4):
        log.append(claim())
    reader._state = None
    body = claim()(LogState())
    memory.put(path(4), Entry(number=4, timestamp="2026-01-02T03:04:05Z", body=body).to_bytes())
    with pytest.raises(ManifestError, match="not a snapshot"):
        reader.refresh()


@pytest.mark.slow
def test_a_log_of_thousands_opens_from_its_snapshot(memory):
    log = open_log(memory)
    log.append(claim())
    for step in range(3 * SNAPSHOT_EVERY):
        log.append(commit(step))
    reads = []
    cold = open_log(FaultyStore(memory, fail_read=lambda name, at: reads.append(name)))
    assert cold.refresh() == log.refresh()
    assert len(reads) < 20


# --- faults -------


def eio(number, name, at):
    return StorageError(operation=name, path=at, why="injected", errno=errno.EIO)


def test_an_append_whose_reply_was_lost_is_found(memory):
    lost = open_log(
        FaultyStore(
            memory, fail_after=lambda n, name, at: eio(n, name, at) if name == "put_new" else None
        )
    )
    assert lost.append(claim()).number == 1
    assert lost.append(commit(5)).number == 2
    assert steps(open_log(memory).refresh()) == [5]


def test_what_is_found_after_a_lost_reply_is_made_durable():
    class LostBeforeDurable(MemoryStore):
        """The name appears, and the error comes before the folder is synced."""

        def put_new(self, path, data):
            with self.create(path) as writer:
                writer.write_at(0, data)
                writer.sync()
            raise eio(0, "put_new", path)

    store = LostBeforeDurable()
    store.make_dirs(LOG)
    open_log(store).append(claim())
    assert open_log(store.crash()).refresh().number == 1


def test_an_append_that_was_repeated_underneath_is_not_a_lost_race(memory):
    class Repeating(FaultyStore):
        def put_new(self, path, data):
            super().put_new(path, data)
            return super().put_new(path, data)

    assert open_log(Repeating(memory)).append(claim()).number == 1
    assert open_log(memory).refresh().number == 1


@pytest.mark.parametrize("kind", [StorageError, StorageFullError])
def test_an_append_that_did_not_take_place_is_the_error_itself(memory, kind):
    first = kind(operation="put_new", path="x", why="injected")
    full = open_log(FaultyStore(memory, fail=lambda n, name, at: first))
    with pytest.raises(kind) as caught:
        full.append(claim())
    assert caught.value is first
    assert open_log(memory).refresh().number == 0


def test_an_append_that_another_won_during_an_error_is_a_lost_race(memory):
    other = open_log(memory)
    failed = []

    def fail_once(number, name, at):
        if failed:
            return None
        failed.append(other.append(claim(BOB)))
        return eio(number, name, at)

    entry = open_log(FaultyStore(memory, fail=fail_once)).append(claim())
    assert (entry.number, entry.body.epoch) == (2, 2)


def test_a_longer_entry_of_another_is_a_lost_race(memory):
    for lost_in_an_error in (False, True):
        other = open_log(memory)
        raced = []

        def long_claim(state, n=None):
            body = claim(BOB)(state)
            return Claim(writer=BOB, branch=MAIN, epoch=body.epoch, world_size=1, host="x" * 5000)

        def race(number, name, at, other=other, raced=raced, fails=lost_in_an_error):
            if raced:
                return None
            raced.append(other.append(long_claim))
            return eio(number, name, at) if fails else None

        log = open_log(FaultyStore(memory, fail=race))
        before = open_log(memory).refresh().number
        assert log.append(claim()).number == before + 2


def test_when_the_entry_cannot_be_read_back_nobody_knows(memory):
    down = []

    def fail_after(number, name, at):
        down.append(at)
        return eio(number, name, at)

    def fail_read(name, at):
        return eio(0, name, at) if down else None

    log = open_log(FaultyStore(memory, fail_after=fail_after, fail_read=fail_read))
    with pytest.raises(CommitUnknownError) as caught:
        log.append(claim())
    assert caught.value.entry == path(1)
    assert memory.exists(path(1)), "nothing may be deleted"
    down.clear()
    assert log.refresh().number == 1


def test_when_the_entry_cannot_be_made_durable_nobody_knows(memory):
    log = open_log(FaultyStore(memory, fail_after=eio))
    with pytest.raises(CommitUnknownError, match="sync_dir"):
        log.append(claim())


def test_when_the_entry_is_there_and_cannot_be_read_nobody_knows(memory):
    class Odd(FaultyStore):
        def put_new(self, path, data):
            return False

    with pytest.raises(CommitUnknownError):
        open_log(Odd(memory)).append(claim())


def test_a_log_without_its_folder_is_a_storage_error():
    with pytest.raises(StorageError):
        open_log(MemoryStore()).append(claim())


# --- crashes -------


def scenario(store):
    """Claims and commits across a snapshot; what was acknowledged, in order."""
    log = open_log(store)
    acknowledged = []
    makes = (claim(), commit(1), commit(2), commit(3), commit(4))
    with suppress(SimulatedCrash, CkptError):
        acknowledged.extend(log.append(make) for make in makes)
    return acknowledged


def prepared():
    store = MemoryStore()
    store.make_dirs(LOG)
    return store


@pytest.mark.usefixtures("every")
def test_a_crash_at_any_operation_leaves_the_old_log_or_the_new_one():
    whole = FaultyStore(prepared())
    assert len(scenario(whole)) == 5
    for k in range(len(whole.operations) + 1):
        for seed in (None, *range(5)):
            memory = prepared()
            acknowledged = scenario(FaultyStore(memory, crash_at=k))
            after = memory.crash(None if seed is None else random.Random(seed))
            check_after(after, acknowledged)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("moment", ["fail", "fail_after"])
def test_an_error_at_any_operation_loses_nothing_that_was_acknowledged(moment):
    whole = FaultyStore(prepared())
    scenario(whole)
    for k in range(len(whole.operations)):
        memory = prepared()

        def at(number, name, where, k=k):
            return eio(number, name, where) if number == k else None

        acknowledged = scenario(FaultyStore(memory, **{moment: at}))
        check_after(memory.crash(), acknowledged)


def check_after(store, acknowledged):
    """Nothing acknowledged is lost, at most one entry more is there, and the log goes on."""
    entries = [e for e in open_log(store).entries() if not isinstance(e.body, Snapshot)]
    assert entries[: len(acknowledged)] == acknowledged
    assert len(entries) <= len(acknowledged) + 1
    log = open_log(store)
    epoch = log.append(claim(BOB)).body.epoch
    log.append(commit(99, BOB, epoch=epoch))
    assert log.refresh() == open_log(store).refresh()
    assert 99 in steps(log.refresh())
