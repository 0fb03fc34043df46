"""What commands have in common: their options, and what happens around each of them."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ckptcoord.cli.errors import BROKEN_PIPE, INTERRUPTED, error_document, error_lines
from ckptcoord.cli.output import Output, forget
from ckptcoord.errors import CkptError

if TYPE_CHECKING:
    from collections.abc import Callable

RepoWord = Annotated[str | None, typer.Argument(metavar="REPO", show_default=False)]
RefWord = Annotated[str | None, typer.Argument(metavar="REF", show_default=False)]
RepoOption = Annotated[
    str | None,
    typer.Option("--repo", "-C", metavar="PATH", help="The folder of the repository."),
]
GivenRef = Annotated[str, typer.Argument(metavar="REF", show_default=False)]
OneComponent = Annotated[
    str | None, typer.Option("--component", metavar="KEY", help="Only this component.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")]


class Command(TyperCommand):
    """A command whose text comes as it was given."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 (typer's or click's, by version)
        """The parameters."""
        return _quick(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands; its own text, too, comes as it was given."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 (typer's or click's, by version)
        """The parameters."""
        return _quick(super().get_params(ctx))


def commands(name: str | None = None, help: str | None = None) -> typer.Typer:  # noqa: A002 (typer's word)
    """A group to declare commands in; with a name, one that is a command itself."""
    return typer.Typer(
        name=name,
        cls=Group,
        help=help,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def run(command: str, body: Callable[[Output], int], *, as_json: bool) -> int:
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


def _quick(parameters: list[Any]) -> list[Any]:
    """Spare text the way through typer's pydantic, whose import takes as long as all the rest."""
    for parameter in parameters:
        checked = partial(type(parameter).process_value, parameter)
        parameter.process_value = partial(_text_as_given, checked, parameter.required)
    return parameters


def _text_as_given(
    checked: Callable[[object, object], object],
    required: bool,  # noqa: FBT001 (of a partial)
    context: object,
    value: object,
) -> object:
    if required and not value and value != "":  # it is missing: typer says so
        return checked(context, value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return list(value)
    return checked(context, value)
