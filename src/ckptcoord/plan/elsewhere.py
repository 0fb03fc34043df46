"""Which checkpoints beside base and parent a delta may name, and what it needs then. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import newest_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import BranchName
    from ckptcoord.plan.commit import LogState

MAX_HEADS = 4
MAX_ELSEWHERE = 8
MAX_NEEDS = 64  # folders that a save needs for anything but its base


def nearby(state: LogState, base: str, parent: str) -> tuple[str, ...]:
    """The folders that a delta may name in any case: base and parent, and what these need.

    Where these are more than `MAX_NEEDS`, base and what it needs: where each save of a star names
    what the saves before it hold, the parent's needs would grow from one to the next.
    """
    both = closure(state, (base, parent))
    return both if len(both) <= MAX_NEEDS else closure(state, (base,))


def other_heads(state: LogState, branch: BranchName) -> tuple[str, ...]:
    """The folders of the newest checkpoints of other branches, newest first, a few at most."""
    newest = [newest_on(state, other) for other in branches(state) if other != branch]
    found = [commit for commit in newest if commit is not None]
    found.sort(key=lambda commit: state.stamps[commit.checkpoint_id].number, reverse=True)
    return tuple(commit.path for commit in found[:MAX_HEADS])


def elsewhere(
    state: LogState, near: Iterable[str], candidates: Sequence[str]
) -> tuple[Commit, ...]:
    """The checkpoints that a save may name beside those that are near; live ones only.

    Args:
        state: what the log says.
        near: the folders that may be named in any case.
        candidates: folders, those that are wanted most first.

    Returns:
        At most `MAX_ELSEWHERE`, and none with which all that may be needed would be more than
        `MAX_NEEDS` folders.
    """
    live = {commit.path: commit for commit in state.commits.values()}
    needs: set[str] = set(closure(state, near))
    found: dict[str, Commit] = {}
    for path in candidates:
        commit = live.get(path)
        if commit is None or path in needs or len(found) == MAX_ELSEWHERE:
            continue
        with_it = needs | {path, *commit.needs}
        if len(with_it) <= MAX_NEEDS:
            needs, found[path] = with_it, commit
    return tuple(found.values())


def closure(state: LogState, folders: Iterable[str]) -> tuple[str, ...]:
    """These folders and all that they need in turn, sorted.

    A folder that is not in the log any more stays alone: the commit that needs it is refused.
    """
    needs = {commit.path: commit.needs for commit in state.commits.values()}
    needs |= {path: retired.commit.needs for path, retired in state.retired.items()}
    named = set(folders)
    return tuple(sorted(named.union(*(needs.get(folder, ()) for folder in named))))
