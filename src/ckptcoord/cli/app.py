"""The commands, their options, and what happens around each of them.

A command's module is imported when the command runs: an answer should not wait for the others'.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ckptcoord.cli.errors import BROKEN_PIPE, INTERRUPTED, error_document, error_lines
from ckptcoord.cli.output import Output, forget
from ckptcoord.errors import CkptError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HELP = """Look at the checkpoints of a training run.

REPO is the folder that holds .ckptcoord: the trainer's output_dir. Without it, the one around the
current directory is meant. REF is one checkpoint: main@500, latest, main@latest, checkpoint-500, a
tag, a branch (its newest), or the path of a checkpoint's folder. One argument alone is REPO if it
is a folder that is a repository, else it is REF.

Exit codes: 0 done, 1 failed, 2 usage, 10 no repository, 12 no such ref, 13 corrupt, 14 no space,
130 interrupted, 141 the reader of the pipe has gone.
"""
_LOG_HELP = """Show the checkpoints, newest first.

The order is that in which they were committed, whatever the clocks said.

\b
Examples:
  ckptcoord log
  ckptcoord log runs/gpt -n 5
  ckptcoord log -n 20 --timing
  ckptcoord log --branch experiment --json
"""
_INSPECT_HELP = """Show what is in a checkpoint: where it comes from, its components and files.

REF is `latest` by default. One argument alone is REPO if it is a folder that is a repository, else
it is REF.

\b
Examples:
  ckptcoord inspect
  ckptcoord inspect main@500
  ckptcoord inspect runs/gpt main@500 --tensors --component model
  ckptcoord inspect runs/gpt/checkpoint-500 --json
"""
_VERIFY_HELP = """Read every byte of a checkpoint and compare it with its digests.

REF is `latest` by default. One argument alone is REPO if it is a folder that is a repository, else
it is REF. The exit code is 13 when anything is corrupt; a file that is in no manifest is named,
and does no harm.

\b
Examples:
  ckptcoord verify
  ckptcoord verify runs/gpt main@500
  ckptcoord verify runs/gpt --all
"""
_COMPACT_HELP = """Write deltas and coded anchors anew as plain safetensors that stand alone.

Without REF: those for whose sake `ckptcoord gc` keeps checkpoints that were retired. The state
stays the same to the last bit, and so do its place in history, metrics and message; a later gc
deletes the old files. Safe beside running saves and loads.

\b
Examples:
  ckptcoord compact --dry-run
  ckptcoord compact runs/gpt main@500
"""
_LS_HELP = """List the checkpoints, or with REF the files of one; one a line.

One argument alone is REPO if it is a folder that is a repository, else it is REF. Into a pipe the
columns are separated by tabs and sizes are in bytes.

\b
Examples:
  ckptcoord ls
  ckptcoord ls runs/gpt main@500
  ckptcoord ls runs/gpt | cut -f1
"""
_DU_HELP = """Show what takes how much: each checkpoint, and on a terminal each component and all.

`alone` is what gc could delete if that checkpoint alone were retired. Into a pipe the columns are
separated by tabs and sizes are in bytes: ref, state, stored, alone, folder, live or retired; with
--codec ref, codec, tensors, state, stored of each live checkpoint.

\b
Examples:
  ckptcoord du
  ckptcoord du --codec
  ckptcoord du runs/gpt --json
"""
_GC_HELP = """Delete what no checkpoint needs: retired ones, and what killed saves left.

A retired checkpoint whose files a live one needs stays, and so does what is younger than the grace,
what a running save may own, and all that is not ckptcoord's. It asks first, unless -y is given.

\b
Examples:
  ckptcoord gc --dry-run
  ckptcoord gc runs/gpt --grace 7d
  ckptcoord gc runs/gpt --compact
  ckptcoord gc runs/gpt -y --json
"""


class _QuickCommand(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 (typer's or click's, by version)
        """The parameters, with text taken as it is given."""
        return _quick(super().get_params(ctx))


class _QuickGroup(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 (typer's or click's, by version)
        """The parameters, with text taken as it is given."""
        return _quick(super().get_params(ctx))


def _quick(parameters: list[Any]) -> list[Any]:
    """Spare text the way through typer's pydantic, whose import takes as long as all the rest."""
    for parameter in parameters:
        checked = partial(type(parameter).process_value, parameter)
        parameter.process_value = partial(_text_as_given, checked)
    return parameters


def _text_as_given(
    checked: Callable[[object, object], object], context: object, value: object
) -> object:
    return value if value is None or isinstance(value, str) else checked(context, value)


app = typer.Typer(
    name="ckptcoord",
    cls=_QuickGroup,
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Which of the two copies of click there are raises it is typer's own affair.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
_COMMANDS = ("compact", "inspect", "log", "ls", "verify")

_Repo = Annotated[str | None, typer.Argument(metavar="REPO", show_default=False)]
_Ref = Annotated[str | None, typer.Argument(metavar="REF", show_default=False)]
_RepoOption = Annotated[
    str | None,
    typer.Option("--repo", "-C", metavar="PATH", help="The folder of the repository."),
]
_Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (typer's way to call it)
    if wanted:
        from ckptcoord import __version__

        typer.echo(f"ckptcoord {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    assert not version  # it has been answered


@app.command("log", cls=_QuickCommand, help=_LOG_HELP)
def _log(
    repo: _Repo = None,
    *,
    repo_option: _RepoOption = None,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Only this branch's.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--limit", "-n", metavar="N", help="Only the newest N.")
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing", help="How long each save took, and where.")
    ] = False,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, log

        root = locate.locate_repository(repo, repo_option)
        return log.run(out, root, branch=branch, limit=log.limit_of(limit), timing=timing)

    return _run("log", body, as_json=as_json)


@app.command("inspect", cls=_QuickCommand, help=_INSPECT_HELP)
def _inspect(
    repo: _Repo = None,
    ref: _Ref = None,
    *,
    repo_option: _RepoOption = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also the tensors in each shard.")
    ] = False,
    component: Annotated[
        str | None, typer.Option("--component", metavar="KEY", help="Only this component.")
    ] = None,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import inspect, locate

        root, wanted = locate.locate(repo, ref, repo_option)
        return inspect.run(out, root, wanted, component=component, with_tensors=tensors)

    return _run("inspect", body, as_json=as_json)


@app.command("verify", cls=_QuickCommand, help=_VERIFY_HELP)
def _verify(
    repo: _Repo = None,
    ref: _Ref = None,
    *,
    repo_option: _RepoOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint.")] = False,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, verify

        root, wanted = locate.locate(repo, ref, repo_option)
        return verify.run(out, root, wanted, everything=everything)

    return _run("verify", body, as_json=as_json)


@app.command("compact", cls=_QuickCommand, help=_COMPACT_HELP)
def _compact(
    repo: _Repo = None,
    ref: _Ref = None,
    *,
    repo_option: _RepoOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would do.")] = False,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import compact, locate

        root, wanted = locate.locate(repo, ref, repo_option)
        return compact.run(out, root, wanted, dry_run=dry_run)

    return _run("compact", body, as_json=as_json)


@app.command("ls", cls=_QuickCommand, help=_LS_HELP)
def _ls(
    repo: _Repo = None,
    ref: _Ref = None,
    *,
    repo_option: _RepoOption = None,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, ls

        return ls.run(out, *locate.locate(repo, ref, repo_option))

    return _run("ls", body, as_json=as_json)


@app.command("du", cls=_QuickCommand, help=_DU_HELP)
def _du(
    repo: _Repo = None,
    *,
    repo_option: _RepoOption = None,
    codec: Annotated[
        bool, typer.Option("--codec", help="By codec, too; reads the header of each file.")
    ] = False,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import du, locate

        return du.run(out, locate.locate_repository(repo, repo_option), codecs=codec)

    return _run("du", body, as_json=as_json)


@app.command("gc", cls=_QuickCommand, help=_GC_HELP)
def _gc(  # noqa: PLR0913 (each is an option)
    repo: _Repo = None,
    *,
    repo_option: _RepoOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done.")
    ] = False,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="SPAN",
            help="Keep what was retired so lately: 90s, 1h (default), 7d.",
        ),
    ] = None,
    rebase: Annotated[
        bool,
        typer.Option("--compact", help="First make those stand alone that need retired ones."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: _Json = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import gc as collect
        from ckptcoord.cli import locate

        root = locate.locate_repository(repo, repo_option)
        return collect.run(out, root, grace=grace, dry_run=dry_run, yes=yes, rebase=rebase)

    return _run("gc", body, as_json=as_json)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        args: the words after the program's name; those of this process by default.
    """
    if args is not None:
        return _main(args)
    # The process is ours: imports make much that lives and nothing to collect, now or at its end.
    gc.set_threshold(100_000, 20, 20)
    # No plugin watches a command's own models, and pydantic would look for one for 15 ms.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    try:
        return _main(sys.argv[1:])
    finally:
        gc.freeze()


def _main(args: Sequence[str]) -> int:
    given = list(args)
    words = given or ["--help"]
    command = typer.main.get_command(app)
    try:
        code: object = command.main(words, prog_name="ckptcoord", standalone_mode=False)
    except _UsageError as error:
        return _usage(words, error)
    except SystemExit:  # typer's answer when the pipe breaks while it writes help
        return BROKEN_PIPE
    if not given:
        return ConfigError.exit_code
    return code if isinstance(code, int) else 0


def _run(command: str, body: Callable[[Output], int], *, as_json: bool) -> int:
    """The exit code of a command; no traceback for what is no bug of ours."""
    out = Output(command, as_json=as_json)
    try:
        return _reported(out, body)
    except KeyboardInterrupt:
        out.note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        forget(sys.stdout)
        forget(sys.stderr)
        return BROKEN_PIPE


def _reported(out: Output, body: Callable[[Output], int]) -> int:
    try:
        code = body(out)
        out.flush()
    except CkptError as error:
        if out.as_json and not out.broken:
            out.error(error_document(error))
        else:
            out.note(*error_lines(error, out.paint_note))
        return error.exit_code
    return code


def _usage(words: Sequence[str], error: typer.BadParameter) -> int:
    """What typer refused, in the form of every other error."""
    name = next((word for word in words if word in _COMMANDS), "")
    called = f"ckptcoord {name}".rstrip()
    why = str(error.format_message())

    def body(_: Output) -> int:
        raise ConfigError(field=called, why=why, help=f"See `{called} --help`")

    return _run(name, body, as_json="--json" in words)
