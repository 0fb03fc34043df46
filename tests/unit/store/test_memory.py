"""MemoryStore: the suite, and its model of a power loss."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.errors import ClosedError
from ckptcoord.testing import MemoryStore
from ckptcoord.testing.suite import StoreSuite


@pytest.fixture
def store():
    return MemoryStore()


class TestMemoryStore(StoreSuite):
    pass


def test_it_says_where_it_is(store):
    assert store.url == "memory:"


def test_closed_writers_and_readers_are_closed(store):
    with store.create("f") as writer:
        pass
    with pytest.raises(ClosedError):
        writer.write_at(0, b"x")
    with pytest.raises(ClosedError):
        writer.sync()
    with store.open("f") as reader:
        pass
    with pytest.raises(ClosedError):
        reader.read(0, 0)


def test_a_crash_loses_a_name_that_was_not_synced(store):
    with store.create("f") as writer:
        writer.write_at(0, b"x")
        writer.sync()
    assert not store.crash().exists("f")
    store.sync_dir("")
    assert store.crash().read("f", limit_bytes=1) == b"x"


def test_a_crash_loses_content_that_was_not_synced(store):
    with store.create("f") as writer:
        writer.write_at(0, b"abc")
        writer.sync()
        writer.write_at(1, b"XYZ")
    store.sync_dir("")
    assert store.crash().read("f", limit_bytes=9) == b"abc"
    assert store.read("f", limit_bytes=9) == b"aXYZ"


def test_a_crash_brings_back_a_name_whose_removal_was_not_synced(store):
    store.put("f", b"x")
    store.remove_tree("f")
    assert store.crash().exists("f")
    store.sync_dir("")
    assert not store.crash().exists("f")


def test_a_crash_keeps_what_is_durable_by_contract(store):
    store.make_dirs("a/b")
    store.put_new("a/b/new", b"1")
    store.put("a/b/put", b"2")
    store.put("a/b/put", b"3")
    store.move_dir("a/b", "c")
    after = store.crash()
    assert after.read("c/new", limit_bytes=1) == b"1"
    assert after.read("c/put", limit_bytes=1) == b"3"
    assert after.list("a") == ()


def test_a_moved_folder_does_not_make_its_names_durable(store):
    store.make_dirs("a")
    store.create("a/f").__exit__(None, None, None)
    store.move_dir("a", "b")
    assert store.crash().list("b") == ()


def test_what_survived_is_durable_and_apart_from_what_went_on(store):
    store.put("f", b"1")
    after = store.crash()
    store.put("f", b"2")
    assert after.crash().read("f", limit_bytes=1) == b"1"


@given(seed=st.integers(0, 2**32))
def test_a_crash_by_chance_keeps_what_was_synced_and_invents_nothing(seed):
    store = MemoryStore()
    with store.create("old") as writer:
        writer.write_at(0, b"aaaa")
        writer.sync()
        store.sync_dir("")
        writer.write_at(2, b"bbbb")
    store.create("young").__exit__(None, None, None)
    store.put("gone", b"")
    store.create("younger").__exit__(None, None, None)
    store.remove_tree("gone")
    after = store.crash(random.Random(seed))
    assert after.read("old", limit_bytes=9) in {
        b"aaaa",
        b"aab",
        b"aabb",
        b"aabbb",
        b"aabbbb",
        b"aaba",
    }
    assert {entry.name for entry in after.list("")} - {"younger", "gone"} == {"old", "young"}


def test_chance_reaches_every_outcome(store):
    with store.create("f") as writer:
        writer.write_at(0, b"ab")
        writer.write_at(4, b"cd")
    outcomes = set()
    for seed in range(400):
        after = store.crash(random.Random(seed))
        outcomes.add(after.read("f", limit_bytes=9) if after.exists("f") else None)
    assert {None, b"", b"a", b"ab", b"ab\0\0c", b"ab\0\0cd", b"\0\0\0\0cd"} <= outcomes
