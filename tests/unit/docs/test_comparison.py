"""docs/comparison.md quotes docs/benchmarks.md, and names tests and commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/comparison.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text().replace("**", "")
FIGURES = re.findall(r"\d[\d.e-]* \([\d.e-]+ to [^)]+\)", PAGE)


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_with_its_spread_is_quoted(figure: str) -> None:
    assert figure in BENCHMARKS


def test_figures_without_a_spread_stand_there_too() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("|") and "`python bench" in row]
    assert rows
    for row in rows:
        cell = row.split("|")[2]
        for number in re.findall(r"\d+\.\d+", cell):
            assert number in BENCHMARKS, row


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", PAGE))))
def test_what_shows_a_claim_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


def test_sweeps_are_those_of_the_script() -> None:
    known = re.findall(r"^  ([\w-]+)\) module=", (ROOT / "scripts/sweep").read_text(), re.MULTILINE)
    assert set(re.findall(r"scripts/sweep ([\w-]+)", PAGE)) <= set(known)
