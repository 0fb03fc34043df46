"""Each `ckptcoord ...` that any page names, run or not, is a command with these options."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ckptcoord.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INLINE = re.compile(r"`ckptcoord ([^`]+)`")
LINE = re.compile(r"^(?:\$ )?ckptcoord ((?:.*\\\n)*.*)$", re.MULTILINE)


def _named(page: Path) -> list[str]:
    text = page.read_text()
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL)
    found = [words for block in blocks for words in LINE.findall(block)]
    return found + INLINE.findall(text)


@cache
def _commands() -> dict[str, set[str]]:
    sys.path.insert(0, str(ROOT / "docs/_extensions"))
    try:
        from clireference import walk
    finally:
        sys.path.pop(0)
    return {name: _options(command) for name, command in walk("ckptcoord", get_command(app))}


def _options(command: Any) -> set[str]:
    context = command.context_class(command)
    return {word for one in command.get_params(context) for word in one.opts} | {"--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_and_options_that_there_are(page: Path) -> None:
    for said in _named(page):
        # Up to the command's own child, a pipe, another command or a comment.
        words = re.split(r"\s(?:--|\||\|\||&&|;|#|>)\s|\s*[|;&]|…|'.*?'", said)[0].split()
        if not words or words[0].startswith(("-", "COMMAND", "<")):
            continue
        known = _commands()
        name = f"ckptcoord {words[0].rstrip(',.')}"
        below = f"{name} {words[1].rstrip(',.')}" if len(words) > 1 else name
        command = below if below in known else name
        assert command in known, (page.name, said)
        for word in words:
            if re.match(r"--?[a-zA-Z]", word):
                option = re.sub(r"[=,.\])].*", "", word)
                assert option in known[command], (page.name, said, option)
