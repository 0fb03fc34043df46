"""Folders that come to belong to a commit while somebody else is about to move them."""

from __future__ import annotations

import shutil
from threading import Event, Thread, current_thread

import pytest

import ckptcoord
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent, open_repository
from ckptcoord.errors import FencedError, SaveAbortedError, StorageError
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.repository import Repository
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.store.local import LocalStore

COMPONENTS = [StateComponent("s", {"n": 1}, SharingPattern.GLOBAL)]


def overtake(monkeypatch, target_ends_with: str, before_move):
    """Have another writer do something just before a folder is moved aside."""
    move, done = LocalStore.move_dir, []

    def overtaken(self, source, target):
        if target.endswith(target_ends_with) and not done:
            done.append(source)
            before_move()
        move(self, source, target)

    monkeypatch.setattr(LocalStore, "move_dir", overtaken)
    return done


def test_a_fenced_writer_leaves_what_the_next_one_is_about_to_commit(tmp_path, monkeypatch):
    move, renamed, go_on = LocalStore.move_dir, Event(), Event()
    newer = Thread(target=lambda: save_once(tmp_path, n=2))

    def interleaved(self, source, target):
        if current_thread() is not newer and not renamed.is_set():
            newer.start()
            assert renamed.wait(30)
        move(self, source, target)
        if current_thread() is newer and target == "checkpoint-1":
            renamed.set()
            assert go_on.wait(30)

    monkeypatch.setattr(LocalStore, "move_dir", interleaved)
    with pytest.raises(FencedError):
        save_once(tmp_path, n=1)
    go_on.set()
    newer.join()
    repository = open_repository(tmp_path)
    assert verify_checkpoint(repository, repository.resolve("main@1")).ok
    assert ckptcoord.load(tmp_path)["s"] == {"n": 2}


def save_once(folder, n):
    components = [StateComponent("s", {"n": n}, SharingPattern.GLOBAL)]
    with CheckpointCoordinator(components, output_dir=folder) as one:
        one.save_checkpoint(step=1)


def test_a_retired_folder_that_is_committed_meanwhile_is_put_back(tmp_path, monkeypatch):
    from ckptcoord import CoordinatorConfig

    config = CoordinatorConfig(keep_last=1)
    with CheckpointCoordinator(COMPONENTS, output_dir=tmp_path, config=config) as one:
        for step in (1, 2):
            one.save_checkpoint(step=step)

        def commit_it() -> None:
            shutil.rmtree(tmp_path / "checkpoint-1")
            with CheckpointCoordinator(COMPONENTS, output_dir=tmp_path) as other:
                other.save_checkpoint(step=1)

        done = overtake(monkeypatch, "-swept", commit_it)
        one.save_checkpoint(step=3)
    assert done == ["checkpoint-1"]
    repository = open_repository(tmp_path)
    assert verify_checkpoint(repository, repository.resolve("main@1")).ok


def test_staging_that_cannot_be_deleted_does_not_hide_why_the_save_failed(tmp_path, monkeypatch):
    def refuse(self: Attempt) -> None:
        raise StorageError(operation="rmdir", path=self.folder, why="Directory not empty")

    monkeypatch.setattr(Attempt, "abandon", refuse)
    state = {"n": 1}
    with CheckpointCoordinator(
        [StateComponent("s", state, SharingPattern.GLOBAL)], output_dir=tmp_path
    ) as coordinator:

        def full(self: Attempt, name: str, data: bytes) -> None:
            raise StorageError(operation="write", path=name, why="Input/output error")

        monkeypatch.setattr(Attempt, "write_file", full)
        with pytest.raises((StorageError, SaveAbortedError), match="Input/output error"):
            coordinator.save_checkpoint(step=1)


def test_files_of_other_ranks_that_never_show_are_an_error_and_late_ones_are_waited_for(
    tmp_path, monkeypatch
):
    from ckptcoord import CoordinatorConfig

    seen = Attempt.unseen
    late = {"looks": 2}

    def lagging(self: Attempt, files):
        late["looks"] -= 1
        return tuple(files) if late["looks"] >= 0 else seen(self, files)

    monkeypatch.setattr(Attempt, "unseen", lagging)
    config = CoordinatorConfig(timeout_s=0.3)
    with CheckpointCoordinator(COMPONENTS, output_dir=tmp_path, config=config) as coordinator:
        coordinator.save_checkpoint(step=1)
        late["looks"] = 10**9
        with pytest.raises(StorageError, match=r"not visible to rank 0.*the same folder"):
            coordinator.save_checkpoint(step=2)
    assert [c.step for c in Repository.state(open_repository(tmp_path)).commits] == [1]
