"""What stands against dropping checkpoints, and what it would free. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from ckptcoord.plan.commit import branches, live_folders
from ckptcoord.plan.lookup import newest_on

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.plan.commit import LogState


class HeldBy(StrEnum):
    """What holds a checkpoint.

    TAG: a tag names it. HEAD: it is the newest of its branch. FORK: another branch begins there.
    START: the same, and that branch has nothing else: the log itself refuses to drop it.
    """

    TAG = "tag"
    HEAD = "head"
    FORK = "fork"
    START = "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One reason to keep a checkpoint; `name` is that of the tag or branch."""

    checkpoint_id: CheckpointId
    by: HeldBy
    name: str

    def __str__(self) -> str:
        """`the tag 'best'`."""
        match self.by:
            case HeldBy.TAG:
                return f"the tag {self.name!r}"
            case HeldBy.HEAD:
                return f"the branch {self.name!r}, whose newest it is"
            case HeldBy.FORK:
                return f"the branch {self.name!r}, which was forked there"
            case HeldBy.START:
                return f"the branch {self.name!r}, which has only that"


def holds(state: LogState, ids: Collection[CheckpointId]) -> tuple[Hold, ...]:
    """What stands against dropping these together, sorted by checkpoint."""
    wanted = frozenset(ids)
    found = [*_tags(state, wanted), *_heads(state, wanted), *_forks(state, wanted)]
    order = list(HeldBy)
    return tuple(sorted(found, key=lambda one: (one.checkpoint_id, order.index(one.by), one.name)))


def own_of(state: LogState, branch: BranchName) -> tuple[CheckpointId, ...]:
    """The checkpoints that were made on a branch, oldest first by their place in the log."""
    own = (one for one in state.commits if one.branch == branch)
    return tuple(sorted(own, key=lambda one: state.stamps[one].number))


def counts(state: LogState) -> Counter[BranchName]:
    """How many checkpoints each branch has of its own; branches without any count 0."""
    found = Counter(dict.fromkeys(branches(state), 0))
    found.update(one.branch for one in state.commits)
    return found


def freed_bytes(state: LogState, ids: Collection[CheckpointId]) -> int:
    """The bytes of files that gc could delete if these were dropped, and cannot now."""
    after = replace(state, commits={i: c for i, c in state.commits.items() if i not in ids})
    sizes = {path: one.commit.stored_bytes for path, one in state.retired.items()}
    sizes |= {commit.path: commit.stored_bytes for commit in state.commits.values()}
    return sum(sizes.get(path, 0) for path in live_folders(state) - live_folders(after))


def _tags(state: LogState, wanted: frozenset[CheckpointId]) -> Iterator[Hold]:
    for name, target in state.tags.items():
        if target in wanted:
            yield Hold(checkpoint_id=target, by=HeldBy.TAG, name=str(name))


def _heads(state: LogState, wanted: frozenset[CheckpointId]) -> Iterator[Hold]:
    for branch in {one.branch for one in wanted}:
        newest = newest_on(state, branch)
        if newest is not None and newest.checkpoint_id in wanted:
            yield Hold(checkpoint_id=newest.checkpoint_id, by=HeldBy.HEAD, name=str(branch))


def _forks(state: LogState, wanted: frozenset[CheckpointId]) -> Iterator[Hold]:
    own = counts(state)
    for branch, fork in state.forks.items():
        if fork.source in wanted:
            by = HeldBy.FORK if own[branch] else HeldBy.START
            yield Hold(checkpoint_id=fork.source, by=by, name=str(branch))
