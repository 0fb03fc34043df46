"""An outline says of a state what taking it apart says, or that it cannot tell."""

import collections
import enum
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.outline import compile_outline
from ckptcoord.core.tree import flatten


class Tensor:
    """A foreign tensor: its elements live at `address`; below 0, nobody knows where."""

    def __init__(self, address):
        self.address = address


class Parameter(Tensor):
    pass


class Adapter:
    def is_leaf(self, value):
        return isinstance(value, Tensor)

    def identity(self, value):
        return None if value.address < 0 else value.address

    def global_shape(self, value):
        return None

    def encode_atom(self, value):
        return None


class Level(enum.IntEnum):
    LOW = 1


class Mine(dict):
    pass


ADAPTER = Adapter()
LEAF_TYPES = (Tensor, Parameter)


def dump(tree):
    return dump_json({"tree": tree, "before": ["<0:7>", "<1:"]})


def outline_of(state):
    text = dump(flatten(state, ADAPTER).document)
    return compile_outline(state, text, ADAPTER, LEAF_TYPES, dump)


def taken_apart(state):
    tree = flatten(state, ADAPTER)
    return dump(tree.document), [(leaf.name, leaf.value) for leaf in tree.leaves]


def by_outline(outline, state):
    """As `taken_apart`; None where the outline cannot tell."""
    match = outline.match(state)
    if match is None or not outline.is_tied([ADAPTER.identity(slot) for slot in match.slots]):
        return None
    leaves = [match.slots[first] for first in outline.firsts]
    return outline.document(match.constants), list(zip(outline.names, leaves, strict=True))


def agrees(first, second):
    """Whether the outline of one state says of another what there is to say, and says anything."""
    outline = outline_of(first)
    assert outline is not None
    found = by_outline(outline, second)
    assert found is None or found == taken_apart(second)
    return found is not None


# --- the law --------------------------------------------------------------------------------------

BITS = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0])
FLOATS = st.floats() | BITS
TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(
    ["a", "$", "<0:0>", "<0:1>", '"<0:1>"']
)
OF_TYPE = {
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(0, 2) | st.integers() | st.integers(-(2**80), 2**80),
    float: st.sampled_from([0.0, -0.0, 1.0]) | FLOATS,
    complex: st.builds(complex, FLOATS, FLOATS),
    str: TEXT,
    bytes: st.binary(max_size=3),
}
CONSTANTS = st.one_of(*OF_TYPE.values())
LEAVES = st.builds(lambda kind, at: kind(at), st.sampled_from(LEAF_TYPES), st.integers(0, 4))
KEYS = st.sampled_from([0, 1, True, False, None, "a", "b", "$", "a.b", "\ud800", b"a", 2**70])


def with_metadata(items, metadata):
    ordered = collections.OrderedDict(items)
    if metadata is not None:
        ordered._metadata = metadata
    return ordered


def containers(inner):
    pairs = st.dictionaries(KEYS, inner, max_size=4)
    metadata = st.dictionaries(TEXT, st.fixed_dictionaries({"version": CONSTANTS}), max_size=2)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        pairs,
        st.builds(with_metadata, pairs, st.none() | metadata.map(collections.OrderedDict) | inner),
    )


STATES = st.recursive(LEAVES | CONSTANTS, containers, max_leaves=12)


@st.composite
def varied(draw, state, rarely):  # noqa: C901 (one line a type)
    """The state once more: other constants of the same types, and rarely another structure."""

    def address_of(tensor):
        return draw(st.integers(0, 20)) if draw(rarely) else tensor.address + 10

    def vary(value):
        kind = type(value)
        if draw(rarely):
            return draw(STATES)
        if kind in LEAF_TYPES:
            return kind(address_of(value))
        if kind in OF_TYPE:
            return draw(OF_TYPE[kind])
        return kind(map(vary, value)) if kind in (list, tuple) else vary_dict(value)

    def vary_dict(value):
        pairs = [(key, vary(one)) for key, one in value.items()]
        if draw(rarely):
            others = st.sampled_from(OTHERS)
            pairs = [
                (draw(st.just(key) | others), one) for key, one in draw(st.permutations(pairs))
            ]
        if type(value) is dict:
            return dict(pairs)
        return with_metadata(pairs, vary(value._metadata) if vars(value) else None)

    return vary(state)


OTHERS = (1, True, 0, False, 1.0, -0.0, "a", b"a", Level.LOW)


@given(STATES, st.data())
@settings(max_examples=200, deadline=None)
def test_a_state_of_the_same_structure_matches_and_gives_the_same_document_and_leaves(state, data):
    assert agrees(state, data.draw(varied(state, st.just(False))))


@given(STATES, st.data())
@settings(max_examples=300, deadline=None)
def test_a_state_of_any_structure_gives_the_same_or_does_not_match(state, data):
    agrees(state, data.draw(varied(state, st.sampled_from([False] * 9 + [True]))))


# --- what the law must not miss -------------------------------------------------------------------

T = Tensor(7)
NAN = float("nan")
(QUIET_ODD,) = struct.unpack(">d", bytes.fromhex("7ff8000000000001"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 0.0}, {"a": -0.0}),
        ([NAN, 1.0], [QUIET_ODD, float("-inf")]),
        ([1, 2], [10**5000, -(2**53)]),
        ([1j], [complex(-0.0, NAN)]),
        (["<0:0>", "x"], ['"<0:1>"', "\ud800"]),
        ([b"", None], [b"\0", None]),
        ({"a": [T, Tensor(8)]}, {"a": [Tensor(5), Tensor(6)]}),
        ([T, T, Tensor(8)], [Tensor(5), Tensor(5), Tensor(6)]),
        (1, 2),
        ([], []),
        (T, Tensor(5)),
        ([{"s": 1, "a": T}, {"s": 2}], [{"s": 3, "a": Tensor(5)}, {"s": 4}]),
        ({0: {"a": T, "b": None}, 1: {}}, {0: {"a": Tensor(5), "b": None}, 1: {}}),
    ],
)
def test_what_differs_in_constants_and_memory_alone_matches(first, second):
    assert agrees(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": Level.LOW}),
        ({"a": 1.0}, {"a": np.float64(1.0)}),
        ({1: 1}, {True: 1}),
        ({1: 1}, {1.0: 1}),
        ({1: 1}, {Level.LOW: 1}),
        ({"a": 1}, {np.str_("a"): 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, collections.OrderedDict(a=1)),
        ({"a": 1}, collections.defaultdict(int, a=1)),
        ([1], (1,)),
        ([1], [1, 1]),
        ([], {}),
        ([T], [Parameter(7)]),
        ([T], [1]),
        ([T, T], [T, Tensor(8)]),
        ([T, Tensor(8)], [T, T]),
        ([T, Tensor(8), T], [T, Tensor(8), Tensor(8)]),
        ([T], [Tensor(-1)]),
        ([{"a": 1, "b": 1}, {"c": 1}], [{"a": 1}, {"b": 1, "c": 1}]),
        ([{"a": 1}, {"b": T}], [{"a": 1}, {"b": Parameter(7)}]),
        ([{"a": 1}, {"b": T}], [{"a": T}, {"b": 1}]),
        ([{"a": 1}, {1: 1}], [{"a": 1}, {True: 1}]),
        ([{"a": 1}, {"b": 1}], [{"a": 1}, {"c": 1}]),
        ([{"a": 1}, {"b": 1}], [{"a": 1}, Mine(b=1)]),
        ([{"a": 1}, {"b": 1}], [{"a": 1}, [1]]),
        (with_metadata({"a": T}, None), with_metadata({"a": T}, {})),
        (with_metadata({"a": T}, {}), with_metadata({"a": T}, None)),
        (with_metadata({"a": T}, {"v": 1}), with_metadata({"a": T}, {"v": 1.0})),
        (with_metadata({"a": T}, {"v": 1}), with_metadata({"a": T}, {"w": 1})),
    ],
)
def test_what_is_built_otherwise_does_not_match(first, second):
    assert not agrees(first, second)


def test_an_attribute_of_its_own_is_left_to_who_refuses_it():
    odd = with_metadata({"a": 1}, {})
    outline = outline_of(odd)
    odd.mine = 1
    assert outline.match(odd) is None
    assert compile_outline(odd, b"", ADAPTER, LEAF_TYPES, dump) is None


@pytest.mark.parametrize(
    "state",
    [
        [np.zeros(3)],
        [np.float64(1.0)],
        [bytearray(b"a")],
        [{1}],
        [collections.deque()],
        [collections.Counter("a")],
        [Mine(a=1)],
        [Level.LOW],
        {1.0: 1},
        {(1,): 1},
        {Level.LOW: 1},
        [Tensor(-1)],
        with_metadata({}, {"a": {1}}),
    ],
)
def test_what_an_outline_cannot_tell_apart_has_none(state):
    assert compile_outline(state, b"", ADAPTER, LEAF_TYPES, dump) is None


def test_a_container_that_stands_twice_is_two():
    shared = [T, 1]
    assert agrees([shared, shared], [[T, 2], [Tensor(7), 3]])


def test_of_two_objects_over_the_same_elements_the_first_is_the_leaf():
    first = [[Tensor(1)], Tensor(1), Tensor(2)]
    outline = outline_of(first)
    second = [[Tensor(3)], Tensor(3), Tensor(4)]
    match = outline.match(second)
    assert [match.slots[one] for one in outline.firsts] == [second[0][0], second[2]]


def test_a_document_can_be_made_again_and_nothing_of_the_trainers_is_in_it():
    state = {"steps": [1, 2], "lr": 0.5}
    outline = outline_of(state)
    match = outline.match(state)
    expected = taken_apart(state)[0]
    state["steps"].append(3)
    state["lr"] = 1.0
    assert outline.document(match.constants) == outline.document(match.constants) == expected
