"""Values as people read them. Nothing that comes out of here moves a terminal's cursor."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.digest import Digest

_SHORT_HEX = 12
_AGES = (
    (365 * 86400, "year"),
    (30 * 86400, "month"),
    (7 * 86400, "week"),
    (86400, "day"),
    (3600, "hour"),
    (60, "minute"),
    (1, "second"),
)


class Style(StrEnum):
    """SGR parameters."""

    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"
    CYAN = "36"


class Painter:
    """Colours text, or leaves it as it is."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    def __call__(self, text: str, *styles: Style) -> str:
        """The text in these styles; it must be printable already."""
        if not self._enabled or not text:
            return text
        return f"\x1b[{';'.join(styles)}m{text}\x1b[0m"


def printable(text: str) -> str:
    r"""One line that shows every character: `\x1b` for an escape, `\u202e` for an override.

    Names and messages come from whoever wrote the repository; raw, they could clear the screen,
    forge lines or type into the shell.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def subject(message: str, limit: int = 100) -> str:
    """The first line of a message, with `...` where there is more."""
    first, _, rest = message.strip().partition("\n")
    shown = clipped(printable(first.rstrip()), limit)
    return f"{shown} ..." if rest.strip() and not shown.endswith("...") else shown


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters, with `...` where something was cut."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def bytes_text(size_bytes: int) -> str:
    """`17 B`, `1.2 GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if round(size, 1) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} EiB"


def seconds_text(seconds: float) -> str:
    """`0.4 ms`, `12 ms`, `1.23 s`, `1,234 s`."""
    if round(seconds, 3) < 1:
        return f"{seconds * 1000:.{0 if seconds >= 0.00995 else 1}f} ms"
    return f"{seconds:.2f} s" if seconds < 99.995 else f"{seconds:,.0f} s"


def ratio_text(size_bytes: int, stored_bytes: int) -> str:
    """Bytes of state for each byte stored: `1.52`, or `-` where nothing is stored."""
    return f"{size_bytes / stored_bytes:.2f}" if stored_bytes else "-"


def short(digest: Digest | None) -> str:
    """The first digits of a digest, enough to compare by eye."""
    return "-" if digest is None else digest.hex[:_SHORT_HEX]


def when(timestamp: str, now: datetime) -> str:
    """`3 hours ago (2026-02-03 04:05:06 UTC)`; a time that is none stays as it is."""
    moment = _moment(timestamp)
    return printable(timestamp) if moment is None else f"{_ago(moment, now)} ({_utc(moment)})"


def ago(timestamp: str, now: datetime) -> str:
    """`3 hours ago`; a time that is none stays as it is."""
    moment = _moment(timestamp)
    return printable(timestamp) if moment is None else _ago(moment, now)


def _moment(timestamp: str) -> datetime | None:
    try:
        return datetime.fromisoformat(timestamp).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _utc(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _ago(moment: datetime, now: datetime) -> str:
    return _age((now - moment).total_seconds())


def _age(seconds: float) -> str:
    if seconds < -60:
        return "in the future"
    for length_s, unit in _AGES:
        count = int(seconds // length_s)
        if count > 0:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """`eval_loss 2.5, loss 2.31`, by name."""
    return ", ".join(f"{printable(name)} {value:.6g}" for name, value in sorted(metrics.items()))


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def aligned(rows: list[tuple[str, ...]], *, right: frozenset[int] = frozenset()) -> list[list[str]]:
    """The cells of a table, each padded to its column's width; those in `right` from the left.

    The last column is not padded.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        [
            cell.rjust(width) if at in right else cell if at == last else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
