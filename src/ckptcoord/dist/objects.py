"""`ckptcoord.save` and `load`: one object in a folder, in the place of torch.save's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.jsonio import JsonValue, parse_json
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.manifest import TENSOR_KINDS, FileKind
from ckptcoord.core.refs import MAIN, BranchName
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.core.tree import MAX_STATE_BYTES, leaf_forms
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.restore import build, empty_like
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.world import Solo
from ckptcoord.errors import ManifestError
from ckptcoord.plan.commit import head
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.plan.lineage import Compression
    from ckptcoord.repo.repository import Repository

OBJECT = "object"
_THREADS = 2


def save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    compression: Compression | str = CompressionLevel.AUTO,
    keep: int = 1,
    message: str = "",
) -> str:
    """Save an object into a folder; again into the same folder costs what has changed since.

    Atomic: whenever it is interrupted, `load` gives the object before or the new one. Ranks of a
    job that save each call it with a path of their own.

    Args:
        obj: any nesting of dicts, lists, tuples, tensors, arrays and scalars.
        path: a folder, which is made; a ckptcoord repository like any other.
        compression: `off` writes plain safetensors each time.
        keep: how many of the newest saves stay loadable, by `load(path, "main@<n>")`.
        message: for people.

    Returns:
        The folder of the checkpoint.

    Raises:
        UnsupportedStateError: something in it has no pickle-free form; names where it is.
        OutputDirError: the path is a file, or cannot be written.
        FencedError: another process saved there at the same time.
        StorageError: the storage refused; the object that was saved before is untouched.
    """
    component = StateComponent(
        OBJECT, [], SharingPattern.GLOBAL, get_state=lambda: obj, set_state=lambda _: None
    )
    config = CoordinatorConfig(compression=compression, keep_last=keep, io_threads=_THREADS)
    with CheckpointCoordinator([component], dist=Solo(), output_dir=path, config=config) as one:
        newest = head(one.repository.state(), BranchName(MAIN))
        step = 1 if newest is None else newest.checkpoint_id.step + 1
        return one.save_checkpoint(step=step, message=message)


def load(path: str | os.PathLike[str], ref: str = "latest") -> object:
    """What `save` was given, every byte checked; tensors are on the CPU.

    Of a repository that a trainer wrote: its components by key, and of those that have several
    copies, the copies by label (`rank00002`).

    Raises:
        RepositoryNotFoundError: the folder is none.
        RefNotFoundError: nothing was saved there, or not under this ref.
        CorruptError: what is there is damaged.
    """
    repository = open_repository(path)
    commit = repository.resolve(ref)
    manifest = repository.manifest(commit)
    if tuple(manifest.components) == (OBJECT,):
        return _copy(repository, commit, manifest, OBJECT, "")
    found: dict[str, object] = {}
    for key in manifest.components:
        labels = sorted({record.scope for record in manifest.files if record.component == key})
        copies = {label: _copy(repository, commit, manifest, key, label) for label in labels}
        found[key] = copies[""] if labels == [""] else copies
    return found


def _copy(
    repository: Repository,
    commit: Commit,
    manifest: CheckpointManifest,
    component: str,
    label: str,
) -> object:
    """One copy of a component; where its members held different things, each one's, by file."""
    records = [r for r in manifest.files if (r.component, r.scope) == (component, label)]
    documents = [record for record in records if record.kind is FileKind.STATE]
    states = {
        one.path: _state(repository, commit, [r for r in records if r.kind in TENSOR_KINDS], one)
        for one in documents
    }
    if len(states) == 1:
        return next(iter(states.values()))
    return states


def _state(
    repository: Repository, commit: Commit, shards: Sequence[FileRecord], document: FileRecord
) -> object:
    path = f"{commit.path}/{document.path}"
    tree = _tree(repository.read_document(commit, document), path)
    names = leaf_forms(tree, path=path)
    with ShardSet(repository, commit) as files:
        sources = files.sources(shards)
        absent = sorted(set(names) - set(sources))
        if absent:
            raise ManifestError(path=path, why=f"names {absent[0]!r}, which no shard holds")
        made = {name: empty_like(sources[name][1].spec) for name in names}
        files.read([(sources[name], made[name][1]) for name in names], threads=_THREADS)
    return build(tree, {name: tensor for name, (tensor, _) in made.items()}, path)


def _tree(data: bytes, path: str) -> JsonValue:
    document = parse_json(data, path=path, max_bytes=MAX_STATE_BYTES)
    if not isinstance(document, dict) or document.get("format_version") != 1:
        raise ManifestError(path=path, why="is no state document of a known version")
    if "tree" not in document:
        raise ManifestError(path=path, why="has no tree")
    return document["tree"]
