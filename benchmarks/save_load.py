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

import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common import Figure, Ratio, best_of, emit, options, order, paired, ratio, spread_table
from job import RankRun, label, leave, member
from job import Settings as JobSettings
from job import run_ranks as run_job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.context import ForkServerContext

    from rich.table import Table
    from sides import Job

Seconds: TypeAlias = dict[str, list[float]]
Results: TypeAlias = dict[str, Seconds]

OURS, RAW = "ckptcoord", "raw"
PEERS = ("torch.save", "safetensors", "dcp")
SAVING = (OURS, RAW, *PEERS)
LOADING = (OURS, *PEERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(JobSettings):
    """One run of the benchmark.

    Attributes:
        phase: `time`, or `memory <side>`.
    """

    phase: str = "time"


# --- in every rank --------------------------------------------------------------------------------


def rank_main(rank: int, settings: Settings) -> None:
    """One rank from start to end; rank 0 leaves what it found."""
    with member(rank, settings) as job:
        run = _Run(job, settings)
        if settings.phase == "time":
            results: Results = {
                "save": run.saves(),
                "load": run.loads(cold=False),
                "load_cold": run.loads(cold=True),
            }
        else:
            results = {"memory": {"both": run.memory(settings.phase.removeprefix("memory "))}}
        leave(job, results)
        run.close()


class _Run(RankRun):
    """The state of one rank, and its sides."""

    def __init__(self, job: Job, settings: Settings) -> None:
        from sides import digests_of, make_side, make_state

        state = make_state(settings.size_bytes, seed=1)
        self._digests = digests_of(state)
        names: Sequence[str] = SAVING
        if settings.phase != "time":
            names = (settings.phase.removeprefix("memory "),)
        super().__init__(job, state, {n: make_side(n, job, state, self._digests) for n in names})
        self._settings = settings

    def saves(self) -> Seconds:
        """Seconds a save took, by side and round; one round goes before to warm up."""
        seconds: Seconds = {side: [] for side in SAVING}
        for turn in range(self._settings.rounds + 1):
            for name in order(SAVING, turn):
                side = self.sides[name]
                took = self.timed(side.save)
                if turn:
                    seconds[name].append(took)
                self.remove(side.files())
        return seconds

    def loads(self, *, cold: bool) -> Seconds:
        """Seconds a load took, from the page cache or not; warmed up, and checked, by one round."""
        from sides import drop_cached, read_all

        seconds: Seconds = {side: [] for side in LOADING}
        for name in LOADING:
            self.sides[name].save(self.state)
        for turn in range(self._settings.rounds + 1):
            for name in order(LOADING, turn):
                side = self.sides[name]
                if self.job.rank == 0:
                    (drop_cached if cold else read_all)(side.files())
                if not turn:
                    self._blank()
                took = self.timed(side.load)
                if turn:
                    seconds[name].append(took)
                else:
                    self._check(name)
        for name in LOADING:
            self.remove(self.sides[name].files())
        return seconds

    def memory(self, name: str) -> list[float]:
        """Bytes that a save took beyond what a rank had, at most, and of the largest file."""
        from sides import peak_memory

        side = self.sides[name]
        extra = peak_memory(lambda: side.save(self.state))
        self.barrier()
        largest = max(path.stat().st_size for path in side.files().rglob("*") if path.is_file())
        return [max(self.gather(extra)), largest]

    def _blank(self) -> None:
        from sides import tensors_of

        for tensor in tensors_of(self.state).values():
            tensor.zero_()

    def _check(self, name: str) -> None:
        from sides import digests_of

        if digests_of(self.state) != self._digests:
            sys.exit(f"{name} did not load what was saved")


# --- in the parent --------------------------------------------------------------------------------


def run_ranks(context: ForkServerContext, settings: Settings) -> Results:
    """Run the ranks in a scratch folder and return what rank 0 found."""
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-", dir=settings.folder) as name:
        found: Results = run_job(context, rank_main, replace(settings, folder=Path(name)))
        return found


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
