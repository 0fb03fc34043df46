"""A piece's bytes, in whatever parts they come, end up in the boxes that they belong to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec import scatter
from ckptcoord.codec.scatter import Scatter, Target
from ckptcoord.core.box import Box
from ckptcoord.errors import ConfigError
from tests.unit.core.test_box import boxes

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
    for _ in range(2):  # a second pass begins anew
        sink.begin()
        at = 0
        while at < len(stream):
            size = data.draw(st.integers(1, len(stream)))
            sink.take(memoryview(stream)[at : at + size])
            at += size
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
