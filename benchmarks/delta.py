#!/usr/bin/env python3
"""Deltas of real training states: ckptcoord beside zstd on XOR, zipnn, blosc2 and full saves.

    python benchmarks/delta.py [--quick] [--json] [--rounds N] [--traces fp32,bf16] [--folder DIR]

The states are those of traces.py, made first where the folder has none. A case is one class of
tensors of one trace (all of it as one array: a small model's tensors are far below a frame), at a
base step, early or late, and a gap of steps after it. Every side codes every case, decodes it in
place of the base, and is checked bit for bit. A peer that takes no base gets the raw bytes, their
XOR with the base or (zipnn) their difference; it counts with the smallest. zipnn and blosc2 are
optional (`pip install 'ckptcoord[bench]'`); which is absent is said.

Speeds are of the raw bytes, the best of several rounds: with one thread by CPU time, with two by
the clock. ckptcoord's encoding takes a BLAKE3 digest too, the peers' does not.

Ratios (less is better): `stored_vs_best_peer_<trace>_<class>_gap<g>_<phase>` is ckptcoord's bytes
at `auto` against the best peer's, bar 1.0, and `aggressive_vs_best_peer_*` that at `aggressive`;
`star_vs_best_peer_*` is the same for six saves, ten steps apart, the first of them the base of the
others. `encode_bar_*` and `decode_bar_*` are the bars of 0.9 and 1.8 GB/s with one thread, 1.5 and
3.0 with two, over the speeds of all cases of 1 MiB and more: a call's fixed cost hides the speed of
smaller ones. JSON has the ratios of single cases too, and among its figures `encode_gbs_*_1t` and
the like.
"""

from __future__ import annotations

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from common import Figure, Ratio, emit, options, order, ratio
from delta_sides import AGGRESSIVE, FULL, OURS, PEERS, SIDES, make_sides, stored_bytes
from rich.table import Table
from traces import (
    GAPS,
    PHASES,
    STAR_OFFSETS,
    Trace,
    Traces,
    TraceSettings,
    default_folder,
    make_traces,
)

from ckptcoord.codec.cast import is_cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from delta_sides import Side
    from numpy.typing import NDArray
    from traces import TensorClass

THREADS = (1, 2)
CLOCKS = {1: time.process_time, 2: time.perf_counter}
BARS_GBS = {("encode", 1): 0.9, ("encode", 2): 1.5, ("decode", 1): 1.8, ("decode", 2): 3.0}
COUNTS_FROM_BYTES = 1 << 20
CAST = "ckptcoord auto, casts left out"

Work: TypeAlias = tuple[str, int]  # encode or decode, threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One array and its base, both `[bytes]`."""

    trace: Trace
    kind: str
    gap: int
    phase: str
    dtype: str
    new: NDArray[np.uint8]
    base: NDArray[np.uint8]

    @property
    def name(self) -> str:
        """As ratios and figures end."""
        return f"{self.trace}_{self.kind}_gap{self.gap}_{self.phase}"


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one variant of a side did with a case; the least seconds of all rounds."""

    stored: int = 0
    seconds: dict[Work, float] = field(default_factory=dict)

    def took(self, work: Work, seconds: float) -> None:
        """Count one more round."""
        self.seconds[work] = min(seconds, self.seconds.get(work, math.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A case's name and size, and what each side did with it, by side and variant."""

    trace: Trace
    name: str
    size_bytes: int
    found: dict[tuple[str, str], Measured]

    def of(self, side: str) -> Measured | None:
        """The side's smallest variant, if it is there."""
        variants = [one for (name, _), one in sorted(self.found.items()) if name == side]
        return min(variants, key=lambda one: one.stored, default=None)

    def best_peer_bytes(self) -> int:
        """What the best of the peers stores."""
        return min(one.stored for (name, _), one in self.found.items() if name in (*PEERS, FULL))

    def gbs(self, measured: Measured, work: Work) -> float:
        """The speed of a variant, in GB/s of raw bytes."""
        return self.size_bytes / measured.seconds[work] / 1e9


# --- measuring ------------------------------------------------------------------------------------


def cases(traces: Traces, trace: Trace) -> Iterator[Case]:
    """All cases of a trace."""
    for phase in PHASES:
        base = traces.state(trace, phase, 0)
        for gap in GAPS:
            for kind, one in traces.state(trace, phase, gap).items():
                yield Case(
                    trace=trace,
                    kind=kind,
                    gap=gap,
                    phase=phase,
                    dtype=one.dtype,
                    new=one.data,
                    base=base[kind].data,
                )


def measure(case: Case, sides: Sequence[Side], rounds: int) -> Result:
    """Every side, interleaved, for some rounds after one that warms up."""
    taking = {(one.name, one.variant): one for one in sides if one.takes(case.base)}
    found = {key: Measured() for key in taking}
    names = {" ".join(key): key for key in taking}
    for turn in range(rounds + 1):
        for name in order(list(names), turn):
            key = names[name]
            for threads in THREADS:
                _round(case, taking[key], threads, found[key], counts=turn > 0)
    return Result(trace=case.trace, name=case.name, size_bytes=case.new.size, found=found)


def _round(case: Case, side: Side, threads: int, measured: Measured, *, counts: bool) -> None:
    clock = CLOCKS[threads]
    out = case.base.copy()
    began_s = clock()
    parts = side.encode(case.new, case.base, case.dtype, threads)
    encoded_s = clock()
    side.decode(parts, out, case.dtype, threads)
    decoded_s = clock()
    _check(side, case.name, out, case.new)
    measured.stored = stored_bytes(parts)
    if counts:
        measured.took(("encode", threads), encoded_s - began_s)
        measured.took(("decode", threads), decoded_s - encoded_s)


def _check(side: Side, what: str, out: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> None:
    if not np.array_equal(out, wanted):
        sys.exit(f"{side.name} on {side.variant} did not give back {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Star:
    """A trace's saves in one phase: raw and stored bytes of all, by class and side."""

    name: str
    raw: dict[str, int]
    stored: dict[str, dict[str, int]]

    def total(self, side: str) -> int:
        """All classes of a side."""
        return sum(one[side] for one in self.stored.values())


def star(traces: Traces, trace: Trace, phase: str, sides: Sequence[Side]) -> Star:
    """Save an anchor, and then deltas against it."""
    states = [traces.state(trace, phase, offset) for offset in STAR_OFFSETS]
    stored = {kind: _star_of_class(kind, states, sides) for kind in states[0]}
    for kind, by_side in stored.items():
        by_side[CAST] = 0 if _is_derived(kind, states) else by_side[OURS]
    raw = {kind: sum(state[kind].data.size for state in states) for kind in states[0]}
    return Star(name=f"{trace}_{phase}", raw=raw, stored=stored)


def _star_of_class(
    kind: str, states: Sequence[Mapping[str, TensorClass]], sides: Sequence[Side]
) -> dict[str, int]:
    """Bytes by side, each save with its side's smallest variant."""
    totals: dict[str, int] = {}
    anchor = states[0][kind].data
    for index, state in enumerate(states):
        new, dtype, base = state[kind].data, state[kind].dtype, anchor if index else None
        smallest: dict[str, int] = {}
        for side in sides:
            if side.takes(base):
                parts = side.encode(new, base, dtype, 1)
                out = anchor.copy() if index else np.empty_like(new)
                side.decode(parts, out, dtype, 1)
                _check(side, f"save {index} of a star of {kind}", out, new)
                taken = smallest.get(side.name, stored_bytes(parts))
                smallest[side.name] = min(taken, stored_bytes(parts))
        for name, size in smallest.items():
            totals[name] = totals.get(name, 0) + size
    return totals


def _is_derived(kind: str, states: Sequence[Mapping[str, TensorClass]]) -> bool:
    """Whether the class is the cast of its master in every state: then it needs no bytes."""
    return kind == "params" and all(
        "master" in state
        and is_cast(
            state["master"].data, state["master"].dtype, state[kind].data, state[kind].dtype
        )
        for state in states
    )


# --- reporting ------------------------------------------------------------------------------------


def ratios_of(
    results: Sequence[Result], stars: Sequence[Star], counts_from: int
) -> dict[str, Ratio]:
    """All but those of single cases, by the names that the module describes."""
    ratios: dict[str, Ratio] = {}
    for prefix, side in (("stored", OURS), ("aggressive", AGGRESSIVE)):
        against = [_stored(one, side) / one.best_peer_bytes() for one in results]
        ratios[f"{prefix}_vs_best_peer"] = ratio(against)
    for one in stars:
        best = min(one.total(peer) for peer in _peers_of(one))
        ratios[f"star_vs_best_peer_{one.name}"] = ratio([one.total(OURS) / best])
    for (what, threads), bar_gbs in BARS_GBS.items():
        speeds = [
            one.gbs(_must(one, OURS), (what, threads))
            for one in results
            if one.size_bytes >= counts_from
        ]
        ratios[f"{what}_bar_{threads}t"] = ratio([bar_gbs / speed for speed in speeds])
    return ratios


def case_ratios_of(results: Sequence[Result]) -> dict[str, Ratio]:
    """Those of single cases; tables show the same."""
    return {
        f"{prefix}_vs_best_peer_{one.name}": ratio([_stored(one, side) / one.best_peer_bytes()])
        for prefix, side in (("stored", OURS), ("aggressive", AGGRESSIVE))
        for one in results
    }


def _must(result: Result, side: str) -> Measured:
    measured = result.of(side)
    assert measured is not None
    return measured


def _stored(result: Result, side: str) -> int:
    return _must(result, side).stored


def _peers_of(one: Star) -> list[str]:
    """The peers that are installed."""
    there = next(iter(one.stored.values()))
    return [peer for peer in (*PEERS, FULL) if peer in there]


def summary_of(results: Sequence[Result], counts_from: int) -> dict[str, Figure]:
    """Where a peer is smaller, and where it is faster as well."""
    above = {one.name: _stored(one, OURS) / one.best_peer_bytes() for one in results}
    worst = sorted(above, key=lambda name: (-above[name], name))
    figures: dict[str, Figure] = {
        "worst stored_vs_best_peer": f"{above[worst[0]]:.4f}: {worst[0]}",
        "above the best peer": _listed(
            [f"{name} {above[name]:.4f}" for name in worst if above[name] > 1], len(results)
        ),
    }
    counted = [one for one in results if one.size_bytes >= counts_from]
    for peer in PEERS:
        smaller = sum(_beats(one, peer, None) for one in results)
        figures[f"{peer}: smaller"] = f"{smaller} of {len(results)}"
        for work in BARS_GBS:
            both = [one.name for one in counted if _beats(one, peer, work)]
            name = f"{peer}: smaller, and faster to {work[0]} ({_threads(work[1])})"
            figures[name] = _listed(both, len(counted))
    return figures


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _beats(result: Result, peer: str, work: Work | None) -> bool:
    """Whether a variant of the peer is smaller than ours, and, if a work is given, faster."""
    ours = _must(result, OURS)
    return any(
        one.stored < ours.stored and (work is None or one.seconds[work] < ours.seconds[work])
        for (name, _), one in result.found.items()
        if name == peer
    )


def _listed(names: Sequence[str], total: int) -> str:
    return f"{len(names)} of {total}" + (f": {', '.join(names)}" if names else "")


def speeds_of(results: Sequence[Result]) -> dict[str, Figure]:
    """GB/s of ckptcoord at `auto`, by case."""
    return {
        f"{what}_gbs_{one.name}_{threads}t": round(one.gbs(_must(one, OURS), (what, threads)), 3)
        for one in results
        for what, threads in BARS_GBS
    }


def ratio_table(trace: Trace, results: Sequence[Result]) -> Table:
    """Raw over stored bytes, a row a case."""
    table = _table(f"{trace}: raw / stored", SIDES)
    for result in results:
        of_sides = [result.of(side) for side in SIDES]
        shown = [
            "-" if one is None else f"{result.size_bytes / one.stored:.3f}" for one in of_sides
        ]
        table.add_row(_short(result), *shown)
    return table


def speed_table(trace: Trace, results: Sequence[Result], threads: int) -> Table:
    """Encode / decode, a row a case."""
    table = _table(f"{trace}: GB/s to encode / decode, {_threads(threads)}", SIDES)
    for result in results:
        shown = []
        for one in map(result.of, SIDES):
            speeds = (
                [] if one is None else [result.gbs(one, (w, threads)) for w in ("encode", "decode")]
            )
            shown.append(" / ".join(f"{speed:.2f}" for speed in speeds) or "-")
        table.add_row(_short(result), *shown)
    return table


def star_table(stars: Sequence[Star]) -> Table:
    """Stored over raw bytes of all saves of a star, a row a class."""
    sides = (CAST, *SIDES)
    table = _table(
        f"stored / raw, {len(STAR_OFFSETS)} saves, the first the base of the others", sides
    )
    for one in stars:
        for kind, raw in one.raw.items():
            of_sides = [one.stored[kind].get(side) for side in sides]
            shown = ["-" if size is None else f"{size / raw:.3f}" for size in of_sides]
            table.add_row(f"{one.name} {kind}", *shown)
        there = [side in next(iter(one.stored.values())) for side in sides]
        raw = sum(one.raw.values())
        totals = zip(sides, there, strict=True)
        shown = [f"{one.total(side) / raw:.3f}" if here else "-" for side, here in totals]
        table.add_row(f"{one.name} all", *shown, end_section=True)
    return table


def star_figures(stars: Sequence[Star]) -> dict[str, Figure]:
    """Stored over raw bytes of whole stars, by side."""
    return {
        f"star_stored_{one.name}: {side}": round(one.total(side) / sum(one.raw.values()), 4)
        for one in stars
        for side in (CAST, OURS, AGGRESSIVE, *_peers_of(one))
    }


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table("case", *columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _short(result: Result) -> str:
    return result.name.removeprefix(f"{result.trace}_")


def main() -> None:
    """Make the traces, measure, and print."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="rounds that count; 5, or 1 with --quick")
    parser.add_argument("--traces", default=",".join(Trace), help="which, by comma")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="that keeps traces")
    parser.add_argument("--seed", type=int, default=1, help="of the traces")
    args = parser.parse_args()
    settings = TraceSettings.quick(args.seed) if args.quick else TraceSettings(seed=args.seed)
    rounds = args.rounds or (1 if args.quick else 5)
    counts_from = 0 if args.quick else COUNTS_FROM_BYTES
    traces = make_traces(settings, args.folder)
    chosen = [Trace(name) for name in args.traces.split(",")]
    with ThreadPoolExecutor(max(THREADS)) as pool:
        sides, absent = make_sides(pool)
        results = [measure(case, sides, rounds) for t in chosen for case in cases(traces, t)]
        stars = [star(traces, trace, phase, sides) for trace in chosen for phase in PHASES]
    figures: dict[str, Figure] = {"not installed": ", ".join(absent) or "none", "rounds": rounds}
    figures |= summary_of(results, counts_from)
    tables = []
    for trace in chosen:
        own = [one for one in results if one.trace is trace]
        tables += [ratio_table(trace, own), *(speed_table(trace, own, n) for n in THREADS)]
    ratios = ratios_of(results, stars, counts_from)
    if args.json:
        ratios |= case_ratios_of(results)
        figures |= speeds_of(results) | star_figures(stars)
    emit("delta", ratios, figures, as_json=args.json, tables=[*tables, star_table(stars)])


if __name__ == "__main__":
    main()
