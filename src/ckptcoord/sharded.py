"""A model's tensors in a folder: saved as Hugging Face tools keep them, loaded as they come.

One file or several with an index, safetensors or `.bin`. transformers reads what is written here,
and what it writes is read. Tied tensors are stored once and tied again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.errors import CkptError, ConfigError, InvalidNameError, StateMismatchError
from ckptcoord.formats.folder import SourceFolder
from ckptcoord.formats.hf import find_weights, load_weights
from ckptcoord.formats.modelfiles import write_model_files
from ckptcoord.formats.modelloading import SHARING, fill_module, read_model_files, tied_names
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.settings import CONFIG_PATH

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ckptcoord.core.jsonio import JsonValue

__all__ = [
    "find_latest_checkpoint",
    "load_checkpoint",
    "next_checkpoint_path",
    "save_checkpoint",
    "validate_checkpoint",
]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
_FOLDER = re.compile(r"checkpoint-(.+)")
_CHECKPOINTS = "checkpoints"


def save_checkpoint(  # noqa: PLR0913, PLR0917 (a public name; so other tools have it)
    output_dir: str | os.PathLike[str],
    module: torch.nn.Module | Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any] | None = None,
    safetensors: bool = True,  # noqa: FBT001, FBT002 (as above)
    max_shard_size: int = 2**31,
    include_param_sharing: bool = True,  # noqa: FBT001, FBT002 (as above)
    param_sharing_metadata: Sequence[Sequence[str]] | None = None,
) -> str:
    """Save a model's tensors into a folder, in the place of those that are there.

    Atomic: whenever it is interrupted, `load_checkpoint` gives the model before or the new one.
    Other files in the folder stay. Each tensor has a digest in its file's header, if safetensors.

    Args:
        output_dir: made if absent.
        module: a module, or its state: tensors by name.
        metadata: JSON values, for other tools: in the index, or the header of the one file.
        safetensors: False writes `pytorch_model*.bin` by torch.save: plain tensors by name, which
            `torch.load(weights_only=True)` reads.
        max_shard_size: bytes of tensors a file; a larger tensor gets a file of its own.
        include_param_sharing: tensors that are tied are stored once, and which they are is noted;
            False: each name is stored by itself.
        param_sharing_metadata: the groups of names that share a tensor, rather than those found.

    Returns:
        The folder.

    Raises:
        ConfigError: there are no tensors, the metadata is not JSON, or a group's tensors differ.
        UnsupportedStateError: something is no plain tensor.
        OutputDirError: the folder cannot be made.
        StorageError: the storage refused; what was there is as it was.
    """
    state = _state_of(module)
    groups: list[list[str]] = []
    if param_sharing_metadata is not None:
        groups = _given_groups(state, param_sharing_metadata)
    elif include_param_sharing:
        groups = tied_names(state)
    notes = _checked(metadata)
    if groups:
        notes[SHARING] = [[*group] for group in groups]
    twins = {name: first for first, *others in groups for name in others}
    write_model_files(
        Path(output_dir),
        {name: tensor for name, tensor in state.items() if name not in twins},
        twins=twins,
        metadata=notes,
        safetensors=bool(safetensors),
        max_shard_size=max_shard_size,
    )
    return os.fspath(output_dir)


@overload
def load_checkpoint(
    model_dir: str | os.PathLike[str],
    module: torch.nn.Module,
    device: str | torch.device = "cpu",
    strict: bool = True,  # noqa: FBT001, FBT002 (as below)
    assign: bool = False,  # noqa: FBT001, FBT002 (as below)
    keys: Collection[str] | None = None,
) -> None: ...


@overload
def load_checkpoint(
    model_dir: str | os.PathLike[str],
    module: None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,  # noqa: FBT001, FBT002 (as below)
    assign: bool = False,  # noqa: FBT001, FBT002 (as below)
    keys: Collection[str] | None = None,
) -> dict[str, torch.Tensor]: ...


def load_checkpoint(
    model_dir: str | os.PathLike[str],
    module: torch.nn.Module | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,  # noqa: FBT001, FBT002 (as above)
    assign: bool = False,  # noqa: FBT001, FBT002 (as above)
    keys: Collection[str] | None = None,
) -> dict[str, torch.Tensor] | None:
    """Load a model's tensors from a folder: one file or several, safetensors or `.bin`.

    Where a file has digests, as those of `save_checkpoint` do, every tensor is held to its own.
    Nothing of the module is changed unless all fits.

    Args:
        model_dir: the folder; its safetensors go before its `.bin`, an index before a single file.
        module: to load into; None: the tensors are returned by name, tied ones as one tensor.
        device: where returned or assigned tensors go; a module's own stay where they are.
        strict: refuse names that are missing in the folder or unknown to the module; with None as
            module, those of `keys` that are missing.
        assign: put the loaded tensors in the place of the module's, as for one on `meta`.
        keys: only these names.

    Raises:
        FormatError: there is no model in the folder, or its files hold more than tensors.
        CorruptError: a file is damaged, or not what the index says.
        StateMismatchError: it does not fit.
    """
    files = read_model_files(SourceFolder(model_dir), keys)
    if module is None:
        missing = sorted(set(keys) - files.tensors.keys()) if strict and keys is not None else []
        if missing:
            raise StateMismatchError(checkpoint=files.path, missing=tuple(missing))
        return _moved(files.tensors, device)
    if assign:
        files.tensors = _moved(files.tensors, device)
    fill_module(module, files, strict=strict, assign=assign, keys=keys)
    return None


def find_latest_checkpoint(model_dir: str | os.PathLike[str]) -> str | None:
    """The newest valid checkpoint of a run: the folder, or None.

    `checkpoint-<id>` in `checkpoints/`, or where that is absent in the folder itself. Ids that are
    numbers are steps, and the largest is the newest; others, as times, come before them, by name.
    In a ckptcoord repository, only what was committed counts. Where there is none of them, the
    folder itself, if it is one.
    """
    root = Path(model_dir)
    inside = root / _CHECKPOINTS
    place = inside if inside.is_dir() else root
    found = [entry for entry in place.glob("checkpoint-*") if entry.is_dir()]
    if (place / CONFIG_PATH).is_file():
        committed = {commit.path for commit in open_repository(place).state().commits.values()}
        found = [entry for entry in found if entry.name in committed]
    for entry in sorted(found, key=_order, reverse=True):
        if validate_checkpoint(entry):
            return str(entry)
    return str(root) if validate_checkpoint(root) else None


def next_checkpoint_path(model_dir: str | os.PathLike[str], checkpoint_id: int | str) -> str:
    """Where a run's checkpoint of this step, or other id, belongs. Nothing is made.

    Raises:
        InvalidNameError: it can be no folder's name.
    """
    text = str(checkpoint_id)
    if isinstance(checkpoint_id, bool) or _ID.fullmatch(text) is None or ".." in text:
        raise InvalidNameError(
            kind="checkpoint id",
            name=text,
            why="is not 1 to 100 letters, digits, '.', '_', ':' or '-' that begin with a letter "
            "or digit",
        )
    return str(Path(model_dir) / _CHECKPOINTS / f"checkpoint-{text}")


def validate_checkpoint(checkpoint_path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a whole model: every file of its index, each with a sound header.

    Their bytes are not read; `load_checkpoint` does that.
    """
    try:
        folder = SourceFolder(checkpoint_path)
        weights = find_weights(folder, folder.names())
        if weights is None:
            return False
        load_weights(folder, weights)
    except CkptError:
        return False
    return True


# --- helpers -------------------------------------------------------------------------------------


def _state_of(module: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    given = module if isinstance(module, Mapping) else module.state_dict()
    if not given:
        raise ConfigError(field="module", why="has no tensors")
    return dict(given)


def _given_groups(
    state: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """The groups as far as the state has their names; of what the state holds apart, equal ones."""
    found = []
    for group in groups:
        names = [name for name in dict.fromkeys(group) if name in state]
        for other in names[1:]:
            if not torch.equal(state[names[0]], state[other]):
                raise ConfigError(
                    field="param_sharing_metadata",
                    why=f"says that {names[0]!r} and {other!r} are one tensor; they differ",
                )
        if len(names) > 1:
            found.append(names)
    if len({name for names in found for name in names}) < sum(map(len, found)):
        raise ConfigError(field="param_sharing_metadata", why="has a name in two groups")
    return found


def _checked(metadata: Mapping[str, Any] | None) -> dict[str, JsonValue]:
    try:
        value = parse_json(dump_json(dict(metadata or {})), path="metadata")
    except (TypeError, ValueError, RecursionError, CkptError) as error:
        raise ConfigError(field="metadata", why=f"is no JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(field="metadata", why="is no JSON object")
    return value


def _moved(
    tensors: Mapping[str, torch.Tensor], device: str | torch.device
) -> dict[str, torch.Tensor]:
    """The tensors in memory of their own on a device; one that has two names stays one."""
    done: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in done:
            done[id(tensor)] = tensor.to(device, copy=True)
    return {name: done[id(tensor)] for name, tensor in tensors.items()}


def _order(folder: Path) -> tuple[bool, int, str]:
    match = _FOLDER.fullmatch(folder.name)
    text = match[1] if match else ""
    numbered = text.isascii() and text.isdigit() and len(text) <= 18
    return numbered, int(text) if numbered else 0, text
