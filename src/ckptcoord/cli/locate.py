"""From the words on the command line to a repository and a checkpoint in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.context import HandOff, Variable
from ckptcoord.core.refs import CheckpointId, PathRef, StepRef, parse_ref
from ckptcoord.errors import (
    ConfigError,
    InvalidNameError,
    RefNotFoundError,
    RepositoryNotFoundError,
)
from ckptcoord.plan.lookup import nearest, resolve
from ckptcoord.repo.context import Places, find_places
from ckptcoord.repo.settings import CONFIG_PATH
from ckptcoord.repo.workspace import find_repo, is_repository, repositories
from ckptcoord.store.files import storage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.commit import LogState

LATEST = "latest"
_SHOWN = 5


def locate_repository(path: str | None, repo: str | None) -> Path:
    """The repository's folder, for a command that takes no ref.

    Raises:
        RepositoryNotFoundError: there is none.
        ConfigError: it is given twice.
    """
    if path is not None and repo is not None:
        raise _twice(path, repo)
    given = path if repo is None else repo
    return _around(None) if given is None else _exactly(given)


def locate_place(path: str | None, repo: str | None) -> Path | None:
    """As `locate_repository`; None where there is none, and a workspace around.

    Raises:
        RepositoryNotFoundError: there is neither, or the one that is named is not there.
        ConfigError: it is given twice.
    """
    if path is None and repo is None:
        there = places(Variable.WORKSPACE, Variable.REPO)
        if there.repo.value is None and there.workspace.value is not None:
            return None
    return locate_repository(path, repo)


def locate(first: str | None, second: str | None, repo: str | None) -> tuple[Path, str | None]:
    """The repository's folder and the ref, from `[REPO] [REF]` and `--repo`.

    One word alone is REPO if it is a folder that is a repository, else REF.

    Raises:
        RepositoryNotFoundError: there is none.
        ConfigError: it is given twice.
    """
    if repo is not None:
        if second is not None:
            raise _twice(str(first), repo)
        return _exactly(repo), first
    if first is None:
        return _around(None), None
    if second is not None:
        return _exactly(first), second
    if first and is_repository(Path(first)):  # Path("") is the current directory
        return Path(first), None
    return _around(first), first


def locate_words(words: Sequence[str], repo: str | None) -> tuple[Path, list[str]]:
    """The repository's folder and the other words, from `[REPO] WORD...` and `--repo`.

    The first word is REPO if it is a folder that is a repository. Without it, a word that is the
    path of a checkpoint's folder says which.

    Raises:
        RepositoryNotFoundError: there is none.
    """
    if repo is not None:
        return _exactly(repo), list(words)
    if words and is_repository(Path(words[0])):
        return Path(words[0]), list(words[1:])
    return _around(next((word for word in words if "/" in word and _is_folder(word)), None)), [
        *words
    ]


def find_commit(state: LogState, root: Path, ref: str) -> Commit:
    """The commit that a ref names; a path is relative to the current directory.

    Raises:
        RefNotFoundError: there is none; the nearest are named.
        InvalidNameError: the text is no ref.
    """
    parsed = parse_ref(ref)
    if not isinstance(parsed, PathRef):
        return resolve(state, parsed)
    folder = Path(parsed.path).resolve()
    if folder.parent == root.resolve():
        for commit in state.commits.values():
            if commit.path == folder.name:
                return commit
    raise RefNotFoundError(ref=ref, nearest=_nearest(state, folder.name))


def places(*read: Variable) -> Places:
    """The workspace and the repository that these variables name, else those around here.

    Raises:
        RepositoryNotFoundError: one that is named is not there.
        WorkspaceNotFoundError: likewise.
        ConfigError: a variable makes no sense.
    """
    named = {str(name): os.environ.get(name, "") for name in read}
    return find_places(told=HandOff.from_environment(named))


def _twice(path: str, repo: str) -> ConfigError:
    return ConfigError(
        field="REPO",
        why=f"is given twice: {path!r}, and {repo!r} by --repo",
        help="Beside --repo there is only REF",
    )


def _exactly(path: str) -> Path:
    """The repository in a folder, else the one of that name in the workspace."""
    if is_repository(Path(path)):
        return Path(path)
    workspace = places(Variable.WORKSPACE).workspace.value
    names = repositories(workspace) if workspace is not None else ()
    if workspace is not None and path in names:
        return workspace / path
    _refuse_closed(path)
    raise RepositoryNotFoundError(path=path, nearest=names[:_SHOWN])


def _refuse_closed(path: str) -> None:
    """What may not be looked into is no folder without a repository."""
    try:
        (Path(path) / CONFIG_PATH).stat()
    except PermissionError as error:
        raise storage_error("open", path, error) from error
    except (OSError, ValueError):  # there is none, or no file can have that name
        return


def _around(ref: str | None) -> Path:
    """The repository around a checkpoint's folder, else that of the environment or around here."""
    if ref is not None and _is_folder(ref):
        found = find_repo(ref)
        if found is not None:
            return found
    there = places(Variable.WORKSPACE, Variable.REPO)
    if there.repo.value is not None:
        return there.repo.value
    workspace = there.workspace.value
    names = repositories(workspace) if workspace is not None else ()
    where = ref if ref is not None and "/" in ref else str(_here())
    raise RepositoryNotFoundError(path=where, nearest=names[:_SHOWN])


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as error:  # it was deleted
        raise RepositoryNotFoundError(path=".") from error


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _nearest(state: LogState, folder: str) -> tuple[str, ...]:
    try:
        ref = StepRef(CheckpointId.parse(folder))
    except InvalidNameError:
        return nearest(state, folder)
    return nearest(state, ref.id)
