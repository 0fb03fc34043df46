"""A trainer's script goes on where `ckptcoord resume` and `ckptcoord fork` say, unchanged."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Net, Noisy, Spy, arguments, model, plain, remains
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptcoord import (
    AccelTrainer,
    CheckpointCoordinator,
    DDPTrainer,
    FSDPTrainer,
    HybridTrainer,
    PipelineTrainer,
    SharingPattern,
    StateComponent,
    Trainer,
    open_repository,
)
from ckptcoord.core.context import HandOff, Reset, Variable
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    MissingComponentsError,
    NotNewestError,
    RefNotFoundError,
)
from ckptcoord.plan.commit import branches
from ckptcoord.trainers.base import BaseTrainer

if TYPE_CHECKING:
    from ckptcoord.repo.repository import Repository


@pytest.fixture(autouse=True)
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the environment; at first it says nothing."""

    def set_to(told: HandOff) -> None:
        for name, text in told.to_environment().items():
            monkeypatch.setenv(name, text)

    set_to(HandOff())
    return set_to


def run(folder: Path, *, spy: Spy | None = None, **settings: Any) -> tuple[Trainer, Spy]:
    spy = spy or Spy()
    trainer = Trainer(model(), arguments(folder, **settings), Noisy(13), callbacks=[spy])
    trainer.train()
    trainer.close()
    return trainer, spy


def saved(folder: Path) -> Repository:
    """main@3 and main@5 of nine steps."""
    run(folder, spy=Spy(stop_at=5, save_at=(3,)))
    torch.manual_seed(999)  # as a new process would, all is elsewhere
    return open_repository(folder)


def fork(repository: Repository, step: int, **more: Any) -> HandOff:
    number = repository.state().number
    source = CheckpointId(BranchName("main"), step)
    repository.fork(BranchName("exp"), source, writer="f" * 32)
    return HandOff(
        repo=repository.url, branch="exp", resume_ref=source.ref, resume_since=number, **more
    )


class AtStart(Spy):
    """What the run goes on from."""

    found: dict[str, Any]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].state_dict()
        self.found = {
            "step": state.global_step,
            "moments": len(optimizer["state"]),
            "lr": [group["lr"] for group in optimizer["param_groups"]],
            "schedule": kwargs["lr_scheduler"].last_epoch,
            "draws": (random.random(), plain(torch.rand(4))),
        }


def test_a_fork_goes_on_as_the_undisturbed_run_does_on_its_own_branch(tmp_path, say) -> None:
    straight, _ = run(tmp_path / "straight")
    wanted = remains(straight)
    repository = saved(tmp_path / "run")
    say(fork(repository, 3))

    forked, spy = run(tmp_path / "run", spy=Spy(save_at=(7,)))

    assert remains(forked) == wanted
    assert sorted(spy.losses) == [4, 5, 6, 7, 8, 9]
    commit = repository.resolve("exp@7")
    assert commit.parent == CheckpointId(BranchName("main"), 3)
    assert repository.resolve("main").checkpoint_id.step == 5


def test_a_fork_that_is_restarted_goes_on_from_what_it_has_saved(tmp_path, say) -> None:
    repository = saved(tmp_path)
    say(fork(repository, 3, resets=(Reset.OPTIMIZER,), seed=1))
    run(tmp_path, spy=Spy(stop_at=7))

    _, spy = run(tmp_path, spy=AtStart())

    assert spy.found["step"] == 7
    assert spy.found["moments"] > 0


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_left_open_is_taken_from_the_environment(
    tmp_path, monkeypatch, say, resume
) -> None:
    repository = saved(tmp_path / "run")
    say(fork(repository, 5, autocommit=2))
    monkeypatch.chdir(tmp_path)
    settings = arguments(
        Path("trainer_output"), resume_from_checkpoint=resume, save_strategy="steps"
    )

    args = Trainer(model(), settings, Noisy(13)).args

    assert args.output_dir == tmp_path / "run"
    assert (args.branch, args.resume_from_checkpoint) == ("exp", "main@5")
    assert args.save_steps == 2


def test_what_an_argument_says_goes_before_the_environment(tmp_path, say, caplog) -> None:
    repository = saved(tmp_path / "run")
    say(fork(repository, 5, autocommit=2))
    given = {"branch": "mine", "resume_from_checkpoint": "main@3", "save_steps": 7}

    args = Trainer(
        model(), arguments(tmp_path / "run", save_strategy="steps", **given), Noisy(13)
    ).args

    assert {name: getattr(args, name) for name in given} == given
    assert "CKPTCOORD_BRANCH=exp is not heard" in caplog.text
    assert "CKPTCOORD_RESUME_REF=main@5 is not heard" in caplog.text


def test_repo_yaml_is_heard_after_the_environment(tmp_path, say) -> None:
    saved(tmp_path)
    settings = "format_version: 1\nbranch: theirs\nautocommit: 0\n"
    (tmp_path / ".ckptcoord/repo.yaml").write_text(settings)

    args = Trainer(model(), arguments(tmp_path, save_strategy="steps"), Noisy(13)).args
    assert (args.branch, args.save_strategy) == ("theirs", "no")

    say(HandOff(branch="ours", autocommit=4))
    args = Trainer(model(), arguments(tmp_path, save_strategy="steps"), Noisy(13)).args
    assert (args.branch, args.save_strategy, args.save_steps) == ("ours", "steps", 4)


def test_without_a_branch_checkpoints_go_to_the_one_that_the_ref_names(tmp_path, say) -> None:
    repository = saved(tmp_path)
    fork(repository, 5)
    say(HandOff(resume_ref="exp"))

    args = Trainer(model(), arguments(tmp_path), Noisy(13)).args

    assert (args.branch, args.resume_from_checkpoint) == ("exp", "main@5")


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_new_branch_begins_in_the_log_where_training_goes_on(tmp_path, say, by) -> None:
    repository = saved(tmp_path)
    given = {"branch": "exp", "resume_from_checkpoint": "main@3"}
    if by == "environment":
        say(HandOff(branch="exp", resume_ref="main@3"))
        given = {}

    run(tmp_path, save_strategy="steps", save_steps=4, **given)

    source = CheckpointId(BranchName("main"), 3)
    assert repository.state().forks[BranchName("exp")].source == source
    assert repository.resolve("exp@4").parent == source
    run(tmp_path, save_strategy="steps", save_steps=4, branch="exp", resume_from_checkpoint="exp")
    assert list(repository.state().forks) == [BranchName("exp")]


def test_a_new_branch_begins_at_what_was_loaded_whatever_the_ref_names_by_then(
    tmp_path, monkeypatch
) -> None:
    """Another run may move the tag meanwhile."""
    repository = saved(tmp_path)
    loaded, newer = (CheckpointId(BranchName("main"), step) for step in (3, 5))
    load = CheckpointCoordinator.load_checkpoint

    def load_and_move(coordinator: CheckpointCoordinator, *given: Any) -> Any:
        report = load(coordinator, *given)
        repository.tag(TagName("start"), newer, writer="e" * 32)
        return report

    repository.tag(TagName("start"), loaded, writer="e" * 32)
    monkeypatch.setattr(CheckpointCoordinator, "load_checkpoint", load_and_move)
    run(
        tmp_path,
        save_strategy="steps",
        save_steps=4,
        branch="exp",
        resume_from_checkpoint="start",
    )
    assert repository.state().forks[BranchName("exp")].source == loaded
    assert repository.resolve("exp@4").parent == loaded


# --- what begins anew ----------------------------------------------------------------------------


def began(tmp_path: Path, say: Any, *resets: Reset, seed: int | None = None) -> dict[str, Any]:
    say(HandOff())
    repository = saved(tmp_path)
    say(fork(repository, 5, resets=resets, seed=seed))
    _, spy = run(tmp_path, spy=AtStart())
    return spy.found


def test_a_new_optimizer_has_no_moments_and_the_rate_of_the_schedule(tmp_path, say) -> None:
    kept = began(tmp_path / "kept", say)
    found = began(tmp_path / "reset", say, Reset.OPTIMIZER)

    assert (kept["moments"] > 0, found["moments"]) == (True, 0)
    assert found | {"moments": kept["moments"]} == kept


def test_a_new_schedule_begins_at_its_first_step(tmp_path, say) -> None:
    kept = began(tmp_path / "kept", say)
    found = began(tmp_path / "reset", say, Reset.SCHEDULER)

    assert (kept["schedule"], found["schedule"]) == (5, 0)
    assert found["lr"] == [0.0, 0.0]  # of a warm-up
    assert (found["moments"], found["step"]) == (kept["moments"], 5)


def test_a_seed_gives_other_draws_and_the_same_ones_each_time(tmp_path, say) -> None:
    draws = [
        began(tmp_path / str(at), say, seed=seed)["draws"]
        for at, seed in enumerate((None, 7, 7, 8))
    ]
    assert draws[1] == draws[2]
    assert len({str(one) for one in draws}) == 3


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (Variable.BRANCH, "a/b"),
        (Variable.BRANCH, "x.lock"),
        (Variable.RESUME_REF, "main@"),
        (Variable.RESUME_REF, "x" * 10_000),
        (Variable.AUTOCOMMIT, "-1"),
        (Variable.RESET, "model"),
        (Variable.SEED, "1e3"),
        (Variable.RESUME_SINCE, "soon"),
        (Variable.REPO, ".."),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(tmp_path, monkeypatch, name, text) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(CkptError) as caught:
        Trainer(model(), arguments(Path("trainer_output")), Noisy(13))
    assert text == ".." or (isinstance(caught.value, ConfigError) and name in str(caught.value))
    assert len(str(caught.value)) < 500


def test_an_old_step_of_a_branch_that_has_newer_ones_is_refused(tmp_path, say) -> None:
    saved(tmp_path)
    say(HandOff(branch="main", resume_ref="main@3"))
    with pytest.raises(NotNewestError, match=r"ckptcoord fork main@3 NAME .* --rewind"):
        Trainer(model(), arguments(tmp_path, save_strategy="steps"), Noisy(13))


def test_another_repository_than_the_one_of_the_ref_is_refused(tmp_path, say) -> None:
    repository = saved(tmp_path / "run")
    say(fork(repository, 5))
    with pytest.raises(ConfigError, match=r"output_dir: is .*other.* CKPTCOORD_REPO is"):
        Trainer(model(), arguments(tmp_path / "other"), Noisy(13))


def test_a_ref_that_is_not_there_is_refused_with_the_nearest(tmp_path, say) -> None:
    saved(tmp_path)
    say(HandOff(resume_ref="main@4"))
    with pytest.raises(RefNotFoundError, match="main@3, main@5"):
        Trainer(model(), arguments(tmp_path), Noisy(13))


def test_all_ranks_hear_rank_0(tmp_path) -> None:
    saved(tmp_path)
    assert run_job(_hear, str(tmp_path), size=2) == [("main@5", "exp")] * 2
    assert run_job(_hear, str(tmp_path / "none"), size=2) == ["RepositoryNotFoundError"] * 2
    assert BranchName("exp") not in branches(open_repository(tmp_path).state())


def _hear(folder: str) -> Any:
    environ = os.environ  # noqa: TID251 (as ckptcoord resume does)
    if environ["RANK"] == "0":
        environ.update(HandOff(branch="exp", resume_ref="main@5").to_environment())
    try:
        trainer = DDPTrainer(model(), arguments(Path(folder)), Noisy(13))
    except CkptError as error:
        return type(error).__name__
    trainer.close()
    return trainer.args.resume_from_checkpoint, trainer.args.branch


# --- from weights alone --------------------------------------------------------------------------


def weights(folder: Path, key: str = "model") -> Net:
    """`imported@1000` holds a model and nothing else; the model."""
    net = model()
    with torch.no_grad():
        net.first.weight.mul_(3)
    with CheckpointCoordinator(
        [StateComponent(key, net, SharingPattern.REPLICATED)],
        output_dir=folder,
        config=CoordinatorConfig(branch="imported"),
    ) as coordinator:
        coordinator.save_checkpoint(step=1000)
    return net


def fork_of(repository: Repository, source: str, **more: Any) -> HandOff:
    number = repository.state().number
    source_id = repository.resolve(source).checkpoint_id
    repository.fork(BranchName("tune"), source_id, writer="f" * 32)
    return HandOff(
        repo=repository.url, branch="tune", resume_ref=source, resume_since=number, **more
    )


def messages(folder: Path, branch: str) -> dict[str, str]:
    commits = open_repository(folder).state().commits
    return {one.ref: c.message for one, c in commits.items() if str(one.branch) == branch}


@pytest.mark.parametrize("kind", ["model alone", "everything"])
def test_weights_only_trains_as_a_new_run_with_these_weights(tmp_path, say, kind) -> None:
    if kind == "model alone":
        net, source = weights(tmp_path / "run"), "imported@1000"
    else:
        trainer, _ = run(tmp_path / "run", spy=Spy(stop_at=5))
        net, source = trainer.model, "main@5"
    start = Trainer(net, arguments(tmp_path / "new", save_strategy="steps"), Noisy(13))
    start.train()
    wanted = remains(start)
    start.close()
    say(fork_of(open_repository(tmp_path / "run"), source, resets=(Reset.WEIGHTS_ONLY,)))

    forked, spy = run(tmp_path / "run", save_strategy="steps", save_steps=4)

    assert remains(forked) == wanted
    assert sorted(spy.losses) == [*range(1, 10)]
    assert messages(tmp_path / "run", "tune") == {
        "tune@0": f"fork of {source}: weights only",
        **{f"tune@{step}": f"step {step}" for step in (4, 8, 9)},
    }


def test_a_trainer_that_has_a_model_alone_says_what_is_missing(tmp_path, say) -> None:
    net = weights(tmp_path)
    say(fork_of(open_repository(tmp_path), "imported@1000", resets=(Reset.OPTIMIZER,), seed=1))
    trainer = Trainer(model(), arguments(tmp_path, save_strategy="steps"), Noisy(13))
    before = plain(trainer.model.state_dict())
    with pytest.raises(
        MissingComponentsError,
        match=r"imported@1000 does .*: scheduler, dataset, progress\. .* --weights-only -- ",
    ):
        trainer.train()
    trainer.close()
    assert plain(trainer.model.state_dict()) == before != plain(net.state_dict())
    assert not messages(tmp_path, "tune")


class InParts(Trainer):
    """Its model is in two components, neither of which is called so, and a copy in a third."""

    def get_state_components(self) -> list[StateComponent]:
        _, *others = super().get_state_components()
        parts = {"first": self.model.first, "second": self.model.second, "copy": model()}
        own = [StateComponent(key, part, SharingPattern.GLOBAL) for key, part in parts.items()]
        return [*own, *others]


class Nameless(Trainer):
    """Nothing says which component is the model."""

    def get_state_components(self) -> list[StateComponent]:
        one, *others = super().get_state_components()
        state, pattern = one.stateful.state_dict, SharingPattern.GLOBAL
        return [StateComponent("net", None, pattern, get_state=state, set_state=print), *others]


def test_the_model_is_the_component_of_that_name_or_those_of_its_modules(tmp_path, say) -> None:
    net = model()
    parts = {"first": net.first, "second": net.second}
    torch.nn.init.ones_(net.first.weight)
    with CheckpointCoordinator(
        [StateComponent(key, part, SharingPattern.GLOBAL) for key, part in parts.items()],
        output_dir=tmp_path,
    ) as coordinator:
        coordinator.save_checkpoint(step=3)
    say(fork_of(open_repository(tmp_path), "main@3", resets=(Reset.WEIGHTS_ONLY,)))
    settings = arguments(tmp_path, max_steps=1, learning_rate=0.0)

    trainer = InParts(model(), settings, Noisy(13))
    trainer.train()
    trainer.close()
    assert torch.equal(trainer.model.first.weight, net.first.weight)

    nameless = Nameless(model(), settings, Noisy(13))
    with pytest.raises(ConfigError, match=r"CKPTCOORD_RESET: is weights-only, .*\(net, optimizer"):
        nameless.train()
    nameless.close()


def test_weights_only_takes_a_branch_of_its_own(tmp_path, say) -> None:
    saved(tmp_path)
    say(HandOff(branch="main", resume_ref="main@5", resets=(Reset.WEIGHTS_ONLY,)))
    with pytest.raises(ConfigError, match=r"CKPTCOORD_RESET: .* `?ckptcoord fork main@5"):
        Trainer(model(), arguments(tmp_path, save_strategy="steps"), Noisy(13))


def test_weights_are_not_taken_over_again_in_the_middle_of_the_run(tmp_path, say) -> None:
    """However many steps had been done where they come from."""
    weights(tmp_path)
    say(fork_of(open_repository(tmp_path), "imported@1000", resets=(Reset.WEIGHTS_ONLY,)))
    trainer, _ = run(tmp_path, save_strategy="steps", save_steps=4)
    before = plain(trainer.model.state_dict())
    with pytest.raises(ConfigError, match=r"weights of imported@1000, and its branch is at tune@9"):
        trainer.train()
    trainer.close()
    assert plain(trainer.model.state_dict()) == before


# --- a fork that dies before its first save ------------------------------------------------------


@pytest.mark.parametrize(
    ("resets", "words"),
    [
        ({"resets": (Reset.OPTIMIZER, Reset.SCHEDULER)}, "a new optimizer, a new scheduler"),
        ({"seed": 7}, "seed 7"),
        ({"resets": (Reset.WEIGHTS_ONLY,), "seed": 7}, "weights only, seed 7"),
    ],
)
def test_what_was_begun_anew_outlives_a_kill_before_the_first_save(
    tmp_path, say, resets, words
) -> None:
    """It is resumed later by its branch, and nobody says any more what to begin anew."""
    step = 0 if "weights" in words else 5
    outcomes = []
    for name in ("straight", "killed"):
        folder, settings = tmp_path / name, {"save_strategy": "steps", "save_steps": 100}
        say(HandOff())
        repository = saved(folder)
        if name == "straight":
            say(fork_of(repository, "main@5", **resets))
        else:
            told = fork_of(repository, "main@5", **resets)
            die(str(folder), told.to_environment(), step + 2)
            assert messages(folder, "tune") == {f"tune@{step}": f"fork of main@5: {words}"}
            torch.manual_seed(998)
            say(HandOff(repo=repository.url, branch="tune", resume_ref="tune"))
        trainer, _ = run(folder, **settings)
        outcomes.append(remains(trainer))
    assert outcomes[0] == outcomes[1]


def die(*args: Any) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_train_and_die, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _train_and_die(folder: str, environment: dict[str, str], step: int) -> None:
    os.environ.update(environment)  # noqa: TID251 (as ckptcoord fork does)
    torch.set_num_threads(1)
    torch.manual_seed(997)
    deadly = Spy(at={step: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    settings = arguments(Path(folder), save_strategy="steps", save_steps=100)
    Trainer(model(), settings, Noisy(13), callbacks=[deadly]).train()


def test_a_run_that_saves_nothing_leaves_no_first_checkpoint(tmp_path, say) -> None:
    repository = saved(tmp_path)
    say(fork_of(repository, "main@5", resets=(Reset.OPTIMIZER,)))
    run(tmp_path)
    assert not messages(tmp_path, "tune")


def test_a_reset_on_the_branch_itself_is_not_saved_over_its_step(tmp_path, say) -> None:
    saved(tmp_path)
    say(HandOff(branch="main", resume_ref="main@5", resets=(Reset.OPTIMIZER,)))
    _, spy = run(tmp_path, spy=AtStart(), save_strategy="steps", save_steps=7)
    assert (spy.found["moments"], spy.saved) == (0, ["checkpoint-7", "checkpoint-9"])


# --- all kinds of trainers -----------------------------------------------------------------------


class Classes:
    """Points, each with its class."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.linspace(0, 1, 8) * index, torch.tensor(index % 4)


def layered(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class _Classifies(BaseTrainer):
    def compute_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


class _InTensors(_Classifies, HybridTrainer):
    def parallelize(self, model: nn.Module, mesh: Any) -> None:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class _Ddp(_Classifies, DDPTrainer): ...


class _Fsdp(_Classifies, FSDPTrainer): ...


class _Pipeline(_Classifies, PipelineTrainer): ...


class _Accel(_Classifies, AccelTrainer): ...


KINDS: dict[str, Any] = {
    "ddp": _Ddp,
    "fsdp": _Fsdp,
    "pipeline": _Pipeline,
    "tensors": partial(_InTensors, mesh_shape={"tp": 2}),
    "accelerate": _Accel,
}


class Found(AtStart):
    """What each rank begins with, of a model's tensors those that it has a part of."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {
            "step": state.global_step,
            "moments": len(kwargs["optimizer"].state_dict()["state"]),
            "draws": (random.random(), plain(torch.rand(4))),
            "weights": {
                name: plain(value.full_tensor() if isinstance(value, DTensor) else value)
                for name, value in kwargs["model"].state_dict().items()
            },
        }


def test_trainers_of_all_kinds_fork_weights_that_no_trainer_has_saved(tmp_path) -> None:
    pytest.importorskip("accelerate")
    wanted = layered(1)
    for kind in KINDS:
        with CheckpointCoordinator(
            [StateComponent("model", wanted, SharingPattern.GLOBAL)], output_dir=tmp_path / kind
        ) as coordinator:
            coordinator.save_checkpoint(step=30)

    for found in zip(*run_job(_from_weights, str(tmp_path), size=2), strict=True):
        assert [one["step"] for one in found] == [0, 0]
        assert [one["moments"] for one in found] == [0, 0]
        weights = found[0]["weights"] | found[1]["weights"]
        assert weights == plain(dict(wanted.state_dict()))

    for kind in KINDS:
        assert messages(tmp_path / kind, "tune") == {
            "tune@0": "fork of main@30: weights only, seed 7",
            "tune@2": "step 2",
        }


def test_ranks_that_hold_parts_of_a_tensor_draw_alike_after_a_seed(tmp_path) -> None:
    with CheckpointCoordinator(
        [StateComponent("model", layered(1), SharingPattern.GLOBAL)],
        output_dir=tmp_path / "tensors",
    ) as coordinator:
        coordinator.save_checkpoint(step=30)
    ((one,), (other,)) = run_job(_from_weights, str(tmp_path), "tensors", size=2)
    assert one["draws"] == other["draws"]


def _from_weights(folder: str, *kinds: str) -> Any:
    found = []
    for kind in kinds or KINDS:
        told = HandOff(branch="tune", resume_ref="main@30", resets=(Reset.WEIGHTS_ONLY,), seed=7)
        os.environ.update(told.to_environment())  # noqa: TID251 (as ckptcoord fork does)
        spy = Found()
        settings = arguments(Path(folder) / kind, max_steps=2, save_strategy="steps")
        trainer = KINDS[kind](layered(2), settings, Classes(), callbacks=[spy])
        trainer.train()
        trainer.close()
        found.append(spy.found)
    return found
