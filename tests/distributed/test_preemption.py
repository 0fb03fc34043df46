"""Real torchrun jobs that a signal ends: what is saved, what they exit with, how they go on.

`python -m tests.distributed.test_preemption FOLDER SETTINGS` is what torchrun runs on every rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.launch import Torchrun
from tests.unit.trainers.job import Wide
from tests.unit.trainers.tiny import Noisy, arguments

from ckptcoord import (
    CoordinatorConfig,
    DDPTrainer,
    TrainerCallback,
    open_repository,
    shutdown,
)
from ckptcoord.errors import RepositoryNotFoundError
from ckptcoord.repo.inspect import content_digests
from ckptcoord.trainers import base
from ckptcoord.trainers.callbacks import LossLogCallback

pytestmark = [pytest.mark.dist, pytest.mark.alone]
RANKS, STEPS, SAVE_STEPS = 2, 40, 4
PROGRAM = "tests.distributed.test_preemption"
TIMEOUT_S = 120.0
AFTER_SIGNAL_S = 0.1  # a step takes so long once the signal is on its way
EXIT_CODE, AGENT_EXIT_CODE = 75, 1  # torchrun itself says 1, whatever its workers said


# --- on every rank --------------------------------------------------------------------------------


class Hold(TrainerCallback):
    """At one step, says so in a file and waits for the file `sent`; slow steps after that."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            rank = os.environ["RANK"]  # noqa: TID251 (torchrun's)
            put(self.folder / f"at-{rank}", {"rank": os.getpid(), "agent": os.getppid()})
            until_exists(self.folder / "sent")
        if state.global_step > self.step:
            time.sleep(AFTER_SIGNAL_S)


def train(folder: Path, settings: dict[str, Any]) -> int:
    """One run in `folder/run`; says what it exits with in a file, too."""
    hold_at, slow_s = settings.pop("hold_at"), settings.pop("slow_s")
    if slow_s:

        def slow(step: str) -> None:
            time.sleep(slow_s if step == "write" else 0)

        base.CoordinatorConfig = partial(CoordinatorConfig, probe=slow)  # type: ignore[misc,assignment]
    torch.manual_seed(5)
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS}
    args = arguments(folder / "run", learning_rate=0.003, **{**defaults, **settings})
    callbacks = [LossLogCallback(), *([Hold(folder, hold_at)] if hold_at else [])]
    trainer = DDPTrainer(Wide(), args, Noisy(100), callbacks=callbacks)
    output = trainer.train()
    answer = {
        "exit_code": output.exit_code,
        "step": output.global_step,
        "signal": output.stopped_by_signal,
    }
    put(folder / f"end-{trainer.ranks.rank}", answer)
    shutdown(trainer)
    return output.exit_code


def put(path: Path, value: Any) -> None:
    """A file that is seen whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value))
    draft.replace(path)


def until_exists(path: Path) -> None:
    """Wait for a file."""
    until_s = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > until_s:
            raise TimeoutError(path)
        time.sleep(0.005)


# --- the tests ------------------------------------------------------------------------------------


def start(folder: Path, *, hold_at: int = 0, slow_s: float = 0.0, **settings: Any) -> Torchrun:
    """A job in this folder; where it holds for a signal, its agent is its ranks' parent."""
    folder.mkdir(exist_ok=True)
    said = json.dumps({"hold_at": hold_at, "slow_s": slow_s, **settings})
    arguments = ["--standalone", f"--nproc_per_node={RANKS}", "-m", PROGRAM]
    return Torchrun([*arguments, str(folder), said], folder / "log", warm=not hold_at)


def newest(folder: Path) -> int:
    """The newest committed step of a job; 0: none."""
    try:
        commits = open_repository(folder / "run").state().commits
    except RepositoryNotFoundError:
        return 0
    return max((one.step for one in commits), default=0)


def strike(folder: Path, whom: str, rank: int, *, committed: int) -> None:
    """SIGTERM, to a rank or to its agent, while all ranks hold and so much is committed."""
    for one in range(RANKS):
        until_exists(folder / f"at-{one}")
    until_s = time.monotonic() + TIMEOUT_S
    while newest(folder) < committed:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    target = json.loads((folder / f"at-{rank}").read_text())[whom]
    os.kill(target, signal.SIGTERM)
    put(folder / "sent", None)


def ends(folder: Path) -> list[dict[str, int]]:
    """What the ranks said at their ends."""
    return [json.loads((folder / f"end-{rank}").read_text()) for rank in range(RANKS)]


def assert_resumes_as_if_undisturbed(folder: Path, straight: Path) -> None:
    """Go on to the end, and compare the last checkpoint and every loss."""
    with start(folder, resume_from_checkpoint=True) as job:
        job.succeed(TIMEOUT_S)
    assert [end["exit_code"] for end in ends(folder)] == [0] * RANKS
    found, wanted = (
        content_digests(repo, repo.resolve(f"main@{STEPS}"))
        for repo in (open_repository(folder / "run"), open_repository(straight / "run"))
    )
    assert found == wanted
    losses = [(one / "run" / "losses.jsonl").read_bytes() for one in (folder, straight)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    with start(folder) as job:
        job.succeed(TIMEOUT_S)
    assert [end["exit_code"] for end in ends(folder)] == [0] * RANKS
    return folder


@pytest.mark.parametrize(("whom", "rank"), [("rank", 1), ("agent", 0)])
def test_a_sigterm_ends_all_ranks_in_one_save_with_exit_code_75(
    tmp_path: Path, straight: Path, whom: str, rank: int
) -> None:
    folder = tmp_path / "job"
    with start(folder, hold_at=6) as job:
        strike(folder, whom, rank, committed=0)
        assert job.finish(TIMEOUT_S) == AGENT_EXIT_CODE, job.log.read_text()
    said = ends(folder)
    assert said[0] == said[1]
    assert (said[0]["exit_code"], said[0]["signal"]) == (EXIT_CODE, signal.SIGTERM)
    assert 6 <= said[0]["step"] < STEPS
    assert newest(folder) == said[0]["step"]
    assert_resumes_as_if_undisturbed(folder, straight)


def test_where_a_save_does_not_fit_the_grace_the_last_commit_stands(
    tmp_path: Path, straight: Path
) -> None:
    folder = tmp_path / "job"
    with start(folder, hold_at=10, slow_s=1.5, preemption_grace_s=1.0) as job:
        strike(folder, "rank", 1, committed=8)  # by now the ranks know how slow a save is
        assert job.finish(TIMEOUT_S) == AGENT_EXIT_CODE, job.log.read_text()
    said = ends(folder)
    assert said[0] == said[1] == {"exit_code": EXIT_CODE, "step": 10, "signal": signal.SIGTERM}
    assert newest(folder) == 8
    log = job.log.read_text()
    assert log.count("step 10 is not saved: SIGTERM came") == 1
    assert "of the 1 s of grace were left, and a save takes about 1." in log
    assert "main@8 stands" in log
    assert_resumes_as_if_undisturbed(folder, straight)


if __name__ == "__main__":
    sys.exit(train(Path(sys.argv[1]), json.loads(sys.argv[2])))
