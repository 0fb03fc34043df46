"""What a page of the docs shows, as things to run in order.

A page runs from top to bottom in one empty folder, with one Python scope:

- `console` blocks: each `$ ` line is run by bash, and what stands below it is what a terminal shows
  (stdout and stderr; `...` stands for anything). A command fails if and only if an `error[` line is
  shown. A line that ends in a backslash goes on in the next.
- `bash` blocks: run whole, by bash; what they say is not looked at.
- `python` blocks: run.
- blocks of other languages: not run.

HTML comments, which no renderer shows, say the rest:

- `<!-- run: bash` or `<!-- run: python`, and code until `-->`: hidden set-up.
- `<!-- file: train.py -->`: the next block is written to that file, and not run; with
  `+train.py` it is appended to it. With text until `-->` that is what is written.
- `<!-- run apart: NAME -->`: not the next block, either: `test_pages.py` says which test runs it.
- `<!-- varies -->`: what the commands of the next block say is another at each run.

On the page of the command line, each command runs in a folder of its own, with the small history of
`tests/unit/cli/conftest.py` as `runs/gpt`, and its output goes into a pipe.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_TOKEN = re.compile(
    r"^<!-- (?P<word>run apart|run|file|varies):? ?(?P<said>.*?)(?:\n(?P<code>.*?))??[ \n]?-->$"
    r"|^(?P<fence>`{3,})(?P<language>[\w-]*)[^\n]*\n(?P<block>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do.

    Attributes:
        kind: `console`, `bash`, `python` or `file`.
        text: a command, code, or what the file holds.
        line: where it stands on the page, from 1.
        shown: of a command, what the page shows below it.
        name: of a file.
    """

    kind: str
    text: str
    line: int
    shown: str = ""
    name: str = ""


@dataclass(slots=True, kw_only=True)
class Page:
    """A page of the docs.

    Attributes:
        steps: what to run, in order.
        run_apart: the names of blocks that other tests run.
        apart: each command has a history of its own.
    """

    path: Path
    steps: list[Step] = field(default_factory=list)
    run_apart: list[str] = field(default_factory=list)
    apart: bool = False


def read_page(path: Path) -> Page:
    """Parse a page.

    Raises:
        ValueError: a comment is of no kind that there is.
    """
    text, page = path.read_text(encoding="utf-8"), Page(path=path, apart=path.name == "cli.md")
    said, name = "", ""  # by the comment before a block
    for found in _TOKEN.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if (word := found["word"]) is None:
            if said == "run apart":
                page.run_apart.append(name)
            elif said == "file":
                page.steps.append(Step(kind="file", text=found["block"], line=line, name=name))
            else:
                steps = _steps(found["language"], found["block"], line)
                page.steps += [replace(one, shown="...") for one in steps] if said else steps
            said = name = ""
        elif word == "run":
            kind = "python" if found["said"] == "python" else "bash"
            page.steps.append(Step(kind=kind, text=found["code"] or "", line=line))
        elif word == "file" and found["code"] is not None:
            page.steps.append(
                Step(kind="file", text=found["code"] + "\n", line=line, name=found["said"])
            )
        else:
            said, name = word, found["said"]
    return page


def _steps(language: str, block: str, line: int) -> list[Step]:
    if language in {"python", "bash"}:
        return [Step(kind=language, text=block, line=line)]
    if language != "console":
        return []
    steps = []
    for found in re.finditer(r"^\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)", block, re.MULTILINE):
        at = line + 1 + block.count("\n", 0, found.start())
        steps.append(Step(kind="console", text=found[1], line=at, shown=found[2]))
    return steps


_PASSING = (  # what is another at each run
    (re.compile(r"just now|\d+ \w+ ago"), "some time ago"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "2026-01-01 00:00:00"),
    (re.compile(r" {2,}"), "  "),  # columns are as wide as what is in them
    (re.compile(r" +$", re.MULTILINE), ""),
)


_DECIMAL = re.compile(r"\d+\\\.\d+(?:e\\?-\d+)?")  # in a pattern


def fits(shown: str, output: str) -> bool:
    """Whether this is what the page shows.

    `...` there stands for anything. Ages are all alike, and so are numbers with a decimal point
    that are less than a tenth apart: other processors add in another order.
    """
    return _matches(shown.rstrip(), output.rstrip()) or _matches(_settled(shown), _settled(output))


def _matches(shown: str, output: str) -> bool:
    pattern = re.escape(shown).replace(re.escape("..."), ".*?")
    numbers = [float(one.replace("\\", "")) for one in _DECIMAL.findall(pattern)]
    pattern = _DECIMAL.sub(r"(\\d+\\.\\d+(?:e-\\d+)?)", pattern)
    found = re.fullmatch(pattern, output, re.DOTALL)
    return found is not None and all(
        math.isclose(one, float(other), rel_tol=0.1)
        for one, other in zip(numbers, found.groups(), strict=True)
    )


def _settled(text: str) -> str:
    for passing, settled in _PASSING:
        text = passing.sub(settled, text)
    return text.rstrip()
