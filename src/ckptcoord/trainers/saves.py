"""The saves of one call of `train()`: begun, awaited, tagged, reported."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent import futures
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.dist.config import OnFailure
from ckptcoord.dist.rng import preserved_rng
from ckptcoord.trainers.pacing import guessed_save_s

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from ckptcoord.trainers.base import BaseTrainer
    from ckptcoord.trainers.pacing import SavePacer

_log = logging.getLogger("ckptcoord")
_REMEMBERED = 3  # saves that the next one's time is judged by


@dataclass(slots=True, kw_only=True)
class _Begun:
    """A save in the background."""

    step: int
    committed: Future[str]
    called_s: float
    ended_s: float | None = None  # set by the worker's thread

    def end(self, committed: Future[str]) -> None:
        """It has ended, well or badly."""
        self.ended_s = time.perf_counter()


@dataclass(slots=True, kw_only=True)
class _Best:
    """A save whose checkpoint is to be tagged, and what was the best before it."""

    step: int
    ref: str
    before: tuple[float | None, str | None]
    failed: bool = False


class RunSaves:
    """Begins saves and knows how they end. What it knows may differ over ranks; see `Word`.

    **The tag `best`** follows its commit: it is set at the first step boundary at which no rank has
    a save under way, so that nobody waits; or, where that comes first, before the next save begins
    or training ends, and that waits for the commit. So retention, which runs with the next commit,
    never meets a best checkpoint without its tag, and a resume from the newest checkpoint can put a
    missing tag right. Where every save is a new best one, saves are one behind the other.

    Args:
        trainer: whose state is saved.
        pacer: hears what saves take from training.
        state_bytes: about what a rank writes in a save.

    Attributes:
        begun_step: of the newest checkpoint begun or loaded; None: there is none.
        committed_step: of the newest checkpoint committed or loaded; None: there is none.
        failed: whether a save has failed that has not been raised.
    """

    def __init__(self, trainer: BaseTrainer, pacer: SavePacer, state_bytes: int) -> None:
        self._trainer, self._pacer = trainer, pacer
        self._unfinished: deque[_Begun] = deque()
        self._guess_s = guessed_save_s(state_bytes)
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._last_end_s = 0.0
        self._best: _Best | None = None
        self._in_background = False  # whether any has been begun there
        self.begun_step: int | None = None
        self.committed_step: int | None = None
        self.failed = False

    # --- what is known ---------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether a save is under way, as of the last `look`."""
        return bool(self._unfinished)

    @property
    def save_s(self) -> float:
        """From the call of a save to its commit, but for the wait for those before it.

        The one under way has taken as long as it has, whatever was to be expected of it.
        """
        return max(max(self._recent, default=self._guess_s), self._running_s)

    @property
    def drain_s(self) -> float:
        """Until the saves under way have ended."""
        if not self._unfinished:
            return 0.0
        save_s = self.save_s
        return max(0.0, save_s - self._running_s) + (len(self._unfinished) - 1) * save_s

    @property
    def _running_s(self) -> float:
        """How long the first of the saves under way has taken so far; 0: there is none."""
        if not self._unfinished:
            return 0.0
        return time.perf_counter() - max(self._unfinished[0].called_s, self._last_end_s)

    def loaded(self, step: int) -> None:
        """The run goes on from this checkpoint."""
        self.begun_step = self.committed_step = step

    def look(self) -> None:
        """Take note of saves that have ended since, and announce their reports. Not collective."""
        while self._unfinished and self._unfinished[0].committed.done():
            self._note(self._unfinished.popleft())
        if not self._unfinished:
            self._pacer.ended()
        self._announce_reports()

    # --- what happens ----------------------------------------------------------------------------

    def save(self, *, metrics: Mapping[str, float], message: str, background: bool) -> None:
        """Save the state as it is. Collective.

        Raises:
            CkptError: this save failed, or one before it.
        """
        trainer, state = self._trainer, self._trainer.state
        coordinator, step = trainer.coordinator, state.global_step
        started_s = time.perf_counter()
        if background:
            pending = coordinator.save_checkpoint_async(
                step=step, message=message, metrics=metrics, epoch=state.epoch
            )
            begun = _Begun(step=step, committed=pending.committed, called_s=started_s)
            self._unfinished.append(begun)
            self._in_background = True
            pending.committed.add_done_callback(begun.end)
            name = CheckpointId(BranchName(trainer.args.branch), step)
            path = str(Path(coordinator.repository.url) / str(name))
        else:
            path = coordinator.save_checkpoint(
                step=step, message=message, metrics=metrics, epoch=state.epoch
            )
        self.begun_step = step
        seconds = time.perf_counter() - started_s
        self._pacer.began(seconds)
        if not background:
            self._recent.append(seconds)
            self.look()  # at those before it
            self.committed_step = step
        trainer.announce("on_save", checkpoint=path, save_seconds=seconds, committed=not background)

    def mark_best(self, before: tuple[float | None, str | None]) -> None:
        """The save just begun is the best; `before`: what the state said of the best until then."""
        state = self._trainer.state
        ref = state.best_model_checkpoint or ""
        self._best = _Best(step=state.global_step, ref=ref, before=before)
        if not self._unfinished or self._unfinished[-1].step != state.global_step:
            self.settle_best()

    def settle_best(self) -> None:
        """Tag what is to be tagged, once it is committed. Collective.

        Raises:
            CkptError: a save failed.
        """
        best = self._best
        if best is None:
            return
        if self._in_background:
            self._trainer.coordinator.wait()
            self.look()
        (failed,) = self._trainer.ranks.agree((int(best.failed),))
        self._best = None
        if failed:
            state = self._trainer.state
            state.best_metric, state.best_model_checkpoint = best.before
        else:
            self._trainer.coordinator.set_best_checkpoint(best.ref)

    def act(self, *, unfinished: bool, failed: bool) -> None:
        """At a step boundary, as the ranks agreed. Collective.

        Raises:
            CkptError: a save failed.
        """
        if failed and self._trainer.args.on_save_failure is not OnFailure.WARN:
            self._trainer.coordinator.wait()
        self.failed = False
        if not unfinished:
            self.settle_best()

    def finish(self, within_s: float | None = None) -> bool:
        """Wait for the saves under way, so long at most. Collective; whether all have ended.

        Raises:
            CkptError: a save failed.
        """
        if self._in_background:
            if within_s is not None:
                futures.wait([begun.committed for begun in self._unfinished], max(0.0, within_s))
                self.look()
                (unfinished,) = self._trainer.ranks.agree((int(self.unfinished),))
                if unfinished:
                    return False
            self._trainer.coordinator.wait()
        self.look()
        self.settle_best()
        return True

    # --- helpers ---------------------------------------------------------------------------------

    def _note(self, begun: _Begun) -> None:
        ended_s = time.perf_counter() if begun.ended_s is None else begun.ended_s
        if begun.committed.exception() is None:
            self.committed_step = begun.step
            self._recent.append(ended_s - max(begun.called_s, self._last_end_s))
        else:
            self.failed = True
            if self._best is not None and self._best.step == begun.step:
                self._best.failed = True
        self._last_end_s = ended_s

    def _announce_reports(self) -> None:
        """Callbacks see them and no more: when one comes is chance, and must decide nothing."""
        trainer = self._trainer
        for report in trainer.take_reports():
            control = copy(trainer.control)
            with preserved_rng():
                trainer.announce("on_save_report", report=report)
            trainer.control = control
