"""A whole save, cut off at each of its operations: the head is the old one or the new one."""

from __future__ import annotations

import random
import secrets
from datetime import UTC, datetime

import pytest
import torch

from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.core.topology import Topology
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.loading import load
from ckptcoord.dist.report import SaveTimer
from ckptcoord.dist.request import SaveRequest
from ckptcoord.dist.saving import SaveTask, hold, save
from ckptcoord.dist.session import Session
from ckptcoord.dist.world import Solo
from ckptcoord.errors import CkptError, StorageError
from ckptcoord.plan.commit import STAGING, head
from ckptcoord.repo.log import LOG
from ckptcoord.repo.repository import create_store
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.store.local import LocalStore
from ckptcoord.store.memory import MemoryStore
from ckptcoord.testing import FaultyStore, SimulatedCrash

MAIN = BranchName()
POWER_LOSSES = (None, *(random.Random(seed) for seed in range(2)))


def clock():
    return datetime.now(UTC)


class Job:
    """One incarnation of a job of one rank, on a store."""

    def __init__(self, store):
        self.state = {
            "model": {"w": torch.zeros(40), "b": torch.zeros(3)},
            "optimizer": {"m": [torch.zeros(40)]},
        }
        self.session = Session(
            world=Solo(),
            topology=Topology(nodes=((0,),)),
            repository=create_store(store, clock=clock),
            components=tuple(
                StateComponent(key, held, SharingPattern.REPLICATED)
                for key, held in self.state.items()
            ),
            config=CoordinatorConfig(max_shard_size=128, timeout_s=5),
            writer=secrets.token_hex(16),
        )

    def tensors(self):
        return [*self.state["model"].values(), *self.state["optimizer"]["m"]]

    def save(self, step, *, overwrite=False):
        for tensor in self.tensors():
            tensor.fill_(step)
        request = SaveRequest(checkpoint_id=CheckpointId(MAIN, step), overwrite=overwrite)
        task = SaveTask(request=request, state=lambda: hold(self.session), timer=SaveTimer(clock))
        return save(self.session, task)

    def load(self):
        for tensor in self.tensors():
            tensor.fill_(-1)
        step = load(self.session, lambda: "latest", strict=True).step
        assert {float(v) for t in self.tensors() for v in t.tolist()} == {float(step)}
        return step


def saved_once(store):
    Job(store).save(1)
    return store


def check(store, *, acknowledged, attempted):
    """What must hold for whoever comes after; returns the step of the head."""
    job = Job(store)
    repository = job.session.repository
    newest = head(repository.state(), MAIN)
    found = newest.checkpoint_id.step if newest else 0
    assert found in (acknowledged, attempted)
    if found:
        assert job.load() == found
    job.save(attempted, overwrite=found == attempted)
    assert job.load() == attempted
    job.save(attempted + 1)
    assert job.load() == attempted + 1
    for commit in repository.state().commits.values():
        report = verify_checkpoint(repository, commit)
        assert report.ok, report.findings
    return found


def operations_of(store, work):
    """How often `work` changes the store."""
    watched = FaultyStore(store)
    work(watched)
    return watched.operations


def test_a_save_has_many_operations_and_the_append_comes_after_all_that_it_names():
    operations = operations_of(saved_once(MemoryStore()), lambda store: Job(store).save(2))
    names = [(one.name, one.path.split("/")[0]) for one in operations]
    appends = [i for i, one in enumerate(operations) if one.path.startswith(f"{LOG}/")]
    assert len(operations) > 30
    assert len(appends) == 2, "a claim and a commit"
    assert appends[-1] == len(operations) - 1, "INV-1: the append is the last write"
    assert names.index(("move_dir", "checkpoint-2")) == appends[-1] - 1


@pytest.mark.parametrize("power_loss", [False, True], ids=["killed", "power lost"])
def test_a_crash_leaves_the_old_head_or_the_new_one(power_loss):
    count = len(operations_of(saved_once(MemoryStore()), lambda store: Job(store).save(2)))
    heads = []
    for at in range(count):
        store = saved_once(MemoryStore())
        with pytest.raises(SimulatedCrash):
            Job(FaultyStore(store, crash_at=at)).save(2)
        for rng in POWER_LOSSES if power_loss else (None,):
            after = store.crash(rng) if power_loss else store
            heads.append(check(after, acknowledged=1, attempted=2))
    assert set(heads) == {1}, "the append is the last operation, and the crash came before it"
    store = saved_once(MemoryStore())
    Job(store).save(2)
    assert check(store.crash(), acknowledged=2, attempted=2) == 2


def test_a_crash_in_the_life_of_a_new_repository_leaves_nothing_or_the_first_checkpoint():
    count = len(operations_of(MemoryStore(), saved_once))
    for at in range(count):
        store = MemoryStore()
        with pytest.raises(SimulatedCrash):
            saved_once(FaultyStore(store, crash_at=at))
        assert check(store.crash(), acknowledged=0, attempted=1) == 0
        assert check(store, acknowledged=0, attempted=1) == 0


def test_a_crash_in_an_overwriting_save_keeps_the_old_content_or_gives_the_new(tmp_path):
    def overwrite(store):
        Job(store).save(1, overwrite=True)

    for at in range(len(operations_of(saved_once(MemoryStore()), overwrite))):
        store = saved_once(MemoryStore())
        with pytest.raises(SimulatedCrash):
            overwrite(FaultyStore(store, crash_at=at))
        assert check(store.crash(), acknowledged=1, attempted=1) == 1


def test_a_crash_on_a_real_file_system_leaves_the_old_head_or_the_new_one(tmp_path):
    count = len(operations_of(saved_once(MemoryStore()), lambda store: Job(store).save(2)))
    for at in range(count % 5, count, 5):  # MemoryStore had them all; here each takes many fsyncs
        with LocalStore(tmp_path / str(at), create=True) as store:
            saved_once(store)
            with pytest.raises(SimulatedCrash):
                Job(FaultyStore(store, crash_at=at)).save(2)
            assert check(store, acknowledged=1, attempted=2) == 1


def test_a_crash_of_a_save_beside_debris_is_survived_too():
    def with_debris():
        """A save that was cut off between the rename and the append."""
        store = saved_once(MemoryStore())
        operations = operations_of(store.crash(), lambda other: Job(other).save(2))
        with pytest.raises(SimulatedCrash):
            Job(FaultyStore(store, crash_at=len(operations) - 1)).save(2)
        assert store.exists("checkpoint-2")
        return store

    for at in range(len(operations_of(with_debris(), lambda store: Job(store).save(2)))):
        store = with_debris()
        with pytest.raises(SimulatedCrash):
            Job(FaultyStore(store, crash_at=at)).save(2)
        assert check(store.crash(), acknowledged=1, attempted=2) == 1


@pytest.mark.parametrize("lost_reply", [False, True], ids=["refused", "reply lost"])
def test_an_error_at_any_operation_is_typed_and_the_next_save_works(lost_reply):
    count = len(operations_of(saved_once(MemoryStore()), lambda store: Job(store).save(2)))
    for at in range(count):
        store = saved_once(MemoryStore())

        def fail(number, name, path, at=at):
            error = StorageError(operation=name, path=path, why="Input/output error", errno=5)
            return error if number == at else None

        faults = {"fail_after": fail} if lost_reply else {"fail": fail}
        returned = False
        try:
            Job(FaultyStore(store, **faults)).save(2)
            returned = True
        except CkptError as error:
            assert "Input/output error" in error.what  # noqa: PT017 (some are survived)
        if not lost_reply and not returned:  # a full disk must not stay full of what has failed
            names = [entry.name for entry in (*store.list(""), *store.list(STAGING))]
            assert [name for name in names if name[0] != "."] == ["checkpoint-1"], f"operation {at}"
        assert (check(store, acknowledged=1, attempted=2) == 2) == returned, f"operation {at}"


def test_what_another_writer_has_put_in_the_place_of_a_refused_checkpoint_stays():
    store = saved_once(MemoryStore())
    refused = StorageError(operation="append", path="log", why="No space left", errno=28)
    old = Job(store)
    old.save(2)
    log = old.session.repository.log
    append = log.append

    def overtaken(make):
        if make(log.refresh()).kind != "commit":
            return append(make)
        store.remove_tree("checkpoint-3")  # as if moved aside; the claim is not seen yet
        Job(store).save(3)
        log.append = append
        raise refused

    log.append = overtaken
    state = old.session.repository.state()
    old.session.repository.state = lambda: state
    with pytest.raises(StorageError, match="No space left"):
        old.save(3)

    assert Job(store).load() == 3
