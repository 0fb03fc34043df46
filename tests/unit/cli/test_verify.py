import itertools
import json

import pytest
import torch

import ckptcoord
from ckptcoord.cli.output import Output
from ckptcoord.cli.progress import progress
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.plan.lineage import Compression


def _flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_sound_checkpoint_is_ok(cli, history) -> None:
    answer = cli("verify", history.root, "best")

    assert (answer.code, answer.err) == (0, "")
    assert answer.out == "ok  main@200  checkpoint-200  3 files, 1006 B read\n"


def test_the_latest_is_verified_by_default_and_all_on_demand(cli, history) -> None:
    assert cli("verify", history.root).out.startswith("ok  exp@300  ")
    lines = cli("verify", history.root, "--all").out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "exp@300",
        "main@1000",
        "exp@250",
        "main@200",
        "main@100",
    ]


def test_damage_is_named_by_file_tensor_reason_and_remedy(cli, history) -> None:
    _flip(history.root / "checkpoint-200/model.safetensors", -1)

    answer = cli("verify", history.root, "best")

    bad, finding, remedy = answer.out.splitlines()
    assert answer.code == 13
    assert bad == "BAD  main@200  checkpoint-200  3 files, 1006 B read"
    assert finding.startswith(
        "  error[CC013]: checkpoint-200/model.safetensors: tensor 'wte.weight' is corrupt (digest "
    )
    assert remedy == (
        "  help: Put an intact copy of the file back, or load main@100 instead; "
        "see `ckptcoord verify --all`"
    )


def test_every_damaged_tensor_is_named(cli, build) -> None:
    build.commit(1)
    shard = build.root / "checkpoint-1/model.safetensors"
    _flip(shard, -1)
    _flip(shard, -513)

    document = cli("verify", build.root, "--json").json["data"]

    assert document["ok"] is False
    (checkpoint,) = document["checkpoints"]
    assert (checkpoint["ref"], checkpoint["ok"], checkpoint["files"]) == ("main@1", False, 3)
    assert [one["tensor"] for one in checkpoint["findings"]] == ["lm_head.bias", "wte.weight"]
    assert {one["path"] for one in checkpoint["findings"]} == {"checkpoint-1/model.safetensors"}
    assert {one["code"] for one in checkpoint["findings"]} == {"CC013"}
    assert "load another checkpoint" in checkpoint["findings"][0]["help"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_empty_word_is_no_ref(cli, history, command) -> None:
    answer = cli(command, history.root, "")

    assert (answer.code, answer.out) == (2, "")


def test_one_bad_checkpoint_among_all_is_found(cli, history) -> None:
    _flip(history.root / "checkpoint-250@exp/rng.rank00001.state.json", 0)

    answer = cli("verify", history.root, "--all")

    assert answer.code == 13
    assert answer.out.count("\nok  ") + answer.out.startswith("ok  ") == 4
    assert "checkpoint-250@exp/rng.rank00001.state.json: the file is corrupt (digest" in answer.out


@pytest.mark.parametrize("name", ["model.safetensors", "rng.rank00000.state.json"])
@pytest.mark.parametrize(
    ("harm", "why"),
    [("missing", "the file is missing"), ("short", ""), ("long", ""), ("head", "")],
)
def test_a_file_that_is_not_the_one_that_was_written_is_corrupt(
    cli, build, name, harm, why
) -> None:
    build.commit(1)
    path = build.root / "checkpoint-1" / name
    match harm:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
        case "long":
            path.write_bytes(path.read_bytes() + b"\0")
        case "head":
            _flip(path, 9)

    answer = cli("verify", build.root)

    assert answer.code == 13
    assert f"error[CC013]: checkpoint-1/{name}: {why}" in answer.out


def test_a_link_in_place_of_a_shard_is_refused(cli, build, tmp_path) -> None:
    build.commit(1)
    path = build.root / "checkpoint-1/model.safetensors"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")

    answer = cli("verify", build.root)

    assert answer.code == 13
    assert "error[CC041]: checkpoint-1/model.safetensors" in answer.out


def test_an_extra_file_is_named_and_harmless(cli, build) -> None:
    build.commit(1)
    (build.root / "checkpoint-1/no\x1bte.txt").write_text("mine")

    answer = cli("verify", build.root)
    document = cli("verify", build.root, "--json").json["data"]

    assert answer.code == 0
    assert answer.out.splitlines()[1] == (
        r"  note: checkpoint-1/no\x1bte.txt: is not in the manifest; no load looks at it"
    )
    assert document["ok"] is True
    (finding,) = document["checkpoints"][0]["findings"]
    assert (finding["harmful"], finding["code"], finding["help"]) == (False, None, "")


def test_a_changed_manifest_is_corrupt(cli, build) -> None:
    build.commit(1)
    _flip(build.root / "checkpoint-1/checkpoint_manifest.json", 20)

    answer = cli("verify", build.root)

    assert answer.code == 13
    assert "checkpoint-1/checkpoint_manifest.json: the file is corrupt (digest" in answer.out
    assert cli("inspect", build.root).code == 13


def test_all_and_a_ref_exclude_each_other(cli, history) -> None:
    answer = cli("verify", history.root, "best", "--all")

    assert answer.code == 2
    assert "--all: stands beside the ref 'best'" in answer.err


def test_there_is_nothing_to_verify_in_an_empty_repository(cli, build) -> None:
    answer = cli("verify", build.root, "--all")

    assert (answer.code, answer.out) == (0, "")
    assert "no checkpoints yet" in answer.err
    assert cli("verify", build.root).code == 12


def test_without_a_terminal_progress_is_a_line_each_ten_seconds(capsys) -> None:
    times = itertools.count(0.0, 4.0)
    out = Output("verify", as_json=False)

    with progress(out, "verify", 4096, clock=lambda: next(times)) as advance:
        for _ in range(8):
            advance(512)

    assert capsys.readouterr().err.splitlines() == [
        "verify: 1.5 KiB of 4.0 KiB (37 %)",
        "verify: 3.0 KiB of 4.0 KiB (75 %)",
    ]


def test_on_a_terminal_progress_is_a_bar(cli, history, monkeypatch, capsys) -> None:
    import sys

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    answer = cli("verify", history.root, "--all", "--json")

    assert json.loads(answer.out)["data"]["ok"] is True
    assert "1006" not in answer.out.split("checkpoints")[0]
    assert "verify" in answer.err


def test_progress_counts_every_byte_of_good_and_bad_files(build) -> None:
    from ckptcoord.repo.verify import verify_checkpoint

    commit = build.commit(1)
    for missing in (False, True):
        if missing:
            (build.root / commit.path / "model.safetensors").unlink()
        done: list[int] = []
        report = verify_checkpoint(build.repository, commit, progress=done.append)
        assert sum(done) == commit.stored_bytes
        assert report.bytes_read == (commit.stored_bytes if report.ok else 22)


def _deltas(root) -> None:
    """An anchor and a delta on it, twice."""
    value = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    rule = Compression(level=CompressionLevel.AUTO, reanchor_interval=2)
    for _ in range(4):
        ckptcoord.save({"w": value}, root, keep=9, compression=rule)
        value = value * 1.0001


def test_damage_of_a_base_is_found_there_and_nothing_that_needs_it_is_recommended(
    cli, tmp_path
) -> None:
    _deltas(tmp_path / "run")
    _flip(tmp_path / "run/checkpoint-3/object.safetensors", -1)

    answer = cli("verify", tmp_path / "run", "main@4", "--json")

    (finding,) = answer.json["data"]["checkpoints"][0]["findings"]
    assert (answer.code, finding["tensor"]) == (13, "w")
    assert finding["path"] == "checkpoint-4/object.delta.safetensors"
    assert "checkpoint-3/object.safetensors: tensor 'w' is corrupt" in finding["why"]
    assert "or load main@2 instead" in finding["help"]


def test_where_all_before_it_need_what_is_gone_none_is_recommended(cli, tmp_path) -> None:
    _deltas(tmp_path / "run")
    (tmp_path / "run/checkpoint-1/object.safetensors").unlink()

    answer = cli("verify", tmp_path / "run", "main@2", "--json")

    (finding,) = answer.json["data"]["checkpoints"][0]["findings"]
    assert (answer.code, finding["tensor"]) == (13, "w")
    assert "or load another checkpoint" in finding["help"]
