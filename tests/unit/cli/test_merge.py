"""`ckptcoord merge --average`: words, answers, and what a user did wrong."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

import ckptcoord
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent


@pytest.fixture
def run(tmp_path):
    state = OrderedDict(w=torch.zeros(3), n=torch.tensor(1))
    model = StateComponent("model", state, SharingPattern.REPLICATED)
    with CheckpointCoordinator([model], output_dir=tmp_path / "run") as coordinator:
        for step in (1, 2, 3):
            state["w"] += 3
            state["n"] = torch.tensor(1 if step < 3 else 2)
            coordinator.save_checkpoint(step=step)
    return tmp_path / "run"


def test_two_checkpoints_become_a_branch(cli, run) -> None:
    words = ["merge", "--average", "main@1", "main@2:3", "--into", "soup", "-C", run]

    dry = cli(*words, "--dry-run")
    assert (dry.code, dry.out) == (0, "")
    assert "soup@2 would be made of 20 B: tensors 1 averaged, 1 equal in all" in dry.err
    done = cli(*words, "-m", "a soup")

    assert (done.code, done.out) == (0, f"soup@2\t{run}/checkpoint-2@soup\n")
    assert "ckptcoord fork soup@2 NEW_BRANCH --weights-only" in done.err
    found = ckptcoord.load(run, "soup")
    assert isinstance(found, dict)
    assert found["model"]["w"].tolist() == [5.25] * 3
    assert "a soup" in cli("inspect", run, "soup").out
    again = cli(*words)
    assert again.code == 1
    assert "branch 'soup' exists already" in again.err


def test_a_dry_run_lists_what_does_not_fit(cli, run) -> None:
    words = ["merge", "--average", "main@1", "main@3", "--into", "soup", "-C", run]

    dry = cli(*words, "--dry-run")
    assert (dry.code, dry.out) == (3, "n\tI64 tensors that differ\n")
    failed = cli(*words)
    assert failed.code == 1
    assert "error[CC080]: there is no average: n: I64 tensors that differ" in failed.err
    data = cli(*words, "--keep-first", "--json").json["data"]
    assert (data["ref"], data["problems"]) == ("soup@3", [])
    assert data["tensors"] == {"average": 1, "equal": 0, "compare": 0, "first": 1}
    assert [one["weight"] for one in data["average_of"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["main@1", "main@2", "--into", "x"], 2, "--average: is missing"),
        (["--average", "main@1", "main@2"], 2, "--into: is missing"),
        (["--average", "--into", "x"], 2, "Missing argument"),
        (["--average", "main@1", "--into", "x"], 2, "two checkpoints or more"),
        (["--average", "main@1", "main@2:a", "--into", "x"], 2, "is not REF or REF:WEIGHT"),
        (["--average", "main@1", "main@2:-1", "--into", "x"], 2, "a negative weight"),
        (["--average", "main@1", "main@2:nan", "--into", "x"], 2, "not finite"),
        (["--average", "main@1", ":1", "--into", "x"], 2, "ref"),
        (["--average", "main@1", "main@9", "--into", "x"], 12, "Nearest: main@1, main@2, main@3"),
        (["--average", "main@1", "..", "--into", "x"], 12, "no checkpoint"),
        (["--average", "main@1", "a\0b", "--into", "x"], 2, "ref"),
        (["--average", "main@1", "y" * 10_000, "--into", "x"], 2, "ref"),
        (["--average", "main@1", "main@2", "--into", "main"], 1, "exists already"),
        (["--average", "main@1", "main@2", "--into", "a/b"], 2, "branch"),
        (["--average", "main@1", "main@2", "--into", ".."], 2, "branch"),
        (["--average", "main@1", "main@2", "--into", "x.lock"], 2, "branch"),
        (["--average", "main@1", "main@2", "--into", ""], 2, "branch"),
        (["--average", "main@1", "main@2", "--into", "y" * 10_000], 2, "branch"),
        (["--average", "main@1", "main@2", "--into", "x", "--step", "1.5"], 2, "--step"),
        (["--average", "main@1", "main@2", "--into", "x", "--step", "9" * 19], 2, "step"),
        (["--average", "main@1", "main@2", "--into", "x", "--component", "y"], 2, "no 'y'"),
        (["--average", "main@1", "main@2", "--into", "x", "-m", "y" * 200_000], 2, "message"),
        (["--average", "main@1", "main@2", "--into", "x", "-m", "\udc80"], 2, "message"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_begun(cli, run, words, code, why) -> None:
    number = ckptcoord.open_repository(run).state().number

    answer = cli("merge", *words, "-C", run)

    assert (answer.code, answer.out) == (code, ""), answer.err
    assert why in answer.err
    assert answer.err.startswith("error[")
    assert ckptcoord.open_repository(run).state().number == number
