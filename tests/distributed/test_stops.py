"""Ranks and store hosts that are stopped, lost or slow: a deadline for each, and a name (INV-7)."""

from __future__ import annotations

import signal

import pytest
from tests.distributed.aftermath import (
    ABORTED,
    DEADLINE_S,
    GRACE_S,
    begin,
    check_aftermath,
    check_sound,
    check_survivors,
    check_whole,
)
from tests.distributed.launch import World
from tests.distributed.rank import IN_A_WRITE, Strike, expected

from ckptcoord import open_repository
from ckptcoord.core.entries import Claim, Commit

pytestmark = [pytest.mark.dist, pytest.mark.waits]
PATIENCE_S = DEADLINE_S + GRACE_S + 15
# Stopped here, rank 0 finds every vote when it resumes, and the fence when it appends.
FENCED = ("written", "renamed")


@pytest.mark.parametrize("step", [IN_A_WRITE, "vote"])
def test_a_stopped_rank_is_named_in_time_and_hears_of_the_abort_when_it_resumes(tmp_path, step):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        begin(world, repo)
        world.tell("save", step=2, strike=Strike(step=step, ranks=(2,), how="stop"))
        assert not check_survivors(world.hear(PATIENCE_S, [0, 1, 3]), lost=(2,))
        world.signal(2, signal.SIGCONT)
        (resumed,) = world.hear(PATIENCE_S, [2]).values()
        assert resumed.kind == ABORTED
        assert resumed.facts["silent"] == [2]
        # Nobody died and nobody is fenced: the same world saves on.
        assert check_whole(world) == 1
        world.ask("save", step=3)
    check_aftermath(tmp_path, repo, acknowledged=3, attempted=4)


@pytest.mark.parametrize("step", ["open", "written", "renamed"])
def test_a_stopped_rank_0_never_commits_what_the_others_reported_as_failed(tmp_path, step):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        begin(world, repo)
        world.tell("save", step=2, strike=Strike(step=step, ranks=(0,), how="stop"))
        heard = world.hear(PATIENCE_S, [1, 2, 3])
        assert set(heard) == {1, 2, 3}
        assert not check_survivors(heard, lost=(0,))
        before = [entry.body for entry in open_repository(repo).log.entries()]
        world.signal(0, signal.SIGCONT)
        (resumed,) = world.hear(PATIENCE_S, [0]).values()
        assert resumed.kind == ("FencedError" if step in FENCED else ABORTED)
        after = [entry.body for entry in open_repository(repo).log.entries()]
        assert after == before, "something was appended late"
        assert check_sound(repo) == [1]
    assert check_aftermath(tmp_path, repo, acknowledged=1, attempted=2) == 1


def test_the_log_of_a_settled_save_holds_the_fence_and_no_commit(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        begin(world, repo)
        world.tell("save", step=2, strike=Strike(step="append", ranks=(0,), how="stop"))
        assert set(world.hear(PATIENCE_S, [1, 2, 3])) == {1, 2, 3}
        bodies = [entry.body for entry in open_repository(repo).log.entries()]
        claim, commit, fence = bodies
        assert isinstance(claim, Claim)
        assert isinstance(commit, Commit)
        assert isinstance(fence, Claim)
        assert (fence.epoch, fence.writer != claim.writer) == (2, True)
        world.signal(0, signal.SIGCONT)
        (resumed,) = world.hear(PATIENCE_S, [0]).values()
        assert resumed.kind == "FencedError"
        assert resumed.facts["holder"] == fence.writer
        assert [entry.body for entry in open_repository(repo).log.entries()] == bodies


def test_a_rank_0_that_is_stopped_after_the_append_has_committed_for_all(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        begin(world, repo)
        world.tell("save", step=2, strike=Strike(step="appended", ranks=(0,), how="stop"))
        assert check_survivors(world.hear(PATIENCE_S, [1, 2, 3]), lost=(0,))
        world.signal(0, signal.SIGCONT)
        (resumed,) = world.hear(PATIENCE_S, [0]).values()
        assert resumed.kind == ""
        assert resumed.value == "checkpoint-2"
    assert check_aftermath(tmp_path, repo, acknowledged=1, attempted=2, committed=True) == 2


def test_a_new_job_that_took_over_meanwhile_fences_a_stopped_one(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as old, World(tmp_path) as new:
        begin(old, repo)
        old.ask("hurry", timeout_s=PATIENCE_S)  # not to settle before the others saved
        old.tell("save", step=2, strike=Strike(step="append", ranks=(0,), how="stop"))
        new.ask("open", output_dir=str(repo))
        assert check_whole(new) == 1
        new.ask("save", step=2)
        old.signal(0, signal.SIGCONT)
        for rank, outcome in old.hear(PATIENCE_S).items():
            assert outcome.kind == "FencedError", f"rank {rank}: {outcome}"
        assert check_whole(new) == 2
        new.ask("save", step=3)
    assert check_sound(repo) == [1, 2, 3]


def test_a_slow_rank_within_the_deadline_succeeds(tmp_path):
    with World(tmp_path) as world:
        begin(world, tmp_path / "run")
        for step, slow in ((2, 3), (3, 0)):
            strike = Strike(step="vote", ranks=(slow,), how="sleep", seconds=DEADLINE_S * 0.6)
            world.ask("save", step=step, strike=strike)
        assert check_whole(world) == 3


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda one: one.name)
@pytest.mark.parametrize("step", ["open", IN_A_WRITE])
def test_a_store_host_of_its_own_that_is_lost_ends_the_save_in_time_on_every_rank(
    tmp_path, step, number
):
    repo = tmp_path / "run"
    with World(tmp_path, store_apart=True) as world:
        begin(world, repo)
        slow = Strike(step=step, ranks=(0, 1, 2, 3), how="sleep", seconds=1.0)
        world.tell("save", step=2, strike=slow)
        world.signal("host", number)
        heard = world.hear(PATIENCE_S)
        assert set(heard) == {0, 1, 2, 3}
        assert not check_survivors(heard, lost=(0, 1, 2, 3))
        for outcome in heard.values():
            assert "store at 127.0.0.1" in outcome.error["what"]
            assert "torchrun agent" in outcome.error["what"]
    assert check_aftermath(tmp_path, repo, acknowledged=1, attempted=2) == 1


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda one: one.name)
@pytest.mark.parametrize("step", ["append", "appended"])
def test_when_the_store_is_lost_around_the_append_the_ranks_agree_with_the_log(
    tmp_path, step, number
):
    repo = tmp_path / "run"
    with World(tmp_path, store_apart=True) as world:
        begin(world, repo)
        slow = Strike(step=step, ranks=(0,), how="sleep", seconds=1.5)
        world.tell("save", step=2, strike=slow)
        world.await_file(repo / "checkpoint-2")
        world.signal("host", number)
        heard = world.hear(PATIENCE_S)
    assert set(heard) == {0, 1, 2, 3}
    committed = 2 in check_sound(repo)
    for rank, outcome in heard.items():
        assert outcome.waited_s <= DEADLINE_S + GRACE_S, f"rank {rank}"
        assert (outcome.kind == "") == committed, f"rank {rank}, committed {committed}: {outcome}"
    found = check_aftermath(tmp_path, repo, acknowledged=1, attempted=2, committed=committed)
    assert found == (2 if committed else 1)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda one: one.name)
def test_a_store_that_is_lost_between_two_operations_is_reported_in_time(tmp_path, number):
    repo = tmp_path / "run"
    for order, arguments in (
        ("save", {"step": 2}),
        ("load", {}),
        ("open", {"output_dir": str(repo), "timeout_s": DEADLINE_S}),
    ):
        with World(tmp_path, store_apart=True) as world:
            if order == "save":
                begin(world, repo)
            if order == "load":
                world.ask("open", output_dir=str(repo))
                world.ask("hurry", timeout_s=DEADLINE_S)
            world.signal("host", number)
            world.tell(order, **arguments)
            heard = world.hear(PATIENCE_S)
            assert set(heard) == {0, 1, 2, 3}, order
            for outcome in heard.values():
                assert outcome.kind in (ABORTED, "LoadAbortedError", "SetupAbortedError")
                assert outcome.waited_s <= DEADLINE_S + GRACE_S, order
    assert check_aftermath(tmp_path, repo, acknowledged=1, attempted=2) == 1


@pytest.mark.parametrize("step", ["plan", "check", "read"])
def test_a_rank_that_is_stopped_in_a_load_is_named_and_nothing_live_changes(tmp_path, step):
    with World(tmp_path) as world:
        begin(world, tmp_path / "run")
        world.tell("load_and_be_struck", [3], step=step)
        world.tell("load_and_be_struck", [0, 1, 2], step="")
        heard = world.hear(PATIENCE_S, [0, 1, 2])
        assert set(heard) == {0, 1, 2}
        for rank, outcome in heard.items():
            assert outcome.kind == "LoadAbortedError"
            assert outcome.facts["silent"] == [3]
            assert outcome.facts["phase"] == step
            assert outcome.waited_s <= DEADLINE_S + GRACE_S, f"rank {rank}"
        world.signal(3, signal.SIGCONT)
        assert world.hear(PATIENCE_S, [3])[3].kind == "LoadAbortedError"
        for rank, outcome in world.ask("look").items():
            assert outcome.value == expected(rank, -1), "a live tensor was changed (INV-8)"
        assert check_whole(world) == 1
