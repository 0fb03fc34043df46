"""Shard files: what is written is read, and what is not as it was written is found."""

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import (
    CkptError,
    ClosedError,
    ConfigError,
    CorruptError,
    DigestMismatchError,
    InvalidNameError,
    MissingFileError,
    StorageError,
    StorageFullError,
)
from ckptcoord.repo import ahead
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.readjobs import read_tensors
from ckptcoord.repo.shards import TensorSource, hf_index, write_file, write_shard
from ckptcoord.store.local import LocalStore
from ckptcoord.store.memory import MemoryStore
from ckptcoord.testing.faulty import FaultyStore, SimulatedCrash

PATH = "model.safetensors"


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def small_steps(monkeypatch):
    """Tensors of a few hundred bytes take every path that those of many MiB take."""
    monkeypatch.setattr(ShardReader, "part_bytes", 32)
    monkeypatch.setattr(ahead, "_INLINE_BYTES", 64)
    monkeypatch.setattr(ahead, "_AHEAD_BYTES", 512)
    monkeypatch.setattr(ahead, "_PIECE_BYTES", 128)


def source(name, data, dtype="U8", shape=None):
    array = np.frombuffer(data, np.uint8)
    if shape is None:
        shape = (len(data) // ITEM_BYTES[dtype],)
    return TensorSource(spec=TensorSpec(name=name, dtype=dtype, shape=shape), read=lambda: array)


def some_sources(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [source(f"t{i}", rng.bytes(int(rng.integers(0, 700)))) for i in range(count)]


def read_all(reader):
    outs = {entry.spec.name: bytearray(entry.spec.nbytes) for entry in reader.header.entries}
    jobs = [(reader, entry, memoryview(outs[entry.spec.name])) for entry in reader.header.entries]
    read_tensors(jobs, threads=2)
    return {name: bytes(out) for name, out in outs.items()}


def contents(sources):
    return {s.spec.name: s.read().tobytes() for s in sources}


def open_written(store, written):
    return ShardReader(store, written.path, expected=written.digest, size_bytes=written.size_bytes)


# --- writing and reading back ------------------------------------------------------------------


@settings(max_examples=40)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)
        ),
        max_size=10,
    ),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_was_written_is_read(tensors, threads, seed):
    rng = np.random.default_rng(seed)
    specs = [TensorSpec(name=f"t{i}", dtype=d, shape=s) for i, (d, s) in enumerate(tensors)]
    sources = [source(s.name, rng.bytes(s.nbytes), s.dtype, s.shape) for s in specs]
    store = MemoryStore()
    written = write_shard(store, PATH, sources, metadata={"a": "b"}, threads=threads)
    with open_written(store, written) as reader:
        assert reader.header.entries == written.entries
        assert reader.header.metadata == {"a": "b", "format": "pt"}
        assert {entry.spec for entry in written.entries} == set(specs)
        assert read_all(reader) == contents(sources)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_number_of_threads_and_the_steps_leave_no_trace_in_the_file(threads, seed):
    sources = some_sources(20, seed)
    plain, other = MemoryStore(), MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "part_bytes", 1 << 20)
        want = write_shard(plain, PATH, sources, threads=1)
    assert write_shard(other, PATH, reversed(sources), threads=threads) == want
    limit = want.size_bytes
    assert other.read(PATH, limit_bytes=limit) == plain.read(PATH, limit_bytes=limit)
    assert len(plain.read(PATH, limit_bytes=limit)) == limit
    with open_written(other, want) as reader:
        assert read_all(reader) == contents(sources)


def test_a_written_shard_is_durable_once_its_folder_is():
    store = MemoryStore()
    written = write_shard(store, PATH, some_sources())
    store.sync_dir("")
    with open_written(store.crash(), written) as reader:
        assert read_all(reader) == contents(some_sources())


def test_tensors_of_many_mebibytes_go_through_a_real_file(tmp_path):
    rng = np.random.default_rng(0)
    sizes = (40 << 20, (9 << 20) + 1, 300_000, 8, 0, (33 << 20) + 7)
    sources = [source(f"t{i}", rng.bytes(size)) for i, size in enumerate(sizes)]
    with LocalStore(tmp_path) as store:
        written = write_shard(store, PATH, sources, threads=3)
        assert (tmp_path / PATH).stat().st_size == written.size_bytes
        with open_written(store, written) as reader:
            assert read_all(reader) == contents(sources)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_is_read_once_in_file_order_and_let_go(threads):
    """Of tensors larger than the window, one at a time is in memory."""
    alive, order = [], []

    def reading(name):
        def read():
            order.append(name)
            assert not [ref for ref in alive if ref() is not None]
            data = np.full(1000, len(order), np.uint8)
            alive.append(weakref.ref(data))
            return data

        return read

    names = [f"t{i}" for i in range(10)]
    sources = [
        TensorSource(spec=TensorSpec(name=name, dtype="U8", shape=(1000,)), read=reading(name))
        for name in names
    ]
    write_shard(MemoryStore(), PATH, sources, threads=threads)
    assert order == names


@pytest.mark.usefixtures("small_steps")
def test_tensors_ahead_of_their_digests_stay_within_the_window(monkeypatch):
    held, most = [0], [0]
    real = ahead.blake3_digest

    def hashing(data, *, threads=1):
        digest = real(data, threads=threads)
        held[0] -= data.nbytes
        return digest

    monkeypatch.setattr(ahead, "blake3_digest", hashing)

    def read():
        held[0] += 100
        most[0] = max(most[0], held[0])
        return np.zeros(100, np.uint8)

    spec = [TensorSpec(name=f"t{i}", dtype="U8", shape=(100,)) for i in range(50)]
    write_shard(MemoryStore(), PATH, [TensorSource(spec=s, read=read) for s in spec])
    assert 0 < most[0] <= 512
    assert held[0] == 0


# --- what can go wrong in a write --------------------------------------------------------------


def some_other_error():
    raise ZeroDivisionError


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_fails_fails_the_write_with_its_own_error(threads):
    bad = TensorSource(spec=TensorSpec(name="t3", dtype="U8", shape=(9,)), read=some_other_error)
    store = MemoryStore()
    with pytest.raises(ZeroDivisionError):
        write_shard(store, PATH, [*some_sources(3), bad], threads=threads)
    with pytest.raises(CorruptError):
        ShardReader(store, PATH, expected=None)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(7, np.uint8),
        np.zeros(9, np.uint8),
        np.zeros(8, np.int8),
        np.zeros(2, np.float32),
        np.zeros((2, 4), np.uint8),
        np.zeros(16, np.uint8)[::2],
    ],
)
def test_a_source_that_gives_other_bytes_than_declared_is_refused(data):
    wrong = TensorSource(spec=TensorSpec(name="w", dtype="F32", shape=(2,)), read=lambda: data)
    with pytest.raises(ConfigError, match="'w'"):
        write_shard(MemoryStore(), PATH, [wrong])


def test_a_name_given_twice_is_refused_before_a_file_is_made():
    store = MemoryStore()
    with pytest.raises(InvalidNameError):
        write_shard(store, PATH, [source("a", b"x"), source("a", b"y")])
    assert not store.exists(PATH)


def test_a_file_that_exists_is_not_written_over():
    store = MemoryStore()
    write_file(store, PATH, b"old")
    with pytest.raises(StorageError):
        write_shard(store, PATH, some_sources())
    with pytest.raises(StorageError):
        write_file(store, PATH, b"new")
    assert store.read(PATH, limit_bytes=9) == b"old"


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_at_any_operation_is_raised(threads):
    counting = FaultyStore(MemoryStore())
    write_shard(counting, PATH, some_sources(), threads=threads)
    assert [op.name for op in counting.operations][-3:] == ["write_at", "sync", "close"]
    full = StorageFullError(operation="write", path=PATH, why="no space")
    for at in range(len(counting.operations)):
        store = FaultyStore(
            MemoryStore(), fail=lambda number, *_, at=at: full if number == at else None
        )
        with pytest.raises(StorageFullError) as caught:
            write_shard(store, PATH, some_sources(), threads=threads)
        assert caught.value is full


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_crash_before_the_header_leaves_nothing_that_can_be_read(threads):
    counting = FaultyStore(MemoryStore())
    write_shard(counting, PATH, some_sources(), threads=threads)
    names = [op.name for op in counting.operations]
    header_at = len(names) - 3
    for at in range(1, header_at + 1):
        inner = MemoryStore()
        with pytest.raises(SimulatedCrash):
            write_shard(FaultyStore(inner, crash_at=at), PATH, some_sources(), threads=threads)
        with pytest.raises(CorruptError):
            ShardReader(inner, PATH, expected=None)


# --- what can go wrong in a read ---------------------------------------------------------------


def test_every_changed_byte_is_found():
    good = MemoryStore()
    sources = [
        source("a", b"12345678", "C64", (1,)),
        source("z", b"1234567812345678", "C128", ()),
        source("e", b""),
        source("b", b"xyz"),
    ]
    written = write_shard(good, PATH, sources)
    data = good.read(PATH, limit_bytes=written.size_bytes)
    for at in range(len(data)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            store = MemoryStore()
            changed = bytearray(data)
            changed[at] ^= flip
            store.put_new(PATH, bytes(changed))
            with pytest.raises(CkptError) as caught, open_written(store, written) as reader:
                read_all(reader)
            assert PATH in str(caught.value)
            if at >= written.entries[0].begin:
                assert isinstance(caught.value, DigestMismatchError)
                (hit,) = (e for e in written.entries if e.begin <= at < e.end)
                assert caught.value.tensor == hit.spec.name


def test_every_shorter_and_a_longer_file_is_found():
    good = MemoryStore()
    written = write_shard(good, PATH, some_sources(2))
    data = good.read(PATH, limit_bytes=written.size_bytes)
    for other in [*(data[:n] for n in range(len(data))), data + b"\0"]:
        store = MemoryStore()
        store.put_new(PATH, other)
        with pytest.raises(CorruptError, match="its manifest says"):
            open_written(store, written)
        with pytest.raises(CorruptError):
            ShardReader(store, PATH, expected=written.digest)
        with pytest.raises(CorruptError):
            ShardReader(store, PATH, expected=None)


def test_a_sound_shard_in_the_place_of_another_is_found():
    store = MemoryStore()
    a = write_shard(store, "a", [source("w", b"1234")])
    b = write_shard(store, "b", [source("w", b"5678")])
    with pytest.raises(DigestMismatchError, match=r"^b: the file"):
        ShardReader(store, "b", expected=a.digest, size_bytes=b.size_bytes)


def test_a_missing_shard_is_named():
    with pytest.raises(MissingFileError, match=PATH):
        ShardReader(MemoryStore(), PATH, expected=None)


FOREIGN = (55).to_bytes(
    8, "little"
) + b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}  abcd'


def test_a_file_of_others_is_read_but_cannot_stand_for_ours():
    store = MemoryStore()
    store.put_new(PATH, FOREIGN)
    with ShardReader(store, PATH, expected=None) as reader:
        assert read_all(reader) == {"w": b"abcd"}
    with pytest.raises(CorruptError, match="no digests"):
        ShardReader(store, PATH, expected=blake3_digest(FOREIGN))


def test_a_reader_that_refuses_its_file_leaves_nothing_open(tmp_path):
    open_files = Path("/proc/self/fd")
    with LocalStore(tmp_path) as store:
        written = write_shard(store, PATH, some_sources(2))
        before = len(list(open_files.iterdir()))
        with pytest.raises(CorruptError):
            ShardReader(store, PATH, expected=written.digest, size_bytes=1)
        with pytest.raises(CorruptError):
            ShardReader(store, PATH, expected=blake3_digest(b""))
        with open_written(store, written):
            assert len(list(open_files.iterdir())) == before + 1
        assert len(list(open_files.iterdir())) == before


def test_a_closed_reader_says_so():
    store = MemoryStore()
    with open_written(store, write_shard(store, PATH, [source("w", b"1234")])) as reader:
        pass
    with pytest.raises(ClosedError):
        reader.read_into(reader.header.entries[0], memoryview(bytearray(4)))


@pytest.mark.parametrize(
    "out",
    [
        memoryview(bytearray(3)),
        memoryview(bytearray(5)),
        memoryview(np.zeros(1, np.float32)),
        memoryview(np.zeros((2, 2), np.uint8)),
        memoryview(bytes(4)),
    ],
)
def test_a_destination_that_does_not_fit_is_refused(out):
    store = MemoryStore()
    written = write_shard(store, PATH, [source("w", b"1234")])
    with open_written(store, written) as reader, pytest.raises(ConfigError, match="'w'"):
        reader.read_into(reader.header.entries[0], out)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 2, 4, 99])
def test_several_threads_read_several_files(threads):
    store = MemoryStore()
    want, jobs, outs, readers = {}, [], {}, []
    for number in range(3):
        sources = some_sources(10, seed=number)
        written = write_shard(store, f"{number}", sources)
        readers.append(open_written(store, written))
        for name, data in contents(sources).items():
            want[number, name] = data
        for entry in readers[-1].header.entries:
            out = bytearray(entry.spec.nbytes)
            outs[number, entry.spec.name] = out
            jobs.append((readers[-1], entry, memoryview(out)))
    read_tensors(jobs, threads=threads)
    assert outs == want


def test_no_job_is_no_error():
    read_tensors([], threads=4)


class Recorder:
    """Stands for a ShardReader whose reads take a moment; those of `bad` fail."""

    slow = False

    def __init__(self, bad):
        self.bad, self.began = bad, []

    def fill(self, entry, out, proof):
        self.began.append(entry)
        if entry == self.bad:
            raise DigestMismatchError(path="p", tensor=str(entry), expected="x", found="y")
        threading.Event().wait(0.001)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_failure_is_raised_and_the_rest_is_left_out(threads):
    reader = Recorder(bad=5)
    with pytest.raises(DigestMismatchError, match="tensor '5'"):
        read_tensors([(reader, i, memoryview(b"")) for i in range(1000)], threads=threads)
    assert len(reader.began) < 5 + 10 * threads


def test_large_tensors_are_begun_first():
    reader = Recorder(bad=None)
    read_tensors([(reader, i, memoryview(bytes(i))) for i in (2, 9, 4)], threads=1)
    assert reader.began == [9, 4, 2]


# --- other files -------------------------------------------------------------------------------


def test_any_other_files_digest_is_that_of_its_bytes():
    store = MemoryStore()
    written = write_file(store, "optimizer.state.json", b"{}")
    assert (written.path, written.size_bytes, written.entries) == ("optimizer.state.json", 2, ())
    assert written.digest == blake3_digest(b"{}")
    store.sync_dir("")
    assert store.crash().read("optimizer.state.json", limit_bytes=2) == b"{}"


def test_the_index_is_what_transformers_reads():
    index = hf_index({"m-2": ["b"], "m-1": ["c", "a"]}, 12)
    assert index.decode() == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n'
        '    "a": "m-1",\n    "b": "m-2",\n    "c": "m-1"\n  }\n}\n'
    )


def test_a_tensor_in_two_files_is_refused_in_the_index():
    with pytest.raises(InvalidNameError, match="two files"):
        hf_index({"m-1": ["a"], "m-2": ["a"]}, 1)
