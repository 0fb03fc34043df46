"""Saves in the background: the state at the call, in order, and failures heard by all (ADR 9)."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.dist.session import heard
from ckptcoord.dist.snapshot import Snapshot
from ckptcoord.errors import (
    CheckpointExistsError,
    CkptError,
    ClosedError,
    ConfigError,
    DisagreementError,
    ReplicationError,
    SaveAbortedError,
    StorageError,
)
from ckptcoord.testing.ranks import run_ranks

GLOBAL, REPLICATED, PER_RANK, PER_GROUP = (
    SharingPattern.GLOBAL,
    SharingPattern.REPLICATED,
    SharingPattern.PER_RANK,
    SharingPattern.PER_GROUP,
)
PATIENCE_S = 20.0
FULL = StorageError(operation="write", path="model.safetensors", why="no space on the disk")


def weights(value: float = 0.0) -> dict:
    own = torch.Generator().manual_seed(7)
    return {f"layer.{i}.weight": torch.randn(64, 33, generator=own) + value for i in range(12)}


def solo(tmp_path, state, **settings):
    settings.setdefault("timeout_s", PATIENCE_S)
    return CheckpointCoordinator(
        [StateComponent("model", state, GLOBAL)],
        output_dir=tmp_path / "run",
        config=CoordinatorConfig(**settings),
    )


def steps(repository) -> list[int]:
    """Of the checkpoints, in the order of their commits."""
    return [commit.checkpoint_id.step for commit in repository.state().commits.values()]


class Gate:
    """A probe that stops at a step of the protocol until it is opened."""

    def __init__(self, at: str) -> None:
        self.at, self.reached, self.open = at, threading.Event(), threading.Event()

    def __call__(self, step: str) -> None:
        if step == self.at:
            self.reached.set()
            assert self.open.wait(PATIENCE_S)


class FailsAt:
    """A probe that raises at a step of the protocol, so many times, what storage might."""

    def __init__(self, at: str, times: int = 1, error: BaseException | None = None) -> None:
        self.at, self.left, self.error = at, times, error or FULL

    def __call__(self, step: str) -> None:
        if step == self.at and self.left:
            self.left -= 1
            raise self.error


# --- what is saved -------------------------------------------------------------------------------


def state_of(rank: int, value: float) -> dict[str, dict[str, object]]:
    return {
        "model": weights(value),
        "cursor": {"at": np.array(value), "order": np.arange(9) + int(value)},
        "rng": {"state": torch.full((rank + 3,), value)},
        "expert": {f"w{rank}": torch.full((70, 40), value + rank), "bias": torch.ones(3) * value},
    }


def declare(held: dict[str, dict[str, object]]) -> list[StateComponent]:
    return [
        StateComponent("model", held["model"], REPLICATED, validate_replication=True),
        StateComponent("cursor", held["cursor"], GLOBAL),
        StateComponent("rng", held["rng"], PER_RANK),
        StateComponent("expert", held["expert"], PER_GROUP, process_group_name="ep"),
    ]


def put(held: dict[str, dict[str, object]], new: dict[str, dict[str, object]]) -> None:
    """Every tensor in place, as training does it."""
    for key, part in new.items():
        for name, value in part.items():
            held[key][name][...] = value


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("compression", ["off", "auto"])
def test_the_checkpoint_holds_the_state_at_the_call(job, size, compression):
    def groups(rank: int) -> dict[str, object]:
        return {"ep": [r for r in range(size) if r // 2 == rank // 2]}

    held = [state_of(rank, 0.0) for rank in range(size)]

    def work(coordinator, rank: int) -> None:
        for step in range(1, 5):
            put(held[rank], state_of(rank, float(step)))
            coordinator.save_checkpoint_async(step=step)
            put(held[rank], state_of(rank, -1.0))  # what comes after the call is not saved

    job.do(size, lambda rank: declare(held[rank]), work, groups=groups, compression=compression)
    for step in range(1, 5):
        fresh = [state_of(rank, -2.0) for rank in range(size)]
        job.do(
            size,
            lambda rank, fresh=fresh: declare(fresh[rank]),
            lambda coordinator, _, step=step: coordinator.load_checkpoint(f"main@{step}"),
            groups=groups,
        )
        for rank in range(size):
            for key, part in state_of(rank, float(step)).items():
                for name, value in part.items():
                    assert np.array_equal(value, fresh[rank][key][name]), (step, rank, key, name)


def test_a_structure_that_changed_on_one_member_is_named_and_the_next_save_stands(job):
    held = [{"a": torch.zeros(5000)}, {"b": torch.zeros(6000)}]

    def expert(rank: int) -> list[StateComponent]:
        return [StateComponent("expert", held[rank], PER_GROUP, process_group_name="ep")]

    def work(coordinator, rank: int):
        coordinator.save_checkpoint(step=1)
        if rank == 1:
            held[1]["a"] = torch.zeros(5000)  # which member writes what is another matter now
        coordinator.save_checkpoint_async(step=2)
        try:
            coordinator.wait()
        except CkptError as error:
            assert "not kept" in str(error)  # noqa: PT017 (it may also have gone well)
        coordinator.save_checkpoint_async(step=3)
        coordinator.wait()
        return steps(coordinator.repository)[-1]

    said = job.do(2, expert, work, groups=lambda _: {"ep": [0, 1]})
    assert said == [3, 3]


def test_replicas_that_differ_are_named_by_tensor_and_rank(job):
    def model(rank: int) -> list[StateComponent]:
        state = weights()
        if rank == 2:
            state["layer.3.weight"][5, 5] += 1
        return [StateComponent("model", state, REPLICATED, validate_replication=True)]

    def work(coordinator, rank: int) -> None:
        coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)

    for error in job.run(3, model, work).errors:
        assert isinstance(error, ReplicationError)
        assert "layer.3.weight" in str(error)
        assert list(error.minority) == [2]


def test_commits_come_in_the_order_of_the_calls(tmp_path):
    with solo(tmp_path, weights()) as coordinator:
        pending = [coordinator.save_checkpoint_async(step=step) for step in (3, 1, 2, 9)]
        coordinator.wait()
        assert all(one.done() for one in pending)
        assert pending[1].result().endswith("checkpoint-1")
        assert steps(coordinator.repository) == [3, 1, 2, 9]


def test_a_call_waits_when_the_queue_is_full(tmp_path):
    gate, reports = Gate("write"), []
    with solo(
        tmp_path, weights(), queue_depth=1, probe=gate, on_saved=reports.append
    ) as coordinator:
        coordinator.save_checkpoint_async(step=1)
        assert gate.reached.wait(PATIENCE_S)
        threading.Timer(0.2, gate.open.set).start()
        coordinator.save_checkpoint_async(step=2)
        coordinator.wait()
    assert reports[0].waited_s < 0.1 < reports[1].waited_s <= reports[1].stall_s
    assert [one.queue_depth for one in reports] == [1, 1]


def test_without_room_for_copies_the_call_waits_for_the_save_and_the_log_says_so_once(
    tmp_path, caplog
):
    state, reports = weights(), []
    with solo(tmp_path, state, staging_bytes=1000, on_saved=reports.append) as coordinator:
        coordinator.save_checkpoint_async(step=0)
        pending = coordinator.save_checkpoint_async(step=1)
        assert pending.done()
        assert pending.staged.done()
        state["layer.0.weight"].fill_(5)
        coordinator.load_checkpoint("main@1")
    assert torch.equal(state["layer.0.weight"], weights()["layer.0.weight"])
    for report in reports:
        assert report.total_s - report.opened_s <= report.waited_s < report.stall_s
        assert report.staged_s is None  # nothing was copied
    assert caplog.text.count("staging_bytes is 1,000, which has no room for what rank 0") == 1


def test_a_waiting_save_comes_after_those_in_the_queue(tmp_path):
    with solo(tmp_path, weights()) as coordinator:
        coordinator.save_checkpoint_async(step=1)
        coordinator.save_checkpoint_async(step=2)
        coordinator.save_checkpoint(step=3)
        assert steps(coordinator.repository) == [1, 2, 3]


def test_validate_reads_back_what_was_saved(tmp_path):
    with solo(tmp_path, weights()) as coordinator:
        assert coordinator.save_checkpoint_async(step=1, validate=True).result(PATIENCE_S)


# --- failures ------------------------------------------------------------------------------------


def outcomes(coordinator, calls) -> list[str]:
    """What each call raised: the class's name, or nothing."""
    said = []
    for call in calls:
        try:
            call(coordinator)
        except CkptError as error:
            said.append(type(error).__name__)
        else:
            said.append("")
    return said


def test_state_that_cannot_be_read_on_one_rank_is_named_on_all(job):
    broken = [False, False, True]

    def model(rank: int) -> list[StateComponent]:
        def state():
            if broken[rank]:
                raise ValueError("the engine is on fire")
            return {"w": torch.ones(3)}

        return [StateComponent("model", [], REPLICATED, get_state=state)]

    def work(coordinator, rank: int):
        pending = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(SaveAbortedError, match=r"rank 2: .*on fire"):
            pending.result(PATIENCE_S)
        broken[rank] = False
        with pytest.raises(SaveAbortedError, match="on fire") as caught:
            coordinator.save_checkpoint_async(step=2)
        (note,) = caught.value.__notes__
        assert note.startswith("The save of checkpoint-1 in the background to /")
        assert "did nothing else" in note
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        return steps(coordinator.repository)

    assert job.do(3, model, work) == [[2]] * 3


class PanicException(BaseException):
    """Of the name of pyo3's, which is no Exception."""


@pytest.mark.parametrize(("rank", "at"), [(1, "written"), (0, "manifest")])
def test_a_panic_on_one_rank_is_said_to_all(job, rank, at):
    """In its own work, or where rank 0 decides for all."""
    panic = FailsAt(at, error=PanicException("called unwrap on a None"))

    def work(coordinator, _):
        pending = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(CkptError, match=f"rank {rank}.*PanicException: called unwrap"):
            pending.result(PATIENCE_S)
        with pytest.raises(CkptError, match="PanicException"):
            coordinator.wait()
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        return steps(coordinator.repository)

    probes = [panic if one == rank else FailsAt("never") for one in range(2)]
    assert run_with_probes(job, probes, work) == [[2]] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_not_heard_but_raised(error):
    def interrupted():
        raise error

    with pytest.raises(error):
        heard(interrupted)


def test_ranks_in_different_operations_do_not_wait_to_agree_on_a_call(job, caplog):
    def work(coordinator, rank: int):
        coordinator.save_checkpoint(step=1)
        calls = [lambda c: c.save_checkpoint_async(step=2).result(PATIENCE_S), lambda c: c.wait()]
        if rank:
            calls = [lambda c: c.load_checkpoint()]
        assert set(outcomes(coordinator, calls)) == {"DisagreementError"}
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)
        return steps(coordinator.repository)

    results = job.do(2, lambda _: [StateComponent("model", weights(), REPLICATED)], work)
    assert results == [[1, 2]] * 2
    assert "could not agree" not in caplog.text


def test_a_failure_is_raised_by_the_same_call_on_every_rank(job):
    """Rank 0 has made a call more than rank 1 when the save fails: neither of these raises it."""
    gates = [Gate("write"), FailsAt("written")]
    ahead = threading.Event()

    def work(coordinator, rank: int):
        said = []
        pending = coordinator.save_checkpoint_async(step=1)
        if rank == 0:
            said += outcomes(coordinator, [lambda c: c.save_checkpoint_async(step=2)])
            ahead.set()
            gates[0].open.set()
        assert ahead.wait(PATIENCE_S)
        with pytest.raises(SaveAbortedError):
            pending.result(PATIENCE_S)
        if rank == 1:  # it knows of the failure, and rank 0's call was made when nobody did
            said += outcomes(coordinator, [lambda c: c.save_checkpoint_async(step=2)])
        third = [lambda c: c.save_checkpoint_async(step=3)] * 2
        said += outcomes(coordinator, [*third, lambda c: c.wait()])
        return said, steps(coordinator.repository)

    results = run_with_probes(job, gates, work)
    assert results == [(["", "SaveAbortedError", "", ""], [2, 3])] * 2


def run_with_probes(job, probes, work):
    """Each rank has a probe of its own."""

    def one(world):
        with CheckpointCoordinator(
            [StateComponent("model", weights(), REPLICATED)],
            {},
            world,
            job.output_dir,
            config=CoordinatorConfig(timeout_s=PATIENCE_S, probe=probes[world.rank]),
        ) as coordinator:
            return work(coordinator, world.rank)

    return run_ranks(len(probes), one).values


@pytest.mark.parametrize("at", ["written", "manifest", "rename", "append"])
def test_a_failed_save_leaves_the_last_commit_and_no_debris(tmp_path, at):
    with solo(tmp_path, weights()) as coordinator:
        coordinator.save_checkpoint(step=1)
    with solo(tmp_path, weights(), probe=FailsAt(at)) as coordinator:
        pending = coordinator.save_checkpoint_async(step=2)
        with pytest.raises(CkptError, match="no space"):
            pending.result(PATIENCE_S)
        with pytest.raises(CkptError, match="no space"):
            coordinator.wait()
        assert steps(coordinator.repository) == [1]
        assert not list((tmp_path / "run/.ckptcoord/staging").iterdir())
        coordinator.save_checkpoint_async(step=2)
        coordinator.wait()
        assert steps(coordinator.repository) == [1, 2]


def test_where_no_thread_may_become_nicer_saves_go_on_as_they_are(tmp_path, monkeypatch):
    """As in some sandboxes."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    with solo(tmp_path, weights()) as coordinator:
        coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_the_worker_lets_training_go_first_and_the_copies_half_as_much(tmp_path):
    def niceness(name: str) -> int:
        new = set(threading.enumerate()) - others
        (thread,) = [one for one in new if one.name == name]
        return os.getpriority(os.PRIO_PROCESS, thread.native_id)

    others = set(threading.enumerate())
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    gate, model = Gate("write"), torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = [
        StateComponent("model", model, REPLICATED),
        StateComponent("optimizer", optimizer, REPLICATED),
    ]
    config = CoordinatorConfig(background_nice=4, probe=gate)
    with CheckpointCoordinator(parts, output_dir=tmp_path, config=config) as coordinator:
        coordinator.save_checkpoint_async(step=1, deferred=True)
        assert gate.reached.wait(PATIENCE_S)
        assert niceness("ckptcoord-staging") == min(19, own + 2)
        assert niceness("ckptcoord-saves") == min(19, own + 4)
        gate.open.set()


def test_close_raises_what_failed_and_the_rest_is_committed(tmp_path):
    coordinator = solo(tmp_path, weights(), probe=FailsAt("written"))
    coordinator.save_checkpoint_async(step=1)
    coordinator.save_checkpoint_async(step=2)
    with pytest.raises(CkptError, match="no space") as caught:
        coordinator.close()
    assert caught.value.__notes__[-1].endswith("failed. The coordinator is closed all the same")
    coordinator.close()
    assert steps(coordinator.repository) == [2]
    with pytest.raises(ClosedError):
        coordinator.save_checkpoint_async(step=3)


def test_an_error_in_the_block_comes_before_that_of_a_save(tmp_path):
    def train():
        with solo(tmp_path, weights(), probe=FailsAt("written")) as coordinator:
            coordinator.save_checkpoint_async(step=1)
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert "no space" in caught.value.__notes__[0]


def test_a_save_whose_own_error_ends_the_block_is_not_noted_as_another(tmp_path):
    def train():
        with solo(tmp_path, weights(), probe=FailsAt("written", error=full)) as coordinator:
            coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)

    full = StorageError(operation="write", path="model.safetensors", why="no space on the disk")
    with pytest.raises(StorageError, match="no space") as caught:
        train()
    assert not [note for note in caught.value.__notes__ if "failed, too" in note]


def test_a_failure_that_is_only_warned_of_is_raised_by_its_future_alone(tmp_path, caplog):
    with solo(tmp_path, weights(), probe=FailsAt("written"), on_failure="warn") as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        coordinator.save_checkpoint_async(step=2)
        coordinator.wait()
        with pytest.raises(CkptError, match="no space"):
            pending.result()
        assert steps(coordinator.repository) == [2]
    assert "the save of checkpoint-1 in the background failed" in caplog.text
    assert "no space" in caplog.text


@pytest.mark.parametrize("deferred", [("auto", "auto"), (True, True), (False, "auto")])
def test_what_auto_has_to_learn_ends_no_training_and_what_was_asked_for_does(job, caplog, deferred):
    """Where the ranks have not asked for the same, all of them raise it, in the same call."""
    learns = deferred == ("auto", "auto")
    models = [torch.nn.Linear(300, 300) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]

    def components(rank: int) -> list[StateComponent]:
        return [
            StateComponent("model", models[rank], PER_RANK),
            StateComponent("optimizer", optimizers[rank], PER_RANK),
        ]

    def train(rank: int) -> None:
        models[rank].weight.grad = torch.ones_like(models[rank].weight)
        optimizers[rank].step()

    def work(coordinator, rank: int) -> list[bool]:
        gate = Gate("copy")
        coordinator._background._stager._probe = lambda step: (
            gate(step) if "staging" in threading.current_thread().name else None
        )
        coordinator.save_checkpoint_async(step=1)
        train(rank)
        pending = coordinator.save_checkpoint_async(step=2, deferred=deferred[rank])
        if rank:  # as an average of weights does, put in for an evaluation
            models[rank].weight.data += 1
        gate.open.set()
        with pytest.raises(CkptError, match=r"rank 1.*model\.weight"):
            pending.result(PATIENCE_S)
        if not learns:
            with pytest.raises(SaveAbortedError, match="StateMovedError"):
                coordinator.wait()
            coordinator.save_checkpoint(step=2)
            return []
        found = []
        for step in (3, 4):
            train(rank)
            pending = coordinator.save_checkpoint_async(step=step)
            expected = models[rank].weight.detach().clone()
            models[rank].weight.data += 1
            pending.result(PATIENCE_S)
            coordinator.wait()
            coordinator.load_checkpoint()
            found.append(torch.equal(models[rank].weight, expected))
        return found

    assert job.do(2, components, work) == [[True, True] if learns else []] * 2
    assert ("training goes on" in caplog.text) is learns


@pytest.mark.parametrize(("times", "saved"), [(1, True), (2, True), (3, False)])
def test_what_storage_refused_is_tried_twice_again(tmp_path, monkeypatch, times, saved):
    monkeypatch.setattr("ckptcoord.dist.savequeue._RETRY_AFTER_S", (0.01, 0.01))
    state = weights()
    with solo(tmp_path, state, probe=FailsAt("written", times), on_failure="retry") as coordinator:
        coordinator.save_checkpoint_async(step=1)
        state["layer.0.weight"].fill_(5)
        if not saved:
            with pytest.raises(StorageError, match="no space"):
                coordinator.wait()
            return
        coordinator.wait()
        coordinator.load_checkpoint("main@1")
    assert torch.equal(state["layer.0.weight"], weights()["layer.0.weight"])


def test_what_no_other_try_can_mend_is_not_tried_again(tmp_path):
    with solo(tmp_path, weights(), on_failure="retry") as coordinator:
        coordinator.save_checkpoint(step=1)
        coordinator.save_checkpoint_async(step=1)
        with pytest.raises(CheckpointExistsError):
            coordinator.wait()


def test_a_second_save_of_a_step_in_the_queue_is_refused_by_name(job):
    def work(coordinator, rank: int):
        coordinator.save_checkpoint_async(step=1)
        again = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(CheckpointExistsError, match="checkpoint-1"):
            again.result(PATIENCE_S)
        with pytest.raises(CheckpointExistsError, match="checkpoint-1"):
            coordinator.wait()
        coordinator.save_checkpoint_async(step=1, overwrite=True).result(PATIENCE_S)

    job.do(2, lambda _: [StateComponent("model", weights(), REPLICATED)], work)


def test_a_wrong_request_on_one_rank_is_heard_by_all(job, caplog):
    def work(coordinator, rank: int):
        bad = {"step": 1} if rank else {"step": 1, "checkpoint_id": "checkpoint-2"}
        pending = coordinator.save_checkpoint_async(**bad)
        with pytest.raises(SaveAbortedError, match="rank 0: ConfigError"):
            pending.result(PATIENCE_S)
        return outcomes(
            coordinator,
            [lambda c: c.save_checkpoint_async(step=5), lambda c: c.save_checkpoint(step=5)],
        )

    reports = []
    said = job.do(
        2,
        lambda _: [StateComponent("model", weights(), REPLICATED)],
        work,
        on_saved=reports.append,
    )
    assert said == [["SaveAbortedError", ""]] * 2
    failed = {report.rank: report for report in reports if not report.ok}
    assert {rank: (one.checkpoint_id, one.step) for rank, one in failed.items()} == {
        0: ("", -1),
        1: ("checkpoint-1", 1),
    }
    assert all("rank 0: ConfigError" in one.error for one in failed.values())
    assert "a checkpoint was not saved" in caplog.text


def test_ranks_that_take_failures_otherwise_are_told_at_once(tmp_path):
    def work(world):
        how = "warn" if world.rank else "raise"
        parts = [StateComponent("model", weights(), REPLICATED)]
        config = CoordinatorConfig(timeout_s=10 * PATIENCE_S, on_failure=how)
        with pytest.raises(DisagreementError, match=r"on_failure: raise on .* 0; warn on .* 1"):
            CheckpointCoordinator(parts, {}, world, tmp_path, config=config)

    run_ranks(2, work)


def test_one_rank_that_waits_for_its_save_and_one_that_does_not_are_told_at_once(tmp_path):
    def work(world):
        parts = [StateComponent("model", weights(), REPLICATED)]
        config = CoordinatorConfig(timeout_s=10 * PATIENCE_S)
        with CheckpointCoordinator(parts, {}, world, tmp_path, config=config) as coordinator:
            save = coordinator.save_checkpoint if world.rank else coordinator.save_checkpoint_async
            with pytest.raises(DisagreementError, match="saving in the background: True on"):
                getattr(save(step=1), "result", None)(PATIENCE_S)
            with suppress(DisagreementError):
                coordinator.wait()
            return coordinator.save_checkpoint(step=2)

    assert len(set(run_ranks(2, work).values)) == 1


def test_a_signals_handler_may_close_what_is_being_closed(tmp_path):
    gate, closed = Gate("write"), []
    coordinator = solo(tmp_path, weights(), probe=gate)

    def close(*_: object) -> None:
        coordinator.close()
        closed.append(True)
        gate.open.set()

    pending = coordinator.save_checkpoint_async(step=1)
    before = signal.signal(signal.SIGUSR1, close)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        coordinator.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert closed
    assert pending.result(PATIENCE_S).endswith("checkpoint-1")


@pytest.mark.parametrize("who", ["on_saved", "the log"])
def test_whoever_watches_a_save_that_was_committed_cannot_make_it_a_failure(tmp_path, who, capsys):
    def leave(what: object) -> None:
        raise SystemExit("enough") if who == "on_saved" else OSError("the disk of the log is full")

    handler = logging.Handler()
    handler.emit = leave  # type: ignore[method-assign]
    logger = logging.getLogger("ckptcoord")
    logger.setLevel(logging.INFO)
    if who == "the log":
        logger.addHandler(handler)
    on_saved = leave if who == "on_saved" else None
    try:
        with solo(tmp_path, weights(), on_saved=on_saved) as coordinator:
            for step in (1, 2):
                assert coordinator.save_checkpoint_async(step=step).result(PATIENCE_S)
            coordinator.wait()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert ("the disk of the log is full" in capsys.readouterr().err) is (who == "the log")


def test_whatever_ends_the_worker_is_a_failure_and_the_next_save_works(tmp_path):
    with solo(tmp_path, weights(), probe=FailsAt("write", error=SystemExit("bye"))) as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(CkptError, match="SystemExit"):
            pending.result(PATIENCE_S)
        with pytest.raises(CkptError, match="SystemExit"):
            coordinator.save_checkpoint_async(step=2)
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)


@pytest.mark.parametrize("length", [1, 2])
def test_an_error_that_is_its_own_cause_is_raised_like_any(tmp_path, length):
    errors = [ValueError(f"boom {index}") for index in range(length)]
    for index, error in enumerate(errors):
        error.__cause__ = errors[index - 1]
    with solo(tmp_path, weights(), probe=FailsAt("write", error=errors[0])) as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        with pytest.raises(CkptError, match="boom 0"):
            pending.result(PATIENCE_S)
        with pytest.raises(CkptError, match="boom 0"):
            coordinator.wait()


def test_a_worker_that_cannot_go_on_fails_all_that_is_queued(tmp_path, monkeypatch):
    gate = Gate("write")
    with solo(tmp_path, weights(), probe=gate) as coordinator:
        queue = coordinator._background.queue
        monkeypatch.setattr(type(queue), "_run", lambda *_: gate("write") or 1 / 0)
        pending = [coordinator.save_checkpoint_async(step=step) for step in (1, 2)]
        assert gate.reached.wait(PATIENCE_S)
        gate.open.set()
        for one in pending:
            with pytest.raises(CkptError, match="ZeroDivisionError"):
                one.result(PATIENCE_S)
        with pytest.raises(CkptError, match="ZeroDivisionError"):
            coordinator.save_checkpoint_async(step=3)
        monkeypatch.undo()
        coordinator.save_checkpoint_async(step=3).result(PATIENCE_S)


def test_a_save_cannot_be_cancelled_by_one_rank(tmp_path):
    gate = Gate("write")
    with solo(tmp_path, weights(), probe=gate) as coordinator:
        pending = coordinator.save_checkpoint_async(step=1)
        assert not pending.committed.cancel()
        assert not pending.staged.cancel()
        gate.open.set()
        assert pending.result(PATIENCE_S)


def test_a_callback_that_calls_back_is_told_so_and_harms_nothing(tmp_path, caplog):
    reports = []

    def on_saved(report):
        reports.append(report)
        coordinator.save_checkpoint_async(step=report.step + 1)

    with solo(tmp_path, weights(), on_saved=on_saved) as coordinator:
        coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)
        coordinator.wait()
        assert steps(coordinator.repository) == [1]
    assert "is called by a save in the background" in caplog.text
    (report,) = reports
    assert report.ok
    assert report.background
    assert 0 <= report.staged_s <= report.opened_s + 1
    assert report.opened_s <= report.written_s <= report.committed_s
    assert report.size_bytes > report.stored_bytes * 0.5 > 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_process_that_ends_without_closing_finishes_its_saves(tmp_path, kept):
    program = f"""
import gc
import torch
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
state = {{"w": torch.ones(3_000_000)}}
one = CheckpointCoordinator(
    [StateComponent("model", state, SharingPattern.GLOBAL)], output_dir={str(tmp_path / "run")!r}
)
for step in (1, 2):
    one.save_checkpoint_async(step=step)
if not {kept}:
    del one
    gc.collect()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    with solo(tmp_path, {"w": torch.zeros(3_000_000)}) as coordinator:
        assert steps(coordinator.repository) == [1, 2]


# --- who may call, and from where ----------------------------------------------------------------


def test_on_saved_is_refused_even_while_training_is_in_a_call(tmp_path):
    said = []

    def on_saved(report):
        for call in (coordinator.wait, coordinator.close, pending[0].result):
            with pytest.raises(ConfigError):
                call()
        said.append(report.step)

    gate, pending = Gate("write"), []
    coordinator = solo(tmp_path, weights(), on_saved=on_saved, probe=gate)
    pending.append(coordinator.save_checkpoint_async(step=1))
    threading.Timer(0.1, gate.open.set).start()
    coordinator.wait()
    coordinator.close()
    assert said == [1]


def test_a_callback_of_the_future_may_take_a_lock_that_is_held_around_calls(tmp_path):
    lock, seen = threading.Lock(), []

    def done(_):
        with lock:
            seen.append(1)

    with solo(tmp_path, weights(), queue_depth=1) as coordinator:
        for step in (1, 2, 3):
            with lock:
                pending = coordinator.save_checkpoint_async(step=step)
            pending.committed.add_done_callback(done)
        coordinator.wait()
        pending.result(PATIENCE_S)
    assert seen == [1, 1, 1]


def test_a_callback_of_staged_is_refused_while_another_save_is_queued(tmp_path, monkeypatch):
    run, queued, said = Snapshot.run, threading.Event(), []

    def run_once_queued(snapshot) -> None:
        assert queued.wait(PATIENCE_S)
        run(snapshot)

    def call_back(_) -> None:
        for call in (coordinator.wait, coordinator.close, last.result):
            with pytest.raises(ConfigError, match="callback"):
                call()
        said.append(1)

    monkeypatch.setattr(Snapshot, "run", run_once_queued)
    model = StateComponent("model", weights(), REPLICATED, validate_replication=True)
    with CheckpointCoordinator([model], output_dir=tmp_path / "run") as coordinator:
        first, last = (coordinator.save_checkpoint_async(step=step) for step in (1, 2))
        first.staged.add_done_callback(call_back)
        queued.set()
        assert last.result(PATIENCE_S)
        assert said == [1]


def test_close_within_a_call_is_refused(tmp_path):
    def state():
        with pytest.raises(ConfigError, match="own operation"):
            coordinator.close()
        return {"w": torch.ones(3)}

    part = StateComponent("model", [], GLOBAL, get_state=state)
    with CheckpointCoordinator([part], output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=1)
        coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)


FORKED = """
import os
import sys
import torch
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.errors import ConfigError

state = {{"w": torch.ones(3_000_000)}}
one = CheckpointCoordinator(
    [StateComponent("model", state, SharingPattern.GLOBAL)], output_dir={folder!r}
)
one.save_checkpoint_async(step=1)
child = os.fork()
if not child:
    try:
        one.save_checkpoint_async(step=2)
    except ConfigError as error:
        assert "forked child" in str(error)
        one.close()
        sys.exit(7)  # as a loader's worker ends, through Python's own end
    sys.exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
"""


def test_a_forked_child_leaves_the_parents_saves_alone(tmp_path):
    program = FORKED.format(folder=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with solo(tmp_path, {"w": torch.zeros(3_000_000)}) as coordinator:
        assert steps(coordinator.repository) == [1]


def test_what_is_declared_is_that_of_the_call(tmp_path):
    part = StateComponent("model", weights(), GLOBAL, metadata={"epoch": 1})
    gate = Gate("capture")
    config = CoordinatorConfig(timeout_s=PATIENCE_S, probe=gate)
    with CheckpointCoordinator([part], output_dir=tmp_path / "run", config=config) as coordinator:
        coordinator.save_checkpoint_async(step=1)
        part.metadata["epoch"] = 2
        gate.open.set()
        coordinator.wait()
        repository = coordinator.repository
        manifest = repository.manifest(repository.resolve("main@1"))
    assert manifest.components["model"].metadata == {"epoch": 1}


def test_an_interrupted_wait_for_the_live_state_voids_the_save(tmp_path, monkeypatch):
    state, gate = weights(), Gate("write")

    def interrupted(_):
        assert gate.reached.wait(PATIENCE_S)
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptcoord.dist.background.wait", interrupted)
    with solo(tmp_path, state, staging_bytes=1000, probe=gate) as coordinator:
        with pytest.raises(KeyboardInterrupt):
            coordinator.save_checkpoint_async(step=1)
        state["layer.0.weight"].fill_(5)
        gate.open.set()
        with pytest.raises(CkptError, match="interrupted"):
            coordinator.wait()
        assert steps(coordinator.repository) == []


def test_an_interrupted_close_can_be_made_again(tmp_path, monkeypatch):
    gate = Gate("write")
    coordinator = solo(tmp_path, weights(), probe=gate)
    coordinator.save_checkpoint_async(step=1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ckptcoord.dist.savequeue.SaveQueue.drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coordinator.close()
    gate.open.set()
    coordinator.close()
    assert steps(coordinator.repository) == [1]


def test_copies_are_freed_with_the_coordinator(tmp_path):
    coordinator = solo(tmp_path, weights())
    coordinator.save_checkpoint_async(step=1)
    coordinator.close()
    assert coordinator._background._stager.pool.held_bytes == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_close_ends_the_threads_and_lets_the_state_go_whoever_keeps_a_save(
    tmp_path, fails, deferred
):
    model = torch.nn.Linear(300, 300)
    alive = weakref.ref(model)
    before = set(threading.enumerate())
    full = StorageError(operation="write", path="x", why="full")  # holds whom it was raised through
    optimizer = torch.optim.SGD(model.parameters())
    parts = [StateComponent("model", model, GLOBAL), StateComponent("optimizer", optimizer, GLOBAL)]
    config = CoordinatorConfig(probe=FailsAt("write", int(fails), full))
    coordinator = CheckpointCoordinator(parts, output_dir=tmp_path / "run", config=config)
    kept = [coordinator.save_checkpoint_async(step=step, deferred=deferred) for step in (1, 2)]
    with pytest.raises(StorageError) if fails else nullcontext():
        coordinator.close()
    assert set(threading.enumerate()) <= before
    if fails:
        kept.clear()  # the error, which it has, holds whom it was raised through
    del coordinator, model, full, optimizer, parts, config
    gc.collect()
    assert alive() is None
    assert all(one.done() for one in kept)


@pytest.mark.parametrize("left", [0, 1])
def test_who_waits_for_a_rank_that_has_closed_is_told_that_it_has(job, left):
    def work(coordinator, rank: int) -> None:
        coordinator.save_checkpoint_async(step=1).result(PATIENCE_S)
        if rank == left:
            coordinator.close()
        else:
            coordinator.save_checkpoint_async(step=2).result(PATIENCE_S)

    def model(_: int) -> list[StateComponent]:
        return [StateComponent("model", weights(), REPLICATED)]

    said = job.run(2, model, work, timeout_s=1.0).futures[1 - left].exception()
    assert isinstance(said, SaveAbortedError)
    assert f"rank {left}: silent for 1 s, last seen in 'coordinator: closed'" in str(said)


def test_ranks_that_ask_for_different_things_are_told_so(job):
    def work(coordinator, rank: int):
        pending = coordinator.save_checkpoint_async(step=1, validate=rank == 0)
        with pytest.raises(DisagreementError, match="validate"):
            pending.result(PATIENCE_S)
        with pytest.raises(DisagreementError, match="validate"):
            coordinator.wait()

    job.do(2, lambda _: [StateComponent("model", weights(), REPLICATED)], work)


def test_a_committed_save_that_reads_back_damaged_is_not_saved_again(tmp_path, monkeypatch):
    def damaged(*_):
        raise FULL

    monkeypatch.setattr("ckptcoord.dist.savequeue.verify", damaged)
    with solo(tmp_path, weights(), on_failure="retry") as coordinator:
        pending = coordinator.save_checkpoint_async(step=1, validate=True)
        with pytest.raises(StorageError, match="no space"):
            pending.result(PATIENCE_S)
        with pytest.raises(StorageError, match="no space"):
            coordinator.wait()


def test_a_wrong_word_for_deferred_is_an_error_of_the_save(tmp_path):
    with solo(tmp_path, weights(), on_failure="warn") as coordinator:
        pending = coordinator.save_checkpoint_async(step=1, deferred="never")
        with pytest.raises(ConfigError, match="never"):
            pending.result(PATIENCE_S)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_depth", 0),
        ("queue_depth", 1.5),
        ("deferred", 1),
        ("deferred", "True"),
        ("on_failure", "ignore"),
        ("io_budget", 0),
        ("io_budget", float("nan")),
        ("staging_bytes", -1),
        ("background_nice", 20),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        CoordinatorConfig(**{name: value})
