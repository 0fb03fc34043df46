"""The state tree: what goes in comes out, type for type and bit for bit, or is refused by name."""

import collections
import dataclasses
import enum
import itertools
import struct
import sys
import time
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.tree import (
    MAX_DOCUMENT_DEPTH,
    LeafKind,
    NumpyAdapter,
    flatten,
    leaf_forms,
    leaf_names,
    unflatten,
)
from ckptcoord.errors import UnsupportedStateError

# --- things that a state may hold --------------------------------------------------------------

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
class Level(enum.IntEnum):
    LOW = 0
    HIGH = 1


@in_module
class Word(enum.StrEnum):
    YES = "yes"


@in_module
class Parts(enum.Flag):
    A = 1
    B = 2


@in_module
class Open(enum.IntFlag, boundary=enum.KEEP):
    A = 1


Point = in_module(collections.namedtuple("Point", "x y"))  # noqa: PYI024 (the untyped kind too)


@in_module
class Typed(typing.NamedTuple):
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)


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
class Sub(Plain):
    pass


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


def there_and_back(state, adapter=ADAPTER):
    """The state after a way through bytes."""
    tree = flatten(state, adapter)
    document = parse_json(dump_json(tree.document), path="p")
    leaves = {leaf.name: leaf.value for leaf in tree.leaves}
    assert set(leaf_names(document, path="p")) == set(leaves)
    kinds = {name: form.kind for name, form in leaf_forms(document, path="p").items()}
    assert kinds == {leaf.name: leaf.kind for leaf in tree.leaves}
    return unflatten(document, leaves, adapter, path="p")


def bits(value):
    return struct.pack(">d", value)


def same(a, b):  # noqa: C901 (one line a type)
    """Equal with exact types, bit for bit, in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if type(a) is float:
        return bits(a) == bits(b)
    if type(a) is complex:
        return bits(a.real) + bits(a.imag) == bits(b.real) + bits(b.imag)
    if isinstance(a, dict):
        extra = vars(a) if hasattr(a, "__dict__") else {}
        if extra:
            return same(extra, vars(b)) and same(dict(a), dict(b))
        return getattr(a, "default_factory", 0) is getattr(b, "default_factory", 0) and all_same(
            itertools.chain(*a.items()), itertools.chain(*b.items())
        )
    if isinstance(a, set | frozenset):
        return all_same(sorted(a, key=canonical), sorted(b, key=canonical))
    if isinstance(a, collections.deque):
        return a.maxlen == b.maxlen and all_same(a, b)
    if isinstance(a, list | tuple):
        return all_same(a, b)
    if dataclasses.is_dataclass(a):
        return all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(type(a))
        )
    return a is b if isinstance(a, Tensor) else a == b


def all_same(a, b):
    return all(same(x, y) for x, y in itertools.zip_longest(a, b, fillvalue=StopIteration))


def canonical(value):
    return dump_json(flatten(value, ADAPTER).document)


# --- the law -----------------------------------------------------------------------------------

ANY_FLOAT = st.floats() | st.integers(0, 2**64 - 1).map(
    lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0]
)
ANY_TEXT = st.text(st.characters(), max_size=8)
CONSTANTS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | ANY_FLOAT
    | st.builds(complex, ANY_FLOAT, ANY_FLOAT)
    | ANY_TEXT
    | st.sampled_from(["$", "$order", "$x", "\ud800", "\ud83d\ude00", "", "a.b"])
    | st.binary(max_size=8)
    | st.sampled_from([*Colour, *Level, *Word, *Parts, Parts.A | Parts.B, Parts(0), Open(9)])
    | st.builds(Constant, st.text(st.characters(exclude_categories=["Cs"]), max_size=3))
)
DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(min_len=1, max_len=4),
    hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=4),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
ARRAYS = hnp.arrays(DTYPES, SHAPES)
NUMPY_SCALARS = hnp.arrays(DTYPES, (1,)).map(lambda array: array[0])
KEYS = st.recursive(
    CONSTANTS | NUMPY_SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(inner, max_size=3)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=4,
)


def containers(inner):
    lists = st.lists(inner, max_size=3)
    pairs = st.dictionaries(KEYS, inner, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(collections.deque),
        lists.map(lambda items: collections.deque(items, len(items) + 1)),
        st.dictionaries(ANY_TEXT, inner, max_size=4),
        pairs,
        pairs.map(collections.OrderedDict),
        pairs.map(lambda items: collections.defaultdict(list, items)),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(collections.Counter),
        st.builds(Point, inner, inner),
        st.builds(Typed, inner, inner),
        st.builds(Plain, inner, inner),
        st.builds(Sub, inner, inner),
        st.builds(Frozen, value=inner),
    )


STATES = st.recursive(
    KEYS
    | ARRAYS
    | st.binary(max_size=8).map(bytearray)
    | st.sets(KEYS, max_size=3)
    | st.builds(Tensor),
    containers,
    max_leaves=12,
)


@given(STATES)
@settings(max_examples=400, deadline=None)
def test_what_was_flattened_comes_back_exactly(state):
    assert same(there_and_back(state), state)


@given(ARRAYS, st.sampled_from("CF"))
@settings(max_examples=100, deadline=None)
def test_an_arrays_leaf_is_row_major_in_a_dtype_of_safetensors(array, order):
    (leaf,) = flatten(np.asarray(array, order=order), ADAPTER).leaves
    value = leaf.value
    assert leaf.kind is LeafKind.NDARRAY
    assert type(value) is np.ndarray
    assert value.flags.c_contiguous
    assert value.dtype.isnative
    assert value.dtype.name in {
        *("bool", "float16", "float32", "float64", "complex64", "complex128"),
        *(f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64)),
    }
    assert same(there_and_back(np.asarray(array, order=order)), array)


@given(STATES)
@settings(max_examples=50, deadline=None)
def test_the_document_depends_on_the_state_alone(state):
    first, second = flatten(state, ADAPTER), flatten(state, ADAPTER)
    assert dump_json(first.document) == dump_json(second.document)
    assert [leaf.name for leaf in first.leaves] == [leaf.name for leaf in second.leaves]


SPECIAL_BITS = [
    *("7ff8000000000000", "fff8000000000000", "7ff0000000000001", "7fffffffffffffff"),
    *("7ff0000000000000", "fff0000000000000", "8000000000000000", "0000000000000001"),
    *(bits(number).hex() for number in (0.0, 1e16, 1e22, sys.float_info.max, 0.1)),
]


@pytest.mark.parametrize("text", SPECIAL_BITS)
def test_a_float_keeps_every_bit(text):
    (number,) = struct.unpack(">d", bytes.fromhex(text))
    assert same(there_and_back(number), number)
    assert same(there_and_back(complex(1, number)), complex(1, number))


def test_an_int_keeps_every_digit():
    for number in (2**53 - 1, 2**53, -(2**53), 2**63, 10**5000, -(10**5000), True, 0):
        assert same(there_and_back(number), number)
        assert same(there_and_back({number: [number]}), {number: [number]})


ODD_ONES = [
    *(np.str_("a\0"), np.str_(""), np.str_("\ud800"), np.bytes_(b"a\0"), np.bytes_(b"")),
    *(np.longlong(5), np.ulonglong(5), np.int64(5), np.longdouble(1) / 3, np.bool_(1)),
    *(np.datetime64("NaT"), np.datetime64("2024", "ns"), np.timedelta64(3, "7D")),
    np.uint32(0x7F800001).view(np.float32),
    np.array(["a\0b", "é"], ">U4"),
    np.array([b"a\0b", b""], "S4"),
    np.array([1, 2], "q"),
    np.array([1 / 3], "longdouble"),
    np.array([0x7F800001], ">u4").view(">f4"),
    np.array(3.5, ">c16"),
    np.zeros((0, 3), "<U2"),
    np.array("x"),
    np.arange(6, dtype=">i2").reshape(2, 3).T,
    np.arange(10)[::-2],
    np.broadcast_to(np.float32(1), (2, 3)),
    collections.Counter({"a": 2, "b": -1, "c": 0}),
    collections.defaultdict(None, {1: 2}),
    collections.defaultdict(int, {"b": 1, "a": 2}),
    collections.deque([1, 2], 2),
    collections.deque(maxlen=sys.maxsize),
    {float("nan"): 1, -0.0: 2},
    {"b": 1, "a": {"z": 1, "y": 2}},
    (3, tuple(range(2**32 - 625, 2**32)), None),
    {"": 0, "é": 1, "\x00": 2},
    {frozenset({1, (2, "x")}): {3, b"4"}},
    set(),
    frozenset(),
]


@pytest.mark.parametrize(
    "value", ODD_ONES, ids=[f"{i}-{type(value).__name__}" for i, value in enumerate(ODD_ONES)]
)
def test_the_odd_ones_come_back_exactly(value):
    assert same(there_and_back(value), value)


def test_a_torch_state_dict_keeps_its_versions():
    state = collections.OrderedDict(weight=Tensor(), bias=Tensor())
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    found = there_and_back(state)
    assert same(found, state)
    assert found._metadata == state._metadata


def test_an_array_in_native_order_is_not_copied():
    array = np.arange(6.0).reshape(2, 3)
    tree = flatten([array], ADAPTER)
    assert tree.leaves[0].value is array
    (found,) = unflatten(tree.document, {"0": array}, ADAPTER, path="p")
    assert found is array


def test_what_numpy_takes_for_an_array_serves_as_one():
    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return np.arange(3.0)

    document = flatten({"a": np.zeros(3)}, NumpyAdapter()).document
    found = unflatten(document, {"a": Foreign()}, NumpyAdapter(), path="p")
    assert same(found, {"a": np.arange(3.0)})


# --- the document, as people and other tools read it -------------------------------------------


def test_an_optimizers_state_reads_like_json():
    state = {
        "state": {0: {"step": 3.0, "exp_avg": Tensor()}},
        "param_groups": [{"betas": (0.9, 0.99), "lr": 0.1}],
    }
    assert flatten(state, ADAPTER).document == {
        "$order": ["state", "param_groups"],
        "state": {
            "$": "dict",
            "items": [
                [
                    0,
                    {
                        "$order": ["step", "exp_avg"],
                        "step": 3.0,
                        "exp_avg": {"$": "tensor", "name": "state.0.exp_avg"},
                    },
                ]
            ],
        },
        "param_groups": [{"betas": {"$": "tuple", "items": [0.9, 0.99]}, "lr": 0.1}],
    }


def test_a_set_is_written_in_the_order_of_its_text_whatever_the_hashes_are():
    for numbers in itertools.permutations([1, 9, 17, 100]):  # all in one slot of a small table
        assert flatten(set(numbers), ADAPTER).document == {"$": "set", "items": [1, 100, 17, 9]}


def test_an_int_that_a_double_may_lose_is_written_in_hex():
    assert flatten([2**53 - 1, 1 - 2**53], ADAPTER).document == [2**53 - 1, 1 - 2**53]
    assert flatten(-(2**53), ADAPTER).document == {"$": "int", "hex": "-20000000000000"}
    assert flatten(2**53, ADAPTER).document == {"$": "int", "hex": "20000000000000"}


def test_an_array_is_named_with_its_dtype():
    (leaf,) = flatten({"seen": np.zeros(2, ">u2")}, ADAPTER).leaves
    assert (leaf.name, leaf.kind) == ("seen", LeafKind.NDARRAY)
    document = flatten({"seen": np.zeros(2, ">u2")}, ADAPTER).document
    assert document == {"seen": {"$": "ndarray", "name": "seen", "dtype": ">u2"}}


# --- refusals when saving ----------------------------------------------------------------------


def refused(state, root="optimizer"):
    with pytest.raises(UnsupportedStateError) as caught:
        flatten(state, ADAPTER, root=root)
    return caught.value


class Text(str):
    __slots__ = ()


def local_enum():
    class Local(enum.Enum):
        A = 1

    return Local.A


def forged(cls, name, value):
    """What no enum has made."""
    return set_attribute(object.__new__(cls), _name_=name, _value_=value)


def set_attribute(value, **attributes):
    for name, item in attributes.items():
        object.__setattr__(value, name, item)
    return value


@dataclasses.dataclass
class Dying:
    x: int = 1

    def __del__(self):
        pass


@dataclasses.dataclass
class Dictlike(dict):
    x: int = 1


class Watched:
    def __get__(self, instance, owner):
        return 1

    def __set__(self, instance, value):
        pass


@dataclasses.dataclass
class Descriptor:
    x: int = Watched()


class Slotted(Frozen):
    __slots__ = ("more",)


class Wide(Point):
    pass


Spaced = in_module(dataclasses.dataclass(type("a b", (), {})))
Unloaded = dataclasses.dataclass(type("Unloaded", (), {"__module__": "not_loaded"}))


@in_module
class Chosen(enum.Flag):
    A = 1

    @classmethod
    def _missing_(cls, value):
        return cls.A


for cls in (Dying, Dictlike, Descriptor, Slotted, Wide):
    in_module(cls)


@pytest.mark.parametrize(
    ("value", "type_name", "why"),
    [
        (print, "builtin_function_or_method", "code is not stored"),
        (int, "type", "code is not stored"),
        (lambda: 1, "function", "code is not stored"),
        (object(), "object", ""),
        (range(3), "range", ""),
        (Text("a"), "Text", "not exactly a str"),
        (np.zeros(1).view(np.recarray), "recarray", "not exactly a ndarray"),
        (np.ma.array([1]), "MaskedArray", "not exactly a ndarray"),
        (np.array([None]), "ndarray", "its dtype is object"),
        (np.zeros(1, "i4,i4"), "ndarray", "its dtype is"),
        (np.zeros(1, [("a", "U0")])["a"], "ndarray", "its dtype is"),
        (np.array(["a"], np.dtypes.StringDType()), "ndarray", "its dtype is"),
        (np.void(b"ab"), "void", "not exactly a generic"),
        (time.gmtime(0), "struct_time", "not exactly a tuple"),
        (collections.defaultdict(lambda: 1), "defaultdict", "default_factory is code"),
        (set_attribute(collections.OrderedDict(), hook=1), "OrderedDict", "attribute 'hook'"),
        (set_attribute(collections.Counter(), hook=1), "Counter", "attribute 'hook'"),
        (local_enum(), "Local", "not found under the name"),
        (Spaced(), "a b", "not found under the name"),
        (Unloaded(), "Unloaded", "not found under the name"),
        (forged(Colour, "RED", 1), "Colour", "no member of its class"),
        (forged(Parts, None, 3), "Parts", "another combination of that value"),
        (forged(Parts, None, "3"), "Parts", "no member of its class"),
        (set_attribute(Wide(1, 2), more=1), "Wide", "more or less than its named items"),
        (set_attribute(Plain(1), extra=1), "Plain", "attribute 'extra' is no field"),
        (object.__new__(Frozen), "Frozen", "field 'value' is not set"),
        (Dictlike(), "Dictlike", "more than a dataclass"),
        (Descriptor(), "Descriptor", "field 'x' is set by code of its own"),
        (Dying(), "Dying", "has a __del__"),
        (set_attribute(Slotted(value=1), more=1), "Slotted", "attribute 'more' is no field"),
        ({Frozen(value=1): 1}, "Frozen", "only constants may be keys"),
        ({Tensor(): 1}, "Tensor", "only constants may be keys"),
        ({(1, Tensor()): 1}, "tuple", "only constants may be keys"),
        ({Frozen(value=1)}, "set", "only constants may be elements"),
        ({print: 1}, "builtin_function_or_method", "code is not stored"),
    ],
)
def test_what_has_no_exact_form_is_refused_by_type(value, type_name, why):
    error = refused({"x": value})
    assert error.type_name == type_name
    assert why in error.why
    assert error.path.startswith("optimizer.x")


@pytest.mark.parametrize(
    ("state", "path"),
    [
        (print, "optimizer"),
        ({"param_groups": [{"fn": print}]}, "optimizer.param_groups[0]['fn']"),
        ({"a b": print}, "optimizer['a b']"),
        ({"state": {0: {"x": print}}}, "optimizer.state[0]['x']"),
        ({"x": Plain(print)}, "optimizer.x.a"),
        ({"x": Point(1, (print,))}, "optimizer.x.y[0]"),
        ({"x": {(1, 2): print}}, "optimizer.x[<tuple>]"),
        ({"x": {2**9999: print}}, "optimizer.x[0x"),
        ({"x": {"k" * 999: print}}, "optimizer.x['kkk"),
        ({"x": {print: 1}}, "optimizer.x[<builtin_function_or_method>]"),
        ({"x": {(1, print)}}, "optimizer.x{...}[1]"),
        (set_attribute(collections.OrderedDict(), _metadata=print), "optimizer._metadata"),
    ],
)
def test_a_refusal_names_the_path(state, path):
    found = refused(state).path
    assert found.startswith(path)
    assert found == path or len(found) < 90


def test_a_text_that_could_not_be_read_again_is_not_written():
    assert "surrogates" in refused(Constant("\ud800")).why
    odd = in_module(enum.Enum("Odd", {"\ud800": 1}))
    assert "no member of its class" in refused(odd["\ud800"]).why


def test_without_a_root_the_path_begins_with_state():
    assert refused({"a": print}, root="").path == "state.a"


def test_a_state_that_contains_itself_is_refused():
    state = {"a": [1]}
    state["a"].append(state)
    error = refused(state)
    assert error.path == "optimizer.a[1]"
    assert "contains itself" in error.why


def test_the_same_list_twice_is_no_cycle():
    shared = [1]
    assert there_and_back([shared, (shared, ())]) == [[1], ([1], ())]


WRAPS = {
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dict": lambda x: {"b": x, "a": 1},
    "dict by int": lambda x: {1: x},
    "dict by tuple": lambda x: {(1, "a"): [x]},
    "frozenset": lambda x: frozenset([x]),
    "tuple as key": lambda x: (x, "a"),
    "dataclass": lambda x: Frozen(value=x),
    "namedtuple": lambda x: Point(x, 1),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_whatever_is_not_too_deep_to_save_can_be_loaded(wrap):
    def in_place(value):
        return {value: [1]} if wrap is WRAPS["tuple as key"] else value

    states = itertools.accumulate(itertools.repeat(None), lambda state, _: wrap(state), initial=1)
    deepest, depth = None, 0
    for state in states:
        try:
            flatten(in_place(state), ADAPTER)
        except UnsupportedStateError as error:
            assert "nested too deeply" in error.why  # noqa: PT017 (the end of a search)
            break
        deepest, depth = state, depth + 1
    assert 25 < depth <= MAX_DOCUMENT_DEPTH + 1
    assert same(there_and_back(in_place(deepest)), in_place(deepest))


def test_too_deep_a_state_is_refused():
    state = []
    for _ in range(MAX_DOCUMENT_DEPTH):
        state = [state]
    assert "nested too deeply" in refused(state).why
    assert same(there_and_back(state[0]), state[0])


def test_a_hundred_thousand_leaves_take_about_a_second():
    state = {f"transformer.h.{i}.attn.weight": Tensor() for i in range(100_000)}
    started = time.process_time()
    tree = flatten(state, ADAPTER)
    assert len(tree.leaves) == 100_000
    assert time.process_time() - started < 5  # 0.8 s on a quiet machine
