"""Runs a page of the docs: see pages.py for how it is read."""

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

from tests.unit.cli.conftest import Builder
from tests.unit.cli.conftest import _write_history as write_history
from tests.unit.docs.pages import Page, Step, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]


class Runner:
    """Runs a page from top to bottom."""

    def __init__(self, page: Page, folder: Path, commands: Path) -> None:
        self._page, self._folder = page, folder
        self._history = folder.parent / "history"
        if page.apart:
            write_history(Builder(self._history))
        self._scope: dict[str, Any] = {"__name__": "page"}
        kept = dict(os.environ)  # noqa: TID251 (for children)
        self._environ = kept | {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{kept['PATH']}",
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
        sys.path.insert(0, str(self._folder))  # for what the page has written there
        known = set(sys.modules)
        try:
            exec(compile(code, str(self._page.path), "exec"), self._scope)
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.path.remove(str(self._folder))
            self._forget(set(sys.modules) - known)

    def _forget(self, names: set[str]) -> None:
        for name in names:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(self._folder)):
                del sys.modules[name]

    def _bash(self, step: Step) -> None:
        code, output = self.shell(step.text)
        assert code == 0, f"{self._page.path.name}:{step.line}: {output}"

    def _console(self, step: Step) -> None:
        if self._page.apart:
            self._folder = Path(tempfile.mkdtemp(dir=self._folder.parent))
            shutil.copytree(self._history, self._folder / "runs/gpt")
        code, output = self.shell(step.text)
        self.check(step, code, output)

    def check(self, step: Step, code: int, output: str) -> None:
        """A command has said this.

        Raises:
            AssertionError: the page shows something else.
        """
        where = f"{self._page.path.name}:{step.line}: $ {step.text}\nexit code {code}\n"
        if not fits(step.shown, output):
            lines = difflib.ndiff(step.shown.splitlines(), output.splitlines())
            raise AssertionError(where + "\n".join(lines))
        assert (code != 0) == ("error[" in step.shown and "||" not in step.text), where + output

    def shell(self, command: str) -> tuple[int, str]:
        """The exit code, and what a terminal of 100 columns would show, or a pipe gets."""
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
