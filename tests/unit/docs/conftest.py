"""A shell whose commands start at once, for all pages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.unit.docs.fastshell import FastShell

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        shell = FastShell(Path(folder))
        try:
            shell.wait()
            yield shell.bin
        finally:
            shell.close()
