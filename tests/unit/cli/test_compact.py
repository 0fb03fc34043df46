"""`ckptcoord compact`: deltas that stand alone again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptcoord
from ckptcoord import (
    CheckpointCoordinator,
    Compression,
    CoordinatorConfig,
    Lossy,
    SharingPattern,
    StateComponent,
)
from ckptcoord.cli.text import bytes_text
from ckptcoord.core.entries import Retire
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import RefNotFoundError
from ckptcoord.repo import compaction
from ckptcoord.repo.compaction import compact


def deltas(root, *, keep_last=None, shard=1 << 30):
    """Three checkpoints, the last two of them deltas."""
    live = {"model": {"a": torch.ones(5000), "b": torch.zeros(70)}}
    config = CoordinatorConfig(compression="auto", keep_last=keep_last, max_shard_size=shard)
    component = StateComponent("model", live["model"], SharingPattern.REPLICATED)
    with CheckpointCoordinator([component], output_dir=root, config=config) as coordinator:
        for step in (1, 2, 3):
            live["model"]["a"] += 1
            coordinator.save_checkpoint(
                step=step, message=f"step {step}", metrics={"loss": 1 / step}
            )
    return live["model"]


def test_a_delta_becomes_plain_safetensors_and_keeps_its_place(cli, tmp_path):
    root = tmp_path / "run"
    live = deltas(root)
    answer = cli("compact", root, "main@3")
    assert answer.code == 0
    assert answer.out.startswith("main@3  ")
    assert "needing 1 other checkpoint; now" in answer.out
    assert "ckptcoord gc" in answer.err
    repository = ckptcoord.open_repository(root)
    commit = repository.resolve("main@3")
    assert commit.needs == ()
    assert (commit.message, dict(commit.metrics)) == ("step 3", {"loss": 1 / 3})
    assert repository.resolve("latest") == commit
    found = load_file(root / commit.path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in live.items())
    assert cli("verify", root, "--all").code == 0
    assert "compacted; it was a delta against main@1" in cli("inspect", root, "main@3").out
    loaded = ckptcoord.load(root)
    assert isinstance(loaded, dict)
    assert torch.equal(loaded["model"]["a"], live["a"])


def test_what_was_given_up_is_said_of_each_tensor_afterwards(cli, tmp_path):
    root = tmp_path / "run"
    live = {name: torch.randn(9000) for name in ("exact", "near")}
    rule = Compression(level="auto", lossy={"model": Lossy(update_fraction=0.2)})
    component = StateComponent("model", live, SharingPattern.REPLICATED)
    config = CoordinatorConfig(compression=rule)
    with CheckpointCoordinator([component], output_dir=root, config=config) as coordinator:
        coordinator.save_checkpoint(step=1)
        live["near"] += 1e-3 * torch.randn(9000)
        coordinator.save_checkpoint(step=2)

    def said() -> dict[str, Any]:
        tensors = cli("inspect", root, "main@2", "--tensors", "--json").json["data"]["tensors"]
        return {one["name"]: one.get("given_up") for one in tensors}

    before = said()
    assert before["exact"] is None
    assert before["near"][1] > 0
    assert cli("compact", root, "main@2").code == 0
    assert said() == before
    assert cli("verify", root, "--all").code == 0
    text = cli("inspect", root, "main@2", "--tensors").out
    assert f"gives up {before['near'][1]:.1e}" in next(
        line for line in text.splitlines() if "near" in line
    )


def test_without_a_ref_those_that_keep_retired_ones_alive(cli, tmp_path):
    root = tmp_path / "run"
    deltas(root, keep_last=1)
    before = cli("compact", root, "--dry-run", "--json").json
    assert [one["ref"] for one in before["data"]["compacted"]] == ["main@3"]
    assert ckptcoord.open_repository(root).resolve("main@3").needs
    assert cli("compact", root, "--json").json["data"]["compacted"][0]["needs"] == ["checkpoint-1"]
    assert ckptcoord.open_repository(root).resolve("main@3").needs == ()
    again = cli("compact", root)
    assert (again.code, again.out) == (0, "")
    assert "nothing to do" in again.err


def test_gc_can_make_them_stand_alone_first(cli, tmp_path):
    root = tmp_path / "run"
    live = deltas(root, keep_last=1)
    plain = cli("gc", root, "--grace", "0s", "--dry-run").out
    assert "keep\tcheckpoint-1\t" in plain, "its delta needs it"
    dry = cli("gc", root, "--grace", "0s", "--compact", "--dry-run")
    assert ckptcoord.open_repository(root).resolve("main@3").needs, "nothing was changed"
    done = cli("gc", root, "--grace", "0s", "--compact", "-y")
    assert (done.code, done.out) == (0, dry.out)
    size = bytes_text(ckptcoord.open_repository(root).resolve("main@3").size_bytes)
    assert f"1 plain checkpoint, about {size} to write; " in dry.err
    assert f"1 plain checkpoint, about {size} written; " in done.err
    verbs = [line.split("\t")[:2] for line in done.out.splitlines()]
    assert verbs[0] == ["compact", "checkpoint-3"]
    assert ["delete", "checkpoint-1"] in verbs
    assert ["delete", "checkpoint-3"] in verbs, "of it there is a plain one now"
    commit = ckptcoord.open_repository(root).resolve("main@3")
    assert sorted(one.name for one in root.iterdir() if one.name.startswith("ch")) == [commit.path]
    assert torch.equal(load_file(root / commit.path / "model.safetensors")["a"], live["a"])
    again = cli("gc", root, "--grace", "0s", "--compact", "-y", "--json").json["data"]
    assert (again["compact"], again["delete"]) == ([], [])


@pytest.mark.parametrize("command", [["gc", "--grace", "0s", "--compact", "-y"], ["compact"]])
@pytest.mark.parametrize("dropped", [2, 3])
def test_what_is_dropped_meanwhile_is_left_and_the_rest_is_done(
    cli, tmp_path, monkeypatch, dropped, command
):
    """As a run with retention does beside it: at the very checkpoint, or before its turn."""
    root = tmp_path / "run"
    deltas(root)
    repository = ckptcoord.open_repository(root)

    def retire(step: int) -> None:
        ids = (CheckpointId(BranchName(), step),)
        if ids[0] in repository.state().commits:
            repository.log.append(lambda _: Retire(writer="a" * 32, checkpoint_ids=ids))

    def retire_and_compact(*args: Any, **more: Any) -> bool:
        retire(dropped)
        return compact(*args, **more)

    retire(1)
    monkeypatch.setattr(compaction, "compact", retire_and_compact)
    answer = cli(command[0], root, *command[1:])
    assert answer.code == 0
    assert f"note: main@{dropped} was dropped or written anew meanwhile" in answer.err
    stays = repository.resolve(f"main@{5 - dropped}")
    assert stays.needs == ()
    if command[0] == "gc":
        assert sorted(one.name for one in root.glob("ch*")) == [stays.path]
    else:
        assert [line.split()[0] for line in answer.out.splitlines()] == [stays.checkpoint_id.ref]
    assert cli("verify", root, "--all").code == 0


def test_a_copy_of_what_was_dropped_meanwhile_leaves_nothing_behind(tmp_path):
    root = tmp_path / "run"
    deltas(root)
    repository = ckptcoord.open_repository(root)
    ids = (CheckpointId(BranchName(), 2),)

    def retire(_: int) -> None:
        if ids[0] in repository.state().commits:
            repository.log.append(lambda _: Retire(writer="a" * 32, checkpoint_ids=ids))

    with pytest.raises(RefNotFoundError):
        compact(repository, ids[0], writer="b" * 32, progress=retire)
    assert [one.name for one in root.glob("checkpoint-2*")] == ["checkpoint-2"]
    assert not list((root / ".ckptcoord/staging").iterdir())


def test_what_cannot_be_compacted_and_is_live_is_an_error(cli, tmp_path):
    root = tmp_path / "run"
    deltas(root, keep_last=1)
    (file,) = (root / "checkpoint-3").glob("*.delta.safetensors")
    file.unlink()
    answer = cli("gc", root, "--grace", "0s", "--compact", "-y")
    assert answer.code == 13
    assert "the file is missing" in answer.err
    assert (root / "checkpoint-1").is_dir(), "nothing was deleted"


def test_several_shards_get_their_index(cli, tmp_path):
    root = tmp_path / "run"
    live = deltas(root, shard=1000)
    assert cli("compact", root, "main@2").code == 0
    folder = root / ckptcoord.open_repository(root).resolve("main@2").path
    names = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if "delta" in name]
    assert cli("verify", root, "main@2").code == 0
    loaded = ckptcoord.load(root, "main@2")
    assert isinstance(loaded, dict)
    assert torch.equal(loaded["model"]["a"], live["a"] - 1)


def test_what_cannot_be_read_is_left_as_it_is(cli, tmp_path):
    root = tmp_path / "run"
    deltas(root)
    (root / "checkpoint-1" / "model.safetensors").unlink()
    before = ckptcoord.open_repository(root).resolve("main@3")
    answer = cli("compact", root, "main@3")
    assert answer.code == 13
    assert "checkpoint-1/model.safetensors" in answer.err
    assert ckptcoord.open_repository(root).resolve("main@3") == before
    assert not any((root / ".ckptcoord" / "staging").iterdir())
    assert cli("compact", root, "main@9").code == 12
