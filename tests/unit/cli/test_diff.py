"""`ckptcoord diff`."""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch

import ckptcoord

COLUMNS = 10


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two saves of an object that is much like a training state, and a third like the second."""
    folder = tmp_path_factory.mktemp("diff") / "run"
    for step in (1, 2, 2):
        weight = torch.ones(4, 8) * step
        if step == 2:
            weight[0, :2] = torch.tensor([math.nan, math.inf])
        state = {
            "layers": [{"w": weight}, {"w": torch.ones(5)}],
            "groups": [{"lr": 1 / step, "betas": (0.9, 0.95)} for _ in range(3)],
            "step": torch.tensor(float(step)),
            "odd\x1b[31m": torch.zeros(2) + step,
        }
        ckptcoord.save(state, folder, keep=9)
    return folder


def rows(answer) -> list[list[str]]:
    return [line.split("\t") for line in answer.out.splitlines()]


def test_into_a_pipe_every_line_has_the_same_columns(cli, written):
    answer = cli("diff", written, "main@1", "main@2")
    assert (answer.code, answer.err) == (0, "")
    found = rows(answer)
    assert {len(row) for row in found} == {COLUMNS}
    assert [row[:5] for row in found] == [
        *(["value", "changed", f"object.groups[{at}].lr", "1.0", "0.5"] for at in range(3)),
        ["value", "changed", "object.step", "1.0", "2.0"],
        ["tensor", "changed", "object.layers.0.w", "F32[4,8]", "F32[4,8]"],
        ["tensor", "changed", "object.odd%1B[31m", "F32[2]", "F32[2]"],
    ]
    assert found[4][5:] == ["1", "1", "1", "32", "32"], "of what is finite on both sides"


def test_equal_states_are_no_lines(cli, written):
    answer = cli("diff", "--repo", written, "main@2", "main@3", "--exit-code")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_with_exit_code_a_difference_is_a_finding(cli, written):
    assert cli("diff", written, "main@1", "main@2").code == 0
    assert cli("diff", written, "main@1", "main@2", "--exit-code").code == 3
    assert cli("diff", written, "main@1", "main@2", "--exit-code", "--json").code == 3


def test_top_is_of_each_kind(cli, written):
    found = rows(cli("diff", written, "main@1", "main@2", "--top", "1"))
    assert [row[0] for row in found] == ["value", "tensor"]
    data = cli("diff", written, "main@1", "main@2", "--top", "0", "--json").json["data"]
    assert (data["tensors"], data["scalars"], data["layers"]) == ([], [], [])
    assert data["counts"]["changed"] == 3


def test_json_has_all_that_is_known(cli, written):
    document = cli("diff", written, "main@1", "latest", "--json").json
    assert (document["schema_version"], document["command"]) == (1, "diff")
    data = document["data"]
    assert (data["old"], data["new"], data["differs"]) == ("main@1", "main@3", True)
    assert data["counts"] == {
        **dict.fromkeys(("added", "removed", "reshaped", "partial"), 0),
        "changed": 3,
        "equal": 1,
    }
    tensor = data["tensors"][0]
    assert tensor["old"] == {"dtype": "F32", "shape": [4, 8]}
    assert (tensor["nans"], tensor["infinities"]) == ([0, 1], [0, 1])
    assert tensor["l2"] == pytest.approx(math.sqrt(30))
    assert [one["name"] for one in data["layers"]] == ["object", "object.layers.0"]
    by_name = {one["name"]: one for one in data["tensors"]}
    assert by_name["object.step"]["values"] == [1.0, 2.0]
    back = cli("diff", written, "main@3", "main@1", "--json").json["data"]
    assert back["tensors"][0]["relative_l2"] == pytest.approx(0.5)


def test_what_no_number_can_say_is_null(cli, tmp_path):
    for value in (0.0, 1.0):
        ckptcoord.save(
            {"w": torch.full((2,), value), "x": math.inf * value}, tmp_path / "it", keep=9
        )
    data = cli("diff", tmp_path / "it", "main@1", "main@2", "--json").json["data"]
    assert data["tensors"][0]["relative_l2"] is None
    assert data["tensors"][0]["cosine"] is None
    assert data["scalars"][0] == {
        "path": "object.x",
        "status": "changed",
        "old": "nan",
        "new": "inf",
    }


def test_a_terminal_gets_tables(terminal, written):
    found = terminal("diff", written, "main@1", "main@2", "--top", "2")
    lines = [line.rstrip() for line in found.splitlines()]
    assert lines[0] == "main@1 -> main@2  1 equal tensor, 3 changed tensors, 4 changed values"
    assert "  object.groups[0].lr  1.0  ->  0.5  and 2 more alike" in lines
    (layer,) = (line for line in lines if line.startswith("  object.layers.0 "))
    assert " ".join(layer.split()) == "object.layers.0 1/1 1 1 0 -> 1 NaN, 0 -> 1 Inf"
    assert "relative L2" in found
    assert (
        terminal("diff", written, "main@2", "main@3")
        .splitlines()[0]
        .endswith("the states are equal: 4 equal tensors")
    )


def test_what_is_cut_says_how_to_see_it(terminal, written):
    found = terminal("diff", written, "main@1", "main@2", "--top", "1")
    assert "and 1 more: --top 2" in found


@pytest.fixture
def terminal(cli, monkeypatch):
    """The CLI where a person reads stdout."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return cli(*words).out

    return run


# --- bad input


@pytest.mark.parametrize("refs", [(), ("main@1",), ("main@1", "main@2", "main@3")])
def test_two_refs_are_needed(cli, written, refs):
    answer = cli("diff", written, *refs)
    assert answer.code == 2
    assert f"needs two checkpoints to compare, not {len(refs)}" in answer.err
    assert "help: As in: ckptcoord diff main@100 main@200" in answer.err


@pytest.mark.parametrize(
    ("ref", "code"),
    [
        ("main@9", 12),
        ("mian", 12),
        ("..", 12),
        ("../x", 12),
        ("/", 12),
        ("a/b/../..", 12),
        ("x.lock", 2),
        ("a\0b", 2),
        ("x" * 10_000, 2),
        ("", 2),
        ("main@-1", 2),
    ],
)
def test_a_ref_that_names_nothing_is_told_in_a_line(cli, written, ref, code):
    for refs in ((ref, "main@1"), ("main@1", ref)):
        answer = cli("diff", "-C", written, *refs)
        assert (answer.code, answer.out) == (code, "")
        assert answer.err.startswith("error[CC0")
        assert "Traceback" not in answer.err
        assert len(answer.err) < 1000


def test_the_nearest_are_named(cli, written):
    assert "help: Nearest: main@1, main@2, main@3" in cli("diff", written, "main@1", "main@7").err


@pytest.mark.parametrize("top", ["x", "-1", "1.5", "9" * 30, "", "\N{SUPERSCRIPT TWO}"])
def test_a_number_that_is_none_is_refused(cli, written, top):
    answer = cli("diff", written, "main@1", "main@2", f"--top={top}")
    assert answer.code == 2
    assert "--top" in answer.err


def test_a_component_that_is_not_there_is_refused(cli, written):
    answer = cli("diff", written, "main@1", "main@2", "--component", "modle")
    assert answer.code == 2
    assert "there is: object" in answer.err
    assert rows(cli("diff", written, "main@1", "main@2", "--component", "object"))


def test_without_a_repository_the_code_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("diff", "main@1", "main@2").code == 10


def test_damage_is_no_difference(cli, written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    (path,) = (tmp_path / "run/checkpoint-1").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    answer = cli("diff", tmp_path / "run", "main@1", "main@2", "--exit-code")
    assert answer.code == 13
    assert "corrupt" in answer.err or "digest" in answer.err


def test_a_repository_without_documents_is_compared_by_its_files(cli, history):
    found = rows(cli("diff", history.root, "main@100", "best"))
    assert ["tensor", "changed", "model.wte.weight", "F32[8,16]", "F32[8,16]"] in [
        row[:5] for row in found
    ]
    assert ["metric", "changed", "loss", "3.5", "2.25"] in [row[:5] for row in found]
    assert ["metric", "added", "eval_loss", "-", "2.5"] in [row[:5] for row in found]


def test_of_a_layer_that_cannot_be_compared_nothing_is_said_but_that_it_changed(cli, tmp_path):
    for size in (4, 5):
        ckptcoord.save({"embed": {"w": torch.ones(size)}}, tmp_path / "run", keep=9)
    (layer,) = cli("diff", tmp_path / "run", "main@1", "main@2", "--json").json["data"]["layers"]
    assert (layer["reshaped"], layer["relative_l2"], layer["max_abs"]) == (1, None, 0.0)
