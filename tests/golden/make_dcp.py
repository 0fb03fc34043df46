"""Make tests/golden/dcp with torch.distributed.checkpoint: two ranks, tensors cut over both.

    python tests/golden/make_dcp.py

`sharded`: a model and its optimizer under FSDP, by get_state_dict. `values`: what stands beside
tensors: numbers, texts, lists, a tensor of no dimensions, an empty one, an optimizer by index.
Beside them, `<name>.whole.pt` has the same states as they were, whole.
"""

import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

HERE = Path(__file__).parent / "dcp"


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    parts = get_state_dict(model, optimizer)
    state = {"model": parts[0], "optimizer": parts[1], "step": torch.tensor(40), "epoch": 2}
    dcp.save(state, checkpoint_id=HERE / "sharded")
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    plain = nn.Linear(3, 2)
    by_index = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain(torch.ones(3)).sum().backward()
    by_index.step()
    values = {
        "state_dict": plain.state_dict(),
        "optimizer": by_index.state_dict(),
        "bf16": torch.arange(6).reshape(2, 3).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "names": ["a", {"b": torch.ones(2)}, None],
        "text": "words",
        "global_step": 7,
    }
    dcp.save(values, checkpoint_id=HERE / "values")
    if rank == 0:
        state = {"model": whole[0], "optimizer": whole[1], "step": torch.tensor(40), "epoch": 2}
        torch.save(state, HERE / "sharded.whole.pt")
        torch.save(values, HERE / "values.whole.pt")
    dist.barrier()
    del model, optimizer, parts
    dist.destroy_process_group()


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(f"{folder}/store",), nprocs=2)
