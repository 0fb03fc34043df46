"""From a ref to a commit, and to what was meant where there is none."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, assert_never

from ckptcoord.core.refs import BranchName, CheckpointId, LatestRef, NameRef, PathRef, Ref, StepRef
from ckptcoord.errors import RefNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.commit import LogState

_SHOWN = 3


def latest(state: LogState) -> Commit | None:
    """The newest commit of all: by its place in the log, not by step."""
    return _newest(state, state.commits)


def newest_on(state: LogState, branch: BranchName) -> Commit | None:
    """The newest commit made on a branch."""
    return _newest(state, (one for one in state.commits if one.branch == branch))


def head(state: LogState, branch: BranchName) -> Commit | None:
    """Where a branch stands: at its newest commit, or before its first at its fork point."""
    own = newest_on(state, branch)
    fork = state.forks.get(branch)
    if own is None and fork is not None:
        return state.commits.get(fork.source)
    return own


def resolve(state: LogState, ref: Ref) -> Commit:
    """The commit that a ref names.

    Raises:
        RefNotFoundError: there is none; the nearest are named.
    """
    wanted: CheckpointId | str
    match ref:
        case StepRef():
            found, text, wanted = state.commits.get(ref.id), ref.id.ref, ref.id
        case LatestRef():
            found = latest(state) if ref.branch is None else head(state, ref.branch)
            text = "latest" if ref.branch is None else f"{ref.branch}@latest"
            wanted = str(ref.branch or "")
        case NameRef():
            found, text, wanted = _named(state, ref.name), ref.name, ref.name
        case PathRef():
            found, text = _at_path(state, ref.path), ref.path
            wanted = ref.path.rstrip("/").rpartition("/")[2]
        case _:
            assert_never(ref)
    if found is None:
        near = nearest(state, wanted)
        raise RefNotFoundError(ref=text, nearest=near)
    return found


def nearest(state: LogState, wanted: CheckpointId | str) -> tuple[str, ...]:
    """Refs that exist and look like what was wanted; empty only where there is no checkpoint.

    A step's nearest are the nearest steps of its branch, as numbers; where there is no such branch,
    that step of those with names like it, or those.
    """
    step: int | None = None
    if isinstance(wanted, CheckpointId):
        step = wanted.step
        steps = [one for one in state.commits if one.branch == wanted.branch]
        if steps:
            near = sorted(steps, key=lambda one: (abs(one.step - step), one.step))[:_SHOWN]
            return tuple(one.ref for one in sorted(near))
        wanted = str(wanted.branch)
    names = {str(tag) for tag in state.tags} | {str(one.branch) for one in state.commits}
    names |= {str(branch) for branch in state.forks}
    close = get_close_matches(wanted, sorted(names), n=_SHOWN)
    same = {str(one.branch): one.ref for one in state.commits if one.step == step}
    newest = latest(state)
    return tuple(same.get(name, name) for name in close) or (
        (newest.checkpoint_id.ref,) if newest else ()
    )


def _newest(state: LogState, ids: Iterable[CheckpointId]) -> Commit | None:
    newest = max(ids, key=lambda one: state.stamps[one].number, default=None)
    return None if newest is None else state.commits[newest]


def _named(state: LogState, name: str) -> Commit | None:
    """A tag, else a branch."""
    for tag, target in state.tags.items():
        if tag.value == name:
            return state.commits.get(target)
    return head(state, BranchName(name))


def _at_path(state: LogState, path: str) -> Commit | None:
    folder = path.removeprefix("./").rstrip("/")
    return next((commit for commit in state.commits.values() if commit.path == folder), None)
