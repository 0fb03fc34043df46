"""`ckptcoord compact`: checkpoints written anew as plain ones that need nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.progress import progress
from ckptcoord.cli.text import bytes_text, counted, printable
from ckptcoord.errors import CkptError
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository

_MAX_THREADS = 8


def run(out: Output, root: Path, ref: str | None, *, dry_run: bool) -> int:
    """Compact one checkpoint, or all for whose sake retired ones are kept.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        CkptError: it cannot be read or written; it is as it was.
    """
    from ckptcoord.repo.compaction import is_plain, needing_retired  # late: numpy

    repository = open_repository(root)
    state = repository.state()
    if ref is None:
        wanted = needing_retired(state)
    else:
        one = find_commit(state, root, ref)
        wanted = () if is_plain(repository, one) else (one,)
    done = wanted if dry_run else compact_all(out, repository, wanted)
    after = state if dry_run else repository.state()
    done = tuple(commit for commit in done if commit.checkpoint_id in after.commits)
    if out.as_json:
        documents = [_document(commit, after) for commit in done]
        out.data({"repository": repository.url, "dry_run": dry_run, "compacted": documents})
        return 0
    out.lines([_line(commit, after, dry_run=dry_run) for commit in done])
    if not wanted:
        why = "no checkpoint needs one that was retired" if ref is None else f"{ref} is plain"
        out.note(f"nothing to do: {printable(why)}")
    elif done and not dry_run:
        out.note("run `ckptcoord gc` to delete what is not needed any more")
    return 0


def compact_all(
    out: Output, repository: Repository, wanted: Iterable[Commit]
) -> tuple[Commit, ...]:
    """Compact these, and say how far it has come; returns those that were.

    What a run beside this drops or saves again meanwhile is left to it, with a note.

    Raises:
        CkptError: one cannot be read or written; it is as it was, those before it are compacted.
    """
    wanted = tuple(wanted)
    writer = os.urandom(16).hex()
    with progress(out, "compact", sum(commit.size_bytes for commit in wanted)) as advance:
        done = [one for one in wanted if _compacted(repository, one, writer, advance)]
    for commit in wanted:
        if commit not in done:
            ref = printable(commit.checkpoint_id.ref)
            out.note(f"note: {ref} was dropped or written anew meanwhile, and is left as it is")
    return tuple(done)


def _compacted(
    repository: Repository, commit: Commit, writer: str, progress: Callable[[int], None]
) -> bool:
    """Compact a checkpoint; False where it is another one by now, or none."""
    from ckptcoord.repo.compaction import compact  # late: numpy

    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    try:
        return _is_live(repository, commit) and compact(
            repository, commit.checkpoint_id, writer=writer, threads=threads, progress=progress
        )
    except CkptError:
        if _is_live(repository, commit):
            raise
        return False  # its files may have been deleted under the copy


def _is_live(repository: Repository, commit: Commit) -> bool:
    """Whether the log still names these very files."""
    now = repository.state().commits.get(commit.checkpoint_id)
    return now is not None and now.path == commit.path


def _line(commit: Commit, after: LogState, *, dry_run: bool) -> str:
    needs = counted(len(commit.needs), "other checkpoint")
    was = f"{bytes_text(commit.stored_bytes)}, {f'needing {needs}' if commit.needs else 'coded'}"
    ref = commit.checkpoint_id.ref
    if dry_run:
        return f"{ref}  {was}; would be about {bytes_text(commit.size_bytes)}"
    now = after.commits[commit.checkpoint_id]
    return f"{ref}  {was}; now {bytes_text(now.stored_bytes)} in {now.path}"


def _document(commit: Commit, after: LogState) -> dict[str, object]:
    now = after.commits[commit.checkpoint_id]
    return {
        "ref": commit.checkpoint_id.ref,
        "needs": list(commit.needs),
        "stored_bytes_before": commit.stored_bytes,
        "stored_bytes": now.stored_bytes,
        "path": now.path,
    }
