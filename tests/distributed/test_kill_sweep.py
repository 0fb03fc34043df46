"""The main promise: killed at any moment and resumed, a training ends as if it never was."""

from __future__ import annotations

import os
import random
import secrets

import pytest
from tests.distributed import background_kills
from tests.distributed.kill_sweep import sweep


@pytest.mark.dist
def test_a_training_killed_at_random_moments_and_resumed_equals_the_undisturbed_one(tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (to run it again)
    kills = int(os.getenv("CKPTCOORD_KILLS", "2"))
    tally = sweep(tmp_path, kills, random.Random(seed))
    assert len(tally.kills) == kills
    assert tally.compared > 100


@pytest.mark.dist
def test_no_acknowledged_save_in_the_background_is_lost_to_a_kill(tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (to run it again)
    tally = background_kills.sweep(tmp_path, 2, random.Random(seed))
    assert len(tally.kills) == 2
    assert tally.acknowledged > 0
    assert tally.loaded >= background_kills.STEPS
