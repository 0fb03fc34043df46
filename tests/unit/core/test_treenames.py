"""Names of leaves: the trainer's own, fit for a header, never twice; what is tied has one."""

import collections
import dataclasses
import enum
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.tree import NumpyAdapter, flatten, unflatten
from ckptcoord.core.treenames import is_leaf_name

Point = collections.namedtuple("Point", "x y")  # noqa: PYI024 (the untyped kind is common)


class Colour(enum.Enum):
    RED = 1


class Tensor:
    """A foreign tensor: its elements live at `address`."""

    def __init__(self, address=None):
        self.address = id(self) if address is None else address


class TensorAdapter(NumpyAdapter):
    def is_leaf(self, value):
        return isinstance(value, Tensor)

    def identity(self, value):
        return None if value.address < 0 else ("cpu", value.address)


ADAPTER = TensorAdapter()
ANY_TEXT = st.text(st.characters(), max_size=8)


def there_and_back(state):
    tree = flatten(state, ADAPTER)
    return unflatten(
        tree.document, {leaf.name: leaf.value for leaf in tree.leaves}, ADAPTER, path="p"
    )


def names(state):
    tree = flatten(state, ADAPTER)
    return [leaf.name for leaf in tree.leaves]


def test_names_are_what_the_trainer_calls_things():
    t = Tensor
    assert names({"transformer.h.0.attn.weight": t(), "a/b": t(), "é ü": t()}) == [
        "transformer.h.0.attn.weight",
        "a/b",
        "é ü",
    ]
    assert names({"state": {0: {"exp_avg": t()}}, "groups": [t(), (t(),)]}) == [
        "state.0.exp_avg",
        "groups.0",
        "groups.1.0",
    ]
    assert names(Point(t(), [t()])) == ["x", "y.0"]
    assert names(
        {None: t(), True: t(), 1.5: t(), b"\xff": t(), (1, "a"): t(), Colour.RED: t()}
        | {np.int8(7): t(), frozenset(): t(), 2**9999: t()}
    )[:8] == ["None", "True", "1.5", "ff", "(1,a)", "Colour.RED", "7", "frozenset"]


def test_a_state_that_is_one_leaf_has_a_name_too():
    assert names(Tensor()) == ["value"]


def test_two_leaves_never_share_a_name():
    assert names({"a": {"b": Tensor()}, "a.b": Tensor(), 1: Tensor(), "1": Tensor()}) == [
        "a.b",
        "a.b#2",
        "1",
        "1#2",
    ]
    assert names({"a.b#2": Tensor(), "a": {"b": Tensor()}, "a.b": Tensor()}) == [
        "a.b#2",
        "a.b",
        "a.b#3",
    ]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("__metadata__", "%5F_metadata__"),
        ("", "%"),
        ("a\0b", "a%00b"),
        ("a\nb", "a%0Ab"),
        ("\ud800", "%ED%A0%80"),
        ("\u202ex", "%E2%80%AEx"),
        ("..", "%2E%2E"),
        ("../x", "%2E%2E/x"),
        ("a/../../b", "a/%2E%2E/%2E%2E/b"),
        ("a..b/..c", "a..b/..c"),
        ("/etc", "%2Fetc"),
        ("a\\b", "a%5Cb"),
    ],
)
def test_what_cannot_stand_in_a_name_is_escaped(key, name):
    assert names({key: Tensor()}) == [name]


def test_a_long_name_is_cut_and_stays_its_own():
    found = names({"a" * 5000 + "b": Tensor(), "a" * 5000 + "c": Tensor()})
    assert len(set(found)) == 2
    assert all(len(name) < 1024 and name.startswith("aaa") for name in found)
    assert not any("#" in name for name in found)  # the cut part has a say in the digest


@given(st.lists(ANY_TEXT | st.sampled_from(["..", "/", ".", "\\", "__metadata__"]), max_size=6))
@settings(max_examples=200, deadline=None)
def test_every_name_is_fit_for_a_header(keys):
    state = {key: {other: Tensor() for other in keys} for key in keys}
    found = names(state)
    assert len(set(found)) == len(found)
    for name in found:
        assert name.isprintable()
        assert 0 < len(name) <= 1024
        assert name != "__metadata__"
        assert ".." not in name.replace("\\", "/").split("/")
        assert is_leaf_name(name)
    assert there_and_back(state) == state


# --- ties --------------------------------------------------------------------------------------


def test_tied_tensors_are_one_leaf_and_come_back_as_one_object():
    state = {"wte": Tensor(7), "other": Tensor(8), "lm_head": Tensor(7)}
    tree = flatten(state, ADAPTER)
    assert [leaf.name for leaf in tree.leaves] == ["wte", "other"]
    assert tree.leaves[0].value is state["wte"]
    found = there_and_back(state)
    assert found["lm_head"] is found["wte"] is not found["other"]


def test_a_tensor_without_identity_is_tied_to_itself_only():
    state = [Tensor(-1), Tensor(-1)]
    assert names([*state, state[0]]) == ["0", "1"]


def test_views_of_the_same_elements_are_tied_and_others_are_not():
    base = np.arange(6.0)
    state = [base, base[:], base[:3], base.reshape(2, 3), base.view("i8"), base.copy()]
    assert names(state) == ["0", "2", "3", "4", "5"]
    assert names([base[:3], base[::2]]) == ["0", "1"]  # only the strides differ
    found = there_and_back(state)
    assert found[0] is found[1]
    assert names([np.zeros(0), np.zeros(0)]) == ["0", "1"]


def test_tied_arrays_in_another_byte_order_come_back_as_one_object():
    array = np.arange(3, dtype=">i4")
    found = there_and_back([array, array])
    assert found[0] is found[1]
    assert (found[0].dtype, found[0].tolist()) == (array.dtype, array.tolist())


def test_a_tensor_and_an_array_over_the_same_memory_stay_apart():
    array = np.arange(3.0)
    assert names([array, Tensor(array.__array_interface__["data"][0])]) == ["0", "1"]


def test_an_array_that_is_made_anew_at_each_look_is_never_taken_for_another():
    @dataclasses.dataclass
    class Counting:
        first: object = None
        second: object = None

        def __getattribute__(self, name):
            if name in ("first", "second"):
                counted.append(name)
                return np.full(4096, len(counted), ">f8")
            return object.__getattribute__(self, name)

    counted = []
    Counting.__qualname__, Counting.__module__ = "Counting", "made_anew"
    module = types.ModuleType("made_anew")
    module.Counting = Counting
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "made_anew", module)
        tree = flatten([Counting() for _ in range(8)], ADAPTER)
    values = [leaf.value[0] for leaf in tree.leaves]
    assert len(set(values)) == len(values) == 16
