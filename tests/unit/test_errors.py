"""Errors: each says what, where and what next, and reaches another rank as it was."""

import json

import pytest

from ckptcoord import errors
from ckptcoord.errors import CkptError

EXAMPLES = [
    CkptError(what="it broke", help="mend it", number=1),
    errors.ConfigError(field="save_steps", why="is 0", help="Use 1 or more"),
    errors.InvalidNameError(kind="branch", name="a b", why="has a space"),
    errors.DuplicateComponentError(key="model"),
    errors.UnknownGroupError(component="model", group="tp", known=("dp", "pp")),
    errors.NotInGroupError(component="model", group="tp", rank=3),
    errors.UnsupportedStateError(path="model.x[0]", type_name="function", why="code is not stored"),
    errors.DisagreementError(field="step", values={"5": [0, 1, 3], "6": [2]}),
    errors.ReplicationError(
        component="model", tensor="w", minority=(2,), reference=0, apart="max 1e-3"
    ),
    errors.CheckpointExistsError(checkpoint_id="checkpoint-5"),
    errors.StateMismatchError(
        checkpoint="main@5", missing=("a",), unexpected=tuple("bcdefghijk"), mismatched=()
    ),
    errors.StateMovedError(component="model", tensors=tuple(f"model.{i}" for i in range(12))),
    errors.ThreadLimitError(),
    errors.RepositoryNotFoundError(path="runs/x"),
    errors.WorkspaceNotFoundError(path="runs"),
    errors.OutputDirError(path="runs/x", why="is a file"),
    errors.RefNotFoundError(ref="main@7", nearest=("main@5", "main@9")),
    errors.FencedError(branch="main", writer="w1", holder="w2", epoch=4),
    errors.CommitUnknownError(entry="log/7", why="timed out"),
    errors.NotNewestError(ref="main@5", branch="main", newer=("main@6", "main@7")),
    errors.CommandError(command="torchrun", why="there is no such command"),
    errors.BranchExistsError(branch="exp"),
    errors.CheckpointInUseError(checkpoint_id="checkpoint-5", used_by="the tag 'best'"),
    errors.BaseGoneError(checkpoint_id="checkpoint-6", folder="checkpoint-5"),
    errors.BaseUnreadableError(folder="checkpoint-5", why="is damaged"),
    errors.AttemptSweptError(checkpoint_id="checkpoint-6", attempt="a" * 32),
    errors.TagExistsError(tag="best", target="main@5"),
    errors.TensorNotFoundError(checkpoint="main@5", name="model.w", nearest=("model.v",)),
    errors.CollectiveError(phase="vote", failures={1: "why"}),
    errors.SaveAbortedError(
        phase="vote", failures={2: "disk full", 0: "silent"}, silent=(0,), label="checkpoint-5"
    ),
    errors.LoadAbortedError(phase="check", failures=dict.fromkeys(range(20), "why")),
    errors.SetupAbortedError(phase="start", failures={1: "why"}),
    errors.StoreUnreachableError(phase="vote", host="node0:29500", why="is gone"),
    errors.ClosedError(thing="coordinator"),
    errors.LoginError(where="https://host", why="no answer"),
    errors.TokenRefusedError(url="https://host", status=401),
    errors.NotLoggedInError(),
    errors.NotMergeableError(problems=("model.w: I64 differs",) * 9),
    errors.StorageError(operation="fsync", path="a/b", why="I/O error", errno=5),
    errors.StorageFullError(operation="write", path="a/b", why="no space", errno=28),
    errors.UnsafePathError(path="../x", why="it leaves the repository"),
    errors.CorruptError(path="a/b", why="is damaged"),
    errors.DigestMismatchError(
        path="a.safetensors", tensor="w", expected="blake3:" + "a" * 64, found="blake3:" + "b" * 64
    ),
    errors.MissingComponentsError(ref="main@9", components=("optimizer",), anew=("rng",)),
    errors.MissingFileError(path="a/b"),
    errors.ManifestError(path="m.json", why="holds NaN"),
    errors.FormatVersionError(path="m.json", found=9, supported=1),
    errors.FormatError(path="old.pt", why="needs argparse.Namespace", help="Save it again"),
]
BY_NAME = {type(error).__name__: error for error in EXAMPLES}
ALL = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, CkptError) and cls.__module__ == errors.__name__
]


def crossed(error):
    return CkptError.from_document(json.loads(json.dumps(error.to_document())))


def plain(value):
    """As JSON has it."""
    return json.loads(json.dumps(value))


def test_every_error_has_an_example_here():
    assert {cls.__name__ for cls in ALL} == set(BY_NAME)


@pytest.mark.parametrize("error", EXAMPLES, ids=BY_NAME.keys())
def test_an_error_reaches_another_rank_as_it_was(error):
    found = crossed(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert (found.what, found.help) == (error.what, error.help)
    assert plain(found.facts) == plain(error.facts)
    assert crossed(found).to_document() == found.to_document()


@pytest.mark.parametrize("error", EXAMPLES, ids=BY_NAME.keys())
def test_an_errors_facts_are_its_attributes_here_and_there(error):
    for name, value in error.facts.items():
        if type(error) is not CkptError:
            assert plain(getattr(error, name)) == plain(value)
        assert plain(getattr(crossed(error), name)) == plain(value)


@pytest.mark.parametrize("error", EXAMPLES, ids=BY_NAME.keys())
def test_an_error_says_what_and_what_next_in_one_line(error):
    text = str(error)
    assert text.startswith(error.what)
    assert error.help in text
    assert "\n" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("error", EXAMPLES, ids=BY_NAME.keys())
def test_an_error_can_be_caught_by_kind_and_never_escapes_except_exception(error):
    assert isinstance(error, Exception)
    with pytest.raises(CkptError):
        raise error


def test_failures_are_asked_for_by_rank_on_every_rank():
    error = BY_NAME["SaveAbortedError"]
    assert crossed(error).failures == error.failures == {2: "disk full", 0: "silent"}
    assert crossed(error).silent == error.silent == (0,)


def test_codes_tell_errors_apart():
    codes = {}
    for cls in ALL:
        codes.setdefault(cls.code, []).append(cls)
    for code, classes in codes.items():
        bases = [cls for cls in classes if all(issubclass(other, cls) for other in classes)]
        assert bases, f"{code} stands for {classes}"


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        *(("ConfigError", 2), ("InvalidNameError", 2), ("RepositoryNotFoundError", 10)),
        *(("FencedError", 11), ("RefNotFoundError", 12), ("CorruptError", 13)),
        *(("DigestMismatchError", 13), ("ManifestError", 13), ("StorageFullError", 14)),
        *(("SaveAbortedError", 1), ("CkptError", 1)),
    ],
)
def test_the_cli_exits_with_what_users_know(name, exit_code):
    assert BY_NAME[name].exit_code == exit_code


def test_an_unknown_error_of_a_newer_rank_is_still_one():
    document = {"type": "NewerError", "what": "new", "help": "", "facts": {"rank": 3}}
    found = CkptError.from_document(document)
    assert type(found) is CkptError
    assert (str(found), found.rank) == ("new", 3)


def test_a_document_without_facts_is_still_an_error():
    found = CkptError.from_document({"type": "ClosedError", "what": "closed", "facts": None})
    assert type(found) is errors.ClosedError
    assert (found.what, found.help, found.facts) == ("closed", "", {})
    found = CkptError.from_document({"type": "SaveAbortedError", "what": "aborted"})
    assert (found.failures, found.silent) == ({}, ())


def test_a_name_of_ten_thousand_letters_does_not_fill_the_screen():
    assert len(str(errors.InvalidNameError(kind="ref", name="x" * 10_000, why="is long"))) < 200


def test_ranks_are_written_as_runs():
    text = str(errors.DisagreementError(field="step", values={"5": [5, 0, 1, 2], "6": [3]}))
    assert "5 on ranks 0-2,5; 6 on ranks 3" in text


def test_many_failures_are_cut_and_counted():
    text = str(BY_NAME["LoadAbortedError"])
    assert "rank 7: why" in text
    assert "rank 8" not in text
    assert "12 ranks more" in text


def test_many_names_are_cut_and_counted():
    text = str(BY_NAME["StateMismatchError"])
    assert "missing 1 (a); unexpected 10 (b, c, d, e, f, g, h, i, …)" in text
    assert "mismatched" not in text
