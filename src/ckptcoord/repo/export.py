"""A model alone, as a plain folder of safetensors that Hugging Face tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.topology import Scope, ScopeKind
from ckptcoord.errors import ConfigError, OutputDirError
from ckptcoord.plan.placement import Piece, index_path, plan_shards
from ckptcoord.repo.repository import make_folder
from ckptcoord.repo.settings import MARKER
from ckptcoord.repo.shards import TensorSource, hf_index, write_file, write_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptcoord.repo.repository import Repository
    from ckptcoord.store.local import LocalStore

_ALONE = Scope(kind=ScopeKind.JOB, index=0, writers=(0,), readers=(0,))


def check_model_folder(target: Path, repository: Repository, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced by a model's.

    Raises:
        ConfigError: checkpoints are in it or around it; or it is not empty and `overwrite` is
            false.
        OutputDirError: a file is in the way.
    """
    place, here = target.resolve(), Path(repository.url).resolve()
    inside = place.relative_to(here).parts[:1] if place.is_relative_to(here) else ("",)
    if here.is_relative_to(place) or inside[0].startswith((MARKER, "checkpoint-")):
        raise ConfigError(
            field="output_dir",
            why=f"a model's folder cannot take the place of {target}, where checkpoints are",
            help="Give a folder of its own; the default is `model` in the repository",
        )
    if target.exists() and not target.is_dir():
        raise OutputDirError(path=str(target), why="a file is in the way")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            field="output_dir",
            why=f"{target} is not empty",
            help="Pass overwrite_output_dir=True to replace it",
        )


def write_model_folder(
    target: Path,
    sources: Sequence[TensorSource],
    *,
    max_shard_size: int,
    config: bytes = b"",
) -> None:
    """Write `model*.safetensors`, their index, and `config.json` where there is one.

    The folder is written beside and put in place whole; a replaced one is deleted last.

    Raises:
        OutputDirError: it cannot be made.
        StorageError: the storage refused.
    """
    store = make_folder(target.parent)
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
