"""Checkpoints of Forgather: `<key>_state.pt` for each component, and the model's files.

A component that ranks, groups or nodes hold apart has a file for each; they are kept by label, as
`rank_0`. `checkpoint_manifest.json`, where there is one, says which components there must be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CorruptError, FormatError, MissingFileError
from ckptcoord.formats.components import MODEL, RNG, deal_out, epoch_of, is_step
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.hf import find_weights, load_weights
from ckptcoord.formats.model import with_files
from ckptcoord.formats.source import SourceCheckpoint, SourceState
from ckptcoord.formats.torchfile import load_torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from ckptcoord.formats.folder import SourceFolder

MANIFEST, METRICS, METADATA = (
    "checkpoint_manifest.json",
    "eval_metrics.json",
    "checkpoint_metadata.pt",
)
STATE_FILE = re.compile(r"([A-Za-z0-9_-]{1,64}?)_state(?:_((?:rank|group|node)_.{1,100}))?\.pt")
_STEP = re.compile(r"checkpoint-(0|[1-9][0-9]{0,15})")


def is_checkpoint(folder: SourceFolder, names: Collection[str]) -> bool:
    """Whether a folder is one checkpoint of Forgather's."""
    if any(STATE_FILE.fullmatch(name) for name in names):
        return True
    return MANIFEST in names and "checkpoint_path" in folder.read_json(MANIFEST)


def find_checkpoint(folder: SourceFolder, names: Collection[str]) -> SourceCheckpoint:
    """One checkpoint's facts.

    Raises:
        CorruptError: its manifest or metrics are damaged.
    """
    match = _STEP.fullmatch(folder.path.name)
    return SourceCheckpoint(
        path=str(folder.path),
        read=lambda: _read(folder, names),
        step=int(match[1]) if match else None,
        message="" if match else folder.path.name,
        metrics=_metrics(folder) if METRICS in names else {},
    )


def _read(folder: SourceFolder, names: Collection[str]) -> SourceState:
    given: dict[str, Any] = {}
    left_out: list[str] = []
    files = set(names) - {MANIFEST, METRICS}
    weights = find_weights(folder, names)
    if weights is not None:
        tensors = load_weights(folder, weights)
        # The index has the model's own order, which the files do not.
        given[MODEL] = {name: tensors[name] for name in weights.index or tensors}
        files -= {*weights.files, weights.index_file}
    _read_components(folder, files, given, left_out)
    _check_complete(folder, names, given)
    trainer = given.get("trainer")
    step = trainer.get("global_step") if isinstance(trainer, Mapping) else None
    epoch = trainer.get("epoch", trainer.get("raw_epoch")) if isinstance(trainer, Mapping) else None
    state = deal_out(given)
    state = replace(
        state,
        step=step if is_step(step) else None,
        epoch=epoch_of(epoch),
        left_out=tuple(left_out),
    )
    return with_files(
        state, folder, {name for name in files if STATE_FILE.fullmatch(name) is None} - {METADATA}
    )


def _read_components(
    folder: SourceFolder, files: Collection[str], given: dict[str, Any], left_out: list[str]
) -> None:
    """The state of each component by its key; of several copies, each by its label."""
    copies: dict[str, dict[str, Any]] = {}
    for name in sorted(files, key=_in_numbers):
        key, label = ("checkpoint_metadata", "") if name == METADATA else _key_of(name)
        if not key:
            continue
        try:
            state = load_torch(folder, name)
        except FormatError as error:
            left_out.append(f"{name}: {error.why}")
            continue
        if label:
            copies.setdefault(key, {})[label] = state
        else:
            given[key] = state
    for key, states in copies.items():
        if key == RNG or len(states) == 1:
            given.setdefault(key, next(iter(states.values())))
        if len(states) > 1:
            given[f"{key}_of_copies"] = states


def _key_of(name: str) -> tuple[str, str]:
    """The component that a file is of, and the label of the copy; "" for what it is not."""
    match = STATE_FILE.fullmatch(name)
    return (match[1], match[2] or "") if match else ("", "")


def _in_numbers(name: str) -> list[tuple[bool, int, str]]:
    """Natural order: rank 2 before rank 10."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d{1,18})", name)
    ]


def _check_complete(folder: SourceFolder, names: Collection[str], given: Mapping[str, Any]) -> None:
    """What the manifest lists is there, also of each rank.

    Raises:
        MissingFileError: it is not.
    """
    if MANIFEST not in names:
        return
    listed = folder.read_json(MANIFEST).get("components", {})
    if not isinstance(listed, dict):
        raise CorruptError(path=folder.shown(MANIFEST), why="lists no components", help=RECOPY)
    for key, entry in listed.items():
        pattern = entry.get("sharing_pattern") if isinstance(entry, dict) else None
        ranks = entry.get("ranks") if isinstance(entry, dict) else None
        if pattern == "per_rank" and isinstance(ranks, list):
            wanted = [f"{key}_state_rank_{rank}.pt" for rank in ranks if type(rank) is int]
        else:
            wanted = [f"{key}_state.pt"] if pattern in ("global", "replicated") else []
        missing = [name for name in wanted if name not in names and key not in given]
        if missing:
            raise MissingFileError(path=folder.shown(missing[0]))


def _metrics(folder: SourceFolder) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in folder.read_json(METRICS).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
