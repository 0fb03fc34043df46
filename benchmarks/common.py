"""What the benchmarks share: options, interleaved rounds, paired ratios, tables and JSON.

A benchmark compares sides. Each round runs every side once, in an order shuffled anew, and each
ratio is that of two sides within one round: on a shared machine a disk or a core that is slow for
a minute then slows both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Ratio: TypeAlias = dict[str, float | int]
Figure: TypeAlias = float | int | str


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; the first line of `doc` describes it."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, within a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def order(sides: Sequence[str], turn: int) -> list[str]:
    """The sides in the order of a round: shuffled by its number, the same on all ranks.

    What a side leaves behind (warm pages, or none) helps or hurts whoever comes next.
    """
    turned = sorted(sides)
    random.Random(turn).shuffle(turned)
    return turned


def ratio(values: Sequence[float]) -> Ratio:
    """The figures of one ratio, as every benchmark's `ratios` gives them."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of two sides, round by round."""
    return ratio([our / their for our, their in zip(ours, theirs, strict=True)])


def best_of(seconds: Mapping[str, Sequence[float]], sides: Sequence[str]) -> str:
    """The side with the lowest median."""
    return min(sides, key=lambda side: (statistics.median(seconds[side]), side))


def emit(
    benchmark: str,
    ratios: Mapping[str, Ratio],
    figures: Mapping[str, Figure],
    *,
    as_json: bool,
    tables: Sequence[Table] = (),
) -> None:
    """Print the report: one JSON object, or the tables, the figures and the ratios."""
    if as_json:
        report = {"benchmark": benchmark, "ratios": dict(ratios), "figures": dict(figures)}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    console = Console()
    for table in tables:
        console.print(table)
    table = Table("figure", "value", title=benchmark)
    table.columns[1].justify = "right"
    for name, value in figures.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console.print(table)
    table = Table("ratio (less is better)", "median", "min", "max", "runs")
    for name, one in ratios.items():
        table.add_row(name, *(str(one[part]) for part in ("median", "min", "max", "runs")))
    console.print(table)


def spread_table(title: str, seconds: Mapping[str, Sequence[float]], size_bytes: int) -> Table:
    """Every side's seconds and its speed at the median."""
    table = Table("side", "median s", "min s", "max s", "GB/s", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for side, values in seconds.items():
        median = statistics.median(values)
        shown = (median, min(values), max(values), size_bytes / median / 1e9)
        table.add_row(side, *(f"{value:.3f}" for value in shown))
    return table
