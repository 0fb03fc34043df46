"""Every page of the docs runs as printed: see pages.py for how a page is read."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import termios
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.cli.conftest import Builder
from tests.unit.cli.conftest import _write_history as write_history
from tests.unit.docs.fastshell import FastShell
from tests.unit.docs.pages import Page, Step, fits, read_page

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): read_page(path)
    for path in sorted(DOCS.rglob("*.md"))
    if path.parent.name != "adr"
}
# Blocks that are shown and not run, each with its reason.
NOT_RUN: dict[str, str] = {}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastShell]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        made = FastShell(Path(folder))
        try:
            made.wait()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda _: None)
        build = Builder(tmp_path_factory.mktemp("history") / "run")
        write_history(build)
    return build.root


class Runner:
    """Runs a page from top to bottom."""

    def __init__(self, page: Page, folder: Path, shell: FastShell, history: Path) -> None:
        self._page, self._folder, self._history = page, folder, history
        self._scope: dict[str, Any] = {"__name__": "page"}
        kept = dict(os.environ)  # noqa: TID251 (for children)
        self._environ = kept | {
            "PATH": f"{shell.bin}:{Path(sys.executable).parent}:{kept['PATH']}",
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / ".state"),
            "XDG_CONFIG_HOME": str(folder / ".config"),
            "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
            "REPOSITORY": str(ROOT),
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "TERM": "dumb",
        }

    def run(self) -> None:
        for step in self._page.steps:
            getattr(self, f"_{step.kind}")(step)

    def _file(self, step: Step) -> None:
        path = self._folder / step.name.removeprefix("+")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if step.name.startswith("+") else "w") as file:
            file.write(step.text)

    def _python(self, step: Step) -> None:
        # Its lines have the numbers that they have on the page.
        code = "\n" * step.line + textwrap.dedent(step.text)
        try:
            exec(compile(code, str(self._page.path), "exec"), self._scope)
        except SystemExit as end:
            if end.code:
                raise

    def _bash(self, step: Step) -> None:
        code, output = self._shell(step.text)
        assert code == 0, f"{self._page.path.name}:{step.line}: {output}"

    def _console(self, step: Step) -> None:
        if self._page.apart:
            self._folder = Path(tempfile.mkdtemp(dir=self._folder.parent))
            shutil.copytree(self._history, self._folder / "runs/gpt")
        code, output = self._shell(step.text)
        where = f"{self._page.path.name}:{step.line}: $ {step.text}\nexit code {code}\n"
        if not fits(step.shown, output):
            lines = difflib.ndiff(step.shown.splitlines(), output.splitlines())
            pytest.fail(where + "\n".join(lines), pytrace=False)
        assert (code != 0) == ("error[" in step.shown and "||" not in step.text), where + output

    def _shell(self, command: str) -> tuple[int, str]:
        """Exit code and what a terminal of 100 columns would show, or a pipe gets."""
        ours, theirs = os.pipe() if self._page.apart else _terminal()
        child = subprocess.Popen(
            ["bash", "-c", f"set -o pipefail\n{command}"],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        output = b"".join(_parts(ours))
        os.close(ours)
        return child.wait(timeout=10), output.decode()


def _terminal() -> tuple[int, int]:
    ours, theirs = os.openpty()
    modes = termios.tcgetattr(theirs)
    modes[1] &= ~termios.OPOST  # no carriage returns
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    termios.tcsetwinsize(theirs, (50, 100))
    return ours, theirs


def _parts(file: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(file, 1 << 16)
        except OSError:  # Linux says EIO when a terminal's last program has gone
            return
        if not part:
            return
        yield part


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.steps])
def test_a_page_runs_as_printed(
    name: str,
    shell: FastShell,
    history: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Runner(PAGES[name], folder, shell, history).run()


def test_what_is_not_run_is_known_by_name() -> None:
    found = [name for page in PAGES.values() for name in page.not_run]
    assert sorted(found) == sorted(NOT_RUN)
