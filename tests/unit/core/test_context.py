"""What a run is told: by whom, in which order, and unharmed through an environment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.core.context import (
    MAX_SEED,
    Anew,
    Asked,
    HandOff,
    Origin,
    Reset,
    Variable,
    choose_settings,
)
from ckptcoord.core.refs import (
    MAX_STEP,
    BranchName,
    CheckpointId,
    RepoName,
    is_checkpoint_folder,
)
from ckptcoord.errors import ConfigError, InvalidNameError

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,20}", fullmatch=True).filter(
    lambda text: text != "latest" and not is_checkpoint_folder(text)
)
# What an environment can hold: no NUL, and nothing that os.environ would not encode.
TEXTS = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=60
)
HAND_OFFS = st.builds(
    HandOff,
    workspace=st.none() | TEXTS,
    repo=st.none() | NAMES | TEXTS.map(lambda text: f"/{text}"),
    branch=st.none() | NAMES,
    resume_ref=st.none() | st.builds("{}@{}".format, NAMES, st.integers(0, 10**9)),
    resume_since=st.none() | st.integers(0, MAX_STEP - 1),
    autocommit=st.none() | st.integers(0, MAX_STEP - 1),
    resets=st.sets(st.sampled_from(list(Reset))).map(
        lambda chosen: tuple(one for one in Reset if one in chosen)
    ),
    seed=st.none() | st.integers(0, MAX_SEED),
)


@given(HAND_OFFS)
def test_what_is_handed_over_is_what_is_heard(told):
    assert HandOff.from_environment(told.to_environment()) == told


@given(HAND_OFFS)
def test_all_variables_are_said_so_that_none_is_left_from_before(told):
    assert set(told.to_environment()) == set(Variable)


def test_an_empty_environment_says_nothing():
    assert HandOff.from_environment({}) == HandOff()
    assert HandOff.from_environment({str(name): "" for name in Variable}) == HandOff()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (Variable.WORKSPACE, "x" * 5000),
        (Variable.REPO, "latest"),
        (Variable.REPO, "checkpoint-5"),
        (Variable.REPO, "a\0/b"),
        (Variable.REPO, ".hidden"),
        (Variable.BRANCH, ".."),
        (Variable.BRANCH, "a/b"),
        (Variable.BRANCH, "a.lock"),
        (Variable.BRANCH, "x" * 10_000),
        (Variable.BRANCH, "a\0b"),
        (Variable.RESUME_REF, "main@latest@5"),
        (Variable.RESUME_REF, "main@-1"),
        (Variable.RESUME_REF, "a\nb"),
        (Variable.RESUME_SINCE, "-1"),
        (Variable.AUTOCOMMIT, "never"),
        (Variable.AUTOCOMMIT, "1.5"),
        (Variable.AUTOCOMMIT, "9" * 5000),
        (Variable.AUTOCOMMIT, "\u0663"),
        (Variable.RESET, "optimizer;scheduler"),
        (Variable.RESET, "weights"),
        (Variable.SEED, str(MAX_SEED + 1)),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_variables_name(name, text):
    with pytest.raises(ConfigError) as caught:
        HandOff.from_environment({str(name): text})
    assert caught.value.field == name
    assert len(str(caught.value)) < 500


def test_words_that_are_allowed():
    told = HandOff.from_environment(
        {"CKPTCOORD_RESET": " scheduler, optimizer", "CKPTCOORD_AUTOCOMMIT": "off"}
    )
    assert told.resets == (Reset.OPTIMIZER, Reset.SCHEDULER)
    assert told.autocommit == 0


SAID = st.none() | NAMES


@given(SAID, SAID, SAID)
def test_the_first_that_says_anything_is_heard(argument, environment, repository):
    chosen = choose_settings(
        Asked(branch=argument), HandOff(branch=environment), branch=repository, autocommit=None
    ).branch
    layers = (
        (Origin.ARGUMENT, argument),
        (Origin.ENVIRONMENT, environment),
        (Origin.REPOSITORY, repository),
        (Origin.DEFAULT, "main"),
    )
    assert (chosen.origin, chosen.value) == next(one for one in layers if one[1] is not None)


def test_0_is_said_and_none_is_not():
    told = HandOff(autocommit=7)
    found = choose_settings(Asked(autocommit=0), told, branch=None, autocommit=9).autocommit
    assert (found.value, found.origin) == (0, Origin.ARGUMENT)


def test_since_belongs_to_the_environments_ref():
    told = HandOff(resume_ref="main@5", resume_since=3)
    nobody = {"branch": None, "autocommit": None}
    assert choose_settings(Asked(), told, **nobody).resume_since == 3
    assert choose_settings(Asked(resume="main@5"), told, **nobody).resume_since is None


@pytest.mark.parametrize(
    "given",
    [{"branch": "a b"}, {"resume": ""}, {"autocommit": -1}, {"autocommit": True}],
)
def test_arguments_that_make_no_sense_are_refused(given):
    with pytest.raises((ConfigError, InvalidNameError)):
        Asked(**given)


def test_a_repositorys_name_is_no_checkpoints():
    assert str(RepoName("gpt4")) == "gpt4"
    for name in ("checkpoint-5", "checkpoint-5@exp", "checkpoint-5.0123abcd", "a/b", "", "..", 5):
        with pytest.raises(InvalidNameError):
            RepoName(name)


# --- what begins anew ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anew", "words", "taken"),
    [
        (Anew(), "", "model optimizer scheduler dataset rng"),
        (Anew(seed=0), "seed 0", "model optimizer scheduler dataset"),
        (Anew(resets=(Reset.OPTIMIZER,)), "a new optimizer", "model scheduler dataset rng"),
        (
            Anew(resets=(Reset.OPTIMIZER, Reset.SCHEDULER), seed=7),
            "a new optimizer, a new scheduler, seed 7",
            "model dataset",
        ),
        (Anew(resets=(Reset.WEIGHTS_ONLY,)), "weights only", "model"),
        (Anew(resets=tuple(Reset), seed=7), "weights only, seed 7", "model"),
    ],
)
def test_what_begins_anew_is_not_taken_over(anew, words, taken):
    parts = ("model", "optimizer", "scheduler", "dataset", "rng")
    assert (str(anew), bool(anew)) == (words, bool(words))
    assert " ".join(filter(anew.takes_over, parts)) == taken


def test_steps_that_begin_at_0_take_a_branch_of_their_own():
    source, anew = CheckpointId(BranchName("main"), 5), Anew(resets=(Reset.WEIGHTS_ONLY,))
    anew.check_branch(source, BranchName("tune"))
    Anew(resets=(Reset.OPTIMIZER,)).check_branch(source, BranchName("main"))
    with pytest.raises(ConfigError, match="ckptcoord fork main@5 NEW_BRANCH --weights-only"):
        anew.check_branch(source, BranchName("main"))
