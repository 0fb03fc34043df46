"""Where a run goes on, and what of its branch stands in the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Commit, Entry, Fork, Retire, Tag
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.errors import InvalidNameError, NotNewestError, RefNotFoundError
from ckptcoord.plan.commit import LogState, replay
from ckptcoord.plan.lookup import head
from ckptcoord.plan.resuming import resume_point

WRITER = "a" * 32
TIME = "2026-01-02T03:04:05Z"
MAIN, EXP = BranchName(), BranchName("exp")


def cid(step, branch=MAIN):
    return CheckpointId(branch, step)


def saved(step, branch=MAIN):
    return Commit(
        writer=WRITER,
        checkpoint_id=cid(step, branch),
        path=str(cid(step, branch)),
        manifest_digest=Digest(bytes(32)),
        epoch=1,
        attempt="b" * 32,
        size_bytes=1,
        stored_bytes=1,
    )


def fork(step, branch=EXP):
    return Fork(writer=WRITER, branch=branch, source=cid(step))


def log(*bodies, before=None):
    state = before or LogState()
    entries = [
        Entry(number=state.number + at, timestamp=TIME, body=body)
        for at, body in enumerate(bodies, start=1)
    ]
    return replay(state, entries)


HISTORY = log(saved(100), saved(200), fork(100), saved(150, EXP), saved(300))


@pytest.mark.parametrize("ref", ["main", "main@latest", "latest", "main@300", "checkpoint-300"])
def test_the_newest_of_a_branch_passes(ref):
    point = resume_point(HISTORY, ref)
    point.refuse_newer()
    assert (point.commit.checkpoint_id, point.branch) == (cid(300), MAIN)


def test_an_old_step_is_refused_and_the_answer_is_said():
    point = resume_point(HISTORY, "main@100")
    assert point.newer == (cid(200), cid(300))
    with pytest.raises(NotNewestError) as caught:
        point.refuse_newer()
    assert "ckptcoord fork main@100 NAME" in caught.value.help
    assert "ckptcoord resume main@100 --rewind" in caught.value.help


def test_a_step_that_was_saved_again_meets_the_higher_ones():
    state = log(saved(100), before=HISTORY)
    assert resume_point(state, "main").newer == (cid(200), cid(300))


def test_a_branch_without_a_checkpoint_goes_on_where_it_begins_and_on_itself():
    state = log(fork(200, BranchName("new")), before=HISTORY)
    for ref in ("new", "new@latest"):
        point = resume_point(state, ref)
        assert (point.commit.checkpoint_id, str(point.branch), point.newer) == (cid(200), "new", ())


def test_a_tag_goes_before_a_branch_and_names_the_checkpoints_own():
    state = log(Tag(writer=WRITER, name=TagName("exp"), target=cid(300)), before=HISTORY)
    assert resume_point(state, "exp").branch == MAIN
    assert resume_point(state, "exp@latest").branch == EXP


def test_a_checkpoint_of_another_branch_leaves_all_of_this_one_beside():
    assert resume_point(HISTORY, "main@300", branch=EXP).newer == (cid(150, EXP),)
    assert resume_point(HISTORY, "main@300", branch=BranchName("none")).newer == ()


def test_a_restart_goes_on_from_what_the_run_has_saved_since():
    handed = HISTORY.number
    state = log(fork(100, BranchName("new")), before=HISTORY)
    new = BranchName("new")
    first = resume_point(state, "main@100", branch=new, since=handed)
    assert (first.commit.checkpoint_id, first.is_restart) == (cid(100), False)

    state = log(saved(120, new), saved(140, new), before=state)
    second = resume_point(state, "main@100", branch=new, since=handed)
    assert (second.commit.checkpoint_id, second.is_restart) == (cid(140, new), True)
    second.refuse_newer()

    gone = log(Retire(writer=WRITER, checkpoint_ids=(cid(100),)), before=state)
    assert resume_point(gone, "main@100", branch=new, since=handed) == second
    with pytest.raises(RefNotFoundError):
        resume_point(gone, "main@100", branch=new)


@pytest.mark.parametrize("ref", ["main@7", "nosuch", "nosuch@latest"])
def test_what_is_not_there_is_named_with_the_nearest(ref):
    with pytest.raises(RefNotFoundError) as caught:
        resume_point(HISTORY, ref)
    assert caught.value.nearest


@pytest.mark.parametrize("ref", ["", "a\0b", "x" * 10_000, "a.lock", "main@x"])
def test_what_can_be_no_ref_is_refused(ref):
    with pytest.raises(InvalidNameError):
        resume_point(HISTORY, ref)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_once_the_newer_ones_are_dropped_the_branch_stands_there_and_meets_no_step_again(
    steps, data
):
    state = log(*map(saved, steps))
    ref = cid(data.draw(st.sampled_from(steps))).ref
    newer = resume_point(state, ref).newer
    if newer:
        state = log(Retire(writer=WRITER, checkpoint_ids=newer), before=state)

    point = resume_point(state, ref)

    point.refuse_newer()
    assert head(state, MAIN) == point.commit
    assert max(one.step for one in state.commits) == point.commit.checkpoint_id.step
