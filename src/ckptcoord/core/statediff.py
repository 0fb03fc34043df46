"""What differs between two states beside their tensors: learning rates, steps, names. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.treecheck import ORDER, TAG
from ckptcoord.core.treecodec import SCALARS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.core.jsonio import JsonValue

Value: TypeAlias = "bool | int | float | str | None"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SHOWN_CHARS = 200
_FEW_ITEMS = 16  # of a list whose differing items are each worth a line: not so a generator's state
_LEAVES = frozenset({"tensor", "sharded", "ndarray"})
_SEQUENCES = frozenset({"tuple", "deque", "set", "frozenset"})
_PAIRS = frozenset({"dict", "OrderedDict", "StateDict", "Counter", "defaultdict"})
_FIELDS = frozenset({"namedtuple", "dataclass"})


class Status(StrEnum):
    """What became of something between two checkpoints.

    RESHAPED is a tensor of another dtype or shape. Of a PARTIAL one the pieces that are there are
    not the whole, and differ.
    """

    EQUAL = "equal"
    CHANGED = "changed"
    RESHAPED = "reshaped"
    PARTIAL = "partial"
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarChange:
    """A value of a state that is no tensor, old and new.

    Attributes:
        path: the way to it: `optimizer.param_groups[0].lr`.
        status: CHANGED, ADDED or REMOVED.
        old: None, too, where there was none. What is no JSON value is described in words.
        new: the same.
    """

    path: str
    status: Status
    old: Value = None
    new: Value = None


def state_changes(old: JsonValue, new: JsonValue, *, root: str) -> list[ScalarChange]:
    """Where two well-formed documents differ, in the order of the new one; tensors are left out.

    Nothing only if they are the same but for how their tensors are cut into pieces: of what is the
    same in another order, or as another type, there is a change that says so.

    Args:
        old: as `check_document` passed it.
        new: the same.
        root: what paths begin with.
    """
    return list(_changes(old, new, root))


def _changes(old: JsonValue, new: JsonValue, path: str) -> Iterator[ScalarChange]:
    tags = _tag(old), _tag(new)
    if tags[0] in _LEAVES and tags[1] in _LEAVES:
        return
    if not (_is_inner(tags[0]) and _is_inner(tags[1])):
        if tags[0] != tags[1] or not _same(old, new):
            yield from _one_sided(old, path, Status.REMOVED) if _is_inner(tags[0]) else ()
            yield from _scalar(old, new, path)
            yield from _one_sided(new, path, Status.ADDED) if _is_inner(tags[1]) else ()
        return
    if tags[0] != tags[1]:
        yield _changed(path, f"a {tags[0]}", f"a {tags[1]}")
    if tags[0] in _ORDERED and tags[1] in _ORDERED:
        yield from _item_changes(_items(old), _items(new), path)
    else:
        yield from _member_changes(old, new, path)


def _member_changes(old: JsonValue, new: JsonValue, path: str) -> Iterator[ScalarChange]:
    before = {key: (text, node) for key, text, node in _members(old)}
    after = {key: (text, node) for key, text, node in _members(new)}
    for key, (text, node) in before.items():
        if key not in after:
            yield from _one_sided(node, path + text, Status.REMOVED)
    for key, (text, node) in after.items():
        if key in before:
            yield from _changes(before[key][1], node, path + text)
        else:
            yield from _one_sided(node, path + text, Status.ADDED)
    if [key for key in before if key in after] != [key for key in after if key in before]:
        yield _changed(path, "keys in one order", "keys in another")


def _item_changes(old: list[JsonValue], new: list[JsonValue], path: str) -> Iterator[ScalarChange]:
    if max(len(old), len(new)) > _FEW_ITEMS and not any(map(_holds_more, (*old, *new))):
        same = sum(map(_same, old, new))
        if not same == len(old) == len(new):
            differ = max(len(old), len(new)) - same
            yield _changed(path, f"{len(old)} items", f"{len(new)} items, {differ} differ")
        return
    for at in range(max(len(old), len(new))):
        where = f"{path}[{at}]"
        if at >= len(new):
            yield from _one_sided(old[at], where, Status.REMOVED)
        elif at >= len(old):
            yield from _one_sided(new[at], where, Status.ADDED)
        else:
            yield from _changes(old[at], new[at], where)


def _one_sided(node: JsonValue, path: str, status: Status) -> Iterator[ScalarChange]:
    """The values of what is there on one side only."""
    tag = _tag(node)
    if tag in _LEAVES:
        return
    if not _is_inner(tag):
        yield _sided(path, status, _shown(node))
        return
    members = list(_members(node))
    if not members or (tag in _ORDERED and len(members) > _FEW_ITEMS):
        yield _sided(path, status, f"a {tag} of {len(members)}")
        return
    for _, key, item in members:
        yield from _one_sided(item, path + key, status)


def _scalar(old: JsonValue, new: JsonValue, path: str) -> Iterator[ScalarChange]:
    """A place that holds a value, or a tensor, where it held something else."""
    before, after = _described(old), _described(new)
    if before is not None and after is not None:
        yield _changed(path, *before, *after)
    elif before is not None:
        yield _sided(path, Status.REMOVED, *before)
    elif after is not None:
        yield _sided(path, Status.ADDED, *after)


def _described(node: JsonValue) -> tuple[Value] | None:
    """What stands there in one word; None for what is gone through by its members."""
    tag = _tag(node)
    if _is_inner(tag):
        return None
    return ("a tensor",) if tag in _LEAVES else (_shown(node),)


def _changed(path: str, old: Value, new: Value) -> ScalarChange:
    return ScalarChange(path=path, status=Status.CHANGED, old=old, new=new)


def _sided(path: str, status: Status, value: Value) -> ScalarChange:
    if status is Status.ADDED:
        return ScalarChange(path=path, status=status, new=value)
    return ScalarChange(path=path, status=status, old=value)


# --- nodes ---------------------------------------------------------------------------------------

_ORDERED = _SEQUENCES | {"list"}
_INNER = _ORDERED | _PAIRS | _FIELDS


def _tag(node: JsonValue) -> str:
    """What kind of node it is; empty for a plain value."""
    if isinstance(node, list):
        return "list"
    if isinstance(node, dict):
        return str(node.get(TAG, "dict"))
    return ""


def _is_inner(tag: str) -> bool:
    return tag in _INNER


def _holds_more(node: JsonValue) -> bool:
    tag = _tag(node)
    return tag in _INNER or tag in _LEAVES


def _items(node: JsonValue) -> list[JsonValue]:
    items = node if isinstance(node, list) else node["items"] if isinstance(node, dict) else []
    assert isinstance(items, list), "a checked document"
    return items


def _members(node: JsonValue) -> Iterator[tuple[object, str, JsonValue]]:
    """What a container holds, by its key and the text that leads to it; all else it has, too."""
    if isinstance(node, list):
        yield from _numbered(node)
    elif not isinstance(node, dict):
        return
    elif TAG not in node:
        order = node.get(ORDER)
        keys = order if isinstance(order, list) else [key for key in node if key != ORDER]
        yield from ((key, _key_text(key), node[str(key)]) for key in map(str, keys))
    else:
        for name, value in node.items():
            if name == "items" and isinstance(value, list):
                yield from _pairs(value) if node[TAG] in _PAIRS else _numbered(value)
            elif name == "fields" and isinstance(value, dict):
                yield from ((key, _key_text(key), item) for key, item in value.items())
            elif name != TAG and value is not None:
                yield (TAG, name), f"<{name}>", value


def _numbered(items: list[JsonValue]) -> Iterator[tuple[object, str, JsonValue]]:
    return ((at, f"[{at}]", item) for at, item in enumerate(items))


def _pairs(items: list[JsonValue]) -> Iterator[tuple[object, str, JsonValue]]:
    for pair in items:
        assert isinstance(pair, list), "a checked document"
        key, item = pair
        yield key if isinstance(key, str) else dump_json(key), _key_text(key), item


def _key_text(key: JsonValue) -> str:
    if isinstance(key, str) and _IDENTIFIER.fullmatch(key):
        return f".{key}"
    text = repr(_shown(key)) if isinstance(key, str) else str(_shown(key))
    return f"[{text}]"


def _same(old: JsonValue, new: JsonValue) -> bool:
    """Whether two values are the same, and of one type; a zero has its sign."""
    if type(old) is not type(new):
        return False
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return repr(old) == repr(new) if isinstance(old, float) else old == new


def _shown(node: JsonValue) -> Value:
    """A plain value, clipped; of all else, words."""
    if isinstance(node, str):
        return node if len(node) <= _SHOWN_CHARS else f"{node[: _SHOWN_CHARS - 3]}..."
    if not isinstance(node, dict):
        return str(_items(node)) if isinstance(node, list) else node
    tag = _tag(node)
    if tag in SCALARS:
        fields, decode = SCALARS[tag]
        return _decoded(tag, decode(*(node[field] for field in fields)))
    if tag in ("enum", "flag"):
        return f"{str(node['class']).rpartition(':')[2]}.{node.get('name', node.get('bits'))}"
    return str(node["text"])[:_SHOWN_CHARS] if tag == "atom" else f"a {tag}"


def _decoded(tag: str, value: object) -> Value:
    """A value that JSON cannot hold: floats that are no numbers are floats here."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes, {bytes(value[:8]).hex()}"
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    item = value.item() if hasattr(value, "item") else value
    plain = isinstance(item, bool | int | float | str)
    text = str(item)
    if plain and not isinstance(item, str):
        return item  # type: ignore[return-value]
    return f"{text[: _SHOWN_CHARS - 3]}..." if len(text) > _SHOWN_CHARS else text or f"a {tag}"
