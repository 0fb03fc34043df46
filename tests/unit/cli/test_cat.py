"""`ckptcoord cat`."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    Compression,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
)
from ckptcoord.dist.sharded import Sharded
from ckptcoord.testing.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

WEIGHT = torch.arange(35.0).reshape(7, 5)


def save(root: Path, states: list[dict[str, Any]], pattern=SharingPattern.GLOBAL, **settings):
    """One step after another."""
    live: dict[str, Any] = {}
    components = [StateComponent("model", live, pattern)]
    config = CoordinatorConfig(**settings)
    with CheckpointCoordinator(components, output_dir=root, config=config) as coordinator:
        for step, state in enumerate(states):
            live.clear()
            live.update(state)
            coordinator.save_checkpoint(step=step)


def save_ranks(root: Path, states: list[dict[str, Any]]) -> None:
    """One step, each rank its own."""

    def work(world):
        components = [StateComponent("model", states[world.rank], SharingPattern.PER_RANK)]
        with CheckpointCoordinator(components, {}, world, root) as coordinator:
            coordinator.save_checkpoint(step=0)

    assert run_ranks(len(states), work).values


def columns(whole: torch.Tensor, rank: int) -> Sharded:
    cut = slice(0, 3) if rank == 0 else slice(3, 5)
    return Sharded(whole[:, cut].clone(), offset=(0, cut.start), shape=tuple(whole.shape))


@pytest.fixture
def run(tmp_path):
    weight = WEIGHT.clone()
    weight[2, 3], weight[6, 0], weight[4, 4] = math.nan, math.nan, -math.inf
    bias = torch.tensor([0.0, -1.5, 2.5], dtype=torch.bfloat16)
    flags = torch.tensor([True, False])
    save(
        tmp_path / "run",
        [{"w": WEIGHT, "b": bias, "on": flags}, {"w": weight, "b": bias, "on": flags}],
    )
    return tmp_path / "run"


def found(cli, *words):
    data = cli("cat", *words, "--json").json["data"]
    return {one["name"]: one for one in data["tensors"]}


def test_a_tensor_has_its_statistics(cli, run) -> None:
    one = found(cli, run, "main@0", "model.w")["model.w"]

    values = WEIGHT.numpy().astype(np.float64)
    assert (one["dtype"], one["shape"], one["size_bytes"], one["count"]) == ("F32", [7, 5], 140, 35)
    assert (one["min"], one["max"], one["zeros"], one["nans"]) == (0.0, 34.0, 1, 0)
    assert (one["mean"], one["std"]) == (pytest.approx(17.0), pytest.approx(values.std()))
    assert one["norm"] == pytest.approx(np.linalg.norm(values))
    assert (one["pieces"], one["complete"]) == (1, True)


def test_into_a_pipe_it_is_a_line_each(cli, run) -> None:
    answer = cli("cat", run, "main@0", "model.*")

    assert answer.out == (
        "model.b\tBF16\t[3]\t-1.5\t2.5\t0.333333\t1.64992\t2.91548\t1\t0\t0\n"
        "model.on\tBOOL\t[2]\t0\t1\t0.5\t0.5\t1\t1\t0\t0\n"
        "model.w\tF32\t[7,5]\t0\t34\t17\t10.0995\t116.983\t1\t0\t0\n"
    )


def test_people_see_one_tensor_in_words(cli, run, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    out = cli("cat", run, "latest", "model.w").out
    assert "range  0 to 34\n" in out
    assert "NaN    2, first at [2,3], [6,0]\n" in out
    assert "Inf    1, first at [4,4]\n" in out
    table = cli("cat", run, "latest").out.splitlines()
    assert table[0].split() == [
        "tensor", "dtype", "shape", "min", "max", "mean", "std", "norm", "zeros", "nan", "inf",
    ]  # fmt: skip
    assert len(table) == 4


def test_nan_is_looked_for_in_all_tensors(cli, run) -> None:
    answer = cli("cat", run, "main@1", "--nan")

    assert (answer.code, answer.out) == (3, "model.w\t2 NaN\t1 Inf\tat [2,3]\n")
    assert answer.err == "1 of 3 tensors have NaN or Inf\n"
    clean = cli("cat", run, "main@0", "--nan")
    assert (clean.code, clean.out) == (0, "")
    assert clean.err == "no NaN or Inf in 3 tensors\n"
    assert cli("cat", run, "main@1", "model.b", "--nan").code == 0
    assert cli("cat", run, "main@1", "--nan", "--json").json["data"]["looked_at"] == 3


def test_values_are_shown_by_their_place(cli, run) -> None:
    assert cli("cat", run, "main@0", "model.b", "--values", "2").out == (
        "model.b\t0\t0.0\nmodel.b\t1\t-1.5\n"
    )
    assert found(cli, run, "main@0", "model.on", "--values", "9")["model.on"]["values"] == [
        True,
        False,
    ]
    values = found(cli, run, "main@1", "model.w", "--values", "35")["model.w"]["values"]
    assert values[:3] == [0.0, 1.0, 2.0]
    assert values[13] == "nan"


@pytest.mark.parametrize("given", ["x", "-1", "", "1.5", "9" * 30, "²"])
def test_values_that_are_no_count_are_a_usage_error(cli, run, given) -> None:
    assert cli("cat", run, "main@0", f"--values={given}").code == 2


def test_bytes_go_out_as_they_are(run) -> None:
    program = [sys.executable, "-m", "ckptcoord.cli", "cat", str(run), "main@0"]
    answer = subprocess.run([*program, "model.w", "--raw"], capture_output=True, check=True)

    assert answer.stdout == WEIGHT.numpy().tobytes()
    assert answer.stderr == b""


def test_bytes_are_of_one_tensor_and_not_for_a_terminal(cli, run, monkeypatch) -> None:
    assert cli("cat", run, "main@0", "model.*", "--raw").code == 2
    assert cli("cat", run, "main@0", "model.w", "--raw", "--json").code == 2
    assert cli("cat", run, "main@0", "model.w", "--raw", "--nan").code == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli("cat", run, "main@0", "model.w", "--raw").code == 2


def test_tensors_in_pieces_are_put_together(cli, tmp_path) -> None:
    whole = WEIGHT.clone()
    whole[1, 4], whole[3, 0], whole[3, 3] = math.nan, math.nan, math.nan
    save_ranks(tmp_path / "run", [{"w": columns(whole, rank)} for rank in (0, 1)])

    one = found(cli, tmp_path / "run", "latest", "model.w")["model.w"]
    assert (one["pieces"], one["complete"], one["count"], one["shape"]) == (2, True, 35, [7, 5])
    assert one["nan_at"] == [[1, 4], [3, 0], [3, 3]]
    rest = whole[torch.isfinite(whole)].numpy().astype(np.float64)
    assert (one["mean"], one["std"]) == (pytest.approx(rest.mean()), pytest.approx(rest.std()))
    program = [sys.executable, "-m", "ckptcoord.cli", "cat", str(tmp_path / "run"), "latest"]
    answer = subprocess.run([*program, "model.w", "--raw"], capture_output=True, check=True)
    assert answer.stdout == whole.numpy().tobytes()


def test_what_differs_from_rank_to_rank_is_named_by_its_copy(cli, tmp_path) -> None:
    states = [
        {"rank": rank, "w": columns(WEIGHT, rank), "x": torch.tensor(rank)} for rank in (0, 1)
    ]
    save_ranks(tmp_path / "run", states)

    data = found(cli, tmp_path / "run")
    assert set(data) == {f"model.rank{rank:05d}.{name}" for rank in (0, 1) for name in ("w", "x")}
    part = data["model.rank00001.w"]
    assert (part["complete"], part["count"], part["min"], part["max"]) == (False, 14, 3.0, 34.0)
    assert cli("cat", tmp_path / "run", "latest", "model.rank00001.w", "--raw").code == 2


@pytest.mark.parametrize("base", ["anchor", "previous"])
def test_deltas_are_decoded_from_any_point_of_a_chain(cli, tmp_path, base) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [{"w": torch.randn(300, 200, generator=generator)}]
    for _ in range(3):
        states.append({"w": states[-1]["w"] + 1e-4})
    save(tmp_path / "run", states, compression=Compression(level="auto", base=base))

    for step, state in enumerate(states):
        one = found(cli, tmp_path / "run", f"main@{step}", "model.w")["model.w"]
        values = state["w"].numpy().astype(np.float64)
        assert (one["min"], one["max"]) == (values.min(), values.max())
        assert one["mean"] == pytest.approx(values.mean())
    kinds = [
        cli("show", tmp_path / "run", f"main@{step}", "--json").json["data"]["kind"]
        for step in range(4)
    ]
    assert kinds == ["anchor", "delta", "delta", "delta"]


def test_empty_and_scalar_tensors_are_no_error(cli, tmp_path) -> None:
    state = {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "z": torch.tensor([1 + 2j])}
    save(tmp_path / "run", [state])

    data = found(cli, tmp_path / "run", "latest", "*", "--values", "2")
    assert (data["model.none"]["count"], data["model.none"]["min"]) == (0, None)
    assert (data["model.one"]["mean"], data["model.one"]["values"]) == (2.5, [2.5])
    assert (data["model.z"]["count"], data["model.z"]["values"]) == (2, ["(1+2j)"])


@pytest.mark.parametrize(
    "name", ["model.x", "modl.w", "model", "", "..", "/", "a\0b", "x.lock", "model.[", "zz*", "[!"]
)
def test_a_name_that_no_tensor_has_offers_the_nearest(cli, run, name) -> None:
    answer = cli("cat", "-C", run, "--", "main@0", name)

    assert answer.code == 12
    assert "error[CC029]" in answer.err
    assert "model.w" in answer.err or "model." in answer.err


def test_a_pattern_without_end_is_a_usage_error(cli, run) -> None:
    assert cli("cat", run, "main@0", "*a" * 5000).code == 2
    assert cli("cat", run, "main@0", "x" * 10_000).code == 2
    assert cli("cat", run, "main@0", "*a" * 1000).code == 12


@pytest.mark.parametrize("ref", ["", "/", "..", "a\0b", "x" * 10_000, "x.lock", "no", "main@7"])
def test_a_ref_that_names_nothing_is_an_error(cli, run, ref) -> None:
    answer = cli("cat", "-C", run, "--", ref, "model.w")

    assert answer.code in (2, 12)
    assert answer.err.startswith("error[")


def test_damage_is_an_error_and_no_number(cli, run) -> None:
    shard = run / "checkpoint-0/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)

    answer = cli("cat", run, "main@0", "model.w")

    assert answer.code == 13
    assert answer.out == ""
    assert "model.w" in answer.err or "'w'" in answer.err


def test_memory_does_not_grow_with_the_tensor(tmp_path) -> None:
    from ckptcoord import open_repository
    from ckptcoord.dist.contents import Contents
    from ckptcoord.repo.summary import raw_parts, summarise

    save(tmp_path / "run", [{"w": torch.zeros(16 << 20)}])
    repository = open_repository(tmp_path / "run")
    contents = Contents(repository, repository.resolve("latest"))
    held = contents.find("model.w")
    tracemalloc.start()
    with contents.shards() as shards:
        (one,) = summarise([("model.w", held)], shards)
        assert sum(part.nbytes for part in raw_parts("model.w", held, shards)) == 64 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert one.statistics.zeros == 16 << 20
    assert peak < 24 << 20


def test_a_file_is_opened_once_however_many_tensors_it_has(cli, tmp_path, monkeypatch) -> None:
    from ckptcoord.dist.shardset import ShardSet

    save(tmp_path / "run", [{f"w{n}": torch.tensor([float(n), math.inf]) for n in range(1500)}])
    opened: list[str] = []
    reader = ShardSet.reader

    def counting(self, record):
        opened.append(record.path)
        return reader(self, record)

    monkeypatch.setattr(ShardSet, "reader", counting)

    answer = cli("cat", tmp_path / "run", "latest", "--nan")

    assert (answer.code, answer.out.count("\n")) == (3, 1500)
    assert opened == ["model.safetensors"]


def test_few_files_are_open_at_once(tmp_path, monkeypatch) -> None:
    from ckptcoord import open_repository
    from ckptcoord.dist.contents import Contents
    from ckptcoord.repo import summary

    save_ranks(tmp_path / "run", [{"w": torch.tensor(float(rank))} for rank in range(6)])
    monkeypatch.setattr(summary, "_MOST_FILES", 2)
    repository = open_repository(tmp_path / "run")
    contents = Contents(repository, repository.resolve("latest"))
    held = contents.tensors("model")

    with contents.shards() as shards, summary._Open(shards) as files:
        for one in held.items():
            assert files.of([one])
            assert len(files._open) <= 2
    with contents.shards() as shards:
        found = list(summary.summarise(held.items(), shards))
    assert [one.statistics.mean for one in found] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
