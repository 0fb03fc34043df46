"""Large writes past the page cache: the same bytes, whatever the system makes of O_DIRECT."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.errors import StorageError, StorageFullError
from ckptcoord.store import direct
from ckptcoord.store.local import LocalStore

PAGE = direct._ALIGN_BYTES


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """A few pages take every path that many MiB take."""
    monkeypatch.setattr(direct, "_LEAST_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct, "_CALL_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct, "_IDLE", deque(maxlen=2))


def write(path, parts):
    """Write (offset, bytes) parts and sync; returns what the file then holds."""
    with LocalStore(path, create=True) as store:
        with store.create("file") as writer:
            for offset, data in parts:
                writer.write_at(offset, data)
            writer.sync()
        store_path = path / "file"
        return store_path.read_bytes()


def past_the_cache(monkeypatch):
    """Every (offset, length) that was written with O_DIRECT."""
    seen = []
    pwrite = os.pwrite

    def call(descriptor, data, offset):
        count = pwrite(descriptor, data, offset)
        if os.get_blocking(descriptor) and fcntl_flags(descriptor) & os.O_DIRECT:
            seen.append((offset, count))
        return count

    monkeypatch.setattr(os, "pwrite", call)
    return seen


def fcntl_flags(descriptor):
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def needs_direct(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9 * PAGE), max_size=6), start=st.integers(0, 2 * PAGE), seed=...
)
def test_what_is_written_in_parts_of_any_size_is_what_is_read(
    tmp_path_factory, sizes, start, seed: int
):
    order = random.Random(seed)
    parts, offset = [], start
    for size in sizes:
        parts.append((offset, order.randbytes(size)))
        offset += size
    want = bytes(start) + b"".join(data for _, data in parts) if offset > start else b""
    order.shuffle(parts)
    assert write(tmp_path_factory.mktemp("any"), parts) == want


def test_the_aligned_middle_of_a_large_write_passes_by_the_cache(tmp_path, monkeypatch):
    needs_direct(tmp_path / "probe")
    seen = past_the_cache(monkeypatch)
    data = random.Random(0).randbytes(5 * PAGE + 77)
    assert write(tmp_path, [(100, data)]) == bytes(100) + data
    assert sorted(seen) == [(PAGE, 2 * PAGE), (3 * PAGE, 2 * PAGE)]


def test_a_small_write_goes_through_the_cache(tmp_path, monkeypatch):
    seen = past_the_cache(monkeypatch)
    data = random.Random(0).randbytes(2 * PAGE - 1)
    assert write(tmp_path, [(0, data)]) == data
    assert seen == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EMFILE, errno.ENOENT])
def test_where_the_file_cannot_be_opened_that_way_the_cache_is_used(tmp_path, monkeypatch, number):
    work = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return work(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    data = random.Random(1).randbytes(7 * PAGE)
    assert write(tmp_path, [(0, data), (len(data), data)]) == data + data


def test_where_the_system_has_no_such_flag_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    data = random.Random(1).randbytes(7 * PAGE)
    assert write(tmp_path, [(0, data)]) == data


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_refused_write_is_made_through_the_cache(tmp_path, monkeypatch, number, calls):
    needs_direct(tmp_path / "probe")
    left, work = [calls], os.pwrite

    def refuse(descriptor, data, offset):
        if fcntl_flags(descriptor) & os.O_DIRECT:
            if not left[0]:
                raise OSError(number, os.strerror(number))
            left[0] -= 1
        return work(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = random.Random(2).randbytes(7 * PAGE + 5)
    assert write(tmp_path, [(9, data), (9 + len(data), data)]) == bytes(9) + data + data


@pytest.mark.parametrize("most", [0, 512, PAGE])
def test_a_short_write_is_completed_through_the_cache(tmp_path, monkeypatch, most):
    needs_direct(tmp_path / "probe")
    work = os.pwrite

    def short(descriptor, data, offset):
        if fcntl_flags(descriptor) & os.O_DIRECT:
            return work(descriptor, data[:most], offset) if most else 0
        return work(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    data = random.Random(3).randbytes(7 * PAGE + 5)
    assert write(tmp_path, [(9, data)]) == bytes(9) + data


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, StorageError), (errno.ENOSPC, StorageFullError)]
)
def test_a_device_that_refuses_is_an_error_and_the_file_is_abandoned(
    tmp_path, monkeypatch, number, kind
):
    needs_direct(tmp_path / "probe")
    work = os.pwrite

    def refuse(descriptor, data, offset):
        if fcntl_flags(descriptor) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return work(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    with LocalStore(tmp_path) as store, store.create("file") as writer:
        with pytest.raises(kind):
            writer.write_at(0, bytes(4 * PAGE))
        with pytest.raises(StorageError, match="abandoned"):
            writer.sync()


def test_no_descriptor_is_left_open(tmp_path):
    def open_descriptors():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (only their number counts)

    before = open_descriptors()
    write(tmp_path, [(0, bytes(8 * PAGE))])
    assert open_descriptors() == before


def test_several_threads_write_one_file(tmp_path):
    data = random.Random(4).randbytes(64 * PAGE + 3)
    step = 5 * PAGE + 1
    with LocalStore(tmp_path) as store:
        with store.create("file", size_bytes=len(data)) as writer, ThreadPoolExecutor(4) as pool:
            starts = range(0, len(data), step)
            list(pool.map(lambda at: writer.write_at(at, data[at : at + step]), starts))
            writer.sync()
        assert (tmp_path / "file").read_bytes() == data


# --- the space of a file -------------------------------------------------------------------------


def test_a_file_of_known_size_has_it_from_the_start_and_reads_as_zeros(tmp_path):
    with LocalStore(tmp_path) as store:
        with store.create("file", size_bytes=5000) as writer:
            writer.write_at(10, b"x")
            writer.sync()
        assert (tmp_path / "file").read_bytes() == bytes(10) + b"x" + bytes(4989)


def with_fallocate(monkeypatch, *errors):
    """The system's call gives these errors in turn."""
    left = list(errors)

    class System:
        def __init__(self, *_, **__):
            pass

        def fallocate(self, *_):
            ctypes.set_errno(left.pop(0))
            return -1 if ctypes.get_errno() else 0

    System.fallocate = type("Call", (), {"__call__": System.fallocate})()
    monkeypatch.setattr(ctypes, "CDLL", System)


def test_a_full_device_says_so_before_anything_is_written(tmp_path, monkeypatch):
    with_fallocate(monkeypatch, errno.EINTR, errno.ENOSPC)
    with LocalStore(tmp_path) as store, pytest.raises(StorageFullError):
        store.create("file", size_bytes=5000)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_space_cannot_be_taken_the_file_grows_as_it_is_written(tmp_path, monkeypatch, number):
    with_fallocate(monkeypatch, number)
    with LocalStore(tmp_path) as store:
        with store.create("file", size_bytes=5000) as writer:
            writer.write_at(0, b"x")
        assert (tmp_path / "file").read_bytes() == b"x"


def test_where_the_system_has_no_such_call_the_file_grows_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    with LocalStore(tmp_path) as store, store.create("file", size_bytes=5000):
        assert (tmp_path / "file").stat().st_size == 0


# --- from where the bytes are --------------------------------------------------------------------


def aligned(pages, shift=0):
    """Random bytes that begin `shift` past a page in memory; and the memory, to keep."""
    raw = mmap.mmap(-1, (pages + 1) * PAGE)
    view = memoryview(raw)[shift : shift + pages * PAGE]
    view[:] = random.Random(7).randbytes(pages * PAGE)
    return view


def bounced(monkeypatch):
    """The length of every part that went through a buffer of the writer's own."""
    seen = []
    write = direct.DirectFile._write

    def call(self, offset, part, buffer):
        seen.append(part.nbytes)
        return write(self, offset, part, buffer)

    monkeypatch.setattr(direct.DirectFile, "_write", call)
    return seen


@pytest.mark.parametrize(("shift", "offset"), [(0, 0), (512, 512), (0, PAGE), (1024, 512)])
def test_bytes_that_are_aligned_in_memory_are_not_copied(tmp_path, monkeypatch, shift, offset):
    needs_direct(tmp_path / "probe")
    copies, past = bounced(monkeypatch), past_the_cache(monkeypatch)
    data = aligned(9, shift)
    assert write(tmp_path / "s", [(offset, data)]) == bytes(offset) + bytes(data)
    assert copies == []
    assert sum(count for _, count in past) >= 8 * PAGE


def test_bytes_that_are_not_aligned_go_through_a_buffer(tmp_path, monkeypatch):
    needs_direct(tmp_path / "probe")
    copies = bounced(monkeypatch)
    data = aligned(9, 8)
    assert write(tmp_path / "s", [(0, data)]) == bytes(data)
    assert sum(copies) == 9 * PAGE


def test_files_that_follow_one_another_take_the_same_buffers(tmp_path, monkeypatch):
    needs_direct(tmp_path / "probe")
    bounced(monkeypatch)
    data = random.Random(5).randbytes(9 * PAGE)
    assert write(tmp_path, [(0, memoryview(b"x" + data)[1:])]) == data
    (kept,) = direct._IDLE
    (tmp_path / "file").unlink()
    assert write(tmp_path, [(0, memoryview(b"x" + data)[1:])]) == data
    assert [*direct._IDLE] == [kept]
    kept.close()  # no view of it is left


@pytest.mark.parametrize("refused_at", [0, 1])
def test_a_device_that_wants_another_alignment_gets_a_buffer(tmp_path, monkeypatch, refused_at):
    needs_direct(tmp_path / "probe")
    copies, calls, pwrite = bounced(monkeypatch), [], os.pwrite

    def refuse(descriptor, data, offset):
        if fcntl_flags(descriptor) & os.O_DIRECT and not copies:
            calls.append(offset)
            if len(calls) == refused_at + 1:
                raise OSError(errno.EINVAL, "no")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = aligned(9)
    assert write(tmp_path / "s", [(0, data), (9 * PAGE, data)]) == bytes(data) * 2
    assert sum(copies) >= 9 * PAGE
    assert len(calls) == refused_at + 1


@pytest.mark.parametrize("most", [0, 512, PAGE + 512])
def test_a_write_in_place_that_stops_early_is_completed(tmp_path, monkeypatch, most):
    needs_direct(tmp_path / "probe")
    pwrite, cut = os.pwrite, []

    def short(descriptor, data, offset):
        if fcntl_flags(descriptor) & os.O_DIRECT and not cut:
            cut.append(offset)
            return pwrite(descriptor, data[:most], offset) if most else 0
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    data = aligned(9)
    assert write(tmp_path / "s", [(0, data)]) == bytes(data)
    assert cut
