"""Attach, commit, resume, fork: in one process."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from tests.unit.engine.loop import Loop

import ckptcoord
from ckptcoord import CheckpointEngine, CoordinatorConfig, EngineConfig, open_repository
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import (
    BranchExistsError,
    CheckpointExistsError,
    CheckpointInUseError,
    CkptError,
    ClosedError,
    ConfigError,
    DuplicateComponentError,
    InvalidNameError,
    NotNewestError,
    RefNotFoundError,
    RepositoryNotFoundError,
    StateMismatchError,
)
from ckptcoord.plan.commit import branches


@pytest.fixture
def trained(tmp_path):
    """Six steps of a run, committed at every second."""
    loop = Loop()
    with loop.attach(tmp_path) as engine:
        engine.autocommit(every=2)
        loop.train(engine, 6)
    return loop


def refs(folder):
    repository = open_repository(folder / "run")
    return sorted(one.ref for one in repository.state().commits)


# --- commits -------------------------------------------------------------------------------------


def test_it_commits_at_every_multiple_and_says_where(trained, tmp_path):
    assert trained.refs == [None, "main@2", None, "main@4", None, "main@6"]
    assert refs(tmp_path) == ["main@2", "main@4", "main@6"]


def test_properties_say_where_it_is(tmp_path):
    with Loop().attach(tmp_path / "w") as engine:
        assert (engine.current_step, engine.branch, engine.repo_name) == (0, "main", "run")
        assert engine.workspace_path == tmp_path / "w"
        assert engine.repo_path == tmp_path / "w" / "run"
        assert engine.maybe_commit(7) is None  # nobody said how often
        assert engine.current_step == 7
        assert engine.commit(8, "by hand", metrics={"loss": 0.5}) == "main@8"
        engine.wait()
        commit = open_repository(engine.repo_path).resolve("main@8")
        assert (commit.message, dict(commit.metrics)) == ("by hand", {"loss": 0.5})


def test_steps_of_numpy_and_torch_are_numbers_too(tmp_path):
    with Loop().attach(tmp_path) as engine:
        assert engine.commit(np.int64(3)) == "main@3"
        assert engine.commit(torch.tensor(4)) == "main@4"
        assert type(engine.current_step) is int


@pytest.mark.parametrize("step", [True, 1.0, "7", None, torch.ones(2)])
def test_what_is_no_step_is_refused(tmp_path, step):
    with Loop().attach(tmp_path) as engine:
        with pytest.raises((ConfigError, TypeError)):
            engine.commit(step)
        with pytest.raises(InvalidNameError):
            engine.commit(-1)
        with pytest.raises(InvalidNameError):
            engine.commit(10**15)


def test_steps_go_up(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        engine.resume_latest()
        with pytest.raises(CheckpointExistsError):
            engine.commit(6)
        with pytest.raises(ConfigError, match="main@6 is committed already: steps go up"):
            engine.commit(5)
        assert engine.commit(7) == "main@7"
        with pytest.raises(CheckpointExistsError):
            engine.commit(7)


def test_a_run_that_does_not_go_on_from_the_branch_cannot_commit_to_it(trained, tmp_path):
    with Loop().attach(tmp_path) as engine:
        with pytest.raises(ConfigError, match="'main' is at main@6, and this run does not"):
            engine.commit(100)
        assert engine.maybe_commit(1) is None
        engine.autocommit(every=50)
        with pytest.raises(ConfigError, match="main@6"):  # at once, not after 50 steps
            engine.maybe_commit(1)
    with Loop().attach(tmp_path, branch="other") as engine:
        assert engine.commit(1) == "other@1"


class Fickle:
    """State that cannot be saved until it can."""

    def __init__(self, engine):
        self.state = object()
        engine.register_state("fickle", lambda: self.state, lambda _: None)


def test_a_failed_commit_is_raised_by_a_later_call_and_can_be_made_again(tmp_path):
    engine = Loop().attach(tmp_path)
    fickle = Fickle(engine)
    engine.commit(1)
    with pytest.raises(CkptError, match="fickle"):
        engine.wait()
    fickle.state = 5
    assert engine.commit(1) == "main@1"
    with pytest.raises(CheckpointExistsError):
        engine.commit(1)
    engine.close()
    assert refs(tmp_path) == ["main@1"]


def test_a_failed_commit_may_be_raised_by_the_next(tmp_path):
    engine = Loop().attach(tmp_path)
    fickle = Fickle(engine)
    step = 1
    with pytest.raises(CkptError, match="fickle"):  # noqa: PT012 (which one, is chance)
        while step < 1000:
            engine.commit(step)
            step += 1
    fickle.state = 5
    with contextlib.suppress(CkptError):
        engine.wait()
    assert engine.commit(1) == "main@1"
    engine.close()
    assert refs(tmp_path) == ["main@1"]


def fail(folder, *, on):
    with Loop().attach(folder) as engine:
        Fickle(engine)
        engine.commit(1)
        if on == "both":
            raise ZeroDivisionError


def test_an_error_in_the_block_comes_before_that_of_a_commit(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        fail(tmp_path, on="both")
    assert "A commit failed, too" in caught.value.__notes__[0]
    with pytest.raises(CkptError, match="fickle"):
        fail(tmp_path, on="commit")


def test_a_closed_engine_says_so(tmp_path):
    engine = Loop().attach(tmp_path)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.commit(1),
        lambda: engine.maybe_commit(1),
        lambda: engine.resume("main"),
        lambda: engine.fork("main", "x"),
        lambda: engine.register_state("a", dict, dict),
        engine.resume_latest,
        engine.wait,
    ):
        with pytest.raises(ClosedError):
            call()


def test_autocommit_can_be_switched_off(tmp_path):
    with Loop().attach(tmp_path) as engine:
        engine.autocommit(1)
        assert engine.maybe_commit(1) == "main@1"
        engine.autocommit(None)
        assert engine.maybe_commit(2) is None
        for bad in (-1, 1.5, True, "3", 10**15):
            with pytest.raises(ConfigError, match="autocommit"):
                engine.autocommit(bad)


# --- resume --------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(trained, tmp_path):
    straight = trained
    resumed = Loop(seed=99)  # other weights, and other draws
    with resumed.attach(tmp_path) as engine:
        report = engine.resume("main@6")
        assert (report.step, engine.current_step, engine.branch) == (6, 6, "main")
        assert resumed.remains() == straight.remains()
    again = Loop(seed=98)
    with again.attach(tmp_path) as engine:
        engine.fork("main@4", "again")
        again.train(engine, 6)
    assert again.losses == {step: straight.losses[step] for step in (5, 6)}
    assert again.remains() == straight.remains()


def test_there_may_be_nothing_to_resume(tmp_path):
    loop = Loop()
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        assert engine.resume_latest() is None
        assert loop.remains() == before
        assert engine.commit(1) == "main@1"
        assert engine.resume_latest().step == 1


def test_an_old_step_is_refused_and_nothing_changes(trained, tmp_path):
    loop = Loop(seed=5)
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        with pytest.raises(NotNewestError, match=r"main@4, main@6 come after it") as caught:
            engine.resume("main@2")
        assert "rewind" in caught.value.help
        assert "fork(" in caught.value.__notes__[0]
    assert loop.remains() == before
    assert refs(tmp_path) == ["main@2", "main@4", "main@6"]


def test_rewinding_drops_what_came_after(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        assert engine.resume("main@2", rewind=True).step == 2
        assert refs(tmp_path) == ["main@2"]
        assert open_repository(tmp_path / "run").state().retired  # until gc
        trained.train(engine, 3)
        assert engine.commit(4) == "main@4"
    assert refs(tmp_path) == ["main@2", "main@4"]


def test_rewinding_past_a_tag_changes_nothing(trained, tmp_path):
    with ckptcoord.CheckpointCoordinator([], output_dir=tmp_path / "run") as coordinator:
        coordinator.set_best_checkpoint("main@4")
    loop = Loop(seed=5)
    before = loop.remains()
    with loop.attach(tmp_path) as engine, pytest.raises(CheckpointInUseError, match="best"):
        engine.resume("main@2", rewind=True)
    assert loop.remains() == before
    assert len(refs(tmp_path)) == 3


def test_a_branch_that_nobody_named_follows_the_ref(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        engine.fork("main@2", "exp")
        assert engine.commit(3) == "exp@3"
    with trained.attach(tmp_path) as engine:
        engine.resume("exp")
        assert (engine.branch, engine.current_step) == ("exp", 3)
        assert engine.commit(4) == "exp@4"
        assert engine.resume_latest().step == 4
    with trained.attach(tmp_path) as engine:
        engine.resume("latest")
        assert engine.branch == "exp"


def test_a_branch_that_was_named_stays(trained, tmp_path):
    with trained.attach(tmp_path, branch="exp") as engine:
        engine.resume("main@4")  # it is not there yet: it begins there
        assert (engine.branch, engine.current_step) == ("exp", 4)
        engine.commit(5)
    state = open_repository(tmp_path / "run").state()
    assert state.forks[BranchName("exp")].source.ref == "main@4"
    assert open_repository(tmp_path / "run").resolve("exp@5").parent.ref == "main@4"
    with trained.attach(tmp_path, branch="exp") as engine:
        with pytest.raises(ConfigError, match="main@6 is not on branch exp"):
            engine.resume("main@6")
        assert engine.resume_latest().step == 5


def test_a_forked_branch_without_checkpoints_resumes_where_it_begins(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        engine.fork("main@2", "exp")
    with trained.attach(tmp_path, branch="exp") as engine:
        assert engine.resume_latest().step == 2
        assert engine.branch == "exp"
        assert engine.commit(3) == "exp@3"


def test_a_folder_is_a_ref(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        assert engine.resume(tmp_path / "run" / "checkpoint-6").step == 6
        assert engine.resume(f"{tmp_path}/run/checkpoint-6").step == 6


@pytest.mark.parametrize(
    "ref",
    ["", "..", "a/b", "no\0pe", "x" * 10_000, "main@", "main.lock", "main@7", "/", "nope", "-x", 5],
)
def test_refs_that_lead_nowhere_change_nothing(trained, tmp_path, ref):
    loop = Loop(seed=5)
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        for call in (
            lambda: engine.resume(ref),
            lambda: engine.fork(ref, "new"),
        ):
            with pytest.raises((RefNotFoundError, InvalidNameError)) as caught:
                call()
            assert len(str(caught.value)) < 1000
        assert branches(open_repository(engine.repo_path).state()) == (BranchName("main"),)
        assert engine.resume_latest().step == 6  # and it goes on
    assert loop.remains() != before


def test_a_checkpoint_that_does_not_fit_changes_nothing(trained, tmp_path):
    model = torch.nn.Linear(3, 3)
    before = model.weight.tolist()
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointEngine.attach(model, optimizer, workspace=tmp_path, repo="run") as engine:
        for call in (lambda: engine.resume("main@6"), lambda: engine.fork("main@4", "exp")):
            with pytest.raises(StateMismatchError):
                call()
        assert engine.branch == "main"
    assert model.weight.tolist() == before
    assert branches(open_repository(tmp_path / "run").state()) == (BranchName("main"),)


def test_without_strict_it_takes_what_fits(trained, tmp_path):
    model = torch.nn.Sequential()
    model.first = torch.nn.Linear(6, 12)
    model.other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.first.parameters())
    with CheckpointEngine.attach(model, optimizer, workspace=tmp_path, repo="run") as engine:
        report = engine.resume("main", strict=False)
    assert any("other.weight" in name for name in report.missing)
    assert model.first.weight.tolist() == trained.model.first.weight.tolist()


# --- forks ---------------------------------------------------------------------------------------


def test_a_fork_switches_the_branch_and_leaves_the_old_one_alone(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        report = engine.fork("main@4", "exp")
        assert (report.step, engine.branch, engine.current_step) == (4, "exp", 4)
        assert refs(tmp_path) == ["main@2", "main@4", "main@6"]  # nothing new to keep
        assert engine.commit(6) == "exp@6"
        assert engine.commit(8) == "exp@8"
    repository = open_repository(tmp_path / "run")
    assert repository.resolve("exp@6").parent.ref == "main@4"
    assert repository.resolve("main@6").parent.ref == "main@4"
    assert repository.resolve("main").checkpoint_id.step == 6


def test_a_branch_that_begins_has_room_for_the_step_it_begins_at(trained, tmp_path):
    with trained.attach(tmp_path) as engine:
        engine.fork("main@4", "exp")
        assert engine.commit(4, "the same again") == "exp@4"
        with pytest.raises(CheckpointExistsError):
            engine.commit(4)
    assert "exp@4" in refs(tmp_path)


def test_what_is_reset_is_as_it_was_when_attached(trained, tmp_path):
    loop = Loop(seed=11, lr=0.5)
    fresh = loop.remains()
    with loop.attach(tmp_path) as engine:
        engine.fork(
            "main@4",
            "exp",
            reset_optimizer=True,
            reset_scheduler=True,
            reset_rng_seed=7,
            message="anew",
        )
        left = loop.remains()
        assert left["optimizer"] == fresh["optimizer"]
        assert left["scheduler"] == fresh["scheduler"]
        assert left["draws"] != fresh["draws"]
        engine.wait()
        assert "exp@4" in refs(tmp_path)
        assert open_repository(engine.repo_path).resolve("exp@4").message == "anew"
        assert engine.maybe_commit(4) is None  # it has that
        loop.train(engine, 6)
    resumed = Loop(seed=12)  # who resumes the branch, goes on from what was reset
    with resumed.attach(tmp_path, branch="exp") as engine:
        assert engine.resume_latest().step == 4
        assert resumed.remains() == left
        resumed.train(engine, 6)
    assert resumed.losses == loop.losses
    twice = Loop(seed=13, lr=0.5)
    with twice.attach(tmp_path) as engine:
        engine.fork("main@4", "exp2", True, True, 7)
        twice.train(engine, 6)
    message = open_repository(tmp_path / "run").resolve("exp2@4").message
    assert message == "fork of main@4: a new optimizer, a new scheduler, seed 7"
    assert twice.losses == loop.losses


def test_what_is_not_reset_goes_on(trained, tmp_path):
    loop = Loop(seed=11, lr=0.5)
    with loop.attach(tmp_path) as engine:
        engine.fork("main@6", "a", reset_scheduler=True)
        assert loop.remains()["optimizer"]["state"] == trained.remains()["optimizer"]["state"]
        assert loop.optimizer.param_groups[0]["lr"] == 0.5
        engine.fork("main@6", "b", reset_optimizer=True)
        assert loop.scheduler.last_epoch == 6
        assert not loop.optimizer.state
        assert loop.remains()["draws"] == trained.remains()["draws"]


def test_a_fork_onto_a_branch_that_exists_is_refused_before_anything_changes(trained, tmp_path):
    loop = Loop(seed=5)
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        with pytest.raises(BranchExistsError):
            engine.fork("main@4", "main", reset_optimizer=True)
        assert engine.branch == "main"
    assert loop.remains() == before


def test_of_two_forks_to_one_name_the_second_changes_nothing(trained, tmp_path, monkeypatch):
    """The log decides, not the look before: here somebody else forks between the two."""
    loop = Loop(seed=5)
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        load = ckptcoord.CheckpointCoordinator.load_checkpoint

        def late(self, *args, **kwargs):
            other = open_repository(tmp_path / "run")
            source = other.resolve("main@2").checkpoint_id
            other.fork(BranchName("exp"), source, writer="f" * 32)
            return load(self, *args, **kwargs)

        monkeypatch.setattr(ckptcoord.CheckpointCoordinator, "load_checkpoint", late)
        with pytest.raises(BranchExistsError):
            engine.fork("main@4", "exp", reset_optimizer=True)
        assert engine.branch == "main"
    assert loop.remains() == before


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "no\0pe", "x" * 10_000, "a@b", "main.lock", "latest", "-x", None, 5]
)
def test_branches_that_cannot_be_are_refused(trained, tmp_path, name):
    with trained.attach(tmp_path) as engine, pytest.raises(InvalidNameError):
        engine.fork("main@4", name)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "7"])
def test_seeds_that_cannot_be_are_refused(trained, tmp_path, seed):
    with trained.attach(tmp_path) as engine:
        with pytest.raises(ConfigError, match="reset_rng_seed"):
            engine.fork("main@4", "exp", reset_rng_seed=seed)
        assert engine.branch == "main"


def test_there_is_no_scheduler_to_begin_anew(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with CheckpointEngine.attach(model, optimizer, workspace=tmp_path, repo="run") as engine:
        engine.commit(1)
        with pytest.raises(ConfigError, match="none was attached"):
            engine.fork("main@1", "exp", reset_scheduler=True)


# --- other state ---------------------------------------------------------------------------------


def test_registered_state_is_saved_and_loaded(tmp_path):
    seen = {"samples": 3, "best": 0.1 + 0.2, "names": ["a", "b"], "weights": torch.arange(4.0)}
    with Loop().attach(tmp_path) as engine:
        engine.register_state("data", lambda: seen, lambda _: None)
        engine.commit(1)
    found: list = []
    with Loop().attach(tmp_path) as engine:
        engine.register_state("data", lambda: seen | {"samples": 0}, found.append)
        engine.resume_latest()
    assert found[0]["samples"] == 3
    assert found[0]["best"] == 0.1 + 0.2
    assert found[0]["weights"].tolist() == [0, 1, 2, 3]


def test_state_that_is_registered_after_a_resume_is_loaded_then(tmp_path):
    with Loop().attach(tmp_path) as engine:
        engine.register_state("data", lambda: {"at": 7}, lambda _: None)
        engine.commit(1)
    loop, found = Loop(), []
    with loop.attach(tmp_path) as engine:
        engine.resume_latest()
        draws = loop.remains()["draws"]
        engine.register_state("other", lambda: {"at": 1}, found.append)  # it has none of that
        assert found == []
        engine.register_state("data", lambda: {"at": 0}, found.append)
        assert found == [{"at": 7}]
        assert loop.remains()["draws"] == draws
        engine.maybe_commit(2)
        engine.commit(3)
    assert set(
        open_repository(tmp_path / "run")
        .manifest(open_repository(tmp_path / "run").resolve("main@3"))
        .components
    ) == {"model", "optimizer", "scheduler", "rng", "data", "other"}


def test_state_that_is_registered_later_in_training_is_not_put_back(tmp_path):
    with Loop().attach(tmp_path) as engine:
        engine.register_state("data", lambda: {"at": 7}, lambda _: None)
        engine.commit(1)
    found: list = []
    with Loop().attach(tmp_path) as engine:
        engine.resume_latest()
        engine.maybe_commit(2)
        engine.register_state("data", lambda: {"at": 0}, found.append)
    assert found == []


@pytest.mark.parametrize("name", ["model", "Optimizer", "rng", "scheduler"])
def test_names_that_are_taken_are_refused(tmp_path, name):
    with Loop().attach(tmp_path) as engine, pytest.raises(DuplicateComponentError):
        engine.register_state(name, dict, lambda _: None)


@pytest.mark.parametrize("name", ["", "..", "a/b", "no\0pe", "x" * 10_000, "-x", None])
def test_names_that_cannot_be_files_are_refused(tmp_path, name):
    with Loop().attach(tmp_path) as engine, pytest.raises(InvalidNameError):
        engine.register_state(name, dict, lambda _: None)


def test_getters_and_setters_are_functions(tmp_path):
    with Loop().attach(tmp_path) as engine:
        with pytest.raises(ConfigError, match="getter"):
            engine.register_state("data", {}, lambda _: None)
        with pytest.raises(ConfigError, match="setter"):
            engine.register_state("data", dict, None)


# --- attaching -----------------------------------------------------------------------------------


def test_nobody_names_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop = Loop()
    with pytest.raises(RepositoryNotFoundError):
        CheckpointEngine.attach(loop.model, loop.optimizer)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "no\0pe", "x" * 10_000, "run.lock", "-x", "a@b"]
)
def test_repositories_that_cannot_be_are_refused(tmp_path, name):
    loop = Loop()
    for places in ({"workspace": tmp_path / "w", "repo": name}, {"workspace": f"{name}\0"}):
        with pytest.raises(CkptError) as caught:
            CheckpointEngine.attach(loop.model, loop.optimizer, **places)
        assert len(str(caught.value)) < 6000
    assert not (tmp_path / "w" / "run.lock").exists()
    assert not (tmp_path / "x").exists()


def test_the_settings_may_name_the_places(tmp_path):
    config = EngineConfig(workspace_path=tmp_path, repo_name="other", branch="b")
    loop = Loop()
    with CheckpointEngine.attach(loop.model, loop.optimizer, config=config) as engine:
        assert (engine.repo_path, engine.branch) == (tmp_path / "other", "b")
    with loop.attach(tmp_path, repo_name="other") as engine:
        assert engine.repo_name == "run"  # the argument goes first


def test_a_path_is_a_repository_of_its_own(tmp_path):
    loop = Loop()
    with CheckpointEngine.attach(loop.model, loop.optimizer, repo=tmp_path / "alone") as engine:
        assert engine.workspace_path is None
        assert engine.commit(1) == "main@1"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ((None, "optimizer", None), "model"),
        (("model", None, None), "optimizer"),
        (("model", "optimizer", object()), "scheduler"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(tmp_path, given, field):
    loop = Loop()
    model, optimizer, scheduler = (
        getattr(loop, one) if isinstance(one, str) else one for one in given
    )
    with pytest.raises(ConfigError, match=field):
        CheckpointEngine.attach(model, optimizer, scheduler, workspace=tmp_path, repo="run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_something_else_is_refused(tmp_path):
    loop = Loop()
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ConfigError, match="do not name parameter"):
        CheckpointEngine.attach(loop.model, other, workspace=tmp_path, repo="run")


def test_settings_that_make_no_sense_are_refused():
    for wrong in (
        {"branch": "a/b"},
        {"compression": "most"},
        {"reanchor_interval": 0},
        {"coordinator": {}},
    ):
        with pytest.raises((ConfigError, InvalidNameError)):
            EngineConfig(**wrong)


def test_settings_reach_the_coordinator():
    base = CoordinatorConfig(timeout_s=5, compression="auto", branch="x")
    config = EngineConfig(reanchor_interval=3, coordinator=base)
    made = config.on_branch("exp")
    assert (made.branch, made.timeout_s) == ("exp", 5)
    assert (made.rule.level.value, made.rule.reanchor_interval) == ("auto", 3)
    assert EngineConfig(compression="aggressive").on_branch("m").rule.level.value == "aggressive"
    assert EngineConfig().on_branch("m").rule.level.value == "off"


def test_deltas_come_every_so_often(tmp_path):
    loop = Loop()
    with loop.attach(tmp_path, compression="auto", reanchor_interval=2) as engine:
        engine.autocommit(1)
        loop.train(engine, 4)
    repository = open_repository(tmp_path / "run")
    kinds = [str(repository.manifest(repository.resolve(f"main@{n}")).kind) for n in range(1, 5)]
    assert kinds == ["anchor", "delta", "anchor", "delta"]


def test_a_compiled_models_checkpoint_is_the_plain_models(tmp_path):
    loop = Loop()
    compiled = torch.compile(loop.model, backend="eager")
    with CheckpointEngine.attach(
        compiled, loop.optimizer, loop.scheduler, workspace=tmp_path, repo="run"
    ) as engine:
        engine.commit(1)
    other = Loop(seed=8)
    with other.attach(tmp_path) as engine:
        engine.resume_latest()
    assert other.remains()["model"] == loop.remains()["model"]
