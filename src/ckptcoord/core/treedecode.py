"""From a checked document and its leaves back to the state."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, TypeAlias, cast

from ckptcoord.core.treecheck import DEFAULT_FACTORIES, ORDER, TAG
from ckptcoord.core.treeclasses import (
    build_dataclass,
    build_namedtuple,
    decode_enum,
    decode_flag,
)
from ckptcoord.core.treecodec import SCALARS, restored_array
from ckptcoord.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.jsonio import JsonValue

    _Node: TypeAlias = Mapping[str, JsonValue]


def decode_document(
    document: JsonValue,
    leaves: Mapping[str, object],
    decode_atom: Callable[[str, str], object],
    *,
    path: str,
) -> object:
    """The state that a document describes. `check_document` must have passed it.

    Raises:
        ManifestError: what the form does not show: a leaf or class that is not there or is another,
            or a key twice.
    """
    return _Decoder(leaves, decode_atom, path).decode(document)


class _Decoder:
    def __init__(
        self,
        leaves: Mapping[str, object],
        decode_atom: Callable[[str, str], object],
        path: str,
    ) -> None:
        self._leaves = leaves
        self._decode_atom = decode_atom
        self._path = path
        self._arrays: dict[str, object] = {}

    def decode(self, node: JsonValue) -> object:
        """The value of one node."""
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            order = cast("list[str]", node.get(ORDER, node))
            return {key: self.decode(node[key]) for key in order}
        try:
            return self._tagged(str(node[TAG]), node)
        except ValueError as error:
            raise ManifestError(path=self._path, why=str(error)) from error

    def _tagged(self, tag: str, node: _Node) -> object:
        if tag in SCALARS:
            fields, decode = SCALARS[tag]
            return decode(*(node[field] for field in fields))
        return _HANDLERS[tag](self, node)

    def make_tensor(self, node: _Node) -> object:
        return self._leaf(str(node["name"]))

    def make_array(self, node: _Node) -> object:
        name = str(node["name"])
        if name not in self._arrays:
            stored = self._leaf(name)
            try:
                self._arrays[name] = restored_array(stored, str(node["dtype"]))
            except ValueError as error:
                raise ValueError(f"the leaf {name!r}: {error}") from error
        return self._arrays[name]

    def _leaf(self, name: str) -> object:
        if name not in self._leaves:
            raise ValueError(f"names the leaf {name!r}, which no shard holds")
        return self._leaves[name]

    def make_atom(self, node: _Node) -> object:
        kind, text = str(node["kind"]), str(node["text"])
        try:
            return self._decode_atom(kind, text)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"holds a {kind[:80]!r} that cannot be read: {error}") from error

    def make_enum(self, node: _Node) -> object:
        return decode_enum(str(node["class"]), str(node["name"]))

    def make_flag(self, node: _Node) -> object:
        return decode_flag(str(node["class"]), str(node["bits"]))

    def make_namedtuple(self, node: _Node) -> object:
        return build_namedtuple(str(node["class"]), self._members(node))

    def make_dataclass(self, node: _Node) -> object:
        return build_dataclass(str(node["class"]), self._members(node))

    def _members(self, node: _Node) -> dict[str, object]:
        fields = cast("dict[str, JsonValue]", node["fields"])
        return {name: self.decode(item) for name, item in fields.items()}

    def make_tuple(self, node: _Node) -> object:
        return tuple(self._items(node))

    def make_deque(self, node: _Node) -> object:
        return deque(self._items(node), cast("int | None", node["maxlen"]))

    def make_set(self, node: _Node) -> object:
        return set(self._elements(node))

    def make_frozenset(self, node: _Node) -> object:
        return frozenset(self._elements(node))

    def _items(self, node: _Node) -> list[object]:
        return [self.decode(item) for item in cast("list[JsonValue]", node["items"])]

    def _elements(self, node: _Node) -> dict[object, object]:
        return _unique([(item, None) for item in self._items(node)])

    def make_ordered_dict(self, node: _Node) -> object:
        return OrderedDict(self.make_dict(node))

    def make_state_dict(self, node: _Node) -> object:
        state = OrderedDict(self.make_dict(node))
        vars(state)["_metadata"] = self.decode(node["metadata"])
        return state

    def make_counter(self, node: _Node) -> object:
        counter: Counter[object] = Counter()
        for key, count in self.make_dict(node).items():
            counter[key] = cast("int", count)  # whatever it is: `update` would add it
        return counter

    def make_default_dict(self, node: _Node) -> object:
        factory = node["factory"]
        make = None if factory is None else DEFAULT_FACTORIES[str(factory)]
        return defaultdict(make, self.make_dict(node))

    def make_dict(self, node: _Node) -> dict[object, object]:
        pairs = cast("list[list[JsonValue]]", node["items"])
        return _unique([(self.decode(key), self.decode(item)) for key, item in pairs])


def _unique(pairs: list[tuple[object, object]]) -> dict[object, object]:
    try:
        found = dict(pairs)
    except TypeError as error:
        raise ValueError(f"holds a key that is none: {error}") from error
    if len(found) != len(pairs):
        raise ValueError("holds a key or an element twice")
    return found


_HANDLERS: Mapping[str, Callable[[_Decoder, _Node], object]] = {
    "tensor": _Decoder.make_tensor,
    "sharded": _Decoder.make_tensor,
    "ndarray": _Decoder.make_array,
    "atom": _Decoder.make_atom,
    "enum": _Decoder.make_enum,
    "flag": _Decoder.make_flag,
    "namedtuple": _Decoder.make_namedtuple,
    "dataclass": _Decoder.make_dataclass,
    "tuple": _Decoder.make_tuple,
    "deque": _Decoder.make_deque,
    "set": _Decoder.make_set,
    "frozenset": _Decoder.make_frozenset,
    "dict": _Decoder.make_dict,
    "OrderedDict": _Decoder.make_ordered_dict,
    "StateDict": _Decoder.make_state_dict,
    "Counter": _Decoder.make_counter,
    "defaultdict": _Decoder.make_default_dict,
}
