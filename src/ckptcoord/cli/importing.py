"""`ckptcoord import`: what another tool has saved, as checkpoints of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import locate_repository
from ckptcoord.cli.text import Style, bytes_text, counted, printable
from ckptcoord.core.refs import MAX_STEP, checked_name
from ckptcoord.errors import ConfigError, InvalidNameError, RepositoryNotFoundError
from ckptcoord.repo.workspace import absolute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.cli.output import Output
    from ckptcoord.formats.importing import Planned
    from ckptcoord.formats.source import Source

_MAX_DIGITS = 16


def run(
    out: Output, path: str, *, repo: str | None, branch: str | None, step: str | None, dry_run: bool
) -> int:
    """Import what is at a path, or say what would be.

    Raises:
        FormatError: nothing known is there, or it needs more than plain data.
        ConfigError: other or newer checkpoints are in its place.
        CkptError: it cannot be read, or the repository not written.
    """
    from ckptcoord.formats.detect import find_source  # late: torch
    from ckptcoord.formats.importing import check_place, plan_import, run_import

    number = _step_of(step)
    if branch is not None:
        checked_name("branch", branch)
    root = _root(repo)
    source = find_source(path)
    plans = plan_import(source, branch=branch, step=number)
    check_place(root, plans)
    rows: list[dict[str, object]] = []
    if dry_run:
        for plan in plans:
            _show(out, rows, plan, "would import", "")
    else:
        for one in run_import(source, plans, root):
            _show(out, rows, one.plan, "imported" if one.new else "there already", one.path)
    _finish(out, root, source, plans, rows, dry_run=dry_run)
    return 0


def _step_of(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InvalidNameError(kind="step", name=text, why=f"is not from 0 to {MAX_STEP - 1}")
    return int(text)


def _root(repo: str | None) -> Path:
    """The repository's folder, which need not be there yet where it was named."""
    if repo is None:
        try:
            return locate_repository(None, None)
        except RepositoryNotFoundError as error:
            raise ConfigError(
                field="--repo",
                why="is not given, and no repository is around the current directory",
                help="Give --repo PATH: the repository is made there",
            ) from error
    if not repo or "\0" in repo:
        raise ConfigError(field="--repo", why=f"is {repo!r:.80}, which is no path")
    return Path(repo)


def _show(out: Output, rows: list[dict[str, object]], plan: Planned, done: str, path: str) -> None:
    """One checkpoint, as soon as it is done."""
    ref = plan.id.ref
    rows.append(
        {
            "ref": ref,
            "status": done,
            "source": plan.checkpoint.path,
            "path": path or None,
            "size_bytes": plan.size_bytes,
            "components": list(plan.components),
            "left_out": list(plan.left_out),
            "notes": list(plan.notes),
        }
    )
    if out.as_json:
        return
    components = ", ".join(plan.components)
    if out.terminal:
        size = bytes_text(plan.size_bytes)
        line = f"{out.paint(ref, Style.GREEN)}  {done}  {size}  {components}"
        out.lines([f"{line}  from {printable(plan.checkpoint.path)}"])
    else:
        name = printable(plan.checkpoint.path)
        out.lines([f"{ref}\t{done}\t{plan.size_bytes}\t{components}\t{name}"])


def _finish(
    out: Output,
    root: Path,
    source: Source,
    plans: Iterable[Planned],
    rows: list[dict[str, object]],
    *,
    dry_run: bool,
) -> None:
    if out.as_json:
        out.data(
            {
                "repository": str(absolute(root)),
                "source": source.path,
                "format": source.format,
                "dry_run": dry_run,
                "checkpoints": rows,
                "left_out": list(source.left_out),
            }
        )
        return
    said = [f"left out: {printable(why)}" for why in source.left_out]
    for plan in plans:
        said += [f"{plan.id.ref}: left out: {printable(why)}" for why in plan.left_out]
        said += [f"{plan.id.ref}: note: {printable(why)}" for why in plan.notes]
    new = sum(row["status"] == "imported" for row in rows)
    verb = "to import; nothing was written" if dry_run else "imported, read back and compared"
    count = len(rows) if dry_run else new
    out.note(*said, f"{source.format}: {counted(count, 'checkpoint')} {verb}")
