#!/usr/bin/env python3
"""Saving sharded state on n ranks and loading it on m, beside DCP on the same DTensors.

An fp32 model and two moments, 1 GiB together, on a 1-D mesh of all ranks (gloo): three quarters
sharded by rows, some of that unevenly, a quarter by columns, small tensors replicated. A job of n
ranks saves with both sides; a job of m ranks then loads what each saved last, from warm pages. A
save ends when files and folders are synced, on both sides; a load ends with the bytes in the live
tensors. ckptcoord makes digests of all that it writes and checks all that it reads; DCP does
neither. Once a pair, and for each side, what was loaded is compared with what was saved, by digests
of the full tensors.

    python benchmarks/reshard.py [--quick] [--json] [--size-mb N] [--rounds N] [--pairs 4:2,4:4,2:4]

Ratios (less is better): `save_vs_dcp_*` and `load_vs_dcp_*` have the bar 1.0. `unique_bytes_read_*`
and `bytes_read_once_*`, in units of the state, have the bar 1.05: in the former each byte of a file
counts once, however many ranks read it and how often; the latter is all that is read by a load with
`read_once`. Memory is what a rank of a fresh job holds at its peak beyond what it had: of a save
beyond its pieces, with the bar 64 MiB, of a load beyond the tensors that it fills, with the bar
256 MiB (with `read_once`, which is not held to it, a load fills new tensors first).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common import Figure, Ratio, emit, options, order, paired, ratio, spread_table
from job import RankRun, leave, member, run_ranks
from job import Settings as JobSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerContext

    from rich.table import Table
    from sides import Job

Found: TypeAlias = dict[str, list[float]]
"""What a job measured, by side: seconds of each round, or figures."""

OURS, DCP = SAVING = ("ckptcoord", "dcp")
ONCE = "ckptcoord, read once"
LOADING = (OURS, ONCE, DCP)
SAVED = "saved.json"
SAVE_BAR, LOAD_BAR = 64 << 20, 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(JobSettings):
    """One job.

    Attributes:
        work: a method of `_Run`.
        sides: who takes part.
    """

    work: str = ""
    sides: tuple[str, ...] = SAVING


# --- in every rank --------------------------------------------------------------------------------


def rank_main(rank: int, settings: Settings) -> None:
    """One rank from start to end; rank 0 leaves what it found."""
    with member(rank, settings, grouped=True) as job:
        run = _Run(job, settings)
        leave(job, getattr(run, settings.work)())
        run.close()


class _Run(RankRun):
    """The state of one rank, and its sides."""

    def __init__(self, job: Job, settings: Settings) -> None:
        from reshard_sides import make_side, make_state

        state = make_state(settings.size_bytes)
        super().__init__(job, state, {n: make_side(n, job, state) for n in settings.sides})
        self._settings = settings

    def saves(self) -> Found:
        """Seconds that saves took; one round goes before to warm up, and the last save stays."""
        from reshard_sides import content_of

        seconds: Found = {name: [] for name in self.sides}
        for turn in range(self._settings.rounds + 1):
            for name in order(self._settings.sides, turn):
                side = self.sides[name]
                took = self.timed(side.save)
                if turn:
                    seconds[name].append(took)
                if turn < self._settings.rounds:
                    self.remove(side.files())
        content = content_of(self.state)
        if self.job.rank == 0:
            (self.job.folder / SAVED).write_text(json.dumps(content))
        return seconds

    def loads(self) -> Found:
        """Seconds that loads took; one round goes before to warm up, and is checked."""
        seconds: Found = {name: [] for name in self.sides}
        for turn in range(self._settings.rounds + 1):
            for name in order(self._settings.sides, turn):
                self._warm()
                if not turn:
                    self._blank()
                took = self.timed(self.sides[name].load)
                if turn:
                    seconds[name].append(took)
                else:
                    self._check(name)
        return seconds

    def save_once(self) -> Found:
        """The bytes of memory that a save took, and those of the pieces that a rank holds."""
        ((name, side),) = self.sides.items()
        return {name: self._memory(side.save)}

    def load_once(self) -> Found:
        """As `save_once`; and the bytes that all ranks read, and of ours each byte but once."""
        from reshard_sides import CountingReader, united_bytes

        ((name, side),) = self.sides.items()
        counting = CountingReader()
        read = 0

        def load(state: dict[str, object]) -> None:
            nonlocal read
            before = _read_so_far()
            side.load(state)
            read = _read_so_far() - before

        memory = self._memory(load)
        total, unique = sum(self.gather(read)), united_bytes(self.gather(counting.spans))
        return {name: [*memory, total, unique]}

    def _memory(self, work: Callable[[dict[str, object]], None]) -> list[float]:
        from reshard_sides import held_bytes
        from sides import peak_memory

        extra = peak_memory(lambda: work(self.state))
        return [max(self.gather(extra)), max(self.gather(held_bytes(self.state)))]

    def _warm(self) -> None:
        from sides import read_all

        if self.job.rank == 0:
            read_all(self.job.folder)

    def _blank(self) -> None:
        from reshard_sides import blank

        blank(self.state)

    def _check(self, name: str) -> None:
        from reshard_sides import content_of

        content = content_of(self.state)
        if self.job.rank == 0 and content != json.loads((self.job.folder / SAVED).read_text()):
            sys.exit(f"{name} did not load what was saved")


def _read_so_far() -> int:
    """Bytes that this process asked the system to read, from a disk or a cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


# --- in the parent --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What one pair gave.

    Attributes:
        save: seconds.
        load: seconds.
        save_once: by side, the bytes of memory that a save took, and those held by a rank.
        load_once: the same of a load; the bytes read, and of ours those that are no repeats.
    """

    save: Found
    load: Found
    save_once: Found
    load_once: Found


def run_pair(context: ForkServerContext, base: Settings, saving: int, loading: int) -> Pair:
    """Save on some ranks, load on others, each measured in jobs of its own."""
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-", dir=base.folder) as name:
        inside = replace(base, folder=Path(name) / "kept")
        inside.folder.mkdir()
        save = run_ranks(context, rank_main, replace(inside, ranks=saving, work="saves"))
        load = run_ranks(
            context, rank_main, replace(inside, ranks=loading, work="loads", sides=LOADING)
        )
        save_once: Found = {}
        load_once: Found = {}
        for side in LOADING:
            alone = replace(inside, ranks=loading, work="load_once", sides=(side,))
            load_once |= run_ranks(context, rank_main, alone)
        for side in SAVING:
            alone = replace(base, ranks=saving, work="save_once", sides=(side,))
            with tempfile.TemporaryDirectory(dir=name) as scratch:
                save_once |= run_ranks(context, rank_main, replace(alone, folder=Path(scratch)))
        return Pair(save=save, load=load, save_once=save_once, load_once=load_once)


def ratios_of(pair: Pair, label: str, size_bytes: int) -> dict[str, Ratio]:
    """Ours against theirs, and against the bars that are given in bytes."""
    saving, _ = pair.save_once[OURS]
    loading, _, _, unique = pair.load_once[OURS]
    _, _, once, _ = pair.load_once[ONCE]
    return {
        f"save_vs_dcp_{label}": paired(pair.save[OURS], pair.save[DCP]),
        f"load_vs_dcp_{label}": paired(pair.load[OURS], pair.load[DCP]),
        f"load_read_once_vs_dcp_{label}": paired(pair.load[ONCE], pair.load[DCP]),
        f"unique_bytes_read_{label}": ratio([unique / size_bytes]),
        f"bytes_read_once_{label}": ratio([once / size_bytes]),
        f"save_memory_of_bar_{label}": ratio([saving / SAVE_BAR]),
        f"load_memory_of_bar_{label}": ratio([loading / LOAD_BAR]),
    }


def figures_of(pair: Pair, label: str, size_bytes: int) -> dict[str, Figure]:
    """What stands behind the ratios."""
    figures: dict[str, Figure] = {}
    for side in SAVING:
        saving, held = pair.save_once[side]
        figures |= {
            f"{label} save s: {side}": round(statistics.median(pair.save[side]), 3),
            f"{label} save, extra MB beyond {held / 1e6:.0f}: {side}": round(saving / 1e6, 1),
        }
    for side in LOADING:
        loading, filled, read, _ = pair.load_once[side]
        figures |= {
            f"{label} load s: {side}": round(statistics.median(pair.load[side]), 3),
            f"{label} load, extra MB beyond {filled / 1e6:.0f}: {side}": round(loading / 1e6, 1),
            f"{label} bytes read, of the state: {side}": round(read / size_bytes, 3),
        }
    return figures


def pairs_of(text: str) -> list[tuple[int, int]]:
    """`4:2,2:4` as numbers of ranks."""
    return [(int(n), int(m)) for n, _, m in (pair.partition(":") for pair in text.split(","))]


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, help="MiB of state; 1024, or 192 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds that count; 9, or 3 with --quick")
    parser.add_argument("--pairs", default="4:2,4:4,2:4", help="ranks that save, and that load")
    parser.add_argument("--threads", type=int, default=2, help="of both sides, a rank")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="writes below this folder")
    arguments = parser.parse_args()
    size_mb = arguments.size_mb or (192 if arguments.quick else 1024)
    base = Settings(
        size_bytes=size_mb << 20,
        rounds=arguments.rounds or (3 if arguments.quick else 9),
        threads=arguments.threads,
        folder=Path(arguments.dir),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reshard_sides", "ckptcoord.dist.coordinator"])
    ratios: dict[str, Ratio] = {}
    figures: dict[str, Figure] = {
        "state, MiB": size_mb,
        "rounds": base.rounds,
        "threads a rank": base.threads,
        "cores": os.cpu_count() or 0,
    }
    tables: list[Table] = []
    for saving, loading in pairs_of(arguments.pairs):
        pair, label = run_pair(context, base, saving, loading), f"{saving}to{loading}"
        ratios |= ratios_of(pair, label, base.size_bytes)
        figures |= figures_of(pair, label, base.size_bytes)
        tables += [
            spread_table(f"{phase}, {saving} to {loading} ranks", seconds, base.size_bytes)
            for phase, seconds in (("save", pair.save), ("load", pair.load))
        ]
    emit("reshard", ratios, figures, as_json=arguments.json, tables=tables)


if __name__ == "__main__":
    main()
