"""Where a training run stands, and what callbacks may ask of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_DURABLE = (
    "global_step",
    "epoch_index",
    "steps_in_epoch",
    "steps_missed",
    "samples_seen",
    "best_metric",
    "best_model_checkpoint",
)


@dataclass(slots=True, kw_only=True)
class TrainerState:
    """Progress, with Hugging Face's names. Its `state_dict` is the `progress` component.

    Attributes:
        global_step: optimizer steps done.
        epoch_index: the epoch under way, from 0.
        steps_in_epoch: optimizer steps done in it; after a resume on another number of ranks,
            steps_per_epoch less those that are still to come.
        steps_missed: optimizer steps of epochs that a callback ended early.
        samples_seen: by all ranks together.
        best_metric: the best value of `metric_for_best_model` among the saved checkpoints.
        best_model_checkpoint: its ref, `main@500`.
        max_steps: where training ends.
        num_train_epochs: how many epochs that is, rounded up.
        steps_per_epoch: optimizer steps of a whole epoch.
        log_history: what this process has logged; not saved.
        is_world_process_zero: whether this is rank 0.
        is_local_process_zero: whether this is the first rank of its node.
    """

    global_step: int = 0
    epoch_index: int = 0
    steps_in_epoch: int = 0
    steps_missed: int = 0
    samples_seen: int = 0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    max_steps: int = 0
    num_train_epochs: int = 0
    steps_per_epoch: int = 1
    log_history: list[dict[str, Any]] = field(default_factory=list)
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self.epoch_index + self.steps_in_epoch / self.steps_per_epoch

    @property
    def step_offset(self) -> int:
        """How far global_step is ahead of the steps that these ranks would have needed.

        Not 0 where another number of ranks has done some of the steps.
        """
        here = self.epoch_index * self.steps_per_epoch + self.steps_in_epoch - self.steps_missed
        return self.global_step - here

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; nothing of the log and nothing of this process."""
        return {name: getattr(self, name) for name in _DURABLE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where the saved run stood."""
        counted = {"steps_missed": 0, **state_dict}  # which was not always counted
        for name in _DURABLE:
            setattr(self, name, counted[name])


@dataclass(slots=True, kw_only=True)
class TrainerControl:
    """What should happen next; callbacks set it, on any rank, and all ranks act on it together."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_log: bool = False
    should_evaluate: bool = False
    should_save: bool = False

    def to_flags(self) -> tuple[int, ...]:
        """One 0 or 1 a field, in order."""
        return tuple(int(getattr(self, name)) for name in self.__slots__)

    def take_flags(self, flags: tuple[int, ...]) -> None:
        """The inverse of `to_flags`."""
        for name, flag in zip(self.__slots__, flags, strict=True):
            setattr(self, name, bool(flag))
