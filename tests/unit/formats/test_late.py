"""A state of torch.distributed.checkpoint comes in tensor by tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptcoord
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.formats.detect import find_source
from ckptcoord.formats.importing import plan_import, run_import
from ckptcoord.formats.late import LateTensor

GOLDEN = Path(__file__).parents[2] / "golden/dcp"


def test_it_is_read_each_time_and_only_then() -> None:
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return torch.arange(6, dtype=torch.int64).reshape(2, 3)

    late = LateTensor(read, torch.int64, (2, 3))
    assert (late.shape, late.dtype, late.numel(), late.nbytes) == ((2, 3), torch.int64, 6, 48)
    assert "LateTensor" in repr(late)
    assert reads == []
    assert tensor_bytes(late).tobytes() == tensor_bytes(read()).tobytes()
    assert torch.equal(late, read())
    assert torch.stack([late, late]).tolist() == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert type(late + 0) is torch.Tensor
    assert int(LateTensor(lambda: torch.tensor(7), torch.int64, ())) == 7
    assert len(reads) == 7


def test_no_file_stays_open_and_no_tensor_in_memory_between(tmp_path) -> None:
    (one,) = find_source(GOLDEN / "sharded").checkpoints
    state = one.read()
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert [path for path in opened if path.startswith(str(GOLDEN.resolve()))] == []
    tensors = [t for t in state.components["model"].values() if t.numel()]
    assert tensors
    assert all(type(tensor) is LateTensor for tensor in tensors)


@pytest.mark.parametrize("kind", ["sharded", "values"])
def test_what_changes_between_plan_and_save_is_an_error_and_nothing_is_committed(
    tmp_path, kind
) -> None:
    import shutil

    shutil.copytree(GOLDEN / kind, tmp_path / "d")
    source = find_source(tmp_path / "d")
    plans = plan_import(source)
    state = plans[0].checkpoint.read()
    assert state.components
    for file in (tmp_path / "d").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ckptcoord.CkptError, match="distcp"):
        list(run_import(source, plans, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


SAVE = """
import sys, torch, warnings
from pathlib import Path
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
warnings.simplefilter("ignore")
torch.set_num_threads(1)
ROWS = int(sys.argv[2])
names = [(i, half) for i in range(4) for half in (0, 1)]
halves = {f"w{i}/{half}": torch.full((ROWS, 1 << 17), i + half / 2) for i, half in names}
dcp.save(halves, checkpoint_id=sys.argv[1], no_dist=True)
# As two ranks would have: each tensor in two chunks.
import pickle
path = Path(sys.argv[1]) / ".metadata"
metadata = pickle.loads(path.read_bytes())
tensors, places = {}, {}
for index, place in metadata.storage_data.items():
    name, half = index.fqn.split("/")
    old = metadata.state_dict_metadata[index.fqn]
    offset = torch.Size([ROWS * int(half), 0])
    entry = tensors.setdefault(name, type(old)(old.properties, torch.Size([2 * ROWS, 1 << 17]), []))
    entry.chunks.append(ChunkStorageMetadata(offset, old.size))
    places[MetadataIndex(name, offset)] = place
metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = tensors, places, None
path.write_bytes(pickle.dumps(metadata))
"""
IMPORT = """
import json, sys
from pathlib import Path
import ckptcoord, torch
from ckptcoord.formats.detect import find_source
from ckptcoord.formats.importing import plan_import, run_import
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss would begin at that of who started this
before = resident("VmRSS")
source = find_source(sys.argv[1])
(done,) = run_import(source, plan_import(source), sys.argv[2])
print(json.dumps({"peak": resident("VmHWM") - before, "size": done.plan.size_bytes}))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_tensor_and_not_by_the_state(tmp_path) -> None:
    words = [sys.executable, "-c"]
    subprocess.run([*words, SAVE, tmp_path / "d", "64"], check=True)
    done = subprocess.run(
        [*words, IMPORT, tmp_path / "d", tmp_path / "run"], check=True, capture_output=True
    )
    said = json.loads(done.stdout)
    window = 64 << 20  # a tensor; the state has four, in two chunks each
    assert said["size"] == 4 * window
    assert said["peak"] < 3 * window
    found = ckptcoord.load(tmp_path / "run", "main@0")["model"]["w3"]
    assert torch.equal(found[:64], torch.full((64, 1 << 17), 3.0))
    assert torch.equal(found[64:], torch.full((64, 1 << 17), 3.5))
