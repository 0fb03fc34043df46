"""A fork begins anew what it is told to, which the checkpoint need not have then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.loop import Loop, plain
from tests.unit.engine.test_beginning import Trained, pairs, rates

from ckptcoord import (
    CheckpointCoordinator,
    SharingPattern,
    StateComponent,
    init_workspace,
    open_repository,
)
from ckptcoord.core.context import Anew, HandOff, Reset
from ckptcoord.core.refs import BranchName
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.engine.beginning import Beginning
from ckptcoord.errors import ConfigError, MissingComponentsError, StateMismatchError

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "imported@1000"
ALL = {"reset_optimizer": True, "reset_scheduler": True, "reset_rng_seed": 7}
WAYS: dict[str, dict[str, Any]] = {"weights only": {"weights_only": True}, "all that lacks": ALL}


@pytest.fixture
def weights(tmp_path: Path) -> Any:
    """`imported@1000` holds a model and nothing else, as an import or a merge leaves it."""
    loop = Loop(seed=77)
    loop.step()
    init_workspace(tmp_path)
    with CheckpointCoordinator(
        [StateComponent("model", loop.model, SharingPattern.REPLICATED)],
        output_dir=tmp_path / "run",
        config=CoordinatorConfig(branch="imported"),
    ) as coordinator:
        coordinator.save_checkpoint(step=1000)
    return plain(loop.model.state_dict())


@pytest.fixture
def trained(tmp_path: Path) -> Loop:
    """`main@2`, `main@4` and `main@6` hold everything."""
    loop = Loop()
    with loop.attach(tmp_path) as engine:
        engine.autocommit(2)
        loop.train(engine, 6)
    return loop


def commits(folder: Path) -> dict[str, str]:
    """The message of each."""
    state = open_repository(folder / "run").state()
    return {one.ref: commit.message for one, commit in state.commits.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_alone_is_enough_for_a_fork_that_begins_the_rest_anew(tmp_path, weights, way):
    loop = Loop(seed=9)
    fresh = loop.remains()
    with loop.attach(tmp_path) as engine:
        engine.fork(SOURCE, "tune", **WAYS[way])
        found = loop.remains()
        step = 0 if way == "weights only" else 1000
        assert (engine.current_step, engine.branch) == (step, "tune")
        assert found["model"] == weights
        assert (found["optimizer"], found["scheduler"]) == (fresh["optimizer"], fresh["scheduler"])
        assert (found["draws"] == fresh["draws"]) == (way == "weights only")
        loop.train(engine, step + 1)
        engine.commit(step + 1)
    words = way if way == "weights only" else "a new optimizer, a new scheduler, seed 7"
    left = commits(tmp_path)
    assert left[f"tune@{step}"] == f"fork of {SOURCE}: {words}"
    again = Loop(seed=10)
    with again.attach(tmp_path) as engine:
        assert engine.resume("tune").step == step + 1
    assert again.remains() == loop.remains()


def test_with_weights_only_everything_else_stays_though_it_is_there(tmp_path, trained):
    loop, loaded = Loop(seed=9, lr=0.5), []
    fresh = loop.remains()
    with loop.attach(tmp_path) as engine:
        engine.register_state("early", lambda: 1, loaded.append, required=False)
        engine.fork("main@4", "tune", weights_only=True)
        engine.register_state("late", lambda: 1, loaded.append, required=False)
        assert loop.remains() | {"model": 0} == fresh | {"model": 0}
        assert loop.remains()["model"] != fresh["model"]
        assert not loaded


def test_what_is_registered_after_a_fork_of_the_weights_is_not_loaded_from_step_0(tmp_path):
    first, loaded = Loop(), []
    with first.attach(tmp_path) as engine:
        engine.register_state("data", lambda: 5, loaded.append)
        engine.commit(0)
    with Loop(seed=9).attach(tmp_path) as engine:
        engine.fork("main@0", "tune", weights_only=True)
        engine.register_state("data", lambda: 6, loaded.append)
        assert not loaded


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ({}, "optimizer, scheduler, rng"),
        ({"reset_optimizer": True}, "scheduler, rng"),
        ({"reset_optimizer": True, "reset_rng_seed": 3}, "scheduler"),
    ],
)
def test_what_is_missing_is_named_with_the_ways_out_and_nothing_changes(
    tmp_path, weights, asked, missing
):
    ways = "--reset-optimizer --reset-scheduler --seed N"  # also those that were taken
    loop = Loop(seed=9)
    before = loop.remains()
    with loop.attach(tmp_path) as engine:
        with pytest.raises(MissingComponentsError) as caught:
            engine.fork(SOURCE, "tune", **asked)
        assert caught.value.what == f"{SOURCE} does not have what this run goes on with: {missing}"
        assert f"`ckptcoord fork {SOURCE} NEW_BRANCH --weights-only -- " in caught.value.help
        assert f"`ckptcoord fork {SOURCE} NEW_BRANCH {ways} -- COMMAND`" in caught.value.help
        assert "weights_only=True" in caught.value.__notes__[0]
        with pytest.raises(StateMismatchError, match="--weights-only"):
            engine.resume(SOURCE)
        assert (engine.branch, engine.current_step) == ("main", 0)
    assert loop.remains() == before
    assert set(commits(tmp_path)) == {SOURCE}
    assert not open_repository(tmp_path / "run").state().forks


def test_other_state_that_is_missing_can_only_be_left_with_weights_only(tmp_path, weights):
    loop = Loop(seed=9)
    with loop.attach(tmp_path) as engine:
        engine.register_state("data", dict, lambda _: None)
        with pytest.raises(MissingComponentsError, match=r"goes on with: data\. .* --weights-only"):
            engine.fork(SOURCE, "tune", **ALL)
        engine.fork(SOURCE, "tune", weights_only=True)


def test_a_checkpoint_without_a_model_does_not_offer_its_weights(tmp_path):
    loop = Loop(seed=9)
    with CheckpointCoordinator(
        [StateComponent("optim", [1], SharingPattern.REPLICATED)], output_dir=tmp_path / "run"
    ) as coordinator:
        coordinator.save_checkpoint(step=1)
    with loop.attach(tmp_path) as engine:
        for asked in ({"weights_only": True}, {}):
            with pytest.raises(MissingComponentsError, match="model") as caught:
                engine.fork("main@1", "tune", **asked)
            assert "--weights-only" not in caught.value.help


def test_an_optimizer_of_another_kind_can_begin_anew(tmp_path, trained):
    loop = Loop(seed=9)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 0.3, momentum=0.9)
    loop.scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.9)
    with loop.attach(tmp_path) as engine:
        engine.fork("main@4", "sgd", reset_optimizer=True)
    (group,) = loop.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.02 * 0.9**4)  # of the schedule that goes on
    assert (group["momentum"], len(loop.optimizer.state)) == (0.9, 0)


@given(pair=st.sampled_from(pairs()), before=st.integers(1, 4), after=st.integers(1, 4))
@settings(max_examples=60)
def test_rates_go_on_where_the_optimizer_is_not_loaded(pair, before, after):
    """As they do in the run that was not forked, though only the schedule is taken over."""
    one, same = Trained(*pair), Trained(*pair)
    beginning, anew = Beginning(one.optimizer, one.scheduler), Anew(resets=(Reset.OPTIMIZER,))
    same.train(before)
    if one.scheduler is not None:
        one.scheduler.load_state_dict(same.scheduler.state_dict())
    if beginning.takes_over("optimizer", anew):
        one.optimizer.load_state_dict(same.optimizer.state_dict())
        assert pair[1] == "one cycle"  # which keeps its bounds in the groups alone
    beginning.begin(anew, rank=0)
    for _ in range(after):
        assert one.scheduler is None or rates(one) == rates(same)
        one.train(1)
        same.train(1)


def test_a_schedule_that_does_not_tell_its_rate_goes_on_with_the_saved_one(tmp_path):
    class Halving:
        """Anything with a state may be a scheduler."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.param_groups[0]["lr"] /= 2

        def get_last_lr(self):
            return [self.optimizer.param_groups[0]["lr"]]

        def state_dict(self):
            return {"kind": "halving"}

        def load_state_dict(self, state):
            assert state == self.state_dict()

    for seed in (3, 9):
        loop = Loop(seed=seed, lr=0.5)
        loop.scheduler = Halving(loop.optimizer)
        with loop.attach(tmp_path) as engine:
            if seed == 3:
                loop.train(engine, 2)
                engine.commit(2)
            else:
                engine.fork("main@2", "exp", reset_optimizer=True)
    assert loop.optimizer.param_groups[0]["lr"] == 0.125
    assert not loop.optimizer.state


# --- what the environment asks for ---------------------------------------------------------------


@pytest.fixture
def hand(monkeypatch, tmp_path):
    """What `ckptcoord fork SOURCE tune` does and says."""

    def hand(source: str, branch: str = "tune", **said: Any) -> None:
        repository = open_repository(tmp_path / "run")
        number = repository.state().number
        if branch == "tune":
            source_id = repository.resolve(source).checkpoint_id
            repository.fork(BranchName(branch), source_id, writer="f" * 32)
        told = HandOff(branch=branch, resume_ref=source, resume_since=number, **said)
        for name, value in told.to_environment().items():
            monkeypatch.setenv(name, value)

    return hand


@pytest.mark.parametrize("resets", [(Reset.WEIGHTS_ONLY,), (Reset.OPTIMIZER, Reset.SCHEDULER)])
def test_a_script_forks_a_model_alone_and_is_restarted(tmp_path, weights, hand, resets):
    hand(SOURCE, resets=resets, seed=7)
    begins = 0 if Reset.WEIGHTS_ONLY in resets else 1000
    left = []
    for seed, until in ((9, begins + 3), (10, begins + 4)):
        loop = Loop(seed=seed)
        with loop.attach(tmp_path) as engine:
            assert engine.current_step == (begins if seed == 9 else begins + 2)
            engine.resume_latest()  # as scripts do
            left.append(engine.current_step)
            engine.autocommit(2)
            if seed == 9:
                assert loop.remains()["model"] == weights
            loop.train(engine, until)
    assert left == [begins, begins + 2]
    assert set(commits(tmp_path)) == {SOURCE, *(f"tune@{begins + n}" for n in (0, 2, 4))}


def test_weights_only_takes_a_branch_of_its_own(tmp_path, trained, hand):
    hand("main@6", "main", resets=(Reset.WEIGHTS_ONLY,))
    loop = Loop(seed=9)
    before = loop.remains()
    with pytest.raises(ConfigError, match=r"CKPTCOORD_RESET: .* ckptcoord fork main@6 NEW_BRANCH"):
        loop.attach(tmp_path)
    assert loop.remains() == before


def test_a_reset_on_the_branch_itself_is_not_committed_over_its_step(tmp_path, trained, hand):
    hand("main@6", "main", resets=(Reset.OPTIMIZER,))
    loop = Loop(seed=9)
    with loop.attach(tmp_path) as engine:
        engine.resume_latest()
        assert not loop.optimizer.state
        assert engine.commit(7) == "main@7"


def test_what_the_environment_does_not_begin_anew_must_be_there(tmp_path, weights, hand):
    hand(SOURCE, resets=(Reset.OPTIMIZER,), seed=1)
    with pytest.raises(MissingComponentsError, match=r"goes on with: scheduler\. "):
        Loop(seed=9).attach(tmp_path)
