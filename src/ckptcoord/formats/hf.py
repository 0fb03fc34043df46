"""A model as Hugging Face tools keep it: one file or several with an index, safetensors or .bin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ckptcoord.codec.tensorspec import check_tensor_name
from ckptcoord.errors import CorruptError, FormatError
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.tensors import load_safetensors, merged
from ckptcoord.formats.torchfile import load_torch
from ckptcoord.store.checks import check_path

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.formats.folder import SourceFolder

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where a model's tensors are.

    Attributes:
        files: in order of their names.
        index: which file holds which tensor; empty where there is no index.
        metadata: of the index.
        index_file: its name; empty where there is none.
    """

    files: tuple[str, ...]
    index: dict[str, str]
    metadata: dict[str, JsonValue]
    index_file: str = ""


def find_weights(folder: SourceFolder, names: Collection[str]) -> Weights | None:
    """The model's files, safetensors before .bin, sharded before whole; None: there is none.

    Raises:
        CorruptError, UnsafePathError: an index that is none, or names files elsewhere or absent.
    """
    for index, file in ((SAFE_INDEX, SAFE), (BIN_INDEX, BIN)):
        if index in names:
            return _indexed(folder, index, names)
        if file in names:
            return Weights(files=(file,), index={}, metadata={})
    return None


def load_weights(
    folder: SourceFolder, weights: Weights, keys: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """A model's tensors by name, of `keys` those that it has; read as they are used.

    Raises:
        CorruptError: a file is damaged, or holds another tensor than its index says.
        FormatError: a file holds more than tensors.
    """
    wanted = weights.files
    if weights.index and keys is not None:
        wanted = tuple(sorted({weights.index[key] for key in keys if key in weights.index}))
    parts = {file: load_file(folder, file, keys) for file in wanted}
    found = merged(parts, folder)
    lost = [
        name
        for name, file in weights.index.items()
        if (keys is None or name in keys) and name not in parts[file]
    ]
    if lost:
        raise CorruptError(
            path=folder.shown(weights.index[lost[0]]),
            why=f"lacks tensor {lost[0]!r:.200}, which {weights.index_file} says is in it",
            help=RECOPY,
        )
    return found


def load_file(
    folder: SourceFolder, file: str, keys: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one file, by its name's ending.

    Raises:
        FormatError: it holds more than tensors.
    """
    if file.endswith(".safetensors"):
        return load_safetensors(folder, file, keys)
    state = load_torch(folder, file)
    if not is_tensors(state):
        raise FormatError(path=folder.shown(file), why="holds more than tensors by name")
    for name in state:
        check_tensor_name(name)
    return {name: value for name, value in state.items() if keys is None or name in keys}


def is_tensors(state: object) -> bool:
    """Whether a state is nothing but tensors by name, and at least one."""
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    )


def _indexed(folder: SourceFolder, index: str, names: Collection[str]) -> Weights:
    document = folder.read_json(index)
    weight_map, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CorruptError(path=folder.shown(index), why="is no index of tensors", help=RECOPY)
    found: dict[str, str] = {}
    ending = ".safetensors" if index == SAFE_INDEX else ".bin"
    for name, file in weight_map.items():
        check_tensor_name(name)
        if not isinstance(file, str) or not file.endswith(ending):
            raise CorruptError(
                path=folder.shown(index), why=f"has {file!r:.80} for a {ending} file", help=RECOPY
            )
        found[name] = file
    files = tuple(sorted(set(found.values())))
    _check_files(folder, index, files, names)
    return Weights(files=files, index=found, metadata=metadata, index_file=index)


def _check_files(
    folder: SourceFolder, index: str, files: Sequence[str], names: Collection[str]
) -> None:
    for file in files:
        check_path(file)  # of an absolute one, or one with `..`, it says so
        if "/" in file or file not in names:
            raise CorruptError(
                path=folder.shown(index),
                why=f"names {file!r:.200}, which is not beside it",
                help=RECOPY,
            )
