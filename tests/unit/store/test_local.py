"""LocalStore: the suite, and what only a real file system has."""

from __future__ import annotations

import errno
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptcoord.errors import (
    ClosedError,
    CorruptError,
    StorageError,
    StorageFullError,
    UnsafePathError,
)
from ckptcoord.store import files
from ckptcoord.store.local import LocalStore
from ckptcoord.testing.suite import StoreSuite


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def store(root):
    before = open_descriptors()
    with LocalStore(root, create=True) as store:
        yield store
    assert open_descriptors() == before, "a descriptor was left open"


def fail(*, number=errno.EIO, times=1, work=None):
    """A system call that fails its first `times` calls, then does the work."""
    left = [times]

    def call(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return work(*args, **kwargs)

    return call


class TestLocalStore(StoreSuite):
    pass


def test_an_absent_root_is_refused(tmp_path):
    with pytest.raises(StorageError) as caught:
        LocalStore(tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT


def test_a_file_as_root_is_refused(tmp_path):
    (tmp_path / "f").touch()
    for path in (tmp_path / "f", tmp_path / "f" / "below"):
        with pytest.raises(StorageError):
            LocalStore(path, create=True)


def test_a_root_is_made_with_its_parents_and_opened_again(tmp_path):
    for _ in range(2):
        with LocalStore(tmp_path / "a" / "b", create=True) as store:
            assert store.url == str(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_a_root_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with LocalStore(tmp_path / "link", create=True) as store:
        store.put("f", b"1")
    assert (tmp_path / "real" / "f").read_bytes() == b"1"


def test_a_store_follows_its_folder_when_that_is_renamed(store, root):
    root.rename(root.with_name("elsewhere"))
    root.mkdir()
    store.put("f", b"1")
    assert (root.with_name("elsewhere") / "f").exists()
    assert not (root / "f").exists()


def test_a_closed_store_is_closed(root):
    store = LocalStore(root, create=True)
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.list("")


def test_a_dropped_store_gives_its_descriptor_back(root):
    before = open_descriptors()
    store = LocalStore(root, create=True)
    del store
    assert open_descriptors() == before


def test_closed_writers_and_readers_are_closed(store):
    with store.create("f") as writer:
        pass
    writer.__exit__(None, None, None)
    with pytest.raises(ClosedError):
        writer.write_at(0, b"x")
    with pytest.raises(ClosedError):
        writer.sync()
    with store.open("f") as reader:
        pass
    reader.__exit__(None, None, None)
    with pytest.raises(ClosedError):
        reader.read(0, 0)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        with LocalStore(tmp_path / "root", create=True) as store:
            store.make_dirs("a/b")
            store.put("a/put", b"")
            store.put_new("a/new", b"")
            store.create("a/created").__exit__(None, None, None)
    finally:
        os.umask(old)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "root").rglob("*")
    }
    files_too = {"put": 0o600, "new": 0o600, "created": 0o600}
    assert modes == {"a": 0o700, "b": 0o700, **files_too}


def test_a_folder_that_was_there_keeps_its_mode(store, root):
    (root / "d").mkdir()
    (root / "d").chmod(0o755)
    store.make_dirs("d/e")
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o755


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    return folder


def test_links_are_not_followed(store, root, outside):
    (root / "file").symlink_to(outside / "secret")
    (root / "dir").symlink_to(outside)
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    calls = [
        lambda: store.open("file"),
        lambda: store.open("dangling"),
        lambda: store.open("loop"),
        lambda: store.open("dir"),
        lambda: store.open("dir/secret"),
        lambda: store.list("dir"),
        lambda: store.exists("dir/secret"),
        lambda: store.create("dir/new"),
        lambda: store.put("dir/secret", b""),
        lambda: store.put_new("dir/new", b""),
        lambda: store.make_dirs("dir/new"),
        lambda: store.make_dirs("dir"),
        lambda: store.sync_dir("dir"),
        lambda: store.remove_tree("dir/secret"),
    ]
    for call in calls:
        with pytest.raises(UnsafePathError):
            call()
    with pytest.raises(StorageError):
        store.create("dangling")
    with pytest.raises(StorageError):
        store.move_dir("dir", "elsewhere")
    assert store.put_new("dangling", b"") is False
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_removing_a_tree_with_links_removes_the_links_only(store, root, outside):
    store.make_dirs("d/e")
    (root / "d" / "e" / "dir").symlink_to(outside)
    (root / "d" / "file").symlink_to(outside / "secret")
    (root / "link").symlink_to(outside)
    store.remove_tree("d")
    store.remove_tree("link")
    assert store.list("") == ()
    assert (outside / "secret").exists()


def test_a_put_replaces_a_link_and_not_its_target(store, root, outside):
    (root / "f").symlink_to(outside / "secret")
    store.put("f", b"mine")
    assert store.read("f", limit_bytes=4) == b"mine"
    assert (outside / "secret").read_bytes() == b"secret"


def test_what_is_no_plain_file_is_refused_without_waiting(store, root):
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root)  # a socket's path may have 108 bytes only
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        for path in ("fifo", "socket"):
            with pytest.raises(UnsafePathError):
                store.open(path)
    assert [entry.name for entry in store.list("")] == ["fifo", "socket"]


def test_a_device_is_refused():
    with LocalStore("/dev") as store, pytest.raises(UnsafePathError):
        store.open("null")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_has_its_own_error(store, monkeypatch, number, call):
    def fill():
        with store.create("f") as writer:
            writer.write_at(0, b"x")
            writer.sync()

    monkeypatch.setattr(os, call, fail(number=number, times=99))
    with pytest.raises(StorageFullError) as caught:
        fill()
    assert caught.value.errno == number
    for put in (store.put, store.put_new):
        with pytest.raises(StorageFullError):
            put("g", b"x")
    assert [entry.name for entry in store.list("")] == ["f"], "a temporary file was left"


def test_after_a_failed_fsync_the_file_is_abandoned(store, monkeypatch):
    with store.create("f") as writer:
        writer.write_at(0, b"x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail())
            with pytest.raises(StorageError) as caught:
                writer.sync()
        assert (caught.value.errno, caught.value.operation) == (errno.EIO, "fsync")
        with pytest.raises(StorageError, match="abandoned"):
            writer.sync()
        with pytest.raises(StorageError, match="abandoned"):
            writer.write_at(0, b"x")


def test_short_writes_and_reads_are_completed(store, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:2]], at))
    data = bytes(range(100))
    store.put("f", data)
    assert store.read("f", limit_bytes=100) == data


def test_a_write_of_nothing_is_an_error_and_no_loop(store, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with store.create("f") as writer, pytest.raises(StorageError, match="nothing"):
        writer.write_at(0, b"x")


def test_a_call_that_says_again_is_made_again(store, monkeypatch):
    monkeypatch.setattr(os, "pwrite", fail(number=errno.EAGAIN, times=2, work=os.pwrite))
    monkeypatch.setattr(os, "preadv", fail(number=errno.EAGAIN, times=2, work=os.preadv))
    store.put("f", b"abc")
    assert store.read("f", limit_bytes=3) == b"abc"


def test_a_call_that_says_again_for_ever_is_an_error(store, monkeypatch):
    monkeypatch.setattr(files, "_AGAIN_PAUSE_S", 0)
    monkeypatch.setattr(os, "pwrite", fail(number=errno.EAGAIN, times=10**6))
    with store.create("f") as writer, pytest.raises(StorageError) as caught:
        writer.write_at(0, b"x")
    assert caught.value.errno == errno.EAGAIN


def test_a_failed_close_is_an_error(store, monkeypatch):
    close = os.close

    def closing(fd):
        close(fd)
        raise OSError(errno.EIO, "input/output error")

    writer = store.create("f")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closing)
        with pytest.raises(StorageError, match="close"):
            writer.__exit__(None, None, None)
    other = store.create("g")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closing)
        first = ValueError("first")
        other.__exit__(ValueError, first, None)
    assert "closing g failed too" in first.__notes__[0]


def test_a_file_that_shrinks_while_it_is_read_is_corruption(store, root):
    store.put("f", b"abcdef")
    with store.open("f") as reader:
        os.truncate(root / "f", 2)
        with pytest.raises(CorruptError, match="ends at byte 2"):
            reader.read(0, 6)


def test_a_failed_read_is_an_error(store, monkeypatch):
    store.put("f", b"abc")
    monkeypatch.setattr(os, "preadv", fail())
    with pytest.raises(StorageError) as caught:
        store.read("f", limit_bytes=3)
    assert caught.value.errno == errno.EIO


def test_a_file_whose_mode_cannot_be_set_is_an_error(store, monkeypatch):
    monkeypatch.setattr(os, "fchmod", fail(number=errno.EPERM, times=9))
    with pytest.raises(StorageError):
        store.create("f")
    with pytest.raises(StorageError):
        store.make_dirs("d")


def test_ones_own_link_is_a_success_though_the_system_says_it_exists(store, monkeypatch):
    link = os.link

    def twice(*args, **kwargs):
        link(*args, **kwargs)
        link(*args, **kwargs)

    monkeypatch.setattr(os, "link", twice)
    assert store.put_new("f", b"mine") is True
    assert store.read("f", limit_bytes=4) == b"mine"


def test_a_name_that_vanishes_after_it_won_is_a_lost_race(store, monkeypatch):
    monkeypatch.setattr(os, "link", fail(number=errno.EEXIST))
    assert store.put_new("f", b"mine") is False


def test_an_unknown_outcome_of_a_link_is_an_error_and_leaves_no_temporary_file(store, monkeypatch):
    link = os.link

    def lost(*args, **kwargs):
        link(*args, **kwargs)
        raise OSError(errno.EIO, "reply lost")

    monkeypatch.setattr(os, "link", lost)
    with pytest.raises(StorageError):
        store.put_new("f", b"mine")
    assert [entry.name for entry in store.list("")] == ["f"]


def test_a_temporary_file_that_cannot_be_removed_does_not_change_the_outcome(
    store, root, monkeypatch
):
    monkeypatch.setattr(os, "unlink", fail())
    assert store.put_new("f", b"mine") is True
    debris = [entry.name for entry in store.list("") if entry.name.startswith(".tmp-")]
    assert len(debris) == 1


def test_a_name_is_durable_before_put_new_says_so(store, monkeypatch):
    calls = []
    for name in ("pwrite", "fsync", "link", "replace", "unlink", "rename", "mkdir"):
        work = getattr(os, name)

        def call(*args, _name=name, _work=work, **kwargs):
            folder = stat.S_ISDIR(os.fstat(args[0]).st_mode) if _name == "fsync" else False
            calls.append("fsync folder" if folder else _name)
            return _work(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def order(action):
        calls.clear()
        action()
        return calls[:]

    written = ["pwrite", "fsync"]
    assert order(lambda: store.put_new("f", b"1")) == [*written, "link", "fsync folder", "unlink"]
    assert order(lambda: store.put("f", b"1")) == [*written, "replace", "fsync folder", "unlink"]
    # The second time too: whoever made a folder may not have come to its own fsync.
    for _ in range(2):
        assert order(lambda: store.make_dirs("d/e")) == ["mkdir", "fsync folder"] * 2
    assert order(lambda: store.move_dir("d/e", "g")) == ["rename", "fsync folder", "fsync folder"]


def test_names_that_vanish_while_they_are_listed_or_removed_are_skipped(store, root, monkeypatch):
    store.make_dirs("d")
    store.put("d/f", b"")
    scandir = os.scandir

    class Vanishing:
        def __init__(self, folder):
            self.inner = scandir(folder)

        def __enter__(self):
            entries = list(self.inner.__enter__())
            (root / "d" / "f").unlink(missing_ok=True)
            return iter(entries)

        def __exit__(self, *args):
            self.inner.__exit__(*args)

    monkeypatch.setattr(os, "scandir", Vanishing)
    assert store.list("d") == ()
    (root / "d" / "f").touch()
    store.remove_tree("d")
    assert not (root / "d").exists()


def test_names_that_are_no_text_are_listed_and_removed(store, root):
    store.make_dirs("d")
    (root / "d" / os.fsdecode(b"\xff")).touch()
    assert len(store.list("d")) == 1
    store.remove_tree("d")
    assert store.list("") == ()


def test_errors_name_no_more_than_the_path_in_the_store(store, monkeypatch):
    monkeypatch.setattr(os, "link", fail(number=errno.EROFS))
    with pytest.raises(StorageError) as caught:
        store.put_new("f", b"")
    assert str(caught.value) == "f: put_new failed: Read-only file system"


def test_threads_that_list_the_root_at_once_each_see_all_of_it(tmp_path):
    for number in range(50):
        (tmp_path / f"f{number}").touch()
    store = LocalStore(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        counts = set(pool.map(lambda _: len(list(store.list(""))), range(400)))
    assert counts == {50}
