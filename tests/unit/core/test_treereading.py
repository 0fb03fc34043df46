"""Reading a state document: whatever it says, a value or a ManifestError, and no code runs."""

import collections
import contextlib
import dataclasses
import enum
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.tree import NumpyAdapter, flatten, leaf_names, unflatten
from ckptcoord.errors import ManifestError, UnsupportedStateError

MODULE = types.ModuleType("a_trainers_module")


def in_module(cls):
    """Make a class look like one of an importable module, as this test file is none."""
    cls.__module__ = MODULE.__name__
    setattr(MODULE, cls.__qualname__, cls)
    return cls


@pytest.fixture(autouse=True)
def _module(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)


@in_module
class Colour(enum.Enum):
    RED = 1
    GREEN = "g"
    ROUGE = 1  # noqa: PIE796 (an alias is the case)


@in_module
class Parts(enum.Flag):
    A = 1
    B = 2


@in_module
class Ejecting(enum.IntFlag, boundary=enum.EJECT):
    A = 1


@in_module
class Chosen(enum.Flag):
    A = 1

    @classmethod
    def _missing_(cls, value):
        return cls.A


Point = in_module(collections.namedtuple("Point", "x y"))  # noqa: PYI024 (the untyped kind too)


@in_module
@dataclasses.dataclass
class Plain:
    a: object
    b: object = 2

    def __post_init__(self):
        assert self.a is not BANNED, "a constructor ran"


@in_module
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    value: object


@in_module
@dataclasses.dataclass
class Dying:
    x: int = 1

    def __del__(self):
        pass


class Watched:
    def __get__(self, instance, owner):
        return 1

    def __set__(self, instance, value):
        pass


@in_module
@dataclasses.dataclass
class Descriptor:
    x: int = Watched()


BANNED = "never from a constructor"


class Tensor:
    """A foreign tensor: its elements live at `address`."""

    def __init__(self, address=None):
        self.address = id(self) if address is None else address


class Constant:
    def __init__(self, text):
        self.text = text

    def __eq__(self, other):
        return type(other) is Constant and other.text == self.text

    def __hash__(self):
        return hash(self.text)


class TensorAdapter:
    def is_leaf(self, value):
        return isinstance(value, Tensor)

    def identity(self, value):
        return None if value.address < 0 else ("cpu", value.address)

    def global_shape(self, value):
        return None

    def encode_atom(self, value):
        return ("constant", value.text) if isinstance(value, Constant) else None

    def decode_atom(self, kind, text):
        if kind != "constant" or text == "unknown":
            raise ValueError(f"no {kind} is {text}")
        return Constant(text) if text != "hashless" else []


ADAPTER = TensorAdapter()


def rejected(document, leaves=None):
    with pytest.raises(ManifestError) as caught:
        unflatten(document, leaves or {}, ADAPTER, path="a.state.json")
    assert caught.value.path == "a.state.json"
    return caught.value.why


def tagged(tag, **fields):
    return {"$": tag} | {name.rstrip("_"): value for name, value in fields.items()}


def point(**fields):
    return tagged("namedtuple", class_="a_trainers_module:Point", fields=fields)


TENSOR = tagged("tensor", name="w")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (tagged("pickle", data="x"), "unknown tag 'pickle'"),
        ({"$": 1}, "unknown tag a int"),
        ({"$": ["tuple"]}, "unknown tag a list"),
        ({"$x": 1}, "reserved key '$x'"),
        ({"a": 1, "$order": ["a", "b"]}, "of other keys than its own"),
        ({"a": 1, "$order": ["a", "a"]}, "of other keys than its own"),
        ({"a": 1, "$order": "a"}, "no list of keys"),
        ({"a": 1, "$order": [1]}, "no list of keys"),
        (tagged("tuple"), "other fields than ['items']"),
        (tagged("tuple", items=[], more=1), "other fields"),
        (tagged("tuple", items={}), "['items'] is no list"),
        (tagged("tuple", items=[[tagged("what")]]), "['items'][0][0] has the unknown tag"),
        (tagged("deque", items=[1, 2], maxlen=1), "more items than its maxlen"),
        (tagged("deque", items=[], maxlen=True), "is no length"),
        (tagged("deque", items=[], maxlen=-1), "is no length"),
        (tagged("deque", items=[], maxlen=2**63), "is no length"),
        (tagged("dict", items=[1]), "is no pair"),
        (tagged("dict", items={"a": 1}), "is no list"),
        (tagged("dict", items=[[1, 2, 3]]), "is no pair"),
        (tagged("dict", items=[[[], 1]]), "key that cannot be hashed"),
        (tagged("dict", items=[[{}, 1]]), "key that cannot be hashed"),
        (tagged("dict", items=[[TENSOR, 1]]), "key that cannot be hashed"),
        (tagged("dict", items=[[point(x=TENSOR, y=1), 1]]), "key that cannot be hashed"),
        (tagged("dict", items=[[tagged("tuple", items=[[]]), 1]]), "cannot be hashed"),
        (tagged("dict", items=[[tagged("bytearray", base64=""), 1]]), "cannot be hashed"),
        (tagged("dict", items=[[1, 2], [1.0, 3]]), "twice"),
        (tagged("OrderedDict", items=[["a", 2], ["a", 3]]), "twice"),
        (tagged("set", items=[[]]), "element that cannot be hashed"),
        (tagged("set", items=[1, True]), "twice"),
        (tagged("frozenset", items=["a", "a"]), "twice"),
        (tagged("set", items=[tagged("atom", kind="constant", text="hashless")]), "unhashable"),
        (tagged("defaultdict", items=[], factory="eval"), "is no factory: 'eval'"),
        (tagged("defaultdict", items=[], factory=1), "is no factory"),
        (tagged("int", hex="0x1"), "is no int"),
        (tagged("int", hex="01"), "is no int"),
        (tagged("int", hex=1), "is no text"),
        (tagged("float", bits="7ff"), "is no float"),
        (tagged("float", bits="7FF8000000000000"), "is no float"),
        (tagged("complex", bits="7ff8000000000000"), "is no complex"),
        (tagged("bytes", base64="a"), "is no bytes"),
        (tagged("bytes", base64="é==="), "is no bytes"),
        (tagged("bytes", base64="YQ==\n"), "is no bytes"),
        (tagged("str", base64="/w=="), "is no str"),
        (tagged("numpy", dtype="<f4", base64=""), "is no numpy"),
        (tagged("numpy", dtype="|O", base64=""), "is no numpy"),
        (tagged("numpy", dtype="<U1", base64="AAAAAA=="), "is no numpy"),
        (tagged("numpy", dtype="i4,i4", base64=""), "is no numpy"),
        (tagged("numpy", dtype="<i3", base64=""), "is no numpy"),
        (tagged("numpy", dtype="<M8[zz]", base64=""), "is no numpy"),
        (tagged("numpy", dtype=">b1", base64=""), "is no numpy"),
        (tagged("atom", kind="constant", text="unknown"), "cannot be read"),
        (tagged("atom", kind="torch.dtype", text="x"), "cannot be read"),
        (tagged("atom", kind="constant", text=[]), "is no text"),
        (tagged("tensor", name="w", dtype="<f4"), "other fields"),
        (tagged("tensor", name=""), "no leaf's name"),
        (tagged("tensor", name="__metadata__"), "no leaf's name"),
        (tagged("tensor", name="a\0"), "no leaf's name"),
        (tagged("tensor", name="a/../b"), "no leaf's name"),
        (tagged("tensor", name="/a"), "no leaf's name"),
        (tagged("tensor", name="a\\b"), "no leaf's name"),
        (tagged("tensor", name="a" * 1025), "no leaf's name"),
        (tagged("tensor", name=10**5000), "no leaf's name: a int"),
        (tagged("ndarray", name="w", dtype="|V8"), "no numpy dtype"),
        (tagged("ndarray", name="w", dtype="<U0"), "no numpy dtype"),
        (tagged("ndarray", name="w", dtype=4), "is no text"),
        ([TENSOR, tagged("ndarray", name="w", dtype="<f4")], "two types"),
        (TENSOR, "names the leaf 'w', which no shard holds"),
        (tagged("enum", class_="nowhere", name="A"), "no class's name"),
        (tagged("enum", class_="a:b.<locals>.c", name="A"), "no class's name"),
        (tagged("enum", class_="a:", name="A"), "no class's name"),
        (
            tagged("enum", class_="antigravity:X", name="A"),
            "'antigravity', which is not loaded: im",
        ),
        (tagged("enum", class_="a_trainers_module:X", name="A"), "which has no such class"),
        (tagged("enum", class_="a_trainers_module:Point.x.y", name="A"), "has no such class"),
        (tagged("enum", class_="a_trainers_module:Colour", name="mro"), "no member of an enum"),
        (tagged("enum", class_="a_trainers_module:Plain", name="A"), "no member of an enum"),
        (tagged("flag", class_="a_trainers_module:Parts", bits="ff"), "invalid value"),
        (tagged("flag", class_="a_trainers_module:Parts", bits="x"), "no hex integer"),
        (tagged("flag", class_="a_trainers_module:Colour", bits="1"), "no plain flag"),
        (tagged("flag", class_="a_trainers_module:Ejecting", bits="8"), "no combination of"),
        (tagged("flag", class_="a_trainers_module:Chosen", bits="8"), "no plain flag"),
        (tagged("namedtuple", class_="a_trainers_module:Plain", fields={}), "is none here"),
        (tagged("namedtuple", class_="a_trainers_module:Point", fields={"x": 1}), "['y']"),
        (tagged("namedtuple", class_="a_trainers_module:Point", fields=[1, 2]), "is no object"),
        (tagged("dataclass", class_="a_trainers_module:Plain", fields={"a b": 1}), "no field"),
        (tagged("dataclass", class_="a_trainers_module:Plain", fields={"a": 1}), "fields ['b']"),
        (tagged("dataclass", class_="a_trainers_module:Point", fields={}), "is no dataclass"),
        (tagged("dataclass", class_="a_trainers_module:Dying", fields={"x": 1}), "__del__"),
        (tagged("dataclass", class_="a_trainers_module:Descriptor", fields={"x": 1}), "its own"),
        ((1, 2), "is a tuple, which is no JSON value"),
        ({1: 2}, "key that is no text"),
        ([b""], "tree[0] is a bytes"),
    ],
)
def test_a_document_that_breaks_the_form_is_rejected(document, why):
    assert why in rejected(document)


def test_no_constructor_runs_when_a_dataclass_is_rebuilt():
    document = flatten(Plain("x"), ADAPTER).document
    document["fields"]["a"] = BANNED
    assert unflatten(document, {}, ADAPTER, path="p").a == BANNED


def test_a_class_is_never_imported(monkeypatch):
    document = flatten(Colour.RED, ADAPTER).document
    monkeypatch.delitem(sys.modules, MODULE.__name__)
    monkeypatch.setattr("builtins.__import__", lambda *a, **k: pytest.fail("imported"))
    assert "'a_trainers_module', which is not loaded: import it first" in rejected(document)


def test_a_modules_own_getattr_is_not_asked(monkeypatch):
    monkeypatch.setattr(MODULE, "__getattr__", lambda name: pytest.fail("asked"), raising=False)
    document = tagged("enum", class_="a_trainers_module:Lazy", name="A")
    assert "no such class" in rejected(document)


@pytest.mark.parametrize(
    ("dtype", "leaf"),
    [
        ("<f4", np.zeros(3)),
        (">f4", np.zeros(3, ">f4")),
        ("<M8[s]", np.zeros(3)),
        ("<U2", np.zeros((3, 4), "u1")),
        ("<U2", np.zeros((3, 8), "i1")),
        ("<U2", np.array(3, "u1")),
        ("<U2", np.zeros((0, 16), "u1")),
        ("<f4", [[1], [1, 2]]),
    ],
)
def test_an_array_of_another_dtype_is_rejected(dtype, leaf):
    why = rejected(tagged("ndarray", name="w", dtype=dtype), {"w": leaf})
    assert "the leaf 'w'" in why


def test_a_tensor_that_numpy_cannot_hold_is_rejected():
    class Bfloat16:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("unsupported ScalarType BFloat16")

    assert "BFloat16" in rejected(tagged("ndarray", name="w", dtype="<f4"), {"w": Bfloat16()})


def test_a_bottomless_document_is_rejected_before_it_overflows():
    document = 1
    for _ in range(100_000):
        document = [document]
    assert "nested too deeply" in rejected(document)
    with pytest.raises(ManifestError, match="nested too deeply"):
        leaf_names(document, path="p")


def test_leaf_names_come_in_order_and_once():
    document = [TENSOR, {"a": tagged("tensor", name="v"), "b": TENSOR}]
    assert leaf_names(document, path="p") == ("w", "v")


def test_leaf_names_need_no_class():
    document = tagged("dataclass", class_="not.there:X", fields={"a": TENSOR})
    assert leaf_names(document, path="p") == ("w",)


TAGS = [
    *("tuple", "set", "frozenset", "deque", "dict", "OrderedDict", "StateDict", "Counter"),
    *("defaultdict", "enum", "flag", "namedtuple", "dataclass", "atom", "tensor", "ndarray", "int"),
    *("float", "complex", "str", "bytes", "bytearray", "numpy", "numpy.str", "numpy.bytes", "x"),
]
FIELDS = {
    "items": st.deferred(
        lambda: (
            st.lists(DOCUMENTS, max_size=3)
            | st.lists(st.lists(DOCUMENTS, min_size=2, max_size=2), max_size=3)
        )
    ),
    "metadata": st.deferred(lambda: DOCUMENTS),
    "maxlen": st.none() | st.integers(-1, 4),
    "factory": st.sampled_from([None, "list", "eval"]),
    "class": st.sampled_from([f"{MODULE.__name__}:{n}" for n in vars(MODULE)] + ["os:x", "a", ":"]),
    "fields": st.deferred(
        lambda: st.dictionaries(st.sampled_from(["x", "y", "a", "b", "value"]), DOCUMENTS)
    ),
    "name": st.sampled_from(["A", "RED", "w", "v", "", "../x"]),
    "dtype": st.sampled_from(["<f8", ">f4", "<U2", "<M8[s]", "|O", "q"]),
    "bits": st.sampled_from(["1", "3", "ff", "7ff8000000000000", "z"]),
    "hex": st.sampled_from(["1", "-ff", "z"]),
    "base64": st.sampled_from(["", "AAAAAAAAAAA=", "AAAAAA==", "/w==", "!"]),
    "kind": st.sampled_from(["constant", "torch.dtype"]),
    "text": st.sampled_from(["a", "unknown", "hashless"]),
}
SHAPES_OF_TAGS = [
    *(("tuple", ["items"]), ("set", ["items"]), ("dict", ["items"]), ("Counter", ["items"])),
    *(("deque", ["items", "maxlen"]), ("StateDict", ["items", "metadata"]), ("int", ["hex"])),
    *(("defaultdict", ["items", "factory"]), ("enum", ["class", "name"]), ("float", ["bits"])),
    *(("flag", ["class", "bits"]), ("namedtuple", ["class", "fields"]), ("tensor", ["name"])),
    *(("dataclass", ["class", "fields"]), ("atom", ["kind", "text"]), ("str", ["base64"])),
    *(("ndarray", ["name", "dtype"]), ("numpy", ["dtype", "base64"]), ("frozenset", ["items"])),
]


def well_shaped(shape):
    tag, fields = shape
    return st.fixed_dictionaries({"$": st.just(tag)} | {name: FIELDS[name] for name in fields})


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "$"])
DOCUMENTS = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "$", "$order", "items"]), inner, max_size=3)
        | st.fixed_dictionaries({"$": st.sampled_from(TAGS)}, optional={"items": inner})
        | st.sampled_from(SHAPES_OF_TAGS).flatmap(well_shaped)
    ),
    max_leaves=8,
)


@given(DOCUMENTS)
@settings(max_examples=400, deadline=None)
def test_any_document_gives_a_value_or_a_manifest_error(document):
    leaves = {"w": np.zeros(2), "v": Tensor()}
    with contextlib.suppress(ManifestError):
        leaf_names(document, path="p")
    try:
        value = unflatten(document, leaves, ADAPTER, path="p")
    except ManifestError:
        return
    try:
        flatten(value, ADAPTER)
    except UnsupportedStateError as error:
        assert "_metadata" in error.path or "tensor" in str(document)  # noqa: PT017 (either way)


def test_the_adapter_of_no_library_knows_arrays_only():
    adapter = NumpyAdapter()
    array = np.arange(3.0)
    tree = flatten({"a": array}, adapter)
    assert unflatten(tree.document, {"a": array}, adapter, path="p")["a"] is array
    assert adapter.identity(array) is None
    with pytest.raises(UnsupportedStateError):
        flatten({"a": Tensor()}, adapter)
    with pytest.raises(ManifestError, match="which numpy does not have"):
        unflatten(tagged("atom", kind="torch.dtype", text="x"), {}, adapter, path="p")
