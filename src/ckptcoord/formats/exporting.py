"""A checkpoint in another tool's form, read back and compared before it takes its name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.leaf import LeafKind
from ckptcoord.errors import ConfigError, OutputDirError
from ckptcoord.formats.beside import Beside, find_beside
from ckptcoord.formats.model import NOTE
from ckptcoord.formats.whole import WholeCheckpoint
from ckptcoord.repo.export import check_model_folder
from ckptcoord.repo.repository import make_folder
from ckptcoord.repo.shards import write_file
from ckptcoord.store.files import storage_errors
from ckptcoord.store.local import LocalStore
from ckptcoord.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ckptcoord.core.entries import Commit
    from ckptcoord.formats.to_onnx import Factory
    from ckptcoord.formats.whole import WholeState, WholeTensor
    from ckptcoord.repo.repository import Repository

_MAX_NOTE_BYTES = 1 << 20
_MAX_SHARD_BYTES = 5 << 30


class Target(StrEnum):
    """What an export is for."""

    HF = "hf"
    TORCH = "torch"
    DCP = "dcp"
    ONNX = "onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is wanted.

    Attributes:
        to: the form.
        component: the key of what is exported, the model.
        everything: all components; torch and dcp can hold them.
        dtype: a code that the component's floating-point tensors are cast to; None: as they are.
        max_shard_size: bytes of tensors in a file of hf.
        config_from: a folder with config.json and tokenizer files, for hf.
        factory: makes the module, for onnx.
        force: an earlier export may be replaced.

    Raises:
        ConfigError: these do not go together.
    """

    to: Target
    component: str = "model"
    everything: bool = False
    dtype: str | None = None
    max_shard_size: int = _MAX_SHARD_BYTES
    config_from: Path | None = None
    factory: Factory | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.everything and self.to in (Target.HF, Target.ONNX):
            why = f"{self.to} holds one model; torch and dcp hold all components"
            raise ConfigError(field="--all", why=why)
        if self.config_from is not None and self.to is not Target.HF:
            raise ConfigError(field="--config-from", why="is for hf")
        if (self.factory is None) == (self.to is Target.ONNX):
            why = "is for onnx" if self.factory else "is missing: onnx is made from a module"
            raise ConfigError(field="--model", why=why)
        if self.max_shard_size < 1:
            raise ConfigError(field="--max-shard-size", why="is not a positive number of bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: the folder.
        files: name and bytes, sorted; empty where nothing was written.
        tensors: how many.
        size_bytes: of these.
        cast: how many of them are in another dtype than the checkpoint's.
        overflowed: finite elements that became infinite, by tensor.
        left_out: the paths of what the form has no place for.
        notes: what whoever uses it should know.
    """

    path: str
    files: tuple[tuple[str, int], ...]
    tensors: int
    size_bytes: int
    cast: int
    overflowed: Mapping[str, int]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export(
    repository: Repository,
    commit: Commit,
    output_dir: str | os.PathLike[str],
    wanted: Export,
    *,
    dry_run: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> ExportReport:
    """Write a checkpoint as a folder for another tool. It is there whole, or not at all.

    It is written beside, synced, read back and held to the checkpoint's digests, or with a dtype to
    what rounding must give. No more than a tensor is in memory at a time, but with onnx, of which
    torch wants the whole module; torch and dcp take as much disk again while they are written.

    Args:
        repository: where.
        commit: which checkpoint.
        output_dir: the folder to make.
        wanted: in which form.
        dry_run: check all that can be without reading tensors, and write nothing.
        advance: told of bytes as they are read and as they are checked.

    Raises:
        ConfigError: the folder is not empty and not an earlier export with `force`, checkpoints are
            in or around it, there is no such component, or the form cannot hold it.
        CorruptError: the checkpoint is damaged, or what was read back is not what was written.
        OutputDirError, StorageError: it cannot be written.
    """
    target = _checked(Path(output_dir), repository, force=wanted.force)
    if wanted.to is Target.ONNX:
        from ckptcoord.formats.to_onnx import check_onnx  # late: few need it

        check_onnx()
    with WholeCheckpoint(repository, commit) as source:
        parts = _parts(source, wanted)
        beside = _beside(source, wanted, parts)
        files: tuple[tuple[str, int], ...] = ()
        left_out: tuple[str, ...] = ()
        if not dry_run:
            store = make_folder(target.parent)
            fresh = f".{target.name[:80]}.{os.urandom(4).hex()}.new"
            store.make_dirs(fresh)
            try:
                left_out = _write(source, wanted, parts, beside, target.parent / fresh, advance)
                files = _seal(target.parent / fresh, source, wanted)
                _put_in_place(store, fresh, target.name)
            finally:
                store.remove_tree(fresh)
    states = [state for copies in parts.values() for state in copies.values()]
    tensors = [
        one
        for state in states
        for one in state.tensors.values()
        if wanted.to is not Target.HF or one.saved.kind is LeafKind.TENSOR
    ]
    return ExportReport(
        path=str(target),
        files=files,
        tensors=len(tensors),
        size_bytes=sum(one.spec.nbytes for one in tensors),
        cast=sum(one.is_cast for one in tensors),
        overflowed=source.losses.overflowed,
        left_out=left_out,
        notes=(*beside.notes, *(_disguised(tensors) if wanted.to is Target.HF else ())),
    )


def _disguised(tensors: Iterable[WholeTensor]) -> Iterator[str]:
    """What stands in safetensors as another dtype than it has, which only we undo."""
    for one in tensors:
        stored = one.spec.stored
        if stored != (one.spec.dtype, one.spec.shape):
            yield (
                f"{one.spec.name} is {one.spec.dtype}, which safetensors lacks: others see "
                f"{stored[0]} {list(stored[1])}"
            )


def _checked(given: Path, repository: Repository, *, force: bool) -> Path:
    """The folder to make, absolute, where one may be made."""
    if "\0" in str(given):
        raise OutputDirError(path=ascii(str(given)), why="its name has a NUL")
    with storage_errors("look at", str(given)):
        target = Path(os.path.abspath(given))  # noqa: PTH100 (a link at its end is not followed)
        if not target.name:
            raise OutputDirError(path=str(given), why="it is no folder's name")
        if target.is_symlink():
            raise OutputDirError(path=str(given), why="a link is in the way")
        there = target.is_dir() and any(target.iterdir())
        try:
            check_model_folder(target, repository, overwrite=True)
        except RuntimeError as error:
            raise OutputDirError(path=str(given), why="links lead in a circle") from error
    if there and not force:
        raise ConfigError(
            field="output_dir",
            why=f"{given} is not empty",
            help="Name another folder; --force replaces an earlier export",
        )
    if there and not _is_export(target):
        raise ConfigError(
            field="--force",
            why=f"{given} is not what an export has made: there is no {NOTE} in it",
            help="Name another folder, or delete that one yourself",
        )
    return target


def _is_export(folder: Path) -> bool:
    store = LocalStore(folder)
    if not store.exists(NOTE):
        return False
    try:
        note = json.loads(store.read(NOTE, limit_bytes=_MAX_NOTE_BYTES))
    except (ValueError, RecursionError):
        return False
    return isinstance(note, dict) and "exported_from" in note


def _parts(source: WholeCheckpoint, wanted: Export) -> dict[str, dict[str, WholeState]]:
    """The components, with what their tensors are to become; only the one named is cast."""
    keys = list(source.manifest.components) if wanted.everything else [wanted.component]
    if wanted.to in (Target.HF, Target.ONNX):
        return {key: {"": source.state(key, wanted.dtype)} for key in keys}
    return {
        key: source.states(key, wanted.dtype if key == wanted.component else None) for key in keys
    }


def _beside(
    source: WholeCheckpoint, wanted: Export, parts: dict[str, dict[str, WholeState]]
) -> Beside:
    if wanted.to is not Target.HF or wanted.config_from is not None:
        return Beside()
    return find_beside(source, wanted.component, parts[wanted.component][""])


def _write(
    source: WholeCheckpoint,
    wanted: Export,
    parts: dict[str, dict[str, WholeState]],
    beside: Beside,
    folder: Path,
    advance: Callable[[int], None],
) -> tuple[str, ...]:
    """Write and read back; returns what was left out."""
    if wanted.to is Target.HF:
        from ckptcoord.formats.to_hf import write_hf

        return write_hf(source, wanted, parts[wanted.component][""], beside, folder, advance)
    from ckptcoord.formats.spilled import Spilled

    alone = not wanted.everything
    spilled = Spilled(source, parts, alone=alone, folder=folder, advance=advance)
    name = wanted.component if alone else "checkpoint"
    match wanted.to:
        case Target.TORCH:
            from ckptcoord.formats.to_torch import write_torch

            write_torch(spilled, folder / f"{name}.pt")
        case Target.DCP:
            from ckptcoord.formats.to_dcp import write_dcp

            write_dcp(spilled, folder)
        case Target.ONNX:
            from ckptcoord.formats.to_onnx import write_onnx

            assert wanted.factory is not None
            write_onnx(spilled, folder / f"{name}.onnx", wanted.factory, dtype=wanted.dtype)
        case _:
            assert_never(wanted.to)
    return ()


def _seal(folder: Path, source: WholeCheckpoint, wanted: Export) -> tuple[tuple[str, int], ...]:
    """Say what it is from, and make all of it durable."""
    store, commit = LocalStore(folder), source.commit
    write_file(
        store,
        NOTE,
        dump_json(
            {
                "exported_from": commit.checkpoint_id.ref,
                "manifest_digest": str(commit.manifest_digest),
                "to": wanted.to.value,
                "component": None if wanted.everything else wanted.component,
                "dtype": wanted.dtype,
                "ckptcoord_version": VERSION,
            },
            indent=2,
        ),
    )
    with storage_errors("fsync", str(folder)):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    store.sync_dir("")
    return tuple((entry.name, entry.size_bytes) for entry in store.list(""))


def _put_in_place(store: LocalStore, fresh: str, name: str) -> None:
    """A folder that was there is moved aside, and deleted last."""
    old = f"{fresh.removesuffix('.new')}.old"
    if store.exists(name):
        store.move_dir(name, old)
    store.move_dir(fresh, name)
    store.remove_tree(old)
