"""A model's files into memory or into a module, all checked before anything live changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.jsonio import parse_json
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.errors import DigestMismatchError, FormatError, StateMismatchError
from ckptcoord.formats.hf import find_weights, load_weights
from ckptcoord.formats.tensors import open_safetensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ckptcoord.formats.folder import SourceFolder

SHARING = "param_sharing"
"""In an index, or the header of a file that is alone: the groups of names that share a tensor."""


@dataclass(slots=True, kw_only=True)
class ModelFiles:
    """What a folder holds of a model.

    Attributes:
        tensors: by name, read from the files as they are used; tied ones by each name.
        path: the folder, for errors.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    path: str = ""


def read_model_files(folder: SourceFolder, keys: Collection[str] | None = None) -> ModelFiles:
    """A model's tensors, against their digests where the files have them; of `keys`, those there.

    Raises:
        FormatError: there is no model in the folder.
        CorruptError: a file is damaged, or not what the index says.
    """
    names = folder.names()
    weights = find_weights(folder, names)
    if weights is None:
        raise FormatError(
            path=str(folder.path),
            why="holds no model: no model.safetensors, pytorch_model.bin, or index of them",
        )
    groups = _groups(weights.metadata.get(SHARING))
    if len(weights.files) == 1 and not weights.index and weights.files[0].endswith(".safetensors"):
        _, header = open_safetensors(folder, weights.files[0], ())
        text = header.metadata.get(SHARING)
        groups = [] if text is None else _groups(parse_json(text.encode(), path=SHARING))
    wanted = None if keys is None else _with_twins(keys, groups)
    tensors = load_weights(folder, weights, wanted)
    for file in weights.files:
        if file.endswith(".safetensors"):
            _check_digests(folder, file, tensors)
    for group in groups:
        _share(tensors, group)
    if keys is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name in keys}
    return ModelFiles(tensors=tensors, path=str(folder.path))


def fill_module(
    module: torch.nn.Module,
    files: ModelFiles,
    *,
    strict: bool,
    assign: bool,
    keys: Collection[str] | None,
) -> None:
    """Load tensors into a module; nothing is changed unless all fits.

    Raises:
        StateMismatchError: a shape differs; or, if strict, a name is missing or unexpected.
    """
    live = module.state_dict(keep_vars=True)
    groups = tied_names(live)
    state = dict(files.tensors)
    for group in groups:
        _share(state, group)
    wanted = {name for name in live if keys is None or name in keys}
    mismatched = [
        f"{name} ({list(state[name].shape)}, live {list(live[name].shape)})"
        for name in sorted(wanted & state.keys())
        if isinstance(live[name], torch.Tensor) and live[name].shape != state[name].shape
    ]
    missing = sorted(wanted - state.keys()) if strict else []
    unexpected = sorted(state.keys() - live.keys()) if strict else []
    if mismatched or missing or unexpected:
        raise StateMismatchError(
            checkpoint=files.path,
            missing=tuple(missing),
            unexpected=tuple(unexpected),
            mismatched=tuple(mismatched),
        )
    fitting = {name: tensor for name, tensor in state.items() if name in live}
    module.load_state_dict(fitting, strict=False, assign=assign)
    if assign:
        _tie(module, groups)


def tied_names(state: Mapping[str, object]) -> list[list[str]]:
    """The groups of names that have one tensor, in order."""
    by_memory: dict[object, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            by_memory.setdefault(_memory(value), []).append(name)
    return [names for names in by_memory.values() if len(names) > 1]


def _memory(tensor: torch.Tensor) -> object:
    """Equal for tensors that are one: the same elements, or, without elements, the same object."""
    if tensor.is_meta or not tensor.numel() or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _share(tensors: dict[str, torch.Tensor], group: Sequence[str]) -> None:
    """Give the names of a group that are missing the tensor of one that is there."""
    held = next((tensors[name] for name in group if name in tensors), None)
    if held is not None:
        for name in group:
            tensors.setdefault(name, held)


def _tie(module: torch.nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Make the names of each group one tensor again, which assigning has taken apart."""
    for first, *others in groups:
        held = _attribute(module, first)
        for name in others:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, held)


def _attribute(module: torch.nn.Module, name: str) -> object:
    parent, _, last = name.rpartition(".")
    return getattr(module.get_submodule(parent), last)


def _groups(value: object) -> list[list[str]]:
    """Groups of names; what is none is nobody's business here: other tools' metadata."""
    if not isinstance(value, list):
        return []
    return [
        list(group)
        for group in value
        if isinstance(group, list) and all(isinstance(name, str) for name in group)
    ]


def _with_twins(keys: Collection[str], groups: Iterable[Sequence[str]]) -> set[str]:
    found = set(keys)
    for group in groups:
        if found & set(group):
            found |= set(group)
    return found


def _check_digests(folder: SourceFolder, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """INV-9: what ckptcoord wrote has a digest for each tensor."""
    _, header = open_safetensors(folder, file, ())
    for entry in header.entries:
        name = entry.spec.name
        if entry.digest is None or name not in tensors:
            continue
        found = blake3_digest(tensor_bytes(tensors[name]).data)
        if found != entry.digest:
            raise DigestMismatchError(
                path=folder.shown(file), tensor=name, expected=str(entry.digest), found=str(found)
            )
