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
# Blocks that are shown and not run, each with its reason.
NOT_RUN = {
    "lightning": "Lightning is not installed for the tests: it is no dependency, and large",
    "lightning callback": "likewise",
    "hf-trainer": "transformers.Trainer trains its own way; that it is left is the point",
    "forgather": "Forgather is in no package index",
    "gradient-desc": "gradient-desc pins its own torch",
    "pip": "what it installs is what runs the tests",
    "pip onnx": "likewise",
    "torchrun job": "it runs for hours; tests/distributed has it, and its signals",
    "slurm": "test_preemption_docs.py runs it, beside a Slurm of its own",
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


def test_what_is_not_run_is_known_by_name() -> None:
    found = [name for page in PAGES.values() for name in page.not_run]
    assert sorted(found) == sorted(NOT_RUN)
