"""What people ask of a state beside its tensors: learning rates and counts of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.text import printable
from ckptcoord.core.manifest_fields import FileKind
from ckptcoord.repo.plain import read_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.plainmanifest import PlainFile, PlainManifest
    from ckptcoord.repo.repository import Repository

_MAX_BYTES = 512 << 10  # of documents: an optimizer of 100,000 tensors has megabytes of names
_MAX_SHOWN = 12
_NAMES = ("lr", "global_step", "step", "epoch", "last_epoch", "weight_decay", "momentum")
_PAIRS = frozenset({"dict", "OrderedDict", "StateDict", "defaultdict"})
_MAX_SHOWN_VALUE = 1e300  # nothing of the kind is larger, and NaN is not smaller
_MAX_DEPTH = 112  # of a document


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A value of a state.

    Attributes:
        path: the first way to it: `optimizer.param_groups[0].lr`.
        also: how many places have the same by the same name.
    """

    path: str
    value: int | float
    also: int = 0

    def text(self) -> str:
        """`optimizer.param_groups[0].lr 0.001 (and 3 more)`."""
        number = f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value)[:40]
        more = f" (and {self.also} more)" if self.also else ""
        return f"{printable(self.path)} {number}{more}"


def scalars_of(
    repository: Repository, commit: Commit, manifest: PlainManifest
) -> tuple[Scalar, ...]:
    """The best known values, of documents that are quickly read; of copies, the first one's.

    Raises:
        CorruptError: a document is not what was written.
    """
    found: dict[tuple[int, str, str, float], list[str]] = {}
    for record in _documents(manifest):
        for path, value in _values(repository, commit, record):
            last = path.rpartition(".")[2]
            if last in _NAMES and abs(value) < _MAX_SHOWN_VALUE:
                key = _NAMES.index(last), record.component, type(value).__name__, value
                found.setdefault(key, []).append(path)
    scalars = [
        Scalar(path=paths[0], value=key[-1], also=len(paths) - 1)
        for key, paths in sorted(found.items(), key=lambda item: item[0][:2])
    ]
    return tuple(scalars[:_MAX_SHOWN])


def _documents(manifest: PlainManifest) -> Iterator[PlainFile]:
    left, seen = _MAX_BYTES, set[str]()
    for record in manifest.files:
        if record.kind is FileKind.STATE and record.component not in seen:
            seen.add(record.component)
            left -= record.size_bytes
            if left >= 0:
                yield record


def _values(
    repository: Repository, commit: Commit, record: PlainFile
) -> Iterator[tuple[str, float]]:
    document = read_plain(repository, commit, record)
    tree = document.get("tree") if isinstance(document, dict) else None
    if tree is None:
        return
    yield from _numbers(tree, record.component, _MAX_DEPTH)


def _numbers(node: JsonValue, path: str, depth: int) -> Iterator[tuple[str, float]]:
    """The numbers in a document, of which some may be malformed: what is no number is passed by."""
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node
    elif isinstance(node, dict | list) and depth:
        for key, item in _members(node):
            text = f".{key}" if isinstance(key, str) else f"[{key}]"
            yield from _numbers(item, path + text, depth - 1)


def _members(node: dict[str, JsonValue] | list[JsonValue]) -> Iterator[tuple[str | int, JsonValue]]:
    """What a node holds, by the keys of the state."""
    if isinstance(node, list):
        yield from enumerate(node)
        return
    tag, items = node.get("$"), node.get("items")
    if tag is None:
        yield from ((key, item) for key, item in node.items() if not key.startswith("$"))
    elif isinstance(items, list) and tag in _PAIRS:
        for pair in items:
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int):
                yield pair[0], pair[1]
    elif isinstance(items, list):
        yield from enumerate(items)
