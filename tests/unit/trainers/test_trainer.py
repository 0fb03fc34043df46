from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.tiny import Noisy, Spy, Struck, arguments, model, remains

import ckptcoord
from ckptcoord import SharingPattern
from ckptcoord.errors import CheckpointExistsError, CkptError, ConfigError, RefNotFoundError
from ckptcoord.trainers import loop, saves
from ckptcoord.trainers.single import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.trainers.state import TrainerState


def run(
    folder: Path, *, spy: Spy | None = None, samples: int = 13, **settings: Any
) -> tuple[Trainer, Spy]:
    """Train in this process, everything made anew."""
    spy = spy or Spy()
    held_out = Noisy(5) if settings.pop("evaluated", False) else None
    trainer = Trainer(
        model(), arguments(folder, **settings), Noisy(samples), held_out, callbacks=[spy]
    )
    trainer.train()
    trainer.close()
    return trainer, spy


@pytest.mark.parametrize("at", [1, 5, 6, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine"},
        {"dataloader_num_workers": 1, "max_grad_norm": 0},
        {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "accumulating", "workers", "evaluating"],
)
def test_a_run_that_is_stopped_and_resumed_is_the_undisturbed_run(
    tmp_path: Path, at: int, settings: dict[str, Any]
) -> None:
    straight, heard = run(tmp_path / "straight", **settings)
    wanted = remains(straight)
    _, before = run(tmp_path / "run", spy=Spy(stop_at=at), **settings)
    torch.manual_seed(999)  # as a new process would, all is elsewhere
    resumed, after = run(tmp_path / "run", resume_from_checkpoint=True, **settings)
    assert before.saved == [f"checkpoint-{at}"]
    assert remains(resumed) == wanted
    assert {**before.losses, **after.losses} == heard.losses
    assert sorted(after.losses) == list(range(at + 1, 10))


def test_saving_does_not_disturb_a_run(tmp_path: Path) -> None:
    straight, heard = run(tmp_path / "a")
    saving, also = run(tmp_path / "b", save_strategy="steps", save_steps=1)
    assert also.losses == heard.losses
    assert len(also.saved) == 9
    assert straight.state.state_dict() == saving.state.state_dict()


def test_evaluating_does_not_disturb_a_run(tmp_path: Path) -> None:
    _, heard = run(tmp_path / "a")
    _, also = run(tmp_path / "b", evaluated=True, eval_strategy="steps", eval_steps=1)
    assert also.losses == heard.losses
    assert also.events.count("evaluate 3") == 1


def test_the_seed_decides_what_a_run_computes(tmp_path: Path) -> None:
    _, first = run(tmp_path / "a")
    _, same = run(tmp_path / "b")
    _, other = run(tmp_path / "c", seed=1)
    assert first.losses == same.losses != other.losses


def test_steps_save_every_so_many_and_the_last(tmp_path: Path) -> None:
    trainer, spy = run(tmp_path, save_strategy="steps", save_steps=4)
    assert spy.saved == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    assert trainer.state.samples_seen == 18


def test_epochs_save_and_evaluate_at_their_ends(tmp_path: Path) -> None:
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "evaluated": True}
    trainer, spy = run(tmp_path, samples=6, max_steps=-1, num_train_epochs=2, **settings)
    assert [e for e in spy.events if not e.startswith("step")] == [
        "epoch 1", "evaluate 3", "save 3", "epoch 2", "evaluate 6", "save 6"
    ]  # fmt: skip
    assert trainer.state.max_steps == 6
    assert trainer.state.num_train_epochs == 2


def test_a_resume_at_the_end_of_an_epoch_goes_on_with_the_next(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 6, "max_steps": 7}
    straight, heard = run(tmp_path / "a", **settings)
    wanted = remains(straight)
    for at in (3, 6):
        _, before = run(tmp_path / f"{at}", spy=Spy(stop_at=at), **settings)
        resumed, after = run(tmp_path / f"{at}", resume_from_checkpoint=True, **settings)
        assert remains(resumed) == wanted
        assert {**before.losses, **after.losses} == heard.losses


def test_leftover_batches_make_a_smaller_step_that_counts_fully(tmp_path: Path) -> None:
    trainer, spy = run(tmp_path, samples=10, gradient_accumulation_steps=3, max_steps=2)
    assert spy.events == ["substep", "substep", "step 1", "substep", "step 2", "epoch 1"]
    assert trainer.state.steps_per_epoch == 2
    assert trainer.state.samples_seen == 10


def test_best_saves_only_what_improves_and_ends_with_its_weights(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 0.0, 0.0, 1.0, float("nan"), 4.0, 0.5])
    weights: dict[int, Any] = {}

    class Scripted(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            weights[self.state.global_step] = self.model.second.weight.detach().clone()
            return {"eval_loss": next(values)}

    spy = Spy()
    args = arguments(
        tmp_path,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer = Scripted(model(), args, Noisy(20), Noisy(2), callbacks=[spy])
    output = trainer.train()
    assert spy.saved == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert output.best_model_checkpoint == "main@4"
    assert trainer.state.best_metric == 0.0
    assert torch.equal(trainer.model.second.weight, weights[4])
    assert not torch.equal(weights[4], weights[9])
    repository = ckptcoord.open_repository(tmp_path)
    assert str(repository.resolve("best").checkpoint_id) == "checkpoint-4"
    trainer.close()


def test_the_best_is_judged_at_a_save_even_where_no_evaluation_was_due(tmp_path: Path) -> None:
    settings = {"metric_for_best_model": "eval_loss", "evaluated": True}
    trainer, spy = run(tmp_path, save_strategy="steps", save_steps=5, **settings)
    assert [e for e in spy.events if not e.startswith("step")][:2] == ["evaluate 5", "save 5"]
    assert trainer.state.best_metric is not None


def test_the_training_loss_can_be_the_metric(tmp_path: Path) -> None:
    trainer, spy = run(
        tmp_path, save_strategy="steps", save_steps=1, metric_for_best_model="loss", evaluated=True
    )
    assert trainer.state.best_metric == min(spy.losses.values())


def test_a_metric_that_nobody_measures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'accuracy' is not among the metrics \(eval_loss, loss"):
        run(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            metric_for_best_model="accuracy",
            evaluated=True,
        )


def test_a_tag_that_a_kill_left_behind_is_put_right_by_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings["metric_for_best_model"] = "loss"

    class KilledError(BaseException):
        pass

    def killed(self: Any, ref: str) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(ckptcoord.CheckpointCoordinator, "set_best_checkpoint", killed)
        with pytest.raises(KilledError):
            run(tmp_path, **settings)
    with pytest.raises(RefNotFoundError):
        ckptcoord.open_repository(tmp_path).resolve("best")
    ckptcoord.shutdown()
    run(tmp_path, resume_from_checkpoint="latest", **{**settings, "max_steps": 1})
    commit = ckptcoord.open_repository(tmp_path).resolve("best")
    assert str(commit.checkpoint_id) == "checkpoint-1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_save_and_the_resumed_run_is_the_undisturbed_one(
    tmp_path: Path, number: signal.Signals
) -> None:
    straight, _ = run(tmp_path / "straight")
    wanted = remains(straight)
    before = signal.getsignal(number)
    spy = Spy(at={4: lambda: os.kill(os.getpid(), number)})
    stopped, _ = run(tmp_path / "run", spy=spy, save_strategy="steps", save_steps=100)
    assert stopped.stopped_by_signal == number
    assert spy.saved == ["checkpoint-4"]
    assert spy.events[-1] == "save 4"
    assert signal.getsignal(number) is before
    message = ckptcoord.open_repository(tmp_path / "run").resolve("latest")
    assert message.checkpoint_id.step == 4
    resumed, _ = run(tmp_path / "run", resume_from_checkpoint=True)
    assert remains(resumed) == wanted
    assert resumed.stopped_by_signal is None


def test_a_signal_saves_nothing_where_nothing_shall_be_saved(tmp_path: Path) -> None:
    spy = Spy(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    trainer, _ = run(tmp_path, spy=spy)
    assert trainer.state.global_step == 2
    assert spy.saved == []


def test_a_signal_does_not_wait_for_evaluations(tmp_path: Path) -> None:
    spy = Spy(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    run(
        tmp_path,
        spy=spy,
        evaluated=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        load_best_model_at_end=True,
    )
    assert spy.events == ["step 1", "step 2", "save 2"]


@pytest.mark.parametrize("cause", ["eval_strategy", "save_strategy"])
def test_an_evaluate_of_ones_own_survives_the_signal_that_cuts_it_and_its_metrics_are_dropped(
    tmp_path: Path, cause: str
) -> None:
    """Whether it is due by itself, or a save asks for it."""

    class Perplexed(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            first = super().evaluate(eval_dataset)["eval_loss"]
            empty = super().evaluate(Noisy(0))["eval_loss"]
            return {"eval_loss": first, "perplexity": 2**first, "other": empty}

    spy = Spy()
    settings = {cause: "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = Perplexed(
        model(),
        arguments(
            tmp_path,
            metric_for_best_model="perplexity",
            greater_is_better=False,
            per_device_eval_batch_size=1,
            **settings,
        ),
        Noisy(13),
        Struck(5),
        callbacks=[spy],
    )
    trainer.train()
    trainer.close()
    assert spy.events == ["step 1", "step 2", "save 2"]
    assert trainer.state.best_metric is None
    assert not any("perplexity" in logs for logs in trainer.state.log_history)
    commit = ckptcoord.open_repository(tmp_path).resolve("latest")
    assert commit.metrics.keys() == {"loss"}
    assert not trainer.evaluations.was_cut


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_adaptive_saves_stay_within_their_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(saves, "time", clock)
    save = ckptcoord.CheckpointCoordinator.save_checkpoint

    def slow_save(self: Any, *args: Any, **kwargs: Any) -> str:
        clock.pass_(0.5)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ckptcoord.CheckpointCoordinator, "save_checkpoint", slow_save)
    spy = Spy(at={step: lambda: clock.pass_(1.0) for step in range(1, 61)})
    settings = {"max_save_overhead": 0.05, "max_steps": 60, "background_saves": False}
    run(tmp_path, spy=spy, save_strategy="adaptive", **settings)
    steps = [int(name.removeprefix("checkpoint-")) for name in spy.saved]
    assert steps[-1] == 60  # the last is always kept
    assert len(steps) == 7
    # The first one's cost was guessed too low.
    for count, step in enumerate(steps[1:-1], start=2):
        assert 0.5 * count <= 0.05 * (step + 0.5 * count)


def test_a_failed_save_ends_the_training(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=9)
    with pytest.raises(CheckpointExistsError):
        run(tmp_path, save_strategy="steps", save_steps=9)
    ckptcoord.shutdown()


def test_going_on_from_an_older_checkpoint_needs_a_branch_of_its_own(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    straight, _ = run(tmp_path, **settings)
    wanted = remains(straight)
    with pytest.raises(ConfigError, match="main@3 is older than main@9"):
        run(tmp_path, resume_from_checkpoint="main@3", **settings)
    ckptcoord.shutdown()
    forked, spy = run(tmp_path, resume_from_checkpoint="main@3", branch="again", **settings)
    assert spy.saved == ["checkpoint-6@again", "checkpoint-9@again"]
    assert remains(forked) == wanted


def test_a_run_resumes_from_a_folder(tmp_path: Path) -> None:
    straight, _ = run(tmp_path, save_strategy="steps", save_steps=5, max_steps=5)
    wanted = remains(straight)
    folder = str(tmp_path / "checkpoint-5")
    resumed, spy = run(tmp_path, resume_from_checkpoint=folder, max_steps=5)
    assert remains(resumed) == wanted
    assert spy.events == []


def test_a_ref_that_does_not_exist_is_an_error_and_latest_of_nothing_is_a_new_run(
    tmp_path: Path,
) -> None:
    trainer, _ = run(tmp_path, resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    with pytest.raises(RefNotFoundError):
        run(tmp_path, resume_from_checkpoint="main@77")
    ckptcoord.shutdown()


def test_a_dataset_too_small_for_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few samples"):
        run(tmp_path, samples=1)


def test_a_loader_that_gives_nothing_is_refused_rather_than_asked_forever(tmp_path: Path) -> None:
    class Empty(list[int]):
        def __iter__(self) -> Any:
            return iter(())

    class Hungry(Trainer):
        def get_train_dataloader(self) -> Any:
            return Empty([1])

    with pytest.raises(ConfigError, match="no batch in a whole epoch"):
        Hungry(model(), arguments(tmp_path)).train()


def test_an_evaluation_needs_something_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset: is None"):
        run(tmp_path, eval_strategy="steps")


def test_an_evaluation_is_the_mean_over_samples(tmp_path: Path) -> None:
    class Constant:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return [torch.zeros(8), torch.tensor([float(index)])]

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, str]:
            assert not self.training
            return y.mean(), "logits"

    args = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = Trainer(Plain(), args, Noisy(4))
    assert trainer.evaluate(Constant()) == {"eval_loss": 1.0}
    assert trainer.model.training
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 1))
    assert str(trainer.evaluate(empty)) == "{'eval_loss': nan}"


def test_a_batch_that_is_a_tensor_is_passed_as_it_is(tmp_path: Path) -> None:
    class Doubling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).mean()

    numbers = [torch.tensor([float(i)]) for i in range(6)]
    trainer = Trainer(Doubling(), arguments(tmp_path, max_steps=2), numbers)
    assert trainer.train().global_step == 2


def test_what_a_trainer_declares(tmp_path: Path) -> None:
    trainer = Trainer(model(), arguments(tmp_path), Noisy(4))
    components = {c.key: c.sharing_pattern for c in trainer.get_state_components()}
    assert components.pop("rng") is SharingPattern.PER_RANK
    assert set(components) == {"model", "optimizer", "scheduler", "dataset", "progress"}
    assert set(components.values()) == {SharingPattern.GLOBAL}
    assert trainer.get_process_groups() == {}
    assert trainer.unwrapped_model() is trainer.model
    assert trainer._get_dataset_sharing_pattern() is SharingPattern.PER_RANK


def test_the_manifest_says_what_it_was(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=9, run_name="first try")
    repository = ckptcoord.open_repository(tmp_path)
    manifest = repository.manifest(repository.resolve("latest"))
    assert manifest.message == "first try, step 9"
    assert set(manifest.metrics) == {"loss"}
    assert manifest.epoch == pytest.approx(1.5)
    assert manifest.training_args_hash is not None


def test_where_a_run_is_written_is_no_part_of_its_hash(tmp_path: Path) -> None:
    hashes = []
    for name, settings in (("a", {}), ("b", {"run_name": "x"}), ("c", {"seed": 1})):
        run(tmp_path / name, save_strategy="steps", **settings)
        repository = ckptcoord.open_repository(tmp_path / name)
        hashes.append(repository.manifest(repository.resolve("latest")).training_args_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_trainer_can_be_closed_twice_and_before_it_has_saved(tmp_path: Path) -> None:
    trainer = Trainer(model(), arguments(tmp_path), Noisy(4))
    trainer.close()
    trainer.close()
    ckptcoord.shutdown(trainer)


def test_a_loader_needs_no_more_than_len_and_iter_where_nothing_is_saved(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return [{"x": torch.ones(2, 8), "y": torch.ones(2, 1)}] * 4

    assert Own(model(), arguments(tmp_path)).train().global_step == 9


def test_a_callback_can_end_an_epoch(tmp_path: Path) -> None:
    class Short(Spy):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            control.should_epoch_stop = state.steps_in_epoch == 2

    trainer, spy = run(tmp_path, spy=Short(), max_steps=5)
    assert [e for e in spy.events if e.startswith("epoch")] == [
        f"epoch {n + 2 / 6:g}" for n in (0, 1)
    ] + [f"epoch {2 + 1 / 6:g}"]
    assert trainer.state.epoch_index == 2


def test_an_error_of_the_model_comes_through(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 1))

        def forward(self, **batch: torch.Tensor) -> None:
            return None

    with pytest.raises(CkptError, match="without a loss"):
        Trainer(Broken(), arguments(tmp_path), Noisy(4)).train()


def test_tokens_are_counted_where_a_batch_has_them(tmp_path: Path) -> None:
    class Summing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 1))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return (self.weight * input_ids).mean()

    ids = [{"input_ids": torch.ones(7)} for _ in range(4)]
    trainer = Trainer(Summing(), arguments(tmp_path, max_steps=1), ids)
    trainer.train()
    (logs,) = trainer.state.log_history
    assert logs["tokens_per_second"] == pytest.approx(7 * logs["samples_per_second"])


def test_a_signal_at_a_save_without_an_evaluation_leaves_the_best_alone(tmp_path: Path) -> None:
    spy = Spy(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    trainer, _ = run(
        tmp_path,
        spy=spy,
        evaluated=True,
        save_strategy="steps",
        metric_for_best_model="eval_loss",
    )
    assert spy.saved == ["checkpoint-2"]
    assert trainer.state.best_metric is None


def test_nothing_best_leaves_the_last_weights(tmp_path: Path) -> None:
    class Undefined(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            return {"eval_loss": float("nan")}

    args = arguments(
        tmp_path,
        save_strategy="best",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer = Undefined(model(), args, Noisy(20), Noisy(2))
    assert trainer.train().best_model_checkpoint is None


def test_a_step_is_saved_once_whoever_asks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "epoch", "samples": 6, "max_steps": 3}
    _, spy = run(tmp_path, spy=Spy(save_at=(3,)), **settings)
    assert spy.saved == ["checkpoint-3"]
    _, resumed = run(tmp_path, resume_from_checkpoint=True, **settings)
    assert resumed.saved == []


def test_batches_accumulated_into_a_step_are_as_one_large_batch(tmp_path: Path) -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square().mean()

    def trained(folder: str, **settings: Any) -> tuple[list[float], float]:
        torch.manual_seed(3)
        points = [torch.linspace(0, 1, 4) * (i + 1) for i in range(16)]
        net = Linear(4, 1)
        # SGD, since Adam does not see the scale of a gradient.
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        args = arguments(tmp_path / folder, max_steps=3, max_grad_norm=0, **settings)
        output = Trainer(net, args, points, optimizer=optimizer).train()
        return net.weight.flatten().tolist(), output.training_loss

    many = trained("a", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one = trained("b", per_device_train_batch_size=4)
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    assert many[1] == pytest.approx(one[1], rel=1e-5)


def test_anchors_are_coded_where_the_arguments_say_so(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "straight")
    wanted = remains(straight)
    coded = {"compression": "auto", "compress_anchors": True}
    run(tmp_path / "run", spy=Spy(stop_at=5), **coded)
    first = tmp_path / "run" / "checkpoint-5"
    assert (first / "model.delta.safetensors").exists()
    assert not (first / "model.safetensors").exists()
    resumed, _ = run(tmp_path / "run", resume_from_checkpoint=True, **coded)
    assert remains(resumed) == wanted
