"""The same with DistributedDataParallel and data that is read in order, under torchrun.

    torchrun --nproc_per_node=2 examples/engine/ddp.py --workspace runs/engine --steps 60

The engine's lines are those of train.py: which rank writes what, and that all ranks commit or none
does, is not the loop's business. Kill it anywhere and start it again; try
`ckptcoord fork main@40 slow --seed 7 -- torchrun ... ddp.py`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
from torch.nn.parallel import DistributedDataParallel

from ckptcoord import CheckpointEngine, CkptError, EngineConfig, shutdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ByteGPT, ByteWindows, GPTConfig, split, standard_library_text


class Reader:
    """Batches of this rank, in order; knows where it is."""

    def __init__(self, data: ByteWindows, batch_size: int) -> None:
        self.data, self.batch_size, self.at = data, batch_size, c10d.get_rank() * batch_size

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next one; from the beginning again at the end."""
        indices = [(self.at + i) % len(self.data) for i in range(self.batch_size)]
        self.at += c10d.get_world_size() * self.batch_size
        windows = [self.data[i] for i in indices]
        return {name: torch.stack([w[name] for w in windows]) for name in windows[0]}

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        self.at = state["at"]


def main() -> int:
    """Train; every rank prints its loss of each step."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workspace", default="ml-experiments")
    parser.add_argument("--repo", default="gpt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--compression", default="auto", choices=["off", "auto", "aggressive"])
    args = parser.parse_args()
    c10d.init_process_group("gloo")
    try:
        train(args)
    except CkptError as error:
        sys.stderr.write(f"error[{error.code}]: {error.what}\n")
        sys.stderr.write(f"help: {error.help}\n" if error.help else "")
        return error.exit_code
    finally:
        shutdown()
    return 0


def train(args: argparse.Namespace) -> None:
    """One run, from the start or from the newest checkpoint."""
    torch.manual_seed(c10d.get_rank())
    training, _ = split(standard_library_text(1 << 20), context=64)
    model = DistributedDataParallel(ByteGPT(GPTConfig(layers=2, width=64, context=64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
    reader = Reader(training, batch_size=8)

    config = EngineConfig(compression=args.compression)
    with CheckpointEngine.attach(
        model, optimizer, scheduler, workspace=args.workspace, repo=args.repo, config=config
    ) as engine:
        engine.register_state("reader", reader.state_dict, reader.load_state_dict)
        engine.autocommit(every=args.every)
        engine.resume_latest()
        for step in range(engine.current_step + 1, args.steps + 1):
            loss = model(**reader.next_batch())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            engine.maybe_commit(step, metrics={"loss": loss.item()})
            print(step, loss.item(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
