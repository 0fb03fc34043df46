#!/usr/bin/env python3
"""Comparing two checkpoints: how fast both sides' bytes are gone through, in how much memory.

    python benchmarks/diff.py [--quick] [--json] [--size-mb N] [--rounds N] [--folder DIR]

A state of float32 tensors is saved three times, each element moved a little in between: as an
anchor, as another anchor, and as a delta against that. Each side runs in a process of its own, with
the files in the page cache, and says its seconds and by how much its memory grew at most. `anchors`
and `delta` are ckptcoord's, by threads; every byte is held to its BLAKE3 digest. `torch` is what
one writes without it, for the anchors only: both files with safetensors, tensor by tensor, and the
same figures of each by torch, with two threads and no digests.

Speed is of the bytes of both checkpoints' tensors together. Ratios (less is better):
`bar_<side>` is 1 GB/s over the speed, `memory_<side>` the growth over 256 MiB, whatever the size of
the checkpoints, and `time_vs_torch` our time for the anchors with two threads over torch's. The
bars are 1.0. The figures `cpu_gbs_<side>` are the bytes over the time of one core, for a machine
that others use meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Figure, emit, options, order, paired, ratio, spread_table
from sides import peak_memory, read_all

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST, SECOND, DELTA = "main@1", "main@2", "main@3"
SIDES = {
    "anchors_1t": (FIRST, SECOND, 1),
    "anchors_2t": (FIRST, SECOND, 2),
    "delta_1t": (SECOND, DELTA, 1),
    "delta_2t": (SECOND, DELTA, 2),
}
TORCH = "torch_2t"
TENSOR_MB = 16
MEMORY_BAR = 256 << 20


def main() -> None:
    """Write the checkpoints, then time each side in turn."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, default=1024, help="of each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write, instead of a temporary one")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a child runs
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.folder)))
        return
    size_mb, rounds = (128, 2) if args.quick else (args.size_mb, args.rounds)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        build(Path(folder), size_mb)
        found = measure(Path(folder), rounds)
    report(found, 2 * size_mb << 20, as_json=args.json)


def build(folder: Path, size_mb: int) -> None:
    """Three saves of a state."""
    import torch

    from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent

    torch.manual_seed(7)
    names = [f"layers.{at}.weight" for at in range(max(1, size_mb // TENSOR_MB))]
    state = {name: torch.randn(TENSOR_MB << 18).mul_(0.02) for name in names}
    components = [StateComponent("model", state, SharingPattern.GLOBAL)]
    for step, compression in ((1, "off"), (2, "off"), (3, "auto")):
        config = CoordinatorConfig(compression=compression)
        with CheckpointCoordinator(components, output_dir=folder, config=config) as coordinator:
            coordinator.save_checkpoint(step=step)
        for tensor in state.values():
            tensor.add_(torch.randn_like(tensor), alpha=1e-6)


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """What each side says, by round; the first round is not counted."""
    sides = [*SIDES, TORCH]
    found: dict[str, dict[str, list[float]]] = {
        what: {side: [] for side in sides} for what in ("seconds", "cpu_seconds", "memory_bytes")
    }
    read_all(folder)
    for turn in range(rounds + 1):
        for side in order(sides, turn):
            words = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
            said = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
            for what, value in said.items() if turn else ():
                found[what][side].append(value)
    return found


def run_side(side: str, folder: Path) -> dict[str, float]:
    """One side, in this process; what it imports and compiles is there before it is timed."""
    work = by_torch(folder) if side == TORCH else by_us(folder, *SIDES[side])
    spans: list[float] = []

    def timed() -> None:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        work()
        spans.extend((time.perf_counter() - began_s, time.process_time() - began_cpu_s))

    grown = peak_memory(timed)
    return {"seconds": spans[0], "cpu_seconds": spans[1], "memory_bytes": max(grown, 1)}


def by_us(folder: Path, old: str, new: str, threads: int) -> Callable[[], None]:
    """What `ckptcoord diff` does."""
    import numpy as np

    from ckptcoord import open_repository
    from ckptcoord.codec import delta
    from ckptcoord.codec.compare import Tally

    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal(1 << 16).astype(np.float32).view(np.uint8) for _ in "ab")
    Tally("F32").add(a, b)
    delta.decode(memoryview(delta.encode(a, b, dtype="F32")), b, dtype="F32")
    repository = open_repository(folder)

    def work() -> None:
        found = repository.diff(old, new, threads=threads)
        if not found.differs or found.read_bytes < 1 << 20:
            raise RuntimeError("nothing was compared")

    return work


def by_torch(folder: Path) -> Callable[[], None]:
    """Norms, largest difference and cosine of each tensor of both anchors."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(2)
    files = [
        sorted((folder / name).glob("*.safetensors")) for name in ("checkpoint-1", "checkpoint-2")
    ]

    def work() -> None:
        for one, other in zip(*files, strict=True):
            with safe_open(one, "pt") as old, safe_open(other, "pt") as new:
                for name in old.keys():  # noqa: SIM118 (it is no dict)
                    a, b = old.get_tensor(name).view(-1), new.get_tensor(name).view(-1)
                    change = b - a
                    norms = [torch.linalg.vector_norm(part) for part in (change, a, b)]
                    found = [*norms, change.abs().max(), torch.dot(a, b)]
                    if not all(map(torch.isfinite, found)):
                        raise RuntimeError("something is not finite")

    return work


def report(found: dict[str, dict[str, list[float]]], size_bytes: int, *, as_json: bool) -> None:
    """Print ratios and figures."""
    seconds, memory = found["seconds"], found["memory_bytes"]
    ratios = {}
    for side in SIDES:
        ratios[f"bar_{side}"] = ratio([value * 1e9 / size_bytes for value in seconds[side]])
        ratios[f"memory_{side}"] = ratio([value / MEMORY_BAR for value in memory[side]])
    ratios["time_vs_torch"] = paired(seconds["anchors_2t"], seconds[TORCH])
    figures: dict[str, Figure] = {"compared_bytes": size_bytes}
    for side, values in memory.items():
        figures[f"memory_mib_{side}"] = round(max(values) / 2**20, 1)
        cpu_s = statistics.median(found["cpu_seconds"][side])
        figures[f"cpu_gbs_{side}"] = round(size_bytes / cpu_s / 1e9, 2)
    table = spread_table("both checkpoints' bytes", seconds, size_bytes)
    emit("diff", ratios, figures, as_json=as_json, tables=[table])


if __name__ == "__main__":
    main()
