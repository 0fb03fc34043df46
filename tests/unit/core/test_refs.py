"""Names and refs: what was written is read back, and what could leave a folder is no name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.refs import (
    MAX_STEP,
    BranchName,
    CheckpointId,
    LatestRef,
    NameRef,
    PathRef,
    StepRef,
    TagName,
    parse_ref,
)
from ckptcoord.errors import InvalidNameError

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda text: ".." not in text and not text.endswith((".lock", ".")) and text != "latest"
)
IDS = st.builds(CheckpointId, NAMES.map(BranchName), st.integers(0, MAX_STEP - 1))
BAD_NAMES = [
    *("", "..", "a..b", ".hidden", "-x", "a/b", "a\\b", "a b", "a\0", "a\n", "é", "a@b", "~", "*"),
    *("x.lock", "x.", "latest", "../x", "/etc", "a" * 101, "x" * 10_000, "a:b", "main\n"),
]


@pytest.mark.parametrize("kind", [BranchName, TagName])
@pytest.mark.parametrize("text", BAD_NAMES, ids=[f"{i}" for i in range(len(BAD_NAMES))])
def test_what_could_leave_a_folder_or_be_misread_is_no_name(kind, text):
    with pytest.raises(InvalidNameError) as caught:
        kind(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [BranchName, TagName])
def test_what_is_no_text_is_no_name(kind):
    with pytest.raises(InvalidNameError):
        kind(7)


@pytest.mark.parametrize("text", ["main", "a", "_x", "1.2", "feat-1_b.c", "a" * 100, "latest2"])
def test_plain_words_are_names(text):
    assert str(BranchName(text)) == str(TagName(text)) == text


@given(IDS)
@settings(max_examples=100)
def test_a_checkpoint_ids_text_and_ref_are_read_back(checkpoint):
    assert CheckpointId.parse(str(checkpoint)) == checkpoint
    assert parse_ref(str(checkpoint)) == StepRef(checkpoint)
    assert parse_ref(checkpoint.ref) == StepRef(checkpoint)


def test_main_is_not_written_in_a_folders_name():
    assert str(CheckpointId(BranchName(), 500)) == "checkpoint-500"
    assert str(CheckpointId(BranchName("exp"), 7)) == "checkpoint-7@exp"
    assert CheckpointId(BranchName(), 500).ref == "main@500"


@given(st.lists(IDS, max_size=8))
@settings(max_examples=50)
def test_ids_are_ordered_by_branch_and_then_by_number(ids):
    assert sorted(ids) == sorted(ids, key=lambda one: (one.branch.value, one.step))


def test_step_10_comes_after_step_9():
    assert CheckpointId(BranchName(), 9) < CheckpointId(BranchName(), 10)


@pytest.mark.parametrize("step", [-1, MAX_STEP, True, 1.0, "1", None])
def test_a_step_is_a_number_from_0(step):
    with pytest.raises(InvalidNameError):
        CheckpointId(BranchName(), step)


@pytest.mark.parametrize(
    "text",
    [
        *("checkpoint-", "checkpoint-01", "checkpoint--1", "checkpoint-1@", "checkpoint-1@a@b"),
        *("checkpoint-1@..", "checkpoint-1@a/b", "checkpoint-1 ", "checkpoint-1\n", "Checkpoint-1"),
        *("checkpoint-1e3", "checkpoint-" + "9" * 17, "checkpoint-" + "9" * 16, "500", ""),
        "checkpoint-٣",
    ],
)
def test_any_other_text_is_no_checkpoint_id(text):
    with pytest.raises(InvalidNameError):
        CheckpointId.parse(text)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("latest", LatestRef()),
        ("exp@latest", LatestRef(BranchName("exp"))),
        ("main@100", StepRef(CheckpointId(BranchName(), 100))),
        ("exp@0", StepRef(CheckpointId(BranchName("exp"), 0))),
        ("checkpoint-5", StepRef(CheckpointId(BranchName(), 5))),
        ("checkpoint-5@exp", StepRef(CheckpointId(BranchName("exp"), 5))),
        ("best", NameRef("best")),
        ("v1.0", NameRef("v1.0")),
        ("checkpoint-x", NameRef("checkpoint-x")),
        ("runs/a", PathRef("runs/a")),
        ("/abs/checkpoint-5", PathRef("/abs/checkpoint-5")),
        ("../x", PathRef("../x")),
        (".", PathRef(".")),
        ("..", PathRef("..")),
    ],
)
def test_a_ref_is_what_it_looks_like(text, ref):
    assert parse_ref(text) == ref


REFS_OF_NOBODY = [
    *("", "x.lock", "main@", "@5", "main@-1", "main@05", "main@5x", "a b@5", "main@" + "9" * 17),
    *("a\0b", "a\nb", "a/\x1b[2J", "x" * 5000, "/" * 4097, "exp@@5", "..@latest", "a..b", 5, None),
]


@pytest.mark.parametrize("text", REFS_OF_NOBODY, ids=[f"{i}" for i in range(len(REFS_OF_NOBODY))])
def test_what_can_be_no_ref_is_refused(text):
    with pytest.raises(InvalidNameError):
        parse_ref(text)


@given(st.text(max_size=20) | st.text("main@latest/.-0123456789", max_size=12))
@settings(max_examples=200)
def test_any_text_is_a_ref_or_an_invalid_name(text):
    try:
        ref = parse_ref(text)
    except InvalidNameError:
        return
    assert isinstance(ref, StepRef | LatestRef | NameRef | PathRef)
    assert isinstance(ref, PathRef) or "/" not in text
