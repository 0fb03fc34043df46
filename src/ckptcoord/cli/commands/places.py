"""Commands that say where one is, and make places to save to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, RepoOption, RepoWord, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_STATUS_HELP = """Show where you are, what was saved last, who writes, and what is under way.

Without a repository, it is the workspace that is shown, as by `ckptcoord workspace status`. Into a
pipe, name and text are separated by a tab.

\b
Examples:
  ckptcoord status
  ckptcoord status runs/gpt --json
"""
_WORKSPACE_HELP = """Folders that hold repositories: `workspace init`, `workspace status`."""
_WORKSPACE_INIT_HELP = """Make a folder a workspace: one that holds repositories, one for each run.

PATH is the current directory by default, and is made where it is absent. A workspace that is there
stays as it is.

\b
Examples:
  ckptcoord workspace init ml-experiments
  ckptcoord workspace init -d "language models"
"""
_WORKSPACE_STATUS_HELP = """Show a workspace, and what is in each of its repositories.

PATH is by default the nearest from the current directory upwards, or what CKPTCOORD_WORKSPACE says.
The exit code is 1 where a repository cannot be read.

\b
Examples:
  ckptcoord workspace status
  ckptcoord workspace status ml-experiments --json
"""
_REPO_HELP = """Repositories, one for each run: `repo init`, `repo list`."""
_REPO_INIT_HELP = """Make a repository in a workspace; one that is there stays as it is.

NAME is as a branch's: letters, digits, '.', '_' and '-'. A trainer makes its own repository where
there is none.

\b
Examples:
  ckptcoord repo init gpt4
  ckptcoord repo init gpt4 -d "the large one" --workspace ml-experiments
"""
_REPO_LIST_HELP = """List the repositories of a workspace, one a line.

Into a pipe the columns are separated by tabs: name, checkpoints, stored bytes, newest, its time,
description. The exit code is 1 where one cannot be read.

\b
Examples:
  ckptcoord repo list
  ckptcoord repo list --workspace ml-experiments | cut -f1
"""
_CONFIG_HELP = """Settings of a run that is started here: `config show`."""
_CONFIG_SHOW_HELP = """Show the settings of a run that is started here, such as its branch.

An argument in the code goes before the environment, that before repo.yaml, that before the default.
--origin shows which of them said it.

\b
Examples:
  ckptcoord config show --origin
  CKPTCOORD_BRANCH=exp ckptcoord config show --json
"""
_Description = Annotated[
    str, typer.Option("--description", "-d", metavar="TEXT", help="For people, one line.")
]
_Workspace = Annotated[
    str | None, typer.Option("--workspace", metavar="PATH", help="The folder of the workspace.")
]
_Path = Annotated[str | None, typer.Argument(metavar="PATH", show_default=False)]

app = commands()
_workspace = commands("workspace", _WORKSPACE_HELP)
_repo = commands("repo", _REPO_HELP)
_config = commands("config", _CONFIG_HELP)
for _group in (_workspace, _repo, _config):
    app.add_typer(_group)


@app.command("status", cls=Command, help=_STATUS_HELP)
def _status(
    repo: RepoWord = None, *, repo_option: RepoOption = None, as_json: AsJson = False
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, status

        return status.run(out, locate.locate_place(repo, repo_option))

    return run("status", body, as_json=as_json)


@_workspace.command("init", cls=Command, help=_WORKSPACE_INIT_HELP)
def _workspace_init(
    path: _Path = None, *, description: _Description = "", as_json: AsJson = False
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import workspaces

        return workspaces.init_workspace_at(out, "." if path is None else path, description)

    return run("workspace init", body, as_json=as_json)


@_workspace.command("status", cls=Command, help=_WORKSPACE_STATUS_HELP)
def _workspace_status(path: _Path = None, *, as_json: AsJson = False) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import workspaces

        return workspaces.show_workspace(out, workspaces.find(path))

    return run("workspace status", body, as_json=as_json)


@_repo.command("init", cls=Command, help=_REPO_INIT_HELP)
def _repo_init(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    *,
    description: _Description = "",
    workspace: _Workspace = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import workspaces

        return workspaces.init_repository(out, name, workspace, description)

    return run("repo init", body, as_json=as_json)


@_repo.command("list", cls=Command, help=_REPO_LIST_HELP)
def _repo_list(*, workspace: _Workspace = None, as_json: AsJson = False) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import workspaces

        return workspaces.list_repositories(out, workspace)

    return run("repo list", body, as_json=as_json)


@_config.command("show", cls=Command, help=_CONFIG_SHOW_HELP)
def _config_show(
    *,
    repo_option: RepoOption = None,
    origin: Annotated[bool, typer.Option("--origin", help="Also who said it.")] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import settings

        return settings.show(out, repo_option, origin=origin)

    return run("config show", body, as_json=as_json)
