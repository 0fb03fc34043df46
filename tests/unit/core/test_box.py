"""Boxes of tensors: what they have in common, whether they cover, and how entries are named."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.box import Box, covers_once, parse_piece_name, piece_name
from ckptcoord.errors import ConfigError


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    def one(size: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda p: tuple(sorted(p)))

    return st.tuples(*(one(size) for size in shape)).map(
        lambda ranges: Box(offset=tuple(a for a, _ in ranges), size=tuple(b - a for a, b in ranges))
    )


shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, b) for a, b in zip(box.offset, box.stop, strict=True))))


@given(st.data(), shapes)
def test_what_two_boxes_have_in_common_are_the_elements_of_both(data, shape):
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = one.meet(other)
    assert elements(one) & elements(other) == (elements(common) if common else set())


@given(st.data(), shapes)
def test_boxes_cover_a_target_once_if_each_of_its_elements_is_in_one_of_them(data, shape):
    parts = data.draw(st.lists(boxes(shape), max_size=4))
    target = data.draw(boxes(shape))
    counts = np.zeros(shape, int)
    for part in parts:
        if part.volume:
            counts[part.seen_from(Box.whole(shape))] += 1
    seen = counts[target.seen_from(Box.whole(shape))]
    assert covers_once(parts, target) == bool((seen == 1).all())


@given(st.data(), shapes)
def test_a_grid_covers_what_it_was_cut_from(data, shape):
    cuts = [data.draw(st.sets(st.integers(1, size), max_size=3)) | {0, size} for size in shape]
    ranges = [list(zip(sorted(c), sorted(c)[1:], strict=False)) for c in cuts]
    grid = [
        Box(offset=tuple(a for a, _ in cell), size=tuple(b - a for a, b in cell))
        for cell in product(*ranges)
    ]
    assert covers_once(grid, Box.whole(shape))
    if len(grid) > 1:
        assert not covers_once(grid[1:], Box.whole(shape))
        assert not covers_once([*grid, grid[0]], Box.whole(shape))


@given(st.text(min_size=1), st.data(), shapes.filter(len))
def test_an_entrys_name_says_which_piece_it_holds(name, data, shape):
    box = data.draw(boxes(shape))
    assert parse_piece_name(piece_name(name, box)) == (name, box)


@pytest.mark.parametrize(
    "name", ["w", "w[]", "w[0]", "w[2:1]", "w[00:1]", "w[0:1,]", "[0:1]", "w[0:1]x", "w[-1:2]"]
)
def test_other_names_are_of_whole_tensors(name):
    assert parse_piece_name(name) is None


def test_a_box_is_of_a_tensor():
    assert Box(offset=(1, 2), size=(3, 4)).within((4, 6))
    assert not Box(offset=(1, 2), size=(3, 5)).within((4, 6))
    assert not Box(offset=(1,), size=(3,)).within((4, 6))
    with pytest.raises(ConfigError):
        Box(offset=(1,), size=(-1,))
    with pytest.raises(ConfigError):
        Box(offset=(1,), size=(1, 1))
