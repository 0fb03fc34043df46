"""How far a long command has come, on stderr: a bar on a terminal, elsewhere a line at times."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptcoord.cli.text import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptcoord.cli.output import Output

EVERY_S = 10.0


@contextmanager
def progress(
    out: Output,
    what: str,
    total_bytes: int,
    *,
    every_s: float = EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """A function to be called with the bytes that were done since its last call.

    Args:
        out: where notes go.
        what: what is being done: `verify`.
        total_bytes: how much there is to do.
        every_s: between lines, where there is no terminal.
        clock: in seconds.
    """
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with _bar(what, total_bytes) as advance:
            yield advance
        return
    done, said_at = 0, clock()

    def line(size_bytes: int) -> None:
        nonlocal done, said_at
        done += size_bytes
        if clock() - said_at >= every_s:
            said_at = clock()
            percent = 100 * done // max(total_bytes, 1)
            out.note(f"{what}: {bytes_text(done)} of {bytes_text(total_bytes)} ({percent} %)")

    yield line


@contextmanager
def _bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console  # late: only a terminal pays for it
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
