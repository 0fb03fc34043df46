"""Every page of the docs runs as printed: see pages.py for how a page is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.unit.docs.pages import read_page
from tests.unit.docs.runner import ROOT, Runner

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): read_page(path)
    for path in sorted(DOCS.rglob("*.md"))
    if path.parent.name != "adr"
}
# Blocks that a test of their own runs: which.
RUN_APART = {
    "gradient-desc": "tests/unit/docs/test_migration.py",
    "pip": "tests/unit/docs/test_install.py",
    "pip onnx": "tests/unit/docs/test_install.py",
    "slurm": "tests/unit/trainers/test_preemption_docs.py",
}


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.steps])
def test_a_page_runs_as_printed(
    name: str, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Runner(PAGES[name], folder, commands).run()


def test_what_is_not_run_here_is_run_by_another_test() -> None:
    found = [name for page in PAGES.values() for name in page.run_apart]
    assert sorted(found) == sorted(RUN_APART)
    for name, path in RUN_APART.items():
        assert name in (ROOT / path).read_text()
