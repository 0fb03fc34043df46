"""A checkpoint's model as one plain folder, however many ranks have saved it and in what layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.box import Box
from ckptcoord.core.leaf import LeafKind
from ckptcoord.core.manifest import FileKind
from ckptcoord.core.treemerge import MergeConflictError
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.dist.destinations import wants_for
from ckptcoord.dist.restore import empty_like
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.union import SavedComponent
from ckptcoord.errors import ConfigError
from ckptcoord.repo.export import check_model_folder, write_model_folder
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.shards import TensorSource

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.dist.saved import SavedTensor

_THREADS = 2


def export_model(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    ref: str = "latest",
    *,
    component: str = "model",
    max_shard_size: int = 5 << 30,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint's model as a folder that Hugging Face tools read.

    The stages of a pipeline and the pieces of sharded tensors are put together, one tensor at a
    time.

    Args:
        path: of the repository.
        output_dir: the folder to write.
        ref: which checkpoint.
        component: the key of the model.
        max_shard_size: bytes of data in a file.
        overwrite: replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no such component, its copies differ or lack parts, or the folder is
            not empty.
        RefNotFoundError: there is no such checkpoint.
        CorruptError: it is damaged.
    """
    repository = open_repository(path)
    commit = repository.resolve(ref)
    manifest = repository.manifest(commit)
    target = Path(output_dir)
    check_model_folder(target, repository, overwrite=overwrite)
    if component not in manifest.components:
        raise ConfigError(
            field="component",
            why=f"{commit.path} has no {component!r}, but {', '.join(manifest.components)}",
        )
    with ShardSet(repository, commit) as shards:
        shards.vouch(manifest)
        there = SavedComponent(repository, commit, manifest, shards, component)
        try:
            tree, document = there.document(there.documents(there.labels))
            saved = there.open(there.labels, tree, document)
        except MergeConflictError as error:
            raise ConfigError(
                field="component", why=f"{component!r} of {commit.path} is no one model: {error}"
            ) from error
        tensors = {n: t for n, t in saved.tensors.items() if t.kind is LeafKind.TENSOR}
        for name, tensor in tensors.items():
            if not tensor.has(Box.whole(tensor.spec.shape)):
                raise ConfigError(
                    field="component", why=f"{commit.path} has only a part of {component}.{name}"
                )
        write_model_folder(
            target,
            [
                TensorSource(spec=one.spec, read=partial(_read, shards, one))
                for one in tensors.values()
            ],
            max_shard_size=max_shard_size,
            config=next(
                (
                    repository.read_document(commit, record)
                    for record in manifest.files
                    if record.kind is FileKind.CONFIG and record.component == component
                ),
                b"",
            ),
        )
    return str(target)


def _read(shards: ShardSet, saved: SavedTensor) -> NDArray[np.uint8]:
    tensor = empty_like(saved.spec)
    shards.read(
        wants_for(saved, [(Box.whole(saved.spec.shape), tensor)]),
        threads=_THREADS,
    )
    return tensor_bytes(tensor)
