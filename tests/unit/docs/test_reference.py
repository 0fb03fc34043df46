"""The API page has every public name, and every page is in a table of contents."""

from __future__ import annotations

import re
from pathlib import Path

import ckptcoord

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    named = set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE))
    assert named >= set(ckptcoord.__all__)


def test_every_page_can_be_found_from_the_index() -> None:
    pages = {str(path.relative_to(DOCS))[:-3] for path in DOCS.rglob("*.md")}
    listed = {"index"}
    for index in ("index", "cookbook/index", "decisions"):
        for tree in re.findall(
            r"```{toctree}\n(.*?)```", (DOCS / f"{index}.md").read_text(), re.DOTALL
        ):
            for line in tree.splitlines():
                if line and not line.startswith(":"):
                    found = (DOCS / index).parent.glob(f"{line}.md")
                    listed |= {str(path.relative_to(DOCS))[:-3] for path in found}
    assert pages == listed
