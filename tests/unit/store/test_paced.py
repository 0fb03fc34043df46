"""PacedStore: the suite, and the rate that it keeps, by a clock that only its own waits move."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.store import paced
from ckptcoord.store.paced import PacedStore
from ckptcoord.testing import MemoryStore
from ckptcoord.testing.suite import StoreSuite

MIB = 1 << 20


class Clock:
    """In the place of the module `time`: nothing takes time but sleep."""

    def __init__(self) -> None:
        self.now_s, self.slept = 0.0, []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now_s += seconds


class Recorder(MemoryStore):
    """When how many bytes were written."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.written = clock, []

    def create(self, path, *, size_bytes=0):
        writer = super().create(path, size_bytes=size_bytes)
        write_at = writer.write_at

        def record(offset, data):
            self.written.append((self.clock.now_s, memoryview(data).nbytes))
            write_at(offset, data)

        writer.write_at = record
        return writer


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paced, "time", clock)
    return clock


def put(store, name, *sizes):
    """Write parts of these sizes behind one another."""
    data = bytes(range(251)) * (1 + sum(sizes) // 251)
    with store.create(name) as writer:
        at = 0
        for size in sizes:
            writer.write_at(at, memoryview(data)[at : at + size])
            at += size
        writer.sync()
    return data[: sum(sizes)]


class TestPacedStore(StoreSuite):
    @pytest.fixture
    def store(self, clock):
        return PacedStore(MemoryStore(), 1e9)


def test_it_says_where_it_is():
    assert PacedStore(MemoryStore(), 1.0).url == "memory:"


@given(
    rate=st.floats(MIB, 1000 * MIB),
    sizes=st.lists(st.integers(0, 7 * MIB), min_size=1, max_size=6),
    idle_s=st.lists(st.floats(0, 3), min_size=6, max_size=6),
)
def test_at_any_moment_no_more_was_written_than_the_rate_allows(rate, sizes, idle_s):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paced, "time", clock)
        inner = Recorder(clock)
        store = PacedStore(inner, rate)
        for number, (size, pause_s) in enumerate(zip(sizes, idle_s, strict=False)):
            clock.now_s += pause_s
            data = put(store, f"f{number}", size)
            assert store.read(f"f{number}", limit_bytes=size) == data
    piece = store.piece_bytes
    assert all(size <= piece for _, size in inner.written)
    # Between any two moments: what was under way, and the rate times what lies between.
    for first, (begin_s, _) in enumerate(inner.written):
        total = 0
        for now_s, size in inner.written[first:]:
            total += size
            assert total <= piece + (now_s - begin_s) * rate * (1 + 1e-9) + 1


def test_idle_time_is_not_saved_up_and_the_first_piece_does_not_wait(clock):
    store = PacedStore(Recorder(clock), 10 * MIB)
    put(store, "a", MIB)
    assert not clock.slept
    clock.now_s += 100
    put(store, "b", 21 * MIB)
    assert sum(clock.slept) == pytest.approx(2.0)


def test_all_files_and_threads_share_one_rate(clock):
    store = PacedStore(Recorder(clock), 10 * MIB)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: put(store, f"f{number}", 5 * MIB, 5 * MIB), range(4)))
    # The fake clock adds up what threads sleep side by side, so it says at most too much.
    assert store._free_at_s >= 4.0
    assert clock.now_s >= 40 * MIB / (10 * MIB) - store.piece_bytes / (10 * MIB)


def test_what_is_read_named_or_made_otherwise_is_not_slowed(clock):
    store = PacedStore(MemoryStore(), 1.0)
    store.make_dirs("folder")
    store.put("folder/a", bytes(1000))
    assert store.put_new("folder/b", bytes(1000))
    assert len(store.read("folder/a", limit_bytes=1000)) == 1000
    store.sync_dir("folder")
    store.move_dir("folder", "other")
    assert {entry.name for entry in store.list("other")} == {"a", "b"}
    store.remove_tree("other")
    assert not clock.slept
