"""Where the system starts no more threads, a save fails on all ranks and the next one works."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.distributed as c10d

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.world import TorchWorld
from ckptcoord.errors import SaveAbortedError, StoreUnreachableError, ThreadLimitError

GLOBAL, REPLICATED = SharingPattern.GLOBAL, SharingPattern.REPLICATED
PATIENCE_S = 120.0  # where the kernels of deltas are still to be compiled
LIMIT = "no more threads can be started here"


@contextmanager
def no_more(name: str, *, of: str = ""):
    """No thread of such a name starts; of only those that one thread would start."""
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith(name) and threading.current_thread().name.startswith(of):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        yield


class Gate:
    """A probe that stops before the writing until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, step: str) -> None:
        if step == "write":
            self.reached.set()
            assert self.open.wait(PATIENCE_S)


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def steps(coordinator) -> list[int]:
    commits = coordinator.repository.state().commits.values()
    return [commit.checkpoint_id.step for commit in commits]


def solo(tmp_path, state, **settings):
    settings.setdefault("timeout_s", PATIENCE_S)
    return CheckpointCoordinator(
        [StateComponent("model", state, GLOBAL)],
        output_dir=tmp_path / "run",
        config=CoordinatorConfig(**settings),
    )


@pytest.mark.parametrize("name", ["ckptcoord-saves", "ckptcoord-ends", "ckptcoord-staging"])
def test_a_thread_that_does_not_start_on_one_rank_fails_the_save_on_all(job, name):
    lifted = threading.Barrier(3)

    def work(coordinator, rank: int):
        pending = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(SaveAbortedError, match=f"rank 1: ThreadLimitError: {LIMIT}"):
            pending.result(PATIENCE_S)
        if lifted.wait(PATIENCE_S) == 0:
            limit.close()
        lifted.wait(PATIENCE_S)
        with pytest.raises(SaveAbortedError, match=LIMIT):
            coordinator.save_checkpoint_async(step=2)
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        coordinator.wait()
        return steps(coordinator)

    state = {"w": torch.ones(70_000)}
    model = StateComponent("model", state, REPLICATED, validate_replication=True)
    with ExitStack() as limit:
        limit.enter_context(no_more(name, of="rank_1"))
        assert job.do(3, lambda _: [model], work) == [[2]] * 3


@pytest.mark.parametrize("name", ["ckptcoord-hash", "ckptcoord-write", "ckptcoord-encode"])
def test_a_pool_without_threads_fails_the_save_by_name(tmp_path, name):
    state = {f"w{i}": torch.randn(2_000_000) for i in range(4)}
    with solo(tmp_path, state, compression="auto", io_threads=4, deferred=False) as coordinator:
        coordinator.save_checkpoint(step=1)
        for value in state.values():
            value[::7] += 1e-3
        with no_more(name):
            pending = coordinator.save_checkpoint_async(step=2)
            with pytest.raises(ThreadLimitError, match=LIMIT):
                pending.result(PATIENCE_S)
        with pytest.raises(ThreadLimitError):
            coordinator.wait()
        assert coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        assert steps(coordinator) == [1, 2]


def test_where_nobody_helps_to_copy_the_call_copies_alone(tmp_path, caplog):
    state = {f"w{i}": torch.randn(5_000_000) for i in range(2)}
    with solo(tmp_path, state, io_threads=4, deferred=False) as coordinator:
        with no_more("ckptcoord-copying"):
            coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)
        assert f"{LIMIT}: mostly the limit" in caplog.text
        expected = state["w1"].clone()
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        assert threads("ckptcoord-copying")
        for step in (1, 2):
            state["w1"].zero_()
            coordinator.load_checkpoint(f"main@{step}")
            assert torch.equal(state["w1"], expected)


def test_saves_that_are_queued_are_told_of_their_ends_whatever_starts(tmp_path):
    with solo(tmp_path, {"w": torch.ones(3)}) as coordinator:
        first = coordinator.save_checkpoint_async(step=1)
        with no_more("ckptcoord-saves"), no_more("ckptcoord-ends"):
            second = coordinator.save_checkpoint_async(step=2)
            assert first.result(PATIENCE_S).endswith("checkpoint-1")
            assert second.result(PATIENCE_S).endswith("checkpoint-2")
            coordinator.wait()


def test_the_thread_that_tells_does_not_end_while_a_save_is_unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptcoord.dist.savequeue._IDLE_S", 0.05)
    gate = Gate()
    with solo(tmp_path, {"w": torch.ones(3)}, probe=gate) as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        assert gate.reached.wait(PATIENCE_S)
        coordinator._background.queue._teller.join(0.3)  # idle for longer than it stays
        with no_more("ckptcoord-ends"):
            gate.open.set()
            assert pending.result(PATIENCE_S)
        coordinator.wait()


def test_a_callback_that_exits_leaves_the_thread_that_tells(tmp_path, caplog):
    def leave(_):
        raise SystemExit

    gate = Gate()
    with solo(tmp_path, {"w": torch.ones(3)}, probe=gate) as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        pending.committed.add_done_callback(leave)
        gate.open.set()
        coordinator.wait()
        assert coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
    assert "a callback of the save of checkpoint-1 failed" in caplog.text


def test_a_store_that_no_thread_could_ask_is_not_blamed():
    world = TorchWorld(c10d.HashStore(), 0, 1, host="this process", host_is_rank_0=True)
    world.begin(SaveAbortedError, "checkpoint-1")
    with no_more("ckptcoord-store"), pytest.raises(SaveAbortedError, match=LIMIT) as caught:
        world.agree("open", 1, sum, deadline=Deadline.after(1))
    assert not caught.value.silent
    assert isinstance(caught.value.__cause__, StoreUnreachableError)
    assert world.agree("open", 1, sum, deadline=Deadline.after(PATIENCE_S)) == 1
    world.close()


@pytest.mark.parametrize("name", ["ckptcoord-base", "ckptcoord-encode"])
def test_an_object_is_saved_again_once_threads_start_again(tmp_path, name):
    obj = {"a": torch.randn(40_000), "b": torch.randn(40_000)}
    ckptcoord.save(obj, tmp_path)
    obj["a"][:10] += 1
    with no_more(name), pytest.raises(ThreadLimitError, match=LIMIT):
        ckptcoord.save(obj, tmp_path)
    ckptcoord.save(obj, tmp_path)
    with no_more("ckptcoord-read"), pytest.raises(ThreadLimitError, match=LIMIT):
        ckptcoord.load(tmp_path)
    found = ckptcoord.load(tmp_path)
    assert isinstance(found, dict)
    assert torch.equal(found["a"], obj["a"])
