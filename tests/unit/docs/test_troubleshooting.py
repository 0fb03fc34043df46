"""docs/troubleshooting.md has an entry for each error: its classes, its exit code and its words."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path

from ckptcoord import errors
from ckptcoord.errors import CkptError

PAGE = (Path(__file__).parents[3] / "docs/troubleshooting.md").read_text()
HOME = CkptError.__module__
ENTRY = re.compile(
    r"^### (CC\d{3}): (.*)\n\n\*([\w, ]+), exit code (\d+)\.\*", re.MULTILINE | re.DOTALL
)


def _classes() -> dict[str, list[type[CkptError]]]:
    found = defaultdict(list)
    for one in vars(errors).values():
        if inspect.isclass(one) and issubclass(one, CkptError):
            found[one.code].append(one)
    return found


def _entries() -> list[tuple[str, str, str, str]]:
    entries = [ENTRY.match(part) for part in re.split(r"(?=^### )", PAGE, flags=re.MULTILINE)]
    return [entry.groups() for entry in entries if entry]


def test_every_error_has_one_entry_with_its_classes_and_exit_code() -> None:
    classes = _classes()
    entries = _entries()
    assert sorted(code for code, *_ in entries) == sorted(classes)
    for code, _, names, exit_code in entries:
        assert sorted(names.split(", ")) == sorted(one.__name__ for one in classes[code])
        assert {one.exit_code for one in classes[code]} == {int(exit_code)}


def test_what_an_entry_quotes_stands_in_the_error() -> None:
    classes = _classes()
    for code, title, *_ in _entries():
        if "…" not in title:
            continue  # a description: the text is the cause's
        bases = {base for one in classes[code] for base in one.__mro__ if base.__module__ == HOME}
        source = " ".join("".join(inspect.getsource(one) for one in bases).split())
        source = re.sub(r'" f?"', "", source)  # a text in several pieces is one
        for words in filter(None, (part.strip() for part in title.split("…"))):
            assert words in source, (code, words)
