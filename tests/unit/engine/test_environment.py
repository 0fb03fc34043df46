"""What `ckptcoord resume` and `ckptcoord fork` hand over, done by attach."""

from __future__ import annotations

import pytest
from tests.unit.engine.loop import Loop

from ckptcoord import open_repository
from ckptcoord.core.context import HandOff, Reset
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import ConfigError, NotNewestError, RefNotFoundError, StateMismatchError


@pytest.fixture
def hand(monkeypatch):
    """Sets the environment as the commands do."""

    def hand(**said):
        for name, value in HandOff(**said).to_environment().items():
            monkeypatch.setenv(name, value)

    return hand


@pytest.fixture
def trained(tmp_path):
    loop = Loop()
    with loop.attach(tmp_path) as engine:
        engine.autocommit(every=2)
        loop.train(engine, 6)
    return loop


def number(folder):
    """Of the log's last entry."""
    return open_repository(folder / "run").state().number


def refs(folder):
    return sorted(one.ref for one in open_repository(folder / "run").state().commits)


def test_it_resumes_at_once(trained, tmp_path, hand):
    hand(branch="main", resume_ref="main@6", resume_since=number(tmp_path))
    loop = Loop(seed=9)
    with loop.attach(tmp_path) as engine:
        assert (engine.current_step, engine.branch) == (6, "main")
        assert loop.remains() == trained.remains()
        assert engine.resume_latest().step == 6  # as scripts do
        assert loop.remains() == trained.remains()
        assert engine.commit(7) == "main@7"


def test_a_restarted_run_goes_on_from_its_own_last(trained, tmp_path, hand):
    hand(branch="main", resume_ref="main@6", resume_since=number(tmp_path))
    first = Loop(seed=9)
    with first.attach(tmp_path) as engine:
        first.train(engine, 7)
        engine.commit(8)
    again = Loop(seed=10)
    with again.attach(tmp_path) as engine:
        assert engine.current_step == 8
    assert again.remains() == first.remains()


def test_an_old_step_is_refused(trained, tmp_path, hand):
    hand(branch="main", resume_ref="main@4", resume_since=number(tmp_path))
    loop = Loop(seed=9)
    before = loop.remains()
    with pytest.raises(NotNewestError):
        loop.attach(tmp_path)
    assert loop.remains() == before


def test_how_often_to_commit_comes_from_the_environment_unless_code_says(tmp_path, hand):
    hand(autocommit=3)
    with Loop().attach(tmp_path) as engine:
        assert [engine.maybe_commit(step) for step in (1, 2, 3)] == [None, None, "main@3"]
        engine.autocommit(every=2)
        assert engine.maybe_commit(4) == "main@4"


def fork(folder, hand, **said):
    """As `ckptcoord fork main@4 exp` does."""
    repository = open_repository(folder / "run")
    source = repository.resolve("main@4").checkpoint_id
    repository.fork(BranchName("exp"), source, writer="f" * 32)
    hand(branch="exp", resume_ref="exp@latest", resume_since=number(folder), **said)


def test_a_fork_goes_on_on_its_branch(trained, tmp_path, hand):
    fork(tmp_path, hand)
    loop = Loop(seed=9)
    with loop.attach(tmp_path) as engine:
        assert (engine.branch, engine.current_step) == ("exp", 4)
        loop.train(engine, 6)
        assert engine.commit(7) == "exp@7"
    assert loop.losses == {step: trained.losses[step] for step in (5, 6)}


RESETS = {"resets": (Reset.OPTIMIZER, Reset.SCHEDULER), "seed": 7}


@pytest.mark.parametrize("asks", ["resume_latest", "nothing"])
def test_what_a_fork_resets_is_reset_once(tmp_path, hand, asks):
    states = []

    def run(loop, until):
        with loop.attach(tmp_path) as engine:
            engine.register_state("data", lambda: {"n": until}, states.append)
            if asks == "resume_latest":
                engine.resume_latest()
            states.append(loop.remains())
            engine.autocommit(2)
            loop.train(engine, until)
        return loop.remains()

    run(Loop(), 6)
    fork(tmp_path, hand, **RESETS)
    loop = Loop(seed=9, lr=0.5)
    fresh = loop.remains()
    left = run(loop, 6)
    begun = states.pop()
    assert states.pop() == {"n": 6}
    assert begun["optimizer"] == fresh["optimizer"]
    assert begun["scheduler"] == fresh["scheduler"]
    assert begun["model"] != fresh["model"]
    run(Loop(seed=10, lr=0.7), 8)  # the same environment: it is restarted
    assert states[-1] == left
    assert ("exp@4" in refs(tmp_path)) == (asks == "resume_latest")


def test_a_run_that_was_killed_before_its_first_commit_begins_alike(trained, tmp_path, hand):
    fork(tmp_path, hand, **RESETS)
    left = []
    for seed in (9, 10):
        loop = Loop(seed=seed, lr=0.5)
        with loop.attach(tmp_path) as engine:
            loop.train(engine, 6)
        left.append(loop.remains())
    assert left[0] == left[1]


def test_a_scheduler_that_is_not_there_cannot_begin_anew(trained, tmp_path, hand):
    fork(tmp_path, hand, resets=(Reset.SCHEDULER,))
    loop = Loop(seed=9)
    loop.scheduler = None
    with pytest.raises((ConfigError, StateMismatchError), match="none was attached"):
        loop.attach(tmp_path)


def test_bad_values_are_named_with_their_variable(tmp_path, monkeypatch, trained):
    for name, value in {
        "CKPTCOORD_BRANCH": "a/b",
        "CKPTCOORD_RESUME_REF": "main@x",
        "CKPTCOORD_AUTOCOMMIT": "-3",
        "CKPTCOORD_RESET": "everything",
        "CKPTCOORD_SEED": "1e3",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=name):
                Loop().attach(tmp_path)
    monkeypatch.setenv("CKPTCOORD_RESUME_REF", "main@5")
    with pytest.raises(RefNotFoundError, match="main@4"):
        Loop().attach(tmp_path)


def test_a_branch_of_the_code_goes_before_that_of_the_environment(trained, tmp_path, hand):
    hand(branch="exp", autocommit=1)
    with Loop().attach(tmp_path, branch="mine") as engine:
        assert engine.maybe_commit(1) == "mine@1"
