"""What several copies' documents have together."""

from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.tree import NumpyAdapter, flatten, unflatten
from ckptcoord.core.treemerge import (
    MergeConflictError,
    has_keys,
    leaf_keys,
    merge_documents,
    prune_document,
)

A = np.arange(3)


def document(state):
    return parse_json(dump_json(flatten(state, NumpyAdapter()).document), path="test")


def state(merged):
    names = leaf_keys(merged)
    return unflatten(merged, dict.fromkeys(names, A), NumpyAdapter(), path="test")


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({"a": 1}, {"a": 1}, {"a": 1}),
        ({"b": 1}, {"a": 2}, {"b": 1, "a": 2}),
        ({}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": {"x": 1}}, {"a": {"y": None}}, {"a": {"x": 1, "y": None}}),
        ({1: "x"}, {2: "y", 1: "x"}, {1: "x", 2: "y"}),
        ({"a": 1}, {2: "y"}, {"a": 1, 2: "y"}),
        ({"l": [1, 2]}, {"l": [1, 2]}, {"l": [1, 2]}),
        (OrderedDict(b=1), OrderedDict(a=1), OrderedDict(b=1, a=1)),
        (defaultdict(int, a=1), defaultdict(int, b=2), defaultdict(int, a=1, b=2)),
    ],
)
def test_dicts_are_united_by_key_in_their_order(one, other, both):
    found = state(merge_documents([document(one), document(other)], root="c"))
    assert found == both
    assert type(found) is type(both)
    assert list(found) == list(both)


def test_leaves_of_two_stages_come_together():
    merged = merge_documents([document({"s": {"0.w": A}}), document({"s": {"1.w": A}})], root="c")
    assert leaf_keys(merged) == {"s.0.w": ("s", "0.w"), "s.1.w": ("s", "1.w")}
    assert set(state(merged)["s"]) == {"0.w", "1.w"}


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ({"a": 1}, {"a": 2}, "c.a"),
        ({"a": 0.0}, {"a": -0.0}, "c.a"),
        ({"a": 1}, {"a": True}, "c.a"),
        ({"a": None}, {"a": 0}, "c.a"),
        ({"a": [1]}, {"a": [1, 2]}, "c.a"),
        ({"a": {"b": (1,)}}, {"a": {"b": [1]}}, "c.a.b"),
        ({"a": OrderedDict()}, {"a": {}}, "c.a"),
        ({1: "x"}, {1: "y"}, "c[1]"),
        ({"a": A}, {"a": 1}, "c.a"),
    ],
)
def test_what_differs_is_named(one, other, path):
    with pytest.raises(MergeConflictError) as caught:
        merge_documents([document(one), document(other)], root="c")
    assert caught.value.path == path


def test_what_is_not_wanted_is_left_out():
    full = document({"b": {"x": 1, "y": 2}, "a": {3: "z", 4: "w"}, "c": [1]})

    def wants(keys):
        return keys not in (("b", "x"), ("a", 3), ("c",))

    assert state(prune_document(full, wants)) == {"b": {"y": 2}, "a": {4: "w"}}
    assert list(state(prune_document(full, wants))) == ["b", "a"]


def test_keys_are_missed_at_any_depth_of_dicts_only():
    there = {"a": {"$": "dict", "items": [[1, {"x": 0}], [2, [{}]]]}, "b": 5}
    assert has_keys(there, {})
    assert has_keys(there, {"a": {"$": "dict", "items": [[1, {"x": {"y": 0}}]]}})
    assert has_keys(there, {"a": {"$": "dict", "items": [[2, [{"z": 0}]]]}, "b": {"c": 0}})
    assert not has_keys(there, {"c": 0})
    assert not has_keys(there, {"a": {"$": "dict", "items": [[3, 0]]}})
    assert not has_keys(there, {"a": {"$": "dict", "items": [[1, {"y": 0}]]}})
