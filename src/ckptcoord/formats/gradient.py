"""Repositories of gradient-desc: `ckpt_<branch>_s<step>.pt`, whole or as differences.

A difference is what its anchor lacks to the state, mostly rounded to half precision: what is
imported is what gradient-desc itself would have loaded, which is not what was trained. Anchors are
found by branch and step beside the file; the absolute paths that are saved in it are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ckptcoord.core.refs import BranchName
from ckptcoord.errors import CorruptError, FormatError
from ckptcoord.formats.components import deal_out, is_step
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.source import SourceCheckpoint, SourceState
from ckptcoord.formats.torchfile import load_torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.formats.folder import SourceFolder

MARKER, MANIFEST = ".gradient-repo", "manifest.json"
_FILE = re.compile(r"ckpt_(.+)_s(0|[1-9][0-9]{0,15})\.pt")
_MAX_CHECKPOINTS = 100_000
_MAX_DEPTH = 100
_BY_DIFFERENCE = ("model", "optimizer")
_ROUNDED = (
    "saved as a difference: values are those that gradient-desc would load, not the trained ones"
)


def is_repository(folder: SourceFolder, names: Collection[str]) -> bool:
    """Whether a folder is one of gradient-desc's."""
    if MARKER in names:
        return True
    return MANIFEST in names and any(_FILE.fullmatch(name) for name in names)


def find_checkpoints(
    folder: SourceFolder, names: Collection[str]
) -> tuple[list[SourceCheckpoint], list[str]]:
    """All checkpoints, in the order in which they can be committed; and what is left out.

    Raises:
        CorruptError: manifest.json is damaged.
        InvalidNameError: a branch has a name that no branch of ours can have.
    """
    listed = _listed(folder) if MANIFEST in names else []
    known = {(branch, step) for branch, step, _ in listed}
    for name in sorted(names):
        match = _FILE.fullmatch(name)
        if match is not None and (match[1], int(match[2])) not in known:
            listed.append((match[1], int(match[2]), ""))
    found, left_out = [], []
    for branch, step, time in listed:
        file = _name(branch, step)
        if file in names:
            BranchName(branch)
            found.append((_checkpoint(folder, branch, step, file), time))
        else:
            left_out.append(f"{branch}@{step}: {file} is not there")
    # By step, so that each branch grows; where one was forked, what it was forked from comes first.
    found.sort(key=lambda one: (one[0].step, one[0].fork is not None, one[1], one[0].branch))
    return [one for one, _ in found], left_out


def _checkpoint(folder: SourceFolder, branch: str, step: int, file: str) -> SourceCheckpoint:
    payload = _payload(folder, file)
    meta = payload["data"].get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    message, parent = meta.get("message"), meta.get("parent_ref")
    return SourceCheckpoint(
        path=folder.shown(file),
        read=lambda: _read(folder, file),
        step=step,
        branch=branch,
        fork=_parsed(parent),
        message=message if isinstance(message, str) else "",
    )


def _listed(folder: SourceFolder) -> list[tuple[str, int, str]]:
    """Branch, step and time of what the manifest lists."""
    entries = folder.read_json(MANIFEST).get("checkpoints")
    if not isinstance(entries, list) or len(entries) > _MAX_CHECKPOINTS:
        raise CorruptError(path=folder.shown(MANIFEST), why="has no checkpoints", help=RECOPY)
    return [_entry(folder, entry) for entry in entries]


def _entry(folder: SourceFolder, entry: JsonValue) -> tuple[str, int, str]:
    if isinstance(entry, dict):
        branch, step, time = (entry.get(name) for name in ("branch", "step", "created_at"))
        if isinstance(branch, str) and is_step(step):
            return branch, int(step), time if isinstance(time, str) else ""  # type: ignore[arg-type]
    raise CorruptError(
        path=folder.shown(MANIFEST), why=f"lists {entry!r:.80}, which is no checkpoint", help=RECOPY
    )


def _name(branch: str, step: int) -> str:
    return f"ckpt_{branch}_s{step}.pt"


def _parsed(ref: object) -> tuple[str, int] | None:
    branch, _, step = ref.rpartition("@") if isinstance(ref, str) else ("", "", "")
    digits = branch and step.isascii() and step.isdigit() and len(step) <= 16
    return (branch, int(step)) if digits else None


def _payload(folder: SourceFolder, file: str) -> dict[str, Any]:
    payload = load_torch(folder, file)
    if not isinstance(payload, dict) or not isinstance(payload.get("data"), dict):
        raise CorruptError(path=folder.shown(file), why="is none of gradient-desc", help=RECOPY)
    return payload


def _read(folder: SourceFolder, file: str) -> SourceState:
    payload = _payload(folder, file)
    data = payload["data"]
    rounded = bool(payload.get("is_delta"))
    if rounded:
        data = _restored(folder, file, payload)
    given = {key: _unwrapped(value) for key, value in data.items() if key not in ("meta", "step")}
    state = deal_out(given)
    return replace(state, notes=(*state.notes, _ROUNDED)) if rounded else state


def _restored(folder: SourceFolder, file: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a difference: what gradient-desc makes of it and its anchor."""
    ref = _parsed(payload.get("anchor_ref"))
    if ref is None:
        raise FormatError(path=folder.shown(file), why="is a difference without its anchor's name")
    anchor = _payload(folder, _name(*ref))
    if anchor.get("is_delta") or anchor.get("anchor_id") != payload.get("anchor_id"):
        raise FormatError(
            path=folder.shown(file),
            why=f"is a difference to {ref[0]}@{ref[1]} as it was before it was saved again",
            help="It cannot be restored; import the others with --branch and --step",
        )
    base, data = anchor["data"], payload["data"]
    found = {**base, **data}
    for name in _BY_DIFFERENCE:
        if name == "optimizer" and _is_whole(data):
            continue
        if isinstance(base.get(name), Mapping) and isinstance(data.get(name), Mapping):
            found[name] = _added(base[name], data[name], folder.shown(file), 0)
    return found


def _is_whole(data: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state is no difference, as with delta_optimizer=False.

    Where differences are not compressed, nothing in the file tells; then it is taken for one.
    """
    model, optimizer = data.get("model"), data.get("optimizer")
    packed = isinstance(model, Mapping) and any(_is_packed(one) for one in model.values())
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    entries = states.values() if isinstance(states, Mapping) else ()
    held = [one for entry in entries if isinstance(entry, Mapping) for one in entry.values()]
    return packed and not any(_is_packed(one) for one in held)


def _is_packed(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value.get("__compressed__"))


def _added(
    base: Mapping[Any, Any], delta: Mapping[Any, Any], path: str, depth: int
) -> dict[Any, Any]:
    """Each value of the difference, added to the anchor's where it is one of a tensor."""
    if depth > _MAX_DEPTH:
        raise CorruptError(path=path, why=f"has over {_MAX_DEPTH} levels", help=RECOPY)
    return {
        key: _sum(base[key], value, path, depth) if key in base else value
        for key, value in delta.items()
    }


def _sum(base: Any, value: Any, path: str, depth: int) -> Any:  # noqa: ANN401 (whatever was saved)
    if isinstance(value, Mapping) and not _is_packed(value):
        return _added(base, value, path, depth + 1) if isinstance(base, Mapping) else value
    if not isinstance(value, Mapping | torch.Tensor):
        return value
    if not isinstance(base, torch.Tensor):
        raise CorruptError(path=path, why="has a difference to what is no tensor", help=RECOPY)
    try:
        return base + (_unpacked(base, value, path) if isinstance(value, Mapping) else value)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise CorruptError(
            path=path, why=f"does not fit its anchor ({error})", help=RECOPY
        ) from error


def _unpacked(base: torch.Tensor, packed: Mapping[str, Any], path: str) -> torch.Tensor:
    """What gradient-desc's `_decompress_tensor` gives, for the shape that the anchor has."""
    scheme, shape, values = (packed.get(name) for name in ("scheme", "shape", "values"))
    if tuple(shape or ()) != tuple(base.shape):
        raise CorruptError(path=path, why="has a difference of another shape", help=RECOPY)
    if scheme == "zeros":
        return torch.zeros_like(base)
    if scheme == "fp16" and isinstance(values, torch.Tensor):
        return values.to(torch.float16).to(base.dtype).view(base.shape)
    if scheme == "sparse_fp16" and isinstance(values, torch.Tensor):
        full = torch.zeros_like(base)
        index = packed["indices"].to(torch.long)
        full[tuple(index.t())] = values.to(torch.float16).to(base.dtype)
        return full
    raise FormatError(path=path, why=f"is coded by {scheme!r:.40}, which is not known")


def _unwrapped(value: Any) -> Any:  # noqa: ANN401 (whatever was saved)
    """State that was registered by name stands in an envelope with a version."""
    if (
        isinstance(value, dict)
        and value.keys() == {"version", "state"}
        and value["version"] is None
    ):
        return value["state"]
    return value
