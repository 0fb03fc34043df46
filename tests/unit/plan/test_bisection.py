"""The first bad checkpoint is found in ceil(log2 n) questions, and one more for each skip."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import ConfigError
from ckptcoord.plan.bisection import Bisection, Verdict, line_between, line_to
from ckptcoord.plan.commit import LogState
from ckptcoord.plan.condition import Condition


def ids(count, branch="main", first=0):
    return tuple(CheckpointId(BranchName(branch), first + i) for i in range(count))


@st.composite
def questions(draw):
    """A line, where it turned bad, what cannot be judged, and what is gone."""
    line = ids(draw(st.integers(2, 70)))
    first_bad = draw(st.integers(1, len(line) - 1))
    inner = line[1:-1]
    skipped = draw(st.sets(st.sampled_from(inner))) if inner else set()
    gone = draw(st.sets(st.sampled_from(inner))) if inner else set()
    return line, first_bad, skipped, gone


@given(questions())
def test_the_first_bad_one_is_found_in_log2_questions_and_one_for_each_skip(question) -> None:
    line, first_bad, skipped, gone = question
    there = set(line) - gone
    search, asked, skips = Bisection(line=line), 0, 0

    while (one := search.next(there)) is not None:
        left = search.steps_left(there)
        asked += 1
        if one in skipped:
            skips += 1
            search = search.mark(one, Verdict.SKIP)
        else:
            bad = line.index(one) >= first_bad
            search = search.mark(one, Verdict.BAD if bad else Verdict.GOOD)
            assert search.steps_left(there) < left
        assert one in there

    assert asked <= math.ceil(math.log2(len(line) - 1)) + skips
    assert line[first_bad] in search.answers
    # What is left besides the answer could not be judged.
    assert set(search.answers[:-1]) <= skipped | gone
    assert search.steps_left(there) == 0


@given(questions(), st.data())
def test_no_verdict_may_contradict_another(question, data) -> None:
    line, _, _, _ = question
    search = Bisection(line=line)
    for _ in range(10):
        one = data.draw(st.sampled_from(line))
        verdict = data.draw(st.sampled_from(list(Verdict)))
        try:
            search = search.mark(one, verdict)
        except ConfigError:
            continue
        assert search.verdicts[one] is verdict
        assert line.index(search.good) < line.index(search.bad)
        assert search.answers[-1] == search.bad


def test_a_skip_can_be_judged_after_all() -> None:
    line = ids(3)
    search = Bisection(line=line).mark(line[1], Verdict.SKIP)
    assert search.next(set(line)) is None
    assert search.answers == line[1:]

    assert search.mark(line[1], Verdict.GOOD).answers == line[2:]


@pytest.mark.parametrize(
    ("at", "verdict"),
    [(0, Verdict.BAD), (4, Verdict.GOOD), (0, Verdict.SKIP), (4, Verdict.SKIP), (1, Verdict.BAD)],
)
def test_what_contradicts_is_refused_by_name(at, verdict) -> None:
    line = ids(5)
    search = Bisection(line=line).mark(line[2], Verdict.GOOD)

    with pytest.raises(ConfigError, match=line[at].ref):
        search.mark(line[at], verdict)


def test_a_checkpoint_off_the_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="exp@3 is not between main@0 and main@4"):
        Bisection(line=ids(5)).mark(CheckpointId(BranchName("exp"), 3), Verdict.BAD)


@pytest.mark.parametrize(
    ("line", "verdicts"),
    [
        (ids(1), {}),
        (ids(2) + ids(1), {}),
        (ids(3), {ids(3)[0]: Verdict.BAD}),
        (ids(3), {ids(3)[2]: Verdict.GOOD}),
        (ids(4), {ids(4)[1]: Verdict.BAD, ids(4)[2]: Verdict.GOOD}),
        (ids(4), {ids(9)[8]: Verdict.GOOD}),
    ],
)
def test_what_no_bisection_can_be_is_refused(line, verdicts) -> None:
    with pytest.raises(ConfigError):
        Bisection(line=line, verdicts=verdicts)


# --- lines ----------------------------------------------------------------------------------------


def state_of(parents, *, retired=(), swept=(), forks=None):
    """A log's state, as far as lines need it: refs like `main@3`."""
    commits = {
        name(one): SimpleNamespace(checkpoint_id=name(one), parent=parent and name(parent))
        for one, parent in parents.items()
    }
    gone = {name(one) for one in (*retired, *swept)}
    return LogState(
        commits={one: commit for one, commit in commits.items() if one not in gone},
        retired={
            str(name(one)): SimpleNamespace(
                commit=commits[name(one)], stamp=SimpleNamespace(number=1)
            )
            for one in retired
        },
        forks={
            BranchName(branch): SimpleNamespace(source=name(source))
            for branch, source in (forks or {}).items()
        },
    )


def name(text):
    branch, _, step = text.partition("@")
    return CheckpointId(BranchName(branch), int(step))


HISTORY = {
    "main@1": None,
    "main@2": "main@1",
    "main@3": "main@2",
    "main@4": "main@3",
    "exp@3": "main@2",
    "exp@5": "exp@3",
    "sub@6": "exp@5",
}
FORKS = {"exp": "main@2", "sub": "exp@5"}


def refs(line):
    return [one.ref for one in line]


def test_a_line_goes_back_across_forks() -> None:
    state = state_of(HISTORY, forks=FORKS)

    assert refs(line_to(state, name("sub@6"))) == ["main@1", "main@2", "exp@3", "exp@5", "sub@6"]
    between = line_between(state, name("main@2"), name("sub@6"))
    assert refs(between) == ["main@2", "exp@3", "exp@5", "sub@6"]


@pytest.mark.parametrize("how", ["retired", "swept"])
@pytest.mark.parametrize("gone", [["exp@3"], ["exp@3", "exp@5"], ["main@2"], ["main@2", "exp@3"]])
def test_a_line_goes_on_behind_what_is_gone(how, gone) -> None:
    state = state_of(HISTORY, forks=FORKS, **{how: gone})

    found = refs(line_to(state, name("sub@6")))

    whole = ["main@1", "main@2", "exp@3", "exp@5", "sub@6"]
    assert found == [one for one in whole if one not in gone]


def test_a_cycle_in_a_forged_log_ends() -> None:
    state = state_of({"main@1": "main@2", "main@2": "main@1"})

    assert refs(line_to(state, name("main@2"))) == ["main@1", "main@2"]


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        ("main@4", "exp@5", "part at main@2"),
        ("main@3", "main@1", "comes before main@3"),
        ("main@3", "main@3", "is the good one"),
    ],
)
def test_a_bad_one_must_come_out_of_the_good_one(good, bad, why) -> None:
    state = state_of(HISTORY, forks=FORKS)

    with pytest.raises(ConfigError, match=why):
        line_between(state, name(good), name(bad))


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "verdict"),
    [
        ("loss > 3", 3.1, "bad"),
        ("loss > 3", 3.0, "good"),
        ("loss>=3", 3.0, "bad"),
        ("  loss   <   -1e-3 ", -1.0, "bad"),
        ("loss <= 3", 3.5, "good"),
        ("loss < 3", math.nan, "bad"),
        ("loss > 3", math.nan, "bad"),
        ("loss > 3", math.inf, "bad"),
        ("loss > 3", None, "skip"),
    ],
)
def test_a_condition_says_what_is_bad(text, value, verdict) -> None:
    metrics = {} if value is None else {"loss": value}

    assert Condition.parse(text).verdict(metrics) == verdict


def test_a_metric_may_have_any_name() -> None:
    condition = Condition.parse("eval/top 1 acc < 0.5")

    assert condition.metric == "eval/top 1 acc"
    assert condition.verdict({"eval/top 1 acc": 0.4}) is Verdict.BAD
    assert Condition.parse(str(condition)) == condition
    assert Condition.parse("a < 1", absent=Verdict.BAD).verdict({}) is Verdict.BAD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "loss > ",
        "> 3",
        "loss = 3",
        "loss > nan",
        "loss > inf",
        "a > 1 > 2",
        "x" * 10_000,
    ],
)
def test_what_is_no_condition_is_refused(text) -> None:
    with pytest.raises(ConfigError, match="--metric"):
        Condition.parse(text)
