"""Folders of a model alone: Hugging Face's, and any other folder of safetensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ckptcoord.errors import FormatError
from ckptcoord.formats.components import MODEL
from ckptcoord.formats.folder import MAX_JSON_BYTES, json_object
from ckptcoord.formats.hf import CONFIG, find_weights, load_weights
from ckptcoord.formats.source import SourceState
from ckptcoord.formats.tensors import load_safetensors, merged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ckptcoord.formats.folder import SourceFolder

FILES = "files"
"""The component of the small files beside a model: each one's bytes, by name."""
NOTE = "ckptcoord_export.json"
"""In every folder that an export has made: from what."""
_KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".merges", ".spm", ".bpe")
_INDEX = ".index.json"
_KEPT_BYTES = 64 << 20


def read_model(folder: SourceFolder, names: Collection[str]) -> SourceState:
    """A Hugging Face model: its tensors, its config.json, and the small files of its tokenizer.

    Raises:
        FormatError: there are no weights in it.
        CorruptError: an index, a header or config.json is damaged.
    """
    weights = find_weights(folder, names)
    if weights is None:
        raise FormatError(
            path=str(folder.path),
            why="holds no model",
            help="Give the folder of a model.safetensors, a pytorch_model.bin or an index of them",
        )
    state = SourceState(components={MODEL: load_weights(folder, weights)})
    return with_files(state, folder, set(names) - {*weights.files, weights.index_file})


def read_safetensors(folder: SourceFolder, names: Collection[str]) -> SourceState:
    """The tensors of all files of safetensors together, as a model; and its small files.

    Raises:
        CorruptError: a header is damaged, or two files hold a tensor of one name.
    """
    files = safetensors_in(names)
    return with_files(
        SourceState(components={MODEL: load_all(folder, files)}), folder, set(names) - {*files}
    )


def safetensors_in(names: Iterable[str]) -> list[str]:
    """The files of safetensors, whatever they are called: `adapter_model.safetensors`."""
    return [name for name in names if name.endswith(".safetensors")]


def load_all(folder: SourceFolder, files: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of several files of safetensors. Raises as `read_safetensors`."""
    return merged({file: load_safetensors(folder, file) for file in files}, folder)


def is_small_file(name: str) -> bool:
    """Whether a file beside a model is kept as it is: by its name, a tokenizer's or the like."""
    if not name.isprintable() or "\\" in name or name in (CONFIG, NOTE):
        return False
    return name.endswith(_KEPT) and not name.endswith(_INDEX)


def is_ordered(folder: SourceFolder, names: Collection[str]) -> bool:
    """Whether the model's tensors stand in the order in which the model has them."""
    weights = find_weights(folder, names)
    return weights is not None and weights.files[0].endswith(".bin") and len(weights.files) == 1


def with_files(state: SourceState, folder: SourceFolder, names: Collection[str]) -> SourceState:
    """The state with config.json, and with the files of a tokenizer and the like as they are.

    Raises:
        CorruptError: config.json is no JSON.
    """
    sizes = folder.names()
    kept, left_out = {}, []
    for name in sorted(names):
        if name == CONFIG:
            continue
        if sizes[name].is_dir:
            left_out.append(f"{name}/: a folder in a checkpoint")
        elif not is_small_file(name):
            left_out.append(f"{name}: no part of a checkpoint that is known")
        elif sizes[name].size_bytes > _KEPT_BYTES:
            left_out.append(f"{name}: over {_KEPT_BYTES >> 20} MiB")
        else:
            data = folder.read(name, limit_bytes=_KEPT_BYTES)
            kept[name] = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if data
                else torch.empty(0, dtype=torch.uint8)
            )
    components = {**state.components, FILES: kept} if kept else state.components
    return replace(
        state,
        components=components,
        config=_config(folder) if CONFIG in names else b"",
        left_out=(*state.left_out, *left_out),
    )


def _config(folder: SourceFolder) -> bytes:
    data = folder.read(CONFIG, limit_bytes=MAX_JSON_BYTES)
    json_object(data, folder.shown(CONFIG))
    return data
