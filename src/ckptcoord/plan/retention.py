"""Which checkpoints may go. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.plan.commit import LogState


def surplus(state: LogState, branch: BranchName, *, keep_last: int) -> tuple[CheckpointId, ...]:
    """The commits of a branch beyond its newest `keep_last`, oldest first.

    Newest by their place in the log, not by step. What a tag names or a branch was forked from
    stays, and does not count.
    """
    pinned = {*state.tags.values(), *(fork.source for fork in state.forks.values())}
    own = sorted(
        (one for one in state.commits if one.branch == branch and one not in pinned),
        key=lambda one: state.stamps[one].number,
    )
    return tuple(own[: max(0, len(own) - keep_last)])
