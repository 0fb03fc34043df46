import re

import pytest


def test_the_newest_commit_comes_first_whatever_its_step(cli, history) -> None:
    answer = cli("log", history.root, "--json")

    refs = [one["ref"] for one in answer.json["data"]["checkpoints"]]
    assert refs == ["exp@300", "main@1000", "exp@250", "main@200", "main@100"]
    assert answer.json["schema_version"] == 1
    assert answer.json["command"] == "log"
    assert answer.json["data"]["repository"] == str(history.root)
    assert answer.code == 0


def test_people_see_refs_marks_times_sizes_metrics_and_messages(cli, history) -> None:
    answer = cli("log", history.root)

    blocks = answer.out.rstrip("\n").split("\n\n")
    assert len(blocks) == 5
    assert blocks[0].startswith("exp@300 (latest, exp)  checkpoint-300@exp\n")
    assert blocks[0].endswith("parent exp@250\n    the newest")
    assert blocks[1].startswith("main@1000 (main)  checkpoint-1000\n")
    assert "parent main@200" in blocks[2]
    assert blocks[3].startswith("main@200 (tag: best)  checkpoint-200\n")
    assert re.search(
        r"ago \(2026-02-03 04:\d\d:06 UTC\), 598 B, 1006 B stored, parent main@100\n", blocks[3]
    )
    assert blocks[3].endswith("    eval_loss 2.5, loss 2.25")
    assert blocks[4].endswith("no parent\n    loss 3.5\n    first ...")
    assert answer.err == ""


def test_a_program_gets_everything_the_log_knows(cli, history) -> None:
    document = cli("log", history.root, "--json").json["data"]["checkpoints"][3]

    commit = history.repository.resolve("main@200")
    assert document == {
        "ref": "main@200",
        "checkpoint_id": "checkpoint-200",
        "branch": "main",
        "step": 200,
        "path": "checkpoint-200",
        "parent": "main@100",
        "timestamp": history.repository.state().stamps[commit.checkpoint_id].timestamp,
        "log_number": 3,
        "size_bytes": 598,
        "stored_bytes": 1006,
        "metrics": {"eval_loss": 2.5, "loss": 2.25},
        "message": "",
        "latest": False,
        "heads": [],
        "tags": ["best"],
        "manifest_digest": str(commit.manifest_digest),
        "attempt": commit.attempt,
        "writer": "a" * 32,
        "epoch": 1,
    }


def test_a_branch_can_be_chosen(cli, history) -> None:
    answer = cli("log", "-C", history.root, "--branch", "exp", "--json")

    assert [one["ref"] for one in answer.json["data"]["checkpoints"]] == ["exp@300", "exp@250"]


def test_a_branch_that_was_only_forked_stands_at_its_fork_point(cli, build) -> None:
    build.commit(1)
    build.fork("next", 1)

    assert cli("log", build.root).out.startswith("main@1 (latest, main, next)  checkpoint-1\n")
    assert cli("log", build.root, "--branch", "next").out == ""


def test_an_unknown_branch_names_the_nearest(cli, history) -> None:
    answer = cli("log", history.root, "--branch", "exo")

    assert answer.code == 12
    assert answer.err == "error[CC012]: no checkpoint 'exo'\nhelp: Nearest: exp\n"


@pytest.mark.parametrize(("given", "count"), [("2", 2), ("0", 0), ("99", 5)])
def test_the_newest_n_are_shown(cli, history, given, count) -> None:
    assert len(cli("log", history.root, "-n", given, "--json").json["data"]["checkpoints"]) == count


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 30, "²"])
def test_a_limit_that_is_no_count_is_a_usage_error(cli, history, given) -> None:
    answer = cli("log", history.root, f"--limit={given}")

    assert answer.code == 2
    assert "--limit" in answer.err


def test_an_empty_repository_is_no_error(cli, build) -> None:
    answer = cli("log", build.root)

    assert (answer.code, answer.out) == (0, "")
    assert answer.err == f"no checkpoints yet in {build.root}\n"


def test_a_long_subject_is_cut(cli, build) -> None:
    build.commit(1, message="x" * 500 + "\nmore")

    assert cli("log", build.root).out.endswith("x" * 97 + "...\n")


def test_a_hostile_message_cannot_drive_the_terminal(cli, build) -> None:
    build.commit(1, message="\x1b]0;owned\x07 \x9b2J", metrics={"\x1b[2Jloss": 1.0})

    out = cli("log", build.root).out

    assert out.replace("\n", "").isprintable()
    assert r"\x1b]0;owned\x07 \x9b2J" in out


def test_a_forced_colour_marks_the_refs(cli, history, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    assert cli("log", history.root).out.startswith("\x1b[33mexp@300\x1b[0m (\x1b[1;36mlatest")
