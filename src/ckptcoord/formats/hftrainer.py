"""What Hugging Face's Trainer saves: `checkpoint-500/` with weights, optimizer, generators, state.

`trainer_state.json` says step, epoch and metrics. `training_args.bin` is a pickle of objects of
transformers, and is left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CorruptError, FormatError
from ckptcoord.formats.components import (
    MODEL,
    PROGRESS,
    RNG,
    deal_out,
    epoch_of,
    generators,
    is_step,
    progress,
)
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.hf import find_weights, load_weights
from ckptcoord.formats.model import is_ordered, load_all, safetensors_in, with_files
from ckptcoord.formats.source import SourceCheckpoint, SourceState
from ckptcoord.formats.torchfile import load_torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.formats.folder import SourceFolder

STATE = "trainer_state.json"
_PARTS = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "scaler.pt": "scaler"}
_RNG = re.compile(r"rng_state(?:_(0|[1-9][0-9]{0,5}))?\.pth")
_LOGGED = ("epoch", "step", "total_flos", "runtime", "per_second")


def find_checkpoint(folder: SourceFolder) -> SourceCheckpoint:
    """One checkpoint's facts, from its trainer_state.json.

    Raises:
        CorruptError: that is damaged.
    """
    document = folder.read_json(STATE)
    step, epoch = document.get("global_step"), document.get("epoch")
    if not is_step(step):
        raise CorruptError(path=folder.shown(STATE), why="has no global_step", help=RECOPY)
    return SourceCheckpoint(
        path=str(folder.path),
        read=lambda: _read(folder, document),
        step=step,  # type: ignore[arg-type]
        metrics=_metrics(document, step),
        epoch=epoch_of(epoch),
    )


def _read(folder: SourceFolder, document: Mapping[str, JsonValue]) -> SourceState:
    names = set(folder.names())
    weights = find_weights(folder, names)
    given: dict[str, Any] = {}
    left_out = []
    if weights is not None:
        given[MODEL] = load_weights(folder, weights)
        names -= {*weights.files, weights.index_file}
    elif files := safetensors_in(names):
        given[MODEL] = load_all(folder, files)
        names -= {*files}
    for file, name in _PARTS.items():
        if file in names:
            names.discard(file)
            try:
                given[name] = load_torch(folder, file)
            except FormatError as error:
                left_out.append(f"{file}: {error.why}")
    state = deal_out(given, ordered=is_ordered(folder, folder.names()))
    components = dict(state.components)
    components |= _generators(folder, names, left_out)
    components[PROGRESS] = _progress(document)
    state = replace(state, components=components, left_out=(*state.left_out, *left_out))
    return with_files(state, folder, {n for n in names if _RNG.fullmatch(n) is None} - {STATE})


def _generators(
    folder: SourceFolder, names: Collection[str], left_out: list[str]
) -> dict[str, Any]:
    """Of rank 0 as ours; those of all ranks, if there are more, as they are."""
    states = {}
    for name in sorted(names):
        match = _RNG.fullmatch(name)
        if match is None:
            continue
        try:
            states[int(match[1] or 0)] = load_torch(folder, name)
        except FormatError as error:
            left_out.append(f"{name}: {error.why}")
    found: dict[str, Any] = {}
    own = generators(states.get(0))
    if own is not None:
        found[RNG] = own
    if own is None or len(states) > 1:
        found |= {"rng_of_ranks": states} if states else {}
    return found


def _progress(document: Mapping[str, JsonValue]) -> dict[str, Any]:
    step, epoch, metric = (document.get(name) for name in ("global_step", "epoch", "best_metric"))
    return progress(
        int(step) if isinstance(step, int) else 0,
        epoch_of(epoch),
        best_metric=float(metric) if isinstance(metric, int | float) else None,
    )


def _metrics(document: Mapping[str, JsonValue], step: object) -> dict[str, float]:
    """What was logged at the checkpoint's step."""
    found: dict[str, float] = {}
    history = document.get("log_history")
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            found |= {
                name: float(value)
                for name, value in entry.items()
                if isinstance(value, int | float)
                and not name.endswith(_LOGGED)
                and math.isfinite(value)
            }
    return found
