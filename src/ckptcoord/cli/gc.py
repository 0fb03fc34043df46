"""`ckptcoord gc`: delete what no checkpoint needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.asking import agreed, nonce, require_somebody
from ckptcoord.cli.compact import compact_all
from ckptcoord.cli.errors import error_document, error_lines
from ckptcoord.cli.text import Style, bytes_text, counted, printable
from ckptcoord.plan.retention import parse_span
from ckptcoord.repo.maintenance import (
    DEFAULT_GRACE_S,
    Gc,
    GcResult,
    local_times,
    prepare_gc,
    run_gc,
)
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.sweeping import GcPlan

_FAILED = 1


def run(
    out: Output, root: Path, *, grace: str | None, dry_run: bool, yes: bool, rebase: bool = False
) -> int:
    """Show what goes and what stays, and unless it is a dry run, do it.

    With `rebase`, checkpoints that need retired ones are made to stand alone first.

    Raises:
        ConfigError: the grace is no time span, or there is nobody to ask and no `-y`.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    grace_s = DEFAULT_GRACE_S if grace is None else parse_span(grace, field="--grace")
    require_somebody(out, "gc", dry_run=dry_run, yes=yes)
    repository = open_repository(root)
    changed, state = local_times(repository), repository.state()
    wanted: tuple[Commit, ...] = ()
    if rebase:
        from ckptcoord.repo.compaction import as_if_compacted, needing_retired  # late: numpy

        wanted = needing_retired(state)
        state = as_if_compacted(state, wanted, now=out.now)
    gc = prepare_gc(repository, now=out.now, changed=changed, grace_s=grace_s, state=state)
    if not out.as_json:
        out.lines([*(_compact_line(out, commit) for commit in wanted), *_lines(out, gc.plan)])
    result = None
    if not dry_run and (yes or _agreed(out, gc.plan, wanted)):
        if wanted:
            wanted = compact_all(out, repository, wanted)
            gc = prepare_gc(repository, now=out.now, changed=changed, grace_s=grace_s)
        result = run_gc(repository, gc, writer=nonce())
    if out.as_json:
        document = _document(gc, result, wanted, dry_run=dry_run)
        out.data({"repository": repository.url, **document})
    else:
        out.note(*_summary(out, gc.plan, result, wanted))
    return _FAILED if result is not None and result.failed else 0


def _agreed(out: Output, plan: GcPlan, wanted: Sequence[Commit]) -> bool:
    """Ask; what is not yes is no."""
    if not (plan.doomed or plan.restored or wanted):
        return True
    first = f"Write {_anew(wanted)}, then delete" if wanted else "Delete"
    return agreed(f"{first} {_extent(plan.freed_bytes, len(plan.doomed))}?")


def _lines(out: Output, plan: GcPlan) -> Iterable[str]:
    """A line for each folder, tab-separated: what is done, folder, bytes, why."""
    for doomed in plan.doomed:
        yield _line(out, "delete", doomed.path, doomed.size_bytes, doomed.why, Style.RED)
    for restored in plan.restored:
        yield _line(out, "restore", restored.path, 0, f"to {restored.target}", Style.GREEN)
    for kept in plan.kept:
        yield _line(out, "keep", kept.path, kept.size_bytes, kept.why, Style.DIM)


def _compact_line(out: Output, commit: Commit) -> str:
    why = f"needs {', '.join(commit.needs)}"
    return _line(out, "compact", commit.path, commit.stored_bytes, why, Style.YELLOW)


def _line(out: Output, verb: str, path: str, size_bytes: int, why: str, style: Style) -> str:
    if out.terminal:
        size = bytes_text(size_bytes)
        return f"{out.paint(f'{verb:<7}', style)}  {printable(path)}  {size}  {printable(why)}"
    return f"{verb}\t{printable(path)}\t{size_bytes}\t{printable(why)}"


def _summary(
    out: Output, plan: GcPlan, result: GcResult | None, wanted: Sequence[Commit]
) -> list[str]:
    if result is None:
        first = f"{_anew(wanted)} to write; " if wanted else ""
        going = _extent(plan.freed_bytes, len(plan.doomed))
        return [f"{first}{going} to delete; nothing was changed"]
    freed_bytes = sum(one.size_bytes for one in result.deleted)
    first = f"{_anew(wanted)} written; " if wanted else ""
    lines = [f"{first}{_extent(freed_bytes, len(result.deleted))} deleted"]
    lines += [f"note: {printable(one.path)} is in use by now, and stays" for one in result.spared]
    for path, error in result.failed:
        lines += [f"{printable(path)} is still there:", *error_lines(error, out.paint_note)]
    return lines


def _anew(wanted: Sequence[Commit]) -> str:
    """What standing alone costs: it may be more than what goes."""
    size_bytes = sum(commit.size_bytes for commit in wanted)
    return f"{counted(len(wanted), 'plain checkpoint')}, about {bytes_text(size_bytes)}"


def _extent(size_bytes: int, count: int) -> str:
    return f"{counted(count, 'folder')}, {bytes_text(size_bytes)}"


def _document(
    gc: Gc, result: GcResult | None, wanted: Iterable[Commit], *, dry_run: bool
) -> dict[str, object]:
    plan, deleted = gc.plan, () if result is None else result.deleted
    return {
        "dry_run": dry_run,
        "grace_s": gc.grace_s,
        "compact": [
            {
                "ref": one.checkpoint_id.ref,
                "needs": list(one.needs),
                "stored_bytes_before": one.stored_bytes,
                "size_bytes": one.size_bytes,
            }
            for one in wanted
        ],
        "delete": [
            {
                "path": one.path,
                "attempt": one.attempt,
                "why": one.why.value,
                "size_bytes": one.size_bytes,
                "deleted": one in deleted,
            }
            for one in plan.doomed
        ],
        "restore": [{"path": one.path, "target": one.target} for one in plan.restored],
        "keep": [
            {"path": one.path, "why": one.why, "size_bytes": one.size_bytes} for one in plan.kept
        ],
        "failed": [
            {"path": path, "error": error_document(error)}
            for path, error in (() if result is None else result.failed)
        ],
        "freed_bytes": sum(one.size_bytes for one in (plan.doomed if dry_run else deleted)),
    }
