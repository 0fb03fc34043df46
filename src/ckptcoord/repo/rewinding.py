"""A branch goes back to one of its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.entries import Retire
from ckptcoord.errors import NotNewestError, RefNotFoundError
from ckptcoord.plan.lookup import nearest
from ckptcoord.plan.resuming import newer_than

if TYPE_CHECKING:
    from ckptcoord.plan.commit import LogState
    from ckptcoord.plan.resuming import ResumePoint
    from ckptcoord.repo.repository import Repository


def rewind(repository: Repository, point: ResumePoint, *, writer: str) -> None:
    """Drop what a branch has after a checkpoint: all of it, by one entry; the files stay until gc.

    Raises:
        RefNotFoundError: the checkpoint itself was dropped meanwhile.
        NotNewestError: the branch has been given others meanwhile; nothing was changed.
        CheckpointInUseError: a tag names one, or a branch has nothing else.
        CkptError: the log cannot be read or appended to.
    """
    ref = point.commit.checkpoint_id.ref

    def make(state: LogState) -> Retire:
        if point.commit.checkpoint_id not in state.commits:
            raise RefNotFoundError(ref=ref, nearest=nearest(state, point.commit.checkpoint_id))
        newer = newer_than(state, point.branch, point.commit)
        if newer != point.newer:
            refs = tuple(one.ref for one in newer)
            raise NotNewestError(ref=ref, branch=str(point.branch), newer=refs)
        return Retire(writer=writer, checkpoint_ids=newer, reason=f"rewind to {ref}")

    repository.log.append(make)
