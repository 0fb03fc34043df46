"""`ckptcoord rm`, and what `log` shows of it."""

import sys
from datetime import UTC, datetime

import pytest

from ckptcoord.plan.dropping import freed_bytes
from ckptcoord.repo.maintenance import prepare_gc


class Terminal:
    """A stdin where somebody answers."""

    def __init__(self, said: str) -> None:
        self.said = said

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.said


def refs(cli, history):
    data = cli("log", history.root, "--json").json["data"]["checkpoints"]
    return [one["ref"] for one in data]


def test_what_is_retired_is_gone_from_the_log_and_stays_on_disk_until_gc(cli, history) -> None:
    answer = cli("rm", history.root, "main@100", "-y")

    assert (answer.code, answer.out) == (0, "retire\tmain@100\tcheckpoint-100\t1006\n")
    assert "frees 1006 B" in answer.err
    assert "main@100" not in refs(cli, history)
    assert (history.root / "checkpoint-100").is_dir()
    assert cli("inspect", history.root, "main@100").code == 12
    gc = prepare_gc(history.repository, now=datetime.now(UTC), changed=lambda _: None, grace_s=0)
    assert [one.path for one in gc.plan.doomed] == ["checkpoint-100"]


def test_retired_ones_are_listed_with_their_reason(cli, history) -> None:
    cli("rm", history.root, "main@100", "-y")
    cli("branch", history.root, "-d", "exp", "-y")

    lines = [line.split("\t") for line in cli("log", history.root, "--retired").out.splitlines()]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("exp@250", "checkpoint-250@exp", "branch -d exp"),
        ("exp@300", "checkpoint-300@exp", "branch -d exp"),
        ("main@100", "checkpoint-100", "rm"),
    ]
    found = cli("log", history.root, "--retired", "--branch", "main", "--json").json["data"]
    assert [one["ref"] for one in found["retired"]] == ["main@100"]
    assert cli("log", history.root, "--retired", "-n", "1").out.count("\n") == 1


def test_nothing_retired_is_no_error(cli, history) -> None:
    answer = cli("log", history.root, "--retired")

    assert (answer.code, answer.out) == (0, "")
    assert "waits for gc" in answer.err


@pytest.mark.parametrize(
    ("ref", "why"),
    [("best", "the tag 'best'"), ("main@200", "forked there"), ("main@1000", "whose newest it is")],
)
def test_what_is_held_is_refused(cli, history, ref, why) -> None:
    answer = cli("rm", history.root, "main@100", ref, "-y")

    assert answer.code == 1
    assert why in answer.err
    assert "--force" in answer.err
    assert len(refs(cli, history)) == 5


def test_force_drops_what_is_held_and_its_tags(cli, history) -> None:
    answer = cli("rm", history.root, "best", "main@1000", "-f", "-y", "--json").json["data"]

    assert answer["untag"] == ["best"]
    assert [one["ref"] for one in answer["retire"]] == ["main@200", "main@1000"]
    assert refs(cli, history) == ["exp@300", "exp@250", "main@100"]
    assert cli("tag", history.root).out == ""


def test_not_even_force_takes_a_branch_its_beginning(cli, history) -> None:
    history.fork("next", 100)

    answer = cli("rm", history.root, "main@100", "--force", "-y")

    assert answer.code == 1
    assert "'next', which has only that" in answer.err
    assert len(refs(cli, history)) == 5


def test_somebody_is_asked(cli, history, monkeypatch) -> None:
    assert cli("rm", history.root, "main@100").code == 2
    assert cli("rm", history.root, "main@100", "--json").json["error"]["code"] == "CC002"
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    answer = cli("rm", history.root, "main@100")
    assert answer.err.startswith("Retire 1 checkpoint? [y/N] ")
    assert "nothing was changed" in answer.err
    assert len(refs(cli, history)) == 5
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert cli("rm", history.root, "main@100").code == 0
    assert len(refs(cli, history)) == 4


def test_a_dry_run_changes_nothing(cli, history) -> None:
    answer = cli("rm", history.root, "main@100", "--dry-run", "--json").json["data"]

    assert (answer["dry_run"], answer["done"], answer["freed_bytes"]) == (True, False, 1006)
    assert len(refs(cli, history)) == 5


def test_a_checkpoint_named_twice_goes_once(cli, history) -> None:
    assert cli("rm", history.root, "main@100", "checkpoint-100", "-y").out.count("\n") == 1


@pytest.mark.parametrize("ref", ["", "/", "..", "a\0b", "x" * 10_000, "x.lock", "no", "main@7"])
def test_a_ref_that_names_nothing_retires_nothing(cli, history, ref) -> None:
    answer = cli("rm", "-C", history.root, "-y", "--", "main@100", ref)

    assert answer.code in (2, 12)
    assert answer.err.startswith("error[")
    assert len(refs(cli, history)) == 5


def test_without_a_ref_it_is_a_usage_error(cli, history) -> None:
    assert cli("rm", history.root, "-y").code == 2


def test_what_is_freed_is_what_no_other_needs(history) -> None:
    from dataclasses import replace

    state = history.repository.state()
    (first, *_), commits = sorted(state.commits), dict(state.commits)
    needing = sorted(commits)[-1]
    commits[needing] = replace(commits[needing], needs=(commits[first].path,))
    shared = replace(state, commits=commits)

    assert freed_bytes(state, [first]) == 1006
    assert freed_bytes(shared, [first]) == 0
    assert freed_bytes(shared, [first, needing]) == 2012


# --- the picture ---------------------------------------------------------------------------------


def test_the_graph_shows_each_checkpoint_above_its_parent(cli, history) -> None:
    lines = cli("log", history.root, "--graph").out.splitlines()

    assert [line.split("  ")[0] for line in lines] == [
        "● exp@300 (latest, exp)", "│ ● main@1000 (main)", "● │ exp@250", "├─╯",
        "● main@200 (tag: best)", "● main@100",
    ]  # fmt: skip
    assert lines[0].endswith("  the newest")


def test_programs_get_the_parents(cli, history) -> None:
    cli("rm", history.root, "main@200", "-f", "-y")
    found = cli("log", history.root, "--graph", "--json").json["data"]["checkpoints"]

    assert {one["ref"]: (one["parents"], one["parent_dropped"]) for one in found} == {
        "exp@300": (["exp@250"], False),
        "exp@250": (["main@100"], True),
        "main@1000": (["main@100"], True),
        "main@100": ([], False),
    }


def test_views_that_exclude_each_other_are_a_usage_error(cli, history) -> None:
    assert cli("log", history.root, "--graph", "--timing").code == 2
    assert cli("log", history.root, "--retired", "--timing").code == 2


def test_the_graph_can_be_cut_and_be_of_one_branch(cli, history) -> None:
    assert cli("log", history.root, "--graph", "-n", "2").out.count("\n") == 2
    lines = cli("log", history.root, "--graph", "--branch", "exp").out.splitlines()
    assert [line[:9] for line in lines] == ["● exp@300", "● exp@250"]
