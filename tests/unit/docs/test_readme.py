"""What the README shows works as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tests.unit.docs.pages import Page
from tests.unit.docs.runner import Runner

import ckptcoord

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_trainer_of_the_readme_declares_its_components(tmp_path):
    from ckptcoord import CheckpointCoordinator, TrainingArguments

    scope: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), scope)
    data = [(torch.randn(4), torch.randn(4)) for _ in range(8)]

    class Regression(torch.nn.Linear):
        def forward(self, x, y):
            return (super().forward(x) - y).square().mean()

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=2
    )
    trainer = scope["MyTrainer"](Regression(4, 4), args, data)
    trainer.train()
    trainer.close()
    with CheckpointCoordinator([], output_dir=tmp_path) as coordinator:
        manifest = coordinator.repository.manifest(coordinator.repository.resolve("main@2"))
    assert sorted(manifest.components) == ["dataset", "model", "optimizer", "rng"]


def test_the_lines_without_a_trainer_save_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    scope = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    exec(compile(blocks("python")[1], "README.md", "exec"), scope)
    assert (tmp_path / "runs/mine/checkpoint-100/checkpoint_manifest.json").is_file()


def test_the_loop_of_the_readme_is_the_example_that_tests_run():
    """tests/distributed/test_engine.py runs, kills and resumes it, also under torchrun."""
    (script,) = [block for block in blocks("python") if "CheckpointEngine" in block]
    assert script == (ROOT / "examples/engine/train.py").read_text()
    assert sum(1 for line in script.splitlines() if line) <= 20


def test_the_commands_around_the_loop_run_one_after_the_other(tmp_path, commands):
    (block,) = [one for one in blocks("console") if "examples/engine" in one]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    runner = Runner(Page(path=ROOT / "README.md"), tmp_path, commands)
    said = {}
    for line in block.splitlines():
        code, said[line] = runner.shell(line.removeprefix("$ "))
        assert code == 0, said[line]
    train, log, fork, diff = said.values()
    assert train.splitlines()[-1].startswith("200 ")
    assert log.startswith("main@200 (latest, main)")
    assert fork.splitlines()[-1].startswith("200 ")
    assert diff.startswith("main@200 -> anew@200")


def test_the_commands_about_a_trainers_run_run_one_after_the_other(tmp_path, commands):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    runner = Runner(Page(path=ROOT / "README.md"), tmp_path, commands)
    lines = [line for one in blocks("console") if "runs/gpt" in one for line in one.splitlines()]
    said = {  # gc would ask
        line: runner.shell(line.removeprefix("$ ").replace(" gc ", " gc -y ")) for line in lines
    }
    assert {line: output for line, (code, output) in said.items() if code != 0} == {}
    assert said["$ ckptcoord log runs/gpt"][1].startswith("main@20 (latest, main)")
    assert [line.split()[2] for line in lines[-3:]] == ["du", "gc", "compact"]
    ckptcoord.export_model(tmp_path / "runs/gpt", tmp_path / "gpt-hf")
    assert "main@30 (latest, main)" in runner.shell("ckptcoord log runs/gpt -n 1")[1]


@pytest.mark.parametrize("line", [x for b in blocks("console") for x in b.splitlines()])
def test_every_command_of_the_readme_names_what_exists(line):
    words = shlex.split(line.removeprefix("$ "), comments=True)
    if words[0] == "ckptcoord":
        from typer.testing import CliRunner

        from ckptcoord.cli.app import app

        result = CliRunner().invoke(app, [words[1], "--help"])
        assert result.exit_code == 0
    else:
        script = next(word for word in words if "/" in word)
        assert (ROOT / script).is_file()


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
