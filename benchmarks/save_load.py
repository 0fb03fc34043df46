#!/usr/bin/env python3
"""Saving and loading 1 GB of state, durably, beside torch.save, safetensors and DCP.

One process first, then 4 ranks (gloo) that hold the same state: ckptcoord and DCP stripe it over
the ranks; torch.save and safetensors write on rank 0 while the others wait. A save ends when files
and folders are synced, on every side, and what it wrote is deleted, and the deletion synced, before
the next begins. A load ends with the bytes in the live tensors; that of safetensors with a BLAKE3
check of them, as ckptcoord's does. `raw` is a pwrite of the same bytes and one fsync, a share a
rank. Memory is what a save in a fresh process needs beyond the state.

    python benchmarks/save_load.py [--quick] [--json] [--size-mb N] [--rounds N] [--ranks 1,4]

Ratios (less is better): `save_vs_raw_*` has the bar 1.1, `save_vs_best_peer_*` 1.0,
`load_vs_safetensors_plus_digest_*` 1.1 and `save_memory_of_one_shard_*` 1.0.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common import Figure, Ratio, best_of, emit, options, order, paired, ratio, spread_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.context import ForkServerContext, ForkServerProcess

    from rich.table import Table

Seconds: TypeAlias = dict[str, list[float]]
Results: TypeAlias = dict[str, Seconds]

OURS, RAW = "ckptcoord", "raw"
PEERS = ("torch.save", "safetensors", "dcp")
SAVING = (OURS, RAW, *PEERS)
LOADING = (OURS, *PEERS)
RESULT = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the benchmark.

    Attributes:
        phase: `time`, or `memory <side>`.
    """

    size_bytes: int
    rounds: int
    ranks: int
    threads: int
    folder: Path
    phase: str
    port: int = 0


# --- in every rank --------------------------------------------------------------------------------


def rank_main(rank: int, settings: Settings) -> None:
    """One rank from start to end; rank 0 leaves what it found in `RESULT`."""
    import torch
    import torch.distributed as dist

    from ckptcoord.dist.shutdown import shutdown

    if settings.ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings.port))
        dist.init_process_group("gloo", rank=rank, world_size=settings.ranks)
        torch.set_num_threads(1)  # as torchrun does
    run = _Run(rank, settings)
    if settings.phase == "time":
        results: Results = {
            "save": run.saves(),
            "load": run.loads(cold=False),
            "load_cold": run.loads(cold=True),
        }
    else:
        results = {"memory": {"both": run.memory(settings.phase.removeprefix("memory "))}}
    if rank == 0:
        (settings.folder / RESULT).write_text(json.dumps(results))
    run.close()
    shutdown()


class _Run:
    """The state of one rank, and its sides."""

    def __init__(self, rank: int, settings: Settings) -> None:
        from sides import Job, Side, digests_of, make_side, make_state

        self._settings = settings
        self._job = Job(
            rank=rank, size=settings.ranks, threads=settings.threads, folder=settings.folder
        )
        self._state = make_state(settings.size_bytes, seed=1)
        self._digests = digests_of(self._state)
        names: Sequence[str] = SAVING
        if settings.phase != "time":
            names = (settings.phase.removeprefix("memory "),)
        self._sides: dict[str, Side] = {
            name: make_side(name, self._job, self._state, self._digests) for name in names
        }

    def saves(self) -> Seconds:
        """Seconds a save took, by side and round; one round goes before to warm up."""
        seconds: Seconds = {side: [] for side in SAVING}
        for turn in range(self._settings.rounds + 1):
            for name in order(SAVING, turn):
                side = self._sides[name]
                took = self._timed(side.save)
                if turn:
                    seconds[name].append(took)
                self._remove(side.files())
        return seconds

    def loads(self, *, cold: bool) -> Seconds:
        """Seconds a load took, from the page cache or not; warmed up, and checked, by one round."""
        from sides import drop_cached, read_all

        seconds: Seconds = {side: [] for side in LOADING}
        for name in LOADING:
            self._sides[name].save(self._state)
        for turn in range(self._settings.rounds + 1):
            for name in order(LOADING, turn):
                side = self._sides[name]
                if self._job.rank == 0:
                    (drop_cached if cold else read_all)(side.files())
                if not turn:
                    self._blank()
                took = self._timed(side.load)
                if turn:
                    seconds[name].append(took)
                else:
                    self._check(name)
        for name in LOADING:
            self._remove(self._sides[name].files())
        return seconds

    def memory(self, name: str) -> list[float]:
        """Bytes that a save took beyond what a rank had, at most, and of the largest file."""
        from sides import peak_memory

        side = self._sides[name]
        extra = peak_memory(lambda: side.save(self._state))
        self._barrier()
        largest = max(path.stat().st_size for path in side.files().rglob("*") if path.is_file())
        return [self._most(extra), largest]

    def close(self) -> None:
        """End what runs for the sides."""
        for side in self._sides.values():
            side.close()

    def _timed(self, work: Callable[[dict[str, object]], None]) -> float:
        self._barrier()
        began_s = time.perf_counter()
        work(self._state)
        self._barrier()
        return time.perf_counter() - began_s

    def _barrier(self) -> None:
        import torch.distributed as dist

        if self._job.size > 1:
            dist.barrier()

    def _most(self, value: int) -> int:
        import torch
        import torch.distributed as dist

        most = torch.tensor(value)
        if self._job.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _remove(self, folder: Path) -> None:
        """Delete what a side wrote, durably: that is not billed to the next one."""
        from sides import sync

        self._barrier()
        if self._job.rank == 0:
            shutil.rmtree(folder)
            sync(folder.parent)
        self._barrier()

    def _blank(self) -> None:
        from sides import tensors_of

        for tensor in tensors_of(self._state).values():
            tensor.zero_()

    def _check(self, name: str) -> None:
        from sides import digests_of

        if digests_of(self._state) != self._digests:
            sys.exit(f"{name} did not load what was saved")


# --- in the parent --------------------------------------------------------------------------------


def run_ranks(context: ForkServerContext, settings: Settings) -> Results:
    """Run the ranks in a scratch folder and return what rank 0 found."""
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-", dir=settings.folder) as name:
        inside = replace(settings, folder=Path(name), port=free_port())
        children = [
            context.Process(target=rank_main, args=(rank, inside)) for rank in range(settings.ranks)
        ]
        for child in children:
            child.start()
        join(children)
        found: Results = json.loads((inside.folder / RESULT).read_text())
        return found


def join(children: Sequence[ForkServerProcess]) -> None:
    """Wait for all; when one fails, end the others, and the benchmark."""
    running = {child.sentinel: child for child in children}
    while running:
        for sentinel in wait(list(running)):
            assert isinstance(sentinel, int)
            child = running.pop(sentinel)
            child.join()
            if child.exitcode:
                for other in running.values():
                    other.kill()
                sys.exit(f"a rank failed with exit code {child.exitcode}")


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def label(ranks: int) -> str:
    """How the names of ratios and figures end."""
    return "1proc" if ranks == 1 else f"{ranks}rank"


def ratios_of(timed: Mapping[str, Seconds], ranks: int) -> dict[str, Ratio]:
    """Ours against each other side, round by round; the best peer is that of the lowest median."""
    end = label(ranks)
    save, load, cold = timed["save"], timed["load"], timed["load_cold"]
    ratios = {
        f"save_vs_raw_{end}": paired(save[OURS], save[RAW]),
        f"save_vs_best_peer_{end}": paired(save[OURS], save[best_of(save, PEERS)]),
    }
    ratios |= {
        f"save_vs_{peer.replace('.', '_')}_{end}": paired(save[OURS], save[peer]) for peer in PEERS
    }
    ratios |= {
        f"load_vs_safetensors_plus_digest_{end}": paired(load[OURS], load["safetensors"]),
        f"load_vs_torch_load_{end}": paired(load[OURS], load["torch.save"]),
        f"load_vs_dcp_{end}": paired(load[OURS], load["dcp"]),
        f"load_cold_vs_safetensors_plus_digest_{end}": paired(cold[OURS], cold["safetensors"]),
    }
    return ratios


def figures_of(timed: Mapping[str, Seconds], ranks: int) -> dict[str, Figure]:
    """The medians behind the ratios."""
    return {
        f"{label(ranks)} {phase.replace('_', ' ')} s: {side}": round(statistics.median(values), 3)
        for phase, seconds in timed.items()
        for side, values in seconds.items()
    }


def memory_of(
    context: ForkServerContext, base: Settings
) -> tuple[dict[str, Ratio], dict[str, Figure]]:
    """What a save needs beyond the state, each side in fresh processes."""
    end = label(base.ranks)
    ratios: dict[str, Ratio] = {}
    figures: dict[str, Figure] = {}
    for side in (OURS, *PEERS):
        extra, largest = run_ranks(context, replace(base, phase=f"memory {side}"))["memory"]["both"]
        figures[f"{end} save, extra MB a rank: {side}"] = round(extra / 1e6, 1)
        if side == OURS:
            ratios[f"save_memory_of_one_shard_{end}"] = ratio([extra / largest])
    return ratios, figures


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, help="MB of state; 1024, or 256 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds that count; 9, or 3 with --quick")
    parser.add_argument("--ranks", default="1,4", help="numbers of processes, by comma")
    parser.add_argument("--threads", type=int, default=2, help="of every side, a rank")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="writes below this folder")
    arguments = parser.parse_args()
    size_mb = arguments.size_mb or (256 if arguments.quick else 1024)
    base = Settings(
        size_bytes=size_mb << 20,
        rounds=arguments.rounds or (3 if arguments.quick else 9),
        ranks=1,
        threads=arguments.threads,
        folder=Path(arguments.dir),
        phase="time",
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.checkpoint", "safetensors.torch", "ckptcoord.dist.coordinator"]
    )
    ratios: dict[str, Ratio] = {}
    figures: dict[str, Figure] = {
        "state, MB": size_mb,
        "rounds": base.rounds,
        "threads a rank": base.threads,
        "cores": os.cpu_count() or 0,
    }
    tables: list[Table] = []
    for ranks in map(int, arguments.ranks.split(",")):
        settings = replace(base, ranks=ranks)
        timed = run_ranks(context, settings)
        ratios |= ratios_of(timed, ranks)
        figures |= figures_of(timed, ranks)
        more_ratios, more_figures = memory_of(context, settings)
        ratios |= more_ratios
        figures |= more_figures
        tables += [
            spread_table(f"{phase}, {label(ranks)}, {size_mb} MiB", seconds, base.size_bytes)
            for phase, seconds in timed.items()
        ]
    emit("save_load", ratios, figures, as_json=arguments.json, tables=tables)


if __name__ == "__main__":
    main()
