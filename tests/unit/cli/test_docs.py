"""Every example of docs/cli.md, in a shell."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs/cli.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = f'set -o pipefail; ckptcoord() {{ {shlex.quote(sys.executable)} -m ckptcoord.cli "$@"; }}; '


def _examples() -> list[tuple[str, str]]:
    found = []
    for block in BLOCK.findall(PAGE.read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found.append((command, expected))
    return found


@pytest.mark.parametrize(("command", "expected"), _examples())
def test_an_example_of_the_docs_does_what_it_shows(history, tmp_path, command, expected) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/gpt").symlink_to(history.root)

    run = subprocess.run(
        ["bash", "-c", SHELL + command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    pattern = re.escape(expected).replace(re.escape("..."), ".*?")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(pattern, run.stdout, re.DOTALL), run.stdout


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
