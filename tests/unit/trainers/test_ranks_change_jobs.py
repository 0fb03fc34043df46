"""Real jobs of 4, 2 and 6 ranks, one after the other, over one epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.trainers import changes
from tests.unit.trainers.job import run_job

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


@pytest.mark.parametrize("settings", [{}, {"dispatch_batches": True}], ids=["own", "dispatched"])
def test_4_then_2_then_6_ranks_see_every_sample_once_and_go_on_drawing(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    four = run_job(changes.go_on, str(tmp_path), 50, 3, size=4, **settings)
    two = run_job(changes.go_on, str(tmp_path), 50, 7, size=2, **settings)
    six = run_job(changes.go_on, str(tmp_path), 50, -1, size=6, **settings)
    asked = [index for job in (four, two, six) for seen, *_ in job for index in seen]
    assert sorted(asked) == list(range(50))
    _, (state, max_steps, epoch), *_ = six[0]
    assert (state["global_step"], max_steps, epoch) == (12, 12, 1.0)
    assert all(one[1] == six[0][1] for one in six)
    for before, after in ((four, two), (two, six)):
        for rank, (_, _, began, _, _) in enumerate(after):
            *_, ended, _ = before[min(rank, len(before) - 1)]
            if rank < len(before):
                assert began == ended
    new = [one[2] for one in six[2:]]
    assert len({*new, *(one[2] for one in six[:2])}) == 6


def test_new_ranks_draw_what_seed_step_and_rank_say(tmp_path: Path) -> None:
    two = run_job(changes.go_on, str(tmp_path), 30, 3, size=2)
    assert two
    three = run_job(changes.go_on, str(tmp_path), 30, 3, size=3)
    _, _, began, _, derived = three[2]
    assert began == derived


def test_a_loader_of_torchdata_is_refused_on_another_number_of_ranks(tmp_path: Path) -> None:
    run_job(changes.go_on, str(tmp_path), 12, 2, changes.Foreign, size=2)
    again = run_job(changes.go_on, str(tmp_path), 12, 4, changes.Foreign, size=2)
    assert [one[0] for one in again] == [[2, 3]] * 2
    with pytest.raises(AssertionError, match="a StatefulDataLoader was saved by 2 ranks and is"):
        run_job(changes.go_on, str(tmp_path), 12, 6, changes.Foreign, size=3)


def test_a_loader_of_torchdata_begins_the_epoch_again_where_that_is_declared(
    tmp_path: Path,
) -> None:
    for saved, loads in ((2, 3), (1, 2)):
        folder = str(tmp_path / str(saved))
        run_job(changes.go_on, folder, 12, 2, changes.Skipping, size=saved)
        again = run_job(changes.go_on, folder, 12, -1, changes.Skipping, size=loads)
        for asked, (state, max_steps, epoch), *_ in again:
            assert asked == list(range(12))
            assert (state["global_step"], max_steps, epoch) == (14, 14, 1.0)
