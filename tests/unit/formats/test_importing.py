"""What other tools have saved, imported: the same to the last bit, in order, with its history."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptcoord
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.dist.world import Solo
from ckptcoord.errors import ConfigError, CorruptError, FormatError, MissingFileError
from ckptcoord.formats import importing
from ckptcoord.formats.components import progress
from ckptcoord.formats.detect import find_source
from ckptcoord.formats.importing import check_place, plan_import, run_import
from ckptcoord.repo.repository import open_repository
from ckptcoord.trainers.state import TrainerState

GOLDEN = Path(__file__).parents[2] / "golden"


def bring(path, root, **choice):
    source = find_source(path)
    plans = plan_import(source, **choice)
    check_place(root, plans)
    return list(run_import(source, plans, root))


def refs(done):
    return [one.plan.id.ref for one in done]


def alike(one, other) -> bool:
    """As `same`, in whatever order mappings are."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return same(one, other)


def same(one, other) -> bool:
    """Type for type and bit for bit, for what states are made of."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def whole(path):
    return torch.load(path, weights_only=True)  # noqa: TID251 (as it was written)


def by_name(optimizer, names):
    """A state by index in the form of OptimizerState."""
    groups = optimizer["param_groups"]
    return {
        "state": {names[index]: entry for index, entry in optimizer["state"].items()},
        "groups": {
            str(n): {key: value for key, value in group.items() if key != "params"}
            for n, group in enumerate(groups)
        },
        "group_of": {names[i]: str(n) for n, group in enumerate(groups) for i in group["params"]},
    }


# --- each format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "auto", "sparse"])
def test_gradient_desc_comes_in_as_it_would_itself_have_loaded_it(tmp_path, mode):
    done = bring(GOLDEN / "gradient" / mode, tmp_path / "run")
    assert refs(done) == ["main@10", "main@20", "exp@20", "main@30", "exp@30"]
    loaded = whole(GOLDEN / f"gradient/{mode}.loaded.pt")
    for ref, want in loaded.items():
        found = ckptcoord.load(tmp_path / "run", ref)
        assert same(found["model"], want["model"]), ref
        names = list(want["model"])
        assert same(found["optimizer"], by_name(want["optimizer"], names)), ref
        assert same(found["scheduler"], want["scheduler"])
        assert found["progress"]["global_step"] == int(ref.partition("@")[2])
    rounded = [any("difference" in note for note in one.plan.notes) for one in done]
    assert rounded == [False, True, False, True, True]


def test_gradient_desc_keeps_branches_forks_and_messages(tmp_path):
    bring(GOLDEN / "gradient/auto", tmp_path / "run")
    state = open_repository(tmp_path / "run").state()
    fork = state.forks[BranchName("exp")]
    assert fork.source.ref == "main@20"
    commits = {commit.checkpoint_id.ref: commit for commit in state.commits.values()}
    assert {ref: c.parent and c.parent.ref for ref, c in commits.items()} == {
        "main@10": None,
        "main@20": "main@10",
        "main@30": "main@20",
        "exp@20": "main@20",
        "exp@30": "exp@20",
    }
    assert commits["main@20"].message == "after 20"
    assert commits["exp@20"].message == "another try"


def test_one_branch_or_step_of_gradient_desc(tmp_path):
    done = bring(GOLDEN / "gradient/auto", tmp_path / "a", branch="exp")
    assert refs(done) == ["exp@20", "exp@30"]
    assert refs(bring(GOLDEN / "gradient/auto", tmp_path / "b", branch="exp", step=30)) == [
        "exp@30"
    ]
    with pytest.raises(ConfigError, match="exp, main"):
        bring(GOLDEN / "gradient/auto", tmp_path / "c", branch="other")
    with pytest.raises(ConfigError, match="no step 7"):
        bring(GOLDEN / "gradient/auto", tmp_path / "c", step=7)
    assert not (tmp_path / "c").exists()


def test_a_difference_whose_anchor_was_saved_again_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "gradient/auto", tmp_path / "g")
    shutil.copy(tmp_path / "g/ckpt_exp_s20.pt", tmp_path / "g/ckpt_main_s10.pt")
    with pytest.raises(FormatError, match="saved again"):
        bring(tmp_path / "g", tmp_path / "run")
    (tmp_path / "g/ckpt_main_s10.pt").unlink()
    with pytest.raises(MissingFileError, match="main_s10"):
        bring(tmp_path / "g", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradient_desc_without_its_manifest_and_with_holes(tmp_path):
    shutil.copytree(GOLDEN / "gradient/off", tmp_path / "g")
    (tmp_path / "g/ckpt_main_s30.pt").unlink()
    source = find_source(tmp_path / "g")
    assert source.left_out == ("main@30: ckpt_main_s30.pt is not there",)
    (tmp_path / "g/manifest.json").unlink()
    done = bring(tmp_path / "g", tmp_path / "run")
    assert refs(done) == ["main@10", "main@20", "exp@20", "exp@30"]


def test_forgather_with_and_without_manifest(tmp_path):
    done = bring(GOLDEN / "forgather/output", tmp_path / "run")
    assert refs(done) == ["main@9", "main@10"], "by number, not by name"
    want = whole(GOLDEN / "forgather/whole.pt")
    names = ["0.weight", "1.weight", "1.bias"]  # what is tied is one parameter
    for step in (9, 10):
        found = ckptcoord.load(tmp_path / "run", f"main@{step}")
        assert same(found["model"], dict(want[step]["model"]))
        assert found["model"]["0.weight"] is found["model"]["2.weight"]
        assert same(found["optimizer"], by_name(want[step]["optimizer"], names))
        assert same(found["scheduler"], want[step]["scheduler"])
        assert found["trainer"] == want[step]["trainer"]
        assert found["progress"]["global_step"] == step
        assert found["checkpoint_metadata"]["best_checkpoints"][0][1] == 2.5
    ranks = found["rng_of_copies"]
    assert [ranks[f"rank_{r}"]["torch"].sum() for r in (0, 1)] == [
        one["torch"].sum() for one in want[10]["rng"]
    ]
    manifest = open_repository(tmp_path / "run").manifest(
        open_repository(tmp_path / "run").resolve("main@10")
    )
    assert manifest.metrics == {"eval_loss": 2.5}
    assert manifest.epoch == 2.5


def test_one_checkpoint_of_forgather_and_one_that_lacks_a_rank(tmp_path):
    one = GOLDEN / "forgather/output/checkpoints/checkpoint-10"
    assert refs(bring(one, tmp_path / "run")) == ["main@10"]
    shutil.copytree(one, tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10/scheduler_state.pt").unlink()
    with pytest.raises(MissingFileError, match="scheduler_state"):
        bring(tmp_path / "checkpoint-10", tmp_path / "other")


def test_a_run_of_transformers_trainer(tmp_path):
    from transformers import GPT2LMHeadModel

    done = bring(GOLDEN / "hf/trainer", tmp_path / "run")
    assert refs(done) == ["main@3", "main@6"]
    assert any("training_args.bin" in why for why in done[0].plan.left_out)
    repository = open_repository(tmp_path / "run")
    manifest = repository.manifest(repository.resolve("main@6"))
    assert set(manifest.metrics) >= {"eval_loss", "loss", "learning_rate"}
    assert manifest.epoch == 1.5
    found = ckptcoord.load(tmp_path / "run", "main@6")
    inside = GOLDEN / "hf/trainer/checkpoint-6"
    assert same(found["optimizer"], whole(inside / "optimizer.pt")), "by index, as it was"
    assert same(found["scheduler"], whole(inside / "scheduler.pt"))
    config = (inside / "generation_config.json").read_bytes()
    assert bytes(found["files"]["generation_config.json"].tolist()) == config
    assert found["progress"]["global_step"] == 6
    assert (found["progress"]["epoch_index"], found["progress"]["steps_in_epoch"]) == (1, 2)
    # The newest checkpoint may be a delta; the oldest is what transformers opens.
    opened = GPT2LMHeadModel.from_pretrained(tmp_path / "run/checkpoint-3")
    want = GPT2LMHeadModel.from_pretrained(GOLDEN / "hf/trainer/checkpoint-3")
    assert same(dict(opened.state_dict()), dict(want.state_dict()))


def test_the_generators_of_transformers_trainer_are_ours(tmp_path):
    bring(GOLDEN / "hf/trainer/checkpoint-6", tmp_path / "run")
    rng = ckptcoord.RNGState()
    before = rng.state_dict()
    try:
        component = StateComponent("rng", rng, SharingPattern.PER_RANK)
        with CheckpointCoordinator([component], dist=Solo(), output_dir=tmp_path / "run") as one:
            one.load_checkpoint()
        drawn = torch.rand(3), np.random.rand(3)
        with torch.serialization.safe_globals(_numpy_names()):
            want = whole(GOLDEN / "hf/trainer/checkpoint-6/rng_state.pth")
        torch.set_rng_state(want["cpu"])
        np.random.set_state(want["numpy"])
        assert torch.equal(drawn[0], torch.rand(3))
        assert np.array_equal(drawn[1], np.random.rand(3))
    finally:
        rng.load_state_dict(before)


def _numpy_names():
    from numpy._core.multiarray import _reconstruct

    return [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@pytest.mark.parametrize("layout", ["one", "sharded", "bin", "bin_sharded"])
def test_a_model_of_transformers_in_every_layout(tmp_path, layout):
    from transformers import GPT2LMHeadModel

    (done,) = bring(GOLDEN / "hf" / layout, tmp_path / "run")
    assert done.plan.id.ref == "main@0"
    want = whole(GOLDEN / "hf/whole.pt")
    found = ckptcoord.load(tmp_path / "run")["model"]
    assert all(same(found[name], want[name]) for name in found)
    opened = GPT2LMHeadModel.from_pretrained(tmp_path / "run/checkpoint-0")
    assert same(dict(opened.state_dict()), dict(want))


def test_a_file_and_a_folder_of_safetensors(tmp_path):
    one, two = {"a": torch.randn(3)}, {"b": torch.arange(4).bfloat16()}
    (tmp_path / "s").mkdir()
    save_file(one, tmp_path / "s/x.safetensors")
    save_file(two, tmp_path / "s/y.safetensors")
    bring(tmp_path / "s", tmp_path / "run", step=4)
    assert same(ckptcoord.load(tmp_path / "run", "main@4")["model"], {**one, **two})
    bring(tmp_path / "s/x.safetensors", tmp_path / "run", branch="x")
    assert same(ckptcoord.load(tmp_path / "run", "x@0")["model"], one)
    (tmp_path / "s/adapter_config.json").write_text("{}")
    (tmp_path / "s/global_step5").mkdir()
    (done,) = bring(tmp_path / "s", tmp_path / "with_files")
    assert done.plan.components == ("files", "model")
    assert done.plan.left_out == ("global_step5/: a folder in a checkpoint",)
    save_file(one, tmp_path / "s/z.safetensors")
    with pytest.raises(CorruptError, match="stands in"):
        bring(tmp_path / "s", tmp_path / "other")


def test_torch_distributed_checkpoint_of_two_ranks(tmp_path):
    (done,) = bring(GOLDEN / "dcp/sharded", tmp_path / "run")
    assert done.plan.id.ref == "main@40"
    found, want = ckptcoord.load(tmp_path / "run"), whole(GOLDEN / "dcp/sharded.whole.pt")
    assert found["model"].keys() == want["model"].keys()
    assert all(same(found["model"][name], value) for name, value in want["model"].items())
    for name, entry in want["optimizer"]["state"].items():
        assert alike(found["optimizer"]["state"][name], entry)
    assert found["progress"]["global_step"] == 40
    assert found["progress"]["epoch_index"] == 2


def test_what_stands_beside_tensors_in_torch_distributed_checkpoint(tmp_path):
    bring(GOLDEN / "dcp/values", tmp_path / "run")
    found, want = ckptcoord.load(tmp_path / "run", "main@7"), whole(GOLDEN / "dcp/values.whole.pt")
    assert same(found["model"], dict(want["state_dict"]))
    assert alike(found["optimizer"], want["optimizer"]), "by index: the order of names is lost"
    assert same(found["bf16"], want["bf16"])
    assert same(found["names"], want["names"])
    assert same(found["empty"], want["empty"])
    extra = {"scalar": want["scalar"], "text": "words", "global_step": 7}
    assert found["extra"].keys() == extra.keys()
    assert all(same(found["extra"][key], value) for key, value in extra.items())


def test_runs_of_numbered_folders_come_by_number(tmp_path):
    for step in (9, 100, 20):
        shutil.copytree(GOLDEN / "dcp/values", tmp_path / f"out/step-{step}")
    (tmp_path / "out/step-7").mkdir()
    source = find_source(tmp_path / "out")
    assert source.left_out == ("step-7: holds nothing known",)
    assert refs(bring(tmp_path / "out", tmp_path / "run")) == ["main@9", "main@20", "main@100"]
    assert refs(bring(tmp_path / "out", tmp_path / "b", step=20, branch="x")) == ["x@20"]


def test_adapters_of_a_trainer_run_are_its_model(tmp_path):
    shutil.copytree(GOLDEN / "hf/trainer/checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6/model.safetensors").unlink()
    save_file({"lora": torch.ones(2)}, tmp_path / "checkpoint-6/adapter_model.safetensors")
    bring(tmp_path / "checkpoint-6", tmp_path / "run")
    assert same(ckptcoord.load(tmp_path / "run")["model"], {"lora": torch.ones(2)})


def test_the_last_model_beside_the_checkpoints_of_a_run_is_left_out(tmp_path):
    shutil.copytree(GOLDEN / "hf/trainer", tmp_path / "out")
    shutil.copytree(GOLDEN / "hf/one", tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "out/checkpoint-6/global_step6").mkdir()
    source = find_source(tmp_path / "out")
    assert [one.step for one in source.checkpoints] == [3, 6]
    assert source.left_out == ("model.safetensors: beside the checkpoints",)


# --- torch.save ----------------------------------------------------------------------------------


def trained(steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def test_a_file_of_torch_save_with_all_that_people_put_there(tmp_path):
    model, optimizer, scheduler = trained()
    names = [name for name, _ in model.named_parameters()]
    state = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 2,
        "global_step": 300,
        "loss": 0.25,
        "ema": {"shadow": torch.randn(3)},
        "numpy": np.arange(3),
        "note": None,
        "a b/../c": [1],
    }
    torch.save(state, tmp_path / "a.pt")
    (done,) = bring(tmp_path / "a.pt", tmp_path / "run")
    assert done.plan.id.ref == "main@300"
    assert done.plan.notes == ()
    found = ckptcoord.load(tmp_path / "run")
    assert same(found["model"], dict(model.state_dict()))
    assert type(found["model"]) is OrderedDict
    assert same(found["optimizer"], by_name(optimizer.state_dict(), names))
    assert same(found["scheduler"], scheduler.state_dict())
    assert same(found["ema"], state["ema"])
    assert np.array_equal(found["numpy"], np.arange(3))
    assert found["extra"] == {"epoch": 2, "global_step": 300, "loss": 0.25, "a b/../c": [1]}
    assert found["progress"] == progress(300, 2.0)


def test_progress_is_as_our_trainers_have_it():
    TrainerState().load_state_dict(progress(300, 2.25))
    assert progress(300, 2.25).keys() == TrainerState().state_dict().keys()


def test_lightning(tmp_path):
    model, optimizer, scheduler = trained()
    state = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(state, tmp_path / "last.ckpt")
    bring(tmp_path / "last.ckpt", tmp_path / "run")
    found = ckptcoord.load(tmp_path / "run", "main@20")
    assert found["optimizer"]["group_of"]["0.weight"] == "0"
    assert same(found["scheduler"], scheduler.state_dict())
    assert found["hyper_parameters"] == {"lr": 0.1}


@pytest.mark.parametrize(
    "value",
    [torch.randn(3), [1, "a", torch.ones(2)], 7, {1: torch.ones(2)}, {}],
    ids=["tensor", "list", "number", "numbers as keys", "empty"],
)
def test_what_is_no_mapping_by_name_is_one_object(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    bring(tmp_path / "a.pt", tmp_path / "run")
    found = ckptcoord.load(tmp_path / "run")
    assert same(found, value)


def test_tied_tensors_stay_tied(tmp_path):
    one = torch.randn(4)
    torch.save({"a": one, "b": one, "c": one[:2]}, tmp_path / "a.pt")
    bring(tmp_path / "a.pt", tmp_path / "run")
    found = ckptcoord.load(tmp_path / "run")["model"]
    assert found["a"] is found["b"]
    assert torch.equal(found["c"], one[:2])


# --- optimizers by name --------------------------------------------------------------------------


def two_groups(model, first):
    named = list(model.named_parameters())
    groups = [[p for n, p in named if first(n, p)], [p for n, p in named if not first(n, p)]]
    return torch.optim.SGD([{"params": group} for group in groups], lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "first", [lambda n, p: p.ndim >= 2, lambda n, p: "bias" not in n], ids=["matrices", "no bias"]
)
def test_groups_with_and_without_decay_are_told_apart_by_shapes(tmp_path, first):
    model, *_ = trained()
    if "bias" in (first.__code__.co_consts or ()):
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    optimizer = two_groups(model, first)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt"
    )
    bring(tmp_path / "a.pt", tmp_path / "run")
    found = ckptcoord.load(tmp_path / "run")["optimizer"]
    for name, parameter in model.named_parameters():
        assert torch.equal(
            found["state"][name]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"]
        )


def test_names_that_cannot_be_proved_leave_the_state_by_index(tmp_path):
    model, optimizer, _ = trained()
    state = optimizer.state_dict()
    state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "a.pt")
    (done,) = bring(tmp_path / "a.pt", tmp_path / "run")
    assert "by the index" in done.plan.notes[0]
    found = ckptcoord.load(tmp_path / "run")["optimizer"]
    assert same(found, state)
    trained()[1].load_state_dict(optimizer.state_dict())


def test_names_that_the_optimizer_has_itself_are_taken(tmp_path):
    model, *_ = trained()
    optimizer = torch.optim.SGD(reversed(list(model.named_parameters())), lr=0.1, momentum=0.9)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt"
    )
    bring(tmp_path / "a.pt", tmp_path / "run")
    found = ckptcoord.load(tmp_path / "run")["optimizer"]["state"]
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(found[name]["momentum_buffer"], momentum)


# --- going on from an import ---------------------------------------------------------------------


class Points(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        x = torch.linspace(0, 1, 4) * (index + 1)
        return {"x": x, "y": x.sum().reshape(1)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, y):
        return {"loss": (self.second(self.first(x).relu()) - y).square().mean()}


class GoOn(ckptcoord.Trainer):
    """What an import does not have is not required."""

    def get_state_components(self):
        have = {"model", "optimizer", "scheduler", "progress"}
        return [replace(one, required=one.key in have) for one in super().get_state_components()]


def trainer(folder, kind=ckptcoord.Trainer, **settings):
    torch.manual_seed(3)
    args = ckptcoord.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        logging_steps=0,
        resume_from_checkpoint=True,
        **settings,
    )
    return kind(Net(), args, Points())


def test_a_trainer_goes_on_from_a_file_of_torch_save(tmp_path):
    by_hand = trainer(tmp_path / "hand", max_steps=6, save_strategy="no", weight_decay=0.1)
    by_hand.train()
    state = {
        "model": by_hand.model.state_dict(),
        "optimizer": by_hand.optimizer.state_dict(),
        "scheduler": by_hand.lr_scheduler.state_dict(),
        "step": 6,
        "epoch": 1.0,
    }
    torch.save(state, tmp_path / "model.pt")
    assert refs(bring(tmp_path / "model.pt", tmp_path / "run")) == ["main@6"]

    other = trainer(tmp_path / "run", GoOn, max_steps=6, save_strategy="no", weight_decay=0.1)
    with torch.no_grad():
        other.model.first.weight.zero_()
    other.train()
    assert same(dict(other.model.state_dict()), dict(by_hand.model.state_dict()))
    assert same(other.optimizer.state_dict(), by_hand.optimizer.state_dict())
    assert same(other.lr_scheduler.state_dict(), by_hand.lr_scheduler.state_dict())
    assert other.state.global_step == 6

    more = trainer(tmp_path / "run", GoOn, max_steps=8, save_steps=8, weight_decay=0.1)
    assert more.train().global_step == 8
    repository = open_repository(tmp_path / "run")
    assert repository.resolve("main@8").parent.ref == "main@6"


def test_another_shape_is_refused_and_named(tmp_path):
    torch.save({"model": {"first.weight": torch.ones(2, 2)}}, tmp_path / "model.pt")
    bring(tmp_path / "model.pt", tmp_path / "run")

    class WithModel(ckptcoord.Trainer):
        def get_state_components(self):
            parts = super().get_state_components()
            return [replace(part, required=part.key == "model") for part in parts]

    with pytest.raises(ckptcoord.CkptError, match=r"first\.weight"):
        trainer(tmp_path / "run", WithModel, max_steps=1).train()


# --- twice, elsewhere, badly ---------------------------------------------------------------------


def tree(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "source", ["gradient/auto", "hf/trainer", "forgather/output", "dcp/values"]
)
def test_nothing_of_the_source_changes_and_a_second_import_does_nothing(tmp_path, source):
    shutil.copytree(GOLDEN / source, tmp_path / "source")
    before = tree(tmp_path / "source")
    first = bring(tmp_path / "source", tmp_path / "run")
    assert all(one.new for one in first)
    after = tree(tmp_path / "run")
    second = bring(tmp_path / "source", tmp_path / "run")
    assert not any(one.new for one in second)
    assert [one.path for one in second] == [one.path for one in first]
    assert tree(tmp_path / "run") == after
    assert tree(tmp_path / "source") == before


def test_an_import_that_was_interrupted_goes_on(tmp_path):
    source = find_source(GOLDEN / "gradient/auto")
    steps = run_import(source, plan_import(source), tmp_path / "run")
    assert [next(steps).plan.id.ref, next(steps).plan.id.ref] == ["main@10", "main@20"]
    steps.close()
    done = bring(GOLDEN / "gradient/auto", tmp_path / "run")
    assert [one.new for one in done] == [False, False, True, True, True]


def test_another_checkpoint_in_the_place_is_kept(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "step": 5}, tmp_path / "a.pt")
    torch.save({"model": {"a": torch.zeros(2)}, "step": 5}, tmp_path / "b.pt")
    torch.save({"model": {"a": torch.zeros(2)}, "step": 4}, tmp_path / "c.pt")
    bring(tmp_path / "a.pt", tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.a differs.*--branch"):
        bring(tmp_path / "b.pt", tmp_path / "run")
    with pytest.raises(ConfigError, match="after main@5"):
        bring(tmp_path / "c.pt", tmp_path / "run")
    assert tree(tmp_path / "run") == before
    assert refs(bring(tmp_path / "b.pt", tmp_path / "run", branch="b")) == ["b@5"]


def test_planning_writes_nothing(tmp_path):
    plans = plan_import(find_source(GOLDEN / "hf/trainer"))
    assert [plan.id.ref for plan in plans] == ["main@3", "main@6"]
    assert list(tmp_path.iterdir()) == []


def test_two_checkpoints_in_one_place_are_refused(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / "dcp/values", tmp_path / f"out/checkpoint-{name}")
    with pytest.raises(ConfigError, match="main@7"):
        bring(tmp_path / "out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_reads_back_otherwise_is_retired_again(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    monkeypatch.setattr(importing, "differences", lambda *_: iter(["model.a differs"]))
    with pytest.raises(CorruptError, match=r"model\.a differs"):
        bring(tmp_path / "a.pt", tmp_path / "run")
    state = open_repository(tmp_path / "run").state()
    assert CheckpointId(BranchName("main"), 0) not in state.commits
    monkeypatch.undo()
    assert refs(bring(tmp_path / "a.pt", tmp_path / "run")) == ["main@0"]


def test_ckptcoords_own_folders_are_not_imported(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    bring(tmp_path / "a.pt", tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run/checkpoint-0"):
        with pytest.raises(FormatError, match="own"):
            find_source(path)


def test_a_digest_is_of_what_was_in_the_source(tmp_path):
    value = torch.randn(5)
    torch.save({"a": value}, tmp_path / "a.pt")
    (done,) = bring(tmp_path / "a.pt", tmp_path / "run")
    shard = tmp_path / "run" / done.path / "model.safetensors"
    head = json.loads(shard.read_bytes()[8 : 8 + int.from_bytes(shard.read_bytes()[:8], "little")])
    digests = json.loads(head["__metadata__"]["ckptcoord"])["digests"]
    from blake3 import blake3

    assert digests["a"] == f"blake3:{blake3(value.numpy().tobytes()).hexdigest()}"


def test_an_engine_goes_on_from_an_import_without_its_generators(tmp_path):
    model, optimizer, scheduler = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": 30,
    }
    torch.save(state, tmp_path / "last.pt")
    bring(tmp_path / "last.pt", tmp_path / "w/run")
    other = trained(steps=1)
    engine = ckptcoord.CheckpointEngine.attach(*other, workspace=tmp_path / "w", repo="run")
    with engine:
        assert engine.resume("main@30", strict=False).step == 30
        assert same(dict(other[0].state_dict()), dict(model.state_dict()))
        assert same(other[1].state_dict(), optimizer.state_dict())
        assert same(other[2].state_dict(), scheduler.state_dict())
        engine.commit(31)
    assert open_repository(tmp_path / "w/run").resolve("main@31").parent.ref == "main@30"
