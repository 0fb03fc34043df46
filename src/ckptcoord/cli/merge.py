"""`ckptcoord merge --average`: several checkpoints' models as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.branch import new_branch
from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import bytes_text, counted, printable
from ckptcoord.errors import ConfigError
from ckptcoord.formats.averaging import How, Rules
from ckptcoord.formats.merging import Merge, merge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.formats.merging import MergeReport
    from ckptcoord.repo.repository import Repository

_FINDINGS = 3


def wanted(  # noqa: PLR0913 (each is an option)
    repository: Repository,
    root: Path,
    words: Sequence[str],
    *,
    average: bool,
    into: str | None,
    component: str,
    step: str | None,
    message: str | None,
    as_given: bool,
    keep_first: bool,
) -> Merge:
    """What the words ask for.

    Raises:
        ConfigError: they make no sense.
        RefNotFoundError: there is no such checkpoint.
    """
    if not average:
        why = "is missing; a weighted average is the only merge there is"
        raise ConfigError(field="--average", why=why)
    if into is None:
        raise ConfigError(field="--into", why="is missing: the name of the new branch")
    state = repository.state()
    parts = [(find_commit(state, root, ref), weight) for ref, weight in map(_part, words)]
    return Merge(
        parts=tuple(parts),
        into=new_branch(state, into),
        component=component,
        step=None if step is None else _step(step),
        message=message,
        rules=Rules(normalise=not as_given, keep_first=keep_first),
    )


def run(out: Output, repository: Repository, asked: Merge, *, dry_run: bool) -> int:
    """Average, and commit.

    Raises:
        CkptError: it cannot be done; nothing was committed.
    """
    size_bytes = asked.parts[0][0].size_bytes
    with progress(out, "merge", size_bytes) as advance:
        report = merge(repository, asked, dry_run=dry_run, advance=advance)
    if out.as_json:
        out.data(_document(repository, asked, report, dry_run=dry_run))
        return _FINDINGS if report.problems else 0
    if dry_run:
        out.lines(["\t".join(map(printable, one.split(": ", 1))) for one in report.problems])
    else:
        out.lines(["\t".join(map(printable, (report.ref, report.path)))])
    out.note(*_notes(asked, report, dry_run=dry_run))
    return _FINDINGS if report.problems else 0


def _part(word: str) -> tuple[str, float]:
    """`main@100:0.3`: a ref, and a weight, by default 1."""
    ref, colon, text = word.rpartition(":")
    if not colon:
        return word, 1.0
    try:
        return ref, float(text)
    except ValueError:
        why = f"{word[:80]!r} is not REF or REF:WEIGHT"
        raise ConfigError(field="--average", why=why) from None


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ConfigError(field="--step", why=f"is {text[:40]!r}, not a whole number from 0")
    return int(text)


def _notes(asked: Merge, report: MergeReport, *, dry_run: bool) -> list[str]:
    ways = ", ".join(
        f"{count:,} {word}"
        for how, word in (
            (How.AVERAGE, "averaged"),
            (How.EQUAL, "equal in all"),
            (How.COMPARE, "that have to be equal"),
            (How.FIRST, "of the first checkpoint"),
        )
        if (count := report.counts[how])
    )
    if report.problems:
        return [f"{counted(len(report.problems), 'thing')} in the way of an average"]
    verb = "would be " if dry_run else ""
    lines = [f"{report.ref} {verb}made of {bytes_text(report.size_bytes)}: tensors {ways or '0'}"]
    if not dry_run:
        lines.append(
            f"note: only {asked.component!r} is in it, no optimizer; to train it on: "
            f"`ckptcoord fork {report.ref} NEW_BRANCH --weights-only -- COMMAND`"
        )
    return lines


def _document(
    repository: Repository, asked: Merge, report: MergeReport, *, dry_run: bool
) -> dict[str, object]:
    return {
        "repository": repository.url,
        "dry_run": dry_run,
        "ref": report.ref,
        "path": report.path or None,
        "component": asked.component,
        "average_of": [
            {"ref": commit.checkpoint_id.ref, "weight": share}
            for (commit, _), share in zip(asked.parts, asked.shares, strict=True)
        ],
        "tensors": {how.value: count for how, count in report.counts.items()},
        "size_bytes": report.size_bytes,
        "problems": list(report.problems),
    }
