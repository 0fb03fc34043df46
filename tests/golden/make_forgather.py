"""Make tests/golden/forgather as Forgather lays checkpoints out.

    python tests/golden/make_forgather.py

Forgather is on no package registry, so this writes the files by the names, and with the calls, that
its code (early 2026) has: `checkpoint-10` is of a data-parallel job of two ranks, with a manifest;
`checkpoint-9`, older, of one without manifest, whose name would come last as text. `whole.pt` has
what is in them.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent / "forgather"


def state(steps: int):
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight  # tied
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model.state_dict(), optimizer.state_dict(), scheduler.state_dict()


def save(folder: Path, steps: int, *, ranks: int, manifest: bool) -> dict:
    folder.mkdir(parents=True)
    model, optimizer, scheduler = state(steps)
    shards = "pytorch_model-00001-of-00001.bin"
    index = {
        "metadata": {"total_size": 0, "param_sharing": [["0.weight", "2.weight"]]},
        "weight_map": dict.fromkeys(model, shards),
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=4))
    torch.save(model, folder / shards)
    trainer = {"global_step": steps, "raw_epoch": steps / 4}
    states = {"optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    for key, value in states.items():
        torch.save(value, folder / f"{key}_state.pt")
    rng = [{"torch": torch.Generator().manual_seed(r).get_state()} for r in range(ranks)]
    for rank in range(ranks):
        torch.save(rng[rank], folder / f"rng_state_rank_{rank}.pt")
    torch.save({"best_checkpoints": [[str(folder.name), 2.5]]}, folder / "checkpoint_metadata.pt")
    (folder / "eval_metrics.json").write_text(json.dumps({"eval_loss": steps / 4}))
    if manifest:
        patterns = {"optimizer": "replicated", "scheduler": "replicated", "trainer": "global"}
        entries = {
            key: {"key": key, "sharing_pattern": pattern, "ranks": [0], "size_bytes": 1}
            for key, pattern in patterns.items()
        }
        every = list(range(ranks))
        entries["rng"] = {"key": "rng", "sharing_pattern": "per_rank", "ranks": every}
        document = {
            "checkpoint_path": f"output/checkpoints/{folder.name}",
            "world_size": ranks,
            "timestamp": "2026-02-03T04:05:06",
            "components": entries,
            "pytorch_version": torch.__version__,
            "metadata": {},
        }
        (folder / "checkpoint_manifest.json").write_text(json.dumps(document, indent=2))
    return {"model": model, "rng": rng, **states}


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    inside = HERE / "output/checkpoints"
    whole = {
        10: save(inside / "checkpoint-10", 10, ranks=2, manifest=True),
        9: save(inside / "checkpoint-9", 9, ranks=1, manifest=False),
    }
    torch.save(whole, HERE / "whole.pt")
