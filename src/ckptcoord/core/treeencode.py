"""A state into a document and leaves."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ckptcoord.core.jsonio import JsonValue, dump_json
from ckptcoord.core.leaf import Leaf, LeafAdapter, LeafKind
from ckptcoord.core.treecheck import (
    DEFAULT_FACTORIES,
    MAX_DOCUMENT_DEPTH,
    ORDER,
    TAG,
    is_key,
)
from ckptcoord.core.treeclasses import (
    class_name,
    dataclass_items,
    encode_enum,
    is_namedtuple,
    namedtuple_items,
)
from ckptcoord.core.treecodec import (
    CONSTANTS,
    array_identity,
    dtype_text,
    encode_numpy_scalar,
    is_plain_text,
    stored_array,
)
from ckptcoord.core.treenames import LeafNames, Step, StepKind, path_text
from ckptcoord.errors import UnsupportedStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from numpy.typing import NDArray


def encode_document(
    state: object, adapter: LeafAdapter, *, root: str
) -> tuple[JsonValue, tuple[Leaf, ...]]:
    """The document of a state, and its leaves in order.

    Raises:
        UnsupportedStateError: something in it has no exact form.
    """
    encoder = _Encoder(adapter, root)
    document = encoder.encode(state)
    return document, tuple(encoder.leaves)


class _Encoder:
    def __init__(self, adapter: LeafAdapter, root: str) -> None:
        self.leaves: list[Leaf] = []
        self._adapter = adapter
        self._root = root
        self._names = LeafNames()
        self._tied: dict[Hashable, str] = {}
        self._kept: list[object] = []  # a freed array's address could come again and look tied
        self._steps: list[Step] = []
        self._open: set[int] = set()  # ids of the containers around the current value
        self._depth = 0

    def encode(self, value: object) -> JsonValue:
        """The document of one value; its leaves are added to `leaves`."""
        constant = CONSTANTS.get(type(value))
        if constant is not None:
            return constant(value)
        container = _CONTAINERS.get(type(value))
        if container is not None:
            return container(self, value)
        try:
            return self._foreign(value)
        except ValueError as error:  # from `treeclasses`: reading could not make it again
            raise self._error(value, str(error)) from error

    def _foreign(self, value: object) -> JsonValue:
        if self._adapter.is_leaf(value):
            return self._tensor(value)
        encoded = self._constant(value)
        if encoded is not None:
            return encoded
        if is_namedtuple(type(value)):
            assert isinstance(value, tuple)
            return self._record("namedtuple", value, namedtuple_items(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._record("dataclass", value, dataclass_items(value))
        raise self._error(value, _why_not(value))

    def _constant(self, value: object) -> JsonValue:
        if isinstance(value, np.generic):
            return encode_numpy_scalar(value)
        if isinstance(value, Enum):
            return encode_enum(value)
        atom = self._adapter.encode_atom(value)
        if atom is None:
            return None
        if not all(map(is_plain_text, atom)):
            self._refuse(value, "its text has surrogates")
        return {TAG: "atom", "kind": atom[0], "text": atom[1]}

    # --- leaves ---

    def _tensor(self, value: object) -> JsonValue:
        identity = self._adapter.identity(value)
        key = ("object", id(value)) if identity is None else ("tensor", identity)
        name = self._tied.get(key)
        if name is None:
            name = self._tied[key] = self._names.take(self._steps)
            self.leaves.append(Leaf(name=name, value=value))
        shape = self._adapter.global_shape(value)
        if shape is not None:
            return {TAG: "sharded", "name": name, "shape": list(shape)}
        return {TAG: "tensor", "name": name}

    def array_node(self, value: NDArray[np.generic]) -> JsonValue:
        text = dtype_text(value.dtype)
        if text is None:
            self._refuse(value, f"its dtype is {value.dtype}")
        key = ("ndarray", array_identity(value))
        name = self._tied.get(key)
        if name is None:
            name = self._tied[key] = self._names.take(self._steps)
            self.leaves.append(Leaf(name=name, value=stored_array(value), kind=LeafKind.NDARRAY))
            self._kept.append(value)
        return {TAG: "ndarray", "name": name, "dtype": text}

    # --- containers ---

    def _children(
        self, owner: object, levels: int, children: Iterable[tuple[Step, object]]
    ) -> list[JsonValue]:
        if id(owner) in self._open:
            self._refuse(owner, "it contains itself")
        self._open.add(id(owner))
        self._depth += levels
        if self._depth > MAX_DOCUMENT_DEPTH:
            self._refuse(owner, "it is nested too deeply")
        nodes = []
        for step, child in children:
            self._steps.append(step)
            nodes.append(self.encode(child))
            self._steps.pop()
        self._depth -= levels
        self._open.remove(id(owner))
        return nodes

    def list_node(self, value: list[object]) -> JsonValue:
        return self._children(value, 1, _indexed(value))

    def tuple_node(self, value: tuple[object, ...]) -> JsonValue:
        return {TAG: "tuple", "items": self._children(value, 2, _indexed(value))}

    def deque_node(self, value: deque[object]) -> JsonValue:
        items = self._children(value, 2, _indexed(value))
        return {TAG: "deque", "items": items, "maxlen": value.maxlen}

    def set_node(self, value: set[object] | frozenset[object]) -> JsonValue:
        nodes = self._children(value, 2, (((StepKind.ELEMENT, None), item) for item in value))
        if not all(is_key(node) for node in nodes):
            self._refuse(value, "only constants may be elements")
        # A set has no order of its own; its document must not depend on this process's hashes.
        return {TAG: type(value).__name__, "items": sorted(nodes, key=dump_json)}

    def dict_node(self, value: dict[object, object]) -> JsonValue:
        keys = [key for key in value if type(key) is str]
        if len(keys) != len(value) or not all(map(_is_plain_key, keys)):
            return {TAG: "dict", "items": self._pairs(value)}
        document = dict(zip(keys, self._children(value, 1, _keyed(value)), strict=True))
        if keys != sorted(keys):
            document[ORDER] = list(keys)
        return document

    def ordered_dict_node(self, value: OrderedDict[object, object]) -> JsonValue:
        attributes = dict(vars(value))
        # torch's modules note their versions there.
        metadata = [attributes.pop(name) for name in ("_metadata",) if name in attributes]
        self._check_bare(value, attributes)
        items = self._pairs(value)
        if not metadata:
            return {TAG: "OrderedDict", "items": items}
        (node,) = self._children(value, 1, [((StepKind.FIELD, "_metadata"), metadata[0])])
        return {TAG: "StateDict", "items": items, "metadata": node}

    def counter_node(self, value: Counter[object]) -> JsonValue:
        self._check_bare(value, vars(value))
        return {TAG: "Counter", "items": self._pairs(value)}

    def default_dict_node(self, value: defaultdict[object, object]) -> JsonValue:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and DEFAULT_FACTORIES.get(name) is not factory:
            self._refuse(value, "its default_factory is code; use a plain dict, or a builtin class")
        return {TAG: "defaultdict", "items": self._pairs(value), "factory": name}

    def _pairs(self, value: Mapping[object, object]) -> list[JsonValue]:
        self._depth += 3
        keys = [self._key(key) for key in value]
        self._depth -= 3
        nodes = self._children(value, 3, _keyed(value))
        return [[key, node] for key, node in zip(keys, nodes, strict=True)]

    def _key(self, key: object) -> JsonValue:
        self._steps.append((StepKind.KEY, key))
        node = self.encode(key)
        if not is_key(node):
            self._refuse(key, "only constants may be keys")
        self._steps.pop()
        return node

    def _record(self, tag: str, value: object, items: list[tuple[str, object]]) -> JsonValue:
        name = class_name(type(value))
        steps = (((StepKind.FIELD, field), item) for field, item in items)
        nodes = self._children(value, 2, steps)
        fields = {field: node for (field, _), node in zip(items, nodes, strict=True)}
        return {TAG: tag, "class": name, "fields": fields}

    # --- refusals ---

    def _check_bare(self, value: object, attributes: Mapping[str, object]) -> None:
        if attributes:
            self._refuse(value, f"it has an attribute {min(attributes)!r} of its own")

    def _refuse(self, value: object, why: str) -> NoReturn:
        raise self._error(value, why)

    def _error(self, value: object, why: str) -> UnsupportedStateError:
        return UnsupportedStateError(
            path=path_text(self._root, self._steps), type_name=type(value).__name__, why=why
        )


def _indexed(items: Iterable[object]) -> Iterable[tuple[Step, object]]:
    return (((StepKind.INDEX, index), item) for index, item in enumerate(items))


def _keyed(items: Mapping[object, object]) -> Iterable[tuple[Step, object]]:
    return (((StepKind.KEY, key), item) for key, item in items.items())


@lru_cache(maxsize=100_000)
def _is_plain_key(key: str) -> bool:
    return is_plain_text(key) and not key.startswith(TAG)


def _why_not(value: object) -> str:
    exact = next(
        (cls for cls in (*CONSTANTS, *_CONTAINERS, np.generic) if isinstance(value, cls)), None
    )
    if exact is not None:
        return f"it is not exactly a {exact.__name__}, and would come back as one"
    if callable(value):
        return "code is not stored"
    return ""


_CONTAINERS: Mapping[type, Callable[[_Encoder, Any], JsonValue]] = {
    np.ndarray: _Encoder.array_node,
    list: _Encoder.list_node,
    tuple: _Encoder.tuple_node,
    deque: _Encoder.deque_node,
    set: _Encoder.set_node,
    frozenset: _Encoder.set_node,
    dict: _Encoder.dict_node,
    OrderedDict: _Encoder.ordered_dict_node,
    Counter: _Encoder.counter_node,
    defaultdict: _Encoder.default_dict_node,
}
"""What the tree takes apart itself, by exact type: a subclass would not come back as one."""
