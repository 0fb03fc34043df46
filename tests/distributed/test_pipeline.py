"""Pipelines of real processes: they train as one process does, resume, and load elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed import pipelines
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Spy, arguments, plain

from ckptcoord import (
    CheckpointCoordinator,
    PipelineTrainer,
    SharingPattern,
    StateComponent,
    Trainer,
    export_model,
    open_repository,
)
from ckptcoord.repo.inspect import content_digests

pytestmark = pytest.mark.dist
SAVED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "max_grad_norm": 0.0}


def run(folder: Path, stages: int, **settings: Any) -> list[dict[str, Any]]:
    """What each stage says after its training."""
    return run_job(pipelines.train, folder, settings, size=stages)


def together(stages: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """One dict of all stages'."""
    return {name: value for stage in stages for name, value in stage[part].items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        (4, {"pipeline_schedule": "gpipe", "pipeline_microbatches": 1}),
        (4, {"pipeline_schedule": "gpipe", "pipeline_microbatches": 4}),
        (4, {"pipeline_microbatches": 4, "gradient_accumulation_steps": 2}),
        (2, {"pipeline_microbatches": 8}),
        (2, {"pipeline_microbatches": 2, "per_device_train_batch_size": 4, "tied": True}),
    ],
    ids=["whole batches", "gpipe", "1f1b, accumulated", "two stages", "tied"],
)
def test_it_trains_as_one_process_does(
    tmp_path: Path, stages: int, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 4, "max_grad_norm": 0.0, **settings}
    (alone,) = run(tmp_path / "a", 1, **settings)
    ranks = run(tmp_path / "b", stages, **settings)
    for stage in ranks:
        for fact in ("eval_loss", "samples", "left"):
            assert stage[fact] == alone[fact]
    if "tied" not in settings:  # there the order of a sum differs: microbatches, then uses
        assert all(stage["losses"] == alone["losses"] for stage in ranks)
        assert together(ranks, "weights") == alone["weights"]
        assert together(ranks, "optimizer") == alone["optimizer"]
    else:
        assert [*ranks[0]["losses"].values()] == pytest.approx([*alone["losses"].values()])
        for part, name in (("weights", "tokens.weight"), ("optimizer", "tokens.weight")):
            assert ranks[0][part][name] == ranks[1][part][name]
    for part in ("weights", "optimizer"):
        assert {*together(ranks, part)} == {*alone[part]}


def test_a_mesh_of_stages_alone_is_a_pipeline(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "max_grad_norm": 0.01, "dropout": 0.2, "tied": True}
    wanted = run(tmp_path / "a", 2, **settings)
    assert run(tmp_path / "b", 2, mesh={"pp": 2}, **settings) == wanted


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "max_grad_norm": 0.01, "pipeline_microbatches": 4, "tied": True}
    (alone,) = run(tmp_path / "a", 1, **settings)
    ranks = run(tmp_path / "b", 4, **settings)
    for stage in ranks:
        assert stage["grad_norms"] == pytest.approx(alone["grad_norms"])
        assert [*stage["losses"].values()] == pytest.approx([*alone["losses"].values()])


@pytest.mark.parametrize(
    ("stages", "settings"),
    [(4, {"pipeline_schedule": "gpipe"}), (2, {"tied": True, "compression": "auto"})],
)
def test_a_stopped_pipeline_resumes_bit_for_bit_in_new_processes(
    tmp_path: Path, stages: int, settings: dict[str, Any]
) -> None:
    settings = {**SAVED, "dropout": 0.2, "max_grad_norm": 1.0, **settings}
    straight = run(tmp_path / "a", stages, **settings)
    before = run(tmp_path / "b", stages, stop_at=5, **settings)
    after = run(tmp_path / "b", stages, resume_from_checkpoint=True, **settings)
    for first, rest, whole in zip(before, after, straight, strict=True):
        assert {**first["losses"], **rest["losses"]} == whole["losses"]
        for part in ("weights", "optimizer", "eval_loss", "draws", "samples"):
            assert rest[part] == whole[part]
    found, wanted = (
        content_digests(repo, repo.resolve("main@8"))
        for repo in (open_repository(tmp_path / name / "run") for name in "ba")
    )
    assert found == wanted


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_of_some_stages_goes_on_on_any_other_number(
    tmp_path: Path, *, tied: bool
) -> None:
    settings = {**SAVED, "pipeline_microbatches": 4, "tied": tied}
    straight = run(tmp_path / "a", 4, **settings)
    run(tmp_path / "b", 4, stop_at=4, **settings)
    for stages in (1, 2):
        folder = tmp_path / f"to-{stages}"
        shutil.copytree(tmp_path / "b", folder)
        ranks = run(folder, stages, resume_from_checkpoint=True, **settings)
        wanted = {step: loss for step, loss in straight[0]["losses"].items() if step > 4}
        for stage in ranks:
            if tied:
                assert [*stage["losses"].values()] == pytest.approx([*wanted.values()])
                continue
            assert stage["losses"] == wanted
        if not tied:
            assert together(ranks, "weights") == together(straight, "weights")
            assert together(ranks, "optimizer") == together(straight, "optimizer")
    back = run(tmp_path / "to-1", 4, resume_from_checkpoint=True, **{**settings, "max_steps": 9})
    assert [*back[0]["losses"]] == [9]


WHOLE_BATCHES = {**SAVED, "pipeline_schedule": "gpipe", "pipeline_microbatches": 1}


def train_whole(folder: Path, **settings: Any) -> tuple[dict[int, float], dict[str, Any]]:
    """With a trainer that knows nothing of stages, in this process: losses, and what is left."""
    torch.manual_seed(5)
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.1}
    args = arguments(folder / "run", **{**defaults, **settings})
    spy = Spy(stop_at=4 if "resume_from_checkpoint" not in settings else -1)
    trainer = Trainer(pipelines.Tiny(), args, pipelines.Tokens(), callbacks=[spy])
    trainer.train()
    trainer.close()
    return spy.losses, plain(trainer.model.state_dict())


def test_one_process_and_a_pipeline_take_turns(tmp_path: Path) -> None:
    straight = run(tmp_path / "a", 4, **WHOLE_BATCHES)
    run(tmp_path / "b", 4, stop_at=4, **WHOLE_BATCHES)
    losses, weights = train_whole(tmp_path / "b", resume_from_checkpoint=True, **WHOLE_BATCHES)
    wanted = {step: loss for step, loss in straight[0]["losses"].items() if step > 4}
    assert losses == wanted
    assert weights == together(straight, "weights")

    train_whole(tmp_path / "c", **WHOLE_BATCHES)
    ranks = run(tmp_path / "c", 2, resume_from_checkpoint=True, **WHOLE_BATCHES)
    assert all(stage["losses"] == wanted for stage in ranks)
    assert together(ranks, "weights") == weights


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_parts_are_exported_as_one(tmp_path: Path, *, tied: bool) -> None:
    ranks = run(tmp_path, 4, **{**SAVED, "max_steps": 4, "tied": tied})
    weights = together(ranks, "weights")
    folder = Path(export_model(tmp_path / "run", tmp_path / "export"))
    exported = plain(load_file(folder / "model.safetensors"))
    assert {*weights} - {*exported} == ({"head.weight"} if tied else set())
    assert exported == {name: weights[name] for name in exported}
    model = pipelines.Tiny(tied=tied)
    component = StateComponent("model", model, SharingPattern.GLOBAL)
    with CheckpointCoordinator([component], output_dir=tmp_path / "run") as coordinator:
        coordinator.load_checkpoint("main@4")
    assert plain(model.state_dict()) == weights


def test_what_cannot_work_is_said_on_every_rank(tmp_path: Path) -> None:
    for rank, (batch, parts, data) in enumerate(run_job(pipelines.try_all, tmp_path)):
        assert "is 6, no multiple of the 4 microbatches" in batch
        assert "is 2, and 1f1b needs as many as there are stages, 4" in parts
        assert data.startswith(
            "rank 0 could not read the next batch: OSError: " if rank else "disk"
        )


def test_alone_it_needs_no_process_group(tmp_path: Path) -> None:
    trainer = pipelines.make_trainer(tmp_path, max_steps=2, pipeline_microbatches=2)
    assert isinstance(trainer, PipelineTrainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.close()
