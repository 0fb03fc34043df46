"""`ckptcoord.save` and `load`: one object in a folder, in the place of torch.save's file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckptcoord.core.box import Box
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.refs import MAIN, BranchName
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.core.treecheck import TAG
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.contents import Contents
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.destinations import wants_for
from ckptcoord.dist.restore import build, empty_like
from ckptcoord.dist.sharded import Sharded
from ckptcoord.dist.world import Solo
from ckptcoord.errors import (
    CheckpointExistsError,
    CorruptError,
    ManifestError,
    OutputDirError,
)
from ckptcoord.plan.commit import head
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.contents import Copy
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.dist.shardset import ShardSet, Want
    from ckptcoord.plan.lineage import Compression

OBJECT = "object"
_THREADS = 2
_TRIES = 5  # beside processes that save there, too


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
    if not os.fspath(path):  # which would be the current folder
        raise OutputDirError(path="''", why="the path is empty")
    component = StateComponent(
        OBJECT, [], SharingPattern.GLOBAL, get_state=lambda: obj, set_state=lambda _: None
    )
    config = CoordinatorConfig(compression=compression, keep_last=keep, io_threads=_THREADS)
    with CheckpointCoordinator([component], dist=Solo(), output_dir=path, config=config) as one:
        for more in reversed(range(_TRIES)):
            newest = head(one.repository.state(), BranchName(MAIN))
            step = 1 if newest is None else newest.checkpoint_id.step + 1
            try:
                return one.save_checkpoint(step=step, message=message)
            except CheckpointExistsError:  # another process has been quicker
                if not more:
                    raise
    raise AssertionError("the last try returns or raises")


def load(path: str | os.PathLike[str], ref: str = "latest") -> object:
    """What `save` was given, every byte checked; tensors are on the CPU.

    Of a repository that a trainer wrote: its components by key. What ranks held in parts is put
    together: the stages of a model, the pieces of a tensor. Where copies differ, as generators do,
    they are given by label (`rank00002`).

    Raises:
        RepositoryNotFoundError: the folder is none.
        RefNotFoundError: nothing was saved there, or not under this ref.
        CorruptError: what is there is damaged.
    """
    repository = open_repository(path)
    for more in reversed(range(_TRIES)):
        commit = repository.resolve(ref)
        try:
            return _object_of(Contents(repository, commit))
        except CorruptError:
            # Who saves there has saved again, and dropped what was being read here.
            if not more or not repository.is_dropped(commit):
                raise
    raise AssertionError("the last try returns or raises")


def _object_of(contents: Contents) -> object:
    with contents.shards() as shards:
        found = {key: state_of(contents, key, shards) for key in contents.manifest.components}
    return found[OBJECT] if tuple(found) == (OBJECT,) else found


def outline_of(contents: Contents, key: str) -> object:
    """As `state_of`, with a TensorSpec in the place of each tensor and array; none is read.

    Raises:
        as `state_of`.
    """
    return _by_label(
        contents.copies(key),
        lambda tensors: {name: one.spec for name, one in tensors.items()},
        outline=True,
    )


def state_of(contents: Contents, key: str, shards: ShardSet) -> object:
    """What all copies of a component are together; where they differ, each one's, by label.

    Raises:
        ManifestError: it has no state document, or one that breaks the form.
    """
    return _by_label(contents.copies(key, shards), lambda tensors: _read(tensors, shards))


def _by_label(
    copies: Sequence[Copy],
    leaves_of: Callable[[Mapping[str, SavedTensor]], Mapping[str, object]],
    *,
    outline: bool = False,
) -> object:
    states: dict[str, object] = {}
    for copy in copies:
        saved = copy.state
        if not copy.has_document:
            raise ManifestError(path=saved.path, why="has no state document in the manifest")
        leaves = leaves_of(saved.tensors)
        tree = _without_arrays(saved.tree) if outline else saved.tree
        states[copy.label] = build(tree, leaves, saved.path)
    return states[""] if tuple(states) == ("",) else states


def _without_arrays(node: JsonValue) -> JsonValue:
    """The same document with tensors in the place of arrays, which are given as they are."""
    if isinstance(node, list):
        return [_without_arrays(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get(TAG) == "ndarray":
        return {TAG: "tensor", "name": node["name"]}
    return {key: _without_arrays(item) for key, item in node.items()}


def tensor_of(saved: SavedTensor, shards: ShardSet) -> object:
    """A whole tensor; of one of which only parts are there, the parts."""
    return _read({"": saved}, shards)[""]


def _read(tensors: Mapping[str, SavedTensor], shards: ShardSet) -> dict[str, object]:
    """As `tensor_of`, all at once, so that threads read several."""
    found: dict[str, object] = {}
    wants: list[Want] = []
    for name, saved in tensors.items():
        whole = Box.whole(saved.spec.shape)
        is_whole = saved.has(whole)
        boxes = [whole] if is_whole else [box for box, _ in saved.pieces]
        pieces = [(box, empty_like(saved.spec, size=box.size, file=saved.file)) for box in boxes]
        wants += wants_for(saved, pieces)
        if is_whole:
            found[name] = pieces[0][1]
        else:
            parts = [Sharded(part, box.offset, saved.spec.shape) for box, part in pieces]
            found[name] = parts[0] if len(parts) == 1 else parts
    shards.read(wants, threads=_THREADS)
    return found
