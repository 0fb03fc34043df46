"""Which checkpoints a delta may name beside base and parent, and what it needs then."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Commit
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.plan.commit import LogState, Retired, Stamp
from ckptcoord.plan.elsewhere import (
    MAX_ELSEWHERE,
    MAX_HEADS,
    MAX_NEEDS,
    closure,
    elsewhere,
    nearby,
    other_heads,
)

FOLDERS = [f"checkpoint-{step}" for step in range(90)]


def commit(step: int, needs: tuple[str, ...] = (), branch: str = "main") -> Commit:
    checkpoint_id = CheckpointId(BranchName(branch), step)
    return Commit(
        writer="0" * 32,
        checkpoint_id=checkpoint_id,
        path=str(checkpoint_id),
        manifest_digest=Digest(bytes(32)),
        epoch=1,
        attempt=f"{step:032x}",
        size_bytes=1,
        stored_bytes=1,
        metrics={},
        message="",
        needs=tuple(sorted(needs)),
        replaces=None,
    )


def state_of(commits: list[Commit], retired: frozenset[str] = frozenset()) -> LogState:
    stamps = {one.checkpoint_id: Stamp(number=n, timestamp="") for n, one in enumerate(commits, 1)}
    live = [one for one in commits if one.path not in retired]
    return LogState(
        number=len(commits),
        commits={one.checkpoint_id: one for one in live},
        stamps={one.checkpoint_id: stamps[one.checkpoint_id] for one in live},
        retired={
            one.path: Retired(commit=one, stamp=stamps[one.checkpoint_id])
            for one in commits
            if one.path in retired
        },
    )


@st.composite
def histories(draw: st.DrawFn) -> LogState:
    """Stars and chains, some of them retired; what each needs is closed."""
    commits: list[Commit] = []
    closed: dict[str, frozenset[str]] = {}
    for step in range(draw(st.integers(1, 90))):
        folder = FOLDERS[step]
        bases = draw(st.lists(st.sampled_from(FOLDERS[:step]), max_size=2)) if step else []
        closed[folder] = frozenset(bases).union(*(closed[one] for one in bases))
        commits.append(commit(step, tuple(closed[folder])))
    return state_of(commits, draw(st.frozensets(st.sampled_from(FOLDERS))))


@given(state=histories(), data=st.data())
def test_what_may_be_named_is_live_few_and_needs_little(state: LogState, data: Any) -> None:
    paths = sorted([one.path for one in state.commits.values()] + [*state.retired])
    near = data.draw(st.lists(st.sampled_from(paths), max_size=3))
    candidates = data.draw(st.lists(st.sampled_from(FOLDERS), max_size=40))
    found = [one.path for one in elsewhere(state, near, candidates)]
    assert {*found} <= {one.path for one in state.commits.values()}
    assert not {*found} & {*closure(state, near)}
    assert len(found) == len({*found}) <= MAX_ELSEWHERE
    if found:
        assert len(closure(state, [*near, *found])) <= MAX_NEEDS
    assert found == sorted(found, key=candidates.index)


def test_the_head_of_a_long_chain_is_not_named_and_a_later_candidate_is() -> None:
    chain = [commit(step, tuple(FOLDERS[:step])) for step in range(MAX_NEEDS + 2)]
    alone = commit(MAX_NEEDS + 2)
    state = state_of([*chain, alone])
    candidates = [chain[-1].path, chain[-2].path, chain[-4].path, alone.path]
    found = [one.path for one in elsewhere(state, [alone.path], candidates)]
    assert found == [chain[-4].path]
    found = [one.path for one in elsewhere(state, [], candidates)]
    assert found == [chain[-4].path, alone.path]


@given(state=histories(), data=st.data())
def test_what_is_needed_is_closed(state: LogState, data: Any) -> None:
    every = {one.path: one for one in state.commits.values()}
    every |= {path: one.commit for path, one in state.retired.items()}
    named = data.draw(st.lists(st.sampled_from(sorted(every)), max_size=5))
    needs = closure(state, named)
    assert list(needs) == sorted(set(needs))
    assert {*named} <= {*needs}
    assert all({*every[one].needs} <= {*needs} for one in needs)


@given(state=histories(), data=st.data())
def test_what_is_near_is_closed_and_bounded_but_for_the_base(state: LogState, data: Any) -> None:
    paths = sorted([one.path for one in state.commits.values()] + [*state.retired])
    base, parent = data.draw(st.sampled_from(paths)), data.draw(st.sampled_from(paths))
    near = nearby(state, base, parent)
    assert near == closure(state, near)
    assert base in near
    assert near == closure(state, [base]) or (parent in near and len(near) <= MAX_NEEDS)


def test_the_parent_is_left_out_where_it_would_need_too_much() -> None:
    chain = [commit(step, tuple(FOLDERS[:step])) for step in range(MAX_NEEDS + 1)]
    state = state_of(chain)
    assert nearby(state, FOLDERS[0], FOLDERS[MAX_NEEDS - 1]) == tuple(sorted(FOLDERS[:MAX_NEEDS]))
    assert nearby(state, FOLDERS[0], FOLDERS[MAX_NEEDS]) == (FOLDERS[0],)


def test_a_folder_that_was_swept_is_still_said_to_be_needed() -> None:
    assert closure(LogState(), ["checkpoint-1"]) == ("checkpoint-1",)


def test_heads_are_those_of_other_branches_newest_first() -> None:
    commits = [commit(step, branch=f"b{step % 7}") for step in range(14)]
    state = state_of(commits)
    heads = other_heads(state, BranchName("b6"))
    assert heads == tuple(f"checkpoint-{step}@b{step - 7}" for step in (12, 11, 10, 9))
    assert len(heads) == MAX_HEADS
