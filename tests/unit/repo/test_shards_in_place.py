"""Reading in two steps: first every tensor is checked, then its bytes go where they belong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.errors import ConfigError, CorruptError, DigestMismatchError
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.readjobs import check_inputs, check_tensors, fill_tensors
from ckptcoord.repo.shards import TensorSource, write_shard
from ckptcoord.store.local import LocalStore

PATH = "model.safetensors"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Tensors of a few hundred bytes take every path that those of many MiB take."""
    monkeypatch.setattr(ShardReader, "part_bytes", 32)


def write(folder, contents):
    store = LocalStore(folder)
    sources = [
        TensorSource(
            spec=TensorSpec(name=f"t{i}", dtype="U8", shape=(len(data),)),
            read=lambda data=data: np.frombuffer(data, np.uint8),
        )
        for i, data in enumerate(contents)
    ]
    written = write_shard(store, PATH, sources)
    return ShardReader(store, PATH, expected=written.digest), written


def jobs_of(reader):
    return [
        (reader, entry, memoryview(bytearray(b"\xee" * entry.spec.nbytes)))
        for entry in reader.header.entries
    ]


def flip(folder, entry, at=0):
    path = folder / PATH
    data = bytearray(path.read_bytes())
    data[entry.begin + at] ^= 1
    with path.open("r+b") as file:  # the very same file: an open reader sees it
        file.write(data)


@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(st.binary(min_size=0, max_size=200), min_size=1, max_size=6),
    threads=st.integers(1, 3),
)
def test_what_was_checked_is_filled_in(tmp_path_factory, contents, threads):
    reader, _ = write(tmp_path_factory.mktemp("shard"), contents)
    with reader:
        jobs = jobs_of(reader)
        found = check_inputs(jobs, {}, threads=threads)
        assert all(set(out) <= {0xEE} for _, _, out in jobs), "a check touches no destination"
        fill_tensors(zip(jobs, found, strict=True), threads=threads)
        for _, entry, out in jobs:
            assert out.tobytes() == contents[int(entry.spec.name[1:])]


@pytest.mark.parametrize("at", [0, 31, 32, 99])
def test_a_flip_before_the_check_is_found_by_it(tmp_path, at):
    reader, written = write(tmp_path, [bytes(100), bytes(range(100))])
    flip(tmp_path, written.entries[1], at)
    with reader, pytest.raises(DigestMismatchError) as caught:
        check_tensors(jobs_of(reader), threads=2)
    assert written.entries[1].spec.name in str(caught.value)


@pytest.mark.parametrize("at", [0, 31, 32, 99])
def test_a_flip_after_the_check_is_found_by_the_read(tmp_path, at):
    reader, written = write(tmp_path, [bytes(100), bytes(range(100))])
    with reader:
        jobs = jobs_of(reader)
        found = check_inputs(jobs, {}, threads=1)
        flip(tmp_path, written.entries[1], at)
        with pytest.raises(CorruptError, match="changed between the check and the read") as caught:
            fill_tensors(zip(jobs, found, strict=True), threads=1)
    assert written.entries[1].spec.name in str(caught.value)


def test_a_file_that_is_cut_after_the_check_is_corrupt(tmp_path):
    reader, written = write(tmp_path, [bytes(100)])
    with reader:
        jobs = jobs_of(reader)
        found = check_inputs(jobs, {}, threads=1)
        with (tmp_path / PATH).open("r+b") as file:
            file.truncate(written.size_bytes - 10)
        with pytest.raises(CorruptError, match="the file ends"):
            fill_tensors(zip(jobs, found, strict=True), threads=1)


@pytest.mark.parametrize("out", [bytearray(99), bytes(100), bytearray(101)])
def test_memory_that_does_not_fit_is_refused(tmp_path, out):
    reader, _ = write(tmp_path, [bytes(100)])
    with reader:
        (entry,) = reader.header.entries
        with pytest.raises(ConfigError, match="flat, writable"):
            reader.fill(entry, memoryview(out), reader.check(entry))
