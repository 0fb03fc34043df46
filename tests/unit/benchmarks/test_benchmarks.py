"""The benchmarks run from end to end on tiny sizes. What they find is not looked at."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_spec = importlib.util.spec_from_file_location("benchmarks_common", BENCHMARKS / "common.py")
common = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(common)


def run(name, *arguments):
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ratios_of(name, *arguments):
    """The report's ratios, once its shape is found right."""
    report = json.loads(run(name, "--json", *arguments))
    assert set(report) == {"benchmark", "ratios", "figures"}
    assert report["benchmark"] == name.removesuffix(".py")
    for ratio in report["ratios"].values():
        assert set(ratio) == {"median", "min", "max", "runs"}
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["runs"] >= 1
    assert all(isinstance(one, int | float | str) for one in report["figures"].values())
    return set(report["ratios"])


SAVE_LOAD = {
    "save_vs_raw",
    "save_vs_best_peer",
    "save_vs_torch_save",
    "save_vs_safetensors",
    "save_vs_dcp",
    "load_vs_safetensors_plus_digest",
    "load_vs_torch_load",
    "load_vs_dcp",
    "load_cold_vs_safetensors_plus_digest",
    "save_memory_of_one_shard",
}


@pytest.mark.dist
@pytest.mark.parametrize(
    "ranks", [["1proc"], pytest.param(["1proc", "2rank"], marks=pytest.mark.slow)]
)
def test_save_load_reports_every_ratio_by_its_name(tmp_path, ranks):
    numbers = ",".join(end[0] for end in ranks)
    found = ratios_of(
        "save_load.py",
        *("--size-mb", "2", "--rounds", "1", "--ranks", numbers, "--dir", str(tmp_path)),
    )
    assert found == {f"{name}_{end}" for name in SAVE_LOAD for end in ranks}
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_coordination_reports_every_ratio_by_its_name():
    found = ratios_of(
        "coordination.py", "--quick", "--ranks", "16", "--tensors", "64", "--dcp-ranks", "2"
    )
    assert found == {"seconds_of_bar", "memory_of_bar", "time_of_dcp", "bytes_of_dcp"}


def test_without_json_there_are_tables():
    printed = run(
        "coordination.py", *("--quick", "--ranks", "16", "--tensors", "64"), "--dcp-ranks=2"
    )
    assert "seconds_of_bar" in printed
    assert "median" in printed


# --- what they share -----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=9))
def test_ratios_are_taken_round_by_round(rounds):
    ours, theirs = zip(*rounds, strict=True)
    found = common.paired(ours, theirs)
    assert found["runs"] == len(rounds)
    assert found["median"] == round(statistics.median(a / b for a, b in rounds), 4)
    assert found["min"] == round(min(a / b for a, b in rounds), 4)


@given(st.integers(0, 99))
def test_every_round_has_every_side_once_and_in_the_same_order_on_all_ranks(turn):
    sides = ["raw", "ours", "theirs"]
    assert sorted(common.order(sides, turn)) == sorted(sides)
    assert common.order(sides, turn) == common.order(tuple(sides), turn)


def test_the_order_of_the_sides_changes():
    assert len({tuple(common.order(["a", "b", "c"], turn)) for turn in range(30)}) == 6


def test_the_best_side_has_the_lowest_median():
    seconds = {"a": [1.0, 2.0, 9.0], "b": [1.9, 1.9, 99.0], "c": [0.0, 0.0, 0.0]}
    assert common.best_of(seconds, ("a", "b")) == "b"


@pytest.mark.slow
def test_incremental_reports_every_ratio_by_its_name(tmp_path):
    found = ratios_of(
        "incremental.py", *("--size-mb", "8", "--rounds", "1", "--dir", str(tmp_path))
    )
    kinds = ("star", "chain", "strict_chain", "sparse_chain")
    whats = ("vs_anchor", "cold_vs_anchor", "memory_of_bar")
    loads = {f"{kind}_load_{what}" for kind in kinds for what in whats}
    saves = {f"{kind}_save_memory_of_bar" for kind in ("sparse", *kinds)}
    sparse = {
        f"sparse_{one}" for one in ("save_vs_full", "save_vs_torch_save", "stored_vs_changed")
    }
    assert found == loads | saves | sparse
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.slow
def test_lossy_reports_every_ratio_by_its_name():
    found = ratios_of("lossy.py", "--quick")
    whats = ("stored_vs_torch_save", "time_vs_torch_save")
    assert found >= {f"{side}_{what}" for side in ("exact", "bounded") for what in whats}


@pytest.mark.slow
def test_diff_reports_every_ratio_by_its_name():
    sides = [f"{what}_{threads}t" for what in ("anchors", "delta") for threads in (1, 2)]
    names = {f"{of}_{side}" for of in ("bar", "memory") for side in sides} | {"time_vs_torch"}
    assert ratios_of("diff.py", "--size-mb", "16", "--rounds", "1") == names


@pytest.mark.slow
def test_cli_reports_every_ratio_by_its_name():
    found = ratios_of("cli.py", "--quick", "--commits", "20", "--tensors", "200")
    commands = ("show", "inspect", "ls", "du", "status", "branch", "completion")
    assert found >= {f"{one}_vs_{what}" for one in commands for what in ("bar", "python")}


@pytest.mark.slow
def test_reshard_reports_every_ratio_by_its_name(tmp_path):
    found = ratios_of(
        "reshard.py", *("--size-mb=16", "--rounds=1", "--pairs=2:1", "--dir", str(tmp_path))
    )
    assert found >= {"save_vs_dcp_2to1", "load_vs_dcp_2to1", "unique_bytes_read_2to1"}
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.slow
def test_detect_reports_its_ratios():
    assert ratios_of("detect.py", "--size-mb", "16", "--rounds", "1")


PAGE = (BENCHMARKS.parent / "docs/benchmarks.md").read_text()
USAGE = re.findall(r"^python benchmarks/(\w+\.py)((?:.*\n +)*.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "words"), USAGE)
def test_the_page_names_options_that_there_are(name, words):
    known = (BENCHMARKS / name).read_text() + (BENCHMARKS / "common.py").read_text()
    options = re.findall(r"--[\w-]+", words)
    assert options
    assert [one for one in options if f'"{one}"' not in known] == []
