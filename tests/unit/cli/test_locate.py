"""Which repository and which checkpoint the words on the command line mean."""

import os
from pathlib import Path

import pytest


def _ref(answer) -> str:
    assert answer.code == 0, answer.err
    return answer.json["data"]["ref"]


def test_without_words_it_is_the_repository_around_the_current_folder(
    cli, history, monkeypatch
) -> None:
    for folder in (history.root, history.root / "checkpoint-100", history.root / ".ckptcoord/log"):
        monkeypatch.chdir(folder)
        assert _ref(cli("inspect", "--json")) == "exp@300"
        assert cli("log", "--json").json["data"]["repository"] == str(history.root)


def test_one_word_is_the_repository_if_it_is_one(cli, history, monkeypatch) -> None:
    monkeypatch.chdir(history.root.parent)

    assert _ref(cli("inspect", "run", "--json")) == "exp@300"
    assert _ref(cli("inspect", "run/", "--json")) == "exp@300"
    monkeypatch.chdir(history.root)
    assert _ref(cli("inspect", ".", "--json")) == "exp@300"


@pytest.mark.parametrize(
    ("ref", "meant"),
    [
        ("main@100", "main@100"),
        ("latest", "exp@300"),
        ("main@latest", "main@1000"),
        ("main", "main@1000"),
        ("best", "main@200"),
        ("checkpoint-100", "main@100"),
        ("checkpoint-250@exp", "exp@250"),
        ("checkpoint-100/", "main@100"),
        ("./checkpoint-250@exp", "exp@250"),
    ],
)
def test_else_it_is_a_ref(cli, history, monkeypatch, ref, meant) -> None:
    monkeypatch.chdir(history.root)

    assert _ref(cli("inspect", ref, "--json")) == meant


def test_two_words_are_repository_and_ref(cli, history) -> None:
    assert _ref(cli("inspect", history.root, "best", "--json")) == "main@200"


def test_beside_the_option_the_word_is_a_ref(cli, history, monkeypatch) -> None:
    monkeypatch.chdir(history.root.parent)

    assert _ref(cli("inspect", "-C", "run", "best", "--json")) == "main@200"
    assert _ref(cli("inspect", "--repo", "run", "--json")) == "exp@300"


def test_a_checkpoints_folder_is_a_ref_from_anywhere(cli, history, monkeypatch, tmp_path) -> None:
    folder = history.root / "checkpoint-100"
    (tmp_path / "best").symlink_to(folder)
    monkeypatch.chdir("/")

    assert _ref(cli("inspect", folder, "--json")) == "main@100"
    assert _ref(cli("inspect", f"{folder}/", "--json")) == "main@100"
    assert _ref(cli("inspect", history.root, folder, "--json")) == "main@100"
    assert _ref(cli("inspect", tmp_path / "best", "--json")) == "main@100"
    monkeypatch.chdir(folder)
    assert _ref(cli("inspect", ".", "--json")) == "main@100"


def test_a_checkpoint_that_was_saved_again_is_found_by_its_own_folder(cli, build) -> None:
    build.commit(5)
    again = build.commit(5, overwrite=True)

    assert again.path.startswith("checkpoint-5.")
    assert _ref(cli("inspect", build.root / again.path, "--json")) == "main@5"
    replaced = cli("inspect", build.root / "checkpoint-5")
    assert replaced.code == 12
    assert replaced.err.endswith("help: Nearest: main@5\n")


@pytest.mark.parametrize("command", ["log", "inspect", "verify", "ls"])
def test_a_folder_around_no_repository_is_named(cli, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)

    answer = cli(command)

    assert answer.code == 10
    assert answer.err.startswith(f"error[CC020]: no ckptcoord repository at {tmp_path}\nhelp: ")
    assert cli(command, "-C", "absent").code == 10


@pytest.mark.parametrize("words", [["nowhere/run"], ["nowhere/run", "latest"]])
def test_a_path_that_is_no_repository_is_named(cli, tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)

    answer = cli("inspect", *words)

    assert answer.code == 10
    assert "no ckptcoord repository at nowhere/run" in answer.err


@pytest.mark.parametrize(
    "words", [["log", "run", "-C", "run"], ["inspect", "run", "best", "-C", "run"]]
)
def test_a_repository_given_twice_is_a_usage_error(cli, history, monkeypatch, words) -> None:
    monkeypatch.chdir(history.root.parent)

    answer = cli(*words)

    assert answer.code == 2
    assert "REPO: is given twice: 'run', and 'run' by --repo" in answer.err


@pytest.mark.parametrize(
    ("ref", "code", "nearest"),
    [
        ("main@101", 12, "main@100, main@200, main@1000"),
        ("beset", 12, "best"),
        ("checkpoint-999/", 12, "main@100, main@200, main@1000"),
        ("../x", 12, "exp@300"),
        ("elsewhere/checkpoint-100", 12, "main@100, main@200, main@1000"),
        ("x.lock", 2, ""),
        ("main@x", 2, ""),
        ("a" * 10_000, 2, ""),
        ("a/" * 5_000, 2, ""),
        ("\x1b[2J", 2, ""),
        ("nul\0", 2, ""),
    ],
)
def test_a_ref_that_names_nothing(cli, history, monkeypatch, ref, code, nearest) -> None:
    monkeypatch.chdir(history.root)

    answer = cli("inspect", ref)

    assert (answer.code, answer.out) == (code, "")
    assert answer.err.replace("\n", "").isprintable()
    assert len(answer.err) < 500
    assert f"Nearest: {nearest}\n" in answer.err or not nearest


def test_a_folder_that_may_not_be_read_is_no_repository(cli, tmp_path, monkeypatch) -> None:
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)

    assert cli("inspect", "some/where").code == 10


def test_a_current_folder_that_was_deleted_is_no_repository(cli, tmp_path) -> None:
    before = Path.cwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        answer = cli("log")
    finally:
        os.chdir(before)

    assert answer.code == 10


def test_a_folder_that_may_not_be_looked_into_is_said_to_be_closed(cli, history, monkeypatch):
    def closed(path, **_: object):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.stat", closed)
    monkeypatch.setattr("ckptcoord.cli.locate.is_repository", lambda _: False)

    answer = cli("log", "-C", history.root)

    assert answer.code == 1
    assert answer.err.startswith(f"error[CC040]: {history.root}: open failed: Permission denied\n")
