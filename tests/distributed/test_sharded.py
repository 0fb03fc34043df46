"""DTensors on real ranks: every layout loads into every other, and into plain tensors and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.distributed import sharded_program
from tests.distributed.sharded_program import (
    GRIDS,
    SHAPES,
    coordinator,
    full,
    parts_of,
    state_of,
    train,
    trained,
)
from tests.unit.trainers.job import run_job

from ckptcoord import SharingPattern, StateComponent

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves in the background on a mesh of 2 x 2, as anchor and deltas."""
    folder = tmp_path_factory.mktemp("grids")
    run_job(sharded_program.save, str(folder / "run"), size=4)
    return folder / "run"


@pytest.mark.parametrize(("ranks", "grid"), [(4, False), (4, True), (2, False)])
def test_every_layout_loads_into_every_other(grids: Path, ranks: int, grid: bool) -> None:
    refs = {"main@4": 4} if grid else {"main@2": 2, "main@4": 4}
    for wrong in run_job(sharded_program.load, str(grids), refs, grid=grid, size=ranks):
        assert not any(wrong.values()), wrong


def test_pieces_load_into_plain_tensors_and_back(grids: Path, tmp_path: Path) -> None:
    assert list(grids.glob("checkpoint-4/*.delta.safetensors"))
    live = {key: {name: torch.zeros_like(full(name, 0)) for name in SHAPES} for key in GRIDS}

    def declared() -> list[StateComponent]:
        return [StateComponent(key, live[key], SharingPattern.GLOBAL) for key in GRIDS]

    for step in (1, 2, 3, 4):
        with coordinator(grids, declared()) as one:
            one.load_checkpoint(f"main@{step}")
        for key in GRIDS:
            for name in SHAPES:
                wanted = full(name, step)
                assert live[key][name].dtype == wanted.dtype, (step, key, name)
                assert torch.equal(live[key][name], wanted), (step, key, name)
    with coordinator(tmp_path / "run", declared()) as one:
        one.save_checkpoint(step=4)
    run = str(tmp_path / "run")
    for wrong in run_job(sharded_program.load, run, {"main@4": 4}, grid=True, size=4):
        assert not any(wrong.values()), wrong


def test_sharded_tensors_meshes_of_some_ranks_and_results_under_way(tmp_path: Path) -> None:
    for rank, same in enumerate(run_job(sharded_program.odd, str(tmp_path / "run"), size=4)):
        assert same == [[True] if rank < 3 else [], True, True]
    live = {"nine": torch.zeros(9, 2)}
    for key in ("old", "some", "late"):
        held = {key: live["nine"].zero_()}
        with coordinator(
            tmp_path / "run", [StateComponent(key, held, SharingPattern.GLOBAL)]
        ) as one:
            one.load_checkpoint()
        assert torch.equal(live["nine"], full("nine", 1)), key


@pytest.mark.parametrize(("saved_on", "way"), [(4, "fsdp-tp"), (2, "fsdp"), (4, "fsdp")])
def test_a_model_of_odd_sizes_and_its_optimizer_load_into_other_layouts(
    tmp_path: Path, saved_on: int, way: str
) -> None:
    run = str(tmp_path / "run")
    states, *others = run_job(sharded_program.save_model, run, way, size=saved_on)
    assert all(one == states for one in others)

    for step in (1, 2, 3):
        model, optimizer = trained("alone", 1)
        with coordinator(run, parts_of(model, optimizer)) as one:
            one.load_checkpoint(f"main@{step}")
        assert model.again.weight is model.out.weight
        assert state_of(model, optimizer) == states[step]
    (loss,) = train(model, optimizer, [4])
    assert float.fromhex(loss) == pytest.approx(float.fromhex(states["next"][0]), rel=1e-5)

    ranks, other = (2, "fsdp") if saved_on == 4 else (4, "fsdp-tp")
    for found in run_job(sharded_program.load_model, run, other, size=ranks):
        assert {step: found[step] for step in (1, 2, 3)} == {s: states[s] for s in (1, 2, 3)}
