"""`ckptcoord diff`: what differs between two checkpoints."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import Style, aligned, clipped, counted, printable
from ckptcoord.core.statediff import Status
from ckptcoord.dist.comparing import compare_checkpoints
from ckptcoord.dist.contents import Contents
from ckptcoord.errors import ConfigError
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.codec.compare import Difference
    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.core.statediff import ScalarChange, Value
    from ckptcoord.repo.changes import CheckpointDiff, LayerChange, TensorChange

DIFFERENT = 3
_MAX_THREADS = 8
_SHOWN = 20  # of each kind, on a terminal
_VALUE_CHARS = 60


def run(
    out: Output,
    root: Path,
    refs: Sequence[str],
    *,
    component: str | None,
    top: str | None,
    exit_code: bool,
) -> int:
    """Compare two checkpoints; 3 where they differ and that was asked for, else 0.

    Raises:
        ConfigError: there are not two refs, `top` is no count, or there is no such component.
        RefNotFoundError: there is no such checkpoint.
        CkptError: something cannot be read, or is not what was written.
    """
    limit = _count(top)
    if len(refs) != 2:
        why = f"needs two checkpoints to compare, not {len(refs)}"
        raise ConfigError(field="REF", why=why, help="As in: ckptcoord diff main@100 main@200")
    repository = open_repository(root)
    state = repository.state()
    old, new = (Contents(repository, find_commit(state, root, ref)) for ref in refs)
    sizes = old.commit.size_bytes + new.commit.size_bytes
    with progress(out, "diff", sizes) as advance:
        found = compare_checkpoints(
            old,
            new,
            component=component,
            threads=min(_MAX_THREADS, os.cpu_count() or 1),
            progress=advance,
        )
    if out.as_json:
        out.data({"repository": repository.url, **found.to_json(top=limit)})
    elif out.terminal:
        out.lines(_page(out, found, _SHOWN if limit is None else limit))
    else:
        out.lines("\t".join(row) for row in _rows(found, limit))
    return DIFFERENT if exit_code and found.differs else 0


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(field="--top", why=f"{text[:80]!r} is no number")
    return int(text)


# --- for pipes -----------------------------------------------------------------------------------


def _rows(found: CheckpointDiff, limit: int | None) -> Iterator[tuple[str, ...]]:
    none = ("-",) * 5
    for metric in found.metrics[:limit]:
        status = _sided(metric.old is None, metric.new is None)
        old, new = (_metric(value) for value in (metric.old, metric.new))
        yield ("metric", status.value, printable(metric.name), old, new, *none)
    for one in found.scalars[:limit]:
        yield ("value", one.status.value, printable(one.path), *_ends(one), *none)
    for tensor in found.changed[:limit]:
        if tensor.values is None:
            name = printable(tensor.name)
            forms = _form(tensor.old), _form(tensor.new)
            yield ("tensor", tensor.status.value, name, *forms, *_numbers(tensor))


def _sided(is_new: bool, is_gone: bool) -> Status:  # noqa: FBT001 (two of a kind)
    return Status.ADDED if is_new else Status.REMOVED if is_gone else Status.CHANGED


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _ends(one: ScalarChange) -> tuple[str, str]:
    """The old value and the new one; a dash where there is none."""
    old = "-" if one.status is Status.ADDED else _value_text(one.old)
    return old, "-" if one.status is Status.REMOVED else _value_text(one.new)


def _numbers(one: TensorChange) -> tuple[str, ...]:
    there = one.difference
    if there is None:
        return ("-",) * 5
    cosine = "-" if there.cosine is None else f"{there.cosine:.6g}"
    change = f"{there.relative_l2:.6g}", f"{there.max_abs:.6g}"
    return (*change, cosine, str(there.differing), str(there.elements))


def _form(spec: TensorSpec | None) -> str:
    return "-" if spec is None else f"{spec.dtype}[{','.join(map(str, spec.shape))}]"


def _value_text(value: Value) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return clipped(printable(text), _VALUE_CHARS)


# --- for terminals -------------------------------------------------------------------------------


def _page(out: Output, found: CheckpointDiff, limit: int) -> Iterator[str]:
    heads = " -> ".join(out.paint(ref, Style.YELLOW) for ref in (found.old, found.new))
    yield f"{heads}  {_summary(found)}"
    metrics = [
        (printable(one.name), _metric(one.old), "->", _metric(one.new)) for one in found.metrics
    ]
    yield from _section(out, "metrics", [("", "", "", ""), *metrics], limit, right=())
    yield from _section(out, "values", [("", "", "", "", ""), *_alike(found.scalars)], limit)
    layers = [_layer_row(one) for one in found.layers if one.changed]
    columns = ("relative L2", "largest")
    head = ("", "changed", *columns, "not finite")
    yield from _section(out, "layers", [head, *layers], limit, right=(1, 2, 3))
    tensors = [_tensor_row(one) for one in found.changed if one.values is None]
    wide = ("", "", *columns, "cosine", "differ", "not finite")
    yield from _section(out, "tensors", [wide, *tensors], limit, right=(2, 3, 4, 5))


def _summary(found: CheckpointDiff) -> str:
    counts = [
        counted(count, f"{status.value} tensor") for status, count in found.counts.items() if count
    ]
    values = [counted(len(found.scalars), "changed value")] if found.scalars else []
    if not found.differs:
        return f"the states are equal: {', '.join(counts) or 'nothing is in them'}"
    return ", ".join((*counts, *values))


def _section(
    out: Output,
    name: str,
    rows: list[tuple[str, ...]],
    limit: int,
    right: Sequence[int] = (),
) -> Iterator[str]:
    """A table below its name, which stands in the first cell of its head."""
    (_, *head), *rest = rows
    if not rest:
        return
    if not any(row[-1] for row in rest):  # nothing has what the last column is for
        head, rest = head[:-1], [row[:-1] for row in rest]
    shown = [(name, *head), *((f"  {first}", *cells) for first, *cells in rest[:limit])]
    first, *lines = aligned(shown, right=frozenset(right))
    yield out.paint("  ".join(first).rstrip(), Style.BOLD)
    yield from ("  ".join(cells).rstrip() for cells in lines)
    if len(rest) > limit:
        yield out.paint(f"  and {len(rest) - limit:,} more: --top {len(rest)}", Style.DIM)


def _alike(scalars: Sequence[ScalarChange]) -> list[tuple[str, ...]]:
    """A row for each; one for all that end alike and changed alike, as steps do."""
    groups: dict[tuple[str, ...], list[ScalarChange]] = {}
    for one in scalars:
        key = (one.path.rpartition(".")[2], *_ends(one))
        groups.setdefault(key, []).append(one)
    return [
        (
            printable(members[0].path),
            old,
            "->",
            new,
            f"and {len(members) - 1:,} more alike" if len(members) > 1 else "",
        )
        for (_, old, new), members in groups.items()
    ]


def _layer_row(one: LayerChange) -> tuple[str, ...]:
    compared = one.max_abs > 0 or one.relative_l2 < math.inf
    change = (f"{one.relative_l2:.3g}", f"{one.max_abs:.3g}") if compared else ("-", "-")
    return printable(one.name), f"{one.changed}/{one.tensors}", *change, _spoiled(one)


def _tensor_row(one: TensorChange) -> tuple[str, ...]:
    name, there = printable(one.name), one.difference
    form = _form(one.new or one.old)
    if one.status is Status.RESHAPED:
        form = f"{_form(one.old)} -> {form}"
    if there is None:
        return name, form, one.status.value, "", "", "", ""
    cosine = "-" if there.cosine is None else f"{there.cosine:.4f}"
    share = f"{100 * there.differing / max(1, there.elements):.3g} %"
    change = f"{there.relative_l2:.3g}", f"{there.max_abs:.3g}"
    return name, form, *change, cosine, share, _spoiled(there)


def _spoiled(one: LayerChange | Difference) -> str:
    """`3 -> 5 NaN, 0 -> 1 Inf`, where there are any."""
    pairs = (("NaN", one.nans), ("Inf", one.infinities))
    return ", ".join(f"{old:,} -> {new:,} {name}" for name, (old, new) in pairs if old or new)
