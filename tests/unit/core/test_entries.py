"""The log's entries: one JSON form, strict in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import (
    FORMAT_VERSION,
    LONGEST_TIMING,
    MAX_SECONDS,
    QUEUE_DEPTH,
    SECONDS,
    SLOWEST_RANK,
    Claim,
    Commit,
    Entry,
    Fork,
    Retire,
    Rewrite,
    Snapshot,
    Sweep,
    Tag,
    timestamp_of,
)
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.errors import ConfigError, FormatVersionError, InvalidNameError, ManifestError

W = "0123456789abcdef" * 2
A = "f" * 32
DIGEST = Digest(bytes(range(32)))
MAIN, EXP = BranchName(), BranchName("exp")
CLAIM = Claim(writer=W, branch=EXP, epoch=3, host="node-7", world_size=4)
COMMIT = Commit(
    writer=W,
    checkpoint_id=CheckpointId(MAIN, 500),
    path="checkpoint-500",
    manifest_digest=DIGEST,
    epoch=1,
    attempt=A,
    parent=CheckpointId(EXP, 400),
    size_bytes=10,
    stored_bytes=5,
    metrics={"loss": 0.5, "acc": 1},
    message="naïve ☃",
    replaces="checkpoint-500.deadbeef",
    needs=("checkpoint-300@exp", "checkpoint-400.01234567"),
)
REWRITE = Rewrite(writer=W, commit=COMMIT)
FORK = Fork(writer=W, branch=EXP, source=CheckpointId(MAIN, 5))
TAG = Tag(writer=W, name=TagName("best"), target=CheckpointId(MAIN, 5))
UNTAG = Tag(writer=W, name=TagName("best"), target=None)
RETIRE = Retire(writer=W, checkpoint_ids=(CheckpointId(MAIN, 5),), reason="old")
SWEEP = Sweep(writer=W, paths=(".ckptcoord/staging/x", "checkpoint-5@exp"), digests=(DIGEST,))
SNAPSHOT = Snapshot(writer=W, state={"number": 511})
BY_NAME = {
    "claim": CLAIM,
    "commit": COMMIT,
    "fork": FORK,
    "tag": TAG,
    "untag": UNTAG,
    "retire": RETIRE,
    "sweep": SWEEP,
    "snapshot": SNAPSHOT,
    "rewrite": REWRITE,
}
every_body = pytest.mark.parametrize("body", BY_NAME.values(), ids=BY_NAME.keys())


def entry(body=CLAIM, number=7, timestamp="2026-01-02T03:04:05Z"):
    return Entry(number=number, timestamp=timestamp, body=body)


def document(body=CLAIM):
    return json.loads(entry(body).to_bytes())


def parse(value):
    return Entry.parse(json.dumps(value).encode(), path="e.json")


@every_body
def test_an_entry_reads_back_as_written(body):
    data = entry(body).to_bytes()
    assert Entry.parse(data, path="e.json") == entry(body)
    assert Entry.parse(data, path="e.json").to_bytes() == data
    assert type(body).from_json(body.to_json()) == body


def test_the_form_on_disk_is_flat_and_canonical():
    assert entry(FORK).to_bytes() == (
        b'{"branch":"exp","format_version":1,"from":"checkpoint-5","kind":"fork","number":7,'
        b'"timestamp":"2026-01-02T03:04:05Z","writer":"%s"}\n' % W.encode()
    )


@settings(max_examples=50)
@given(
    metrics=st.dictionaries(
        st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False, allow_infinity=False)
    ),
    message=st.text(st.characters(codec="utf-8")),
)
def test_any_text_and_any_finite_metric_survive(metrics, message):
    commit = Commit.from_json(COMMIT.to_json() | {"metrics": metrics, "message": message})
    read = Entry.parse(entry(commit).to_bytes(), path="e").body
    assert read == commit
    assert [value.hex() for value in read.metrics.values()] == [
        metrics[name].hex() for name in read.metrics
    ]


@every_body
def test_every_field_is_needed_and_none_is_unknown(body):
    whole = document(body)
    for name in whole:
        with pytest.raises(ManifestError, match=r"e\.json"):
            parse({key: value for key, value in whole.items() if key != name})
    with pytest.raises(ManifestError, match="unknown field"):
        parse({**whole, "surprise": 1})


@every_body
def test_a_field_of_another_type_is_refused(body):
    whole = document(body)
    for name in whole:
        if (body, name) == (SNAPSHOT, "state"):
            continue
        for wrong in (1.5, True, [1], {"a": 1}):
            with pytest.raises(ManifestError):
                parse({**whole, name: wrong})


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        (CLAIM, "writer", W.upper()),
        (CLAIM, "writer", W[1:]),
        (CLAIM, "branch", "../x"),
        (CLAIM, "epoch", 0),
        (CLAIM, "epoch", 2**61),
        (CLAIM, "world_size", 0),
        (CLAIM, "host", "x" * 100_001),
        (CLAIM, "number", 0),
        (CLAIM, "timestamp", "2026-01-02 03:04:05Z"),
        (CLAIM, "timestamp", "2026-01-02T03:04:05+01:00"),
        (COMMIT, "attempt", "no"),
        (COMMIT, "checkpoint_id", "checkpoint-05"),
        (COMMIT, "parent", "checkpoint-500"),
        (COMMIT, "path", "../checkpoint-500"),
        (COMMIT, "path", "a/b"),
        (COMMIT, "path", ".ckptcoord"),
        (COMMIT, "path", ""),
        (COMMIT, "replaces", ".."),
        (COMMIT, "manifest_digest", "blake3:00"),
        (COMMIT, "size_bytes", -1),
        (COMMIT, "stored_bytes", -1),
        (COMMIT, "metrics", {"loss": 1}),
        (COMMIT, "metrics", {"x" * 100_001: 1.0}),
        (COMMIT, "needs", ["checkpoint-500"]),
        (COMMIT, "needs", ["checkpoint-5", "checkpoint-4"]),
        (COMMIT, "needs", ["checkpoint-5", "checkpoint-5"]),
        (COMMIT, "needs", ["../checkpoint-5"]),
        (COMMIT, "needs", ["checkpoint-5/model.safetensors"]),
        (COMMIT, "needs", ["checkpoint-5.0123"]),
        (COMMIT, "needs", [".01234567"]),
        (COMMIT, "needs", [""]),
        (FORK, "from", "main@5"),
        (TAG, "name", "latest"),
        (TAG, "target", "5"),
        (RETIRE, "checkpoint_ids", []),
        (RETIRE, "checkpoint_ids", ["checkpoint-5", "checkpoint-5"]),
        (SWEEP, "paths", ["../x"]),
        (SWEEP, "paths", ["/x"]),
        (SWEEP, "paths", ["a//b"]),
        (SWEEP, "digests", ["x"]),
    ],
)
def test_a_value_that_breaks_the_format_is_refused(body, field, value):
    assert field in document(body)
    with pytest.raises(ManifestError):
        parse({**document(body), field: value})


def test_what_is_no_object_is_refused():
    for value in ([], "x", None, 1):
        with pytest.raises(ManifestError, match="not a JSON object"):
            parse(value)
    with pytest.raises(ManifestError, match="not a JSON object"):
        Claim.from_json([])


def test_a_body_of_another_kind_is_refused():
    with pytest.raises(ManifestError, match="kind"):
        Claim.from_json(COMMIT.to_json())


def test_a_newer_format_is_refused_as_such_whatever_else_is_in_it():
    with pytest.raises(FormatVersionError) as caught:
        parse({"format_version": FORMAT_VERSION + 1, "kind": "merge"})
    assert (caught.value.found, caught.value.path) == (FORMAT_VERSION + 1, "e.json")
    with pytest.raises(ManifestError, match="'merge' is unknown"):
        parse({**document(), "kind": "merge"})
    for version in (0, -1, "1", None, True, 1.0):
        with pytest.raises(ManifestError, match="format_version"):
            parse({**document(), "format_version": version})


def test_what_could_not_be_read_back_is_never_built():
    for change in (
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"message": "\ud800"},
        {"path": "a/b"},
        {"parent": COMMIT.checkpoint_id},
    ):
        with pytest.raises(ConfigError):
            replace(COMMIT, **change)
    with pytest.raises(InvalidNameError):
        replace(COMMIT, writer="me")
    with pytest.raises(ConfigError):
        entry(timestamp="yesterday")


TIMING = {
    "stall_s": 0.0,
    "staged_s": 0.25,
    "opened_s": 5e-324,
    "written_s": 1.5,
    "voted_s": MAX_SECONDS,
    "committed_s": 2.5,
    "slowest_rank": 3,
    "queue_depth": 2,
}
timings = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(SECONDS, st.floats(0, MAX_SECONDS)),
        SLOWEST_RANK: st.integers(0, 999_999),
        QUEUE_DEPTH: st.integers(1, 64),
    },
)


@given(timings)
def test_any_timing_survives_and_none_at_all_is_written_as_nothing(timing):
    commit = replace(COMMIT, timing=timing)
    data = entry(commit).to_bytes()
    read = Entry.parse(data, path="e").body
    assert read == commit
    assert read.timing == timing
    assert Entry.parse(data, path="e").to_bytes() == data
    assert (b'"timing"' in data) == bool(timing)
    assert {name: type(number) for name, number in read.timing.items()} == {
        name: int if name in (SLOWEST_RANK, QUEUE_DEPTH) else float for name in timing
    }


@given(timings)
def test_no_timing_takes_more_room_than_the_longest(timing):
    longest = entry(replace(COMMIT, timing=LONGEST_TIMING)).to_bytes()
    assert len(entry(replace(COMMIT, timing=timing)).to_bytes()) <= len(longest)


def test_whole_seconds_are_written_as_floats():
    commit = replace(COMMIT, timing={"stall_s": 2})
    assert b'"timing":{"stall_s":2.0}' in entry(commit).to_bytes()
    assert Entry.parse(entry(commit).to_bytes(), path="e").body == commit


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "{}",
        "[]",
        "1.5",
        '"stall_s"',
        '{"stall_s": 1}',
        '{"stall_s": true}',
        '{"stall_s": null}',
        '{"stall_s": "1.0"}',
        '{"stall_s": [1.0]}',
        '{"stall_s": -0.001}',
        '{"stall_s": NaN}',
        '{"stall_s": Infinity}',
        '{"stall_s": 1e999}',
        '{"stall_s": 1000000000.1}',
        '{"stall_s": 1.0, "stall_s": 1.0}',
        '{"slowest_rank": -1}',
        '{"slowest_rank": 1000000}',
        '{"slowest_rank": 1.0}',
        '{"slowest_rank": true}',
        '{"slowest_rank": ' + "9" * 60 + "}",
        '{"queue_depth": 0}',
        '{"queue_depth": 65}',
        '{"queue_depth": 2.0}',
        '{"queue_depth": true}',
        '{"total_s": 1.0}',
        '{"STALL_S": 1.0}',
        '{"": 1.0}',
        "{" + ", ".join(f'"t{i}": 1.0' for i in range(20_000)) + "}",
        '{"' + "x" * 100_000 + '": 1.0}',
    ],
)
@pytest.mark.parametrize("body", [COMMIT, REWRITE], ids=["commit", "rewrite"])
def test_a_timing_that_breaks_the_format_is_refused(body, text):
    timed = COMMIT.to_json() | {"timing": "@"}
    whole = document(COMMIT) | timed if body is COMMIT else document(body) | {"commit": timed}
    data = json.dumps(whole).replace('"@"', text).encode()
    with pytest.raises(ManifestError, match=r"e\.json") as caught:
        Entry.parse(data, path="e.json")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "timing",
    [
        {"stall_s": float("nan")},
        {"stall_s": float("inf")},
        {"stall_s": -1.0},
        {"stall_s": True},
        {"slowest_rank": 1.0},
        {"slowest_rank": True},
        {"queue_depth": True},
        {"queue_depth": 0},
        {"total_s": 1.0},
    ],
)
def test_a_timing_that_could_not_be_read_back_is_never_built(timing):
    with pytest.raises(ConfigError):
        replace(COMMIT, timing=timing)


def test_times_are_written_in_utc():
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert timestamp_of(moment) == "2026-01-02T01:04:05Z"
    assert timestamp_of(datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)).endswith("05.000006Z")
    entry(timestamp=timestamp_of(datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)))
