"""Where training goes on from, and what of the branch it saves to stands in the way. Pure.

`ckptcoord resume`, engines and trainers all ask here, so that they all mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.refs import BranchName, LatestRef, NameRef, Ref, parse_ref
from ckptcoord.errors import NotNewestError
from ckptcoord.plan.lookup import newest_on, resolve

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where training goes on from.

    Attributes:
        commit: what is loaded.
        branch: that checkpoints are saved to.
        newer: the checkpoints of that branch which come after it, by branch and step. Where there
            are any, going on would leave them beside the line, or meet their steps again.
        is_restart: it is what the run itself has saved since it was started; what a fork begins
            anew was begun anew then.
    """

    commit: Commit
    branch: BranchName
    newer: tuple[CheckpointId, ...] = ()
    is_restart: bool = False

    def refuse_newer(self) -> None:
        """Let only the newest of a branch pass.

        Raises:
            NotNewestError: the branch has newer ones; says how to go on.
        """
        if self.newer:
            raise NotNewestError(
                ref=self.commit.checkpoint_id.ref,
                branch=str(self.branch),
                newer=tuple(one.ref for one in self.newer),
            )


def resume_point(
    state: LogState, ref: str, *, branch: BranchName | None = None, since: int | None = None
) -> ResumePoint:
    """Where a run goes on that is told a ref.

    Args:
        state: what the log says.
        ref: names a checkpoint, not by a path.
        branch: that the run saves to; by default the one that the ref names.
        since: the last entry of the log when the ref was handed over. What the branch was given
            after that is the run's own, and a run that is restarted goes on from there.

    Raises:
        RefNotFoundError: there is no such checkpoint; the nearest are named.
        InvalidNameError: the text is no ref.
    """
    parsed = parse_ref(ref)
    if since is not None and branch is not None:
        own = newest_on(state, branch)
        if own is not None and state.stamps[own.checkpoint_id].number > since:
            return ResumePoint(commit=own, branch=branch, is_restart=True)
    commit = resolve(state, parsed)
    onto = branch or branch_of(state, parsed, commit)
    return ResumePoint(commit=commit, branch=onto, newer=newer_than(state, onto, commit))


def branch_of(state: LogState, ref: Ref, commit: Commit) -> BranchName:
    """The branch that a ref names, which may only begin at the commit; else the commit's own."""
    if isinstance(ref, LatestRef) and ref.branch is not None:
        return ref.branch
    if isinstance(ref, NameRef) and all(tag.value != ref.name for tag in state.tags):
        return BranchName(ref.name)
    return commit.checkpoint_id.branch


def newer_than(state: LogState, branch: BranchName, commit: Commit) -> tuple[CheckpointId, ...]:
    """The checkpoints of a branch that come after a commit: later in the log, or at higher steps.

    After a commit of another branch, all do.
    """
    here, number = commit.checkpoint_id, state.stamps[commit.checkpoint_id].number
    return tuple(
        sorted(
            one
            for one in state.commits
            if one.branch == branch
            and one != here
            and (here.branch != branch or state.stamps[one].number > number or one.step > here.step)
        )
    )
