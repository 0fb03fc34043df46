"""Callbacks, with Hugging Face's names: what watches a run and what steers it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ckptcoord.trainers.arguments import (
    EvalStrategy,
    SaveStrategy,
    TrainingArguments,
)
from ckptcoord.trainers.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptcoord.dist.report import SaveReport

__all__ = [
    "CallbackList",
    "FlowCallback",
    "LossLogCallback",
    "ProgressCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
]

# What an event carries besides is its own affair; see TrainerCallback.
Extra: TypeAlias = Any

# Every event that a trainer announces, in the order of a run.
EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_save_report",
    "on_epoch_end",
    "on_train_end",
)
# Measurements of this run's speed: true of the process, not of the training.
_SPEED_SUFFIXES = ("_per_second", "_seconds")


class TrainerCallback:
    """Override the events of interest. Each may return a `TrainerControl` to replace the one given.

    Keyword arguments are what the trainer has: `model`, `optimizer`, `lr_scheduler`,
    `train_dataloader`, and by event `logs`, `metrics`, `checkpoint`, `save_seconds`, `committed`
    and `report`. What a callback draws from the global generators is part of the run: it must
    draw alike in a resumed one.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """The trainer has been made."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """Training begins; a resumed run has been loaded."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """Training has ended."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """An epoch begins, or goes on after a resume."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """An epoch has ended."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """An optimizer step begins: its batches have been read."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """One batch of several that gradients are accumulated over, except the last."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """An optimizer step has been taken."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """An evaluation has ended; `metrics`."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """A checkpoint has been committed, or begun in the background.

        `checkpoint` is its folder; of one begun, where it will be unless that folder is taken.
        `save_seconds` is how long training waited, `committed` whether it is done.
        """

    def on_save_report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """A save has ended, well or badly: `report`, a `SaveReport`, on each rank its own.

        Called between steps and before training ends. Ranks hear at different steps, and another
        run at others: what is done to `control` and drawn from generators is undone, and nothing
        collective may be called.
        """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl | None:
        """Something has been logged; `logs`."""


class CallbackList:
    """Calls every callback in order."""

    def __init__(self, callbacks: Iterable[TrainerCallback]) -> None:
        self.callbacks = list(callbacks)

    def call(
        self,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Extra,
    ) -> TrainerControl:
        """Announce an event; returns the control that the callbacks leave behind."""
        for callback in self.callbacks:
            control = getattr(callback, event)(args, state, control, **kwargs) or control
        return control


class FlowCallback(TrainerCallback):
    """Turns the arguments' strategies into what should happen at each step and epoch."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl:
        """Log, evaluate and save every so many steps; stop at the last."""
        step = state.global_step
        if _every(args.logging_steps, step):
            control.should_log = True
        if args.eval_strategy is EvalStrategy.STEPS and _every(args.evaluation_steps, step):
            control.should_evaluate = True
        if args.save_strategy is SaveStrategy.STEPS and _every(args.save_steps, step):
            control.should_save = True
        if step >= state.max_steps:
            control.should_training_stop = True
            control.should_save |= args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.ADAPTIVE)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> TrainerControl:
        """Evaluate and save at the end of the epoch."""
        if args.eval_strategy is EvalStrategy.EPOCH:
            control.should_evaluate = True
        if args.save_strategy is SaveStrategy.EPOCH:
            control.should_save = True
        return control


class LossLogCallback(TrainerCallback):
    """Rank 0 appends each logged step to a JSON Lines file, which a resumed run continues exactly.

    Floats are written as `repr` gives them, so equal files mean equal bits. Speeds are left out.
    When training begins at step k, lines beyond step k and a torn last line are removed: they
    belong to a run that was killed.

    Args:
        path: by default `losses.jsonl` in the output directory.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = Path(path) if path is not None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Keep the lines up to this step."""
        path = self._file(args)
        if not state.is_world_process_zero or not path.exists():
            return
        kept = [
            line for line in path.read_bytes().splitlines(keepends=True) if _is_past(line, state)
        ]
        draft = path.with_name(f"{path.name}.tmp")
        draft.write_bytes(b"".join(kept))
        draft.replace(path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Append one line for a step's loss."""
        logs: Mapping[str, Any] = kwargs["logs"]
        if not state.is_world_process_zero or "loss" not in logs:
            return
        kept = {name: value for name, value in logs.items() if not name.endswith(_SPEED_SUFFIXES)}
        path = self._file(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as file:
            file.write(json.dumps({"step": state.global_step, **kept}) + "\n")

    def _file(self, args: TrainingArguments) -> Path:
        return self._path or args.output_dir / "losses.jsonl"


class ProgressCallback(TrainerCallback):
    """A bar on a terminal, plain lines elsewhere; on rank 0, to stderr.

    Args:
        console: where to; by default stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Show where the run begins and ends."""
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self._say(f"resumed at step {state.global_step}")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self._bar = Progress(text, *columns, console=self._console, transient=True)
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """One line of numbers."""
        if state.is_world_process_zero:
            shown = "  ".join(_shown(name, value) for name, value in kwargs["logs"].items())
            self._say(f"step {state.global_step}/{state.max_steps}  {shown}")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Which checkpoint, and how long it took."""
        if state.is_world_process_zero and kwargs["committed"]:
            name = Path(kwargs["checkpoint"]).name
            self._say(f"saved {name} in {kwargs['save_seconds']:.2f} s")

    def on_save_report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """The same of a checkpoint that was saved in the background, or why it was not."""
        report: SaveReport = kwargs["report"]
        if not state.is_world_process_zero or not report.background:
            return
        if report.ok:
            took = f"{report.total_s:.2f} s, {report.stall_s:.2f} s of it waited for"
            self._say(f"saved {report.checkpoint_id} in {took}")
        else:
            self._say(f"could not save {report.checkpoint_id}: {report.error}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Extra
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def _is_past(line: bytes, state: TrainerState) -> bool:
    """Whether a line is whole and no later than the state."""
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= state.global_step
    except (ValueError, KeyError, TypeError):
        return False  # torn by a kill, or not ours


def _shown(name: str, value: object) -> str:
    words = name.replace("_per_second", "/s")
    if not isinstance(value, float) or not math.isfinite(value):
        return f"{words} {value}"
    return f"{words} {value:,.0f}" if value >= 1000 else f"{words} {value:.4g}"
