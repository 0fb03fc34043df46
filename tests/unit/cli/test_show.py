"""`ckptcoord show`."""

import pytest

from ckptcoord.cli.scalars import _numbers


def test_people_see_the_place_in_the_run(cli, history) -> None:
    lines = cli("show", history.root, "best").out.splitlines()

    assert lines[0] == "main@200 (tag: best)  checkpoint-200"
    facts = {line[2:10].strip(): line[12:] for line in lines[1:] if line.startswith("  ")}
    assert facts["parent"] == "main@100"
    assert facts["children"] == "exp@250, main@1000"
    assert facts["metrics"] == "eval_loss   2.5"
    assert "            loss       2.25  -1.25  from main@100" in lines
    assert facts["epoch"] == "1.5"
    assert facts["state"] == "598 B, 1006 B stored as an anchor: compression is off"
    assert "  model  576 B  984 B stored in 1 file  REPLICATED" in lines


def test_the_whole_message_and_what_the_save_cost_are_shown(cli, history) -> None:
    out = cli("show", history.root, "main@100").out

    assert "\n\n    first\n\n    with a body\n\n" in out
    assert "parent    none" in out
    assert (
        "\n  save      stall 12 ms, staged 250 ms, opened 25 ms, written 1.50 s, voted 1.62 s\n"
        in (cli("show", history.root).out)
    )


def test_a_parent_that_was_dropped_is_said_with_what_comes_before(cli, history) -> None:
    cli("rm", history.root, "exp@250", "-y")

    out = cli("show", history.root, "exp").out
    assert "parent    exp@250, which was dropped; before it comes main@200\n" in out
    cli("rm", history.root, "main@100", "-y")
    out = cli("show", history.root, "main@200").out
    assert "parent    main@100, which was dropped\n" in out


def test_programs_get_the_same(cli, history) -> None:
    data = cli("show", history.root, "main@200", "--json").json["data"]

    assert (data["ref"], data["parent"], data["before"]) == ("main@200", "main@100", "main@100")
    assert data["children"] == ["exp@250", "main@1000"]
    assert data["metric_changes"] == {"loss": -1.25}
    assert (data["kind"], data["base"], data["needs"]) == ("anchor", None, [])
    assert data["components"]["rng"] == {
        "sharing_pattern": "per_rank",
        "size_bytes": 22,
        "stored_bytes": 22,
        "files": 2,
    }
    assert data["values"] == {}


@pytest.mark.parametrize("ref", ["", "/", "..", "a\0b", "x" * 10_000, "x.lock", "bset", "main@7"])
def test_a_ref_that_names_nothing_is_an_error_without_a_traceback(cli, history, ref) -> None:
    answer = cli("show", "-C", history.root, "--", ref)

    assert answer.code in (2, 12)
    assert answer.err.startswith("error[")


def test_a_hostile_message_cannot_drive_the_terminal(cli, build) -> None:
    build.commit(1, message="\x1b]0;owned\x07\n\x9b2J", metrics={"\x1b[2Jloss": 1.0})

    assert cli("show", build.root).out.replace("\n", "").isprintable()


def test_help_says_how_show_and_inspect_differ(cli) -> None:
    assert "`ckptcoord inspect`" in " ".join(cli("show", "--help").out.split())
    assert "`ckptcoord show`" in " ".join(cli("inspect", "--help").out.split())


def test_numbers_are_found_in_whatever_a_document_holds() -> None:
    tree = {
        "$order": ["param_groups", "state"],
        "param_groups": [{"lr": 0.5, "betas": {"$": "tuple", "items": [0.9, 0.99]}, "on": True}],
        "state": {"$": "dict", "items": [[3, {"step": 7, "w": {"$": "tensor", "name": "w"}}], 5]},
        "odd": {"$": "dict", "items": [[[1], 2], "x"]},
        "none": None,
    }

    assert list(_numbers(tree, "optimizer", 112)) == [
        ("optimizer.param_groups[0].lr", 0.5),
        ("optimizer.param_groups[0].betas[0]", 0.9),
        ("optimizer.param_groups[0].betas[1]", 0.99),
        ("optimizer.state[3].step", 7),
    ]
    assert list(_numbers([[[1]]], "x", 2)) == []


def test_the_learning_rate_is_shown(cli, tmp_path) -> None:
    from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent

    state = {
        "param_groups": [{"lr": 0.25}, {"lr": 0.25}, {"lr": 0.5}],
        "state": {0: {"step": float("nan")}},
    }
    components = [StateComponent("optimizer", state, SharingPattern.GLOBAL)]
    with CheckpointCoordinator(components, output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=1)

    out = cli("show", tmp_path / "run").out
    assert "values    optimizer.param_groups[0].lr 0.25 (and 1 more)\n" in out
    assert "            optimizer.param_groups[2].lr 0.5\n" in out
    assert cli("show", tmp_path / "run", "--json").json["data"]["values"] == {
        "optimizer.param_groups[0].lr": 0.25,
        "optimizer.param_groups[2].lr": 0.5,
    }
