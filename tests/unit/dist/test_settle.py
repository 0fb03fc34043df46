"""A save whose rank 0 falls silent after the votes is settled by the log (docs/adr/0001)."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.errors import CommitUnknownError, FencedError, SaveAbortedError, StorageError
from ckptcoord.repo.repository import Repository
from ckptcoord.testing.ranks import Outcomes, run_ranks

TIMEOUT_S = 0.5
SLEEP_S = 4.0


def save(tmp_path, sleep_at: str, size: int = 3) -> Outcomes[str]:
    """A save in which rank 0 sleeps past everybody's patience at one step."""

    def one(world: Any) -> str:
        def probe(step: str) -> None:
            if world.rank == 0 and step == sleep_at:
                time.sleep(SLEEP_S)

        components = [StateComponent("s", {"t": torch.ones(3)}, SharingPattern.REPLICATED)]
        config = CoordinatorConfig(timeout_s=TIMEOUT_S, probe=probe)
        with CheckpointCoordinator(components, None, world, tmp_path, config=config) as coordinator:
            return coordinator.save_checkpoint(step=1)

    return run_ranks(size, one)


def test_a_commit_that_stands_is_a_success_on_the_ranks_that_did_not_hear_of_it(tmp_path):
    assert save(tmp_path, "appended").values == [str(tmp_path / "checkpoint-1")] * 3
    assert [c.step for c in open_repository(tmp_path).state().commits] == [1]


def test_a_commit_that_does_not_stand_is_fenced_for_ever(tmp_path):
    errors = save(tmp_path, "append").errors
    assert isinstance(errors[0], FencedError)
    for error in errors[1:]:
        assert isinstance(error, SaveAbortedError)
        assert error.silent == (0,)
    state = open_repository(tmp_path).state()
    assert not state.commits
    assert max(claim.epoch for claim in state.claims.values()) == 2


def test_when_the_log_cannot_be_read_either_the_outcome_is_said_to_be_unknown(
    tmp_path, monkeypatch
):
    def unreadable(self: Repository, *_: Any, **__: Any) -> str:
        raise StorageError(operation="read", path=".ckptcoord/log", why="Input/output error")

    monkeypatch.setattr(Repository, "settle", unreadable)
    errors = save(tmp_path, "append", size=2).futures
    assert errors[0].result() == str(tmp_path / "checkpoint-1")
    with pytest.raises(CommitUnknownError, match="Input/output error"):
        errors[1].result()
