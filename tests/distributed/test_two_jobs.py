"""Two jobs on one branch (one wins, nothing is lost), and worlds that end in good order."""

from __future__ import annotations

import pytest
from tests.distributed.aftermath import check_sound, check_whole
from tests.distributed.launch import World

from ckptcoord import open_repository

pytestmark = [pytest.mark.dist, pytest.mark.waits]


def test_of_two_jobs_that_save_at_the_same_time_one_wins_and_nothing_acknowledged_is_lost(tmp_path):
    repo = tmp_path / "run"
    acknowledged: set[int] = set()
    fenced: set[int] = set()
    with World(tmp_path) as odd, World(tmp_path) as even:
        jobs = {1: odd, 0: even}
        for job in jobs.values():
            job.ask("open", output_dir=str(repo))
        for turn in range(1, 9):
            for name, job in jobs.items():
                job.tell("save", step=2 * turn + name)
            for name, job in jobs.items():
                kinds = {outcome.kind for outcome in job.hear(60).values()}
                assert len(kinds) == 1, kinds
                if kinds == {""}:
                    assert name not in fenced, "a fenced job has committed"
                    acknowledged.add(2 * turn + name)
                else:
                    assert kinds == {"FencedError"}
                    fenced.add(name)
        assert len(fenced) == 1
        (loser,) = fenced
        assert check_whole(jobs[1 - loser]) == max(acknowledged)
    steps = check_sound(repo)
    assert sorted(acknowledged) == steps
    assert {16 + (1 - loser), 14 + (1 - loser)} <= acknowledged


def test_a_fenced_job_deletes_nothing_and_its_next_incarnation_can_take_over(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as old, World(tmp_path) as new:
        for step, job in ((1, old), (2, new)):
            job.ask("open", output_dir=str(repo))
            job.ask("save", step=step)
        for _ in range(2):
            old.tell("save", step=3)
            assert {outcome.kind for outcome in old.hear(60).values()} == {"FencedError"}
        assert check_sound(repo) == [1, 2]
        new.ask("save", step=3)
        old.ask("open", output_dir=str(repo))
        assert check_whole(old) == 3
        old.ask("save", step=4)
        new.tell("save", step=5)
        assert {outcome.kind for outcome in new.hear(60).values()} == {"FencedError"}
    assert check_sound(repo) == [1, 2, 3, 4]
    claims = open_repository(repo).state().claims
    assert [claim.epoch for claim in claims.values()] == [3]


@pytest.mark.parametrize("turn", range(4))
def test_a_world_with_a_live_ddp_model_ends_without_hanging(tmp_path, turn):
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(tmp_path / "run"))
        losses = world.ask("train", steps=3, within_s=100)
        assert len({outcome.value for outcome in losses.values()}) == 4, "each has its own data"
        world.ask("save", step=1)
        assert world.close(30) == [0, 0, 0, 0]
