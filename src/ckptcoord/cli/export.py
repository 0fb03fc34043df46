"""`ckptcoord export`: a checkpoint in the form of another tool."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import bytes_text, clipped, counted, printable
from ckptcoord.errors import ConfigError
from ckptcoord.formats.casting import parse_dtype
from ckptcoord.formats.exporting import Export, Target, export
from ckptcoord.formats.to_onnx import Factory
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.formats.exporting import ExportReport

_SHOWN_CHARS = 300
_SIZE = re.compile(r"([0-9]{1,15})\s*(?:([KMGT])(i?)B)?")


def wanted(  # noqa: PLR0913 (each is an option)
    *,
    to: str | None,
    component: str,
    everything: bool,
    dtype: str | None,
    max_shard_size: str | None,
    config_from: str | None,
    model: str | None,
    force: bool,
) -> Export:
    """What the options ask for.

    Raises:
        ConfigError: they make no sense.
    """
    if to is None or to not in list(Target):
        why = "is missing" if to is None else f"is {to[:40]!r}"
        raise ConfigError(field="--to", why=f"{why}; there are {', '.join(Target)}")
    if model is not None and "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: the user's module is here
    sizes = {} if max_shard_size is None else {"max_shard_size": _size(max_shard_size)}
    return Export(
        to=Target(to),
        component=component,
        everything=everything,
        dtype=None if dtype is None else parse_dtype(dtype),
        config_from=None if config_from is None else Path(config_from),
        factory=None if model is None else Factory(name=model),
        force=force,
        **sizes,
    )


def run(
    out: Output, root: Path, ref: str | None, folder: str, asked: Export, *, dry_run: bool
) -> int:
    """Export a checkpoint.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        CkptError: it cannot be read, or the folder not be made; nothing is left of it.
    """
    repository = open_repository(root)
    commit = find_commit(repository.state(), root, LATEST if ref is None else ref)
    # Read, and read back.
    with progress(out, "export", 2 * commit.size_bytes) as advance:
        report = export(repository, commit, folder, asked, dry_run=dry_run, advance=advance)
    if out.as_json:
        out.data(_document(repository.url, commit, asked, report, dry_run=dry_run))
    else:
        out.lines(_lines(out, report, dry_run=dry_run))
        out.note(*_notes(commit, asked, report, dry_run=dry_run))
    return 0


def _size(text: str) -> int:
    """`500MB`, `2GiB`, or bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        why = f"is {text[:40]!r}, not a size as 500MB or 2GiB"
        raise ConfigError(field="--max-shard-size", why=why)
    power = " KMGT".index(match[2]) if match[2] else 0
    unit: int = (1024 if match[3] else 1000) ** power
    return int(match[1]) * unit


def _lines(out: Output, report: ExportReport, *, dry_run: bool) -> list[str]:
    """A line for each file."""
    if dry_run:
        return [printable(report.path)]
    gap = "  " if out.terminal else "\t"
    return [
        f"{printable(f'{report.path}/{name}')}{gap}"
        f"{bytes_text(size_bytes) if out.terminal else size_bytes}"
        for name, size_bytes in report.files
    ]


def _notes(commit: Commit, asked: Export, report: ExportReport, *, dry_run: bool) -> list[str]:
    verb = "would be exported" if dry_run else "exported, read back and found the same"
    extent = f"{counted(report.tensors, 'tensor')}, {bytes_text(report.size_bytes)}"
    lines = [f"{commit.checkpoint_id.ref} for {asked.to}: {extent} {verb}"]
    if report.cast:
        lines.append(f"note: {counted(report.cast, 'tensor')} cast to {asked.dtype}")
    for name, count in report.overflowed.items():
        elements = counted(count, "element")
        lines.append(f"warning: {elements} of {printable(name)} became infinite in {asked.dtype}")
    lines += [f"note: {clipped(printable(note), _SHOWN_CHARS)}" for note in report.notes]
    if report.left_out:
        names = clipped(", ".join(map(printable, report.left_out)), _SHOWN_CHARS)
        lines.append(f"warning: left out, as it is no tensor: {names}")
    return lines


def _document(
    url: str, commit: Commit, asked: Export, report: ExportReport, *, dry_run: bool
) -> dict[str, object]:
    return {
        "repository": url,
        "ref": commit.checkpoint_id.ref,
        "to": asked.to.value,
        "path": report.path,
        "dry_run": dry_run,
        "dtype": asked.dtype,
        "tensors": report.tensors,
        "size_bytes": report.size_bytes,
        "cast": report.cast,
        "overflowed": dict(report.overflowed),
        "left_out": list(report.left_out),
        "notes": list(report.notes),
        "files": [{"path": name, "size_bytes": size} for name, size in report.files],
    }
