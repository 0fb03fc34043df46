"""FaultyStore: the suite while it is quiet, and its faults."""

from __future__ import annotations

import pytest

from ckptcoord.errors import StorageError
from ckptcoord.testing import FaultyStore, MemoryStore, Operation, SimulatedCrash
from ckptcoord.testing.suite import StoreSuite


@pytest.fixture
def store():
    return FaultyStore(MemoryStore())


class TestQuietFaultyStore(StoreSuite):
    pass


class TestHarmlessFaultyStore(StoreSuite):
    @pytest.fixture
    def store(self):
        def quiet(*_):
            return None

        return FaultyStore(MemoryStore(), fail=quiet, fail_after=quiet, fail_read=quiet)


def scenario(store):
    store.make_dirs("a")
    with store.create("a/f") as writer:
        writer.write_at(0, b"x")
        writer.sync()
    store.sync_dir("a")
    store.move_dir("a", "b")
    store.put_new("new", b"")
    store.put("put", b"")
    store.remove_tree("put")


FILLING = ["create", "write_at", "sync", "close"]
NAMES = ["make_dirs", *FILLING, "sync_dir", "move_dir", "put_new", "put", "remove_tree"]


def storage_error(name, path):
    return StorageError(operation=name, path=path, why="injected")


def test_operations_are_listed_in_order(store):
    scenario(store)
    assert [operation.name for operation in store.operations] == NAMES
    assert store.operations[6] == Operation(name="move_dir", path="b")
    assert store.url == "memory:"
    assert isinstance(store.inner, MemoryStore)


@pytest.mark.parametrize("k", range(len(NAMES)))
def test_a_crash_at_an_operation_stops_it_and_all_later_calls(k):
    store = FaultyStore(MemoryStore(), crash_at=k)
    with pytest.raises(SimulatedCrash):
        scenario(store)
    assert [operation.name for operation in store.operations] == NAMES[: k + 1]
    for call in (
        lambda: store.list(""),
        lambda: store.exists(""),
        lambda: store.open("b/f"),
        lambda: store.read("b/f", limit_bytes=1),
        lambda: store.put("f", b""),
    ):
        with pytest.raises(SimulatedCrash):
            call()


def test_a_crash_is_not_caught_as_an_exception():
    assert not issubclass(SimulatedCrash, Exception)


@pytest.mark.parametrize("k", range(len(NAMES)))
def test_an_error_may_come_before_or_after_the_effect(k):
    def at(number, name, path):
        return storage_error(name, path) if number == k else None

    for store in (
        FaultyStore(MemoryStore(), fail=at),
        FaultyStore(MemoryStore(), fail_after=at),
    ):
        with pytest.raises(StorageError, match="injected") as caught:
            scenario(store)
        assert caught.value.operation == NAMES[k]


def test_the_effect_of_a_lost_reply_is_there():
    def lost(number, name, path):
        return storage_error(name, path)

    before = FaultyStore(MemoryStore(), fail=lost)
    after = FaultyStore(MemoryStore(), fail_after=lost)
    for store in (before, after):
        with pytest.raises(StorageError):
            store.put_new("f", b"x")
    assert not before.exists("f")
    assert after.read("f", limit_bytes=1) == b"x"


def test_reading_fails_as_told():
    inner = MemoryStore()
    inner.put("f", b"x")
    refused = {"read_into"}
    store = FaultyStore(
        inner, fail_read=lambda name, path: storage_error(name, path) if name in refused else None
    )
    with store.open("f") as reader:
        assert reader.read(0, 1) == b"x"
        with pytest.raises(StorageError):
            reader.read_into(0, memoryview(bytearray(1)))
        refused.update(("read", "open", "list", "exists"))
        with pytest.raises(StorageError):
            reader.read(0, 1)
    for call in (
        lambda: store.list(""),
        lambda: store.exists(""),
        lambda: store.open("f"),
        lambda: store.read("f", limit_bytes=1),
    ):
        with pytest.raises(StorageError):
            call()
