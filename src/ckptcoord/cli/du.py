"""`ckptcoord du`: what takes how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.text import Style, aligned, bytes_text, printable
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.usage import (
    CheckpointUsage,
    CodecUsage,
    ComponentUsage,
    Usage,
    measure,
    savings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ckptcoord.cli.output import Output

_NUMBERS = frozenset({1, 2, 3})


def run(out: Output, root: Path, *, codecs: bool = False) -> int:
    """Show the bytes of each checkpoint, each component, and all; or by codec.

    Raises:
        CkptError: the repository cannot be read.
    """
    repository = open_repository(root)
    usage = measure(repository, codecs=codecs)
    if out.as_json:
        out.data({"repository": repository.url, **_document(usage, codecs=codecs)})
    elif codecs and not out.terminal:
        out.lines(
            f"{one.commit.checkpoint_id.ref}\t{part.codec}\t{part.tensors}\t{part.size_bytes}\t"
            f"{part.stored_bytes}"
            for one in usage.checkpoints
            for part in one.codecs
        )
    elif out.terminal:
        out.lines(_report(out, usage))
    else:
        out.lines(
            f"{one.commit.checkpoint_id.ref}\t{one.commit.size_bytes}\t{one.commit.stored_bytes}\t"
            f"{one.freed_bytes}\t{one.commit.path}\t{_state(one)}"
            for one in usage.checkpoints
        )
    for one in usage.checkpoints:
        if one.unreadable and not out.as_json:
            out.note(f"note: {printable(one.unreadable)}: its components are not counted")
    return 0


def _state(one: CheckpointUsage) -> str:
    """`live`, `retired`, or for whom it is kept."""
    if one.live:
        return "live"
    needing = ", ".join(checkpoint_id.ref for checkpoint_id in one.needed_by)
    return f"needed by {needing}" if needing else "retired"


def _report(out: Output, usage: Usage) -> Iterable[str]:
    rows: list[tuple[str, ...]] = [("checkpoint", "state", "stored", "alone", "")]
    rows += [
        (
            one.commit.checkpoint_id.ref,
            bytes_text(one.commit.size_bytes),
            bytes_text(one.commit.stored_bytes),
            bytes_text(one.freed_bytes),
            "" if one.live else _state(one),
        )
        for one in usage.checkpoints
    ]
    yield from _table(out, rows)
    parts: list[tuple[str, ...]] = [("component", "state", "stored", "ratio", "")]
    parts += [
        (
            printable(one.key),
            bytes_text(one.size_bytes),
            bytes_text(one.stored_bytes),
            _ratio(one.size_bytes, one.stored_bytes),
            "",
        )
        for one in usage.components
    ]
    yield ""
    yield from _table(out, parts)
    if usage.codecs:
        yield ""
        yield from _table(out, _codec_rows(usage))
    yield ""
    yield f"live     {bytes_text(usage.size_bytes)} of state in {bytes_text(usage.stored_bytes)}"
    yield f"kept     {bytes_text(usage.kept_bytes)} of retired checkpoints that live ones need"
    yield f"ratio    {_ratio(usage.size_bytes, usage.stored_bytes + usage.kept_bytes)}"
    if usage.codecs:
        yield from _savings_lines(usage)
    yield f"retired  {bytes_text(usage.retired_bytes)} that gc deletes"
    yield f"other    {bytes_text(usage.other_bytes)} of unfinished saves and unknown folders"


def _savings_lines(usage: Usage) -> Iterable[str]:
    """What the live checkpoints' tensors need not take, and why."""
    saved = savings(usage.codecs)
    held, stored = saved.held_bytes, saved.stored_bytes
    dedup, coding = _ratio(held + saved.deduped_bytes, held), _ratio(held, stored)
    yield f"dedup    {dedup}, {bytes_text(saved.deduped_bytes)} are equal to or a cast of others"
    yield f"coding   {coding}, {bytes_text(held)} of tensors in {bytes_text(stored)}"


def _codec_rows(usage: Usage) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("codec", "tensors", "state", "stored", "")]
    rows += [
        (
            one.codec,
            str(one.tensors),
            bytes_text(one.size_bytes),
            bytes_text(one.stored_bytes),
            "",
        )
        for one in usage.codecs
    ]
    return rows


def _table(out: Output, rows: list[tuple[str, ...]]) -> Iterable[str]:
    head, *rest = aligned(rows, right=_NUMBERS)
    yield out.paint("  ".join(head).rstrip(), Style.DIM)
    for first, *cells in rest:
        yield f"{out.paint(first, Style.YELLOW)}  {'  '.join(cells)}".rstrip()


def _ratio(size_bytes: int, stored_bytes: int) -> str:
    return f"{size_bytes / stored_bytes:.2f}" if stored_bytes else "-"


def _document(usage: Usage, *, codecs: bool) -> dict[str, object]:
    return {
        "size_bytes": usage.size_bytes,
        "stored_bytes": usage.stored_bytes,
        "kept_bytes": usage.kept_bytes,
        "retired_bytes": usage.retired_bytes,
        "other_bytes": usage.other_bytes,
        "ratio": usage.ratio,
        "components": _components(usage.components),
        **(_codecs(usage.codecs) if codecs else {}),
        "checkpoints": [
            {
                "ref": one.commit.checkpoint_id.ref,
                "path": one.commit.path,
                "live": one.live,
                "size_bytes": one.commit.size_bytes,
                "stored_bytes": one.commit.stored_bytes,
                "freed_bytes": one.freed_bytes,
                "needs": list(one.commit.needs),
                "needed_by": [checkpoint_id.ref for checkpoint_id in one.needed_by],
                "components": _components(one.components),
                **(_codecs(one.codecs) if codecs else {}),
                "unreadable": one.unreadable or None,
            }
            for one in usage.checkpoints
        ],
    }


def _components(components: tuple[ComponentUsage, ...]) -> dict[str, object]:
    return {
        one.key: {"size_bytes": one.size_bytes, "stored_bytes": one.stored_bytes}
        for one in components
    }


def _codecs(codecs: tuple[CodecUsage, ...]) -> dict[str, object]:
    saved = savings(codecs)
    return {
        "deduped_bytes": saved.deduped_bytes,
        "dedup_ratio": saved.dedup_ratio,
        "compression_ratio": saved.compression_ratio,
        "codecs": {
            one.codec: {
                "tensors": one.tensors,
                "size_bytes": one.size_bytes,
                "stored_bytes": one.stored_bytes,
            }
            for one in codecs
        },
    }
