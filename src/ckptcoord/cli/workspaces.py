"""`ckptcoord workspace` and `ckptcoord repo`: folders of repositories, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import places
from ckptcoord.cli.text import Style, aligned, bytes_text, counted, printable, when
from ckptcoord.core.context import Variable, check_path
from ckptcoord.core.refs import RepoName
from ckptcoord.errors import CkptError, WorkspaceNotFoundError
from ckptcoord.plan.lookup import latest
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.settings import WORKSPACE_PATH, has_marker, read_workspace_config
from ckptcoord.repo.workspace import (
    absolute,
    init_repo,
    init_workspace,
    is_repository,
    repo_config,
    repositories,
    workspace_at,
)
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.cli.output import Output

_UNREADABLE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A repository in a list; of one that cannot be read, why."""

    name: str
    checkpoints: int = 0
    stored_bytes: int = 0
    latest: str | None = None
    timestamp: str | None = None
    description: str = ""
    why: str = ""


def init_workspace_at(out: Output, path: str, description: str) -> int:
    """Make a folder a workspace, and say where it is.

    Raises:
        CkptError: it cannot be made.
    """
    there = has_marker(absolute(check_path(path)), WORKSPACE_PATH)
    folder = init_workspace(path, description=description)
    return _said(out, "workspace", folder, created=not there)


def init_repository(out: Output, name: str, workspace: str | None, description: str) -> int:
    """Make a repository in a workspace, and say where it is.

    Raises:
        CkptError: it cannot be made.
    """
    around = find(workspace)
    there = is_repository(around / RepoName(name).value)
    folder = init_repo(name, workspace=around, description=description)
    return _said(out, "repository", folder, created=not there)


def list_repositories(out: Output, workspace: str | None) -> int:
    """One line for each repository of a workspace.

    Raises:
        WorkspaceNotFoundError: there is none.
    """
    folder = find(workspace)
    rows = _rows(folder)
    if out.as_json:
        out.data({"workspace": str(folder), "repositories": [_document(row) for row in rows]})
    else:
        _show(out, rows)
    return _warned(out, rows)


def show_workspace(out: Output, folder: Path) -> int:
    """A workspace, and each repository in it.

    Raises:
        ConfigError: its marker is malformed.
    """
    with LocalStore(folder) as store:
        config = read_workspace_config(store)
    about = "" if config is None else config.description
    rows = _rows(folder)
    stored_bytes = sum(row.stored_bytes for row in rows)
    if out.as_json:
        out.data(
            {
                "workspace": str(folder),
                "description": about,
                "stored_bytes": stored_bytes,
                "repositories": [_document(row) for row in rows],
            }
        )
        return _warned(out, rows)
    many = "1 repository" if len(rows) == 1 else f"{len(rows):,} repositories"
    lines = [f"workspace\t{printable(str(folder))}", f"stored\t{bytes_text(stored_bytes)}, {many}"]
    if about:
        lines.insert(1, f"about\t{printable(about)}")
    out.lines(lines)
    _show(out, rows)
    return _warned(out, rows)


def find(workspace: str | None) -> Path:
    """The workspace that an option or the environment names, else the nearest.

    Raises:
        WorkspaceNotFoundError: there is none.
    """
    if workspace is not None:
        return workspace_at(workspace)
    found = places(Variable.WORKSPACE).workspace.value
    if found is None:
        raise WorkspaceNotFoundError(path=str(Path.cwd()))
    return found


def _rows(folder: Path) -> list[_Row]:
    return [_row(name, folder / name) for name in repositories(folder)]


def _row(name: str, folder: Path) -> _Row:
    """What can be said of a repository; that one is damaged must not hide the others."""
    try:
        config, state = repo_config(folder), open_repository(folder).state()
    except CkptError as error:
        return _Row(name=name, why=f"error[{error.code}]: {error.what}")
    newest = latest(state)
    return _Row(
        name=name,
        checkpoints=len(state.commits),
        stored_bytes=sum(one.stored_bytes for one in state.commits.values()),
        latest=None if newest is None else newest.checkpoint_id.ref,
        timestamp=None if newest is None else state.stamps[newest.checkpoint_id].timestamp,
        description=config.description,
    )


def _show(out: Output, rows: Iterable[_Row]) -> None:
    if not out.terminal:
        out.lines(
            f"{row.name}\t{row.checkpoints}\t{row.stored_bytes}\t{row.latest or '-'}\t"
            f"{printable(row.timestamp or '-')}\t{printable(row.description)}"
            for row in rows
        )
        return
    cells: list[tuple[str, ...]] = [
        (
            row.name,
            counted(row.checkpoints, "checkpoint"),
            bytes_text(row.stored_bytes),
            row.latest or "-",
            when(row.timestamp, out.now) if row.timestamp else "-",
            printable(row.description),
        )
        for row in rows
    ]
    out.lines(
        f"{out.paint(first, Style.YELLOW)}  {'  '.join(rest)}".rstrip()
        for first, *rest in aligned(cells, right=frozenset({1, 2}))
    )


def _warned(out: Output, rows: Iterable[_Row]) -> int:
    unreadable = [row for row in rows if row.why]
    if unreadable and not out.as_json:
        out.note(*(f"{row.name} cannot be read: {printable(row.why)}" for row in unreadable))
    return _UNREADABLE if unreadable else 0


def _document(row: _Row) -> dict[str, object]:
    return {
        "name": row.name,
        "checkpoints": row.checkpoints,
        "stored_bytes": row.stored_bytes,
        "latest": row.latest,
        "timestamp": row.timestamp,
        "description": row.description,
        "error": row.why or None,
    }


def _said(out: Output, kind: str, folder: Path, *, created: bool) -> int:
    if out.as_json:
        out.data({"path": str(folder), "name": folder.name, "created": created})
        return 0
    out.lines([printable(str(folder))])
    if not created:
        out.note(f"the {kind} was there already; nothing was changed")
    return 0
