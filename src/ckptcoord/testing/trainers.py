"""The laws of resuming that every trainer must keep, as a pytest base class over real jobs."""

# ruff: noqa: D102 (the names of the tests are the sentences)

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import pytest

from ckptcoord.errors import RepositoryNotFoundError
from ckptcoord.repo.inspect import content_digests
from ckptcoord.repo.repository import open_repository
from ckptcoord.trainers.loop import STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

POLL_S = 0.002
KILL_ATTEMPTS = 5
SLOW_SAVE_S = 1.0  # what the saves take of a job that is to be hit in one
BRANCH = "again"


class TrainerSuite:
    """Derive a class whose name begins with Test, and say how a job is started.

    Either by `factory`, or by `script`; or override `command`. A job must train to the same bits
    when it is run twice. It is started with options of `TrainingArguments`, and must leave
    `losses.jsonl` in its output directory (`LossLogCallback`) and exit with the run's `exit_code`;
    with a factory that is so already. Jobs are found and killed by way of /proc: Linux only.

    Attributes:
        factory: `module:function`; takes the `TrainingArguments` and returns the trainer. The
            module is imported from where pytest runs.
        script: a program to run; its path, from where pytest runs.
        nproc: ranks, started with torchrun; 1: without it.
        steps: of a run.
        save_steps: between saves.
        epochs: of the run that is resumed at the end of an epoch. Have them short.
        options: more options of every job, by name.
        timeout_s: for any one job.
    """

    factory: ClassVar[str] = ""
    script: ClassVar[str] = ""
    nproc: ClassVar[int] = 1
    steps: ClassVar[int] = 24
    save_steps: ClassVar[int] = 3
    epochs: ClassVar[int] = 2
    options: ClassVar[Mapping[str, object]] = {}
    timeout_s: ClassVar[float] = 300.0

    # --- the laws --------------------------------------------------------------------------------

    def test_a_run_killed_in_a_save_resumes_as_if_undisturbed(
        self, tmp_path: Path, undisturbed: Path
    ) -> None:
        folder = tmp_path / "job"
        self.kill_in_a_save(folder, undisturbed)
        before = newest(folder)
        assert 0 < before < self.steps
        self.succeed(folder, resume_from_checkpoint="true")
        assert_same_run(folder, undisturbed, f"main@{self.steps}")

    def test_a_run_ended_by_sigterm_resumes_as_if_undisturbed(
        self, tmp_path: Path, undisturbed: Path
    ) -> None:
        folder = tmp_path / "job"
        with self.start(folder, **self.slow_saves(undisturbed)) as job:
            job.await_commit(folder, self.timeout_s)
            job.terminate()
            code = job.finish(self.timeout_s)
        # torchrun says 1, whatever its workers said.
        assert code == (STOPPED_EXIT_CODE if self.nproc == 1 else 1), job.output()
        stopped_at = newest(folder)
        assert self.save_steps <= stopped_at < self.steps
        losses = (folder / "losses.jsonl").read_bytes().splitlines()
        assert len(losses) == stopped_at, "the last save is not of the last step"
        self.succeed(folder, resume_from_checkpoint="true")
        assert_same_run(folder, undisturbed, f"main@{self.steps}")

    def test_a_run_resumed_at_the_end_of_an_epoch_goes_on_as_if_undisturbed(
        self, tmp_path: Path
    ) -> None:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        by_epochs = {"max_steps": -1, "num_train_epochs": self.epochs, "save_strategy": "epoch"}
        self.succeed(whole, **by_epochs)
        ends = steps(whole)
        assert len(ends) == self.epochs, f"saved at steps {ends}"
        shutil.copytree(whole, resumed)
        here = {"branch": BRANCH, "resume_from_checkpoint": f"main@{ends[0]}"}
        self.succeed(resumed, **by_epochs, **here)
        assert_same_run(resumed, whole, f"{BRANCH}@{ends[-1]}", f"main@{ends[-1]}")

    def test_saves_in_the_background_hold_what_saves_that_are_waited_for_hold(
        self, tmp_path: Path, undisturbed: Path
    ) -> None:
        self.succeed(tmp_path / "job", background_saves="false")
        assert steps(tmp_path / "job") == steps(undisturbed)
        for step in steps(undisturbed):
            assert_same_run(tmp_path / "job", undisturbed, f"main@{step}")

    # --- how jobs are started --------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def undisturbed(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The output directory of a run that nobody disturbed, with saves in the background."""
        folder = tmp_path_factory.mktemp("undisturbed") / "job"
        cls.succeed(folder)
        return folder

    @classmethod
    def command(cls, options: Sequence[str]) -> list[str]:
        """What starts a job with these options of TrainingArguments."""
        runner = [sys.executable]
        if cls.nproc > 1:
            runner += ["-m", "torch.distributed.run", "--standalone"]
            runner += [f"--nproc_per_node={cls.nproc}"]
        if cls.script:
            return [*runner, cls.script, *options]
        assert cls.factory, f"{cls.__name__} says neither factory nor script"
        return [*runner, "-m", "ckptcoord.testing.trainee", cls.factory, *options]

    @classmethod
    def start(cls, folder: Path, **options: object) -> Job:
        """A job that writes to this folder, and whose output goes beside it."""
        every = {
            "output_dir": folder,
            "max_steps": cls.steps,
            "save_strategy": "steps",
            "save_steps": cls.save_steps,
            "logging_steps": 1,
            **cls.options,
            **options,
        }
        texts = [f"--{name.replace('_', '-')}={value}" for name, value in every.items()]
        return Job(cls.command(texts), folder.with_name(f"{folder.name}.log"))

    @classmethod
    def succeed(cls, folder: Path, **options: object) -> None:
        """Run a job to its end, which must be a success."""
        with cls.start(folder, **options) as job:
            code = job.finish(cls.timeout_s)
        assert code == 0, f"a job exited with {code}:\n{job.output()}"

    @classmethod
    def slow_saves(cls, undisturbed: Path) -> dict[str, object]:
        """Options by which each save takes about so long that a signal can hit it."""
        checkpoint = undisturbed / f"checkpoint-{cls.steps}"
        stored = sum(path.stat().st_size for path in checkpoint.iterdir())
        return {"save_io_budget": max(1, int(stored / cls.nproc / SLOW_SAVE_S))}

    def kill_in_a_save(self, folder: Path, undisturbed: Path) -> None:
        """Start a job and SIGKILL all of it while files of its second save are being written."""
        for _ in range(KILL_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            with self.start(folder, **self.slow_saves(undisturbed)) as job:
                job.await_commit(folder, self.timeout_s)
                job.wait_until(lambda: in_a_save(folder), self.timeout_s)
                job.kill()
            if in_a_save(folder):  # it had not ended meanwhile
                return
        pytest.fail(f"no save could be cut short in {KILL_ATTEMPTS} runs")


class Job:
    """All processes of one job; a context manager that leaves none of them.

    torchrun gives each worker a session of its own, so that no process group holds them all: they
    are found by a mark in their environment.

    Args:
        command: to run.
        log: for what they print.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        name, value = "CKPTCOORD_TEST_JOB", secrets.token_hex(16)
        self._mark = f"{name}={value}".encode()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                # Thread counts change the order of sums.
                env={**os.environ, "OMP_NUM_THREADS": "1", name: value},  # noqa: TID251 (a launcher)
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def finish(self, timeout_s: float) -> int:
        """Wait for its end; the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"a job did not end in {timeout_s:g} s:\n{self.output()}")

    def terminate(self) -> None:
        """SIGTERM, as a scheduler sends it: to the process that was started."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL every process, all stopped first, so that none starts another."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            seen: set[int] = set()
            while fresh := self._members() - seen:
                for pid in fresh:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                seen |= fresh
        self._process.wait()

    def await_commit(self, folder: Path, timeout_s: float) -> None:
        """Wait for its first checkpoint."""
        self.wait_until(lambda: newest(folder) > 0, timeout_s)

    def wait_until(self, true: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something is so; the job must not end before."""
        until_s = time.monotonic() + timeout_s
        while not true():
            ended = self._process.poll()
            assert ended is None, f"the job ended too early, with {ended}:\n{self.output()}"
            assert time.monotonic() < until_s, f"nothing in {timeout_s:g} s:\n{self.output()}"
            time.sleep(POLL_S)

    def output(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-4000:]

    def _members(self) -> set[int]:
        found = set()
        for folder in Path("/proc").iterdir():
            # A process may end meanwhile; a zombie's environment is empty.
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self._mark in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
        return found


def steps(folder: Path, branch: str = "main") -> list[int]:
    """Of all checkpoints on a branch, ascending."""
    try:
        commits = open_repository(folder).state().commits
    except RepositoryNotFoundError:
        return []
    return sorted(one.step for one in commits if str(one.branch) == branch)


def newest(folder: Path) -> int:
    """The newest checkpoint's step; 0: there is none."""
    return max(steps(folder), default=0)


def in_a_save(folder: Path) -> bool:
    """Whether files of a save that is not committed are there."""
    return any(path.is_file() for path in (folder / ".ckptcoord" / "staging").glob("*/*"))


def assert_same_run(ours: Path, theirs: Path, ref: str, their_ref: str | None = None) -> None:
    """Two runs have the same state at a checkpoint, and the same losses up to their ends."""
    found, wanted = (
        content_digests(repository, repository.resolve(at))
        for repository, at in (
            (open_repository(ours), ref),
            (open_repository(theirs), their_ref or ref),
        )
    )
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    assert not differing, f"{len(differing)} of {len(wanted)} differ at {ref}: {differing[:10]}"
    losses = [(folder / "losses.jsonl").read_text().splitlines() for folder in (ours, theirs)]
    assert losses[0] == losses[1], f"the losses of {ours} are not those of {theirs}"
    assert losses[0], "no loss was logged"
