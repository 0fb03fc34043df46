"""docs/cli.md has every command and option; tests/unit/docs/test_pages.py runs its examples."""

from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/cli.md"


def test_the_docs_know_every_command_and_option() -> None:
    from typer.main import get_command

    from ckptcoord.cli.app import app

    page = PAGE.read_text()
    group = get_command(app)
    for name, command in ((n, group.get_command(None, n)) for n in group.list_commands(None)):
        assert f"`ckptcoord {name} " in page
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert any(f"{option}" in page for option in parameter.opts), parameter.opts
