"""What a save cost: points, stalls, the report, its line in the log."""

from __future__ import annotations

import json
import logging
import math
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import MAX_ENTRY_BYTES, SECONDS, Commit, Entry
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.dist.report import SaveReport, SaveTimer, Slowest, log_report
from ckptcoord.dist.request import SaveRequest
from ckptcoord.errors import ConfigError, StorageFullError

CALLED_AT = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
ID = CheckpointId(BranchName(), 500)


class Watch:
    """A monotonic clock that is set by hand."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def __call__(self) -> float:
        return self.at_s


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def timer(watch):
    return SaveTimer(lambda: CALLED_AT, monotonic=watch)


def report_of(timer, **changes):
    told = {
        "checkpoint_id": "checkpoint-500",
        "step": 500,
        "rank": 1,
        "background": True,
        "path": "checkpoint-500",
        "size_bytes": 4000,
        "stored_bytes": 1000,
        "queue_depth": 2,
        "slowest": Slowest(3, 0.75),
    }
    return timer.report(**told | changes)


def whole(timer, watch):
    timer.stall(0.125)
    for point, at_s in (
        ("opened", 0.25),
        ("staged", 0.5),
        ("written", 1.0),
        ("voted", 1.5),
        ("committed", 2.0),
    ):
        watch.at_s = 1000 + at_s
        timer.mark(point)
    watch.at_s = 1002.25
    return report_of(timer)


def test_each_point_is_told_from_the_call_on(timer, watch):
    report = whole(timer, watch)

    assert report == SaveReport(
        checkpoint_id="checkpoint-500",
        path="checkpoint-500",
        step=500,
        ok=True,
        background=True,
        called_at=CALLED_AT,
        stall_s=0.125,
        staged_s=0.5,
        opened_s=0.25,
        written_s=1.0,
        voted_s=1.5,
        committed_s=2.0,
        total_s=2.25,
        size_bytes=4000,
        stored_bytes=1000,
        queue_depth=2,
        rank=1,
        slowest=Slowest(3, 0.75),
    )
    assert report.ratio == 4.0


def test_stalls_add_up_over_threads(timer):
    threads = [
        threading.Thread(
            target=lambda: [timer.stall(0.5, waited_s=0.25) for _ in range(100)]  # exact in binary
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    report = report_of(timer)

    assert (report.stall_s, report.waited_s) == (200.0, 100.0)


def test_a_blocking_save_stalls_for_as_long_as_it_takes(watch):
    timer = SaveTimer(lambda: CALLED_AT, blocking=True, monotonic=watch)
    watch.at_s += 3.0

    assert report_of(timer, background=False).stall_s == 3.0
    assert timer.timing(queue_depth=2) == {
        "stall_s": 3.0,
        "waited_s": 0.0,
        "committed_s": 3.0,
        "queue_depth": 2,
    }


def test_another_try_forgets_the_rounds_of_the_one_before_and_keeps_what_was_staged(timer, watch):
    whole(timer, watch)
    watch.at_s = 1005.0
    timer.mark("opened")

    report = report_of(timer)

    assert (report.opened_s, report.staged_s) == (5.0, 0.5)
    assert (report.written_s, report.voted_s, report.committed_s) == (None, None, None)


def test_a_failed_save_says_why_and_how_far_it_came(timer, watch):
    watch.at_s += 0.5
    timer.mark("opened")

    error = StorageFullError(operation="write", path="model.safetensors", why="no space")
    report = report_of(
        timer, error=error, path="", size_bytes=0, stored_bytes=0, slowest=None, background=False
    )

    assert not report.ok
    assert report.error.startswith("StorageFullError: ")
    assert report.scalars() == {
        "ckptcoord/ok": 0.0,
        "ckptcoord/stall_s": 0.0,
        "ckptcoord/waited_s": 0.0,
        "ckptcoord/opened_s": 0.5,
        "ckptcoord/total_s": 0.5,
        "ckptcoord/queue_depth": 2.0,
    }


def test_scalars_are_floats_of_what_is_known(timer, watch):
    assert whole(timer, watch).scalars() == {
        "ckptcoord/ok": 1.0,
        "ckptcoord/stall_s": 0.125,
        "ckptcoord/waited_s": 0.0,
        "ckptcoord/staged_s": 0.5,
        "ckptcoord/opened_s": 0.25,
        "ckptcoord/written_s": 1.0,
        "ckptcoord/voted_s": 1.5,
        "ckptcoord/committed_s": 2.0,
        "ckptcoord/total_s": 2.25,
        "ckptcoord/slowest_write_s": 0.75,
        "ckptcoord/size_bytes": 4000.0,
        "ckptcoord/stored_bytes": 1000.0,
        "ckptcoord/ratio": 4.0,
        "ckptcoord/queue_depth": 2.0,
    }


def test_the_json_holds_every_field(timer, watch):
    report = whole(timer, watch)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert document.keys() == {*SaveReport.__dataclass_fields__, "ratio"}
    assert document["called_at"] == "2026-02-03T04:05:06Z"
    assert document["slowest"] == {"rank": 3, "write_s": 0.75}
    assert document["ratio"] == 4.0
    assert replace(report, slowest=None, stored_bytes=0).to_json()["slowest"] is None
    assert replace(report, stored_bytes=0).ratio is None


@given(
    stalls=st.lists(st.floats(allow_nan=False)),
    marks=st.lists(
        st.tuples(
            st.sampled_from(["staged", "opened", "written", "voted", "committed"]),
            st.floats(-1e12, 1e12),
        )
    ),
    rank=st.integers(0, 999_999),
)
def test_a_commit_entry_can_always_hold_what_the_timer_knows(stalls, marks, rank):
    watch = Watch()
    timer = SaveTimer(lambda: CALLED_AT, monotonic=watch)
    for seconds in stalls:
        timer.stall(seconds)
    for point, at_s in marks:
        watch.at_s = at_s
        timer.mark(point)

    timing = timer.timing(Slowest(rank, 1.0))

    commit = Commit(
        writer="a" * 32,
        checkpoint_id=ID,
        path=str(ID),
        manifest_digest=Digest(bytes(32)),
        epoch=1,
        attempt="b" * 32,
        size_bytes=1,
        stored_bytes=1,
        timing=timing,
    )
    entry = Entry(number=1, timestamp="2026-02-03T04:05:06Z", body=commit)
    assert Entry.parse(entry.to_bytes(), path="e") == entry
    assert timing["slowest_rank"] == rank
    assert all(math.isfinite(number) for number in timing.values())


def test_a_request_leaves_room_for_the_times_of_its_save():
    def fits(letters: int) -> bool:
        try:
            SaveRequest(checkpoint_id=ID, metrics=dict.fromkeys(names(letters), 0.5))
        except ConfigError:
            return False
        return True

    low, high = 0, MAX_ENTRY_BYTES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)

    largest = Commit(
        writer="a" * 32,
        checkpoint_id=ID,
        path=f"{ID}.01234567",
        manifest_digest=Digest(bytes(32)),
        epoch=2**60,
        attempt="b" * 32,
        parent=CheckpointId(BranchName("x" * 100), 10**14),
        size_bytes=2**60,
        stored_bytes=2**60,
        metrics=dict.fromkeys(names(low), 0.5),
        replaces=f"{ID}.01234567",
        timing={
            **dict.fromkeys(SECONDS, 1.2345678901234567e-300),
            "slowest_rank": 999_999,
            "queue_depth": 64,
        },
    )
    entry = Entry(number=2**60, timestamp="2000-01-01T00:00:00.000000Z", body=largest)
    assert MAX_ENTRY_BYTES - 200 < len(entry.to_bytes()) <= MAX_ENTRY_BYTES


def names(letters: int) -> list[str]:
    """Names of metrics with so many letters in all."""
    full, rest = divmod(letters, 1000)
    return [f"{at:04d}".ljust(1000, "x") for at in range(full)] + (["y" * rest] if rest else [])


# --- on the logger -------


def test_a_save_is_one_line_with_all_of_it_as_an_attribute(timer, watch, caplog):
    report = whole(timer, watch)
    with caplog.at_level(logging.INFO, logger="ckptcoord"):
        log_report(report)

    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ckptcoord", logging.INFO)
    assert record.getMessage() == (
        "checkpoint-500 saved: stall 0.125 s, staged after 0.500 s, written after 1.000 s, "
        "committed after 2.000 s, 1,000 bytes stored, ratio 4.00, "
        "rank 3 wrote longest, 0.750 s"
    )
    assert record.ckptcoord == report.to_json()


def test_a_save_that_failed_is_a_warning_with_its_error(timer, caplog):
    error = RuntimeError("100 %s of it")
    with caplog.at_level(logging.WARNING, logger="ckptcoord"):
        log_report(report_of(timer, error=error, path=""))

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "checkpoint-500 was not saved: RuntimeError: 100 %s of it"
    assert record.ckptcoord["ok"] is False
