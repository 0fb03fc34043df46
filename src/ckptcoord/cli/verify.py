"""`ckptcoord verify`: every byte against every digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckptcoord.cli.commits import newest_first
from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import Style, bytes_text, counted, printable
from ckptcoord.errors import CkptError, ConfigError, CorruptError
from ckptcoord.plan.ancestry import Ancestry
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.verify import Finding, VerifyReport, verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.commit import LogState

_MAX_THREADS = 8


def run(out: Output, root: Path, ref: str | None, *, everything: bool) -> int:
    """Verify a checkpoint, or all; 0 when all are sound, 13 when something is corrupt.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        CkptError: the repository or its log cannot be read.
    """
    if everything and ref is not None:
        raise ConfigError(
            field="--all", why=f"stands beside the ref {ref!r}", help="Give one of them"
        )
    repository = open_repository(root)
    state = repository.state()
    wanted = LATEST if ref is None else ref
    commits = newest_first(state) if everything else [find_commit(state, root, wanted)]
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    documents, exit_code = [], 0
    with progress(out, "verify", sum(commit.stored_bytes for commit in commits)) as advance:
        for commit in commits:
            report = verify_checkpoint(repository, commit, threads=threads, progress=advance)
            exit_code = max(exit_code, _exit_code(report))
            remedy = _remedy(state, commit, report)
            documents.append(_document(commit, report, remedy))
            if not out.as_json:
                out.lines(_lines(out, commit, report, remedy))
    if out.as_json:
        out.data({"repository": repository.url, "ok": exit_code == 0, "checkpoints": documents})
    elif not commits:
        out.note(f"no checkpoints yet in {printable(repository.url)}")
    return exit_code


def _exit_code(report: VerifyReport) -> int:
    """13 once something is corrupt; what only cannot be read keeps its own code."""
    codes = {finding.error.exit_code for finding in report.findings if finding.error}
    return max(codes, default=0)


def _remedy(state: LogState, commit: Commit, report: VerifyReport) -> str:
    """Mend the files, or load the nearest before it that needs nothing of where the damage is."""
    damaged = {_folder(one.error) for one in report.findings if one.error}
    ancestry, seen, instead = Ancestry(state), {commit.checkpoint_id}, "another checkpoint"
    above = ancestry.above(commit)
    while above is not None and above not in seen:  # a forged log may go in circles
        seen.add(above)
        earlier = state.commits[above]
        if not damaged & {earlier.path, *earlier.needs}:
            instead = f"{above.ref} instead"
            break
        above = ancestry.above(earlier)
    return f"Put an intact copy of the file back, or load {instead}; see `ckptcoord verify --all`"


def _folder(error: CkptError) -> str:
    """The checkpoint whose files are damaged: of a delta's error, perhaps one that it needs."""
    found: BaseException | None = error
    path = ""
    while isinstance(found, CkptError):
        path = str(found.facts.get("path", path))
        found = found.__cause__
    return path.partition("/")[0]


def _help(finding: Finding, remedy: str) -> str:
    """A remedy for damage; what else may be wrong says itself what helps."""
    if not finding.harmful:
        return ""
    if finding.error is None or isinstance(finding.error, CorruptError):
        return remedy
    return finding.error.help


def _lines(out: Output, commit: Commit, report: VerifyReport, remedy: str) -> list[str]:
    paint = out.paint
    verdict = paint("ok", Style.GREEN) if report.ok else paint("BAD", Style.BOLD, Style.RED)
    ref = paint(commit.checkpoint_id.ref, Style.YELLOW)
    extent = f"{counted(report.files, 'file')}, {bytes_text(report.bytes_read)} read"
    lines = [f"{verdict}  {ref}  {commit.path}  {extent}"]
    for finding in report.findings:
        code = finding.error.code if finding.error else ""
        head = paint(f"error[{code}]:", Style.RED) if finding.harmful else "note:"
        lines.append(f"  {head} {printable(finding.path)}: {printable(finding.why)}")
    helps = {_help(finding, remedy): None for finding in report.findings}
    lines += [f"  {paint('help:', Style.GREEN)} {printable(text)}" for text in helps if text]
    return lines


def _document(commit: Commit, report: VerifyReport, remedy: str) -> dict[str, object]:
    return {
        "ref": commit.checkpoint_id.ref,
        "checkpoint_id": str(commit.checkpoint_id),
        "path": commit.path,
        "ok": report.ok,
        "files": report.files,
        "bytes_read": report.bytes_read,
        "findings": [
            {
                "path": finding.path,
                "tensor": finding.tensor or None,
                "why": finding.why,
                "harmful": finding.harmful,
                "code": finding.error.code if finding.error else None,
                "help": _help(finding, remedy),
            }
            for finding in report.findings
        ],
    }
