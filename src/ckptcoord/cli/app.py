"""The program: which command is meant, and where it is declared.

Only the module that declares the command is imported: an answer should not wait for the others'.
"""

from __future__ import annotations

import gc
import os
import sys
from copy import copy
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptcoord.cli.errors import BROKEN_PIPE, INTERRUPTED
from ckptcoord.cli.masking import mask_secrets, mask_tracebacks
from ckptcoord.cli.options import Group, run
from ckptcoord.cli.output import forget, stdout_error
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptcoord.cli.output import Output

_HELP = """Look at the checkpoints of a training run.

REPO is the folder that holds .ckptcoord: the trainer's output_dir. Without it, the one around the
current directory is meant. REF is one checkpoint: main@500, latest, main@latest, checkpoint-500, a
tag, a branch (its newest), or the path of a checkpoint's folder. One argument alone is REPO if it
is a folder that is a repository, else it is REF.

Exit codes: 0 done, 1 failed, 2 usage, 3 found what was looked for, 10 no repository, 12 no such
ref, 13 corrupt, 14 no space, 130 interrupted, 141 the reader of the pipe has gone.
"""
# Where each command is declared, in the order of the help.
_HOMES = {
    "workspace": "places",
    "repo": "places",
    "status": "places",
    "config": "places",
    "resume": "children",
    "fork": "children",
    "log": "look",
    "show": "history",
    "tag": "history",
    "branch": "history",
    "rm": "history",
    "cat": "history",
    "inspect": "look",
    "ls": "look",
    "du": "look",
    "verify": "look",
    "diff": "compare",
    "compact": "keep",
    "gc": "keep",
    "import": "transfer",
    "export": "transfer",
    "merge": "merging",
    "bisect": "search",
    "login": "account",
    "logout": "account",
    "whoami": "account",
    "completion": "history",
}


class _Interrupted(BaseException):
    """An interrupt before a command can say so itself: typer would end without a word."""


class _LazyGroup(Group):
    """All commands; each is imported when it is asked for."""

    def make_context(self, *args: Any, **extra: Any) -> Any:  # noqa: ANN401 (typer's or click's)
        """Read the words."""
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt as error:
            raise _Interrupted from error

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (as above)
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 (typer's or click's)
        """Their names."""
        return list(_HOMES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 (as above)
        """The one of that name."""
        home = _HOMES.get(cmd_name)
        if home is None:
            return None
        module = import_module(f"ckptcoord.cli.commands.{home}")
        group: typer.Typer = module.app
        return typer.main.get_group(_only(group, cmd_name)).commands[cmd_name]


def _only(group: typer.Typer, name: str) -> typer.Typer:
    """A group without its other commands: to make one of its declaration takes a millisecond."""
    found = copy(group)
    found.registered_commands = [one for one in group.registered_commands if one.name == name]
    found.registered_groups = [
        one
        for one in group.registered_groups
        if one.typer_instance is not None and one.typer_instance.info.name == name
    ]
    return found


app = typer.Typer(
    name="ckptcoord",
    cls=_LazyGroup,
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Which of the two copies of click there are raises it is typer's own affair.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
_HELP_WORDS = {"--help", "-h", "--version"}


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
    _open_streams()
    mask_tracebacks()
    try:
        return _main(sys.argv[1:])
    finally:
        gc.freeze()


def _open_streams() -> None:
    """A stream that the parent closed (`>&-`) is None; what is written to it goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for good)


def _main(args: Sequence[str]) -> int:
    given = list(args)
    mask_secrets(given)
    words = given or ["--help"]
    command = typer.main.get_command(app)
    try:
        code: object = command.main(words, prog_name="ckptcoord", standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group alone; either copy's
            typer.echo(error.format_message())
            return ConfigError.exit_code
        return _usage(words, error)
    except (_Interrupted, SystemExit) as ended:
        return _said(ended)
    except OSError as error:
        if not _HELP_WORDS & {*words}:
            raise
        return run("", partial(_unwritten, error), as_json=False)
    if not given:
        return ConfigError.exit_code
    return code if isinstance(code, int) else 0


def _said(ended: _Interrupted | SystemExit) -> int:
    """What a command is ended by before it begins; its exit code."""
    if isinstance(ended, SystemExit):  # typer's answer when the pipe breaks while it writes help
        return BROKEN_PIPE
    typer.echo("interrupted", err=True)
    return INTERRUPTED


def _unwritten(error: OSError, _: Output) -> int:
    """What typer itself could not write."""
    forget(sys.stdout)
    raise stdout_error(error) from error


def _usage(words: Sequence[str], error: typer.BadParameter) -> int:
    """What typer refused, in the form of every other error."""
    context: Any = getattr(error, "ctx", None)
    called = context.command_path if context else "ckptcoord"
    name = called.removeprefix("ckptcoord").strip()
    why = str(error.format_message())

    def body(_: Output) -> int:
        raise ConfigError(
            field=called, why=why, help=_nearest(words, name) or f"See `{called} --help`"
        )

    own = words[: words.index("--")] if "--" in words else words  # the rest is a command's
    return run(name, body, as_json="--json" in own)


def _nearest(words: Sequence[str], name: str) -> str:
    """Commands that may have been meant, or where an option belongs."""
    if name:
        return ""
    meant = next((word for word in words if word in _HOMES), None)
    if words[0].startswith("-") and meant is not None:
        return f"Options stand behind the command: `ckptcoord {meant} --help`"
    from difflib import get_close_matches  # late: who types right need not wait for it

    near = get_close_matches(words[0][:40], _HOMES)
    return f"Nearest: {', '.join(near)}" if near else ""
