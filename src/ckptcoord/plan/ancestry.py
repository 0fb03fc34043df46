"""What came before a checkpoint, also where checkpoints between were dropped. Pure."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.plan.commit import LogState


class Ancestry:
    """The nearest ancestors that are there, of all checkpoints."""

    def __init__(self, state: LogState) -> None:
        self._state = state
        self._dropped = {
            one.commit.checkpoint_id: one.commit.parent
            for one in sorted(state.retired.values(), key=lambda one: one.stamp.number)
        }
        self._own: dict[BranchName, list[tuple[int, CheckpointId]]] = {}
        for checkpoint_id, stamp in sorted(state.stamps.items(), key=lambda item: item[1].number):
            self._own.setdefault(checkpoint_id.branch, []).append((stamp.number, checkpoint_id))

    def above(self, commit: Commit) -> CheckpointId | None:
        """The parent, or where that was dropped, the nearest before it that is there.

        Of what was swept, the log has forgotten the parent. Then it is what the branch has from
        before the commit, or where the branch begins.
        """
        parent, seen = commit.parent, {commit.checkpoint_id}
        while parent is not None and parent not in self._state.commits:
            if parent in seen or parent not in self._dropped:  # a forged log may go in circles
                return self._before(commit)
            seen.add(parent)
            parent = self._dropped[parent]
        return parent

    def _before(self, commit: Commit) -> CheckpointId | None:
        branch = commit.checkpoint_id.branch
        own = self._own.get(branch, [])
        at = bisect_left(own, (self._state.stamps[commit.checkpoint_id].number,))
        if at:
            return own[at - 1][1]
        fork = self._state.forks.get(branch)
        return fork.source if fork is not None and fork.source in self._state.commits else None
