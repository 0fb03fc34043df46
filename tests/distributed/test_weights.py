"""From the shell: weights that were imported or averaged are trained on by unchanged scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from safetensors.torch import save_file
from tests.unit.engine.loop import Loop
from tests.unit.trainers.job import run_job
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckptcoord import (
    CheckpointCoordinator,
    CheckpointEngine,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.dist.parallel import start_process_group
from ckptcoord.errors import CkptError

pytestmark = pytest.mark.dist

README = str(Path(__file__).parents[2] / "examples/engine/train.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
REPO = ("--repo", "ml-experiments/first")
# Says where it begins; where DIE is set, it is killed in its second step.
TRAINER = """
import os, signal, sys, torch
from ckptcoord import DDPTrainer, TrainerCallback, TrainingArguments, shutdown


class Data:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.linspace(0, 1, 32) * index
        return x, x.sin().sum().reshape(1)


class Mine(DDPTrainer):
    def compute_loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()


class Tell(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(args.branch, state.global_step, len(kwargs["optimizer"].state), flush=True)
        self.begins = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if "DIE" in os.environ and state.global_step == self.begins + 2:
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
steps = int(os.environ.get("STEPS", 6))
args = TrainingArguments(max_steps=steps, save_steps=4, use_cpu=True, per_device_train_batch_size=4)
trainer = Mine(model, args, Data(), callbacks=[Tell()])
code = trainer.train().exit_code
shutdown(trainer)
sys.exit(code)
"""


class Shell:
    """A folder in which commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environ = os.environ  # noqa: TID251 (the children's)
        kept = {name: text for name, text in environ.items() if not name.startswith("CKPTCOORD_")}
        self._environ = {**kept, "OMP_NUM_THREADS": "1"}

    def __call__(
        self, *words: str, code: int = 0, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """`ckptcoord` with these words; it exits like this."""
        done = subprocess.run(
            [sys.executable, "-m", "ckptcoord.cli", *words],
            cwd=self.folder,
            env=self._environ | environ,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    def messages(self, branch: str) -> dict[str, str]:
        commits = open_repository(self.folder / "ml-experiments/first").state().commits
        return {one.ref: c.message for one, c in commits.items() if str(one.branch) == branch}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """`imported@1000` came out of a safetensors file."""
    shell = Shell(tmp_path)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "mine.py").write_text(TRAINER)
    shell("workspace", "init", "ml-experiments")
    shell("import", "model.safetensors", *REPO, "--branch", "imported", "--step", "1000")
    return shell


def test_the_readmes_script_trains_an_imported_model_on(shell: Shell) -> None:
    done = shell(
        *("fork", *REPO, "imported@1000", "tune", "--weights-only", "--seed", "7"),
        *("--", sys.executable, README),
    )
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == [*range(1, 201)]
    steps = {f"tune@{step}": "" for step in range(20, 201, 20)}
    first = {"tune@0": "fork of imported@1000: weights only, seed 7"}
    assert shell.messages("tune") == first | steps

    shell(
        *("fork", *REPO, "imported@1000", "named", "--reset-optimizer", "--reset-scheduler"),
        *("--seed", "7", "--", sys.executable, README),
    )
    words = "fork of imported@1000: a new optimizer, a new scheduler, seed 7"
    assert shell.messages("named") == {"named@1000": words}

    failed = shell("resume", *REPO, "imported", "--", sys.executable, README, code=1)
    assert "imported@1000 does not have what this run goes on with: optimizer, scheduler, rng" in (
        failed.stderr
    )
    assert "`ckptcoord fork imported@1000 NEW_BRANCH --weights-only -- COMMAND`" in failed.stderr


@pytest.mark.slow
def test_a_trainers_script_trains_an_imported_model_on_and_is_killed(shell: Shell) -> None:
    command = (*TORCHRUN, "mine.py")
    fork = ("fork", *REPO, "imported@1000")
    done = shell(*fork, "tune", "--weights-only", "--", *command, code=1, DIE="1")
    assert "tune 0 0" in done.stdout
    first = {"tune@0": "fork of imported@1000: weights only"}
    assert shell.messages("tune") == first

    done = shell("resume", *REPO, "tune", "--", *command)
    assert "tune 0 0" in done.stdout
    assert shell.messages("tune") == first | {"tune@4": "step 4", "tune@6": "step 6"}

    shell("fork", *REPO, "tune@4", "anew", "--reset-optimizer", "--", *command, code=1, DIE="1")
    first = {"anew@4": "fork of tune@4: a new optimizer"}
    assert shell.messages("anew") == first
    done = shell("resume", *REPO, "anew", "--", *command)
    assert "anew 4 0" in done.stdout
    assert shell.messages("anew") == first | {"anew@6": "step 6"}

    resets = ("--reset-optimizer", "--reset-scheduler", "--seed", "7")
    failed = shell(*fork, "more", *resets, "--", *command, code=1)
    assert "imported@1000 does not have what this run goes on with: dataset, progress" in (
        failed.stderr
    )


@pytest.mark.slow
def test_an_average_of_two_branches_is_trained_on(shell: Shell) -> None:
    for name, steps in (("one", "5"), ("two", "6")):
        fork = ("fork", *REPO, "imported@1000", name, "--weights-only")
        shell(*fork, "--", sys.executable, "mine.py", STEPS=steps)
    shell("merge", *REPO, "--average", "one", "two", "--into", "soup")
    for name, script, saves in (("a", README, 11), ("b", "mine.py", 3)):
        shell("fork", *REPO, "soup", name, "--weights-only", "--", *TORCHRUN, script)
        assert shell.messages(name)[f"{name}@0"] == "fork of soup@6: weights only"
        assert len(shell.messages(name)) == saves


# --- several ranks, in ranks that are forked ------------------------------------------------------


def from_weights(folder: str, kind: str) -> Any:
    """A fork that is refused on all ranks alike, and one that takes the model over alone."""
    start_process_group()
    torch.set_num_threads(1)
    loop = Loop(seed=9)
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(loop.model)
    else:
        model = fully_shard(loop.model)
    plain = loop.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def weights() -> list[float]:
        bias: Any = plain.last.bias
        return (bias.full_tensor() if kind == "fsdp" else bias).tolist()

    before, told = weights(), []
    with CheckpointEngine.attach(
        model, optimizer, scheduler, workspace=folder, repo="run"
    ) as engine:
        for asked in ({"reset_optimizer": True}, {"weights_only": c10d.get_rank() == 0}):
            try:
                engine.fork("main@5", "tune", **asked)
            except CkptError as error:
                told.append(type(error).__name__)
        assert weights() == before
        engine.fork("main@5", "tune", weights_only=True, reset_rng_seed=3)
        after = engine.current_step, engine.branch, len(optimizer.state)
        loop.model = model  # type: ignore[assignment]
        loop.optimizer, loop.scheduler = optimizer, scheduler
        found, draws = weights(), torch.rand(2).tolist()
        loop.train(engine, 2)
        engine.commit(2)
    return told, after, found, draws


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_take_the_weights_alone_or_nothing_together(tmp_path: Path, kind: str) -> None:
    wanted = Loop(seed=77)
    with CheckpointCoordinator(
        [StateComponent("model", wanted.model, SharingPattern.GLOBAL)], output_dir=tmp_path / "run"
    ) as coordinator:
        coordinator.save_checkpoint(step=5)
    one, other = run_job(from_weights, str(tmp_path), kind, size=2)
    for told, after, found, _ in (one, other):
        assert told == ["MissingComponentsError", "DisagreementError"]
        assert after == (0, "tune", 0)
        assert found == wanted.model.last.bias.tolist()
    assert one[3] != other[3]  # each rank has a seed of its own
    commits = open_repository(tmp_path / "run").state().commits
    assert {one.ref for one in commits} == {"main@5", "tune@0", "tune@2"}
