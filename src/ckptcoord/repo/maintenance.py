"""Dropping checkpoints: first from the log, a save later from the storage."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from ckptcoord.core.entries import Retire, Sweep
from ckptcoord.plan.commit import live_folders
from ckptcoord.plan.retention import surplus
from ckptcoord.repo.repository import STAGING, Repository

if TYPE_CHECKING:
    from ckptcoord.core.refs import BranchName


def keep_newest(
    repository: Repository, branch: BranchName, *, keep_last: int, writer: str
) -> tuple[str, ...]:
    """Keep the newest checkpoints of a branch; returns the folders that were deleted.

    What is retired now is deleted by the next call, so that a load that has begun has a save's
    time to end (INV-5).

    Raises:
        StorageError: the storage refused; what is not deleted is tried again by the next call.
    """
    swept = _sweep(repository, writer)
    doomed = surplus(repository.state(), branch, keep_last=keep_last)
    if doomed:
        reason = f"keep_last={keep_last}"
        repository.log.append(lambda _: Retire(writer=writer, checkpoint_ids=doomed, reason=reason))
    return swept


def _sweep(repository: Repository, writer: str) -> tuple[str, ...]:
    """Delete the folders of retired checkpoints, after saying so in the log (INV-5)."""
    state = repository.state()
    live = live_folders(state)
    present = {entry.name for entry in repository.store.list("")}
    doomed = tuple(sorted(state.retired.keys() & present - live))
    if doomed:
        repository.log.append(lambda _: Sweep(writer=writer, paths=doomed))
    return tuple(path for path in doomed if _delete(repository, path))


def _delete(repository: Repository, path: str) -> bool:
    """Delete one folder, unless a commit has come to own its name meanwhile."""
    aside = f"{STAGING}/{secrets.token_hex(16)}-swept"
    repository.store.move_dir(path, aside)
    if any(commit.path == path for commit in repository.state().commits.values()):
        repository.store.move_dir(aside, path)
        return False
    repository.store.remove_tree(aside)
    return True
