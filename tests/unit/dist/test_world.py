"""Rounds: everyone says, rank 0 decides, and everyone hears the same (INV-7)."""

from __future__ import annotations

import threading
import time

import pytest

from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.topology import agree_on_topology
from ckptcoord.dist.world import Solo, TorchWorld, current_world
from ckptcoord.errors import (
    CheckpointExistsError,
    CkptError,
    ConfigError,
    FencedError,
    LoadAbortedError,
    SaveAbortedError,
    StorageFullError,
)
from ckptcoord.testing.ranks import run_ranks

FULL = StorageFullError(operation="write", path="x", why="No space left on device", errno=28)


def soon() -> Deadline:
    return Deadline.after(0.3)


def test_every_rank_returns_what_rank_0_decided():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        first = world.agree("sum", world.rank, sum, deadline=Deadline.after(5))
        second = world.agree("list", world.rank * 10, lambda said: said, deadline=Deadline.after(5))
        return [first, second]

    assert run_ranks(5, work).values == [[10, [0, 10, 20, 30, 40]]] * 5


def test_many_rounds_leave_no_keys_behind():
    import torch.distributed as c10d

    store = c10d.HashStore()

    def work(world: TorchWorld) -> int:
        for _ in range(50):
            world.begin(SaveAbortedError, "checkpoint-1")
            world.agree("one", "x", lambda _: None, deadline=Deadline.after(5))
            world.exchange("e", (0, 1, 2), world.rank, deadline=Deadline.after(5))
            world.agree("two", "x", lambda _: None, deadline=Deadline.after(5))
        return 0

    assert run_ranks(3, work, store=store).values == [0, 0, 0]
    assert store.num_keys() <= 8


def test_an_error_on_one_rank_is_raised_on_all_and_names_the_rank():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-7")
        word = FULL if world.rank == 2 else "fine"
        return world.agree("vote", word, lambda _: None, deadline=Deadline.after(5))

    errors = run_ranks(4, work).errors
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, SaveAbortedError)
        assert error.phase == "vote"
        assert set(error.failures) == {2}
        assert "StorageFullError" in error.failures[2]
        assert "checkpoint-7" in str(error)
    assert errors[2].__cause__ is FULL
    assert errors[0].__cause__ is None


def test_the_same_error_on_every_rank_is_raised_as_itself():
    def work(world: TorchWorld) -> object:
        world.begin(LoadAbortedError, "latest")
        error = ConfigError(field="x", why="is wrong")
        return world.agree("plan", error, lambda _: None, deadline=Deadline.after(5))

    assert [type(error) for error in run_ranks(3, work).errors] == [ConfigError] * 3


def test_what_rank_0_decides_against_is_the_same_typed_error_everywhere():
    def refuse(_: object) -> object:
        raise FencedError(branch="main", writer="a", holder="b", epoch=3)

    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        return world.agree("vote", None, refuse, deadline=Deadline.after(5))

    for error in run_ranks(3, work).errors:
        assert isinstance(error, FencedError)
        assert (error.branch, error.holder, error.epoch) == ("main", "b", 3)


def test_a_bug_in_a_decision_reaches_all_ranks_instead_of_hanging_them():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        return world.agree("vote", None, lambda said: said[99], deadline=Deadline.after(5))

    errors = run_ranks(3, work).errors
    assert all(isinstance(e, CkptError) and "IndexError" in str(e) for e in errors)
    assert isinstance(errors[0].__cause__, IndexError)


@pytest.mark.parametrize("silent", [1, 3])
def test_a_silent_rank_is_named_on_all_others_within_the_deadline(silent: int):
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        world.agree("open", "ok", lambda _: None, deadline=Deadline.after(5))
        world.note("checkpoint-1: write")
        if world.rank == silent:
            return "silent"
        started = time.monotonic()
        with pytest.raises(SaveAbortedError) as caught:
            world.agree("vote", "ok", lambda _: None, deadline=soon())
        return caught.value, time.monotonic() - started

    outcomes = run_ranks(4, work).values
    for rank in set(range(4)) - {silent}:
        error, waited = outcomes[rank]
        assert error.silent == (silent,)
        assert "last seen in 'checkpoint-1: write'" in error.failures[silent]
        assert waited < 0.3 + 2


def test_a_silent_rank_0_is_named_by_the_others():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        if world.rank == 0:
            return None
        with pytest.raises(SaveAbortedError) as caught:
            world.agree("vote", "ok", lambda _: None, deadline=soon())
        return caught.value

    for error in run_ranks(3, work).values[1:]:
        assert error.silent == (0,)
        assert "silent for 0.3 s" in error.failures[0]


def test_after_a_failed_round_the_next_operation_works():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        with pytest.raises(SaveAbortedError):
            world.agree("vote", FULL if world.rank else "ok", lambda _: None, deadline=soon())
        world.begin(SaveAbortedError, "checkpoint-2")
        return world.agree("vote", world.rank, lambda said: said, deadline=Deadline.after(5))

    assert run_ranks(2, work).values == [[0, 1]] * 2


def test_an_exchange_is_among_its_members_only_and_names_the_one_that_is_silent():
    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "checkpoint-1")
        if world.rank == 0:
            return None
        values = world.exchange("a", (1, 2), world.rank, deadline=Deadline.after(5))
        if world.rank == 2:
            return values
        with pytest.raises(SaveAbortedError) as caught:
            world.exchange("b", (1, 2), world.rank, deadline=soon())
        assert caught.value.silent == (2,)
        return values

    assert run_ranks(3, work).values[1:] == [{1: 1, 2: 2}] * 2


def test_posts_are_read_after_a_round_and_gone_after_the_next_operation():
    import torch.distributed as c10d

    store = c10d.HashStore()

    def work(world: TorchWorld) -> object:
        world.begin(LoadAbortedError, "latest")
        if world.rank:
            world.post("k", [world.rank], deadline=Deadline.after(5))
        world.agree("between", None, lambda _: None, deadline=Deadline.after(5))
        found = world.posts("k", (0, 1, 2), deadline=Deadline.after(5))
        world.begin(LoadAbortedError, "latest")
        world.agree("next", None, lambda _: None, deadline=Deadline.after(5))
        assert world.posts("k", (0, 1, 2), deadline=Deadline.after(5)) == {}
        world.agree("last", None, lambda _: None, deadline=Deadline.after(5))
        return found

    assert run_ranks(3, work, store=store).values == [{1: [1], 2: [2]}] * 3
    assert store.num_keys() <= 4  # of the last round only


@pytest.mark.parametrize("text", ["", "x" * 8, "x" * 100, "äöü" * 40])
def test_a_long_post_is_cut_for_the_store_and_comes_whole(monkeypatch, text):
    monkeypatch.setattr("ckptcoord.dist.world._POST_BYTES", 10)
    import torch.distributed as c10d

    store = c10d.HashStore()

    def work(world: TorchWorld) -> None:
        for _ in range(2):
            world.begin(LoadAbortedError, "x")
            world.post("k", [text, world.rank], deadline=Deadline.after(5))
            world.agree("round", None, lambda said: None, deadline=Deadline.after(5))
            found = world.posts("k", (0, 1), deadline=Deadline.after(5))
            assert found == {0: [text, 0], 1: [text, 1]}
        for _ in range(2):
            world.begin(LoadAbortedError, "x")
            world.agree("round", None, lambda said: None, deadline=Deadline.after(5))

    run_ranks(2, work, store=store).values  # noqa: B018
    assert store.num_keys() < 8


def test_posts_that_cannot_reach_the_store_say_who_is_gone():
    class Lost:
        def clone(self) -> object:
            raise RuntimeError("connection reset")

    world = TorchWorld(Lost(), 1, 2, host="somewhere", host_is_rank_0=True)  # type: ignore[arg-type]
    world.begin(LoadAbortedError, "latest")
    with pytest.raises(LoadAbortedError, match="'post of k': rank 0"):
        world.post("k", 1, deadline=soon())
    with pytest.raises(LoadAbortedError, match="'posts of k': rank 0"):
        world.posts("k", (0,), deadline=soon())


def test_a_world_of_one_raises_what_it_says_and_returns_what_it_decides():
    world = Solo()
    world.begin(SaveAbortedError, "x")
    world.note("x")
    assert world.agree("p", 4, lambda said: [*said, 5], deadline=soon()) == [4, 5]
    assert world.exchange("k", (0,), "me", deadline=soon()) == {0: "me"}
    world.post("k", "me", deadline=soon())
    assert world.posts("k", (), deadline=soon()) == {}
    with pytest.raises(StorageFullError):
        world.agree("p", FULL, lambda _: None, deadline=soon())
    world.close()


def test_a_launcher_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="not initialised"):
        current_world()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(current_world(), Solo)


def test_an_error_crosses_ranks_with_its_facts():
    error = CheckpointExistsError(checkpoint_id="checkpoint-5")
    back = CkptError.from_document(error.to_document())
    assert type(back) is CheckpointExistsError
    assert (str(back), back.checkpoint_id) == (str(error), "checkpoint-5")


def test_groups_and_nodes_are_put_together_from_what_each_rank_knows(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def work(world: TorchWorld) -> object:
        world.begin(SaveAbortedError, "setup")
        groups = {"tp": [0, 1] if world.rank < 2 else [2, 3], "dp": None if world.rank else [0]}
        return agree_on_topology(world, groups, Deadline.after(5))

    for topology in run_ranks(4, work).values:
        assert topology.nodes == ((0, 1, 2, 3),)
        assert [(g.name, g.instances) for g in topology.groups] == [
            ("dp", ((0,),)),
            ("tp", ((0, 1), (2, 3))),
        ]


def test_what_an_earlier_incarnation_left_in_the_store_is_no_answer():
    """torchrun restarts its workers with the store that the ones before have used."""
    import torch.distributed as c10d

    store, late = c10d.HashStore(), threading.Event()

    def decided(word: str, *, slow: bool = False) -> list[object]:
        def work(world: TorchWorld) -> object:
            if slow and world.rank == 0:
                assert late.wait(5)  # the others ask before rank 0 has said anything new
            if slow and world.rank == 1:
                threading.Timer(0.3, late.set).start()
            world.begin(SaveAbortedError, "main@1")
            return [
                world.agree(phase, word, lambda said: said[0], deadline=Deadline.after(10))
                for phase in ("open", "vote")
            ]

        return run_ranks(3, work, store=store).values

    assert decided("old") == [["old", "old"]] * 3
    assert decided("new", slow=True) == [["new", "new"]] * 3
