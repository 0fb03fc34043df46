"""What a command says, and where: data on stdout, everything else on stderr.

No stream gets a token that this process knows of, nor stderr anything that looks like one.
With `--json`, stdout holds exactly one object, also for an error:
{"schema_version": 1, "command": "log", "data": ...} or {..., "error": {...}}.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from ckptcoord.cli.text import Painter
from ckptcoord.errors import StorageError, StorageFullError
from ckptcoord.redact import mask_known, redact, redact_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SCHEMA_VERSION = 1
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Output:
    """The streams of one run of a command.

    Args:
        command: its name, for the envelope; empty where none is known.
        as_json: write the envelope instead of text.

    Attributes:
        paint: colours for stdout.
        paint_note: colours for stderr.
        terminal: whether a person reads stdout.
        now: when the command began.
        broken: stdout cannot be written.
    """

    def __init__(self, command: str, *, as_json: bool) -> None:
        self.command = command
        self.as_json = as_json
        self.terminal = _is_terminal(sys.stdout)
        self.paint = Painter(enabled=wants_color(sys.stdout, os.environ))
        self.paint_note = Painter(enabled=wants_color(sys.stderr, os.environ))
        self.now = datetime.now(UTC)
        self.broken = False
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def can_show(self, text: str) -> bool:
        """Whether stdout's encoding has these characters."""
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True

    def lines(self, lines: Iterable[str]) -> None:
        """Data, for people or pipes; printable already."""
        self._write("".join(f"{line}\n" for line in lines))

    def data(self, data: object) -> None:
        """Data, for programs."""
        self._envelope({"data": data})

    def raw(self, part: memoryview) -> None:
        """Data, byte by byte as it is."""
        with self._failing():
            sys.stdout.buffer.write(part)

    def error(self, error: Mapping[str, object]) -> None:
        """An error, for programs."""
        self._envelope({"error": redact_all(dict(error))})

    def note(self, *lines: str) -> None:
        """What is no data: warnings, errors for people."""
        sys.stdout.flush()  # keeps the order where both streams are one
        sys.stderr.write(redact("".join(f"{line}\n" for line in lines)))
        sys.stderr.flush()

    def flush(self) -> None:
        """All data is out.

        Raises:
            BrokenPipeError: the reader has gone.
            StorageError: stdout is a file, and cannot be written.
        """
        self._write("")

    def _envelope(self, body: Mapping[str, object]) -> None:
        document = {"schema_version": SCHEMA_VERSION, "command": self.command or None, **body}
        indent = 2 if self.terminal else None
        self._write(json.dumps(document, indent=indent, ensure_ascii=True, allow_nan=False) + "\n")

    def _write(self, text: str) -> None:
        text = mask_known(text)
        if not self.can_show(text):
            text = text.encode(self._encoding, "backslashreplace").decode(self._encoding)
        with self._failing():
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.broken = True
            forget(sys.stdout)
            raise stdout_error(error) from error


def stdout_error(error: OSError) -> StorageError:
    """The typed error for stdout that cannot be written."""
    kind = StorageFullError if error.errno in _FULL else StorageError
    why = error.strerror or str(error)
    return kind(operation="write", path="stdout", why=why, errno=error.errno)


def forget(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter does not complain at its end."""
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def wants_color(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """https://no-color.org and https://force-color.org; a dumb terminal has no colours."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return environ["FORCE_COLOR"] != "0"
    return _is_terminal(stream) and environ.get("TERM", "dumb") != "dumb"


def _is_terminal(stream: TextIO) -> bool:
    return not stream.closed and stream.isatty()
