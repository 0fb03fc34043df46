import re
from dataclasses import replace

import pytest

from ckptcoord.core.entries import Rewrite
from ckptcoord.plan.commit import SNAPSHOT_EVERY

WRITER = "a" * 32


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


# --- what saves cost -------

TIMING = {
    "stall_s": 0.0123,
    "opened_s": 0.025,
    "staged_s": 0.25,
    "written_s": 1.5,
    "voted_s": 1.625,
    "slowest_rank": 1,
}
WHOLE = TIMING | {"waited_s": 0.002, "encoded_s": 1.0, "committed_s": 1.75, "queue_depth": 2}


def test_the_times_of_saves_are_a_table_with_a_dash_for_what_is_not_known(cli, build) -> None:
    build.commit(1)
    build.commit(20, timing={"stall_s": 123.4, "slowest_rank": 0})
    build.commit(300, timing=WHOLE)

    lines = cli("log", build.root, "--timing").out.splitlines()

    size, times = "598 B 1006 B 0.59", "stall waited staged encoded written voted committed"
    assert [" ".join(line.split()) for line in lines] == [
        f"checkpoint {times} queue state stored ratio slowest",
        f"main@300 12 ms 2.0 ms 250 ms 1.00 s 1.50 s 1.62 s 1.75 s 2 {size} rank 1",
        f"main@20 123 s - - - - - - - {size} rank 0",
        f"main@1 - - - - - - - - {size} -",
    ]
    assert len({len(line) for line in lines}) == 1
    assert "main@20" not in cli("log", build.root, "--timing", "-n", "1").out


def test_a_program_gets_the_times_that_the_log_knows(cli, history) -> None:
    found = cli("log", history.root, "--timing", "--json").json["data"]["checkpoints"]

    assert [one["timing"] for one in found] == [TIMING, None, None, None, None]
    assert "timing" not in cli("log", history.root, "--json").json["data"]["checkpoints"][0]


def test_the_times_are_known_after_many_snapshots_and_a_rewrite(cli, build) -> None:
    first = build.commit(1, timing=TIMING)
    other = replace(first, path="checkpoint-1.01234567", attempt="1" * 32, replaces=first.path)
    build.repository.log.append(lambda _: Rewrite(writer=WRITER, commit=other))
    for _ in range(SNAPSHOT_EVERY):
        build.tag("best", 1)

    (found,) = cli("log", build.root, "--timing", "--json").json["data"]["checkpoints"]

    assert (found["path"], found["timing"]) == (other.path, TIMING)


def test_times_in_an_empty_repository_are_no_error(cli, build) -> None:
    assert (cli("log", build.root, "--timing").code, cli("log", build.root).out) == (0, "")


def test_an_entry_that_was_tampered_with_is_corruption(cli, build) -> None:
    build.commit(1, timing=TIMING)
    for _ in range(SNAPSHOT_EVERY):
        build.tag("best", 1)
    log = build.root / ".ckptcoord/log"
    (log / f"{2:020d}.json").write_bytes(
        (log / f"{1:020d}.json").read_bytes().replace(b'"number":1,', b'"number":2,')
    )

    assert cli("log", build.root).code == 0
    answer = cli("log", build.root, "--timing")

    assert answer.code == 13
    assert "log entry 2: is no commit of checkpoint-1" in answer.err


def test_a_forced_colour_marks_the_refs_of_the_table(cli, history, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    out = cli("log", history.root, "--timing", "-n", "1").out
    assert out.startswith("\x1b[2mcheckpoint ")
    assert "\n\x1b[33mexp@300   \x1b[0m  " in out
