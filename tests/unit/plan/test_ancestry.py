"""The nearest ancestor that is there, whatever was dropped between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Claim, Commit, Entry, EntryBody, Fork, Retire, Sweep, Tag
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.plan.ancestry import Ancestry
from ckptcoord.plan.commit import LogState, parent_of, refusal, replay
from ckptcoord.plan.dropping import HeldBy, counts, freed_bytes, holds, own_of

WRITER = "a" * 32
MAIN, EXP = BranchName("main"), BranchName("exp")
TIME = "2026-02-03T04:05:06Z"


class History:
    """A log that takes what it may."""

    def __init__(self) -> None:
        self.state = LogState()
        for branch in (MAIN, EXP):
            self.say(Claim(writer=WRITER, branch=branch, epoch=1, world_size=1))

    def say(self, body: EntryBody) -> None:
        entry = Entry(number=self.state.number + 1, timestamp=TIME, body=body)
        why = refusal(self.state, entry)
        if why is not None:
            raise why
        self.state = replay(self.state, (entry,))

    def commit(self, step: int, branch: BranchName = MAIN, needs: tuple[str, ...] = ()) -> None:
        one = CheckpointId(branch, step)
        self.say(
            Commit(
                writer=WRITER,
                checkpoint_id=one,
                path=str(one),
                manifest_digest=Digest(bytes(32)),
                epoch=1,
                attempt=f"{step:032x}" if branch == MAIN else f"{step:031x}e",
                parent=parent_of(self.state, one),
                size_bytes=10,
                stored_bytes=5,
                needs=needs,
            )
        )

    def drop(self, *ids: CheckpointId, sweep: bool = False) -> None:
        self.say(Retire(writer=WRITER, checkpoint_ids=ids))
        if sweep:
            self.say(Sweep(writer=WRITER, paths=tuple(map(str, ids))))

    def above(self, one: CheckpointId) -> CheckpointId | None:
        return Ancestry(self.state).above(self.state.commits[one])


def at(step: int, branch: BranchName = MAIN) -> CheckpointId:
    return CheckpointId(branch, step)


@pytest.mark.parametrize("sweep", [False, True])
def test_what_was_dropped_is_passed_over(sweep) -> None:
    history = History()
    for step in (1, 2, 3, 4):
        history.commit(step)

    assert history.above(at(4)) == at(3)
    history.drop(at(3), sweep=sweep)
    history.drop(at(2), sweep=sweep)
    assert history.above(at(4)) == at(1)
    history.drop(at(1), sweep=sweep)
    assert history.above(at(4)) is None


@given(st.sets(st.integers(1, 11)), st.booleans())
def test_it_is_the_newest_before_it_that_is_there(dropped, sweep) -> None:
    history = History()
    for step in range(1, 13):
        history.commit(step)
    for step in sorted(dropped):
        history.drop(at(step), sweep=sweep)

    kept = [step for step in range(1, 13) if step not in dropped]
    for before, step in zip([None, *kept], kept, strict=False):
        assert history.above(at(step)) == (None if before is None else at(before))


def forked() -> History:
    """`main` has 1 to 4, 3 is tagged; `exp` begins at 2 and has 5, and 6, which needs 5."""
    history = History()
    history.state = LogState()
    history.say(Claim(writer=WRITER, branch=MAIN, epoch=1, world_size=1))
    for step in (1, 2, 3, 4):
        history.commit(step)
    history.say(Fork(writer=WRITER, branch=EXP, source=at(2)))
    history.say(Claim(writer=WRITER, branch=EXP, epoch=1, world_size=1))
    history.say(Tag(writer=WRITER, name=TagName("best"), target=at(3)))
    history.commit(5, EXP)
    history.commit(6, EXP, needs=("checkpoint-5@exp",))
    return history


def test_past_the_beginning_of_a_branch_it_is_where_that_was_forked() -> None:
    history = forked()

    assert history.above(at(5, EXP)) == at(2)
    history.drop(at(5, EXP))
    assert history.above(at(6, EXP)) == at(2)


def test_each_reason_to_keep_a_checkpoint_is_named() -> None:
    state = forked().state

    assert holds(state, [at(1)]) == ()
    found = holds(state, [at(4), at(3), at(2), at(6, EXP)])
    assert [(one.checkpoint_id, one.by, one.name) for one in found] == [
        (at(6, EXP), HeldBy.HEAD, "exp"),
        (at(2), HeldBy.FORK, "exp"),
        (at(3), HeldBy.TAG, "best"),
        (at(4), HeldBy.HEAD, "main"),
    ]
    assert len({str(one) for one in found}) == 4


def test_what_a_branch_begins_at_and_has_nothing_else_is_what_the_log_refuses_too() -> None:
    history = History()
    history.state = LogState()
    history.say(Claim(writer=WRITER, branch=MAIN, epoch=1, world_size=1))
    history.commit(1)
    history.commit(2)
    history.say(Fork(writer=WRITER, branch=EXP, source=at(1)))

    (hold,) = holds(history.state, [at(1)])
    assert hold.by is HeldBy.START
    with pytest.raises(Exception, match="has only that"):
        history.drop(at(1))


def test_a_branch_has_its_own_in_the_order_of_the_log() -> None:
    history = forked()

    assert own_of(history.state, EXP) == (at(5, EXP), at(6, EXP))
    assert counts(history.state) == {MAIN: 4, EXP: 2}
    history.drop(at(5, EXP), at(6, EXP))
    assert own_of(history.state, EXP) == ()
    assert counts(history.state) == {MAIN: 4, EXP: 0}


def test_what_is_freed_is_what_no_other_needs() -> None:
    history = forked()

    assert freed_bytes(history.state, [at(1)]) == 5
    assert freed_bytes(history.state, [at(5, EXP)]) == 0
    assert freed_bytes(history.state, [at(6, EXP)]) == 5
    assert freed_bytes(history.state, [at(5, EXP), at(6, EXP)]) == 10
    history.drop(at(5, EXP))
    assert freed_bytes(history.state, [at(6, EXP)]) == 10
