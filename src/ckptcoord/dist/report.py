"""What a save cost: the timer that goes with it through its threads, and the report at its end.

All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from ckptcoord.core.entries import MAX_SECONDS, QUEUE_DEPTH, SLOWEST_RANK, timestamp_of
from ckptcoord.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from ckptcoord.core.jsonio import JsonValue

UNKNOWN_STEP = -1
_log = logging.getLogger("ckptcoord")

Point: TypeAlias = Literal["staged", "opened", "encoded", "written", "voted", "committed"]
# Each follows the one before; "staged" does not stand here, since the rounds do not wait for it.
_ROUNDS: tuple[Point, ...] = ("opened", "encoded", "written", "voted", "committed")


class Slowest(NamedTuple):
    """The rank that wrote longest, and for how many seconds."""

    rank: int
    write_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """How one save went, as one rank saw it.

    Attributes:
        checkpoint_id: what was saved; empty where what this rank asked for was itself wrong.
        path: its folder in the repository; empty where nothing was committed.
        step: of training; UNKNOWN_STEP where the id is empty.
        ok: whether it was committed.
        error: why it was not, in words; empty where it was.
        background: whether training went on meanwhile.
        called_at: when the save was called, by the coordinator's clock, aware.
        stall_s: for how long the training thread was held up, in the call and in the hook before
            the optimizer's step.
        waited_s: for how long of that it waited for room in the queue or in memory; where there is
            too little memory for copies, until now.
        staged_s: from the call until all that this rank writes was copied. Like the five after it,
            None where the save did not come so far, or has no such point on this rank, as where
            nothing is copied.
        opened_s: from the call until all ranks had agreed to begin.
        encoded_s: from the call until this rank had coded all that it codes, and had handed it to
            the storage.
        written_s: from the call until this rank's files were coded, written and durable.
        voted_s: from the call until all ranks' votes were in, which rank 0 alone sees.
        committed_s: from the call until this rank knew of the commit.
        total_s: from the call until this report.
        size_bytes: of the whole checkpoint's state before any coding; 0 where it is not known.
        stored_bytes: of the whole checkpoint's files; 0 where it is not known.
        queue_depth: saves unfinished on this rank at the call, this one among them.
        rank: whose report this is.
        slowest: who wrote longest, where that is known.
    """

    checkpoint_id: str
    path: str = ""
    step: int
    ok: bool
    error: str = ""
    background: bool
    called_at: datetime
    stall_s: float
    waited_s: float = 0.0
    staged_s: float | None = None
    opened_s: float | None = None
    encoded_s: float | None = None
    written_s: float | None = None
    voted_s: float | None = None
    committed_s: float | None = None
    total_s: float
    size_bytes: int = 0
    stored_bytes: int = 0
    queue_depth: int = 1
    rank: int
    slowest: Slowest | None = None

    @property
    def ratio(self) -> float | None:
        """Bytes of state for each byte stored; None where nothing is known to be stored."""
        return self.size_bytes / self.stored_bytes if self.stored_bytes else None

    def _seconds(self) -> dict[str, float | None]:
        return {
            "stall_s": self.stall_s,
            "waited_s": self.waited_s,
            "staged_s": self.staged_s,
            "opened_s": self.opened_s,
            "encoded_s": self.encoded_s,
            "written_s": self.written_s,
            "voted_s": self.voted_s,
            "committed_s": self.committed_s,
            "total_s": self.total_s,
        }

    def scalars(self) -> dict[str, float]:
        """What is known, by names that TensorBoard groups: `ckptcoord/stall_s` and so on."""
        known = {
            "ok": float(self.ok),
            **self._seconds(),
            "slowest_write_s": self.slowest.write_s if self.slowest else None,
            "size_bytes": self.size_bytes or None,
            "stored_bytes": self.stored_bytes or None,
            "ratio": self.ratio,
            "queue_depth": self.queue_depth,
        }
        return {
            f"ckptcoord/{name}": float(value) for name, value in known.items() if value is not None
        }

    def to_json(self) -> dict[str, JsonValue]:
        """All of it as JSON values, with the ratio; null where something is not known."""
        slowest = self.slowest
        return {
            "checkpoint_id": self.checkpoint_id,
            "path": self.path,
            "step": self.step,
            "ok": self.ok,
            "error": self.error,
            "background": self.background,
            "called_at": timestamp_of(self.called_at),
            **self._seconds(),
            "size_bytes": self.size_bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "queue_depth": self.queue_depth,
            "rank": self.rank,
            "slowest": {"rank": slowest.rank, "write_s": slowest.write_s} if slowest else None,
        }


class SaveTimer:
    """Follows one save from the call on; any thread may mark a point.

    Args:
        clock: tells when the call was, aware.
        blocking: whether the training thread is held up for as long as the save goes on.
        monotonic: seconds from any beginning.
    """

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        blocking: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._blocking = blocking
        self._began = monotonic()
        self._called_at = clock()
        self._lock = Lock()
        self._marks: dict[Point, float] = {}
        self._stall_s = 0.0
        self._waited_s = 0.0
        self._blocked_at_s: float | None = None
        self._more_s: Callable[[], float] = lambda: 0.0

    def block(self, *, waited_s: float = 0.0) -> None:
        """There is no room for copies: the training thread waits until the end, from here on.

        Args:
            waited_s: for how long it has waited for room before.
        """
        with self._lock:
            self._blocking = True
            self._waited_s += max(0.0, waited_s)
            self._blocked_at_s = self._elapsed_s()

    def follow(self, stalled_s: Callable[[], float]) -> None:
        """For how long the training thread is held up elsewhere, too, may still grow."""
        self._more_s = stalled_s

    def mark(self, point: Point) -> None:
        """The save has come to this point now.

        A round that is marked again is that of another try: what came after it in the one before
        is forgotten.
        """
        with self._lock:
            after_s = self._elapsed_s()
            self._marks[point] = after_s
            if point in _ROUNDS:
                for later in _ROUNDS[_ROUNDS.index(point) + 1 :]:
                    self._marks.pop(later, None)

    def stall(self, seconds: float, *, waited_s: float = 0.0) -> None:
        """The training thread was held up for so long again, `waited_s` of it for room."""
        with self._lock:
            self._stall_s += max(0.0, seconds)
            self._waited_s += max(0.0, waited_s)

    def timing(self, slowest: Slowest | None = None, *, queue_depth: int = 1) -> dict[str, float]:
        """What a commit entry says of it, which is about to be appended; to the microsecond."""
        with self._lock:
            seconds = {"stall_s": self._stalled_s(), "waited_s": self._all_waited_s()}
            seconds |= {f"{point}_s": at for point, at in self._marks.items()}
            seconds["committed_s"] = self._elapsed_s()
        known: dict[str, float] = {
            name: min(round(value, 6), MAX_SECONDS) for name, value in seconds.items()
        }
        known[QUEUE_DEPTH] = queue_depth
        if slowest is not None:
            known[SLOWEST_RANK] = slowest.rank
        return known

    def report(  # noqa: PLR0913 (each is a field of the report)
        self,
        *,
        checkpoint_id: str,
        step: int,
        rank: int,
        background: bool,
        path: str = "",
        error: BaseException | None = None,
        size_bytes: int = 0,
        stored_bytes: int = 0,
        queue_depth: int = 1,
        slowest: Slowest | None = None,
    ) -> SaveReport:
        """What has come of the save; it was committed unless there is an error."""
        with self._lock:
            marks, stall_s = dict(self._marks), self._stalled_s()
            waited_s = self._all_waited_s()
            total_s = self._elapsed_s()
        return SaveReport(
            checkpoint_id=checkpoint_id,
            path=path,
            step=step,
            ok=error is None,
            error="" if error is None else redact(f"{type(error).__name__}: {error}"),
            background=background,
            called_at=self._called_at,
            stall_s=stall_s,
            waited_s=waited_s,
            staged_s=marks.get("staged"),
            opened_s=marks.get("opened"),
            encoded_s=marks.get("encoded"),
            written_s=marks.get("written"),
            voted_s=marks.get("voted"),
            committed_s=marks.get("committed"),
            total_s=total_s,
            size_bytes=size_bytes,
            stored_bytes=stored_bytes,
            queue_depth=queue_depth,
            rank=rank,
            slowest=slowest,
        )

    def _elapsed_s(self) -> float:
        return max(0.0, self._monotonic() - self._began)

    def _all_waited_s(self) -> float:
        since_s = self._blocked_at_s
        return self._waited_s + (0.0 if since_s is None else self._elapsed_s() - since_s)

    def _stalled_s(self) -> float:
        return self._elapsed_s() if self._blocking else self._stall_s + self._more_s()


def watched(call: Callable[[], object], what: str, *, background: bool) -> None:
    """Run what follows a save: what it raises is logged, and changes nothing of the save.

    Args:
        call: by whoever watches.
        what: it is, for the log.
        background: there is no caller whom an interrupt is meant for.
    """
    try:
        call()
    except BaseException as error:
        if not (background or isinstance(error, Exception)):
            raise
        try:
            _log.exception("%s failed", what)
        except Exception:  # noqa: BLE001 (a handler of the log is what fails)
            traceback.print_exc()


def log_report(report: SaveReport) -> None:
    """One line on the logger `ckptcoord`: INFO, or WARNING with the error of a save that failed.

    The record's attribute `ckptcoord` has all of the report, for formatters that write JSON.
    """
    extra = {"ckptcoord": report.to_json()}
    if report.ok:
        _log.info("%s", _line(report), extra=extra)
    else:
        what = report.checkpoint_id or "a checkpoint"
        _log.warning("%s was not saved: %s", what, report.error, extra=extra)


def _line(report: SaveReport) -> str:
    parts = [f"stall {report.stall_s:.3f} s"]
    for name, after_s in (
        ("staged", report.staged_s),
        ("written", report.written_s),
        ("committed", report.committed_s),
    ):
        if after_s is not None:
            parts.append(f"{name} after {after_s:.3f} s")
    if report.ratio is not None:
        parts.append(f"{report.stored_bytes:,} bytes stored, ratio {report.ratio:.2f}")
    if report.slowest is not None:
        parts.append(f"rank {report.slowest.rank} wrote longest, {report.slowest.write_s:.3f} s")
    return f"{report.checkpoint_id} saved: {', '.join(parts)}"
