"""`ckptcoord export`: words, files, and what a user did wrong."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent


@pytest.fixture
def run(tmp_path):
    state = OrderedDict(weight=torch.randn(5, 3), big=torch.tensor([1e20]))
    model = StateComponent("model", state, SharingPattern.REPLICATED)
    optimizer = StateComponent("optimizer", {"lr": 0.1}, SharingPattern.REPLICATED)
    with CheckpointCoordinator([model, optimizer], output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=5)
        state["weight"] += 1
        coordinator.save_checkpoint(step=7)
    return tmp_path / "run"


def test_a_ref_becomes_a_folder(cli, run, tmp_path) -> None:
    answer = cli("export", "main@5", tmp_path / "out", "--to", "hf", "-C", run)

    assert answer.code == 0
    files = dict(line.split("\t") for line in answer.out.splitlines())
    names = ("ckptcoord_export.json", "model.safetensors")
    assert files.keys() == {f"{tmp_path}/out/{name}" for name in names}
    assert all(Path(path).stat().st_size == int(size) for path, size in files.items())
    assert "main@5 for hf: 2 tensors, 64 B exported, read back and found the same" in answer.err
    note = json.loads((tmp_path / "out/ckptcoord_export.json").read_text())
    assert (note["exported_from"], note["to"]) == ("main@5", "hf")
    assert str(tmp_path) not in json.dumps(note)


def test_json_and_a_checkpoint_by_its_path(cli, run, tmp_path) -> None:
    words = ["export", run / "checkpoint-7", tmp_path / "out", "--to", "hf", "--dtype", "half"]

    data = cli(*words, "--json").json["data"]

    assert (data["ref"], data["dtype"], data["cast"]) == ("main@7", "F16", 2)
    assert data["overflowed"] == {"big": 1}
    assert load_file(tmp_path / "out/model.safetensors")["weight"].dtype == torch.float16
    again = cli(*words, "--force")
    assert "warning: 1 element of big became infinite in F16" in again.err


def test_a_repository_stands_for_its_latest(cli, run, tmp_path) -> None:
    answer = cli("export", run, tmp_path / "out", "--to", "torch", "--dry-run")

    assert (answer.code, answer.out) == (0, f"{tmp_path}/out\n")
    assert "main@7 for torch: 2 tensors, 64 B would be exported" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["main@5", "out"], 2, "--to: is missing; there are hf, torch, dcp, onnx"),
        (["main@5", "out", "--to", "keras"], 2, "--to: is 'keras'"),
        (["main@5", "out", "--to", "hf", "--dtype", "int8"], 2, "--dtype: is 'int8'"),
        (["main@5", "out", "--to", "hf", "--all"], 2, "--all: hf holds one model"),
        (["main@5", "out", "--to", "hf", "--component", "x"], 2, "no 'x', but model, optimizer"),
        (["main@5", "out", "--to", "hf", "--max-shard-size", "-1"], 2, "--max-shard-size"),
        (["main@5", "out", "--to", "hf", "--max-shard-size", "0"], 2, "--max-shard-size"),
        (["main@5", "out", "--to", "hf", "--config-from", "nowhere"], 2, "no config.json"),
        (["main@5", "out", "--to", "onnx"], 2, "--model: is missing"),
        (["main@5", ".", "--to", "hf"], 2, "where checkpoints are"),
        (["main@5", "run", "--to", "hf"], 2, "where checkpoints are"),
        (["main@5", "a\0b", "--to", "hf"], 1, "NUL"),
        (["main@5", "", "--to", "hf"], 2, "where checkpoints are"),
        (["main@6", "out", "--to", "hf"], 12, "Nearest: main@5, main@7"),
        (["mian", "out", "--to", "hf"], 12, "Nearest: main"),
        (["..", "out", "--to", "hf"], 12, "no checkpoint"),
        (["a\0b", "out", "--to", "hf"], 2, "ref"),
        (["x" * 10_000, "out", "--to", "hf"], 2, "ref"),
        (["main@5.lock", "out", "--to", "hf"], 2, "ref"),
        (["", "out", "--to", "hf"], 2, "ref"),
        (["main@5"], 2, "Missing argument"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_made(
    cli, run, tmp_path, monkeypatch, words, code, why
) -> None:
    monkeypatch.chdir(tmp_path)

    answer = cli("export", *words, "-C", run)

    assert (answer.code, answer.out) == (code, "")
    assert why in answer.err
    assert answer.err.startswith("error[")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_written_to(cli, run, tmp_path) -> None:
    (tmp_path / "file").write_text("x")

    answer = cli("export", "main@5", tmp_path / "file/out", "--to", "hf", "-C", run)

    assert answer.code == 1
    assert "file" in answer.err


def test_names_that_come_from_files_are_printable(cli, tmp_path) -> None:
    state = {"a": {"b\x1b[31m": 1, "t": torch.ones(2)}}
    model = StateComponent("model", state, SharingPattern.REPLICATED)
    with CheckpointCoordinator([model], output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=5)

    answer = cli("export", tmp_path / "run", tmp_path / "out", "--to", "hf")

    assert r"left out, as it is no tensor: a.b\x1b[31m" in answer.err
    assert "\x1b" not in answer.err
