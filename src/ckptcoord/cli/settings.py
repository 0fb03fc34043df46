"""`ckptcoord config show`: the settings of a run that is started here, and who said them."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from ckptcoord.cli.locate import locate_repository
from ckptcoord.cli.text import Style, aligned, printable
from ckptcoord.core.context import (
    Asked,
    HandOff,
    Origin,
    Setting,
    Variable,
    choose_settings,
    is_path,
)
from ckptcoord.plan.retention import Retention
from ckptcoord.repo.context import Places, find_places
from ckptcoord.repo.settings import RepoConfig
from ckptcoord.repo.workspace import repo_config

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_VARIABLES = {
    "workspace": Variable.WORKSPACE,
    "repo": Variable.REPO,
    "branch": Variable.BRANCH,
    "resume_ref": Variable.RESUME_REF,
    "autocommit": Variable.AUTOCOMMIT,
    "resets": Variable.RESET,
    "seed": Variable.SEED,
}


def show(out: Output, repo: str | None, *, origin: bool) -> int:
    """A line for each setting; with `origin` also who said it.

    Raises:
        RepositoryNotFoundError: the one that is named is not there.
        ConfigError: a variable, or the repository's file, makes no sense; names it.
    """
    told = HandOff.from_environment(os.environ)
    variables = dict(_VARIABLES)
    if told.repo is not None and is_path(told.repo):
        variables["workspace"] = Variable.REPO  # it is the folder around that
    named = None if repo is None else locate_repository(None, repo)
    settings = _settings(find_places(repo=named, told=told), told)
    if out.as_json:
        out.data(
            {
                "settings": {
                    name: {"value": _plain(one.value), "origin": str(one.origin)}
                    | ({"variable": str(variables[name])} if name in variables else {})
                    for name, one in settings.items()
                }
            }
        )
        return 0
    rows: list[tuple[str, ...]] = [
        (
            name,
            _text(one.value),
            *([_origin_text(one.origin, variables.get(name))] if origin else []),
        )
        for name, one in settings.items()
    ]
    if out.terminal:
        out.lines(
            f"{out.paint(first, Style.BOLD)}  {'  '.join(rest)}".rstrip()
            for first, *rest in aligned(rows)
        )
    else:
        out.lines("\t".join(row) for row in rows)
    return 0


def _settings(places: Places, told: HandOff) -> dict[str, Setting[object]]:
    path = places.repo.value
    config = RepoConfig() if path is None else repo_config(path)
    chosen = choose_settings(Asked(), told, branch=config.branch, autocommit=config.autocommit)
    found: dict[str, Setting[object]] = {
        "workspace": Setting(value=places.workspace.value, origin=places.workspace.origin),
        "repo": Setting(value=path, origin=places.repo.origin),
    }
    for name in chosen.origins:
        one: Setting[object] = getattr(chosen, name)
        found[name] = one
    found["description"] = _of_file(config.description, "")
    for field in fields(Retention):
        value = getattr(config.retention, field.name)
        found[f"retention.{field.name}"] = _of_file(value, None)
    return found


def _of_file(value: object, default: object) -> Setting[object]:
    said = Origin.DEFAULT if value == default else Origin.REPOSITORY
    return Setting(value=value, origin=said)


def _origin_text(origin: Origin, variable: Variable | None) -> str:
    return f"{origin}: {variable}" if origin is Origin.ENVIRONMENT else str(origin)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return "-" if value is None or value == "" else printable(str(value))


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return value if value is None or isinstance(value, int | float | str) else str(value)
