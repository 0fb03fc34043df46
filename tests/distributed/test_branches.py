"""Some rounds of the sweep of branches (`scripts/sweep branches 500`), in real processes."""

from __future__ import annotations

import random

import pytest
from tests.distributed import branches


@pytest.mark.dist
def test_committers_a_forker_and_a_collector_lose_nothing_and_keep_the_order(tmp_path):
    tally = branches.sweep(tmp_path, 10, random.Random())
    assert tally.commits >= 22
    assert tally.forks + tally.late == 10
    assert tally.loaded > 50
