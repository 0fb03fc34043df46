"""`ckptcoord import`, as people and programs meet it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptcoord.repo.repository import open_repository

GOLDEN = Path(__file__).parents[2] / "golden"
HOSTILE = ["", "..", "a/b", "\0", "x" * 10_000, "a.lock", "-x", "latest", "\x1b[31m"]


@pytest.fixture
def file(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}, "step": 7, "loss": 0.5}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_what_was_done_is_a_line_each_and_the_rest_goes_to_stderr(cli, tmp_path) -> None:
    answer = cli("import", GOLDEN / "hf/trainer", "--repo", tmp_path / "run")

    assert answer.code == 0
    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[:2] for row in rows] == [["main@3", "imported"], ["main@6", "imported"]]
    assert rows[0][3] == "files, model, optimizer, progress, rng, scheduler"
    assert rows[0][4].endswith("hf/trainer/checkpoint-3")
    assert "main@3: left out: training_args.bin" in answer.err
    assert "2 checkpoints imported, read back and compared" in answer.err

    again = cli("import", GOLDEN / "hf/trainer", "--repo", tmp_path / "run")
    assert again.code == 0
    assert [line.split("\t")[1] for line in again.out.splitlines()] == ["there already"] * 2


def test_json_says_all_of_it(cli, tmp_path) -> None:
    answer = cli("import", GOLDEN / "gradient/auto", "-C", tmp_path / "run", "--json")

    assert answer.code == 0
    assert answer.json["command"] == "import"
    data = answer.json["data"]
    assert data["format"] == "gradient-desc repository"
    assert data["repository"] == str(tmp_path / "run")
    assert [one["ref"] for one in data["checkpoints"]][:3] == ["main@10", "main@20", "exp@20"]
    first = data["checkpoints"][1]
    assert first["status"] == "imported"
    assert first["path"] == "checkpoint-20"
    assert first["size_bytes"] > 1000
    assert "difference" in first["notes"][0]
    assert data["left_out"] == []


def test_a_dry_run_writes_nothing(cli, tmp_path, file) -> None:
    answer = cli("import", file, "--repo", tmp_path / "run", "--dry-run")

    assert answer.code == 0
    assert answer.out.startswith("main@7\twould import\t12\textra, model\t")
    assert not (tmp_path / "run").exists()


def test_step_and_branch(cli, tmp_path, file) -> None:
    root = tmp_path / "run"
    assert cli("import", file, "--repo", root, "--step", "9", "--branch", "old").code == 0
    assert [str(one) for one in open_repository(root).state().commits] == ["checkpoint-9@old"]


def test_the_repository_around_is_meant_where_none_is_named(
    cli, tmp_path, file, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cli("import", "a.pt")
    assert (answer.code, answer.out) == (2, "")
    assert "--repo" in answer.err

    assert cli("import", "a.pt", "--repo", "run").code == 0
    inside = tmp_path / "run/deeper"
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert cli("import", "../../a.pt", "--branch", "b").code == 0
    assert len(open_repository(tmp_path / "run").state().commits) == 2


def test_another_checkpoint_in_the_place_is_usage_and_says_what_differs(cli, tmp_path, file):
    assert cli("import", file, "--repo", tmp_path / "run").code == 0
    torch.save({"model": {"w": torch.zeros(3)}, "step": 7, "loss": 0.5}, file)
    answer = cli("import", file, "--repo", tmp_path / "run")
    assert answer.code == 2
    assert "model.w differs" in answer.err
    assert "--branch" in answer.err


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_are_errors(cli, tmp_path, file, word) -> None:
    root = tmp_path / "run"
    for words in (["--branch", word], ["--step", word]):
        answer = cli("import", file, "--repo", root, *words)
        assert answer.code == 2, words
        assert "Traceback" not in answer.err
        assert "\x1b" not in answer.err
    answer = cli("import", tmp_path / word if word != "\0" else word, "--repo", root, "--json")
    assert answer.code != 0
    assert answer.json["error"]["code"].startswith("CC")
    assert not root.exists()


@pytest.mark.parametrize("step", ["-1", "1.5", "1e3", "٣", "9" * 30, "x"])
def test_steps_that_are_none(cli, tmp_path, file, step) -> None:
    assert cli("import", file, "--repo", tmp_path / "run", "--step", step).code == 2


@pytest.mark.parametrize("repo", ["", "\0", "a.pt", "x" * 10_000])
def test_repositories_that_can_be_none(cli, tmp_path, file, monkeypatch, repo) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cli("import", file, "--repo", repo)
    assert answer.code in (1, 2)
    assert answer.err.startswith("error[CC")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_names_of_files_cannot_drive_a_terminal(cli, tmp_path) -> None:
    inside = tmp_path / "a\x1b[31m\nb"
    inside.mkdir()
    torch.save({"w": torch.ones(1)}, inside / "x.pt")
    answer = cli("import", inside / "x.pt", "--repo", tmp_path / "run")
    assert answer.code == 0
    assert "\x1b" not in answer.out + answer.err
    assert len(answer.out.splitlines()) == 1


def test_what_needs_objects_is_refused_with_what_to_do(cli, tmp_path) -> None:
    torch.save({"config": Path("x")}, tmp_path / "a.pt")
    answer = cli("import", tmp_path / "a.pt", "--repo", tmp_path / "run")
    assert answer.code == 1
    assert "error[CC060]" in answer.err
    assert "pathlib" in answer.err
    assert "state_dict()" in answer.err
    assert not (tmp_path / "run").exists()


def test_damage_is_thirteen(cli, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    answer = cli("import", tmp_path, "--repo", tmp_path / "run")
    assert answer.code == 13
