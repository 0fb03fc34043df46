"""stall.py runs from end to end on a tiny state. How long anything took is not looked at."""

from __future__ import annotations

import pytest
from tests.unit.benchmarks.test_benchmarks import ratios_of

WHATS = {
    "lost_vs_memcpy",
    "blocked_vs_memcpy",
    "blocked_vs_memcpy_in_loop",
    "lost_vs_best_dcp",
    "lost_vs_best_dcp_overlapped",
    "lost_vs_torch_save",
    "reported_vs_measured",
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        ("1proc", ()),
        pytest.param("1proc", ("--compression", "auto"), marks=pytest.mark.slow),
        pytest.param("2rank", ("--io-budget-mb", "50"), marks=pytest.mark.slow),
    ],
)
def test_stall_reports_every_ratio_by_its_name(tmp_path, ranks, more):
    found = ratios_of(
        "stall.py",
        *("--size-mb", "2", "--rounds", "1", "--ranks", ranks[0], "--dir", str(tmp_path)),
        *("--loops", "free,cpu", "--every", "2", *more),
    )
    cases = [f"{loop}_every_2_{ranks}" for loop in ("free", "cpu")]
    ours = ("deferred", "eager")
    assert found == {f"{side}_{what}_{case}" for side in ours for what in WHATS for case in cases}
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
