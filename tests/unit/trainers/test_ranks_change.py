"""Steps, epochs and the learning rate where a run goes on with another number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.trainers.tiny import Noisy, Spy, arguments, model

from ckptcoord.core.sharing import OnWorldSizeChange, SharingPattern, StateComponent
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.callbacks import TrainerCallback
from ckptcoord.trainers.single import Trainer
from ckptcoord.trainers.state import TrainerState

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.trainers.data import ResumableLoader


class One(Trainer):
    """Rank 0 of so many, alone: it reads and counts as one of them, and nobody else is there."""

    world_size = 1

    def get_train_dataloader(self) -> ResumableLoader:
        return self.make_loader(0, self.world_size)


class Progress(TrainerCallback):
    """How far the run says it is, and the learning rate, step by step."""

    def __init__(self) -> None:
        self.epochs: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs[state.global_step] = state.epoch
        self.rates[state.global_step] = kwargs["optimizer"].param_groups[0]["lr"]


def go_on(
    folder: Path, world_size: int, *, stop_at: int = -1, samples: int = 48, **given_: Any
) -> tuple[One, Progress]:
    """Train on as one of so many ranks, and save at a step."""
    progress = Progress()
    defaults = {"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 0, "learning_rate": 0.01}
    args = arguments(
        folder,
        resume_from_checkpoint=True,
        **{"per_device_train_batch_size": 1, **defaults, **given_},
    )
    kind = type("OneOfMany", (One,), {"world_size": world_size})
    trainer = kind(model(), args, Noisy(samples), callbacks=[progress, Spy(stop_at=stop_at)])
    trainer.train()
    trainer.close()
    return trainer, progress


@pytest.fixture(autouse=True)
def _no_batch_norm_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "BatchNorm1d", torch.nn.LayerNorm)


def test_epochs_end_where_the_data_does_on_4_then_2_then_6_ranks(tmp_path: Path) -> None:
    four, _ = go_on(tmp_path, 4, stop_at=6)
    assert (four.state.steps_per_epoch, four.state.max_steps) == (12, 24)
    two, second = go_on(tmp_path, 2, stop_at=24)
    assert (two.state.steps_per_epoch, two.state.max_steps) == (24, 6 + 36)
    assert second.epochs[7] == 0.5 + 1 / 24
    assert second.epochs[18] == 1.0
    six, third = go_on(tmp_path, 6)
    assert (six.state.steps_per_epoch, six.state.max_steps) == (8, 24 + 6)
    assert third.epochs[25] == 1.25 + 1 / 8
    assert six.state.global_step == 30
    assert six.state.epoch == 2.0
    assert six.state.num_train_epochs == 2
    assert third.rates[30] == 0.0
    assert 0.0 < third.rates[29] < 0.01


def test_the_same_layout_again_keeps_what_the_change_made_of_the_count(tmp_path: Path) -> None:
    go_on(tmp_path, 4, stop_at=6)
    go_on(tmp_path, 2, stop_at=10)
    again, progress = go_on(tmp_path, 2)
    assert again.state.max_steps == 6 + 36
    assert progress.epochs[11] == 0.5 + 5 / 24
    assert progress.rates[42] == 0.0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_another_batch_size_or_accumulation_counts_alike(tmp_path: Path, accumulation: int) -> None:
    go_on(tmp_path, 1, stop_at=6, per_device_train_batch_size=4)
    other, progress = go_on(
        tmp_path, 1, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation
    )
    left = 12 + 24 if accumulation == 1 else 4 + 8
    assert other.state.max_steps == other.state.global_step == 6 + left
    assert progress.epochs[6 + left] == 2.0


def test_given_max_steps_and_schedules_stay_as_they_are(tmp_path: Path) -> None:
    go_on(tmp_path, 4, stop_at=6, max_steps=20)
    two, progress = go_on(tmp_path, 2, max_steps=20)
    assert two.state.global_step == two.state.max_steps == 20
    assert two.state.num_train_epochs == 2
    assert progress.rates[20] == 0.0


def test_an_epoch_that_was_saved_at_its_end_is_over_on_any_number_of_ranks(tmp_path: Path) -> None:
    settings_ = {"save_strategy": "epoch"}
    go_on(tmp_path, 4, stop_at=12, **settings_)
    six, progress = go_on(tmp_path, 6, **settings_)
    assert six.state.max_steps == six.state.global_step == 12 + 8
    assert progress.epochs[13] == 1.125


def test_what_did_not_go_round_makes_the_steps_that_it_is_worth(tmp_path: Path) -> None:
    go_on(tmp_path, 4, stop_at=3, samples=15)  # 3 of 15 samples are left
    two, progress = go_on(tmp_path, 2, samples=15)
    assert progress.epochs[4] == 1.0
    assert two.state.max_steps == 3 + 1 + 7


def test_an_epoch_that_a_callback_ends_counts_with_its_steps(tmp_path: Path) -> None:
    class Short(Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.epoch_index == 0 and state.steps_in_epoch == 2

    def trainer(stop_at: int) -> Trainer:
        args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, resume_from_checkpoint=True)
        made = Trainer(model(), args, Noisy(12), callbacks=[Short(), Spy(stop_at=stop_at)])
        made.train()
        made.close()
        return made

    assert trainer(5).state.steps_missed == 4
    assert trainer(-1).state.max_steps == 12


@given(
    st.integers(1, 50), st.integers(0, 9), st.integers(0, 50), st.integers(0, 9), st.integers(0, 99)
)
@settings(max_examples=50)
def test_the_offset_is_what_other_ranks_did_otherwise(
    per_epoch: int, epoch: int, steps: int, missed: int, offset: int
) -> None:
    state = TrainerState(
        global_step=epoch * per_epoch + steps - missed + offset,
        epoch_index=epoch,
        steps_in_epoch=steps,
        steps_missed=missed,
        steps_per_epoch=per_epoch,
    )
    assert state.step_offset == offset


def test_progress_of_a_checkpoint_from_before_missed_steps_were_counted_loads() -> None:
    saved = TrainerState(global_step=3).state_dict()
    del saved["steps_missed"]
    state = TrainerState()
    state.load_state_dict(saved)
    assert (state.global_step, state.steps_missed) == (3, 0)


def test_generators_are_each_ranks_own_and_the_data_everyones(tmp_path: Path) -> None:
    trainer = Trainer(model(), arguments(tmp_path, seed=9), Noisy(4))
    changes = {one.key: one.on_world_size_change for one in trainer.get_state_components()}
    assert changes.pop("rng") is OnWorldSizeChange.OWN
    assert set(changes.values()) == {OnWorldSizeChange.REFUSE}
    assert trainer.rng.seed == 9


def test_what_a_component_does_on_a_change_is_checked() -> None:
    for given_ in OnWorldSizeChange:
        component = StateComponent(
            "x",
            {},
            SharingPattern.PER_RANK,
            on_world_size_change=str(given_),  # type: ignore[arg-type]
        )
        assert component.on_world_size_change is given_
    with pytest.raises(ConfigError, match=r"on_world_size_change: is 'keep'"):
        StateComponent("x", {}, SharingPattern.PER_RANK, on_world_size_change="keep")  # type: ignore[arg-type]
