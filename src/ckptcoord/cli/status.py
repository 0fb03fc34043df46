"""`ckptcoord status`: where you are, what was saved last, who writes, what is under way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import places
from ckptcoord.cli.text import Style, aligned, bytes_text, counted, printable, when
from ckptcoord.cli.workspaces import show_workspace
from ckptcoord.core.context import Asked, HandOff, Origin, Setting, Variable, choose_settings
from ckptcoord.core.entries import timestamp_of
from ckptcoord.core.refs import BranchName
from ckptcoord.plan.commit import STAGING, branches, live_folders
from ckptcoord.plan.dropping import counts
from ckptcoord.plan.lookup import head, latest, newest_on
from ckptcoord.repo.maintenance import local_times
from ckptcoord.repo.repository import Repository, open_repository
from ckptcoord.repo.settings import WORKSPACE_PATH, has_marker
from ckptcoord.repo.workspace import repo_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Claim, Commit
    from ckptcoord.plan.commit import LogState


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfinished:
    """A save that is under way, or was cut off: nobody can tell which but by its age."""

    path: str
    size_bytes: int
    changed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    root: Path
    repository: Repository
    state: LogState
    description: str
    branch: Setting[str]
    unfinished: tuple[_Unfinished, ...]

    @property
    def workspace(self) -> Path | None:
        """The folder around it, if that is one."""
        parent = self.root.absolute().parent
        return parent if has_marker(parent, WORKSPACE_PATH) else None

    def stamp(self, commit: Commit) -> str:
        """When it was committed."""
        return self.state.stamps[commit.checkpoint_id].timestamp


def run(out: Output, root: Path | None) -> int:
    """Show where one is; without a repository the workspace, if there is one.

    Raises:
        RepositoryNotFoundError: there is neither.
        CkptError: the repository cannot be read.
    """
    if root is None:
        workspace = places(Variable.WORKSPACE).workspace.value
        assert workspace is not None, "or a repository was looked for"
        return show_workspace(out, workspace)
    repository = open_repository(root)
    config = repo_config(root)
    told = HandOff.from_environment(os.environ)
    chosen = choose_settings(Asked(), told, branch=config.branch, autocommit=config.autocommit)
    status = _Status(
        root=root,
        repository=repository,
        state=repository.state(),
        description=config.description,
        branch=chosen.branch,
        unfinished=tuple(_unfinished(repository)),
    )
    if out.as_json:
        out.data(_document(status))
    elif out.terminal:
        rows: list[tuple[str, ...]] = list(_rows(out, status))
        for (name, _), (label, text) in zip(rows, aligned(rows), strict=True):
            style = Style.BOLD if name else Style.DIM
            out.lines([f"{out.paint(label, style)}  {text}"])
    else:
        out.lines(f"{name}\t{text}" for name, text in _rows(out, status))
    return 0


def _rows(out: Output, status: _Status) -> Iterator[tuple[str, str]]:
    state, own = status.state, BranchName(status.branch.value)
    if status.workspace is not None:
        yield "workspace", printable(str(status.workspace))
    about = f"  {printable(status.description)}" if status.description else ""
    yield "repository", f"{printable(status.repository.url)}{about}"
    origin = status.branch.origin
    yield "branch", f"{own}" if origin is Origin.DEFAULT else f"{own} (by {origin})"
    yield "head", _placed(out, status, head(state, own))
    newest = latest(state)
    yield "latest", _placed(out, status, newest)
    yield "checkpoints", _sum(state)
    for branch, count in sorted(counts(state).items()):
        claim = state.claims.get(branch)
        said = "" if claim is None else f"; {_claim(out, status, claim)}"
        yield "", f"{branch}: {counted(count, 'checkpoint')}{said}"
    for one in status.unfinished:
        age = "at an unknown time" if one.changed is None else when(one.changed, out.now)
        yield "staging", f"{printable(one.path)}  {bytes_text(one.size_bytes)}, changed {age}"


def _placed(out: Output, status: _Status, commit: Commit | None) -> str:
    if commit is None:
        return "none yet"
    return f"{commit.checkpoint_id.ref}  {when(status.stamp(commit), out.now)}"


def _sum(state: LogState) -> str:
    stored = bytes_text(sum(one.stored_bytes for one in state.commits.values()))
    line = f"{counted(len(state.commits), 'checkpoint')}, {stored} stored"
    retired = state.retired.keys() - live_folders(state)
    if not retired:
        return line
    freed = bytes_text(sum(state.retired[path].commit.stored_bytes for path in retired))
    return f"{line}; {len(retired)} retired, {freed} for gc"


def _claim(out: Output, status: _Status, claim: Claim) -> str:
    """Who may commit there, and what came of it: the log does not know who is alive."""
    host = printable(claim.host or "an unknown host")
    who = f"claimed by {host}, {counted(claim.world_size, 'rank')}, epoch {claim.epoch}"
    last = _last_of(status.state, claim)
    if last is None:
        return f"{who}, nothing saved yet"
    return f"{who}, saved {last.checkpoint_id.ref} {when(status.stamp(last), out.now)}"


def _last_of(state: LogState, claim: Claim) -> Commit | None:
    newest = newest_on(state, claim.branch)
    if newest is None or (newest.writer, newest.epoch) != (claim.writer, claim.epoch):
        return None
    return newest


def _unfinished(repository: Repository) -> Iterator[_Unfinished]:
    changed = local_times(repository)
    for entry in repository.store.list(STAGING):
        if not entry.is_dir:
            continue
        path = f"{STAGING}/{entry.name}"
        seconds = changed(path)
        moment = None if seconds is None else datetime.fromtimestamp(seconds, UTC)
        yield _Unfinished(
            path=path,
            size_bytes=sum(file.size_bytes for file in repository.store.list(path)),
            changed=None if moment is None else timestamp_of(moment),
        )


def _document(status: _Status) -> dict[str, object]:
    state, own = status.state, BranchName(status.branch.value)
    return {
        "workspace": None if status.workspace is None else str(status.workspace),
        "repository": status.repository.url,
        "description": status.description,
        "branch": str(own),
        "branch_origin": str(status.branch.origin),
        "head": _placed_document(status, head(state, own)),
        "latest": _placed_document(status, latest(state)),
        "checkpoints": len(state.commits),
        "stored_bytes": sum(one.stored_bytes for one in state.commits.values()),
        "retired": len(state.retired),
        "branches": [_branch_document(status, branch) for branch in branches(state)],
        "staging": [
            {"path": one.path, "size_bytes": one.size_bytes, "changed": one.changed}
            for one in status.unfinished
        ],
    }


def _branch_document(status: _Status, branch: BranchName) -> dict[str, object]:
    state, claim = status.state, status.state.claims.get(branch)
    fork = state.forks.get(branch)
    last = None if claim is None else _last_of(state, claim)
    return {
        "name": str(branch),
        "checkpoints": counts(state)[branch],
        "head": _placed_document(status, head(state, branch)),
        "forked_from": None if fork is None else fork.source.ref,
        "claim": None
        if claim is None
        else {
            "host": claim.host,
            "epoch": claim.epoch,
            "world_size": claim.world_size,
            "writer": claim.writer,
            "last_save": _placed_document(status, last),
        },
    }


def _placed_document(status: _Status, commit: Commit | None) -> dict[str, object] | None:
    if commit is None:
        return None
    return {"ref": commit.checkpoint_id.ref, "timestamp": status.stamp(commit)}
