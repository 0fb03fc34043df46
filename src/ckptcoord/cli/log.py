"""`ckptcoord log`: the checkpoints, newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.commits import Names, Naming, commit_document, newest_first
from ckptcoord.cli.text import (
    Style,
    aligned,
    bytes_text,
    metrics_text,
    printable,
    ratio_text,
    seconds_text,
    subject,
    when,
)
from ckptcoord.core.entries import QUEUE_DEPTH, SLOWEST_RANK, Commit
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import ConfigError, ManifestError, RefNotFoundError
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import nearest
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository

_SHOWN = ("stall", "waited", "staged", "encoded", "written", "voted", "committed")
_TIMES = {name: f"{name}_s" for name in _SHOWN}


def limit_of(text: str | None) -> int | None:
    """How many checkpoints to show.

    Raises:
        ConfigError: the text is not a count.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(field="--limit", why=f"{text!r} is not a number of checkpoints")
    return int(text)


def run(
    out: Output,
    root: Path,
    *,
    branch: str | None,
    limit: int | None,
    timing: bool = False,
    graph: bool = False,
) -> int:
    """Show the log, with `timing` a table of what its saves cost, with `graph` its branches.

    Raises:
        ConfigError: both are asked for.
        RefNotFoundError: there is no such branch.
        CkptError: the repository cannot be read.
    """
    if timing and graph:
        raise ConfigError(field="--timing", why="stands beside --graph", help="Give one of them")
    repository = open_repository(root)
    state = repository.state()
    commits = newest_first(state)
    if branch is not None:
        wanted = _known(state, branch)
        commits = [commit for commit in commits if commit.checkpoint_id.branch == wanted]
    if graph:
        from ckptcoord.cli.picture import show_picture  # late: few ask for it

        show_picture(out, repository, state, commits, limit)
    else:
        show = _table if timing else _blocks
        show(out, repository, state, commits, limit)
    if not commits and not out.as_json:
        out.note(f"no checkpoints yet in {printable(repository.url)}")
    return 0


def _blocks(
    out: Output, repository: Repository, state: LogState, commits: list[Commit], limit: int | None
) -> None:
    naming = Naming(state)
    named = [(commit, naming.of(commit.checkpoint_id)) for commit in commits[:limit]]
    if out.as_json:
        _data(out, repository, [commit_document(state, *one) for one in named])
    elif named:
        out.lines("\n\n".join(_block(out, state, *one) for one in named).split("\n"))


def _data(out: Output, repository: Repository, checkpoints: list[dict[str, object]]) -> None:
    out.data({"repository": repository.url, "checkpoints": checkpoints})


def _known(state: LogState, name: str) -> BranchName:
    branch = BranchName(name)
    if branch not in branches(state):
        raise RefNotFoundError(ref=name, nearest=nearest(state, name))
    return branch


def timing_of(repository: Repository, state: LogState, commit: Commit) -> Mapping[str, float]:
    """What the save of a checkpoint cost, from its entry: the state does not keep it.

    Raises:
        ManifestError: the entry is not that of this commit.
    """
    number = state.stamps[commit.checkpoint_id].number
    body = repository.log.entry(number).body
    if not isinstance(body, Commit) or body.checkpoint_id != commit.checkpoint_id:
        why = f"is no commit of {commit.checkpoint_id}"
        raise ManifestError(path=f"log entry {number}", why=why)
    return body.timing


def _table(
    out: Output, repository: Repository, state: LogState, commits: list[Commit], limit: int | None
) -> None:
    naming = Naming(state)
    timed = [(commit, timing_of(repository, state, commit)) for commit in commits[:limit]]
    if out.as_json:
        documents = [
            {
                **commit_document(state, commit, naming.of(commit.checkpoint_id)),
                "timing": dict(timing) or None,
            }
            for commit, timing in timed
        ]
        _data(out, repository, documents)
    elif timed:
        out.lines(_timing_lines(out, timed))


def _timing_lines(out: Output, timed: list[tuple[Commit, Mapping[str, float]]]) -> Iterator[str]:
    rows = [("checkpoint", *_TIMES, "queue", "state", "stored", "ratio", "slowest")]
    rows += [_row(commit, timing) for commit, timing in timed]
    head, *rest = aligned(rows, right=frozenset(range(1, len(rows[0]))))
    yield out.paint("  ".join(head), Style.DIM)
    for first, *cells in rest:
        yield f"{out.paint(first, Style.YELLOW)}  {'  '.join(cells)}"


def _row(commit: Commit, timing: Mapping[str, float]) -> tuple[str, ...]:
    slowest, depth = timing.get(SLOWEST_RANK), timing.get(QUEUE_DEPTH)
    return (
        commit.checkpoint_id.ref,
        *(seconds_text(timing[name]) if name in timing else "-" for name in _TIMES.values()),
        "-" if depth is None else str(depth),
        bytes_text(commit.size_bytes),
        bytes_text(commit.stored_bytes),
        ratio_text(commit.size_bytes, commit.stored_bytes),
        "-" if slowest is None else f"rank {slowest}",
    )


def _block(out: Output, state: LogState, commit: Commit, names: Names) -> str:
    paint, checkpoint_id = out.paint, commit.checkpoint_id
    parent = f"parent {commit.parent.ref}" if commit.parent else "no parent"
    age = when(state.stamps[checkpoint_id].timestamp, out.now)
    sizes = f"{bytes_text(commit.size_bytes)}, {bytes_text(commit.stored_bytes)} stored"
    lines = [
        f"{paint(checkpoint_id.ref, Style.YELLOW)}{names.text(paint)}  {commit.path}",
        f"    {age}, {sizes}, {parent}",
    ]
    if commit.metrics:
        lines.append(f"    {metrics_text(commit.metrics)}")
    if commit.message:
        lines.append(f"    {subject(commit.message)}")
    return "\n".join(lines)
