"""Retention: what goes is what no rule keeps."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Commit, Fork, timestamp_of
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.errors import ConfigError
from ckptcoord.plan.commit import LogState, Stamp
from ckptcoord.plan.retention import Mode, Retention, parse_span, surplus

MAIN, EXP = BranchName(), BranchName("exp")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
NOW = BEGIN + timedelta(hours=100)


def cid(step, branch=MAIN):
    return CheckpointId(branch, step)


def commit(one, metrics):
    return Commit(
        writer="a" * 32,
        checkpoint_id=one,
        path=str(one),
        manifest_digest=Digest(bytes(32)),
        epoch=1,
        attempt="0" * 32,
        size_bytes=1,
        stored_bytes=1,
        metrics=metrics,
    )


def history(*steps, metrics=None, tags=(), forks=(), branch=MAIN):
    """Commits in this order, an hour apart, the last at `NOW`."""
    commits = {cid(s, branch): commit(cid(s, branch), (metrics or {}).get(s, {})) for s in steps}
    times = {one: NOW - timedelta(hours=len(commits) - 1 - i) for i, one in enumerate(commits)}
    return LogState(
        number=len(steps),
        commits=commits,
        stamps={
            one: Stamp(number=i, timestamp=timestamp_of(times[one]))
            for i, one in enumerate(commits, 1)
        },
        tags={TagName(f"t{step}"): cid(step) for step in tags},
        forks={
            BranchName(f"b{step}"): Fork(
                writer="a" * 32, branch=BranchName(f"b{step}"), source=cid(step)
            )
            for step in forks
        },
    )


def gone(state, branch=MAIN, now=NOW, **rules):
    return [one.step for one in surplus(state, branch, Retention(**rules), now)]


def test_without_a_rule_nothing_goes():
    assert gone(history(1, 2, 3)) == []
    assert not Retention(metric="loss", mode=Mode.MIN).has_rules


def test_the_newest_by_the_log_stay_whatever_their_steps():
    assert gone(history(10, 9, 100, 11, 12), keep_last=2) == [10, 9, 100]
    assert gone(history(1, 2), keep_last=2) == []


def test_tags_and_fork_points_stay_and_do_not_count():
    state = history(1, 2, 3, 4, 5, tags=[5], forks=[2])
    assert gone(state, keep_last=2) == [1]


def test_the_best_stay_and_a_checkpoint_without_the_metric_is_not_among_them():
    loss = {1: {"loss": 3.0}, 2: {"loss": 1.0}, 3: {}, 4: {"loss": 2.0}, 5: {"other": 0.0}}
    state = history(1, 2, 3, 4, 5, 6, metrics=loss)
    assert gone(state, keep_best=1, metric="loss") == [1, 3, 4, 5]
    assert gone(state, keep_best=2, metric="loss", mode=Mode.MIN) == [1, 3, 5]
    assert gone(state, keep_best=2, metric="loss", mode=Mode.MAX) == [2, 3, 5]
    assert gone(state, keep_best=9, metric="other") == [1, 2, 3, 4]
    accuracy = {1: {"acc": 0.9}, 2: {"acc": 0.9}, 3: {"acc": 0.1}}
    assert gone(history(1, 2, 3, 4, metrics=accuracy), keep_best=1, metric="acc") == [2, 3]


def test_nan_is_never_the_best():
    state = history(1, 2, 3, 4, metrics={2: {"loss": 9.0}, 3: {"loss": 10.0}})
    object.__setattr__(state.commits[cid(1)], "metrics", {"loss": float("nan")})
    for mode in Mode:
        assert 1 in gone(state, keep_best=2, metric="loss", mode=mode)


def test_every_so_many_steps_one_stays():
    assert gone(history(0, 50, 100, 150, 200, 250), keep_every=100) == [50, 150]


def test_what_is_young_stays_and_so_does_what_has_no_time():
    state = history(1, 2, 3, 4)
    assert gone(state, keep_for_s=2 * 3600) == [1]
    assert gone(state, keep_for_s=2 * 3600 - 1) == [1, 2]
    assert gone(state, keep_for_s=0, now=BEGIN) == []  # all of it is in the future
    for odd in ("2026-02-31T00:00:00Z", "soon", "2026-01-01T00:00:00"):
        state.stamps[cid(1)] = replace(state.stamps[cid(1)], timestamp=odd)
        assert gone(state, keep_for_s=1) == [2, 3]


def test_the_newest_of_a_branch_never_goes():
    for rules in ({"keep_every": 1000}, {"keep_for_s": 0}, {"keep_best": 1, "metric": "loss"}):
        later = NOW + timedelta(days=9)
        assert gone(history(1, 2, 3), now=later, **rules) == [1, 2]
    assert gone(history(1, 2, tags=[1]), keep_last=1) == []


def test_a_branch_is_judged_by_itself():
    one, other = history(1, 2, 3), history(4, 5, branch=EXP)
    state = replace(one, commits=one.commits | other.commits, stamps={**other.stamps, **one.stamps})
    assert gone(state, keep_last=1) == [1, 2]
    assert gone(state, EXP, keep_last=1) == [4]


RULES = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 5),
    keep_best=st.none() | st.integers(1, 3),
    metric=st.just("loss"),
    mode=st.none() | st.sampled_from(Mode),
    keep_every=st.none() | st.integers(1, 5),
    keep_for_s=st.none() | st.floats(0, 20 * 3600),
)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.integers(0, 30), unique=True, max_size=12),
    losses=st.lists(st.none() | st.floats(-1, 1), min_size=12, max_size=12),
    tagged=st.sets(st.integers(0, 30), max_size=2),
    rules=RULES,
)
def test_what_goes_is_what_each_rule_alone_lets_go(steps, losses, tagged, rules):
    metrics = {s: {"loss": x} for s, x in zip(steps, losses, strict=False) if x is not None}
    state = history(*steps, metrics=metrics, tags=tagged & set(steps))
    going = surplus(state, MAIN, rules, NOW)
    alone = [
        replace(Retention(metric="loss", mode=rules.mode), **{name: getattr(rules, name)})
        for name in ("keep_last", "keep_best", "keep_every", "keep_for_s")
        if getattr(rules, name) is not None
    ]
    expected = [set(surplus(state, MAIN, rule, NOW)) for rule in alone]
    assert set(going) == (set.intersection(*expected) if expected else set())
    numbers = [state.stamps[one].number for one in going]
    assert numbers == sorted(numbers)
    assert not set(going) & set(state.tags.values())
    if steps:
        assert cid(steps[-1]) not in going


# --- the rules as settings -------


def test_rules_are_read_from_settings():
    assert Retention.from_settings({}) == Retention()
    whole = {
        "keep_last": 3, "keep_best": 2, "metric": "acc", "mode": "max", "keep_every": 1000,
        "keep_for": "7d",
    }  # fmt: skip
    rules = Retention.from_settings(whole)
    assert rules == Retention(
        keep_last=3, keep_best=2, metric="acc", mode=Mode.MAX, keep_every=1000, keep_for_s=604800
    )
    assert Retention.from_settings({"keep_for": 60}).keep_for_s == 60
    assert str(Retention(keep_last=3, keep_every=10)) == "keep_last=3, keep_every=10"


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        "keep_last",
        {"keep_lost": 3},
        {3: 3},
        {"keep_for_s": 3},
        {"keep_last": 0},
        {"keep_last": True},
        {"keep_last": "3"},
        {"keep_last": 1.0},
        {"keep_last": 10**16},
        {"keep_best": 1},
        {"keep_best": 1, "metric": ""},
        {"keep_best": 1, "metric": 5},
        {"mode": "least"},
        {"mode": ["min"]},
        {"keep_every": -1},
        {"keep_for": "a week"},
        {"keep_for": -1},
        {"keep_for": float("nan")},
        {"keep_for": float("inf")},
        {"keep_for": True},
        {"keep_for": []},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match="retention"):
        Retention.from_settings(settings)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("90s", 90), ("30m", 1800), ("1h", 3600), ("1.5d", 129600), (" 2 w ", 1209600)],
)
def test_spans(text, seconds):
    assert parse_span(text, field="--grace") == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "h", "-1h", "1y", "1h30m", "1e3s", "\u0661h", "9" * 13 + "s"]
)
def test_what_is_no_span(text):
    with pytest.raises(ConfigError, match="--grace"):
        parse_span(text, field="--grace")


def test_rules_given_go_before_others_one_by_one():
    given_, others = Retention(keep_last=2), Retention(keep_last=9, keep_every=100)
    assert given_.over(others) == Retention(keep_last=2, keep_every=100)
    best = Retention(keep_best=1, metric="acc")
    other = Retention(keep_best=5, metric="loss", mode=Mode.MIN, keep_for_s=5)
    assert best.over(other) == Retention(keep_best=1, metric="acc", keep_for_s=5)
    assert Retention(metric="acc").over(other) == other
