"""The directive `cli-reference`: each command, its words, options and examples, from the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from ckptcoord.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator


class CliReference(SphinxDirective):
    """A section a command."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        return [_section(name, command) for name, command in walk("ckptcoord", get_command(app))]


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 (typer's or click's)
    """Each command below this one, groups before what is in them."""
    for word in command.list_commands(None):
        below = command.get_command(None, word)
        yield f"{name} {word}", below
        if hasattr(below, "list_commands"):
            yield from walk(f"{name} {word}", below)


def _section(name: str, command: Any) -> nodes.section:  # noqa: ANN401 (as above)
    section = nodes.section(ids=[nodes.make_id(name)], names=[name])
    section += nodes.title(text=name)
    context = command.context_class(command, info_name=name)
    section += _code(" ".join(command.get_usage(context).removeprefix("Usage: ").split()))
    for paragraph in (command.help or "").split("\n\n"):
        section += _paragraph(paragraph)
    options = [one for one in command.get_params(context) if one.param_type_name == "option"]
    if options:
        section += _options(options)
    return section


def _paragraph(text: str) -> nodes.Element:
    """A paragraph; click marks with a backspace what keeps its lines."""
    if not text.startswith("\b"):
        return _prose(text)
    lines = text.removeprefix("\b").strip("\n")
    if lines.startswith("Examples:"):
        examples = lines.splitlines()[1:]
        return _code("\n".join(f"$ {line.strip()}" for line in examples), "console")
    return _code(lines)


def _prose(text: str) -> nodes.paragraph:
    """Flowing text; what stands between backticks is code."""
    paragraph = nodes.paragraph()
    for at, part in enumerate(" ".join(text.split()).split("`")):
        paragraph += nodes.literal(text=part) if at % 2 else nodes.Text(part)
    return paragraph


def _code(text: str, language: str = "text") -> nodes.literal_block:
    return nodes.literal_block(text, text, language=language)


def _options(options: list[Any]) -> nodes.definition_list:
    found = nodes.definition_list()
    for option in options:
        item, term = nodes.definition_list_item(), nodes.term()
        words = ", ".join(sorted(option.opts, key=len))
        takes = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
        term += nodes.literal(text=f"{words}{takes}")
        item += [term, nodes.definition("", _prose(option.help or ""))]
        found += item
    return found


def setup(app: Any) -> dict[str, bool]:  # noqa: ANN401 (Sphinx's application)
    """Called by Sphinx."""
    app.add_directive("cli-reference", CliReference)
    return {"parallel_read_safe": True}
