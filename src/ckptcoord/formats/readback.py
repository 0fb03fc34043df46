"""Whether a committed checkpoint is a state: by its documents, and by its tensors' digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.box import Box
from ckptcoord.dist.capture import dump_document, tensor_bytes
from ckptcoord.dist.destinations import wants_for
from ckptcoord.dist.restore import empty_like
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.union import SavedComponent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptcoord.core.digest import Digest
    from ckptcoord.core.entries import Commit
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.repo.repository import Repository

_THREADS = 2


def differences(
    repository: Repository, commit: Commit, states: Mapping[str, CapturedComponent]
) -> Iterator[str]:
    """What a checkpoint, read from storage, has otherwise than these states; nothing if it is them.

    Every byte is read and held to its digest (INV-9), one tensor at a time.

    Raises:
        CorruptError: the checkpoint is damaged.
    """
    manifest = repository.manifest(commit)
    for key in sorted(manifest.components.keys() ^ states.keys()):
        yield f"component {key!r} is {'only there' if key in manifest.components else 'not there'}"
    with ShardSet(repository, commit) as shards:
        shards.vouch(manifest)
        for key in sorted(manifest.components.keys() & states.keys()):
            there = SavedComponent(repository, commit, manifest, shards, key)
            tree, path = there.document(there.documents(there.labels))
            if dump_document(key, tree) != states[key].document:
                yield f"{key} differs in more than its tensors"
                continue
            saved = there.open(there.labels, tree, path).tensors
            for name, tensor in states[key].tensors.items():
                if saved[name].spec != tensor.spec:
                    yield f"{key}.{name} has another shape or dtype"
                elif _stored(shards, saved[name]) != blake3_digest(tensor.read().data):
                    yield f"{key}.{name} differs"


def _stored(shards: ShardSet, saved: SavedTensor) -> Digest:
    tensor = empty_like(saved.spec)
    shards.read(wants_for(saved, [(Box.whole(saved.spec.shape), tensor)]), threads=_THREADS)
    return blake3_digest(tensor_bytes(tensor).data)
