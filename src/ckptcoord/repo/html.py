"""Pictures for notebooks: the history of a run, and what changed between two checkpoints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptcoord.core.html import BLUE, ORANGE, dim, name, page, size_text, table, text, title
from ckptcoord.core.statediff import Status
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import latest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.core.statediff import ScalarChange, Value
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.changes import CheckpointDiff, LayerChange, TensorChange

_DRAWN = 60  # of the newest checkpoints
_LANES = 12  # branches that have one to themselves
_LISTED = 12
_STEP, _LANE, _EDGE = 18, 22, 12  # pixels
_BAR = 220  # pixels of the longest


def repository_html(state: LogState, url: str) -> str:
    """A repository: a picture of its history, and its newest checkpoints."""
    every = sorted(
        state.commits.values(), key=lambda one: state.stamps[one.checkpoint_id].number, reverse=True
    )
    tags: dict[CheckpointId, list[str]] = {}
    for tag, target in sorted(state.tags.items()):
        tags.setdefault(target, []).append(str(tag))
    rows = [
        (
            name(one.checkpoint_id.ref),
            dim(", ".join(tags.get(one.checkpoint_id, []))),
            text(state.stamps[one.checkpoint_id].timestamp[:19].replace("T", " ")),
            size_text(one.stored_bytes),
            text(", ".join(f"{key} {value:.6g}" for key, value in sorted(one.metrics.items()))),
            text(one.message.strip().partition("\n")[0]),
        )
        for one in every[:_LISTED]
    ]
    counts = f"{len(every):,} checkpoints on {len(branches(state)):,} branches"
    more = [dim(f"and {len(every) - _LISTED:,} before these")] if len(every) > _LISTED else []
    head = ("checkpoint", "tags", "saved", "stored", "metrics", "message")
    return page(
        title(name(url), dim(counts)),
        history_svg(state) if every else dim("no checkpoints yet"),
        table(head, rows, numbers=(3,)) if rows else "",
        *more,
    )


def history_svg(state: LogState) -> str:
    """The newest checkpoints as dots, a line of them for each branch, joined to their parents."""
    order = sorted(state.commits.values(), key=lambda one: state.stamps[one.checkpoint_id].number)
    order = order[-_DRAWN:]
    lanes: dict[str, int] = {}
    places: dict[CheckpointId, tuple[int, int]] = {}
    for at, one in enumerate(order):
        branch = str(one.checkpoint_id.branch)
        lane = lanes.setdefault(branch, min(len(lanes), _LANES - 1))
        places[one.checkpoint_id] = (_EDGE + at * _STEP, _EDGE + lane * _LANE)
    newest = latest(state)
    parts = [_edge(places, one) for one in order]
    parts += [_dot(state, one, places[one.checkpoint_id], newest) for one in order]
    right = _EDGE + len(order) * _STEP
    labels = {lane: branch for branch, lane in reversed(lanes.items())}
    parts += [
        f'<text x="{right}" y="{_EDGE + lane * _LANE + 4}" font-size="11" fill="currentColor" '
        f'font-family="monospace">{text(branch[:40])}</text>'
        for lane, branch in sorted(labels.items())
    ]
    width, height = right + 290, 2 * _EDGE + max(labels, default=0) * _LANE
    return _svg(width, height, f"history of {len(order)} checkpoints", parts)


def _edge(places: Mapping[CheckpointId, tuple[int, int]], one: Commit) -> str:
    """The line from a parent that is drawn, along its own branch and then up or down."""
    if one.parent is None or one.parent not in places:
        return ""
    (x, y), (to, lane) = places[one.parent], places[one.checkpoint_id]
    path = f"M{x} {y} H{to}" if y == lane else f"M{x} {y} L{x + _STEP // 2} {lane} H{to}"
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>'


def _dot(state: LogState, one: Commit, place: tuple[int, int], newest: Commit | None) -> str:
    """A checkpoint; filled where it is tagged, larger where it is the latest."""
    x, y = place
    tags = [str(tag) for tag, target in state.tags.items() if target == one.checkpoint_id]
    is_latest = newest is not None and newest.checkpoint_id == one.checkpoint_id
    colour, size = ORANGE if tags else BLUE, 6 if is_latest else 4
    words = [one.checkpoint_id.ref, *tags, *(f"{k} {v:.6g}" for k, v in one.metrics.items())]
    tip = text(", ".join(words))
    return f'<circle cx="{x}" cy="{y}" r="{size}" fill="{colour}"><title>{tip}</title></circle>'


def diff_html(found: CheckpointDiff) -> str:
    """Two checkpoints: how much each layer changed, and which values and tensors did."""
    counts = ", ".join(
        f"{count:,} {status.value}" for status, count in found.counts.items() if count
    )
    layers = [one for one in found.layers if one.changed]
    tensors = [one for one in found.changed if one.values is None]
    values = [(name(one.name), _value(one.old), _value(one.new)) for one in found.metrics]
    values += [(name(one.path), *_ends(one)) for one in found.scalars]
    head = ("tensor", "", "relative L2", "largest", "cosine", "differ")
    return page(
        title(name(found.old), "→", name(found.new), dim(f"tensors: {counts or 'none'}")),
        table(("value", "old", "new"), values[:_LISTED]) + _more(values) if values else "",
        layers_svg(layers[:_DRAWN]) + _more(layers, _DRAWN) if layers else "",
        table(head, map(_tensor, tensors[:_LISTED]), numbers=(2, 3, 4, 5)) + _more(tensors)
        if tensors
        else "",
        "" if found.differs else dim("the states are equal"),
    )


def layers_svg(layers: Sequence[LayerChange]) -> str:
    """A bar for each layer: its relative L2, by its logarithm; orange where it is not finite."""
    known = [one.relative_l2 for one in layers if 0 < one.relative_l2 < math.inf]
    low = math.log10(min(known, default=1.0)) - 0.5
    span = max(math.log10(max(known, default=1.0)) - low, 0.5)
    left, parts = 8 * max(min(len(one.name), 40) for one in layers) + 10, []
    for at, one in enumerate(layers):
        y, is_known = at * 18, 0 < one.relative_l2 < math.inf
        width = _BAR * (math.log10(one.relative_l2) - low) / span if is_known else 0.0
        if one.relative_l2 == math.inf:
            width = _BAR
        colour = BLUE if is_known and not (any(one.nans) or any(one.infinities)) else ORANGE
        shown = f"{one.relative_l2:.3g}" if is_known else "from zero, or other tensors"
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" font-size="11" '
            f'font-family="monospace" fill="currentColor">{text(one.name[-40:])}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="12" fill="{colour}">'
            f"<title>{text(f'{one.name}: {one.changed} of {one.tensors} tensors')}</title></rect>"
            f'<text x="{left + width + 6:.1f}" y="{y + 13}" font-size="11" '
            f'fill="currentColor">{text(shown if one.relative_l2 else "")}</text>'
        )
    return _svg(left + _BAR + 190, len(layers) * 18 + 4, "relative change by layer", parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg>'
    )


def _tensor(one: TensorChange) -> tuple[str, ...]:
    there, spec = one.difference, one.new or one.old
    form = "" if spec is None else f"{spec.dtype}{list(spec.shape)}"
    if one.status is Status.RESHAPED and one.old is not None:
        form = f"{one.old.dtype}{list(one.old.shape)} → {form}"
    if there is None:
        return name(one.name), dim(f"{form} {one.status.value}"), "", "", "", ""
    cosine = "" if there.cosine is None else f"{there.cosine:.4f}"
    share = f"{100 * there.differing / max(1, there.elements):.3g} %"
    change = f"{there.relative_l2:.3g}", f"{there.max_abs:.3g}"
    return name(one.name), dim(form), *change, cosine, share


def _ends(one: ScalarChange) -> tuple[str, str]:
    old = "" if one.status is Status.ADDED else _value(one.old)
    return old, "" if one.status is Status.REMOVED else _value(one.new)


def _value(value: Value) -> str:
    return text(repr(value))


def _more(items: Sequence[object], shown: int = _LISTED) -> str:
    return dim(f"and {len(items) - shown:,} more") if len(items) > shown else ""
