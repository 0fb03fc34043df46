"""keep_last: old checkpoints leave the log at once and the storage a save later."""

from __future__ import annotations

import logging

import pytest

import ckptcoord
from ckptcoord import SharingPattern, StateComponent, open_repository
from ckptcoord.errors import RefNotFoundError
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.store.local import LocalStore


def components(_: int) -> list[StateComponent]:
    return [StateComponent("state", {"n": 1}, SharingPattern.REPLICATED)]


def folders(job) -> list[str]:
    return sorted(p.name for p in job.output_dir.glob("checkpoint-*"))


def steps(job) -> list[int]:
    return sorted(one.step for one in open_repository(job.output_dir).state().commits)


def test_the_newest_stay_and_the_rest_go_a_save_later(job):
    def work(coordinator, rank):
        for step in (10, 9, 100, 11, 12):
            coordinator.save_checkpoint(step=step)

    job.run(2, components, work, keep_last=2).values  # noqa: B018
    assert steps(job) == [11, 12]
    assert folders(job) == ["checkpoint-100", "checkpoint-11", "checkpoint-12"]
    with pytest.raises(RefNotFoundError):
        open_repository(job.output_dir).resolve("main@100")
    assert not list((job.output_dir / ".ckptcoord" / "staging").iterdir())


def test_rules_are_given_by_a_public_name(job):
    """The mode as text, which is not what the name of the metric alone would say."""
    rules = ckptcoord.Retention(keep_best=1, metric="error", mode="min")

    def work(coordinator, rank):
        for step, error in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
            coordinator.save_checkpoint(step=step, metrics={"error": error})

    job.run(1, components, work, retention=rules).values  # noqa: B018
    assert steps(job) == [2, 4]


def test_a_tagged_checkpoint_stays_and_does_not_count(job):
    def work(coordinator, rank):
        coordinator.save_checkpoint(step=1)
        coordinator.set_best_checkpoint("main@1")
        for step in (2, 3, 4):
            coordinator.save_checkpoint(step=step)

    job.run(2, components, work, keep_last=1).values  # noqa: B018
    assert steps(job) == [1, 4]
    repository = open_repository(job.output_dir)
    assert verify_checkpoint(repository, repository.resolve("best")).ok


def test_a_storage_that_will_not_delete_does_not_fail_the_save(job, monkeypatch, caplog):
    refuse = {"on": True}
    move = LocalStore.move_dir

    def stubborn(self, source, target):
        if refuse["on"] and target.endswith("-swept"):
            from ckptcoord.errors import StorageError

            raise StorageError(operation="rename", path=source, why="Permission denied")
        move(self, source, target)

    monkeypatch.setattr(LocalStore, "move_dir", stubborn)

    def work(coordinator, rank):
        for step in (1, 2, 3):
            coordinator.save_checkpoint(step=step)
        refuse["on"] = False
        coordinator.save_checkpoint(step=4)

    with caplog.at_level(logging.WARNING, "ckptcoord"):
        job.run(1, components, work, keep_last=1).values  # noqa: B018
    assert "Permission denied" in caplog.text
    assert steps(job) == [4]
    assert folders(job) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_name_that_a_commit_owns_again_is_not_deleted(job):
    def work(coordinator, rank):
        for step in (1, 2, 1):
            coordinator.save_checkpoint(step=step)
        coordinator.save_checkpoint(step=3)

    job.run(1, components, work, keep_last=1).values  # noqa: B018
    assert steps(job) == [3]
    repository = open_repository(job.output_dir)
    assert verify_checkpoint(repository, repository.resolve("latest")).ok
