"""SIGKILL at every step of the protocol: what a load gives afterwards is old or new, and whole."""

from __future__ import annotations

import pytest
from tests.distributed.aftermath import (
    DEADLINE_S,
    check_sound,
    tear,
)
from tests.distributed.launch import World
from tests.distributed.rank import OF_RANK_0, STEPS, Strike

pytestmark = [pytest.mark.dist, pytest.mark.waits]

# Before these, nothing can have been committed; from these on, it has been.
_COMMITTED = ("appended", "decided")
_CASES = [
    (step, rank, how)
    for step in STEPS
    for rank, how in (
        ((0, "kill"), (0, "kill all"))
        if step in OF_RANK_0
        else ((0, "kill"), (2, "kill"), (3, "kill all"))
    )
]


@pytest.mark.parametrize(("step", "rank", "how"), _CASES)
def test_after_a_kill_at_any_step_a_load_gives_the_old_checkpoint_or_the_new_one(
    tmp_path, step, rank, how
):
    committed, found = tear(tmp_path, tmp_path / "run", Strike(step=step, ranks=(rank,), how=how))
    assert found == (2 if step in _COMMITTED else 1)
    assert committed == (step in _COMMITTED) or how == "kill all"


@pytest.mark.parametrize("step", ["open", "written", "append"])
def test_a_kill_in_the_very_first_save_leaves_an_empty_repository_that_works(tmp_path, step):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo))
        world.tell("save", step=1, strike=Strike(step=step, ranks=(0,), how="kill all"))
        assert world.hear(30) == {}
    assert check_sound(repo) == []
    with World(tmp_path) as fresh:
        fresh.ask("open", output_dir=str(repo))
        fresh.tell("load")
        assert {outcome.kind for outcome in fresh.hear(30).values()} == {"RefNotFoundError"}
        fresh.ask("save", step=1)
    assert check_sound(repo) == [1]


def test_the_survivors_of_a_kill_can_close_and_leave(tmp_path):
    with World(tmp_path, store_apart=True) as world:
        world.ask("open", output_dir=str(tmp_path / "run"))
        world.ask("hurry", timeout_s=DEADLINE_S)
        world.tell("save", step=1, strike=Strike(step="write", ranks=(3,)))
        assert set(world.hear(DEADLINE_S + 20)) == {0, 1, 2}
        for rank in (0, 1, 2):
            world.tell("leave", [rank])
        assert set(world.hear(10, [0, 1, 2])) == {0, 1, 2}
