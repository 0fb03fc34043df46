"""A model's files written into a folder that may hold the ones before: the old set, then the new.

Shards are written beside what is there, under names that are free; then one rename decides: of the
index, or of the file where there is only one. What the new set does not need is deleted last. So a
kill at any moment leaves the set that was there or the new one, whole.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.topology import Scope, ScopeKind
from ckptcoord.dist.capture import spec_of, tensor_bytes
from ckptcoord.errors import CkptError, StorageError, UnsupportedStateError
from ckptcoord.formats.hf import BIN, BIN_INDEX, SAFE, SAFE_INDEX
from ckptcoord.plan.placement import Piece, plan_shards
from ckptcoord.repo.repository import make_folder
from ckptcoord.repo.shards import TensorSource, write_shard
from ckptcoord.store.files import create_file, storage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.store.local import LocalStore

_ALONE = Scope(kind=ScopeKind.JOB, index=0, writers=(0,), readers=(0,))
_TEMP = ".tmp-model-"
_OWN = re.compile(
    r"model(-[0-9a-f]{8})?-\d{5,}-of-\d{5,}\.safetensors"
    r"|pytorch_model(-[0-9a-f]{8})?-\d{5,}-of-\d{5,}\.bin"
    rf"|{re.escape(_TEMP)}[0-9a-f]{{16}}"
)
_WHOLE = (SAFE, SAFE_INDEX, BIN, BIN_INDEX)


def write_model_files(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    twins: Mapping[str, str],
    metadata: Mapping[str, JsonValue],
    safetensors: bool,
    max_shard_size: int,
) -> None:
    """Write a model's tensors as one file or several with an index, in the place of those there.

    Args:
        path: the folder, made if absent; what is no model's file in it stays.
        tensors: each once.
        twins: names that share the tensor of another one; a .bin file that is alone has them too,
            since it has no header to note them in.
        metadata: goes into the index, or into the header of the one file.
        safetensors: else files of torch.save, of tensors only.
        max_shard_size: bytes of tensors a file; a larger one gets a file of its own.

    Raises:
        UnsupportedStateError: a tensor is in parts on several ranks, or of a kind without bytes.
        OutputDirError: the folder cannot be made.
        StorageError: the storage refused; what was there is as it was.
    """
    pieces = [
        Piece(name=name, nbytes=_source(name, tensor).spec.nbytes, holders=(0,))
        for name, tensor in tensors.items()
    ]
    plans = plan_shards("model", _ALONE, pieces, max_shard_size=max_shard_size)
    saver = _Saver(make_folder(path), path, tensors, safetensors=safetensors)
    with saver.undone_on_failure():
        if len(plans) == 1:
            keep = saver.write_alone(metadata, twins)
        else:
            keep = saver.write_shards([plan.names for plan in plans], metadata)
    saver.delete_others(keep)


class _Saver:
    def __init__(
        self,
        store: LocalStore,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        *,
        safetensors: bool,
    ) -> None:
        self._store, self._path, self._tensors, self._safe = store, path, tensors, safetensors
        self._before = {entry.name for entry in store.list("")}
        self._made: list[str] = []

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Delete what was written if it is not to count."""
        try:
            yield
        except BaseException:
            for name in self._made:
                with suppress(CkptError):  # debris; the first error is the one to be told
                    self._store.remove_tree(name)
            raise

    def write_alone(self, metadata: Mapping[str, JsonValue], twins: Mapping[str, str]) -> set[str]:
        """One file; its name."""
        temp = f"{_TEMP}{os.urandom(8).hex()}"
        self._made.append(temp)
        if self._safe:
            self._write_safe(temp, tuple(self._tensors), _texts(metadata))
        else:
            self._write_bin(temp, tuple(self._tensors), twins)
        final = SAFE if self._safe else BIN
        self._rename(temp, final)
        return {final}

    def write_shards(
        self, shards: Sequence[Sequence[str]], metadata: Mapping[str, JsonValue]
    ) -> set[str]:
        """Several files and their index; their names."""
        files = self._names(len(shards))
        for file, names in zip(files, shards, strict=True):
            self._made.append(file)
            if self._safe:
                self._write_safe(file, names, {})
            else:
                self._write_bin(file, names, {})
        self._store.sync_dir("")
        index: dict[str, JsonValue] = {
            "metadata": {**metadata, "total_size": sum(t.nbytes for t in self._tensors.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        name = SAFE_INDEX if self._safe else BIN_INDEX
        self._made.clear()  # from here on it may count, whatever becomes of this process
        self._store.put(name, dump_json(index, indent=2))
        return {*files, name}

    def delete_others(self, keep: set[str]) -> None:
        """Delete the files of the set before, whole ones first: loaders look at these first."""
        for name in _WHOLE:
            if name in self._before and name not in keep:
                self._store.remove_tree(name)
        self._store.sync_dir("")
        for name in sorted(self._before - keep):
            if _OWN.fullmatch(name):
                self._store.remove_tree(name)

    def _names(self, count: int) -> list[str]:
        """The usual names; where one of them is taken, others, since the old set needs it yet."""
        stem, ending = ("model", "safetensors") if self._safe else ("pytorch_model", "bin")
        names = _numbered(stem, count, ending)
        if self._before.isdisjoint(names):
            return names
        return _numbered(f"{stem}-{os.urandom(4).hex()}", count, ending)

    def _write_safe(self, file: str, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        sources = [_source(name, self._tensors[name]) for name in names]
        write_shard(self._store, file, sources, metadata=metadata)

    def _write_bin(self, file: str, names: Sequence[str], twins: Mapping[str, str]) -> None:
        tensors = {name: _alone(self._tensors[name]) for name in names}
        tensors |= {name: tensors[first] for name, first in twins.items()}
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.fdopen(create_file(file, folder), "wb") as out:
                torch.save(tensors, out)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise storage_error("write", file, error) from error
        except RuntimeError as error:  # torch's word for a write that failed
            raise StorageError(operation="write", path=file, why=str(error)[:200]) from error
        finally:
            os.close(folder)

    def _rename(self, temp: str, final: str) -> None:
        try:
            (self._path / temp).replace(self._path / final)  # the new set counts from here
        except OSError as error:
            raise storage_error("rename", final, error) from error
        self._store.sync_dir("")


def _numbered(stem: str, count: int, ending: str) -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.{ending}" for number in range(1, count + 1)]


def _source(name: str, tensor: torch.Tensor) -> TensorSource:
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedStateError(
            path=f"model.{name}",
            type_name=type(tensor).__name__,
            why="a model's files hold tensors",
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UnsupportedStateError(
            path=f"model.{name}",
            type_name=type(tensor).__name__,
            why="it is no plain tensor; gather it first, as with full_tensor()",
        )
    return TensorSource(spec=spec_of("model", name, tensor), read=lambda: tensor_bytes(tensor))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with a storage of its own: torch.save writes all of a storage."""
    plain = tensor.detach().cpu()
    whole = plain.untyped_storage().nbytes() == plain.nbytes and plain.is_contiguous()
    return plain if whole else plain.clone(memory_format=torch.contiguous_format)


def _texts(metadata: Mapping[str, JsonValue]) -> dict[str, str]:
    """As a header takes it: every value a text."""
    return {
        key: value if isinstance(value, str) else dump_json(value).decode()
        for key, value in metadata.items()
        if key != "format"  # a header has its own
    }
