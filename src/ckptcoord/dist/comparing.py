"""What differs between two checkpoints of one repository: their tensors, values and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.manifest import TENSOR_KINDS
from ckptcoord.core.statediff import state_changes
from ckptcoord.errors import ConfigError
from ckptcoord.repo.changes import CheckpointDiff, metric_changes
from ckptcoord.repo.diff import Comparison, Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.statediff import ScalarChange
    from ckptcoord.dist.contents import Contents, Copy
    from ckptcoord.dist.shardset import ShardSet

_THREADS = 2


def compare_checkpoints(
    old: Contents,
    new: Contents,
    *,
    component: str | None = None,
    threads: int = _THREADS,
    progress: Callable[[int], None] = lambda _: None,
) -> CheckpointDiff:
    """Compare two checkpoints; tensors are streamed, and memory does not grow with them.

    Args:
        old: what is compared with.
        new: what is compared.
        component: compare only this one.
        threads: that read, decode and compare.
        progress: is told of bytes that were read, in any thread.

    Raises:
        ConfigError: there is no such component in either.
        CorruptError: something that is read is not what was written.
        StorageError: it cannot be read.
    """
    pairs: list[Pair] = []
    documents: list[ScalarChange] = []
    with old.shards() as olds, new.shards() as news:
        for key in _keys(old, new, component):
            for before, after in _copies((old, olds), (new, news), key):
                pairs += _pairs(before, after)
                documents += _scalars(before, after)
        comparison = Comparison(olds, news, threads=threads, progress=progress)
        tensors = comparison.compare(pairs)
    return CheckpointDiff(
        old=old.commit.checkpoint_id.ref,
        new=new.commit.checkpoint_id.ref,
        tensors=tuple(sorted(tensors, key=lambda one: one.name)),
        documents=tuple(documents),
        metrics=metric_changes(old.manifest.metrics, new.manifest.metrics),
        read_bytes=comparison.read_bytes,
    )


def _keys(old: Contents, new: Contents, component: str | None) -> list[str]:
    """Of the components that are compared: in the new one's order, then what is gone."""
    keys = list(dict.fromkeys((*new.manifest.components, *old.manifest.components)))
    if component is None:
        return keys
    if component not in keys:
        raise ConfigError(
            field="component", why=f"{component[:80]!r} is in neither; there is: {', '.join(keys)}"
        )
    return [component]


def _copies(
    old: tuple[Contents, ShardSet], new: tuple[Contents, ShardSet], key: str
) -> Iterator[tuple[Copy | None, Copy | None]]:
    """The state of a component on both sides: all copies together, or each with its like."""
    (before, olds), (after, news) = old, new
    if key not in before.manifest.components:
        yield from ((None, copy) for copy in after.copies(key, news))
        return
    if key not in after.manifest.components:
        yield from ((copy, None) for copy in before.copies(key, olds))
        return
    if _is_same(before, after, key):
        there = after.copies(key, news) if _has_tensors(after, key) else ()
        yield from ((copy, copy) for copy in there)
        return
    sides = before.copies(key, olds), after.copies(key, news)
    if any(copy.label for side in sides for copy in side):
        sides = before.by_label(key, olds), after.by_label(key, news)
    one, other = ({copy.label: copy for copy in side} for side in sides)
    yield from ((one.get(label), other.get(label)) for label in sorted(one.keys() | other.keys()))


def _is_same(old: Contents, new: Contents, key: str) -> bool:
    """Whether every file of a component is the same on both sides, by digest."""
    return _digests(old, key) == _digests(new, key)


def _digests(side: Contents, key: str) -> list[tuple[str, str]]:
    files = (file for file in side.manifest.files if file.component == key)
    return sorted((file.scope, str(file.digest)) for file in files)


def _has_tensors(side: Contents, key: str) -> bool:
    return any(file.component == key and file.kind in TENSOR_KINDS for file in side.manifest.files)


def _pairs(old: Copy | None, new: Copy | None) -> Iterator[Pair]:
    before = {} if old is None else old.tensors
    after = {} if new is None else new.tensors
    for name in dict.fromkeys((*after, *before)):
        yield Pair(name=name, old=before.get(name), new=after.get(name))


def _scalars(old: Copy | None, new: Copy | None) -> list[ScalarChange]:
    """Of a copy that is there on one side only, its values all are."""
    if old is new:
        return []
    trees: list[JsonValue] = [{} if copy is None else copy.state.tree for copy in (old, new)]
    there = new or old
    return state_changes(*trees, root="" if there is None else there.prefix)
