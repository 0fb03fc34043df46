"""Saves in the background of a training, and the last one before a signal ends it."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from concurrent import futures
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.test_trainer import Clock, run
from tests.unit.trainers.tiny import Noisy, Spy, Struck, arguments, model, remains

import ckptcoord
from ckptcoord import CoordinatorConfig, open_repository
from ckptcoord.errors import CheckpointExistsError, RefNotFoundError
from ckptcoord.repo.inspect import content_digests
from ckptcoord.trainers import base, loop, pacing, saves
from ckptcoord.trainers.pacing import SavePacer, guessed_save_s
from ckptcoord.trainers.saves import RunSaves
from ckptcoord.trainers.single import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE_S = 60.0


class Gate:
    """Background saves wait here, before they write."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def pass_(self, step: str) -> None:
        if step == "write" and threading.current_thread() is not threading.main_thread():
            assert self._open.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.open).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Closed until a test opens it."""
    gate = Gate()
    config = partial(CoordinatorConfig, probe=gate.pass_)
    monkeypatch.setattr(base, "CoordinatorConfig", config)
    yield gate
    gate.open()
    ckptcoord.shutdown()


class Watcher(Spy):
    """Keeps reports, too."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.reports: list[Any] = []

    def on_save_report(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reports.append(kwargs["report"])


class Watched(Trainer):
    """Lets a test wait for the saves."""

    def __init__(self, *given: Any, **more: Any) -> None:
        self.pending: list[Any] = []
        super().__init__(*given, **more)

    def make_coordinator(self, components: Any) -> Any:
        coordinator = super().make_coordinator(components)
        begin = coordinator.save_checkpoint_async

        def begin_and_keep(**given: Any) -> Any:
            self.pending.append(begin(**given))
            return self.pending[-1]

        coordinator.save_checkpoint_async = begin_and_keep  # type: ignore[method-assign]
        return coordinator

    def settle(self) -> None:
        """Wait until all saves have ended, well or badly."""
        futures.wait([one.committed for one in self.pending], PATIENCE_S)


def watched(folder: Path, spy: Spy, **settings: Any) -> Watched:
    return Watched(model(), arguments(folder, **settings), Noisy(13), callbacks=[spy])


def steps(folder: Path) -> list[int]:
    return sorted(one.step for one in open_repository(folder).state().commits)


def contents(folder: Path) -> dict[int, dict[str, str]]:
    repository = open_repository(folder)
    commits = repository.state().commits.values()
    return {one.checkpoint_id.step: content_digests(repository, one) for one in commits}


def to_self(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# --- training goes on -----------------------------------------------------------------------------


def test_training_goes_on_meanwhile_and_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, gate: Gate
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    _, waiting = run(tmp_path / "a", background_saves=False, **settings)
    during: list[list[int]] = []

    def look_and_open() -> None:
        during.append(steps(tmp_path / "b"))
        gate.open()

    spy = Watcher(at={5: look_and_open})
    trainer, _ = run(tmp_path / "b", spy=spy, **settings)
    assert during == [[]]
    assert spy.saved == waiting.saved == [f"checkpoint-{n}" for n in (2, 4, 6, 8, 9)]
    assert spy.events.index("save 4") < spy.events.index("step 5")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert [(one.step, one.ok, one.background) for one in spy.reports] == [
        (step, True, True) for step in (2, 4, 6, 8, 9)
    ]
    assert trainer.take_reports() == []


def test_all_saves_have_ended_when_training_ends(tmp_path: Path, gate: Gate) -> None:
    class Last(Watcher):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert [one.step for one in self.reports] == [9]
            assert steps(tmp_path) == [9]

    gate.open_after(0.1)
    run(tmp_path, spy=Last(), save_strategy="steps")


def test_a_report_changes_nothing(tmp_path: Path) -> None:
    class Meddler(Watcher):
        def on_save_report(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_save_report(args, state, control, **kwargs)
            control.should_training_stop = True
            torch.rand(1)
            random.random()

    straight, heard = run(tmp_path / "a")
    wanted = remains(straight)
    spy = Meddler()
    meddled, _ = run(tmp_path / "b", spy=spy, save_strategy="steps", save_steps=1)
    assert len(spy.reports) == 9
    assert spy.losses == heard.losses
    assert remains(meddled) == wanted


def test_the_settings_reach_the_coordinator_and_are_no_part_of_the_hash(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "save_queue_depth": 3,
        "save_deferred": "false",
        "save_staging_bytes": "1GiB",
        "save_io_budget": "20MB",
        "on_save_failure": "retry",
    }
    configs = []
    for settings in ({}, given):
        with Trainer(model(), arguments(tmp_path, **settings), Noisy(4)).coordinator as one:
            configs.append(one._config)
    default, config = configs
    assert (config.queue_depth, config.deferred, config.staging_bytes) == (3, False, 1 << 30)
    assert (config.io_budget, config.on_failure) == (20_000_000, "retry")
    assert (default.queue_depth, default.deferred, default.on_failure) == (2, "auto", "raise")
    assert config.training_args_hash == default.training_args_hash


# --- failures -------------------------------------------------------------------------------------


def test_a_failure_ends_the_training_at_a_step_boundary(tmp_path: Path) -> None:
    run(tmp_path, spy=Spy(stop_at=4))
    spy = Watcher()
    trainer = watched(tmp_path, spy, save_strategy="steps", save_steps=4)
    spy.at[5] = trainer.settle
    with pytest.raises(CheckpointExistsError):
        trainer.train()
    assert spy.events[-1] == "step 5"
    assert [one.ok for one in spy.reports] == [False]
    trainer.close()


def test_a_failure_that_is_only_warned_of_leaves_what_was_best_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, spy=Spy(stop_at=4))
    spy = Watcher()
    values = iter([3.0, 2.0, 2.5, 2.25])

    class Scripted(Watched):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            return {"eval_loss": next(values)}

    args = arguments(
        tmp_path,
        on_save_failure="warn",
        save_strategy="steps",
        save_steps=2,
        max_steps=8,
        metric_for_best_model="eval_loss",
    )
    trainer = Scripted(model(), args, Noisy(20), Noisy(2), callbacks=[spy])
    spy.at[5] = trainer.settle
    output = trainer.train()
    trainer.close()
    assert [(one.step, one.ok) for one in spy.reports] == [
        (2, True), (4, False), (6, True), (8, True)
    ]  # fmt: skip
    # Step 4 was the best, and is not there; of what is, 8 is.
    assert output.best_model_checkpoint == "main@8"
    assert trainer.state.best_metric == 2.25
    assert str(open_repository(tmp_path).resolve("best").checkpoint_id) == "checkpoint-8"


# --- the best -------------------------------------------------------------------------------------


def test_the_tag_comes_with_a_step_after_the_commit_and_holds_nobody_up(
    tmp_path: Path, gate: Gate
) -> None:
    tagged: list[str] = []

    def look() -> None:
        try:
            tagged.append(str(open_repository(tmp_path).resolve("best").checkpoint_id))
        except RefNotFoundError:
            tagged.append("")

    def open_and_settle() -> None:
        look()
        gate.open()
        trainer.settle()

    spy = Spy(save_at=(2,), at={5: open_and_settle, 6: look})
    trainer = watched(tmp_path, spy, metric_for_best_model="loss")
    trainer.train()
    trainer.close()
    assert tagged == ["", "checkpoint-2"]


def test_retention_never_takes_the_best(tmp_path: Path) -> None:
    settings = {"save_total_limit": 1, "metric_for_best_model": "eval_loss"}
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])

    class Scripted(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            return {"eval_loss": next(values)}

    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=5, **settings)
    trainer = Scripted(model(), args, Noisy(20), Noisy(2))
    trainer.train()
    trainer.close()
    assert steps(tmp_path) == [2, 5]
    assert str(open_repository(tmp_path).resolve("best").checkpoint_id) == "checkpoint-2"


# --- how long a save takes ------------------------------------------------------------------------


def test_the_time_of_a_save_does_not_hold_that_of_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(saves, "time", clock)
    trainer = Trainer(model(), arguments(tmp_path), Noisy(4))
    pending: list[futures.Future[str]] = []

    def begin(**given: Any) -> Any:
        pending.append(futures.Future())
        return SimpleNamespace(committed=pending[-1])

    repository = SimpleNamespace(url=str(tmp_path))
    trainer._coordinator = SimpleNamespace(  # type: ignore[assignment]
        save_checkpoint_async=begin, repository=repository, close=lambda: None
    )
    held = RunSaves(trainer, SavePacer(0.02, 0), state_bytes=0)
    guess_s = guessed_save_s(0)
    assert (held.save_s, held.drain_s, held.unfinished) == (guess_s, 0.0, False)
    for step in (1, 2, 3):
        trainer.state.global_step = step
        held.save(metrics={}, message="", background=True)
        clock.pass_(1.0)
    assert guess_s < 3.0
    assert (held.save_s, held.drain_s) == (3.0, 6.0)  # the first should have ended by now
    clock.pass_(1.0)
    pending[0].set_result("")
    held.look()
    assert (held.save_s, held.drain_s, held.committed_step) == (4.0, 8.0, 1)
    clock.pass_(1.0)
    assert held.drain_s == 7.0
    clock.pass_(4.0)
    assert (held.save_s, held.drain_s) == (5.0, 5.0)
    pending[1].set_result("")
    held.look()
    assert (held.save_s, held.drain_s, held.committed_step) == (5.0, 5.0, 2)
    assert not held.failed
    pending[2].set_exception(ValueError())
    held.look()
    assert (held.save_s, held.drain_s, held.committed_step, held.failed) == (5.0, 0.0, 2, True)
    trainer.close()


# --- a signal -------------------------------------------------------------------------------------


def test_a_last_save_comes_after_those_under_way(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    straight, _ = run(tmp_path / "straight")
    wanted = remains(straight)

    def strike() -> None:
        gate.open_after(0.1)
        to_self(signal.SIGUSR1)()

    spy = Spy(at={5: strike}, save_at=(4,))
    trainer = watched(tmp_path / "run", spy, save_strategy="steps")
    output = trainer.train()
    trainer.close()
    assert (output.exit_code, output.stopped_by_signal) == (75, signal.SIGUSR1)
    assert steps(tmp_path / "run") == [4, 5]
    assert warnings_in(caplog) == []  # nothing that it is not saved
    assert remains(run(tmp_path / "run", resume_from_checkpoint=True)[0]) == wanted


def test_where_no_save_fits_those_under_way_are_waited_for_and_the_last_commit_stands(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pacing, "_GUESSED_LATENCY_S", 1000.0)

    def strike() -> None:
        gate.open_after(0.1)
        to_self(signal.SIGTERM)()

    spy = Spy(at={5: strike}, save_at=(4,))
    trainer = watched(tmp_path, spy, save_strategy="steps", preemption_grace_s=PATIENCE_S)
    output = trainer.train()
    assert (output.exit_code, output.global_step) == (75, 5)
    assert steps(tmp_path) == [4]
    trainer.close()
    (said,) = warnings_in(caplog)
    assert said.startswith("step 5 is not saved: SIGTERM came 0.")
    assert "of the 60 s of grace were left, and a save takes about 1000.0 s, behind" in said
    assert said.endswith("; main@4 stands")


def test_saves_under_way_are_waited_for_no_longer_than_the_grace_lasts(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy(at={5: to_self(signal.SIGTERM)}, save_at=(4,))
    trainer = watched(tmp_path, spy, save_strategy="steps", preemption_grace_s=0.05)
    assert trainer.train().exit_code == 75  # the gate is closed
    assert steps(tmp_path) == []
    (said,) = warnings_in(caplog)
    assert "there is no checkpoint; saves under way are committed only if there is time" in said
    gate.open()
    trainer.close()
    assert steps(tmp_path) == [4]


@pytest.mark.parametrize(("grace_s", "saved"), [(PATIENCE_S, [2]), (0.0, [])])
@pytest.mark.parametrize("why", ["it is due", "the best is sought"])
def test_a_signal_within_an_evaluation_ends_it_and_there_is_a_last_save_if_there_is_time(
    tmp_path: Path, grace_s: float, saved: list[int], why: str
) -> None:
    held_out, spy = Struck(9), Spy(save_at=(2,) if why != "it is due" else ())
    due = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "adaptive"}
    sought = {"metric_for_best_model": "eval_loss", "save_strategy": "steps", "save_steps": 9}
    settings = due if why == "it is due" else sought
    args = arguments(tmp_path, preemption_grace_s=grace_s, per_device_eval_batch_size=1, **settings)
    trainer = Trainer(model(), args, Noisy(13), held_out, callbacks=[spy])
    output = trainer.train()
    trainer.close()
    assert (output.exit_code, output.global_step, held_out.reads) == (75, 2, 2)
    assert not any(event.startswith("evaluate") for event in spy.events)
    assert (steps(tmp_path) if saved else spy.saved) == saved
    assert trainer.evaluate(Noisy(4)).keys() == {"eval_loss"}  # the run has ended


def test_what_is_saved_already_is_not_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The signal comes with the last step's own save."""
    spy = Spy(at={9: to_self(signal.SIGTERM)})
    trainer, _ = run(tmp_path, spy=spy, save_strategy="steps")
    assert (spy.saved, trainer.stopped_by_signal) == (["checkpoint-9"], signal.SIGTERM)
    assert warnings_in(caplog) == []


def test_without_checkpoints_a_signal_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, spy=Spy(at={2: to_self(signal.SIGTERM)}), preemption_grace_s=0)
    assert warnings_in(caplog) == []


def test_exit_code_is_that_of_sysexits() -> None:
    assert loop.STOPPED_EXIT_CODE == 75


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
