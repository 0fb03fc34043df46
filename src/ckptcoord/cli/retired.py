"""`ckptcoord log --retired`: what was dropped and is not deleted yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.text import Style, ago, bytes_text, printable
from ckptcoord.core.entries import Retire
from ckptcoord.plan.commit import needed_by
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.plan.commit import LogState, Retired
    from ckptcoord.repo.repository import Repository


def run(out: Output, root: Path, *, branch: str | None, limit: int | None) -> int:
    """List them, the last that was dropped first.

    Raises:
        CkptError: the repository cannot be read.
    """
    repository = open_repository(root)
    state = repository.state()
    found = sorted(
        state.retired.values(), key=lambda one: (-one.stamp.number, one.commit.checkpoint_id)
    )
    if branch is not None:
        found = [one for one in found if str(one.commit.checkpoint_id.branch) == branch]
    found = found[:limit]
    reasons = _reasons(repository, found)
    if out.as_json:
        documents = [_document(state, one, reasons[one.stamp.number]) for one in found]
        out.data({"repository": repository.url, "retired": documents})
    elif found:
        out.lines(_line(out, state, one, reasons[one.stamp.number]) for one in found)
    else:
        out.note(f"nothing in {printable(repository.url)} waits for gc")
    return 0


def _reasons(repository: Repository, found: list[Retired]) -> dict[int, str]:
    """By the number of the entry that dropped them."""
    reasons = {}
    for number in {one.stamp.number for one in found}:
        body = repository.log.entry(number).body
        reasons[number] = body.reason if isinstance(body, Retire) else "replaced"
    return reasons


def _line(out: Output, state: LogState, one: Retired, reason: str) -> str:
    commit = one.commit
    needing = ", ".join(found.ref for found in needed_by(state, commit.path))
    kept = f"needed by {needing}" if needing else ""
    if not out.terminal:
        cells = (commit.path, str(commit.stored_bytes), printable(one.stamp.timestamp))
        return "\t".join((commit.checkpoint_id.ref, *cells, printable(reason), kept))
    size = bytes_text(commit.stored_bytes)
    when = f"dropped {ago(one.stamp.timestamp, out.now)}"
    parts = (commit.path, size, f"{when}: {printable(reason)}" if reason else when, kept)
    ref = out.paint(commit.checkpoint_id.ref, Style.YELLOW)
    return "  ".join((ref, *filter(None, parts)))


def _document(state: LogState, one: Retired, reason: str) -> dict[str, object]:
    commit = one.commit
    return {
        "ref": commit.checkpoint_id.ref,
        "path": commit.path,
        "stored_bytes": commit.stored_bytes,
        "parent": None if commit.parent is None else commit.parent.ref,
        "retired_at": one.stamp.timestamp,
        "log_number": one.stamp.number,
        "reason": reason,
        "needed_by": [found.ref for found in needed_by(state, commit.path)],
        "metrics": dict(sorted(commit.metrics.items())),
        "message": commit.message,
    }
