"""What is at a path: which format, and which checkpoints."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.errors import FormatError
from ckptcoord.formats import dcp, forgather, gradient, hftrainer
from ckptcoord.formats.components import deal_out
from ckptcoord.formats.folder import SourceFolder
from ckptcoord.formats.hf import BIN, BIN_INDEX, SAFE, SAFE_INDEX
from ckptcoord.formats.model import read_model, read_safetensors
from ckptcoord.formats.source import Source, SourceCheckpoint, SourceState
from ckptcoord.formats.tensors import load_safetensors
from ckptcoord.formats.torchfile import load_torch

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from ckptcoord.store.base import Entry

_MARKER = ".ckptcoord"
_NUMBERED = re.compile(r"(?:checkpoint|step|global_step|ckpt|iter)[-_]?(0|[1-9][0-9]{0,15})")
_WEIGHTS = (SAFE, SAFE_INDEX, BIN, BIN_INDEX)
KNOWN = (
    "a file of torch.save or safetensors; a folder of safetensors, of a Hugging Face model or "
    "Trainer, of torch.distributed.checkpoint, of Forgather, of gradient-desc"
)


def find_source(path: str | os.PathLike[str]) -> Source:
    """The checkpoints at a path, oldest first. Little is read of them.

    Raises:
        FormatError: there is nothing, or nothing that is known.
        CorruptError, UnsafePathError: what says which checkpoints there are is damaged.
    """
    text = str(path)
    if not text or "\0" in text:
        raise FormatError(path=ascii(text)[:200], why="is no path")
    there = Path(path)
    try:
        is_dir, is_file = there.is_dir(), there.is_file()
    except OSError as error:
        raise FormatError(path=text[:200], why=error.strerror or "cannot be opened") from error
    if is_file:
        return _of_file(there.resolve(), safetensors=there.suffix == ".safetensors")
    if not is_dir:
        raise FormatError(path=text[:200], why="there is no such file or folder")
    folder = SourceFolder(there)
    names = folder.names()
    _refuse_own(folder, names)
    # A run's folder may hold its last model beside the checkpoints.
    run = None if gradient.is_repository(folder, names) else _of_run(folder, names)
    found = run or _of_folder(folder, names)
    if found is None:
        raise FormatError(path=str(folder.path), why="holds nothing known", help=f"Known: {KNOWN}")
    return found


def _of_file(path: Path, *, safetensors: bool) -> Source:
    folder, name = SourceFolder(path.parent), path.name

    def read() -> SourceState:
        if safetensors:
            return deal_out(load_safetensors(folder, name), ordered=False)
        return deal_out(load_torch(folder, name))

    kind = "safetensors" if safetensors else "torch.save"
    return Source(
        format=f"{kind} file",
        path=str(path),
        checkpoints=(SourceCheckpoint(path=str(path), read=read),),
    )


def _of_folder(folder: SourceFolder, names: Mapping[str, Entry]) -> Source | None:
    """A folder that is one checkpoint, or a repository of gradient-desc; None: neither."""
    _refuse_own(folder, names)
    if gradient.is_repository(folder, names):
        found, left_out = gradient.find_checkpoints(folder, names)
        if not found:
            raise FormatError(path=str(folder.path), why="is a gradient-desc repository with none")
        return Source(
            format="gradient-desc repository",
            path=str(folder.path),
            checkpoints=tuple(found),
            left_out=tuple(left_out),
        )
    for format_, is_one, find in _KINDS:
        if is_one(folder, names):
            return Source(format=format_, path=str(folder.path), checkpoints=(find(folder, names),))
    return None


def _refuse_own(folder: SourceFolder, names: Mapping[str, Entry]) -> None:
    manifest = forgather.MANIFEST in names and folder.read_json(forgather.MANIFEST)
    if _MARKER in names or (manifest and "checkpoint_id" in manifest):
        raise FormatError(
            path=str(folder.path),
            why="is ckptcoord's own",
            help="Name it with --repo, or its checkpoints by their refs",
        )
    if ".gradient" in names:
        raise FormatError(
            path=str(folder.path),
            why="is a workspace of gradient-desc",
            help="Import its repositories one by one: they are the folders in it",
        )


def _of_run(folder: SourceFolder, names: Mapping[str, Entry]) -> Source | None:
    """A folder of checkpoints of one kind: `checkpoint-500`, `step-500`; or in `checkpoints/`."""
    inside = folder.below("checkpoints") if "checkpoints" in names else folder
    formats, checkpoints = set(), []
    left_out = [f"{name}: beside the checkpoints" for name in _WEIGHTS if name in names]
    for unnumbered, step, name in _numbered(inside):
        below = inside.below(name)
        found = _of_folder(below, below.names())
        if found is None:
            left_out.append(f"{name}: holds nothing known")
            continue
        formats.add(found.format)
        checkpoints += [
            one if unnumbered or one.step is not None else _at(one, step)
            for one in found.checkpoints
        ]
    if not checkpoints:
        return None
    kind = formats.pop() if len(formats) == 1 else "checkpoints of several formats"
    return Source(
        format=f"{kind}s" if kind.endswith("t") else kind,
        path=str(folder.path),
        checkpoints=tuple(checkpoints),
        left_out=tuple(left_out),
    )


def _numbered(folder: SourceFolder) -> list[tuple[bool, int, str]]:
    """The folders that may be checkpoints, by step: whether it has none, the step, the name."""
    found = []
    for name, entry in folder.names().items():
        match = _NUMBERED.fullmatch(name)
        if entry.is_dir and (match is not None or name.startswith("checkpoint-")):
            found.append((match is None, int(match[1]) if match else 0, name))
    return sorted(found)


def _at(one: SourceCheckpoint, step: int) -> SourceCheckpoint:
    return replace(one, step=step)


def _one(
    read: Callable[[SourceFolder, Mapping[str, Entry]], SourceState],
) -> Callable[[SourceFolder, Mapping[str, Entry]], SourceCheckpoint]:
    def find(folder: SourceFolder, names: Mapping[str, Entry]) -> SourceCheckpoint:
        return SourceCheckpoint(path=str(folder.path), read=lambda: read(folder, names))

    return find


_KINDS: tuple[
    tuple[
        str,
        Callable[[SourceFolder, Mapping[str, Entry]], bool],
        Callable[[SourceFolder, Mapping[str, Entry]], SourceCheckpoint],
    ],
    ...,
] = (
    (
        "torch.distributed.checkpoint",
        lambda _, names: dcp.METADATA in names,
        _one(lambda folder, _: dcp.read_dcp(folder)),
    ),
    (
        "Hugging Face Trainer checkpoint",
        lambda _, names: hftrainer.STATE in names,
        lambda folder, _: hftrainer.find_checkpoint(folder),
    ),
    ("Forgather checkpoint", forgather.is_checkpoint, forgather.find_checkpoint),
    (
        "Hugging Face model",
        lambda _, names: any(name in names for name in _WEIGHTS),
        _one(read_model),
    ),
    (
        "folder of safetensors",
        lambda _, names: any(name.endswith(".safetensors") for name in names),
        _one(read_safetensors),
    ),
)
