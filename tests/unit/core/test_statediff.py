"""What differs between two states beside their tensors."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.leaf import NumpyAdapter
from ckptcoord.core.statediff import Status, state_changes
from ckptcoord.core.tree import flatten


def document(state):
    return flatten(state, NumpyAdapter()).document


def changes(old, new):
    found = state_changes(document(old), document(new), root="optimizer")
    return [(one.path, one.status.value, one.old, one.new) for one in found]


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.sampled_from([np.float32(1.5), np.int64(3), np.str_("x")]),
)
KEYS = st.one_of(st.text(max_size=3), st.integers(0, 3), st.booleans(), st.none())
STATES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=20),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(lambda d: defaultdict(list, d)),
        st.frozensets(st.integers(0, 5), max_size=3),
    ),
    max_leaves=25,
)


@given(old=STATES, new=STATES)
def test_nothing_is_said_to_differ_if_and_only_if_the_documents_are_the_same(old, new):
    same = dump_json(document(old)) == dump_json(document(new))
    assert (changes(old, new) == []) is same


@given(state=STATES)
def test_a_state_does_not_differ_from_itself(state):
    assert changes(state, state) == []


def test_an_optimizers_settings_are_named_by_the_way_to_them():
    old = {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None}], "state": {}}
    new = {
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "foreach": None}],
        "state": {0: {"step": 1, "m": np.zeros(3)}},
    }
    assert changes(old, new) == [
        ("optimizer.param_groups[0].lr", "changed", 1e-3, 1e-4),
        ("optimizer.param_groups[0].betas[1]", "changed", 0.95, 0.99),
        ("optimizer.state[0].step", "added", None, 1),
    ]


def test_tensors_are_left_out_also_where_they_are_in_pieces():
    whole = {"w": {"$": "tensor", "name": "w"}}
    cut = {"w": {"$": "sharded", "name": "w", "shape": [4]}}
    assert state_changes(whole, cut, root="m") == []
    assert changes({"w": np.zeros(2)}, {"w": 3}) == [("optimizer.w", "changed", "a tensor", 3)]
    assert changes({"w": np.zeros(2)}, {}) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1, 1.0, ("changed", 1, 1.0)),
        (1, True, ("changed", 1, True)),
        (0.0, -0.0, ("changed", 0.0, -0.0)),
        (None, 0, ("changed", None, 0)),
        (b"abc", b"abd", ("changed", "3 bytes, 616263", "3 bytes, 616264")),
        (2**4000, 2, ("changed", "an integer of 4001 bits", 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ("changed", "keys in one order", "keys in another")),
        ([], (), ("changed", "a list", "a tuple")),
        (OrderedDict(a=1), {"a": 1}, ("changed", "a OrderedDict", "a dict")),
        (np.float32(1), np.float32(2), ("changed", 1.0, 2.0)),
        ("x" * 9999, "y", ("changed", "x" * 197 + "...", "y")),
        (
            tuple(range(625)),
            tuple(range(1, 626)),
            ("changed", "625 items", "625 items, 625 differ"),
        ),
    ],
)
def test_a_value_that_is_another_is_shown_in_a_line(old, new, expected):
    assert changes({"x": old}, {"x": new}) == [("optimizer.x", *expected)]


def test_what_is_there_on_one_side_only_is_added_or_removed():
    state = {"a": [1, {"b": 2}], "r": list(range(99)), "none": {}, 7: {"k k": 1}}
    added = [
        ("optimizer.a[0]", "added", None, 1),
        ("optimizer.a[1].b", "added", None, 2),
        ("optimizer.r", "added", None, "a list of 99"),
        ("optimizer.none", "added", None, "a dict of 0"),
        ("optimizer[7]['k k']", "added", None, 1),
    ]
    assert changes({}, state) == added
    removed = [(path, "removed", new, None) for path, _, _, new in added]
    assert changes(state, {}) == removed
    assert changes({"x": 3}, {"x": [4]}) == [
        ("optimizer.x", "removed", 3, None),
        ("optimizer.x[0]", "added", None, 4),
    ]


def test_what_is_no_number_is_a_float_that_is_none():
    ((_, _, old, new),) = changes({"x": math.nan}, {"x": -math.inf})
    assert math.isnan(old)
    assert new == -math.inf


def test_counts_and_factories_and_types_of_keys_count():
    assert changes(Counter("ab"), Counter("abb")) == [("optimizer.b", "changed", 1, 2)]
    lists, dicts = defaultdict(list), defaultdict(dict)
    assert changes(lists, dicts) == [("optimizer<factory>", "changed", "list", "dict")]
    assert {one[1] for one in changes({1: 5}, {True: 5})} == {"added", "removed"}
    assert Status.ADDED == "added"
