"""A trainer's script goes on where `ckptcoord resume` and `ckptcoord fork` say, unchanged."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Noisy, Spy, arguments, model, plain, remains

from ckptcoord import DDPTrainer, Trainer, open_repository
from ckptcoord.core.context import HandOff, Reset, Variable
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CkptError, ConfigError, NotNewestError, RefNotFoundError
from ckptcoord.plan.commit import branches

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
