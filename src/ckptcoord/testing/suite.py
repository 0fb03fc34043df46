"""The laws that every Store must pass, as a pytest base class."""

# ruff: noqa: D102 (the names of the tests are the sentences)

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from ckptcoord.errors import (
    CorruptError,
    MissingFileError,
    StorageError,
    UnsafePathError,
)
from ckptcoord.store.base import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.store.base import Store

UNSAFE_PATHS = (
    "/",
    "/etc/passwd",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "./a",
    "a/.",
    "a\\b",
    "a\0b",
    "x" * 256,
    "é" * 128,
    "a/\ud800",
)
RACERS = 8


class StoreSuite:
    """Derive a class whose name begins with Test and give it a fixture `store`: an empty Store."""

    def test_a_file_reads_back_as_written(self, store: Store) -> None:
        with store.create("f") as writer:
            writer.write_at(2, b"cd")
            writer.write_at(0, memoryview(b"ab"))
            writer.write_at(4, bytearray(b"ef"))
            writer.write_at(6, b"")
            writer.sync()
        with store.open("f") as reader:
            assert reader.size_bytes == 6
            assert reader.read(0, 6) == b"abcdef"
            assert reader.read(6, 0) == b""
            out = bytearray(3)
            reader.read_into(1, memoryview(out))
            assert out == b"bcd"
        assert store.read("f", limit_bytes=6) == b"abcdef"

    def test_a_gap_between_writes_is_zeros(self, store: Store) -> None:
        with store.create("f") as writer:
            writer.write_at(3, b"d")
        assert store.read("f", limit_bytes=4) == b"\0\0\0d"

    def test_wide_items_are_written_and_read_by_their_bytes(self, store: Store) -> None:
        with store.create("f") as writer:
            writer.write_at(0, memoryview(bytes(range(16))).cast("Q"))
        out = memoryview(bytearray(16)).cast("I")
        with store.open("f") as reader:
            reader.read_into(0, out)
        assert out.tobytes() == bytes(range(16))

    def test_threads_may_write_disjoint_ranges(self, store: Store) -> None:
        with store.create("f") as writer:
            _together(lambda i: writer.write_at(i * 1000, bytes([i]) * 1000))
        data = store.read("f", limit_bytes=1 << 20)
        assert data == b"".join(bytes([i]) * 1000 for i in range(RACERS))

    def test_creating_what_exists_is_refused(self, store: Store) -> None:
        store.put("f", b"old")
        with pytest.raises(StorageError):
            store.create("f")
        assert store.read("f", limit_bytes=3) == b"old"

    def test_creating_in_an_absent_folder_is_refused(self, store: Store) -> None:
        with pytest.raises(StorageError):
            store.create("absent/f")
        with pytest.raises(StorageError):
            store.put("absent/f", b"")
        with pytest.raises(StorageError):
            store.put_new("absent/f", b"")
        assert store.list("") == ()

    def test_a_read_past_the_end_is_corruption(self, store: Store) -> None:
        store.put("f", b"abc")
        with store.open("f") as reader:
            for offset, length in ((0, 4), (3, 1), (-1, 1), (1, -1)):
                with pytest.raises(CorruptError):
                    reader.read(offset, length)
            with pytest.raises(CorruptError):
                reader.read_into(1, memoryview(bytearray(3)))

    def test_a_file_over_the_limit_is_not_read(self, store: Store) -> None:
        store.put("f", b"abc")
        with pytest.raises(CorruptError):
            store.read("f", limit_bytes=2)

    def test_an_absent_file_is_a_missing_file(self, store: Store) -> None:
        for path in ("f", "absent/f"):
            with pytest.raises(MissingFileError):
                store.open(path)
            with pytest.raises(MissingFileError):
                store.read(path, limit_bytes=1)

    def test_a_folder_is_no_file(self, store: Store) -> None:
        store.make_dirs("d")
        with pytest.raises(UnsafePathError):
            store.open("d")
        with pytest.raises(StorageError):
            store.put("d", b"")
        assert store.put_new("d", b"") is False

    def test_a_file_is_no_folder(self, store: Store) -> None:
        store.put("f", b"")
        calls: tuple[Callable[[], object], ...] = (
            lambda: store.open("f/g"),
            lambda: store.list("f"),
            lambda: store.create("f/g"),
            lambda: store.put("f/g", b""),
            lambda: store.put_new("f/g", b""),
            lambda: store.make_dirs("f/g"),
            lambda: store.make_dirs("f"),
            lambda: store.sync_dir("f"),
            lambda: store.move_dir("f", "g"),
            lambda: store.remove_tree("f/g"),
        )
        for call in calls:
            with pytest.raises(StorageError):
                call()
        assert not store.exists("f/g")
        assert store.read("f", limit_bytes=0) == b""

    def test_put_new_creates_once(self, store: Store) -> None:
        assert store.put_new("f", b"first") is True
        assert store.put_new("f", b"second") is False
        assert store.read("f", limit_bytes=100) == b"first"
        assert store.list("") == (Entry(name="f", is_dir=False, size_bytes=5),)

    def test_one_of_many_racers_creates(self, store: Store) -> None:
        won: dict[int, bool] = {}
        _together(lambda i: won.__setitem__(i, store.put_new("f", b"%d" % i)))
        winners = [i for i in won if won[i]]
        assert len(winners) == 1
        assert store.read("f", limit_bytes=100) == b"%d" % winners[0]

    def test_put_replaces(self, store: Store) -> None:
        store.put("f", b"first, and longer")
        with store.open("f") as reader:
            store.put("f", b"second")
            assert reader.read(0, reader.size_bytes) == b"first, and longer"
        assert store.read("f", limit_bytes=100) == b"second"
        assert [entry.name for entry in store.list("")] == ["f"]

    def test_a_listing_is_sorted_and_complete(self, store: Store) -> None:
        store.make_dirs("d/e")
        store.put("d/b", b"12")
        store.put("d/a", b"")
        assert store.list("d") == (
            Entry(name="a", is_dir=False, size_bytes=0),
            Entry(name="b", is_dir=False, size_bytes=2),
            Entry(name="e", is_dir=True, size_bytes=0),
        )
        assert store.list("absent") == ()
        assert store.list("absent/too") == ()

    def test_exists_sees_files_and_folders(self, store: Store) -> None:
        store.make_dirs("d")
        store.put("d/f", b"")
        assert all(store.exists(path) for path in ("", "d", "d/f"))
        assert not any(store.exists(path) for path in ("e", "d/e", "e/f"))

    def test_make_dirs_is_fine_twice(self, store: Store) -> None:
        store.make_dirs("a/b")
        store.put("a/b/f", b"1")
        store.make_dirs("a/b/c")
        store.make_dirs("a/b")
        store.make_dirs("")
        assert store.read("a/b/f", limit_bytes=1) == b"1"

    def test_many_may_make_the_same_folders(self, store: Store) -> None:
        _together(lambda i: store.make_dirs(f"a/b/c/{i}"))
        assert len(store.list("a/b/c")) == RACERS

    def test_sync_dir_wants_a_folder(self, store: Store) -> None:
        store.make_dirs("d")
        store.sync_dir("d")
        store.sync_dir("")
        with pytest.raises(StorageError):
            store.sync_dir("absent")

    def test_move_dir_moves_all(self, store: Store) -> None:
        store.make_dirs("staging/x/sub")
        store.put("staging/x/sub/f", b"1")
        with store.open("staging/x/sub/f") as reader:
            store.move_dir("staging/x", "final")
            assert reader.read(0, 1) == b"1"
        assert not store.exists("staging/x")
        assert store.read("final/sub/f", limit_bytes=1) == b"1"

    @pytest.mark.parametrize("content", ["", "f", "d"])
    def test_move_dir_replaces_nothing(self, store: Store, content: str) -> None:
        store.make_dirs("source")
        store.put("source/g", b"")
        store.make_dirs("target")
        if content == "f":
            store.put("target/f", b"")
        if content == "d":
            store.make_dirs("target/d")
        store.put("file", b"")
        for target in ("target", "file", "source", "source/below", "absent/target"):
            with pytest.raises(StorageError):
                store.move_dir("source", target)
        assert [entry.name for entry in store.list("")] == ["file", "source", "target"]
        assert [entry.name for entry in store.list("target")] == list(content)

    def test_moving_what_is_absent_is_refused(self, store: Store) -> None:
        with pytest.raises(StorageError):
            store.move_dir("absent", "target")
        with pytest.raises(StorageError):
            store.move_dir("absent/too", "target")

    def test_remove_tree_removes_all_below(self, store: Store) -> None:
        store.make_dirs("d/e")
        store.put("d/e/f", b"")
        store.put("d/f", b"")
        store.put("g", b"")
        store.remove_tree("d")
        store.remove_tree("g")
        store.remove_tree("absent")
        store.remove_tree("absent/too")
        assert store.list("") == ()

    def test_an_open_file_outlives_its_name(self, store: Store) -> None:
        store.put("f", b"abc")
        with store.open("f") as reader:
            store.remove_tree("f")
            assert reader.read(0, 3) == b"abc"

    @pytest.mark.parametrize("path", UNSAFE_PATHS)
    def test_unsafe_paths_are_refused_everywhere(self, store: Store, path: str) -> None:
        store.make_dirs("a")
        calls: tuple[Callable[[], object], ...] = (
            lambda: store.create(path),
            lambda: store.open(path),
            lambda: store.read(path, limit_bytes=1),
            lambda: store.put_new(path, b""),
            lambda: store.put(path, b""),
            lambda: store.list(path),
            lambda: store.exists(path),
            lambda: store.make_dirs(path),
            lambda: store.sync_dir(path),
            lambda: store.move_dir("a", path),
            lambda: store.move_dir(path, "b"),
            lambda: store.remove_tree(path),
        )
        for call in calls:
            with pytest.raises(UnsafePathError):
                call()
        assert [entry.name for entry in store.list("")] == ["a"]

    def test_the_root_is_no_file_and_stays(self, store: Store) -> None:
        calls: tuple[Callable[[], object], ...] = (
            lambda: store.create(""),
            lambda: store.open(""),
            lambda: store.put_new("", b""),
            lambda: store.put("", b""),
            lambda: store.move_dir("", "b"),
            lambda: store.remove_tree(""),
        )
        for call in calls:
            with pytest.raises(UnsafePathError):
                call()

    def test_the_longest_names_work(self, store: Store) -> None:
        for name in ("x" * 255, "é" * 127, "a b'\"$(*)", ".hidden", "…"):
            assert store.put_new(name, b"1")
            store.put(name, b"2")
            assert store.read(name, limit_bytes=1) == b"2"

    def test_a_negative_offset_is_refused(self, store: Store) -> None:
        with store.create("f") as writer, pytest.raises(StorageError):
            writer.write_at(-1, b"x")


def _together(call: Callable[[int], object]) -> None:
    """Run the call with 0 to RACERS - 1, each on its thread, and raise what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(RACERS)

    def run(index: int) -> None:
        barrier.wait()
        try:
            call(index)
        except BaseException as error:  # noqa: BLE001 (handed to the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
