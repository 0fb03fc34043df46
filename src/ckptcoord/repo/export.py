"""A model alone, as a plain folder of safetensors that Hugging Face tools read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.topology import Scope, ScopeKind
from ckptcoord.errors import ConfigError, OutputDirError
from ckptcoord.plan.placement import Piece, index_path, plan_shards
from ckptcoord.repo.shards import TensorSource, hf_index, write_file, write_shard
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ALONE = Scope(kind=ScopeKind.JOB, index=0, writers=(0,), readers=(0,))


def write_model_folder(
    target: Path,
    sources: Sequence[TensorSource],
    *,
    max_shard_size: int,
    config: bytes = b"",
    overwrite: bool = False,
) -> None:
    """Write `model*.safetensors`, their index, and `config.json` where there is one.

    The folder is written beside and put in place whole; a replaced one is deleted last.

    Raises:
        ConfigError: the folder is not empty and `overwrite` is false.
        OutputDirError: it cannot be made.
        StorageError: the storage refused.
    """
    if target.exists() and not target.is_dir():
        raise OutputDirError(path=str(target), why="a file is in the way")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            field="output_dir",
            why=f"{target} is not empty",
            help="Pass overwrite_output_dir=True to replace it",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputDirError(path=str(target), why=error.strerror or str(error)) from error
    store = LocalStore(target.parent)
    fresh, old = f".{target.name}.new", f".{target.name}.old"
    store.remove_tree(fresh)
    store.make_dirs(fresh)
    _write(store, fresh, sources, max_shard_size)
    if config:
        write_file(store, f"{fresh}/config.json", config)
    store.sync_dir(fresh)
    store.remove_tree(old)
    if store.exists(target.name):
        store.move_dir(target.name, old)
    store.move_dir(fresh, target.name)
    store.remove_tree(old)


def _write(
    store: LocalStore, folder: str, sources: Sequence[TensorSource], max_shard_size: int
) -> None:
    named = {source.spec.name: source for source in sources}
    pieces = [Piece(name=name, nbytes=s.spec.nbytes, holders=(0,)) for name, s in named.items()]
    plans = plan_shards("model", _ALONE, pieces, max_shard_size=max_shard_size)
    for plan in plans:
        write_shard(store, f"{folder}/{plan.path}", [named[name] for name in plan.names])
    if len(plans) > 1:
        index = hf_index({p.path: p.names for p in plans}, sum(p.nbytes for p in plans))
        write_file(store, f"{folder}/{index_path('model', _ALONE)}", index)
