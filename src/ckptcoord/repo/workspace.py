"""Workspaces, and the repositories in them: folders that a marker makes what they are."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from ckptcoord.core.context import check_path
from ckptcoord.core.refs import RepoName
from ckptcoord.errors import (
    InvalidNameError,
    MissingFileError,
    OutputDirError,
    RepositoryNotFoundError,
    StorageError,
    WorkspaceNotFoundError,
)
from ckptcoord.repo.repository import create_repository, make_folder
from ckptcoord.repo.settings import (
    CONFIG_PATH,
    MARKER,
    WORKSPACE_PATH,
    RepoConfig,
    WorkspaceConfig,
    has_marker,
    read_config,
    read_workspace_config,
)
from ckptcoord.store.local import LocalStore

# --- workspaces ----------------------------------------------------------------------------------


def init_workspace(path: str | os.PathLike[str] = ".", *, description: str = "") -> Path:
    """Make a folder a workspace, and make the folder where it is absent; its absolute path.

    A workspace that is there stays as it is, its description too.

    Raises:
        OutputDirError: the folder cannot be written, or is a repository itself.
        ConfigError: the description is longer than a line, or a marker that is there is malformed.
    """
    data = WorkspaceConfig(description=description).to_bytes()
    with make_folder(path) as store:
        if store.exists(CONFIG_PATH):
            why = "it is a repository, which holds no others"
            raise OutputDirError(path=store.url, why=why)
        if read_workspace_config(store) is None:
            try:
                store.make_dirs(MARKER)
                store.put_new(WORKSPACE_PATH, data)
            except StorageError as error:
                raise OutputDirError(path=store.url, why=error.why) from error
        return Path(store.url)


def find_workspace(start: str | os.PathLike[str] | None = None) -> Path | None:
    """The nearest workspace from a folder upwards; from the current directory by default."""
    return _upwards(start, WORKSPACE_PATH)


def repositories(workspace: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the repositories in a workspace, sorted.

    Raises:
        StorageError: the folder cannot be read.
    """
    with LocalStore(workspace) as store:
        names = [entry.name for entry in store.list("") if entry.is_dir]
    return tuple(name for name in names if _is_name(name) and is_repository(Path(workspace, name)))


# --- repositories --------------------------------------------------------------------------------


def init_repo(
    name: str, *, workspace: str | os.PathLike[str] | None = None, description: str = ""
) -> Path:
    """Make a repository in a workspace; its absolute path. One that is there stays as it is.

    Args:
        name: letters, digits, `.`, `_` and `-`, as a branch's.
        workspace: its folder; by default the nearest from the current directory upwards.
        description: for people, one line.

    Raises:
        InvalidNameError: the name is none.
        WorkspaceNotFoundError: there is no workspace.
        OutputDirError: the folder cannot be written, or is a workspace itself.
        ConfigError: the description is longer than a line.
    """
    folder = workspace_at(workspace) / RepoName(name).value
    config = RepoConfig(description=description)
    make_repo(folder, config)
    return folder


def make_repo(folder: Path, config: RepoConfig) -> None:
    """Make a folder a repository with these settings; one that is there stays as it is.

    Raises:
        OutputDirError: the folder cannot be written, or is a workspace itself.
    """
    if has_marker(folder, WORKSPACE_PATH):
        raise OutputDirError(path=str(folder), why="it is a workspace itself")
    create_repository(folder, clock=lambda: datetime.now(UTC), config=config)


def find_repo(start: str | os.PathLike[str] | None = None) -> Path | None:
    """The nearest repository from a folder upwards; from the current directory by default."""
    return _upwards(start, CONFIG_PATH)


def is_repository(folder: Path) -> bool:
    """Whether a folder holds a repository's marker."""
    return has_marker(folder, CONFIG_PATH)


def workspace_at(path: str | os.PathLike[str] | None = None, *, variable: str = "") -> Path:
    """A workspace's absolute path; the nearest one by default.

    Args:
        path: its folder.
        variable: of the environment, that says so.

    Raises:
        WorkspaceNotFoundError: there is none.
    """
    if path is None:
        found = find_workspace()
        if found is None:
            raise WorkspaceNotFoundError(path=str(starting_at(None)))
        return found
    folder = absolute(path)
    if not has_marker(folder, WORKSPACE_PATH):
        raise WorkspaceNotFoundError(path=str(path), variable=variable)
    return folder


def repo_config(path: Path) -> RepoConfig:
    """The settings of the repository in a folder.

    Raises:
        RepositoryNotFoundError: there is none.
        ManifestError: its marker is malformed.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    try:
        with LocalStore(path) as store:
            return read_config(store)
    except MissingFileError as error:
        raise RepositoryNotFoundError(path=str(path)) from error


def starting_at(start: str | os.PathLike[str] | None) -> Path:
    """Where to search from: a folder, of which the links are followed, as for a process's own."""
    if start is not None:
        return absolute(start).resolve()
    try:
        return Path.cwd()
    except OSError as error:  # it was deleted
        raise RepositoryNotFoundError(path=".") from error


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path as this process has it, with no link followed.

    Raises:
        ConfigError: it can be none.
        RepositoryNotFoundError: it is relative, and the current directory was deleted.
    """
    check_path(os.fspath(path))
    try:
        return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links)
    except OSError as error:  # the current directory was deleted
        raise RepositoryNotFoundError(path=str(path)) from error


def _upwards(start: str | os.PathLike[str] | None, marker: str) -> Path | None:
    folder = starting_at(start)
    return next((one for one in (folder, *folder.parents) if has_marker(one, marker)), None)


def _is_name(text: str) -> bool:
    try:
        RepoName(text)
    except InvalidNameError:
        return False
    return True
