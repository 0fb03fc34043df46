"""The form of a state document, checked in full before anything is built from it.

A tagged object is `{"$": tag, field: ...}` with exactly the fields of its tag. A plain object may
have a "$order" beside its members: their order where it is not the sorted one, which canonical
JSON gives them. Keys that begin with "$" are kept for this.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from ckptcoord.core.leaf import LeafForm
from ckptcoord.core.treeclasses import is_class_name
from ckptcoord.core.treecodec import SCALARS, parse_array_dtype
from ckptcoord.core.treenames import is_leaf_name
from ckptcoord.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ckptcoord.core.jsonio import JsonValue

TAG = "$"
ORDER = "$order"
MAX_DOCUMENT_DEPTH = 112
"""Levels of a state document. `parse_json` reads 128, which leaves some for what is around it."""
MAX_LENGTH = 2**63 - 1
MAX_DIMS = 32
DEFAULT_FACTORIES: Mapping[str, type] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
    }
)
"""What a defaultdict may make: these classes by name."""


_KEY_TAGS = frozenset(SCALARS) - {"bytearray"} | {"enum", "flag", "atom"}
_PLAIN = (bool, int, float, str, type(None))


def is_key(node: JsonValue) -> bool:
    """Whether a well-formed node may be a dict's key or a set's element."""
    if not isinstance(node, dict):
        return not isinstance(node, list)
    tag = node.get(TAG)
    if tag in ("tuple", "frozenset"):
        items = node["items"]
        return isinstance(items, list) and all(is_key(item) for item in items)
    if tag == "namedtuple":
        fields = node["fields"]
        return isinstance(fields, dict) and all(is_key(item) for item in fields.values())
    return tag in _KEY_TAGS


def check_document(document: JsonValue, *, path: str) -> dict[str, LeafForm]:
    """The leaves of a document by name, in its order.

    Raises:
        ManifestError: the document breaks the form.
    """
    check = _Check(path)
    check.node(document)
    return check.leaves


class _Check:
    def __init__(self, path: str) -> None:
        self.leaves: dict[str, LeafForm] = {}
        self._path = path
        self._where: list[str | int] = []

    def node(self, node: JsonValue) -> None:
        """Check one value and all below it."""
        if len(self._where) > MAX_DOCUMENT_DEPTH:
            self._refuse("is nested too deeply")
        if type(node) is list:
            self._walk(enumerate(node))
        elif type(node) is dict:
            if not all(type(key) is str for key in node):
                self._refuse("has a key that is no text")
            if TAG in node:
                self._tagged(node)
            else:
                self._plain(node)
        elif type(node) not in _PLAIN:
            self._refuse(f"is a {type(node).__name__}, which is no JSON value")

    def _walk(self, nodes: Iterable[tuple[str | int, JsonValue]]) -> None:
        for step, node in nodes:
            self._where.append(step)
            self.node(node)
            self._where.pop()

    def _plain(self, node: dict[str, JsonValue]) -> None:
        members = {key: item for key, item in node.items() if key != ORDER}
        reserved = [key for key in members if key.startswith(TAG)]
        if reserved:
            self._refuse(f"has the reserved key {reserved[0][:80]!r}")
        if ORDER in node:
            order = node[ORDER]
            if type(order) is not list or not all(type(key) is str for key in order):
                self._refuse(f"has a {ORDER} that is no list of keys")
            if len(order) != len(members) or set(order) != set(members):
                self._refuse(f"has a {ORDER} of other keys than its own")
        self._walk(members.items())

    def _tagged(self, node: dict[str, JsonValue]) -> None:
        tag = node[TAG]
        fields = _SCHEMA.get(tag) if type(tag) is str else None
        if fields is None:
            self._refuse(f"has the unknown tag {_shown(tag)}")
        if node.keys() - {TAG} != fields.keys():
            self._refuse(f"is a {tag} with other fields than {sorted(fields)}")
        for name, check in fields.items():
            self._where.append(name)
            check(self, node[name])
            self._where.pop()
        if tag in ("tensor", "ndarray", "sharded"):
            self._leaf(node)
        elif tag in SCALARS:
            self._scalar(str(tag), node)
        elif tag == "deque":
            self._deque(node)

    def _leaf(self, node: dict[str, JsonValue]) -> None:
        name, dtype, shape = str(node["name"]), node.get("dtype"), node.get("shape")
        form = LeafForm(
            dtype=None if dtype is None else str(dtype),
            shape=tuple(int(str(size)) for size in shape) if isinstance(shape, list) else None,
        )
        if self.leaves.setdefault(name, form) != form:
            self._refuse(f"gives the leaf {name[:80]!r} two types")

    def _scalar(self, tag: str, node: dict[str, JsonValue]) -> None:
        fields, decode = SCALARS[tag]
        try:
            decode(*(node[field] for field in fields))
        except ValueError as error:
            raise self._error(f"is no {tag}: {error}") from error

    def _deque(self, node: dict[str, JsonValue]) -> None:
        items, maxlen = node["items"], node["maxlen"]
        if isinstance(items, list) and isinstance(maxlen, int) and len(items) > maxlen:
            self._refuse("has more items than its maxlen")

    def text(self, value: JsonValue) -> None:
        if type(value) is not str:
            self._refuse("is no text")

    def class_name(self, value: JsonValue) -> None:
        if type(value) is not str or not is_class_name(value):
            self._refuse(f"is no class's name: {_shown(value)}")

    def leaf_name(self, value: JsonValue) -> None:
        if not is_leaf_name(value):
            self._refuse(f"is no leaf's name: {_shown(value)}")

    def dtype(self, value: JsonValue) -> None:
        self.text(value)
        try:
            parse_array_dtype(str(value))
        except ValueError as error:
            raise self._error(str(error)) from error

    def factory(self, value: JsonValue) -> None:
        if value is not None and (type(value) is not str or value not in DEFAULT_FACTORIES):
            self._refuse(f"is no factory: {_shown(value)}")

    def length(self, value: JsonValue) -> None:
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_LENGTH):
            self._refuse("is no length")

    def shape(self, value: JsonValue) -> None:
        if (
            type(value) is not list
            or not 0 < len(value) <= MAX_DIMS
            or not all(type(size) is int and 0 <= size <= MAX_LENGTH for size in value)
        ):
            self._refuse("is no shape")

    def nodes(self, value: JsonValue) -> None:
        if type(value) is not list:
            self._refuse("is no list")
        self._walk(enumerate(value))

    def keys(self, value: JsonValue) -> None:
        self.nodes(value)
        assert isinstance(value, list)
        for item in value:
            if not is_key(item):
                self._refuse("has an element that cannot be hashed")

    def pairs(self, value: JsonValue) -> None:
        if type(value) is not list:
            self._refuse("is no list")
        for number, pair in enumerate(value):
            self._where.append(number)
            if type(pair) is not list or len(pair) != 2:
                self._refuse("is no pair")
            self._walk(enumerate(pair))
            if not is_key(pair[0]):
                self._refuse("has a key that cannot be hashed")
            self._where.pop()

    def members(self, value: JsonValue) -> None:
        if type(value) is not dict:
            self._refuse("is no object")
        if not all(type(key) is str and key.isidentifier() for key in value):
            self._refuse("has a key that names no field")
        self._walk(value.items())

    def _refuse(self, why: str) -> NoReturn:
        raise self._error(why)

    def _error(self, why: str) -> ManifestError:
        where = "".join(f"[{step!r:.80}]" for step in self._where[-8:])
        cut = "..." if len(self._where) > 8 else ""
        return ManifestError(path=self._path, why=f"tree{cut}{where} {why}")


def _shown(value: JsonValue) -> str:
    return repr(value[:80]) if type(value) is str else f"a {type(value).__name__}"


_SCHEMA: Mapping[str, Mapping[str, Callable[[_Check, JsonValue], None]]] = MappingProxyType(
    {
        **{tag: dict.fromkeys(fields, _Check.text) for tag, (fields, _) in SCALARS.items()},
        "tuple": {"items": _Check.nodes},
        "set": {"items": _Check.keys},
        "frozenset": {"items": _Check.keys},
        "deque": {"items": _Check.nodes, "maxlen": _Check.length},
        "dict": {"items": _Check.pairs},
        "OrderedDict": {"items": _Check.pairs},
        "StateDict": {"items": _Check.pairs, "metadata": _Check.node},
        "Counter": {"items": _Check.pairs},
        "defaultdict": {"items": _Check.pairs, "factory": _Check.factory},
        "enum": {"class": _Check.class_name, "name": _Check.text},
        "flag": {"class": _Check.class_name, "bits": _Check.text},
        "namedtuple": {"class": _Check.class_name, "fields": _Check.members},
        "dataclass": {"class": _Check.class_name, "fields": _Check.members},
        "atom": {"kind": _Check.text, "text": _Check.text},
        "tensor": {"name": _Check.leaf_name},
        "sharded": {"name": _Check.leaf_name, "shape": _Check.shape},
        "ndarray": {"name": _Check.leaf_name, "dtype": _Check.dtype},
    }
)
