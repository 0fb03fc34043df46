"""A piece's bytes, in whatever parts they come, end up in the boxes that they belong to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.test_box import boxes

from ckptcoord.codec import scatter
from ckptcoord.codec.scatter import Scatter, Target
from ckptcoord.core.box import Box
from ckptcoord.errors import ConfigError

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@given(st.data(), shapes, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 7, 64, 1 << 18]))
def test_every_wanted_element_arrives_and_nothing_else_is_touched(data, shape, item, row_bytes):
    whole = np.random.default_rng(0).integers(1, 256, (*shape, item), np.uint8)
    piece = data.draw(boxes(shape))
    wanted = [data.draw(boxes(shape)) for _ in range(data.draw(st.integers(1, 3)))]
    memory = [np.zeros((*box.size, item), np.uint8) for box in wanted]
    stream = whole[piece.seen_from(Box.whole(shape))].tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "_ROW_BYTES", row_bytes)
        sink = Scatter(
            piece, item, [Target(box=b, data=m) for b, m in zip(wanted, memory, strict=True)]
        )
    first, last = sink.wanted
    for begin, end in [(0, len(stream)), (data.draw(st.integers(0, first)), last)]:
        at = begin  # a second pass begins anew, and need not bring what nobody wants
        sink.begin(at)
        while at < end:
            size = data.draw(st.integers(1, len(stream)))
            sink.take(memoryview(stream)[at : at + size])
            at += size
        check(shape, whole, piece, wanted, memory)
        for found in memory:
            found[...] = 0
    if sink.memory is not None:
        sink.memory[:] = stream[first:last]
        check(shape, whole, piece, wanted, memory)


def check(shape, whole, piece, wanted, memory):
    for box, found in zip(wanted, memory, strict=True):
        expected = np.zeros_like(found)
        common = piece.meet(box)
        if common:
            expected[common.seen_from(box)] = whole[common.seen_from(Box.whole(shape))]
        assert np.array_equal(found, expected)


def test_it_fills_strided_memory():
    memory = np.zeros((4, 6, 2), np.uint8)
    target = Target(box=Box(offset=(1, 0), size=(2, 3)), data=memory[::2, ::2])
    sink = Scatter(Box.whole((4, 3)), 2, [target])
    sink.take(memoryview(bytes(range(24))))
    assert memory[2, 4].tolist() == [16, 17]
    assert not memory[1].any()


def test_memory_has_the_shape_of_its_box():
    target = Target(box=Box.whole((2,)), data=np.zeros((3, 4), np.uint8))
    with pytest.raises(ConfigError, match="target"):
        Scatter(Box.whole((2,)), 4, [target])


@pytest.mark.parametrize(
    ("box", "run"),
    [
        (Box(offset=(1, 0), size=(2, 3)), True),
        (Box(offset=(0, 1), size=(1, 2)), True),
        (Box(offset=(2, 0), size=(9, 3)), True),
        (Box(offset=(0, 0), size=(4, 2)), False),
        (Box(offset=(0, 1), size=(3, 9)), False),
    ],
)
def test_what_is_wanted_in_one_run_has_memory_of_its_own(box, run):
    memory = np.zeros((*box.size, 2), np.uint8)
    assert (Scatter(Box.whole((4, 3)), 2, [Target(box=box, data=memory)]).memory is not None) is run


def test_two_that_want_the_same_have_no_memory_of_one():
    targets = [Target(box=Box.whole((4,)), data=np.zeros((4, 2), np.uint8)) for _ in range(2)]
    sink = Scatter(Box.whole((4,)), 2, targets)
    assert sink.memory is None
    assert sink.wanted == (0, 8)
