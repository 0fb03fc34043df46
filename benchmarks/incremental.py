#!/usr/bin/env python3
"""What a delta costs in a whole save and a whole load: time, bytes and memory, in one process.

*Sparse*: a state of 60 large tensors of which three change between saves, 5 % of its bytes: a
durable delta beside a durable full save, ckptcoord's own and torch.save's. *Long*: a smaller
state, saved ten times: where all changes between saves, as a star, as a chain, and as a chain
through deltas of any size (`strict_chain`); as a chain where a 20th changes. Loading the tenth
delta beside loading the anchor, with all files in the page cache, and with none in it, as after a
crash: saves go past it. Memory is what a save and a load need beyond the state.

    python benchmarks/incremental.py [--quick] [--json] [--size-mb N] [--rounds N] [--dir DIR]

Ratios (less is better): `sparse_save_vs_full` has the bar 0.125, `*_load_vs_anchor` 2.0
(but for `strict_chain`), `*_save_memory_of_bar` (the pieces and 256 MiB) and `*_load_memory_of_bar`
(256 MiB) 1.0.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import Figure, Ratio, emit, options, order, paired, ratio, spread_table
from sides import drop_cached, make_state, peak_memory, read_all, sync, tensors_of

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.codec import kernels
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.plan.lineage import BaseChoice, Compression

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

OFF = Compression()
STAR = Compression(level=CompressionLevel.AUTO, restore_budget=1e9, reanchor_interval=1000)
CHAIN = Compression(level=CompressionLevel.AUTO, restore_budget=1e9, base=BaseChoice.PREVIOUS)
STRICT = replace(CHAIN, chain_below=1.0)  # through deltas of any size
RULES = {"star": STAR, "chain": CHAIN, "strict_chain": STRICT, "sparse_chain": CHAIN}
LINKS = 10
COLD = ("", ", cold")  # how a side is called whose files are in the page cache, or are not
LAYERS = 60  # a large tensor and a small one each
SPARSE = 40  # every 40th tensor is every 20th large one
SLACK_BYTES = 256 << 20
MB = 10**6


class Report:
    """What was measured."""

    def __init__(self) -> None:
        self.ratios: dict[str, Ratio] = {}
        self.figures: dict[str, Figure] = {}
        self.tables: list[Table] = []

    def memory(self, name: str, extra_bytes: int, bar_bytes: int) -> None:
        """Bytes beyond the state, and the bar."""
        self.ratios[f"{name}_memory_of_bar"] = ratio([max(extra_bytes, 0) / bar_bytes])
        self.figures[f"{name}: extra MB"] = round(max(extra_bytes, 0) / 1e6, 1)


def coordinator(state: dict[str, object], folder: Path, rule: Compression) -> CheckpointCoordinator:
    """One component that this process owns."""
    part = StateComponent("state", state, SharingPattern.REPLICATED)
    config = CoordinatorConfig(compression=rule)
    return CheckpointCoordinator([part], output_dir=folder, config=config)


def change(state: dict[str, object], every: int, generator: torch.Generator) -> int:
    """Train every `every`th tensor a little; returns the bytes of those."""
    changed = list(tensors_of(state).values())[::every]
    for tensor in changed:
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-4)
    return sum(tensor.nbytes for tensor in changed)


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def torch_save(state: dict[str, object], path: Path) -> None:
    """torch.save, durably."""
    torch.save(state, path)
    sync(path)
    sync(path.parent)


def sparse(size_bytes: int, rounds: int, folder: Path, report: Report) -> None:
    """A state of which a 20th changes."""
    state = make_state(size_bytes, seed=1, layers=LAYERS)
    generator = torch.Generator().manual_seed(2)
    seconds: dict[str, list[float]] = {"delta": [], "full": [], "torch.save": []}
    with (
        coordinator(state, folder / "delta", STAR) as delta,
        coordinator(state, folder / "full", OFF) as full,
    ):
        delta.save_checkpoint(step=0)
        for turn in range(rounds + 1):
            changed = change(state, SPARSE, generator)
            saves: dict[str, Callable[[], object]] = {
                "delta": partial(delta.save_checkpoint, step=turn + 1),
                "full": partial(full.save_checkpoint, step=turn + 1),
                "torch.save": partial(torch_save, state, folder / "state.pt"),
            }
            for name in order(list(saves), turn):
                took = seconds_of(saves[name])
                if turn:
                    seconds[name].append(took)
            shutil.rmtree(folder / "full" / f"checkpoint-{turn + 1}")
        change(state, SPARSE, generator)
        extra = peak_memory(lambda: delta.save_checkpoint(step=rounds + 2))
    stored = stored_in(folder / "delta" / f"checkpoint-{rounds + 1}")
    report.ratios["sparse_save_vs_full"] = paired(seconds["delta"], seconds["full"])
    report.ratios["sparse_save_vs_torch_save"] = paired(seconds["delta"], seconds["torch.save"])
    report.ratios["sparse_stored_vs_changed"] = ratio([stored / changed])
    report.memory("sparse_save", extra, size_bytes + SLACK_BYTES)
    report.tables.append(spread_table(f"sparse, {size_bytes // MB} MB", seconds, size_bytes))


def long(kind: str, size_bytes: int, rounds: int, folder: Path, every: int, report: Report) -> None:
    """Ten deltas, between which every `every`th tensor changes, and loads of the last."""
    state = make_state(size_bytes, seed=3, layers=LAYERS)
    generator = torch.Generator().manual_seed(4)
    with coordinator(state, folder / kind, RULES[kind]) as one:
        for step in range(LINKS):
            one.save_checkpoint(step=step)
            change(state, every, generator)
        extra = peak_memory(lambda: one.save_checkpoint(step=LINKS))
        report.memory(f"{kind}_save", extra, size_bytes + SLACK_BYTES)
        want = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
        last = f"delta {LINKS}"
        refs = {"anchor": "main@0", last: f"main@{LINKS}"}
        seconds: dict[str, list[float]] = {f"{name}{cold}": [] for name in refs for cold in COLD}
        for turn in range(rounds + 1):
            for side in order(list(seconds), turn):
                name = side.removesuffix(COLD[1])
                (read_all if name == side else drop_cached)(folder / kind)
                took = seconds_of(partial(one.load_checkpoint, refs[name]))
                if turn:
                    seconds[side].append(took)
        report.memory(
            f"{kind}_load", peak_memory(partial(one.load_checkpoint, refs[last])), SLACK_BYTES
        )
    if not all(torch.equal(tensors_of(state)[name], want[name]) for name in want):
        raise SystemExit("what was loaded is not what was saved")
    report.figures[f"{kind}: stored MB of delta {LINKS}"] = round(
        stored_in(folder / kind / f"checkpoint-{LINKS}") / 1e6, 1
    )
    for cold in COLD:
        found = paired(seconds[f"{last}{cold}"], seconds[f"anchor{cold}"])
        report.ratios[f"{kind}_load{cold.replace(', ', '_')}_vs_anchor"] = found
    report.tables.append(spread_table(f"{kind}, {size_bytes // MB} MB", seconds, size_bytes))


def stored_in(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--size-mb", type=int, help="MB of state; 1100, or 192 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds that count; 7, or 3 with --quick")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="writes below this folder")
    arguments = parser.parse_args()
    size_mb = arguments.size_mb or (192 if arguments.quick else 1100)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    kernels.warm()
    report = Report()
    report.figures |= {"state, MB": size_mb, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="ckptcoord-bench-", dir=arguments.dir) as name:
        folder = Path(name)
        sparse(size_mb * MB, rounds, folder, report)
        for kind in RULES:
            every = SPARSE if kind == "sparse_chain" else 1
            long(kind, size_mb * MB // 4, rounds, folder, every, report)
    emit(
        "incremental",
        report.ratios,
        report.figures,
        as_json=arguments.json,
        tables=report.tables,
    )


if __name__ == "__main__":
    main()
