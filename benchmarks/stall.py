#!/usr/bin/env python3
"""What saving costs a training loop: ckptcoord, DCP's async_save and torch.save, all durable.

A GPT with AdamW, 1 GB with both moments, trains; every step or every tenth is saved. *Blocked* is
what the training thread spends in the call and in the hooks before the optimizer's step. *Lost* is
the loop's time minus that of as many steps without saves, in the same round; the loop goes on
until all is durable, so that a save that returns early and slows the steps that follow is found
out. Both are per save. *Memcpy* is one warm copy of what a rank writes: all of it in one process, a
quarter with 4 ranks, all ranks at a time and none of them doing anything else. *Memcpy in the loop*
is that copy where a save would be, as a side of its own: ranks that have made theirs go on, and
take cores from those that have not.

*Free*: a step leaves the host free, as an accelerator does: it sleeps, then an optimizer changes a
few tensors. A GB is given 2 s to be written where every step is saved (one step), 4 s where every
tenth is. *Saturated* (not by default): steps that are far shorter than a save. *Cpu*: forward,
backward and fused AdamW on the same cores that hash and write. With several ranks a step ends with
an all-reduce, as with DDP.

Each of DCP's modes has a stager that keeps its buffers. `overlapped` copies while training goes on,
as deferred saves do, which torch documents for CUDA only: it has ratios of its own. At the end of
a loop, a save that is followed at once by steps is loaded and compared, bit for bit.

    python benchmarks/stall.py [--quick] [--json] [--size-mb N] [--rounds N] [--ranks 1,4]
        [--loops free,cpu,saturated] [--every 1,10] [--compression off|auto] [--io-budget-mb N]

Ratios (less is better) and bars, of the free loop: `eager_lost_vs_memcpy_*` 1.2,
`deferred_lost_vs_memcpy_*` 0.2, `deferred_lost_vs_best_dcp_*` 0.2; of the cpu loop:
`*_blocked_vs_memcpy_*` 1.2 and 0.2 (beside it `*_blocked_vs_memcpy_in_loop_*`),
`deferred_lost_vs_best_dcp_*` 0.5. `*_reported_*` is the stall that the reports of saves tell over
the measured one, and should be 1.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common import Figure, Ratio, best_of, emit, options, order, paired, ratio
from job import Settings as JobSettings
from job import label, leave, member
from job import run_ranks as run_job
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from multiprocessing.context import ForkServerContext

    from sides import Job
    from stall_sides import Side, Sides, Training

DEFERRED, EAGER = "ckptcoord deferred", "ckptcoord eager"
DCP = ("dcp thread", "dcp process")
OVERLAPPED = ("dcp thread, overlapped", "dcp process, overlapped")
BLOCKING = "torch.save"
SAVING = (DEFERRED, EAGER, *DCP, *OVERLAPPED, BLOCKING)
NONE, MEMCPY, COPYING = "no saves", "memcpy", "memcpy in the loop"
LOOPS = ("free", "cpu", "saturated")
INTERVAL_S = {1: 2.0, 10: 4.0}  # from save to save of the free loop, for a GiB
SATURATED_S = 0.1
LEAST_S = 1e-3  # no ratio to a loss that is smaller, or none
COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One loop.

    Attributes:
        loop: `free`, `cpu` or `saturated`.
        every: steps from save to save.
        saves: how many saves.
        step_s: how long a step sleeps, where it does.
    """

    loop: str
    every: int
    saves: int
    step_s: float

    @property
    def name(self) -> str:
        """As in the ratios."""
        return f"{self.loop}_every_{self.every}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(JobSettings):
    """One run of the benchmark."""

    cases: tuple[Case, ...]
    compression: str
    io_budget: float | None
    ours: bool

    @property
    def saving(self) -> tuple[str, ...]:
        """The sides that save."""
        return (DEFERRED, EAGER, COPYING) if self.ours else (*SAVING, COPYING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side cost in one round, in seconds, per save; the worst of all ranks.

    Attributes:
        blocked_s: the training thread in calls and hooks.
        lost_s: by the loop.
        waited_s: for earlier saves, of what blocked.
        durable_s: from the call until a save was durable, the longest.
        reported: stall that the side tells, over that which was measured; 0 where it tells none.
    """

    blocked_s: float
    lost_s: float
    waited_s: float
    durable_s: float
    reported: float


Found: TypeAlias = dict[str, dict[str, list[Turn]]]
"""By case and side, round by round; of `memcpy`, the seconds stand in `lost_s`."""


# --- in every rank --------------------------------------------------------------------------------


def rank_main(rank: int, settings: Settings) -> None:
    """One rank from start to end; rank 0 leaves what it found."""
    from stall_sides import Sides, Training

    warnings.simplefilter("ignore")
    with member(rank, settings, grouped=True) as job:  # DCP's process needs a group
        training = Training(settings.size_bytes, settings.ranks)
        with Sides(
            training, job, compression=settings.compression, io_budget=settings.io_budget
        ) as sides:
            run = _Run(job, training, sides, settings)
            leave(job, {case.name: run.case(case, settings.rounds) for case in settings.cases})


class _Run:
    """The state of one rank, and its sides."""

    def __init__(self, job: Job, training: Training, sides: Sides, settings: Settings) -> None:
        from stall_sides import Copying, CopySide, HookWatch

        self._job, self._training = job, training
        self._saving = settings.saving
        self._hooks = HookWatch(training)
        self._copying = Copying(training.tensors(), job)
        copies = CopySide(training, job, COPYING, self._copying)
        self._sides: dict[str, Side] = {**sides.by_name, COPYING: copies}
        warm = Case(loop="free", every=2, saves=2, step_s=0.05)
        with _silent():  # the process that DCP starts here tells of every request
            for name in DCP if not settings.ours else ():
                self._turn(name, warm)
        for name in self._saving:
            self._turn(name, warm)

    def case(self, case: Case, rounds: int) -> dict[str, list[Turn]]:
        """All sides, round by round, in one kind of loop; then the saves of ours are looked at."""
        found: dict[str, list[Turn]] = {name: [] for name in (*self._saving, MEMCPY)}
        self._step(case)
        for turn in range(rounds):
            raw = {
                name: self._turn(name, case) for name in order((*self._saving, NONE, MEMCPY), turn)
            }
            step_s = raw[NONE].loop_s / raw[NONE].steps
            for name, turns in found.items():
                turns.append(raw[name].per_save(case.saves, 0.0 if name == MEMCPY else step_s))
        for name in (DEFERRED, EAGER):
            self._check(name, case)
        return found

    def _turn(self, name: str, case: Case) -> _Raw:
        if name == MEMCPY:
            return self._copy(case)
        side = None if name == NONE else self._sides[name]
        if side is not None:
            side.reset()
        self._hooks.seconds, self._hooks.side = 0.0, side
        self._agree(0.0)
        blocked_s, steps, busy = 0.0, 0, False
        began_s = time.perf_counter()
        while steps < case.saves * case.every or busy:
            if side is not None and steps % case.every == 0 and steps < case.saves * case.every:
                called_s = time.perf_counter()
                side.save()
                blocked_s += time.perf_counter() - called_s
            self._step(case)
            steps += 1
            busy = bool(self._agree(float(side is not None and side.unfinished())))
        loop_s = time.perf_counter() - began_s
        self._hooks.side = None
        if side is None:
            return _Raw(loop_s=self._agree(loop_s), steps=steps)
        blocked_s += self._hooks.seconds
        self._finish(side)
        reported = side.reported_s
        return _Raw(
            loop_s=self._agree(loop_s),
            steps=steps,
            blocked_s=self._agree(blocked_s),
            waited_s=self._agree(side.waited_s),
            durable_s=self._agree(max(side.durable_s, default=0.0)),
            reported=0.0 if reported is None else self._agree(reported / blocked_s),
        )

    def _copy(self, case: Case) -> _Raw:
        """Counted as a loss, so many times as there are saves."""
        seconds = []
        for _ in range(COPIES):
            self._agree(0.0)
            seconds.append(self._agree(self._copying.run()))
        return _Raw(loop_s=statistics.median(seconds) * case.saves, steps=0)

    def _check(self, name: str, case: Case) -> None:
        """What is loaded must be the state at the call, though steps followed at once."""
        from stall_sides import CkptcoordSide

        side = self._sides[name]
        assert isinstance(side, CkptcoordSide)
        want = self._training.digests()
        side.save()
        for _ in range(2):
            self._step(replace(case, step_s=0.0))
        side.drain()
        if self._training.digests() == want:
            sys.exit(f"{case.name}: the steps after a save change nothing")
        side.load()
        if self._training.digests() != want:
            sys.exit(f"{case.name}: {name} did not load the state at the call")
        self._finish(side)

    def _step(self, case: Case) -> None:
        if case.loop == "cpu":
            self._training.compute()
        else:
            self._training.free(case.step_s)

    def _finish(self, side: Side) -> None:
        """Nothing of it runs, and nothing of it is left to be deleted in the turn of another."""
        side.drain()
        self._agree(0.0)
        if self._job.rank == 0:
            side.clean()
        self._agree(0.0)

    def _agree(self, value: float) -> float:
        """The most of what the ranks say; they wait for each other."""
        import torch
        import torch.distributed as dist

        if self._job.size == 1:
            return value
        most = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """A turn as it was measured: all of its saves together."""

    loop_s: float
    steps: int
    blocked_s: float = 0.0
    waited_s: float = 0.0
    durable_s: float = 0.0
    reported: float = 0.0

    def per_save(self, saves: int, step_s: float) -> Turn:
        """Against a loop whose steps take so long each."""
        return Turn(
            blocked_s=self.blocked_s / saves,
            lost_s=(self.loop_s - self.steps * step_s) / saves,
            waited_s=self.waited_s / saves,
            durable_s=self.durable_s,
            reported=self.reported,
        )


@contextmanager
def _silent() -> Iterator[None]:
    """What is started within writes its error output to nowhere, for as long as it lives."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- in the parent --------------------------------------------------------------------------------


def check_memory(settings: Settings) -> None:
    """End where the state, its gradients and every side's copies of it would not fit."""
    # Whole on each rank: the state, a third of it as gradients, what both of DCP's stagers keep.
    # Shared by the ranks: the measure's copy, ours for as many as two saves, pages being written.
    each, shared = (1.4 if settings.ours else 3.4), 4.0
    need = settings.size_bytes * (each * settings.ranks + shared) + (settings.ranks << 29)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < need:
            sys.exit(f"{label(settings.ranks)} needs {need / 1e9:.0f} GB of memory: use --size-mb")


def run_ranks(context: ForkServerContext, settings: Settings) -> Found:
    """Run the ranks in a scratch folder and return what rank 0 found."""
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-", dir=settings.folder) as name:
        found = run_job(context, rank_main, replace(settings, folder=Path(name)))
    return {
        case: {side: [Turn(**turn) for turn in turns] for side, turns in by_side.items()}
        for case, by_side in found.items()
    }


def ratios_of(case: str, turns: Mapping[str, Sequence[Turn]], ranks: int) -> dict[str, Ratio]:
    """Ours against a copy and against the others, round by round."""
    lost = {side: [max(turn.lost_s, LEAST_S) for turn in turns[side]] for side in turns}
    blocked = {side: [turn.blocked_s for turn in turns[side]] for side in turns}
    end = f"{case}_{label(ranks)}"
    found: dict[str, Ratio] = {}
    for name, side in (("deferred", DEFERRED), ("eager", EAGER)):
        found |= {
            f"{name}_lost_vs_memcpy_{end}": paired(lost[side], lost[MEMCPY]),
            f"{name}_blocked_vs_memcpy_{end}": paired(blocked[side], lost[MEMCPY]),
            f"{name}_blocked_vs_memcpy_in_loop_{end}": paired(blocked[side], blocked[COPYING]),
            f"{name}_reported_vs_measured_{end}": ratio([turn.reported for turn in turns[side]]),
        }
        if BLOCKING in lost:
            found |= {
                f"{name}_lost_vs_best_dcp_{end}": paired(lost[side], lost[best_of(lost, DCP)]),
                f"{name}_lost_vs_best_dcp_overlapped_{end}": paired(
                    lost[side], lost[best_of(lost, OVERLAPPED)]
                ),
                f"{name}_lost_vs_torch_save_{end}": paired(lost[side], lost[BLOCKING]),
            }
    return found


def table_of(case: str, turns: Mapping[str, Sequence[Turn]], ranks: int) -> Table:
    """Medians by side; of the time lost also the least and the most."""
    names = ("blocked s", "lost s", "lost min", "lost max", "waited s", "durable s")
    table = Table("side", *names, title=f"{case}, {label(ranks)}, a save")
    for column in table.columns[1:]:
        column.justify = "right"
    for side, seen in turns.items():
        lost = [turn.lost_s for turn in seen]
        shown = (
            statistics.median(turn.blocked_s for turn in seen),
            statistics.median(lost),
            min(lost),
            max(lost),
            statistics.median(turn.waited_s for turn in seen),
            statistics.median(turn.durable_s for turn in seen),
        )
        table.add_row(side, *(f"{value:.4f}" for value in shown))
    return table


def figures_of(case: str, turns: Mapping[str, Sequence[Turn]], ranks: int) -> dict[str, Figure]:
    """The medians behind the ratios."""
    found: dict[str, Figure] = {}
    for side, seen in turns.items():
        for name in ("blocked_s", "lost_s", "durable_s"):
            if side != MEMCPY or name == "lost_s":
                median = statistics.median(getattr(turn, name) for turn in seen)
                what = "s" if side == MEMCPY else name.replace("_s", " s")
                found[f"{label(ranks)} {case} {what}: {side}"] = round(median, 4)
    return found


def cases_of(loops: str, every: str, size_bytes: int) -> tuple[Case, ...]:
    """The loops asked for."""
    found = []
    for loop in loops.split(","):
        if loop not in LOOPS:
            sys.exit(f"--loops: {loop} is none of {', '.join(LOOPS)}")
        for number in (1,) if loop == "saturated" else map(int, every.split(",")):
            interval_s = INTERVAL_S.get(number, 4.0) * max(size_bytes / 2**30, 0.05)
            step_s = SATURATED_S if loop == "saturated" else interval_s / number
            saves = 2 if number == 1 else 1
            found.append(Case(loop=loop, every=number, saves=saves, step_s=step_s))
    return tuple(found)


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, help="MB of state; 1024, or 256 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds that count; 5, or 2 with --quick")
    parser.add_argument("--ranks", default="1,4", help="numbers of processes, by comma")
    parser.add_argument("--loops", default="free,cpu", help=f"some of {','.join(LOOPS)}")
    parser.add_argument("--every", default="1,10", help="steps from save to save, by comma")
    parser.add_argument("--compression", default="off", choices=("off", "auto"))
    parser.add_argument("--io-budget-mb", type=float, help="ckptcoord's, MB/s a rank")
    parser.add_argument("--threads", type=int, default=2, help="of every side, a rank")
    parser.add_argument("--ours", action="store_true", help="ckptcoord and a memcpy alone")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="writes below this folder")
    arguments = parser.parse_args()
    size_mb = arguments.size_mb or (256 if arguments.quick else 1024)
    budget_mb = arguments.io_budget_mb
    base = Settings(
        size_bytes=size_mb << 20,
        rounds=arguments.rounds or (2 if arguments.quick else 5),
        ranks=1,
        threads=arguments.threads,
        cases=cases_of(arguments.loops, arguments.every, size_mb << 20),
        compression=arguments.compression,
        io_budget=None if budget_mb is None else budget_mb * 1e6,
        ours=arguments.ours,
        folder=Path(arguments.dir),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "stall_sides"])
    ratios: dict[str, Ratio] = {}
    figures: dict[str, Figure] = {
        "state, MB": size_mb,
        "rounds": base.rounds,
        "compression": base.compression,
        "cores": os.cpu_count() or 0,
        "load before": round(os.getloadavg()[0], 1),
    }
    tables: list[Table] = []
    for ranks in map(int, arguments.ranks.split(",")):
        settings = replace(base, ranks=ranks)
        check_memory(settings)
        for case, turns in run_ranks(context, settings).items():
            ratios |= ratios_of(case, turns, ranks)
            figures |= figures_of(case, turns, ranks)
            tables.append(table_of(case, turns, ranks))
    emit("stall", ratios, figures, as_json=arguments.json, tables=tables)


if __name__ == "__main__":
    main()
