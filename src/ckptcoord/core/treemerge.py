"""One document of several: what the copies of a component have together (ADR 11)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.jsonio import JsonValue, dump_json
from ckptcoord.core.treecheck import ORDER, TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Keys: TypeAlias = "tuple[object, ...]"
"""The keys that lead to a value, from the top; texts as they are, others as their document."""

_PAIRED = frozenset({"dict", "OrderedDict", "StateDict", "defaultdict", "Counter"})


class MergeConflictError(ValueError):
    """Copies that differ.

    Attributes:
        path: where, for people.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"its copies differ at {path}")
        self.path = path


def merge_documents(documents: Sequence[JsonValue], *, root: str) -> JsonValue:
    """The union of well-formed documents: dicts by key, in the order of the first that has it.

    Args:
        documents: at least one.
        root: what an error's path begins with.

    Raises:
        MergeConflictError: what is no dict differs.
    """
    return _merge(documents, root)


def prune_document(document: JsonValue, wants: Callable[[Keys], bool]) -> JsonValue:
    """A document without the members that are not wanted; of a dict that is, all are asked for."""
    return _prune(document, (), wants)


def top_keys(document: JsonValue) -> frozenset[object]:
    """The keys of a document that is a dict."""
    if not isinstance(document, dict) or not _is_dict(document):
        return frozenset()
    return frozenset(key for key, _ in _members(document))


def has_keys(document: JsonValue, wanted: JsonValue) -> bool:
    """Whether every key of a dict of `wanted` is there, at the same place of a document."""
    if not (isinstance(document, dict) and isinstance(wanted, dict)):
        return True
    if not (_is_dict(document) and _is_dict(wanted)):
        return True
    there = dict(_members(document))
    return all(key in there and has_keys(there[key], node) for key, node in _members(wanted))


def leaf_keys(document: JsonValue) -> dict[str, Keys]:
    """The keys that lead to each leaf, by its name; of one in several places, to the first.

    Only of leaves that dicts alone lead to.
    """
    found: dict[str, Keys] = {}
    _collect(document, (), found)
    return found


def _merge(nodes: Sequence[JsonValue], path: str) -> JsonValue:
    """All at once: one after the other would look at the keys of the first again for each."""
    first = nodes[0]
    if len(nodes) == 1:
        return first
    dicts = [node for node in nodes if isinstance(node, dict) and _is_dict(node)]
    if len(dicts) == len(nodes):
        if all(map(_is_plain, dicts)):
            return _merge_plain(dicts, path)
        return _merge_paired([_paired(node) for node in dicts], path)
    text = dump_json(first)
    if any(node is not first and dump_json(node) != text for node in nodes[1:]):
        raise MergeConflictError(path)
    return first


def _merge_plain(nodes: Sequence[dict[str, JsonValue]], path: str) -> dict[str, JsonValue]:
    members: dict[str, list[JsonValue]] = {}
    for node in nodes:
        for key in _order(node):
            members.setdefault(key, []).append(node[key])
    merged = {key: _merge(values, f"{path}.{key}") for key, values in members.items()}
    keys = list(merged)
    if keys != sorted(keys):
        merged[ORDER] = list[JsonValue](keys)
    return merged


def _merge_paired(nodes: Sequence[dict[str, JsonValue]], path: str) -> dict[str, JsonValue]:
    first = nodes[0]
    if any(node[TAG] != first[TAG] for node in nodes):
        raise MergeConflictError(path)
    keys: dict[bytes, JsonValue] = {}
    members: dict[bytes, list[JsonValue]] = {}
    for node in nodes:
        for key, value in _pairs(node):
            text = dump_json(key)
            keys[text] = key
            members.setdefault(text, []).append(value)
    items: list[JsonValue] = [
        [keys[text], _merge(values, f"{path}[{text.decode()}]")] for text, values in members.items()
    ]
    merged: dict[str, JsonValue] = {TAG: first[TAG], "items": items}
    for field in first.keys() - merged.keys():
        merged[field] = _merge([node[field] for node in nodes], f"{path}.{field}")
    return merged


def _prune(node: JsonValue, keys: Keys, wants: Callable[[Keys], bool]) -> JsonValue:
    if not isinstance(node, dict) or not _is_dict(node):
        return node
    if _is_plain(node):
        kept = {key: node[key] for key in _order(node) if wants((*keys, key))}
        pruned = {key: _prune(value, (*keys, key), wants) for key, value in kept.items()}
        order = list[JsonValue](kept)
        return {**pruned, ORDER: order} if list(kept) != sorted(kept) else pruned
    items: list[JsonValue] = [
        [key, _prune(value, (*keys, _key(key)), wants)]
        for key, value in _pairs(node)
        if wants((*keys, _key(key)))
    ]
    return {**node, "items": items}


def _collect(node: JsonValue, keys: Keys, found: dict[str, Keys]) -> None:
    if not isinstance(node, dict):
        return
    if _is_dict(node):
        for key, value in _members(node):
            _collect(value, (*keys, key), found)
    elif node[TAG] in ("tensor", "sharded", "ndarray"):
        found.setdefault(str(node["name"]), keys)


def _members(node: dict[str, JsonValue]) -> Iterator[tuple[object, JsonValue]]:
    if _is_plain(node):
        return ((key, node[key]) for key in _order(node))
    return ((_key(key), value) for key, value in _pairs(node))


def _key(node: JsonValue) -> object:
    return dump_json(node) if isinstance(node, dict | list) else node


def _is_plain(node: dict[str, JsonValue]) -> bool:
    return TAG not in node


def _is_dict(node: dict[str, JsonValue]) -> bool:
    return TAG not in node or node[TAG] in _PAIRED


def _paired(node: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A plain dict in the form of those whose keys are no texts."""
    if not _is_plain(node):
        return node
    return {TAG: "dict", "items": [[key, node[key]] for key in _order(node)]}


def _order(node: dict[str, JsonValue]) -> list[str]:
    order = node.get(ORDER)
    if isinstance(order, list):
        return [str(key) for key in order]
    return [key for key in node if key != ORDER]


def _pairs(node: dict[str, JsonValue]) -> Iterator[tuple[JsonValue, JsonValue]]:
    items = node["items"]
    assert isinstance(items, list), "a checked document"
    for pair in items:
        assert isinstance(pair, list), "a checked document"
        yield pair[0], pair[1]
