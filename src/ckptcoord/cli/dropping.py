"""What `rm` and `branch -d` have in common: show what would be retired, ask, retire it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.asking import agreed, nonce, require_somebody
from ckptcoord.cli.text import Style, bytes_text, counted, printable
from ckptcoord.plan.dropping import freed_bytes
from ckptcoord.repo.history import delete_tag, retire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptcoord.cli.output import Output
    from ckptcoord.core.refs import CheckpointId, TagName
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """What goes, and what stays of what was meant.

    Attributes:
        ids: the checkpoints that are retired.
        tags: those that are deleted with them.
        kept: other checkpoints, each with why it stays.
        reason: for the log.
    """

    ids: tuple[CheckpointId, ...]
    tags: tuple[TagName, ...] = ()
    kept: tuple[tuple[CheckpointId, str], ...] = ()
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What was said on the command line of doing it."""

    command: str
    dry_run: bool
    yes: bool

    def require(self, out: Output) -> None:
        """Before anything is looked at.

        Raises:
            ConfigError: nobody can be asked.
        """
        require_somebody(out, self.command, dry_run=self.dry_run, yes=self.yes)


def carry_out(
    out: Output, repository: Repository, state: LogState, drop: Drop, consent: Consent
) -> bool:
    """Show it, and unless it is a dry run or somebody says no, do it; returns whether it was done.

    Raises:
        CheckpointInUseError: something has come to name a checkpoint since.
        CkptError: the log cannot be read or appended to.
    """
    freed = freed_bytes(state, drop.ids)
    if not out.as_json:
        out.lines(_lines(out, state, drop))
    question = f"Retire {counted(len(drop.ids), 'checkpoint')}?"
    nothing = not drop.ids
    done = not (consent.dry_run or nothing) and (consent.yes or agreed(question))
    if done:
        writer = nonce()
        for tag in drop.tags:
            delete_tag(repository, tag, writer=writer)
        retire(repository, drop.ids, writer=writer, reason=drop.reason)
    if out.as_json:
        document = _document(state, drop, freed)
        said = {"dry_run": consent.dry_run, "done": done, **document}
        out.data({"repository": repository.url, **said})
    else:
        out.note(_summary(drop, freed, done=done))
    return done


def _lines(out: Output, state: LogState, drop: Drop) -> Iterator[str]:
    """A line each, tab-separated: what is done, ref, folder, bytes, why."""
    for tag in drop.tags:
        target = state.tags[tag].ref
        yield _line(out, "untag", (str(tag), target), Style.RED)
    for one in drop.ids:
        commit = state.commits[one]
        size = bytes_text(commit.stored_bytes) if out.terminal else str(commit.stored_bytes)
        yield _line(out, "retire", (one.ref, commit.path, size), Style.RED)
    for one, why in drop.kept:
        yield _line(out, "keep", (one.ref, state.commits[one].path, why), Style.DIM)


def _line(out: Output, verb: str, cells: Sequence[str], style: Style) -> str:
    shown = [printable(cell) for cell in cells]
    if out.terminal:
        return "  ".join((out.paint(f"{verb:<6}", style), *shown))
    return "\t".join((verb, *shown))


def _summary(drop: Drop, freed: int, *, done: bool) -> str:
    count = counted(len(drop.ids), "checkpoint")
    if not done:
        return f"{count} to retire, {bytes_text(freed)} for gc to free; nothing was changed"
    return (
        f"{count} retired; `ckptcoord gc` frees {bytes_text(freed)}, "
        "`ckptcoord log --retired` shows what waits for it"
    )


def _document(state: LogState, drop: Drop, freed: int) -> dict[str, object]:
    return {
        "untag": [str(tag) for tag in drop.tags],
        "retire": [
            {
                "ref": one.ref,
                "path": state.commits[one].path,
                "stored_bytes": state.commits[one].stored_bytes,
            }
            for one in drop.ids
        ],
        "keep": [{"ref": one.ref, "why": why} for one, why in drop.kept],
        "freed_bytes": freed,
    }
