"""Engines in real processes: killed with SIGKILL, resumed, and the same to the last bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from tests.distributed.program import digest
from tests.unit.engine.loop import Loop
from tests.unit.trainers.job import run_job
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckptcoord import CheckpointEngine, open_repository
from ckptcoord.dist.parallel import start_process_group
from ckptcoord.errors import CkptError

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "engine"
TIMEOUT_S = 120.0


class Script:
    """A script as a user starts it, in a folder, in a session of its own.

    Args:
        folder: where.
        ranks: 0: without torchrun.
        command: the script and its arguments.
    """

    def __init__(self, folder: Path, ranks: int, *command: str) -> None:
        self.logs, self.ranks = folder / "logs", ranks
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        if ranks:  # unbuffered ranks mix up their lines, but for files of their own
            launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
            command = (*launcher, "--redirects=1", f"--log-dir={self.logs}", *command)
        with (self.logs / "stdout.log").open("w") as out, (self.logs / "stderr").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # noqa: TID251 (the child's)
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def losses(self) -> list[dict[int, str]]:
        """What each rank has printed of each step."""
        pattern = f"**/attempt_0/*/{OUT}" if self.ranks else OUT
        texts = [path.read_text() for path in sorted(self.logs.glob(pattern))]
        lines = [text[: text.rfind("\n") + 1].splitlines() for text in texts]
        return [dict(_parsed(line) for line in one) for one in lines]

    def finish(self) -> list[dict[int, str]]:
        """Let it end, without a word on stderr that a user would have to think about."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        errors = (self.logs / "stderr").read_text()
        assert not code, errors
        assert not re.search("Traceback|Warning|Error", errors), errors
        return self.losses()

    def kill_at(self, step: int) -> None:
        """SIGKILL to all its processes, once each rank has printed a step."""
        until_s = time.monotonic() + TIMEOUT_S
        while not (found := self.losses()) or any(step not in one for one in found):
            assert self.process.poll() is None, (self.logs / "stderr").read_text()
            assert time.monotonic() < until_s
            time.sleep(0.005)
        self.kill()

    def kill(self) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)


OUT = "stdout.log"


def _parsed(line: str) -> tuple[int, str]:
    step, loss = line.split()
    return int(step), loss


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in children for one in (int(child), *descendants(int(child)))]


DDP = (str(EXAMPLES / "ddp.py"), "--repo", "first", "--steps", "30", "--every", "5")


@pytest.mark.parametrize(
    ("ranks", "command", "at"),
    [
        (0, (str(EXAMPLES / "train.py"),), 117),
        (2, (str(EXAMPLES / "train.py"),), 117),
        pytest.param(2, DDP, 17, marks=pytest.mark.slow),
    ],
    ids=["the README's", "the README's under torchrun", "DDP"],
)
def test_a_killed_script_goes_on_to_the_last_bit(
    tmp_path: Path, ranks: int, command: tuple[str, ...], at: int
) -> None:
    straight = Script(tmp_path / "a", ranks, *command).finish()
    Script(tmp_path / "b", ranks, *command).kill_at(at)
    commits = open_repository(tmp_path / "b" / "ml-experiments" / "first").state().commits
    saved = max(one.step for one in commits)
    resumed = Script(tmp_path / "b", ranks, *command).finish()
    assert len(resumed) == len(straight) == max(ranks, 1)
    for again, undisturbed in zip(resumed, straight, strict=True):
        assert list(again) == list(range(saved + 1, max(undisturbed) + 1))
        assert again.items() <= undisturbed.items()


# --- what ranks do, in ranks that are forked ------------------------------------------------------


SIZE = {"width": 64, "layers": 3}


def parallel(folder: str, kind: str, seed: int, until: int, fork: str = "") -> Any:
    """Some training as DDP or FSDP have it; what is left on each rank."""
    start_process_group()
    torch.set_num_threads(1)
    loop = Loop(seed=seed, **SIZE)
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(loop.model)
    else:
        for layer in loop.model.layers:
            fully_shard(layer)
        model = fully_shard(loop.model)
    torch.manual_seed(seed + c10d.get_rank())
    loop.optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    loop.scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.9)
    plain, loop.model = loop.model, model
    with CheckpointEngine.attach(
        model, loop.optimizer, loop.scheduler, workspace=folder, repo="run"
    ) as engine:
        engine.autocommit(every=2)
        if fork:
            engine.fork("main@4", fork, reset_optimizer=True, reset_rng_seed=5)
            assert not loop.optimizer.state
        else:
            engine.resume_latest()
        loop.train(engine, until)
        branch = engine.branch
    left = [digest(plain.state_dict()), digest(loop.optimizer.state_dict())]
    draws = torch.rand(2).tolist()
    del model, plain
    loop.model = None  # type: ignore[assignment]
    return loop.losses, left, draws, branch


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_resume_and_fork_together(tmp_path: Path, kind: str) -> None:
    """Four of them, with batch norm that each has seen other data with, and other draws."""
    straight = run_job(parallel, str(tmp_path / "a"), kind=kind, seed=3, until=6)
    run_job(parallel, str(tmp_path / "b"), kind=kind, seed=3, until=5)
    resumed = run_job(parallel, str(tmp_path / "b"), kind=kind, seed=80, until=6)
    for (losses_a, *left_a), (losses_b, *left_b) in zip(straight, resumed, strict=True):
        assert losses_b == {step: losses_a[step] for step in (5, 6)}
        assert left_b == left_a
    forked = run_job(parallel, str(tmp_path / "b"), kind=kind, seed=81, until=6, fork="exp")
    assert {one[3] for one in forked} == {"exp"}
    assert len({tuple(one[2]) for one in forked}) == 4  # each rank has a seed of its own
    assert forked[0][0] != resumed[0][0]
    repository = open_repository(tmp_path / "b" / "run")
    assert {one.ref for one in repository.state().commits} == {
        *("main@2", "main@4", "main@6"),
        *("exp@4", "exp@6"),
    }
    manifest = repository.manifest(repository.resolve("main@6"))
    patterns = {key: str(one.sharing_pattern) for key, one in manifest.components.items()}
    shared = "replicated" if kind == "ddp" else "per_group"
    assert patterns == {
        "model": shared,
        "optimizer": shared,
        "scheduler": "replicated",
        "rng": "per_rank",
    }
    if kind == "ddp":  # what DDP saved, the bare model loads
        alone = Loop(seed=82, **SIZE)
        with alone.attach(tmp_path / "b") as engine:
            assert engine.resume("main").step == 6
        assert digest(alone.model.state_dict()) == resumed[0][1][0]


def disagree(folder: str) -> Any:
    """What each rank is told when they do not ask for the same, or one of them cannot."""
    start_process_group()
    rank = c10d.get_rank()
    loop, told = Loop(), []

    def attempt(work: Any) -> None:
        try:
            work()
            told.append("nothing")
        except CkptError as error:
            told.append(f"{type(error).__name__}: {error}")

    attempt(lambda: loop.attach(f"{folder}/{rank % 2}"))
    other = Loop()
    broken = loop.optimizer if rank == 1 else other.optimizer
    attempt(lambda: CheckpointEngine.attach(other.model, broken, workspace=folder, repo="run"))
    with loop.attach(folder) as engine:
        engine.commit(1)
        attempt(lambda: engine.fork("main@1", f"of-{rank}"))
        attempt(lambda: engine.fork("main@1", "../x" if rank == 2 else "x"))
        attempt(lambda: engine.resume("main@1" if rank else "latest"))
        attempt(lambda: engine.fork("main@1", "main"))
        bias = loop.model.last.bias.detach().clone()
        loop.model.last.bias.data += int(rank == 3)  # a rank that went another way
        engine.commit(2)
        attempt(engine.wait)
        loop.model.last.bias.data.copy_(bias)
        engine.commit(3)
        attempt(engine.wait)
    return told


def test_ranks_that_disagree_are_told_so_all_of_them(tmp_path: Path) -> None:
    told = run_job(disagree, str(tmp_path))
    assert told[0] == told[3]
    places, broken, branch, name, ref, exists, diverged, fine = told[0]
    for error in (places, branch, ref):
        assert error.startswith("DisagreementError"), error
    assert "SetupAbortedError" in broken
    assert "rank 1" in broken
    assert "rank 2" in name
    assert exists.startswith("BranchExistsError")
    assert "'last.bias' on ranks 3" in diverged
    assert fine == "nothing"
    repository = open_repository(tmp_path / "run")
    assert [one.ref for one in repository.state().commits] == ["main@1", "main@3"]
    assert not repository.state().forks
