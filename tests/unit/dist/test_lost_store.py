"""A rank 0 that loses the c10d store in the vote reports what the log says."""

from __future__ import annotations

import pytest
import torch

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.dist.world import Solo
from ckptcoord.errors import SaveAbortedError, StoreUnreachableError


class Cut(Solo):
    """A world of one whose store is lost in the vote, before the decision or after it."""

    def __init__(self, *, decided: bool) -> None:
        self.decided = decided

    def agree(self, phase, say, decide, *, deadline):
        if phase != "vote" or self.decided:
            decision = super().agree(phase, say, decide, deadline=deadline)
        if phase != "vote":
            return decision
        lost = StoreUnreachableError(phase=phase, host="somewhere", why="closed the connection")
        raise SaveAbortedError(phase=phase, failures={0: lost.what}) from lost


def coordinator(path, world):
    state = {"w": torch.ones(4)}
    return CheckpointCoordinator(
        [StateComponent("model", state, SharingPattern.REPLICATED)], dist=world, output_dir=path
    )


def test_what_rank_0_committed_before_it_lost_the_store_is_a_success(tmp_path):
    with coordinator(tmp_path, Cut(decided=True)) as one:
        assert one.save_checkpoint(step=1) == str(tmp_path / "checkpoint-1")
        assert one.save_checkpoint(step=2) == str(tmp_path / "checkpoint-2"), "it is not fenced"


def test_what_rank_0_did_not_commit_before_it_lost_the_store_is_aborted_and_swept(tmp_path):
    with coordinator(tmp_path, Cut(decided=False)) as one:
        with pytest.raises(SaveAbortedError, match="closed the connection"):
            one.save_checkpoint(step=1)
        assert not one.repository.state().commits
    assert not any((tmp_path / ".ckptcoord" / "staging").iterdir())
    with coordinator(tmp_path, Solo()) as next_one:
        next_one.save_checkpoint(step=1)
