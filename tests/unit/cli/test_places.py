"""`workspace`, `repo`, `status` and `config`: where one is, in words and in JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ckptcoord.plan.commit import STAGING

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    "",
    "..",
    "a/b",
    "/etc",
    "a\0b",
    "x" * 10_000,
    "a.lock",
    "latest",
    "checkpoint-5",
    "\x1b[2J",
]


@pytest.fixture
def space(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with one empty repository; the process stands in it."""
    assert cli("workspace", "init", tmp_path / "space", "-d", "R&D").code == 0
    monkeypatch.chdir(tmp_path / "space")
    assert cli("repo", "init", "a", "-d", "the first").code == 0
    return tmp_path / "space"


# --- workspace and repo --------------------------------------------------------------------------


def test_both_say_where_they_are_and_can_be_said_twice(cli, space) -> None:
    for words, path in ((("workspace", "init", "."), space), (("repo", "init", "a"), space / "a")):
        answer = cli(*words)
        assert (answer.code, answer.out) == (0, f"{path}\n")
        assert "nothing was changed" in answer.err
        answer = cli(*words, "--json")
        assert answer.json["data"] == {"path": str(path), "name": path.name, "created": False}
    assert cli("repo", "init", "b", "--json").json["data"]["created"] is True


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_makes_nothing(cli, space, name) -> None:
    before = sorted(space.rglob("*"))
    answer = cli("repo", "init", name)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[CC003]: repository ")
    assert "\x1b" not in answer.err
    assert len(answer.err) < 400
    assert sorted(space.rglob("*")) == before


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 10_000, "x/" * 3_000, "/proc/none/x"])
def test_a_path_that_is_none_is_no_traceback(cli, space, path) -> None:
    for words in (("workspace", "init"), ("workspace", "status"), ("repo", "list", "--workspace")):
        answer = cli(*words, path)
        assert answer.code in (1, 2, 10)
        assert answer.err.startswith("error[CC")
        assert len(answer.err) < 12_000


def test_a_description_is_one_line(cli, space) -> None:
    answer = cli("repo", "init", "b", "-d", "two\nlines")
    assert (answer.code, answer.err[:33]) == (2, "error[CC002]: description: is lon")
    assert not (space / "b").exists()


def test_without_a_workspace_it_is_said_how_to_make_one(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("repo", "init", "a"), ("repo", "list"), ("workspace", "status")):
        answer = cli(*words)
        assert answer.code == 10
        assert "help: Make one: ckptcoord workspace init PATH" in answer.err


def test_the_environment_names_the_workspace(cli, space, monkeypatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("CKPTCOORD_WORKSPACE", str(space))
    assert cli("repo", "list").out == "a\t0\t0\t-\t-\tthe first\n"
    monkeypatch.setenv("CKPTCOORD_WORKSPACE", str(space / "none"))
    assert cli("repo", "list").code == 10


def test_a_list_says_what_is_in_each(cli, space, history) -> None:
    history.root.rename(space / "run")
    answer = cli("repo", "list", "--json")
    first, second = answer.json["data"]["repositories"]
    assert first["description"] == "the first"
    assert (second["name"], second["checkpoints"], second["latest"]) == ("run", 5, "exp@300")
    lines = cli("workspace", "status").out.splitlines()
    assert lines[0] == f"workspace\t{space}"
    assert [line.split("\t")[0] for line in lines[3:]] == ["a", "run"]


def test_a_damaged_repository_hides_no_other(cli, space, history) -> None:
    history.root.rename(space / "run")
    (space / "run/.ckptcoord/repo.yaml").write_text("format_version: 1\nbrnach: \x1b[2J\n")
    answer = cli("repo", "list")
    assert (answer.code, len(answer.out.splitlines())) == (1, 2)
    assert "run cannot be read: error[CC013]: " in answer.err
    assert "\x1b" not in answer.err + answer.out
    answer = cli("workspace", "status", "--json")
    assert [bool(one["error"]) for one in answer.json["data"]["repositories"]] == [False, True]


def test_a_name_is_enough_in_a_workspace(cli, space, history, monkeypatch) -> None:
    history.root.rename(space / "run")
    monkeypatch.chdir(space / "a")
    assert len(cli("ls", "-C", "run").out.splitlines()) == 5
    assert "no checkpoints yet" in cli("log").err
    answer = cli("log", "-C", "rnu")
    assert (answer.code, "The workspace has: a, run" in answer.err) == (10, True)


def test_a_repository_that_the_environment_names_goes_before_the_one_around(
    cli, space, history, monkeypatch
) -> None:
    monkeypatch.chdir(space / "a")
    monkeypatch.setenv("CKPTCOORD_REPO", str(history.root))
    monkeypatch.setenv("CKPTCOORD_SEED", "no number, and none of a look's business")
    assert len(cli("ls").out.splitlines()) == 5


def test_a_group_alone_shows_its_commands(cli) -> None:
    for group in ("workspace", "repo", "config"):
        answer = cli(group)
        assert (answer.code, answer.err) == (2, "")
        assert "Commands:" in answer.out


# --- status --------------------------------------------------------------------------------------


def test_status_says_where_one_is_and_what_was_saved(cli, history) -> None:
    data = cli("status", history.root, "--json").json["data"]
    assert data["branch"] == "main"
    assert data["head"]["ref"] == "main@1000"
    assert data["latest"]["ref"] == "exp@300"
    exp, main = data["branches"]
    assert (exp["name"], exp["forked_from"], exp["checkpoints"]) == ("exp", "main@200", 2)
    assert (main["claim"]["world_size"], main["claim"]["last_save"]["ref"]) == (2, "main@1000")
    text = cli("status", history.root).out
    assert "claimed by host\\x1b[31m7, 2 ranks, epoch 1, saved main@1000" in text
    assert "\x1b" not in text


def test_status_is_of_the_branch_that_a_run_would_save_to(cli, history, monkeypatch) -> None:
    monkeypatch.setenv("CKPTCOORD_BRANCH", "exp")
    assert "branch\texp (by environment)" in cli("status", history.root).out
    monkeypatch.setenv("CKPTCOORD_BRANCH", "new")
    assert "head\tnone yet" in cli("status", history.root).out
    monkeypatch.setenv("CKPTCOORD_BRANCH", "a/b")
    answer = cli("status", history.root)
    assert (answer.code, "CKPTCOORD_BRANCH" in answer.err) == (2, True)


def test_status_knows_a_writer_that_has_not_saved_yet(cli, history) -> None:
    history.fork("new", 200)
    history.claim("new")
    assert "new: 0 checkpoints; claimed by host" in cli("status", history.root).out
    assert "epoch 1, nothing saved yet" in cli("status", history.root).out


def test_status_shows_what_is_in_staging_and_what_waits_for_gc(cli, history) -> None:
    history.commit(1000, overwrite=True)
    staged = history.root / STAGING / ("a" * 32)
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"x" * 100)
    os.utime(staged, (0, 0))
    text = cli("status", history.root).out
    assert "; 1 retired, " in text
    assert f"staging\t{STAGING}/{'a' * 32}  100 B, changed " in text
    (one,) = cli("status", history.root, "--json").json["data"]["staging"]
    assert (one["size_bytes"], one["changed"][:10]) == (100, "1970-01-01")


def test_status_of_an_empty_repository(cli, space) -> None:
    out = cli("status", "a").out
    assert f"workspace\t{space}\n" in out
    assert "head\tnone yet" in out
    assert "the first" in out


def test_status_outside_of_a_repository_is_the_workspaces(cli, space, monkeypatch) -> None:
    assert cli("status").out == cli("workspace", "status").out
    monkeypatch.chdir(space.parent)
    assert cli("status").code == 10


# --- config --------------------------------------------------------------------------------------


def test_config_shows_who_said_what(cli, space, monkeypatch) -> None:
    text = "format_version: 1\nbranch: filed\nautocommit: 10\nretention: {keep_last: 3}\n"
    (space / "a/.ckptcoord/repo.yaml").write_text(text)
    monkeypatch.chdir(space / "a")
    monkeypatch.setenv("CKPTCOORD_AUTOCOMMIT", "20")
    monkeypatch.setenv("CKPTCOORD_RESET", "optimizer,scheduler")

    lines = cli("config", "show", "--origin").out.splitlines()

    assert lines[:7] == [
        f"workspace\t{space}\tcurrent directory",
        f"repo\t{space}/a\tcurrent directory",
        "branch\tfiled\trepo.yaml",
        "resume_ref\t-\tdefault",
        "autocommit\t20\tenvironment: CKPTCOORD_AUTOCOMMIT",
        "resets\toptimizer,scheduler\tenvironment: CKPTCOORD_RESET",
        "seed\t-\tdefault",
    ]
    assert "retention.keep_last\t3\trepo.yaml" in lines
    assert cli("config", "show").out.splitlines()[2] == "branch\tfiled"


def test_config_names_the_variable_that_the_workspace_comes_from(cli, space, monkeypatch) -> None:
    monkeypatch.setenv("CKPTCOORD_REPO", str(space / "a"))
    lines = cli("config", "show", "--origin").out.splitlines()
    assert lines[:2] == [
        f"workspace\t{space}\tenvironment: CKPTCOORD_REPO",
        f"repo\t{space}/a\tenvironment: CKPTCOORD_REPO",
    ]


@pytest.mark.parametrize(
    ("text", "helps"),
    [("{{{", "Mend the file"), ("autocommit: often", "Mend the file"), ("branhc: x", "Known: ")],
)
def test_a_mistake_in_repo_yaml_is_mended_there(cli, space, text, helps) -> None:
    (space / "a/.ckptcoord/repo.yaml").write_text(f"format_version: 1\n{text}\n")
    answer = cli("config", "show", "-C", space / "a")
    assert answer.code == 13
    assert f"help: {helps}" in answer.err


def test_a_folder_that_can_be_no_workspace_is_no_place_for_checkpoints(cli, tmp_path) -> None:
    (tmp_path / "file").touch()
    answer = cli("workspace", "init", tmp_path / "file")
    assert answer.err.startswith(f"error[CC021]: cannot write to {tmp_path}/file: ")
    assert "help: Choose another folder" in answer.err
    assert "output_dir" not in answer.err


def test_config_is_that_of_a_run_here(cli, space) -> None:
    data = cli("config", "show", "-C", "a", "--json").json["data"]["settings"]
    assert data["repo"] == {
        "value": str(space / "a"),
        "origin": "argument",
        "variable": "CKPTCOORD_REPO",
    }
    assert data["resets"] == {"value": [], "origin": "default", "variable": "CKPTCOORD_RESET"}


def test_config_without_a_repository_shows_the_defaults(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("config", "show").out.splitlines()[:3] == ["workspace\t-", "repo\t-", "branch\tmain"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("BRANCH", "x" * 10_000), ("SEED", "-1"), ("RESET", "all"), ("RESUME_REF", "a\x1b[2Jb")],
)
def test_config_names_the_variable_that_makes_no_sense(cli, space, monkeypatch, name, text) -> None:
    monkeypatch.setenv(f"CKPTCOORD_{name}", text)
    answer = cli("config", "show")
    assert answer.code == 2
    assert answer.err.startswith(f"error[CC002]: CKPTCOORD_{name}: ")
    assert "\x1b" not in answer.err
    assert len(answer.err) < 500
