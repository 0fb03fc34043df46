"""Which repository a process means, and how its run goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.context import (
    Asked,
    HandOff,
    Origin,
    Setting,
    Variable,
    check_path,
    check_repo,
    choose_settings,
    is_path,
)
from ckptcoord.errors import ConfigError, RepositoryNotFoundError, WorkspaceNotFoundError
from ckptcoord.repo.settings import WORKSPACE_PATH, RepoConfig, has_marker
from ckptcoord.repo.workspace import (
    absolute,
    find_repo,
    find_workspace,
    init_workspace,
    is_repository,
    make_repo,
    repo_config,
    repositories,
    starting_at,
    workspace_at,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ckptcoord.core.context import Reset

_MANY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Where a run's checkpoints are, and how it goes on.

    Attributes:
        workspace_path: the workspace that the repository is in; None: it stands alone.
        repo_name: the name of its folder.
        repo_path: its folder, absolute.
        branch: that checkpoints are saved to.
        resume_ref: that training goes on from; None: nobody said.
        resume_since: see `HandOff`; None with a ref that came as an argument.
        autocommit: steps from one commit to the next; 0: none by itself.
        resets: what is begun anew where training goes on from `resume_ref`.
        seed: for the random number generators there; None: they go on.
        origins: for each of these names, who said it.
    """

    workspace_path: Path | None
    repo_name: str
    repo_path: Path
    branch: str
    resume_ref: str | None
    resume_since: int | None
    autocommit: int
    resets: tuple[Reset, ...]
    seed: int | None
    origins: Mapping[str, Origin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which workspace and which repository are meant; each is there, or None."""

    workspace: Setting[Path | None]
    repo: Setting[Path | None]


def resolve_context(  # noqa: PLR0913 (each is a setting)
    workspace: str | os.PathLike[str] | None = None,
    repo: str | os.PathLike[str] | None = None,
    *,
    branch: str | None = None,
    resume: str | None = None,
    autocommit: int | None = None,
    environ: Mapping[str, str] | None = None,
    start: str | os.PathLike[str] | None = None,
    create: bool = True,
) -> RunContext:
    """Where a run's checkpoints are: an argument, else the environment, repo.yaml, the default.

    Where nobody names them, the workspace and the repository are the nearest from the current
    directory upwards. A repository that is named here and absent is made, and with it its
    workspace, if that is named here as well.

    Args:
        workspace: its folder.
        repo: a repository's name in the workspace, or its path: that has a `/` in it.
        branch: that checkpoints are saved to; `main` by default.
        resume: the ref that training goes on from.
        autocommit: steps from one commit to the next; 0: none by itself, the default.
        environ: the environment; by default this process's.
        start: the folder that is searched upwards from.
        create: make what is absent.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WorkspaceNotFoundError: there is no workspace, and the repository is given by its name.
        ConfigError: a setting makes no sense; names the argument, the variable or the file.
        OutputDirError: what is absent cannot be made.
    """
    told = HandOff.from_environment(
        os.environ if environ is None else environ  # noqa: TID251 (this call reads the hand-off)
    )
    if told.resume_ref is None or resume is not None:
        places = find_places(workspace, repo, told=told, start=start, create=create)
    else:
        places = _where_told(workspace, repo, told, start)
    path = places.repo.value
    if path is None:
        raise _nothing_named(places, start)
    config = repo_config(path)
    chosen = choose_settings(
        Asked(branch=branch, resume=resume, autocommit=autocommit),
        told,
        branch=config.branch,
        autocommit=config.autocommit,
    )
    return RunContext(
        workspace_path=places.workspace.value,
        repo_name=path.name,
        repo_path=path,
        branch=chosen.branch.value,
        resume_ref=chosen.resume_ref.value,
        resume_since=chosen.resume_since,
        autocommit=chosen.autocommit.value,
        resets=chosen.resets.value,
        seed=chosen.seed.value,
        origins={
            "workspace_path": places.workspace.origin,
            "repo_name": places.repo.origin,
            "repo_path": places.repo.origin,
            **chosen.origins,
        },
    )


def find_places(
    workspace: str | os.PathLike[str] | None = None,
    repo: str | os.PathLike[str] | None = None,
    *,
    told: HandOff,
    start: str | os.PathLike[str] | None = None,
    create: bool = False,
) -> Places:
    """Which workspace and repository are meant, as `resolve_context` has it; None: there is none.

    Raises:
        RepositoryNotFoundError: the one that is named is not there.
        WorkspaceNotFoundError: likewise.
        ConfigError: a name or path makes no sense.
        OutputDirError: what is absent cannot be made.
    """
    asked = _Named.of(workspace, told.workspace, Variable.WORKSPACE)
    wanted = _Named.of(repo, told.repo, Variable.REPO)
    if wanted is None:
        return _around(asked, start)
    if not wanted.is_path:
        return _in_workspace(asked, wanted, start, create=create)
    if asked is not None and asked.origin is wanted.origin is Origin.ARGUMENT:
        why = f"{wanted.text!r} is a path, and a workspace is given, too"
        raise ConfigError(field="repo", why=why, help="Give its name in the workspace")
    folder = absolute(wanted.text)
    if not is_repository(folder):
        _make(folder, wanted, create=create)
    parent = folder.parent if has_marker(folder.parent, WORKSPACE_PATH) else None
    return _places(parent, folder, wanted.origin, wanted.origin)


def _where_told(
    workspace: str | os.PathLike[str] | None,
    repo: str | os.PathLike[str] | None,
    told: HandOff,
    start: str | os.PathLike[str] | None,
) -> Places:
    """As `find_places`, where the environment says what to go on from: so it is there already."""
    there = absolute(told.repo) if told.repo is not None and is_path(told.repo) else None
    try:
        places = find_places(workspace, repo, told=told, start=start)
    except (RepositoryNotFoundError, WorkspaceNotFoundError) as error:
        if there is None:
            raise
        raise _elsewhere(told, there, error.what) from error
    found = places.repo.value
    if there is not None and found is not None and found.resolve() != there.resolve():
        raise _elsewhere(told, there, f"the code names {found}")
    return places


def _elsewhere(told: HandOff, there: Path, why: str) -> ConfigError:
    return ConfigError(
        field=str(Variable.REPO),
        why=f"asks to go on from {told.resume_ref} in {there}, and {why}",
        help="Run the command in the folder that the code's relative paths are meant from, or "
        "leave workspace and repo out of the code",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """What somebody called a workspace or repository; `variable`: of the environment, if that."""

    text: str
    is_path: bool
    origin: Origin
    variable: str = ""

    @classmethod
    def of(
        cls, argument: str | os.PathLike[str] | None, environment: str | None, variable: Variable
    ) -> _Named | None:
        """What was said, checked; None: nothing was."""
        if argument is not None:
            text, origin, named = os.fspath(argument), Origin.ARGUMENT, ""
        elif environment is not None:
            text, origin, named = environment, Origin.ENVIRONMENT, str(variable)
        else:
            return None
        may_be_name = variable is Variable.REPO and not isinstance(argument, os.PathLike)
        (check_repo if may_be_name else check_path)(text)
        by_path = not may_be_name or is_path(text)
        return cls(text=text, is_path=by_path, origin=origin, variable=named)


def _around(asked: _Named | None, start: str | os.PathLike[str] | None) -> Places:
    """The repository around a folder; of a workspace that was named, only one of its own."""
    repo = find_repo(start)
    if asked is None:
        workspace = find_workspace(start if repo is None else repo)
        return _places(workspace, repo, Origin.FOUND, Origin.FOUND)
    workspace = workspace_at(asked.text, variable=asked.variable)
    if repo is not None and repo.parent.resolve() != workspace.resolve():
        repo = None
    return _places(workspace, repo, asked.origin, Origin.FOUND)


def _in_workspace(
    asked: _Named | None,
    wanted: _Named,
    start: str | os.PathLike[str] | None,
    *,
    create: bool,
) -> Places:
    """A repository by its name in the workspace that was named, or else the nearest."""
    if asked is None:
        workspace = find_workspace(start)
        if workspace is None:
            raise WorkspaceNotFoundError(path=str(starting_at(start)))
        origin = Origin.FOUND
    else:
        origin = asked.origin
        if create and asked.origin is wanted.origin is Origin.ARGUMENT:
            workspace = init_workspace(asked.text)
        else:
            workspace = workspace_at(asked.text, variable=asked.variable)
    folder = workspace / wanted.text
    if not is_repository(folder):
        _make(folder, wanted, create=create, nearest=repositories(workspace))
    return _places(workspace, folder, origin, wanted.origin)


def _make(folder: Path, wanted: _Named, *, create: bool, nearest: tuple[str, ...] = ()) -> None:
    """Make a repository that code asks for by name; what the environment names must be there."""
    if not create or wanted.origin is not Origin.ARGUMENT:
        raise RepositoryNotFoundError(
            path=str(folder), nearest=nearest[:_MANY], variable=wanted.variable
        )
    make_repo(folder, RepoConfig())


def _nothing_named(places: Places, start: str | os.PathLike[str] | None) -> RepositoryNotFoundError:
    workspace = places.workspace.value
    names = repositories(workspace) if workspace is not None else ()
    return RepositoryNotFoundError(path=str(starting_at(start)), nearest=names[:_MANY])


def _places(
    workspace: Path | None, repo: Path | None, workspace_origin: Origin, repo_origin: Origin
) -> Places:
    return Places(
        workspace=Setting(value=workspace, origin=workspace_origin),
        repo=Setting(value=repo, origin=repo_origin),
    )
