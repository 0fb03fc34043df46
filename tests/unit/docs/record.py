"""Writes what commands say into a page: `python -m tests.unit.docs.record docs/PAGE.md`.

Look at what has changed before you commit it: the page then says what the code does, right or not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.unit.docs.fastshell import FastShell
from tests.unit.docs.pages import Page, Step, fits, read_page
from tests.unit.docs.runner import Runner


class Recorder(Runner):
    """Takes what a command says in the place of what the page shows, unless that fits."""

    def __init__(self, page: Page, folder: Path, commands: Path) -> None:
        super().__init__(page, folder, commands)
        self.said: list[tuple[Step, str]] = []

    def check(self, step: Step, code: int, output: str) -> None:
        """Note it."""
        if not fits(step.shown, output):
            self.said.append((step, output))


def record(path: Path, commands: Path) -> None:
    """Run a page and rewrite it."""
    lines = path.read_text().splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        os.chdir(folder)
        recorder = Recorder(read_page(path), folder, commands)
        try:
            recorder.run()
        finally:
            for step, output in reversed(recorder.said):
                at = step.line + step.text.count("\n")
                shown = output.rstrip().splitlines()
                lines[at : at + len(step.shown.splitlines())] = [one.rstrip() for one in shown]
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    pages = [Path(word).resolve() for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as place:
        shell = FastShell(Path(place))
        try:
            shell.wait()
            for page in pages:
                record(page, shell.bin)
        finally:
            shell.close()
