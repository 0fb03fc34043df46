"""Of a tensor that was checked as a whole, only the parts that are wanted are read again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.test_box import boxes

from ckptcoord.codec import scatter
from ckptcoord.codec.scatter import Scatter, Target
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.core.box import Box
from ckptcoord.errors import CorruptError
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.shards import TensorSource, write_shard
from ckptcoord.store.memory import MemoryStore

PATH = "model.safetensors"
PART = 32
SHAPE = (30, 7)
WHOLE = np.random.default_rng(0).integers(1, 256, SHAPE, np.uint8)


class Counting(ShardReader):
    """Reads small parts, takes down which, and changes one byte in passing, if told to."""

    part_bytes = PART

    def __init__(self, store, written):
        self.read = []
        self.flipped = None
        super().__init__(store, PATH, expected=written.digest)

    def read_range(self, entry, offset, out, **more):
        self.read.append((offset, offset + out.nbytes))
        super().read_range(entry, offset, out, **more)
        if self.flipped in range(*self.read[-1]):
            out[self.flipped - offset] ^= 1


@pytest.fixture(scope="module")
def open_reader():
    store = MemoryStore()
    spec = TensorSpec(name="w", dtype="U8", shape=SHAPE)
    written = write_shard(store, PATH, [TensorSource(spec=spec, read=lambda: WHOLE.reshape(-1))])
    return lambda: Counting(store, written)


def into(box):
    memory = np.zeros((*box.size, 1), np.uint8)
    return memory, Scatter(Box.whole(SHAPE), 1, [Target(box=box, data=memory)])


def wanted_of(box):
    return WHOLE[box.seen_from(Box.whole(SHAPE))].reshape(*box.size, 1)


@given(boxes(SHAPE), st.sampled_from([1, 14, 1 << 18]))
def test_a_fill_reads_the_parts_that_are_wanted_and_no_others(open_reader, box, row_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "_ROW_BYTES", row_bytes)
        memory, out = into(box)
    with open_reader() as reader:
        (entry,) = reader.header.entries
        proof = reader.check(entry)
        assert sum(stop - start for start, stop in reader.read) == WHOLE.nbytes
        reader.read.clear()
        reader.fill(entry, out, proof)
    assert np.array_equal(memory, wanted_of(box))
    first, last = out.wanted
    assert all(start < last and stop > first for start, stop in reader.read)
    assert len(set(reader.read)) == len(reader.read)


@given(boxes(SHAPE))
def test_one_pass_fills_a_box_too(open_reader, box):
    memory, out = into(box)
    with open_reader() as reader:
        reader.read_into(reader.header.entries[0], out)
    assert np.array_equal(memory, wanted_of(box))


@pytest.mark.parametrize("columns", [slice(0, 7), slice(2, 5)])
@pytest.mark.parametrize(("at", "found"), [(0, False), (64, True), (71, True), (95, True)])
def test_what_changed_after_the_check_is_found_in_the_parts_that_are_read(
    open_reader, columns, at, found
):
    width = columns.stop - columns.start
    _, out = into(Box(offset=(10, columns.start), size=(2, width)))  # bytes 70 to 83, so 64 to 95
    with open_reader() as reader:
        (entry,) = reader.header.entries
        proof = reader.check(entry)
        reader.flipped = at
        if found:
            with pytest.raises(CorruptError, match="changed between the check and the read"):
                reader.fill(entry, out, proof)
        else:
            reader.fill(entry, out, proof)


def test_of_what_another_reader_checked_the_same_parts_are_read_and_held_to_its_findings(
    open_reader,
):
    box = Box(offset=(10, 0), size=(2, 7))  # bytes 70 to 83, so 64 to 95
    memory, out = into(box)
    with open_reader() as one, open_reader() as other:
        (entry,) = one.header.entries
        other.fill(entry, out, one.check(entry))
        assert other.read == [(64, 96)]
        assert np.array_equal(memory, wanted_of(box))
        other.flipped = 71
        with pytest.raises(CorruptError, match="changed between the check and the read"):
            other.fill(entry, out, one.check(entry))


def test_findings_of_another_tensor_are_refused(open_reader):
    _, out = into(Box.whole(SHAPE))
    with open_reader() as reader:
        (entry,) = reader.header.entries
        for proof in (b"", reader.check(entry)[:-16], reader.check(entry)[16:]):
            with pytest.raises(CorruptError, match="changed between the check and the read"):
                reader.fill(entry, out, proof)
