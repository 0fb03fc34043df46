from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from ckptcoord.dist.report import SaveReport
from ckptcoord.trainers.arguments import TrainingArguments
from ckptcoord.trainers.callbacks import (
    EVENTS,
    CallbackList,
    FlowCallback,
    LossLogCallback,
    ProgressCallback,
    TrainerCallback,
)
from ckptcoord.trainers.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from pathlib import Path


def flow(event: str, step: int, **settings: Any) -> list[str]:
    """What FlowCallback asks for."""
    state = TrainerState(global_step=step, max_steps=12)
    control = getattr(FlowCallback(), event)(TrainingArguments(**settings), state, TrainerControl())
    return [name.removeprefix("should_") for name in control.__slots__ if getattr(control, name)]


@pytest.mark.parametrize(
    ("step", "settings", "wanted"),
    [
        (1, {}, []),
        (10, {}, ["log"]),
        (4, {"save_steps": 4}, ["save"]),
        (4, {"save_steps": 4, "save_strategy": "epoch"}, []),
        (4, {"logging_steps": 0}, []),
        (4, {"eval_strategy": "steps", "logging_steps": 4}, ["log", "evaluate"]),
        (3, {"eval_strategy": "steps", "eval_steps": 3}, ["evaluate"]),
        (12, {}, ["training_stop", "save"]),
        (12, {"save_strategy": "adaptive"}, ["training_stop", "save"]),
        (12, {"save_strategy": "no"}, ["training_stop"]),
    ],
)
def test_strategies_say_what_a_step_ends_with(
    step: int, settings: dict[str, Any], wanted: list[str]
) -> None:
    assert flow("on_step_end", step, **settings) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, []),
        ({"save_strategy": "epoch"}, ["save"]),
        ({"eval_strategy": "epoch"}, ["evaluate"]),
    ],
)
def test_strategies_say_what_an_epoch_ends_with(
    settings: dict[str, Any], wanted: list[str]
) -> None:
    assert flow("on_epoch_end", 5, **settings) == wanted


def test_a_callback_may_replace_the_control_and_the_next_one_sees_it() -> None:
    seen = []

    class Replacing(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
            return TrainerControl(should_save=True)

    class Looking(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((control.should_save, kwargs["logs"]))

    control = CallbackList([Replacing(), Looking()]).call(
        "on_log", TrainingArguments(), TrainerState(), TrainerControl(), logs={"x": 1}
    )
    assert control.should_save
    assert seen == [(True, {"x": 1})]


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_does_nothing_by_default(event: str) -> None:
    method = getattr(TrainerCallback(), event)
    assert method(TrainingArguments(), TrainerState(), TrainerControl(), other=1) is None


class Log:
    """A loss log as a trainer drives it."""

    def __init__(self, folder: Path) -> None:
        self.args = TrainingArguments(output_dir=folder / "run")
        self.path = folder / "run" / "losses.jsonl"

    def begin(self, step: int, *, first: bool = True) -> None:
        state = TrainerState(global_step=step, is_world_process_zero=first)
        LossLogCallback().on_train_begin(self.args, state, TrainerControl())

    def steps(self, *steps: int, first: bool = True) -> None:
        for step in steps:
            state = TrainerState(global_step=step, is_world_process_zero=first)
            logs = {"loss": 1 / (step + 1), "tokens_per_second": 3.0}
            LossLogCallback().on_log(self.args, state, TrainerControl(), logs=logs)


def test_a_resumed_log_equals_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    straight, killed = Log(tmp_path / "a"), Log(tmp_path / "b")
    straight.begin(0)
    straight.steps(1, 2, 3, 4, 5)
    killed.begin(0)
    killed.steps(1, 2, 3, 4)
    with killed.path.open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    killed.begin(2)
    killed.steps(3, 4, 5)
    assert killed.path.read_bytes() == straight.path.read_bytes()
    assert [path.name for path in killed.path.parent.iterdir()] == ["losses.jsonl"]


def test_losses_are_written_to_the_last_bit_and_speeds_are_not(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps(2)
    (line,) = log.path.read_text().splitlines()
    assert line == '{"step": 2, "loss": 0.3333333333333333}'
    assert json.loads(line)["loss"] == 1 / 3


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin(0)
    assert not log.path.exists()
    log.steps(1)
    log.begin(0)
    assert log.path.read_bytes() == b""


def test_only_rank_0_writes_and_only_losses(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps(1, first=False)
    assert not log.path.exists()
    log.steps(1)
    log.begin(0, first=False)
    LossLogCallback().on_log(log.args, TrainerState(), TrainerControl(), logs={"eval_loss": 1.0})
    assert len(log.path.read_text().splitlines()) == 1


def test_lines_that_are_not_ours_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"step": 1}\n[]\n{"x": 1}\nnull\n{"step": "y"}\n{"step": 2}\n')
    LossLogCallback(path).on_train_begin(
        TrainingArguments(), TrainerState(global_step=9), TrainerControl()
    )
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def report(**given: Any) -> SaveReport:
    known: dict[str, Any] = {
        "checkpoint_id": "checkpoint-5",
        "step": 5,
        "ok": True,
        "background": True,
        "called_at": datetime(2026, 1, 1, tzinfo=UTC),
        "stall_s": 0.012,
        "total_s": 3.21,
        "rank": 0,
    }
    return SaveReport(**{**known, **given})


def drive(console: Console, *, first: bool = True) -> None:
    """A short run, as the trainer announces it."""
    args, control = TrainingArguments(), TrainerControl()
    state = TrainerState(global_step=4, max_steps=6, is_world_process_zero=first)
    callback = ProgressCallback(console)
    callback.on_train_begin(args, state, control)
    state.global_step = 5
    callback.on_step_end(args, state, control)
    logs = {"loss": 0.12345, "tokens_per_second": 12345.6, "eval_loss": float("nan")}
    callback.on_log(args, state, control, logs=logs)
    save = {"checkpoint": "/x/checkpoint-5", "save_seconds": 0.456}
    callback.on_save(args, state, control, committed=True, **save)
    callback.on_save(args, state, control, committed=False, **save)
    for given in ({"ok": True}, {"ok": False, "error": "disk full"}, {"background": False}):
        callback.on_save_report(args, state, control, report=report(**given))
    callback.on_train_end(args, state, control)


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    drive(Console(file=out, highlight=False, soft_wrap=True))
    assert out.getvalue().splitlines() == [
        "resumed at step 4",
        "step 5/6  loss 0.1235  tokens/s 12,346  eval_loss nan",
        "saved checkpoint-5 in 0.46 s",
        "saved checkpoint-5 in 3.21 s, 0.01 s of it waited for",
        "could not save checkpoint-5: disk full",
    ]


def test_a_bar_on_a_terminal_with_the_lines_above_it() -> None:
    out = io.StringIO()
    terminal = {"TERM": "xterm"}
    drive(Console(file=out, force_terminal=True, width=80, highlight=False, _environ=terminal))
    assert "training" in out.getvalue()
    assert "5/6" in out.getvalue()
    assert "loss 0.1235" in out.getvalue()


def test_a_dumb_terminal_gets_plain_lines() -> None:
    out = io.StringIO()
    drive(Console(file=out, force_terminal=True, width=80, _environ={"TERM": "dumb"}))
    assert "training" not in out.getvalue()


def test_other_ranks_say_nothing() -> None:
    out = io.StringIO()
    drive(Console(file=out), first=False)
    assert out.getvalue() == ""
