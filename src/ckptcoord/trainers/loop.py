"""One call of `train()`: the loop, and what happens at its step boundaries."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ckptcoord.dist.rng import seed_everything
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import SaveStrategy
from ckptcoord.trainers.batch import sample_count, token_count
from ckptcoord.trainers.beginning import Beginning, set_epoch
from ckptcoord.trainers.boundary import Grace, Word, to_ms
from ckptcoord.trainers.pacing import SavePacer
from ckptcoord.trainers.saves import RunSaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ckptcoord.trainers.base import BaseTrainer
    from ckptcoord.trainers.signals import StopSignals

STOPPED_EXIT_CODE = os.EX_TEMPFAIL  # 75: "try again later"
_log = logging.getLogger("ckptcoord")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutput:
    """How a call of `train()` ended.

    Attributes:
        global_step: optimizer steps done, also by earlier runs that it resumed.
        training_loss: of the last step, the mean over ranks; NaN where no step was taken.
        stopped_by_signal: the signal's number, or None.
        best_model_checkpoint: ref of the best checkpoint, or None.
    """

    global_step: int
    training_loss: float
    stopped_by_signal: int | None
    best_model_checkpoint: str | None

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0, or 75 where a signal ended it and it can go on.

        75 is EX_TEMPFAIL, "try again later": neither success, nor an error of ckptcoord's, nor what
        a shell shows of a process that a signal killed, 128 and more (docs/preemption.md).
        """
        return 0 if self.stopped_by_signal is None else STOPPED_EXIT_CODE


@dataclass(slots=True, kw_only=True)
class _Step:
    """What the last optimizer step left behind."""

    loss: torch.Tensor
    grad_norm: torch.Tensor | None
    learning_rate: float
    mean_loss: float | None = None  # over ranks, once somebody asked


@dataclass(slots=True, kw_only=True)
class _Window:
    """What this rank has done since the last log."""

    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0


class TrainingRun:
    """Drives a trainer. Decisions are agreed: every rank logs, evaluates, saves and stops alike."""

    def __init__(self, trainer: BaseTrainer, signals: StopSignals) -> None:
        self._trainer, self._signals = trainer, signals
        self._args, self._ranks = trainer.args, trainer.ranks
        self._state = trainer.state
        state_bytes = _state_bytes(trainer)
        self._pacer = SavePacer(trainer.args.max_save_overhead, state_bytes)
        self._saves = RunSaves(trainer, self._pacer, state_bytes)
        self._grace: Grace | None = None  # once a signal has come
        self._grace_until_s = 0.0
        self._step: _Step | None = None
        self._window = _Window()
        self._metrics: dict[str, float] = {}  # of this step's evaluation
        trainer.stopped_by_signal = None

    def run(self) -> TrainOutput:
        """All epochs, the last save, the best model."""
        trainer, state, args = self._trainer, self._state, self._args
        trainer.model_wrapped.train()
        beginning = Beginning(trainer, self._saves)
        if not beginning.go_on():
            seed_everything(args.seed, self._ranks.rank)
        trainer.control.should_training_stop = state.global_step >= state.max_steps
        trainer.announce("on_train_begin")
        beginning.save_anew()
        while not trainer.control.should_training_stop:
            self._epoch()
        self._finish_saves()
        if args.load_best_model_at_end and trainer.stopped_by_signal is None:
            self._load_best()
        loss = self._mean_loss()
        trainer.announce("on_train_end")
        return TrainOutput(
            global_step=state.global_step,
            training_loss=loss,
            stopped_by_signal=trainer.stopped_by_signal,
            best_model_checkpoint=state.best_model_checkpoint,
        )

    # --- steps -----------------------------------------------------------------------------------

    def _epoch(self) -> None:
        """The rest of the epoch under way."""
        trainer, state, control = self._trainer, self._state, self._trainer.control
        control.should_epoch_stop = False
        set_epoch(trainer)
        trainer.announce("on_epoch_begin")
        batches = iter(trainer.train_dataloader)
        while not (trainer.control.should_epoch_stop or trainer.control.should_training_stop):
            started_s = time.perf_counter()
            group = list(islice(batches, self._args.gradient_accumulation_steps))
            if not group:
                break
            self._take_step(group)
            self._measure(time.perf_counter() - started_s, group)
            self._act()
        if trainer.stopped_by_signal is not None:
            return
        if not state.steps_in_epoch:
            raise ConfigError(field="train_dataloader", why="gave no batch in a whole epoch")
        trainer.announce("on_epoch_end")
        self._act()
        if not trainer.control.should_training_stop:
            state.steps_missed += state.steps_per_epoch - state.steps_in_epoch
            state.epoch_index += 1
            state.steps_in_epoch = 0

    def _take_step(self, group: Sequence[Any]) -> None:
        """One optimizer step over a group of batches; their losses count alike."""
        trainer, state = self._trainer, self._state
        trainer.announce("on_step_begin")
        self._step = self._update(trainer.training_step(group))
        self._metrics = {}
        state.global_step += 1
        state.steps_in_epoch += 1
        state.samples_seen += trainer.data_ranks * sum(sample_count(batch) for batch in group)
        trainer.announce("on_step_end")

    def _update(self, loss: torch.Tensor) -> _Step:
        trainer, norm = self._trainer, None
        if self._args.max_grad_norm:
            norm = trainer.clip_gradients(self._args.max_grad_norm)
        rate = float(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        return _Step(loss=loss, grad_norm=norm, learning_rate=rate)

    def _measure(self, seconds: float, group: Sequence[Any]) -> None:
        self._pacer.stepped(seconds)
        self._window.seconds += seconds
        self._window.samples += sum(sample_count(batch) for batch in group)
        self._window.tokens += sum(token_count(batch) for batch in group)

    # --- step boundaries -------------------------------------------------------------------------

    def _act(self) -> None:
        """Agree on what any rank's callbacks and signals ask for, and do it in this order."""
        trainer, saves = self._trainer, self._saves
        saves.look()
        control = trainer.control
        flags = (*control.to_flags(), *self._word().to_flags())
        agreed = self._ranks.agree(flags)
        asked = len(control.to_flags())
        control.take_flags(agreed[:asked])
        word = Word.from_flags(agreed[asked:])
        saves.act(unfinished=bool(word.unfinished), failed=bool(word.failed))
        control.should_save |= bool(word.due)
        if word.signal:
            self._wind_down(word)
        if control.should_log:
            self._log()
        if control.should_evaluate:
            self._evaluate()
        if trainer.control.should_save:
            self._save()
        control = trainer.control
        control.should_log = control.should_evaluate = control.should_save = False

    def _word(self) -> Word:
        """What this rank has to say to the others."""
        saves, signals = self._saves, self._signals
        adaptive = self._args.save_strategy is SaveStrategy.ADAPTIVE
        return Word(
            # Rank 0's clock alone decides, so that ranks never differ about what fits the budget.
            due=adaptive and self._ranks.rank == 0 and self._pacer.due,
            signal=signals.received,
            since_ms=to_ms(signals.since_s),
            unfinished=saves.unfinished,
            failed=saves.failed,
            drain_ms=to_ms(saves.drain_s),
            save_ms=to_ms(saves.save_s),
        )

    def _wind_down(self, word: Word) -> None:
        """A signal has come: stop here, with a last save if there is time for one."""
        args, control = self._args, self._trainer.control
        self._grace = grace = Grace.of(word, args.preemption_grace_s)
        self._grace_until_s = time.perf_counter() + grace.left_s
        self._trainer.stopped_by_signal = word.signal
        control.should_training_stop = True
        control.should_evaluate = False  # whoever sent it will not wait long
        control.should_save = args.save_strategy is not SaveStrategy.NO and grace.fits

    def _finish_saves(self) -> None:
        """Wait for the saves under way; after a signal, for as long as the grace lasts."""
        saves, grace = self._saves, self._grace
        if grace is None:
            saves.finish()
            return
        finished = saves.finish(within_s=self._grace_until_s - time.perf_counter())
        lost = self._state.global_step != saves.committed_step
        if self._ranks.rank or not lost or self._args.save_strategy is SaveStrategy.NO:
            return
        newest = f"{self._args.branch}@{saves.committed_step}"
        stands = "there is no checkpoint" if saves.committed_step is None else f"{newest} stands"
        why = "" if saves.begun_step == self._state.global_step else f": {grace.why_not()}"
        more = "" if finished else "; saves under way are committed only if there is time after all"
        _log.warning("step %d is not saved%s; %s%s", self._state.global_step, why, stands, more)

    def _mean_loss(self) -> float:
        """The last step's loss, over all ranks; they all ask."""
        step = self._step
        if step is None:
            return math.nan
        if step.mean_loss is None:
            (total,) = self._ranks.total((float(step.loss),))
            step.mean_loss = total / self._ranks.size
        return step.mean_loss

    def _log(self) -> None:
        step, window, ranks = self._step, self._window, self._trainer.data_ranks
        logs: dict[str, float] = {"loss": self._mean_loss()}
        if step is not None and step.grad_norm is not None:
            logs["grad_norm"] = float(step.grad_norm)
        if step is not None:
            logs["learning_rate"] = step.learning_rate
        logs["epoch"] = self._state.epoch
        if window.seconds:
            logs["samples_per_second"] = ranks * window.samples / window.seconds
        if window.seconds and window.tokens:
            logs["tokens_per_second"] = ranks * window.tokens / window.seconds
        self._window = _Window()
        self._state.log_history.append({"step": self._state.global_step, **logs})
        self._trainer.announce("on_log", logs=logs)

    def _evaluate(self) -> None:
        started_s = time.perf_counter()
        metrics = self._trainer.evaluate()
        self._pacer.trained(time.perf_counter() - started_s)
        if self._trainer.evaluations.was_cut:
            self._wind_down(Word.from_flags(self._ranks.agree(self._word().to_flags())))
            return
        self._metrics = metrics
        self._state.log_history.append({"step": self._state.global_step, **self._metrics})
        self._trainer.announce("on_log", logs=self._metrics)
        if self._args.save_strategy is SaveStrategy.BEST:
            better = self._improvement(self._metrics) is not None
            (any_better,) = self._ranks.agree((int(better),))
            self._trainer.control.should_save |= bool(any_better)

    def _save(self) -> None:
        """One checkpoint of this step, unless there is one."""
        trainer, args, state, saves = self._trainer, self._args, self._state, self._saves
        if state.global_step == saves.begun_step:
            return
        saves.settle_best()
        if self._lacks_metric():
            self._evaluate()
        if not trainer.control.should_save:
            return  # a signal came meanwhile, and there is no time for it
        metrics = {"loss": self._mean_loss(), **self._metrics}
        best = self._improvement(metrics) if args.tracks_best else None
        before = state.best_metric, state.best_model_checkpoint
        if best is not None:  # before the save: the checkpoint itself says what is best
            state.best_metric = best
            state.best_model_checkpoint = f"{args.branch}@{state.global_step}"
        # After a signal there is nothing left to do meanwhile.
        background = args.background_saves and trainer.stopped_by_signal is None
        saves.save(metrics=metrics, message=self._message(), background=background)
        if best is not None:
            saves.mark_best(before)

    def _lacks_metric(self) -> bool:
        """Whether the best checkpoint is judged by an evaluation that this step has not had."""
        name = self._args.metric_name(evaluates=self._trainer.eval_dataset is not None)
        return (
            self._args.tracks_best
            and self._trainer.eval_dataset is not None
            and self._trainer.stopped_by_signal is None
            and name != "loss"
            and not self._metrics
        )

    def _improvement(self, metrics: dict[str, float]) -> float | None:
        """The deciding metric's value if it is the best so far.

        Raises:
            ConfigError: nobody measures it.
        """
        name = self._args.metric_name(evaluates=self._trainer.eval_dataset is not None)
        value = metrics.get(name, metrics.get(f"eval_{name}"))
        if value is None and self._trainer.stopped_by_signal is None:
            raise ConfigError(
                field="metric_for_best_model",
                why=f"{name!r} is not among the metrics ({', '.join(sorted(metrics))})",
                help="Name one of these, or return it from evaluate()",
            )
        if value is None or not self._args.improves(value, self._state.best_metric, metric=name):
            return None
        return value

    def _message(self) -> str:
        parts = [self._args.run_name, f"step {self._state.global_step}"]
        if self._trainer.stopped_by_signal is not None:
            parts.append(f"stopped by {signal.Signals(self._trainer.stopped_by_signal).name}")
        return ", ".join(part for part in parts if part)

    def _load_best(self) -> None:
        """The weights of the best checkpoint, and nothing else of it."""
        ref = self._state.best_model_checkpoint
        if ref is None:
            return
        components = self._trainer.get_state_components()
        model = [component for component in components if component.key == "model"]
        with self._trainer.make_coordinator(model) as coordinator:
            coordinator.load_checkpoint(ref)


def _state_bytes(trainer: BaseTrainer) -> int:
    """About what a rank writes in a save: its part of weights and two moments."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return 3 * weights // trainer.ranks.size
