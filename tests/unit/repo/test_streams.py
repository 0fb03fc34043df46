"""Files whose tensors' sizes come out one by one read as any other, by us and by safetensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from ckptcoord.codec.tensorfile import TensorSpec, room_for_header
from ckptcoord.errors import StorageError
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.streams import ShardStream
from ckptcoord.store.memory import MemoryStore

GREATEST = 1 << 40


def spec(name, size):
    return TensorSpec(name=name, dtype="U8", shape=(size,))


def written(store, tensors, metadata, room_bytes):
    with (
        store.create("f") as writer,
        ShardStream(writer, "f", room_bytes=room_bytes, threads=1) as stream,
    ):
        for name, data in tensors.items():
            stream.put(spec(name, len(data)), memoryview(data))
        return stream.finish(metadata)


@given(
    tensors=st.dictionaries(
        st.text("abcdé_", min_size=1, max_size=9), st.binary(max_size=300), max_size=12
    ),
    note=st.text(max_size=40),
    spare=st.integers(0, 40),
)
def test_what_was_put_is_read(tensors, note, spare):
    store, longest = MemoryStore(), {"note": note + " " * spare}
    room_bytes = room_for_header([spec(name, GREATEST) for name in tensors], longest)
    file = written(store, tensors, {"note": note}, room_bytes)
    raw = store.read("f", limit_bytes=1 << 30)
    assert len(raw) == file.size_bytes == room_bytes + sum(map(len, tensors.values()))
    assert {name: bytes(array) for name, array in load(raw).items()} == tensors
    with ShardReader(store, "f", expected=file.digest, size_bytes=file.size_bytes) as reader:
        assert reader.header.entries == file.entries
        assert reader.header.metadata["note"] == note
        for entry in reader.header.entries:
            out = bytearray(entry.spec.nbytes)
            reader.read_into(entry, memoryview(out))
            assert out == tensors[entry.spec.name]


def test_a_header_that_outgrows_its_room_is_a_bug_and_no_file():
    with pytest.raises(AssertionError, match="room"):
        written(MemoryStore(), {"a": b"x" * 100}, {"note": "n" * 500}, 200)


def test_a_storage_that_fails_is_heard_while_tensors_come():
    class Full(MemoryStore):
        def create(self, path, *, size_bytes=0):
            writer = super().create(path, size_bytes=size_bytes)

            def refuse(offset, data):
                raise StorageError(operation="write", path=path, why="full")

            writer.write_at = refuse
            return writer

    big = np.zeros(40 << 20, np.uint8)
    with pytest.raises(StorageError, match="full"):
        written(Full(), {"a": big, "b": big, "c": big}, {}, 4096)
