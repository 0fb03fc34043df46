import io
import subprocess
import sys
from dataclasses import replace

import pytest

from ckptcoord.core.entries import Retire, Sweep
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.repo.usage import measure

WRITER = "a" * 32


def retire(build, *steps) -> None:
    ids = tuple(CheckpointId(BranchName(), step) for step in steps)
    build.repository.log.append(lambda _: Retire(writer=WRITER, checkpoint_ids=ids))


def test_a_pipe_gets_tabs_and_bytes(cli, history) -> None:
    retire(history, 100)

    answer = cli("du", history.root)

    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[0] for row in rows] == ["exp@250", "exp@300", "main@200", "main@1000", "main@100"]
    assert rows[2][1:] == ["598", "1006", "1006", "checkpoint-200", "live"]
    assert rows[4][1:] == ["598", "1006", "1006", "checkpoint-100", "retired"]
    assert (answer.code, answer.err) == (0, "")


def test_programs_get_the_sums_and_the_parts(cli, history) -> None:
    (history.root / ".ckptcoord/staging" / ("0" * 32)).mkdir()
    (history.root / ".ckptcoord/staging" / ("0" * 32) / "x").write_bytes(bytes(77))
    retire(history, 100)

    data = cli("du", history.root, "--json").json["data"]

    assert data["size_bytes"] == 4 * 598
    assert data["stored_bytes"] == 4 * 1006
    assert (data["retired_bytes"], data["kept_bytes"], data["other_bytes"]) == (1006, 0, 77)
    assert data["ratio"] == 598 / 1006
    assert data["components"]["model"] == {"size_bytes": 4 * 576, "stored_bytes": 4 * 984}
    assert sum(one["stored_bytes"] for one in data["components"].values()) == data["stored_bytes"]
    for one in data["checkpoints"][:4]:
        assert sum(part["size_bytes"] for part in one["components"].values()) == one["size_bytes"]


def test_what_is_needed_is_kept_for_others_and_not_freed(build) -> None:
    build.commit(1)
    for step in (2, 3, 4):
        commit = build.commit(step)
        needs = ("checkpoint-1",) if step < 4 else ()
        build.repository.log.append(
            lambda _, one=commit, needs=needs: replace(
                one, attempt=f"{one.checkpoint_id.step:032x}", path=f"{one.path}.{'0' * 8}",
                replaces=one.path, needs=needs,
            )
        )  # fmt: skip
        build.repository.store.move_dir(commit.path, f"{commit.path}.{'0' * 8}")
    paths = ("checkpoint-2", "checkpoint-3", "checkpoint-4")
    build.repository.log.append(lambda _: Sweep(writer=WRITER, paths=paths))
    retire(build, 1)

    usage = measure(build.repository)

    freed = {one.commit.checkpoint_id.step: one.freed_bytes for one in usage.checkpoints}
    assert freed == {1: 0, 2: 1006, 3: 1006, 4: 1006}  # either of 2 and 3 keeps 1
    assert (usage.kept_bytes, usage.retired_bytes, usage.stored_bytes) == (1006, 0, 3 * 1006)
    assert usage.ratio == 3 * 598 / (4 * 1006)
    retire(build, 2)
    usage = measure(build.repository)
    freed = {one.commit.checkpoint_id.step: one.freed_bytes for one in usage.checkpoints}
    assert freed == {1: 0, 2: 1006, 3: 2012, 4: 1006}
    retire(build, 3)
    assert measure(build.repository).retired_bytes == 3 * 1006


@pytest.fixture
def screen(monkeypatch):
    """What a terminal shows of a command."""
    from ckptcoord.cli import main

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def shown(*words: object) -> str:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            main([str(word) for word in words])
        return terminal.getvalue()

    return shown


def test_a_person_gets_tables(history, screen) -> None:
    lines = screen("du", history.root).splitlines()
    assert lines[0].split() == ["checkpoint", "state", "stored", "alone"]
    assert lines[1].split() == ["exp@250", "598", "B", "1006", "B", "1006", "B"]
    assert ["model", "2.8", "KiB", "4.8", "KiB", "0.59"] in [line.split() for line in lines]
    assert lines[-3] == "ratio    0.59"


def test_a_manifest_that_cannot_be_read_is_a_note(cli, history) -> None:
    path = history.root / "checkpoint-100/checkpoint_manifest.json"
    path.write_bytes(path.read_bytes().replace(b"model", b"medal"))

    answer = cli("du", history.root)

    assert answer.code == 0
    assert len(answer.out.splitlines()) == 5
    assert answer.err.startswith("note: checkpoint-100/checkpoint_manifest.json: ")


def test_an_empty_repository_takes_nothing(cli, build) -> None:
    data = cli("du", build.root, "--json").json["data"]

    assert (data["checkpoints"], data["stored_bytes"], data["ratio"]) == ([], 0, None)


def test_it_waits_for_no_library_that_it_does_not_need(history) -> None:
    code = "import sys; from ckptcoord.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    words = ["du", "-C", str(history.root)]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )

    unwanted = {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}
    assert not unwanted & set(run.stdout.splitlines()[-1].split())


def deltas(root):
    """A coded anchor and a delta with something of each codec."""
    import torch

    from ckptcoord import (
        CheckpointCoordinator,
        Compression,
        CoordinatorConfig,
        Lossy,
        SharingPattern,
        StateComponent,
    )

    live = {"w": torch.randn(4000), "frozen": torch.ones(3000), "v": torch.randn(5000)}
    live["narrow"] = live["v"].bfloat16()
    lossy = {"w": torch.randn(2000)}
    parts = [
        StateComponent("model", live, SharingPattern.REPLICATED),
        StateComponent("ema", lossy, SharingPattern.REPLICATED, lossy=Lossy(update_fraction=0.1)),
        StateComponent(
            "plain", {"p": torch.ones(100)}, SharingPattern.REPLICATED, compression="off"
        ),
    ]
    rule = Compression(level="auto", compress_anchors=True)
    config = CoordinatorConfig(compression=rule)
    with CheckpointCoordinator(parts, output_dir=root, config=config) as coordinator:
        coordinator.save_checkpoint(step=1)
        live["w"] += 1e-3
        live["v"] += 1e-3
        live["narrow"].copy_(live["v"].bfloat16())
        lossy["w"] += 1e-3 * torch.randn(2000)
        coordinator.save_checkpoint(step=2)


def test_codecs_add_up_to_what_is_stored(cli, tmp_path) -> None:
    deltas(tmp_path / "run")

    data = cli("du", tmp_path / "run", "--codec", "--json").json["data"]

    first, second = (one["codecs"] for one in data["checkpoints"])
    assert {codec: one["tensors"] for codec, one in first.items()} == {
        "cast": 1, "coded": 4, "other": 0, "plain": 1,
    }  # fmt: skip
    assert {codec: one["tensors"] for codec, one in second.items()} == {
        "cast": 1, "coded": 2, "other": 0, "plain": 1, "same": 1, "update": 1,
    }  # fmt: skip
    assert (second["same"]["size_bytes"], second["same"]["stored_bytes"]) == (12000, 0)
    assert (second["cast"]["size_bytes"], second["cast"]["stored_bytes"]) == (10000, 0)
    assert second["plain"] == {"tensors": 1, "size_bytes": 400, "stored_bytes": 400}
    assert 0 < second["update"]["stored_bytes"] < 2500
    for one in (data, *data["checkpoints"]):
        parts = one["codecs"].values()
        assert sum(part["stored_bytes"] for part in parts) == one["stored_bytes"]
    assert data["codecs"]["plain"] == {"tensors": 2, "size_bytes": 800, "stored_bytes": 800}


def test_dedup_and_compression_are_told_apart(cli, tmp_path) -> None:
    deltas(tmp_path / "run")

    data = cli("du", tmp_path / "run", "--codec", "--json").json["data"]

    first, second = data["checkpoints"]
    assert (first["deduped_bytes"], second["deduped_bytes"]) == (10000, 22000)  # a cast; and a same
    assert data["deduped_bytes"] == 32000
    for one in (data, first, second):
        stored = [
            one["codecs"][name] for name in ("plain", "coded", "update") if name in one["codecs"]
        ]
        size_bytes = sum(part["size_bytes"] for part in stored)
        assert one["dedup_ratio"] == (size_bytes + one["deduped_bytes"]) / size_bytes
        assert one["compression_ratio"] == size_bytes / sum(part["stored_bytes"] for part in stored)
    assert second["compression_ratio"] > first["compression_ratio"] > 1


def test_a_person_gets_both_ratios_with_the_codecs(cli, tmp_path, screen) -> None:
    deltas(tmp_path / "run")

    lines = screen("du", tmp_path / "run", "--codec").splitlines()

    (dedup,) = (line for line in lines if line.startswith("dedup "))
    (coding,) = (line for line in lines if line.startswith("coding "))
    data = cli("du", tmp_path / "run", "--codec", "--json").json["data"]
    assert dedup == f"dedup    {data['dedup_ratio']:.2f}, 31.2 KiB are equal to or a cast of others"
    assert coding.startswith(f"coding   {data['compression_ratio']:.2f}, ")
    assert not [line for line in screen("du", tmp_path / "run").splitlines() if "dedup" in line]


def test_without_tensors_there_is_no_ratio(cli, build) -> None:
    data = cli("du", build.root, "--codec", "--json").json["data"]

    assert (data["deduped_bytes"], data["dedup_ratio"], data["compression_ratio"]) == (
        0,
        None,
        None,
    )


def test_codecs_are_a_table_of_their_own_and_need_to_be_asked_for(cli, history) -> None:
    data = cli("du", history.root, "--json").json["data"]
    assert "codecs" not in data
    assert "codecs" not in data["checkpoints"][0]

    rows = [line.split("\t") for line in cli("du", history.root, "--codec").out.splitlines()]
    assert rows[:2] == [["exp@250", "other", "0", "0", "430"], ["exp@250", "plain", "2", "576", "576"]]  # fmt: skip  # noqa: E501
    assert len(rows) == 10


def test_a_header_that_cannot_be_read_is_a_note(cli, history) -> None:
    path = history.root / "checkpoint-100/model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"lm_head", b"lm_hand"))

    assert cli("du", history.root).err == ""
    answer = cli("du", history.root, "--codec")

    assert (answer.code, len(answer.out.splitlines())) == (0, 8)
    assert answer.err.startswith("note: checkpoint-100/model.safetensors: ")
